"""Autograd around `linear_token_stats`: two `torch.library` ops, and the Function that differentiates them.

Rows whose label is ignored are dropped first. The others go through in chunks: both models' logits of a chunk are made, folded
into statistics, and forgotten. What backward needs of them depends on the head:

- trained: backward makes them again, turns them into their gradient, and multiplies that by the head and by the hidden states.
  2 + 4 units (fused_tdpo/_projection.py); 2 + 3 where the KL gets no gradient.
- frozen: nothing is summed over rows, so forward forms the *directions* U^logp = (e_y - p) W and U^kl = (p - q) W, (N, D) each,
  while it has the logits, and backward is d_hidden = g_logp·U^logp + g_kl·U^kl. 2 + 1 units, or 2 + 2 with the KL's.

Where the divergence is not KL(q || p), the gradient of another stands for p - q.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_tdpo._checks import check_labels_in_range, check_valid_rows
from fused_tdpo._chunks import host_counts, split
from fused_tdpo._projection import HeadSums, Projection, Tiles, head_gradient, projection, same_memory, wide
from fused_tdpo.functions.token_stats import stat_names, stats_dtype
from fused_tdpo.types import Divergence


class LinearOptions(NamedTuple):
    """What is static in a call, in the order of the ops' schema."""

    scale: float
    softcap: float
    """0 for none."""
    ref_scale: float
    ref_softcap: float
    V: int
    ignore_index: int
    temperature: float
    dtype: torch.dtype
    """Of the policy's products."""
    ref_dtype: torch.dtype
    logits_dtype: torch.dtype | None
    """Of the logits of a chunk, if another one is asked for."""
    rows: int
    """Of a chunk."""
    backend: str
    divergence: str = "forward_kl"
    alpha: float = 0.0
    """Of the divergence "alpha"."""


_OPTIONS = (
    "float scale, float softcap, float ref_scale, float ref_softcap, int V, int ignore_index, float temperature, "
    "ScalarType dtype, ScalarType ref_dtype, ScalarType? logits_dtype, int rows, str backend, str divergence, float alpha"
)
_MODELS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias, Tensor labels"


def _options(arguments: tuple[Any, ...], start: int) -> tuple[LinearOptions, tuple[Any, ...]]:
    """Those among the positional arguments of an op, and what comes after them."""
    stop = start + len(LinearOptions._fields)
    return LinearOptions(*arguments[start:stop]), arguments[stop:]


def make_tiles(models: tuple[Any, ...], options: LinearOptions, count: int, with_ref: bool = True) -> Tiles:
    """Of hidden, weight, bias, the same of the reference, and labels, of which `count` are not ignored."""
    hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels = models
    o = options
    policy = projection(hidden, weight, bias, o.scale, o.softcap or None, o.V, o.dtype, o.logits_dtype)
    ref: Projection | None = None
    if ref_hidden is not None and with_ref:
        alike = (o.scale, o.softcap, o.dtype) == (o.ref_scale, o.ref_softcap, o.ref_dtype)
        if alike and same_memory(weight, ref_weight) and same_memory(bias, ref_bias):  # of tensors as given: a cast copies
            ref = replace(policy, hidden=ref_hidden.detach())
        else:
            ref = projection(
                ref_hidden, ref_weight, ref_bias, o.ref_scale, o.ref_softcap or None, o.V, o.ref_dtype, o.logits_dtype
            )
    common: dict[str, Any] = {"ignore_index": o.ignore_index, "temperature": o.temperature, "backend": o.backend}
    common["divergence"] = Divergence(o.divergence, o.alpha)
    return Tiles(policy, ref, labels.to(torch.int64), min(o.rows, count), **common)


def no_autocast(tensor: Tensor) -> AbstractContextManager:
    """Dtypes were resolved by hand: nothing below is to be cast again."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


@torch.library.custom_op(
    "fused_tdpo::linear_token_stats_fwd",
    mutates_args=(),
    schema=f"({_MODELS}, {_OPTIONS}, str extras, bool check_labels, int valid_rows, int directions, bool padded) -> Tensor[]",
)
def linear_token_stats_fwd(*arguments) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """logp, with a reference ref_logp and kl, the extras, each (N,); for backward `saved`, a few numbers a row, `order` (N,),
    `count` () on the CPU; and the directions asked for, (count, D), or (N, D) if `padded`.

    Rows that count come first in `order`, `count` of them; `saved` and directions are in that order. `valid_rows` is `count`
    where the caller knows it, else -1. `directions` is 0, 1 (of logp) or 2 (of logp and kl).
    """
    options, (extras, check_labels, valid_rows, directions, padded) = _options(arguments, 7)
    models = hidden, _, _, ref_hidden, _, _, labels = arguments[:7]
    with no_autocast(hidden):
        if check_labels:
            check_labels_in_range(labels, options.V, options.ignore_index)
        ignored = labels == options.ignore_index
        order = torch.argsort(ignored.to(torch.uint8), stable=True)
        counted = (~ignored).sum()
        count = host_counts(counted[None])[0] if valid_rows < 0 else valid_rows
        wrong = check_valid_rows(counted, count, options.ignore_index) if valid_rows >= 0 else None
        tiles = make_tiles(models, options, count)
        names = stat_names(ref_hidden is not None, extras)
        dtype = stats_dtype(options.dtype, options.ref_dtype)
        out = {name: torch.zeros(len(labels), dtype=dtype, device=labels.device) for name in names}
        saved = torch.zeros((tiles.divergence.saved, len(labels)), dtype=dtype, device=labels.device)
        kept = [
            hidden.new_zeros((len(labels) if padded else count, hidden.shape[1]), dtype=options.dtype)
            for _ in range(directions)
        ]
        for part in split(0, count, options.rows):
            index = order[part]
            tiles.project(index)
            stats, saved[:, part] = tiles.stats(tuple(extras.split(",")) if extras else ())
            for name, stat in stats.items():
                out[name][index] = stat
            one = torch.ones_like(stats["logp"])
            if directions > 1:
                tiles.policy.d_hidden(tiles.gradient(saved[:, part].contiguous(), None, one, keep_x=True), kept[1][part])
                tiles.z = None
            if directions:
                tiles.policy.d_hidden(tiles.gradient(saved[:, part].contiguous(), one, None), kept[0][part])
        if wrong is not None:
            for name in names:
                out[name].masked_fill_(wrong, float("nan"))
        return [*out.values(), saved, order, torch.tensor(count), *kept]


@linear_token_stats_fwd.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    options, (extras, _, valid_rows, directions, padded) = _options(arguments, 7)
    hidden, _, _, ref_hidden, _, _, labels = arguments[:7]
    N, dtype = len(labels), stats_dtype(options.dtype, options.ref_dtype)
    count = len(stat_names(ref_hidden is not None, extras))
    stats = [hidden.new_empty(N, dtype=dtype) for _ in range(count)]
    rows = N if padded else valid_rows
    if directions and rows < 0:
        rows = torch.library.get_ctx().new_dynamic_size()
    kept = [hidden.new_empty((rows, hidden.shape[1]), dtype=options.dtype) for _ in range(directions)]
    order = labels.new_empty(N, dtype=torch.int64)
    saved = hidden.new_empty((Divergence(options.divergence).saved, N), dtype=dtype)
    return [*stats, saved, order, torch.empty((), dtype=torch.int64, device="cpu"), *kept]


@torch.library.custom_op(
    "fused_tdpo::linear_token_stats_bwd",
    mutates_args=(),
    schema=f"({_MODELS}, Tensor saved, Tensor order, Tensor count, Tensor? g_logp, Tensor? g_kl, {_OPTIONS}, "
    "bool need_hidden, bool need_weight, bool need_bias) -> Tensor[]",
)
def linear_token_stats_bwd(*arguments) -> list[Tensor]:  # type: ignore[no-untyped-def]
    """The gradients that are needed, of hidden (N, D), weight and bias, each in the dtype of what it belongs to."""
    options, (need_hidden, need_weight, need_bias) = _options(arguments, 12)
    models, (saved, order, count, g_logp, g_kl) = arguments[:7], arguments[7:12]
    hidden, weight, bias = models[:3]
    with no_autocast(hidden):
        tiles = make_tiles(models, options, int(count), with_ref=g_kl is not None)
        d_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
        total = HeadSums(tiles.policy, need_weight, need_bias)
        g_logp, g_kl = (None if g is None else g.to(saved.dtype) for g in (g_logp, g_kl))
        for part in split(0, int(count), options.rows):
            index = order[part]
            tiles.project(index, with_ref=g_kl is not None)
            here_logp, here_kl = (None if g is None else g[index] for g in (g_logp, g_kl))
            d = tiles.gradient(saved[:, part].contiguous(), here_logp, here_kl)
            if d_hidden is not None:
                d_rows = torch.empty_like(tiles.h)
                tiles.policy.d_hidden(d, d_rows)
                d_hidden[index] = d_rows.to(hidden.dtype)
            total.add(d, tiles.h)
        found = [] if d_hidden is None else [d_hidden]
        for sums, like in zip(total.totals(), (weight, bias), strict=True):
            if sums is not None:
                found.append(head_gradient(sums, like.shape, like.dtype))
        return found


@linear_token_stats_bwd.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    _, needs = _options(arguments, 12)
    return [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in zip(arguments[:3], needs, strict=True) if need
    ]


_TWICE = (
    "linear_token_stats has no second derivative (its backward is a kernel): a double backward, as create_graph=True asks for, "
    "needs backend='reference'"
)


def _refuse_double_backward(ctx: object, *grads: Tensor) -> None:
    raise RuntimeError(_TWICE)


linear_token_stats_bwd.register_autograd(_refuse_double_backward)


class LinearTokenStatsFunction(torch.autograd.Function):
    """Differentiable `linear_token_stats` on checked arguments: `(logp[, ref_logp, kl], *extras)`, each (N,).

    `logp` and `kl` carry gradients to the policy's `hidden`, `weight` and `bias`, each where it requires one. Saves those and
    the reference's, and four numbers a row; with a frozen head the directions instead. Call it through
    `fused_tdpo.linear_token_stats`, which checks and names.

    Args of `apply`, all positional:
        hidden, weight, bias: (N, D), (V, D), (V,) or None, of the policy. ref_hidden, ref_weight, ref_bias: the same of the
            reference, or None. labels: (N,) int32 or int64, aligned.
        options: `LinearOptions`. extras: comma-separated names. check_labels: whether to look at the labels' values, and raise.
        valid_rows: how many labels are not ignored; -1 has them counted, which synchronises.
        kl_gradient: whether the KL carries a gradient; without, a frozen head takes one unit less.
        grad_mode: whether autograd recorded at the call; it never does in here.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        labels: Tensor,
        options: LinearOptions,
        extras: str,
        check_labels: bool,
        valid_rows: int,
        kl_gradient: bool,
        grad_mode: bool,
    ) -> tuple[Tensor, ...]:
        trained = any(ctx.needs_input_grad[1:3])
        directions = 0
        if grad_mode and ctx.needs_input_grad[0] and not trained:
            directions = 2 if ref_hidden is not None and kl_gradient else 1
        padded = torch.compiler.is_compiling() and valid_rows < 0
        models = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias, labels)
        found = torch.ops.fused_tdpo.linear_token_stats_fwd(
            *models, *options, extras, check_labels, valid_rows, directions, padded
        )
        names = len(stat_names(ref_hidden is not None, extras))
        stats, (saved, order, count, *kept) = found[:names], found[names:]
        ctx.directions, ctx.padded = directions, padded
        if directions:
            ctx.save_for_backward(order, count, *kept)
            ctx.like = hidden.shape, hidden.dtype
        else:
            ctx.save_for_backward(*models, saved, order, count)
        ctx.options = options
        ctx.set_materialize_grads(False)
        differentiable = (0, 2) if ref_hidden is not None and kl_gradient else (0,)  # logp and kl
        ctx.with_kl = len(differentiable) > 1
        ctx.mark_non_differentiable(*(stat for i, stat in enumerate(stats) if i not in differentiable))
        return tuple(stats)

    @staticmethod
    def backward(ctx, g_logp: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        g_kl = grads[1] if ctx.with_kl else None
        if g_logp is None and g_kl is None:
            return (None,) * 13
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(_TWICE)
        if ctx.directions:
            return _along_directions(ctx, g_logp, g_kl), *(None,) * 12
        *models, saved, order, count = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        found = iter(
            torch.ops.fused_tdpo.linear_token_stats_bwd(*models, saved, order, count, g_logp, g_kl, *ctx.options, *needs)
        )
        return *(next(found) if need else None for need in needs), *(None,) * 10


def _along_directions(ctx, g_logp: Tensor | None, g_kl: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
    """d_hidden = g_logp·U^logp + g_kl·U^kl, summed in float32 and rounded once."""
    order, count, *kept = ctx.saved_tensors
    shape, dtype = ctx.like
    d_hidden = torch.zeros(shape, dtype=dtype, device=order.device)
    index = order[: len(kept[0])]
    for part in [slice(None)] if torch.compiler.is_compiling() else split(0, len(index), ctx.options.rows):
        terms = [
            U[part] * g[index[part], None].to(wide(U.dtype))
            for g, U in zip((g_logp, g_kl), kept, strict=False)
            if g is not None
        ]
        rows = sum(terms[1:], terms[0]).to(dtype)
        if ctx.padded:  # upstream gradients of ignored rows may be anything
            rows = rows.masked_fill((torch.arange(len(index), device=index.device) >= count)[:, None], 0.0)
        d_hidden[index[part]] = rows
    return d_hidden
