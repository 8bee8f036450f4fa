"""Hidden states times head, one chunk of rows at a time: every matrix product of the hidden level is in this file.

    x = scale·(h Wᵀ + b)        d_h = d W        d_W += dᵀ h        d_b += Σ d

with d the gradient of h Wᵀ + b, written over x by a backend, which also applies the soft-cap while it reads x
(kernels/token_stats.py). Each of the first three is one *unit*, 2·N·V·D floating-point operations. Products run in the compute
dtype, through torch's; sums over rows are kept in float32 or wider.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_tdpo._backends import load_backend
from fused_tdpo.types import Divergence

CAST_COLUMNS = 512
"""A CPU has no product of half-precision matrices with a float32 result: so many rows of the head are cast at once there."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over rows are kept in: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Projection:
    """One model: rows of hidden states, and the head that makes logits of them."""

    hidden: Tensor
    """(N, D), of any float dtype: rows are cast as they are taken."""
    weight: Tensor
    """(V, D): the rows of the head that are used, in the compute dtype."""
    bias: Tensor | None
    """(V,), in the compute dtype."""
    scale: float
    softcap: float | None
    logits_dtype: torch.dtype

    def rows(self, index: Tensor) -> Tensor:
        """(R, D) hidden states, in the compute dtype."""
        return self.hidden.index_select(0, index).to(self.weight.dtype)

    def logits(self, h: Tensor, out: Tensor) -> None:
        """Writes x (R, V). 1 unit."""
        if out.dtype == h.dtype:
            if self.bias is None and self.scale == 1:
                torch.mm(h, self.weight.t(), out=out)
            else:
                torch.addmm(self._added(out), h, self.weight.t(), beta=self._beta, alpha=self.scale, out=out)
        elif h.is_cuda:
            torch.addmm(self._added(out), h, self.weight.t(), out.dtype, beta=self._beta, alpha=self.scale, out=out)
        else:
            h = h.to(out.dtype)
            for v in range(0, len(self.weight), CAST_COLUMNS):
                part = slice(v, v + CAST_COLUMNS)
                torch.mm(h, self.weight[part].to(out.dtype).t(), out=out[:, part])
            if self.bias is not None:
                out.add_(self.bias)
            if self.scale != 1:
                out.mul_(self.scale)

    @property
    def _beta(self) -> float:
        return 0.0 if self.bias is None else self.scale  # 0: what is added is not read

    def _added(self, out: Tensor) -> Tensor:
        return out if self.bias is None else self.bias.to(out.dtype)

    def d_hidden(self, d: Tensor, out: Tensor) -> None:
        """Writes d W (R, D). 1 unit."""
        torch.mm(d, self.weight, out=out)

    def add_d_weight(self, total: Tensor, d: Tensor, h: Tensor, first: bool) -> None:
        """Adds dᵀ h to `total` (V, D), or writes it, the first time. 1 unit."""
        beta = 0 if first else 1
        if total.dtype == h.dtype:
            torch.addmm(total, d.t(), h, beta=beta, out=total)
        elif h.is_cuda:
            torch.addmm(total, d.t(), h, total.dtype, beta=beta, out=total)
        else:
            h = h.to(total.dtype)
            for v in range(0, len(total), CAST_COLUMNS):
                part = total[v : v + CAST_COLUMNS]
                torch.addmm(part, d[:, v : v + CAST_COLUMNS].to(total.dtype).t(), h, beta=beta, out=part)

    def add_d_bias(self, total: Tensor, d: Tensor, first: bool) -> None:
        """Adds Σ d over rows to `total` (V,), or writes it."""
        sums = d.sum(0, dtype=total.dtype)
        total.copy_(sums) if first else total.add_(sums)


def projection(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, V: int, dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
) -> Projection:  # fmt: skip
    """A model whose products run in `dtype`, on the first V rows of its head."""
    weight = weight.detach()[:V].to(dtype)
    bias = None if bias is None else bias.detach()[:V].to(dtype)
    return Projection(hidden.detach(), weight, bias, scale, softcap, tile_dtype(dtype, logits_dtype))


def same_memory(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether both are absent, or the same numbers at the same place."""
    if a is None or b is None:
        return a is b
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


def row_bytes(
    V: int, dtype: torch.dtype, ref_dtype: torch.dtype | None, logits_dtype: torch.dtype | None, both: bool = False
) -> int:
    """Bytes of all logit-sized buffers that live at once, for each row: logits of both models, and the gradient of the policy's
    where it cannot be written over them. `dtype` and `ref_dtype` are those of the products; `both` is `keep_x` below."""
    tiles = [tile_dtype(dtype, logits_dtype)]
    if ref_dtype is not None:
        tiles.append(tile_dtype(ref_dtype, logits_dtype))
    if tiles[0] != dtype or (both and tiles[-1] != dtype):
        tiles.append(dtype)
    return sum(_pitch(V, tile) * tile.itemsize for tile in tiles)


def tile_dtype(dtype: torch.dtype, logits_dtype: torch.dtype | None) -> torch.dtype:
    """Of the logits of a chunk: the products' own, or the wider one that was asked for."""
    return dtype if logits_dtype is None else torch.promote_types(dtype, logits_dtype)


def _pitch(V: int, dtype: torch.dtype) -> int:
    """Columns of a tile, so that each of its rows starts on a 16-byte boundary."""
    group = 16 // dtype.itemsize
    return -(-V // group) * group


class Tiles:
    """The logits of one chunk of rows at a time, in memory that every chunk uses again."""

    def __init__(
        self, policy: Projection, ref: Projection | None, labels: Tensor, rows: int, *, ignore_index: int, temperature: float,
        backend: str, divergence: Divergence,
    ) -> None:  # fmt: skip
        self.policy, self.ref, self.labels = policy, ref, labels
        self.backend = load_backend(backend, labels.device)
        self.divergence = divergence
        self.options = {
            "V": len(policy.weight),
            "ignore_index": ignore_index,
            "temperature": temperature,
            "softcaps": (policy.softcap, None if ref is None else ref.softcap),
            "divergence": divergence,
        }
        self.shared = ref is not None and ref.weight is policy.weight  # one product makes both models' logits
        self._x = self._buffer(policy.logits_dtype, 2 * rows if self.shared else rows)
        self._z = None if ref is None or self.shared else self._buffer(ref.logits_dtype, rows)
        self._rows = rows
        self._separate: Tensor | None = None

    def _buffer(self, dtype: torch.dtype, rows: int) -> Tensor:
        V = len(self.policy.weight)
        return self.backend.empty((rows, _pitch(V, dtype)), dtype=dtype, device=self.labels.device)[:, :V]

    def project(self, index: Tensor, with_ref: bool = True) -> None:
        """Makes `h`, x and z of the rows `index` of the hidden states. 2 units, or 1 without the reference."""
        R = len(index)
        self.h = self.policy.rows(index)
        self.y = self.labels.index_select(0, index)
        self.x = self._x[:R]
        self.z = None
        if self.ref is None or not with_ref:
            self.policy.logits(self.h, self.x)
        elif self.shared:
            self.policy.logits(torch.cat([self.h, self.ref.rows(index)]), self._x[: 2 * R])
            self.z = self._x[R : 2 * R]
        else:
            self.policy.logits(self.h, self.x)
            self.z = self._z[:R]  # type: ignore[index] # it is there, as the reference is
            self.ref.logits(self.ref.rows(index), self.z)

    def stats(self, extras: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], Tensor]:
        """Statistics by name, each (R,), and what `gradient` needs of them."""
        z = None if self.z is None else self.z[None]
        return self.backend.token_stats_fwd(self.x[None], z, self.y, extras=extras, **self.options)

    def gradient(self, saved: Tensor, g_logp: Tensor | None, g_kl: Tensor | None, keep_x: bool = False) -> Tensor:
        """d (R, V), in the compute dtype, over x where that fits; over z with `keep_x`."""
        over, dtype = self.z if keep_x else self.x, self.policy.weight.dtype
        if over is None or over.dtype != dtype:
            if self._separate is None:
                self._separate = self._buffer(dtype, self._rows)
            over = self._separate[: len(self.x)]
        if self.policy.scale != 1:
            g_logp, g_kl = (None if g is None else g * self.policy.scale for g in (g_logp, g_kl))
        z = None if self.z is None else self.z[None]
        self.backend.token_stats_bwd(self.x[None], z, self.y, saved, g_logp, g_kl, over[None], **self.options)
        return over


class HeadSums:
    """Σ dᵀ h (V, D) and Σ d (V,) over rows, of the used columns, each where needed: what becomes d_weight and d_bias."""

    def __init__(self, policy: Projection, need_weight: bool, need_bias: bool) -> None:
        self.policy = policy
        V, D = policy.weight.shape
        like: dict[str, Any] = {"dtype": wide(policy.weight.dtype), "device": policy.weight.device}
        self.parts = (torch.empty((V, D), **like) if need_weight else None, torch.empty(V, **like) if need_bias else None)
        self.fresh = True
        """Nothing has been added: the first rows are written, whatever is there."""

    def add(self, d: Tensor, h: Tensor) -> None:
        """Adds the rows of a chunk."""
        weight, bias = self.parts
        if weight is not None:
            self.policy.add_d_weight(weight, d, h, self.fresh)
        if bias is not None:
            self.policy.add_d_bias(bias, d, self.fresh)
        self.fresh = False

    def another(self) -> "HeadSums":
        """Memory for as many sums, of nothing."""
        return HeadSums(self.policy, *(part is not None for part in self.parts))

    def scale_(self, factor: Tensor) -> None:
        """Times a number (1,)."""
        for part in self.parts:
            if part is not None:
                part.mul_(factor.to(part.dtype))

    def add_scaled_(self, other: "HeadSums", factor: Tensor) -> None:
        """Adds other sums, times a number (1,), and leaves those for use again."""
        for part, more in zip(self.parts, other.parts, strict=True):
            if part is not None and more is not None:
                part.addcmul_(more, factor.to(part.dtype))
        other.fresh = True

    def totals(self) -> tuple[Tensor | None, Tensor | None]:
        """The sums, 0 where there was no row."""
        if self.fresh:
            for part in self.parts:
                if part is not None:
                    part.zero_()
        return self.parts


def head_gradient(total: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The sum over the used columns as a gradient of that shape and dtype: 0 in columns that are not used."""
    if (total.shape, total.dtype) == (shape, dtype):
        return total
    gradient = torch.zeros(shape, dtype=dtype, device=total.device)
    gradient[: len(total)] = total
    return gradient


def scaled_head_gradient(total: Tensor, shape: torch.Size, dtype: torch.dtype, factor: Tensor, backend: str) -> Tensor:
    """The same times a factor, in memory of its own: `total` stays what it is."""
    gradient = torch.empty(shape, dtype=dtype, device=total.device)
    gradient[len(total) :] = 0
    backend_module = load_backend(backend, total.device, "scaled_copy")
    backend_module.scaled_copy(total, factor.to(total.dtype), gradient[: len(total)])
    return gradient
