"""The public ops, from logits and from hidden states: check, choose a backend, call."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fused_tdpo._backends import choose_backend
from fused_tdpo._checks import (
    LINEAR_ORDER,
    as_divergence,
    check_chunks,
    check_extras,
    check_hidden,
    check_labels_in_range,
    check_options,
    check_token_stats,
    check_valid_rows,
    check_vocab_size,
    describe,
    looks_at_labels,
)
from fused_tdpo._chunks import rows_per_chunk
from fused_tdpo._projection import row_bytes
from fused_tdpo.functions.linear_token_stats import LinearOptions, LinearTokenStatsFunction, no_autocast
from fused_tdpo.functions.token_stats import TokenStatsFunction, stat_names
from fused_tdpo.heads import LMHead
from fused_tdpo.reference import linear_token_stats_reference, token_stats_reference
from fused_tdpo.types import Divergence, TokenStats


def token_stats(
    policy_logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    divergence: str = "forward_kl",
    divergence_alpha: float | None = None,
    extras: Sequence[str] = (),
    inplace_backward: bool = False,
    check_labels: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Per-token log-prob of the label under policy and reference, and KL(ref || policy), in one pass over the logits.

    With p = softmax(policy_logits / temperature), q = softmax(ref_logits / temperature) over the vocabulary and y the label
    of a row: logp = log p(y), ref_logp = log q(y), kl = sum over v of q(v) (log q(v) - log p(v)). Forward reads each logit
    once and writes a few numbers a row; backward reads each once and writes the gradient once. No tensor of full-vocabulary
    width is made besides that gradient.

    Args:
        policy_logits: (..., V) float16, bfloat16, float32, or float64 (not for Triton). Any strides with contiguous columns are
            read in place. Receives the gradients of `logp` and `kl`.
        ref_logits: (..., V) of any of these dtypes, or None. Never receives a gradient: it is treated as detached even where it
            requires grad.
        labels: (...) int64 or int32, aligned: `labels[i]` is the token that `policy_logits[i]` predicts; nothing is shifted.
        ignore_index: label of the rows to skip. They are not read, and every output and gradient of theirs is exactly 0, even
            where their logits hold NaN.
        temperature: divides the logits of both models, > 0.
        vocab_size: use columns [0, vocab_size) of both; the gradient elsewhere is 0. Needed where the widths differ.
        divergence: what `kl` holds: `"forward_kl"`, KL(q || p), which is TDPO's (arXiv 2404.11999, definition 4.3);
            `"reverse_kl"`, KL(p || q); `"js"`, (KL(q || m) + KL(p || m)) / 2 with m = (p + q) / 2; or `"alpha"`,
            (sum of p^a q^(1-a) - 1) / (a (a - 1)). Forward reads each logit twice for the last two. Where one other than
            KL(q || p) is infinite, its gradient is NaN.
        divergence_alpha: a, a finite number, for `"alpha"`; 0 is KL(q || p), 1 is KL(p || q).
        extras: further `TokenStats` fields to fill: any of `"entropy"`, `"ref_entropy"`, `"accuracy"`, `"mean_logit"`,
            `"log_sum_sq_probs"`. From the same pass, without gradients.
        inplace_backward: let backward write the gradient over `policy_logits`, so that no second (..., V) tensor exists.
            Autograd notices: a second backward, or a producer that needs its output (an activation such as tanh), raises. A
            leaf tensor, or a slice of a larger tensor of logits, makes autograd itself allocate the gradient after all: pass
            the model's whole output and mask labels instead.
        check_labels: raise for labels out of range on every device; on a GPU this synchronises. Without it, the CPU backends
            raise all the same, and on a GPU such a row's logp, ref_logp, kl and gradient are NaN.
        backend: `"triton"` (GPU tensors, or CPU tensors under Triton's interpreter), `"torch"` (any device, a bounded number of
            rows at a time), `"reference"` (the specification, with full-width tensors), or `"auto"`: Triton on a GPU, torch
            elsewhere.

    Returns:
        TokenStats; every field has labels' shape and is float32, or float64 where logits are.

    Raises:
        TypeError: a dtype that is not taken. ValueError: shapes, devices or options that do not fit, labels out of range.
        RuntimeError: backend="triton" without triton; a double backward.
    """
    V = check_token_stats(policy_logits, ref_logits, labels, temperature, vocab_size, divergence, divergence_alpha, extras)
    dtypes = (policy_logits.dtype,) if ref_logits is None else (policy_logits.dtype, ref_logits.dtype)
    name, _ = choose_backend(backend, policy_logits.device.type, dtypes)
    check_labels = looks_at_labels(check_labels, labels, name)

    if name == "reference":
        if inplace_backward:
            raise ValueError(
                "backend='reference' leaves backward to autograd, which cannot write over the logits: use backend='torch', "
                "'triton' or 'auto', or leave inplace_backward off"
            )
        if check_labels:
            check_labels_in_range(labels, V, ignore_index)
        return token_stats_reference(
            policy_logits, ref_logits, labels, ignore_index=ignore_index, temperature=temperature, vocab_size=V,
            divergence=divergence, divergence_alpha=divergence_alpha, extras=extras,
        )  # fmt: skip

    if inplace_backward and any(
        size > 1 and stride == 0 for size, stride in zip(policy_logits.shape, policy_logits.stride(), strict=True)
    ):
        raise ValueError(
            f"inplace_backward needs rows of their own, and policy_logits is expanded: strides {policy_logits.stride()}. "
            "Call .contiguous(), or leave inplace_backward off."
        )
    names = stat_names(ref_logits is not None, ",".join(extras))
    stats = TokenStatsFunction.apply(
        policy_logits,
        None if ref_logits is None else ref_logits.detach(),
        labels,
        V,
        ignore_index,
        float(temperature),
        ",".join(extras),
        check_labels,
        inplace_backward,
        name,
        as_divergence(divergence, divergence_alpha),
    )
    return TokenStats(**dict(zip(names, stats, strict=True)))


class LinearInputs(NamedTuple):
    """Hidden states and heads that have been checked against each other."""

    policy: LMHead
    ref: LMHead | None
    V: int
    """Columns to use."""
    dtype: torch.dtype
    """Of the policy's products."""
    ref_dtype: torch.dtype | None


def linear_inputs(
    policy_hidden: Tensor,
    policy_head: Tensor | LMHead,
    ref_hidden: Tensor | None,
    ref_head: Tensor | LMHead | None,
    labels: Tensor,
    vocab_size: int | None,
) -> LinearInputs:
    """Everything about the tensors of the hidden level that can be refused without looking at values."""
    policy = as_head("policy_head", policy_head)
    dtype = check_hidden("policy_hidden", policy_hidden, "policy_head", policy.weight, labels)
    if (ref_hidden is None) != (ref_head is None):
        raise ValueError(
            f"ref_hidden and ref_head go together: pass both, or None for both; got {describe(ref_hidden)} and "
            f"{describe(ref_head)}. {LINEAR_ORDER}"
        )
    ref, ref_dtype = None, None
    if ref_hidden is not None and ref_head is not None:
        ref = as_head("ref_head", ref_head)
        ref_dtype = check_hidden("ref_hidden", ref_hidden, "ref_head", ref.weight, labels)
        if ref_hidden.device != policy_hidden.device:
            raise ValueError(
                f"ref_hidden must be on the device of policy_hidden, {policy_hidden.device}; got {describe(ref_hidden)}"
            )
    for name, head in (("policy_head", policy), ("ref_head", ref)):
        if head is not None and None not in (head.vocab_size, vocab_size) and head.vocab_size != vocab_size:
            raise ValueError(
                f"vocab_size is {vocab_size}, but that of {name} is {head.vocab_size}: set it once, or to the same number"
            )
    V = check_vocab_size(policy.width, None if ref is None else ref.width, vocab_size, ("policy_head", "ref_head"))
    return LinearInputs(policy, ref, V, dtype, ref_dtype)


def as_head(name: str, head: object) -> LMHead:
    """A weight as an `LMHead`, or such a one as it is."""
    if isinstance(head, Tensor):
        if head.dim() != 2:
            raise ValueError(f"{name} must be a weight (V, D), or an LMHead; got {describe(head)}. {LINEAR_ORDER}")
        head = LMHead(head)
    if not isinstance(head, LMHead):
        hint = " Of a linear layer, pass LMHead(layer.weight, layer.bias)." if isinstance(head, nn.Module) else ""
        raise TypeError(f"{name} must be a weight (V, D), or an LMHead; got {type(head).__name__}.{hint} {LINEAR_ORDER}")
    if any(hasattr(tensor, "full_tensor") for tensor in (head.weight, head.bias)):
        raise TypeError(
            f"{name} must be whole on one device; got a DTensor, {describe(head.weight)}. Pass its full_tensor(), through "
            "which gradients return to the shards: dataclasses.replace(head, weight=head.weight.full_tensor())."
        )
    return head


def linear_token_stats(
    policy_hidden: Tensor,
    policy_head: Tensor | LMHead,
    ref_hidden: Tensor | None,
    ref_head: Tensor | LMHead | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    divergence: str = "forward_kl",
    divergence_alpha: float | None = None,
    extras: Sequence[str] = (),
    inplace_backward: bool = False,
    check_labels: bool = False,
    backend: str = "auto",
    max_chunk_bytes: int | None = None,
    logits_dtype: torch.dtype | None = None,
    valid_rows: int | None = None,
) -> TokenStats:
    """The statistics of `token_stats`, straight from hidden states: logits exist for one chunk of rows at a time, never whole.

    Rows whose label is ignored are dropped before any product. In units of 2·N·V·D operations, of the N rows that are left:
    forward 2; with a trained head backward makes the logits again, 4 more (3 if the KL gets no gradient); with a frozen one
    forward forms directions at once, 2 more (1 without a reference), and backward is none. Under no_grad 2.

    Args:
        policy_hidden: (..., D) what the head is applied to: the backbone's last hidden states. Any strides.
        policy_head: its head: a weight (V, D), or an `LMHead`. `policy_hidden`, weight and bias get a gradient each where they
            require one.
        ref_hidden, ref_head: the same of the reference, whose D and dtype may differ; or None for both. They never get a
            gradient; make them under `torch.no_grad()` (autograd refuses to save tensors of `torch.inference_mode()`). Where
            both models have one head, as with adapters, pass the same tensors: one product a chunk then serves both.
        labels: (...) int64 or int32, aligned: `labels[i]` is the token that `policy_hidden[i]` predicts; nothing is shifted.
        ignore_index, temperature, vocab_size, divergence, divergence_alpha, extras, check_labels, backend: as in `token_stats`.
            `vocab_size` must agree with an `LMHead`'s own.
        inplace_backward: without effect, since a chunk's logits are always overwritten; accepted so that calls may be shared.
        max_chunk_bytes: bound on all logit-sized buffers of both models together, at least one row; the default is 2,048 rows
            or D, if more, for a trained head, and 1,024 for a frozen one. Every chunk reads the head anew, so that fewer than
            some 200 rows make products slow. Outside it are N·D numbers for each direction, and for a trained head V·D float32
            numbers of its gradient. Under autocast a float32 head is cast whole, in forward and in backward.
        logits_dtype: torch.float32 keeps logits of half-precision products in float32, for an accurate KL near 0.
        valid_rows: how many labels are not `ignore_index`. Without it they are counted, which is the one synchronisation. Wrong
            numbers raise on a CPU, and give NaN on a GPU.

    Returns:
        TokenStats; every field has labels' shape and is float32, or float64 where the products are.

    Raises:
        TypeError: dtypes that are not taken or differ outside autocast. ValueError: shapes, devices or options that do not fit,
            labels out of range. RuntimeError: backend="triton" without triton; a double backward.
    """
    inputs = linear_inputs(policy_hidden, policy_head, ref_hidden, ref_head, labels, vocab_size)
    check_options(temperature, divergence, divergence_alpha)
    check_extras(extras, has_ref=inputs.ref is not None, ref="ref_hidden")
    check_chunks(max_chunk_bytes, logits_dtype)
    if valid_rows is not None and not (isinstance(valid_rows, int) and 0 <= valid_rows <= labels.numel()):
        raise ValueError(
            f"valid_rows must be the number of labels that are not ignored, at most {labels.numel()}; got {valid_rows!r}"
        )
    name, _ = choose_backend(backend, policy_hidden.device.type, (inputs.dtype, inputs.ref_dtype or inputs.dtype))
    return linear_stats(
        policy_hidden, ref_hidden, labels, inputs, ignore_index=ignore_index, temperature=temperature,
        divergence=as_divergence(divergence, divergence_alpha), extras=extras, check_labels=check_labels, backend=name,
        max_chunk_bytes=max_chunk_bytes, logits_dtype=logits_dtype, valid_rows=valid_rows,
    )  # fmt: skip


def linear_stats(
    policy_hidden: Tensor,
    ref_hidden: Tensor | None,
    labels: Tensor,
    inputs: LinearInputs,
    *,
    ignore_index: int,
    temperature: float,
    check_labels: bool,
    backend: str,
    max_chunk_bytes: int | None,
    logits_dtype: torch.dtype | None,
    valid_rows: int | None,
    divergence: Divergence,
    extras: Sequence[str] = (),
    kl_gradient: bool = True,
) -> TokenStats:
    """`linear_token_stats` of checked inputs on a chosen backend. `kl_gradient=False` promises that nobody differentiates the
    KL, and saves a frozen head a unit."""
    policy, ref = inputs.policy, inputs.ref
    check_labels = looks_at_labels(check_labels, labels, backend)
    if backend == "reference":
        if check_labels:
            check_labels_in_range(labels, inputs.V, ignore_index)
        with no_autocast(labels):  # its casts are made by hand, since logits_dtype may undo them
            stats = linear_token_stats_reference(
                policy_hidden.to(inputs.dtype), _cast(policy, inputs.dtype),
                None if ref_hidden is None else ref_hidden.to(inputs.ref_dtype), _cast(ref, inputs.ref_dtype), labels,
                ignore_index=ignore_index, temperature=temperature, vocab_size=inputs.V, divergence=divergence.name,
                divergence_alpha=divergence.alpha, extras=extras, logits_dtype=logits_dtype,
            )  # fmt: skip
        if valid_rows is not None:
            wrong = check_valid_rows((labels != ignore_index).sum(), valid_rows, ignore_index)
            poison = torch.where(wrong, float("nan"), 0.0)
            named = {name: stat + poison.to(stat.dtype) for name, stat in stats._asdict().items() if stat is not None}
            stats = TokenStats(**named)
        return stats
    both = ref is not None and kl_gradient
    options = linear_options(
        policy_hidden, inputs, ignore_index=ignore_index, temperature=temperature, divergence=divergence, backend=backend,
        logits_dtype=logits_dtype, max_chunk_bytes=max_chunk_bytes, both=both,
    )  # fmt: skip
    stats = LinearTokenStatsFunction.apply(
        policy_hidden.reshape(-1, policy_hidden.shape[-1]),
        policy.weight,
        policy.bias,
        None if ref_hidden is None else ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        None if ref is None else ref.weight.detach(),
        None if ref is None or ref.bias is None else ref.bias.detach(),
        labels.flatten(),
        options,
        ",".join(extras),
        check_labels,
        -1 if valid_rows is None else valid_rows,
        kl_gradient,
        torch.is_grad_enabled(),
    )
    names = stat_names(ref is not None, ",".join(extras))
    return TokenStats(**{name: stat.view(labels.shape) for name, stat in zip(names, stats, strict=True)})


def _cast(head: LMHead | None, dtype: torch.dtype | None) -> LMHead | None:
    if head is None or dtype is None or head.weight.dtype == dtype:
        return head
    return replace(head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))


def linear_options(
    policy_hidden: Tensor,
    inputs: LinearInputs,
    *,
    ignore_index: int,
    temperature: float,
    divergence: Divergence,
    backend: str,
    max_chunk_bytes: int | None,
    logits_dtype: torch.dtype | None,
    both: bool,
) -> LinearOptions:
    """What is static in a call. `both`: a frozen head's directions of logp and of kl are wanted."""
    policy, ref, V, dtype, ref_dtype = inputs
    recorded = torch.is_grad_enabled()
    trained = recorded and any(t is not None and t.requires_grad for t in (policy.weight, policy.bias))
    bytes_of_row = row_bytes(V, dtype, ref_dtype, logits_dtype, both and recorded and not trained)
    return LinearOptions(
        scale=policy.scale,
        softcap=policy.softcap or 0.0,
        ref_scale=1.0 if ref is None else ref.scale,
        ref_softcap=0.0 if ref is None else ref.softcap or 0.0,
        V=V,
        ignore_index=ignore_index,
        temperature=float(temperature),
        dtype=dtype,
        ref_dtype=ref_dtype or dtype,
        logits_dtype=logits_dtype,
        rows=rows_per_chunk(bytes_of_row, policy_hidden.shape[-1], trained, max_chunk_bytes),
        backend=backend,
        divergence=divergence.name,
        alpha=divergence.alpha,
    )
