"""What `linear_token_stats` promises, as tests: `contract_token_stats`, one level down. Each backend is a few lines.

    LinearTokenStatsContract        every backend
    LinearLayoutsContract           every backend but the interpreter, which would take minutes
    FusedLinearTokenStatsContract   every backend but the naive one: accurate KL, the same bits always, compilable
    Float64LinearContract           backends that accept float64: exact to the last digits
    RefusesBadLabels                where labels can be checked without synchronising (CPU)
    PoisonsBadLabels                where they cannot (GPU kernels, interpreted or not)

The oracle makes all logits at once, in plain torch, and hands them to the specification. Letters: N rows, S sequences,
T positions, D hidden size, V vocabulary, h hidden states, W head weight, x = softcap(scale (h W' + b)) policy logits, z the
reference's.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from contract_token_stats import (
    EXTRAS,
    LAYOUTS,
    NAN,
    POLICY_EXTRAS,
    SHORT,
    bf16,
    fp16,
    fp32,
    fp64,
    kl_from_delta,
    noise,
    poisoned_memory,
)
from fused_tdpo import LMHead, TokenStats, linear_token_stats
from fused_tdpo.reference import token_stats_reference
from tolerances import TINY_KL_RELATIVE, assert_exactly_zero, assert_relative, assert_same_bits, assert_within_budget

HALF = (fp16, bf16)
INF = float("inf")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """A second thread has nothing to do on tensors of this size, but is waited for. Test files import this."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class LinearBackend:
    """Who is tested."""

    name: str
    device: str = "cpu"
    compiler: str = "aot_eager"
    """Which torch.compile backend must trace it."""
    examples: float = 1.0
    """Share of Hypothesis' examples."""

    def __call__(self, *args: Any, **options: Any) -> TokenStats:
        return linear_token_stats(*args, backend=self.name, **options)


# --- cases -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """Hidden states and what makes logits of them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    @property
    def head(self) -> Tensor | LMHead:
        """What the op is given: the bare weight wherever that says it all."""
        if self.bias is None and (self.scale, self.softcap, self.vocab_size) == (1.0, None, None):
            return self.weight
        return LMHead(self.weight, self.bias, self.scale, self.softcap, self.vocab_size)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Model":
        bias = None if self.bias is None else function(self.bias)
        return replace(self, hidden=function(self.hidden), weight=function(self.weight), bias=bias)


TRAINABLE = ("hidden", "weight", "bias")
SUBSETS = [names for n in (1, 2, 3) for names in itertools.combinations(TRAINABLE, n)]


@dataclass(frozen=True)
class Case:
    """Arguments of one call, and the upstream gradients of its `logp` and `kl` (None: that output is not used)."""

    policy: Model
    ref: Model | None
    labels: Tensor
    g_logp: Tensor | None = None
    g_kl: Tensor | None = None
    shared: bool = False
    """The reference is given the very head of the policy; then `ref` holds equal values."""
    options: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> "Case":
        return replace(self, **changes)

    def having(self, **options: Any) -> "Case":
        return replace(self, options={**self.options, **options})

    def to(self, dtype: torch.dtype) -> "Case":
        ref = None if self.ref is None else self.ref.map(lambda t: t.to(dtype))
        return replace(self, policy=self.policy.map(lambda t: t.to(dtype)), ref=ref)

    @property
    def ignored(self) -> Tensor:
        return self.labels == self.options.get("ignore_index", -100)

    @property
    def V(self) -> int:
        """Number of columns in use."""
        set_in = (self.options.get("vocab_size"), self.policy.vocab_size, self.ref.vocab_size if self.ref else None)
        return next((k for k in set_in if k is not None), self.policy.weight.shape[0])

    def budget(self, rows: int) -> int:
        """Bytes of that many rows of logits of both models."""
        weights = [model.weight for model in (self.policy, self.ref) if model is not None]
        return rows * sum(weight.shape[0] * weight.element_size() for weight in weights)


class Outcome(NamedTuple):
    stats: TokenStats
    grads: dict[str, Tensor]
    """By name of the policy's tensor: "hidden", "weight", "bias"."""


def run(op: Callable[..., TokenStats], case: Case, train: Iterable[str] = TRAINABLE) -> Outcome:
    """Forward and backward of a case. Gradients are taken at the very views of memory that the op is given."""
    policy = case.policy.map(torch.Tensor.detach)
    train = [name for name in train if getattr(policy, name) is not None]
    for name in train:
        getattr(policy, name).requires_grad_()
    head = policy.head
    ref_head = None if case.ref is None else head if case.shared else case.ref.head
    stats = op(policy.hidden, head, None if case.ref is None else case.ref.hidden, ref_head, case.labels, **case.options)
    used = [(s, g) for s, g in ((stats.logp, case.g_logp), (stats.kl, case.g_kl)) if s is not None and g is not None]
    if not used or not train:
        return Outcome(stats, {})
    outputs, upstream = zip(*((s, g.to(s.dtype)) for s, g in used), strict=True)
    grads = torch.autograd.grad(outputs, [getattr(policy, name) for name in train], upstream)
    return Outcome(stats, dict(zip(train, grads, strict=True)))


def logits_of(hidden: Tensor, head: Tensor | LMHead, cut: int) -> Tensor:
    """(..., cut) all logits at once, in the dtype of the head, before any temperature."""
    head = head if isinstance(head, LMHead) else LMHead(head)
    x = hidden @ head.weight[:cut].T
    x = x if head.bias is None else x + head.bias[:cut]
    x = x if head.scale == 1 else x * head.scale
    return x if head.softcap is None else head.softcap * torch.tanh(x / head.softcap)


def naive(
    policy_hidden: Tensor,
    policy_head: Tensor | LMHead,
    ref_hidden: Tensor | None,
    ref_head: Tensor | LMHead | None,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    temperature: float = 1.0,
    extras: Iterable[str] = (),
    **chunks: Any,
) -> TokenStats:
    """The oracle. Options that must not change the result are not looked at."""
    assert chunks.keys() <= {"max_chunk_bytes", "logits_dtype", "valid_rows", "check_labels"}, f"{chunks}: teach the oracle"
    drop = (labels == ignore_index).unsqueeze(-1)
    cuts = {getattr(head, "vocab_size", None) for head in (policy_head, ref_head)} | {vocab_size}
    cut = max(cuts - {None}, default=getattr(policy_head, "weight", policy_head).shape[0])
    x = logits_of(policy_hidden.masked_fill(drop, 0.0), policy_head, cut)
    z = None if ref_hidden is None else logits_of(ref_hidden.masked_fill(drop, 0.0), ref_head, cut)
    options = {"ignore_index": ignore_index, "temperature": temperature, "extras": tuple(extras)}
    return token_stats_reference(x, z, labels, **options)


def make_case(
    device: str,
    lead: tuple[int, ...] = (7,),
    V: int = 37,
    D: int = 12,
    *,
    dtype: torch.dtype = fp32,
    ref: bool = True,
    ref_dtype: torch.dtype | None = None,
    ref_D: int | None = None,
    bias: bool = True,
    ref_bias: bool | None = None,
    widths: tuple[int, int] | None = None,
    head: dict[str, Any] | None = None,
    ref_head: dict[str, Any] | None = None,
    shared: bool = False,
    used: tuple[str, ...] = ("logp", "kl"),
    ignore_every: int = 3,
    labels_dtype: torch.dtype = torch.int64,
    seed: int = 0,
    **options: Any,
) -> Case:
    """A policy near its reference where sizes agree. Every `ignore_every`-th row is ignored; its hidden states are NaN and inf.

    `widths` are the widths of (policy, reference) heads where they exceed `V`; what is beyond `V` is NaN. `head` and `ref_head`
    are further fields of the heads; the reference has the policy's unless told otherwise.
    """
    ref_D = ref_D or D
    weight = 2.0 * noise(V, D, seed=seed) / D**0.5
    b = 0.5 * noise(V, seed=seed + 1)
    h = 1.5 * noise(*lead, D, seed=seed + 2)
    if ref_D == D:
        z_h = h + 0.3 * noise(*lead, D, seed=seed + 3)
        z_weight = weight if shared else weight + 0.1 * noise(V, D, seed=seed + 4)
        z_b = b if shared else b + 0.1 * noise(V, seed=seed + 5)
    else:
        z_h, z_weight = 1.5 * noise(*lead, ref_D, seed=seed + 3), 2.0 * noise(V, ref_D, seed=seed + 4) / ref_D**0.5
        z_b = 0.5 * noise(V, seed=seed + 5)

    labels = torch.randint(V, lead, generator=torch.Generator().manual_seed(seed + 6))
    ignored = (torch.arange(labels.numel()) % ignore_every == ignore_every - 1).reshape(lead)
    labels = labels.masked_fill(ignored, options.get("ignore_index", -100)).to(labels_dtype)
    h[ignored], z_h[ignored] = NAN, INF

    def wider(values: Tensor, width: int) -> Tensor:
        return torch.cat([values, values.new_full((width - V, *values.shape[1:]), NAN)])

    widths = widths or (V, V)
    dtypes = (dtype, ref_dtype or dtype)
    has_bias = (bias, bias if ref_bias is None else ref_bias)
    fields = (head or {}, (head or {}) if ref_head is None else ref_head)
    models = []
    for i, (hidden, w, offset) in enumerate(((h, weight, b), (z_h, z_weight, z_b))):
        hidden, w, offset = (t.to(device, dtypes[i]) for t in (hidden, wider(w, widths[i]), wider(offset, widths[i])))
        models.append(Model(hidden, w, offset if has_bias[i] else None, **fields[i]))
    upstream = {name: noise(*lead, seed=seed + 7 + i, device=device) for i, name in enumerate(("logp", "kl"))}
    return Case(
        policy=models[0],
        ref=models[1] if ref else None,
        labels=labels.to(device),
        g_logp=upstream["logp"] if "logp" in used else None,
        g_kl=upstream["kl"] if "kl" in used and ref else None,
        shared=shared,
        options=options,
    )


# --- the comparison --------------------------------------------------------------------------------------------------------


def largest(values: Tensor) -> float:
    """max |values| of the finite ones, 0 of nothing."""
    return float(values.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max()) if values.numel() else 0.0


def assert_near(what: str, got: Tensor, expected: Tensor, relative: float, naive: Tensor | None = None) -> None:
    """Every element within `relative` of the largest one, beyond what naive code of the dtype errs there."""
    slack = torch.full_like(expected, relative * largest(expected) + 1e-300, dtype=fp64)
    assert_within_budget(what, got, expected if naive is None else naive, expected, slack)


def assert_as_near_as_naive(what: str, got: Tensor, naive: Tensor, exact: Tensor, eps: float) -> None:
    """For half precision, whose roundings of single elements no two codes share: the error as a whole, with its slack."""
    assert got.shape == exact.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    size = exact.double().norm()
    error, allowed = ((t.detach().double() - exact).norm() for t in (got, naive))
    within = error <= 1.5 * allowed + eps * size
    assert within, f"{what}: relative error {error / size:.3g} as a whole, naive {allowed / size:.3g}, slack {eps:.3g}"


def check(op: Callable[..., TokenStats], case: Case, what: str = "", train: Iterable[str] = TRAINABLE) -> Outcome:
    """Run the op and hold every value and every gradient to the budget. Returns what the op gave."""
    return compare(run(op, case, train), case, what)


def compare(fused: Outcome, case: Case, what: str = "") -> Outcome:
    """Hold an outcome of `case` to the budget: against the oracle in float64, and in the dtypes of the case."""
    what = f"{what}: " if what else ""
    train = tuple(fused.grads)
    plain, exact = run(naive, case, train), run(naive, case.to(fp64), train)
    tiles = case.options.get("logits_dtype")
    same = plain if tiles is None else run(naive, case.to(tiles), ())
    dtypes = [model.weight.dtype for model in (case.policy, case.ref) if model is not None]
    units = [torch.finfo(tiles or dtype).eps for dtype in dtypes]
    ignored, V = case.ignored, case.V
    expected_dtype = fp64 if dtypes[0] == fp64 else fp32

    # what rounding of logits may cost each row: a float32 sum loses by the size of its terms, a half-precision logit by its own
    temperature = case.options.get("temperature", 1.0)
    rounding = torch.zeros(case.labels.shape, dtype=fp64, device=case.labels.device)
    for model, unit in zip((case.policy, case.ref), units, strict=False):
        h, w = model.hidden.double().masked_fill(ignored.unsqueeze(-1), 0.0), model.weight[:V].double()
        offset = 0.0 if model.bias is None else model.bias[:V].double().nan_to_num(0.0, 0.0, 0.0)
        terms = h.abs() @ w.abs().T + abs(offset) if unit < 1e-6 else (h @ w.T + offset).abs()
        rounding += (8 if unit < 1e-6 else 2) * unit * abs(model.scale) / temperature * terms.amax(-1)
    eps = torch.finfo(fp64 if set(dtypes) == {fp64} else fp32).eps
    half = not {tiles or dtype for dtype in dtypes}.isdisjoint(HALF)

    for name in TokenStats._fields:
        got, want = getattr(fused.stats, name), getattr(exact.stats, name)
        if want is None:
            assert got is None, f"{what}{name} was not asked for, or needs an absent reference; it must be None"
            continue
        assert got is not None, f"{what}{name} is missing"
        assert got.shape == case.labels.shape, f"{what}{name} has shape {tuple(got.shape)}"
        assert got.dtype == expected_dtype or fp64 in dtypes, f"{what}{name} is {got.dtype}, expected {expected_dtype}"
        assert_exactly_zero(f"{what}{name} of ignored rows", got[ignored])
        if name == "accuracy" and half:
            assert ((got == 0) | (got == 1)).all(), f"{what}accuracy is {got.tolist()}"
            continue  # the best of two nearly equal logits is a matter of their rounding
        size = 1.0 + want.double().nan_to_num(0.0, 0.0, 0.0).abs()
        assert_within_budget(f"{what}{name}", got, getattr(same.stats, name), want, (rounding + 32 * eps) * size)
        if half and got.numel() >= 16:
            assert_as_near_as_naive(f"{what}{name}", got, getattr(same.stats, name), want, eps=max(units) / 2)

    for name, want in exact.grads.items():
        got = fused.grads[name]
        assert got.dtype == getattr(case.policy, name).dtype, f"{what}gradient of {name} is {got.dtype}"
        assert_exactly_zero(f"{what}gradient of {name}", got[ignored] if name == "hidden" else got[V:])
        if not set(dtypes).isdisjoint(HALF):
            unit = max(torch.finfo(dtype).eps for dtype in dtypes)
            assert_as_near_as_naive(f"{what}gradient of {name}", got, plain.grads[name], want, eps=unit)
        else:
            assert_near(f"{what}gradient of {name}", got, want, 1e-11 if eps < 1e-10 else 2e-5, plain.grads[name])
    return fused


def assert_same_stats(what: str, got: TokenStats, expected: TokenStats) -> None:
    for name in TokenStats._fields:
        assert_same_bits(f"{what}: {name}", getattr(got, name), getattr(expected, name))


def assert_same_outcome(what: str, got: Outcome, expected: Outcome) -> None:
    """Bit for bit, every statistic and every gradient."""
    assert_same_stats(what, got.stats, expected.stats)
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in got.grads.items():
        assert_same_bits(f"{what}: gradient of {name}", grad, expected.grads[name])


def swizzled(case: Case, **layouts: Callable[[Tensor], Tensor]) -> Case:
    """The case with other strides of the named tensors, of both models."""
    changed = [
        None if model is None else replace(model, **{name: f(getattr(model, name)) for name, f in layouts.items()})
        for model in (case.policy, case.ref)
    ]
    return case.with_(policy=changed[0], ref=changed[1])


def cut_out(values: Tensor, before: int, after: int, axis: int) -> Tensor:
    """The same values as a slice of a larger tensor, along the axis, with NaN around."""
    pad = [values.new_full((*values.shape[:axis], n, *values.shape[axis + 1 :]), NAN) for n in (before, after)]
    return torch.cat([pad[0], values, pad[1]], axis).narrow(axis, before, values.shape[axis])


HEAD_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "first rows": partial(cut_out, before=0, after=5, axis=0),  # embedding[:vocabulary]
    "middle rows": partial(cut_out, before=3, after=2, axis=0),
    "columns": partial(cut_out, before=1, after=3, axis=1),  # a pitch, and off a 16-byte boundary
    "transposed": lambda values: values.T.contiguous().T,  # stored (D, V)
    "every other row": lambda values: torch.stack([values, torch.full_like(values, NAN)], 1).flatten(0, 1)[::2],
}

HEADS = [  # fields of the policy's head, of the reference's
    pytest.param({"scale": 0.3}, {"scale": 0.3}, id="scale"),
    pytest.param({"scale": -1.5}, {}, id="scale-of-policy"),
    pytest.param({"softcap": 2.0}, {"softcap": 2.0}, id="softcap"),
    pytest.param({}, {"softcap": 3.0}, id="softcap-of-reference"),
    pytest.param({"scale": 2.0, "softcap": 5.0, "vocab_size": 31}, {"scale": 0.7, "softcap": 4.0, "vocab_size": 31}, id="all"),
]


class LinearTokenStatsContract:
    """What every backend promises."""

    backend: LinearBackend

    def case(self, *args: Any, **options: Any) -> Case:
        return make_case(self.backend.device, *args, **options)

    # --- values and gradients ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ref", [True, False], ids=["pair", "alone"])
    @pytest.mark.parametrize("dtype", [fp32, fp16, bf16], ids=SHORT.get)
    def test_values_and_gradients(self, dtype, ref):
        # Both upstream gradients at once, independent and of any sign.
        check(self.backend, self.case(dtype=dtype, ref=ref, extras=EXTRAS if ref else POLICY_EXTRAS))

    @pytest.mark.parametrize("train", SUBSETS, ids="-".join)
    def test_any_subset_of_gradients(self, train):
        check(self.backend, self.case(), train=train)

    @pytest.mark.parametrize("used", [("logp",), ("kl",)], ids="-".join)
    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_gradient_of_one_output_alone(self, used, train):
        # The upstream gradient of the other output is undefined, not a tensor of zeros.
        check(self.backend, self.case(used=used), train=train)

    def test_upstream_gradient_of_any_strides(self):
        # What .sum() hands down is one number with stride 0; a transposed loss hands down a transposed gradient.
        case = self.case((2, 3))
        one = torch.ones((), device=self.backend.device)
        check(self.backend, case.with_(g_logp=(2 * one).expand(2, 3), g_kl=(-one).expand(2, 3)), "expanded")
        transposed = [noise(3, 2, seed=s, device=self.backend.device).T for s in (7, 8)]
        check(self.backend, case.with_(g_logp=transposed[0], g_kl=transposed[1]), "transposed")

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_large_upstream_gradients(self, train):
        # A loss scaler multiplies by 2^16 before, and divides after: the gradient is linear in what comes down.
        case = self.case()
        check(self.backend, case.with_(g_logp=65536.0 * case.g_logp, g_kl=-65536.0 * case.g_kl), train=train)

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    @pytest.mark.parametrize("rows", [0, 3, 100])
    def test_any_chunk(self, rows, train):
        # From less than one row, which is one row, to everything at once.
        case = self.case((2, 4), extras=EXTRAS)
        check(self.backend, case.having(max_chunk_bytes=max(1, case.budget(rows))), train=train)

    # --- heads -------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    @pytest.mark.parametrize(("head", "ref_head"), HEADS)
    def test_heads(self, head, ref_head, dtype):
        # Scale, softcap and cut of each model separately; `mean_logit` is of the logits after all of them.
        V = head.get("vocab_size", 37)
        case = self.case((7,), V, widths=(37, 37), head=head, ref_head=ref_head, dtype=dtype, temperature=0.8, extras=EXTRAS)
        check(self.backend, case)

    @pytest.mark.parametrize("where", ["call", "heads", "both", "policy"])
    @pytest.mark.parametrize("widths", [(37, 40), (41, 44)], ids=str)
    def test_vocab_size_cuts_both(self, widths, where):
        # Heads padded to different widths; the padding is NaN and its gradient exactly 0. Places that agree are one place.
        if where == "policy":
            widths = (widths[0], 37)  # the reference is as wide as the policy's head says
        head = {"vocab_size": 37} if where != "call" else {}
        ref_head = {} if where == "policy" else head
        options = {"vocab_size": 37} if where in ("call", "both") else {}
        check(self.backend, self.case(widths=widths, head=head, ref_head=ref_head, extras=EXTRAS, **options))

    def test_vocab_size_without_reference(self):
        check(self.backend, self.case(widths=(45, 45), ref=False, vocab_size=37, extras=POLICY_EXTRAS))

    @pytest.mark.parametrize("temperature", [0.5, 3.0])
    def test_temperature(self, temperature):
        # It divides what the softcap gives, and the gradient once more; `mean_logit` is of the logits before.
        check(self.backend, self.case(temperature=temperature, head={"softcap": 4.0}, extras=EXTRAS))

    @pytest.mark.parametrize("ref_D", [5, 20])
    def test_models_of_different_size(self, ref_D):
        check(self.backend, self.case(ref_D=ref_D))

    @pytest.mark.parametrize(
        ("dtype", "ref_dtype"), [(fp32, bf16), (bf16, fp32), (fp16, bf16), (fp32, fp16)], ids=lambda d: SHORT[d]
    )
    def test_models_of_different_dtype(self, dtype, ref_dtype):
        # A float32 policy beside a half-precision reference, as the authors train, and the reverse.
        check(self.backend, self.case(dtype=dtype, ref_dtype=ref_dtype, ref_D=8))

    def test_masked_tokens(self):
        # A bias of -inf in both models masks a token: it adds nothing to any value or gradient.
        case = self.case(ignore_every=99)
        unused = torch.ones(37, dtype=torch.bool, device=self.backend.device).index_fill(0, case.labels, False)
        unused[::2] = False
        masked = [replace(m, bias=m.bias.masked_fill(unused, -INF)) for m in (case.policy, case.ref)]
        got = check(self.backend, case.with_(policy=masked[0], ref=masked[1]))
        assert_exactly_zero("gradient of masked tokens", got.grads["weight"][unused])

    # --- one head for both models ------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    @pytest.mark.parametrize("bias", [False, True], ids=["tensor", "LMHead"])
    def test_shared_head(self, bias, train):
        # One product for both. The gradient is that of the policy's part alone.
        case = self.case(shared=True, bias=bias, extras=EXTRAS)
        got = check(self.backend, case.having(max_chunk_bytes=case.budget(2)), train=train)
        apart = run(self.backend, case.with_(shared=False), train)
        for name in ("logp", "ref_logp", "kl"):
            assert_near(f"{name} beside separate heads", getattr(got.stats, name), getattr(apart.stats, name), 1e-5)

    @pytest.mark.parametrize(
        ("head", "ref_head"),
        [({}, {"scale": 0.5}), ({"softcap": 3.0}, {}), ({"scale": 2.0}, {"scale": 2.0, "softcap": 9.0})],
        ids=["scale", "softcap", "softcap-of-reference"],
    )
    def test_one_weight_in_two_heads(self, head, ref_head):
        # The same tensor, but not the same head: what differs must not be forgotten.
        case = self.case(head=head, ref_head=ref_head, ref_bias=False)
        case = case.with_(ref=replace(case.ref, weight=case.policy.weight))
        check(self.backend, case, train=("hidden",))

        policy = case.policy.map(lambda t: t.detach().requires_grad_())
        ref_head = replace(case.ref, weight=policy.weight).head
        stats = self.backend(policy.hidden, policy.head, case.ref.hidden, ref_head, case.labels)
        leaves = [getattr(policy, name) for name in TRAINABLE]
        grads = torch.autograd.grad([stats.logp, stats.kl], leaves, [case.g_logp, case.g_kl])
        compare(Outcome(stats, dict(zip(TRAINABLE, grads, strict=True))), case, "trained")

    # --- rows that do not count --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ignore_index", [-1, 0, 36])
    def test_ignore_index(self, ignore_index):
        # Also one that is a token; -100 is then a label like any other, and a wrong one.
        check(self.backend, self.case(ignore_index=ignore_index, extras=EXTRAS))

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_ignored_rows_take_no_part(self, train):
        # NaN and inf in their hidden states (make_case puts them there), NaN in what comes down to them: zeros come out.
        case = self.case((2, 4), extras=EXTRAS)
        g_logp, g_kl = (g.masked_fill(case.ignored, NAN) for g in (case.g_logp, case.g_kl))
        got = run(self.backend, case.with_(g_logp=g_logp, g_kl=g_kl), train)
        compare(got, case)

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_all_rows_ignored(self, train):
        got = check(self.backend, self.case(ignore_every=1, extras=EXTRAS), train=train)
        assert set(got.grads) == set(train)

    @pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=lambda s: "x".join(map(str, s)))
    def test_empty_batch(self, lead):
        check(self.backend, self.case(lead, extras=EXTRAS))

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_valid_rows_changes_nothing(self, train):
        case = self.case((2, 4), extras=EXTRAS)
        counted = case.having(valid_rows=int((~case.ignored).sum()))
        assert_same_outcome("counted", run(self.backend, counted, train), run(self.backend, case, train))
        nothing = self.case(ignore_every=1)
        check(self.backend, nothing.having(valid_rows=0), train=train)

    @pytest.mark.parametrize("error", [-1, 1])
    def test_wrong_valid_rows_are_refused(self, error):
        if self.backend.device != "cpu":
            pytest.skip("checking synchronises here; on a CPU it costs nothing")
        case = self.case((2, 4))
        with pytest.raises(ValueError, match="valid_rows"):
            run(self.backend, case.having(valid_rows=int((~case.ignored).sum()) + error))

    # --- what autograd sees ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("train", [("hidden",), ("weight",), TRAINABLE], ids="-".join)
    def test_a_second_backward_of_a_kept_graph(self, train):
        case = self.case()
        policy = case.policy.map(torch.Tensor.detach)
        leaves = [getattr(policy, name).requires_grad_() for name in train]
        stats = self.backend(policy.hidden, policy.head, case.ref.hidden, case.ref.head, case.labels)
        loss = (stats.logp * case.g_logp + stats.kl * case.g_kl).sum()
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
        for name, a, b in zip(train, first, second, strict=True):
            assert_same_bits(f"second backward: {name}", b, a)

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_gradients_add_up(self, train):
        # autograd may adopt a gradient as .grad and add the next one in place: a buffer that is kept must not be that one.
        case = self.case()
        policy = case.policy.map(lambda t: t.detach().clone())
        leaves = {name: getattr(policy, name).requires_grad_() for name in train}
        for _ in range(2):
            stats = self.backend(policy.hidden, policy.head, case.ref.hidden, case.ref.head, case.labels)
            loss = (stats.logp * case.g_logp + stats.kl * case.g_kl).sum()
            loss.backward(retain_graph=True)
            loss.backward()
        for name, grad in run(naive, case, train).grads.items():
            assert_near(f"4 times the gradient of {name}", leaves[name].grad, 4 * grad, 2e-5)

    def test_without_gradients(self):
        # Nothing depends on whether autograd watches.
        case = self.case(dtype=bf16, extras=EXTRAS)
        expected = run(self.backend, case).stats
        for what, mode in (("no_grad", torch.no_grad()), ("inference_mode", torch.inference_mode())):
            policy = case.policy.map(lambda t: t.detach().requires_grad_())
            with mode:
                stats = self.backend(policy.hidden, policy.head, case.ref.hidden, case.ref.head, case.labels, **case.options)
                assert not stats.logp.requires_grad, f"{what}: logp requires grad"
                assert_same_stats(what, stats, expected)
        assert_same_stats("nothing requires grad", run(self.backend, case, ()).stats, expected)

    def test_a_frozen_head_changes_nothing_for_the_body(self):
        # Two routes, one result; a frozen head lets the op keep directions instead of recomputing logits.
        case = self.case((2, 4))
        trained, frozen = run(self.backend, case), run(self.backend, case, ("hidden",))
        assert_near("gradient of hidden", frozen.grads["hidden"], trained.grads["hidden"], 1e-5)
        for name in ("logp", "kl"):
            assert_near(name, getattr(frozen.stats, name), getattr(trained.stats, name), 1e-5)

    def test_the_reference_gets_no_gradient(self):
        # A reference that requires grad is treated as detached.
        case = self.case()
        policy, ref = (model.map(lambda t: t.detach().requires_grad_()) for model in (case.policy, case.ref))
        stats = self.backend(policy.hidden, policy.head, ref.hidden, ref.head, case.labels)
        (stats.logp.sum() + stats.kl.sum()).backward()
        for name in TRAINABLE:
            assert getattr(ref, name).grad is None, f"{name} of the reference got a gradient"
            assert getattr(policy, name).grad is not None, f"{name} of the policy got none"
        stats = self.backend(case.policy.hidden, case.policy.head, ref.hidden, ref.head, case.labels, extras=EXTRAS)
        for name in TokenStats._fields:
            assert not getattr(stats, name).requires_grad, f"{name} requires grad though only the reference does"

    # --- dtypes ------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", HALF, ids=SHORT.get)
    def test_half_precision_at_length(self, dtype):
        # Enough rows and columns that the error of a whole gradient means something, also when it is added up chunk by chunk.
        case = self.case((24,), 131, 24, dtype=dtype)
        check(self.backend, case.having(max_chunk_bytes=case.budget(5)), "trained")
        check(self.backend, case, "frozen", ("hidden",))

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    @pytest.mark.parametrize("dtype", HALF, ids=SHORT.get)
    def test_float32_tiles(self, dtype, train):
        # Statistics of half-precision hidden states as exact as float32 logits allow.
        check(self.backend, self.case(dtype=dtype, logits_dtype=fp32, extras=EXTRAS), train=train)

    def test_float32_tiles_of_float32(self):
        check(self.backend, self.case(logits_dtype=fp32))

    def autocast(self, *args: Any, **options: Any) -> TokenStats:
        """The op inside, its backward outside of autocast."""
        with torch.autocast(torch.device(self.backend.device).type, dtype=bf16):
            return self.backend(*args, **options)

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_autocast(self, train):
        # Float32 parameters, products in bfloat16: the statistics of rounded inputs, gradients in the parameters' own dtype.
        case = self.case()
        got, rounded = run(self.autocast, case, train), case.to(bf16)
        assert_same_stats("autocast", got.stats, run(self.backend, rounded, train).stats)
        narrow, exact = run(naive, rounded, train), run(naive, rounded.to(fp64), train)
        for name in train:
            assert got.grads[name].dtype == fp32, f"gradient of {name} is {got.grads[name].dtype}"
            grads = (outcome.grads[name] for outcome in (got, narrow, exact))
            assert_as_near_as_naive(f"gradient of {name}", *grads, eps=torch.finfo(bf16).eps)

    def test_autocast_of_mixed_dtypes(self):
        # As a model under autocast hands them over: bfloat16 hidden states, float32 head; a reference in bfloat16 altogether.
        case = self.case()
        rounded = case.to(bf16)
        mixed = case.with_(policy=replace(case.policy, hidden=rounded.policy.hidden), ref=rounded.ref)
        got = run(self.autocast, mixed)
        assert_same_stats("mixed", got.stats, run(self.backend, rounded).stats)
        assert {name: grad.dtype for name, grad in got.grads.items()} == {"hidden": bf16, "weight": fp32, "bias": fp32}

    def test_mixed_dtypes_are_refused(self):
        case = self.case()
        wrong = replace(case.policy, hidden=case.policy.hidden.to(bf16))
        with pytest.raises((TypeError, ValueError), match=r"(?is)(?=.*bfloat16)(?=.*float32)"):
            run(self.backend, case.with_(policy=wrong))
        wrong = replace(case.ref, hidden=case.ref.hidden.to(bf16))
        with pytest.raises((TypeError, ValueError), match=r"(?is)(?=.*bfloat16)(?=.*float32)"):
            run(self.backend, case.with_(ref=wrong))


class LinearLayoutsContract(LinearTokenStatsContract):
    """What no kernel sees, with every layout there is: for backends that are fast enough."""

    @pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)], ids=lambda s: "x".join(map(str, s)) or "scalar")
    def test_leading_shapes(self, lead):
        check(self.backend, self.case(lead, extras=EXTRAS))

    # --- strides -----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_strides_of_hidden_states(self, layout):
        # Among them hidden[:, :-1] of a causal model and (T, S, D).transpose(0, 1) of a sequence-first one.
        case = self.case((2, 3))
        check(self.backend, swizzled(case, hidden=LAYOUTS[layout]))

    @pytest.mark.parametrize("layout", HEAD_LAYOUTS)
    def test_strides_of_the_head(self, layout):
        # The gradient of a slice is that of the slice; nothing around it is read.
        check(self.backend, swizzled(self.case(), weight=HEAD_LAYOUTS[layout]))

    def test_expanded_hidden_states(self):
        # Rows with stride 0: several labels scored after one prefix.
        case = self.case((4,), ignore_every=99)
        check(self.backend, swizzled(case, hidden=lambda h: h[:1].expand(4, -1)))

    def test_the_gradient_of_a_slice_of_an_embedding(self):
        # A padded embedding matrix is the leaf: its other rows are not used, so their gradient is 0.
        case = self.case(bias=False)
        big = cut_out(case.policy.weight, 2, 3, axis=0)._base.nan_to_num(0.0).requires_grad_()
        stats = self.backend(case.policy.hidden, big[2:39], case.ref.hidden, case.ref.head, case.labels)
        (grad,) = torch.autograd.grad([stats.logp, stats.kl], big, [case.g_logp, case.g_kl])
        assert_exactly_zero("gradient around the slice", torch.cat([grad[:2], grad[39:]]))
        compare(Outcome(stats, {"weight": grad[2:39]}), case)

    @pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
    def test_labels_of_any_strides(self, labels_dtype):
        case = self.case((2, 3), labels_dtype=labels_dtype)
        longer = torch.full((2, 4), 1 << 30, device=self.backend.device, dtype=labels_dtype)
        longer[:, 1:] = case.labels
        check(self.backend, case.with_(labels=longer[:, 1:]), "shifted")
        check(self.backend, case.with_(labels=case.labels.T.contiguous().T), "transposed")

    # --- options, one by one -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(("bias", "ref_bias"), [(True, False), (False, True), (False, False)])
    def test_bias(self, bias, ref_bias):
        check(self.backend, self.case(bias=bias, ref_bias=ref_bias))

    @pytest.mark.parametrize("extra", EXTRAS)
    def test_extra_alone(self, extra):
        check(self.backend, self.case(extras=(extra,)))

    # --- around the op --------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("train", SUBSETS[:3], ids="-".join)
    def test_only_logp_and_kl_carry_gradients(self, train):
        stats = run(self.backend, self.case(extras=EXTRAS), train).stats
        carrying = {name for name in TokenStats._fields if getattr(stats, name).requires_grad}
        assert carrying == {"logp", "kl"}, f"{carrying} require grad"

    def test_gradients_reach_the_producer(self):
        # A body before the head, and a head tied to the embedding that feeds the body.
        case = self.case((2, 4), bias=False, ignore_every=99)
        tokens = torch.arange(8, device=self.backend.device).reshape(2, 4)
        body = noise(12, 12, seed=30, device=self.backend.device)
        grads = []
        for op in (self.backend, naive):
            leaves = [t.clone().requires_grad_() for t in (body, case.policy.weight)]
            hidden = torch.tanh(torch.nn.functional.embedding(tokens, leaves[1]) @ leaves[0])
            stats = op(hidden, leaves[1], case.ref.hidden, case.ref.head, case.labels)
            grads.append(torch.autograd.grad((stats.logp * case.g_logp + stats.kl * case.g_kl).sum(), leaves))
        for what, got, expected in zip(("body", "embedding"), *grads, strict=True):
            assert_near(f"gradient of the {what}", got, expected, 2e-5)

    def test_inputs_are_left_alone(self):
        case = self.case(extras=EXTRAS)
        tensors = [getattr(model, name) for model in (case.policy, case.ref) for name in TRAINABLE] + [case.labels]
        copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
        run(self.backend, case)
        for tensor, copy, version in zip(tensors, copies, versions, strict=True):
            assert_same_bits("input after backward", tensor, copy)
            assert tensor._version == version, "the version of an input changed"


class FusedLinearTokenStatsContract(LinearTokenStatsContract):
    """What every backend promises beyond the naive one."""

    # --- KL near zero ------------------------------------------------------------------------------------------------------

    def exact_pair(self, distance: float, dtype: torch.dtype, V: int = 211) -> tuple[Model, Model]:
        """Hidden states and a head whose products no order of summation rounds: x = z + distance * w exactly in float32.

        z is a multiple of 1/8 below 14, w of 1/4 up to 3, distance a power of two from 2^-17: at most 24 bits in all. Inputs
        have few bits themselves, so half precision holds them too.
        """
        gen = torch.Generator().manual_seed(1)
        h = torch.randint(-4, 5, (3, 8), generator=gen) / 2
        weight = torch.randint(-4, 5, (V, 8), generator=gen) / 4
        weight[:, 7] = torch.randint(-12, 13, (V,), generator=gen) / 4
        policy, ref = h.clone(), h.clone()
        policy[:, 7], ref[:, 7] = distance, 0.0
        policy, ref, weight = (t.to(self.backend.device, dtype) for t in (policy, ref, weight))
        assert policy[0, 7] == distance, "the test itself is wrong"
        return Model(policy, weight), Model(ref, weight.clone())

    @pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
    @pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=SHORT.get)
    def test_tiny_kl(self, dtype, shared):
        # True KL from 5e-11 to 1, of half-precision inputs by float32 tiles.
        labels = torch.zeros(3, dtype=torch.int64, device=self.backend.device)
        seen = []
        for exponent in (-17, -12, -6, -1):
            policy, ref = self.exact_pair(2.0**exponent, dtype)
            x, z = (m.hidden.double() @ m.weight.double().T for m in (policy, ref))
            assert torch.equal(x.float().double(), x), "the test itself is wrong: float32 does not hold the logits"
            exact = kl_from_delta(x, z)
            head = policy.weight
            options = {} if dtype == fp32 else {"logits_dtype": fp32}
            kl = self.backend(policy.hidden, head, ref.hidden, head if shared else ref.weight, labels, **options).kl
            assert_relative(f"KL at distance 2^{exponent}", kl, exact, TINY_KL_RELATIVE)
            seen.append(exact)
        assert min(map(float, seen[0])) < 2e-10 and max(map(float, seen[-1])) > 0.2, "the test itself is wrong"

    @pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
    def test_equal_models(self, shared):
        # Products that nothing rounds, so that equal models have equal logits in whatever chunk: exactly 0.
        policy, _ = self.exact_pair(1.0, fp32)
        ref = policy.weight if shared else policy.weight.clone()
        labels = torch.tensor([3, 5, 200], device=self.backend.device)
        stats = self.backend(policy.hidden, policy.weight, policy.hidden.clone(), ref, labels)
        assert_exactly_zero("KL", stats.kl)
        assert_same_bits("ref_logp", stats.ref_logp, stats.logp)

    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    def test_kl_is_never_negative(self, dtype):
        case = self.case((9,), dtype=dtype, ignore_every=99)
        for distance in (1e-6, 1e-4, 1e-2):
            hidden = case.policy.hidden + distance * noise(9, 12, seed=40, device=self.backend.device).to(dtype)
            kl = self.backend(case.policy.hidden, case.policy.head, hidden, case.policy.head, case.labels).kl
            assert (kl >= 0).all(), f"distance {distance}: KL {kl.min().item()} is negative"

    # --- the same bits, always ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_repeatable(self, train):
        case = self.case((2, 5), dtype=bf16, extras=EXTRAS)
        case = case.having(max_chunk_bytes=case.budget(3))
        assert_same_outcome("second run", run(self.backend, case, train), run(self.backend, case, train))

    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    def test_a_row_does_not_see_its_neighbours(self, dtype):
        # The number of rows may change the vendor's product; their values may not.
        case = self.case((7,), dtype=dtype, extras=EXTRAS)
        other = self.case((7,), dtype=dtype, extras=EXTRAS, seed=50)
        mine = 3
        others = torch.arange(7, device=self.backend.device) != mine

        def mixed(name: str) -> Tensor:
            a, b = (getattr(c, name) for c in (case, other))
            return torch.where(others & ~case.ignored, b.where(b >= 0, 0), a) if name == "labels" else torch.where(others, b, a)

        def hidden(which: str) -> Tensor:
            return torch.where(others.unsqueeze(-1), getattr(other, which).hidden, getattr(case, which).hidden)

        moved = case.with_(
            policy=replace(case.policy, hidden=hidden("policy")), ref=replace(case.ref, hidden=hidden("ref")),
            labels=mixed("labels"), g_logp=mixed("g_logp"), g_kl=mixed("g_kl"),
        )  # fmt: skip
        for train in (("hidden",), TRAINABLE):
            got, expected = run(self.backend, moved, train), run(self.backend, case, train)
            for name in TokenStats._fields:
                assert_same_bits(name, getattr(got.stats, name)[mine], getattr(expected.stats, name)[mine])
            assert_same_bits("gradient of hidden", got.grads["hidden"][mine], expected.grads["hidden"][mine])

    # --- surroundings ------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_poisoned_memory(self, train):
        # Every output is written in full, also of ignored rows and beyond vocab_size.
        for what, case in (
            ("plain", self.case(extras=EXTRAS)),
            ("vocab_size", self.case(widths=(40, 41), vocab_size=37)),
            ("all ignored", self.case(ignore_every=1)),
        ):
            with poisoned_memory():
                got = run(self.backend, case, train)
            compare(got, case, what)

    def test_default_dtype(self):
        # Fresh tensors inside have their own dtypes, whatever the user's default is.
        case, before = self.case(extras=EXTRAS), torch.get_default_dtype()
        try:
            torch.set_default_dtype(fp64)
            got = run(self.backend, case)
        finally:
            torch.set_default_dtype(before)
        compare(got, case)

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_double_backward_is_refused(self, train):
        # Clearly, and with what to use instead; a gradient of a gradient that silently lacks a term is worse than none.
        case = self.case()
        policy = case.policy.map(torch.Tensor.detach)
        leaves = [getattr(policy, name).requires_grad_() for name in train]
        stats = self.backend(policy.hidden, policy.head, case.ref.hidden, case.ref.head, case.labels)

        def twice() -> None:
            grads = torch.autograd.grad((stats.logp + stats.kl).sum(), leaves, create_graph=True)
            sum(grad.pow(2).sum() for grad in grads).backward()

        with pytest.raises((RuntimeError, NotImplementedError), match="reference"):
            twice()

    # --- torch.compile -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    @pytest.mark.parametrize("counted", [False, True], ids=["", "valid_rows"])
    def test_traces_with_torch_compile(self, counted, train):
        # Forward and backward, without a graph break, whether the number of rows is known or not.
        torch._dynamo.reset()
        case = self.case((2, 4), extras=EXTRAS)
        if counted:
            case = case.having(valid_rows=int((~case.ignored).sum()))
        compiled = torch.compile(self.backend, fullgraph=True, backend=self.backend.compiler)
        compare(run(compiled, case, train), case, "compiled")

    def test_traces_with_torch_compile_inside_a_step(self):
        # A body in the same graph, bare weights, no reference, a chunk of two rows.
        torch._dynamo.reset()
        case = self.case((2, 4), ref=False, bias=False, ignore_every=99)

        def step(op: Callable[..., TokenStats], x: Tensor, body: Tensor, weight: Tensor) -> Tensor:
            stats = op(torch.tanh(x @ body), weight, None, None, case.labels, max_chunk_bytes=case.budget(2))
            return (stats.logp * case.g_logp).sum()

        leaves = [case.policy.hidden, noise(12, 12, seed=60, device=self.backend.device), case.policy.weight]
        grads = []
        compiled = torch.compile(partial(step, self.backend), fullgraph=True, backend=self.backend.compiler)
        for function in (compiled, partial(step, naive)):
            fresh = [t.detach().clone().requires_grad_() for t in leaves]
            function(*fresh).backward()
            grads.append([t.grad for t in fresh])
        for got, expected in zip(*grads, strict=True):
            assert_near("gradient", got, expected, 2e-5)

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_opcheck(self, train):
        # The library ops underneath keep what their schemas and their fake versions say.
        calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func.namespace == "fused_tdpo":
                    calls.append((func, args, kwargs or {}))
                return func(*args, **(kwargs or {}))

        with Recorder():
            run(self.backend, self.case((4,)), train)
        assert calls, "no op of the namespace fused_tdpo was called: this test saw nothing"
        for func, args, kwargs in calls:
            args = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            torch.library.opcheck(func, args, kwargs, test_utils=("test_schema", "test_faketensor"))


class Float64LinearContract(LinearLayoutsContract):
    """Backends that accept float64 keep it throughout: nothing hides in rounding."""

    @pytest.mark.parametrize("rows", [1, 3, 100])
    @pytest.mark.parametrize("train", SUBSETS, ids="-".join)
    def test_float64(self, train, rows):
        # Different sizes and heads, a padded vocabulary, a temperature, every chunk: all at once.
        heads = {"head": {"scale": 1.3, "softcap": 6.0}, "ref_head": {"scale": 0.7}}
        case = self.case((3, 4), ref_D=5, dtype=fp64, widths=(40, 38), vocab_size=37, temperature=0.7, **heads)
        check(self.backend, case.having(max_chunk_bytes=case.budget(rows), extras=EXTRAS), train=train)

    @pytest.mark.parametrize(("dtype", "ref_dtype"), [(fp64, fp32), (fp32, fp64)], ids=SHORT.get)
    def test_float64_beside_another(self, dtype, ref_dtype):
        check(self.backend, self.case(dtype=dtype, ref_dtype=ref_dtype))

    @pytest.mark.parametrize("train", [("hidden",), TRAINABLE], ids=["frozen", "trained"])
    def test_gradcheck(self, train):
        # Against finite differences, which know nothing of our formula.
        case = self.case((3,), 5, 2, dtype=fp64, ignore_every=99, head={"scale": 1.2, "softcap": 4.0})

        def outputs(*leaves: Tensor) -> tuple[Tensor, Tensor]:
            policy = replace(case.policy, **dict(zip(train, leaves, strict=True)))
            stats = self.backend(policy.hidden, policy.head, case.ref.hidden, case.ref.head, case.labels, temperature=0.8)
            return stats.logp, stats.kl

        assert torch.autograd.gradcheck(outputs, [getattr(case.policy, name).detach().requires_grad_() for name in train])

    def test_anything(self):
        """Shapes, heads, chunks and options that nobody thought of."""
        hypothesis = pytest.importorskip("hypothesis")
        st = hypothesis.strategies
        examples = max(3, int(hypothesis.settings().max_examples * self.backend.examples))

        @hypothesis.settings(max_examples=examples, deadline=None)
        @hypothesis.given(st.data())
        def check_anything(data: Any) -> None:
            def draw(name: str, *choices: Any) -> Any:
                return data.draw(st.sampled_from(choices), label=name)

            ref, bias, shared = (draw(name, True, False) for name in ("ref", "bias", "shared"))
            V, D = draw("V", 1, 2, 17, 40), draw("D", 1, 3, 8)
            shared = shared and ref
            head = {"scale": draw("scale", 1.0, 0.5, -2.0), "softcap": draw("softcap", None, 3.0)}
            other = {"scale": draw("ref scale", 1.0, 2.0), "softcap": draw("ref softcap", None, 5.0)}
            widths = (V, V) if shared else (V + draw("padding", 0, 3), V + draw("ref padding", 0, 1))
            used = draw("used", ("logp",), ("kl",), ("logp", "kl")) if ref else ("logp",)
            case = self.case(
                draw("lead", (1,), (5,), (2, 3), (3, 1, 2)), V, D, dtype=fp64, ref=ref, bias=bias, shared=shared,
                ref_D=D if shared else draw("ref_D", D, 4), ref_bias=bias if shared else draw("ref_bias", True, False),
                head=head, ref_head=head if shared else other, widths=widths, vocab_size=V, used=used,
                temperature=draw("temperature", 1.0, 0.6), ignore_every=draw("ignore_every", 1, 2, 3, 99),
                seed=data.draw(st.integers(0, 1000), label="seed"),
            )  # fmt: skip
            rows = draw("rows", None, 0, 1, 2, 4)
            if rows is not None:
                case = case.having(max_chunk_bytes=max(1, case.budget(rows)))
            if draw("counted", True, False):
                case = case.having(valid_rows=int((~case.ignored).sum()))
            check(self.backend, case, train=draw("train", *SUBSETS[:1], *SUBSETS[1:2], *SUBSETS[3:4], TRAINABLE))

        check_anything()


# --- labels that are no labels ---------------------------------------------------------------------------------------------

BAD_LABELS = [37, -1, -101, (1 << 32) + 3, (1 << 32) - 100]  # too large, negative, and two that 32 bits mistake for 3 and -100


class RefusesBadLabels(LinearTokenStatsContract):
    """On a CPU a bad label is an error, at no cost."""

    @pytest.mark.parametrize("counted", [False, True], ids=["", "valid_rows"])
    @pytest.mark.parametrize("bad", BAD_LABELS)
    def test_bad_label(self, bad, counted):
        case = self.case((4,), ignore_every=4)
        labels = case.labels.clone()
        labels[1] = bad
        case = case.having(valid_rows=3) if counted else case
        with pytest.raises(ValueError, match=r"(?i)label"):
            run(self.backend, case.with_(labels=labels))

    def test_bad_label_by_option(self):
        # A label is bad that only the padding would hold, or that nothing ignores.
        case = self.case((4,))
        labels = case.labels.clone()
        labels[1] = 30
        with pytest.raises(ValueError, match="30"):
            run(self.backend, case.with_(labels=labels).having(vocab_size=30))
        with pytest.raises(ValueError, match="-100"):
            run(self.backend, case.having(ignore_index=-1))


class PoisonsBadLabels(LinearTokenStatsContract):
    """Where a check would synchronise, a bad label makes its row NaN, and touches no other row."""

    @pytest.mark.parametrize("bad", BAD_LABELS)
    def test_bad_label(self, bad):
        case = self.case((5,), ignore_every=5)
        labels = case.labels.clone()
        labels[1] = bad
        good, got = (run(self.backend, c, ("hidden",)) for c in (case, case.with_(labels=labels)))
        others = torch.arange(5, device=self.backend.device) != 1
        for name in ("logp", "ref_logp", "kl"):
            values = getattr(got.stats, name)
            assert values[1].isnan(), f"{name} of a bad label is {values[1].item()}"
            assert_same_bits(f"{name} of the other rows", values[others], getattr(good.stats, name)[others])
        assert got.grads["hidden"][1].isnan().all(), "the gradient of a bad label is NaN"
        assert_same_bits("gradient of the other rows", got.grads["hidden"][others], good.grads["hidden"][others])

    def test_bad_label_checked_by_request(self):
        case = self.case((4,))
        check(self.backend, case.having(check_labels=True))
        with pytest.raises(ValueError, match=r"(?i)label"):
            run(self.backend, case.with_(labels=torch.full_like(case.labels, 37)).having(check_labels=True))
