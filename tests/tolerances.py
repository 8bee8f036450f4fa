"""The one error budget of the test-suite: what counts as right, for every backend, dtype and size.

Truth is the specification in float64 *on the same rounded inputs*. A result may be as wrong as naive code of the same dtype
is at that very element, plus one slack:

    |fused - exact| <= |naive - exact| + slack

The slack is a few units in the last place of the arithmetic, times what the arithmetic handles: it grows with the root of the
reduced length, with the size of the result, and with the size of the numbers that are subtracted. It is never loosened for a
test. NaN compares false, so it fails; an infinity must be met exactly.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Slack(NamedTuple):
    """What a dtype may lose beyond naive code. Everything is counted in `eps`."""

    eps: float
    """Distance from 1 to the next number of the *arithmetic*."""
    base: float
    """Roundings of a fixed chain: exp, log, a division, a product with the upstream gradient."""
    root: float
    """Times sqrt(reduced length): a sum in another order."""
    scale: float
    """Times the magnitude of the exponents: `exp2(x * log2(e) - m)` rounds where naive `exp(x - m)` need not."""
    tiny: float
    """Absolute, for gradients: probabilities below the smallest normal number may be flushed to zero."""


_FLOAT32 = Slack(eps=2.0**-23, base=6.0, root=0.125, scale=1.0, tiny=1e-37)
SLACK = {
    torch.float64: Slack(eps=2.0**-52, base=6.0, root=0.125, scale=1.0, tiny=1e-300),
    torch.float32: _FLOAT32,
    # Half-precision logits are computed in float32. The rounding of a stored gradient is in the naive error already.
    torch.float16: _FLOAT32,
    torch.bfloat16: _FLOAT32,
}

TINY_KL_RELATIVE = 1e-4  # what docs/numerics.md promises for a KL between 5e-11 and 1
NEAR_EQUAL_GRAD_RELATIVE = 0.02  # of a KL gradient at |delta| ~ 1e-5, where float32 leaves two digits of p - q


def stat_slack(dtype: torch.dtype, exact: Tensor, length: int, magnitude: Tensor) -> Tensor:
    """Slack of a per-row statistic: (N,) from its true values and the rows' `magnitude` (size of the largest logit)."""
    s = SLACK[dtype]
    size = 1.0 + torch.nan_to_num(exact.detach().double(), nan=0.0, posinf=0.0, neginf=0.0).abs()
    return s.eps * ((s.base + s.root * length**0.5) * size + s.scale * magnitude)


def grad_slack(
    dtype: torch.dtype,
    log_p: Tensor,  # (..., V) float64
    log_q: Tensor | None,  # (..., V) float64
    labels: Tensor,  # (...) in range
    g_logp: Tensor,  # (...)
    g_kl: Tensor,  # (...)
    magnitude: Tensor,  # (...)
    temperature: float,
    kl_terms: Tensor | None = None,  # (..., V)
) -> Tensor:
    """Slack of d_policy, element by element: a relative error of p and of q, never an absolute one for a whole row.

    Of another divergence than KL(q || p) it is a relative error of `kl_terms`, the size of what is summed in its gradient.
    """
    s = SLACK[dtype]
    chain = s.base + s.root * log_p.shape[-1] ** 0.5 + s.scale * magnitude.unsqueeze(-1)

    def weighted(logprobs: Tensor) -> Tensor:  # the relative error of exp(t) is eps * |t|
        return logprobs.exp() * (chain + s.scale * logprobs.abs().clamp(max=1e3))

    a, b = g_logp.double().abs().unsqueeze(-1), g_kl.double().abs().unsqueeze(-1)
    p = weighted(log_p)
    q = torch.zeros_like(p) if log_q is None else weighted(log_q)
    onehot = torch.zeros_like(p).scatter_(-1, labels.long().unsqueeze(-1), s.base)
    kl = p + q
    if kl_terms is not None and log_q is not None:
        kl = p + kl_terms * (chain + s.scale * (log_p.abs() + log_q.abs()).clamp(max=1e3))
    return (s.eps * (a * (onehot + p) + b * kl) + s.tiny * (a + b)) / temperature


def assert_within_budget(what: str, fused: Tensor, naive: Tensor, exact: Tensor, slack: Tensor) -> None:
    """Fail with the worst element's index and its three values unless every element is within the budget."""
    assert fused.shape == exact.shape, f"{what}: shape {tuple(fused.shape)}, expected {tuple(exact.shape)}"
    fused, naive, exact = (t.detach().double() for t in (fused, naive, exact))
    assert not exact.isnan().any(), f"{what}: the test itself is wrong, its truth holds NaN"
    assert slack.isfinite().all(), f"{what}: the test itself is wrong, its slack is not finite"
    naive_error = (naive - exact).abs()
    naive_error = naive_error.where(naive_error.isfinite(), 0.0)  # naive overflow or NaN buys no finite error
    error = (fused - exact).abs()
    overflow_as_naive = exact.isfinite() & naive.isinf() & (fused == naive)
    within = (error <= naive_error + slack) | (fused == exact) | overflow_as_naive
    assert within.all(), f"{what}: " + worst_element_report(fused, naive, exact, slack, within)


def assert_relative(what: str, fused: Tensor, exact: Tensor, bound: float) -> None:
    """Fail unless every element is within a relative `bound` of its (non-zero) truth."""
    assert fused.shape == exact.shape, f"{what}: shape {tuple(fused.shape)}, expected {tuple(exact.shape)}"
    fused, exact = fused.detach().double(), exact.detach().double()
    slack = exact.abs() * bound
    within = (fused - exact).abs() <= slack
    assert within.all(), f"{what}: " + worst_element_report(fused, exact, exact, slack, within)


def assert_same_bits(what: str, got: Tensor | None, expected: Tensor | None) -> None:
    """Fail unless both are the same bits (NaN equals NaN; 0 and -0 differ)."""
    if got is None or expected is None:
        assert got is None and expected is None, f"{what}: one is None, the other is not"
        return
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    got, expected = got.detach().contiguous(), expected.detach().contiguous()
    same = got.view(ints) == expected.view(ints)
    zero = torch.zeros_like(got, dtype=torch.float64)
    assert same.all(), f"{what}: bits differ, " + worst_element_report(got, expected, expected, zero, same)


def assert_exactly_zero(what: str, got: Tensor) -> None:
    """Fail unless every element is 0 (either sign)."""
    zero = torch.zeros_like(got, dtype=torch.float64)
    within = got.detach() == 0
    assert within.all(), f"{what}: must be exactly 0, " + worst_element_report(got.detach(), zero, zero, zero, within)


def worst_element_report(fused: Tensor, naive: Tensor, exact: Tensor, slack: Tensor, within: Tensor) -> str:
    """One line on the element that misses its budget by most; a NaN counts as the worst there is."""
    excess = (fused.double() - exact.double()).abs() - (naive.double() - exact.double()).abs().nan_to_num(0.0, 0.0) - slack
    excess = excess.nan_to_num(nan=float("inf")).where(~within, -float("inf"))
    flat = int(excess.flatten().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), within.shape)) if within.dim() else ()
    f, n, e, s = (float(t.expand(within.shape)[index]) for t in (fused, naive, exact, slack))
    return (
        f"{int((~within).sum())} of {within.numel()} elements outside the budget; worst at {index}: "
        f"fused {f!r}, naive {n!r}, exact {e!r} (errors {abs(f - e):.3g} and {abs(n - e):.3g}, slack {s:.3g})"
    )
