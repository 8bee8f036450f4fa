"""Oracles for the losses, and the small batches they are compared on. torch only; independent of `fused_tdpo`.

Two derivations of the same numbers, on a model's ordinary unshifted labels:

* `official_tdpo`: the data flow of the authors' code, told again: shift both models' logits, mask, policy `log_softmax`,
  reference `softmax().log()`, gather, multiply by the mask, sum. It runs in the dtype it is handed (they cast to float32, we
  hand it float64) and inherits the original's weakness: a reference probability that underflows makes 0 * (-inf) = NaN.
* `expected_sums` and `effective_ratios`: the same mathematics with `log_softmax` on both sides and terms *selected* instead of
  multiplied, plus what the original has not: token weights and temperature.

Sequences are stacked chosen first, then rejected: S = 2P.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100

# --- the official code ------------------------------------------------------------------------------------------------------


class Official(NamedTuple):
    """What the official trainer computes and logs for one batch. (P,) each, except `loss`."""

    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_kl: Tensor
    rejected_kl: Tensor


def official_batch_sums(
    policy: Tensor, ref: Tensor, labels: Tensor, *, average_log_prob: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(S,) each: log-ratio sum, sequential KL(ref || policy), policy log-prob sum; or their means over the counted tokens."""
    targets = labels[:, 1:].clone()  # position t is predicted by the logits of position t - 1
    policy, ref = policy[:, :-1], ref[:, :-1]
    mask = targets != IGNORE
    targets[~mask] = 0  # any valid index: multiplied by 0 below

    policy_logprobs = policy.log_softmax(-1)
    ref_probs = ref.softmax(-1)
    ref_logprobs = ref_probs.log()  # -inf once a probability underflows
    kl_rows = (ref_probs * (ref_logprobs - policy_logprobs)).sum(-1)
    policy_rows = torch.gather(policy_logprobs, 2, targets[..., None])[..., 0]
    ref_rows = torch.gather(ref_logprobs, 2, targets[..., None])[..., 0]

    def over_tokens(rows: Tensor) -> Tensor:
        total = (rows * mask).sum(-1)
        return total / mask.sum(-1) if average_log_prob else total

    return over_tokens(policy_rows - ref_rows), over_tokens(kl_rows), over_tokens(policy_rows)


def official_tdpo(
    policy: Tensor,
    ref: Tensor,
    labels: Tensor,
    *,
    beta: float,
    alpha: float,
    tdpo2: bool,
    average_log_prob: bool = False,
) -> Official:
    """Loss and logged quantities of the authors' trainer; rewards are beta * (ratio + KL) for both variants, without alpha."""
    ratio, kl, logps = official_batch_sums(policy, ref, labels, average_log_prob=average_log_prob)
    (ratio_w, ratio_l), (kl_w, kl_l), (logps_w, logps_l) = ratio.chunk(2), kl.chunk(2), logps.chunk(2)
    gap = alpha * (kl_l - kl_w.detach()) if tdpo2 else kl_l - kl_w
    losses = -F.logsigmoid(beta * ((ratio_w - ratio_l) - gap))
    return Official(
        loss=losses.mean(),
        losses=losses.detach(),
        chosen_rewards=beta * (ratio_w + kl_w).detach(),
        rejected_rewards=beta * (ratio_l + kl_l).detach(),
        chosen_logps=logps_w.detach(),
        rejected_logps=logps_l.detach(),
        chosen_kl=kl_w.detach(),
        rejected_kl=kl_l.detach(),
    )


# --- the same mathematics, safe at -inf, and wider --------------------------------------------------------------------------


class Sums(NamedTuple):
    """(S,) each: policy and reference log-prob sums, their (weighted) difference, (weighted) KL sum, counted tokens."""

    logps: Tensor
    ref_logps: Tensor
    ratio: Tensor
    kl: Tensor
    lengths: Tensor


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(..., V) log-probs of policy and reference -> (...) KL(q || p) in nats. A term whose q is 0 is 0."""
    q = log_q.exp()
    live = q > 0
    return torch.where(live, q * torch.where(live, log_q - log_p, 0.0), 0.0).sum(-1)


def expected_sums(
    policy: Tensor,
    ref: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE,
    temperature: float = 1.0,
    token_weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
) -> Sums:
    """Sequence sums of (S, T, V) logits. A weight belongs to the label of the same position and is shifted with it."""
    dtype = torch.float64
    mask = labels[:, 1:] != ignore_index
    keep = mask[..., None]
    log_p = torch.where(keep, policy[:, :-1].to(dtype), 0.0).div(temperature).log_softmax(-1)
    log_q = torch.where(keep, ref.detach()[:, :-1].to(dtype), 0.0).div(temperature).log_softmax(-1)
    y = torch.where(mask, labels[:, 1:].long(), 0)[..., None]
    logp, ref_logp = log_p.gather(-1, y)[..., 0], log_q.gather(-1, y)[..., 0]
    kl = kl_rows(log_p, log_q)

    def over_tokens(rows: Tensor, weights: Tensor | None = None) -> Tensor:
        if weights is not None:
            rows = rows * weights[:, 1:].to(dtype)
        return torch.where(mask, rows, 0.0).sum(-1)

    return Sums(
        logps=over_tokens(logp),
        ref_logps=over_tokens(ref_logp),
        ratio=over_tokens(logp - ref_logp, token_weights),
        kl=over_tokens(kl, kl_weights),
        lengths=mask.sum(-1).to(dtype),
    )


def effective_ratios(sums: Sums, *, variant: str, alpha: float, average: bool = False) -> tuple[Tensor, Tensor]:
    """(P,), (P,): the log-ratios that make TDPO a DPO. `variant="dpo"` is plain DPO.

    TDPO1 adds K on both sides. TDPO2 adds alpha * K, and the chosen side's K is a constant for the gradient.
    """
    scale = 1 / sums.lengths.clamp(min=1) if average else torch.ones_like(sums.lengths)
    (ratio_w, ratio_l), (kl_w, kl_l) = (sums.ratio * scale).chunk(2), (sums.kl * scale).chunk(2)
    if variant == "dpo":
        return ratio_w, ratio_l
    if variant == "tdpo1":
        return ratio_w + kl_w, ratio_l + kl_l
    if variant == "tdpo2":
        return ratio_w + alpha * kl_w.detach(), ratio_l + alpha * kl_l
    raise AssertionError(variant)


def pair_losses(loss_type: str, r_w: Tensor, r_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float, smoothing: float) -> Tensor:
    """(P,) losses of effective log-ratios and counted tokens. IPO divides by length, as TRL does."""

    def log_sigmoid(z: Tensor) -> Tensor:
        return -torch.logaddexp(torch.zeros_like(z), -z)

    z = beta * (r_w - r_l)
    if loss_type == "sigmoid":  # cDPO: a share `smoothing` of the pairs is labelled the wrong way round
        return -(1 - smoothing) * log_sigmoid(z) - smoothing * log_sigmoid(-z)
    if loss_type == "robust":  # the unbiased version of the same
        return (-(1 - smoothing) * log_sigmoid(z) + smoothing * log_sigmoid(-z)) / (1 - 2 * smoothing)
    if loss_type == "hinge":
        return torch.where(z < 1, 1 - z, 0.0)
    if loss_type == "ipo":
        return (r_w / n_w.clamp(min=1) - r_l / n_l.clamp(min=1) - 1 / (2 * beta)) ** 2
    raise AssertionError(loss_type)


# --- batches ----------------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """policy, ref (S, T, V); labels (S, T), -100 on prompt, holes and padding; lengths: real positions of each sequence."""

    policy: Tensor
    ref: Tensor
    labels: Tensor
    lengths: tuple[int, ...]

    def packed(self) -> "Batch":
        """The same rows without padding: (total, V), (total, V), (total,)."""
        return Batch(*(self.pack(x) for x in self[:3]), self.lengths)

    def pack(self, x: Tensor) -> Tensor:
        """(S, T, ...) -> (total, ...), a tensor of its own."""
        return torch.cat([row[:n] for row, n in zip(x, self.lengths, strict=True)])

    def cu_seqlens(self, dtype: torch.dtype = torch.int32) -> Tensor:
        """(S + 1,) the boundaries of the packed sequences."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(dtype)


# (prompt, response) of four chosen sequences' pairs: uneven, no prompt (its first label has no logits to predict it), a
# response of one token, the longest sequence among the rejected ones.
UNEVEN = ((2, 3), (0, 4), (3, 1), (1, 5), (2, 2), (0, 3), (3, 4), (1, 1))


def make_batch(
    layout: Sequence[tuple[int, int]] = UNEVEN,
    V: int = 23,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    scale: float = 2.0,
    drift: float = 0.7,
    holes: float = 0.0,
    padding: int = 0,
    garbage: float | None = None,
) -> Batch:
    """A seeded batch. `drift` is how far policy and reference are apart; `holes` the share of ignored response tokens;
    `padding` columns of extra right padding; `garbage` what the logits hold where no label uses them (noise by default)."""
    gen = torch.Generator().manual_seed(seed)
    S, T = len(layout), max((prompt + response for prompt, response in layout), default=1) + padding

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    ref = scale * normal(S, T, V)
    policy = ref + drift * normal(S, T, V)
    labels = torch.randint(0, V, (S, T), generator=gen)
    keep = torch.rand((S, T), generator=gen) >= holes
    for s, (prompt, response) in enumerate(layout):
        keep[s, :prompt] = False
        keep[s, prompt + response :] = False
    labels = labels.where(keep, IGNORE)
    if garbage is not None:
        unused = torch.ones(S, T, 1, dtype=torch.bool)
        unused[:, :-1, 0] = labels[:, 1:] == IGNORE
        policy, ref = policy.masked_fill(unused, garbage), ref.masked_fill(unused, garbage)
    return Batch(policy.to(dtype), ref.to(dtype), labels, tuple(prompt + response for prompt, response in layout))


def value_and_grad(loss: Callable[[Tensor], object], at: Tensor) -> tuple[object, Tensor]:
    """Calls `loss` on a fresh leaf holding `at`; returns what it returned and d(its .loss, or itself) / d(leaf)."""
    leaf = at.detach().clone().requires_grad_()
    out = loss(leaf)
    (grad,) = torch.autograd.grad(getattr(out, "loss", out), leaf)
    return out, grad
