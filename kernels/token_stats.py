"""Triton kernels of `token_stats`: per-token log-prob, reference log-prob, KL(q || p) and extras from two logit tensors.

Letters as in docs/math.md: x policy logits, z reference logits, p = softmax(x/τ), q = softmax(z/τ) of one row of V columns, y
its label. Three kernels, each reading a logit at most once:

    fold      (row, segment) -> a record of running sums of that segment              reads x, z
    finish    the records of a row -> logp, ref_logp, kl, extras, and (m, s) of p, q  reads x[y], z[y]
    backward  (row, chunk) -> d_x = g_logp (e_y - p) + g_kl (p - q)                   reads x, z, writes d_x

KL(p || q) is the same with the roles of x and z exchanged. Two more kernels make the divergences that need log p/q, and so both
sums of exponentials, before they can start:

    compare   (row, segment) -> sums of the divergence, and of its slope              reads x, z
    settle    the sums of a row -> kl, and what backward subtracts

How a row is cut is a function of V, the dtypes and its alignment alone, so a row's bits do not depend on its neighbours.
Exponentials are base 2: m is the running maximum of x·scale with scale = log2(e)/τ, and s the sum of 2^(x·scale - m).

Where a softcap is given, x and z stand for cap·tanh(x/cap) of what is loaded, and d_x is times 1 - tanh²(x/cap).

The KL of a row, with t = (x - z)/τ - c for a pivot c near the q-mean of (x - z)/τ (docs/math.md derives it and its error):

    b = E_q[t],  a = E_q[e^t - 1 - t],  u = a + b,  KL = a - (u - log(1 + u))

`e^t - 1 - t` is a series where |t| < 1/8 ("near"). Elsewhere ("far") q·e^t is p's own exponential, summed apart and rescaled
once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-1e38)
"""Where running maxima start: finite, so that -inf logits subtract to -inf and not to NaN."""

# Fields of a segment's record. "Weighted" sums carry the factor 2^-m of their distribution.
M_X: tl.constexpr = tl.constexpr(0)  # max of x·scale
S_X: tl.constexpr = tl.constexpr(1)  # sum of 2^(x·scale - m_x)
M_Z: tl.constexpr = tl.constexpr(2)
S_Z: tl.constexpr = tl.constexpr(3)
PIVOT: tl.constexpr = tl.constexpr(4)  # c
B: tl.constexpr = tl.constexpr(5)  # weighted sum of t under q
A: tl.constexpr = tl.constexpr(6)  # weighted sum of near e^t - 1 - t and far -1 - t under q
FAR: tl.constexpr = tl.constexpr(7)  # weighted sum of 1 over far columns under p: their q·e^t
H_X: tl.constexpr = tl.constexpr(8)  # weighted sum of x·scale - m_x under p
H_Z: tl.constexpr = tl.constexpr(9)
SQUARES: tl.constexpr = tl.constexpr(10)  # sum of 4^(x·scale - m_x)
SUM_X: tl.constexpr = tl.constexpr(11)  # sum of x
BEATEN: tl.constexpr = tl.constexpr(12)  # 1 if a column beats the label: a larger logit, or an equal one before it
NUM_FIELDS = 13

# Divergences, as the kernels are specialised for them
FORWARD_KL: tl.constexpr = tl.constexpr(0)
REVERSE_KL: tl.constexpr = tl.constexpr(1)
JS: tl.constexpr = tl.constexpr(2)
ALPHA: tl.constexpr = tl.constexpr(3)  # a <= 1/2
ALPHA_ABOVE_HALF: tl.constexpr = tl.constexpr(4)


# ------------------------------------------------------------------------------------------------------------ device helpers


@triton.jit
def _row_offset(row, inner, outer_stride, inner_stride):
    """Offset of a row of an (outer, inner, V) tensor, in int64, in the units of the strides."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def _row(ptr, row, inner, outer_stride, inner_stride, WIDE: tl.constexpr, E: tl.constexpr):
    """Pointer to a row; strides in groups of E columns. WIDE promises that it is 16-byte aligned."""
    ptr += _row_offset(row, inner, outer_stride, inner_stride) * E
    return tl.multiple_of(ptr, 16) if WIDE else ptr


@triton.jit
def _aligned_words(row_ptr, word: tl.constexpr):
    """The row as words of another type, 16-byte aligned. AMD's compiler keeps that promise on a cast, but loses `_row`'s."""
    return tl.multiple_of(row_ptr.to(tl.pointer_type(word)), 16)


@triton.jit
def _softcap(x, cap):
    """(y, dy/dx) of y = cap·tanh(x/cap), float32 to two units in the last place, also where |x| is far below or beyond the cap.

    With v = 2·log2(e)·x/cap and r = 2/(1 + 2^|v|): tanh = ±(1 - r), and its derivative r(2 - r), which does not cancel where it
    is small. Where |v| < 2.9, 1 - r would, and tanh is a minimax series. No sum has two products, and a select comes last: a
    compiler can fuse them in one way only, so that equal logits are equal wherever they are capped.
    """
    v = x * (2 * LOG2E / cap)
    w = v * v
    ratio = 3.14344694e-09
    ratio = ratio * w - 1.55706219e-07
    ratio = ratio * w + 4.23119567e-06
    ratio = ratio * w - 9.26829794e-05
    ratio = ratio * w + 1.92258642e-03
    ratio = ratio * w - 4.00373138e-02
    root = tl.rsqrt(tl.exp2(tl.abs(v)) * 0.5 + 0.5)  # 1/√, since 1/x takes six instructions more
    r = root * root
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    large = ((cap - cap * r).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(v) < 2.9, x + x * (w * ratio), large), r * (2.0 - r)


@triton.jit
def _load(row_ptr, group, limit, cap, E: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr):
    """Logits of the column groups `group` (K, T, 1), E columns each, as float32 (K, T, E); columns from `limit` on are -inf.

    A masked group is loaded whole, which keeps the access 128 bits wide: `is_wide` has checked that its memory exists.
    """
    lane = tl.arange(0, E)[None, None, :]
    if WIDE and row_ptr.dtype.element_ty == tl.bfloat16:
        # as words of two: unpacking by shift and mask is one instruction a pair cheaper than Triton's own conversion
        ptrs = _aligned_words(row_ptr, tl.int32) + (group * (E // 2) + tl.arange(0, E // 2)[None, None, :])
        w = tl.load(ptrs, mask=group * E < limit, other=0) if MASKED else tl.load(ptrs)
        even = (w << 16).to(tl.float32, bitcast=True)
        odd = (w & -65536).to(tl.float32, bitcast=True)
        x = tl.reshape(tl.join(even, odd), (w.shape[0], w.shape[1], E))
    elif WIDE:
        ptrs = _aligned_words(row_ptr, tl.int16 if row_ptr.dtype.element_ty == tl.float16 else tl.int32) + (group * E + lane)
        w = tl.load(ptrs, mask=group * E < limit, other=0) if MASKED else tl.load(ptrs)
        x = w.to(row_ptr.dtype.element_ty, bitcast=True).to(tl.float32)
    else:
        ptrs = row_ptr + (group * E + lane)
        x = (tl.load(ptrs, mask=group * E < limit, other=0.0) if MASKED else tl.load(ptrs)).to(tl.float32)
    if cap is not None:
        x, _ = _softcap(x, cap)
    if MASKED:
        x = tl.where(group * E + lane < limit, x, float("-inf"))
    return x


@triton.jit
def _by_thread(tile):
    """(K, T, E) -> (T, K·E): what a thread holds becomes one row, so that reducing axis 1 needs neither shuffle nor barrier."""
    return tl.reshape(tl.permute(tile, (1, 0, 2)), (tile.shape[1], tile.shape[0] * tile.shape[2]))


@triton.jit
def _load_label_logit(row_ptr, label, V, cap):
    """The label's logit as float32; -inf for a label outside [0, V), without touching memory."""
    inside = (label >= 0) & (label < V)
    x = tl.load(row_ptr + label, mask=inside, other=float("-inf")).to(tl.float32)
    if cap is not None:
        x, _ = _softcap(x, cap)
        x = tl.where(inside, x, float("-inf"))
    return x


@triton.jit
def _rescaled(total, factor):
    """total·factor, where total may be infinite and the factor 0 (its mass is gone): 0, not NaN."""
    return tl.where(factor > 0, total * factor, 0.0)


@triton.jit
def _weighted_delta(x, z, top, scale, inv_temperature):
    """(w, w·d) with w = 2^(z·scale - top) and d = (x - z)/τ, both 0 where d is not finite."""
    d = (x - z) * inv_temperature
    usable = tl.abs(d) < 1e30
    w = tl.where(usable, tl.exp2(z * scale - top), 0.0)
    return w, w * tl.where(usable, d, 0.0)


@triton.jit
def _pivot(x, z, x_label, z_label, scale, inv_temperature):
    """q-weighted mean of (x - z)/τ over a (T, K·E) tile and the label, finite whatever the logits hold."""
    top = tl.maximum(tl.maximum(tl.max(tl.max(z, axis=1), axis=0), z_label) * scale, LOWEST)
    w, wd = _weighted_delta(x, z, top, scale, inv_temperature)
    w_label, wd_label = _weighted_delta(x_label, z_label, top, scale, inv_temperature)
    total = tl.sum(tl.sum(w, axis=1), axis=0) + w_label
    return tl.where(total > 0, (tl.sum(tl.sum(wd, axis=1), axis=0) + wd_label) / total, 0.0)


@triton.jit
def _fold_tile(
    state, x, z, group, limit, pivot, x_label, label_group, scale, inv_temperature,
    MASKED: tl.constexpr, ENTROPY: tl.constexpr, REF_ENTROPY: tl.constexpr, ACCURACY: tl.constexpr, MEAN_LOGIT: tl.constexpr,
    SQUARE_SUM: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Folds a (T, K·E) tile, column groups `group` (T, K), into `state`, the running sums of each thread: (T,) vectors."""
    m_x, s_x, m_z, s_z, b, a, far, h_x, h_z, squares, sum_x, beaten = state

    m_x_old = m_x
    m_x = tl.maximum(m_x_old, tl.max(x, axis=1) * scale)
    r_x = tl.exp2(m_x_old - m_x)
    log_x = x * scale - m_x[:, None]
    e_x = tl.exp2(log_x)
    if ENTROPY:
        h_x = (h_x + (m_x_old - m_x) * s_x) * r_x + tl.sum(e_x * tl.maximum(log_x, LOWEST), axis=1)  # 0·LOWEST where p = 0
    if SQUARE_SUM:
        squares = squares * r_x * r_x + tl.sum(e_x * e_x, axis=1)
    if MEAN_LOGIT:
        if MASKED:
            E: tl.constexpr = x.shape[1] // group.shape[1]
            column = tl.reshape(group[:, :, None] * E + tl.arange(0, E)[None, None, :], x.shape)
            sum_x += tl.sum(tl.where(column < limit, x, 0.0), axis=1)
        else:
            sum_x += tl.sum(x, axis=1)
    if ACCURACY:
        # by groups; the label's own group is looked at once, at the end
        top = tl.max(tl.reshape(x, (group.shape[0], group.shape[1], x.shape[1] // group.shape[1])), axis=2)
        ahead = tl.where(group < label_group, top >= x_label, (top > x_label) & (group != label_group))
        beaten = tl.maximum(beaten, tl.max(ahead.to(tl.float32), axis=1))
    s_x = s_x * r_x + tl.sum(e_x, axis=1)

    if z is not None:
        m_z_old = m_z
        m_z = tl.maximum(m_z_old, tl.max(z, axis=1) * scale)
        r_z = tl.exp2(m_z_old - m_z)
        log_z = z * scale - m_z[:, None]
        e_z = tl.exp2(log_z)
        if REF_ENTROPY:
            h_z = (h_z + (m_z_old - m_z) * s_z) * r_z + tl.sum(e_z * tl.maximum(log_z, LOWEST), axis=1)
        s_z = s_z * r_z + tl.sum(e_z, axis=1)
        # q = 0: any finite t in the far range. x - z is NaN where both are -inf, and p's mass there must count as far.
        if REVERSE:
            t = tl.where(e_x > 0, (z - x) * inv_temperature - pivot, 1.0)
        else:
            t = tl.where(e_z > 0, (x - z) * inv_temperature - pivot, 1.0)
        w = e_x if REVERSE else e_z
        r_w = r_x if REVERSE else r_z
        near = tl.abs(t) < 0.125
        # (e^t - 1 - t)/t² on the near range, minimax: relative error 1e-7
        ratio = ((t * 0.00833426 + 0.04168793) * t + 0.16666669) * t + 0.49999997
        a = _rescaled(a, r_w) + tl.sum(w * tl.where(near, t * (t * ratio), -1.0 - t), axis=1)
        b = _rescaled(b, r_w) + tl.sum(w * t, axis=1)
        if REVERSE:
            far = far * r_z + tl.sum(tl.where(near, 0.0, e_z), axis=1)
        else:
            far = far * r_x + tl.sum(tl.where(near, 0.0, e_x), axis=1)
    return m_x, s_x, m_z, s_z, b, a, far, h_x, h_z, squares, sum_x, beaten


@triton.jit
def _fold_columns(
    state, policy_row, ref_row, group, limit, pivot, x_label, label_group, scale, inv_temperature, policy_cap, ref_cap,
    E: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr, ENTROPY: tl.constexpr, REF_ENTROPY: tl.constexpr, ACCURACY: tl.constexpr, MEAN_LOGIT: tl.constexpr,
    SQUARE_SUM: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Loads the tile of column groups `group` (K, T, 1) and folds it."""
    x = _by_thread(_load(policy_row, group, limit, policy_cap, E, WIDE, MASKED))
    z = None
    if ref_row is not None:
        z = _by_thread(_load(ref_row, group, limit, ref_cap, E, WIDE, MASKED))
    return _fold_tile(state, x, z, _by_thread(group), limit, pivot, x_label, label_group, scale, inv_temperature,
                      MASKED, ENTROPY, REF_ENTROPY, ACCURACY, MEAN_LOGIT, SQUARE_SUM, REVERSE)  # fmt: skip


@triton.jit
def _expm1_minus_id_near(h):
    """e^h - 1 - h for |h| < 1/2."""
    poly = 1.0 / 40320
    poly = poly * h + 1.0 / 5040
    poly = poly * h + 1.0 / 720
    poly = poly * h + 1.0 / 120
    poly = poly * h + 1.0 / 24
    poly = poly * h + 1.0 / 6
    poly = poly * h + 0.5
    return h * h * poly


@triton.jit
def _expm1_minus_id(h):
    """e^h - 1 - h without cancellation."""
    return tl.where(tl.abs(h) < 0.5, _expm1_minus_id_near(h), tl.exp(h) - 1.0 - h)


@triton.jit
def _expm1(h):
    """e^h - 1 without cancellation."""
    return tl.where(tl.abs(h) < 0.5, h + _expm1_minus_id_near(h), tl.exp2(h * LOG2E) - 1.0)


@triton.jit
def _power_less_one(w, log2_w, h):
    """w·(e^h - 1), 0 where w = 0; neither cancels nor overflows before its result does."""
    return tl.where(w == 0, 0.0, tl.where(h < 1.0, w * _expm1(h), tl.exp2(log2_w + h * LOG2E) - w))


@triton.jit
def _compared(x, z, scale, inv_temperature, m_x, inv_s_x, m_z, inv_s_z, shift):
    """(t, p, q): t = (x - z)/τ - shift, 0 where neither has the column."""
    p = tl.exp2(x * scale - m_x) * inv_s_x
    q = tl.exp2(z * scale - m_z) * inv_s_z
    return tl.where(p + q == 0, 0.0, (x - z) * inv_temperature - shift), p, q


@triton.jit
def _js_terms(t, p, q):
    """(m·(u·tanh u - log cosh u), p/2·log(p/m)) with m = (p + q)/2, u = t/2: both in one series of u² where |t| < 1/2."""
    u = 0.5 * t
    v = u * u
    h = v * (0.5 + v * (-0.25 + v * (1.0 / 9 + v * (-17.0 / 360 + v * (31.0 / 1575)))))
    log_cosh = v * (0.5 + v * (-1.0 / 12 + v * (1.0 / 45 + v * (-17.0 / 2520 + v * (31.0 / 14175)))))
    gap = tl.minimum(tl.abs(t), 100.0)
    r = tl.exp2(-gap * LOG2E)
    log_bigger = LN2 - LN2 * tl.log2(1.0 + r)
    near = tl.abs(t) < 0.5
    value = 0.5 * (p + q) * tl.where(near, h, log_bigger - gap * (r / (1.0 + r)))
    slope = tl.where(p == 0, 0.0, p * (0.5 * tl.where(near, u - log_cosh, log_bigger - tl.where(t < 0, gap, 0.0))))
    return value, slope


@triton.jit
def _alpha_value(t, p, q, log2_w, alpha, ABOVE_HALF: tl.constexpr):
    """[p - q - (p^a q^(1-a) - q)/a]/(1 - a); for a > 1/2 with p, q and a, 1 - a exchanged. `log2_w` is of what is q here."""
    if ABOVE_HALF:
        t = -t
    w = p if ABOVE_HALF else q
    other = q if ABOVE_HALF else p
    a = 1.0 - alpha if ABOVE_HALF else alpha
    near = (tl.abs(t) < 0.5) & (tl.abs(a * t) < 0.5)
    small = w * (_expm1_minus_id_near(t) - _expm1_minus_id_near(a * t) / a)
    gap = tl.where((t < 1.0) & (w != 0), w * _expm1(t), other - w)
    return tl.where(near, small, gap - _power_less_one(w, log2_w, a * t) / a) / (1.0 - a)


@triton.jit
def _alpha_slope(t, p, q, log2_w, alpha, ABOVE_HALF: tl.constexpr):
    """(p^a q^(1-a) - p)/(a - 1). `log2_w` is of p for a > 1/2, else of q."""
    if ABOVE_HALF:
        powers = _power_less_one(p, log2_w, (alpha - 1.0) * t)
    else:
        far = _power_less_one(q, log2_w, alpha * t) + (q - p)
        powers = tl.where(tl.abs(t) < 1.0, p * _expm1((alpha - 1.0) * t), far)
    return powers / (alpha - 1.0)


@triton.jit
def _id_minus_log1p(u):
    """u - log(1 + u) for -1/2 <= u <= 1 without cancellation: with w = u/(2 + u), log(1 + u) = 2 artanh(w)."""
    w = u / (2.0 + u)
    v = w * w
    poly = 1.0 / 15
    poly = poly * v + 1.0 / 13
    poly = poly * v + 1.0 / 11
    poly = poly * v + 1.0 / 9
    poly = poly * v + 1.0 / 7
    poly = poly * v + 1.0 / 5
    poly = poly * v + 1.0 / 3
    return u * w - 2.0 * w * v * poly


# ------------------------------------------------------------------------------------------------------------------- kernels


@triton.jit(
    do_not_specialize=["inner", "segments", "segment", "V", "scale", "inv_temperature", "policy_cap", "ref_cap",
                       "ignore_index", "field_stride", "policy_outer", "policy_inner", "ref_outer", "ref_inner"],
    do_not_specialize_on_alignment=["policy_ptr", "ref_ptr", "label_ptr", "record_ptr"],
)  # fmt: skip
def token_stats_fold_kernel(
    policy_ptr, ref_ptr, label_ptr,                                  # in   (outer, inner, V), the same or None, (N,) int64
    record_ptr,                                                      # out  (NUM_FIELDS, N, segments) float32
    policy_outer: tl.int64, policy_inner: tl.int64,                  # row strides in groups of E columns
    ref_outer: tl.int64, ref_inner: tl.int64,
    field_stride: tl.int64,                                          # N·segments
    inner, segments, segment, V,                                     # sizes; a segment has `segment` columns
    scale, inv_temperature, policy_cap, ref_cap, ignore_index: tl.int64,
    K: tl.constexpr, T: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr,
    ENTROPY: tl.constexpr, REF_ENTROPY: tl.constexpr, ACCURACY: tl.constexpr, MEAN_LOGIT: tl.constexpr,
    SQUARE_SUM: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """One program folds one segment of one row. Reads 1 x and 1 z per column; an ignored row reads nothing but its label."""
    TILE: tl.constexpr = K * T * E
    pid = tl.program_id(0)
    row = pid // segments
    label = tl.load(label_ptr + row)
    if label == ignore_index:
        return

    policy_row = _row(policy_ptr, row, inner, policy_outer, policy_inner, WIDE, E)
    start = (pid % segments) * segment
    limit = tl.minimum(start + segment, V)
    group = start // E + tl.arange(0, K)[:, None, None] * T + tl.arange(0, T)[None, :, None]
    label_group = label // E

    # The first tile gives the pivot, and is masked since it may be the only one.
    x_label = _load_label_logit(policy_row, label, V, policy_cap)
    x = _by_thread(_load(policy_row, group, limit, policy_cap, E, WIDE, MASKED=True))
    z = None
    ref_row = None
    pivot = 0.0
    if ref_ptr is not None:
        ref_row = _row(ref_ptr, row, inner, ref_outer, ref_inner, WIDE, E)
        z = _by_thread(_load(ref_row, group, limit, ref_cap, E, WIDE, MASKED=True))
        z_label = _load_label_logit(ref_row, label, V, ref_cap)
        if REVERSE:
            pivot = _pivot(z, x, z_label, x_label, scale, inv_temperature)
        else:
            pivot = _pivot(x, z, x_label, z_label, scale, inv_temperature)

    lowest = tl.full([T], LOWEST, tl.float32)
    zero = tl.zeros([T], tl.float32)
    state = (lowest, zero, lowest, zero, zero, zero, zero, zero, zero, zero, zero, zero)
    state = _fold_tile(state, x, z, _by_thread(group), limit, pivot, x_label, label_group, scale, inv_temperature,
                       True, ENTROPY, REF_ENTROPY, ACCURACY, MEAN_LOGIT, SQUARE_SUM, REVERSE)  # fmt: skip

    full = (limit - start) // TILE
    for i in range(1, full):
        state = _fold_columns(
            state, policy_row, ref_row, group + i * (K * T), limit, pivot, x_label, label_group, scale, inv_temperature,
            policy_cap, ref_cap, E, WIDE, False, ENTROPY, REF_ENTROPY, ACCURACY, MEAN_LOGIT, SQUARE_SUM, REVERSE,
        )  # fmt: skip
    if (full > 0) & (start + full * TILE < limit):
        state = _fold_columns(
            state, policy_row, ref_row, group + full * (K * T), limit, pivot, x_label, label_group, scale, inv_temperature,
            policy_cap, ref_cap, E, WIDE, True, ENTROPY, REF_ENTROPY, ACCURACY, MEAN_LOGIT, SQUARE_SUM, REVERSE,
        )  # fmt: skip

    # Merge the threads, once.
    m_x, s_x, m_z, s_z, b, a, far, h_x, h_z, squares, sum_x, beaten = state
    record_ptr += pid
    top_x = tl.max(m_x, axis=0)
    r_x = tl.exp2(m_x - top_x)
    tl.store(record_ptr + M_X * field_stride, top_x)
    tl.store(record_ptr + S_X * field_stride, tl.sum(s_x * r_x, axis=0))
    if ENTROPY:
        tl.store(record_ptr + H_X * field_stride, tl.sum((h_x + (m_x - top_x) * s_x) * r_x, axis=0))
    if SQUARE_SUM:
        tl.store(record_ptr + SQUARES * field_stride, tl.sum(squares * r_x * r_x, axis=0))
    if MEAN_LOGIT:
        tl.store(record_ptr + SUM_X * field_stride, tl.sum(sum_x, axis=0))
    if ACCURACY:
        near_label = label_group * E + tl.arange(0, E)
        x = _load_label_logit(policy_row, near_label, V, policy_cap)
        ahead = tl.where(near_label < label, x >= x_label, x > x_label)
        tl.store(record_ptr + BEATEN * field_stride, tl.maximum(tl.max(beaten, axis=0), tl.max(ahead.to(tl.float32), axis=0)))
    if ref_ptr is not None:
        top_z = tl.max(m_z, axis=0)
        r_z = tl.exp2(m_z - top_z)
        tl.store(record_ptr + M_Z * field_stride, top_z)
        tl.store(record_ptr + S_Z * field_stride, tl.sum(s_z * r_z, axis=0))
        tl.store(record_ptr + PIVOT * field_stride, pivot)
        r_w = r_x if REVERSE else r_z
        tl.store(record_ptr + B * field_stride, tl.sum(_rescaled(b, r_w), axis=0))
        tl.store(record_ptr + A * field_stride, tl.sum(_rescaled(a, r_w), axis=0))
        tl.store(record_ptr + FAR * field_stride, tl.sum(far * (r_z if REVERSE else r_x), axis=0))
        if REF_ENTROPY:
            tl.store(record_ptr + H_Z * field_stride, tl.sum((h_z + (m_z - top_z) * s_z) * r_z, axis=0))


@triton.jit(
    do_not_specialize=["N", "inner", "segments", "V", "scale", "inv_temperature", "policy_cap", "ref_cap", "ignore_index",
                       "field_stride", "policy_outer", "policy_inner", "ref_outer", "ref_inner"],
    do_not_specialize_on_alignment=["policy_ptr", "ref_ptr", "label_ptr", "record_ptr", "saved_ptr", "logp_ptr",
                                    "ref_logp_ptr", "kl_ptr", "entropy_ptr", "ref_entropy_ptr", "accuracy_ptr",
                                    "mean_logit_ptr", "log_sum_sq_probs_ptr"],
)  # fmt: skip
def token_stats_finish_kernel(
    policy_ptr, ref_ptr, label_ptr, record_ptr,                      # in   as in fold, (NUM_FIELDS, N, segments)
    saved_ptr,                                                       # out  (4, N): m_x, s_x, m_z, s_z, kept for backward, or
                                                                     #      (6, N) with the shift of (x - z)/τ and a mean
    logp_ptr, ref_logp_ptr, kl_ptr,                                  # out  (N,) float32; a None is not wanted
    entropy_ptr, ref_entropy_ptr, accuracy_ptr, mean_logit_ptr, log_sum_sq_probs_ptr,
    policy_outer: tl.int64, policy_inner: tl.int64,                  # row strides in elements
    ref_outer: tl.int64, ref_inner: tl.int64,
    field_stride: tl.int64,
    N, inner, segments, V,
    scale, inv_temperature, policy_cap, ref_cap, ignore_index: tl.int64,
    ROWS: tl.constexpr, SEGMENTS: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """One program merges the records of ROWS rows, in index order, and writes every output."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    label = tl.load(label_ptr + row, mask=inside, other=0)
    active = inside & (label != ignore_index)
    labelled = (label >= 0) & (label < V)
    label = tl.where(active, label, -1)  # so that no logit of an ignored row is read

    s = tl.arange(0, SEGMENTS)[None, :]
    cell = record_ptr + row[:, None].to(tl.int64) * segments + s
    live = active[:, None] & (s < segments)

    m_x = tl.load(cell + M_X * field_stride, mask=live, other=LOWEST)
    s_x = tl.load(cell + S_X * field_stride, mask=live, other=0.0)
    top_x = tl.max(m_x, axis=1)
    r_x = tl.exp2(m_x - top_x[:, None])
    sum_exp_x = tl.sum(s_x * r_x, axis=1)
    log2_sum_x = tl.log2(sum_exp_x)
    x_label = _load_label_logit(policy_ptr + _row_offset(row, inner, policy_outer, policy_inner), label, V, policy_cap)
    logp = LN2 * ((x_label * scale - top_x) - log2_sum_x)
    logp = tl.where(labelled, tl.where(logp > 0, 0.0, logp), float("nan"))
    tl.store(logp_ptr + row, tl.where(active, logp, 0.0), mask=inside)
    tl.store(saved_ptr + row, tl.where(active, top_x, 0.0), mask=inside)
    tl.store(saved_ptr + N + row, tl.where(active, sum_exp_x, 0.0), mask=inside)

    if entropy_ptr is not None:
        h_x = tl.load(cell + H_X * field_stride, mask=live, other=0.0)
        mean = tl.sum((h_x + (m_x - top_x[:, None]) * s_x) * r_x, axis=1) / sum_exp_x
        tl.store(entropy_ptr + row, tl.where(active, LN2 * (log2_sum_x - mean), 0.0), mask=inside)
    if log_sum_sq_probs_ptr is not None:
        squares = tl.sum(tl.load(cell + SQUARES * field_stride, mask=live, other=0.0) * r_x * r_x, axis=1)
        tl.store(log_sum_sq_probs_ptr + row, tl.where(active, LN2 * (tl.log2(squares) - 2 * log2_sum_x), 0.0), mask=inside)
    if mean_logit_ptr is not None:
        sum_x = tl.sum(tl.load(cell + SUM_X * field_stride, mask=live, other=0.0), axis=1)
        tl.store(mean_logit_ptr + row, tl.where(active, sum_x / V, 0.0), mask=inside)
    if accuracy_ptr is not None:
        beaten = tl.max(tl.load(cell + BEATEN * field_stride, mask=live, other=0.0), axis=1)
        accuracy = tl.where(labelled, 1.0 - beaten, float("nan"))
        tl.store(accuracy_ptr + row, tl.where(active, accuracy, 0.0), mask=inside)

    if ref_ptr is not None:
        m_z = tl.load(cell + M_Z * field_stride, mask=live, other=LOWEST)
        s_z = tl.load(cell + S_Z * field_stride, mask=live, other=0.0)
        top_z = tl.max(m_z, axis=1)
        r_z = tl.exp2(m_z - top_z[:, None])
        s_z = s_z * r_z
        sum_exp_z = tl.sum(s_z, axis=1)
        log2_sum_z = tl.log2(sum_exp_z)
        z_label = _load_label_logit(ref_ptr + _row_offset(row, inner, ref_outer, ref_inner), label, V, ref_cap)
        ref_logp = LN2 * ((z_label * scale - top_z) - log2_sum_z)
        ref_logp = tl.where(labelled, tl.where(ref_logp > 0, 0.0, ref_logp), float("nan"))
        tl.store(ref_logp_ptr + row, tl.where(active, ref_logp, 0.0), mask=inside)
        tl.store(saved_ptr + 2 * N + row, tl.where(active, top_z, 0.0), mask=inside)
        tl.store(saved_ptr + 3 * N + row, tl.where(active, sum_exp_z, 0.0), mask=inside)

        # Move every segment's sums from its own pivot to C = E_q[(x - z)/τ] of the row (docs/math.md, "Merging"), of KL(p || q)
        # to E_p[(z - x)/τ]: w is the distribution under which means are taken, v the other one.
        REVERSE: tl.constexpr = DIVERGENCE == REVERSE_KL
        r_w = r_x if REVERSE else r_z
        r_v = r_z if REVERSE else r_x
        s_w = s_x * r_x if REVERSE else s_z
        sum_exp_w = sum_exp_x if REVERSE else sum_exp_z
        gap = top_z - top_x if REVERSE else top_x - top_z
        log2_gap = log2_sum_z - log2_sum_x if REVERSE else log2_sum_x - log2_sum_z
        pivot = tl.load(cell + PIVOT * field_stride, mask=live, other=0.0)
        b = _rescaled(tl.load(cell + B * field_stride, mask=live, other=0.0), r_w)
        a = _rescaled(tl.load(cell + A * field_stride, mask=live, other=0.0), r_w)
        far = tl.sum(tl.load(cell + FAR * field_stride, mask=live, other=0.0) * r_v, axis=1)
        # C is c + offset, with c a pivot of the row: a large common shift of the logits is in c, and is never rounded again.
        c = tl.sum(tl.where(s == 0, pivot, 0.0), axis=1)
        pivot -= c[:, None]
        offset = tl.sum(b + pivot * s_w, axis=1) / sum_exp_w
        h = pivot - offset[:, None]
        phi = _expm1_minus_id(h)
        a = tl.where(r_w > 0, (1.0 + h + phi) * a + (h + phi) * b + phi * s_w, 0.0)
        far = tl.where(far > 0, far * tl.exp2(gap - (c + offset) * LOG2E), 0.0)
        a = (tl.sum(a, axis=1) + far) / sum_exp_w
        b = tl.sum(tl.where(r_w > 0, b + h * s_w, 0.0), axis=1) / sum_exp_w
        u = a + b
        # A pivot far above C (its sample held next to no q) makes large terms cancel in `a`; φ(h) tells how large.
        moved = tl.sum(tl.where(s_w > 0, phi * s_w, 0.0), axis=1) / sum_exp_w
        plain = (LN2 * (gap + log2_gap) - c) - offset
        # the plain form where the other is large, infinite, overflown or cancelled
        kl = tl.where((u > -0.5) & (u < 1.0) & (moved < 0.125), a - _id_minus_log1p(u), plain)
        kl = tl.where(kl < 0, 0.0, kl)
        infinite = kl == float("inf")
        if DIVERGENCE == REVERSE_KL:
            tl.store(saved_ptr + 4 * N + row, tl.where(active, -(c + offset), 0.0), mask=inside)
            tl.store(saved_ptr + 5 * N + row, tl.where(active & infinite, float("nan"), 0.0), mask=inside)
        elif DIVERGENCE != FORWARD_KL:
            shift = tl.where(infinite, LN2 * (gap + log2_gap), (c + offset) + kl)
            tl.store(saved_ptr + 4 * N + row, tl.where(active, shift, 0.0), mask=inside)
        if (DIVERGENCE == FORWARD_KL) | (DIVERGENCE == REVERSE_KL):
            kl = tl.where(labelled, kl, float("nan"))
            tl.store(kl_ptr + row, tl.where(active, kl, 0.0), mask=inside)
        if ref_entropy_ptr is not None:
            h_z = tl.load(cell + H_Z * field_stride, mask=live, other=0.0)
            mean = tl.sum(h_z * r_z + (m_z - top_z[:, None]) * s_z, axis=1) / sum_exp_z
            tl.store(ref_entropy_ptr + row, tl.where(active, LN2 * (log2_sum_z - mean), 0.0), mask=inside)


@triton.jit
def _compare_tile(
    sums, policy_row, ref_row, group, limit, scale, inv_temperature, policy_cap, ref_cap, m_x, inv_s_x, m_z, inv_s_z, shift,
    alpha, E: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Adds the columns in `group` (K, T, 1) to the sums of each thread, (T,) vectors, of the divergence and of its slope."""
    value, slope = sums
    x = _load(policy_row, group, limit, policy_cap, E, WIDE, MASKED)
    z = _load(ref_row, group, limit, ref_cap, E, WIDE, MASKED)
    t, p, q = _compared(x, z, scale, inv_temperature, m_x, inv_s_x, m_z, inv_s_z, shift)
    if DIVERGENCE == JS:
        more, pull = _js_terms(t, p, q)
        slope += tl.sum(_by_thread(pull), axis=1)
    elif DIVERGENCE == ALPHA:
        more = _alpha_value(t, p, q, z * scale - m_z + tl.log2(inv_s_z), alpha, ABOVE_HALF=False)
    else:
        more = _alpha_value(t, p, q, x * scale - m_x + tl.log2(inv_s_x), alpha, ABOVE_HALF=True)
    return value + tl.sum(_by_thread(more), axis=1), slope


@triton.jit(
    do_not_specialize=["N", "inner", "segments", "segment", "V", "scale", "inv_temperature", "policy_cap", "ref_cap", "alpha",
                       "ignore_index", "field_stride", "policy_outer", "policy_inner", "ref_outer", "ref_inner"],
    do_not_specialize_on_alignment=["policy_ptr", "ref_ptr", "label_ptr", "record_ptr", "saved_ptr"],
)  # fmt: skip
def token_stats_compare_kernel(
    policy_ptr, ref_ptr, label_ptr, saved_ptr,                       # in   as in fold, (6, N)
    record_ptr,                                                      # out  its fields A, the divergence, and B, its slope
    policy_outer: tl.int64, policy_inner: tl.int64,                  # row strides in groups of E columns
    ref_outer: tl.int64, ref_inner: tl.int64,
    field_stride: tl.int64,
    N, inner, segments, segment, V,
    scale, inv_temperature, policy_cap, ref_cap, alpha, ignore_index: tl.int64,
    K: tl.constexpr, T: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """One program sums one segment of one row, whose log p/q is known by now. Reads 1 x and 1 z per column."""
    pid = tl.program_id(0)
    row = pid // segments
    label = tl.load(label_ptr + row)
    if label == ignore_index:
        return
    policy_row = _row(policy_ptr, row, inner, policy_outer, policy_inner, WIDE, E)
    ref_row = _row(ref_ptr, row, inner, ref_outer, ref_inner, WIDE, E)
    m_x, m_z = tl.load(saved_ptr + row), tl.load(saved_ptr + 2 * N + row)
    inv_s_x, inv_s_z = 1.0 / tl.load(saved_ptr + N + row), 1.0 / tl.load(saved_ptr + 3 * N + row)
    shift = tl.load(saved_ptr + 4 * N + row)
    start = (pid % segments) * segment
    limit = tl.minimum(start + segment, V)
    group = start // E + tl.arange(0, K)[:, None, None] * T + tl.arange(0, T)[None, :, None]
    sums = (tl.zeros([T], tl.float32), tl.zeros([T], tl.float32))
    full = (limit - start) // (K * T * E)
    for i in range(0, full):
        sums = _compare_tile(sums, policy_row, ref_row, group + i * (K * T), limit, scale, inv_temperature, policy_cap, ref_cap,
                             m_x, inv_s_x, m_z, inv_s_z, shift, alpha, E, WIDE, False, DIVERGENCE)  # fmt: skip
    if start + full * (K * T * E) < limit:
        sums = _compare_tile(sums, policy_row, ref_row, group + full * (K * T), limit, scale, inv_temperature, policy_cap,
                             ref_cap, m_x, inv_s_x, m_z, inv_s_z, shift, alpha, E, WIDE, True, DIVERGENCE)  # fmt: skip
    value, slope = sums
    tl.store(record_ptr + A * field_stride + pid, tl.sum(value, axis=0))
    tl.store(record_ptr + B * field_stride + pid, tl.sum(slope, axis=0))


@triton.jit(
    do_not_specialize=["N", "segments", "V", "alpha", "ignore_index", "field_stride"],
    do_not_specialize_on_alignment=["policy_ptr", "label_ptr", "record_ptr", "saved_ptr", "kl_ptr"],
)
def token_stats_settle_kernel(
    policy_ptr, label_ptr, record_ptr,                               # in   policy: of the launcher's device
    saved_ptr, kl_ptr,                                               # out  row 5 of (6, N), (N,)
    field_stride: tl.int64,
    N, segments, V, alpha, ignore_index: tl.int64,
    ROWS: tl.constexpr, SEGMENTS: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """One program adds the sums of ROWS rows, in index order: the divergence, and the mean that its gradient subtracts."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < N
    label = tl.load(label_ptr + row, mask=inside, other=0)
    active = inside & (label != ignore_index)
    s = tl.arange(0, SEGMENTS)[None, :]
    cell = record_ptr + row[:, None].to(tl.int64) * segments + s
    live = active[:, None] & (s < segments)
    kl = tl.sum(tl.load(cell + A * field_stride, mask=live, other=0.0), axis=1)
    kl = tl.where(kl < 0, 0.0, kl)
    if DIVERGENCE == JS:
        kl = tl.where(kl > LN2, LN2, kl)
        mean = tl.sum(tl.load(cell + B * field_stride, mask=live, other=0.0), axis=1)
    else:
        mean = tl.where(kl == float("inf"), float("nan"), alpha * kl)
    tl.store(saved_ptr + 5 * N + row, tl.where(active, mean, 0.0), mask=inside)
    kl = tl.where((label >= 0) & (label < V), kl, float("nan"))
    tl.store(kl_ptr + row, tl.where(active, kl, 0.0), mask=inside)


@triton.jit
def _gradient_tile(
    d_row, policy_row, ref_row, group, limit, stop, label, g_label, c_p, c_q, m_x, m_z, scale, policy_cap, ref_cap, compared,
    E: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Writes g_label·e_y + c_p·2^(x·scale - m_x) + c_q·2^(z·scale - m_z) of the columns in `group` (K, T, 1), up to `stop`;
    with a cap, x and z are capped, and all of it is times the slope of x. Of other divergences than KL(q || p), the last term
    is c_q·(slope - p·mean), and `compared` what it takes.

    A row that is None contributes 0, and so do columns from `limit` on.
    """
    lane = tl.arange(0, E)[None, None, :]
    d_x = tl.zeros([group.shape[0], group.shape[1], E], tl.float32)
    if policy_row is not None:
        x = _load(policy_row, group, limit, None, E, WIDE, MASKED)
        if policy_cap is not None:
            x, slope = _softcap(x, policy_cap)
        d_x = c_p * tl.exp2(x * scale - m_x)
        if ref_row is not None:
            z = _load(ref_row, group, limit, ref_cap, E, WIDE, MASKED)
            if DIVERGENCE == FORWARD_KL:
                d_x += c_q * tl.exp2(z * scale - m_z)
            else:
                inv_temperature, inv_s_x, inv_s_z, shift, mean, alpha = compared
                t, p, q = _compared(x, z, scale, inv_temperature, m_x, inv_s_x, m_z, inv_s_z, shift)
                if DIVERGENCE == REVERSE_KL:
                    pull = tl.where(p == 0, 0.0, p * t)
                elif DIVERGENCE == JS:
                    _, pull = _js_terms(t, p, q)
                elif DIVERGENCE == ALPHA:
                    pull = _alpha_slope(t, p, q, z * scale - m_z + tl.log2(inv_s_z), alpha, ABOVE_HALF=False)
                else:
                    pull = _alpha_slope(t, p, q, x * scale - m_x + tl.log2(inv_s_x), alpha, ABOVE_HALF=True)
                d_x += c_q * (pull - p * mean)
        d_x = tl.where(label - group * E == lane, d_x + g_label, d_x)
        if policy_cap is not None:
            d_x *= slope
    column = group * E + lane
    if MASKED:
        tl.store(d_row + column, tl.where(column < limit, d_x, 0.0).to(d_row.dtype.element_ty), mask=column < stop)
    elif WIDE:
        word: tl.constexpr = tl.int32 if d_row.dtype.element_ty == tl.float32 else tl.int16
        tl.store(_aligned_words(d_row, word) + column, d_x.to(d_row.dtype.element_ty).to(word, bitcast=True))
    else:
        tl.store(d_row + column, d_x.to(d_row.dtype.element_ty))


@triton.jit
def _gradient_columns(
    d_row, policy_row, ref_row, start, stop, V, label, g_label, c_p, c_q, m_x, m_z, scale, policy_cap, ref_cap, compared,
    K: tl.constexpr, T: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Gradient of columns [start, stop), zeros from V on."""
    group = start // E + tl.arange(0, K)[:, None, None] * T + tl.arange(0, T)[None, :, None]
    full = tl.maximum(tl.minimum(stop, V) - start, 0) // (K * T * E)
    for i in range(0, full):
        _gradient_tile(d_row, policy_row, ref_row, group + i * (K * T), V, stop, label, g_label, c_p, c_q, m_x, m_z, scale,
                       policy_cap, ref_cap, compared, E, WIDE, MASKED=False, DIVERGENCE=DIVERGENCE)  # fmt: skip
    for i in range(full, tl.cdiv(stop - start, K * T * E)):
        _gradient_tile(d_row, policy_row, ref_row, group + i * (K * T), V, stop, label, g_label, c_p, c_q, m_x, m_z, scale,
                       policy_cap, ref_cap, compared, E, WIDE, MASKED=True, DIVERGENCE=DIVERGENCE)  # fmt: skip


@triton.jit(
    do_not_specialize=["N", "inner", "chunks", "chunk", "V", "W", "scale", "inv_temperature", "policy_cap", "ref_cap", "alpha",
                       "ignore_index", "policy_outer", "policy_inner", "ref_outer", "ref_inner", "d_outer", "d_inner"],
    do_not_specialize_on_alignment=["policy_ptr", "ref_ptr", "label_ptr", "saved_ptr", "g_logp_ptr", "g_kl_ptr",
                                    "d_policy_ptr"],
)  # fmt: skip
def token_stats_bwd_kernel(
    policy_ptr, ref_ptr, label_ptr, saved_ptr,                       # in   logits as in fold, (N,) int64, (4, N)
    g_logp_ptr, g_kl_ptr,                                            # in   (N,) float32 upstream gradients; None is zero
    d_policy_ptr,                                                    # out  (outer, inner, W); may be the policy logits
    policy_outer: tl.int64, policy_inner: tl.int64,                  # row strides in groups of E columns
    ref_outer: tl.int64, ref_inner: tl.int64,
    d_outer: tl.int64, d_inner: tl.int64,
    N, inner, chunks, chunk, V, W,                                   # sizes; columns [V, W) get a zero gradient
    scale, inv_temperature, policy_cap, ref_cap, alpha, ignore_index: tl.int64,
    K: tl.constexpr, T: tl.constexpr, E: tl.constexpr, WIDE: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """One program writes one chunk of one row's gradient: reads 1 x and 1 z, writes 1 d_x per column.

    With p = 2^(x·scale - m_x) / s_x and q alike: d_x = (g_logp·e_y + (g_kl - g_logp)·p - g_kl·q) / τ. An element is read and
    written by the same thread, so writing over the policy logits is safe. Ignored rows are written without being read, and rows
    with g_kl = 0 (DPO, and the chosen rows of TDPO2) do not read the reference. For p - q stands the divergence's gradient.
    """
    pid = tl.program_id(0)
    row = pid // chunks
    start = (pid % chunks) * chunk
    stop = tl.minimum(start + chunk, W)
    d_row = _row(d_policy_ptr, row, inner, d_outer, d_inner, WIDE, E)

    label = tl.load(label_ptr + row)
    if label == ignore_index:
        _gradient_columns(d_row, None, None, start, stop, W, -1, 0.0, 0.0, 0.0, 0.0, 0.0, scale, None, None, None,
                          K, T, E, WIDE, FORWARD_KL)  # fmt: skip
        return

    labelled = (label >= 0) & (label < V)
    label = tl.where(labelled, label, -1).to(tl.int32)
    policy_row = _row(policy_ptr, row, inner, policy_outer, policy_inner, WIDE, E)
    g_logp = 0.0 if g_logp_ptr is None else tl.load(g_logp_ptr + row)
    g_kl = 0.0 if g_kl_ptr is None else tl.load(g_kl_ptr + row)
    g_label = g_logp * inv_temperature
    c_p = tl.where(labelled, (g_kl - g_logp) * inv_temperature / tl.load(saved_ptr + N + row), float("nan"))
    m_x = tl.load(saved_ptr + row)
    if ref_ptr is None or g_kl_ptr is None:
        _gradient_columns(
            d_row, policy_row, None, start, stop, V, label, g_label, c_p, 0.0, m_x, 0.0, scale, policy_cap, None, None,
            K, T, E, WIDE, FORWARD_KL,
        )  # fmt: skip
    else:
        if g_kl == 0:
            _gradient_columns(
                d_row, policy_row, None, start, stop, V, label, g_label, c_p, 0.0, m_x, 0.0, scale, policy_cap, None, None,
                K, T, E, WIDE, FORWARD_KL,
            )  # fmt: skip
        else:
            ref_row = _row(ref_ptr, row, inner, ref_outer, ref_inner, WIDE, E)
            m_z = tl.load(saved_ptr + 2 * N + row)
            s_z = tl.load(saved_ptr + 3 * N + row)
            compared = None
            if DIVERGENCE == FORWARD_KL:
                c_q = -g_kl * inv_temperature / s_z
            else:
                s_x = tl.load(saved_ptr + N + row)
                c_p = tl.where(labelled, -g_label / s_x, float("nan"))
                c_q = g_kl * inv_temperature
                shift, mean = tl.load(saved_ptr + 4 * N + row), tl.load(saved_ptr + 5 * N + row)
                compared = (inv_temperature, 1.0 / s_x, 1.0 / s_z, shift, mean, alpha)
            _gradient_columns(
                d_row, policy_row, ref_row, start, stop, V, label, g_label, c_p, c_q, m_x, m_z, scale, policy_cap, ref_cap,
                compared, K, T, E, WIDE, DIVERGENCE,
            )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class Tiling:
    """How a program walks over columns: tiles of K x T x E, T threads each owning K groups of E adjacent columns."""

    K: int
    T: int
    E: int
    WIDE: bool

    @property
    def columns(self) -> int:
        return self.K * self.T * self.E

    @property
    def num_warps(self) -> int:
        return self.T // warp_size()


def warp_size() -> int:
    """Threads of a warp; AMD's are called wavefronts."""
    return 64 if torch.version.hip else 32


PAIRS_PER_THREAD = 16
"""K·E: what a thread holds of a tile. 16 fold in 72 registers; 32 would take 128 and halve the occupancy."""

MAX_SEGMENTS = 16
"""Records of a row that `finish` merges at once. Beyond 16 x SEGMENT_COLUMNS columns segments grow instead of multiplying."""

SEGMENT_COLUMNS = 65_536
"""Longest segment of an ordinary vocabulary: few rows still fill a GPU, and a thread has 512 pairs to pay for its merge."""

FINISH_ROWS = 32
"""Rows of one finish program."""


def tiling(V: int, itemsize: int, wide: bool) -> Tiling:
    """The tile for rows of V columns whose widest logits have `itemsize` bytes. A pure function: it fixes every row's bits."""
    elements = 16 // itemsize if wide else 1  # 128-bit accesses, or one column per thread: coalesced at any alignment
    if V <= 1_024:
        threads = warp_size()  # more would have nothing to do
    elif V <= 32_768:
        threads = 64  # the merge of threads costs a warp the same for any V: few warps where V is small
    else:
        threads = 128
    return Tiling(K=PAIRS_PER_THREAD // elements, T=threads, E=elements, WIDE=wide)


def segmentation(V: int, tile: Tiling) -> tuple[int, int]:
    """(number of segments, columns of each) of a row; whole tiles, so that only a row's last tile is partial."""
    segments = min(MAX_SEGMENTS, -(-V // SEGMENT_COLUMNS))
    segment = -(-V // (segments * tile.columns)) * tile.columns
    return -(-V // segment), segment


def backward_chunk(tile: Tiling) -> int:
    """Columns a backward program writes: eight tiles pay for its seven scalar loads."""
    return 8 * tile.columns


def fold_registers(tile: Tiling, extras: bool, reverse: bool) -> int:
    """Cap of registers a thread: the least with which no target spills (`make audit`). Of 80, bfloat16 on sm_90 takes 72.
    `reverse`: of KL(p || q), with one more running sum."""
    if extras:
        return 112
    if not tile.WIDE:
        return 112 if reverse else 96
    return 96 if reverse and tile.E < 8 else 80


def backward_registers(tile: Tiling, dtype: torch.dtype) -> int:
    """The same for backward: 40 needs packed loads, and scalar accesses need an address a column."""
    if not tile.WIDE:
        return 80
    return 40 if tile.E == 8 and dtype == torch.bfloat16 else 48


def ample_registers(extras: bool) -> int:
    """The same for both where more is needed: for softcaps, of whose arithmetic sm_100 packs pairs and holds every constant
    twice, and for gradients wider than their logits. Four warps still fit a quarter of an SM, three with extras."""
    return 168 if extras else 128


def is_wide(V: int, *logits: Tensor | None) -> bool:
    """Whether every row of every (outer, inner, width) tensor starts on a 16-byte boundary, and its last 16-byte group of
    columns below V lies in the tensor's memory whole."""
    present = [t for t in logits if t is not None]
    group = 16 // max(t.element_size() for t in present)
    for t in present:
        pitch_aligned = all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
        last_row = t.storage_offset() + sum((n - 1) * stride for n, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True))
        whole = (last_row + -(-V // group) * group) * t.element_size() <= t.untyped_storage().nbytes()
        if t.data_ptr() % 16 or not pitch_aligned or not whole:
            return False
    return True


# ----------------------------------------------------------------------------------------------------------------- launchers

Softcaps = tuple[float | None, float | None]
Divergence = tuple[str, float]
"""Name and α (fused_tdpo/types.py)."""

empty = torch.empty
"""Every fresh tensor of a launcher comes from here, so that tests can hand out memory full of NaN."""


def _launch(kernel: triton.JITFunction, programs: int, **args: object) -> None:
    """The one place where kernels start: tests and the audit replace it to see exactly what would be launched."""
    if torch.version.hip:
        del args["maxnreg"]  # an option of NVIDIA's compiler
    assert programs < 2**31, "more programs than a grid's first axis holds"
    if programs:
        with torch.cuda.device_of(args["policy_ptr"]):  # no-op for CPU tensors
            kernel[(programs,)](**args)


def _strides(prefix: str, logits: Tensor | None, tile: Tiling | None = None) -> dict[str, int]:
    """Row strides in elements; for kernels that walk in tiles, in groups of E columns, of which WIDE promises alignment."""
    outer, inner = (0, 0) if logits is None else logits.stride()[:2]
    group = 1
    if tile is not None and logits is not None:
        group = tile.E
        assert outer % group == 0 and inner % group == 0, "the kernel was promised rows of whole groups"
        starts = (logits.data_ptr(), outer * logits.element_size(), inner * logits.element_size())
        assert not tile.WIDE or all(start % 16 == 0 for start in starts), "the kernel was promised rows on 16-byte boundaries"
    return {f"{prefix}_outer": outer // group, f"{prefix}_inner": inner // group}


def _scales(temperature: float) -> dict[str, float]:
    return {"scale": LOG2E.value / temperature, "inv_temperature": 1.0 / temperature}


def _kind(divergence: Divergence) -> int:
    """Which constant of the kernels a divergence is."""
    name, alpha = divergence
    if name == "alpha":
        return (ALPHA if alpha <= 0.5 else ALPHA_ABOVE_HALF).value
    return {"forward_kl": FORWARD_KL, "reverse_kl": REVERSE_KL, "js": JS}[name].value


def _caps(softcaps: Softcaps, ref: Tensor | None) -> dict[str, float | None]:
    return {"policy_cap": softcaps[0], "ref_cap": None if ref is None else softcaps[1]}


def token_stats_fwd(
    policy: Tensor,
    ref: Tensor | None,
    labels: Tensor,
    *,
    V: int,
    ignore_index: int,
    temperature: float,
    extras: tuple[str, ...],
    softcaps: Softcaps = (None, None),
    divergence: Divergence = ("forward_kl", 0.0),
) -> tuple[dict[str, Tensor], Tensor]:
    """Launches fold and finish, and for divergences that take a second pass compare and settle.

    Args:
        policy: (outer, inner, >= V) logits, columns contiguous, any row strides. ref: the same or None.
        labels: (outer·inner,) int64, contiguous.
        softcaps: of policy and reference, whose logits are raw products x where it is a number: they count as cap·tanh(x/cap).

    Returns:
        the statistics by name, each (N,) float32, and `saved` (4, N) float32 for backward: m_x, s_x, m_z, s_z; for divergences
        other than KL(q || p) (6, N), with the shift of (x - z)/τ and the mean that the gradient subtracts.
    """
    N, inner = labels.numel(), policy.shape[1]
    wide = is_wide(V, policy, ref)
    tile = tiling(V, max(policy.element_size(), ref.element_size() if ref is not None else 1), wide)
    segments, segment = segmentation(V, tile)
    caps = _caps(softcaps, ref)
    device = policy.device

    names = ["logp", *(["ref_logp", "kl"] if ref is not None else []), *extras]
    out = {name: empty(N, dtype=torch.float32, device=device) for name in names}
    kind = _kind(divergence) if ref is not None else FORWARD_KL.value
    saved = empty((4 if divergence[0] == "forward_kl" else 6, N), dtype=torch.float32, device=device)
    record = empty((NUM_FIELDS, N, segments), dtype=torch.float32, device=device)
    common = {
        "policy_ptr": policy, "ref_ptr": ref, "label_ptr": labels, "record_ptr": record, "field_stride": N * segments,
        "inner": inner, "segments": segments, "V": V, "ignore_index": ignore_index, **_scales(temperature), **caps,
    }  # fmt: skip
    _launch(
        token_stats_fold_kernel, N * segments, **common,
        **_strides("policy", policy, tile), **_strides("ref", ref, tile), segment=segment,
        K=tile.K, T=tile.T, E=tile.E, WIDE=tile.WIDE,
        ENTROPY="entropy" in out, REF_ENTROPY="ref_entropy" in out, ACCURACY="accuracy" in out, MEAN_LOGIT="mean_logit" in out,
        SQUARE_SUM="log_sum_sq_probs" in out, REVERSE=kind == REVERSE_KL.value, num_warps=tile.num_warps,
        maxnreg=ample_registers(bool(extras))
        if any(caps.values())
        else fold_registers(tile, bool(extras), kind == REVERSE_KL.value),
    )  # fmt: skip
    _launch(
        token_stats_finish_kernel, -(-N // FINISH_ROWS), **common,
        **_strides("policy", policy), **_strides("ref", ref), saved_ptr=saved, N=N,
        logp_ptr=out["logp"], ref_logp_ptr=out.get("ref_logp"), kl_ptr=out.get("kl"), entropy_ptr=out.get("entropy"),
        ref_entropy_ptr=out.get("ref_entropy"), accuracy_ptr=out.get("accuracy"), mean_logit_ptr=out.get("mean_logit"),
        log_sum_sq_probs_ptr=out.get("log_sum_sq_probs"), ROWS=FINISH_ROWS, SEGMENTS=MAX_SEGMENTS, DIVERGENCE=kind,
        num_warps=4, maxnreg=None,
    )  # fmt: skip
    if kind in (JS.value, ALPHA.value, ALPHA_ABOVE_HALF.value):
        _launch(
            token_stats_compare_kernel, N * segments, **common,
            **_strides("policy", policy, tile), **_strides("ref", ref, tile), segment=segment, saved_ptr=saved, N=N,
            alpha=divergence[1], K=tile.K, T=tile.T, E=tile.E, WIDE=tile.WIDE, DIVERGENCE=kind, num_warps=tile.num_warps,
            maxnreg=ample_registers(extras=True),
        )  # fmt: skip
        _launch(
            token_stats_settle_kernel, -(-N // FINISH_ROWS),
            policy_ptr=policy, label_ptr=labels, record_ptr=record, saved_ptr=saved, kl_ptr=out["kl"],
            field_stride=N * segments, N=N, segments=segments, V=V, alpha=divergence[1], ignore_index=ignore_index,
            ROWS=FINISH_ROWS, SEGMENTS=MAX_SEGMENTS, DIVERGENCE=kind, num_warps=4, maxnreg=None,
        )  # fmt: skip
    return out, saved


def token_stats_bwd(
    policy: Tensor, ref: Tensor | None, labels: Tensor, saved: Tensor, g_logp: Tensor | None, g_kl: Tensor | None,
    d_policy: Tensor, *, V: int, ignore_index: int, temperature: float, softcaps: Softcaps = (None, None),
    divergence: Divergence = ("forward_kl", 0.0),
) -> None:  # fmt: skip
    """Launches backward: writes the gradient of the policy logits into `d_policy` (outer, inner, W), which may be `policy`, or
    have another dtype. With a softcap of the policy, that of the raw products.

    `g_logp` and `g_kl` are (N,) float32, contiguous, or None for zero; the rest is what `token_stats_fwd` took and saved.
    """
    N, inner, W = labels.numel(), policy.shape[1], policy.shape[2]
    ref = ref if g_kl is not None else None
    kind = _kind(divergence) if ref is not None else FORWARD_KL.value
    wide = is_wide(V, policy, ref) and is_wide(0, d_policy)
    tile = tiling(W, max(t.element_size() for t in (policy, ref, d_policy) if t is not None), wide)
    caps = _caps(softcaps, ref)
    ample = any(caps.values()) or d_policy.element_size() > policy.element_size() or kind != FORWARD_KL.value
    chunk = backward_chunk(tile)
    chunks = -(-W // chunk)
    _launch(
        token_stats_bwd_kernel, N * chunks,
        policy_ptr=policy, ref_ptr=ref, label_ptr=labels, saved_ptr=saved, g_logp_ptr=g_logp, g_kl_ptr=g_kl,
        d_policy_ptr=d_policy,
        **_strides("policy", policy, tile), **_strides("ref", ref, tile), **_strides("d", d_policy, tile),
        N=N, inner=inner, chunks=chunks, chunk=chunk, V=V, W=W, ignore_index=ignore_index, **_scales(temperature), **caps,
        alpha=divergence[1], K=tile.K, T=tile.T, E=tile.E, WIDE=tile.WIDE, DIVERGENCE=kind, num_warps=tile.num_warps,
        maxnreg=ample_registers(extras=kind != FORWARD_KL.value) if ample else backward_registers(tile, policy.dtype),
    )  # fmt: skip
