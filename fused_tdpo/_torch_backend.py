"""`backend="torch"`: the arithmetic of the Triton kernels in plain PyTorch, a bounded number of rows at a time, on any device.

The two functions have the signatures of the launchers in `kernels/token_stats.py`. Memory beyond inputs and outputs: a dozen
tensors of CHUNK_ELEMENTS elements. Having both log-sum-exps before the KL, this backend sums non-negative terms directly
(docs/math.md, "Two passes"): KL = sum of q·(e^r - 1 - r) with r = log p - log q, plus p's mass where q = 0.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 19
"""Logits of one chunk: 2 MiB of float32, which a CPU keeps in its cache. At least one row."""

NEED_LABEL = ("logp", "ref_logp", "kl", "accuracy")
"""NaN where a label is out of range."""

empty = torch.empty
"""Every fresh output comes from here, so that tests can hand out memory full of NaN."""


def _chunks(logits: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Chunks of rows of (outer, inner, V) logits: the index of the first axis, the slice of the second, their slice of N."""
    outer, inner, width = logits.shape
    step = max(1, CHUNK_ELEMENTS // width)
    for o in range(outer):
        for i in range(0, inner, step):
            stop = min(i + step, inner)
            yield o, slice(i, stop), slice(o * inner + i, o * inner + stop)


def _expm1_minus_id(r: Tensor) -> Tensor:
    """e^r - 1 - r by its series, for |r| < 1/8."""
    terms = 11 if r.dtype == torch.float64 else 6  # relative truncation 1e-17 and 1e-9
    total = torch.zeros_like(r)
    factorial = 1.0
    for k in range(2, terms + 2):
        factorial *= k
    for k in range(terms + 1, 1, -1):
        total.mul_(r).add_(1.0 / factorial)
        factorial /= k
    return total.mul_(r).mul_(r)


class _Rows(NamedTuple):
    """A chunk of R rows of one model. Logits are kept before the temperature, so that differences of them stay exact."""

    x: Tensor
    """(R, V) logits; 0 in ignored rows."""
    m: Tensor
    """(R,) their maximum."""
    e: Tensor
    """(R, V) exponentials e^((x - m)/τ)."""
    s: Tensor
    """(R,) the sum of these."""
    temperature: float

    def label_logp(self, y: Tensor) -> Tensor:
        x_y = self.x.gather(-1, y[:, None]).squeeze(-1)
        return ((x_y - self.m) / self.temperature - self.s.log()).clamp_(max=0.0)

    def entropy(self) -> Tensor:
        log_e = torch.where(self.e > 0, (self.x - self.m[:, None]) / self.temperature, 0.0)
        return self.s.log() - (self.e * log_e).sum(-1) / self.s


def _rows(logits: Tensor, ignored: Tensor, temperature: float, dtype: torch.dtype) -> _Rows:
    x = logits.to(dtype).masked_fill(ignored[:, None], 0.0)
    m = x.amax(-1)
    e = (x - m[:, None]).div_(temperature).exp_()
    return _Rows(x, m, e, e.sum(-1), temperature)


def _kl(policy: _Rows, ref: _Rows) -> Tensor:
    """KL(q || p) of each row."""
    p, q = policy.e / policy.s[:, None], ref.e / ref.s[:, None]
    live = q > 0
    t = torch.where(live, (policy.x - ref.x) / policy.temperature, 0.0)
    c = torch.where(t.isfinite(), q * t, 0.0).sum(-1, keepdim=True)
    t = torch.where(live, t - c, 0.0)
    # r = log p - log q = t - shift with shift = lse(x) - lse(z) - c, of which the first form keeps what is small
    u = (q * t.expm1()).sum(-1, keepdim=True)
    p_elsewhere = torch.where(live, 0.0, p).sum(-1, keepdim=True)
    plain = ((policy.m - ref.m) / policy.temperature + (policy.s.log() - ref.s.log()))[:, None] - c
    shift = torch.where((u.abs() < 0.5) & (p_elsewhere < 0.5), torch.log1p(u) - torch.log1p(-p_elsewhere), plain)
    r = t - shift
    near = live & (r.abs() < 0.125)
    terms = torch.where(near, q * _expm1_minus_id(torch.where(near, r, 0.0)), torch.where(live, p - q - q * r, p))
    return terms.sum(-1).clamp_(min=0.0)


def token_stats_fwd(
    policy: Tensor,
    ref: Tensor | None,
    labels: Tensor,
    *,
    V: int,
    ignore_index: int,
    temperature: float,
    extras: tuple[str, ...],
) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics by name, each (N,), and `saved` (4, N): maximum and sum of exponentials of policy, then reference."""
    dtype = torch.promote_types(torch.float32, torch.promote_types(policy.dtype, policy.dtype if ref is None else ref.dtype))
    N = labels.numel()
    names = ["logp", *(["ref_logp", "kl"] if ref is not None else []), *extras]
    out = {name: empty(N, dtype=dtype, device=policy.device) for name in names}
    saved = empty((4, N), dtype=dtype, device=policy.device)
    for o, part, rows in _chunks(policy):
        ignored = labels[rows] == ignore_index
        labelled = (labels[rows] >= 0) & (labels[rows] < V)
        y = labels[rows].where(labelled, 0)
        x = _rows(policy[o, part, :V], ignored, temperature, dtype)
        stats = {"logp": x.label_logp(y)}
        saved[0, rows], saved[1, rows] = x.m, x.s
        if ref is not None:
            z = _rows(ref[o, part, :V], ignored, temperature, dtype)
            stats["ref_logp"] = z.label_logp(y)
            stats["kl"] = _kl(x, z)
            saved[2, rows], saved[3, rows] = z.m, z.s
            if "ref_entropy" in extras:
                stats["ref_entropy"] = z.entropy()
        if "accuracy" in extras:
            stats["accuracy"] = (x.x.argmax(-1) == y).to(dtype)
        if "entropy" in extras:
            stats["entropy"] = x.entropy()
        if "mean_logit" in extras:
            stats["mean_logit"] = x.x.mean(-1)
        if "log_sum_sq_probs" in extras:
            stats["log_sum_sq_probs"] = x.e.square().sum(-1).log() - 2 * x.s.log()
        for name, stat in stats.items():
            if name in NEED_LABEL:
                stat = stat.where(labelled, float("nan"))
            out[name][rows] = stat.masked_fill(ignored, 0.0)
    return out, saved


def token_stats_bwd(
    policy: Tensor, ref: Tensor | None, labels: Tensor, saved: Tensor, g_logp: Tensor | None, g_kl: Tensor | None,
    d_policy: Tensor, *, V: int, ignore_index: int, temperature: float,
) -> None:  # fmt: skip
    """Writes d_x = (g_logp·(e_y - p) + g_kl·(p - q)) / τ into `d_policy` (outer, inner, W), which may be `policy` itself."""
    zero = torch.zeros_like(saved[0])
    g_label = (zero if g_logp is None else g_logp) / temperature
    g_q = (zero if g_kl is None else g_kl) / temperature
    for o, part, rows in _chunks(policy):
        m_x, s_x, m_z, s_z = saved[:, rows, None]
        y = labels[rows, None]
        labelled = (y >= 0) & (y < V)
        d = (policy[o, part, :V].to(saved.dtype) - m_x).div_(temperature).exp_().mul_((g_q - g_label)[rows, None] / s_x)
        if ref is not None and g_kl is not None:
            q = (ref[o, part, :V].to(saved.dtype) - m_z).div_(temperature).exp_()
            d.sub_(q.mul_(g_q[rows, None] / s_z))
        d.scatter_add_(-1, y.where(labelled, 0), g_label[rows, None])
        d_policy[o, part, :V] = d.masked_fill_(~labelled, float("nan")).masked_fill_(y == ignore_index, 0.0)
        d_policy[o, part, V:] = 0
