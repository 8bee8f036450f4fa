"""The specification: what the fused kernels must compute, written as plainly as the paper. torch only, any float dtype.

Nothing here is fast or small. Tests, benchmarks and `backend="reference"` use this one function as their oracle, in float64
where they need the truth. With p = softmax(policy / temperature) and q = softmax(ref / temperature) of one row:

    logp = log p(y)      ref_logp = log q(y)      kl = KL(q || p) = sum_v q(v) (log q(v) - log p(v)), or another divergence

Conventions: q(v) = 0 contributes 0 to KL(q || p) whatever log p(v) is; q(v) > 0 with p(v) = 0 makes it +inf; other divergences
take their limits alike, and an infinite one has no gradient: it is NaN in that row, but for KL(q || p), whose p - q is finite.
A row whose label is `ignore_index` gives exactly 0 everywhere, and a zero gradient, even where its logits hold NaN.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_tdpo.types import TokenStats


def token_stats_reference(
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
) -> TokenStats:
    """Per-token statistics by `log_softmax` over full-vocabulary tensors; gradients by autograd.

    Args:
        policy_logits: (..., V) float tensor; float16 and bfloat16 are computed in float32.
        ref_logits: (..., V) float tensor of any float dtype, or None. Receives no gradient.
        labels: (...) int64 or int32; `labels[i]` is the token that `policy_logits[i]` predicts.
        ignore_index: label of the rows to skip.
        temperature: divides the logits of both models.
        vocab_size: use columns [0, vocab_size) of both; None uses the policy's width.
        divergence, divergence_alpha: what `kl` holds: see `divergence_reference`.
        extras: names of further `TokenStats` fields.

    Returns:
        `TokenStats` of shape `labels.shape`. A label outside [0, vocab_size) gives NaN; checking labels is the caller's.
    """
    V = policy_logits.shape[-1] if vocab_size is None else vocab_size
    ignored = labels == ignore_index
    valid = (labels >= 0) & (labels < V)
    y = labels.long().where(valid, 0).unsqueeze(-1)

    def logits_of(logits: Tensor) -> Tensor:  # (..., V), at least float32
        logits = logits[..., :V].to(torch.promote_types(logits.dtype, torch.float32))
        return logits.masked_fill(ignored.unsqueeze(-1), 0.0)  # selects: NaN and its gradient do not pass

    def finish(stat: Tensor, needs_label: bool = False) -> Tensor:
        if needs_label:
            stat = stat.masked_fill(~valid, float("nan"))
        return stat.masked_fill(ignored, 0.0)

    def entropy_of(logprobs: Tensor) -> Tensor:
        probs = logprobs.exp()
        return -torch.where(probs > 0, probs * logprobs, 0.0).sum(-1)

    x = logits_of(policy_logits)
    log_p = torch.log_softmax(x / temperature, -1)
    stats = {"logp": finish(log_p.gather(-1, y).squeeze(-1), needs_label=True)}

    if ref_logits is not None:
        log_q = torch.log_softmax(logits_of(ref_logits.detach()) / temperature, -1)
        stats["kl"] = finish(divergence_reference(log_p, log_q, divergence, divergence_alpha), needs_label=True)
        stats["ref_logp"] = finish(log_q.gather(-1, y).squeeze(-1), needs_label=True)

    for name in extras:
        if name == "entropy":
            stat = entropy_of(log_p)
        elif name == "ref_entropy":
            stat = entropy_of(log_q)
        elif name == "accuracy":
            stat = (x.argmax(-1, keepdim=True) == y).squeeze(-1).to(x.dtype)
        elif name == "mean_logit":
            stat = x.mean(-1)
        elif name == "log_sum_sq_probs":
            stat = torch.logsumexp(2 * log_p, -1)
        else:
            raise ValueError(f"unknown extra {name!r}")
        stats[name] = finish(stat.detach(), needs_label=name == "accuracy")
    return TokenStats(**stats)


def divergence_reference(log_p: Tensor, log_q: Tensor, divergence: str, alpha: float | None = None) -> Tensor:
    """The divergence of distributions (..., V), given their logarithms, by its name:

    "forward_kl" KL(q || p), "reverse_kl" KL(p || q), "js" (KL(q || m) + KL(p || m)) / 2 with m = (p + q) / 2, and "alpha"
    (sum_v p^a q^(1-a) - 1) / (a (a - 1)), whose limits are KL(q || p) at a = 0 and KL(p || q) at a = 1.
    """
    if divergence == "alpha" and alpha in (0, 1):
        divergence = "reverse_kl" if alpha else "forward_kl"
    q = log_q.exp()
    if divergence == "forward_kl":
        return torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:  # selects twice, so that no gradient of 0·log 0 passes
        counts = log_a.exp() != 0
        return (log_a.exp() * torch.where(counts, log_a - log_b, 0.0)).where(counts, 0.0).sum(-1)

    if divergence == "reverse_kl":
        return kl(log_p, log_q)
    absent = torch.maximum(log_p, log_q) == float("-inf")
    present_p, present_q = log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)
    if divergence == "js":
        log_m = torch.logaddexp(present_p, present_q) - math.log(2)
        return (kl(log_q, log_m) + kl(log_p, log_m)) / 2
    if divergence == "alpha" and alpha is not None:
        powers = torch.exp(alpha * present_p + (1 - alpha) * present_q).masked_fill(absent, 0.0)
        return (powers.sum(-1) - 1) / (alpha * (alpha - 1))
    raise ValueError(f"unknown divergence {divergence!r} with divergence_alpha={alpha!r}")


def linear_token_stats_reference(
    policy_hidden: Tensor,
    policy_head: Any,
    ref_hidden: Tensor | None,
    ref_head: Any,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    divergence: str = "forward_kl",
    divergence_alpha: float | None = None,
    extras: Sequence[str] = (),
    logits_dtype: torch.dtype | None = None,
) -> TokenStats:
    """The same from hidden states: whole logits, softcap(scale·(h Wᵀ + b)), then `token_stats_reference`; by autograd.

    Args:
        policy_hidden: (..., D) float tensor. ref_hidden: the same of the reference, or None; receives no gradient.
        policy_head, ref_head: `LMHead`s; the reference's may be None.
        labels, ignore_index, temperature, vocab_size, divergence, divergence_alpha, extras: as in `token_stats_reference`.
        logits_dtype: dtype of the products and logits; None: the wider one of hidden states and head.

    Returns:
        `TokenStats` of shape `labels.shape`.
    """
    ignored = (labels == ignore_index).unsqueeze(-1)

    def logits_of(hidden: Tensor, head: Any) -> Tensor:  # (..., V)
        hidden = hidden.masked_fill(ignored, 0.0)  # selects: NaN reaches neither logits nor the gradient of the head
        if vocab_size is not None:
            head = replace(head, vocab_size=vocab_size)
        return head.logits(hidden if logits_dtype is None else hidden.to(logits_dtype))

    ref_logits = None
    if ref_hidden is not None:
        with torch.no_grad():
            ref_logits = logits_of(ref_hidden, ref_head)
    return token_stats_reference(
        logits_of(policy_hidden, policy_head),
        ref_logits,
        labels,
        ignore_index=ignore_index,
        temperature=temperature,
        divergence=divergence,
        divergence_alpha=divergence_alpha,
        extras=extras,
    )
