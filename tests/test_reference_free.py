"""SimPO with AlphaPO, CPO and ORPO: the papers' formulas, both levels, both engines, TRL and Liger, and the edges.

The oracle writes the formulas as printed, with probabilities and logarithms of sigmoids, in float64 on sums of `log_softmax` of
whole logits. Letters: P pairs, S = 2P sequences, T positions, D hidden size, V vocabulary.
"""

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fused_tdpo import PreferenceOutput
from fused_tdpo.pair_losses import Form, SequenceSums
from fused_tdpo.reference_free import (
    CPOLoss,
    LinearCPOLoss,
    LinearORPOLoss,
    LinearReferenceFreeLoss,
    LinearSimPOLoss,
    ORPOLoss,
    ReferenceFreeLoss,
    SimPOLoss,
    log_odds,
)
from official_tdpo import IGNORE, UNEVEN, Batch, make_batch, value_and_grad
from products import counted_products
from tolerances import assert_exactly_zero, assert_same_bits, assert_within_budget

fp64 = torch.float64
EXACT = 1e-9  # float64 against float64: only the order of summation may differ
SINGLE = 5e-5  # float32 against float64

LINEAR: dict[type, type] = {SimPOLoss: LinearSimPOLoss, CPOLoss: LinearCPOLoss, ORPOLoss: LinearORPOLoss}

Case = tuple[type[ReferenceFreeLoss], dict[str, Any], Form]
LOSSES: dict[str, Case] = {  # the loss, its options, the form that it declares
    "simpo": (SimPOLoss, {}, Form("margin", by_length=True)),
    "simpo-smoothed": (SimPOLoss, {"beta": 1.5, "gamma": 1.2, "label_smoothing": 0.2}, Form("margin", by_length=True)),
    "alphapo": (SimPOLoss, {"alpha": 0.25, "gamma": 0.0}, Form("pair")),
    "alphapo-negative": (SimPOLoss, {"alpha": -0.7}, Form("pair")),
    "cpo-simpo": (SimPOLoss, {"cpo_alpha": 0.6}, Form("pair")),
    "cpo-alphapo": (SimPOLoss, {"cpo_alpha": 0.6, "alpha": 0.4}, Form("pair")),
    "cpo": (CPOLoss, {}, Form("pair")),
    "cpo-smoothed": (CPOLoss, {"beta": 0.3, "cpo_alpha": 0.4, "label_smoothing": 0.1}, Form("pair")),
    "cpo-hinge": (CPOLoss, {"loss_type": "hinge", "beta": 0.05}, Form("pair")),
    "cpo-ipo": (CPOLoss, {"loss_type": "ipo", "cpo_alpha": 2.0}, Form("pair")),
    "cpo-without-nll": (CPOLoss, {"cpo_alpha": 0.0}, Form("margin")),
    "cpo-hinge-without-nll": (CPOLoss, {"loss_type": "hinge", "cpo_alpha": 0.0, "beta": 0.05}, Form("margin")),
    "cpo-ipo-without-nll": (CPOLoss, {"loss_type": "ipo", "cpo_alpha": 0.0}, Form("margin", by_length=True)),
    "orpo": (ORPOLoss, {}, Form("pair")),
    "orpo-strong": (ORPOLoss, {"beta": 1.3, "reduction": "sum"}, Form("pair")),
}
every_loss = pytest.mark.parametrize(
    ("make", "options", "form"), [pytest.param(*case, id=name) for name, case in LOSSES.items()]
)


def near(what: str, got: Tensor, expected: Tensor, relative: float = EXACT) -> None:
    """Every element within `relative` of the largest one, or of 1e-3 where all are smaller."""
    size = max(1e-3, float(expected.detach().abs().max())) if expected.numel() else 1.0
    assert_within_budget(what, got, expected, expected, torch.full_like(expected, relative * size, dtype=fp64).detach())


# --- the formulas -----------------------------------------------------------------------------------------------------------


class Responses(NamedTuple):
    """(S,) each: sums of weighted log p(y), of plain log p(y), and how many tokens these are."""

    weighted: Tensor
    logp: Tensor
    n: Tensor


def responses(x: Tensor, labels: Tensor, token_weights: Tensor | None = None) -> Responses:
    mask = labels[:, 1:] != IGNORE
    rows = x[:, :-1].to(fp64).log_softmax(-1).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    rows = torch.where(mask, rows, 0.0)
    w = torch.ones_like(rows) if token_weights is None else torch.where(mask, token_weights[:, 1:].to(fp64), 0.0)
    return Responses((w * rows).sum(-1), rows.sum(-1), mask.sum(-1).to(fp64))


class Literal(NamedTuple):
    """(P,) losses; (S,) rewards and log-probabilities that are reported; the NLL, ()."""

    losses: Tensor
    rewards: Tensor
    logps: Tensor
    nll: Tensor


def literal(make: type, options: dict[str, Any], r: Responses) -> Literal:
    """As printed. The NLL adds to every pair its share of the sum over tokens, so that the mean over pairs is right."""
    sigmoid, log = torch.sigmoid, torch.log
    beta = options.get("beta", 2.0 if make is SimPOLoss else 0.1)
    eps = options.get("label_smoothing", 0.0)
    n = r.n.clamp(min=1)
    mean, P = r.weighted / n, len(r.n) // 2
    nll = -r.logp[:P].sum() / r.n[:P].sum().clamp(min=1)
    share = -r.logp[:P] * P / r.n[:P].sum().clamp(min=1)
    if make is ORPOLoss:
        p_w, p_l = mean.exp().chunk(2)
        odds_w, odds_l = p_w / (1 - p_w), p_l / (1 - p_l)
        return Literal(share - beta * log(sigmoid(log(odds_w / odds_l))), beta * mean, r.logp / n, nll)
    averages = make is SimPOLoss or options.get("loss_type") == "ipo"
    score = mean if averages else r.weighted
    alpha = options.get("alpha", 0.0)
    if make is SimPOLoss and alpha:
        score = (1 - mean.exp() ** -alpha) / alpha
    z = beta * (score[:P] - score[P:])
    if make is SimPOLoss:
        z = z - options.get("gamma", 0.5)
    losses = {
        "sigmoid": lambda: -(1 - eps) * log(sigmoid(z)) - eps * log(sigmoid(-z)),
        "hinge": lambda: (1 - z).clamp(min=0),
        "ipo": lambda: (z / beta - 1 / (2 * beta)) ** 2,
    }[options.get("loss_type", "sigmoid")]()
    weight = options.get("cpo_alpha", 0.0 if make is SimPOLoss else 1.0)
    return Literal(losses + weight * share, beta * score, r.logp / n if averages else r.logp, nll)


# ℓ̄_w = −log 2 of two tokens, ℓ̄_l = −log 4 of one. The NLL is log 2; odds are 1 and 1/3; with α = 1 scores are −1 and −3.
BY_HAND: list[Any] = [
    (SimPOLoss(), math.log1p(math.exp(-(2 * math.log(2) - 0.5)))),
    (SimPOLoss(1.0, gamma=0.0, label_smoothing=0.25), math.log(3 / 2) + math.log(2) / 4),
    (SimPOLoss(1.0, gamma=0.0, alpha=1.0), math.log1p(math.exp(-2))),
    (SimPOLoss(1.0, gamma=0.0, alpha=-1.0), math.log1p(math.exp(-1 / 4))),
    (SimPOLoss(1.0, gamma=0.0, cpo_alpha=0.5), math.log(3 / 2) + math.log(2) / 2),
    (CPOLoss(1.0, cpo_alpha=0.0), math.log(2)),  # both sums are −log 4
    (CPOLoss(1.0), 2 * math.log(2)),
    (CPOLoss(1.0, loss_type="hinge"), 1 + math.log(2)),
    (CPOLoss(1.0, loss_type="ipo", cpo_alpha=0.0), (math.log(2) - 1 / 2) ** 2),
    (ORPOLoss(0.5), math.log(2) + math.log(4 / 3) / 2),
]


@pytest.mark.parametrize(
    ("loss", "expected"), [pytest.param(*case, id=f"{i}-{case[0]._get_name()}") for i, case in enumerate(BY_HAND)]
)
def test_by_hand(loss: ReferenceFreeLoss, expected: float) -> None:
    """Two equal logits at the chosen tokens, four at the rejected one."""
    logits = torch.full((2, 3, 4), -math.inf, dtype=fp64)
    logits[0, :, :2] = logits[1] = 0.0
    out = loss(logits, torch.tensor([[IGNORE, 0, 1], [IGNORE, 3, IGNORE]]))
    near("loss", out.loss, torch.tensor(expected, dtype=fp64), 1e-14)


# --- modules on logits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("layout", ["padded", "packed", "interleaved"])
@every_loss
def test_formula(make: type, options: dict[str, Any], form: Form, layout: str, weighted: bool, backend: str) -> None:
    """Losses, the loss, its gradient, and what is reported."""
    batch = make_batch(seed=62, holes=0.2, padding=2)
    P = len(batch.labels) // 2
    assert responses(batch.policy, batch.labels).n.min() > 0, "odds as printed do not exist for an empty response"
    weights = torch.rand(batch.labels.shape, dtype=fp64) if weighted else None
    expected = literal(make, options, responses(batch.policy, batch.labels, weights))
    whole = torch.sum if options.get("reduction") == "sum" else torch.mean
    mean, expected_grad = value_and_grad(
        lambda x: whole(literal(make, options, responses(x, batch.labels, weights)).losses), batch.policy
    )
    assert expected_grad.abs().max() > 1e-3, "the case must move something"

    loss = make(backend=backend, interleaved=layout == "interleaved", **options)
    call: dict[str, Any] = {} if weights is None else {"token_weights": weights}
    if layout == "interleaved":
        order = [s for p in range(P) for s in (p, P + p)]
        batch = Batch(*(x[order] for x in batch[:3]), tuple(batch.lengths[s] for s in order))
        call, expected_grad = {name: x[order] for name, x in call.items()}, expected_grad[order]
    if layout == "packed":
        call = {name: batch.pack(x) for name, x in call.items()} | {"cu_seqlens": batch.cu_seqlens()}
        expected_grad, batch = batch.pack(expected_grad), batch.packed()
    out, grad = value_and_grad(lambda x: loss(x, batch.labels, **call), batch.policy)
    near("losses", out.losses, expected.losses)
    near("loss", out.loss, mean)
    near("gradient", grad, expected_grad)
    near("rewards", torch.cat([out.chosen_rewards, out.rejected_rewards]), expected.rewards)
    near("logps", torch.cat([out.chosen_logps, out.rejected_logps]), expected.logps)
    assert out.chosen_kl is None
    assert out.rejected_kl is None
    assert out.engine is None
    assert not any(t.requires_grad for t in (out.losses, out.chosen_rewards, *out.metrics.values()))
    assert not any(name.startswith("kl/") for name in out.metrics)
    assert ("nll_loss" in out.metrics) == loss.has_nll
    if loss.has_nll:
        near("nll_loss", out.metrics["nll_loss"], expected.nll)


def test_learned_weights_of_tokens() -> None:
    batch = make_batch(seed=32)
    weights = torch.rand(batch.labels.shape, dtype=fp64)
    for make, options, _ in LOSSES.values():
        _, grad = value_and_grad(lambda w, m=make, o=options: m(**o)(batch.policy, batch.labels, token_weights=w), weights)
        whole = torch.sum if options.get("reduction") == "sum" else torch.mean
        _, expected = value_and_grad(
            lambda w, m=make, o=options, f=whole: f(literal(m, o, responses(batch.policy, batch.labels, w)).losses), weights
        )
        near("gradient of weights", grad, expected)


@pytest.mark.parametrize("make", LINEAR)
def test_common_options(make: type) -> None:
    """Those of every loss: temperature, a cut vocabulary, another ignored label, a mean over ranks, metrics of tokens."""
    batch = make_batch(seed=33)
    expected = literal(make, {}, responses(batch.policy[..., :20] / 1.7, batch.labels.clamp(max=19)))
    labels = batch.labels.clamp(max=19).masked_fill(batch.labels == IGNORE, -7)
    loss = make(temperature=1.7, vocab_size=20, ignore_index=-7, extras=("entropy", "accuracy", "mean_logit"))
    out = loss(batch.policy, labels, num_pairs=torch.tensor(10), valid_rows=None)
    near("losses", out.losses, expected.losses)
    near("loss", out.loss, expected.losses.sum() / 10)
    assert {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"} <= out.metrics.keys()
    assert loss(batch.policy[:0], labels[:0]).loss == 0


@pytest.mark.parametrize("make", LINEAR)
def test_compiles_without_a_graph_break(make: type) -> None:
    torch._dynamo.reset()
    batch, loss = make_batch(seed=34), make()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    out, grad = value_and_grad(lambda x: compiled(x, batch.labels), batch.policy)
    expected, expected_grad = value_and_grad(lambda x: loss(x, batch.labels), batch.policy)
    near("loss", out.loss, expected.loss)
    near("gradient", grad, expected_grad)


# --- forms, engines, products -----------------------------------------------------------------------------------------------


@every_loss
def test_declared_forms(make: type, options: dict[str, Any], form: Form) -> None:
    """By autograd, at random sums: slopes are parallel to what the loss says of itself, and no wider form is declared."""
    loss, n = LINEAR[make](**options), 20
    assert loss.form() == form
    assert loss.obstacle(weighted=False) is None
    assert (loss.obstacle(weighted=True) is not None) == loss.has_nll
    weighted, logp = (-7 * torch.rand(2, n, dtype=fp64)).requires_grad_(), (-7 * torch.rand(2, n, dtype=fp64)).requires_grad_()
    count = torch.randint(1, 20, (2, n)).to(fp64)

    def losses(pairs: slice = slice(None)) -> Tensor:
        found = loss._sequence_sums(SequenceSums(weighted, None, logp, count), None)
        return loss.pair_losses(*(found.map(lambda t, i=i: t[i, pairs]) for i in (0, 1)), 7.0)

    of_ratio, of_logp = torch.autograd.grad(losses().sum(), (weighted, logp), materialize_grads=True)
    alone = torch.cat([losses(slice(p, p + 1)) for p in range(n)]).sum()
    near("slopes of pairs alone", torch.autograd.grad(alone, weighted)[0], of_ratio)
    assert (of_ratio != 0).any()
    assert of_logp.any() == loss.has_nll
    d = of_ratio + of_logp
    scale = count[0] / count[1] if form.by_length or loss.averages else torch.ones(n, dtype=fp64)
    if form.kind == "margin":
        near("slopes of R", d[1], -scale * d[0])
    else:
        assert (d[1] + scale * d[0]).abs().max() > 1e-3, "the form could be a margin"
        if "hinge" not in options.values():  # which is linear
            (slope,) = torch.autograd.grad(losses().sum(), weighted, create_graph=True)
            (curvature,) = torch.autograd.grad(slope[0].sum(), weighted)
            assert curvature[1].any(), "the form could be by sequence"


class Hidden(NamedTuple):
    """Hidden states (S, T, D), a weight (V, D) and labels (S, T)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    def to(self, dtype: torch.dtype) -> "Hidden":
        return Hidden(self.hidden.to(dtype), self.weight.to(dtype), self.labels)

    def run(self, loss: ReferenceFreeLoss, trained: bool = True, **call: Any) -> tuple[PreferenceOutput, list[Tensor]]:
        """From hidden states, or from whole logits; the output, and gradients of hidden states and of a trained weight."""
        hidden = self.hidden.clone().requires_grad_()
        weight = self.weight.clone().requires_grad_(trained)
        linear = isinstance(loss, LinearReferenceFreeLoss)
        out = loss(hidden, weight, self.labels, **call) if linear else loss(hidden @ weight.T, self.labels, **call)
        return out, list(torch.autograd.grad(1.7 * out.loss, [hidden, weight] if trained else [hidden]))


def make_hidden(seed: int = 41, V: int = 19, D: int = 6, layout: Any = UNEVEN) -> Hidden:
    labels = make_batch(layout, V, seed=seed, holes=0.2).labels
    return Hidden(torch.randn(*labels.shape, D, dtype=fp64), torch.randn(V, D, dtype=fp64), labels)


def assert_same(got: tuple[PreferenceOutput, list[Tensor]], expected: Any, relative: float, what: str) -> None:
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps"):
        near(f"{what}: {name}", getattr(got[0], name), getattr(expected[0], name), relative)
    assert got[0].metrics.keys() == expected[0].metrics.keys()
    for name, value in expected[0].metrics.items():
        near(f"{what}: {name}", got[0].metrics[name], value, relative)
    for name, grad, right in zip(("hidden", "weight"), got[1], expected[1], strict=False):
        near(f"{what}: gradient of {name}", grad, right, relative)


BUDGETS = {"one row": 19 * 8, "long": 3 * 19 * 8, "mixed": 8 * 19 * 8, "everything": None}


@every_loss
def test_every_route_gives_the_same(make: type, options: dict[str, Any], form: Form) -> None:
    """Engine, chunk, head trained or frozen: one loss, one gradient, that of the logits; near it in float32."""
    batch = make_hidden()
    expected = batch.run(make(backend="reference", **options))
    assert min((batch.labels[:, 1:] != IGNORE).sum(-1)) >= 0
    for engine, (name, budget), trained in itertools.product(("one_pass", "recompute"), BUDGETS.items(), (True, False)):
        got = batch.run(LINEAR[make](engine=engine, max_chunk_bytes=budget, **options), trained)
        assert_same(got, expected, EXACT, f"{engine}, {name}, {trained}")
        assert got[0].engine.name == engine
    for engine in ("one_pass", "recompute"):
        got = batch.to(torch.float32).run(LINEAR[make](engine=engine, max_chunk_bytes=8 * 19 * 4, **options))
        assert_same(got, expected, SINGLE, f"{engine}, float32")


@every_loss
def test_weights_of_tokens_from_hidden_states(make: type, options: dict[str, Any], form: Form) -> None:
    """One pass where there is no NLL, whose rows weigh 1; else the general op, and the output says why."""
    batch = make_hidden(seed=42)
    weights = torch.rand(batch.labels.shape, dtype=fp64)
    got = batch.run(LINEAR[make](max_chunk_bytes=BUDGETS["mixed"], **options), token_weights=weights)
    assert_same(got, batch.run(make(backend="reference", **options), token_weights=weights), EXACT, "weighted")
    nll = LINEAR[make](**options).has_nll
    assert got[0].engine.name == ("recompute" if nll else "one_pass")
    assert not nll or "NLL takes no weights" in got[0].engine.reason
    if nll:
        with pytest.raises(ValueError, match=r"(?s)one_pass.*NLL.*recompute"):
            batch.run(LINEAR[make](engine="one_pass", **options), token_weights=weights)


@pytest.mark.parametrize("make", LINEAR)
def test_layouts_from_hidden_states(make: type) -> None:
    batch = make_hidden(seed=43)
    lengths = [prompt + response for prompt, response in UNEVEN]
    counts = (batch.labels[:, 1:] != IGNORE).sum(-1).tolist()
    expected = make(backend="reference")(batch.hidden @ batch.weight.T, batch.labels)

    def pack(x: Tensor) -> Tensor:
        return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)])

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    packed = LINEAR[make]()(pack(batch.hidden), batch.weight, pack(batch.labels), cu_seqlens=cu_seqlens, valid_rows=counts)
    near("packed", packed.losses, expected.losses)
    order = [s for p in range(4) for s in (p, p + 4)]
    loss = LINEAR[make](interleaved=True)
    near("interleaved", loss(batch.hidden[order], batch.weight, batch.labels[order]).losses, expected.losses)
    ranks = LINEAR[make]()(batch.hidden, batch.weight, batch.labels, num_pairs=16)
    near("a mean over ranks", ranks.loss, expected.loss / 4)


@pytest.mark.parametrize("make", LINEAR)
def test_float16_in_one_pass(make: type) -> None:
    """Slopes get their power of two where log-probabilities are 0, which the odds of ORPO must survive."""
    batch = make_hidden(seed=44, V=97)
    half = batch.to(torch.float16)
    exact = half.to(fp64).run(make(backend="reference"))
    got = half.run(LINEAR[make](engine="one_pass"))
    near("loss", got[0].loss, exact[0].loss, 2e-3)
    for name, grad, right in zip(("hidden", "weight"), got[1], exact[1], strict=True):
        near(f"gradient of {name}", grad, right, 5e-3)


@pytest.mark.parametrize("budget", [8 * 48 * 4, None], ids=["long", "groups"])
@every_loss
def test_units(make: type, options: dict[str, Any], form: Form, budget: int | None) -> None:
    """Without a reference one product of the logits less than with one, in every form."""
    batch = make_hidden(seed=45, V=48, D=32, layout=((2, 20), (1, 9), (3, 14), (2, 12))).to(torch.float32)
    N = int((batch.labels[:, 1:] != IGNORE).sum())

    def units(loss: ReferenceFreeLoss, trained: bool) -> float:
        with counted_products() as products:
            batch.run(loss, trained)
        return products.units(N, 48, 32)

    loss = LINEAR[make](max_chunk_bytes=budget, **options)
    assert (units(loss, True), units(loss, False)) == (3, 2)
    loss = LINEAR[make](max_chunk_bytes=budget, engine="recompute", **options)
    assert (units(loss, True), units(loss, False)) == (4, 2)


# --- beside TRL and Liger ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl() -> SimpleNamespace:
    """Trainers of TRL's that it calls experimental, without its warning."""
    pytest.importorskip("trl", minversion="1.16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.orpo import ORPOTrainer
    return SimpleNamespace(cpo=CPOTrainer, orpo=ORPOTrainer)


def trl_batch(batch: Batch) -> dict[str, Tensor]:
    """What TRL's collator gives; every position up to a sequence's length is attended."""
    attended = torch.arange(batch.labels.shape[1]) < torch.tensor(batch.lengths)[:, None]
    tensors = {"input_ids": batch.labels.clamp(min=0), "attention_mask": attended.long(), "labels": batch.labels}
    halves = {name: tensor.chunk(2) for name, tensor in tensors.items()}
    return {f"{side}_{name}": half[i] for i, side in enumerate(("chosen", "rejected")) for name, half in halves.items()}


def beside_trl(trainer: type, attributes: dict[str, Any], batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Loss, gradient at the policy's logits, and metrics of a trainer's `get_batch_loss_metrics`, on a stub of it."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda value: value)
    stub = SimpleNamespace(accelerator=accelerator, aux_loss_enabled=False, is_encoder_decoder=False, **attributes)
    for name in ("concatenated_inputs", "concatenated_forward", "get_batch_logps", "cpo_loss", "odds_ratio_loss"):
        if method := getattr(trainer, name, None):
            static = name in ("concatenated_inputs", "get_batch_logps")
            setattr(stub, name, method if static else method.__get__(stub))
    found: dict[str, Any] = {}

    def step(x: Tensor) -> Tensor:
        loss, metrics = trainer.get_batch_loss_metrics(stub, lambda *_, **__: SimpleNamespace(logits=x), trl_batch(batch))
        found.update(metrics)
        return loss

    loss, grad = value_and_grad(step, batch.policy)
    return loss.detach(), grad, {name: float(value) for name, value in found.items() if not name.startswith("logits/")}


def assert_as_trl(
    found: tuple[PreferenceOutput, Tensor], theirs: tuple[Tensor, Tensor, dict[str, float]], relative: float, but: str = ""
) -> None:
    """Loss, gradient and all metrics, `but` one; those are rounded to float32."""
    (out, grad), (loss, expected_grad, metrics) = found, theirs
    near("loss", out.loss, loss, relative)
    near("gradient", grad, expected_grad, relative)
    assert expected_grad.abs().max() > 1e-3, "the case must move something"
    if metrics["nll_loss"] == 0:  # of no weight
        del metrics["nll_loss"]
    assert out.metrics.keys() == metrics.keys()
    for name in metrics.keys() - {but}:
        near(name, out.metrics[name], torch.tensor(metrics[name], dtype=fp64), max(relative, 1e-6))


TRL_CPO: list[Any] = [
    ("sigmoid", {}, CPOLoss()),
    ("sigmoid", {"beta": 0.4, "cpo_alpha": 0.3, "label_smoothing": 0.2}, CPOLoss(0.4, cpo_alpha=0.3, label_smoothing=0.2)),
    ("hinge", {"beta": 0.05}, CPOLoss(0.05, loss_type="hinge")),
    ("ipo", {"cpo_alpha": 0.5}, CPOLoss(loss_type="ipo", cpo_alpha=0.5)),
    ("ipo", {"cpo_alpha": 0.0}, CPOLoss(loss_type="ipo", cpo_alpha=0.0)),
    ("simpo", {"beta": 2.0, "cpo_alpha": 0.0}, SimPOLoss()),
    ("simpo", {"beta": 1.4, "simpo_gamma": 1.1}, SimPOLoss(1.4, gamma=1.1, cpo_alpha=1.0)),
    ("simpo", {"beta": 2.0, "cpo_alpha": 0.0, "label_smoothing": 0.1}, SimPOLoss(label_smoothing=0.1)),
    ("simpo", {"beta": 2.0, "cpo_alpha": 0.0, "alpha": 0.25}, SimPOLoss(alpha=0.25)),
    ("simpo", {"beta": 2.0, "cpo_alpha": 0.0, "alpha": -0.6}, SimPOLoss(alpha=-0.6)),
]


@pytest.mark.parametrize(
    ("name", "options", "loss"), [pytest.param(*case, id=f"{i}-{case[0]}") for i, case in enumerate(TRL_CPO)]
)
def test_trl_cpo(trl: SimpleNamespace, name: str, options: dict[str, Any], loss: ReferenceFreeLoss) -> None:
    batch = make_batch(seed=51)
    defaults = {"beta": 0.1, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0, "label_smoothing": 0.0}
    theirs = beside_trl(trl.cpo, defaults | {"loss_type": name, "pad_token_id": 0} | options, batch)
    assert_as_trl(value_and_grad(lambda x: loss(x, batch.labels), batch.policy), theirs, EXACT)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_trl_orpo_whose_nll_has_the_prompt(trl: SimpleNamespace, beta: float) -> None:
    """By the recipe of the docstring. TRL takes log-odds in float32."""
    batch = make_batch(seed=52)
    theirs = beside_trl(trl.orpo, {"beta": beta, "padding_value": 0}, batch)
    labels, weights = batch.labels.clone(), torch.ones(batch.labels.shape, dtype=fp64)
    for s, (prompt, response) in enumerate(UNEVEN[: len(labels) // 2]):
        m, n = max(prompt - 1, 0), response if prompt else response - 1  # nothing predicts the first token
        labels[s, :prompt] = 0  # the ids that TRL is given there
        weights[s, :prompt], weights[s, prompt:] = 0.0, (m + n) / n
    found = value_and_grad(lambda x: ORPOLoss(beta)(x, labels, token_weights=weights), batch.policy)
    assert_as_trl(found, theirs, 1e-5, but="logps/chosen")


LIGER: list[Any] = [
    ("SimPO", {"beta": 2.0, "gamma": 0.7, "compute_nll_loss": False}, LinearSimPOLoss(gamma=0.7)),
    ("SimPO", {"beta": 2.0, "alpha": 0.6, "label_smoothing": 0.1}, LinearSimPOLoss(cpo_alpha=0.6, label_smoothing=0.1)),
    ("CPO", {"beta": 0.1, "alpha": 0.7}, LinearCPOLoss(cpo_alpha=0.7)),
    ("CPO", {"beta": 0.1, "label_smoothing": 0.2}, LinearCPOLoss(label_smoothing=0.2)),
    ("ORPO", {"beta": 0.6}, LinearORPOLoss(0.6)),
]


@pytest.mark.parametrize(
    ("name", "options", "loss"), [pytest.param(*case, id=f"{i}-{case[0]}") for i, case in enumerate(LIGER)]
)
def test_liger(name: str, options: dict[str, Any], loss: LinearReferenceFreeLoss) -> None:
    """In float32. Liger takes labels that are shifted already."""
    liger = pytest.importorskip("liger_kernel.chunked_loss")
    batch = make_hidden(seed=64).to(torch.float32)
    theirs = getattr(liger, f"LigerFusedLinear{name}Loss")(compiled=False, **options)
    leaves = [batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_()]
    expected, *_ = theirs(leaves[1], leaves[0][:, :-1], batch.labels[:, 1:])
    out, grads = batch.run(loss)
    near("loss", out.loss, expected.detach(), 1e-5)
    for what, got, right in zip(("hidden", "weight"), grads, torch.autograd.grad(1.7 * expected, leaves), strict=True):
        near(f"gradient of {what}", got, right, 1e-5)


# --- edges ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, fp64], ids=str)
def test_log_odds(dtype: torch.dtype) -> None:
    """Beside float64, from −1e4 to where 1 − p is a rounding; bounded above, and without a gradient there."""
    eps = torch.finfo(dtype).eps
    mean = torch.tensor([-1e4, -100.0, -30.0, -1.0, -0.5, -1e-3, -1e-5, -4 * eps], dtype=dtype).requires_grad_()
    got = log_odds(mean)
    (slope,) = torch.autograd.grad(got.sum(), mean)
    exact = [value - math.log(-math.expm1(value)) for value in mean.tolist()]
    slopes = [1 / -math.expm1(value) for value in mean.tolist()]
    tolerance = torch.tensor([8 * eps * max(1, abs(value)) for value in exact], dtype=fp64)
    assert_within_budget("log-odds", got, *2 * [torch.tensor(exact, dtype=fp64)], tolerance)
    tolerance = torch.tensor([8 * eps * value for value in slopes], dtype=fp64)
    assert_within_budget("slopes", slope, *2 * [torch.tensor(slopes, dtype=fp64)], tolerance)
    certain = torch.tensor([-eps / 4, 0.0, 0.1], dtype=dtype).requires_grad_()
    got = log_odds(certain)
    near("bound", got, torch.full((3,), -math.log(eps), dtype=fp64), 1e-6)
    assert_exactly_zero("slopes above", torch.autograd.grad(got.sum(), certain)[0])


EDGES = {"certain": 0.0, "hopeless": -1e4}


@pytest.mark.parametrize("dtype", [torch.float32, fp64], ids=str)
@pytest.mark.parametrize(("chosen", "rejected"), [*itertools.product(EDGES, EDGES)])
@every_loss
def test_edges(make: type, options: dict[str, Any], form: Form, chosen: str, rejected: str, dtype: torch.dtype) -> None:
    """Means of 0 and of −1e4 nats: everything finite by either engine; what overflows, AlphaPO's positive α, is not silent."""
    labels = torch.tensor([[IGNORE, 0, 0]] * 2)
    hidden = torch.zeros(2, 3, 2, dtype=dtype)
    for s, name in enumerate((chosen, rejected)):
        hidden[s, :, int(name == "hopeless")] = 1e4
    batch = Hidden(hidden, torch.eye(2, dtype=dtype), labels)
    for loss in (make(**options), LINEAR[make](engine="one_pass", **options), LINEAR[make](engine="recompute", **options)):
        out, grads = batch.run(loss)
        near("logps", out.chosen_logps, EDGES[chosen] * torch.ones(1, dtype=fp64) * (1 if loss.averages else 2), 1e-6)
        if options.get("alpha", 0) > 0 and make is SimPOLoss and "hopeless" in (chosen, rejected):
            assert not all(value.isfinite().all() for value in (out.loss, *grads))
            continue
        assert out.loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
        assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("empty", ["chosen", "rejected", "both"])
@every_loss
def test_empty_responses(make: type, options: dict[str, Any], form: Form, empty: str) -> None:
    """An empty response counts as certain, ℓ = 0, and has no gradient; a batch without chosen tokens has an NLL of 0."""
    batch = make_hidden(seed=46, layout=((2, 3), (2, 4)))
    side = {"chosen": slice(0, 1), "rejected": slice(1, 2), "both": slice(0, 2)}[empty]
    batch.labels[side] = IGNORE
    results = [
        batch.run(loss)
        for loss in (make(**options), LINEAR[make](engine="one_pass", **options), LINEAR[make](engine="recompute", **options))
    ]
    for out, grads in results:
        assert all(value.isfinite() for value in (out.loss, *out.metrics.values()))
        assert all(grad.isfinite().all() for grad in grads)
        assert_exactly_zero("gradient of the empty one", grads[0][side])
        assert grads[0].any() == (empty != "both")
        if "nll_loss" in out.metrics and empty != "rejected":
            assert out.metrics["nll_loss"] == 0
        assert_same((out, grads), results[0], EXACT, empty)


@pytest.mark.parametrize("beta", [1e-3, 1e3])
@every_loss
def test_extreme_betas(make: type, options: dict[str, Any], form: Form, beta: float) -> None:
    batch = make_hidden(seed=47).to(torch.float32)
    for loss in (make, LINEAR[make]):
        out, grads = batch.run(loss(**(options | {"beta": beta})))
        assert out.loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)


def test_the_same_bits_every_time() -> None:
    batch = make_hidden(seed=48).to(torch.float32)
    loss = LinearORPOLoss(max_chunk_bytes=BUDGETS["long"])
    (a, a_grads), (b, b_grads) = batch.run(loss), batch.run(loss)
    for what, first, second in zip(("loss", "hidden", "weight"), (a.loss, *a_grads), (b.loss, *b_grads), strict=True):
        assert_same_bits(what, first, second)


# --- refused ----------------------------------------------------------------------------------------------------------------

REFUSED: list[Any] = [
    (SimPOLoss, {"beta": 0.0}, "beta"),
    (SimPOLoss, {"gamma": -0.1}, "gamma"),
    (SimPOLoss, {"gamma": math.nan}, "gamma"),
    (SimPOLoss, {"label_smoothing": 0.5}, "label_smoothing"),
    (SimPOLoss, {"alpha": math.inf}, "alpha"),
    (SimPOLoss, {"cpo_alpha": -1.0}, "cpo_alpha"),
    (CPOLoss, {"cpo_alpha": -1.0}, "cpo_alpha"),
    (CPOLoss, {"loss_type": "simpo"}, r"(?s)loss_type.*sigmoid, hinge, ipo.*simpo"),
    (CPOLoss, {"label_smoothing": -0.1}, "label_smoothing"),
    (CPOLoss, {"label_smoothing": 0.1, "loss_type": "hinge"}, r"(?s)hinge.*label_smoothing.*sigmoid"),
    (ORPOLoss, {"beta": -1.0}, "beta"),
    (ORPOLoss, {"reduction": "none"}, "reduction"),
    (ORPOLoss, {"extras": ("ref_entropy",)}, r"ref_entropy"),
    (LinearSimPOLoss, {"extras": ("ref_entropy",)}, r"ref_entropy"),
    (LinearCPOLoss, {"engine": "fast"}, "engine"),
    (LinearORPOLoss, {"engine": "one_pass", "backend": "reference"}, r"(?s)one_pass.*reference"),
    (LinearORPOLoss, {"max_chunk_bytes": 0}, "max_chunk_bytes"),
]


@pytest.mark.parametrize(("make", "options", "message"), REFUSED)
def test_refused_when_the_loss_is_made(make: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


BAD_CALLS: dict[str, tuple[Callable[[Hidden], tuple[Any, ...]], dict[str, Any], str]] = {
    "logits for labels": (
        lambda b: (b.hidden @ b.weight.T, b.hidden @ b.weight.T),
        {},
        r"(?s)labels.*\(policy_logits, labels\)",
    ),
    "an odd number": (lambda b: (b.hidden[:3] @ b.weight.T, b.labels[:3]), {}, "even"),
    "weights of another shape": (
        lambda b: (b.hidden @ b.weight.T, b.labels),
        {"token_weights": torch.ones(2, 2)},
        "token_weights",
    ),
    "no pairs": (lambda b: (b.hidden @ b.weight.T, b.labels), {"num_pairs": 0}, "num_pairs"),
}


@pytest.mark.parametrize(("arguments", "call", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_refused_calls(arguments: Callable[..., Any], call: dict[str, Any], message: str) -> None:
    batch = make_hidden(seed=49)
    for make in LINEAR:
        with pytest.raises(ValueError, match=message):
            make()(*arguments(batch), **call)


@pytest.mark.parametrize("make", LINEAR)
def test_a_reference_is_refused(make: type) -> None:
    batch, x = make_batch(seed=36), make_hidden(seed=36)
    with pytest.raises(TypeError, match=rf"{make.__name__} takes no reference.*\(policy_logits, labels\); 1 more"):
        make()(batch.policy, batch.ref, batch.labels)
    with pytest.raises(
        TypeError, match=rf"Linear{make.__name__} takes no reference.*\(policy_hidden, policy_head, labels\); 2 more"
    ):
        LINEAR[make]()(x.hidden, x.weight, x.hidden, x.weight, x.labels)


@pytest.mark.parametrize("make", LINEAR.values())
def test_refused_calls_from_hidden_states(make: type) -> None:
    batch = make_hidden(seed=49)
    with pytest.raises(ValueError, match=r"policy_hidden must be \(\.\.\., D\)"):
        make()(batch.hidden @ batch.weight.T, batch.weight, batch.labels)
    with pytest.raises(ValueError, match="even"):
        make()(batch.hidden[:3], batch.weight, batch.labels[:3])
    with pytest.raises(ValueError, match="valid_rows"):
        make()(batch.hidden, batch.weight, batch.labels, valid_rows=[1] * 8)
    with pytest.raises(ValueError, match="num_pairs"):
        make(reduction="sum")(batch.hidden, batch.weight, batch.labels, num_pairs=3)
