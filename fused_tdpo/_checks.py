"""Checks of user input, on the host, before any launch. Messages say what was expected, what came, and the next step."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Real

import torch
from torch import Tensor

from fused_tdpo.types import DIVERGENCES, EXTRAS, REF_EXTRAS, Divergence

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32)
LINEAR_ORDER = "The order is (policy_hidden, policy_head, ref_hidden, ref_head, labels); a loss without a reference has three."


def describe(tensor: object) -> str:
    """`(4, 7, 32000) torch.bfloat16 on cuda:0`, or the type of what is not a tensor."""
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def check_logits(name: str, logits: Tensor) -> None:
    """A float tensor (..., V) with V >= 1 and contiguous columns."""
    if not isinstance(logits, Tensor) or logits.dtype not in LOGIT_DTYPES:
        hint = ""
        if isinstance(logits, Tensor) and logits.dtype in LABEL_DTYPES:
            hint = " This looks like labels: in the order of arguments they come after all logits."
        raise TypeError(
            f"{name} must be a float16, bfloat16, float32 or float64 tensor (..., V); got {describe(logits)}.{hint}"
        )
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{name} must have a vocabulary axis (..., V) with V >= 1; got {describe(logits)}")
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        raise ValueError(
            f"{name} must be contiguous along its last axis, the vocabulary, since rows are read in place; got strides "
            f"{logits.stride()} for {describe(logits)}. Call .contiguous(), or move the vocabulary last where it is made."
        )


def check_token_stats(
    policy_logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    temperature: float,
    vocab_size: int | None,
    divergence: str,
    divergence_alpha: float | None,
    extras: Sequence[str],
) -> int:
    """Everything that can be refused without looking at values. Returns V, the number of columns to use."""
    check_logits("policy_logits", policy_logits)
    if ref_logits is not None:
        check_logits("ref_logits", ref_logits)
    if not isinstance(labels, Tensor) or labels.dtype not in LABEL_DTYPES:
        hint = (
            " Are ref_logits and labels swapped?"
            if isinstance(labels, Tensor) and labels.dim() == policy_logits.dim()
            else " Call .long() on them."
            if isinstance(labels, Tensor)
            else ""
        )
        raise TypeError(f"labels must be an int64 or int32 tensor; got {describe(labels)}.{hint}")
    rows = policy_logits.shape[:-1]
    if labels.shape != rows:
        hint = ""
        if labels.shape == (*rows, 1):
            hint = " Call labels.squeeze(-1) first."
        elif labels.numel() == rows.numel():
            hint = f" Call labels.reshape({tuple(rows)}) first."
        elif labels.dim() and rows and labels.shape[-1] == rows[-1] + 1:
            hint = " token_stats never shifts: pass labels[..., 1:] with logits[..., :-1, :]."
        elif labels.dim() and rows and labels.shape[-1] == rows[-1] - 1:
            hint = " Pad rather than slice: F.pad(labels[..., 1:], (0, 1), value=-100) goes with whole logits."
        raise ValueError(
            f"labels must have shape {tuple(rows)} to match policy_logits {describe(policy_logits)}; "
            f"got {describe(labels)}.{hint}"
        )
    if ref_logits is not None and ref_logits.shape[:-1] != rows:
        raise ValueError(
            f"ref_logits must have the rows of policy_logits, {tuple(rows)}, before its vocabulary axis; got "
            f"{describe(ref_logits)} beside {describe(policy_logits)}"
            + (". DPO's losses take precomputed sums as ref_logps=..., with None here" if ref_logits.dim() == 1 else "")
        )
    for name, tensor in (("ref_logits", ref_logits), ("labels", labels)):
        if tensor is not None and tensor.device != policy_logits.device:
            raise ValueError(
                f"{name} must be on the device of policy_logits, {policy_logits.device}; got {describe(tensor)}. "
                f"Call {name}.to(policy_logits.device)."
            )
    V = check_vocab_size(policy_logits.shape[-1], None if ref_logits is None else ref_logits.shape[-1], vocab_size)
    check_options(temperature, divergence, divergence_alpha)
    check_extras(extras, has_ref=ref_logits is not None)
    return V


def check_options(temperature: float, divergence: str, divergence_alpha: float | None) -> None:
    """Options that do not depend on tensors."""
    if not (isinstance(temperature, (int, float)) and math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number > 0; got {temperature!r}")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(map(repr, DIVERGENCES))}; got {divergence!r}")
    if divergence != "alpha" and divergence_alpha is not None:
        raise ValueError(f"divergence_alpha belongs to divergence='alpha'; got {divergence_alpha!r} with {divergence!r}")
    if divergence == "alpha" and not (isinstance(divergence_alpha, (int, float)) and math.isfinite(divergence_alpha)):
        raise ValueError(
            f"divergence='alpha' needs divergence_alpha, a finite number: 0 is KL(ref || policy), 1 is KL(policy || ref); got "
            f"{divergence_alpha!r}"
        )


def as_divergence(divergence: str, divergence_alpha: float | None) -> Divergence:
    """Checked options as one thing, limits by their names."""
    if divergence_alpha is None:
        return Divergence(divergence)
    limits = {0: Divergence("forward_kl"), 1: Divergence("reverse_kl")}
    return limits.get(divergence_alpha, Divergence("alpha", float(divergence_alpha)))  # type: ignore[call-overload]


def check_vocab_size(
    policy_width: int,
    ref_width: int | None,
    vocab_size: int | None,
    names: tuple[str, str] = ("policy_logits", "ref_logits"),
) -> int:
    """The number of columns to use of a policy and a reference of these widths."""
    if vocab_size is None:
        if ref_width is not None and ref_width != policy_width:
            raise ValueError(
                f"{names[0]} and {names[1]} have different vocabulary widths, {policy_width} and {ref_width}. If one is "
                f"padded, pass vocab_size (at most {min(policy_width, ref_width)}), the number of real tokens."
            )
        return policy_width
    narrowest = policy_width if ref_width is None else min(policy_width, ref_width)
    if not 1 <= vocab_size <= narrowest:
        raise ValueError(
            f"vocab_size must be between 1 and the narrower vocabulary axis, {narrowest} (policy {policy_width}, "
            f"reference {ref_width}); got {vocab_size}"
        )
    return vocab_size


def check_extras(extras: Sequence[str], has_ref: bool, ref: str = "ref_logits") -> None:
    """Known names, each once, and a reference for those about it."""
    if isinstance(extras, str) or any(name not in EXTRAS for name in extras):
        raise ValueError(f"extras must be a sequence of names among {', '.join(map(repr, EXTRAS))}; got {extras!r}")
    if len(set(extras)) != len(extras):
        raise ValueError(f"extras names a field twice: {extras!r}")
    if not has_ref and any(name in REF_EXTRAS for name in extras):
        raise ValueError(f"extras {', '.join(map(repr, REF_EXTRAS))} need {ref}; got {ref}=None")


def looks_at_labels(check_labels: bool, labels: Tensor, backend: str) -> bool:
    """Whether labels out of range are looked for: on request, and where that costs nothing. Kernels mark such rows instead."""
    return check_labels or (labels.device.type == "cpu" and backend != "triton")


def check_labels_in_range(labels: Tensor, V: int, ignore_index: int) -> None:
    """Looks at values: synchronises with a GPU."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= V))
    if bad.any():
        index = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"labels must be ignore_index ({ignore_index}) or in [0, {V}); got {int(labels[index])} at index {index}, one of "
            f"{int(bad.sum())} such. Is ignore_index the one that your collator writes, and vocab_size the tokenizer's?"
        )


def check_hidden(name: str, hidden: Tensor, head_name: str, weight: Tensor, labels: Tensor) -> torch.dtype:
    """Hidden states (..., D) that go with a head (V, D) and with labels (...). Returns the dtype of their product.

    That is autocast's, where autocast is on and would cast a product of the two; else both must have one dtype.
    """
    if not isinstance(hidden, Tensor) or hidden.dtype not in LOGIT_DTYPES:
        raise TypeError(f"{name} must be a float16, bfloat16, float32 or float64 tensor (..., D); got {describe(hidden)}")
    if not isinstance(labels, Tensor) or labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels must be an int64 or int32 tensor; got {describe(labels)}. {LINEAR_ORDER}")
    V, D = weight.shape
    if hidden.dim() == 0 or hidden.shape[-1] != D:
        hint = ""
        if hidden.dim() and hidden.shape[-1] == V < D:
            hint = " Is the head transposed? It is (V, D), as nn.Linear's weight: pass .t()."
        elif hidden.dim() and hidden.shape[-1] == V:
            hint = f" {name} is as wide as the vocabulary: logits go to token_stats, or to TDPOLoss and DPOLoss."
        elif hidden.dim() == 2 and hidden.shape[0] == D:
            hint = f" Is the head transposed? It is (V, D), as nn.Linear's weight. Or are {name} and {head_name} swapped?"
        raise ValueError(
            f"{name} must be (..., D) with D = {D}, as {head_name} {describe(weight)} is (V, D); got {describe(hidden)}.{hint}"
        )
    if hidden.shape[:-1] != labels.shape:
        raise ValueError(
            f"{name} must have a row for each label, {(*labels.shape, D)}; got {describe(hidden)} beside labels "
            f"{describe(labels)}. {LINEAR_ORDER}"
        )
    for other, tensor in ((head_name, weight), ("labels", labels)):
        if tensor.device != hidden.device:
            raise ValueError(
                f"{other} must be on the device of {name}, {hidden.device}; got {describe(tensor)}. Move it there with .to()."
            )
    device = hidden.device.type
    autocast = not hidden.is_meta and torch.is_autocast_enabled(device)
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"{name} and {head_name} must have the same dtype outside autocast; got {hidden.dtype} and {weight.dtype}. Cast "
            "one of them, or call under torch.autocast."
        )
    return hidden.dtype


def check_chunks(max_chunk_bytes: int | None, logits_dtype: torch.dtype | None) -> None:
    """Options of the hidden level."""
    if max_chunk_bytes is not None and not (isinstance(max_chunk_bytes, int) and max_chunk_bytes > 0):
        raise ValueError(f"max_chunk_bytes must be a number of bytes > 0, or None; got {max_chunk_bytes!r}")
    if logits_dtype not in (None, torch.float32):
        raise ValueError(f"logits_dtype must be torch.float32, or None for the dtype of the products; got {logits_dtype!r}")


def check_valid_rows(counted: Tensor, valid_rows: int, ignore_index: int) -> Tensor:
    """Whether another number of labels counts than the caller said; on a CPU, where looking is free, it raises instead."""
    wrong = counted != valid_rows
    if wrong.device.type == "cpu" and wrong:
        raise ValueError(
            f"valid_rows must be the number of labels that are not ignore_index ({ignore_index}), {int(counted)}; got "
            f"{valid_rows}"
        )
    return wrong


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """One of `choices`."""
    if value not in tuple(choices):  # by equality: a value need not be hashable
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_number(name: str, value: object, fits: Callable[[float], bool], expected: str) -> None:
    """A finite real number that `fits`; `expected` says which does, in words."""
    if not (isinstance(value, Real) and math.isfinite(value) and fits(float(value))):
        raise ValueError(f"{name} must be a finite number {expected}; got {value!r}")


def check_like(name: str, tensor: Tensor | None, shape: tuple[int, ...], labels: Tensor) -> None:
    """Of a shape that goes with the labels, and on their device; or None."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.device != labels.device:
        raise ValueError(f"{name} must have shape {tuple(shape)} on {labels.device}, to go with labels; got {describe(tensor)}")
