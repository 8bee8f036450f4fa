"""docs/parity.md: its rows are the losses of the code, its errors are measured again, and others differ where it says so."""

import math
from typing import Any

import pytest
import torch

import fused_tdpo
import parity_table
from fused_tdpo import DPOLoss
from fused_tdpo.pair_losses import PAIR_LOSSES
from official_tdpo import make_batch, value_and_grad
from parity_table import AT_REFERENCE, PARITY, PEERS, ROWS, WORKED, Errors, Row, Stub, parse, within
from tolerances import assert_relative

NEEDS = {"TRL": "trl", "Liger": "liger_kernel"}


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl", minversion="1.16")


def written(section: str) -> dict[str, list[str]]:
    return parse(section, PARITY.read_text())


# ------------------------------------------------------------------------------------------------------------------- the rows


def test_every_loss_has_a_row() -> None:
    """`python tests/parity_table.py` makes the rows anew."""
    assert [(name, *cells[-2:]) for name, cells in written("losses").items()] == [(r.name, r.source, r.note) for r in ROWS]
    assert {row.options.get("loss_type") for row in ROWS if row.loss == "DPOLoss"} >= set(PAIR_LOSSES)
    classes = {name for name in fused_tdpo.__all__ if name.endswith("Loss") and not name.startswith("Linear")}
    assert {row.loss for row in ROWS} == classes
    assert [name.strip("`") for name in written("step-0")] == list(AT_REFERENCE) == list(PAIR_LOSSES)
    assert list(written("worked")) == list(WORKED)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.strip("`"))
def test_errors_are_as_documented(row: Row, peer: str) -> None:
    documented = parity_table.read(written("losses")[row.name][list(PEERS).index(peer)])
    if peer in NEEDS and documented is not None:
        pytest.importorskip(NEEDS[peer])
    measured = parity_table.measure(row, peer)
    if documented is None or measured is None:
        assert documented is measured is None
        return
    least, most = parity_table.floor(row, peer), parity_table.ceiling(row, peer)
    for what in Errors._fields:
        now, then = getattr(measured, what), getattr(documented, what)
        assert within(now, then, least, most), f"{what}: {now:.1e}, documented are {then:.0e}"


@pytest.mark.parametrize(
    ("measured", "documented", "expected"),
    [
        (9e-13, 0.0, True), (2e-12, 0.0, False), (9e-11, 1e-11, True), (2e-10, 1e-11, False), (2e-10, 2e-10, False),
        (math.nan, 1e-16, False), (1e-16, math.nan, False), (math.inf, math.inf, False),
    ],
)  # fmt: skip
def test_what_is_as_documented(measured: float, documented: float, expected: bool) -> None:
    assert within(measured, documented, 1e-13, 1e-10) is expected


def test_a_nan_anywhere_is_an_error() -> None:
    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan])
    assert parity_table.relative(good, good) == 0
    assert all(math.isnan(parity_table.relative(*pair)) for pair in ((bad, good), (good, bad), (0 * good, 0 * good)))


def test_measure_keeps_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of either batch, in the value and in each gradient."""
    one, nan = torch.ones(()), torch.tensor(math.nan)
    for loss, gradient in ((nan, one), (one, nan)):
        found = {62: parity_table.Found(loss, (one, gradient)), 64: parity_table.Found(one, (one, one))}
        monkeypatch.setitem(PEERS, "paper", lambda row, seed, found=found: (found[seed], parity_table.Found(one, (one, one))))
        value, worst = parity_table.measure(ROWS[0], "paper")
        assert math.isnan(value) == (loss is nan)
        assert math.isnan(worst) == (gradient is nan)


# ------------------------------------------------------------------------------------------------------------ numbers by hand


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_step_0(name: str) -> None:
    for got, expression in zip(parity_table.at_reference(name), AT_REFERENCE[name], strict=True):
        assert parity_table.distance(got, parity_table.number(expression)) <= 1e-13


@pytest.mark.parametrize("what", WORKED)
def test_worked_numbers(what: str) -> None:
    expression, ours = WORKED[what]
    assert parity_table.distance(ours(), parity_table.number(expression)) <= (
        1e-6 if "float32" in what or "…" in what else 1e-13
    )


@pytest.mark.parametrize("section", ["step-0", "worked"])
def test_numbers_in_the_document(section: str) -> None:
    """They do not depend on the machine, but for the last column."""

    def numbers(text: str) -> list[list[str]]:
        return [[name, *cells[:-1]] for name, cells in parse(section, text).items()]

    made = f"<!-- measured: {section} -->\n{parity_table.TABLES[section]()}<!-- end -->"
    assert numbers(PARITY.read_text()) == numbers(made), "python tests/parity_table.py"


# ------------------------------------------------------------------------------------------------------- where others differ


def test_trl_ignores_the_smoothing_of_sigmoid(trl: Any) -> None:
    batch = make_batch(seed=62)
    plain, smoothed = Stub(batch).loss(batch)[0], Stub(batch, label_smoothing=0.2).loss(batch)[0]
    assert plain == smoothed
    assert (DPOLoss(0.3, label_smoothing=0.2)(*batch[:3]).loss - plain).abs() > 1e-2


def test_trl_bounds_the_exponent_of_alpha(trl: Any) -> None:
    """A log-ratio of about −400, with α = ½."""
    batch = make_batch([(1, 2), (1, 2)], seed=62, dtype=torch.float32)
    batch.policy[0, 0, batch.labels[0, 1]] -= 400.0
    options = {"f_divergence": "alpha", "f_alpha": 0.5}
    theirs, gradient = Stub(batch, **options).loss(batch)
    assert theirs.isfinite()
    assert not DPOLoss(0.3, **options)(*batch[:3]).loss.isfinite()
    bounded, ours = value_and_grad(lambda x: DPOLoss(0.3, **options, f_max_exponent=80.0)(x, *batch[1:3]), batch.policy)
    assert_relative("loss", bounded.loss, theirs, 1e-5)
    assert (ours[0] == 0).all() and (gradient[0] == 0).all()
    assert bounded.metrics["f_divergence/clamped"] == 0.5
    assert Stub(batch, f_divergence="forward_kl").loss(batch)[0].isinf()


def test_trl_cannot_weigh_a_hinge(trl: Any) -> None:
    batch = make_batch(seed=62)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Stub(batch, loss_type="hinge", use_weighting=True).loss(batch)
    assert DPOLoss(0.3, loss_type="hinge", use_weighting=True)(*batch[:3]).loss > 0
