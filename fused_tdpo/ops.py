"""The public op: check, choose a backend, call."""

from collections.abc import Sequence

from torch import Tensor

from fused_tdpo._backends import choose_backend
from fused_tdpo._checks import check_labels_in_range, check_token_stats
from fused_tdpo.functions import PAIR_STATS, POLICY_STATS, TokenStatsFunction
from fused_tdpo.reference import token_stats_reference
from fused_tdpo.types import TokenStats


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
        divergence: `"forward_kl"`, KL(q || p), which is TDPO's (arXiv 2404.11999, definition 4.3).
        divergence_alpha: belongs to divergences of later versions; must be None.
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
    check_labels = check_labels or (labels.device.type == "cpu" and name != "triton")

    if name == "reference":
        if inplace_backward:
            raise ValueError(
                "backend='reference' leaves backward to autograd, which cannot write over the logits: use backend='torch', "
                "'triton' or 'auto', or leave inplace_backward off"
            )
        if check_labels:
            check_labels_in_range(labels, V, ignore_index)
        return token_stats_reference(
            policy_logits, ref_logits, labels, ignore_index=ignore_index, temperature=temperature, vocab_size=V, extras=extras
        )

    if inplace_backward and any(
        size > 1 and stride == 0 for size, stride in zip(policy_logits.shape, policy_logits.stride(), strict=True)
    ):
        raise ValueError(
            f"inplace_backward needs rows of their own, and policy_logits is expanded: strides {policy_logits.stride()}. "
            "Call .contiguous(), or leave inplace_backward off."
        )
    names = (*(POLICY_STATS if ref_logits is None else PAIR_STATS), *extras)
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
    )
    return TokenStats(**dict(zip(names, stats, strict=True)))
