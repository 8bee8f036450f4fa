"""TI-DPO (arXiv 2505.19653): TDPO2 whose log-ratios weigh tokens by their importance, and a triplet loss with sampled anchors.

    weights = token_importance(policy, input_ids, attention_mask, labels, head=head)
    out = LinearTIDPOLoss()(hidden, head, ref_hidden, ref_head, labels, token_weights=weights, anchor=anchor)

    loss of a pair = −log σ(β (Σ w_t b_t − Σ w_t c_t − α (K_l − sg K_w))) + γ max(0, Σ (d_t − b_t)² − Σ (c_t − d_t)² + margin)

b, c and d are the log-ratios log p(y_t) − log q(y_t) of the chosen, the rejected and the anchor's tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_tdpo._checks import check_choice, check_number, describe
from fused_tdpo._layout import SequenceLayout
from fused_tdpo.heads import LMHead, backbone, call, eval_mode, unwrap
from fused_tdpo.linear_losses import LinearPreferenceLoss
from fused_tdpo.losses import TDPOLoss
from fused_tdpo.ops import as_head, linear_inputs, linear_stats, token_stats
from fused_tdpo.pair_losses import split
from fused_tdpo.types import FORWARD_KL, PreferenceOutput, TokenStats

# --- importance -------------------------------------------------------------------------------------------------------------


def token_importance(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    mix: float = 0.7,
    scheme: Literal["paper", "code"] = "paper",
    prior_width: float | None = None,
    head: Tensor | LMHead | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Weights of tokens from the gradient of each sequence's last prediction, as `token_weights` of the losses.

        I_t = ‖∂ max_v x(v) / ∂e_t‖₁            x the logits at the last attended position, e_t the embedding of token t
        P_t = exp(−½ ((t − (n − 1)/2)/σ)²)      t = 0 … n − 1 numbers the tokens of a span
        w_t = mix·I_t/Σ I + (1 − mix)·P_t       eq. 5 to 8

    | `scheme` | span | σ | then |
    | --- | --- | --- | --- |
    | `"paper"` | the response: the n tokens whose labels count | n/4 | w as it is: P is 1 in the middle |
    | `"code"` | all n attended tokens, the prompt's too | n/8, at least 1 | P/Σ P in place of P, n·w/Σ w of w: mean 1 |

    `"code"` is what the authors' public code does, with σ as its README trains (its function's own default is n/4). The paper's
    sums Σ w_t b_t run over the response, hence its span and its T, our n; its eq. 5 and 6 leave the T-th token without a
    gradient, ours has one, of the prediction after it.

    One forward and one backward of the backbone, in eval mode, so without dropout, and without checkpoints: all activations
    are kept. Sequences do not see each other; call it on some at a time if memory is short. S rows go through the head.

    Args:
        model: a causal language model of transformers, also inside PEFT or DDP, not sharded. Modes and `.grad` stay.
        input_ids, attention_mask: (S, T), padded on either side. Positions are counted by the mask.
        labels: (S, T) the model's ordinary, unshifted labels, `ignore_index` on prompt and padding.
        mix: λ in [0, 1]: the share of the gradient.
        prior_width: σ/n, > 0; None for the scheme's 1/4 or 1/8.
        head: as `LMHead.from_model(model)` read it before, or a weight (V, D); None to read it now, which checks it, and
            synchronises.

    Returns:
        (S, T) float32, or float64 of such a model, constant; 0 where a label does not count, as the first never does.

    Raises:
        ValueError: arguments that do not fit together, or a model whose embeddings are not found.
        RuntimeError: under `torch.inference_mode()`.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("importance takes a gradient, which torch.inference_mode() rules out; use torch.no_grad() around it")
    check_choice("scheme", scheme, ("paper", "code"))
    check_number("mix", mix, lambda share: 0 <= share <= 1, "in [0, 1]")
    if prior_width is None:
        prior_width = 1 / 4 if scheme == "paper" else 1 / 8
    check_number("prior_width", prior_width, lambda width: width > 0, "> 0, or None")
    for name, tensor in (("input_ids", input_ids), ("attention_mask", attention_mask), ("labels", labels)):
        if (
            not isinstance(tensor, Tensor)
            or tensor.dim() != 2
            or (tensor.shape, tensor.device) != (input_ids.shape, input_ids.device)
        ):
            raise ValueError(
                f"input_ids, attention_mask and labels must be (S, T) on one device; got {name} {describe(tensor)} beside "
                f"input_ids {describe(input_ids)}. Packed rows must be padded: a sequence has one last position."
            )
    attended = attention_mask.bool()
    if not labels.numel():
        return torch.zeros(labels.shape, device=labels.device)
    head = LMHead.from_model(model) if head is None else as_head("head", head)
    scores = _gradient_norms(model, head, input_ids, attention_mask, attended)

    counted = (labels != ignore_index) & attended
    counted[:, :1] = False  # nothing predicts it
    span = counted if scheme == "paper" else attended
    n = span.sum(-1, keepdim=True).clamp(min=1).to(scores.dtype)
    sigma = n * prior_width if scheme == "paper" else (n * prior_width).clamp(min=1)
    prior = torch.exp(-0.5 * ((span.cumsum(-1) - 1 - (n - 1) / 2) / sigma) ** 2).where(span, 0.0)
    gradient = _shares(scores.where(span, 0.0))
    if scheme == "paper":
        weights = mix * gradient + (1 - mix) * prior
    else:
        weights = n * _shares(mix * gradient + (1 - mix) * _shares(prior))
    return weights.where(counted, 0.0)


def _shares(values: Tensor) -> Tensor:
    """Of the sum of each row; 0 where that is 0."""
    total = values.sum(-1, keepdim=True)
    return values / total.where(total != 0, 1.0)


def _gradient_norms(model: Any, head: LMHead, input_ids: Tensor, attention_mask: Tensor, attended: Tensor) -> Tensor:
    """(S, T): ‖∂ max_v x(v) / ∂e_t‖₁, x the logits at each sequence's last attended position, before a soft-cap, whose slope is
    one factor of a whole row and may round to 0."""
    embeddings: list[Tensor] = []

    def keep(module: Any, args: Any, output: Tensor) -> Tensor:
        embeddings.append(output.detach().requires_grad_())
        return embeddings[-1]

    body, module = backbone(model), unwrap(model).get_input_embeddings()
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in signature(body.forward).parameters:
        inputs["position_ids"] = (attended.cumsum(-1) - 1).clamp(min=0)
    handle = module.register_forward_hook(keep)
    try:
        with eval_mode(model), torch.enable_grad():
            hidden = call(body, "last_hidden_state", **inputs)
            if len(embeddings) != 1:
                raise ValueError(
                    f"{type(body).__name__} must look tokens up once, in the module of get_input_embeddings(); it called "
                    f"{type(module).__name__} {len(embeddings)} times. Make the weights by hand, as (S, T) token_weights."
                )
            last = (attended * torch.arange(1, attended.shape[1] + 1, device=attended.device)).argmax(-1)
            hidden = hidden.take_along_dim(last[:, None, None], 1).to(head.weight.device)
            target = replace(head, softcap=None).logits(hidden).max(-1).values
            (gradient,) = torch.autograd.grad(target.sum(), embeddings)
    finally:
        handle.remove()
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)).abs().sum(-1)


# --- losses -----------------------------------------------------------------------------------------------------------------

Anchor = tuple[Tensor, Tensor, Tensor]
"""Logits or hidden states (P, T', ·) of the policy and of the reference, and unshifted labels (P, T')."""


@dataclass(kw_only=True, repr=False, eq=False)
class TIDPOLoss(TDPOLoss):
    """TI-DPO (arXiv 2505.19653, eq. 11 to 14): weighted TDPO2 plus gamma times a triplet loss.

        loss = TIDPOLoss()
        out = loss(policy_logits, ref_logits, labels, token_weights=weights, anchor=(logits, ref_logits, labels))

    The triplet loss draws the policy's own response, the anchor, towards the chosen one and away from the rejected one:

        max(0, Σ (d_t − b_t)² − Σ (c_t − d_t)² + margin)        eq. 13

    b, c and d are the log-ratios of the t-th token of the chosen, the rejected and the anchor's response; each sum runs over
    the t that both have. No weights enter it, and all three get a gradient.

    `token_weights` weigh the log-ratios alone. As in the authors' code, and in their table of hyper-parameters though not in
    eq. 12, the base is TDPO2, and its sequential KL is unweighted unless `kl_weights` are given. β is inside the sigmoid, as
    in their algorithm 1. Without weights and anchor this is `TDPOLoss`, whose options it has besides the fields below.
    """

    gamma: float = 0.1
    """γ >= 0, the weight of the triplet loss."""
    margin: float = 0.01
    """Of the triplet loss, >= 0, in squared nats. The paper calls it α, as its weight of the KL, which is the one in its table;
    this number is that of its code's README."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("gamma", self.gamma, lambda gamma: gamma >= 0, ">= 0")
        check_number("margin", self.margin, lambda margin: margin >= 0, ">= 0")

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
        anchor: Anchor | None = None,
    ) -> PreferenceOutput:
        """`TDPOLoss.forward`, and the triplet loss where there is an anchor; `out.metrics["triplet"]` is its mean over pairs.

        Args:
            policy_logits, ref_logits, labels, token_weights, kl_weights, cu_seqlens, num_pairs, valid_rows, ref_logps:
                as there.
            anchor: (logits, ref_logits, labels) of one sampled response for each pair, in the order of the pairs: (P, T', V)
                twice and unshifted (P, T'), padded whatever the pairs are; T' may differ from T. With `inplace_backward`, of a
                forward of its own.
        """
        self._check_shape(policy_logits, labels, "policy_logits, ref_logits, labels")
        layout = self._layout_of(labels, cu_seqlens, token_weights, kl_weights, ref_logps, num_pairs)
        self._check_reference("ref_logits", ref_logits, kl_weights, ref_logps)
        self._check_anchor("logits", anchor, policy_logits, ref_logits, labels, layout)
        labels = layout.shift(labels, self.ignore_index)
        stats = self._stats(policy_logits, ref_logits, labels)
        return self._from_stats(stats, labels, layout, token_weights, kl_weights, ref_logps, num_pairs, anchor=anchor)

    def _check_anchor(
        self,
        what: str,
        anchor: Anchor | None,
        policy: Tensor,
        ref: Tensor | None,
        labels: Tensor,
        layout: SequenceLayout,
    ) -> None:
        if anchor is None or ref is None:
            return
        if self.form().kind == "batch":
            raise ValueError(
                f"an anchor belongs to a pair, and the losses of loss_type={self.loss_type!r} to ranks of the whole batch; "
                "leave out one of them"
            )
        order = f"anchor must be ({what}, ref_{what}, labels) of one response for each pair"
        if not (isinstance(anchor, tuple) and len(anchor) == 3 and all(isinstance(part, Tensor) for part in anchor)):
            got = ", ".join(map(describe, anchor)) if isinstance(anchor, tuple) else describe(anchor)
            raise ValueError(f"{order}, three tensors; got {got}. Run both models on the sampled responses.")
        P, found = layout.num_sequences // 2, anchor[2]
        rows = (P, found.shape[-1] if found.dim() else 0)
        for name, part, shape in (
            ("labels", found, rows),
            (what, anchor[0], (*rows, policy.shape[-1])),
            (f"ref_{what}", anchor[1], (*rows, ref.shape[-1])),
        ):
            if part.shape != shape or part.device != labels.device:
                raise ValueError(
                    f"{order}: {name} must have shape {shape} on {labels.device}; got {describe(part)}. There are {P} pairs; "
                    "pad their anchors, in the order of the pairs, also where the pairs are packed."
                )

    def _from_stats(  # type: ignore[override]
        self,
        stats: TokenStats,
        labels: Tensor,
        layout: SequenceLayout,
        token_weights: Tensor | None = None,
        kl_weights: Tensor | None = None,
        ref_logps: Tensor | None = None,
        count: float | Tensor | None = None,
        *,
        anchor: Anchor | None = None,
        heads: tuple[Any, ...] = (),
    ) -> PreferenceOutput:
        out = super()._from_stats(stats, labels, layout, token_weights, kl_weights, ref_logps, count)
        if anchor is None:
            return out
        anchor_layout = SequenceLayout(anchor[2], None)
        anchor_labels = anchor_layout.shift(anchor[2], self.ignore_index)
        anchor_stats = self._anchor_stats(anchor, anchor_labels, *heads)
        length = anchor_labels.shape[1]
        (b, c), (has_b, has_c) = (
            split(values, self.interleaved) for values in _by_token(stats, labels != self.ignore_index, layout, length)
        )
        d, has_d = _by_token(anchor_stats, anchor_labels != self.ignore_index, anchor_layout, length)
        near = ((d - b) ** 2).where(has_b & has_d, 0.0).sum(-1)
        far = ((c - d) ** 2).where(has_c & has_d, 0.0).sum(-1)
        triplet = torch.relu(near - far + self.margin)
        return out._replace(
            loss=out.loss + self.gamma * self._mean(triplet, count),
            losses=out.losses + self.gamma * triplet.detach(),
            metrics=out.metrics | {"triplet": triplet.detach().sum() / max(len(triplet), 1)},
        )

    def _anchor_stats(self, anchor: Anchor, labels: Tensor) -> TokenStats:
        """Log-probabilities at already shifted labels; of divergences, which come with them unused, the cheapest."""
        options = self.op_options() | {"divergence": "forward_kl", "divergence_alpha": None}
        in_place = self.inplace_backward
        return token_stats(*anchor[:2], labels, vocab_size=self.vocab_size, inplace_backward=in_place, **options)


def _by_token(stats: TokenStats, counted: Tensor, layout: SequenceLayout, length: int) -> tuple[Tensor, Tensor]:
    """(S, length) log-ratios by the number of a token in its response, and whether there is such a token; 0 where not."""
    log_ratios = stats.logp if stats.ref_logp is None else stats.logp - stats.ref_logp
    num_tokens = layout.sum(counted.to(log_ratios.dtype)).long()
    last = num_tokens.cumsum(0)[:, None]  # tokens that count are numbered from 1 through all sequences
    wanted = last - num_tokens[:, None] + torch.arange(1, length + 1, device=counted.device)
    rows = torch.searchsorted(counted.flatten().cumsum(0), wanted)  # one past the end, where there is none
    return F.pad(log_ratios.flatten(), (0, 1))[rows].where(wanted <= last, 0.0), wanted <= last


@dataclass(kw_only=True, repr=False, eq=False)
class LinearTIDPOLoss(LinearPreferenceLoss, TIDPOLoss):
    """`TIDPOLoss` from hidden states.

        loss = LinearTIDPOLoss()
        out = loss(hidden, head, ref_hidden, ref_head, labels, token_weights=weights, anchor=(hidden, ref_hidden, labels))

    Options are those of `TIDPOLoss` and of `LinearPreferenceLoss`. With an anchor single tokens couple, which takes the
    recompute engine.
    """

    def forward(  # type: ignore[override]
        self,
        policy_hidden: Tensor,
        policy_head: Tensor | LMHead,
        ref_hidden: Tensor | None,
        ref_head: Tensor | LMHead | None,
        labels: Tensor,
        *,
        token_weights: Tensor | None = None,
        kl_weights: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_pairs: float | Tensor | None = None,
        valid_rows: Sequence[int] | Tensor | None = None,
        ref_logps: Tensor | None = None,
        anchor: Anchor | None = None,
    ) -> PreferenceOutput:
        """`LinearTDPOLoss.forward`, and the triplet loss where there is an anchor.

        Args:
            policy_hidden, policy_head, ref_hidden, ref_head, labels, token_weights, kl_weights, cu_seqlens, num_pairs,
                valid_rows, ref_logps: as there.
            anchor: (hidden, ref_hidden, labels), as in `TIDPOLoss`: (P, T', D) of the policy, (P, T', D) of the reference, and
                (P, T'). They go through the heads of the call; how many of these labels count is a synchronisation more.
        """
        inputs = linear_inputs(policy_hidden, policy_head, ref_hidden, ref_head, labels, self.vocab_size)
        layout = self._layout_of(labels, cu_seqlens, token_weights, kl_weights, ref_logps, num_pairs)
        self._check_reference("ref_hidden", ref_hidden, kl_weights, ref_logps)
        self._check_anchor("hidden", anchor, policy_hidden, ref_hidden, labels, layout)

        obstacle = None if anchor is None else "the triplet compares single tokens, of which one pass keeps sums alone"
        return self._from_hidden(
            inputs, policy_hidden, ref_hidden, labels, layout, (token_weights, kl_weights), num_pairs, valid_rows, ref_logps,
            obstacle, anchor=anchor, heads=(policy_head, ref_head),
        )  # fmt: skip

    def _anchor_stats(  # type: ignore[override]
        self, anchor: Anchor, labels: Tensor, policy_head: Tensor | LMHead, ref_head: Tensor | LMHead | None
    ) -> TokenStats:
        inputs = linear_inputs(anchor[0], policy_head, anchor[1], ref_head, labels, self.vocab_size)
        options = self._linear_options(inputs, labels.device) | {"divergence": FORWARD_KL}
        return linear_stats(*anchor[:2], labels, inputs, valid_rows=None, kl_gradient=False, **options)
