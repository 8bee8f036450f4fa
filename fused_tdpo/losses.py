"""TDPO and DPO from logits, and what all losses share: modules without parameters.

    logits ──token_stats──▶ per token (S, T) ──sum──▶ per sequence (S,) ──fused_tdpo.pair_losses──▶ per pair (P,)

Only `token_stats` sees the vocabulary. Letters: P pairs, S = 2P sequences, T positions, V vocabulary; log-probabilities and KL
in nats.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fused_tdpo._backends import choose_backend
from fused_tdpo._checks import check_choice, check_extras, check_like, check_number, check_token_stats, describe
from fused_tdpo._layout import SequenceLayout
from fused_tdpo.ops import token_stats
from fused_tdpo.pair_losses import (
    PAIR_FORMS,
    PAIR_LOSSES,
    SMOOTHED,
    TOKEN_METRICS,
    Form,
    PairOptions,
    Pairs,
    SequenceSums,
    f_dpo_scores,
    split,
    tdpo_log_ratios,
    token_metrics,
)
from fused_tdpo.types import PreferenceOutput, TokenStats

ELSEWHERE = {
    "dpo": "'sigmoid'",
    "tdpo": "TDPOLoss with a pair loss such as 'sigmoid'",
    "tdpo1": "TDPOLoss(variant='tdpo1')",
    "tdpo2": "TDPOLoss(variant='tdpo2')",
    "simpo": "a module of its own, SimPOLoss",
    "cpo": "a module of its own, CPOLoss",
    "orpo": "a module of its own, ORPOLoss",
    "kto": "a module of its own, KTOLoss",
    "kto_pair": "KTOLoss, of single sequences",
    "bco": "'bco_pair' of pairs, or BCOLoss of single sequences",
}
"""What else a `loss_type` is called -> what it is here."""


@dataclass(kw_only=True, repr=False, eq=False)
class SequenceLoss(nn.Module):
    """What all losses share: the options of the op, and the way from statistics of tokens to sums over sequences.

    The fields are the constructor's arguments (a dataclass writes each option once); `beta` may be positional.
    """

    beta: float = field(default=0.1, kw_only=False)
    """Inverse temperature of the implicit reward, > 0."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over what `losses` holds: pairs, or sequences."""
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
    extras: Sequence[str] = ()
    """Report `TOKEN_METRICS` of these, from the same pass: "entropy", "ref_entropy", "accuracy", "mean_logit"."""
    inplace_backward: bool = False
    """Write the gradient over `policy_logits`, as in `token_stats`."""

    def __post_init__(self) -> None:
        super().__init__()
        check_number("beta", self.beta, lambda beta: beta > 0, "> 0")
        if self.reduction == "none":
            raise ValueError("reduction='none' is not offered: only out.loss is differentiable; out.losses holds all, detached")
        check_choice("reduction", self.reduction, ("mean", "sum"))

        # the op's own options, by its own checks: on an empty batch, whose vocabulary is as wide as vocab_size asks
        logits = torch.empty(0, max(self.vocab_size or 1, 1), device="meta")
        labels = torch.empty(0, dtype=torch.int64, device="meta")
        options = self.op_options()
        check_token_stats(
            logits, logits, labels, self.temperature, self.vocab_size, options["divergence"], options["divergence_alpha"],
            self.extras,
        )  # fmt: skip
        known = {extra: None for extra, _ in TOKEN_METRICS.values()}
        if not known.keys() >= set(self.extras):
            raise ValueError(
                f"extras of a loss become metrics, which {', '.join(map(repr, known))} do; got {self.extras!r}. Call the op "
                "for other statistics."
            )
        choose_backend(self.backend, "cuda", ())

    def extra_repr(self) -> str:
        return ", ".join(f"{option.name}={getattr(self, option.name)!r}" for option in fields(self))

    def op_options(self) -> dict[str, Any]:
        """What both ops take from the loss."""
        return {
            "ignore_index": self.ignore_index,
            "temperature": self.temperature,
            "divergence": "forward_kl",
            "divergence_alpha": None,
            "check_labels": self.check_labels,
            "backend": self.backend,
        }

    @property
    def statistics(self) -> tuple[str, ...]:
        """The extras that the op has to compute."""
        return tuple(self.extras)

    @property
    def averages(self) -> bool:
        """Whether sums over a sequence are divided by its number of tokens."""
        return False

    def kl_slopes(self) -> tuple[float, float]:
        """How the effective log-ratios of a chosen and of a rejected sequence change with its K, where ρ changes them by 1."""
        return 0.0, 0.0

    def _layout(self, labels: Tensor, cu_seqlens: Tensor | None, **like_labels: Tensor | None) -> SequenceLayout:
        """Of the labels, with which the other arguments of a call must go together."""
        layout = SequenceLayout(labels, cu_seqlens)
        for name, tensor in like_labels.items():
            check_like(name, tensor, labels.shape, labels)
        return layout

    def _stats(self, policy_logits: Tensor, ref_logits: Tensor | None, labels: Tensor) -> TokenStats:
        """Of logits and shifted labels."""
        return token_stats(
            policy_logits,
            ref_logits,
            labels,
            vocab_size=self.vocab_size,
            extras=self.statistics,
            inplace_backward=self.inplace_backward,
            **self.op_options(),
        )

    def _check_shape(self, policy_logits: Tensor, labels: Tensor, order: str) -> None:
        if labels.shape != policy_logits.shape[:-1] or labels.device != policy_logits.device:
            raise ValueError(
                f"labels must have shape {tuple(policy_logits.shape[:-1])} on {policy_logits.device}, one for each position of "
                f"policy_logits {describe(policy_logits)}; got {describe(labels)}. The order is ({order}); pass logits and "
                "labels as the model has them, since the loss itself shifts the labels."
            )

    def _check_count(self, name: str, value: float | Tensor | None) -> None:
        """Of what a mean is divided by."""
        if value is not None and self.reduction == "sum":
            raise ValueError(f"{name} is what a mean divides by, and reduction='sum' does not divide; use reduction='mean'")
        if isinstance(value, Tensor) and value.dim():
            raise ValueError(f"{name} must be a number or a 0-dim tensor; got {describe(value)}")
        if value is not None and not isinstance(value, Tensor) and not value > 0:
            raise ValueError(f"{name} must be > 0; got {value}")

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
        check_extras(self.extras, ref is not None, name)

    def _from_stats(
        self,
        stats: TokenStats,
        labels: Tensor,
        layout: SequenceLayout,
        token_weights: Tensor | None = None,
        kl_weights: Tensor | None = None,
        ref_logps: Tensor | None = None,
        count: float | Tensor | None = None,
        **call: Any,
    ) -> Any:
        """The output, from statistics of already shifted labels; `count` is what the mean divides by, the rest as it came."""
        totals = self._totals(stats, labels, layout, token_weights, kl_weights)
        extras = {name: layout.sum(getattr(stats, name)) for name in self.extras}
        return self._output(self._sequence_sums(totals, ref_logps), count, extras, totals.num_tokens, **call)

    def _output(
        self,
        sums: SequenceSums,
        count: float | Tensor | None,
        extras: dict[str, Tensor],
        num_tokens: Tensor,
        swept: tuple[Tensor, Tensor] | None = None,
        **call: Any,
    ) -> Any:
        """From sums over sequences and what `token_metrics` takes. `swept`: after one pass, where sums carry no gradient, the
        losses of the engine's pairs, and their sum, which does."""
        raise NotImplementedError

    def _row_weights(
        self,
        token_weights: Tensor | None,
        kl_weights: Tensor | None,
        labels: Tensor,
        num_tokens: Tensor,
        layout: SequenceLayout,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Of log-ratios and of divergences, as already shifted `labels`; those of positions that do not count are left out,
        whatever they hold."""
        counted = labels != self.ignore_index
        tail = self._tail_weights(counted, num_tokens, layout)

        def rows(weights: Tensor | None) -> Tensor | None:
            if weights is None:
                return tail
            weights = layout.shift(weights, 0).to(num_tokens.dtype).where(counted, 0.0)
            return weights if tail is None else weights * tail

        return rows(token_weights), rows(kl_weights)

    def _tail_weights(self, counted: Tensor, num_tokens: Tensor, layout: SequenceLayout) -> Tensor | None:
        """Further weights of rows that a method has of its own."""
        return None

    def _totals(
        self,
        stats: TokenStats,
        labels: Tensor,
        layout: SequenceLayout,
        token_weights: Tensor | None,
        kl_weights: Tensor | None,
    ) -> SequenceSums:
        """From statistics of already shifted labels, the weights as the caller gave them."""
        num_tokens = layout.sum((labels != self.ignore_index).to(stats.logp.dtype))
        w, v = self._row_weights(token_weights, kl_weights, labels, num_tokens, layout)

        def total(values: Tensor, weights: Tensor | None = None) -> Tensor:
            return layout.sum(values if weights is None else values * weights)

        return SequenceSums(
            log_ratio=total(stats.logp if stats.ref_logp is None else stats.logp - stats.ref_logp, w),
            kl=None if stats.kl is None else total(stats.kl, v),
            logp=total(stats.logp),
            num_tokens=num_tokens,
            log_sum_sq_probs=None if stats.log_sum_sq_probs is None else total(stats.log_sum_sq_probs),
            ref_logp=None if stats.ref_logp is None else total(stats.ref_logp, w),
        )

    def _sequence_sums(self, totals: SequenceSums, ref_logps: Tensor | None) -> SequenceSums:
        """From sums over the tokens of each sequence: means of them if the loss `averages`, less `ref_logps`."""
        num_tokens = totals.num_tokens.clamp(min=1)
        sums = totals._replace(num_tokens=num_tokens)
        if self.averages:
            sums = sums.map(lambda total: total / num_tokens)
        if ref_logps is not None:
            ref_logp = ref_logps.detach().to(sums.log_ratio.dtype)
            sums = sums._replace(log_ratio=sums.log_ratio - ref_logp, ref_logp=ref_logp)
        return sums

    def _mean(self, losses: Tensor, count: float | Tensor | None, total: Tensor | None = None) -> Tensor:
        """The loss, from those of pairs or sequences, of which `total`, if given, is the sum that carries the gradient."""
        loss = losses.sum() if total is None else total
        if self.reduction == "sum":
            return loss
        return (loss / (max(len(losses), 1) if count is None else count)).to(losses.dtype)


@dataclass(kw_only=True, repr=False, eq=False)
class PairLoss(SequenceLoss):
    """What losses of pairs share: S = 2P sequences become P losses, and a PreferenceOutput."""

    interleaved: bool = False
    """Sequences 0, 2, ... are chosen and 1, 3, ... rejected, instead of all chosen ones first."""

    def form(self) -> Form:
        """Of the loss as a whole."""
        raise NotImplementedError

    @property
    def has_nll(self) -> bool:
        """Whether the chosen sequence's unweighted log-probability is part of it, beside the log-ratios."""
        return False

    def log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        """Effective log-ratios (P,), (P,) that the pair loss compares."""
        return chosen.log_ratio, rejected.log_ratio

    def reward_log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        """Log-ratios (P,), (P,) whose β-fold is reported as rewards."""
        return self.log_ratios(chosen, rejected)

    def pair_losses(self, chosen: SequenceSums, rejected: SequenceSums, mean_tokens: Tensor | float = 1.0) -> Tensor:
        """(P,) differentiable losses. `mean_tokens`: of the batch's chosen sequences, () or a number; an NLL divides by it."""
        raise NotImplementedError

    def more_metrics(
        self, chosen: SequenceSums, rejected: SequenceSums, mean_tokens: Tensor | float = 1.0
    ) -> dict[str, Tensor]:
        """Name -> (P,): what a family of losses reports besides. `mean_tokens` as in `pair_losses`."""
        return {}

    def _pair_layout(
        self, labels: Tensor, cu_seqlens: Tensor | None, num_pairs: float | Tensor | None, **like_labels: Tensor | None
    ) -> SequenceLayout:
        layout = self._layout(labels, cu_seqlens, **like_labels)
        if layout.num_sequences % 2:
            raise ValueError(
                f"each pair needs a chosen and a rejected sequence, so their number must be even; got {layout.num_sequences} "
                f"from labels {describe(labels)}"
            )
        self._check_count("num_pairs", num_pairs)
        return layout

    def _mean_tokens(self, num_tokens: Tensor) -> Tensor | float:
        """Of (S,) numbers of tokens, the mean of the chosen ones."""
        chosen, _ = split(num_tokens, self.interleaved)
        return chosen.sum().clamp(min=1) / max(len(chosen), 1)

    def _output(
        self,
        sums: SequenceSums,
        count: float | Tensor | None,
        extras: dict[str, Tensor],
        num_tokens: Tensor,
        swept: tuple[Tensor, Tensor] | None = None,
        **call: Any,
    ) -> PreferenceOutput:
        mean_tokens = self._mean_tokens(num_tokens)
        losses, total = swept or (self.pair_losses(*sums.split(self.interleaved), mean_tokens), None)
        pairs = max(len(losses), 1)
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
        reported |= self.more_metrics(chosen, rejected, mean_tokens)
        if chosen.kl is not None and rejected.kl is not None:
            reported |= {"kl/chosen": chosen.kl, "kl/rejected": rejected.kl, "kl/margin": chosen.kl - rejected.kl}
        return PreferenceOutput(
            loss=self._mean(losses, count, total),
            losses=losses.detach(),
            chosen_rewards=chosen_rewards,
            rejected_rewards=rejected_rewards,
            chosen_logps=chosen.logp,
            rejected_logps=rejected.logp,
            chosen_kl=chosen.kl,
            rejected_kl=rejected.kl,
            metrics={name: values.sum() / pairs for name, values in reported.items()}
            | token_metrics(extras, num_tokens, lambda values: split(values, self.interleaved)),
        )


@dataclass(kw_only=True, repr=False, eq=False)
class PreferenceLoss(PairLoss):
    """What TDPOLoss and DPOLoss share: the table of pair losses, on log-ratios of a policy and a reference."""

    loss_type: str | Sequence[str] = "sigmoid"
    """A key of `PAIR_LOSSES`; or several, whose losses are added (MPO, arXiv 2411.10442)."""
    loss_weights: Sequence[float] | None = None
    """Of the losses that `loss_type` names; None for 1."""
    label_smoothing: float = 0.0
    """Assumed share of swapped pairs, in [0, 0.5), for the loss types in `SMOOTHED`; "exo_pair" needs one > 0."""
    discopop_tau: float = 0.05
    """Temperature of "discopop", > 0."""
    ld_alpha: float | None = None
    """LD-DPO (arXiv 2409.06411): weight, in [0, 1], of tokens beyond the length of the pair's shorter one, in ρ and K."""
    use_weighting: bool = False
    """WPO (arXiv 2406.11827, eq. 2): weigh a pair by exp of mean_t(log p(y) − log Σ p²) of both sequences, a constant."""
    average_log_prob: bool = False
    """Divide ρ, K and the reported log-probabilities by the sequence's number of tokens that are not ignored (at least 1)."""
    divergence: str = "forward_kl"
    """The per-token divergence that K sums, as in `token_stats`. DPO only reports it."""
    divergence_alpha: float | None = None
    """Its order, for `divergence="alpha"`."""

    def __post_init__(self) -> None:
        if self.reduction == "none":
            raise ValueError(
                "reduction='none' is not offered: only out.loss is differentiable (out.losses holds the pairs', detached). "
                "For differentiable losses (P,): stats = token_stats(policy_logits, ref_logits, F.pad(labels, (0, 1), "
                "value=-100)[:, 1:]); sum stats.logp - stats.ref_logp, stats.kl, stats.logp and labels[:, 1:] != -100 over "
                "tokens into SequenceSums; chosen, rejected = sums.split(); ratios = tdpo_log_ratios(chosen, rejected, "
                "alpha=...), for DPO the log_ratio of each; PAIR_LOSSES[loss_type](Pairs(*ratios, chosen.num_tokens, "
                "rejected.num_tokens), PairOptions(beta)). All but the op are in fused_tdpo.pair_losses."
            )
        super().__post_init__()
        check_number("label_smoothing", self.label_smoothing, lambda share: 0 <= share < 0.5, "in [0, 0.5)")
        check_number("discopop_tau", self.discopop_tau, lambda tau: tau > 0, "> 0")
        if self.ld_alpha is not None:
            check_number("ld_alpha", self.ld_alpha, lambda alpha: 0 <= alpha <= 1, "in [0, 1], or None")
        self._check_loss_types()

    @property
    def loss_types(self) -> tuple[str, ...]:
        """The names in `loss_type`."""
        return (self.loss_type,) if isinstance(self.loss_type, str) else tuple(self.loss_type)

    def _check_loss_types(self) -> None:
        for name in self.loss_types:
            if isinstance(name, str) and name in ELSEWHERE:
                raise ValueError(f"loss_type={name!r} is {ELSEWHERE[name]}; those here are {', '.join(PAIR_LOSSES)}")
            check_choice("loss_type", name, PAIR_LOSSES)
        if not self.loss_types:
            raise ValueError("loss_type must name at least one loss; got none")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_types):
            raise ValueError(f"loss_weights must be {len(self.loss_types)} numbers, as loss_type; got {self.loss_weights!r}")
        for weight in self.loss_weights or ():
            check_number("loss_weights", weight, lambda _: True, "for each loss type")
        if self.label_smoothing and not {*self.loss_types} & {*SMOOTHED}:
            raise ValueError(
                f"loss_type={self.loss_type!r} takes no label_smoothing; got {self.label_smoothing}. Set it to 0, or use "
                f"{' or '.join(SMOOTHED)}."
            )
        if "exo_pair" in self.loss_types and not self.label_smoothing:
            raise ValueError("loss_type='exo_pair' takes the log of label_smoothing, which must be > 0; its paper has 1e-3")
        if self.discopop_tau != 0.05 and "discopop" not in self.loss_types:
            raise ValueError(f"discopop_tau is an option of loss_type='discopop'; got loss_type={self.loss_type!r}")
        coupled = [name for name in self.loss_types if name == "sft" or PAIR_FORMS[name].kind == "batch"]
        if self.use_weighting and coupled:
            raise ValueError(
                f"use_weighting weighs the loss of a pair, and {' and '.join(map(repr, coupled))} has none: it goes over the "
                "tokens or the ranks of the whole batch. Leave one of them out."
            )

    def form(self) -> Form:
        """Of the loss as a whole: the widest of its parts."""
        form, *others = {PAIR_FORMS[name] for name in self.loss_types}
        if any(part.kind == "batch" for part in (form, *others)):
            return Form("batch")
        weighted = self.use_weighting and form.kind != "margin"  # by numbers of both sequences
        return Form("pair") if others or weighted else form

    @property
    def has_nll(self) -> bool:
        return "sft" in self.loss_types

    @property
    def averages(self) -> bool:
        return self.average_log_prob

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
            num_pairs: divide by this number instead of P, for a mean over ranks and accumulated batches; int or 0-dim. The
                mean over tokens of an NLL ("sft") stays that of the call.
            valid_rows: not needed from logits; accepted so that calls may be shared with the losses from hidden states.
            ref_logps: (S,), DPO only: precomputed sums (means with `average_log_prob`) of the reference's log-probabilities,
                weighted by the same `token_weights` and `ld_alpha`.

        Returns:
            `PreferenceOutput`, of which only `loss` is differentiable. An empty batch gives 0.

        Raises:
            ValueError: arguments that do not fit together; nothing has been computed then.
        """
        self._check_shape(policy_logits, labels, "policy_logits, ref_logits, labels")
        layout = self._layout_of(labels, cu_seqlens, token_weights, kl_weights, ref_logps, num_pairs)
        self._check_reference("ref_logits", ref_logits, kl_weights, ref_logps)
        labels = layout.shift(labels, self.ignore_index)
        stats = self._stats(policy_logits, ref_logits, labels)
        return self._from_stats(stats, labels, layout, token_weights, kl_weights, ref_logps, num_pairs)

    def pair_losses(self, chosen: SequenceSums, rejected: SequenceSums, mean_tokens: Tensor | float = 1.0) -> Tensor:
        """(P,) differentiable losses. `mean_tokens`: of the batch's chosen sequences, () or a number; "sft" divides by it."""
        ref_margin = None if chosen.ref_logp is None or rejected.ref_logp is None else chosen.ref_logp - rejected.ref_logp
        pairs = Pairs(
            *self.log_ratios(chosen, rejected), chosen.num_tokens, rejected.num_tokens, -chosen.logp / mean_tokens, ref_margin
        )
        options = PairOptions(self.beta, self.label_smoothing, self.discopop_tau)
        parts = [PAIR_LOSSES[name](pairs, options) for name in self.loss_types]
        weights = self.loss_weights or [1.0] * len(parts)
        losses = sum((weight * part for weight, part in zip(weights[1:], parts[1:], strict=True)), weights[0] * parts[0])
        if self.use_weighting:
            losses = losses * (_log_likelihood(chosen) + _log_likelihood(rejected)).exp()
        return losses

    @property
    def statistics(self) -> tuple[str, ...]:
        return (*self.extras, "log_sum_sq_probs") if self.use_weighting else tuple(self.extras)

    def _mean_tokens(self, num_tokens: Tensor) -> Tensor | float:
        return 1.0 if self.averages else super()._mean_tokens(num_tokens)  # 1 where sums are means already

    def op_options(self) -> dict[str, Any]:
        return super().op_options() | {"divergence": self.divergence, "divergence_alpha": self.divergence_alpha}

    def _layout_of(
        self,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        token_weights: Tensor | None,
        kl_weights: Tensor | None,
        ref_logps: Tensor | None,
        num_pairs: float | Tensor | None,
    ) -> SequenceLayout:
        layout = self._pair_layout(labels, cu_seqlens, num_pairs, token_weights=token_weights, kl_weights=kl_weights)
        check_like("ref_logps", ref_logps, (layout.num_sequences,), labels)
        return layout

    def _tail_weights(self, counted: Tensor, num_tokens: Tensor, layout: SequenceLayout) -> Tensor | None:
        """LD-DPO: 1 for as many tokens as both sequences of a pair have, `alpha` for those that only the longer one has."""
        if self.ld_alpha is None:
            return None
        shared = torch.minimum(*split(num_tokens, self.interleaved))
        shared = shared.repeat_interleave(2) if self.interleaved else shared.repeat(2)
        # tokens that count are numbered from 1 through all sequences
        last_shared = num_tokens.long().cumsum(0) - num_tokens + shared
        beyond = counted.flatten().cumsum(0) > last_shared[layout.sequence_ids(counted).flatten()]
        return num_tokens.new_ones(counted.shape).masked_fill(beyond.view(counted.shape), self.ld_alpha)


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
        check_number("alpha", self.alpha, lambda alpha: alpha >= 0, ">= 0")
        check_choice("variant", self.variant, ("tdpo1", "tdpo2"))
        check_choice("reward", self.reward, ("tdpo", "effective"))

    def log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        return tdpo_log_ratios(chosen, rejected, alpha=self.alpha, variant=self.variant)

    def reward_log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        variant = "tdpo1" if self.reward == "tdpo" else self.variant
        return tdpo_log_ratios(chosen, rejected, alpha=self.alpha, variant=variant)

    def kl_slopes(self) -> tuple[float, float]:
        if {*self.loss_types} == {"sft"}:  # which does not see them
            return 0.0, 0.0
        return (1.0, 1.0) if self.variant == "tdpo1" else (0.0, self.alpha)

    def _check_reference(self, name: str, ref: Tensor | None, kl_weights: Tensor | None, ref_logps: Tensor | None) -> None:
        if ref is None or ref_logps is not None:
            raise ValueError(
                f"TDPO needs {name}: its KL takes the reference's whole distribution at each token, of which ref_logps keep "
                f"the label's entry only. Pass {name} alone, or use {'LinearDPOLoss' if 'hidden' in name else 'DPOLoss'} with "
                "ref_logps."
            )


@dataclass(kw_only=True, repr=False, eq=False)
class DPOLoss(PreferenceLoss):
    """DPO (arXiv 2305.18290): a pair loss of plain log-ratios, r = ρ.

    Without reference logits, call `loss(policy_logits, None, labels, ref_logps=...)`. With them the sequential KL is reported,
    but has no part in the loss or its gradient. Options are the fields below and those of `PreferenceLoss`.
    """

    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl"
    """f-DPO (arXiv 2309.16240): the divergence that the policy is regularised by; reverse KL is DPO. See `f_dpo_scores`."""
    f_alpha: float | None = None
    """The paper's α, in (0, 1), for f_divergence="alpha"; TRL's coefficient is 1 − α."""
    f_max_exponent: float | None = None
    """With forward_kl and alpha, let −αρ count as at most this, > 0; "f_divergence/clamped" reports how often that happens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("f_divergence", self.f_divergence, ("reverse_kl", "forward_kl", "js", "alpha"))
        if self.f_divergence == "alpha":
            check_number("f_alpha", self.f_alpha, lambda alpha: 0 < alpha < 1, "in (0, 1) for f_divergence='alpha'")
        elif self.f_alpha is not None:
            raise ValueError(f"f_alpha is an option of f_divergence='alpha'; got f_divergence={self.f_divergence!r}")
        if self.f_max_exponent is not None:
            check_number("f_max_exponent", self.f_max_exponent, lambda exponent: exponent > 0, "> 0, or None")
            if self.f_divergence not in ("forward_kl", "alpha"):
                raise ValueError(f"f_max_exponent is for what has an exponent; got f_divergence={self.f_divergence!r}")
        margins = [name for name in self.loss_types if PAIR_FORMS[name].kind == "margin"]
        if self.f_divergence != "reverse_kl" and not (margins and {*self.loss_types} <= {*margins, "sft"}):
            fit = ", ".join(name for name, form in PAIR_FORMS.items() if form.kind == "margin")
            raise ValueError(
                f"f_divergence={self.f_divergence!r} holds for differences of scores, in which the normaliser cancels: {fit}, "
                f"and sft beside them; got loss_type={self.loss_type!r}"
            )

    def form(self) -> Form:
        return super().form() if self.f_divergence == "reverse_kl" else Form("pair")

    def log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        options = (self.f_divergence, self.f_alpha, self.f_max_exponent)
        return f_dpo_scores(chosen.log_ratio, *options), f_dpo_scores(rejected.log_ratio, *options)

    def reward_log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        return chosen.log_ratio, rejected.log_ratio

    def more_metrics(
        self, chosen: SequenceSums, rejected: SequenceSums, mean_tokens: Tensor | float = 1.0
    ) -> dict[str, Tensor]:
        if self.f_max_exponent is None:
            return {}
        least = -self.f_max_exponent / (self.f_alpha or 1.0)
        clamped = [(sums.log_ratio < least).to(sums.log_ratio.dtype) for sums in (chosen, rejected)]
        return {"f_divergence/clamped": (clamped[0] + clamped[1]) / 2}


def _log_likelihood(sums: SequenceSums) -> Tensor:
    """mean_t(log p(y) − log Σ p²) of each sequence, without a gradient."""
    if sums.log_sum_sq_probs is None:
        raise ValueError("use_weighting needs log_sum_sq_probs of both sequences; got None")
    return (sums.logp.detach() - sums.log_sum_sq_probs) / sums.num_tokens
