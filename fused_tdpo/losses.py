"""TDPO and DPO: pure functions on vectors, and the modules without parameters that feed them.

    logits ──token_stats──▶ per token (S, T) ──sum──▶ per sequence (S,) ──log_ratios──▶ per pair (P,) ──PAIR_LOSSES──▶ (P,)

Only `token_stats` sees the vocabulary. TDPO is DPO on *effective* log-ratios, which hold the sequential KL, so one table of
pair losses serves both. Letters: P pairs, S = 2P sequences, T positions, V vocabulary; log-probabilities and KL in nats.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from numbers import Real
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_tdpo._backends import choose_backend
from fused_tdpo._checks import check_token_stats, describe
from fused_tdpo._layout import SequenceLayout
from fused_tdpo.ops import token_stats
from fused_tdpo.types import PreferenceOutput, TokenStats


class SequenceSums(NamedTuple):
    """Per-token statistics summed over each sequence: (S,) of all sequences, or (P,) of the chosen or the rejected ones."""

    log_ratio: Tensor
    """ρ, the weighted sum of logp − ref_logp."""
    kl: Tensor | None
    """K, the weighted sum of the per-token divergence; None without a reference distribution."""
    logp: Tensor
    """Unweighted sum of the policy's logp."""
    num_tokens: Tensor
    """Number of tokens that a length-normalised loss divides by, at least 1; exactly 1 where the sums are means already."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "SequenceSums":
        """`function` of every field that exists."""
        kl = None if self.kl is None else function(self.kl)
        return SequenceSums(function(self.log_ratio), kl, function(self.logp), function(self.num_tokens))

    def split(self, interleaved: bool = False) -> tuple["SequenceSums", "SequenceSums"]:
        """(chosen, rejected): the first and the second half, or even and odd sequences."""
        half = len(self.num_tokens) // 2
        chosen, rejected = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(half), slice(half, None))
        return self.map(lambda sums: sums[chosen]), self.map(lambda sums: sums[rejected])


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


# A pair loss maps effective log-ratios r_w, r_l and token counts |y_w|, |y_l|, each (P,), to losses (P,).
# With z = β (r_w − r_l), and log σ(−z) written as log σ(z) − z:


def sigmoid_loss(
    chosen: Tensor, rejected: Tensor, chosen_count: Tensor, rejected_count: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z): DPO (arXiv 2305.18290, eq. 7); with label smoothing ε, conservative DPO."""
    z = beta * (chosen - rejected)
    losses = -F.logsigmoid(z)
    return losses + label_smoothing * z if label_smoothing else losses


def robust_loss(
    chosen: Tensor, rejected: Tensor, chosen_count: Tensor, rejected_count: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """[−(1 − ε) log σ(z) + ε log σ(−z)] / (1 − 2ε): unbiased when a share ε of the pairs is swapped (arXiv 2403.00409)."""
    z = beta * (chosen - rejected)
    losses = -F.logsigmoid(z)
    return losses - label_smoothing / (1 - 2 * label_smoothing) * z if label_smoothing else losses


def hinge_loss(
    chosen: Tensor, rejected: Tensor, chosen_count: Tensor, rejected_count: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """max(0, 1 − z), without label smoothing (arXiv 2305.10425, on log-ratios as TRL does)."""
    return torch.relu(1 - beta * (chosen - rejected))


def ipo_loss(
    chosen: Tensor, rejected: Tensor, chosen_count: Tensor, rejected_count: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Tensor:
    """(r_w/|y_w| − r_l/|y_l| − 1/(2β))², without label smoothing (arXiv 2310.12036, length-normalised as TRL does)."""
    return (chosen / chosen_count - rejected / rejected_count - 1 / (2 * beta)) ** 2


PAIR_LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
}
"""Every `loss_type`, for DPO and TDPO alike."""

SMOOTHED = ("sigmoid", "robust")
"""The loss types that take label smoothing."""


class Form(NamedTuple):
    """What a pair loss depends on: this decides how pairs longer than a chunk go through (docs/math.md, "One pass")."""

    kind: Literal["margin", "sequence", "pair"]
    """`"margin"`: r_w − r_l alone. `"sequence"`: a sum of a function of r_w and one of r_l. `"pair"`: anything."""
    by_length: bool = False
    """On r/|y| in place of r."""


PAIR_FORMS: dict[str, Form] = {
    "sigmoid": Form("margin"),
    "ipo": Form("margin", by_length=True),
    "hinge": Form("margin"),
    "robust": Form("margin"),
}
"""The form of every pair loss; a test checks each by autograd."""


@dataclass(kw_only=True, repr=False, eq=False)
class PreferenceLoss(nn.Module):
    """What TDPOLoss and DPOLoss share: options, and the way from logits to a PreferenceOutput.

    The fields are the constructor's arguments (a dataclass writes each option once); `beta` may be positional.
    """

    beta: float = field(default=0.1, kw_only=False)
    """Inverse temperature of the implicit reward, > 0."""
    loss_type: str = "sigmoid"
    """A key of `PAIR_LOSSES`."""
    label_smoothing: float = 0.0
    """Assumed share of swapped pairs, in [0, 0.5)."""
    average_log_prob: bool = False
    """Divide ρ, K and the reported log-probabilities by the sequence's number of tokens that are not ignored (at least 1)."""
    interleaved: bool = False
    """Sequences 0, 2, ... are chosen and 1, 3, ... rejected, instead of all chosen ones first."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over pairs."""
    divergence: str = "forward_kl"
    """The per-token divergence that K sums, as in `token_stats`. DPO only reports it."""
    divergence_alpha: float | None = None
    """Its order, for `divergence="alpha"`."""
    ignore_index: int = -100
    """The label of positions that do not count: prompt and padding."""
    temperature: float = 1.0
    """Divides the logits of both models."""
    vocab_size: int | None = None
    """Use columns [0, vocab_size) of both models' logits."""
    check_labels: bool = False
    """Raise on labels outside the vocabulary on a GPU too, which synchronises; they give NaN there otherwise."""
    backend: str = "auto"
    """As in `token_stats`."""
    inplace_backward: bool = False
    """Write the gradient over `policy_logits`, as in `token_stats`."""

    def __post_init__(self) -> None:
        super().__init__()
        _check_number("beta", self.beta, lambda beta: beta > 0, "> 0")
        _check_number("label_smoothing", self.label_smoothing, lambda share: 0 <= share < 0.5, "in [0, 0.5)")
        _check_choice("loss_type", self.loss_type, PAIR_LOSSES)
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise ValueError(
                f"loss_type={self.loss_type!r} takes no label_smoothing; got {self.label_smoothing}. Set it to 0, or use "
                f"{' or '.join(SMOOTHED)}."
            )
        if self.reduction == "none":
            raise ValueError(
                "reduction='none' is not offered: only out.loss is differentiable (out.losses holds the pairs', detached). "
                "For differentiable losses (P,): stats = token_stats(policy_logits, ref_logits, F.pad(labels, (0, 1), "
                "value=-100)[:, 1:]); sum stats.logp - stats.ref_logp, stats.kl, stats.logp and labels[:, 1:] != -100 over "
                "tokens into SequenceSums; chosen, rejected = sums.split(); ratios = tdpo_log_ratios(chosen, rejected, "
                "alpha=...), for DPO the log_ratio of each; PAIR_LOSSES[loss_type](*ratios, chosen.num_tokens, "
                "rejected.num_tokens, beta=...). All but the op are in fused_tdpo.losses."
            )
        _check_choice("reduction", self.reduction, ("mean", "sum"))

        # the op's own options, by its own checks: on an empty batch, whose vocabulary is as wide as vocab_size asks
        logits = torch.empty(0, max(self.vocab_size or 1, 1), device="meta")
        labels = torch.empty(0, dtype=torch.int64, device="meta")
        check_token_stats(
            logits, logits, labels, self.temperature, self.vocab_size, self.divergence, self.divergence_alpha, extras=()
        )
        choose_backend(self.backend, "cuda", ())

    def extra_repr(self) -> str:
        return ", ".join(f"{option.name}={getattr(self, option.name)!r}" for option in fields(self))

    def forward(
        self,
        policy_logits: Tensor,
        ref_logits: Tensor | None,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        kl_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_pairs: float | Tensor | None = None,
        valid_rows: Sequence[int] | Tensor | None = None,
        ref_logps: Tensor | None = None,
    ) -> PreferenceOutput:
        """Loss of P pairs from the logits of S = 2P sequences. Shifts the labels, not the logits; does not synchronise.

        Args:
            policy_logits: (S, T, V), or packed (total, V) with `cu_seqlens`; float.
            ref_logits: the same of the reference, in any float dtype; gets no gradient. None for DPO with `ref_logps`.
            labels: (S, T), or (total,); the model's ordinary, unshifted labels, `ignore_index` on prompt and padding.
            token_weights: as `labels`; the weight of the log-ratio of token `labels[s, t]`. May require grad.
            kl_weights: as `labels`; the weight of the divergence where `labels[s, t]` is predicted. May require grad.
            cu_seqlens: (S + 1,) int32 or int64; sequence s is the rows cu_seqlens[s] to cu_seqlens[s + 1] - 1.
            num_pairs: divide by this number instead of P, for a mean over ranks and accumulated batches; int or 0-dim.
            valid_rows: not needed from logits; accepted so that calls may be shared with the losses from hidden states.
            ref_logps: (S,), DPO only: precomputed sums (means with `average_log_prob`) of the reference's log-probabilities,
                weighted by the same `token_weights`.

        Returns:
            `PreferenceOutput`, of which only `loss` is differentiable. An empty batch gives 0.

        Raises:
            ValueError: arguments that do not fit together; nothing has been computed then.
        """
        if labels.shape != policy_logits.shape[:-1] or labels.device != policy_logits.device:
            raise ValueError(
                f"labels must have shape {tuple(policy_logits.shape[:-1])} on {policy_logits.device}, one for each position of "
                f"policy_logits {describe(policy_logits)}; got {describe(labels)}. The order is (policy_logits, ref_logits, "
                "labels); pass logits and labels as the model has them, since the loss itself shifts the labels."
            )
        layout = self._layout(labels, cu_seqlens, token_weights, kl_weights, ref_logps, num_pairs)
        self._check_reference("ref_logits", ref_logits, kl_weights, ref_logps)

        labels = layout.shift(labels, self.ignore_index)
        stats = token_stats(
            policy_logits,
            ref_logits,
            labels,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            vocab_size=self.vocab_size,
            divergence=self.divergence,
            divergence_alpha=self.divergence_alpha,
            inplace_backward=self.inplace_backward,
            check_labels=self.check_labels,
            backend=self.backend,
        )
        sums = self._sums(stats, labels, layout, token_weights, kl_weights, ref_logps)
        return self._output(sums, self.pair_losses(*sums.split(self.interleaved)), num_pairs)

    def log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        """Effective log-ratios (P,), (P,) that the pair loss compares."""
        return chosen.log_ratio, rejected.log_ratio

    def reward_log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        """Log-ratios (P,), (P,) whose β-fold is reported as rewards."""
        return self.log_ratios(chosen, rejected)

    def pair_losses(self, chosen: SequenceSums, rejected: SequenceSums) -> Tensor:
        """(P,) differentiable losses."""
        ratios, pair_loss = self.log_ratios(chosen, rejected), PAIR_LOSSES[self.loss_type]
        return pair_loss(*ratios, chosen.num_tokens, rejected.num_tokens, beta=self.beta, label_smoothing=self.label_smoothing)

    def kl_slopes(self) -> tuple[float, float]:
        """How the effective log-ratios of a chosen and of a rejected sequence change with its K, where ρ changes them by 1."""
        return 0.0, 0.0

    def _layout(
        self,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        token_weights: Tensor | None,
        kl_weights: Tensor | None,
        ref_logps: Tensor | None,
        num_pairs: float | Tensor | None,
    ) -> SequenceLayout:
        """Of the labels, with which the other arguments of a call must go together."""
        layout = SequenceLayout(labels, cu_seqlens)
        if layout.num_sequences % 2:
            raise ValueError(
                f"each pair needs a chosen and a rejected sequence, so their number must be even; got {layout.num_sequences} "
                f"from labels {describe(labels)}"
            )
        _check_like("token_weights", token_weights, labels.shape, labels)
        _check_like("kl_weights", kl_weights, labels.shape, labels)
        _check_like("ref_logps", ref_logps, (layout.num_sequences,), labels)
        self._check_num_pairs(num_pairs)
        return layout

    def _check_reference(self, name: str, ref: Tensor | None, kl_weights: Tensor | None, ref_logps: Tensor | None) -> None:
        """`ref` is the reference's `name`: its logits or hidden states."""
        if (ref is None) == (ref_logps is None):
            given = "neither" if ref is None else "both"
            raise ValueError(
                f"the reference must be given once, as {name} or as ref_logps; got {given}. Pass {name}, or None in its place "
                "with ref_logps=..."
            )
        if kl_weights is not None and ref is None:
            raise ValueError(f"kl_weights weigh the KL, which does not exist without {name}; pass these, or leave it out")

    def _check_num_pairs(self, num_pairs: float | Tensor | None) -> None:
        if num_pairs is not None and self.reduction == "sum":
            raise ValueError("num_pairs is what a mean divides by, and reduction='sum' does not divide; use reduction='mean'")
        if isinstance(num_pairs, Tensor) and num_pairs.dim():
            raise ValueError(f"num_pairs must be a number or a 0-dim tensor; got {describe(num_pairs)}")
        if num_pairs is not None and not isinstance(num_pairs, Tensor) and not num_pairs > 0:
            raise ValueError(f"num_pairs must be > 0; got {num_pairs}")

    def _sums(
        self,
        stats: TokenStats,
        labels: Tensor,
        layout: SequenceLayout,
        token_weights: Tensor | None,
        kl_weights: Tensor | None,
        ref_logps: Tensor | None,
    ) -> SequenceSums:
        """Sums over each sequence, from statistics of already shifted labels and from weights as the caller gave them."""
        counted = labels != self.ignore_index

        def total(values: Tensor, weights: Tensor | None = None) -> Tensor:
            return layout.sum(values if weights is None else values * self._row_weights(weights, counted, layout, values.dtype))

        log_ratio = total(stats.logp if stats.ref_logp is None else stats.logp - stats.ref_logp, token_weights)
        kl = None if stats.kl is None else total(stats.kl, kl_weights)
        return self._sequence_sums(log_ratio, kl, total(stats.logp), total(counted.to(stats.logp.dtype)), ref_logps)

    def _row_weights(self, weights: Tensor, counted: Tensor, layout: SequenceLayout, dtype: torch.dtype) -> Tensor:
        """Shifted with the labels; those of positions that do not count are left out, whatever they hold."""
        return layout.shift(weights, 0).to(dtype).where(counted, 0.0)

    def _sequence_sums(
        self, log_ratio: Tensor, kl: Tensor | None, logp: Tensor, num_tokens: Tensor, ref_logps: Tensor | None
    ) -> SequenceSums:
        """From sums over the tokens of each sequence: means of them with `average_log_prob`, less `ref_logps`."""
        num_tokens = num_tokens.clamp(min=1)
        sums = SequenceSums(log_ratio, kl, logp, num_tokens)
        if self.average_log_prob:
            sums = sums.map(lambda total: total / num_tokens)
        if ref_logps is not None:
            sums = sums._replace(log_ratio=sums.log_ratio - ref_logps.detach().to(log_ratio.dtype))
        return sums

    def _output(
        self, sums: SequenceSums, losses: Tensor, num_pairs: float | Tensor | None, loss: Tensor | None = None
    ) -> PreferenceOutput:
        """From sums, losses (P,) and, where these carry no gradient, their sum `loss`."""
        pairs = max(len(losses), 1)
        loss = losses.sum() if loss is None else loss
        if self.reduction == "mean":
            loss = (loss / (pairs if num_pairs is None else num_pairs)).to(losses.dtype)

        chosen, rejected = sums.map(Tensor.detach).split(self.interleaved)
        chosen_rewards, rejected_rewards = (self.beta * ratio for ratio in self.reward_log_ratios(chosen, rejected))
        reported = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).to(losses.dtype),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen.logp,
            "logps/rejected": rejected.logp,
        }
        if chosen.kl is not None and rejected.kl is not None:
            reported |= {"kl/chosen": chosen.kl, "kl/rejected": rejected.kl, "kl/margin": chosen.kl - rejected.kl}
        return PreferenceOutput(
            loss=loss,
            losses=losses.detach(),
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            chosen_logps=chosen.logp,
            rejected_logps=rejected.logp,
            chosen_kl=chosen.kl,
            rejected_kl=rejected.kl,
            metrics={name: values.sum() / pairs for name, values in reported.items()},
        )


@dataclass(kw_only=True, repr=False, eq=False)
class TDPOLoss(PreferenceLoss):
    """Token-level DPO (arXiv 2404.11999): DPO whose log-ratios hold the sequential KL(ref ‖ policy); see `tdpo_log_ratios`.

        out = TDPOLoss(beta=0.1, alpha=0.5)(policy_logits, ref_logits, labels)     # (S, T, V) (S, T, V) (S, T)
        out.loss.backward()

    Options are the fields below and those of `PreferenceLoss`.
    """

    alpha: float = 0.5
    """Weight of the KL in TDPO2, >= 0. TDPO1 does not use it."""
    variant: Literal["tdpo1", "tdpo2"] = "tdpo2"
    """TDPO2 weighs the KL by alpha and keeps gradients out of the chosen sequence's."""
    reward: Literal["tdpo", "effective"] = "tdpo"
    """What is reported: β (ρ + K) for both variants, as the authors log it, or β times the effective log-ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("alpha", self.alpha, lambda alpha: alpha >= 0, ">= 0")
        _check_choice("variant", self.variant, ("tdpo1", "tdpo2"))
        _check_choice("reward", self.reward, ("tdpo", "effective"))

    def log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        return tdpo_log_ratios(chosen, rejected, alpha=self.alpha, variant=self.variant)

    def reward_log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        variant = "tdpo1" if self.reward == "tdpo" else self.variant
        return tdpo_log_ratios(chosen, rejected, alpha=self.alpha, variant=variant)

    def kl_slopes(self) -> tuple[float, float]:
        return (1.0, 1.0) if self.variant == "tdpo1" else (0.0, self.alpha)

    def _check_reference(self, name: str, ref: Tensor | None, kl_weights: Tensor | None, ref_logps: Tensor | None) -> None:
        if ref is None or ref_logps is not None:
            raise ValueError(
                f"TDPO needs {name}: its KL takes the reference's whole distribution at each token, of which ref_logps keep "
                f"the label's entry only. Pass {name} alone, or use {type(self).__name__.replace('TDPO', 'DPO')} with "
                "ref_logps."
            )


@dataclass(kw_only=True, repr=False, eq=False)
class DPOLoss(PreferenceLoss):
    """DPO (arXiv 2305.18290). Without reference logits, call `loss(policy_logits, None, labels, ref_logps=...)`.

    With them the sequential KL is reported, but has no part in the loss or its gradient. Options are the fields below and those
    of `PreferenceLoss`.
    """

    f_divergence: str = "reverse_kl"
    """The divergence of f-DPO (arXiv 2309.16240) between sequence distributions; reverse KL is DPO."""
    f_alpha: float | None = None
    """Its order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.f_divergence != "reverse_kl" or self.f_alpha is not None:
            raise ValueError(
                "this version supports f_divergence='reverse_kl' with f_alpha=None only, which is DPO; got "
                f"f_divergence={self.f_divergence!r}, f_alpha={self.f_alpha!r}"
            )


def _check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    if value not in tuple(choices):  # by equality: a value need not be hashable
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def _check_number(name: str, value: object, fits: Callable[[float], bool], expected: str) -> None:
    if not (isinstance(value, Real) and isfinite(value) and fits(float(value))):
        raise ValueError(f"{name} must be a finite number {expected}; got {value!r}")


def _check_like(name: str, tensor: Tensor | None, shape: tuple[int, ...], labels: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.device != labels.device:
        raise ValueError(f"{name} must have shape {tuple(shape)} on {labels.device}, to go with labels; got {describe(tensor)}")
