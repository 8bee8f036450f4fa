"""`backend="torch"`: the arithmetic of the Triton kernels in plain PyTorch, a bounded number of rows at a time, on any device.

The two functions have the signatures of the launchers in `kernels/token_stats.py`. Memory beyond inputs and outputs: a few
tensors of CHUNK_ELEMENTS elements. Having both log-sum-exps before the KL, this backend sums non-negative terms directly
(docs/math.md, "Two passes"): KL = sum of q·(e^r - 1 - r) with r = log p - log q, plus p's mass where q = 0.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21
"""Logits of one chunk: 8 MiB of float32. At least one row."""

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


def _softmax(
    logits: Tensor, ignored: Tensor, V: int, temperature: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logits/τ, their maximum, exponentials relative to it, the sum of these); ignored rows as if their logits were 0."""
    x = logits[..., :V].to(dtype).masked_fill(ignored[:, None], 0.0).div_(temperature)
    m = x.amax(-1)
    e = (x - m[:, None]).exp_()
    return x, m, e, e.sum(-1)


def _entropy(x: Tensor, m: Tensor, e: Tensor, s: Tensor) -> Tensor:
    return s.log() - torch.where(e > 0, e * (x - m[:, None]), 0.0).sum(-1) / s


def _label_logp(x: Tensor, m: Tensor, s: Tensor, y: Tensor) -> Tensor:
    return ((x.gather(-1, y[:, None]).squeeze(-1) - m) - s.log()).clamp_(max=0.0)


def _kl(x: Tensor, m_x: Tensor, e_x: Tensor, s_x: Tensor, z: Tensor, m_z: Tensor, e_z: Tensor, s_z: Tensor) -> Tensor:
    """KL(q || p) of each row."""
    p, q = e_x / s_x[:, None], e_z / s_z[:, None]
    live = q > 0
    t = torch.where(live, x - z, 0.0)
    c = torch.where(t.isfinite(), q * t, 0.0).sum(-1, keepdim=True)
    t = torch.where(live, t - c, 0.0)
    p_elsewhere = torch.where(live, 0.0, p).sum(-1, keepdim=True)
    shift = torch.log1p((q * t.expm1()).sum(-1, keepdim=True)) - torch.log1p(-p_elsewhere)  # lse(x) - lse(z) - c
    r = t - torch.where(shift.isfinite(), shift, 0.0)
    near = live & (r.abs() < 0.125)
    terms = torch.where(near, q * _expm1_minus_id(torch.where(near, r, 0.0)), torch.where(live, p - q - q * r, p))
    direct = terms.sum(-1)
    plain = (m_x + s_x.log()) - (m_z + s_z.log()) - c.squeeze(-1)
    return torch.where(shift.squeeze(-1).isfinite() & ~direct.isnan(), direct, plain).clamp_(min=0.0)


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
        x, m_x, e_x, s_x = _softmax(policy[o, part], ignored, V, temperature, dtype)
        stats = {"logp": _label_logp(x, m_x, s_x, y)}
        saved[0, rows], saved[1, rows] = m_x, s_x
        if ref is not None:
            z, m_z, e_z, s_z = _softmax(ref[o, part], ignored, V, temperature, dtype)
            stats["ref_logp"] = _label_logp(z, m_z, s_z, y)
            stats["kl"] = _kl(x, m_x, e_x, s_x, z, m_z, e_z, s_z)
            saved[2, rows], saved[3, rows] = m_z, s_z
            if "ref_entropy" in extras:
                stats["ref_entropy"] = _entropy(z, m_z, e_z, s_z)
        if "accuracy" in extras:
            stats["accuracy"] = (x.argmax(-1) == y).to(dtype)
        if "entropy" in extras:
            stats["entropy"] = _entropy(x, m_x, e_x, s_x)
        if "mean_logit" in extras:
            stats["mean_logit"] = x.mean(-1) * temperature
        if "log_sum_sq_probs" in extras:
            stats["log_sum_sq_probs"] = e_x.square().sum(-1).log() - 2 * s_x.log()
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
        d = (policy[o, part, :V].to(saved.dtype) / temperature).sub_(m_x).exp_().mul_((g_q - g_label)[rows, None] / s_x)
        if ref is not None and g_kl is not None:
            q = (ref[o, part, :V].to(saved.dtype) / temperature).sub_(m_z).exp_()
            d.sub_(q.mul_(g_q[rows, None] / s_z))
        d.scatter_add_(-1, y.where(labelled, 0), g_label[rows, None])
        d_policy[o, part, :V] = d.masked_fill_(~labelled, float("nan")).masked_fill_(y == ignore_index, 0.0)
        d_policy[o, part, V:] = 0
