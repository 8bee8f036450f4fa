"""A preference loss from hidden states in one sweep: 4 units with a trained head, 3 with a frozen one, 2 without gradients.

A row's gradient takes its loss's slope, which takes the sums over both sequences, which take all their logits. Yet logits need
not be made twice. The loss of a pair depends on its rows through sums over each sequence s alone, R_s of log-ratios and K_s of
divergences, so the gradient of row t is (fused_tdpo/_projection.py has the units, docs/math.md the derivation)

    d_t = g_s·[w_t (e_y - p) + b_s·v_t (p - q)]        g_s = ∂loss/∂R_s,  b_s = (∂loss/∂K_s) / g_s

with weights w_t, v_t of the row; for p - q stands the gradient of another divergence, if it is not KL(q || p). Where b_s is
known beforehand, as in every loss of the DPO and TDPO families, so is the row's *direction*, and all that is missing is one
number a sequence:

- frozen head: directions times the head are stored, row by row, and scaled in backward.
- trained head, pairs that fit into a chunk: groups of them make logits, sums, slopes and gradients while they have the logits.
- trained head, longer pairs: directions are summed over rows into buffers, one for each number that is still unknown, which are
  scaled when it is known, at the end of the sequence or the pair. The first one needs no memory of its own.

The engine knows no loss. It is handed an `Objective`, and differentiates that by autograd, on vectors of pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fused_tdpo._checks import check_labels_in_range
from fused_tdpo._chunks import Group, Plan, plan_pairs, split
from fused_tdpo._projection import HeadSums, scaled_head_gradient
from fused_tdpo.functions.linear_token_stats import LinearOptions, make_tiles, no_autocast
from fused_tdpo.functions.token_stats import stat_names, stats_dtype

SLOPE_TOLERANCE = 1e-3
"""Relative difference of declared and found slopes that rounding may make; beyond it a loss has declared itself wrongly."""


class Sums(NamedTuple):
    """Sums over the rows of each sequence, chosen ones first: (2, P) each, of P pairs."""

    log_ratio: Tensor
    """R, of w·(logp - ref_logp), or of w·logp without a reference."""
    kl: Tensor | None
    """K, of v·kl."""
    logp: Tensor
    """Of logp alone. Its slope is added to that of R; with weights w, whose rows are R's alone, there must be none."""
    extras: dict[str, Tensor]
    """Name -> sums of the extras, without a gradient."""


class Objective(NamedTuple):
    """What the engine must know of a loss. `form` says which slopes a pair leaves open until all its rows are known:

    "margin"    it depends on R_w·c_w - R_l·c_l alone: one number, the other is -`ratio` times it
    "sequence"  it is a sum of a function of the chosen and one of the rejected sequence: each known at the end of its rows
    "pair"      anything else: two numbers
    """

    losses: Callable[[Sums, Tensor], Tensor]
    """(sums of P' pairs, their indices (P',)) -> losses (P',), differentiable. A pair's loss depends on its own sums alone."""
    form: Literal["margin", "sequence", "pair"]
    kl_slopes: tuple[float, float]
    """b of chosen and of rejected sequences: what ∂loss/∂K is, in units of ∂loss/∂R."""
    ratios: list[float]
    """c_l / c_w of each pair, for "margin"; else not looked at."""
    gain: float = 1.0
    """A power of two that makes slopes numbers near 1, for float16: p times a small slope is lost there, and a loss scale, as a
    part of the upstream gradient, comes too late to save it. Forward multiplies by it, backward divides."""


@dataclass(frozen=True, eq=False)
class Job:
    """The arguments of a sweep that get no gradient. N rows, S = 2P sequences."""

    ref: tuple[Tensor | None, Tensor | None, Tensor | None]
    """Hidden states, weight and bias of the reference."""
    labels: Tensor
    """(N,) aligned."""
    sequence_ids: Tensor
    """(N,) the sequence of each row."""
    sequences: list[tuple[int, int]]
    """(chosen, rejected) of each pair."""
    lengths: list[int]
    """(S,) rows that count."""
    objective: Objective
    extras: tuple[str, ...]
    """Further statistics to sum over each sequence, of those that `token_stats` calls so."""
    options: LinearOptions
    check_labels: bool
    grad_mode: bool
    """Whether autograd recorded at the call; it never does within a Function's forward."""


class OnePassFunction(torch.autograd.Function):
    """`(Σ losses, losses (P,), R (S,), K (S,) or None, Σ logp (S,), *sums of the extras (S,))` of a `Job`; only the first is
    differentiable.

    Args of `apply`, all positional:
        hidden, weight, bias: (N, D), (V, D), (V,) or None, of the policy.
        token_weights, kl_weights: (N,) weights w, v, or None for 1. job: the rest.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_weights: Tensor | None,
        kl_weights: Tensor | None,
        job: Job,
    ) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:5] if job.grad_mode else (False,) * 5
        with no_autocast(hidden):
            sweep = Sweep(hidden, weight, bias, token_weights, kl_weights, job, needs)
            sweep.run()
        heads = sweep.head.totals()
        ctx.save_for_backward(sweep.order, sweep.directions, sweep.scales, *heads, *sweep.weight_slopes())
        ctx.like = [None if t is None else (t.shape, t.dtype) for t in (hidden, weight, bias, token_weights, kl_weights)]
        ctx.needs, ctx.rows, ctx.backend, ctx.gain = needs, job.options.rows, job.options.backend, job.objective.gain
        total, *rest = sweep.result()
        ctx.mark_non_differentiable(*(t for t in rest if t is not None))
        return total, *rest

    @staticmethod
    def backward(ctx, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the one-pass engine has no second derivative: a double backward, as create_graph=True asks for, needs "
                "engine='recompute' with backend='reference'"
            )
        upstream = upstream / ctx.gain
        order, directions, scales, d_weight, d_bias, *slopes = ctx.saved_tensors
        found: list[Any] = [None] * 5
        if ctx.needs[0]:
            shape, dtype = ctx.like[0]
            found[0] = torch.zeros(shape, dtype=dtype, device=order.device)
            for part in split(0, len(order), ctx.rows):  # scaled once, in float32, by all that was unknown in forward
                found[0][order[part]] = (directions[part] * (scales[part] * upstream)[:, None]).to(dtype)
        for i, total in ((1, d_weight), (2, d_bias)):
            if ctx.needs[i]:
                shape, dtype = ctx.like[i]
                found[i] = scaled_head_gradient(total, shape, dtype, upstream, ctx.backend)
        for i, slope in zip((3, 4), slopes, strict=True):
            if ctx.needs[i]:
                shape, dtype = ctx.like[i]
                found[i] = torch.zeros(shape, dtype=dtype, device=order.device)
                found[i][order] = (slope * upstream).to(dtype)
        return *found, None


class Sweep:
    """One way through all rows that count, pair by pair in the order of a plan: everything in here is in that order."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, token_weights: Tensor | None, kl_weights: Tensor | None,
        job: Job, needs: tuple[bool, ...],
    ) -> None:  # fmt: skip
        self.options, self.objective = job.options, job.objective
        need_hidden, need_weight, need_bias, *self.need_weights = needs
        self.trained = need_weight or need_bias
        self.turns = need_hidden or self.trained
        self.differentiates = any(needs)
        if job.check_labels:
            check_labels_in_range(job.labels, self.options.V, self.options.ignore_index)

        pair_lengths = [(job.lengths[chosen], job.lengths[rejected]) for chosen, rejected in job.sequences]
        self.n = sum(job.lengths)
        P, S, device = len(pair_lengths), len(job.lengths), hidden.device
        if self.trained:
            self.plan = plan_pairs(pair_lengths, self.options.rows)
        else:  # nothing is summed over rows: chunks may end anywhere, and all pairs go as one long one
            self.plan = Plan(list(range(P)), [Group(slice(0, P), slice(0, self.n), is_long=True)])
        self.pair_lengths = [pair_lengths[pair] for pair in self.plan.pairs]
        sequences = [sequence for pair in self.plan.pairs for sequence in job.sequences[pair]]
        self.pairs, self.sequences = upload(self.plan.pairs, device), upload(sequences, device)
        self.lengths = upload([job.lengths[s] for s in sequences], device)
        rank = torch.empty_like(self.sequences).scatter_(0, self.sequences, torch.arange(S, device=device))
        place = rank[job.sequence_ids].masked_fill(job.labels == self.options.ignore_index, S)
        self.order = torch.argsort(place, stable=True)[: self.n]

        self.tiles = make_tiles((hidden, weight, bias, *job.ref, job.labels), self.options, self.n)
        self.like: dict[str, Any] = {"dtype": stats_dtype(self.options.dtype, self.options.ref_dtype), "device": device}
        self.extras = job.extras
        names = stat_names(job.ref[0] is not None, ",".join(self.extras))
        self.stats = {name: torch.zeros(self.n, **self.like) for name in names}
        self.w, self.v = (
            None if t is None else t.detach()[self.order].to(self.like["dtype"]) for t in (token_weights, kl_weights)
        )
        self.b = torch.empty((2, 1), **self.like)
        self.b[0], self.b[1] = self.objective.kl_slopes
        self.kl_turns = "kl" in self.stats and any(self.objective.kl_slopes)
        self.losses = torch.empty(P, **self.like)
        self.sums = torch.zeros((3 + len(self.extras), 2, P), **self.like)  # R, K, of logp, of extras; of chosen, of rejected
        self.slopes = torch.empty((2, 2, P), **self.like)  # ∂/∂R, ∂/∂K, times the gain
        self.directions = hidden.new_empty((self.n, hidden.shape[1]), dtype=self.options.dtype) if need_hidden else None
        self.scales = torch.ones(self.n, **self.like) if need_hidden else None
        self.head = HeadSums(self.tiles.policy, need_weight, need_bias)
        self.spare: list[HeadSums] = []

    def run(self) -> None:
        """Sweeps."""
        for group in self.plan.groups:
            if group.is_long:
                self._along_directions(group)
            else:
                saved = self._fold(group.rows)
                self._differentiate(group)
                if not self.kl_turns:  # all that is believed here: that the KL has no slope
                    self._verify(group)
                g_logp, g_kl = self._by_row(group, *self.slopes[:, :, group.pairs])
                self._turn(group.rows, saved, g_logp, g_kl, self.head)

    def _along_directions(self, group: Group) -> None:
        """Rows whose slopes are known only afterwards: those of one long pair, or with a frozen head of all pairs."""
        R = torch.ones((2, group.pairs.stop - group.pairs.start), **self.like)
        parts, form = [group.rows], self.objective.form
        if self.trained:
            (first,) = range(group.pairs.start, group.pairs.stop)
            if form == "margin":
                R[1] = -self.objective.ratios[self.plan.pairs[first]]
            else:
                middle = group.rows.start + self.pair_lengths[first][0]
                parts = [slice(group.rows.start, middle), slice(middle, group.rows.stop)]
        g_logp, g_kl = self._by_row(group, R, R * self.b) if self.turns else (None, None)

        unknown: list[HeadSums | None] = [None] * len(parts)  # a buffer for each slope
        early = None
        for i, rows in enumerate(parts):
            for part in split(rows.start, rows.stop, self.options.rows):
                saved = self._fold(part)
                if g_logp is not None:
                    if self.trained and unknown[i] is None:
                        unknown[i] = self._open()
                    here = slice(part.start - group.rows.start, part.stop - group.rows.start)
                    self._turn(part, saved, g_logp[here], None if g_kl is None else g_kl[here], unknown[i])
            if self.trained and form == "sequence" and i == 0:
                self._differentiate(group)
                early = self.slopes[:, 0, group.pairs].clone()
                self._close(unknown[0], early[0])
                unknown[0] = None
        self._differentiate(group)
        if not self.differentiates:
            return
        self._verify(group, R if self.trained and form == "margin" else None, early)
        for i, buffer in enumerate(unknown):
            self._close(buffer, self.slopes[0, i, group.pairs])
        if self.scales is not None:
            slopes = self.slopes[0, :, group.pairs]
            if self.trained and form == "margin":  # the other slope is in the direction already
                slopes = slopes[:1].expand(2, -1)
            self.scales[group.rows] = self._repeat(group, slopes)

    def _open(self) -> HeadSums:
        """A buffer for sums whose slope is unknown. The first one is the total itself, while that holds nothing else."""
        if self.head.fresh:
            return self.head
        return self.spare.pop() if self.spare else self.head.another()

    def _close(self, buffer: HeadSums | None, slope: Tensor) -> None:
        """Its slope (1,) is known."""
        if buffer is None:
            return
        if buffer is self.head:
            self.head.scale_(slope)
        else:
            self.head.add_scaled_(buffer, slope)
            self.spare.append(buffer)

    def _fold(self, part: slice) -> Tensor:
        """Makes the logits of a chunk, and statistics of them; returns what their gradient needs."""
        self.tiles.project(self.order[part])
        stats, saved = self.tiles.stats(self.extras)
        for name, stat in stats.items():
            self.stats[name][part] = stat
        return saved

    def _turn(self, part: slice, saved: Tensor, g_logp: Tensor, g_kl: Tensor | None, head: HeadSums | None) -> None:
        """Turns the logits of the chunk into their gradient, and multiplies that."""
        d = self.tiles.gradient(saved, g_logp, g_kl)
        if self.directions is not None:
            self.tiles.policy.d_hidden(d, self.directions[part])
        if head is not None:
            head.add(d, self.tiles.h)

    def _repeat(self, group: Group, values: Tensor) -> Tensor:
        """(2, P') numbers of sequences -> those of their rows."""
        lengths = self.lengths[2 * group.pairs.start : 2 * group.pairs.stop]
        return torch.repeat_interleave(values.t().flatten(), lengths, output_size=group.rows.stop - group.rows.start)

    def _by_row(self, group: Group, R: Tensor, K: Tensor) -> tuple[Tensor, Tensor | None]:
        """Upstream gradients of logp and kl of each row, from those of the sums, (2, P') each."""
        g_logp, g_kl = self._repeat(group, R), self._repeat(group, K) if self.kl_turns else None
        if self.w is not None:
            g_logp = g_logp * self.w[group.rows]
        if self.v is not None and g_kl is not None:
            g_kl = g_kl * self.v[group.rows]
        return g_logp, g_kl

    def _differentiate(self, group: Group) -> None:
        """Sums, losses and slopes of the group's pairs, from the statistics of their rows."""
        lengths = self.lengths[2 * group.pairs.start : 2 * group.pairs.stop]
        stats = {name: stat[group.rows] for name, stat in self.stats.items()}
        ratio, kl = _log_ratio(stats), stats.get("kl")
        rows = (
            ratio if self.w is None else ratio * self.w[group.rows],
            kl if kl is None or self.v is None else kl * self.v[group.rows],
            stats["logp"],
            *(stats[name] for name in self.extras),
        )
        for total, values in zip(self.sums[:, :, group.pairs], rows, strict=True):
            if values is not None:
                sums = torch.segment_reduce(values.double(), "sum", lengths=lengths, unsafe=True, initial=0)
                total.copy_(sums.view(-1, 2).t())

        with own_autograd(self.differentiates):
            R, K, logp = self.sums[:3, :, group.pairs].clone().requires_grad_(self.differentiates).unbind()
            extras = dict(zip(self.extras, self.sums[3:, :, group.pairs], strict=True))
            losses = self.objective.losses(Sums(R, K if "kl" in stats else None, logp, extras), self.pairs[group.pairs])
            if self.differentiates:
                of_R, of_K, of_logp = torch.autograd.grad(losses.sum(), (R, K, logp), materialize_grads=True)
                of_R = of_R + of_logp if self.w is None else of_R.masked_fill(of_logp != 0, float("nan"))
                self.slopes[:, :, group.pairs] = torch.stack((of_R, of_K)) * self.objective.gain
        self.losses[group.pairs] = losses.detach()

    def _verify(self, group: Group, R: Tensor | None = None, early: Tensor | None = None) -> None:
        """Losses and slopes become NaN where the objective is not what it has declared: in its slopes of K, in those of R if
        they are given, in the chosen sequence's slopes if they have been taken early."""
        slopes = self.slopes[:, :, group.pairs]
        claims = [(slopes[1], slopes[0] * self.b)]
        if R is not None:
            claims.append((slopes[0, 1], slopes[0, 0] * R[1]))
        if early is not None:
            claims.append((early, slopes[:, 0]))
        for found, claimed in claims:
            # tiny: of a saturated pair's slopes, below the normal numbers, rounding leaves nothing to compare
            wrong = (found - claimed).abs() > SLOPE_TOLERANCE * (found.abs() + claimed.abs()) + torch.finfo(found.dtype).tiny
            wrong = wrong.any(0) if wrong.dim() > 1 else wrong
            slopes.masked_fill_(wrong, float("nan"))
            self.losses[group.pairs].masked_fill_(wrong, float("nan"))

    def weight_slopes(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the rows' weights w and v, where they are needed."""
        everything = Group(slice(0, len(self.losses)), slice(0, self.n), is_long=False)
        need_w, need_v = self.need_weights
        return (
            self._repeat(everything, self.slopes[0]) * _log_ratio(self.stats) if need_w else None,
            self._repeat(everything, self.slopes[1]) * self.stats["kl"] if need_v else None,
        )

    def result(self) -> tuple[Tensor | None, ...]:
        """Σ losses, losses, R, K, Σ logp, sums of the extras, in the order of pairs and of sequences."""
        losses = torch.empty_like(self.losses).index_copy_(0, self.pairs, self.losses)
        R, K, *sums = (torch.empty_like(t).index_copy_(0, self.sequences, t) for t in self.sums.transpose(1, 2).flatten(1))
        return losses.sum(), losses, R, K if "kl" in self.stats else None, *sums


def _log_ratio(stats: dict[str, Tensor]) -> Tensor:
    """log p(y) - log q(y) of rows; log p(y) alone without a reference."""
    return stats["logp"] - stats["ref_logp"] if "ref_logp" in stats else stats["logp"]


@contextmanager
def own_autograd(enabled: bool = True) -> Iterator[None]:
    """Autograd on small vectors within a Function or a loss. The hooks of a checkpoint around us must not see it: each tensor
    that it saves would make that run everything again."""
    with torch.set_grad_enabled(enabled), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        yield


def upload(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host on a device, without waiting for it."""
    tensor = torch.tensor(numbers, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
