"""The one-pass engine, handed objectives of every form: exact gradients, matrix products counted, memory, misdeclarations.

What the losses make of it is in test_linear_losses.py. Objectives here are functions of the sums of a pair that no loss of the
package has, so that each form is met, also those that only later losses need. float64: nothing hides in rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from allocations import counted_allocations
from fused_tdpo import DPOLoss, LinearDPOLoss, LinearTDPOLoss, LMHead, TDPOLoss, _chunks, linear_token_stats
from fused_tdpo._chunks import plan_pairs, split
from fused_tdpo._projection import row_bytes
from fused_tdpo.functions.linear_token_stats import LinearOptions
from fused_tdpo.functions.one_pass import Job, Objective, OnePassFunction, Sums
from fused_tdpo.pair_losses import PAIR_FORMS, PAIR_LOSSES, Form, SequenceSums
from fused_tdpo.reference import token_stats_reference
from fused_tdpo.types import EXTRAS
from products import counted_products
from tolerances import assert_exactly_zero, assert_same_bits, assert_within_budget

IGNORE = -100
fp64 = torch.float64


def assert_equal(what: str, got: Tensor | None, expected: Tensor | None) -> None:
    """float64 against float64: only the order of summation may differ."""
    if got is None or expected is None:
        assert expected is None or not expected.any(), f"{what} is missing"
        assert got is None or not got.any(), f"{what} should not be there"
        return
    slack = torch.full_like(expected, 1e-12 * (1e-3 + float(expected.detach().abs().max())) if expected.numel() else 0.0)
    assert_within_budget(what, got, expected, expected, slack.detach())


# ----------------------------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 10, 11, 100])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (0, 1), (3, 10), (0, 10), (2, 102)])
def test_split(start: int, stop: int, rows: int):
    pieces = split(start, stop, rows)
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(start, stop))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert all(0 < length <= rows for length in lengths)
    assert len(pieces) == -(-(stop - start) // rows), "more pieces than it takes"
    assert not lengths or max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("seed", range(30))
def test_plan(seed: int):
    gen = torch.Generator().manual_seed(seed)
    P, rows = int(torch.randint(1, 30, (), generator=gen)), int(torch.randint(1, 40, (), generator=gen))
    lengths = [tuple(pair) for pair in torch.randint(0, 25, (P, 2), generator=gen).tolist()]
    plan = plan_pairs(lengths, rows)
    assert sorted(plan.pairs) == list(range(P))
    pair, row = 0, 0
    for group in plan.groups:
        members = [lengths[p] for p in plan.pairs[group.pairs]]
        assert (group.pairs.start, group.rows.start) == (pair, row), "groups follow one another"
        assert members
        assert group.rows.stop - group.rows.start == sum(map(sum, members))
        assert group.is_long == (group.rows.stop - group.rows.start > rows)
        assert not group.is_long or len(members) == 1
        pair, row = group.pairs.stop, group.rows.stop
    assert pair == P
    assert sorted(plan.groups, key=lambda group: not group.is_long) == plan.groups, "long ones first: the first needs no buffer"
    full = [group.rows.stop - group.rows.start for group in plan.groups if not group.is_long]
    assert sum(size <= rows // 2 for size in full) <= 1, "two half-empty groups are one"


def test_budget():
    """At least a row; as many as fit; defaults by what is done with them."""
    bf16, fp32 = torch.bfloat16, torch.float32
    assert row_bytes(32_000, bf16, bf16, None) == 2 * 32_000 * 2
    assert row_bytes(32_000, bf16, None, None) == 32_000 * 2
    assert row_bytes(32_000, bf16, bf16, fp32) == 32_000 * (4 + 4 + 2), "a gradient that cannot be written over the logits"
    assert row_bytes(32_000, bf16, fp32, None) == 32_000 * (2 + 4)
    assert row_bytes(32_000, bf16, fp32, None, both=True) == 32_000 * (2 + 4 + 2)
    assert row_bytes(32_001, bf16, bf16, None) == 2 * 32_008 * 2, "rows start on 16-byte boundaries"
    assert _chunks.rows_per_chunk(1000, 64, True, 999) == 1
    assert _chunks.rows_per_chunk(1000, 64, True, 5999) == 5
    assert _chunks.rows_per_chunk(1000, 4096, True, None) == 4096
    assert _chunks.rows_per_chunk(1000, 896, True, None) == 2048
    assert _chunks.rows_per_chunk(1000, 4096, False, None) == 1024


# ----------------------------------------------------------------------------------------------------------------- objectives


def margin(sums: Sums, pairs: Tensor) -> Tensor:
    """TDPO2's gradient pattern, with a ratio of its own for each pair."""
    r_w, r_l = sums.log_ratio[0] + 0.7 * sums.kl[0].detach(), sums.log_ratio[1] + 0.7 * sums.kl[1]
    return F.softplus(0.3 - 0.2 * (r_w - (1 + pairs) * r_l)) * (1 + pairs)


def sequence(sums: Sums, pairs: Tensor) -> Tensor:
    r = sums.log_ratio + sums.kl
    return F.softplus(-0.3 * r[0]) + torch.tanh(0.1 * r[1]) * (1 + pairs)


def pair(sums: Sums, pairs: Tensor) -> Tensor:
    r = sums.log_ratio + 0.5 * sums.kl
    return torch.cos(0.2 * r[0]) * torch.sin(0.1 * r[1] + pairs) + 0.01 * (r[0] - r[1]) ** 2


def without_kl(sums: Sums, pairs: Tensor) -> Tensor:
    return -F.logsigmoid(0.2 * (sums.log_ratio[0] - sums.log_ratio[1]))


def sft(sums: Sums, pairs: Tensor) -> Tensor:
    """Needs no reference."""
    return -sums.log_ratio[0] / 7 + 0.1 * F.softplus(sums.log_ratio[1])


P = 8
OBJECTIVES = {
    "margin": Objective(margin, "margin", (0.0, 0.7), [1.0 + p for p in range(P)]),
    "sequence": Objective(sequence, "sequence", (1.0, 1.0), []),
    "pair": Objective(pair, "pair", (0.5, 0.5), []),
    "without-kl": Objective(without_kl, "margin", (0.0, 0.0), [1.0] * P),
}

LAYOUTS = {  # counted rows of (chosen, rejected) of each pair
    "uneven": [(5, 2), (9, 1), (3, 7), (4, 6)],
    "one pair": [(11, 6)],
    "an empty side": [(0, 6), (9, 0), (0, 0), (2, 3)],
    "equal": [(3, 3)] * 5,
    "nothing": [(0, 0), (0, 0)],
}


@dataclass(frozen=True)
class Problem:
    """Inputs of the engine: rows of all sequences, chosen ones first, with ignored rows in between."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref: tuple[Tensor | None, Tensor | None, Tensor | None]
    labels: Tensor
    ids: Tensor
    lengths: list[int]
    w: Tensor | None
    v: Tensor

    @property
    def sequences(self) -> list[tuple[int, int]]:
        half = len(self.lengths) // 2
        return [(p, half + p) for p in range(half)]

    @property
    def shape(self) -> tuple[int, int, int]:
        """N, V, D."""
        return sum(self.lengths), *self.weight.shape

    def inputs(self, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """Fresh leaves of hidden, weight, bias, w, v."""
        leaves = (self.hidden, self.weight, self.bias, self.w, self.v)
        return [None if t is None else t.detach().clone().requires_grad_(need) for t, need in zip(leaves, needs, strict=True)]


def make_problem(
    layout: list[tuple[int, int]], *, V: int = 19, D: int = 6, D_ref: int = 5, ref: bool = True, seed: int = 0
) -> Problem:
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=fp64)

    lengths = [w for w, _ in layout] + [rejected for _, rejected in layout]
    labels, ids = [], []
    for s, n in enumerate(lengths):
        row = torch.full((n + 2,), IGNORE)
        row[torch.randperm(n + 2, generator=gen)[:n]] = torch.randint(V, (n,), generator=gen)
        labels.append(row)
        ids.append(torch.full((n + 2,), s))
    y = torch.cat(labels)
    hidden = normal(len(y), D)
    hidden[y == IGNORE] = float("nan")  # not to be read
    reference = (normal(len(y), D_ref), normal(V, D_ref), normal(V)) if ref else (None, None, None)
    return Problem(hidden, normal(V, D), normal(V), reference, y, torch.cat(ids), lengths, normal(len(y)), normal(len(y)))


def options(problem: Problem, rows: int, **changes: Any) -> LinearOptions:
    found = LinearOptions(
        scale=1.0, softcap=0.0, ref_scale=1.0, ref_softcap=0.0, V=len(problem.weight), ignore_index=IGNORE, temperature=1.0,
        dtype=fp64, ref_dtype=fp64, logits_dtype=None, rows=rows, backend="torch",
    )  # fmt: skip
    return found._replace(**changes)


def engine(
    problem: Problem, objective: Objective, rows: int, inputs: list[Tensor | None], **changes: Any
) -> tuple[Tensor | None, ...]:
    job = Job(
        ref=problem.ref, labels=problem.labels, sequence_ids=problem.ids, sequences=problem.sequences, lengths=problem.lengths,
        objective=objective, extras=(), options=options(problem, rows, **changes), check_labels=True,
        grad_mode=torch.is_grad_enabled(),
    )  # fmt: skip
    return OnePassFunction.apply(*inputs, job)


def naive(problem: Problem, objective: Objective, inputs: list[Tensor | None]) -> tuple[Tensor, Sums]:
    """(losses (P,), sums) by autograd through whole logits."""
    hidden, weight, bias, w, v = inputs
    keep = problem.labels != IGNORE
    x = hidden[keep] @ weight.t() + (0 if bias is None else bias)
    z = None if problem.ref[0] is None else problem.ref[0][keep] @ problem.ref[1].t() + problem.ref[2]
    stats = token_stats_reference(x, z, problem.labels[keep])
    ids, S = problem.ids[keep], len(problem.lengths)

    def total(values: Tensor, weights: Tensor | None = None) -> Tensor:
        values = values if weights is None else values * weights[keep]
        return torch.zeros(S, dtype=fp64).index_add(0, ids, values).view(2, -1)

    ratio = stats.logp if z is None else stats.logp - stats.ref_logp
    sums = Sums(total(ratio, w), None if z is None else total(stats.kl, v), total(stats.logp), {})
    return objective.losses(sums, torch.arange(S // 2)), sums


def compare(
    problem: Problem, objective: Objective, rows: int, needs: tuple[bool, ...], upstream: float = 0.37, **changes: Any
) -> None:
    """Losses, sums and all gradients of the engine against the naive ones."""
    inputs, plain = problem.inputs(needs), problem.inputs(needs)
    total, losses, R, K, logp = engine(problem, objective, rows, inputs, **changes)
    expected, sums = naive(problem, objective, plain)
    assert_equal("losses", losses, expected)
    assert_equal("their sum", total, expected.sum())
    for name, got, want in (("R", R, sums.log_ratio), ("K", K, sums.kl), ("logp", logp, sums.logp)):
        assert_equal(name, got, None if want is None else want.flatten())
    leaves = [i for i, t in enumerate(inputs) if t is not None and t.requires_grad]
    if not leaves:
        assert not total.requires_grad
        return
    factor = torch.tensor(upstream, dtype=fp64)
    found = torch.autograd.grad(total, [inputs[i] for i in leaves], factor, retain_graph=True)
    again = torch.autograd.grad(total, [inputs[i] for i in leaves], factor)
    want = torch.autograd.grad(expected.sum(), [plain[i] for i in leaves], factor, allow_unused=True)
    for i, got, more, right in zip(leaves, found, again, want, strict=True):
        name = ("d_hidden", "d_weight", "d_bias", "d_w", "d_v")[i]
        if i in (0, 3, 4):
            assert_exactly_zero(f"{name} of ignored rows", got[problem.labels == IGNORE])
            got, right, more = (None if t is None else t[problem.labels != IGNORE] for t in (got, right, more))
        assert_equal(name, got, right)
        assert_same_bits(f"{name}, a second time", more, got)


NEEDS = [tuple(bool(n) for n in needs) for needs in product((0, 1), repeat=3)]


@pytest.mark.parametrize("rows", [1, 4, 7, 12, 1000])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_form(name: str, layout: str, rows: int):
    """Chunks that make every pair long, some, or none; whatever needs a gradient; an upstream gradient that is not 1."""
    problem = make_problem(LAYOUTS[layout])
    for needs in NEEDS:
        compare(problem, OBJECTIVES[name], rows, (*needs, False, False))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("rows", [4, 1000])
def test_learned_weights(name: str, rows: int):
    problem = make_problem(LAYOUTS["uneven"], seed=1)
    for needs in ((True, True, True, True, True), (False, False, False, True, False), (True, False, False, False, True)):
        compare(problem, OBJECTIVES[name], rows, needs)


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_without_a_reference(rows: int):
    problem = make_problem(LAYOUTS["uneven"], ref=False)
    for needs in NEEDS:
        compare(problem, Objective(sft, "sequence", (0.0, 0.0), []), rows, (*needs, False, False))


def beside_logp(sums: Sums, pairs: Tensor) -> Tensor:
    """Sums of log-probabilities, whose rows are those of the log-ratio."""
    return F.softplus(-0.2 * (sums.log_ratio[0] - sums.log_ratio[1])) - sums.logp[0] / 7


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_log_probabilities_beside_ratios(rows: int):
    """One direction without weights. With weights there are two: NaN, and not a wrong gradient."""
    problem = make_problem(LAYOUTS["uneven"])
    objective = Objective(beside_logp, "pair", (0.0, 0.0), [])
    for needs in NEEDS:
        compare(replace(problem, w=None), objective, rows, (*needs, False, False))
    inputs = problem.inputs((True, True, False, False, False))
    total, *_ = engine(problem, objective, rows, inputs)
    assert all(grad.isnan().any() for grad in torch.autograd.grad(total, inputs[:2]))


def test_without_a_bias():
    compare(replace(make_problem(LAYOUTS["uneven"]), bias=None), OBJECTIVES["pair"], 4, (True, True, False, False, False))


@pytest.mark.interpreter
@pytest.mark.parametrize("rows", [4, 1000])
def test_triton_takes_the_same_way(rows: int):
    """float32: the kernels' own errors are the contract's; here that the engine hands them the right rows and slopes."""
    problem = make_problem(LAYOUTS["uneven"][:2])
    needs = (True, True, True, True, True)
    plain = problem.inputs(needs)
    expected, _ = naive(problem, OBJECTIVES["margin"], plain)
    want = torch.autograd.grad(expected.sum(), plain)

    def single(t: Tensor | None) -> Tensor | None:
        return t if t is None or not t.is_floating_point() else t.float()

    small = replace(problem, **{name: single(getattr(problem, name)) for name in ("hidden", "weight", "bias", "w", "v")})
    small = replace(small, ref=tuple(single(t) for t in problem.ref))
    inputs = small.inputs(needs)
    total, *_ = engine(
        small, OBJECTIVES["margin"], rows, inputs, dtype=torch.float32, ref_dtype=torch.float32, backend="triton"
    )
    keep = problem.labels != IGNORE
    for i, (got, right) in enumerate(zip(torch.autograd.grad(total, inputs), want, strict=True)):
        got, right = (got[keep], right[keep]) if i in (0, 3, 4) else (got, right)
        assert_within_budget(f"gradient {i}", got, right, right, torch.full_like(right, 3e-5 * float(right.abs().max())))


# ------------------------------------------------------------------------------------------------------- declarations are true


SMOOTHING = {"exo_pair": 0.1}
MIXTURES = (
    ("sigmoid", "sigmoid"), ("sigmoid", "ipo"), ("ipo", "sigmoid_norm"), ("nca_pair", "sppo_hard"), ("sigmoid", "bco_pair"),
    ("sigmoid", "bco_pair", "sft"), ("bco_pair", "sft"), ("apo_down", "hinge"), ("aot", "sigmoid"),
)  # fmt: skip
DECLARED: dict[str, dict[str, Any]] = {
    name: {"loss_type": name, "label_smoothing": SMOOTHING.get(name, 0.0)} for name in PAIR_LOSSES
}
DECLARED |= {"+".join(names): {"loss_type": names, "loss_weights": [0.8, 0.3, 1.1][: len(names)]} for names in MIXTURES}
DECLARED |= {
    f"{name}, weighted": {"loss_type": name, "use_weighting": True} for name in ("sigmoid", "ipo", "nca_pair", "apo_down")
}
OF_DPO: dict[str, dict[str, Any]] = {
    f"{divergence} {name}": {"f_divergence": divergence, "loss_type": name, "f_alpha": 0.3 if divergence == "alpha" else None}
    for divergence in ("forward_kl", "js", "alpha")
    for name in ("sigmoid", "ipo", "hinge")
}
DECLARATIONS = [
    pytest.param(family, name, id=f"{family}-{name}")
    for family in ("dpo", "tdpo1", "tdpo2")
    for name in (DECLARED | OF_DPO if family == "dpo" else DECLARED)
]


@pytest.mark.parametrize("average", [False, True], ids=["", "average_log_prob"])
@pytest.mark.parametrize(("family", "name"), DECLARATIONS)
def test_declared_forms(family: str, name: str, average: bool):
    """By autograd, at random sums: slopes are parallel to what the loss says of itself, and where no form holds, it says so."""
    common = {"average_log_prob": average, "beta": 0.4, **(DECLARED | OF_DPO)[name]}
    loss = LinearDPOLoss(**common) if family == "dpo" else LinearTDPOLoss(variant=family, alpha=0.7, **common)
    n = 20
    ratio, kl, logp = (torch.randn(2, n, dtype=fp64, requires_grad=True) for _ in range(3))
    count, square, ref = torch.randint(1, 20, (2, n)).to(fp64), -torch.rand(2, n, dtype=fp64), torch.randn(2, n, dtype=fp64)
    sums = loss._sequence_sums(SequenceSums(ratio, kl, logp, count, square, ref), None)

    def losses(ratio: Tensor, pairs: slice = slice(None)) -> Tensor:
        found = loss._sequence_sums(SequenceSums(ratio, kl, logp, count, square, ref), None)
        return loss.pair_losses(*(found.map(lambda t, i=i: t[i, pairs]) for i in (0, 1)), 7.0)

    assert sums.num_tokens.min() >= 1
    d_ratio, d_kl, d_logp = torch.autograd.grad(losses(ratio).sum(), (ratio, kl, logp), materialize_grads=True)
    d = d_ratio + d_logp
    assert (d != 0).any()
    assert d_logp.any() == ("sft" in loss.loss_types)
    alone = torch.cat([losses(ratio, slice(p, p + 1)) for p in range(n)]).sum()
    (d_alone,) = torch.autograd.grad(alone, ratio, materialize_grads=True)
    if loss.form().kind == "batch":
        assert (d_alone - d_ratio).abs().max() > 1e-3, "no pair depends on another one"
        assert "whole batch" in loss.obstacle(weighted=False)
        return
    assert_equal("slopes of pairs alone", d_alone, d_ratio)
    b = torch.tensor(loss.kl_slopes(), dtype=fp64)[:, None]
    if "the NLL" in (loss.obstacle(weighted=False) or ""):
        assert family == "tdpo1"
        assert (d_kl - d * b).abs().max() > 1e-3, "one direction a row would do"
        return
    assert loss.obstacle(weighted=False) is None
    assert_equal("slopes of K", d_kl, d * b)
    scale = count[0] / count[1] if loss.form().by_length or average else torch.ones(n, dtype=fp64)
    if loss.form().kind == "margin":
        assert_equal("slopes of R", d[1], -scale * d[0])
    elif not average and not loss.use_weighting:  # nothing is declared wider than it is
        assert (d[1] + scale * d[0]).abs().max() > 1e-3, "the form could be a margin"
    if loss.form().kind == "sequence" and d_ratio.any():
        (slope,) = torch.autograd.grad(losses(ratio).sum(), ratio, create_graph=True)
        (curvature,) = torch.autograd.grad(slope[0].sum(), ratio)
        assert_exactly_zero("a chosen slope that depends on the rejected sequence", curvature[1])
    assert loss.obstacle(weighted=True) is None or "sft" in loss.loss_types


def test_forms_of_mixtures_and_of_weighting():
    """The widest of the parts."""
    for options, form in (
        ({"loss_type": ["sigmoid", "hinge"]}, Form("margin")),
        ({"loss_type": ["ipo", "sigmoid_norm"]}, Form("margin", by_length=True)),
        ({"loss_type": ["ipo", "sigmoid"]}, Form("pair")),
        ({"loss_type": ["nca_pair", "sft"]}, Form("sequence")),
        ({"loss_type": ["nca_pair", "sigmoid"]}, Form("pair")),
        ({"loss_type": ["aot", "sigmoid"]}, Form("batch")),
        ({"loss_type": "sigmoid", "use_weighting": True}, Form("margin")),
        ({"loss_type": "nca_pair", "use_weighting": True}, Form("pair")),
        ({"f_divergence": "js"}, Form("pair")),
    ):
        assert LinearDPOLoss(**options).form() == form, options


def test_every_loss_declares_its_form():
    assert PAIR_FORMS.keys() == PAIR_LOSSES.keys()


WRONG = {
    "another ratio": Objective(margin, "margin", (0.0, 0.7), [1.0] * P),
    "no margin": Objective(pair, "margin", (0.5, 0.5), [1.0] * P),
    "another KL": Objective(margin, "margin", (0.0, 0.9), [1.0 + p for p in range(P)]),
    "a KL that is not declared": Objective(sequence, "pair", (0.0, 0.0), []),
    "not a sum over sequences": Objective(pair, "sequence", (0.5, 0.5), []),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_gives_nan_and_not_a_wrong_gradient(name: str):
    """Of long pairs, which rest on it."""
    problem = make_problem([(5, 4), (6, 7)], seed=2)
    inputs = problem.inputs((True, True, False, False, False))
    total, losses, *_ = engine(problem, WRONG[name], 4, inputs)
    total.backward()
    assert total.isnan()
    assert losses[1].isnan()
    assert inputs[0].grad[problem.labels != IGNORE].isnan().any()
    assert inputs[1].grad.isnan().any()


def test_groups_believe_only_that_a_kl_has_no_slope():
    problem = make_problem([(5, 4), (6, 7)], seed=2)
    for name, objective in WRONG.items():
        total, *_ = engine(problem, objective, 1000, problem.inputs((True, True, False, False, False)))
        assert total.isnan() == (name == "a KL that is not declared"), name


# ----------------------------------------------------------------------------------------------------------- products, counted

WIDE = {"V": 48, "D": 32, "D_ref": 32}


def units(run: Callable[[], object], shape: tuple[int, int, int]) -> float:
    with counted_products() as products:
        run()
    return products.units(*shape)


@pytest.mark.parametrize(
    ("layout", "rows"),
    [
        pytest.param([(13, 9), (7, 5), (20, 30), (2, 3)], 8, id="long"),
        pytest.param([(13, 9), (7, 5), (20, 30), (2, 3)], 24, id="mixed"),
        pytest.param([(13, 9), (7, 5), (20, 30), (2, 3)], 1000, id="groups"),
        pytest.param([(20, 30)], 12, id="one long pair"),
    ],
)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_units(name: str, layout: list[tuple[int, int]], rows: int):
    """Exactly 4 with a trained head, 3 with a frozen one, 2 without gradients; each gradient that is not needed is one less."""
    problem = make_problem(layout, **WIDE)

    def run(*needs: bool) -> Callable[[], object]:
        inputs = problem.inputs((*needs, False, False))

        def step() -> None:
            total, *_ = engine(problem, OBJECTIVES[name], rows, inputs)
            if total.requires_grad:
                total.backward()

        return step

    assert units(run(True, True, True), problem.shape) == 4
    assert units(run(True, True, False), problem.shape) == 4
    assert units(run(True, False, False), problem.shape) == 3
    assert units(run(False, True, False), problem.shape) == 3
    assert units(run(False, False, True), problem.shape) == 2
    assert units(run(False, False, False), problem.shape) == 2
    with torch.no_grad():
        assert units(run(True, True, True), problem.shape) == 2


def test_units_without_a_reference():
    problem = make_problem([(13, 9), (7, 5)], ref=False, **WIDE)
    for needs, expected in (((True, True), 3), ((True, False), 2), ((False, False), 1)):
        inputs = problem.inputs((*needs, False, False, False))
        objective = Objective(sft, "sequence", (0.0, 0.0), [])
        step = lambda i=inputs, o=objective: [t.backward() for t in engine(problem, o, 10, i)[:1] if t.requires_grad]  # noqa: E731
        assert units(step, problem.shape) == expected


@dataclass(frozen=True)
class Model:
    """Hidden states and heads at the level of the losses, float32."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor

    @property
    def counted(self) -> int:
        return int((self.labels[:, 1:] != IGNORE).sum())

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.counted, *self.weight.shape

    def shared(self) -> "Model":
        return replace(self, ref_weight=self.weight)

    def step(self, loss: Callable[..., Any], trained: bool) -> Callable[[], object]:
        hidden = self.hidden.clone().requires_grad_()
        weight = self.weight if not trained else self.weight.clone().requires_grad_()
        ref_weight = weight.detach() if self.ref_weight is self.weight else self.ref_weight
        return lambda: loss(hidden, weight, self.ref_hidden, ref_weight, self.labels).loss.backward()


def make_model(S: int = 4, T: int = 24, V: int = 48, D: int = 32, dtype: torch.dtype = torch.float32) -> Model:
    labels = torch.randint(V, (S, T))
    labels[:, : T // 3] = IGNORE
    labels[1, -4:] = IGNORE
    return Model(
        torch.randn(S, T, D).to(dtype),
        torch.randn(V, D).to(dtype),
        torch.randn(S, T, D).to(dtype),
        torch.randn(V, D).to(dtype),
        labels,
    )


UNITS = [  # loss, engine, trained -> units
    (LinearTDPOLoss, "one_pass", True, 4),
    (LinearTDPOLoss, "one_pass", False, 3),
    (LinearTDPOLoss, "recompute", True, 6),
    (LinearTDPOLoss, "recompute", False, 4),
    (LinearDPOLoss, "one_pass", True, 4),
    (LinearDPOLoss, "one_pass", False, 3),
    (LinearDPOLoss, "recompute", True, 5),  # the KL has no gradient, so the reference is not made again
    (LinearDPOLoss, "recompute", False, 3),
]


@pytest.mark.parametrize("max_chunk_bytes", [20 * 2 * 48 * 4, None], ids=["long", "groups"])
@pytest.mark.parametrize(
    ("make", "options", "trained", "frozen"),
    [
        (LinearTDPOLoss, {"loss_type": ("sigmoid", "bco_pair", "sft")}, 4, 3),
        (LinearTDPOLoss, {"use_weighting": True, "ld_alpha": 0.5}, 4, 3),
        (LinearDPOLoss, {"f_divergence": "js"}, 4, 3),
        (LinearTDPOLoss, {"loss_type": "aot"}, 6, 4),
        (LinearDPOLoss, {"loss_type": "aot"}, 5, 3),
        (LinearTDPOLoss, {"variant": "tdpo1", "loss_type": ("sigmoid", "sft")}, 6, 4),
    ],
    ids=["mixture", "weighted", "f-dpo", "aot", "aot-dpo", "sft beside a KL"],
)
def test_units_by_loss(make: type, options: dict[str, Any], trained: int, frozen: int, max_chunk_bytes: int | None):
    """Whatever couples no batch goes in one pass."""
    model = make_model()
    loss = make(max_chunk_bytes=max_chunk_bytes, **options)
    assert units(model.step(loss, True), model.shape) == trained
    assert units(model.step(loss, False), model.shape) == frozen


@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("max_chunk_bytes", [20 * 2 * 48 * 4, None], ids=["long", "groups"])
@pytest.mark.parametrize("extras", [(), ("entropy", "ref_entropy", "accuracy", "mean_logit")], ids=["", "extras"])
@pytest.mark.parametrize(("make", "engine_name", "trained", "expected"), UNITS)
def test_units_of_losses(
    make: type,
    engine_name: str,
    trained: bool,
    expected: int,
    extras: tuple[str, ...],
    max_chunk_bytes: int | None,
    shared: bool,
):
    model = make_model().shared() if shared else make_model()
    loss = make(engine=engine_name, max_chunk_bytes=max_chunk_bytes, extras=extras)
    assert units(model.step(loss, trained), model.shape) == expected


def test_a_shared_head_takes_one_product_a_chunk():
    model = make_model()
    for ref, products in ((model.ref_weight, 2), (model.weight, 1)):
        with counted_products() as counted, torch.no_grad():
            LinearTDPOLoss()(model.hidden, model.weight, model.ref_hidden, ref, model.labels)
        assert len(counted.flops) == products


def test_ignored_rows_are_not_multiplied():
    """Also in the op, whose rows are given by labels alone."""
    model = make_model()
    labels = model.labels[:, 1:]
    step = lambda: linear_token_stats(model.hidden[:, 1:], model.weight, None, None, labels)  # noqa: E731
    assert units(step, (int((labels != IGNORE).sum()), *model.weight.shape)) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_it_sweeps_twice(reentrant: bool):
    """Not once more for every pair: the engine's own autograd is hidden from a checkpoint's hooks."""
    model = make_model(S=8)
    loss = LinearTDPOLoss(max_chunk_bytes=10 * 2 * 48 * 4)
    hidden, weight = model.hidden.requires_grad_(), model.weight.requires_grad_()

    def step() -> None:
        def inside(h: Tensor) -> Tensor:
            return loss(h, weight, model.ref_hidden, model.ref_weight, model.labels).loss

        torch.utils.checkpoint.checkpoint(inside, hidden, use_reentrant=reentrant).backward()

    assert units(step, model.shape) == (2 + 4 if reentrant else 4 + 4)


def test_rows_are_counted_once_and_not_at_all_if_given(monkeypatch: pytest.MonkeyPatch):
    """What the host asks a device for: in one place, once."""
    calls = []
    model = make_model()
    given = (model.labels[:, 1:] != IGNORE).sum(-1).tolist()
    for module in ("linear_losses", "functions.linear_token_stats"):
        monkeypatch.setattr(f"fused_tdpo.{module}.host_counts", lambda counts: calls.append(counts) or counts.tolist())
    for name in ("one_pass", "recompute"):
        loss = LinearTDPOLoss(engine=name)
        loss(model.hidden, model.weight, model.ref_hidden, model.ref_weight, model.labels)
        assert len(calls) == 1
        calls.clear()
        loss(model.hidden, model.weight, model.ref_hidden, model.ref_weight, model.labels, valid_rows=given)
        assert not calls


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"loss_type": ("sigmoid", "sft")}, {"ld_alpha": 0.3, "use_weighting": True}], ids=str)
@pytest.mark.parametrize("name", ["one_pass", "recompute"])
def test_nothing_waits_for_the_gpu(name: str, options: dict[str, Any]):
    model = make_model()
    loss = LinearTDPOLoss(engine=name, extras=EXTRAS[:4], **options)
    given = (model.labels[:, 1:] != IGNORE).sum(-1).tolist()
    hidden, weight, ref_hidden, ref_weight, labels = (t.cuda() for t in vars(model).values())
    hidden.requires_grad_(), weight.requires_grad_()
    loss(hidden, weight, ref_hidden, ref_weight, labels).loss.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(hidden, weight, ref_hidden, ref_weight, labels, valid_rows=given).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------------------------------------------------------- memory

BUDGET = 2**20


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("engine_name", ["one_pass", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logits_exist_for_a_chunk_only(dtype: torch.dtype, engine_name: str, trained: bool, monkeypatch: pytest.MonkeyPatch):
    """The widest tensor is no larger than a chunk; what grows with T is N·D and a few numbers a row, and nothing else."""
    from fused_tdpo import _projection, _torch_backend

    monkeypatch.setattr(_torch_backend, "CHUNK_ELEMENTS", 2**16)
    monkeypatch.setattr(_projection, "CAST_COLUMNS", 64)
    V, D = 512, 8
    peaks, sizes = [], []
    for T in (1024, 4096, *([32_768] if dtype == torch.float32 and engine_name == "one_pass" else [])):
        model = make_model(S=2, T=T, V=V, D=D, dtype=dtype)
        loss = LinearTDPOLoss(engine=engine_name, max_chunk_bytes=BUDGET)
        given = (model.labels[:, 1:] != IGNORE).sum(-1).tolist()
        hidden, weight = model.hidden.requires_grad_(), model.weight.requires_grad_(trained)
        with counted_allocations() as allocations:
            out = loss(hidden, weight, model.ref_hidden, model.ref_weight, model.labels, valid_rows=given)
            out.loss.backward()
        wide = [size for size in allocations.of_at_least(BUDGET // 2 + 1) if size > 2 * T * D * 4]
        assert not wide, f"{wide} bytes at once, where both models' logits share {BUDGET}"
        peaks.append(allocations.peak)
        sizes.append(2 * T)
    rows = [(b - a) / (n - m) for a, b, m, n in zip(peaks, peaks[1:], sizes, sizes[1:], strict=False)]
    assert max(rows) <= 320, f"{rows} bytes a row; one row of logits has {V * dtype.itemsize}"
    assert peaks[0] <= 4 * BUDGET + sizes[0] * 320 + 3 * V * D * 4


@pytest.mark.parametrize(
    ("name", "layout", "buffers"),
    [
        ("margin", [(30, 30)], 1),
        ("margin", [(30, 30), (30, 30)], 2),
        ("sequence", [(30, 30)], 2),
        ("sequence", [(30, 30), (30, 30)], 2),
        ("pair", [(30, 30)], 2),
        ("pair", [(30, 30), (30, 30)], 3),
        ("pair", [(3, 3), (4, 4)], 1),
    ],
)
def test_buffers_of_the_head(name: str, layout: list[tuple[int, int]], buffers: int, monkeypatch: pytest.MonkeyPatch):
    """The sum itself, and one for each slope that is unknown at a time; the first of these is the sum."""
    from fused_tdpo import _projection

    made = []
    init = _projection.HeadSums.__init__
    monkeypatch.setattr(_projection.HeadSums, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    problem = make_problem(layout)
    engine(problem, OBJECTIVES[name], 10, problem.inputs((True, True, True, False, False)))
    assert len(made) == buffers


# -------------------------------------------------------------------------------------------------------------------- the rest


def test_the_same_bits_every_time():
    model = make_model()
    loss = LinearTDPOLoss(max_chunk_bytes=10 * 2 * 48 * 4)
    found = []
    for _ in range(2):
        hidden, weight = model.hidden.clone().requires_grad_(), model.weight.clone().requires_grad_()
        out = loss(hidden, weight, model.ref_hidden, model.ref_weight, model.labels)
        out.loss.backward()
        found.append((out.loss, hidden.grad, weight.grad))
    for what, a, b in zip(("loss", "d_hidden", "d_weight"), *found, strict=True):
        assert_same_bits(what, a, b)


def test_a_second_derivative_is_refused():
    model = make_model()
    hidden = model.hidden.requires_grad_()
    loss = LinearTDPOLoss()(hidden, model.weight, model.ref_hidden, model.ref_weight, model.labels).loss
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_levels_are_kin():
    """A loss from hidden states is the loss from logits with another way in."""
    assert issubclass(LinearTDPOLoss, TDPOLoss)
    assert issubclass(LinearDPOLoss, DPOLoss)
    assert isinstance(LMHead(torch.zeros(3, 2)).width, int)


def test_float16_keeps_small_probabilities_times_small_slopes():
    """Means over many tokens make slopes of 1e-4; times a p of 1e-4 that is 0 in float16, and a loss scale comes later."""
    S, T, V, D = 4, 100, 20_000, 16
    hidden, ref_hidden = (torch.randn(S, T, D) for _ in range(2))
    weight, ref_weight = (0.3 * torch.randn(V, D) for _ in range(2))
    labels = torch.randint(V, (S, T))
    found = []
    for dtype, options in (
        (fp64, {}),
        (torch.float16, {"engine": "recompute"}),
        (torch.float16, {}),
        (torch.float16, {"max_chunk_bytes": 30 * V * 4}),
    ):
        leaves = [t.half().to(dtype).requires_grad_() for t in (hidden, weight)]
        loss = LinearTDPOLoss(average_log_prob=True, **options)
        out = loss(*leaves, ref_hidden.half().to(dtype), ref_weight.half().to(dtype), labels)
        found.append([g.double() / 2**14 for g in torch.autograd.grad(out.loss, leaves, torch.full_like(out.loss, 2.0**14))])
    exact, recompute, *one_pass = found
    for way in one_pass:
        for got, plain, truth in zip(way, recompute, exact, strict=True):
            assert (got - truth).norm() <= 1.5 * (plain - truth).norm() + 1e-4 * truth.norm()


@pytest.mark.parametrize("rows", [4, 1000], ids=["long", "groups"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_saturated_pair_is_no_wrong_declaration(trained: bool, rows: int):
    """Its slopes are below the normal numbers, where means over 7 and over 3 tokens round apart."""
    model = make_model(S=2, T=12)
    model.labels[:, 1:] = IGNORE
    model.labels[0, 2:9], model.labels[1, 2:5] = 1, 2  # 7 tokens and 3
    options = {"average_log_prob": True, "max_chunk_bytes": rows * 2 * 48 * 4}
    tensors = list(vars(model).values())
    margin = float(LinearTDPOLoss(1.0, reward="effective", **options)(*tensors).metrics["rewards/margins"])
    if margin < 0:  # then the other one is chosen
        tensors = [t if len(t) == 48 else t.flip(0) for t in tensors]
    slopes = []
    for z in range(84, 106):  # e^-87 is the smallest normal number of float32, e^-103 the smallest there is
        hidden, weight, *others = tensors
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        out = LinearTDPOLoss(z / abs(margin), **options)(hidden, weight, *others)
        out.loss.backward()
        assert out.loss.isfinite(), z
        assert hidden.grad.isfinite().all(), z
        slopes.append(float(hidden.grad.abs().max()))
    assert slopes[0] > 1e-37 > slopes[-2], "the test itself is wrong: these pairs are not that saturated"


def test_a_shared_head_is_shared_under_autocast():
    model = make_model().shared()
    with counted_products() as counted, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        LinearTDPOLoss()(model.hidden, model.weight, model.ref_hidden, model.weight, model.labels)
    assert len(counted.flops) == 1


def test_more_rows_than_there_are_cannot_count():
    """Refused on the host, on any device."""
    model = make_model()
    with pytest.raises(ValueError, match="valid_rows"):
        LinearTDPOLoss()(*vars(model).values(), valid_rows=[100, 0, 0, 0])


def test_wrong_counts_give_nan_where_looking_would_wait(monkeypatch: pytest.MonkeyPatch):
    """What a GPU does, shown on a CPU: the check that raises here only compares."""
    model = make_model()
    counted = int((model.labels != IGNORE).sum())
    monkeypatch.setattr(
        "fused_tdpo.functions.linear_token_stats.check_valid_rows", lambda found, claimed, ignore_index: found != claimed
    )
    for claimed, nan in ((counted, False), (counted - 1, True)):
        stats = linear_token_stats(*vars(model).values(), valid_rows=claimed)
        for name in ("logp", "ref_logp", "kl"):
            assert bool(getattr(stats, name).isnan().all()) == nan, name


def test_counts_leave_the_loss_its_dtype():
    model = make_model()
    given = (model.labels[:, 1:] != IGNORE).sum(-1).tolist()
    torch.set_default_dtype(torch.float64)
    try:
        assert LinearTDPOLoss()(*vars(model).values(), valid_rows=given).loss.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_meta_tensors():
    model = {name: t.to("meta") for name, t in vars(make_model()).items()}
    stats = linear_token_stats(*model.values(), valid_rows=7)
    assert stats.kl.shape == model["labels"].shape
    assert LinearTDPOLoss(engine="recompute")(*model.values(), valid_rows=[1, 2, 3, 4]).loss.is_meta


def test_fullgraph_with_counts():
    model = make_model()
    given = (model.labels[:, 1:] != IGNORE).sum(-1).tolist()
    loss = LinearTDPOLoss(engine="recompute")
    step = torch.compile(lambda *tensors: loss(*tensors, valid_rows=given).loss, fullgraph=True, backend="aot_eager")
    expected = loss(*vars(model).values()).loss
    assert_within_budget("loss", step(*vars(model).values()), expected, expected, 1e-6 * expected.double())
