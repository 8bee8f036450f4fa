"""From sums over sequences to losses of pairs: pure functions on vectors, each formula once, and tables of them by name.

    per sequence (S,) ──split──▶ chosen, rejected (P,) ──log-ratios──▶ Pairs ──PAIR_LOSSES──▶ losses (P,)

TDPO is DPO on *effective* log-ratios, which hold the sequential KL, so one table of pair losses serves both. Letters: P pairs,
S = 2P sequences; log-probabilities and KL in nats.
"""

from collections.abc import Callable
from math import inf, log, log1p
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SequenceSums(NamedTuple):
    """Per-token statistics summed over each sequence: (S,) of all sequences, or (P,) of the chosen or the rejected ones."""

    log_ratio: Tensor
    """ρ, the weighted sum of logp − ref_logp."""
    kl: Tensor | None
    """K, the weighted sum of the per-token divergence; None without a reference distribution."""
    logp: Tensor
    """Unweighted sum of the policy's logp."""
    num_tokens: Tensor
    """Number of tokens that a length-normalised loss divides by, at least 1; exactly 1 where the sums are means already,
    unless their number is needed to undo that."""
    log_sum_sq_probs: Tensor | None = None
    """Unweighted sum of the policy's log Σ p², for `use_weighting`."""
    ref_logp: Tensor | None = None
    """The reference's part of `log_ratio`, for "aot"."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "SequenceSums":
        """`function` of every field that exists."""
        return SequenceSums(*(None if total is None else function(total) for total in self))  # type: ignore[arg-type]

    def split(self, interleaved: bool = False) -> tuple["SequenceSums", "SequenceSums"]:
        """(chosen, rejected): the first and the second half, or even and odd sequences."""
        return self.map(lambda sums: split(sums, interleaved)[0]), self.map(lambda sums: split(sums, interleaved)[1])


def split(values: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """(S,) -> those of chosen and of rejected sequences, (P,) each."""
    half = len(values) // 2
    return (values[::2], values[1::2]) if interleaved else (values[:half], values[half:])


TOKEN_METRICS: dict[str, tuple[str, Literal["chosen", "rejected", "both"]]] = {
    "entropy": ("entropy", "both"),
    "ref_entropy": ("ref_entropy", "both"),
    "mean_token_accuracy": ("accuracy", "chosen"),
    "logits/chosen": ("mean_logit", "chosen"),
    "logits/rejected": ("mean_logit", "rejected"),
}
"""Metric -> the extra statistic, and the sequences, over whose tokens that count it is a mean; names are TRL's."""


def token_metrics(
    extras: dict[str, Tensor], num_tokens: Tensor, sides: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Those of `TOKEN_METRICS` that there are extras for, () each; 0 without a token.

    Args:
        extras: name -> (S,) sums over each sequence's tokens that count. num_tokens: (S,) how many these are.
        sides: (S,) -> those of chosen and of rejected sequences.
    """
    metrics = {}
    for name, (extra, side) in TOKEN_METRICS.items():
        if extra in extras:
            total, count = (
                values if side == "both" else sides(values)[side == "rejected"] for values in (extras[extra], num_tokens)
            )
            metrics[name] = total.sum() / count.sum().clamp(min=1)
    return metrics


def tdpo_log_ratios(
    chosen: SequenceSums, rejected: SequenceSums, *, alpha: float, variant: str = "tdpo2"
) -> tuple[Tensor, Tensor]:
    """Effective log-ratios r of TDPO, (P,) and (P,), to be compared as DPO compares ρ. `sg` stops the gradient.

        tdpo1   r_w = ρ_w + K_w          r_l = ρ_l + K_l          (alpha has no part in it)
        tdpo2   r_w = ρ_w + α·sg(K_w)    r_l = ρ_l + α·K_l

    Source: arXiv 2404.11999, eq. 15 (TDPO1), eq. 17 and 18 (TDPO2).
    """
    if chosen.kl is None or rejected.kl is None:
        raise ValueError("TDPO's log-ratios need the KL of both sequences; got None")
    if variant == "tdpo1":
        return chosen.log_ratio + chosen.kl, rejected.log_ratio + rejected.kl
    return chosen.log_ratio + alpha * chosen.kl.detach(), rejected.log_ratio + alpha * rejected.kl


def f_dpo_scores(
    log_ratio: Tensor, f_divergence: str, f_alpha: float | None = None, max_exponent: float | None = None
) -> Tensor:
    """f'(e^ρ) − f'(1) of log-ratios ρ, which f-DPO compares where DPO compares ρ; `f_alpha` is the paper's α, in (0, 1)
    there, of either sign in AlphaPO.

        reverse_kl  ρ                     forward_kl  1 − e^(−ρ)
        js          log 2 + log σ(ρ)      alpha       (1 − e^(−αρ))/α        → ρ as α → 0, forward_kl as α → 1

    ρ sums over a whole sequence, so e^(−αρ) overflows in float32 from αρ ≈ −88 on, and the loss is then infinite or NaN. With
    `max_exponent`, −αρ counts as that number where it is more, without a gradient.

    Source: arXiv 2309.16240; f_alpha is 1 − `f_alpha_divergence_coef` of TRL ≥ 0.29, and its older α.
    """
    if f_divergence == "reverse_kl":
        return log_ratio
    if f_divergence == "js":
        return log(2) + F.logsigmoid(log_ratio)
    alpha = 1.0 if f_divergence == "forward_kl" else f_alpha
    if alpha is None:
        raise ValueError("f_divergence='alpha' needs f_alpha, the paper's α in (0, 1); got None")
    return -torch.expm1((-alpha * log_ratio).clamp(max=max_exponent or inf)) / alpha


# --- pair losses ------------------------------------------------------------------------------------------------------------


class Pairs(NamedTuple):
    """What a pair loss may depend on: (P,) each, or numbers."""

    chosen: Tensor
    """r_w, the log-ratio of the chosen sequence: effective for TDPO, scored for f-DPO."""
    rejected: Tensor
    """r_l, that of the rejected one."""
    chosen_count: Tensor | float = 1.0
    """|y_w|, at least 1. A loss "by length" divides all of r by it, TDPO's KL too."""
    rejected_count: Tensor | float = 1.0
    """|y_l|."""
    chosen_nll: Tensor | None = None
    """−Σ log p(y_w) over the mean of |y_w| in the batch, so that its mean over pairs is the one over tokens. For "sft"."""
    ref_margin: Tensor | None = None
    """log q(y_w) − log q(y_l). For "aot"."""

    @property
    def margin(self) -> Tensor:
        """r_w − r_l."""
        return self.chosen - self.rejected

    @property
    def mean_margin(self) -> Tensor:
        """r_w/|y_w| − r_l/|y_l|."""
        return self.chosen / self.chosen_count - self.rejected / self.rejected_count


class PairOptions(NamedTuple):
    """The numbers in pair losses."""

    beta: float
    """β > 0."""
    label_smoothing: float = 0.0
    """ε, in [0, 0.5)."""
    discopop_tau: float = 0.05
    """τ > 0."""


# A pair loss maps these to losses (P,). With z = β (r_w − r_l), z_w = β r_w and z_l = β r_l:


def sigmoid_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z): DPO (arXiv 2305.18290, eq. 7); with label smoothing ε, conservative DPO."""
    return _cross_entropy(o.beta * pairs.margin, o.label_smoothing)


def sigmoid_norm_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """−log σ(β (r_w/|y_w| − r_l/|y_l|)): length-normalised DPO (arXiv 2411.15124)."""
    return -F.logsigmoid(o.beta * pairs.mean_margin)


def robust_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """[−(1 − ε) log σ(z) + ε log σ(−z)] / (1 − 2ε): unbiased when a share ε of the pairs is swapped (arXiv 2403.00409)."""
    return _cross_entropy(o.beta * pairs.margin, -o.label_smoothing / (1 - 2 * o.label_smoothing))


def hinge_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """max(0, 1 − z) (arXiv 2305.10425, on log-ratios as TRL does)."""
    return torch.relu(1 - o.beta * pairs.margin)


def ipo_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """(r_w/|y_w| − r_l/|y_l| − 1/(2β))² (arXiv 2310.12036, eq. 17, length-normalised as TRL does)."""
    return (pairs.mean_margin - 1 / (2 * o.beta)) ** 2


def exo_pair_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """KL((σ(z), σ(−z)) ‖ (1 − ε, ε)), for ε > 0 (arXiv 2402.00856, eq. 16)."""
    z = o.beta * pairs.margin
    won = torch.sigmoid(z) * (F.logsigmoid(z) - log1p(-o.label_smoothing))
    return won + torch.sigmoid(-z) * (F.logsigmoid(-z) - log(o.label_smoothing))


def discopop_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """−(1 − m) log σ(z) + m e^(−z), m = σ(z/τ): DiscoPOP (arXiv 2406.08414, eq. 5). m e^(−z) is one power."""
    z = o.beta * pairs.margin
    return -torch.sigmoid(-z / o.discopop_tau) * F.logsigmoid(z) + torch.exp(F.logsigmoid(z / o.discopop_tau) - z)


def nca_pair_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """−log σ(z_w) − ½ log σ(−z_w) − ½ log σ(−z_l): noise contrastive alignment (arXiv 2402.05369)."""
    won, lost = o.beta * pairs.chosen, o.beta * pairs.rejected
    return -F.logsigmoid(won) - 0.5 * F.logsigmoid(-won) - 0.5 * F.logsigmoid(-lost)


def bco_pair_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """−log σ(z_w) − log σ(−z_l): binary classifier optimisation (arXiv 2404.04656), its reward shift 0 as in TRL."""
    return -F.logsigmoid(o.beta * pairs.chosen) - F.logsigmoid(-o.beta * pairs.rejected)


def sppo_hard_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """(r_w − 1/(2β))² + (r_l + 1/(2β))²: self-play, the chosen one winning surely (arXiv 2405.00675, eq. 4.7)."""
    return (pairs.chosen - 0.5 / o.beta) ** 2 + (pairs.rejected + 0.5 / o.beta) ** 2


def apo_zero_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """1 − σ(z_w) + σ(z_l): anchored, where the policy is worse than the chosen ones (arXiv 2408.06266, eq. 7)."""
    return torch.sigmoid(-o.beta * pairs.chosen) + torch.sigmoid(o.beta * pairs.rejected)


def apo_down_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """σ(z_w) + 1 − σ(z): anchored, where the policy is better than the chosen ones (arXiv 2408.06266, eq. 8)."""
    return torch.sigmoid(o.beta * pairs.chosen) + torch.sigmoid(-o.beta * pairs.margin)


def sft_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """−log p(y_w) per token, a mean over the chosen tokens of the batch; TDPO's KL and all weights of tokens have no part."""
    if pairs.chosen_nll is None:
        raise ValueError("sft_loss takes log-probabilities, not their ratios: set Pairs.chosen_nll")
    return pairs.chosen_nll


def aot_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """sigmoid_loss of margins sorted over the pairs of a call, policy's less reference's (arXiv 2406.05882, paired). The KL is
    the policy's. Losses go with ranks, not with pairs."""
    if pairs.ref_margin is None:
        raise ValueError("aot_loss sorts the margins of both models: set Pairs.ref_margin")
    policy = pairs.margin + pairs.ref_margin
    return _cross_entropy(o.beta * (policy.sort().values - pairs.ref_margin.sort().values), o.label_smoothing)


def aot_unpaired_loss(pairs: Pairs, o: PairOptions) -> Tensor:
    """sigmoid_loss of r_w and r_l, each sorted over the pairs of a call (arXiv 2406.05882, unpaired). Losses go with ranks."""
    return _cross_entropy(o.beta * (pairs.chosen.sort().values - pairs.rejected.sort().values), o.label_smoothing)


def _cross_entropy(z: Tensor, share: float) -> Tensor:
    """−(1 − share) log σ(z) − share·log σ(−z), with log σ(−z) written as log σ(z) − z."""
    losses = -F.logsigmoid(z)
    return losses + share * z if share else losses


PAIR_LOSSES: dict[str, Callable[[Pairs, PairOptions], Tensor]] = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_norm_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "exo_pair": exo_pair_loss,
    "discopop": discopop_loss,
    "nca_pair": nca_pair_loss,
    "bco_pair": bco_pair_loss,
    "sppo_hard": sppo_hard_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "sft": sft_loss,
    "aot": aot_loss,
    "aot_unpaired": aot_unpaired_loss,
}
"""Every `loss_type`, for DPO and TDPO alike; names are TRL's."""

SMOOTHED = ("sigmoid", "robust", "exo_pair", "aot", "aot_unpaired")
"""The loss types that take label smoothing."""


class Form(NamedTuple):
    """What a pair loss depends on: this decides how pairs longer than a chunk go through (docs/math.md, "One pass")."""

    kind: Literal["margin", "sequence", "pair", "batch"]
    """`"margin"`: r_w − r_l alone. `"sequence"`: a sum of a function of r_w and one of r_l. `"pair"`: anything of both.
    `"batch"`: other pairs' too, which takes the recompute engine."""
    by_length: bool = False
    """On r/|y| in place of r."""


PAIR_FORMS: dict[str, Form] = {
    "sigmoid": Form("margin"),
    "sigmoid_norm": Form("margin", by_length=True),
    "ipo": Form("margin", by_length=True),
    "hinge": Form("margin"),
    "robust": Form("margin"),
    "exo_pair": Form("margin"),
    "discopop": Form("margin"),
    "nca_pair": Form("sequence"),
    "bco_pair": Form("sequence"),
    "sppo_hard": Form("sequence"),
    "apo_zero": Form("sequence"),
    "apo_down": Form("pair"),
    "sft": Form("sequence"),
    "aot": Form("batch"),
    "aot_unpaired": Form("batch"),
}
"""The form of every pair loss; a test checks each by autograd."""
