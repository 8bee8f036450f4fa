"""Softcapped logits, y = cap·tanh(x/cap), where a backend is handed raw products x: as if a pass over them had capped them.

Truth is the specification of the capped logits in float64, its gradient taken through the cap; naive code caps in float32.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from torch import Tensor

from contract_token_stats import (
    DTYPES,
    EXTRAS,
    NAN,
    POLICY_EXTRAS,
    SHORT,
    Case,
    Outcome,
    assert_same_outcome,
    bf16,
    fp16,
    fp32,
    make_case,
    noise,
    run,
)
from fused_tdpo import TokenStats
from fused_tdpo.reference import token_stats_reference
from tolerances import assert_exactly_zero, assert_relative, assert_within_budget, grad_slack, stat_slack

Softcaps = tuple[float | None, float | None]
INF = float("inf")


@dataclass(frozen=True)
class Backend:
    """Whose `token_stats_fwd` and `token_stats_bwd` are called, and where."""

    name: str
    device: str = "cpu"

    @property
    def module(self) -> ModuleType:
        return importlib.import_module(self.name)

    def case(self, N: int = 4, V: int = 515, **options: object) -> Case:
        return make_case(self.device, (N,), V, **{"spread": 20.0, **options})


TRITON, TORCH = "fused_tdpo.kernels.token_stats", "fused_tdpo._torch_backend"
WHERE_TRITON_RUNS = [
    pytest.param(Backend(TRITON), marks=pytest.mark.interpreter, id="triton"),
    pytest.param(Backend(TRITON, "cuda"), marks=pytest.mark.gpu, id="triton-gpu"),
]
BACKENDS = [
    pytest.param(Backend(TORCH), id="torch"),
    pytest.param(Backend(TORCH, "cuda"), marks=pytest.mark.gpu, id="torch-gpu"),
    *WHERE_TRITON_RUNS,
]

every_backend = pytest.mark.parametrize("backend", BACKENDS)


def run_fused(backend: Backend, case: Case, softcaps: Softcaps, d_dtype: torch.dtype | None = None) -> Outcome:
    """Forward and backward of a case, over its logits; with `d_dtype` into another buffer, which holds NaN before."""
    policy, ref = case.policy.clone()[None], None if case.ref is None else case.ref[None]
    options = {
        "V": case.options.get("vocab_size", policy.shape[-1]),
        "ignore_index": -100,
        "temperature": case.options.get("temperature", 1.0),
        "softcaps": softcaps,
    }
    stats, saved = backend.module.token_stats_fwd(policy, ref, case.labels, extras=case.options.get("extras", ()), **options)
    d_policy = policy if d_dtype is None else torch.full_like(policy, NAN, dtype=d_dtype)
    backend.module.token_stats_bwd(policy, ref, case.labels, saved, case.g_logp, case.g_kl, d_policy, **options)
    return Outcome(TokenStats(**stats), d_policy[0])


def capped(logits: Tensor, cap: float | None, ignored: Tensor) -> Tensor:
    """Capped logits, at least in float32; 0 in ignored rows."""
    x = logits.to(torch.promote_types(logits.dtype, fp32)).masked_fill(ignored.unsqueeze(-1), 0.0)
    return x if cap is None else cap * torch.tanh(x / cap)


def specification(softcaps: Softcaps) -> Callable[..., TokenStats]:
    """What `token_stats_reference` is to capped logits, for raw ones."""

    def op(policy: Tensor, ref: Tensor | None, labels: Tensor, vocab_size: int | None = None, **options: object) -> TokenStats:
        ignored = labels == -100
        x, z = (
            None if logits is None else capped(logits[..., :vocab_size], cap, ignored)
            for logits, cap in zip((policy, ref), softcaps, strict=True)
        )
        return token_stats_reference(x, z, labels, **options)

    return op


def compare(fused: Outcome, case: Case, softcaps: Softcaps) -> None:
    """Hold every statistic and every element of the gradient to the budget."""
    naive, exact = run(specification(softcaps), case), run(specification(softcaps), case.double())
    ignored, temperature = case.ignored, case.options.get("temperature", 1.0)
    V = case.options.get("vocab_size", case.policy.shape[-1])
    x, z = (
        None if logits is None else capped(logits[..., :V].double(), cap, ignored)
        for logits, cap in zip((case.policy, case.ref), softcaps, strict=True)
    )
    magnitude = sum(y.amax(-1).abs() / temperature for y in (x, z) if y is not None)
    for name in TokenStats._fields:
        got, want = getattr(fused.stats, name), getattr(exact.stats, name)
        assert (got is None) == (want is None), name
        if want is None:
            continue
        assert_exactly_zero(f"{name} of ignored rows", got[ignored])
        assert_within_budget(name, got, getattr(naive.stats, name), want, stat_slack(fp32, want, V, magnitude))

    assert_exactly_zero("gradient of ignored rows", fused.grad[ignored])
    assert_exactly_zero("gradient beyond vocab_size", fused.grad[..., V:])
    upstream = [0 * magnitude if g is None else g.double().masked_fill(ignored, 0.0).abs() for g in (case.g_logp, case.g_kl)]
    slack = grad_slack(
        fp32,
        torch.log_softmax(x / temperature, -1),
        None if z is None else torch.log_softmax(z / temperature, -1),
        case.labels.masked_fill(ignored, 0),
        *upstream,
        magnitude,
        temperature,
    )
    if softcaps[0] is not None:
        tanh = torch.tanh(case.policy[..., :V].double().masked_fill(ignored[:, None], 0.0) / softcaps[0])
        slack = slack * (1 - tanh**2) + 2.0**-52 * sum(upstream)[:, None] / temperature  # 1 - tanh² rounds in float64 too
    naive_grad = naive.grad.to(fused.grad.dtype)  # what is stored is rounded
    assert_within_budget("gradient", fused.grad[..., :V], naive_grad[..., :V], exact.grad[..., :V], slack)


def check(backend: Backend, case: Case, softcaps: Softcaps, d_dtype: torch.dtype | None = None) -> Outcome:
    outcome = run_fused(backend, case, softcaps, d_dtype)
    compare(outcome, case, softcaps)
    return outcome


# --------------------------------------------------------------------------------------------------- values and gradients


@every_backend
@pytest.mark.parametrize("ref", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(backend, dtype, ref):
    # A third of the logits lies beyond the cap: every branch of a tanh is taken.
    check(backend, backend.case(dtype=dtype, ref=ref, extras=EXTRAS if ref else POLICY_EXTRAS), (30.0, 30.0))


@every_backend
@pytest.mark.parametrize("softcaps", [(30.0, 12.5), (30.0, None), (None, 30.0), (None, None)], ids=str)
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
def test_each_model_has_its_cap(backend, dtype, softcaps):
    spread = 20.0 if None not in softcaps else 5.0
    check(backend, backend.case(dtype=dtype, spread=spread, extras=EXTRAS), softcaps)


@every_backend
@pytest.mark.parametrize("used", [("logp",), ("kl",)], ids="-".join)
def test_gradient_of_one_output_alone(backend, used):
    check(backend, backend.case(dtype=bf16, used=used), (30.0, 50.0))


@every_backend
def test_without_a_reference_its_cap_is_nothing(backend):
    case = backend.case(ref=False)
    assert_same_outcome("cap of no model", run_fused(backend, case, (30.0, 50.0)), run_fused(backend, case, (30.0, None)))


@every_backend
@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_capped_logits(backend, temperature):
    check(backend, backend.case(temperature=temperature, extras=EXTRAS), (30.0, 50.0))


@every_backend
@pytest.mark.parametrize("V", [1, 7, 131, 1024, 1031])
@pytest.mark.parametrize("layout", ["contiguous", "pitched16", "offset1"])
def test_columns_beyond_the_vocabulary_stay_out(backend, V, layout):
    # Neither -cap nor 0: what is not there has no probability. The columns hold NaN, or lie beyond a partial group or tile.
    case = backend.case(N=3, V=V, dtype=bf16, layout=layout, widths=(V + 9, V + 3), vocab_size=V, extras=EXTRAS)
    check(backend, case, (30.0, 30.0))


@every_backend
@pytest.mark.parametrize("d_dtype", [bf16, fp16, fp32], ids=SHORT.get)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [131, 520], ids=["narrow", "wide"])
def test_gradient_of_another_dtype(backend, V, dtype, d_dtype):
    case = backend.case(N=3, V=V, dtype=dtype)
    for softcaps in ((30.0, 30.0), (None, None)):
        outcome = check(backend, case.with_(policy=case.policy / 4, ref=case.ref / 4), softcaps, d_dtype)
        assert outcome.grad.dtype == d_dtype


# ------------------------------------------------------------------------------------------------- far below, far beyond


@every_backend
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
def test_saturated_logits(backend, dtype):
    # Most are ±cap to the last bit, and tie: the first of them is what the model predicts.
    check(backend, backend.case(dtype=dtype, spread=600.0, extras=EXTRAS), (30.0, 30.0))


@every_backend
def test_infinite_logits_are_the_cap(backend):
    case = backend.case(N=3, ignore_every=99, extras=EXTRAS)
    for logits in (case.policy, case.ref):
        logits[0, 5:9], logits[1, ::3], logits[2, 1::4] = INF, -INF, -INF
    case.labels[:] = torch.tensor([5, 6, 7])
    check(backend, case, (30.0, 30.0))


@every_backend
@pytest.mark.parametrize("factor", [1e-3, 1e-6, 1e-30, 0.0])
def test_logits_far_below_the_cap_stay_what_they_are(backend, factor):
    case = backend.case(spread=1.0)
    case = case.with_(policy=case.policy.nan_to_num() * factor, ref=case.ref.nan_to_num(posinf=0.0) * factor)
    outcome = check(backend, case, (30.0, 30.0))
    uncapped = run_fused(backend, case, (None, None))
    active = ~case.ignored
    if factor <= 1e-6:  # u²/3 is nothing
        assert_relative("gradient", outcome.grad[active], uncapped.grad[active].double(), 1e-6)


@every_backend
def test_nan_is_not_capped(backend):
    case = backend.case(N=3, ignore_every=99)
    case.policy[1, 17] = NAN
    outcome = run_fused(backend, case, (30.0, 30.0))
    assert outcome.stats.logp.isnan().tolist() == [False, True, False]
    assert outcome.stats.kl.isnan().tolist() == [False, True, False]
    assert outcome.grad.isnan().any(-1).tolist() == [False, True, False]


@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_kl_of_equal_rows_is_zero(backend, dtype):
    # The cap of x and that of z are compiled apart, and must round alike.
    case = backend.case(dtype=dtype)
    outcome = check(backend, case.with_(policy=case.ref.clone()), (30.0, 30.0))
    assert_exactly_zero("kl", outcome.stats.kl)


@every_backend
@pytest.mark.parametrize("spread", [1.0, 5.0])
def test_kl_of_nearly_equal_rows(backend, spread):
    # Capped logits are rounded, by 2^-24 of themselves: three digits are left of a difference of 1e-3.
    case = backend.case(N=4, V=1031, spread=spread, distance=1e-3, ignore_every=99)
    kl = check(backend, case, (30.0, 30.0)).stats.kl
    assert_relative("kl", kl, run(specification((30.0, 30.0)), case.double()).stats.kl, spread * 1e-3)


@every_backend
def test_accuracy_is_that_of_the_capped_logits(backend):
    # Raw logits that differ, and are equal once capped: the first one wins, wherever it lies. Groups of 16 bytes are 4 columns.
    V = 40
    labels = torch.tensor([8, 9, 10, 20, 9])
    policy = torch.zeros(5, V)
    policy[:, 8:11] = torch.tensor([1e3, 2e3, 3e3])
    policy[:, 20] = 4e3
    policy[4, 8] = 100.0  # cap·tanh(100/30) is below the cap
    policy, labels = policy.to(backend.device), labels.to(backend.device)
    case = Case(policy, None, labels, torch.ones(5, device=backend.device), options={"extras": ("accuracy",)})
    assert check(backend, case, (30.0, None)).stats.accuracy.tolist() == [1.0, 0.0, 0.0, 0.0, 1.0]


# ------------------------------------------------------------------------------------------------- the device function itself


try:
    import triton
    import triton.language as tl

    from fused_tdpo.kernels.token_stats import _softcap
except ImportError:
    pass
else:

    @triton.jit
    def _softcap_kernel(x_ptr, cap, y_ptr, slope_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        y, slope = _softcap(tl.load(x_ptr + i, mask=i < n), cap)
        tl.store(y_ptr + i, y, mask=i < n)
        tl.store(slope_ptr + i, slope, mask=i < n)


def softcap(backend: Backend, x: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    x = x.to(backend.device)
    y, slope = torch.full_like(x, NAN), torch.full_like(x, NAN)
    _softcap_kernel[(-(-x.numel() // 1024),)](x, cap, y, slope, x.numel(), BLOCK=1024)
    return y.cpu(), slope.cpu()


@pytest.mark.parametrize("backend", WHERE_TRITON_RUNS)
@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0, 1e4])
def test_softcap_is_accurate(backend, cap):
    u = torch.cat([10**-6 + noise(50_000, seed=0).abs(), torch.logspace(-30, 1.6, 50_000), torch.linspace(0.9, 1.1, 10_000)])
    x = (cap * u).to(fp32)
    y, slope = softcap(backend, x, cap)
    u = x.double() / cap
    assert_relative("cap·tanh(x/cap)", y, cap * torch.tanh(u), 3 * 2.0**-23)
    exact = 4 * torch.exp(-2 * u) / (1 + torch.exp(-2 * u)) ** 2
    assert_within_budget("derivative", slope, exact, exact, 4 * 2.0**-23 * (1 + u) * exact)  # e^-2u loses 2u roundings
    assert torch.equal(softcap(backend, -x, cap)[0], -y)
    assert torch.equal(softcap(backend, -x, cap)[1], slope)


@pytest.mark.parametrize("backend", WHERE_TRITON_RUNS)
def test_softcap_of_special_values(backend):
    largest = torch.finfo(fp32).max
    x = torch.tensor([0.0, -0.0, INF, -INF, largest, -largest, 1e4, NAN])
    y, slope = softcap(backend, x, 30.0)
    assert y[:-1].tolist() == [0.0, 0.0, 30.0, -30.0, 30.0, -30.0, 30.0]
    assert slope[:-1].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert y[-1].isnan() and slope[-1].isnan()
