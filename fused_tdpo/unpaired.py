"""Preference losses of single sequences, each desirable or not: KTO and BCO, from logits and from hidden states.

    ρ (S,), log p(y) − log q(y) summed over each response ──▶ losses (S,)

A sequence's loss compares its ρ with a constant that other sequences decide, and that the caller passes: the *reference point*.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_tdpo._checks import check_choice, check_like, check_number, describe
from fused_tdpo._layout import SequenceLayout
from fused_tdpo.functions.one_pass import Objective, Sums
from fused_tdpo.heads import LMHead
from fused_tdpo.linear_losses import LinearSequenceLoss, gain
from fused_tdpo.losses import SequenceLoss
from fused_tdpo.ops import linear_inputs
from fused_tdpo.pair_losses import SequenceSums, token_metrics
from fused_tdpo.types import UnpairedOutput


def kto_reference_point(log_ratios: Tensor) -> Tensor:
    """κ = max(0, mean ρ), (), a constant: KTO's estimate of KL(policy ‖ reference), from (S',) `log_ratios` ρ of mismatches.

    Those are prompts, each with the response to another one. Of their logits and labels, under `torch.no_grad()`:

        targets = F.pad(labels, (0, 1), value=-100)[:, 1:]
        stats = token_stats(policy_logits, ref_logits, targets)             # or linear_token_stats, of hidden states
        kappa = kto_reference_point((stats.logp - stats.ref_logp).sum(-1))

    With several processes, gather the log-ratios of all first.

    Raises:
        ValueError: not one number for each sequence, or none at all.
    """
    if not isinstance(log_ratios, Tensor) or log_ratios.dim() != 1:
        raise ValueError(
            f"log_ratios must be (S,), one for each sequence; got {describe(log_ratios)}. Sum over tokens: .sum(-1)"
        )
    if not log_ratios.numel():
        raise ValueError("a mean of log-ratios needs at least one; got none. Keep the last κ, or leave the step out")
    return log_ratios.detach().mean().clamp(min=0)


@dataclass(kw_only=True, repr=False, eq=False)
class UnpairedLoss(SequenceLoss):
    """What losses of single sequences share: S sequences become S losses, and an UnpairedOutput."""

    point_metric: ClassVar[str]
    """Under which TRL logs the reference point, and `metrics` hold it."""

    def sequence_losses(self, log_ratio: Tensor, desirable: Tensor, point: Tensor | float) -> Tensor:
        """(S,) differentiable losses."""
        raise NotImplementedError

    def forward(
        self,
        policy_logits: Tensor,
        ref_logits: Tensor | None,
        labels: Tensor,
        desirable: Tensor,
        *,
        reference_point: float | Tensor | None = None,
        token_weights: Tensor | None = None,
        sequence_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        valid_rows: Sequence[int] | Tensor | None = None,
        ref_logps: Tensor | None = None,
    ) -> UnpairedOutput:
        """Loss of S sequences from their logits. Shifts the labels, not the logits; does not synchronise.

        Args:
            policy_logits: (S, T, V), or packed (total, V) with `cu_seqlens`; float.
            ref_logits: the same of the reference, in any float dtype; gets no gradient. None with `ref_logps`.
            labels: (S, T), or (total,); the model's ordinary, unshifted labels, `ignore_index` on prompt and padding.
            desirable: (S,) bool.
            reference_point: a number or a 0-dim tensor, a constant; see the loss.
            token_weights: as `labels`; the weight of the log-ratio of token `labels[s, t]`. May require grad.
            sequence_weights: (S,) weights of the losses, constants.
            num_sequences: divide by this number instead of S, for a mean over ranks and accumulated batches; int or 0-dim.
            cu_seqlens, valid_rows, ref_logps: as in `DPOLoss`.

        Returns:
            `UnpairedOutput`, of which only `loss` is differentiable. An empty batch gives 0.

        Raises:
            ValueError: arguments that do not fit together; nothing has been computed then.
        """
        self._check_shape(policy_logits, labels, "policy_logits, ref_logits, labels, desirable")
        self._check_reference("ref_logits", ref_logits, None, ref_logps)
        layout = self._layout_of(
            labels, cu_seqlens, desirable, reference_point, token_weights, sequence_weights, num_sequences, ref_logps
        )
        labels = layout.shift(labels, self.ignore_index)
        stats = self._stats(policy_logits, ref_logits, labels)
        return self._from_stats(
            stats, labels, layout, token_weights, None, ref_logps, num_sequences, desirable=desirable,
            reference_point=reference_point, sequence_weights=sequence_weights,
        )  # fmt: skip

    def _layout_of(
        self,
        labels: Tensor,
        cu_seqlens: Tensor | None,
        desirable: Tensor,
        reference_point: float | Tensor | None,
        token_weights: Tensor | None,
        sequence_weights: Tensor | None,
        num_sequences: float | Tensor | None,
        ref_logps: Tensor | None,
    ) -> SequenceLayout:
        layout = self._layout(labels, cu_seqlens, token_weights=token_weights)
        shape = (layout.num_sequences,)
        if not isinstance(desirable, Tensor) or desirable.dtype != torch.bool:
            raise ValueError(
                f"desirable must be a bool tensor of shape {shape}, one for each sequence; got {describe(desirable)}. Call "
                ".bool(), or compare ratings with a threshold."
            )
        for name, tensor in (("desirable", desirable), ("sequence_weights", sequence_weights), ("ref_logps", ref_logps)):
            check_like(name, tensor, shape, labels)
        self._check_count("num_sequences", num_sequences)
        self._check_point(reference_point)
        if isinstance(reference_point, Tensor):
            check_like("reference_point", reference_point, (), labels)
        return layout

    def _check_point(self, point: float | Tensor | None) -> None:
        """Whether there must be one, and which numbers it may be."""
        raise NotImplementedError

    def _losses(
        self, log_ratio: Tensor, desirable: Tensor, reference_point: float | Tensor | None, sequence_weights: Tensor | None
    ) -> Tensor:
        """`sequence_losses`, of what the caller gave."""
        losses = self.sequence_losses(log_ratio, desirable, _constant(reference_point))
        return losses if sequence_weights is None else losses * sequence_weights.detach().to(losses.dtype)

    def _output(  # type: ignore[override]
        self,
        sums: SequenceSums,
        count: float | Tensor | None,
        extras: dict[str, Tensor],
        num_tokens: Tensor,
        swept: tuple[Tensor, Tensor] | None = None,
        *,
        desirable: Tensor,
        reference_point: float | Tensor | None,
        sequence_weights: Tensor | None,
    ) -> UnpairedOutput:
        losses = self._losses(sums.log_ratio, desirable, reference_point, sequence_weights)

        def sides(values: Tensor) -> tuple[Tensor, Tensor]:
            return values.where(desirable, 0.0), values.where(~desirable, 0.0)

        logps, kl = sums.logp.detach(), None if sums.kl is None else sums.kl.detach()
        rewards = self.beta * sums.log_ratio.detach()
        counts = [side.sum() for side in sides(torch.ones_like(rewards))]
        metrics = {
            f"{name}/{side}": total.sum() / number.clamp(min=1)
            for name, values in (("rewards", rewards), ("logps", logps), ("kl", kl))
            if values is not None
            for side, total, number in zip(("chosen", "rejected"), sides(values), counts, strict=True)
        }
        margin = metrics["rewards/chosen"] - metrics["rewards/rejected"]
        metrics["rewards/margins"] = margin.where((counts[0] > 0) & (counts[1] > 0), 0.0)
        metrics[self.point_metric] = torch.zeros_like(margin) + _constant(reference_point)
        return UnpairedOutput(
            loss=self._mean(losses, count, None if swept is None else swept[1]),
            losses=losses.detach(),
            rewards=rewards,
            logps=logps,
            kl=kl,
            metrics=metrics | token_metrics(extras, num_tokens, sides),
        )


@dataclass(kw_only=True, repr=False, eq=False)
class KTOLoss(UnpairedLoss):
    """KTO (arXiv 2402.01306, eq. 7 and 8): λ_D (1 − σ(β (ρ − κ))) if desirable, else λ_U (1 − σ(β (κ − ρ))).

        loss = KTOLoss(beta=0.1)
        out = loss(policy_logits, ref_logits, labels, desirable, reference_point=kappa)     # (S, T, V) twice, (S, T), (S,)

    κ >= 0, in nats: see `kto_reference_point`. It is `out.metrics["kl"]`, TRL's name, an estimate of KL(policy ‖ reference);
    `kl/chosen` and `kl/rejected` are the exact KL(reference ‖ policy), as everywhere here. Options are the fields below and
    those of `SequenceLoss`.
    """

    desirable_weight: float = 1.0
    """λ_D >= 0; with λ_U it makes up for unequal numbers of both kinds."""
    undesirable_weight: float = 1.0
    """λ_U >= 0."""
    loss_type: Literal["kto", "apo_zero_unpaired"] = "kto"
    """The second one (arXiv 2408.06266) has κ = 0, and takes no reference point."""

    point_metric: ClassVar[str] = "kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("desirable_weight", self.desirable_weight, lambda weight: weight >= 0, ">= 0")
        check_number("undesirable_weight", self.undesirable_weight, lambda weight: weight >= 0, ">= 0")
        check_choice("loss_type", self.loss_type, ("kto", "apo_zero_unpaired"))

    def sequence_losses(self, log_ratio: Tensor, desirable: Tensor, point: Tensor | float) -> Tensor:
        z = self.beta * (log_ratio - point)
        return torch.where(desirable, self.desirable_weight * torch.sigmoid(-z), self.undesirable_weight * torch.sigmoid(z))

    def _check_point(self, point: float | Tensor | None) -> None:
        if self.loss_type == "kto" and point is None:
            raise ValueError(
                "KTO needs reference_point, its κ: fused_tdpo.unpaired.kto_reference_point makes it from the log-ratios of "
                "mismatched sequences, prompts each with the response to another one; its docstring shows how. Or use "
                "loss_type='apo_zero_unpaired', which takes none."
            )
        if self.loss_type != "kto" and point is not None:
            raise ValueError(f"loss_type={self.loss_type!r} takes no reference_point; leave it out, or use loss_type='kto'")
        if point is not None:
            _check_value(point, lambda kappa: kappa >= 0, ">= 0, or a 0-dim tensor")


@dataclass(kw_only=True, repr=False, eq=False)
class BCOLoss(UnpairedLoss):
    """BCO (arXiv 2404.04656): −log σ(r − δ) if desirable, else −log σ(−(r − δ)), of rewards r = β ρ.

    δ, in units of rewards, lies halfway between the mean rewards of both kinds so far. Nothing here waits for the GPU:

        delta, totals = 0.0, torch.zeros(2, 2)  # of both kinds: rewards, numbers
        for batch in batches:
            out = loss(policy_logits, ref_logits, labels, desirable, reference_point=delta)
            kinds = torch.stack([desirable, ~desirable]).to(totals)
            totals += torch.stack([kinds @ out.rewards.to(totals), kinds.sum(1)])
            delta = (totals[0] / totals[1].clamp(min=1)).mean()

    (The δ of TRL's former BCOTrainer is the mean of all rewards, `totals[0].sum() / totals[1].sum()`, which differs where the
    numbers do.) With several processes, sum `totals` over them. The loss is a mean over all S, as there; the paper adds up a
    mean for each kind, which is S/S_kind as `sequence_weights`. Where prompts of both kinds differ, ratios of their densities,
    desirable to others, are `sequence_weights` of the others. Options are those of `SequenceLoss`.
    """

    point_metric: ClassVar[str] = "delta"

    def sequence_losses(self, log_ratio: Tensor, desirable: Tensor, point: Tensor | float) -> Tensor:
        z = self.beta * log_ratio - point
        return -F.logsigmoid(torch.where(desirable, z, -z))

    def _check_point(self, point: float | Tensor | None) -> None:
        if point is None:
            raise ValueError(
                "BCO needs reference_point, its δ: halfway between the mean rewards of both kinds so far, 0.0 at first, then "
                "updated from out.rewards after each step as the docstring of BCOLoss shows"
            )
        _check_value(point, lambda _: True, "or a 0-dim tensor")


def _constant(point: float | Tensor | None) -> float | Tensor:
    """A reference point without a gradient; 0 for none."""
    return 0.0 if point is None else point.detach() if isinstance(point, Tensor) else point


def _check_value(point: float | Tensor, fits: Callable[[float], bool], expected: str) -> None:
    """Where looking is free: a tensor on a CPU, and nothing while dynamo traces, to which a number that changes is a symbol."""
    if not (torch.compiler.is_compiling() or (isinstance(point, Tensor) and (point.device.type != "cpu" or point.dim()))):
        check_number("reference_point", float(point.detach() if isinstance(point, Tensor) else point), fits, expected)


@dataclass(kw_only=True, repr=False, eq=False)
class LinearUnpairedLoss(LinearSequenceLoss, UnpairedLoss):
    """What LinearKTOLoss and LinearBCOLoss add to KTOLoss and BCOLoss. The engine goes by pairs, here of any two neighbours."""

    def _objective(
        self, lengths: list[int], num_tokens: Tensor, ref_logps: Tensor | None, dtype: torch.dtype, **call: Any
    ) -> tuple[list[tuple[int, int]], Objective]:
        S = len(lengths)
        P = -(-S // 2)

        def by_pair(values: Tensor) -> Tensor:  # (S,) -> (2, P); a partner of the last one that there is none of gets 0
            return F.pad(values, (0, 2 * P - S)).view(P, 2).t()

        weights = torch.ones_like(num_tokens) if call["sequence_weights"] is None else call["sequence_weights"]
        desirable, shares = by_pair(call["desirable"]), by_pair(weights)
        offset = None if ref_logps is None else by_pair(ref_logps)

        def losses(sums: Sums, pairs: Tensor) -> Tensor:
            log_ratio = sums.log_ratio if offset is None else sums.log_ratio - offset[:, pairs].to(sums.log_ratio.dtype)
            return self._losses(log_ratio, desirable[:, pairs], call["reference_point"], shares[:, pairs]).sum(0)

        both = torch.tensor([True, False])
        scale = gain(lambda zero: self.sequence_losses(zero, both, 0.0), 2, dtype)
        return [(s, s + 1) for s in range(0, 2 * P, 2)], Objective(losses, "sequence", self.kl_slopes(), [1.0] * P, scale)

    def forward(  # type: ignore[override]
        self,
        policy_hidden: Tensor,
        policy_head: Tensor | LMHead,
        ref_hidden: Tensor | None,
        ref_head: Tensor | LMHead | None,
        labels: Tensor,
        desirable: Tensor,
        *,
        reference_point: float | Tensor | None = None,
        token_weights: Tensor | None = None,
        sequence_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_sequences: float | Tensor | None = None,
        valid_rows: Sequence[int] | Tensor | None = None,
        ref_logps: Tensor | None = None,
    ) -> UnpairedOutput:
        """Loss of S sequences from their hidden states. Shifts the labels, not the hidden states.

        Args:
            policy_hidden, policy_head, ref_hidden, ref_head, labels, valid_rows: as in `LinearDPOLoss`.
            desirable, reference_point, token_weights, sequence_weights, cu_seqlens, num_sequences, ref_logps: as in the losses
                from logits.

        Returns:
            `UnpairedOutput`, of which only `loss` is differentiable; `engine` says how it was computed.

        Raises:
            TypeError, ValueError: arguments that do not fit together; nothing has been computed then.
        """
        inputs = linear_inputs(policy_hidden, policy_head, ref_hidden, ref_head, labels, self.vocab_size)
        self._check_reference("ref_hidden", ref_hidden, None, ref_logps)
        layout = self._layout_of(
            labels, cu_seqlens, desirable, reference_point, token_weights, sequence_weights, num_sequences, ref_logps
        )
        return self._from_hidden(
            inputs, policy_hidden, ref_hidden, labels, layout, (token_weights, None), num_sequences, valid_rows, ref_logps,
            desirable=desirable, reference_point=reference_point, sequence_weights=sequence_weights,
        )  # fmt: skip


@dataclass(kw_only=True, repr=False, eq=False)
class LinearKTOLoss(LinearUnpairedLoss, KTOLoss):
    """`KTOLoss` from hidden states: no logits ever, but for one chunk of rows.

        loss = LinearKTOLoss()
        out = loss(policy_hidden, policy_head, ref_hidden, ref_head, labels, desirable, reference_point=kappa)

    Options are those of `KTOLoss` and of `LinearSequenceLoss`.
    """


@dataclass(kw_only=True, repr=False, eq=False)
class LinearBCOLoss(LinearUnpairedLoss, BCOLoss):
    """`BCOLoss` from hidden states. Options are those of `BCOLoss` and of `LinearSequenceLoss`."""
