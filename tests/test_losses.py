"""TDPOLoss and DPOLoss: values, gradients, outputs, errors, module manners and memory, through the public contract only.

The oracles of `official_tdpo` run in float64, and so do the losses here wherever the dtype is not the subject: a wrong term
cannot hide in rounding. Laws (what must not change when something irrelevant does) are in test_losses_laws.py.
"""

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_tdpo
from allocations import Allocations, counted_allocations
from fused_tdpo import DPOLoss, PreferenceOutput, TDPOLoss
from official_tdpo import (
    IGNORE,
    Batch,
    effective_ratios,
    expected_sums,
    make_batch,
    official_tdpo,
    pair_losses,
    value_and_grad,
)
from tolerances import assert_exactly_zero, assert_within_budget

BACKENDS = ("reference", "torch")
EXACT = {"rtol": 1e-9, "atol": 1e-11}  # float64 against float64: only the order of summation may differ
NEAR = {"rtol": 1e-5, "atol": 1e-5}  # float32 against float64, rows of at most 200 columns, sums of at most 10 tokens

backends = pytest.mark.parametrize("backend", BACKENDS)
variants = pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])


def assert_fields(out: PreferenceOutput, expected: Any, tolerance: dict[str, float] = EXACT) -> None:
    """Every field of `expected` against the one of the same name. NaN is never equal."""
    for name in expected._fields:
        actual = getattr(out, name).detach().double()
        torch.testing.assert_close(
            actual, getattr(expected, name).detach().double(), **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def expected_loss(
    batch: Batch,
    *,
    variant: str,
    beta: float = 0.1,
    alpha: float = 0.5,
    loss_type: str = "sigmoid",
    smoothing: float = 0.0,
    average: bool = False,
    **options: Any,
) -> Tensor:
    """(P,) losses by the float64 oracle; `options` go to `expected_sums`."""
    sums = expected_sums(*batch[:3], **options)
    r_w, r_l = effective_ratios(sums, variant=variant, alpha=alpha, average=average)
    return pair_losses(loss_type, r_w, r_l, *sums.lengths.chunk(2), beta, smoothing)


def check_against_oracle(loss: torch.nn.Module, batch: Batch, tolerance: dict[str, float] = EXACT, **oracle: Any) -> None:
    """Per-pair losses, their mean and the gradient of the policy's logits."""
    out, grad = value_and_grad(lambda x: loss(x, batch.ref, batch.labels), batch.policy)
    expected, expected_grad = value_and_grad(
        lambda x: expected_loss(batch._replace(policy=x), **oracle).mean(), batch.policy.double()
    )
    losses = expected_loss(batch._replace(policy=batch.policy.double()), **oracle)
    torch.testing.assert_close(out.losses.double(), losses, **tolerance)
    torch.testing.assert_close(out.loss.double(), expected, **tolerance)
    torch.testing.assert_close(grad.double(), expected_grad, **tolerance)
    assert expected_grad.abs().max() > 1e-4, "the case must move something, else it tests nothing"


# --- TDPO against the authors' code -----------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("holes", [0.0, 0.3], ids=["whole", "holes"])
@pytest.mark.parametrize(
    ("variant", "beta", "alpha"),
    [
        ("tdpo1", 0.1, 0.5),  # what the authors' configuration file trains
        ("tdpo2", 0.1, 0.5),  # what their paper recommends
        ("tdpo2", 1.0, 2.0),  # saturated sigmoids, the rejected row leaves the simplex of p and q
        ("tdpo2", 0.3, 1.0),  # the rejected row loses its p
        ("tdpo1", 0.03, 3.0),  # alpha must not reach TDPO1
    ],
)
def test_tdpo_equals_the_official_code(backend: str, variant: str, beta: float, alpha: float, holes: float) -> None:
    batch = make_batch(holes=holes, padding=2, seed=3)
    loss = TDPOLoss(beta=beta, alpha=alpha, variant=variant, backend=backend)
    out, grad = value_and_grad(lambda x: loss(x, batch.ref, batch.labels), batch.policy)
    options = {"beta": beta, "alpha": alpha, "tdpo2": variant == "tdpo2"}
    official, official_grad = value_and_grad(lambda x: official_tdpo(x, batch.ref, batch.labels, **options), batch.policy)
    assert_fields(out, official)
    torch.testing.assert_close(grad, official_grad, **EXACT)
    assert official_grad.abs().max() > 1e-4


@backends
@variants
def test_average_log_prob_averages_all_that_the_official_code_averages(backend: str, variant: str) -> None:
    """Log-ratios, KLs and log-probs are means over the counted tokens; the first label of a sequence is never counted."""
    batch = make_batch(seed=4)
    loss = TDPOLoss(variant=variant, average_log_prob=True, backend=backend)
    out, grad = value_and_grad(lambda x: loss(x, batch.ref, batch.labels), batch.policy)
    options = {"beta": 0.1, "alpha": 0.5, "tdpo2": variant == "tdpo2", "average_log_prob": True}
    official, official_grad = value_and_grad(lambda x: official_tdpo(x, batch.ref, batch.labels, **options), batch.policy)
    assert_fields(out, official)
    torch.testing.assert_close(grad, official_grad, **EXACT)


@backends
@variants
@pytest.mark.parametrize("gap", [120.0, math.inf], ids=["120-nats", "-inf"])
def test_right_where_the_official_code_is_nan(backend: str, variant: str, gap: float) -> None:
    """float32: a reference entry 120 nats below the largest underflows in softmax, its log is -inf, and 0 * -inf is NaN."""
    batch = make_batch(V=7, dtype=torch.float32, seed=5)
    ref = batch.ref.clone()
    ref[..., 5] = ref.amax(-1) - gap
    batch = batch._replace(ref=ref, labels=batch.labels.where(batch.labels != 5, 4))
    official = official_tdpo(*batch[:3], beta=0.1, alpha=0.5, tdpo2=variant == "tdpo2")
    assert official.loss.isnan(), "the trap must be armed"
    check_against_oracle(TDPOLoss(variant=variant, backend=backend), batch, NEAR, variant=variant)


@backends
def test_a_label_the_reference_finds_nearly_impossible(backend: str) -> None:
    """Its log-prob is about -120, not -inf: the loss is finite and right."""
    batch = make_batch(V=7, dtype=torch.float32, seed=6)
    ref = batch.ref.clone()
    ref[..., 5] = ref.amax(-1) - 120
    labels = batch.labels.clone()
    labels[0, 3] = 5
    check_against_oracle(TDPOLoss(backend=backend), batch._replace(ref=ref, labels=labels), NEAR, variant="tdpo2")


@backends
@variants
def test_columns_masked_in_both_models_do_not_exist(backend: str, variant: str) -> None:
    """-inf in policy and reference equals a narrower vocabulary; the gradient there is exactly 0, not NaN."""
    batch = make_batch(V=9, seed=7)
    masked = batch._replace(policy=F.pad(batch.policy, (0, 3), value=-math.inf), ref=F.pad(batch.ref, (0, 3), value=-math.inf))
    loss = TDPOLoss(variant=variant, backend=backend)
    out, grad = value_and_grad(lambda x: loss(x, batch.ref, batch.labels), batch.policy)
    out_masked, grad_masked = value_and_grad(lambda x: loss(x, masked.ref, masked.labels), masked.policy)
    torch.testing.assert_close(out_masked.losses, out.losses, **EXACT)
    torch.testing.assert_close(out_masked.chosen_kl, out.chosen_kl, **EXACT)
    torch.testing.assert_close(grad_masked[..., :9], grad, **EXACT)
    assert_exactly_zero("gradient of masked columns", grad_masked[..., 9:])


@backends
@pytest.mark.parametrize(
    ("variant", "alpha", "value", "chosen_row", "rejected_row"),
    [
        ("tdpo1", 9.0, math.log(4 / 3), (-1 / 4, 1 / 4), (1 / 4, -1 / 4)),
        ("tdpo2", 1.0, math.log(4 / 3), (-1 / 8, 1 / 8), (1 / 4, -1 / 4)),
        ("tdpo2", 0.0, math.log(13 / 9), (-2 / 13, 2 / 13), (4 / 13, -4 / 13)),
    ],
)
def test_by_hand(
    backend: str, variant: str, alpha: float, value: float, chosen_row: tuple[float, ...], rejected_row: tuple[float, ...]
) -> None:
    """Two words, one token each. Chosen: p = (3/4, 1/4), q = (1/2, 1/2), y = 0, so rho = log 3/2 and
    K = 1/2 log (1/2)/(3/4) + 1/2 log (1/2)/(1/4) = 1/2 log 4/3. Rejected: p = q = (1/2, 1/2), so rho = K = 0.

    TDPO1: h = log 3/2 + 1/2 log 4/3 = 1/2 log 3; beta = 2 gives sigmoid 3/4, loss log 4/3, slope c = 2 * 1/4 = 1/2.
    Chosen row -c (e_y - q) = -1/2 (1/2, -1/2), rejected row +c (e_y - q). TDPO2 with alpha = 1 has the same h, but the chosen
    row -c (e_y - p) = -1/2 (1/4, -1/4). With alpha = 0: sigmoid(2 log 3/2) = 9/13, c = 8/13, rows -+ c (e_y - p).
    """
    policy = torch.tensor([[[math.log(3), 0.0], [7.0, 7.0]], [[0.0, 0.0], [7.0, 7.0]]], dtype=torch.float64)
    labels = torch.tensor([[IGNORE, 0], [IGNORE, 0]])
    loss = TDPOLoss(beta=2.0, alpha=alpha, variant=variant, backend=backend)
    out, grad = value_and_grad(lambda x: loss(x, torch.zeros_like(x), labels), policy)
    assert out.loss.item() == pytest.approx(value, rel=1e-12)
    assert grad[0, 0].tolist() == pytest.approx(chosen_row, rel=1e-12)
    assert grad[1, 0].tolist() == pytest.approx(rejected_row, rel=1e-12)
    assert_exactly_zero("gradient of the last position", grad[:, 1])
    assert out.chosen_kl.item() == pytest.approx(0.5 * math.log(4 / 3), rel=1e-12)
    assert out.chosen_logps.item() == pytest.approx(math.log(3 / 4), rel=1e-12)
    assert out.chosen_rewards.item() == pytest.approx(2 * 0.5 * math.log(3), rel=1e-12), "without alpha, for both variants"
    assert out.rejected_rewards.item() == 0


# --- the DPO family, plain and at token level -------------------------------------------------------------------------------

PAIR_LOSSES = [
    pytest.param("sigmoid", 0.0, 0.1, id="dpo"),
    pytest.param("sigmoid", 0.2, 0.5, id="cdpo"),
    pytest.param("ipo", 0.0, 0.3, id="ipo"),
    pytest.param("hinge", 0.0, 0.4, id="hinge"),
    pytest.param("robust", 0.1, 0.5, id="robust"),
    pytest.param("robust", 0.0, 0.5, id="robust-without-smoothing"),
]


@backends
@pytest.mark.parametrize(("loss_type", "smoothing", "beta"), PAIR_LOSSES)
def test_dpo_closed_forms(backend: str, loss_type: str, smoothing: float, beta: float) -> None:
    loss = DPOLoss(beta=beta, loss_type=loss_type, label_smoothing=smoothing, backend=backend)
    check_against_oracle(
        loss, make_batch(seed=12, holes=0.2), variant="dpo", beta=beta, loss_type=loss_type, smoothing=smoothing
    )


@backends
@variants
@pytest.mark.parametrize(("loss_type", "smoothing", "beta"), PAIR_LOSSES)
def test_every_pair_loss_has_its_token_level_variant(
    backend: str, variant: str, loss_type: str, smoothing: float, beta: float
) -> None:
    """TDPO is DPO on effective log-ratios; IPO divides them, KL included, by the number of counted tokens."""
    loss = TDPOLoss(beta=beta, alpha=0.7, variant=variant, loss_type=loss_type, label_smoothing=smoothing, backend=backend)
    oracle = {"beta": beta, "alpha": 0.7, "loss_type": loss_type, "smoothing": smoothing}
    check_against_oracle(loss, make_batch(seed=17, holes=0.2), variant=variant, **oracle)


@pytest.mark.parametrize(("seed", "variant"), [(12, "dpo"), (17, "tdpo1"), (17, "tdpo2")])
def test_hinge_case_has_both_sides_of_the_kink(seed: int, variant: str) -> None:
    """Guards the two tests above: with these seeds some pairs are past the margin and some are not."""
    losses = expected_loss(make_batch(seed=seed, holes=0.2), variant=variant, beta=0.4, alpha=0.7, loss_type="hinge")
    assert (losses == 0).any()
    assert (losses > 0).any()


# --- options of the data ----------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("ignore_index", [-1, 0, 3])
def test_ignore_index(backend: str, ignore_index: int) -> None:
    """Any value may mark what is not counted, also one that is a valid token."""
    batch = make_batch(seed=15)
    labels = batch.labels.masked_fill(batch.labels == ignore_index, 5).masked_fill(batch.labels == IGNORE, ignore_index)
    loss = TDPOLoss(ignore_index=ignore_index, backend=backend)
    check_against_oracle(loss, batch._replace(labels=labels), variant="tdpo2", ignore_index=ignore_index)


@backends
@variants
def test_temperature_divides_both_models(backend: str, variant: str) -> None:
    loss = TDPOLoss(variant=variant, temperature=1.7, backend=backend)
    check_against_oracle(loss, make_batch(seed=16), variant=variant, temperature=1.7)


@backends
@variants
def test_vocab_size_lets_padded_models_meet(backend: str, variant: str) -> None:
    """Policy and reference padded to different widths, with NaN there: only the first `vocab_size` columns are read."""
    batch = make_batch(V=9, seed=17)
    wide = batch._replace(policy=F.pad(batch.policy, (0, 5), value=math.nan), ref=F.pad(batch.ref, (0, 2), value=math.nan))
    loss = TDPOLoss(variant=variant, vocab_size=9, backend=backend)
    out, grad = value_and_grad(lambda x: loss(x, wide.ref, wide.labels), wide.policy)
    expected, expected_grad = value_and_grad(
        lambda x: TDPOLoss(variant=variant, backend=backend)(x, batch.ref, batch.labels), batch.policy
    )
    torch.testing.assert_close(out.losses, expected.losses, **EXACT)
    torch.testing.assert_close(grad[..., :9], expected_grad, **EXACT)
    assert_exactly_zero("gradient beyond vocab_size", grad[..., 9:])


@backends
def test_int32_labels(backend: str) -> None:
    batch = make_batch(seed=18)
    check_against_oracle(TDPOLoss(backend=backend), batch._replace(labels=batch.labels.int()), variant="tdpo2")


@backends
@variants
def test_reduction_sum(backend: str, variant: str) -> None:
    batch = make_batch(seed=19)
    summed, grad = value_and_grad(
        lambda x: TDPOLoss(variant=variant, reduction="sum", backend=backend)(x, batch.ref, batch.labels), batch.policy
    )
    mean, mean_grad = value_and_grad(
        lambda x: TDPOLoss(variant=variant, backend=backend)(x, batch.ref, batch.labels), batch.policy
    )
    torch.testing.assert_close(summed.loss, mean.losses.sum(), **EXACT)
    torch.testing.assert_close(grad, 4 * mean_grad, **EXACT)


@backends
def test_the_reference_gets_no_gradient(backend: str) -> None:
    batch = make_batch(seed=20)
    policy, ref = batch.policy.requires_grad_(), batch.ref.requires_grad_()
    TDPOLoss(backend=backend)(policy, ref, batch.labels).loss.backward()
    assert policy.grad is not None
    assert ref.grad is None or not ref.grad.any()


# --- what comes back --------------------------------------------------------------------------------------------------------

METRICS = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
    "kl/chosen", "kl/rejected", "kl/margin",
}  # fmt: skip
KL_METRICS = {name for name in METRICS if name.startswith("kl/")}


@pytest.mark.parametrize("make", [TDPOLoss, DPOLoss], ids=["tdpo", "dpo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@backends
def test_output(backend: str, dtype: torch.dtype, make: type) -> None:
    batch = make_batch(seed=21, dtype=dtype)
    out = make(backend=backend)(batch.policy.requires_grad_(), batch.ref, batch.labels)
    assert isinstance(out, PreferenceOutput)
    assert out._fields == (
        "loss", "losses", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps", "chosen_kl", "rejected_kl",
        "metrics", "engine",
    )  # fmt: skip
    assert out.engine is None
    computed = torch.promote_types(dtype, torch.float32)
    assert out.loss.shape == ()
    assert out.loss.requires_grad
    for name in out._fields[:-2]:
        field = getattr(out, name)
        assert field.dtype == computed, name
        if name != "loss":
            assert field.shape == (4,), name
            assert not field.requires_grad, name
    assert set(out.metrics) == METRICS
    for name, metric in out.metrics.items():
        assert isinstance(metric, Tensor), name
        assert metric.shape == (), name
        assert metric.is_floating_point(), name
        assert not metric.requires_grad, name


@backends
@pytest.mark.parametrize("reward", ["tdpo", "effective"])
def test_metrics_are_means_over_pairs(backend: str, reward: str) -> None:
    batch = make_batch(seed=36)  # here the two rewards disagree about who won
    out = TDPOLoss(backend=backend, reward=reward)(*batch[:3])
    chosen, rejected = out.chosen_rewards, out.rejected_rewards
    expected = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).double().mean(),
        "rewards/margins": (chosen - rejected).mean(),
        "logps/chosen": out.chosen_logps.mean(),
        "logps/rejected": out.rejected_logps.mean(),
        "kl/chosen": out.chosen_kl.mean(),
        "kl/rejected": out.rejected_kl.mean(),
        "kl/margin": (out.chosen_kl - out.rejected_kl).mean(),
    }
    assert 0 < expected["rewards/accuracies"] < 1, "an accuracy of 0 or 1 tests little"
    for name, value in expected.items():
        torch.testing.assert_close(out.metrics[name].double(), value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@backends
@pytest.mark.parametrize(("variant", "chosen", "rejected"), [("tdpo1", 1.0, 1.0), ("tdpo2", 0.3, 0.3)])
def test_effective_rewards_carry_alpha(backend: str, variant: str, chosen: float, rejected: float) -> None:
    """reward="effective" is beta times what the loss compares: alpha * K in TDPO2, K in TDPO1."""
    batch = make_batch(seed=23)
    out = TDPOLoss(beta=0.2, alpha=0.3, variant=variant, reward="effective", backend=backend)(*batch[:3])
    (rho_w, rho_l), (kl_w, kl_l) = (x.chunk(2) for x in expected_sums(*batch[:3])[2:4])
    torch.testing.assert_close(out.chosen_rewards, 0.2 * (rho_w + chosen * kl_w), **EXACT)
    torch.testing.assert_close(out.rejected_rewards, 0.2 * (rho_l + rejected * kl_l), **EXACT)
    torch.testing.assert_close(out.losses, -F.logsigmoid(out.chosen_rewards - out.rejected_rewards), **EXACT)


@backends
def test_dpo_rewards_and_kl(backend: str) -> None:
    """DPO's reward is beta * rho; its KL comes for free with the reference's logits and is only reported."""
    batch = make_batch(seed=24)
    out = DPOLoss(0.2, backend=backend)(*batch[:3])
    sums = expected_sums(*batch[:3])
    torch.testing.assert_close(torch.cat([out.chosen_rewards, out.rejected_rewards]), 0.2 * sums.ratio, **EXACT)
    torch.testing.assert_close(torch.cat([out.chosen_logps, out.rejected_logps]), sums.logps, **EXACT)
    torch.testing.assert_close(torch.cat([out.chosen_kl, out.rejected_kl]), sums.kl, **EXACT)


@backends
def test_without_a_reference_distribution_there_is_no_kl(backend: str) -> None:
    batch = make_batch(seed=25)
    out = DPOLoss(backend=backend)(batch.policy, None, batch.labels, ref_logps=expected_sums(*batch[:3]).ref_logps)
    assert out.chosen_kl is None
    assert out.rejected_kl is None
    assert set(out.metrics) == METRICS - KL_METRICS


EXTRAS = ("entropy", "ref_entropy", "accuracy", "mean_logit")


def expected_token_metrics(batch: Batch) -> dict[str, float]:
    """Token by token; the first half of the sequences is chosen."""
    found: dict[str, list[float]] = {
        name: [] for name in ("entropy", "ref_entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
    }
    for s, row in enumerate(batch.labels):
        chosen = s < len(batch.labels) // 2
        for t, label in enumerate(row[1:].tolist()):
            if label == IGNORE:
                continue
            for name, logits in (("entropy", batch.policy), ("ref_entropy", batch.ref)):
                log_p = logits[s, t].double().log_softmax(-1)
                found[name].append(-float((log_p.exp() * log_p).sum()))
            found["logits/chosen" if chosen else "logits/rejected"].append(float(batch.policy[s, t].double().mean()))
            if chosen:
                found["mean_token_accuracy"].append(float(batch.policy[s, t].argmax() == label))
    return {name: sum(values) / max(len(values), 1) for name, values in found.items()}


@backends
@pytest.mark.parametrize("options", [{}, {"average_log_prob": True}, {"reduction": "sum"}], ids=["", "average", "sum"])
@pytest.mark.parametrize("layout", ["padded", "packed", "interleaved", "weighted"])
@pytest.mark.parametrize("make", [TDPOLoss, DPOLoss], ids=["tdpo", "dpo"])
def test_extras_become_means_over_tokens(backend: str, make: type, layout: str, options: dict[str, Any]) -> None:
    """Of policy and reference over all tokens that count, of accuracy over the chosen ones; whatever the loss averages."""
    batch = make_batch(V=5, holes=0.2, seed=37)
    expected = expected_token_metrics(batch)
    assert 0 < expected["mean_token_accuracy"] < 1, "an accuracy of 0 or 1 tests little"
    keywords: dict[str, Tensor] = {}
    if layout == "interleaved":
        order = [s for p in range(4) for s in (p, p + 4)]
        batch = Batch(*(x[order] for x in batch[:3]), tuple(batch.lengths[s] for s in order))
    if layout == "packed":
        keywords["cu_seqlens"], batch = batch.cu_seqlens(), batch.packed()
    if layout == "weighted":
        keywords["token_weights"] = torch.rand(batch.labels.shape).double()
    loss = make(extras=EXTRAS, interleaved=layout == "interleaved", backend=backend, **options)
    out, grad = value_and_grad(lambda x: loss(x, *batch[1:3], **keywords), batch.policy)
    assert out.metrics.keys() == METRICS | expected.keys()
    for name, value in expected.items():
        assert out.metrics[name].item() == pytest.approx(value, rel=1e-12), name
        assert out.metrics[name].shape == ()
        assert not out.metrics[name].requires_grad
    plain = make(interleaved=layout == "interleaved", backend=backend, **options)
    out, expected_grad = value_and_grad(lambda x: plain(x, *batch[1:3], **keywords), batch.policy)
    assert out.metrics.keys() == METRICS
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)


@backends
@pytest.mark.parametrize("name", EXTRAS)
def test_one_extra_alone(backend: str, name: str) -> None:
    batch = make_batch(seed=38)
    added = TDPOLoss(extras=[name], backend=backend)(*batch[:3]).metrics.keys() - METRICS
    expected = {
        "entropy": {"entropy"},
        "ref_entropy": {"ref_entropy"},
        "accuracy": {"mean_token_accuracy"},
        "mean_logit": {"logits/chosen", "logits/rejected"},
    }
    assert added == expected[name]


@backends
def test_extras_without_a_token_are_0(backend: str) -> None:
    batch = make_batch(seed=39)
    labels = batch.labels.clone()
    labels[:4] = IGNORE
    metrics = TDPOLoss(extras=EXTRAS, backend=backend)(*batch[:2], labels).metrics
    assert metrics["mean_token_accuracy"] == metrics["logits/chosen"] == 0
    assert metrics["logits/rejected"] != 0
    assert metrics["entropy"] > 0
    metrics = TDPOLoss(extras=EXTRAS, backend=backend)(*batch[:2], labels.fill_(IGNORE)).metrics
    assert all(metrics[name] == 0 for name in ("entropy", "ref_entropy", "logits/rejected"))


@pytest.mark.parametrize("backend", ["torch", "reference", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_extras_cost_no_second_op(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call of the op, which has them all."""
    calls = []
    original = fused_tdpo.losses.token_stats
    monkeypatch.setattr(
        "fused_tdpo.losses.token_stats", lambda *args, **kw: calls.append(kw["extras"]) or original(*args, **kw)
    )
    TDPOLoss(extras=EXTRAS, backend=backend)(*make_batch(TINY, V=5, dtype=torch.float32)[:3])
    assert calls == [EXTRAS]


@backends
def test_nothing_needs_a_gradient(backend: str) -> None:
    """Evaluation: under no_grad, and with logits that require none."""
    batch = make_batch(seed=26)
    plain = TDPOLoss(backend=backend)(*batch[:3])
    assert not plain.loss.requires_grad
    with torch.no_grad():
        quiet = TDPOLoss(backend=backend)(batch.policy.clone().requires_grad_(), batch.ref, batch.labels)
    assert not quiet.loss.requires_grad
    assert torch.equal(plain.losses, quiet.losses)


@pytest.mark.parametrize("make", [TDPOLoss, DPOLoss], ids=["tdpo", "dpo"])
def test_double_backward_is_refused(make: type) -> None:
    batch = make_batch(seed=27)
    policy = batch.policy.requires_grad_()
    loss = make(backend="torch")(policy, batch.ref, batch.labels).loss
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)twice|double|second"):
        torch.autograd.grad(torch.autograd.grad(loss, policy, create_graph=True)[0].square().sum(), policy)


# --- dtypes, devices, compilation -------------------------------------------------------------------------------------------

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def check_rounding(loss: torch.nn.Module, batch: Batch, variant: str) -> None:
    """Loss and gradient are no further from the float64 truth on the same rounded logits than the authors' code, which casts to
    float32, plus a slack: float32's roundings of a short chain, and for a gradient the rounding to its own dtype."""
    truth, true_grad = value_and_grad(
        lambda x: expected_loss(batch._replace(policy=x), variant=variant).mean(), batch.policy.double()
    )
    options = {"beta": 0.1, "alpha": 0.0 if variant == "dpo" else 0.5, "tdpo2": variant != "tdpo1"}
    cast = torch.promote_types(batch.policy.dtype, torch.float32)
    naive, naive_grad = value_and_grad(
        lambda x: official_tdpo(x.to(cast), batch.ref.to(cast), batch.labels, **options), batch.policy
    )
    out, grad = value_and_grad(lambda x: loss(x, batch.ref, batch.labels), batch.policy)
    assert out.loss.dtype == cast
    assert grad.dtype == batch.policy.dtype

    chain = 64 * torch.finfo(cast).eps
    stored = torch.finfo(batch.policy.dtype)
    grad_slack = stored.eps / 2 * true_grad.abs() + chain * true_grad.abs().max() + stored.smallest_normal * stored.eps
    assert_within_budget("loss", out.loss, naive.loss, truth, chain * truth)
    assert_within_budget("gradient", grad, naive_grad, true_grad, grad_slack)
    assert (true_grad.abs() > 100 * grad_slack).any(), "the budget must be able to fail"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@backends
@variants
def test_dtypes(backend: str, variant: str, dtype: torch.dtype) -> None:
    check_rounding(TDPOLoss(variant=variant, backend=backend), make_batch(V=199, dtype=dtype, seed=31), variant)


@backends
def test_policy_and_reference_may_differ_in_dtype(backend: str) -> None:
    """The official set-up: a float32 policy beside a float16 reference."""
    batch = make_batch(V=199, dtype=torch.float32, seed=32)
    check_rounding(TDPOLoss(backend=backend), batch._replace(ref=batch.ref.half()), "tdpo2")


TINY = ((1, 2), (0, 3))
HARDWARE = [
    pytest.param("cpu", torch.float32, marks=pytest.mark.interpreter, id="interpreter-float32"),
    pytest.param("cpu", torch.float16, marks=pytest.mark.interpreter, id="interpreter-float16"),
    pytest.param("cpu", torch.bfloat16, marks=pytest.mark.interpreter, id="interpreter-bfloat16"),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu, id="gpu-float32"),
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu, id="gpu-bfloat16"),
]


@pytest.mark.parametrize(("device", "dtype"), HARDWARE)
@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2", "dpo"])
def test_triton(device: str, dtype: torch.dtype, variant: str) -> None:
    batch = make_batch(TINY, V=37, dtype=dtype, seed=33)
    on_device = batch._replace(**{name: getattr(batch, name).to(device) for name in ("policy", "ref", "labels")})
    loss = DPOLoss(backend="triton") if variant == "dpo" else TDPOLoss(variant=variant, backend="triton")
    check_rounding(loss, on_device, variant)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_triton_packed_weighted_and_in_place(device: str) -> None:
    """The parts above the seam meet the kernels: boundaries, weights, and the gradient written over the logits."""
    batch = make_batch(TINY, V=37, dtype=torch.float32, seed=34)
    packed = Batch(*(x.to(device) for x in batch.packed()[:3]), batch.lengths)
    weights = torch.rand(len(packed.labels), device=device)
    buffer = packed.policy.clone().requires_grad_()
    loss = TDPOLoss(backend="triton", inplace_backward=True)
    out = loss(
        buffer.view_as(buffer), packed.ref, packed.labels, token_weights=weights, cu_seqlens=batch.cu_seqlens().to(device)
    )
    wide = torch.ones(batch.labels.shape)
    for row, part in zip(wide, weights.cpu().split(batch.lengths), strict=True):
        row[: len(part)] = part
    expected, expected_grad = value_and_grad(
        lambda x: expected_loss(batch._replace(policy=x), variant="tdpo2", token_weights=wide).mean(), batch.policy.double()
    )
    (grad,) = torch.autograd.grad(out.loss, buffer)
    torch.testing.assert_close(out.loss.double().cpu(), expected, **NEAR)
    torch.testing.assert_close(grad.double().cpu(), batch.pack(expected_grad), **NEAR)


@pytest.mark.gpu
@variants
@pytest.mark.parametrize(
    "options",
    [{}, {"loss_type": ("sft", "ipo")}, {"loss_type": "aot"}, {"ld_alpha": 0.3, "use_weighting": True}],
    ids=["sigmoid", "sft", "aot", "weighted"],
)
def test_losses_on_gpu_do_not_synchronise(variant: str, options: dict[str, Any]) -> None:
    batch = make_batch(TINY, V=37, dtype=torch.float32, seed=35)
    policy, ref, labels = (x.cuda() for x in batch[:3])
    loss = TDPOLoss(variant=variant, extras=EXTRAS, **options)
    loss(policy.clone().requires_grad_(), ref, labels).loss.backward()  # compiles
    policy.requires_grad_()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss(policy, ref, labels).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


COMPILED = [
    pytest.param(lambda: TDPOLoss(variant="tdpo1", backend="torch"), id="tdpo1"),
    pytest.param(lambda: TDPOLoss(backend="torch"), id="tdpo2"),
    pytest.param(lambda: TDPOLoss(loss_type="ipo", average_log_prob=True), id="tdpo2-ipo-auto"),
    pytest.param(lambda: DPOLoss(label_smoothing=0.1, backend="torch"), id="cdpo"),
    pytest.param(lambda: TDPOLoss(extras=("entropy", "accuracy"), backend="torch"), id="extras"),
    pytest.param(lambda: TDPOLoss(loss_type=("sigmoid", "sft", "aot"), loss_weights=(0.8, 0.1, 0.3)), id="mixture"),
    pytest.param(lambda: TDPOLoss(ld_alpha=0.3, use_weighting=True), id="weighted"),
    pytest.param(lambda: DPOLoss(f_divergence="alpha", f_alpha=0.4, f_max_exponent=20.0), id="f-dpo"),
]


@pytest.mark.parametrize("make", COMPILED)
def test_compiles_without_a_graph_break(make: Callable[[], torch.nn.Module]) -> None:
    batch = make_batch(seed=36)
    loss = make()
    eager, eager_grad = value_and_grad(lambda x: loss(x, batch.ref, batch.labels), batch.policy)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    out, grad = value_and_grad(lambda x: compiled(x, batch.ref, batch.labels), batch.policy)
    torch.testing.assert_close(out.losses, eager.losses, **EXACT)
    torch.testing.assert_close(grad, eager_grad, **EXACT)
    assert set(out.metrics) == set(eager.metrics)


# --- refused input ----------------------------------------------------------------------------------------------------------

GOOD = make_batch(TINY, V=5, dtype=torch.float32)
PACKED = GOOD.packed()
ODD = make_batch(((1, 2), (0, 3), (1, 1)), V=5, dtype=torch.float32)
S, T = GOOD.labels.shape


def call_packed(cu_seqlens: Any) -> PreferenceOutput:
    return TDPOLoss()(*PACKED[:3], cu_seqlens=cu_seqlens)


BOTH_NAMES = r"(?s)(?=.*ref_logits)(?=.*ref_logps)"

CALLS: list[Any] = [
    # id, call, pattern in the message
    ("odd", lambda: TDPOLoss()(*ODD[:3]), r"(?is)(even|pair|odd).*3|3.*(even|pair|odd)"),
    ("odd-packed", lambda: TDPOLoss()(*ODD.packed()[:3], cu_seqlens=ODD.cu_seqlens()), r"(?i)even|pair|odd"),
    ("labels-shape", lambda: TDPOLoss()(GOOD.policy, GOOD.ref, GOOD.labels[:, 1:]), r"(?s)labels.*\(2, 2\)"),
    ("labels-float", lambda: TDPOLoss()(GOOD.policy, GOOD.ref, GOOD.labels.float()), r"(?s)labels.*float32"),
    ("labels-out-of-range", lambda: TDPOLoss()(GOOD.policy, GOOD.ref, GOOD.labels.clamp(min=5)), r"(?i)label"),
    ("labels-elsewhere", lambda: TDPOLoss()(GOOD.policy, GOOD.ref, GOOD.labels.to("meta")), r"(?i)meta"),
    ("ref-shape", lambda: TDPOLoss()(GOOD.policy, GOOD.ref[:, 1:], GOOD.labels), r"(?s)ref_logits.*\(2, 2, 5\)"),
    ("ref-width", lambda: TDPOLoss()(GOOD.policy, GOOD.ref[..., :4], GOOD.labels), r"vocab_size"),
    ("ref-labels-swapped", lambda: TDPOLoss()(GOOD.policy, GOOD.labels, GOOD.ref), r"(?i)label|swap|order"),
    ("integer-logits", lambda: TDPOLoss()(GOOD.policy.int(), GOOD.ref, GOOD.labels), r"(?s)policy_logits.*int32"),
    ("rows-without-boundaries", lambda: TDPOLoss()(*PACKED[:3]), r"cu_seqlens"),
    ("boundaries-float", lambda: call_packed(GOOD.cu_seqlens(torch.float32)), r"(?s)cu_seqlens.*float32"),
    ("boundaries-2d", lambda: call_packed(GOOD.cu_seqlens()[None]), r"(?s)cu_seqlens.*\(1, 3\)"),
    ("boundaries-list", lambda: call_packed([0, 3, 6]), r"cu_seqlens"),
    ("boundaries-short", lambda: call_packed(torch.tensor([0, 3, 5])), r"(?s)cu_seqlens.*[56]"),
    ("boundaries-late", lambda: call_packed(torch.tensor([1, 3, 6])), r"cu_seqlens"),
    ("boundaries-decreasing", lambda: call_packed(torch.tensor([0, 4, 2, 5, 6])), r"cu_seqlens"),
    ("token-weights-shape", lambda: TDPOLoss()(*GOOD[:3], token_weights=torch.ones(S, T - 1)), r"(?s)token_weights.*\(2, 2\)"),
    ("kl-weights-shape", lambda: TDPOLoss()(*GOOD[:3], kl_weights=torch.ones(S)), r"(?s)kl_weights.*\(2,\)"),
    ("packed-weights-shape",
     lambda: TDPOLoss()(*PACKED[:3], cu_seqlens=GOOD.cu_seqlens(), token_weights=torch.ones(S, T)), r"token_weights"),
    ("tdpo-no-reference", lambda: TDPOLoss()(GOOD.policy, None, GOOD.labels), r"(?i)ref"),
    ("tdpo-ref-logps", lambda: TDPOLoss()(GOOD.policy, None, GOOD.labels, ref_logps=torch.zeros(S)),
     r"(?is)ref_logps.*(distribution|vocabulary|logits)|(distribution|vocabulary|logits).*ref_logps"),
    ("dpo-no-reference", lambda: DPOLoss()(GOOD.policy, None, GOOD.labels), BOTH_NAMES),
    ("dpo-two-references", lambda: DPOLoss()(*GOOD[:3], ref_logps=torch.zeros(S)), BOTH_NAMES),
    ("ref-logps-shape",
     lambda: DPOLoss()(GOOD.policy, None, GOOD.labels, ref_logps=torch.zeros(S - 1)), r"(?s)ref_logps.*\(1,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), [pytest.param(*case[1:], id=case[0]) for case in CALLS])
def test_bad_calls_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


SETTINGS: list[Any] = [
    # loss, arguments, pattern in the message
    (TDPOLoss, {"beta": 0.0}, r"beta"),
    (DPOLoss, {"beta": -0.1}, r"(?s)beta.*-0\.1"),
    (TDPOLoss, {"beta": math.nan}, r"beta"),
    (TDPOLoss, {"loss_type": "dpo"}, r"(?s)loss_type.*'dpo'.*sigmoid|loss_type.*sigmoid.*'dpo'"),
    (DPOLoss, {"loss_type": "nonsense"}, r"(?s)loss_type.*nonsense|nonsense.*loss_type"),
    (TDPOLoss, {"variant": "tdpo3"}, r"(?s)(?=.*variant)(?=.*tdpo3)(?=.*tdpo1)(?=.*tdpo2)"),
    (TDPOLoss, {"reward": "dpo"}, r"(?s)(?=.*reward)(?=.*effective)"),
    (TDPOLoss, {"reduction": "median"}, r"(?s)(?=.*reduction)(?=.*median)"),
    (TDPOLoss, {"divergence": "tv"}, r"(?s)(?=.*divergence)(?=.*forward_kl)"),
    (TDPOLoss, {"divergence": "alpha"}, r"divergence"),  # without its order
    (TDPOLoss, {"divergence_alpha": 0.5}, r"divergence_alpha"),
    (DPOLoss, {"f_divergence": "chi2"}, r"(?s)(?=.*f_divergence)(?=.*chi2)(?=.*reverse_kl)"),
    (DPOLoss, {"f_divergence": "alpha"}, r"f_alpha"),
    (DPOLoss, {"f_alpha": 0.5}, r"f_alpha"),
    (DPOLoss, {"label_smoothing": -0.1}, r"label_smoothing"),
    (DPOLoss, {"label_smoothing": 1.5}, r"label_smoothing"),
    (TDPOLoss, {"label_smoothing": 1.5}, r"label_smoothing"),
    (DPOLoss, {"label_smoothing": 0.5, "loss_type": "robust"}, r"label_smoothing"),
    (DPOLoss, {"label_smoothing": 0.1, "loss_type": "ipo"}, r"(?s)(?=.*label_smoothing)(?=.*ipo)"),
    (TDPOLoss, {"label_smoothing": 0.1, "loss_type": "hinge"}, r"(?s)(?=.*label_smoothing)(?=.*hinge)"),
    (TDPOLoss, {"backend": "cuda"}, r"(?s)(?=.*backend)(?=.*triton)"),
]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        pytest.param(make, arguments, message, id=make.__name__ + "-" + "-".join(f"{k}={v}" for k, v in arguments.items()))
        for make, arguments, message in SETTINGS
    ],
)
def test_bad_settings_are_refused_when_the_loss_is_made(make: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        make(**arguments)


@pytest.mark.parametrize("make", [TDPOLoss, DPOLoss], ids=["tdpo", "dpo"])
def test_reduction_none_is_refused_with_the_recipe(make: type) -> None:
    """Per-pair losses are `out.losses`, detached; differentiable ones are built from the op, which the message names."""
    with pytest.raises((ValueError, NotImplementedError), match=r"token_stats"):
        make(reduction="none")


# --- module manners ---------------------------------------------------------------------------------------------------------

TDPO_DEFAULTS = {
    "beta": 0.1, "alpha": 0.5, "variant": "tdpo2", "loss_type": "sigmoid", "label_smoothing": 0.0, "divergence": "forward_kl",
    "divergence_alpha": None, "reward": "tdpo", "average_log_prob": False, "interleaved": False, "reduction": "mean",
    "backend": "auto",
}  # fmt: skip
DPO_DEFAULTS = {"beta": 0.1, "loss_type": "sigmoid", "label_smoothing": 0.0, "f_divergence": "reverse_kl", "f_alpha": None}
SHARED_DEFAULTS = {"interleaved": False, "reduction": "mean", "backend": "auto"}


@pytest.mark.parametrize(
    ("name", "defaults"),
    [
        ("TDPOLoss", TDPO_DEFAULTS | {"inplace_backward": False}),
        ("DPOLoss", DPO_DEFAULTS | SHARED_DEFAULTS | {"inplace_backward": False}),
    ],
)
def test_defaults(name: str, defaults: dict[str, object]) -> None:
    signature = inspect.signature(getattr(fused_tdpo, name))
    assert {option: signature.parameters[option].default for option in defaults} == defaults
    assert next(iter(signature.parameters)) == "beta"


@pytest.mark.parametrize("make", [TDPOLoss, DPOLoss], ids=["tdpo", "dpo"])
def test_call_keywords(make: type) -> None:
    parameters = inspect.signature(make.forward).parameters
    for name in ("token_weights", "kl_weights", "cu_seqlens", "num_pairs", "valid_rows"):
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert parameters[name].default is None, name
    assert list(parameters)[1:4] == ["policy_logits", "ref_logits", "labels"]


MODULES = [
    pytest.param(lambda: TDPOLoss(0.2, alpha=0.7, variant="tdpo1", backend="torch"), ("0.2", "0.7", "tdpo1"), id="tdpo"),
    pytest.param(lambda: DPOLoss(0.3, loss_type="robust", label_smoothing=0.15), ("0.3", "robust", "0.15"), id="dpo"),
]


@pytest.mark.parametrize(("make", "shown"), MODULES)
def test_a_module_without_parameters(make: Callable[[], torch.nn.Module], shown: tuple[str, ...]) -> None:
    loss = make()
    assert isinstance(loss, torch.nn.Module)
    assert not list(loss.parameters())
    assert not list(loss.buffers())
    assert not loss.state_dict()
    assert type(loss).__name__ in repr(loss)
    for value in shown:
        assert value in repr(loss)


@pytest.mark.parametrize(("make", "shown"), MODULES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_the_same_loss(make: Callable[[], torch.nn.Module], shown: tuple[str, ...], duplicate: Callable) -> None:
    loss, batch = make(), make_batch(seed=41)
    twin = duplicate(loss)
    assert repr(twin) == repr(loss)
    assert torch.equal(twin(*batch[:3]).losses, loss(*batch[:3]).losses)
    assert torch.equal(twin.eval()(*batch[:3]).losses, loss.train()(*batch[:3]).losses)


# --- memory: logits are read where they lie ---------------------------------------------------------------------------------


class _Producer(torch.autograd.Function):
    """Stands for the model: hands out logits that are not a leaf, and remembers where their gradient lay."""

    @staticmethod
    def forward(ctx: Any, seed: Tensor, logits: Tensor, seen: list[Tensor]) -> Tensor:
        ctx.seen = seen
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.seen.append(grad)
        return grad.new_zeros(1), None, None


LARGE_V = 2**17
LARGE = ((8, 24), (4, 28))  # 64 rows: one (N, V) float32 tensor is 32 MiB, more than a chunk; and so is half of it


@pytest.fixture(scope="module")
def large() -> Batch:
    layout = make_batch(LARGE, V=3, seed=51)
    shape = (*layout.labels.shape, LARGE_V)
    gen = torch.Generator().manual_seed(51)
    return layout._replace(policy=torch.randn(shape, generator=gen), ref=torch.randn(shape, generator=gen))


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """The first half of the positions, and all of them: what grows from one to the other grows with N."""
    half = batch.labels.shape[1] // 2
    return Batch(*(x[:, :half].contiguous() for x in batch[:3]), (half, half)), batch


def of_logits_size(memory: Allocations, batch: Batch) -> list[int]:
    """Allocations of half an (N, V) tensor or more: what a copy, a cast or a concatenated half of the batch would take."""
    return memory.of_at_least(batch.policy.nbytes // 2)


def assert_bounded(less: Allocations, more: Allocations, growth: int, by: int) -> None:
    """From half of N to all of N, the peak grows by `growth` bytes and by less than half of what one more (N, V) tensor would
    add (`by` bytes); chunks may be of slightly different size."""
    assert abs(more.peak - less.peak - growth) < by // 2, f"peaks {less.peak} and {more.peak} bytes"


def test_the_memory_counter_counts(large: Batch) -> None:
    """It sees an allocation inside a custom op, and its release. Guards the tests below."""

    @torch.library.custom_op("test_losses::hidden_copy", mutates_args=())
    def hidden_copy(x: Tensor) -> Tensor:
        return x.clone().sum()

    with counted_allocations() as memory:
        hidden_copy(large.policy)
        hidden_copy(large.policy)
    assert of_logits_size(memory, large) == [large.policy.nbytes] * 2
    assert large.policy.nbytes <= memory.peak < 1.5 * large.policy.nbytes


@pytest.mark.parametrize(
    ("family", "view"), [("tdpo1", "plain"), ("dpo", "plain"), ("tdpo2", "positions"), ("tdpo2", "columns")]
)
def test_one_gradient_and_nothing_else_of_its_size(large: Batch, family: str, view: str) -> None:
    """Also for views with a contiguous last axis: a copy would betray itself by its size."""
    options: dict[str, Any] = {"vocab_size": LARGE_V - 5} if view == "columns" else {}
    loss = DPOLoss(backend="torch") if family == "dpo" else TDPOLoss(variant=family, backend="torch", **options)
    forwards, backwards, grads = [], [], []
    for batch in halves(large):
        policy, ref, labels, _ = batch
        if view == "positions":  # what slicing the last positions off a model's output gives
            policy, ref, labels = policy[:, :-1], ref[:, :-1], labels[:, :-1]
        policy = policy.detach().requires_grad_()
        with counted_allocations() as forward:
            out = loss(policy, ref, labels)
        with counted_allocations() as backward:
            torch.autograd.grad(out.loss, policy)
        grads.append(policy.numel() * policy.element_size())
        forwards.append(forward)
        backwards.append(backward)
    assert not of_logits_size(forwards[1], large)
    assert of_logits_size(backwards[1], large) == grads[1:]
    assert_bounded(*forwards, growth=0, by=grads[1] - grads[0])
    assert_bounded(*backwards, growth=grads[1] - grads[0], by=grads[1] - grads[0])


@variants
def test_in_place_nothing_of_the_logits_size_is_allocated(large: Batch, variant: str) -> None:
    """The gradient lies where the logits lay, and is the one that the ordinary backward gives."""
    ordinary = TDPOLoss(variant=variant, backend="torch")
    loss = TDPOLoss(variant=variant, backend="torch", inplace_backward=True)
    memories = []
    for batch in halves(large):
        buffer, seed, seen = batch.policy.clone(), torch.zeros(1, requires_grad=True), []
        logits = _Producer.apply(seed, buffer, seen)
        with counted_allocations() as memory:
            loss(logits, batch.ref, batch.labels).loss.backward()
        assert seen[0].data_ptr() == buffer.data_ptr()
        _, expected = value_and_grad(lambda x, b=batch: ordinary(x, b.ref, b.labels), batch.policy)
        assert torch.equal(seen[0], expected)
        memories.append(memory)
    assert not of_logits_size(memories[1], large)
    assert_bounded(*memories, growth=0, by=large.policy.nbytes // 2)


def test_in_place_twice_is_refused() -> None:
    batch = make_batch(seed=52)
    leaf = batch.policy.requires_grad_()
    out = TDPOLoss(backend="torch", inplace_backward=True)(leaf * 1.0, batch.ref, batch.labels)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)in-?place"):
        out.loss.backward()


def test_in_place_over_an_output_that_its_producer_needs_is_refused() -> None:
    """exp keeps its output for backward: overwriting it must raise, not give a wrong gradient."""
    batch = make_batch(seed=53)
    leaf = batch.policy.requires_grad_()
    out = TDPOLoss(backend="torch", inplace_backward=True)(leaf.exp(), batch.ref, batch.labels)
    with pytest.raises(RuntimeError, match=r"(?i)in-?place"):
        out.loss.backward()


@variants
def test_in_place_is_off_by_default(variant: str) -> None:
    batch = make_batch(seed=54)
    before = batch.policy.clone()
    leaf = batch.policy.requires_grad_()
    TDPOLoss(variant=variant, backend="torch")(leaf, batch.ref, batch.labels).loss.backward()
    assert torch.equal(leaf.detach(), before)
