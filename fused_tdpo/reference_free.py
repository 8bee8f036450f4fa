"""Preference losses without a reference: SimPO with AlphaPO, CPO, and ORPO, from logits and from hidden states.

Where DPO compares log-ratios, these compare the policy's own log-probabilities of the responses: sums ℓ = Σ log p(y) over the
tokens that count, or means ℓ̄ = ℓ/|y|. Some add the *NLL*, −log p per token of the chosen responses. All else is as in
`fused_tdpo.losses` and `fused_tdpo.linear_losses`; in one pass they take 3 units, 2 with a frozen head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fused_tdpo._checks import check_choice, check_number
from fused_tdpo.heads import LMHead
from fused_tdpo.linear_losses import LinearPairLoss
from fused_tdpo.losses import PairLoss
from fused_tdpo.ops import linear_inputs
from fused_tdpo.pair_losses import (
    PAIR_FORMS,
    PAIR_LOSSES,
    Form,
    PairOptions,
    Pairs,
    SequenceSums,
    f_dpo_scores,
    sigmoid_loss,
)
from fused_tdpo.types import PreferenceOutput


def log_odds(mean_logp: Tensor) -> Tensor:
    """log(p/(1 − p)) of p = e^ℓ̄, which ORPO compares (arXiv 2403.07691, eq. 4).

    Infinite at ℓ̄ = 0, of a response that is certain, or empty. So ℓ̄ counts as at most −ε, the dtype's rounding of 1, and has no
    gradient above: where all labels are certain, no row has a direction to go, e_y − p = 0.
    """
    mean_logp = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    return mean_logp - torch.log(-torch.expm1(mean_logp))


@dataclass(kw_only=True, repr=False, eq=False)
class ReferenceFreeLoss(PairLoss):
    """What these losses share: a contrast of log-probabilities, plus `nll_weight` times the NLL of the chosen responses.

    The NLL is a mean over all chosen tokens of the batch that count, as a model's own loss; `token_weights` are not in it.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if "ref_entropy" in self.extras:
            raise ValueError(
                f"extras 'ref_entropy' is of a reference, and this loss has none: leave it out; got {self.extras!r}"
            )

    @property
    def nll_weight(self) -> float:
        """Weight of the NLL."""
        raise NotImplementedError

    @property
    def has_nll(self) -> bool:
        return self.nll_weight > 0

    def contrast(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(P,) differentiable losses from what `log_ratios` gives."""
        raise NotImplementedError

    def contrast_form(self) -> Form:
        """Of the contrast alone."""
        raise NotImplementedError

    def form(self) -> Form:
        return Form("pair") if self.has_nll else self.contrast_form()

    def pair_losses(self, chosen: SequenceSums, rejected: SequenceSums, mean_tokens: Tensor | float = 1.0) -> Tensor:
        losses = self.contrast(*self.log_ratios(chosen, rejected))
        return losses + self.nll_weight * self._nll(chosen, mean_tokens) if self.has_nll else losses

    def more_metrics(
        self, chosen: SequenceSums, rejected: SequenceSums, mean_tokens: Tensor | float = 1.0
    ) -> dict[str, Tensor]:
        return {"nll_loss": self._nll(chosen, mean_tokens)} if self.has_nll else {}

    def forward(
        self,
        policy_logits: Tensor,
        labels: Tensor,
        *reference: Tensor,
        token_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_pairs: float | Tensor | None = None,
        valid_rows: Sequence[int] | Tensor | None = None,
    ) -> PreferenceOutput:
        """Loss of P pairs from the logits of S = 2P sequences. Shifts the labels, not the logits; does not synchronise.

        Args:
            policy_logits: (S, T, V), or packed (total, V) with `cu_seqlens`; float.
            labels: (S, T), or (total,); the model's ordinary, unshifted labels, `ignore_index` on prompt and padding.
            reference: nothing; it is refused.
            token_weights: as `labels`; the weight of log p of token `labels[s, t]`, but not in the NLL. May require grad.
            cu_seqlens, num_pairs, valid_rows: as in `DPOLoss`.

        Returns:
            `PreferenceOutput`, of which only `loss` is differentiable. An empty batch gives 0.

        Raises:
            ValueError: arguments that do not fit together; nothing has been computed then.
        """
        self._refuse(reference, "policy_logits, labels")
        self._check_shape(policy_logits, labels, "policy_logits, labels")
        layout = self._pair_layout(labels, cu_seqlens, num_pairs, token_weights=token_weights)
        labels = layout.shift(labels, self.ignore_index)
        stats = self._stats(policy_logits, None, labels)
        return self._from_stats(stats, labels, layout, token_weights, count=num_pairs)

    def _refuse(self, reference: tuple[Tensor, ...], order: str) -> None:
        if reference:
            raise TypeError(f"{type(self).__name__} takes no reference: call it with ({order}); {len(reference)} more came")

    def _sequence_sums(self, totals: SequenceSums, ref_logps: Tensor | None) -> SequenceSums:
        """Means beside the numbers of tokens, by which the NLL becomes a sum again."""
        return super()._sequence_sums(totals, ref_logps)._replace(num_tokens=totals.num_tokens.clamp(min=1))

    def _nll(self, chosen: SequenceSums, mean_tokens: Tensor | float) -> Tensor:
        """(P,) whose mean is the NLL."""
        return -(chosen.logp * chosen.num_tokens if self.averages else chosen.logp) / mean_tokens


@dataclass(kw_only=True, repr=False, eq=False)
class SimPOLoss(ReferenceFreeLoss):
    """SimPO (arXiv 2405.14734, eq. 6): −log σ(β (ℓ̄_w − ℓ̄_l) − γ).

        out = SimPOLoss(beta=2.0, gamma=0.5)(policy_logits, labels)     # (S, T, V) (S, T)
        out.loss.backward()

    Options are the fields below and those of `PairLoss`.
    """

    beta: float = field(default=2.0, kw_only=False)
    """Scale of the reward, > 0."""
    gamma: float = 0.5
    """Target margin of rewards, >= 0: γ itself, not γ/β."""
    label_smoothing: float = 0.0
    """Assumed share of swapped pairs, in [0, 0.5)."""
    alpha: float = 0.0
    """AlphaPO (arXiv 2501.03884) compares (1 − p^(−α))/α of p = e^ℓ̄ in place of ℓ̄; 0 is SimPO. Where −α ℓ̄ > 88, float32
    overflows, and the loss or its gradient is infinite or NaN."""
    cpo_alpha: float = 0.0
    """CPO-SimPO: weight of the NLL, >= 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, lambda gamma: gamma >= 0, ">= 0")
        check_number("label_smoothing", self.label_smoothing, lambda share: 0 <= share < 0.5, "in [0, 0.5)")
        check_number("alpha", self.alpha, lambda _: True, "of either sign, or 0")
        check_number("cpo_alpha", self.cpo_alpha, lambda weight: weight >= 0, ">= 0")

    @property
    def averages(self) -> bool:
        return True

    @property
    def nll_weight(self) -> float:
        return self.cpo_alpha

    def log_ratios(self, chosen: SequenceSums, rejected: SequenceSums) -> tuple[Tensor, Tensor]:
        if not self.alpha:
            return chosen.log_ratio, rejected.log_ratio
        return f_dpo_scores(chosen.log_ratio, "alpha", self.alpha), f_dpo_scores(rejected.log_ratio, "alpha", self.alpha)

    def contrast(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return sigmoid_loss(Pairs(chosen - self.gamma / self.beta, rejected), PairOptions(self.beta, self.label_smoothing))

    def contrast_form(self) -> Form:
        return Form("pair") if self.alpha else Form("margin", by_length=True)


@dataclass(kw_only=True, repr=False, eq=False)
class CPOLoss(ReferenceFreeLoss):
    """CPO (arXiv 2401.08417, eq. 3): −log σ(β (ℓ_w − ℓ_l)) + cpo_alpha·NLL.

    The NLL is a mean over tokens, as in TRL's and the authors' code, where the equation sums over a response. Options are the
    fields below and those of `PairLoss`.
    """

    cpo_alpha: float = 1.0
    """Weight of the NLL, >= 0."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """A pair loss of `PAIR_LOSSES`, with log-probabilities for log-ratios; "ipo" takes means ℓ̄, and reports them."""
    label_smoothing: float = 0.0
    """Assumed share of swapped pairs, in [0, 0.5), for "sigmoid"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("cpo_alpha", self.cpo_alpha, lambda alpha: alpha >= 0, ">= 0")
        check_choice("loss_type", self.loss_type, ("sigmoid", "hinge", "ipo"))
        check_number("label_smoothing", self.label_smoothing, lambda share: 0 <= share < 0.5, "in [0, 0.5)")
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(
                f"loss_type={self.loss_type!r} takes no label_smoothing; got {self.label_smoothing}. Set it to 0, or use "
                "loss_type='sigmoid'."
            )

    @property
    def averages(self) -> bool:
        return self.loss_type == "ipo"

    @property
    def nll_weight(self) -> float:
        return self.cpo_alpha

    def contrast(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return PAIR_LOSSES[self.loss_type](Pairs(chosen, rejected), PairOptions(self.beta, self.label_smoothing))

    def contrast_form(self) -> Form:
        return PAIR_FORMS[self.loss_type]


@dataclass(kw_only=True, repr=False, eq=False)
class ORPOLoss(ReferenceFreeLoss):
    """ORPO (arXiv 2403.07691, eq. 6 and 7): NLL − β log σ(log odds(y_w) − log odds(y_l)), of p = e^ℓ̄; see `log_odds`.

    The NLL is a mean over all tokens of the chosen responses, as in the authors' code. For TRL's, over prompt and response, let
    the m labels of the chosen one's prompt count, too, and pass `token_weights` of 0 there, (m + n)/n on the n of its response,
    and 1 on the rejected one. Options are the field below and those of `PairLoss`.
    """

    beta: float = field(default=0.1, kw_only=False)
    """Weight of the odds ratio, > 0: the paper's λ. Rewards are reported as β ℓ̄."""

    @property
    def averages(self) -> bool:
        return True

    @property
    def nll_weight(self) -> float:
        return 1.0

    def contrast(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return self.beta * sigmoid_loss(Pairs(log_odds(chosen), log_odds(rejected)), PairOptions(1.0))

    def contrast_form(self) -> Form:
        return Form("pair")

    def more_metrics(
        self, chosen: SequenceSums, rejected: SequenceSums, mean_tokens: Tensor | float = 1.0
    ) -> dict[str, Tensor]:
        ratio = log_odds(chosen.log_ratio) - log_odds(rejected.log_ratio)
        odds = {"log_odds_chosen": ratio, "log_odds_ratio": torch.nn.functional.logsigmoid(ratio)}
        return super().more_metrics(chosen, rejected, mean_tokens) | odds


@dataclass(kw_only=True, repr=False, eq=False)
class LinearReferenceFreeLoss(LinearPairLoss, ReferenceFreeLoss):
    """What LinearSimPOLoss, LinearCPOLoss and LinearORPOLoss add to the losses from logits."""

    def forward(  # type: ignore[override]
        self,
        policy_hidden: Tensor,
        policy_head: Tensor | LMHead,
        labels: Tensor,
        *reference: Tensor,
        token_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_pairs: float | Tensor | None = None,
        valid_rows: Sequence[int] | Tensor | None = None,
    ) -> PreferenceOutput:
        """Loss of P pairs from the hidden states of S = 2P sequences. Shifts the labels, not the hidden states.

        Args:
            policy_hidden, policy_head, labels, valid_rows: as in `LinearDPOLoss`.
            reference: nothing; it is refused.
            token_weights, cu_seqlens, num_pairs: as in the losses from logits.

        Returns:
            `PreferenceOutput`, of which only `loss` is differentiable; `engine` says how it was computed.

        Raises:
            TypeError, ValueError: arguments that do not fit together; nothing has been computed then.
        """
        self._refuse(reference, "policy_hidden, policy_head, labels")
        inputs = linear_inputs(policy_hidden, policy_head, None, None, labels, self.vocab_size)
        layout = self._pair_layout(labels, cu_seqlens, num_pairs, token_weights=token_weights)
        return self._from_hidden(inputs, policy_hidden, None, labels, layout, (token_weights, None), num_pairs, valid_rows)


@dataclass(kw_only=True, repr=False, eq=False)
class LinearSimPOLoss(LinearReferenceFreeLoss, SimPOLoss):
    """`SimPOLoss` from hidden states: no logits ever, but for one chunk of rows.

        out = LinearSimPOLoss(beta=2.0)(policy_hidden, policy_head, labels)     # (S, T, D) (V, D) (S, T)

    Options are those of `SimPOLoss` and of `LinearPairLoss`.
    """

    beta: float = field(default=SimPOLoss.beta, kw_only=False)  # bases that come first have another


@dataclass(kw_only=True, repr=False, eq=False)
class LinearCPOLoss(LinearReferenceFreeLoss, CPOLoss):
    """`CPOLoss` from hidden states. Options are those of `CPOLoss` and of `LinearPairLoss`."""


@dataclass(kw_only=True, repr=False, eq=False)
class LinearORPOLoss(LinearReferenceFreeLoss, ORPOLoss):
    """`ORPOLoss` from hidden states. Options are those of `ORPOLoss` and of `LinearPairLoss`."""
