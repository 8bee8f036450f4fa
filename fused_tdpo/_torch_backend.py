"""`backend="torch"`: the arithmetic of the Triton kernels in plain PyTorch, a bounded number of rows at a time, on any device.

The two functions have the signatures of the launchers in `kernels/token_stats.py`. Memory beyond inputs and outputs: four
tensors of CHUNK_ELEMENTS elements in forward, two in backward (three with a softcap), made once and used by every chunk; some
ten more in forward of "js" and "alpha", and in backward of every divergence but KL(q || p).
Having a chunk at once, this backend takes the pivot of the KL from whole rows (docs/math.md, "Two passes").

No host waits for a device. On a CPU, which may look at values, work that changes no bit of any row is left out.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fused_tdpo.types import FORWARD_KL, Divergence

CHUNK_ELEMENTS = 1 << 19
"""Logits of one chunk: 2 MiB of float32, which a CPU keeps in its cache. At least one row."""

NEAR = 0.25
"""φ(t) is its series for |t| up to this."""

LARGE_KL = 0.05
"""Above this, times 1 + the distance of the maxima that it cancels, the plain form of the KL is accurate."""

NEED_LABEL = ("logp", "ref_logp", "kl", "accuracy")
"""NaN where a label is out of range."""

empty = torch.empty
"""Every fresh output comes from here, so that tests can hand out memory full of NaN."""


def _scratch(count: int, logits: Tensor, V: int, dtype: torch.dtype) -> list[Tensor]:
    """`count` tensors (R, V): memory for chunks of R rows."""
    rows = max(1, min(logits.shape[1], CHUNK_ELEMENTS // V))
    return [empty((rows, V), dtype=dtype, device=logits.device) for _ in range(count)]


def _chunks(logits: Tensor, step: int) -> Iterator[tuple[int, slice, slice]]:
    """Chunks of `step` rows of (outer, inner, V) logits: the index of the first axis, the slice of the second, that of N."""
    outer, inner, _ = logits.shape
    for o in range(outer):
        for i in range(0, inner, step):
            stop = min(i + step, inner)
            yield o, slice(i, stop), slice(o * inner + i, o * inner + stop)


def _load(logits: Tensor, softcap: float | None, out: Tensor, slope: Tensor | None = None) -> Tensor:
    """Logits y = cap·tanh(x/cap) of a chunk in the arithmetic dtype, and their `slope` dy/dx."""
    x = out[: len(logits)].copy_(logits)
    if softcap is None:
        return x
    x.div_(softcap)
    if slope is not None:  # 1/cosh², since 1 - tanh² cancels where the cap is near
        torch.cosh(x, out=slope[: len(x)]).reciprocal_().square_()
    return x.tanh_().mul_(softcap)


def _exp(x: Tensor, m: Tensor, temperature: float, out: Tensor) -> Tensor:
    """e^((x - m)/τ) for rows x and their maxima m."""
    return torch.sub(x, m[:, None], out=out).div_(temperature).exp_()


def _sum(terms: Tensor) -> Tensor:
    """Sums of rows. A single row is summed as one of two: torch would give each thread a part of it, and other bits."""
    return terms.sum(-1) if len(terms) > 1 else terms.expand(2, -1).sum(-1)[:1]


def _weighted(w: Tensor, f: Tensor, spare: Tensor) -> Tensor:
    """Sums of w·f over rows. Where w = 0 the term is 0, whatever f is."""
    inf = float("inf")
    return _sum(torch.mul(w, f, out=spare).nan_to_num_(nan=0.0, posinf=inf, neginf=-inf))


def _phi(t: Tensor, out: Tensor) -> Tensor:
    """φ(t) = e^t - 1 - t = t²·(1/2 + t/3·(1/2 + t/4·(1/2 + …))), for |t| ≤ NEAR."""
    last = 12 if t.dtype == torch.float64 else 7  # relative truncation 1e-16 and 1e-8
    half = t.new_full((), 0.5)
    torch.add(half, t, alpha=0.5 / last, out=out)
    for k in range(last - 1, 2, -1):
        torch.addcmul(half, out, t, value=1.0 / k, out=out)
    return out.mul_(t).mul_(t)


class _Rows(NamedTuple):
    """A chunk of R rows of one model. Logits are kept before the temperature, so that differences of them stay exact."""

    x: Tensor
    """(R, V) logits."""
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

    def entropy(self, spare: Tensor) -> Tensor:
        log_e = torch.sub(self.x, self.m[:, None], out=spare).div_(self.temperature)
        return self.s.log() - _weighted(self.e, log_e, spare) / self.s


def _rows(logits: Tensor, softcap: float | None, temperature: float, x: Tensor, e: Tensor) -> _Rows:
    """Reads a chunk into the memory `x` and `e`."""
    x = _load(logits, softcap, x)
    m = x.amax(-1)
    e = _exp(x, m, temperature, out=e[: len(x)])
    return _Rows(x, m, e, _sum(e), temperature)


def _kl(d: Tensor, policy: _Rows, ref: _Rows, spare: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p) of each row, and E_q[d], given d = (x - z)/τ. Overwrites d, policy.e and `spare`."""
    on_cpu = d.device.type == "cpu"
    c = _weighted(ref.e, d, spare) / ref.s
    m = (policy.m - ref.m) / policy.temperature
    kl = m + (policy.s.log() - ref.s.log()) - c
    small = kl <= LARGE_KL * (1 + m.abs())
    if on_cpu and not small.any():
        return kl, c
    p_elsewhere = _weighted(policy.e, torch.eq(ref.e, 0, out=spare), spare) / policy.s
    t = d.sub_(c[:, None])
    b = _weighted(ref.e, t, spare) / ref.s
    h = torch.clamp(t, -NEAR, NEAR, out=spare)
    phi = _phi(h, out=policy.e)
    g = t.sub_(h)
    if not (on_cpu and g.amin() == 0 == g.amax()):  # φ(h + g) = φ(h) + e^h·(e^g - 1) - g
        e_h = h.add_(phi).add_(1)
        phi.sub_(g).addcmul_(e_h, g.expm1_())
    a = _weighted(ref.e, phi, phi) / ref.s
    # KL = log(1 + a + b) - b - log(1 - p_elsewhere), with b - log(1 + b) = φ(log(1 + b))
    h = torch.log1p(b)
    pivoted = torch.log1p(a / (1 + b)) - _phi(h, out=torch.empty_like(h)) - torch.log1p(-p_elsewhere)
    small &= a.isfinite() & (b.abs() < NEAR / 2) & (p_elsewhere < 0.5)
    return torch.where(small, pivoted, kl).clamp_(min=0.0), torch.where(small, c + b, c)


class _Pair(NamedTuple):
    """A chunk of both models, once their sums of exponentials are known. All (R, V)."""

    t: Tensor
    """(x - z)/τ - shift: with the shift lse(x/τ) - lse(z/τ) it is log p - log q. 0 where neither has the column."""
    p: Tensor
    q: Tensor


def _pair(x: Tensor, z: Tensor, saved: Tensor, temperature: float) -> _Pair:
    """Of logits, which are overwritten, and of `saved`, whose fifth row is the shift."""
    m_x, s_x, m_z, s_z, shift = saved[:5]
    p = _exp(x, m_x, temperature, out=torch.empty_like(x)).div_(s_x[:, None])
    t = torch.sub(x, z, out=x).div_(temperature).sub_(shift[:, None])
    q = _exp(z, m_z, temperature, out=z).div_(s_z[:, None])
    return _Pair(t.masked_fill_(p + q == 0, 0.0), p, q)


def _times(w: Tensor, f: Tensor) -> Tensor:
    """w·f, 0 where w = 0, whatever f is."""
    return torch.where(w == 0, 0.0, w * f)


def _js(pair: _Pair) -> Tensor:
    """Σ m·(u·tanh u - log cosh u), m = (p + q)/2, u = t/2: the Jensen-Shannon divergence, without cancellation."""
    gap = pair.t.abs().clamp(max=200.0)
    h = gap.clamp(max=2.0) / 2
    near = h * h.tanh() - torch.log1p(2 * torch.sinh(h / 2).square())
    r = torch.exp(-gap)
    far = math.log(2) - torch.log1p(r) - gap * r / (1 + r)
    return _sum((pair.p + pair.q) / 2 * torch.where(gap < 2, near, far)).clamp_(0.0, math.log(2))


def _js_slope(pair: _Pair) -> Tensor:
    """p/2·log(p/m), where log(p/m) = u - log cosh u."""
    h = pair.t.clamp(-2.0, 2.0) / 2
    near = h - torch.log1p(2 * torch.sinh(h / 2).square())
    far = math.log(2) - torch.log1p(torch.exp(-pair.t.abs())) - torch.relu(-pair.t)
    return _times(pair.p, torch.where(pair.t.abs() < 2, near, far) / 2)


def _power_less_one(w: Tensor, h: Tensor) -> Tensor:
    """w·(e^h - 1), 0 where w = 0; neither cancels nor overflows before its result does."""
    return torch.where(w == 0, 0.0, torch.where(h < 1, w * torch.expm1(h.clamp(max=1.0)), torch.exp(w.log() + h) - w))


def _alpha(pair: _Pair, alpha: float) -> Tensor:
    """Σ of [p - q - (p^a q^(1-a) - q)/a]/(1 - a), which is never negative; for a > 1/2 with p, q and a, 1 - a exchanged."""
    t, other, w, a = (pair.t, pair.p, pair.q, alpha) if alpha <= 0.5 else (-pair.t, pair.q, pair.p, 1 - alpha)
    is_near = t.abs() < NEAR / max(1.0, abs(a))
    h = t.where(is_near, 0.0)
    near = w * (_phi(h, out=torch.empty_like(h)) - _phi(a * h, out=torch.empty_like(h)) / a)
    gap = torch.where((t < 1) & (w != 0), w * torch.expm1(t.clamp(max=1.0)), other - w)
    return _sum(torch.where(is_near, near, gap - _power_less_one(w, a * t) / a) / (1 - a)).clamp_(min=0.0)


def _alpha_slope(pair: _Pair, alpha: float) -> Tensor:
    """(p^a q^(1-a) - p)/(a - 1)."""
    t, p, q = pair
    if alpha > 0.5:
        return _power_less_one(p, (alpha - 1) * t) / (alpha - 1)
    near = p * torch.expm1((alpha - 1) * t.clamp(-1.0, 1.0))
    return torch.where(t.abs() < 1, near, _power_less_one(q, alpha * t) + (q - p)) / (alpha - 1)


def _slope(pair: _Pair, divergence: Divergence) -> Tensor:
    """∂D/∂x·τ of a divergence other than KL(q || p), but for p·mean (docs/math.md, "Other divergences")."""
    if divergence.name == "reverse_kl":
        return _times(pair.p, pair.t)
    return _js_slope(pair) if divergence.name == "js" else _alpha_slope(pair, divergence.alpha)


def _value_and_mean(pair: _Pair, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """A divergence that takes two passes, and the mean that its gradient subtracts: sums of slopes."""
    if divergence.name == "js":
        return _js(pair), _sum(_js_slope(pair))
    value = _alpha(pair, divergence.alpha)
    return value, divergence.alpha * value


def token_stats_fwd(
    policy: Tensor,
    ref: Tensor | None,
    labels: Tensor,
    *,
    V: int,
    ignore_index: int,
    temperature: float,
    extras: tuple[str, ...],
    softcaps: tuple[float | None, float | None] = (None, None),
    divergence: Divergence = FORWARD_KL,
) -> tuple[dict[str, Tensor], Tensor]:
    """Statistics by name, each (N,), and `saved` (4, N): maximum and sum of exponentials of policy, then reference; of
    divergences other than KL(q || p) (6, N), with the shift of (x - z)/τ and the mean that their gradient subtracts.

    `softcaps` of policy and reference: all is of the logits cap·tanh(x/cap).
    """
    dtype = torch.promote_types(torch.float32, torch.promote_types(policy.dtype, policy.dtype if ref is None else ref.dtype))
    N = labels.numel()
    names = ["logp", *(["ref_logp", "kl"] if ref is not None else []), *extras]
    out = {name: empty(N, dtype=dtype, device=policy.device) for name in names}
    saved = empty((divergence.saved, N), dtype=dtype, device=policy.device).zero_()
    ignored, unlabelled = labels == ignore_index, (labels < 0) | (labels >= V)
    memory = _scratch(4, policy, V, dtype)
    for o, part, rows in _chunks(policy, len(memory[0])):
        if policy.device.type == "cpu" and ignored[rows].all():
            continue
        y = labels[rows].masked_fill(unlabelled[rows], 0)
        x = _rows(policy[o, part, :V], softcaps[0], temperature, memory[0], memory[1])
        spare = memory[2][: len(y)]
        stats = {"logp": x.label_logp(y)}
        saved[0, rows], saved[1, rows] = x.m, x.s
        if "accuracy" in extras:
            stats["accuracy"] = (x.x.argmax(-1) == y).to(dtype)
        if "entropy" in extras:
            stats["entropy"] = x.entropy(spare)
        if "mean_logit" in extras:
            stats["mean_logit"] = _sum(x.x) / V
        if "log_sum_sq_probs" in extras:
            stats["log_sum_sq_probs"] = _weighted(x.e, x.e, spare).log() - 2 * x.s.log()
        if ref is not None:
            z = _rows(ref[o, part, :V], softcaps[1], temperature, memory[2], memory[3])
            stats["ref_logp"] = z.label_logp(y)
            saved[2, rows], saved[3, rows] = z.m, z.s
            d = x.x.sub_(z.x).div_(temperature)
            if "ref_entropy" in extras:
                stats["ref_entropy"] = z.entropy(spare)
            if divergence.name == "reverse_kl":  # the roles exchanged
                stats["kl"], mean = _kl(d.neg_(), z, x, spare)
                saved[4, rows], saved[5, rows] = -mean, 0.0
            else:
                stats["kl"], mean = _kl(d, x, z, spare)
            if divergence.name in ("js", "alpha"):  # a second pass, now that log p - log q is known
                plain = (x.m - z.m) / temperature + (x.s.log() - z.s.log())
                saved[4, rows] = torch.where(stats["kl"].isinf(), plain, mean + stats["kl"])
                logits = _load(policy[o, part, :V], softcaps[0], memory[0]), _load(ref[o, part, :V], softcaps[1], memory[2])
                stats["kl"], saved[5, rows] = _value_and_mean(_pair(*logits, saved[:, rows], temperature), divergence)
            if divergence.name != "forward_kl":
                saved[5, rows] = saved[5, rows].masked_fill(stats["kl"].isinf(), float("nan"))
        for name, stat in stats.items():
            out[name][rows] = stat
    for name, stat in out.items():
        if name in NEED_LABEL:
            stat.masked_fill_(unlabelled, float("nan"))
        stat.masked_fill_(ignored, 0.0)
    return out, saved


def token_stats_bwd(
    policy: Tensor, ref: Tensor | None, labels: Tensor, saved: Tensor, g_logp: Tensor | None, g_kl: Tensor | None,
    d_policy: Tensor, *, V: int, ignore_index: int, temperature: float,
    softcaps: tuple[float | None, float | None] = (None, None), divergence: Divergence = FORWARD_KL,
) -> None:  # fmt: skip
    """Writes d_x = (g_logp·(e_y - p) + g_kl·(p - q)) / τ into `d_policy` (outer, inner, W), which may be `policy` itself; for
    p - q the gradient of another divergence.

    With a softcap of the policy that is times 1/cosh²(x/cap): the gradient of the logits as they came.
    """
    zero = torch.zeros_like(saved[0])
    g_label = (zero if g_logp is None else g_logp) / temperature
    g_q = (zero if g_kl is None else g_kl) / temperature
    m_x, s_x, m_z, s_z = saved[:4]
    other = divergence.name != "forward_kl" and ref is not None and g_kl is not None
    ignored, unlabelled = labels == ignore_index, (labels < 0) | (labels >= V)
    on_cpu = policy.device.type == "cpu"
    w_p = ((-g_label if other else g_q - g_label) / s_x).masked_fill_(unlabelled, float("nan"))
    w_q = g_q / s_z
    memory = _scratch(2 if softcaps[0] is None else 3, policy, V, saved.dtype)
    for o, part, rows in _chunks(policy, len(memory[0])):
        skip = ignored[rows, None]
        if on_cpu and skip.all():
            d_policy[o, part] = 0
            continue
        slope = None if softcaps[0] is None else memory[2][: len(skip)]
        x = _load(policy[o, part, :V], softcaps[0], memory[0], slope)
        d_kl = None
        if other:
            z = _load(ref[o, part, :V], softcaps[1], memory[1])  # type: ignore[index]
            pair = _pair(x.clone(), z, saved[:, rows], temperature)
            d_kl = _slope(pair, divergence).sub_(pair.p.mul_(saved[5, rows, None])).mul_(g_q[rows, None])
        d = _exp(x, m_x[rows], temperature, out=x).mul_(w_p[rows, None])
        if d_kl is not None:
            d.add_(d_kl.masked_fill_(g_q[rows, None] == 0, 0.0))  # not 0·inf
        elif ref is not None and g_kl is not None:
            z = _load(ref[o, part, :V], softcaps[1], memory[1])
            d.addcmul_(_exp(z, m_z[rows], temperature, out=z), w_q[rows, None], value=-1)
        d.scatter_add_(-1, labels[rows, None].masked_fill(unlabelled[rows, None], 0), g_label[rows, None])
        if slope is not None:
            d.mul_(slope)
        if not on_cpu or skip.any():
            d.masked_fill_(skip, 0.0)
        d_policy[o, part, :V] = d
        d_policy[o, part, V:] = 0


def scaled_copy(x: Tensor, factor: Tensor, y: Tensor) -> None:
    """Writes factor·x into `y`, of any dtype; `factor` is () in the dtype of x."""
    torch.mul(x, factor, out=y)
