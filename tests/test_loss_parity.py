"""Beside other people's code: what docs/parity.md has no row for, as options of TRL's DPO with every loss type they go with.

The stub of TRL's trainer is in `parity_table`. What are compared are the loss, the gradient of the policy's logits, and the
metrics.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fused_tdpo import DPOLoss
from fused_tdpo.pair_losses import PAIR_FORMS, PAIR_LOSSES
from official_tdpo import Batch, make_batch, value_and_grad
from parity_table import BETA, LIGER, MPO, SMOOTHING, Row, Stub, beside_liger
from tolerances import assert_within_budget

EXTRAS = ("entropy", "accuracy", "mean_logit")


def near(what: str, got: Tensor, expected: Tensor, relative: float) -> None:
    """Every element within `relative` of the largest one."""
    slack = torch.full_like(expected.double(), relative * float(expected.detach().abs().max()))
    assert_within_budget(what, got, expected, expected, slack)


# --- TRL ----------------------------------------------------------------------------------------------------------------------


def beside_trl(batch: Batch, relative: float = 1e-9, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Compares; gives the metrics of both."""
    stub = Stub(batch, **options)
    expected, expected_grad = stub.loss(batch)
    loss = DPOLoss(BETA, **options, extras=EXTRAS)
    out, grad = value_and_grad(lambda x: loss(x, *batch[1:3]), batch.policy)
    near("loss", out.loss, expected.detach(), relative)
    near("gradient", grad, expected_grad, relative)
    assert expected_grad.abs().max() > 1e-4, "the case must move something"
    return out.metrics, stub.metrics


ROUNDED = {"exo_pair": 1e-6}  # TRL takes the logarithms of a smoothing in float32
NO_F_DIVERGENCE = [name for name, form in PAIR_FORMS.items() if form.kind != "margin"]

trl = pytest.mark.usefixtures("trl_installed")


@pytest.fixture(scope="module")
def trl_installed() -> None:
    pytest.importorskip("trl", minversion="1.16")


@trl
@pytest.mark.parametrize(
    ("names", "weights"),
    [(MPO["loss_type"], None), (("sigmoid", "ipo"), None), (("aot", "apo_down"), (1.0, -0.5))],
)
def test_trl_mixtures(names: tuple[str, ...], weights: tuple[float, ...] | None) -> None:
    beside_trl(make_batch(seed=84, holes=0.2), loss_type=names, loss_weights=weights)


@trl
@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name not in NO_F_DIVERGENCE])
@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", None), ("js", None), ("alpha", 0.3), ("alpha", 0.8)])
def test_trl_f_divergences(divergence: str, alpha: float | None, name: str) -> None:
    """α is ours, the paper's: TRL is given 1 − α, and computes that divergence in float32, if in any precision."""
    batch = make_batch(seed=85, dtype=torch.float32 if alpha else torch.float64)
    options = {"f_divergence": divergence, "f_alpha": alpha, "loss_type": name} | SMOOTHING.get(name, {})
    beside_trl(batch, 1e-4 if alpha else ROUNDED.get(name, 1e-9), **options)


@trl
def test_trl_sft_beside_an_f_divergence() -> None:
    beside_trl(make_batch(seed=86), f_divergence="js", loss_type=["sigmoid", "sft"])


@trl
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "nca_pair", "aot", "aot_unpaired", "sft", "sigmoid_norm"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_trl_ld_dpo(ld_alpha: float, name: str) -> None:
    beside_trl(make_batch(seed=87, holes=0.2), loss_type=name, ld_alpha=ld_alpha)


@trl
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "bco_pair", "apo_down", ("sigmoid", "sppo_hard")])
def test_trl_wpo(name: str | tuple[str, ...]) -> None:
    """Not hinge, whose gradient TRL overwrites in place."""
    beside_trl(make_batch(seed=88, holes=0.2), loss_type=name, use_weighting=True)


@trl
@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}, {"f_divergence": "js"}, {"use_weighting": True}], ids=str)
def test_trl_metrics(options: dict[str, Any]) -> None:
    """Every metric that TRL logs of a batch, but for the number of tokens of all batches."""
    batch = make_batch(V=5, seed=92, holes=0.2)
    ours, theirs = beside_trl(batch, **options)
    theirs.pop("num_tokens")
    assert theirs.keys() == {name for name in ours if not name.startswith("kl/")}
    for name, value in theirs.items():
        near(name, ours[name], torch.tensor(value, dtype=torch.float64), 1e-6)
    assert 0 < theirs["mean_token_accuracy"] < 1
    assert 0 < theirs["rewards/accuracies"] < 1


@trl
def test_trl_has_no_loss_type_that_we_lack() -> None:
    """The names in its own error message."""
    batch = make_batch(seed=90)
    with pytest.raises(ValueError, match="Unknown loss type") as error:
        Stub(batch, loss_type="nonsense").loss(batch)
    named = set(str(error.value).partition("[")[2].partition("]")[0].replace("'", "").split(", "))
    assert named == set(PAIR_LOSSES)


# --- Liger --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIGER)
def test_liger_averages(name: str) -> None:
    pytest.importorskip("liger_kernel")
    row = Row({"loss_type": name, "average_log_prob": True} | SMOOTHING.get(name, {}), liger="DPO")
    ours, theirs = beside_liger(row, seed=62)
    near("loss", ours.loss, theirs.loss, 1e-5)
    for what, got, expected in zip(("hidden", "weight"), ours.gradients, theirs.gradients, strict=True):
        near(f"gradient of {what}", got, expected, 1e-5)
