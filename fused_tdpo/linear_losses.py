"""TDPO and DPO from hidden states: the losses of `fused_tdpo.losses`, where logits exist for one chunk of rows at a time.

    hidden states, heads ──one_pass──▶ losses (P,)                            4 units, 3 with a frozen head, 2 without gradients
    hidden states, heads ──linear_token_stats──▶ per token ──▶ losses (P,)    6 units, 4 with a frozen head: "recompute"

A unit is a product of N rows × V × D. `fused_tdpo.functions.one_pass` tells how; here a loss is taken apart for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any, Literal

import torch
from torch import Tensor

from fused_tdpo._backends import choose_backend
from fused_tdpo._checks import as_divergence, check_chunks, looks_at_labels
from fused_tdpo._chunks import as_counts, host_counts
from fused_tdpo._layout import SequenceLayout
from fused_tdpo.functions.one_pass import Job, Objective, OnePassFunction, Sums, own_autograd, upload
from fused_tdpo.functions.token_stats import stats_dtype
from fused_tdpo.heads import LMHead
from fused_tdpo.losses import DPOLoss, PairLoss, PreferenceLoss, SequenceLoss, TDPOLoss
from fused_tdpo.ops import LinearInputs, linear_inputs, linear_options, linear_stats
from fused_tdpo.pair_losses import SequenceSums
from fused_tdpo.types import Engine, PreferenceOutput

ENGINES = ("auto", "one_pass", "recompute")


def choose_engine(engine: str, backend: str, obstacle: str | None = None) -> Engine:
    """The engine that `engine` means with a chosen backend, and why. `"auto"` picks; a name is that one, or an error.

    `obstacle` says why a loss cannot go in one pass, if so.

    Raises:
        ValueError: an unknown name, or an engine that cannot do it.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(map(repr, ENGINES))}; got {engine!r}")
    if backend == "reference":
        if engine == "one_pass":
            raise ValueError(
                "engine='one_pass' needs a backend that forms gradients itself, and backend='reference' leaves them to "
                "autograd: use backend='torch', 'triton' or 'auto', or engine='auto'"
            )
        return Engine("recompute", "backend='reference' is the specification: whole logits, and gradients by autograd")
    if obstacle is not None:
        if engine == "one_pass":
            raise ValueError(f"engine='one_pass' cannot: {obstacle}. Use engine='recompute', or 'auto', which picks it.")
        return Engine("recompute", obstacle)
    if engine == "recompute":
        return Engine("recompute", "asked for: the general op, whose logits are made again in backward if the head is trained")
    asked = "asked for" if engine == "one_pass" else "each loss depends on sums over its own sequences alone"
    return Engine("one_pass", f"{asked}: each logit is made once, in forward")


@dataclass(kw_only=True, repr=False, eq=False)
class LinearSequenceLoss(SequenceLoss):
    """What losses from hidden states share: the options of a chunk, the choice of an engine, and the way by the general op."""

    engine: Literal["auto", "one_pass", "recompute"] = "auto"
    """One pass makes logits once, recompute a second time in backward; auto picks, and the output says which, and why."""
    max_chunk_bytes: int | None = None
    """Bound on all logit-sized buffers of both models, as in `linear_token_stats`."""
    logits_dtype: torch.dtype | None = None
    """torch.float32 keeps a chunk's logits in float32, as in `linear_token_stats`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_chunks(self.max_chunk_bytes, self.logits_dtype)
        choose_engine(self.engine, self.backend, self.obstacle(weighted=False))

    def obstacle(self, weighted: bool) -> str | None:
        """Why this loss cannot go in one pass, if so. `weighted`: a call with `token_weights`."""
        return None

    def _linear_options(self, inputs: LinearInputs, device: torch.device) -> dict[str, Any]:
        """What `linear_stats` takes from the loss."""
        options = self.op_options()
        divergence = as_divergence(options.pop("divergence"), options.pop("divergence_alpha"))
        backend, _ = choose_backend(self.backend, device.type, (inputs.dtype, inputs.ref_dtype or inputs.dtype))
        return options | {
            "backend": backend,
            "divergence": divergence,
            "max_chunk_bytes": self.max_chunk_bytes,
            "logits_dtype": self.logits_dtype,
        }

    def _from_hidden(
        self,
        inputs: LinearInputs,
        policy_hidden: Tensor,
        ref_hidden: Tensor | None,
        labels: Tensor,
        layout: SequenceLayout,
        weights: tuple[Tensor | None, Tensor | None] = (None, None),
        count: float | Tensor | None = None,
        valid_rows: Sequence[int] | Tensor | None = None,
        ref_logps: Tensor | None = None,
        obstacle: str | None = None,
        **call: Any,
    ) -> Any:
        """Everything as the caller gave it, once it was checked; `call` is what `_from_stats` takes besides, and `obstacle` why
        this call cannot go in one pass."""
        options = self._linear_options(inputs, labels.device)
        engine = choose_engine(self.engine, options["backend"], obstacle or self.obstacle(weights[0] is not None))
        labels = layout.shift(labels, self.ignore_index)
        counts = layout.sum((labels != self.ignore_index).to(stats_dtype(inputs.dtype, inputs.ref_dtype)))
        lengths = wrong = None
        if valid_rows is not None:
            lengths = as_counts(valid_rows, layout.num_sequences, labels.numel())
            wrong = (counts != upload(lengths, labels.device)).any()
            if labels.device.type == "cpu" and not torch.compiler.is_compiling() and wrong:
                expected = counts.long().tolist()
                raise ValueError(
                    f"valid_rows must be the numbers of labels that count in each sequence, {expected}; got {lengths}. A "
                    "sequence's first label never counts. Leave it out to have them counted."
                )
        if engine.name == "one_pass":
            # It holds a callable, which no graph can: dynamo must not look inside.
            one_pass = torch.compiler.disable(self._one_pass) if torch.compiler.is_compiling() else self._one_pass
            out = one_pass(
                policy_hidden, ref_hidden, labels, inputs, layout, counts, weights, lengths, ref_logps, count, options,
                **call,
            )  # fmt: skip
        else:
            stats = linear_stats(
                policy_hidden, ref_hidden, labels, inputs, valid_rows=None if lengths is None else sum(lengths),
                extras=self.statistics, kl_gradient=any(self.kl_slopes()), **options,
            )  # fmt: skip
            out = self._from_stats(stats, labels, layout, *weights, ref_logps, count, **call)
        if wrong is not None:
            out = out._replace(loss=out.loss * torch.where(wrong, float("nan"), 1.0).to(out.loss.dtype))
        return out._replace(engine=engine)

    def _one_pass(
        self,
        policy_hidden: Tensor,
        ref_hidden: Tensor | None,
        labels: Tensor,
        inputs: LinearInputs,
        layout: SequenceLayout,
        counts: Tensor,
        weights: tuple[Tensor | None, Tensor | None],
        lengths: list[int] | None,
        ref_logps: Tensor | None,
        count: float | Tensor | None,
        options: dict[str, Any],
        **call: Any,
    ) -> Any:
        """Takes the loss apart for the engine, and puts its sums together. `labels` are shifted, `counts` those that count in
        each sequence, `lengths` the same on the host; everything else as it came."""
        known = host_counts(counts.long()) if lengths is None else lengths
        if min(known, default=0) < 0:  # of NaN, by which the layout marks them
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {labels.numel()}")
        sequences, objective = self._objective(known, counts, ref_logps, inputs.dtype, **call)
        check_labels = options.pop("check_labels")
        static = linear_options(policy_hidden, inputs, both=False, **options)
        policy, ref = inputs.policy, inputs.ref
        job = Job(
            ref=(None, None, None)
            if ref is None or ref_hidden is None
            else (ref_hidden.reshape(-1, ref_hidden.shape[-1]), ref.weight, ref.bias),
            labels=labels.flatten(),
            sequence_ids=layout.sequence_ids(labels).flatten(),
            sequences=sequences,
            lengths=[*known, *([0] * (2 * len(sequences) - len(known)))],
            objective=objective,
            extras=self.statistics,
            options=static,
            check_labels=looks_at_labels(check_labels, labels, static.backend),
            grad_mode=torch.is_grad_enabled(),
        )
        w, v = (None if t is None else t.flatten() for t in self._row_weights(*weights, labels, counts, layout))
        hidden = policy_hidden.reshape(-1, policy_hidden.shape[-1])
        loss, losses, log_ratio, kl, logp, *more = OnePassFunction.apply(hidden, policy.weight, policy.bias, w, v, job)
        S = len(known)
        extras = {name: total[:S] for name, total in zip(self.statistics, more, strict=True)}
        found = Sums(log_ratio[:S], None if kl is None else kl[:S], logp[:S], extras)
        totals = self._sequence_sums(self._found(found, counts), ref_logps)
        return self._output(totals, count, extras, counts, swept=(losses, loss), **call)

    def _objective(
        self, lengths: list[int], num_tokens: Tensor, ref_logps: Tensor | None, dtype: torch.dtype, **call: Any
    ) -> tuple[list[tuple[int, int]], Objective]:
        """The sequences of each pair, and what the engine must know. A sequence without a partner goes with the number S."""
        raise NotImplementedError

    def _found(self, sums: Sums, num_tokens: Tensor) -> SequenceSums:
        """The engine's sums, as a loss knows them."""
        return SequenceSums(sums.log_ratio, sums.kl, sums.logp, num_tokens, sums.extras.get("log_sum_sq_probs"))


def gain(losses: Callable[[Tensor], Tensor], sequences: int, dtype: torch.dtype) -> float:
    """For float16, the power of two that brings the largest slope of losses by log-ratios (S,), all 0 as where policy and
    reference are equal, into (1/2, 1]; 1 for what has exponents enough."""
    if dtype != torch.float16 or not sequences:
        return 1.0
    with own_autograd():
        zero = torch.zeros(sequences, dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(losses(zero).sum(), zero)
    largest = float(slopes.abs().max())
    return 2.0 ** -ceil(log2(largest)) if largest > 0 else 1.0


@dataclass(kw_only=True, repr=False, eq=False)
class LinearPairLoss(LinearSequenceLoss, PairLoss):
    """Losses of pairs, taken apart for one pass."""

    def obstacle(self, weighted: bool) -> str | None:
        if self.form().kind == "batch":
            return "it sorts the whole batch, so that the slope of a pair takes all pairs' sums"
        if self.has_nll and weighted:
            return "the NLL takes no weights of tokens: beside a log-ratio that does, a row has two directions"
        if self.has_nll and self.kl_slopes()[0]:
            return "the NLL takes no KL: beside a chosen one with a gradient, a row has two directions"
        return None

    def _objective(
        self, lengths: list[int], num_tokens: Tensor, ref_logps: Tensor | None, dtype: torch.dtype, **call: Any
    ) -> tuple[list[tuple[int, int]], Objective]:
        P = len(lengths) // 2
        chosen, rejected = (range(0, 2 * P, 2), range(1, 2 * P, 2)) if self.interleaved else (range(P), range(P, 2 * P))
        sequences = list(zip(chosen, rejected, strict=True))
        ratios = [1.0] * P
        form = self.form()
        if form.by_length or self.averages:
            ratios = [max(lengths[w], 1) / max(lengths[other], 1) for w, other in sequences]

        def by_pair(values: Tensor) -> Tensor:  # (S,) -> (2, P)
            return values.view(-1, 2).t() if self.interleaved else values.view(2, -1)

        pair_tokens, pair_ref_logps = by_pair(num_tokens), None if ref_logps is None else by_pair(ref_logps)
        mean_tokens = self._mean_tokens(num_tokens)

        def losses(sums: Sums, pairs: Tensor) -> Tensor:
            totals = self._found(sums, pair_tokens[:, pairs])
            both = self._sequence_sums(totals, None if pair_ref_logps is None else pair_ref_logps[:, pairs])
            return self.pair_losses(both.map(lambda values: values[0]), both.map(lambda values: values[1]), mean_tokens)

        def of_log_ratios(zero: Tensor) -> Tensor:
            host, no = torch.tensor(lengths).double(), zero.detach()
            sums = self._sequence_sums(SequenceSums(zero, no, zero, host, no), None)
            return self.pair_losses(*sums.split(self.interleaved), self._mean_tokens(host))

        scale = gain(of_log_ratios, len(lengths), dtype)
        return sequences, Objective(losses, form.kind, self.kl_slopes(), ratios, scale)  # type: ignore[arg-type]


@dataclass(kw_only=True, repr=False, eq=False)
class LinearPreferenceLoss(LinearPairLoss, PreferenceLoss):
    """What LinearTDPOLoss and LinearDPOLoss add to TDPOLoss and DPOLoss."""

    def obstacle(self, weighted: bool) -> str | None:
        reason = super().obstacle(weighted or self.ld_alpha is not None)
        return None if reason is None else f"with loss_type={self.loss_type!r} {reason}"

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
    ) -> PreferenceOutput:
        """Loss of P pairs from the hidden states of S = 2P sequences. Shifts the labels, not the hidden states.

        Args:
            policy_hidden: (S, T, D), or packed (total, D) with `cu_seqlens`: the backbone's last hidden states.
            policy_head: its head, a weight (V, D) or an `LMHead`. Hidden states, weight and bias get a gradient where they
                require one.
            ref_hidden, ref_head: the same of the reference, without gradients; D and dtype may differ. With adapters on one
                model pass the policy's own head: one product a chunk then serves both. None for DPO with `ref_logps`.
            labels: (S, T), or (total,); the model's ordinary, unshifted labels, `ignore_index` on prompt and padding.
            token_weights, kl_weights, cu_seqlens, num_pairs, ref_logps: as in the losses from logits.
            valid_rows: (S,) how many labels of each sequence, the first left out, are not `ignore_index`; on the host. Without
                it they are counted, which is the one synchronisation. Wrong numbers raise on a CPU, and give NaN on a GPU.

        Returns:
            `PreferenceOutput`, of which only `loss` is differentiable; `engine` says how it was computed.

        Raises:
            TypeError, ValueError: arguments that do not fit together; nothing has been computed then.
        """
        inputs = linear_inputs(policy_hidden, policy_head, ref_hidden, ref_head, labels, self.vocab_size)
        layout = self._layout_of(labels, cu_seqlens, token_weights, kl_weights, ref_logps, num_pairs)
        self._check_reference("ref_hidden", ref_hidden, kl_weights, ref_logps)
        weights = (token_weights, kl_weights)
        return self._from_hidden(inputs, policy_hidden, ref_hidden, labels, layout, weights, num_pairs, valid_rows, ref_logps)


@dataclass(kw_only=True, repr=False, eq=False)
class LinearTDPOLoss(LinearPreferenceLoss, TDPOLoss):
    """`TDPOLoss` from hidden states: no logits ever, but for one chunk of rows.

        loss = LinearTDPOLoss(beta=0.1, alpha=0.5)
        out = loss(policy_hidden, policy_head, ref_hidden, ref_head, labels)     # (S, T, D) (V, D) (S, T, D) (V, D) (S, T)
        out.loss.backward()

    Options are those of `TDPOLoss` and of `LinearPreferenceLoss`. Do not checkpoint it: it keeps no logits to begin with.
    """


@dataclass(kw_only=True, repr=False, eq=False)
class LinearDPOLoss(LinearPreferenceLoss, DPOLoss):
    """`DPOLoss` from hidden states; without a reference, call `loss(hidden, head, None, None, labels, ref_logps=...)`.

    Options are those of `DPOLoss` and of `LinearPreferenceLoss`.
    """
