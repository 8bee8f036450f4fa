"""What `token_stats` promises, as tests. Every backend runs these classes; adding one adds three lines and no test logic.

A test file subclasses with a `Backend`, and picks what applies to it:

    TokenStatsContract        every backend
    FusedTokenStatsContract   every backend but the naive one: accurate KL, the same bits always, in-place gradients
    Float64Contract           backends that accept float64
    RefusesBadLabels          where labels can be checked without synchronising (CPU)
    PoisonsBadLabels          where they cannot (GPU kernels, interpreted or not)
    TritonContract            the Triton kernels, interpreted or not

Letters: N rows, V vocabulary, S sequences, T positions, x policy logits, z reference logits, p = softmax(x), q = softmax(z).
"""

import importlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fused_tdpo import TokenStats, token_stats
from fused_tdpo.reference import token_stats_reference
from tolerances import (
    NEAR_EQUAL_GRAD_RELATIVE,
    TINY_KL_RELATIVE,
    assert_exactly_zero,
    assert_relative,
    assert_same_bits,
    assert_within_budget,
    grad_slack,
    stat_slack,
)

EXTRAS = ("entropy", "ref_entropy", "accuracy", "mean_logit", "log_sum_sq_probs")  # written out: this is the contract
POLICY_EXTRAS = tuple(name for name in EXTRAS if name != "ref_entropy")

fp64, fp32, fp16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = [pytest.param(fp32, id="fp32"), pytest.param(fp16, id="fp16"), pytest.param(bf16, id="bf16")]
SHORT = {fp64: "fp64", fp32: "fp32", fp16: "fp16", bf16: "bf16"}
NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class Backend:
    """Who is tested, and how large a case may be: the interpreter is a thousand times slower than a CPU."""

    name: str
    device: str = "cpu"
    examples: float = 1.0
    """Share of Hypothesis' examples."""
    rows: int = 200
    """Rows of the tests that want many."""
    compiler: str = "aot_eager"
    """Which torch.compile backend must trace it."""

    def __call__(self, *args: Any, **options: Any) -> TokenStats:
        return token_stats(*args, backend=self.name, **options)


# --- cases -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Arguments of one call, and the upstream gradients of its `logp` and `kl` (None: that output is not used)."""

    policy: Tensor
    ref: Tensor | None
    labels: Tensor
    g_logp: Tensor | None = None
    g_kl: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> "Case":
        return replace(self, **changes)

    def having(self, **options: Any) -> "Case":
        return replace(self, options={**self.options, **options})

    def double(self) -> "Case":
        return replace(self, policy=self.policy.double(), ref=None if self.ref is None else self.ref.double())

    def rows(self, index: Tensor | slice) -> "Case":
        """The same case with other rows, in other order: every tensor indexed alike."""
        pick = [t if t is None else t[index] for t in (self.policy, self.ref, self.labels, self.g_logp, self.g_kl)]
        return Case(*pick, options=self.options)

    @property
    def ignored(self) -> Tensor:
        return self.labels == self.options.get("ignore_index", -100)


class Outcome(NamedTuple):
    stats: TokenStats
    grad: Tensor | None
    """d_policy; None where no output is used."""


def run(op: Callable[..., TokenStats], case: Case) -> Outcome:
    """Forward and backward of a case. The gradient is taken at the very view of memory the op is given."""
    policy = case.policy.detach().requires_grad_()
    stats = op(policy, case.ref, case.labels, **case.options)
    used = [(s, g) for s, g in ((stats.logp, case.g_logp), (stats.kl, case.g_kl)) if s is not None and g is not None]
    if not used:
        return Outcome(stats, None)
    outputs, upstream = zip(*((s, g.to(s.dtype)) for s, g in used), strict=True)
    (grad,) = torch.autograd.grad(outputs, policy, upstream)
    return Outcome(stats, grad)


def noise(*shape: int, seed: int, device: str = "cpu") -> Tensor:
    """Standard normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _contiguous(values: Tensor) -> Tensor:
    return values.clone(memory_format=torch.contiguous_format)


def _embedded(values: Tensor, before: int, after: int) -> Tensor:
    buffer = values.new_full((*values.shape[:-1], before + values.shape[-1] + after), NAN)
    view = buffer[..., before : before + values.shape[-1]]
    view.copy_(values)
    return view


def _shifted(values: Tensor) -> Tensor:
    longer = values.new_full((*values.shape[:-2], values.shape[-2] + 1, values.shape[-1]), NAN)
    longer[..., :-1, :] = values
    return longer[..., :-1, :]


def _reversed_leading(values: Tensor) -> Tensor:
    order = [*range(values.dim() - 2, -1, -1), values.dim() - 1]
    return values.permute(order).contiguous().permute(order)


def _every_other_row(values: Tensor) -> Tensor:
    buffer = values.new_full((*values.shape[:-2], 2 * values.shape[-2], values.shape[-1]), NAN)
    buffer[..., ::2, :] = values
    return buffer[..., ::2, :]


# Same values, other strides. All memory around them is NaN, so what reads too much, or elsewhere, shows.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _contiguous,
    "shifted": _shifted,  # logits[:, :-1] of a causal model: rows do not collapse into one stride
    "pitched": partial(_embedded, before=0, after=5),  # a padded vocabulary; an odd pitch misaligns every row differently
    "pitched16": partial(_embedded, before=0, after=16),  # a pitch that keeps the alignment
    "offset1": partial(_embedded, before=1, after=2),  # every row starts off a 16-byte boundary
    "offset3": partial(_embedded, before=3, after=4),
    "transposed": _reversed_leading,  # (T, S, V).transpose(0, 1), as sequence-first models give
    "every-other-row": _every_other_row,
}


def make_case(
    device: str,
    lead: tuple[int, ...] = (5,),
    V: int = 257,
    *,
    dtype: torch.dtype = fp32,
    ref_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    ref_layout: str | None = None,
    widths: tuple[int, int] | None = None,
    ref: bool = True,
    used: tuple[str, ...] = ("logp", "kl"),
    ignore_every: int = 3,
    seed: int = 0,
    spread: float = 3.0,
    distance: float = 0.5,
    labels_dtype: torch.dtype = torch.int64,
    **options: Any,
) -> Case:
    """A policy near its reference, as in training. Every `ignore_every`-th row is ignored and its logits are NaN and inf.

    `widths` are the widths of (policy, reference) where they exceed `V`; the columns beyond `V` are poison.
    """
    z = spread * noise(*lead, V, seed=seed)
    x = z + distance * noise(*lead, V, seed=seed + 1)
    labels = torch.randint(V, lead, generator=torch.Generator().manual_seed(seed + 2))
    n = labels.numel()
    ignored = (torch.arange(n) % ignore_every == ignore_every - 1).reshape(lead)
    labels = labels.masked_fill(ignored, options.get("ignore_index", -100)).to(labels_dtype)
    x[ignored] = NAN
    z[ignored] = INF

    def place(values: Tensor, width: int, dtype: torch.dtype, layout: str) -> Tensor:
        values = values.to(device, dtype)
        values = torch.cat([values, values.new_full((*lead, width - V), NAN)], -1)
        return LAYOUTS[layout](values)

    policy_width, ref_width = widths or (V, V)
    upstream = {name: noise(*lead, seed=seed + 3 + i, device=device) for i, name in enumerate(("logp", "kl"))}
    return Case(
        policy=place(x, policy_width, dtype, layout),
        ref=place(z, ref_width, ref_dtype or dtype, ref_layout or layout) if ref else None,
        labels=labels.to(device),
        g_logp=upstream["logp"] if "logp" in used else None,
        g_kl=upstream["kl"] if "kl" in used and ref else None,
        options=options,
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """In deterministic mode torch fills every uninitialised tensor with NaN (or the largest integer)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


# --- the comparison --------------------------------------------------------------------------------------------------------


def check(op: Callable[..., TokenStats], case: Case, what: str = "") -> Outcome:
    """Run the op and hold every value and every gradient to the budget. Returns what the op gave."""
    return compare(run(op, case), case, what)


def compare(fused: Outcome, case: Case, what: str = "") -> Outcome:
    """Hold an outcome of `case` to the budget: against the specification in float64, and in the dtypes of the case."""
    what = f"{what}: " if what else ""
    plain = {name: value for name, value in case.options.items() if name not in ("check_labels", "inplace_backward")}
    case = case.with_(options=plain)  # the specification has no such options, and needs none
    naive, exact = run(token_stats_reference, case), run(token_stats_reference, case.double())
    options, ignored = case.options, case.ignored
    V = options.get("vocab_size") or case.policy.shape[-1]
    temperature = options.get("temperature", 1.0)
    float64 = case.policy.dtype == fp64
    mixed64 = case.ref is not None and (case.ref.dtype == fp64) != float64
    dtype = fp64 if float64 and not mixed64 else fp32

    def logprobs(logits: Tensor) -> Tensor:
        return torch.log_softmax(logits[..., :V].double().masked_fill(ignored.unsqueeze(-1), 0.0) / temperature, -1)

    def magnitude_of(logits: Tensor | None) -> Tensor | float:  # of what the exponentials see
        if logits is None or not V:
            return 0.0
        return logits[..., :V].double().masked_fill(ignored.unsqueeze(-1), 0.0).amax(-1).abs() / temperature

    kl_terms, kl_scale = None, 1.0
    divergence, alpha = options.get("divergence", "forward_kl"), options.get("divergence_alpha")
    if case.ref is not None and divergence != "forward_kl":
        kl_terms = divergence_terms(logprobs(case.policy), logprobs(case.ref), divergence, alpha, exact.stats.kl)
        kl_scale = 1.0 if divergence != "alpha" else 1.0 + abs(alpha) + 1 / abs(alpha * (alpha - 1) or 1.0)

    magnitude = torch.zeros_like(exact.stats.logp, dtype=fp64) + magnitude_of(case.policy) + magnitude_of(case.ref)
    for name in TokenStats._fields:
        got, want = getattr(fused.stats, name), getattr(exact.stats, name)
        if want is None:
            assert got is None, f"{what}{name} was not asked for, or needs an absent reference; it must be None"
            continue
        assert got is not None, f"{what}{name} is missing"
        assert got.shape == case.labels.shape, f"{what}{name} has shape {tuple(got.shape)}"
        assert mixed64 or got.dtype == dtype, f"{what}{name} is {got.dtype}, expected {dtype}"
        assert got.device == case.policy.device, f"{what}{name} is on {got.device}"
        assert_exactly_zero(f"{what}{name} of ignored rows", got[ignored])
        assert_within_budget(f"{what}{name}", got, getattr(naive.stats, name), want,
                             stat_slack(dtype, want, V, magnitude) * (kl_scale if name == "kl" else 1.0))  # fmt: skip

    if exact.grad is not None:
        assert fused.grad is not None, f"{what}there is no gradient"
        assert fused.grad.dtype == case.policy.dtype, f"{what}the gradient is {fused.grad.dtype}"
        assert_exactly_zero(f"{what}gradient of ignored rows", fused.grad[ignored])
        assert_exactly_zero(f"{what}gradient beyond vocab_size", fused.grad[..., V:])
        zero = torch.zeros_like(magnitude)
        slack = grad_slack(
            dtype,
            logprobs(case.policy),
            None if case.ref is None else logprobs(case.ref),
            case.labels.masked_fill(ignored, 0),
            *(zero if g is None else g.double().masked_fill(ignored, 0.0) for g in (case.g_logp, case.g_kl)),
            magnitude,
            temperature,
            kl_terms,
        )
        assert_within_budget(f"{what}gradient", fused.grad[..., :V], naive.grad[..., :V], exact.grad[..., :V], slack)
    return fused


def divergence_terms(log_p: Tensor, log_q: Tensor, divergence: str, alpha: float | None, value: Tensor) -> Tensor:
    """The size of what is added up in an element of the gradient of a divergence, (..., V), infinite terms left out."""
    p, q = log_p.exp(), log_q.exp()
    ratio, value = (log_p - log_q).nan_to_num(0.0, 0.0, 0.0).abs(), value.double().nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1)
    if divergence == "js":
        return p * (1.0 + ratio)
    if divergence == "reverse_kl" or alpha == 1:
        return p * (1.0 + ratio + value)
    if alpha == 0:
        return p + q
    powers = torch.exp(alpha * log_p + (1 - alpha) * log_q).nan_to_num(0.0, 0.0, 0.0)
    return (1 + abs(alpha)) * ((powers + p + q) / abs(alpha - 1) + p * value)


def assert_same_outcome(what: str, got: Outcome, expected: Outcome) -> None:
    """Bit for bit, every statistic and the gradient."""
    for name in TokenStats._fields:
        assert_same_bits(f"{what}: {name}", getattr(got.stats, name), getattr(expected.stats, name))
    assert_same_bits(f"{what}: gradient", got.grad, expected.grad)


def kl_from_delta(policy: Tensor, ref: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) in float64, accurate near 0: a + log1p(u) - u with u = a + b, pivot c = E_q[delta]."""
    x, z = policy.double() / temperature, ref.double() / temperature
    q = torch.softmax(z, -1)
    delta = torch.where(q > 0, x - z, 0.0)
    t = delta - (q * delta).sum(-1, keepdim=True)
    series = t * t / 2 * (1 + t / 3 * (1 + t / 4 * (1 + t / 5 * (1 + t / 6))))
    a = (q * torch.where(t.abs() < 1e-2, series, torch.expm1(t) - t)).sum(-1)
    u = a + (q * t).sum(-1)
    log1p_minus = torch.where(u.abs() < 1e-4, -u * u / 2 * (1 - 2 * u / 3), torch.log1p(u) - u)
    plain = token_stats_reference(x, z, torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)).kl
    return torch.where(a < 1, a + log1p_minus, plain)  # above, a and u grow as exp(t) and their difference loses


# Widths at which a block, a vector load or a split begins or ends, for any power of two that a kernel may use.
BOUNDARY_WIDTHS = [1, 2, 3, *(n + d for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048) for d in (-1, 0, 1))]


class TokenStatsContract:
    """What every backend promises."""

    backend: Backend

    def case(self, *args: Any, **options: Any) -> Case:
        return make_case(self.backend.device, *args, **options)

    # --- values and gradients ----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ref_dtype", [None, *DTYPES])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_values_and_gradients(self, dtype, ref_dtype):
        # Both upstream gradients at once, independent and of any sign; None as reference dtype: there is no reference.
        ref = ref_dtype is not None
        extras = EXTRAS if ref else POLICY_EXTRAS
        check(self.backend, self.case((4,), 515, dtype=dtype, ref_dtype=ref_dtype, ref=ref, extras=extras))

    @pytest.mark.parametrize("used", [("logp",), ("kl",)], ids="-".join)
    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    def test_gradient_of_one_output_alone(self, used, dtype):
        # The upstream gradient of the other output is undefined, not a tensor of zeros.
        check(self.backend, self.case((4,), 300, dtype=dtype, used=used))

    def test_upstream_gradient_of_any_strides(self):
        # What .sum() hands down is one number with stride 0; a transposed loss hands down a transposed gradient.
        case = self.case((2, 3), 130)
        one = torch.ones((), device=self.backend.device)
        check(self.backend, case.with_(g_logp=(2 * one).expand(2, 3), g_kl=(-one).expand(2, 3)), "expanded")
        transposed = [noise(3, 2, seed=s, device=self.backend.device).T for s in (7, 8)]
        check(self.backend, case.with_(g_logp=transposed[0], g_kl=transposed[1]), "transposed")

    def test_sums_of_large_magnitude_upstream(self):
        # A loss scaler multiplies by 2^16 before, and divides after: the gradient is linear in what comes down.
        case = self.case((3,), 130)
        check(self.backend, case.with_(g_logp=65536.0 * case.g_logp, g_kl=-65536.0 * case.g_kl))

    @pytest.mark.parametrize("V", BOUNDARY_WIDTHS)
    def test_width_at_a_boundary(self, V):
        # Two dtypes: their vector widths differ, so do the blocks. Rows of an odd width start at every alignment.
        check(self.backend, self.case((3,), V, dtype=fp32, extras=EXTRAS), "fp32")
        check(self.backend, self.case((3,), V, dtype=bf16), "bf16")

    @pytest.mark.parametrize("temperature", [0.5, 0.7, 3.0])
    def test_temperature(self, temperature):
        # It divides the logits of both, and the gradient once more; `mean_logit` is of the logits as they came.
        check(self.backend, self.case((4,), 300, temperature=temperature, extras=EXTRAS))

    @pytest.mark.parametrize(
        ("widths", "k"),
        [((130, 130), 97), ((130, 111), 97), ((97, 120), 97), ((112, 97), 97), ((1030, 1029), 1024), ((9, 5), 1)],
    )
    @pytest.mark.parametrize("dtype", [fp32, fp16], ids=SHORT.get)
    def test_vocab_size_cuts_both(self, widths, k, dtype):
        # A policy and a reference padded to different widths; the padding is NaN and its gradient exactly 0.
        check(self.backend, self.case((4,), k, widths=widths, dtype=dtype, vocab_size=k, extras=EXTRAS))

    def test_vocab_size_without_reference(self):
        check(self.backend, self.case((4,), 97, widths=(130, 130), vocab_size=97, ref=False, extras=POLICY_EXTRAS))

    @pytest.mark.parametrize("labels_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
    @pytest.mark.parametrize("lead", [(), (1,), (6,), (2, 3), (2, 1, 3)], ids=lambda s: "x".join(map(str, s)) or "scalar")
    def test_label_shapes(self, lead, labels_dtype):
        check(self.backend, self.case(lead, 67, labels_dtype=labels_dtype, extras=EXTRAS))

    def test_labels_of_any_strides(self):
        # labels[:, 1:] is how every trainer shifts; expanded and strided labels come from packing.
        case = self.case((2, 3), 67, ignore_every=4)
        longer = torch.full((2, 4), 1 << 40, device=self.backend.device)
        longer[:, 1:] = case.labels
        check(self.backend, case.with_(labels=longer[:, 1:]), "shifted")
        check(self.backend, case.with_(labels=case.labels.T.contiguous().T), "transposed")
        wide = torch.full((2, 6), 1 << 40, device=self.backend.device)
        wide[:, ::2] = case.labels
        check(self.backend, case.with_(labels=wide[:, ::2]), "every other")
        check(self.backend, self.case((2, 3), 67, ignore_every=99).with_(labels=case.labels[:1, :1].expand(2, 3)), "expanded")

    # --- strides -----------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    def test_strides(self, layout, dtype):
        check(self.backend, self.case((2, 2), 131, dtype=dtype, layout=layout, extras=EXTRAS))

    @pytest.mark.parametrize(
        ("layout", "ref_layout"),
        [("offset1", "offset3"), ("contiguous", "offset1"), ("transposed", "contiguous"), ("shifted", "pitched")],
        ids="+".join,
    )
    def test_strides_that_differ(self, layout, ref_layout):
        # Policy and reference come from two models: nothing makes their strides or their alignment agree.
        check(self.backend, self.case((2, 3), 1031, layout=layout, ref_layout=ref_layout))

    def test_expanded_rows(self):
        # Rows with stride 0: several labels scored under one distribution.
        case = self.case((4,), 131, ignore_every=99)
        one_ref = case.with_(ref=case.ref[:1].expand(4, -1))
        check(self.backend, one_ref, "reference")
        check(self.backend, one_ref.with_(policy=case.policy[:1].expand(4, -1)), "both")

    def test_four_axes_in_any_order(self):
        # No single stride reaches these rows, whichever axes are merged.
        case = self.case((2, 3, 2), 67)
        values = case.policy.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
        check(self.backend, case.with_(policy=values, ref=LAYOUTS["offset1"](case.ref)))

    # --- laws --------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("shift", [1.0, -30.0, 700.0, -700.0])
    def test_a_constant_per_row_changes_nothing(self, shift):
        # On multiples of 2^-6 the shifted logits are exact, so the truth is exactly that of the unshifted ones.
        case = self.case((4,), 300)
        case = case.with_(policy=(case.policy * 64).round() / 64, ref=(case.ref * 64).round() / 64)
        for what, policy, ref in (
            ("both", case.policy + shift, case.ref + shift),
            ("policy", case.policy + shift, case.ref),
            ("reference", case.policy, case.ref - shift),
        ):
            moved = case.with_(policy=policy, ref=ref)
            got = check(self.backend, moved, f"{what} against its own truth")
            naive, exact = run(token_stats_reference, case), run(token_stats_reference, case.double())
            magnitude = torch.full_like(exact.stats.logp, 2 * abs(shift))
            for name in ("logp", "ref_logp", "kl"):
                values = [getattr(o.stats, name) for o in (got, naive, exact)]
                assert_within_budget(f"{what}: {name}", *values, stat_slack(fp32, values[2], 300, magnitude))

    def test_a_permutation_of_the_vocabulary_changes_nothing(self):
        case = self.case((4,), 1031, extras=EXTRAS)
        order = torch.randperm(1031, generator=torch.Generator().manual_seed(5)).to(self.backend.device)
        new_place = order.argsort()
        labels = torch.where(case.ignored, case.labels, new_place[case.labels.clamp(min=0)])
        moved = case.with_(policy=case.policy[:, order], ref=case.ref[:, order], labels=labels)
        stats, grad = run(self.backend, moved)
        compare(Outcome(stats, grad[:, new_place]), case, "permuted")

    @pytest.mark.parametrize("used", [("logp",), ("kl",), ("logp", "kl")], ids="-".join)
    def test_gradient_rows_sum_to_zero(self, used):
        case = self.case((5,), 1031, used=used)
        grad = run(self.backend, case).grad.double()
        bound = 32 * 2.0**-23 * grad.abs().sum(-1)
        assert (grad.sum(-1).abs() <= bound).all(), f"rows sum to {grad.sum(-1).tolist()}, expected at most {bound.tolist()}"

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_kl_is_not_negative(self, dtype):
        # Naive float32 code may fall below zero by its own rounding, near 2e-6; nothing may fall further.
        case = self.case((max(4, self.backend.rows // 10),), 515, dtype=dtype, distance=0.01, ignore_every=99)
        kl = self.backend(case.policy, case.ref, case.labels).kl
        assert (kl >= -2e-6).all(), f"KL {kl.min().item()} is negative"

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equal_logits_have_no_divergence(self, dtype):
        # Step 0 of every training run: exactly 0, not nearly, also where some of the vocabulary is masked.
        case = self.case((3,), 1031, dtype=dtype, ignore_every=99)
        masked = case.policy.clone()
        masked[:, 5::7] = -INF
        for what, logits in (("plain", case.policy), ("masked", masked)):
            for temperature in (1.0, 0.7):
                got = self.backend(logits, logits.clone(), case.labels, temperature=temperature)
                assert_exactly_zero(f"KL of equal logits, {what}, temperature {temperature}", got.kl)
                assert_same_bits(f"ref_logp of equal logits, {what}", got.ref_logp, got.logp)

    # --- rows that do not count --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("ignore_index", [-1, 0, 66, 1 << 30])
    def test_ignore_index(self, ignore_index):
        # Also one that is a token: then that token's rows are ignored. -100 is then a label like any other, and a wrong one.
        case = self.case((6,), 67, ignore_index=ignore_index, extras=EXTRAS)
        check(self.backend, case)
        check(self.backend, case.with_(labels=case.labels.int()), "int32")

    def test_ignored_rows_take_no_part(self):
        # NaN and inf in their logits (make_case puts them there), NaN in what comes down to them: zeros come out.
        case = self.case((6,), 300, extras=EXTRAS)
        g_logp, g_kl = (g.masked_fill(case.ignored, NAN) for g in (case.g_logp, case.g_kl))
        got = run(self.backend, case.with_(g_logp=g_logp, g_kl=g_kl))
        compare(got, case)

    def test_all_rows_ignored(self):
        case = self.case((3,), 67, ignore_every=1, extras=EXTRAS)
        assert case.ignored.all(), "the test itself is wrong"
        check(self.backend, case)

    @pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=lambda s: "x".join(map(str, s)))
    def test_empty_batch(self, lead):
        check(self.backend, self.case(lead, 67, extras=EXTRAS))

    def test_vocabulary_of_one(self):
        # One token has probability 1 under every model: nothing to learn and nothing to diverge.
        case = self.case((3,), 1, ignore_every=99, extras=EXTRAS)
        stats, _ = check(self.backend, case)
        assert_exactly_zero("KL of a vocabulary of one", stats.kl)
        for name in ("logp", "ref_logp", "entropy", "ref_entropy", "log_sum_sq_probs"):
            # Not exactly 0 on a GPU: x·scale - m is fused there, and keeps what rounding took off m.
            got, zero = getattr(stats, name), torch.zeros(3, dtype=fp64, device=self.backend.device)
            assert_within_budget(f"{name} of a vocabulary of one", got, zero, zero, zero + 2**-22)
        assert (stats.accuracy == 1).all(), "the only token is the best one"

    # --- masked vocabularies and extreme logits ----------------------------------------------------------------------------

    def masked(self, V: int = 300, **options: Any) -> tuple[Case, Tensor]:
        """A case, and which of its columns to mask: the first, the last and many between, never a label."""
        case = self.case((4,), V, **options)
        columns = torch.zeros(4, V, dtype=torch.bool, device=self.backend.device)
        columns[:, ::3] = True
        columns[:, -1] = True
        return case, columns.scatter(-1, case.labels.clamp(min=0).unsqueeze(-1), False)

    @pytest.mark.parametrize("where", ["both", "reference", "policy"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_minus_infinity(self, where, dtype):
        # Both: nothing. Reference only: q = 0 contributes 0. Policy only: +inf, legitimately, with a finite gradient p - q.
        case, mask = self.masked(dtype=dtype, extras=EXTRAS)
        policy = case.policy.masked_fill(mask, -INF) if where != "reference" else case.policy
        ref = case.ref.masked_fill(mask, -INF) if where != "policy" else case.ref
        stats, grad = check(self.backend, case.with_(policy=policy, ref=ref))
        infinite = (stats.kl == INF) == ((where == "policy") & ~case.ignored)
        assert infinite.all(), f"KL is {stats.kl.tolist()}"
        assert grad.isfinite().all(), "the gradient is finite"

    @pytest.mark.parametrize("V", [300, 2600])
    def test_minus_infinity_in_whole_blocks(self, V):
        # The first and the last block hold nothing at all: no finite running maximum, no pivot, no first guess to start from.
        case, _ = self.masked(V, extras=EXTRAS)
        columns = torch.arange(V, device=self.backend.device)
        mask = ((columns < V // 2) | (columns > V - V // 8)).expand(4, V)
        mask = mask.scatter(-1, case.labels.clamp(min=0).unsqueeze(-1), False)
        policy, ref = case.policy.masked_fill(mask, -INF), case.ref.masked_fill(mask, -INF)
        check(self.backend, case.with_(policy=policy, ref=ref), "both")
        check(self.backend, case.with_(ref=ref), "reference")
        check(self.backend, case.with_(policy=policy), "policy")

    def test_minus_infinity_everywhere_but_one(self):
        # A distribution that is certain: entropy 0, and log-prob 0 at that token.
        case = self.case((3,), 300, ignore_every=99, extras=EXTRAS)
        keep = torch.nn.functional.one_hot(case.labels, 300).bool()
        policy, ref = case.policy.masked_fill(~keep, -INF), case.ref.masked_fill(~keep, -INF)
        check(self.backend, case.with_(policy=policy, ref=ref), "both")
        check(self.backend, case.with_(ref=ref), "reference")

    @pytest.mark.parametrize("where", ["both", "reference", "policy"])
    def test_minus_infinity_at_the_label(self, where):
        # Its log-prob is -inf, its gradient still e_y - p.
        case, _ = self.masked()
        label = torch.zeros(4, 300, dtype=torch.bool, device=self.backend.device)
        label = label.scatter(-1, case.labels.clamp(min=0).unsqueeze(-1), True)
        policy = case.policy.masked_fill(label, -INF) if where != "reference" else case.policy
        ref = case.ref.masked_fill(label, -INF) if where != "policy" else case.ref
        stats, grad = check(self.backend, case.with_(policy=policy, ref=ref))
        hit = ~case.ignored
        assert (stats.logp[hit] == -INF).all() == (where != "reference"), f"logp {stats.logp.tolist()}"
        assert (stats.ref_logp[hit] == -INF).all() == (where != "policy"), f"ref_logp {stats.ref_logp.tolist()}"
        assert grad.isfinite().all(), "the gradient is finite"

    def test_two_kinds_of_mask(self):
        # The policy masks with -inf, the reference with -1e9, as two code bases do: q is 0 there, so the KL is finite.
        case, mask = self.masked(extras=EXTRAS)
        policy, ref = case.policy.masked_fill(mask, -INF), case.ref.masked_fill(mask, -1e9)
        stats, _ = check(self.backend, case.with_(policy=policy, ref=ref))
        assert stats.kl.isfinite().all(), f"KL is {stats.kl.tolist()}"
        policy, ref = case.policy.masked_fill(mask, -1e9), case.ref.masked_fill(mask, -INF)
        check(self.backend, case.with_(policy=policy, ref=ref), "swapped")

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_lowest_finite_masks(self, dtype, temperature):
        # finfo.min overflows as soon as anything is subtracted from it, or it is divided by a temperature below 1.
        extras = ("entropy", "ref_entropy", "accuracy", "log_sum_sq_probs")  # a sum of such logits overflows anyhow
        case, mask = self.masked(dtype=dtype, temperature=temperature, extras=extras)
        low = torch.finfo(dtype).min
        policy, ref = case.policy.masked_fill(mask, low), case.ref.masked_fill(mask, low)
        for what, changed in (("both", case.with_(policy=policy, ref=ref)), ("reference", case.with_(ref=ref))):
            stats, grad = check(self.backend, changed, what)
            assert stats.kl.isfinite().all(), f"{what}: KL is {stats.kl.tolist()}"
            assert grad.isfinite().all(), f"{what}: the gradient is finite"

    @pytest.mark.parametrize("gap", [20.0, 60.0, 110.0, 300.0, 700.0])
    def test_gaps(self, gap):
        # One token far above the rest: probabilities underflow below a gap of 104, and log(softmax) would give -inf and NaN.
        case = self.case((6,), 300, ignore_every=99, extras=EXTRAS)
        rows = torch.arange(6, device=self.backend.device)
        policy, ref = case.policy.clone(), case.ref.clone()
        policy[rows[:4], rows[:4]] += gap  # rows 0, 1: the same token; 2, 3: another one; 4: reference only
        ref[rows[:2], rows[:2]] += gap
        ref[rows[2:5], rows[2:5] + 290] += gap
        policy[5, 295:] -= gap  # row 5: late columns vanish in the policy
        check(self.backend, case.with_(policy=policy, ref=ref))

    def test_rising_and_falling_rows(self):
        # The running maximum moves at every step, or never: both ways of an online softmax to rescale.
        case = self.case((4,), 1031, ignore_every=99, extras=EXTRAS)
        ramp = torch.linspace(-300.0, 300.0, 1031, device=self.backend.device)
        ramps = torch.stack([ramp, -ramp, ramp, -ramp])
        check(self.backend, case.with_(policy=case.policy + ramps, ref=case.ref + ramps), "together")
        check(self.backend, case.with_(policy=case.policy + ramps, ref=case.ref - ramps), "apart")

    # --- extras ------------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("extra", EXTRAS)
    def test_extra_alone(self, extra):
        # Each switches something on in a kernel by itself; whatever was not asked for is None.
        check(self.backend, self.case((3,), 300, extras=(extra,)))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_accuracy_of_ties(self, dtype):
        # Half-precision logits tie often. The first of several maxima counts, as in torch.argmax.
        V = 515
        policy = torch.zeros(8, V)
        ties = [(0, 1), (0, V - 1), (5, 6), (127, 128), (3, 400), (256, 511), (7, 514), (100, 101)]
        for row, columns in enumerate(ties):
            policy[row, list(columns)] = 2.5
        policy = torch.cat([policy, policy, torch.zeros(2, V)]).to(self.backend.device, dtype)  # and rows that tie everywhere
        labels = [first for first, _ in ties] + [second for _, second in ties] + [0, V - 1]
        expected = [1.0] * 8 + [0.0] * 8 + [1.0, 0.0]
        labels = torch.tensor(labels, device=self.backend.device)
        got = self.backend(policy, None, labels, extras=("accuracy",)).accuracy
        assert got.tolist() == expected, f"accuracy {got.tolist()}, expected {expected}"

    def test_accuracy_is_argmax(self):
        case = self.case((40,), 7, dtype=bf16, spread=0.01, distance=0.0, ignore_every=99)  # so few bits that most rows tie
        case = case.with_(policy=(case.policy * 100).round())
        got = self.backend(case.policy, None, case.labels, extras=["accuracy"]).accuracy
        expected = (case.policy.float().cpu().argmax(-1) == case.labels.cpu()).float()
        assert got.tolist() == expected.tolist(), "accuracy differs from argmax == label"

    # --- what autograd sees ------------------------------------------------------------------------------------------------

    def test_the_reference_gets_no_gradient(self):
        # A reference that requires grad is treated as detached.
        case = self.case((3,), 67)
        policy, ref = case.policy.detach().requires_grad_(), case.ref.detach().requires_grad_()
        stats = self.backend(policy, ref, case.labels)
        (stats.logp.sum() + stats.kl.sum()).backward()
        assert ref.grad is None, "the reference got a gradient"
        assert not stats.ref_logp.requires_grad, "ref_logp requires grad"
        stats = self.backend(policy.detach(), ref, case.labels, extras=EXTRAS)
        for name in TokenStats._fields:
            assert not getattr(stats, name).requires_grad, f"{name} requires grad though only the reference does"

    def test_only_logp_and_kl_carry_gradients(self):
        case = self.case((3,), 67, extras=EXTRAS)
        stats = self.backend(case.policy.detach().requires_grad_(), case.ref, case.labels, **case.options)
        carrying = {name for name in TokenStats._fields if getattr(stats, name).requires_grad}
        assert carrying == {"logp", "kl"}, f"{carrying} require grad"
        stats = self.backend(case.policy, case.ref, case.labels, **case.options)
        carrying = {name for name in TokenStats._fields if getattr(stats, name).requires_grad}
        assert not carrying, f"{carrying} require grad though no input does"

    def test_without_gradients(self):
        # Nothing depends on whether autograd watches.
        case = self.case((3,), 300, dtype=bf16, extras=EXTRAS)
        expected = run(self.backend, case).stats
        policy = case.policy.detach().requires_grad_()
        for what, mode in (("no_grad", torch.no_grad()), ("inference_mode", torch.inference_mode())):
            with mode:
                stats = self.backend(policy, case.ref, case.labels, **case.options)
            assert not stats.logp.requires_grad, f"{what}: logp requires grad"
            for name in TokenStats._fields:
                with torch.inference_mode():
                    assert_same_bits(f"{what}: {name}", getattr(stats, name), getattr(expected, name))

    def test_inputs_are_left_alone(self):
        # Off by default: no in-place gradient unless it is asked for.
        case = self.case((3,), 300, dtype=bf16, extras=EXTRAS)
        inputs = (case.policy, case.ref, case.labels)
        copies, versions = [t.clone() for t in inputs], [t._version for t in inputs]
        run(self.backend, case)
        for name, tensor, copy, version in zip(("policy", "reference", "labels"), inputs, copies, versions, strict=True):
            assert_same_bits(f"{name} after backward", tensor, copy)
            assert tensor._version == version, f"the version of {name} changed"

    def test_a_second_backward_of_a_kept_graph(self):
        # Without in-place gradients a kept graph is as good the second time.
        case = self.case((3,), 300)
        policy = case.policy.detach().requires_grad_()
        stats = self.backend(policy, case.ref, case.labels)
        loss = (stats.logp * case.g_logp).sum() + (stats.kl * case.g_kl).sum()
        first, second = (torch.autograd.grad(loss, policy, retain_graph=True)[0] for _ in range(2))
        assert_same_bits("second backward", second, first)

    def test_gradients_reach_the_producer(self):
        # The logits of a real model are a view of a product; the gradient must arrive beyond both.
        case = self.case((2, 3), 67, ignore_every=99)
        hidden, weight = (noise(*s, seed=i, device=self.backend.device) for i, s in enumerate([(2, 4, 8), (67, 8)], 20))
        grads = []
        for op in (self.backend, token_stats_reference):
            leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
            stats = op((leaves[0] @ leaves[1].T)[:, :-1], case.ref, case.labels)
            grads.append(torch.autograd.grad((stats.logp * case.g_logp + stats.kl * case.g_kl).sum(), leaves))
        for what, got, expected in zip(("hidden", "weight"), *grads, strict=True):
            slack = torch.full_like(expected, 1e-5, dtype=fp64)
            assert_within_budget(f"gradient of {what}", got, expected, expected, slack)

    # --- surroundings ------------------------------------------------------------------------------------------------------

    def test_poisoned_memory(self):
        # Every output is written in full, also those of ignored rows and those beyond vocab_size.
        for what, case in (
            ("fp32", self.case((5,), 300, extras=EXTRAS)),
            ("vocab_size", self.case((5,), 300, dtype=bf16, widths=(310, 311), vocab_size=300, extras=EXTRAS)),
            ("all ignored", self.case((3,), 67, ignore_every=1, extras=EXTRAS)),
        ):
            with poisoned_memory():
                assert torch.empty(1, device=self.backend.device).isnan().all(), "the test itself is wrong"
                got = run(self.backend, case)
            compare(got, case, what)

    def test_autocast(self):
        # Autocast chooses the dtype of matrix products; it must not reach the arithmetic in here.
        device = torch.device(self.backend.device).type

        def op(*args: Any, **options: Any) -> TokenStats:
            with torch.autocast(device, dtype=bf16):
                return self.backend(*args, **options)

        check(op, self.case((4,), 515, extras=EXTRAS), "fp32")
        check(op, self.case((4,), 515, dtype=bf16, ref_dtype=fp32), "bf16")

    def test_default_dtype(self):
        # Fresh tensors inside have their own dtypes, whatever the user's default is.
        before = torch.get_default_dtype()
        case = self.case((4,), 300, extras=EXTRAS)
        try:
            for dtype in (fp64, bf16):
                torch.set_default_dtype(dtype)
                got = run(self.backend, case)
                torch.set_default_dtype(before)
                compare(got, case, f"default {dtype}")
        finally:
            torch.set_default_dtype(before)

    # --- anything else -----------------------------------------------------------------------------------------------------

    def test_anything(self):
        """Shapes, strides, dtypes, masks and options that nobody thought of."""
        hypothesis = pytest.importorskip("hypothesis")
        st = hypothesis.strategies
        examples = max(3, int(hypothesis.settings().max_examples * self.backend.examples))
        dtypes, layouts = st.sampled_from([fp32, fp16, bf16]), st.sampled_from(list(LAYOUTS))

        @hypothesis.settings(max_examples=examples, deadline=None)
        @hypothesis.given(st.data())
        def check_anything(data):
            lead = data.draw(st.sampled_from([(1,), (4,), (2, 3), (3, 1, 2)]), label="lead")
            V = data.draw(st.one_of(st.integers(1, 70), st.sampled_from(BOUNDARY_WIDTHS), st.integers(1, 1300)), label="V")
            extras = data.draw(st.lists(st.sampled_from(EXTRAS), unique=True), label="extras")
            ref = data.draw(st.integers(0, 5), label="ref") > 0
            extra = [data.draw(st.integers(0, 9), label="padding") for _ in range(2)]
            case = self.case(
                lead,
                V,
                dtype=data.draw(dtypes, label="dtype"),
                ref_dtype=data.draw(dtypes, label="ref_dtype"),
                layout=data.draw(layouts, label="layout"),
                ref_layout=data.draw(layouts, label="ref_layout"),
                widths=(V + extra[0], V + extra[1]),
                vocab_size=V,
                ref=ref,
                used=data.draw(st.sampled_from([("logp",), ("kl",), ("logp", "kl")][: 3 if ref else 1]), label="used"),
                ignore_every=data.draw(st.integers(1, 7), label="ignore_every"),
                seed=data.draw(st.integers(0, 1000), label="seed"),
                spread=data.draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]), label="spread"),
                distance=data.draw(st.sampled_from([0.0, 1e-3, 0.5, 10.0]), label="distance"),
                labels_dtype=data.draw(st.sampled_from([torch.int32, torch.int64]), label="labels_dtype"),
                temperature=data.draw(st.sampled_from([1.0, 1.0, 0.3, 2.0]), label="temperature"),
                extras=tuple(name for name in extras if ref or name != "ref_entropy"),
            )
            mask = data.draw(st.sampled_from(["none", "both", "reference", "policy"]), label="mask")
            if mask != "none" and V > 1:
                keep = data.draw(st.integers(0, V - 1), label="keep")  # a row of nothing but -inf is no distribution
                step = data.draw(st.integers(1, 5), label="step")
                columns = [v for v in range(0, V, step) if v != keep]
                for tensor in (case.policy if mask != "reference" else None, case.ref if mask != "policy" else None):
                    if tensor is not None:
                        tensor[..., columns] = -INF
            check(self.backend, case)

        check_anything()


class FusedTokenStatsContract(TokenStatsContract):
    """What every backend promises beyond the naive one."""

    # --- KL near zero ------------------------------------------------------------------------------------------------------

    def check_tiny(self, what: str, policy: Tensor, ref: Tensor, bound: float = TINY_KL_RELATIVE, **options: Any) -> Tensor:
        policy, ref = policy.to(self.backend.device), ref.to(self.backend.device)
        exact = kl_from_delta(policy, ref, **options)
        labels = torch.zeros(policy.shape[:-1], dtype=torch.int64, device=self.backend.device)
        kl = self.backend(policy, ref, labels, **options).kl
        assert (kl >= 0).all(), f"{what}: KL {kl.min().item()} is negative"
        assert_relative(f"{what}: KL", kl, exact, bound)
        return exact

    @pytest.mark.parametrize("distance", [1e-5 * 8**i for i in range(6)])
    def test_tiny_kl(self, distance):
        # True KL from 5e-11 to 0.5, where subtracting two log-sum-exps leaves an error of 1e-6 and either sign.
        z = 3.0 * noise(3, 2999, seed=1)
        exact = self.check_tiny("plain", z + distance * noise(3, 2999, seed=2), z)
        assert (exact > 3e-11).all() and (exact < 2).all(), "the test itself is wrong"

    @pytest.mark.parametrize("temperature", [0.7, 2.0])
    def test_tiny_kl_with_temperature(self, temperature):
        # x / temperature and z / temperature must not be rounded before they are subtracted.
        z = 3.0 * noise(3, 2999, seed=1)
        self.check_tiny("temperature", z + 1e-4 * noise(3, 2999, seed=2), z, temperature=temperature)

    @pytest.mark.parametrize("shape", ["flat", "peaked", "quiet start", "empty start", "quiet end", "rising", "masked"])
    def test_tiny_kl_of_rows_of_any_shape(self, shape):
        # Where the mass lies must not matter: any pivot taken from the first columns sees little of it in some of these.
        V = 2999
        z = 3.0 * noise(3, V, seed=1)
        if shape == "flat":
            z = 0.01 * z
        elif shape == "peaked":  # the label of a trained model: one token has 99 %
            z[:, 1700] = torch.logsumexp(z, -1) + math.log(99.0)
        elif shape == "quiet start":
            z[:, : V // 2] -= 60.0
        elif shape == "empty start":  # below any float32 probability: all that a first guess could rest on is worthless
            z[:, : V // 2] -= 200.0
        elif shape == "quiet end":
            z[:, V // 2 :] -= 60.0
        elif shape == "rising":
            z += torch.linspace(0.0, 80.0, V)
        for distance in (1e-4, 1e-2):
            x = z + distance * noise(3, V, seed=2)
            ref = z.clone()
            if shape == "masked":  # the first columns, and some everywhere, exist for neither
                x[:, :1100], ref[:, :1100] = -INF, -INF
                x[:, ::3], ref[:, ::3] = -INF, -INF
            self.check_tiny(f"distance {distance}", x, ref)

    @pytest.mark.parametrize("column", [0, 1500, 2998])
    @pytest.mark.parametrize("change", [5.0, -5.0, 20.0, -20.0])
    def test_one_changed_token(self, change, column):
        # A single far column among thousands of equal ones: the far terms must not drown the near ones, nor the reverse.
        z = 3.0 * noise(2, 2999, seed=1)
        z[:, column] = 0.0
        x = z.clone()
        x[:, column] += change
        self.check_tiny("one token", x, z)

    @pytest.mark.parametrize("dtype", [fp16, bf16], ids=SHORT.get)
    def test_tiny_kl_of_half_precision_logits(self, dtype):
        # The logits as they are, rounded, are the input: a few tokens one unit apart make a tiny, exact KL.
        z = (3.0 * noise(3, 2999, seed=1)).to(dtype)
        x = z.clone()
        x[:, ::100] *= 1.0 + torch.finfo(dtype).eps
        self.check_tiny("half precision", x, z)

    @pytest.mark.parametrize("shift", [1.0, -1.0])
    def test_tiny_kl_under_a_shift(self, shift):
        # The shift costs bits of x - z before any pivot can be subtracted, so the promise is 1e-3 here.
        z = 3.0 * noise(3, 2999, seed=1)
        self.check_tiny("shift", z + shift + 1e-5 * noise(3, 2999, seed=2), z, bound=1e-3)

    @pytest.mark.parametrize("shift", [700.0, -700.0])
    def test_kl_under_a_large_shift(self, shift):
        # All of delta is the shift: exp(delta) overflows, and the plain form subtracts 700 from 700.
        z = (3.0 * noise(3, 2999, seed=1) * 64).round() / 64
        x = z + (0.5 * noise(3, 2999, seed=2) * 64).round() / 64
        self.check_tiny("large shift", x + shift, z, bound=1e-3)
        check(self.backend, self.case((3,), 300).with_(policy=x[:, :300].to(self.backend.device) + shift))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_kl_is_never_negative(self, dtype):
        # Not by one rounding, at any distance: a KL below zero has no logarithm, no root and no excuse.
        for i, distance in enumerate((1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0)):
            rows = max(2, self.backend.rows // 20)
            case = self.case((rows,), 515, dtype=dtype, ref_dtype=fp32, distance=distance, seed=10 * i)
            kl = self.backend(case.policy, case.ref, case.labels).kl
            assert (kl >= 0).all(), f"distance {distance}: KL {kl.min().item()} is negative"

    def test_gradient_near_equality(self):
        # p - q with delta ~ 1e-5, of the KL alone. Best float32 code loses 1.2 % here, a log-sum-exp rounded between the passes
        # 2.7 to 4.4 % (both simulated). Logits of unit spread: larger ones lose more by rounding x * log2(e) itself.
        z = noise(3, 2999, seed=1)
        x = z + 1e-5 * noise(3, 2999, seed=2)
        labels = torch.zeros(3, dtype=torch.int64, device=self.backend.device)
        x, z, one = (t.to(self.backend.device) for t in (x, z, torch.ones(3)))
        case = Case(x, z, labels, g_kl=one)
        got, exact = run(self.backend, case).grad.double(), run(token_stats_reference, case.double()).grad
        error = (got - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert (error <= NEAR_EQUAL_GRAD_RELATIVE).all(), f"relative error {error.tolist()} of the gradient p - q"

    # --- the same bits, always ---------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    def test_repeatable(self, dtype):
        case = self.case((6,), 1031, dtype=dtype, extras=EXTRAS)
        assert_same_outcome("second run", run(self.backend, case), run(self.backend, case))

    @pytest.mark.parametrize("V", [1024, 1031])
    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    def test_a_row_does_not_see_its_neighbours(self, dtype, V):
        # Rows added, removed or permuted change no bit of a row. An odd V moves rows to other alignments as well.
        case = self.case((7,), V, dtype=dtype, extras=EXTRAS)
        whole = run(self.backend, case)

        def picked(index: Tensor | slice) -> Outcome:
            stats = TokenStats(*(getattr(whole.stats, name)[index] for name in TokenStats._fields))
            return Outcome(stats, whole.grad[index])

        device = self.backend.device
        for what, index in (
            ("permuted", torch.tensor([3, 6, 5, 0, 2, 1, 4], device=device)),
            ("some", torch.tensor([4, 1], device=device)),
            ("one", torch.tensor([3], device=device)),
            ("a slice", slice(1, 4)),
            ("many", torch.arange(self.backend.rows, device=device) % 7),
        ):
            assert_same_outcome(what, run(self.backend, case.rows(index)), picked(index))

    @pytest.mark.parametrize("V", [1031, 1032])
    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    def test_strides_change_no_bit(self, layout, dtype, V):
        # A row's bits depend on that row, V, the dtypes, and for Triton on whether rows start at 16-byte boundaries, which lets
        # a thread load 16 bytes at once: not on where else in memory they are. Contiguous rows of 1032 are all aligned so, rows
        # of 1031 are not; a pitch of 1036 or 1037 makes it the other way round.
        def aligned(case: Case) -> bool:
            logits = (case.policy, case.ref)
            return all(t.data_ptr() % 16 == 0 and all(s * t.element_size() % 16 == 0 for s in t.stride()[:-1]) for t in logits)

        plain = self.case((2, 2), V, dtype=dtype, extras=("entropy",))
        expected = run(self.backend, plain)
        for what, layouts in (("both", {"layout": layout}), ("reference", {"ref_layout": layout})):
            case = self.case((2, 2), V, dtype=dtype, extras=("entropy",), **layouts)
            got = run(self.backend, case)
            if self.backend.name != "triton" or aligned(case) == aligned(plain):
                assert_same_outcome(f"{what} {layout}", got, expected)
            else:
                compare(got, case, f"{what} {layout}")

    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    def test_a_row_alone_is_a_row_among_others(self, dtype):
        # The first row of an unaligned batch is aligned itself, but must not be read in another way for that.
        case = self.case((3,), 1031, dtype=dtype, extras=("entropy",), ignore_every=99)
        whole = run(self.backend, case)
        for i in range(3):
            alone = case.with_(
                policy=case.policy[i : i + 1], ref=case.ref[i : i + 1], labels=case.labels[i : i + 1],
                g_logp=case.g_logp[i : i + 1], g_kl=case.g_kl[i : i + 1],
            )  # fmt: skip
            stats = TokenStats(*(None if stat is None else stat[i : i + 1] for stat in whole.stats))
            assert_same_outcome(f"row {i}", run(self.backend, alone), Outcome(stats, whole.grad[i : i + 1]))

    # --- torch.compile -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("used", [("logp",), ("logp", "kl")], ids="-".join)
    def test_traces_with_torch_compile(self, used):
        # Forward and backward, without a graph break; the label check on a CPU must not need one either.
        torch._dynamo.reset()
        compiled = torch.compile(self.backend, fullgraph=True, backend=self.backend.compiler)
        case = self.case((2, 3), 300, layout="shifted", used=used, extras=EXTRAS)
        compare(run(compiled, case), case, "compiled")
        case = self.case((4,), 131, used=used, ref=False, extras=POLICY_EXTRAS)
        compare(run(compiled, case), case, "compiled, without reference")

    # --- gradients in place ------------------------------------------------------------------------------------------------

    def in_place(self, case: Case, produce: Callable[[Tensor], Tensor], in_place: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """(gradient at a leaf, the logits that `produce` made of it, their bits before backward)."""
        leaf = case.policy.detach().clone().requires_grad_()
        logits = produce(leaf)
        before = logits.detach().clone()
        stats = self.backend(logits, case.ref, case.labels, inplace_backward=in_place, **case.options)
        (stats.logp * case.g_logp + stats.kl * case.g_kl).sum().backward()
        return leaf.grad, logits.detach(), before

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("padded", [False, True], ids=["whole", "vocab_size"])
    def test_in_place_gradient(self, dtype, padded):
        # The same bits, written over the logits; adding 0 is a producer that does not need its output.
        options = {"widths": (310, 305), "vocab_size": 300} if padded else {}
        case = self.case((5,), 300, dtype=dtype, ref_dtype=fp32, **options)
        expected, untouched, before = self.in_place(case, lambda leaf: leaf + 0, in_place=False)
        assert_same_bits("logits after an ordinary backward", untouched, before)
        grad, logits, _ = self.in_place(case, lambda leaf: leaf + 0)
        assert_same_bits("gradient", grad, expected)
        assert_same_bits("the logits hold the gradient", logits, expected)

    def test_in_place_gradient_is_announced(self):
        # The version counter is what autograd looks at.
        case = self.case((3,), 131)
        leaf = case.policy.detach().requires_grad_()
        logits = leaf + 0
        stats = self.backend(logits, case.ref, case.labels, inplace_backward=True)
        versions = logits._version, case.ref._version, case.labels._version
        (stats.logp * case.g_logp + stats.kl * case.g_kl).sum().backward()
        assert logits._version > versions[0], "the logits changed, their version did not"
        assert (case.ref._version, case.labels._version) == versions[1:], "only the policy's logits may change"

    def test_in_place_gradient_once(self):
        # After the first backward the logits are gone; a second one must not read the gradient as logits.
        case = self.case((3,), 131)
        leaf = case.policy.detach().requires_grad_()
        stats = self.backend(leaf + 0, case.ref, case.labels, inplace_backward=True)
        loss = (stats.logp * case.g_logp + stats.kl * case.g_kl).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError):
            loss.backward()

    @pytest.mark.parametrize("other", ["same op in place", "same op", "square", "sum"])
    def test_in_place_gradient_beside_another_use(self, other):
        # Whoever also needs the logits gets them, or an error; never a gradient in their place.
        case = self.case((3,), 131, ignore_every=99)

        def gradient(op: Callable[..., TokenStats], **in_place: bool) -> Tensor:
            leaf = case.policy.detach().clone().requires_grad_()
            logits = leaf + 0
            stats = op(logits, case.ref, case.labels, **in_place)
            loss = (stats.logp * case.g_logp + stats.kl * case.g_kl).sum()
            if other == "square":
                loss = loss + (logits * logits).sum()
            elif other == "sum":
                loss = loss + logits.sum()
            else:
                more = op(logits, case.ref, case.labels, **(in_place if other == "same op in place" else {}))
                loss = loss + 3 * more.logp.sum()
            loss.backward()
            return leaf.grad

        self.right_or_refused(lambda: gradient(self.backend, inplace_backward=True), gradient(token_stats_reference))

    def right_or_refused(self, gradient: Callable[[], Tensor], expected: Tensor) -> None:
        """An error is fine, the right gradient is fine; a wrong gradient is the one thing that must not happen."""
        try:
            got = gradient()
        except RuntimeError as error:
            assert re.search("in-?place|modified", str(error)), f"refused for another reason: {error}"
            return
        assert_within_budget("gradient", got, expected, expected, torch.full_like(expected, 1e-4, dtype=fp64))

    @pytest.mark.parametrize("producer", ["tanh", "exp", "softmax", "sigmoid", "softcap"])
    def test_in_place_gradient_of_a_producer_that_needs_its_output(self, producer):
        # These derivatives are formulas of their output, which is overwritten: autograd must notice.
        make = {
            "tanh": torch.tanh,
            "exp": lambda x: (x / 4).exp(),
            "softmax": lambda x: x.softmax(-1),
            "sigmoid": torch.sigmoid,
            "softcap": lambda x: 30 * torch.tanh(x / 30),  # needs tanh's output, which is not the logits: must be right
        }[producer]
        case = self.case((3,), 131, ignore_every=99)

        def gradient(op: Callable[..., TokenStats], **in_place: bool) -> Tensor:
            leaf = case.policy.detach().clone().requires_grad_()
            stats = op(make(leaf), case.ref, case.labels, **in_place)
            (stats.logp * case.g_logp + stats.kl * case.g_kl).sum().backward()
            return leaf.grad

        expected = gradient(token_stats_reference)
        if producer == "softcap":
            got = gradient(self.backend, inplace_backward=True)
            assert_within_budget("gradient", got, expected, expected, torch.full_like(expected, 1e-5, dtype=fp64))
        else:
            self.right_or_refused(lambda: gradient(self.backend, inplace_backward=True), expected)

    @pytest.mark.parametrize("view", ["matrix product", "shifted", "reshaped", "leaf"])
    def test_in_place_gradient_of_a_model(self, view):
        # A product does not need its output: this must work, it is what the option is for. So must a view of one.
        case = self.case((2, 3), 67, ignore_every=4)
        hidden, weight = (noise(*s, seed=i, device=self.backend.device) for i, s in enumerate([(2, 4, 8), (67, 8)], 20))

        def gradients(op: Callable[..., TokenStats], **in_place: bool) -> tuple[Tensor, ...]:
            leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
            if view == "leaf":
                leaves = [(hidden @ weight.T)[:, :-1].contiguous().requires_grad_()]
                logits = leaves[0]
            elif view == "shifted":
                logits = (leaves[0] @ leaves[1].T)[:, :-1]
            else:
                logits = leaves[0][:, :-1] @ leaves[1].T
            ref, labels, g_logp, g_kl = case.ref, case.labels, case.g_logp, case.g_kl
            if view == "reshaped":
                logits, ref = logits.reshape(6, 67), ref.reshape(6, 67)
                labels, g_logp, g_kl = labels.reshape(6), g_logp.reshape(6), g_kl.reshape(6)
            stats = op(logits, ref, labels, **in_place)
            (stats.logp * g_logp + stats.kl * g_kl).sum().backward()
            return tuple(leaf.grad for leaf in leaves)

        for got, expected in zip(gradients(self.backend, inplace_backward=True), gradients(token_stats_reference), strict=True):
            assert_within_budget("gradient", got, expected, expected, torch.full_like(expected, 1e-5, dtype=fp64))

    def test_in_place_gradient_stays_in_its_columns(self):
        # The padding of a row, and the rows around a slice of rows, belong to somebody else.
        V, sentinel = 131, 12345.0
        case = self.case((3,), V)
        leaf = torch.full((6, V + 13), sentinel, device=self.backend.device)
        leaf[2:5, 5 : 5 + V] = case.policy
        buffer = leaf.requires_grad_() + 0
        logits = buffer[2:5, 5 : 5 + V]
        stats = self.backend(logits, case.ref, case.labels, inplace_backward=True)
        (stats.logp * case.g_logp + stats.kl * case.g_kl).sum().backward()
        expected = run(self.backend, case).grad
        assert_same_bits("gradient", leaf.grad[2:5, 5 : 5 + V], expected)
        outside = torch.ones_like(buffer, dtype=torch.bool)
        outside[2:5, 5 : 5 + V] = False
        assert_exactly_zero("gradient outside", leaf.grad[outside])
        around = buffer.detach()[outside]
        assert (around == sentinel).all(), f"{int((around != sentinel).sum())} elements outside the logits were written"

    def test_in_place_gradient_of_rows_that_share_memory(self):
        # Two rows at one address have two gradients: refuse, or write them elsewhere.
        case = self.case((3,), 131, ignore_every=99)

        def gradient(op: Callable[..., TokenStats], **in_place: bool) -> Tensor:
            leaf = case.policy[:1].detach().clone().requires_grad_()
            stats = op((leaf + 0).expand(3, -1), case.ref, case.labels, **in_place)
            (stats.logp * case.g_logp + stats.kl * case.g_kl).sum().backward()
            return leaf.grad

        expected = gradient(token_stats_reference)
        try:
            got = gradient(self.backend, inplace_backward=True)
        except (RuntimeError, ValueError):
            return
        assert_within_budget("gradient", got, expected, expected, torch.full_like(expected, 1e-4, dtype=fp64))

    def test_in_place_gradient_where_the_reference_is_the_policy(self):
        # At step 0 people pass the policy's own logits as the reference: both are read before either is written, or it raises.
        case = self.case((3,), 131, ignore_every=99)

        def gradient(op: Callable[..., TokenStats], **in_place: bool) -> Tensor:
            leaf = case.policy.detach().clone().requires_grad_()
            logits = leaf + 0
            stats = op(logits, logits.detach(), case.labels, **in_place)
            (stats.logp * case.g_logp + stats.kl * case.g_kl).sum().backward()
            return leaf.grad

        self.right_or_refused(lambda: gradient(self.backend, inplace_backward=True), gradient(token_stats_reference))

    def test_in_place_changes_nothing_in_the_forward(self):
        case = self.case((5,), 300, dtype=bf16, extras=EXTRAS)
        before = case.policy.clone()
        with torch.no_grad():
            got = self.backend(case.policy, case.ref, case.labels, inplace_backward=True, **case.options)
        assert_same_bits("logits", case.policy, before)
        for name in TokenStats._fields:
            assert_same_bits(name, getattr(got, name), getattr(run(self.backend, case).stats, name))

    def test_in_place_gradient_under_torch_compile(self):
        # A compiled graph may copy, but not be silently wrong.
        torch._dynamo.reset()
        case = self.case((3,), 131)

        def loss(leaf: Tensor) -> Tensor:
            stats = self.backend(leaf * 1.0, case.ref, case.labels, inplace_backward=True)
            return (stats.logp * case.g_logp + stats.kl * case.g_kl).sum()

        leaf = case.policy.detach().requires_grad_()
        torch.compile(loss, fullgraph=True, backend=self.backend.compiler)(leaf).backward()
        assert_same_bits("gradient", leaf.grad, run(self.backend, case).grad)

    # --- double backward ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("in_place", [False, True], ids=["", "in-place"])
    def test_double_backward_is_refused(self, in_place):
        # Clearly, and with what to use instead; a gradient of a gradient that silently lacks a term is worse than none.
        case = self.case((3,), 67, ignore_every=99)
        policy = case.policy.detach().requires_grad_()
        stats = self.backend(policy * 1.0, case.ref, case.labels, inplace_backward=in_place)

        def twice() -> None:
            (grad,) = torch.autograd.grad((stats.logp + stats.kl).sum(), policy, create_graph=True)
            grad.pow(2).sum().backward()

        with pytest.raises((RuntimeError, NotImplementedError), match="reference"):
            twice()


class Float64Contract(TokenStatsContract):
    """Backends that accept float64 keep it throughout."""

    def test_float64(self):
        check(self.backend, self.case((6,), 515, dtype=fp64, extras=EXTRAS))
        check(self.backend, self.case((6,), 515, dtype=fp64, ref=False, extras=POLICY_EXTRAS), "without reference")
        check(self.backend, self.case((2, 3), 515, dtype=fp64, layout="shifted", temperature=0.7), "shifted")

    @pytest.mark.parametrize(("dtype", "ref_dtype"), [(fp64, fp32), (fp32, fp64), (fp64, bf16)], ids=SHORT.get)
    def test_float64_beside_another(self, dtype, ref_dtype):
        check(self.backend, self.case((6,), 131, dtype=dtype, ref_dtype=ref_dtype, extras=EXTRAS))

    @pytest.mark.parametrize("used", [("logp",), ("kl",), ("logp", "kl")], ids="-".join)
    def test_gradcheck(self, used):
        # Against finite differences, which know nothing of our formula; one row is ignored, the temperature is not 1.
        case = self.case((4,), 7, dtype=fp64, used=used)
        assert case.ignored.any(), "the test itself is wrong"
        filled = case.policy.masked_fill(case.ignored.unsqueeze(-1), 0.0)  # finite differences of NaN are NaN

        def outputs(policy: Tensor) -> tuple[Tensor, ...]:
            stats = self.backend(policy, case.ref, case.labels, temperature=0.8)
            return tuple(getattr(stats, name) for name in used)

        assert torch.autograd.gradcheck(outputs, filled.requires_grad_())


# --- labels that are no labels ---------------------------------------------------------------------------------------------

# One too large, far too large, negative, near the default ignore_index, and two that 32 bits mistake for 3 and for -100.
BAD_LABELS = [67, 99, -1, -99, -101, (1 << 32) + 3, (1 << 32) - 100, -(1 << 63), (1 << 63) - 1]


class RefusesBadLabels(TokenStatsContract):
    """On a CPU a bad label is an error, at no cost."""

    @pytest.mark.parametrize("bad", BAD_LABELS)
    def test_bad_label(self, bad):
        case = self.case((4,), 67)
        labels = case.labels.clone()
        labels[1] = bad
        with pytest.raises(ValueError, match=r"(?i)label"):
            self.backend(case.policy, case.ref, labels)

    def test_bad_label_by_option(self):
        # -100 is a bad label where something else is ignored; a label is bad that only the padding would hold.
        case = self.case((4,), 67)
        with pytest.raises(ValueError, match="-100"):
            self.backend(case.policy, case.ref, case.labels, ignore_index=-1)
        labels = case.labels.clone()
        labels[1] = 60
        with pytest.raises(ValueError, match="60"):
            self.backend(case.policy, case.ref, labels, vocab_size=60)

    def test_bad_label_checked_by_request(self):
        case = self.case((4,), 67)
        check(self.backend, case.having(check_labels=True))
        with pytest.raises(ValueError, match=r"(?i)label"):
            self.backend(case.policy, case.ref, torch.full_like(case.labels, 67), check_labels=True)


class PoisonsBadLabels(TokenStatsContract):
    """Where a check would synchronise, a bad label makes its row NaN, and touches nothing else."""

    @pytest.mark.parametrize("bad", BAD_LABELS)
    def test_bad_label(self, bad):
        case = self.case((5,), 67, ignore_every=5)
        bad_row = 1
        labels = case.labels.clone()
        labels[bad_row] = bad
        good = run(self.backend, case)
        got = run(self.backend, case.with_(labels=labels))
        others = torch.arange(5, device=self.backend.device) != bad_row
        for name in ("logp", "ref_logp", "kl"):
            values = getattr(got.stats, name)
            assert values[bad_row].isnan(), f"{name} of the bad row is {values[bad_row].item()}"
            assert_same_bits(f"{name} of other rows", values[others], getattr(good.stats, name)[others])
        assert got.grad[bad_row].isnan().all(), "the gradient of the bad row is not NaN"
        assert_same_bits("gradient of other rows", got.grad[others], good.grad[others])

    @pytest.mark.parametrize("used", [("logp",), ("kl",)], ids="-".join)
    def test_bad_label_under_one_output(self, used):
        # Even the gradient of the KL alone, which does not depend on the label: a row is right or it is NaN.
        case = self.case((3,), 67, used=used, ignore_every=99)
        labels = case.labels.clone()
        labels[1] = 67
        grad = run(self.backend, case.with_(labels=labels)).grad
        assert grad[1].isnan().all() and grad[[0, 2]].isfinite().all(), "only the gradient of the bad row is NaN"

    def test_bad_label_in_place(self):
        # The gradient is written by column: a column out of range must not become an address out of range.
        V, sentinel = 67, 12345.0
        case = self.case((4,), V, ignore_every=99)
        leaf = torch.full((6, V + 5), sentinel, device=self.backend.device)
        leaf[1:5, :V] = case.policy
        buffer = leaf.requires_grad_() + 0
        labels = case.labels.clone()
        labels[1], labels[2] = V + 2, -3
        stats = self.backend(buffer[1:5, :V], case.ref, labels, inplace_backward=True)
        (stats.logp * case.g_logp + stats.kl * case.g_kl).sum().backward()
        values = buffer.detach()
        assert (values[:, V:] == sentinel).all(), "the padding was written"
        assert (values[[0, 5]] == sentinel).all(), "a neighbouring row was written"
        assert leaf.grad[[2, 3], :V].isnan().all(), "the gradient of the bad rows is not NaN"
        assert leaf.grad[[1, 4], :V].isfinite().all(), "the gradient of the good rows is not finite"

    def test_bad_label_by_option(self):
        # A label is bad that only the padding would hold.
        case = self.case((4,), 60, widths=(67, 67), vocab_size=60)
        labels = case.labels.clone()
        labels[1] = 63
        got = run(self.backend, case.with_(labels=labels))
        assert got.stats.logp[1].isnan() and got.grad[1, :60].isnan().all(), "the row is not NaN"
        assert got.stats.logp[[0, 2, 3]].isfinite().all(), "another row is not finite"

    def test_bad_label_checked_by_request(self):
        case = self.case((4,), 67)
        check(self.backend, case.having(check_labels=True))
        labels = case.labels.clone()
        labels[1] = 99
        with pytest.raises(ValueError, match="99"):
            self.backend(case.policy, case.ref, labels, check_labels=True)


# --- the Triton kernels ----------------------------------------------------------------------------------------------------


class TritonContract(FusedTokenStatsContract, PoisonsBadLabels):
    """What only the Triton kernels promise: their launchers allocate through one name, and float64 is not theirs."""

    @pytest.fixture
    def fresh_tensors(self, monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
        """Makes every fresh tensor of the launchers start as NaN (integers: the largest); lists their shapes."""
        launchers = importlib.import_module("fused_tdpo.kernels.token_stats")
        original, shapes = launchers.empty, []

        def poisoned(*args: Any, **options: Any) -> Tensor:
            tensor = original(*args, **options)
            shapes.append(tensor.shape)
            return tensor.fill_(NAN if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        monkeypatch.setattr(launchers, "empty", poisoned)
        return shapes

    @pytest.mark.parametrize(
        "options",
        [
            {"extras": EXTRAS},
            {"dtype": bf16, "ref_dtype": fp32, "layout": "offset3"},
            {"widths": (310, 305), "vocab_size": 300, "dtype": fp16},  # the columns beyond vocab_size are outputs too
            {"ref": False, "extras": POLICY_EXTRAS},
            {"ignore_every": 1, "extras": EXTRAS},  # nothing but ignored rows
            {"used": ("kl",)},
            {"temperature": 0.7, "labels_dtype": torch.int32},
        ],
        ids=["extras", "mixed", "vocab-size", "no-reference", "all-ignored", "kl-only", "temperature"],
    )
    def test_fresh_tensors_are_written_in_full(self, options, fresh_tensors):
        check(self.backend, self.case((5,), 300, **options))
        assert fresh_tensors, "no launcher allocated through its module's `empty`: this test saw nothing"

    def test_fresh_tensors_of_long_rows_are_written_in_full(self, fresh_tensors):
        # Long enough for several blocks, or for a row split between programs, with their partial results.
        check(self.backend, self.case((3,), 2999, dtype=bf16, extras=EXTRAS))
        assert fresh_tensors, "no launcher allocated through its module's `empty`: this test saw nothing"

    def test_in_place_gradient_needs_no_fresh_logits(self, fresh_tensors):
        # "With inplace_backward nothing of size N*V at all"; without it the gradient, once.
        case = self.case((5,), 300)
        size = case.policy.numel()
        self.in_place(case, lambda leaf: leaf + 0)
        assert not [shape for shape in fresh_tensors if shape.numel() >= size], f"allocated {fresh_tensors}"
        fresh_tensors.clear()
        self.in_place(case, lambda leaf: leaf + 0, in_place=False)
        assert len([shape for shape in fresh_tensors if shape.numel() >= size]) <= 1, f"allocated {fresh_tensors}"

    @pytest.mark.parametrize(("dtype", "ref_dtype"), [(fp64, fp64), (fp64, fp32), (fp32, fp64)], ids=SHORT.get)
    def test_float64_is_refused(self, dtype, ref_dtype):
        case = self.case((3,), 67, dtype=dtype, ref_dtype=ref_dtype)
        with pytest.raises((TypeError, ValueError), match="float64") as raised:
            self.backend(case.policy, case.ref, case.labels)
        assert re.search("torch|reference", str(raised.value)), f"no next step: {raised.value}"
