"""KTO and BCO: the papers' formulas, both levels, TRL and Liger, means by kind, and the edges.

The oracle writes the formulas as printed, sequence by sequence, in float64 on sums of the naive oracle in `official_tdpo`.
Letters: S sequences, T positions, D hidden size, V vocabulary; κ the reference point of KTO, δ that of BCO.
"""

import inspect
import math
import re
from collections import defaultdict
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fused_tdpo import linear_token_stats, token_stats
from fused_tdpo.types import UnpairedOutput
from fused_tdpo.unpaired import (
    BCOLoss,
    KTOLoss,
    LinearBCOLoss,
    LinearKTOLoss,
    LinearUnpairedLoss,
    UnpairedLoss,
    kto_reference_point,
)
from official_tdpo import IGNORE, expected_sums, make_batch, value_and_grad
from parity_table import fused_head
from products import counted_products
from tolerances import assert_exactly_zero, assert_within_budget

fp64 = torch.float64
EXACT = 1e-9  # float64 against float64: only the order of summation may differ
SINGLE = 5e-5  # float32 against float64

LINEAR: dict[type, type] = {KTOLoss: LinearKTOLoss, BCOLoss: LinearBCOLoss}
LOSSES: dict[str, tuple[type[UnpairedLoss], dict[str, Any], float | None]] = {  # the loss, its options, a reference point
    "kto": (KTOLoss, {}, 0.3),
    "kto-at-0": (KTOLoss, {"beta": 0.4}, 0.0),
    "kto-weighted": (KTOLoss, {"beta": 0.7, "desirable_weight": 1.3, "undesirable_weight": 0.8, "reduction": "sum"}, 0.6),
    "apo": (KTOLoss, {"beta": 0.5, "loss_type": "apo_zero_unpaired"}, None),
    "bco": (BCOLoss, {}, 0.2),
    "bco-negative": (BCOLoss, {"beta": 0.8}, -0.4),
}
every_loss = pytest.mark.parametrize(
    ("make", "options", "point"), [pytest.param(*case, id=name) for name, case in LOSSES.items()]
)
ODD = ((2, 3), (0, 4), (3, 1), (1, 5), (2, 2), (0, 3), (3, 4))
DESIRABLE = torch.tensor([True, False, False, True, True, False, True])


def near(what: str, got: Tensor, expected: Tensor, relative: float = EXACT) -> None:
    """Every element within `relative` of the largest one, or of 1e-3 where all are smaller."""
    size = max(1e-3, float(expected.detach().abs().max())) if expected.numel() else 1.0
    assert_within_budget(what, got, expected, expected, torch.full_like(expected, relative * size, dtype=fp64).detach())


def literal(make: type, options: dict[str, Any], point: float | None, rho: Tensor, desirable: Tensor) -> Tensor:
    """(S,) losses, as printed."""
    beta, sigmoid = options.get("beta", 0.1), torch.sigmoid
    losses = []
    for ratio, good in zip(rho, desirable.tolist(), strict=True):
        if make is BCOLoss:
            r = beta * ratio
            losses.append(-torch.log(sigmoid(r - point)) if good else -torch.log(sigmoid(-(r - point))))
            continue
        weight = options.get("desirable_weight" if good else "undesirable_weight", 1.0)
        value = weight * (sigmoid(beta * (ratio - (point or 0.0))) if good else sigmoid(beta * ((point or 0.0) - ratio)))
        losses.append(weight - value)
    return torch.stack(losses)


# --- modules on logits ------------------------------------------------------------------------------------------------------

# ρ = log 3 and −log 2 at β = 1
BY_HAND: list[Any] = [
    (KTOLoss(1.0), 0.0, (1 / 4, 1 / 3)),
    (KTOLoss(1.0), math.log(2), (2 / 5, 1 / 5)),
    (KTOLoss(1.0, loss_type="apo_zero_unpaired", desirable_weight=2.0), None, (1 / 2, 1 / 3)),
    (BCOLoss(1.0), 0.0, (math.log(4 / 3), math.log(3 / 2))),
    (BCOLoss(1.0), math.log(2), (math.log(5 / 3), math.log(5 / 4))),
]


@pytest.mark.parametrize(("loss", "point", "expected"), BY_HAND)
def test_by_hand(loss: UnpairedLoss, point: float | None, expected: tuple[float, float]) -> None:
    logits = torch.zeros(2, 2, 4, dtype=fp64)  # log p = −log 4
    ref_logps = torch.tensor([-math.log(12), -math.log(2)], dtype=fp64)
    labels = torch.tensor([[IGNORE, 1]] * 2)
    out = loss(logits, None, labels, torch.tensor([True, False]), reference_point=point, ref_logps=ref_logps)
    near("losses", out.losses, torch.tensor(expected, dtype=fp64), 1e-14)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@every_loss
def test_formula(make: type, options: dict[str, Any], point: float | None, packed: bool, weighted: bool, backend: str) -> None:
    """Losses, the loss, its gradient, and what is reported; an odd number of sequences, in any order."""
    batch = make_batch(ODD, seed=11, holes=0.2, padding=2)
    S, weights = len(ODD), torch.rand(batch.labels.shape, dtype=fp64) if weighted else None
    shares = torch.rand(S, dtype=fp64) if weighted else torch.ones(S, dtype=fp64)
    sums = expected_sums(*batch[:3], token_weights=weights)
    expected = shares * literal(make, options, point, sums.ratio, DESIRABLE)

    def whole(x: Tensor) -> Tensor:
        rho = expected_sums(x, *batch[1:3], token_weights=weights).ratio
        return (shares * literal(make, options, point, rho, DESIRABLE)).sum() / (S if options.get("reduction") is None else 1)

    value, expected_grad = value_and_grad(whole, batch.policy)
    assert expected_grad.abs().max() > 1e-3, "the case must move something"
    call: dict[str, Any] = {} if weights is None else {"token_weights": weights}
    given = batch
    if packed:
        call = {name: batch.pack(x) for name, x in call.items()} | {"cu_seqlens": batch.cu_seqlens()}
        expected_grad, given = batch.pack(expected_grad), batch.packed()
    call |= {"reference_point": point, "sequence_weights": shares if weighted else None}
    loss = make(backend=backend, **options)
    out, grad = value_and_grad(lambda x: loss(x, *given[1:3], DESIRABLE, **call), given.policy)
    near("losses", out.losses, expected)
    near("loss", out.loss, value)
    near("gradient", grad, expected_grad)
    rewards = options.get("beta", 0.1) * sums.ratio
    for name, got, right in (("rewards", out.rewards, rewards), ("logps", out.logps, sums.logps), ("kl", out.kl, sums.kl)):
        near(name, got, right)
        near(f"{name}/chosen", out.metrics[f"{name}/chosen"], right[DESIRABLE].mean())
        near(f"{name}/rejected", out.metrics[f"{name}/rejected"], right[~DESIRABLE].mean())
    near("margins", out.metrics["rewards/margins"], rewards[DESIRABLE].mean() - rewards[~DESIRABLE].mean())
    near("point", out.metrics["delta" if make is BCOLoss else "kl"], torch.tensor(point or 0.0, dtype=fp64))
    assert out.engine is None
    assert not any(t.requires_grad for t in (out.losses, out.rewards, out.logps, out.kl, *out.metrics.values()))


@every_loss
def test_a_precomputed_reference(make: type, options: dict[str, Any], point: float | None) -> None:
    batch = make_batch(ODD, seed=12)
    loss, sums = make(**options), expected_sums(*batch[:3])
    expected, expected_grad = value_and_grad(lambda x: loss(x, *batch[1:3], DESIRABLE, reference_point=point), batch.policy)
    out, grad = value_and_grad(
        lambda x: loss(x, None, batch.labels, DESIRABLE, reference_point=point, ref_logps=sums.ref_logps), batch.policy
    )
    near("losses", out.losses, expected.losses)
    near("gradient", grad, expected_grad)
    assert out.kl is None
    assert out.metrics.keys() == {name for name in expected.metrics if not name.startswith("kl/")}


@every_loss
def test_a_reference_point_is_a_constant(make: type, options: dict[str, Any], point: float | None) -> None:
    """A tensor, float32 beside float64, gives what the number gives, and gets no gradient."""
    if point is None:
        return
    batch, loss = make_batch(ODD, seed=13), make(**options)
    at = torch.tensor(0.5, requires_grad=True)
    out = loss(batch.policy.requires_grad_(), *batch[1:3], DESIRABLE, reference_point=at)
    out.loss.backward()
    assert at.grad is None and not any(value.requires_grad for value in out.metrics.values())
    near("losses", out.losses, loss(*batch[:3], DESIRABLE, reference_point=0.5).losses)


@pytest.mark.parametrize("desirable", [True, False])
@every_loss
def test_one_kind_alone(make: type, options: dict[str, Any], point: float | None, desirable: bool) -> None:
    """What there is none of has means of 0, and so has the margin."""
    batch, loss = make_batch(ODD, seed=14), make(**options, extras=("accuracy", "mean_logit"))
    kind = torch.full((len(ODD),), desirable)
    out, grad = value_and_grad(lambda x: loss(x, *batch[1:3], kind, reference_point=point), batch.policy)
    near("losses", out.losses, literal(make, options, point, expected_sums(*batch[:3]).ratio, kind))
    assert grad.any()
    side, other = ("chosen", "rejected") if desirable else ("rejected", "chosen")
    for name in ("rewards", "logps", "kl", "logits"):
        assert out.metrics[f"{name}/{side}"] != 0
        assert out.metrics[f"{name}/{other}"] == 0
    assert out.metrics["rewards/margins"] == 0
    near("mean", out.metrics[f"rewards/{side}"], out.rewards.mean())


@pytest.mark.parametrize("make", LINEAR)
def test_common_options(make: type) -> None:
    """Those of every loss: temperature, a cut vocabulary, another ignored label, a mean over ranks, metrics of tokens."""
    batch = make_batch(ODD, seed=15, holes=0.2)
    labels = batch.labels.clamp(max=19).masked_fill(batch.labels == IGNORE, -7)
    policy, ref = (x[..., :20] for x in batch[:2])
    sums = expected_sums(policy, ref, labels, ignore_index=-7, temperature=1.7)
    loss = make(temperature=1.7, vocab_size=20, ignore_index=-7, extras=("entropy", "ref_entropy", "accuracy", "mean_logit"))
    out = loss(*batch[:2], labels, DESIRABLE, reference_point=0.1, num_sequences=torch.tensor(20), valid_rows=None)
    expected = literal(make, {}, 0.1, sums.ratio, DESIRABLE)
    near("losses", out.losses, expected)
    near("loss", out.loss, expected.sum() / 20)
    mask, x = labels[:, 1:] != -7, policy[:, :-1]
    log_p = (x / 1.7).log_softmax(-1)
    near("entropy", out.metrics["entropy"], -(log_p.exp() * log_p).sum(-1)[mask].mean())
    chosen = mask & DESIRABLE[:, None]
    near("accuracy", out.metrics["mean_token_accuracy"], (x.argmax(-1) == labels[:, 1:])[chosen].double().mean())
    near("logits", out.metrics["logits/rejected"], x.mean(-1)[mask & ~DESIRABLE[:, None]].mean())
    nothing = loss(*(x[:0] for x in batch[:2]), labels[:0], DESIRABLE[:0], reference_point=0.1)
    assert nothing.loss == 0
    assert all(value == 0 for name, value in nothing.metrics.items() if name not in ("kl", "delta"))


@pytest.mark.parametrize("make", LINEAR)
def test_compiles_without_a_graph_break(make: type) -> None:
    torch._dynamo.reset()
    batch, loss = make_batch(ODD, seed=16), make()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    call = {"reference_point": torch.tensor(0.2)}
    out, grad = value_and_grad(lambda x: compiled(x, *batch[1:3], DESIRABLE, **call), batch.policy)
    expected, expected_grad = value_and_grad(lambda x: loss(x, *batch[1:3], DESIRABLE, **call), batch.policy)
    near("loss", out.loss, expected.loss)
    near("gradient", grad, expected_grad)
    for number in (0.2, 0.3, 0.4):  # which makes it a symbol
        call = {"reference_point": number}
        near("loss", compiled(*batch[:3], DESIRABLE, **call).loss, loss(*batch[:3], DESIRABLE, **call).loss)


# --- reference points -------------------------------------------------------------------------------------------------------


def test_kto_reference_point() -> None:
    """A mean, not below 0, and a constant; by the recipe of its docstring, at both levels."""
    ratios = torch.tensor([1.0, -3.0, 5.0], requires_grad=True)
    assert kto_reference_point(ratios) == 1.0
    assert not kto_reference_point(ratios).requires_grad
    assert kto_reference_point(ratios - 4) == 0.0
    batch = make_batch(ODD, seed=17)
    expected = expected_sums(*batch[:3]).ratio.mean()
    assert expected < 0, "the policy is worse at random labels"
    swap = expected_sums(batch.ref, batch.policy, batch.labels).ratio.mean()  # above 0, of the models exchanged
    targets = F.pad(batch.labels, (0, 1), value=IGNORE)[:, 1:]
    for policy, ref, right in ((batch.policy, batch.ref, 0.0), (batch.ref, batch.policy, float(swap))):
        eye = torch.eye(policy.shape[-1], dtype=fp64)
        for stats in (token_stats(policy, ref, targets), linear_token_stats(policy, eye, ref, eye, targets)):
            kappa = kto_reference_point((stats.logp - stats.ref_logp).sum(-1))
            near("κ", kappa, torch.tensor(right, dtype=fp64))


def test_no_log_ratio_has_no_mean() -> None:
    with pytest.raises(ValueError, match=r"(?s)at least one.*last κ"):
        kto_reference_point(torch.empty(0))
    with pytest.raises(ValueError, match=r"(?s)\(S,\).*\(3, 4\).*\.sum\(-1\)"):
        kto_reference_point(torch.zeros(3, 4))


def test_bco_reference_point() -> None:
    """The loop of BCOLoss's docstring: δ is halfway between the mean rewards of both kinds in all steps so far."""
    (loop,) = re.findall(r"^        for batch in batches:\n((?: {12}.*\n)+)", BCOLoss.__doc__, re.MULTILINE)
    names: dict[str, Any] = {"torch": torch, "loss": BCOLoss(0.5), "delta": 0.0, "totals": torch.zeros(2, 2, dtype=fp64)}
    good, bad = [], []
    for seed, desirable in ((21, DESIRABLE), (22, ~DESIRABLE), (23, torch.ones_like(DESIRABLE))):
        batch, delta = make_batch(ODD, seed=seed), float(names["delta"])
        names |= {"policy_logits": batch.policy.requires_grad_(), "ref_logits": batch.ref, "labels": batch.labels}
        exec(inspect.cleandoc(loop), names | {"desirable": desirable}, names)
        ratio = expected_sums(*batch[:3]).ratio.detach()
        near("losses", names["out"].losses, literal(BCOLoss, {"beta": 0.5}, delta, ratio, desirable))
        good += [0.5 * float(r) for r, is_good in zip(ratio, desirable, strict=True) if is_good]
        bad += [0.5 * float(r) for r, is_good in zip(ratio, desirable, strict=True) if not is_good]
        near("δ", names["delta"], torch.tensor((fmean(good) + fmean(bad)) / 2, dtype=fp64))
        assert not names["delta"].requires_grad


# --- hidden states ----------------------------------------------------------------------------------------------------------


class Hidden(NamedTuple):
    """Hidden states (S, T, D) and weights (V, D) of policy and reference, and labels (S, T)."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype) -> "Hidden":
        return Hidden(*(x.to(dtype) for x in self[:4]), self.labels)

    def run(self, loss: UnpairedLoss, trained: bool = True, **call: Any) -> tuple[UnpairedOutput, list[Tensor]]:
        """From hidden states, or from whole logits; the output, and gradients of hidden states and of a trained weight."""
        hidden, weight = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_(trained)
        ref = (None, None) if "ref_logps" in call else self[2:4]
        if isinstance(loss, LinearUnpairedLoss):
            out = loss(hidden, weight, *ref, self.labels, DESIRABLE, **call)
        else:
            logits = None if ref[0] is None else ref[0] @ ref[1].T
            out = loss(hidden @ weight.T, logits, self.labels, DESIRABLE, **call)
        return out, list(torch.autograd.grad(1.7 * out.loss, [hidden, weight] if trained else [hidden]))


def make_hidden(seed: int, V: int = 19, D: int = 6, layout: Any = ODD) -> Hidden:
    labels = make_batch(layout, V, seed=seed, holes=0.2).labels
    states = [torch.randn(*labels.shape, D, dtype=fp64) for _ in range(2)]
    weights = [torch.randn(V, D, dtype=fp64) for _ in range(2)]
    return Hidden(states[0], weights[0], states[1], weights[1], labels)


def assert_same(got: Any, expected: Any, relative: float, what: str) -> None:
    for name in ("loss", "losses", "rewards", "logps", "kl"):
        a, b = getattr(got[0], name), getattr(expected[0], name)
        assert (a is None) == (b is None)
        if b is not None:
            near(f"{what}: {name}", a, b, relative)
    assert got[0].metrics.keys() == expected[0].metrics.keys()
    for name, value in expected[0].metrics.items():
        near(f"{what}: {name}", got[0].metrics[name], value, relative)
    for name, grad, right in zip(("hidden", "weight"), got[1], expected[1], strict=False):
        near(f"{what}: gradient of {name}", grad, right, relative)


@pytest.mark.parametrize("given", ["reference", "ref_logps"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@every_loss
def test_hidden_states_give_what_logits_give(
    make: type, options: dict[str, Any], point: float | None, weighted: bool, given: str
) -> None:
    """Chunk, head trained or frozen: one loss, one gradient; near it in float32."""
    batch, S = make_hidden(seed=31), len(ODD)
    call: dict[str, Any] = {"reference_point": point}
    if weighted:
        call |= {"token_weights": torch.rand(batch.labels.shape, dtype=fp64), "sequence_weights": torch.rand(S, dtype=fp64)}
    if given == "ref_logps":
        call["ref_logps"] = -5 * torch.rand(S, dtype=fp64)
    expected = batch.run(make(backend="reference", **options), **call)
    counts = (batch.labels[:, 1:] != IGNORE).sum(-1).tolist()
    for budget in (19 * 8, 8 * 19 * 8, None):
        for trained in (True, False):
            for engine in ("auto", "recompute"):
                loss = LINEAR[make](max_chunk_bytes=budget, engine=engine, **options)
                got = batch.run(loss, trained, valid_rows=counts, **call)
                assert_same(got, expected, EXACT, f"{budget} bytes, {trained}, {engine}")
                assert got[0].engine.name == ("one_pass" if engine == "auto" else "recompute")
    single = {name: x.float() if isinstance(x, Tensor) else x for name, x in call.items()}
    assert_same(batch.to(torch.float32).run(LINEAR[make](**options), **single), expected, SINGLE, "float32")


@pytest.mark.parametrize("engine", ["one_pass", "recompute"])
@every_loss
def test_learned_weights_of_tokens(make: type, options: dict[str, Any], point: float | None, engine: str) -> None:
    batch, weights = make_hidden(seed=36), torch.rand(make_hidden(seed=36).labels.shape, dtype=fp64)
    grads = []
    for loss in (LINEAR[make](engine=engine, max_chunk_bytes=8 * 19 * 8, **options), make(backend="reference", **options)):
        leaf = weights.clone().requires_grad_()
        inputs = (
            batch[:4]
            if isinstance(loss, LinearUnpairedLoss)
            else (batch.hidden @ batch.weight.T, batch.ref_hidden @ batch.ref_weight.T)
        )
        out = loss(*inputs, batch.labels, DESIRABLE, reference_point=point, token_weights=leaf)
        grads += torch.autograd.grad(out.loss, leaf)
    near("gradient of weights", *grads)


@pytest.mark.parametrize("S", [0, 1, 2])
@pytest.mark.parametrize("make", LINEAR)
def test_few_hidden_sequences(make: type, S: int) -> None:
    batch = make_hidden(seed=37)
    few = [batch.hidden[:S].clone().requires_grad_(), batch.weight, batch.ref_hidden[:S], batch.ref_weight, batch.labels[:S]]
    out = LINEAR[make](engine="one_pass")(*few, DESIRABLE[:S], reference_point=0.1)
    expected = batch.run(make(backend="reference"), reference_point=0.1)[0].losses[:S]
    near("losses", out.losses, expected)
    near("loss", out.loss, expected.mean() if S else torch.zeros((), dtype=fp64))
    assert torch.autograd.grad(out.loss, few[0])[0].isfinite().all()


@pytest.mark.parametrize("make", LINEAR)
def test_float16_in_one_pass(make: type) -> None:
    """Slopes get a power of two."""
    half = make_hidden(seed=38, V=97).to(torch.float16)
    exact = half.to(fp64).run(make(1e-4, backend="reference"), reference_point=0.1)
    got = half.run(LINEAR[make](1e-4, engine="one_pass"), reference_point=0.1)
    near("loss", got[0].loss, exact[0].loss, 2e-3)
    for name, grad, right in zip(("hidden", "weight"), got[1], exact[1], strict=True):
        near(f"gradient of {name}", grad, right, 5e-3)


@pytest.mark.parametrize("make", LINEAR)
def test_packed_hidden_states(make: type) -> None:
    batch = make_hidden(seed=32)
    lengths = [prompt + response for prompt, response in ODD]

    def pack(x: Tensor) -> Tensor:
        return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])

    rows = [pack(batch.hidden), batch.weight, pack(batch.ref_hidden), batch.ref_weight, pack(batch.labels)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    out = LINEAR[make]()(*rows, DESIRABLE, reference_point=0.1, cu_seqlens=cu_seqlens, num_sequences=10)
    expected, _ = batch.run(make(backend="reference"), reference_point=0.1)
    near("losses", out.losses, expected.losses)
    near("loss", out.loss, expected.losses.sum() / 10)


@pytest.mark.parametrize("make", LINEAR)
def test_units(make: type) -> None:
    """One pass is at the floor. The KL has no gradient, so recompute never makes the reference's logits again."""
    batch = make_hidden(seed=33, V=48, D=32).to(torch.float32)
    N = int((batch.labels[:, 1:] != IGNORE).sum())
    given = {"ref_logps": torch.zeros(len(ODD))}
    for engine, trained, call, expected in (
        ("one_pass", True, {}, 4), ("one_pass", False, {}, 3), ("one_pass", True, given, 3), ("one_pass", False, given, 2),
        ("recompute", True, {}, 5), ("recompute", False, {}, 3), ("recompute", True, given, 4), ("recompute", False, given, 2),
    ):  # fmt: skip
        loss = LINEAR[make](max_chunk_bytes=8 * 48 * 4, engine=engine)
        with counted_products() as products:
            batch.run(loss, trained, reference_point=0.1, **call)
        assert products.units(N, 48, 32) == expected


# --- beside TRL and Liger ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.4, -0.4])
@pytest.mark.parametrize(
    "options",
    [{}, {"beta": 0.6, "desirable_weight": 1.3, "undesirable_weight": 0.7}, {"beta": 0.3, "loss_type": "apo_zero_unpaired"}],
    ids=str,
)
def test_trl_kto(options: dict[str, Any], kappa: float) -> None:
    """Loss, gradient and every metric of its `_compute_loss`, on a stub whose mismatched log-ratios have the mean `kappa`."""
    trl = pytest.importorskip("trl", minversion="1.16")
    batch, kto = make_batch(ODD, seed=41, holes=0.2), "loss_type" not in options
    S, ids = len(ODD), batch.labels.clamp(min=0)
    mask = (batch.labels != IGNORE).long()
    mask[:, 0] = 0  # a token that nothing predicts
    mismatched = kappa + torch.tensor([-1.0, 2.0, -1.0, 0.0, 3.0, -2.0, -1.0], dtype=fp64)
    alone = lambda value: value  # noqa: E731
    attributes = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "loss_type": "kto"} | options
    stub = SimpleNamespace(
        **attributes, model=SimpleNamespace(training=True, is_gradient_checkpointing=False), calculate_KL=kto,
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=alone), precompute_ref_logps=True,
        aux_loss_enabled=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        _compute_kl_logps=lambda *_: mismatched if kto else None,
    )  # fmt: skip
    inputs = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask, "label": DESIRABLE,
        "ref_logps": expected_sums(*batch[:3]).ref_logps, "ref_KL_logps": torch.zeros(S, dtype=fp64),
    }  # fmt: skip
    expected, expected_grad = value_and_grad(
        lambda x: trl.KTOTrainer._compute_loss(stub, lambda labels, **_: fused_head(x, labels), inputs, False), batch.policy
    )
    loss = KTOLoss(**options, extras=("entropy", "mean_logit"))
    point = kto_reference_point(mismatched) if kto else None
    out, grad = value_and_grad(lambda x: loss(x, *batch[1:3], DESIRABLE, reference_point=point), batch.policy)
    near("loss", out.loss, expected.detach())
    near("gradient", grad, expected_grad)
    metrics = {name: values[0] for name, values in stub._metrics["train"].items() if name != "num_tokens"}
    assert metrics.keys() == {name for name in out.metrics if not name.startswith("kl/")}
    for name, value in metrics.items():
        near(name, out.metrics[name], torch.tensor(value, dtype=fp64), 1e-6)


@pytest.mark.parametrize("kappa", [None, 0.7])
def test_liger_kto(kappa: float | None) -> None:
    """In float32. Liger takes labels that are shifted already, and no weights."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    batch = make_hidden(seed=42).to(torch.float32)
    leaves = [batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()]
    theirs = liger.LigerFusedLinearKTOLoss(beta=0.2, compiled=False, use_ref_model=True)
    expected, *_ = theirs(
        leaves[0][:, :-1], leaves[1], batch.labels[:, 1:], preference_labels=DESIRABLE, ref_input=batch.ref_hidden[:, :-1],
        ref_weight=batch.ref_weight, kl=None if kappa is None else torch.tensor(kappa),
    )  # fmt: skip
    loss = LinearKTOLoss(0.2, loss_type="apo_zero_unpaired" if kappa is None else "kto")
    out, grads = batch.run(loss, reference_point=kappa)
    near("loss", out.loss, expected.detach(), 1e-5)
    for what, got, right in zip(("hidden", "weight"), grads, torch.autograd.grad(1.7 * expected, leaves), strict=True):
        near(f"gradient of {what}", got, right, 1e-5)


# --- edges ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("size", [0.0, 1e4, -1e4])
@every_loss
def test_far_from_the_reference(make: type, options: dict[str, Any], point: float | None, size: float, beta: float) -> None:
    """Sums over thousands of tokens, in float32: all finite; KTO saturates at 0 and λ, BCO grows in proportion."""
    batch = make_batch(ODD, seed=51, dtype=torch.float32)
    loss = make(**(options | {"beta": beta}))
    ref_logps = expected_sums(*batch[:3]).logps.float() - size
    out, grad = value_and_grad(
        lambda x: loss(x, None, batch.labels, DESIRABLE, reference_point=point, ref_logps=ref_logps), batch.policy
    )
    assert all(value.isfinite().all() for value in (out.losses, grad, *out.metrics.values()))
    if size and beta == 1.0:
        won = DESIRABLE if size > 0 else ~DESIRABLE
        assert_exactly_zero("losses of those that won", out.losses[won])
        most = torch.where(DESIRABLE, options.get("desirable_weight", 1.0), options.get("undesirable_weight", 1.0)).double()
        most = torch.full((len(ODD),), abs(size), dtype=fp64) if make is BCOLoss else most
        near("losses of those that lost", out.losses[~won], most[~won], 1e-3)


@every_loss
def test_empty_responses(make: type, options: dict[str, Any], point: float | None) -> None:
    """ρ = 0, and no gradient."""
    batch = make_hidden(seed=52)
    batch.labels[[0, 1]] = IGNORE
    expected = literal(make, options, point, torch.zeros(2, dtype=fp64), DESIRABLE[:2])
    for loss in (make(**options), LINEAR[make](**options)):
        out, grads = batch.run(loss, reference_point=point)
        near("losses", out.losses[:2], expected)
        assert_exactly_zero("gradient", grads[0][:2])
        assert all(value.isfinite() for value in out.metrics.values())


# --- refused ----------------------------------------------------------------------------------------------------------------

REFUSED: list[Any] = [
    (KTOLoss, {"beta": 0.0}, "beta"),
    (KTOLoss, {"desirable_weight": -1.0}, "desirable_weight"),
    (KTOLoss, {"undesirable_weight": math.nan}, "undesirable_weight"),
    (KTOLoss, {"loss_type": "sigmoid"}, r"(?s)loss_type.*kto, apo_zero_unpaired"),
    (BCOLoss, {"reduction": "none"}, "reduction"),
    (BCOLoss, {"extras": ("log_sum_sq_probs",)}, "extras"),
    (LinearKTOLoss, {"engine": "one_pass", "backend": "reference"}, r"(?s)one_pass.*reference"),
    (LinearBCOLoss, {"logits_dtype": torch.float16}, "logits_dtype"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_refused_when_the_loss_is_made(make: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


BAD_CALLS: list[Any] = [
    (KTOLoss(), {"reference_point": None}, r"(?s)reference_point.*kto_reference_point.*mismatched.*apo_zero_unpaired"),
    (KTOLoss(), {"reference_point": -0.1}, r"(?s)reference_point.*>= 0.*-0.1"),
    (KTOLoss(), {"reference_point": math.nan}, "reference_point"),
    (KTOLoss(), {"reference_point": torch.tensor(-0.1)}, r"(?s)reference_point.*>= 0.*-0.1"),
    (KTOLoss(), {"reference_point": torch.zeros(7)}, r"(?s)reference_point.*\(\).*\(7,\)"),
    (KTOLoss(loss_type="apo_zero_unpaired"), {}, r"(?s)apo_zero_unpaired.*reference_point"),
    (BCOLoss(), {"reference_point": None}, r"(?s)reference_point.*out\.rewards"),
    (BCOLoss(), {"reference_point": math.inf}, "reference_point"),
    (KTOLoss(), {"desirable": DESIRABLE.long()}, r"(?s)desirable.*bool.*int64.*\.bool\(\)"),
    (BCOLoss(), {"desirable": [True] * 7}, r"(?s)desirable.*list"),
    (KTOLoss(), {"desirable": DESIRABLE[:6]}, r"(?s)desirable.*\(7,\).*\(6,\)"),
    (KTOLoss(), {"sequence_weights": torch.ones(3)}, r"(?s)sequence_weights.*\(7,\)"),
    (KTOLoss(), {"token_weights": torch.ones(7)}, "token_weights"),
    (KTOLoss(), {"num_sequences": 0}, "num_sequences"),
    (BCOLoss(reduction="sum"), {"num_sequences": 3}, "num_sequences"),
    (KTOLoss(), {"ref_logps": torch.zeros(7)}, r"(?s)given once.*both"),
    (KTOLoss(), {"ref": None}, r"(?s)given once.*neither"),
    (KTOLoss(), {"ref": None, "ref_logps": torch.zeros(6)}, r"(?s)ref_logps.*\(7,\)"),
    (BCOLoss(extras=("ref_entropy",)), {"ref": None, "ref_logps": torch.zeros(7)}, "ref_entropy"),
    (KTOLoss(), {"labels": torch.zeros(7, 3, dtype=torch.int64)}, r"(?s)labels.*policy_logits, ref_logits, labels, desirable"),
]


@pytest.mark.parametrize(
    ("loss", "changes", "message"), BAD_CALLS, ids=[f"{i}-{'-'.join(case[1])}" for i, case in enumerate(BAD_CALLS)]
)
def test_refused_calls(loss: UnpairedLoss, changes: dict[str, Any], message: str) -> None:
    """At both levels, where they share the argument."""
    batch = make_hidden(seed=61)
    call = {"reference_point": 0.2, "labels": batch.labels, "desirable": DESIRABLE, "ref": batch.ref_hidden} | changes
    labels, desirable, ref = (call.pop(name) for name in ("labels", "desirable", "ref"))
    with pytest.raises(ValueError, match=message):
        loss(batch.hidden @ batch.weight.T, None if ref is None else ref @ batch.ref_weight.T, labels, desirable, **call)
    if "labels" in changes:
        return
    options = {name: getattr(loss, name) for name in ("reduction", "extras")}
    options |= {"loss_type": loss.loss_type} if isinstance(loss, KTOLoss) else {}
    with pytest.raises(ValueError, match=message):
        LINEAR[type(loss)](**options)(
            batch.hidden, batch.weight, ref, None if ref is None else batch.ref_weight, labels, desirable, **call
        )
