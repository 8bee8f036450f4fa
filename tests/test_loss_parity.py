"""Beside other people's code: every loss type, f-divergence and mixture of TRL's DPO, and Liger's, by value and by gradient.

TRL computes its loss in one method of its trainer. It runs here on a stub of that, whose model hands out what TRL's fused head
would, from logits of ours. What is compared are the loss, the gradient of the policy's logits, and the metrics.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_tdpo import DPOLoss, LinearDPOLoss
from fused_tdpo.losses import PAIR_FORMS, PAIR_LOSSES
from official_tdpo import IGNORE, Batch, make_batch, value_and_grad
from tolerances import assert_within_budget

OPTIONS: dict[str, Any] = {"beta": 0.3}
EXTRAS = ("entropy", "accuracy", "mean_logit")


def near(what: str, got: Tensor, expected: Tensor, relative: float) -> None:
    """Every element within `relative` of the largest one."""
    slack = torch.full_like(expected.double(), relative * float(expected.detach().abs().max()))
    assert_within_budget(what, got, expected, expected, slack)


# --- TRL ----------------------------------------------------------------------------------------------------------------------


def fused_head(logits: Tensor, labels: Tensor) -> SimpleNamespace:
    """What TRL's fused head gives instead of logits: per token, 0 where a label is ignored."""
    x, y = logits[:, :-1], labels[:, 1:]
    mask, log_p = y != IGNORE, x.log_softmax(-1)
    statistics = {
        "log_probs": log_p.gather(-1, y.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logits": x.mean(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "is_top1": (x.argmax(-1) == y).to(x.dtype),
    }
    found = {name: torch.where(mask, values, 0.0) for name, values in statistics.items()}
    found["is_top1"] = found["is_top1"].bool()
    return SimpleNamespace(**found)


class Stub:
    """The attributes of a `DPOTrainer` that its `_compute_loss` reads."""

    def __init__(self, batch: Batch, **options: Any) -> None:
        names = options.pop("loss_type", "sigmoid")
        self.loss_types = [names] if isinstance(names, str) else list(names)
        self.loss_weights = options.pop("loss_weights", None) or [1.0] * len(self.loss_types)
        self.args = SimpleNamespace(discopop_tau=options.pop("discopop_tau", 0.05), gradient_checkpointing_kwargs=None)
        self.f_divergence_type, self.f_alpha_divergence_coef = "reverse_kl", 0.5
        self.ld_alpha, self.use_weighting, self.label_smoothing = None, False, 0.0
        self.aux_loss_enabled = self.precompute_ref_logps = False
        vars(self).update(OPTIONS | options)
        self.model = torch.nn.Identity()
        self.model.is_gradient_checkpointing = False
        self.ref_model = lambda labels, **_: fused_head(batch.ref, labels)
        alone = lambda value: value  # noqa: E731
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=alone, gather_for_metrics=alone)
        self._metrics: Any = {"train": defaultdict(list)}
        self._total_train_tokens, self._tp_size = 0, 1

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss and its gradient at the policy's logits."""
        from trl import DPOTrainer

        ids = batch.labels.clamp(min=0)
        completion_mask = (batch.labels != IGNORE).long()
        completion_mask[:, 0] = 0  # a token that nothing predicts
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion_mask}

        def step(x: Tensor) -> Tensor:
            return DPOTrainer._compute_loss(self, lambda labels, **_: fused_head(x, labels), inputs, False)

        return value_and_grad(step, batch.policy)


TRL_DIVERGENCE = {"js": "js_divergence", "alpha": "alpha_divergence"}


def beside_trl(batch: Batch, relative: float = 1e-9, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Compares; gives the metrics of both. `options` are ours."""
    theirs = {name: value for name, value in options.items() if not name.startswith("f_")}
    if "f_divergence" in options:
        theirs["f_divergence_type"] = TRL_DIVERGENCE.get(options["f_divergence"], options["f_divergence"])
        theirs["f_alpha_divergence_coef"] = 1 - (options.get("f_alpha") or 0.5)
    stub = Stub(batch, **theirs)
    expected, expected_grad = stub.loss(batch)
    loss = DPOLoss(**(OPTIONS | options), extras=EXTRAS)
    out, grad = value_and_grad(lambda x: loss(x, *batch[1:3]), batch.policy)
    near("loss", out.loss, expected.detach(), relative)
    near("gradient", grad, expected_grad, relative)
    assert expected_grad.abs().max() > 1e-4, "the case must move something"
    return out.metrics, {name: values[0] for name, values in stub._metrics["train"].items()}


SMOOTHING = {"exo_pair": 0.05}
ROUNDED = {"exo_pair": 1e-6}  # TRL takes the logarithms of a smoothing in float32
NO_F_DIVERGENCE = [name for name, form in PAIR_FORMS.items() if form.kind != "margin"]

trl = pytest.mark.usefixtures("trl_installed")


@pytest.fixture(scope="module")
def trl_installed() -> None:
    pytest.importorskip("trl", minversion="1.16")


@trl
@pytest.mark.parametrize("seed", [81, 82])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_trl_loss_types(name: str, seed: int) -> None:
    beside_trl(
        make_batch(seed=seed, holes=0.2), ROUNDED.get(name, 1e-9), loss_type=name, label_smoothing=SMOOTHING.get(name, 0.0)
    )


@trl
@pytest.mark.parametrize("name", ["robust", "aot", "aot_unpaired"])
def test_trl_label_smoothing(name: str) -> None:
    beside_trl(make_batch(seed=83), loss_type=name, label_smoothing=0.2)


@trl
@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)),  # MPO
        (("sigmoid", "ipo"), None),
        (("aot", "apo_down"), (1.0, -0.5)),
    ],
)
def test_trl_mixtures(names: tuple[str, ...], weights: tuple[float, ...] | None) -> None:
    beside_trl(make_batch(seed=84, holes=0.2), loss_type=names, loss_weights=weights)


@trl
@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name not in NO_F_DIVERGENCE])
@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", None), ("js", None), ("alpha", 0.3), ("alpha", 0.8)])
def test_trl_f_divergences(divergence: str, alpha: float | None, name: str) -> None:
    """α is ours, the paper's: TRL is given 1 − α, and computes that divergence in float32, if in any precision."""
    batch = make_batch(seed=85, dtype=torch.float32 if alpha else torch.float64)
    options = {"f_divergence": divergence, "f_alpha": alpha, "loss_type": name, "label_smoothing": SMOOTHING.get(name, 0.0)}
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

LIGER = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip


@pytest.mark.parametrize("average", [False, True], ids=["", "average"])
@pytest.mark.parametrize("name", LIGER)
def test_liger_loss_types(name: str, average: bool) -> None:
    """From hidden states, in float32. Liger takes labels that are shifted already."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    layout = make_batch(seed=91)
    gen = torch.Generator().manual_seed(91)
    S, T, D, V = *layout.labels.shape, 6, 23
    hidden, ref_hidden = (torch.randn(S, T, D, generator=gen) for _ in range(2))
    weight, ref_weight = (torch.randn(V, D, generator=gen) for _ in range(2))
    options = {"loss_type": name, "beta": 0.3, "average_log_prob": average}
    options["label_smoothing"] = SMOOTHING.get(name, 0.1 if name == "robust" else 0.0)

    def leaves() -> list[Tensor]:
        return [t.clone().requires_grad_() for t in (hidden, weight)]

    theirs, (h, w) = liger.LigerFusedLinearDPOLoss(compiled=False, **options), leaves()
    expected, *_ = theirs(w, h[:, :-1], layout.labels[:, 1:], None, ref_hidden[:, :-1], ref_weight)
    expected_grads = torch.autograd.grad(expected, (h, w))
    h, w = leaves()
    loss = LinearDPOLoss(**options)(h, w, ref_hidden, ref_weight, layout.labels).loss
    near("loss", loss, expected.detach(), 1e-5)
    for what, got, grad in zip(("hidden", "weight"), torch.autograd.grad(loss, (h, w)), expected_grads, strict=True):
        near(f"gradient of {what}", got, grad, 1e-5)
