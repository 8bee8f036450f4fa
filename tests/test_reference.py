"""The specification against hand-worked numbers and plain Python, the error budget against errors, and the contract."""

import math

import pytest
import torch
from torch import Tensor

from contract_token_stats import (
    BAD_LABELS,
    EXTRAS,
    INF,
    NAN,
    Backend,
    Float64Contract,
    RefusesBadLabels,
    fp32,
    fp64,
    kl_from_delta,
    make_case,
    noise,
    run,
)
from fused_tdpo.reference import token_stats_reference
from fused_tdpo.types import EXTRAS as TYPES_EXTRAS
from fused_tdpo.types import TokenStats
from tolerances import assert_exactly_zero, assert_relative, assert_same_bits, assert_within_budget, worst_element_report


class TestReferenceBackend(Float64Contract, RefusesBadLabels):
    """`backend="reference"` keeps the contract as every other; what it may lack is in FusedTokenStatsContract."""

    backend = Backend("reference")


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=fp64)


def test_the_contract_names_every_extra():
    assert EXTRAS == TYPES_EXTRAS


# --- numbers worked by hand ------------------------------------------------------------------------------------------------


def test_two_tokens():
    """x = (0, 0), z = (0, ln 3): p = (1/2, 1/2), q = (1/4, 3/4), label 1.

    KL(q || p) = 1/4 ln(1/2) + 3/4 ln(3/2); H(q) = 1/4 ln 4 + 3/4 ln(4/3); sum of p^2 = 1/2.
    """
    stats = token_stats_reference(tensor(0, 0)[None], tensor(0, math.log(3))[None], torch.tensor([1]), extras=EXTRAS)
    expected = {
        "logp": -math.log(2),
        "ref_logp": math.log(3 / 4),
        "kl": math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4,
        "entropy": math.log(2),
        "ref_entropy": math.log(4) / 4 + 3 * math.log(4 / 3) / 4,
        "accuracy": 0.0,  # a tie: the first maximum is token 0
        "mean_logit": 0.0,
        "log_sum_sq_probs": -math.log(2),
    }
    for name, value in expected.items():
        assert getattr(stats, name).tolist() == pytest.approx([value], rel=1e-15, abs=1e-15), name


def test_two_tokens_gradient():
    """The same row, upstream 2 and 3: 2 (e_y - p) + 3 (p - q) = (2 (0 - 1/2) + 3/4, 2 (1 - 1/2) - 3/4) = (-1/4, 1/4)."""
    x = tensor(0, 0)[None].requires_grad_()
    stats = token_stats_reference(x, tensor(0, math.log(3))[None], torch.tensor([1]))
    (grad,) = torch.autograd.grad(2 * stats.logp + 3 * stats.kl, x)
    assert grad.tolist()[0] == pytest.approx([-0.25, 0.25], rel=1e-15)


def test_temperature_by_hand():
    """x = (0, 2 ln 2) at temperature 2 is (0, ln 2): p = (1/3, 2/3). The mean logit, ln 2, knows of no temperature."""
    x = tensor(0, 2 * math.log(2))[None]
    stats = token_stats_reference(x, None, torch.tensor([0]), temperature=2.0, extras=("mean_logit", "entropy"))
    assert stats.logp.tolist() == pytest.approx([-math.log(3)])
    assert stats.entropy.tolist() == pytest.approx([math.log(3) - 2 / 3 * math.log(2)])
    assert stats.mean_logit.tolist() == pytest.approx([math.log(2)])
    assert stats.kl is stats.ref_logp is stats.ref_entropy is None


def test_masks_by_hand():
    """q = (1/2, 1/2, 0). Where p is 0 too: nothing. Where only q is: 0. Where only p is: +inf, with gradient p - q."""
    q = tensor(0, 0, -INF)[None]
    label = torch.tensor([0])
    assert token_stats_reference(q, q, label).kl.tolist() == [0.0]
    assert token_stats_reference(tensor(0, 0, 0)[None], q, label).kl.tolist() == pytest.approx([math.log(3 / 2)])
    x = tensor(0, -INF, 0)[None].requires_grad_()
    stats = token_stats_reference(x, q, label)
    assert stats.kl.tolist() == [INF]
    (grad,) = torch.autograd.grad(stats.kl, x)
    assert grad.tolist() == [[0.0, -0.5, 0.5]]


def test_ignored_row_by_hand():
    x = tensor(NAN, INF, 3.0)[None].requires_grad_()
    stats = token_stats_reference(x, tensor(NAN, NAN, NAN)[None], torch.tensor([-100]), extras=EXTRAS)
    for name in TokenStats._fields:
        assert getattr(stats, name).tolist() == [0.0], name
    (grad,) = torch.autograd.grad(stats.logp + stats.kl, x)
    assert grad.tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("bad", BAD_LABELS)
def test_the_function_gives_nan_for_a_bad_label(bad):
    # Checking is the caller's; what the function gives is what a kernel that cannot check must give.
    case = make_case("cpu", (4,), 67, ignore_every=99)
    labels = case.labels.clone()
    labels[1] = bad
    stats = token_stats_reference(case.policy, case.ref, labels)
    for name in ("logp", "ref_logp", "kl"):
        assert getattr(stats, name).isnan().tolist() == [False, True, False, False], name


# --- against arithmetic that shares nothing with torch ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_against_plain_python(temperature):
    case = make_case("cpu", (5,), 23, dtype=fp64, ignore_every=99, temperature=temperature, extras=EXTRAS)
    stats, grad = run(token_stats_reference, case)
    values = {name: getattr(stats, name).tolist() for name in TokenStats._fields}

    def softmax(logits: list[float]) -> list[float]:
        top = max(logits)
        weights = [math.exp((v - top) / temperature) for v in logits]
        return [w / math.fsum(weights) for w in weights]

    for row in range(5):
        x, y = case.policy[row].tolist(), int(case.labels[row])
        p, q = softmax(x), softmax(case.ref[row].tolist())
        expected = {
            "logp": math.log(p[y]),
            "ref_logp": math.log(q[y]),
            "kl": math.fsum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
            "entropy": -math.fsum(a * math.log(a) for a in p),
            "ref_entropy": -math.fsum(b * math.log(b) for b in q),
            "accuracy": float(x.index(max(x)) == y),
            "mean_logit": math.fsum(x) / 23,
            "log_sum_sq_probs": math.log(math.fsum(a * a for a in p)),
        }
        for name, value in expected.items():
            assert values[name][row] == pytest.approx(value, rel=1e-12, abs=1e-12), name
        a, b = float(case.g_logp[row]), float(case.g_kl[row])
        slopes = [(a * ((v == y) - p[v]) + b * (p[v] - q[v])) / temperature for v in range(23)]
        assert grad[row].tolist() == pytest.approx(slopes, rel=1e-12, abs=1e-12)


def test_the_two_forms_of_the_kl_agree():
    # The accurate form, which the tests of tiny divergences trust, is the plain one where the plain one is accurate.
    z = 3.0 * noise(5, 999, seed=1).double()
    for distance in (1e-2, 1.0, 10.0):
        x = z + distance * noise(5, 999, seed=2)
        plain = token_stats_reference(x, z, torch.zeros(5, dtype=torch.int64)).kl
        assert_relative(f"distance {distance}", kl_from_delta(x, z), plain, 1e-9)


def test_the_accurate_form_against_its_series():
    # KL = 1/2 Var_q(delta) - 1/6 third central moment + ...; at delta ~ 1e-6 the first term is all there is.
    z = 3.0 * noise(3, 999, seed=1).double()
    delta = 1e-6 * noise(3, 999, seed=2).double()
    q = z.softmax(-1)
    variance = (q * (delta - (q * delta).sum(-1, keepdim=True)) ** 2).sum(-1)
    assert_relative("KL", kl_from_delta(z + delta, z), variance / 2, 1e-5)


def test_rho_plus_kl_needs_no_normaliser():
    """log p(y) - log q(y) + KL(q || p) = d_y - E_q[d] with d = x - z: neither log-sum-exp is left."""
    case = make_case("cpu", (6,), 131, dtype=fp64, ignore_every=99)
    stats = token_stats_reference(case.policy, case.ref, case.labels)
    d = case.policy - case.ref
    expected = d.gather(-1, case.labels[:, None]).squeeze(-1) - (case.ref.softmax(-1) * d).sum(-1)
    assert_relative("rho + KL", stats.logp - stats.ref_logp + stats.kl, expected, 1e-12)


# --- the ruler itself ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fused", "naive", "exact", "fits"),
    [
        pytest.param(1.0, 1.0, 1.0, True, id="exact"),
        pytest.param(1.5, 1.0, 1.0, True, id="within-slack"),
        pytest.param(1.51, 1.0, 1.0, False, id="beyond-slack"),
        pytest.param(0.5, 1.0, 1.0, True, id="within-slack-below"),
        pytest.param(3.5, -1.0, 1.0, True, id="as-wrong-as-naive-plus-slack"),
        pytest.param(3.6, -1.0, 1.0, False, id="more-wrong-than-naive-plus-slack"),
        pytest.param(NAN, 1.0, 1.0, False, id="nan"),
        pytest.param(NAN, NAN, 1.0, False, id="nan-as-naive"),
        pytest.param(1.0, NAN, 1.0, True, id="right-where-naive-is-nan"),
        pytest.param(2.0, NAN, 1.0, False, id="wrong-where-naive-is-nan"),
        pytest.param(INF, INF, INF, True, id="infinite"),
        pytest.param(-INF, INF, INF, False, id="infinite-of-the-other-sign"),
        pytest.param(3e38, 3e38, INF, False, id="finite-for-infinite"),
        pytest.param(INF, 1.0, 1.0, False, id="infinite-for-finite"),
        pytest.param(INF, INF, 1.0, True, id="overflow-as-naive"),
        pytest.param(9.0, INF, 1.0, False, id="an-overflow-buys-no-finite-error"),
        pytest.param(NAN, INF, INF, False, id="nan-for-infinite"),
    ],
)
def test_the_budget(fused, naive, exact, fits):
    values = [torch.tensor([1.0, v]) for v in (fused, naive, exact)]
    slack = torch.tensor([0.5, 0.5], dtype=fp64)
    if fits:
        assert_within_budget("x", *values, slack)
    else:
        with pytest.raises(AssertionError, match=r"1 of 2 elements .* worst at \(1,\)"):
            assert_within_budget("x", *values, slack)


def test_the_report_names_the_worst_element():
    exact = torch.zeros(2, 3, dtype=fp64)
    fused = exact.clone()
    fused[0, 1], fused[1, 2] = 0.25, -0.5
    report = worst_element_report(fused, exact, exact, exact + 0.125, fused == 0)
    assert "2 of 6" in report
    assert "(1, 2)" in report
    assert "fused -0.5, naive 0.0, exact 0.0" in report


def test_bits():
    one = torch.tensor([1.0, NAN, 0.0])
    assert_same_bits("x", one, one.clone())
    for other in (torch.tensor([1.0, NAN, -0.0]), torch.tensor([1.0 + 2**-23, NAN, 0.0])):
        with pytest.raises(AssertionError, match="bits differ"):
            assert_same_bits("x", other, one)
    assert_exactly_zero("x", torch.tensor([0.0, -0.0]))
    for value in (NAN, 1e-45):
        with pytest.raises(AssertionError, match="exactly 0"):
            assert_exactly_zero("x", torch.tensor([0.0, value], dtype=fp32))
