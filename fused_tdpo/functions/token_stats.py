"""Autograd around `token_stats`: `torch.library` ops, which compilers can trace, and the Function that differentiates them.

The ops take logits of any leading shape and strides. A backend is a module with `token_stats_fwd`, `token_stats_bwd`, `empty`.
"""

import torch
from torch import Tensor

from fused_tdpo._backends import load_backend
from fused_tdpo._checks import check_labels_in_range
from fused_tdpo.types import FORWARD_KL, Divergence

POLICY_STATS = ("logp",)
PAIR_STATS = ("logp", "ref_logp", "kl")


def stat_names(has_ref: bool, extras: str) -> tuple[str, ...]:
    """The statistics of an op, in the order of its outputs; `extras` are comma-separated names."""
    return (*(PAIR_STATS if has_ref else POLICY_STATS), *(extras.split(",") if extras else ()))


def row_views(*tensors: Tensor | None) -> list[list[Tensor | None]]:
    """Views (outer, inner, V) of tensors (..., V) with equal leading shapes, whatever their strides: no copy.

    Leading axes are merged where every tensor allows it. One list entry is the rule; more than two axes that cannot be merged
    give one per index of the axes in front.
    """
    present = [t for t in tensors if t is not None]
    if present[0][..., 0].numel() == 0:
        return [[None if t is None else t.as_strided((1, 0, t.shape[-1]), (0, 0, 1)) for t in tensors]]
    axes: list[tuple[int, list[int]]] = []  # (size, stride in each tensor)
    for axis, size in enumerate(present[0].shape[:-1]):
        strides = [t.stride(axis) for t in present]
        if size == 1:
            continue
        if axes and all(outer == inner * size for outer, inner in zip(axes[-1][1], strides, strict=True)):
            axes[-1] = (axes[-1][0] * size, strides)
        else:
            axes.append((size, strides))
    if not axes:  # a single row: the pitch it has, or would have in a batch, so that it is read like one of many
        axes.append((1, [t.stride(-2) if t.dim() > 1 else t.shape[-1] for t in present]))
    if len(axes) == 1:
        axes.insert(0, (1, [0] * len(present)))

    *front, (outer, outer_strides), (inner, inner_strides) = axes
    offsets = [[t.storage_offset() for t in present]]
    for size, strides in front:
        offsets = [[o + i * s for o, s in zip(base, strides, strict=True)] for base in offsets for i in range(size)]
    result = []
    for base in offsets:
        views = (
            t.as_strided((outer, inner, t.shape[-1]), (s_outer, s_inner, 1), offset)
            for t, s_outer, s_inner, offset in zip(present, outer_strides, inner_strides, base, strict=True)
        )
        result.append([None if t is None else next(views) for t in tensors])
    return result


@torch.library.custom_op(
    "fused_tdpo::token_stats_fwd",
    mutates_args=(),
    schema="(Tensor policy, Tensor? ref, Tensor labels, int V, int ignore_index, float temperature, str extras, "
    "bool check_labels, str backend, str divergence='forward_kl', float alpha=0.0) -> Tensor[]",
)
def token_stats_fwd(
    policy: Tensor,
    ref: Tensor | None,
    labels: Tensor,
    V: int,
    ignore_index: int,
    temperature: float,
    extras: str,
    check_labels: bool,
    backend: str,
    divergence: str = "forward_kl",
    alpha: float = 0.0,
) -> list[Tensor]:
    """logp, with a reference ref_logp and kl, the extras (comma-separated names), of labels' shape; then
    `saved`, a few numbers a row."""
    if check_labels:
        check_labels_in_range(labels, V, ignore_index)
    module = load_backend(backend, policy.device)
    names = tuple(extras.split(",")) if extras else ()
    flat = labels.to(torch.int64).contiguous().flatten()
    views = row_views(policy, ref)
    options = {"V": V, "ignore_index": ignore_index, "temperature": temperature, "divergence": Divergence(divergence, alpha)}
    parts = [
        module.token_stats_fwd(x, z, y, extras=names, **options)
        for (x, z), y in zip(views, flat.chunk(len(views)), strict=True)
    ]
    stats, saved = parts[0]
    if len(parts) > 1:
        stats = {name: torch.cat([part[name] for part, _ in parts]) for name in stats}
        saved = torch.cat([part for _, part in parts], dim=-1)
    return [*(stat.view(labels.shape) for stat in stats.values()), saved]


@token_stats_fwd.register_fake
def _(  # type: ignore[no-untyped-def]
    policy, ref, labels, V, ignore_index, temperature, extras, check_labels, backend, divergence="forward_kl", alpha=0.0
):
    dtype = stats_dtype(policy.dtype, None if ref is None else ref.dtype)
    count = len(stat_names(ref is not None, extras))
    stats = [policy.new_empty(labels.shape, dtype=dtype) for _ in range(count)]
    return [*stats, policy.new_empty((Divergence(divergence).saved, labels.numel()), dtype=dtype)]


def stats_dtype(policy: torch.dtype, ref: torch.dtype | None) -> torch.dtype:
    """float64 where the logits of either model are, else float32."""
    return torch.float64 if torch.float64 in (policy, ref) else torch.float32


_BWD_ARGUMENTS = (
    "Tensor? ref, Tensor labels, Tensor saved, Tensor? g_logp, Tensor? g_kl, int V, int ignore_index, float temperature, "
    "str backend, str divergence='forward_kl', float alpha=0.0"
)


def _write_gradient(
    policy: Tensor,
    ref: Tensor | None,
    labels: Tensor,
    saved: Tensor,
    g_logp: Tensor | None,
    g_kl: Tensor | None,
    V: int,
    ignore_index: int,
    temperature: float,
    backend: str,
    divergence: str,
    alpha: float,
    d_policy: Tensor,
) -> None:
    module = load_backend(backend, policy.device)
    flat = labels.to(torch.int64).contiguous().flatten()
    upstream = [None if g is None else g.to(saved.dtype).contiguous().flatten() for g in (g_logp, g_kl)]
    views = row_views(policy, ref, d_policy)
    rows = flat.numel() // len(views)
    options = {"V": V, "ignore_index": ignore_index, "temperature": temperature, "divergence": Divergence(divergence, alpha)}
    for k, (x, z, d) in enumerate(views):
        part = slice(k * rows, (k + 1) * rows)
        g_l, g_k = (None if g is None else g[part] for g in upstream)
        own = saved if len(views) == 1 else saved[:, part].contiguous()
        module.token_stats_bwd(x, z, flat[part], own, g_l, g_k, d, **options)


@torch.library.custom_op("fused_tdpo::token_stats_bwd", mutates_args=(), schema=f"(Tensor policy, {_BWD_ARGUMENTS}) -> Tensor")
def token_stats_bwd(  # type: ignore[no-untyped-def]
    policy, ref, labels, saved, g_logp, g_kl, V, ignore_index, temperature, backend, divergence="forward_kl", alpha=0.0
):
    """The gradient of the policy logits, in a fresh contiguous tensor; `saved` is the last output of `token_stats_fwd`."""
    d_policy = load_backend(backend, policy.device).empty(policy.shape, dtype=policy.dtype, device=policy.device)
    _write_gradient(
        policy, ref, labels, saved, g_logp, g_kl, V, ignore_index, temperature, backend, divergence, alpha, d_policy
    )
    return d_policy


@token_stats_bwd.register_fake
def _(policy, *arguments):  # type: ignore[no-untyped-def]
    return policy.new_empty(policy.shape)


@torch.library.custom_op(
    "fused_tdpo::token_stats_bwd_", mutates_args=("policy",), schema=f"(Tensor(a!) policy, {_BWD_ARGUMENTS}) -> ()"
)
def token_stats_bwd_(  # type: ignore[no-untyped-def]
    policy, ref, labels, saved, g_logp, g_kl, V, ignore_index, temperature, backend, divergence="forward_kl", alpha=0.0
):
    """The same, written over the policy logits. A mutating op: autograd counts a new version of them."""
    _write_gradient(policy, ref, labels, saved, g_logp, g_kl, V, ignore_index, temperature, backend, divergence, alpha, policy)


@token_stats_bwd_.register_fake
def _(policy, *arguments):  # type: ignore[no-untyped-def]
    return None


_TWICE = (
    "token_stats has no second derivative (its backward is a kernel): a double backward, as create_graph=True asks for, needs "
    "backend='reference'"
)


def _refuse_double_backward(ctx: object, *grads: Tensor) -> None:
    raise RuntimeError(_TWICE)


token_stats_bwd.register_autograd(_refuse_double_backward)


class TokenStatsFunction(torch.autograd.Function):
    """Differentiable `token_stats` on checked arguments: `(logp[, ref_logp, kl], *extras)`, each of `labels`' shape.

    `logp` and `kl` carry gradients to `policy`; d_policy = g_logp (e_y - p) + g_kl ∂kl/∂x, which of KL(q || p) is p - q, over
    the temperature. Saves the logits it was given, the labels and four numbers a row, six with another divergence. Call it
    through `fused_tdpo.token_stats`, which checks and names.

    Args of `apply`, all positional:
        policy, ref: (..., width) logits, contiguous columns; `ref` may be None. labels: (...) int32 or int64, aligned.
        V: columns [0, V) are used. ignore_index, temperature: as in `token_stats`.
        extras: comma-separated names. check_labels: whether to look at the labels' values, and raise.
        inplace_backward: write the gradient over `policy`. backend: `"triton"` or `"torch"`. divergence: what `kl` holds.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        policy: Tensor,
        ref: Tensor | None,
        labels: Tensor,
        V: int,
        ignore_index: int,
        temperature: float,
        extras: str,
        check_labels: bool,
        inplace_backward: bool,
        backend: str,
        divergence: Divergence = FORWARD_KL,
    ) -> tuple[Tensor, ...]:
        *stats, saved = torch.ops.fused_tdpo.token_stats_fwd(
            policy, ref, labels, V, ignore_index, temperature, extras, check_labels, backend, *divergence
        )
        ctx.save_for_backward(policy, ref, labels, saved)
        ctx.options = (V, ignore_index, temperature, backend, *divergence)
        ctx.inplace_backward = inplace_backward
        ctx.leaf = policy.is_leaf
        ctx.set_materialize_grads(False)
        differentiable = (0,) if ref is None else (0, 2)  # logp and kl
        ctx.mark_non_differentiable(*(stat for i, stat in enumerate(stats) if i not in differentiable))
        return tuple(stats)

    @staticmethod
    def backward(ctx, g_logp: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        policy, ref, labels, saved = ctx.saved_tensors
        g_kl = None if ref is None else grads[1]
        if g_logp is None and g_kl is None:
            d_policy = None
        elif ctx.inplace_backward:
            if torch.is_grad_enabled():
                raise RuntimeError(f"{_TWICE} and inplace_backward=False")
            torch.ops.fused_tdpo.token_stats_bwd_(policy, ref, labels, saved, g_logp, g_kl, *ctx.options)
            d_policy = policy.detach().clone() if ctx.leaf else policy.detach()  # a leaf and its .grad share no memory
        else:
            d_policy = torch.ops.fused_tdpo.token_stats_bwd(policy, ref, labels, saved, g_logp, g_kl, *ctx.options)
        return d_policy, *(None,) * 10
