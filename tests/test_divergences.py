"""Every divergence, from logits and from hidden states, by every backend: values, gradients, limits and laws.

`contract_token_stats` has the cases and the budget, and all of it that does not depend on the divergence.
"""

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import contract_linear
from accuracy_table import divergence_from_ratio
from allocations import counted_allocations
from contract_token_stats import (
    DTYPES,
    EXTRAS,
    INF,
    NAN,
    SHORT,
    Backend,
    Case,
    Outcome,
    assert_same_outcome,
    bf16,
    check,
    compare,
    fp16,
    fp32,
    fp64,
    make_case,
    noise,
    run,
)
from fused_tdpo import LinearTDPOLoss, TDPOLoss, TokenStats, _torch_backend, linear_token_stats, token_stats
from fused_tdpo.reference import divergence_reference, token_stats_reference
from tolerances import TINY_KL_RELATIVE, assert_exactly_zero, assert_relative, assert_within_budget

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BACKENDS = [
    pytest.param(Backend("reference"), id="reference"),
    pytest.param(Backend("torch"), id="torch"),
    pytest.param(Backend("triton"), id="triton", marks=pytest.mark.interpreter),
    pytest.param(Backend("torch", "cuda"), id="torch-gpu", marks=pytest.mark.gpu),
    pytest.param(Backend("triton", "cuda"), id="triton-gpu", marks=pytest.mark.gpu),
]
FUSED = BACKENDS[1:]
OTHERS: list[Any] = [
    pytest.param({"divergence": "reverse_kl"}, id="reverse_kl"),
    pytest.param({"divergence": "js"}, id="js"),
    *(pytest.param({"divergence": "alpha", "divergence_alpha": a}, id=f"alpha{a}") for a in (0.5, 0.2, 0.99, -0.7, 1.6)),
]
EVERY = [pytest.param({}, id="forward_kl"), *OTHERS]
SOME = [param for param in OTHERS if param.id in ("reverse_kl", "js", "alpha0.2", "alpha-0.7", "alpha1.6")]
"""One of each way through the code, and of each kind of infinity."""
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_fused = pytest.mark.parametrize("backend", FUSED)
every_other = pytest.mark.parametrize("kind", OTHERS)
some_others = pytest.mark.parametrize("kind", SOME)
every_kind = pytest.mark.parametrize("kind", EVERY)


def value(backend: Backend, policy: Tensor, ref: Tensor, kind: dict[str, Any], **options: Any) -> Tensor:
    """The divergence of rows (N, V)."""
    labels = torch.zeros(policy.shape[:-1], dtype=torch.int64, device=policy.device)
    return backend(policy, ref, labels, **kind, **options).kl


# ------------------------------------------------------------------------------------------------------------- by the budget


@every_backend
@every_other
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients(backend, kind, dtype):
    check(backend, make_case(backend.device, (4,), 515, dtype=dtype, extras=EXTRAS, **kind))


@every_backend
@some_others
def test_distances(backend, kind):
    for distance in (0.0, 1e-4, 1e-2, 3.0):
        check(backend, make_case(backend.device, (4,), 300, distance=distance, **kind), f"distance {distance}")


@every_backend
@some_others
def test_options(backend, kind):
    make = partial(make_case, backend.device)
    check(backend, make((2, 2), 131, layout="shifted", temperature=0.7, **kind), "temperature")
    check(backend, make((3,), 97, widths=(130, 111), vocab_size=97, dtype=fp16, ref_dtype=fp32, **kind), "widths")
    check(backend, make((3,), 130, used=("kl",), dtype=bf16, **kind), "kl alone")
    check(backend, make((3,), 130, used=("logp",), dtype=bf16, **kind), "logp alone")
    check(backend, make((3,), 1, ignore_every=99, **kind), "one token")
    check(backend, make((0,), 67, **kind), "no rows")


@pytest.mark.interpreter
@every_other
def test_rows_of_several_segments(kind, monkeypatch):
    kernels = pytest.importorskip("fused_tdpo.kernels.token_stats")
    monkeypatch.setattr(kernels, "SEGMENT_COLUMNS", 1024)
    monkeypatch.setattr(kernels, "backward_chunk", lambda tile: 1024)
    backend = Backend("triton")
    check(backend, make_case(backend.device, (3,), 3001, **kind))
    z = 3.0 * noise(2, 3001, seed=1)
    x = z + 1e-5 * noise(2, 3001, seed=2)
    assert_relative("tiny", value(backend, x, z, kind), divergence_from_ratio(x, z, **kind), TINY_KL_RELATIVE)


@every_fused
@some_others
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
def test_the_gradient_in_place_and_twice(backend, kind, dtype):
    case = make_case(backend.device, (4,), 300, dtype=dtype, **kind)
    expected = run(backend, case)
    assert_same_outcome("second run", run(backend, case), expected)
    leaf = case.policy.clone().requires_grad_()
    stats = backend(leaf + 0, case.ref, case.labels, inplace_backward=True, **case.options)
    (stats.logp * case.g_logp + stats.kl * case.g_kl).sum().backward()
    assert torch.equal(leaf.grad, expected.grad), "the gradient in place differs"
    if backend.name == "triton" or backend.device == "cpu":  # torch's sums on a GPU depend on the number of rows
        one = case.rows(slice(1, 2))
        assert torch.equal(run(backend, one).grad, expected.grad[1:2]), "a row alone differs"


@every_other
def test_float64_and_finite_differences(kind):
    backend = Backend("torch")
    check(backend, make_case(backend.device, (6,), 515, dtype=fp64, extras=EXTRAS, **kind))
    case = make_case(backend.device, (4,), 7, dtype=fp64, ignore_every=99, spread=1.0, distance=1.0)

    def kl(policy: Tensor) -> Tensor:
        return backend(policy, case.ref, case.labels, temperature=0.8, **kind).kl

    assert torch.autograd.gradcheck(kl, case.policy.clone().requires_grad_())


# --------------------------------------------------------------------------------------------------- infinite logits and NaN


FINITE = {"reverse_kl": (True, False), "js": (True, True)}
"""Whether it is finite where (the policy, the reference) has probability 0 and the other one has not."""


def finite(kind: dict[str, Any]) -> tuple[bool, bool]:
    a = kind.get("divergence_alpha")
    return FINITE[kind["divergence"]] if a is None else (a > 0, a < 1)


def masked(backend: Backend, columns: str, dtype: torch.dtype, kind: dict[str, Any], **options: Any) -> tuple[Case, Tensor]:
    """A case, and what to mask in its first rows, never a label: a third of the columns, or all but some at the end."""
    V = 2600 if columns == "blocks" else 300
    case = make_case(backend.device, (4,), V, dtype=dtype, **kind, **options)
    column = torch.arange(V, device=backend.device)
    mask = (column < 2100) | (column > 2400) if columns == "blocks" else (column % 3 == 0) | (column == V - 1)
    mask = mask.repeat(4, 1)
    mask[2:] = False
    return case, mask.scatter(-1, case.labels.clamp(min=0).unsqueeze(-1), False)


@every_backend
@some_others
@pytest.mark.parametrize("where", ["both", "policy", "reference"])
@pytest.mark.parametrize(("columns", "dtype"), [("thirds", fp32), ("blocks", bf16)], ids=str)
def test_minus_infinity(backend, kind, where, columns, dtype):
    """Also where the first tiles of a row hold nothing at all, and no pivot."""
    case, mask = masked(backend, columns, dtype, kind)
    policy = case.policy.masked_fill(mask, -INF) if where != "reference" else case.policy
    ref = case.ref.masked_fill(mask, -INF) if where != "policy" else case.ref
    case = case.with_(policy=policy, ref=ref)
    if where == "both" or finite(kind)[where == "reference"]:
        stats, grad = check(backend, case)
        assert stats.kl.isfinite().all() and grad.isfinite().all(), f"{stats.kl.tolist()}"
        return
    got = run(backend, case)
    assert got.stats.kl.tolist()[:2] == [INF, INF], f"{got.stats.kl.tolist()}"
    assert not got.grad[:2].isfinite().any(dim=-1).all(), "an infinite divergence has a gradient"
    rest = slice(2, 4)
    stats = TokenStats(*(None if stat is None else stat[rest] for stat in got.stats))
    compare(Outcome(stats, got.grad[rest]), case.rows(rest), "other rows")
    unused = run(backend, case.with_(g_kl=torch.zeros_like(case.g_kl)))
    if backend.name != "reference":
        assert unused.grad.isfinite().all(), "it is not asked for: 0·inf"


@every_fused
@some_others
@pytest.mark.parametrize(("dtype", "temperature"), [(fp32, 1.0), (bf16, 0.7)], ids=str)
def test_lowest_finite_masks(backend, kind, dtype, temperature):
    """finfo.min overflows as soon as anything is subtracted from it, or it is divided by a temperature below 1."""
    case, mask = masked(backend, "thirds", dtype, kind, temperature=temperature)
    low = torch.finfo(dtype).min
    stats, grad = check(backend, case.with_(policy=case.policy.masked_fill(mask, low), ref=case.ref.masked_fill(mask, low)))
    assert stats.kl.isfinite().all() and grad.isfinite().all(), f"{stats.kl.tolist()}"


@every_fused
@some_others
def test_minus_infinity_at_the_label_and_everywhere_else(backend, kind):
    case = make_case(backend.device, (3,), 300, ignore_every=99, **kind)
    label = torch.nn.functional.one_hot(case.labels, 300).bool()
    for what, mask in (("at the label", label), ("everywhere else", ~label)):
        both = case.with_(policy=case.policy.masked_fill(mask, -INF), ref=case.ref.masked_fill(mask, -INF))
        stats, grad = check(backend, both, what)
        assert stats.kl.isfinite().all() and grad.isfinite().all(), f"{what}: {stats.kl.tolist()}"


@every_backend
@some_others
def test_rows_that_do_not_count_and_rows_that_are_lost(backend, kind):
    case = make_case(backend.device, (6,), 131, **kind)
    g_logp, g_kl = (g.masked_fill(case.ignored, NAN) for g in (case.g_logp, case.g_kl))
    got = run(backend, case.with_(g_logp=g_logp, g_kl=g_kl))
    assert_exactly_zero("ignored rows", got.grad[case.ignored])
    assert_exactly_zero("ignored rows", got.stats.kl[case.ignored])
    lost = case.policy.clone()
    lost[0, 5] = NAN
    assert run(backend, case.with_(policy=lost)).stats.kl[0].isnan(), "NaN logits of a row that counts are not hidden"


@every_fused
@some_others
@pytest.mark.parametrize("gap", [20.0, 85.0, 700.0])
def test_gaps(backend, kind, gap):
    """One token far above the rest, in both, in different places, in one of them."""
    if not all(finite(kind)) and gap > 50:
        pytest.skip("its value leaves the range of float32")
    case = make_case(backend.device, (4,), 300, ignore_every=99, **kind)
    policy, ref = case.policy.clone(), case.ref.clone()
    policy[[0, 1], [0, 1]] += gap
    ref[[0, 1, 2], [0, 290, 291]] += gap
    policy[3, 295:] -= gap
    check(backend, case.with_(policy=policy, ref=ref))


# --------------------------------------------------------------------------------------------------------------------- laws


@every_fused
@every_kind
@pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
def test_equal_logits_have_none(backend, kind, dtype):
    case = make_case(backend.device, (3,), 515, dtype=dtype, ignore_every=99)
    masked = case.policy.clone()
    masked[:, 5::7] = -INF
    for logits in (case.policy, masked):
        equal = Case(logits, logits.clone(), case.labels, g_kl=torch.ones(3, device=backend.device), options=kind)
        got = run(backend, equal)
        assert_exactly_zero("divergence of equal logits", got.stats.kl)
        assert (got.grad.abs() <= 1e-6).all(), "its gradient"


@every_fused
@every_kind
def test_never_negative(backend, kind):
    for i, distance in enumerate((1e-6, 1e-4, 1e-2, 1.0, 10.0)):
        case = make_case(backend.device, (3,), 515, distance=distance, seed=10 * i, ignore_every=99)
        found = value(backend, case.policy, case.ref, kind)
        assert (found >= 0).all(), f"distance {distance}: {found.tolist()}"
        if kind.get("divergence") == "js":
            assert (found <= math.log(2)).all(), f"distance {distance}: {found.tolist()}"


@every_fused
@every_other
def test_tiny_values(backend, kind):
    """Every f-divergence with f''(1) = c is c·χ²/2 near 0: c = 1, and 1/4 for Jensen-Shannon's. The truth is made of KLs."""
    z = 3.0 * noise(3, 999, seed=1, device=backend.device)
    for distance in (1e-5, 1e-3, 1e-1):
        x = z + distance * noise(3, 999, seed=2, device=backend.device)
        exact = divergence_from_ratio(x, z, **kind)
        assert_relative(f"distance {distance}", value(backend, x, z, kind), exact, TINY_KL_RELATIVE)


@every_fused
@some_others
def test_tiny_values_of_other_rows(backend, kind):
    """At a temperature, under a shift, of half-precision logits as they are; a token that has 99 %, or that changes alone."""
    z = 3.0 * noise(2, 999, seed=1, device=backend.device)
    x = z + 1e-4 * noise(2, 999, seed=2, device=backend.device)
    cooled = value(backend, x, z, kind, temperature=0.7)
    assert_relative("temperature", cooled, divergence_from_ratio(x.double() / 0.7, z.double() / 0.7, **kind), TINY_KL_RELATIVE)
    peaked = z.clone()
    peaked[:, 700] = torch.logsumexp(z, -1) + math.log(99.0)
    changed = z.clone()
    changed[:, 500] += 5.0
    half = z.to(bf16)
    nudged = half.clone()
    nudged[:, ::100] *= 1.0 + torch.finfo(bf16).eps
    for what, policy, ref, bound in (
        ("shift", x + 1.0, z, 1e-3),
        ("peaked", peaked + (x - z), peaked, TINY_KL_RELATIVE),
        ("one token", changed, z, TINY_KL_RELATIVE),
        ("half precision", nudged, half, TINY_KL_RELATIVE),
    ):
        assert_relative(what, value(backend, policy, ref, kind), divergence_from_ratio(policy, ref, **kind), bound)


@every_fused
@some_others
def test_a_constant_or_a_permutation_changes_nothing(backend, kind):
    case = make_case(backend.device, (4,), 300, **kind)
    for policy, ref in ((30.0, 30.0), (-30.0, 0.0), (0.0, 700.0)):
        check(backend, case.with_(policy=case.policy + policy, ref=case.ref + ref), f"policy + {policy}, reference + {ref}")
    order = torch.randperm(300, generator=torch.Generator().manual_seed(5)).to(backend.device)
    back = order.argsort()
    labels = torch.where(case.ignored, case.labels, back[case.labels.clamp(min=0)])
    stats, grad = run(backend, case.with_(policy=case.policy[:, order], ref=case.ref[:, order], labels=labels))
    compare(Outcome(stats, grad[:, back]), case, "permuted")


@every_fused
@some_others
def test_gradient_rows_sum_to_zero(backend, kind):
    grad = run(backend, make_case(backend.device, (5,), 1031, used=("kl",), **kind)).grad.double()
    bound = 32 * 2.0**-23 * grad.abs().sum(-1)
    assert (grad.sum(-1).abs() <= bound).all(), f"rows sum to {grad.sum(-1).tolist()}, expected at most {bound.tolist()}"


@pytest.mark.parametrize("backend", BACKENDS[1:3])
@pytest.mark.parametrize("kind", [OTHERS[0], OTHERS[3]])
def test_allocates_one_gradient_and_no_logits(backend, kind, monkeypatch):
    """Forward keeps its outputs and six numbers a row; backward makes one gradient, in place none."""
    monkeypatch.setattr(_torch_backend, "CHUNK_ELEMENTS", 256)
    case = make_case("cpu", (8,), 256, ignore_every=99, **kind)
    elements = case.policy.numel()
    for in_place in (False, True):
        logits = case.policy.requires_grad_() + 0
        with counted_allocations() as allocations:
            stats = backend(logits, case.ref, case.labels, inplace_backward=in_place, **case.options)
        assert not allocations.of_at_least(elements), "at a byte an element"
        assert allocations.live <= 8 * 4 * (3 + 6) + 64, "more is kept for backward"
        with counted_allocations() as allocations:
            torch.autograd.backward([stats.logp, stats.kl], [case.g_logp, case.g_kl])
        assert allocations.of_at_least(elements) == ([] if in_place else [case.policy.nbytes])
        case.policy.grad = None


@every_fused
@every_other
def test_gradient_near_equality(backend, kind):
    z = noise(3, 999, seed=1, device=backend.device)
    x = z + 1e-4 * noise(3, 999, seed=2, device=backend.device)
    labels, g = torch.zeros(3, dtype=torch.int64, device=backend.device), torch.ones(3, device=backend.device)
    case = Case(x, z, labels, g_kl=g, options=kind)
    got, exact = run(backend, case).grad.double(), run(token_stats_reference, case.double()).grad
    error = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert (error <= 5e-3).all(), f"{error.tolist()}"


@every_fused
def test_what_is_symmetric(backend):
    case = make_case(backend.device, (4,), 515, distance=1.0, ignore_every=99)
    for kind in ({"divergence": "js"}, {"divergence": "alpha", "divergence_alpha": 0.5}):
        there, back = value(backend, case.policy, case.ref, kind), value(backend, case.ref, case.policy, kind)
        assert_relative(str(kind), there, back, 1e-5)
    for a in (0.3, 2.0):
        there = value(backend, case.policy, case.ref, {"divergence": "alpha", "divergence_alpha": a})
        back = value(backend, case.ref, case.policy, {"divergence": "alpha", "divergence_alpha": 1 - a})
        assert_relative(f"alpha {a}", there, back, 1e-5)
    forward = value(backend, case.policy, case.ref, {})
    assert_relative("reverse", value(backend, case.ref, case.policy, {"divergence": "reverse_kl"}), forward, 1e-5)


@every_backend
def test_limits_of_alpha(backend):
    case = make_case(backend.device, (4,), 300, ignore_every=99)
    for a, name in ((0, "forward_kl"), (1, "reverse_kl")):
        at = run(backend, case.having(divergence="alpha", divergence_alpha=a))
        assert_same_outcome(name, at, run(backend, case.having(divergence=name)))
        double = case.double()
        for near in (a + 1e-6, a - 1e-6):
            got = run(Backend("torch"), double.having(divergence="alpha", divergence_alpha=near))
            assert_relative(f"alpha {near}", got.stats.kl, run(Backend("torch"), double.having(divergence=name)).stats.kl, 1e-4)


def test_disjoint_distributions_are_log_2_apart():
    x, z = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    for backend in ("reference", "torch"):
        found = token_stats(x, z, torch.tensor([0]), divergence="js", backend=backend).kl
        assert_relative(backend, found, torch.tensor([math.log(2)]), 1e-7)


def test_the_specification_by_hand():
    p, q = torch.tensor([0.5, 0.5], dtype=fp64), torch.tensor([0.25, 0.75], dtype=fp64)
    expected = {
        ("forward_kl", None): 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
        ("reverse_kl", None): 0.5 * math.log(2) + 0.5 * math.log(2 / 3),
        ("js", None): (0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5) + 0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5)) / 2,
        ("alpha", 2.0): (0.25 / 0.25 + 0.25 / 0.75 - 1) / 2,
        ("alpha", 0.5): 4 * (1 - math.sqrt(0.125) - math.sqrt(0.375)),
        ("alpha", 0.0): 0.25 * math.log(0.5) + 0.75 * math.log(1.5),
    }
    for (name, a), want in expected.items():
        assert_relative(name, divergence_reference(p.log(), q.log(), name, a), torch.tensor(want, dtype=fp64), 1e-14)


# -------------------------------------------------------------------------------------------------------- from hidden states


@every_backend
@some_others
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_from_hidden_states(backend, kind, frozen):
    """Of soft-capped logits, which kernels cap in each of their passes. In float64, which kernels refuse: these in float32."""
    dtype, V = (fp32, 300) if backend.name == "triton" else (fp64, 37)
    make = partial(contract_linear.make_case, backend.device, V=V, head={"softcap": 3.0, "scale": 1.2}, ignore_every=4)
    case, exact = make(dtype=dtype), make(dtype=dtype).to(fp64)

    def gradients(case: contract_linear.Case, fused: bool) -> list[Tensor]:
        leaves = [t.clone() for t in (case.policy.hidden, case.policy.weight, case.policy.bias)]
        leaves = [leaf.requires_grad_(not (frozen and i)) for i, leaf in enumerate(leaves)]
        head = contract_linear.LMHead(leaves[1], leaves[2], softcap=3.0, scale=1.2)
        other = contract_linear.LMHead(case.ref.weight, case.ref.bias, softcap=3.0, scale=1.2)
        if fused:
            rows = {} if backend.name == "reference" else {"max_chunk_bytes": 4 * 3 * V * dtype.itemsize}
            stats = linear_token_stats(
                leaves[0], head, case.ref.hidden, other, case.labels, backend=backend.name, **kind, **rows
            )
        else:
            hidden, ref_hidden = (h.masked_fill(case.ignored.unsqueeze(-1), 0.0) for h in (leaves[0], case.ref.hidden))
            stats = token_stats_reference(head.logits(hidden), other.logits(ref_hidden), case.labels, **kind)
        total = (stats.logp * case.g_logp + stats.kl * case.g_kl)[~case.ignored].sum()
        return [stats.kl.detach(), *torch.autograd.grad(total, [leaf for leaf in leaves if leaf.requires_grad])]

    slack = 1e-10 if dtype == fp64 else 2e-5
    for got, naive, want in zip(gradients(case, True), gradients(case, False), gradients(exact, False), strict=True):
        assert_within_budget("from hidden states", got, naive, want, slack * (1 + want.abs()))


@every_kind
@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_losses_by_every_engine(kind, variant, frozen):
    """The loss by a naive sum over tokens, and its gradient, from logits and by both engines from hidden states."""
    S, T, V, D = 4, 6, 19, 5
    hidden, ref_hidden = (noise(S, T, D, seed=i).double() for i in (1, 2))
    weight, ref_weight = (noise(V, D, seed=i).double() for i in (3, 4))
    labels = torch.randint(V, (S, T), generator=torch.Generator().manual_seed(5))
    labels[:, :2] = -100
    options = {"beta": 0.4, "alpha": 0.3, "variant": variant, **kind}
    leaves = hidden.requires_grad_(), weight.requires_grad_(not frozen)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    log_p, log_q = torch.log_softmax(hidden @ weight.T, -1)[:, :-1], torch.log_softmax(ref_hidden @ ref_weight.T, -1)[:, :-1]
    y = labels[:, 1:]
    keep = y != -100
    kl = divergence_reference(log_p, log_q, kind.get("divergence", "forward_kl"), kind.get("divergence_alpha"))
    rho = (log_p - log_q).gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
    rho, kl = (torch.where(keep, t, 0.0).sum(-1).view(2, -1) for t in (rho, kl))
    r_w, r_l = (rho + kl) if variant == "tdpo1" else (rho[0] + 0.3 * kl[0].detach(), rho[1] + 0.3 * kl[1])
    loss = -torch.nn.functional.logsigmoid(0.4 * (r_w - r_l)).mean()
    expected = [loss.detach(), *torch.autograd.grad(loss, wanted)]

    logits = hidden @ weight.T
    out = TDPOLoss(**options)(logits, ref_hidden @ ref_weight.T, labels)
    found = {"logits": [out.loss.detach(), *torch.autograd.grad(out.loss, wanted)]}
    for engine in ("one_pass", "recompute"):
        for rows in (2, 1000):
            fused = LinearTDPOLoss(**options, engine=engine, max_chunk_bytes=rows * 3 * V * 8)
            out = fused(hidden, weight, ref_hidden, ref_weight, labels)
            found[f"{engine}, {rows} rows"] = [out.loss.detach(), *torch.autograd.grad(out.loss, wanted)]
    for what, got in found.items():
        for g, want in zip(got, expected, strict=True):
            assert_within_budget(what, g, want, want, 1e-10 * (1 + want.abs()))


@every_other
def test_traces_with_torch_compile(kind):
    torch._dynamo.reset()
    compiled = torch.compile(Backend("torch"), fullgraph=True, backend="aot_eager")
    check(compiled, make_case("cpu", (2, 3), 131, **kind))
