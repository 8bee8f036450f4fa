"""LinearTDPOLoss and LinearDPOLoss: what the losses on logits give, from hidden states, by either engine and in any chunk.

The oracle is the loss on materialised logits with the naive backend; tests/test_losses.py holds that one to the authors' code.
Everything runs in float64 wherever a dtype is not the subject: a wrong term cannot hide in rounding.

Letters: P pairs, S = 2P sequences, T positions, D hidden size, V vocabulary.
"""

import copy
import inspect
import itertools
import math
import pickle
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import fused_tdpo
from contract_linear import one_thread  # noqa: F401 - a fixture, which pytest finds by its name
from fused_tdpo import DPOLoss, LinearDPOLoss, LinearTDPOLoss, LMHead, PreferenceOutput, TDPOLoss
from fused_tdpo.pair_losses import PAIR_LOSSES
from official_tdpo import IGNORE, expected_sums
from tolerances import assert_exactly_zero, assert_same_bits, assert_within_budget

ENGINES = ("one_pass", "recompute")
EXACT = 1e-9  # float64 against float64: only the order of summation may differ
SINGLE = 5e-5  # float32 against float64

fp64, fp32, fp16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
engines = pytest.mark.parametrize("engine", ENGINES)
families = pytest.mark.parametrize("family", ["tdpo1", "tdpo2", "dpo"])

# --- batches ---------------------------------------------------------------------------------------------------------------

# (prompt, response) of each sequence, chosen first. Counted rows of the pairs: 3 + 0 (a side without any), 6 + 3, 5 + 8, 1 + 1,
# 2 + 9, 4 + 4 less the holes: with eight rows a chunk some pairs share one, and some need more than one.
UNEVEN = ((1, 3), (0, 7), (2, 5), (3, 1), (1, 2), (2, 4), (4, 0), (1, 3), (0, 9), (2, 1), (1, 9), (0, 5))
SHORT = ((1, 2), (0, 4), (2, 1), (0, 3))

TRAINABLE = ("hidden", "weight", "bias")
TRAINED, FROZEN = TRAINABLE, ("hidden",)
trains = pytest.mark.parametrize("train", [TRAINED, FROZEN], ids=["trained", "frozen"])


@dataclass(frozen=True)
class Model:
    """Hidden states (S, T, D) or (total, D), and the head's fields."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def head(self) -> Tensor | LMHead:
        plain = self.bias is None and self.scale == 1.0 and self.softcap is None
        return self.weight if plain else LMHead(self.weight, self.bias, self.scale, self.softcap)

    def logits(self) -> Tensor:
        """All of them, plainly."""
        x = self.hidden @ self.weight.T
        x = (x if self.bias is None else x + self.bias) * self.scale
        return x if self.softcap is None else self.softcap * torch.tanh(x / self.softcap)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Model":
        bias = None if self.bias is None else function(self.bias)
        return replace(self, hidden=function(self.hidden), weight=function(self.weight), bias=bias)


@dataclass(frozen=True)
class Batch:
    policy: Model
    ref: Model | None
    labels: Tensor
    lengths: tuple[int, ...]
    shared: bool = False
    """The reference is given the very head of the policy; then `ref` holds equal values."""

    def to(self, dtype: torch.dtype) -> "Batch":
        ref = None if self.ref is None else self.ref.map(lambda t: t.to(dtype))
        return replace(self, policy=self.policy.map(lambda t: t.to(dtype)), ref=ref)

    def pack(self, x: Tensor) -> Tensor:
        """(S, T, ...) -> (total, ...) without the padding."""
        return torch.cat([row[:n] for row, n in zip(x, self.lengths, strict=True)])

    def packed(self) -> "Batch":
        policy, ref = (replace(model, hidden=self.pack(model.hidden)) for model in (self.policy, self.ref))
        return replace(self, policy=policy, ref=ref, labels=self.pack(self.labels))

    def cu_seqlens(self, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).to(dtype)

    def sequences(self, order: list[int]) -> "Batch":
        """These sequences, in this order."""
        policy, ref = (replace(model, hidden=model.hidden[order]) for model in (self.policy, self.ref))
        return replace(self, policy=policy, ref=ref, labels=self.labels[order], lengths=tuple(self.lengths[s] for s in order))

    def counts(self) -> list[int]:
        """Counted rows of each sequence: labels that something predicts."""
        return (self.labels[:, 1:] != IGNORE).sum(-1).tolist()

    def budget(self, rows: int) -> int:
        """Bytes of that many rows of logits of both models."""
        weights = [model.weight for model in (self.policy, self.ref) if model is not None]
        return rows * sum(weight.shape[0] * weight.element_size() for weight in weights)


def make_batch(
    layout: Iterable[tuple[int, int]] = SHORT,
    V: int = 23,
    D: int = 6,
    *,
    ref_D: int = 5,
    bias: bool = True,
    shared: bool = False,
    holes: float = 0.15,
    seed: int = 0,
    dtype: torch.dtype = fp64,
    **head: Any,
) -> Batch:
    """A seeded batch; `shared` gives both models one head, `head` are further fields of the policy's."""
    layout = tuple(layout)
    gen = torch.Generator().manual_seed(seed)
    S, T = len(layout), max((prompt + response for prompt, response in layout), default=3)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=gen, dtype=fp64)

    ref_D = D if shared else ref_D
    policy = Model(normal(S, T, D), normal(V, D, scale=1.5 / D**0.5), normal(V, scale=0.5) if bias else None, **head)
    if shared:
        ref = replace(policy, hidden=policy.hidden + normal(S, T, D, scale=0.4))
    else:
        ref = Model(normal(S, T, ref_D), normal(V, ref_D, scale=1.5 / ref_D**0.5), normal(V, scale=0.5) if bias else None)
    labels = torch.randint(0, V, (S, T), generator=gen)
    keep = torch.rand((S, T), generator=gen) >= holes
    for s, (prompt, response) in enumerate(layout):
        keep[s, :prompt] = False
        keep[s, prompt + response :] = False
    lengths = tuple(prompt + response for prompt, response in layout)
    return Batch(policy, ref, labels.where(keep, IGNORE), lengths, shared).to(dtype)


# --- running and comparing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    out: PreferenceOutput
    grads: dict[str, Tensor]
    """By name: the policy's tensors, and weights of tokens where these are learned."""


def make(family: str, linear: bool = True, **options: Any) -> torch.nn.Module:
    if family == "dpo":
        return (LinearDPOLoss if linear else DPOLoss)(**options)
    return (LinearTDPOLoss if linear else TDPOLoss)(variant=family, **options)


def call(loss: torch.nn.Module, policy: Model, batch: Batch, **keywords: Any) -> PreferenceOutput:
    """The loss, from hidden states or from logits as it takes them, with the policy given separately."""
    ref = batch.ref
    if isinstance(loss, (LinearTDPOLoss, LinearDPOLoss)):
        head = policy.head
        ref_head = None if ref is None else head if batch.shared else ref.head
        return loss(policy.hidden, head, None if ref is None else ref.hidden, ref_head, batch.labels, **keywords)
    keywords.pop("valid_rows", None)
    return loss(policy.logits(), None if ref is None else ref.logits(), batch.labels, **keywords)


def run(
    loss: torch.nn.Module,
    batch: Batch,
    train: Iterable[str] = TRAINED,
    *,
    learned: Iterable[str] = (),
    upstream: float = 1.0,
    **keywords: Any,
) -> Outcome:
    """The output, and the gradients of `upstream * loss` at the tensors named in `train` and `learned`."""
    policy = batch.policy.map(Tensor.detach)
    leaves = {name: getattr(policy, name).requires_grad_() for name in train if getattr(policy, name) is not None}
    for name in learned:
        keywords[name] = leaves[name] = keywords[name].detach().requires_grad_()
    out = call(loss, policy, batch, **keywords)
    grads = torch.autograd.grad(upstream * out.loss, list(leaves.values())) if leaves else ()
    return Outcome(out, dict(zip(leaves, grads, strict=True)))


def oracle(family: str, batch: Batch, train: Iterable[str] = TRAINED, **keywords: Any) -> Outcome:
    """The loss on logits; `keywords` are options of the loss or of the call."""
    known = inspect.signature(DPOLoss if family == "dpo" else TDPOLoss).parameters
    options = {name: keywords.pop(name) for name in [*keywords] if name in known}
    return run(make(family, linear=False, backend="reference", **options), batch, train, **keywords)


def near(what: str, got: Tensor, expected: Tensor, relative: float = EXACT) -> None:
    """Every element within `relative` of the largest one, or of 1e-3 where all are smaller."""
    scale = max(1e-3, float(expected.detach().abs().max())) if expected.numel() else 1.0
    assert_within_budget(what, got, expected, expected, torch.full_like(expected, relative * scale, dtype=fp64))


def assert_same(got: Outcome, expected: Outcome, relative: float = EXACT, what: str = "") -> None:
    """All fields, all metrics and all gradients."""
    what = f"{what}: " if what else ""
    for name in (
        "loss",
        "losses",
        "chosen_rewards",
        "rejected_rewards",
        "chosen_logps",
        "rejected_logps",
        "chosen_kl",
        "rejected_kl",
    ):
        a, e = getattr(got.out, name), getattr(expected.out, name)
        assert (a is None) == (e is None), f"{what}{name} is {a}, expected {e}"
        if a is not None:
            near(what + name, a, e, relative)
            assert name == "loss" or not a.requires_grad, f"{what}{name} requires grad"
    assert set(got.out.metrics) == set(expected.out.metrics), f"{what}metrics {sorted(got.out.metrics)}"
    for name, value in expected.out.metrics.items():
        near(what + name, got.out.metrics[name], value, relative)
    assert got.grads.keys() == expected.grads.keys()
    for name, grad in expected.grads.items():
        near(f"{what}gradient of {name}", got.grads[name], grad, relative)


def check(family: str, batch: Batch, train: Iterable[str] = TRAINED, relative: float = EXACT, **keywords: Any) -> Outcome:
    """The linear loss against the one on logits; `keywords` are options of the loss, or of the call, or of `run`."""
    own = {name: keywords.pop(name) for name in ("engine", "max_chunk_bytes", "logits_dtype", "backend") if name in keywords}
    expected = oracle(family, batch.to(fp64), train, **keywords)
    options = {name: keywords.pop(name) for name in [*keywords] if name in inspect.signature(TDPOLoss).parameters}
    got = run(make(family, **options, **own), batch, train, **keywords)
    assert_same(got, expected, relative, f"{own.get('engine', 'auto')}, {own.get('max_chunk_bytes')} bytes")
    return got


def budgets(batch: Batch) -> dict[str, int | None]:
    """What a chunk may hold: one row, so that every pair is longer; three; eight, which some pairs share; everything."""
    return {"one row": batch.budget(1), "long": batch.budget(3), "mixed": batch.budget(8), "everything": None}


def as_near_as_naive(what: str, got: Tensor, naive: Tensor, exact: Tensor, eps: float) -> None:
    """The error as a whole, for half precision; `eps` of the size is slack."""
    error, allowed, size = ((t.detach().double() - e).norm() for t, e in ((got, exact), (naive, exact), (exact, 0.0)))
    within = error <= 1.5 * allowed + eps * size
    assert within, f"{what}: relative error {error / size:.3g} as a whole, naive {allowed / size:.3g}, slack {eps:.3g}"


# --- every loss, both engines, both levels ---------------------------------------------------------------------------------

LOSSES = {
    "sigmoid": {},
    "cdpo": {"label_smoothing": 0.2, "beta": 0.5},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1, "beta": 0.5},
    "hinge": {"loss_type": "hinge", "beta": 0.4},
    "ipo": {"loss_type": "ipo", "beta": 0.3},
    "average": {"average_log_prob": True, "beta": 2.0},
    "average-ipo": {"average_log_prob": True, "loss_type": "ipo", "beta": 0.7},
    "sum": {"reduction": "sum", "beta": 0.3},
    "temperature": {"temperature": 1.7, "beta": 0.3},
    "effective": {"reward": "effective", "alpha": 1.4},
    **{name: {"loss_type": name, "beta": 0.4} for name in PAIR_LOSSES if name not in ("sigmoid", "ipo", "hinge", "robust")},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 0.05, "beta": 0.4},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1, "beta": 0.4, "average_log_prob": True},
    "mpo": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0), "beta": 0.3},
    "sft-average": {"loss_type": ("sft", "ipo"), "average_log_prob": True},
    "margins": {"loss_type": ["ipo", "sigmoid_norm"], "loss_weights": [0.1, 1.0], "beta": 0.3},
    "batch-mixture": {"loss_type": ("sigmoid", "aot_unpaired"), "beta": 0.3},
    "ld": {"ld_alpha": 0.3, "beta": 0.3},
    "ld-sequence-average": {"ld_alpha": 0.6, "loss_type": "bco_pair", "average_log_prob": True, "beta": 2.0},
    "ld-sft": {"ld_alpha": 0.3, "loss_type": ("sigmoid", "sft"), "beta": 0.3},
    "wpo": {"use_weighting": True, "beta": 0.3},
    "wpo-sequence": {"use_weighting": True, "loss_type": "nca_pair", "beta": 0.3},
    "wpo-ld-average": {"use_weighting": True, "ld_alpha": 0.4, "average_log_prob": True, "extras": ("entropy",)},
}
OF_DPO = {
    "forward-kl": {"f_divergence": "forward_kl"},
    "js": {"f_divergence": "js", "loss_type": ("hinge", "sft"), "beta": 0.5},
    "alpha": {"f_divergence": "alpha", "f_alpha": 0.3, "loss_type": "ipo", "beta": 0.4},
    "clamped": {"f_divergence": "alpha", "f_alpha": 0.5, "f_max_exponent": 0.5, "beta": 0.4},
}
EVERY_LOSS = [
    pytest.param(family, options, id=f"{family}-{name}")
    for (name, options), family in itertools.product((LOSSES | OF_DPO).items(), ("tdpo1", "tdpo2", "dpo"))
    if name not in ("effective" if family == "dpo" else OF_DPO)
]


@pytest.mark.parametrize(("family", "options"), EVERY_LOSS)
def test_every_loss_by_every_route(family: str, options: dict[str, Any]) -> None:
    """Engine, chunk, head trained or frozen: one loss, one gradient, that of the logits in float64; near it in float32."""
    batch = make_batch(UNEVEN)
    single = batch.to(fp32)
    one_pass = make(family, **options).obstacle(weighted=False) is None
    engines = ENGINES if one_pass else ("recompute", "auto")
    if not one_pass:
        with pytest.raises(ValueError, match=r"(?s)one_pass.*recompute"):
            make(family, engine="one_pass", **options)
    for train in (TRAINED, FROZEN):
        expected = oracle(family, batch, train, **options)
        assert all(grad.abs().max() > 1e-5 for grad in expected.grads.values()), "the case must move something"
        for engine, (name, budget) in itertools.product(engines, budgets(batch).items()):
            got = run(make(family, engine=engine, max_chunk_bytes=budget, **options), batch, train)
            assert_same(got, expected, what=f"{engine}, {name}, {'+'.join(train)}")
            assert got.out.engine.name == ("recompute" if engine == "auto" else engine)
        for engine in engines:
            got = run(make(family, engine=engine, max_chunk_bytes=single.budget(8), **options), single, train)
            assert_same(got, expected, SINGLE, f"{engine}, float32, {'+'.join(train)}")


def test_the_batch_of_that_table_has_every_kind_of_pair() -> None:
    """Guards the test above: groups of pairs, pairs longer than a chunk, an empty side, both sides of hinge's kink."""
    counts = make_batch(UNEVEN).counts()
    pairs = [chosen + rejected for chosen, rejected in zip(counts[:6], counts[6:], strict=True)]
    assert min(counts) == 0
    assert sum(n <= 4 for n in pairs) >= 2, f"two pairs that share a chunk of eight rows: {pairs}"
    assert sum(n > 8 for n in pairs) >= 2, f"several pairs longer than it: {pairs}"
    assert all(n > 1 for n in pairs), f"every pair is longer than a row: {pairs}"
    for family in ("tdpo1", "tdpo2", "dpo"):
        losses = oracle(family, make_batch(UNEVEN), **LOSSES["hinge"]).out.losses
        assert (losses == 0).any(), family
        assert (losses > 0).any(), family


@engines
@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("train", [names for n in (1, 2, 3) for names in itertools.combinations(TRAINABLE, n)], ids="-".join)
def test_any_subset_of_gradients(train: tuple[str, ...], rows: int, engine: str) -> None:
    batch = make_batch()
    for family in ("tdpo1", "tdpo2", "dpo"):
        check(family, batch, train, engine=engine, max_chunk_bytes=batch.budget(rows))


@families
@engines
@trains
def test_heads(train: tuple[str, ...], engine: str, family: str) -> None:
    """Scale and softcap of the policy's head; none of the reference's."""
    batch = make_batch(scale=1.4, softcap=3.0)
    for rows in (2, 100):
        check(family, batch, train, engine=engine, max_chunk_bytes=batch.budget(rows))


@families
@engines
def test_padded_vocabularies(engine: str, family: str) -> None:
    """Heads padded to different widths: `vocab_size` cuts both, and the gradient beyond it is exactly 0."""
    batch = make_batch(bias=False)
    pad = [
        torch.cat([model.weight, torch.ones(n, model.weight.shape[1]).double()])
        for model, n in ((batch.policy, 4), (batch.ref, 2))
    ]
    wide = replace(batch, policy=replace(batch.policy, weight=pad[0]), ref=replace(batch.ref, weight=pad[1]))
    expected = oracle(family, batch)
    for rows in (2, 100):
        got = run(make(family, engine=engine, vocab_size=23, max_chunk_bytes=batch.budget(rows)), wide)
        assert_exactly_zero("gradient beyond vocab_size", got.grads["weight"][23:])
        got.grads["weight"] = got.grads["weight"][:23]
        assert_same(got, expected)


BY_LAYOUT = ("mpo", "sft", "aot", "ld", "wpo", "wpo-ld-average")


@families
@trains
@pytest.mark.parametrize("layout", ["packed", "interleaved", "counted", "weighted"])
@pytest.mark.parametrize("name", BY_LAYOUT)
def test_losses_that_see_more_than_ratios_in_every_layout(name: str, layout: str, train: tuple[str, ...], family: str) -> None:
    """Numbers of tokens, places in a sequence, squares of probabilities: found wherever the rows are."""
    batch = make_batch(UNEVEN, seed=32)
    options, keywords = LOSSES[name], {}
    if layout == "weighted":
        keywords["token_weights"] = torch.rand(batch.labels.shape).double()
    expected = oracle(family, batch, train, **options, **keywords)
    if layout == "interleaved":
        order = [s for p in range(6) for s in (p, p + 6)]
        batch, options = batch.sequences(order), options | {"interleaved": True}
        expected.grads["hidden"] = expected.grads["hidden"][order]
    if layout == "packed":
        expected.grads["hidden"] = batch.pack(expected.grads["hidden"])
        keywords["cu_seqlens"], batch = batch.cu_seqlens(), batch.packed()
    if layout == "counted":
        keywords["valid_rows"] = batch.counts()
    for rows in (3, 8, 100):
        loss = make(family, max_chunk_bytes=batch.budget(rows), **options)
        got = run(loss, batch, train, **keywords)
        assert_same(got, expected, what=f"{rows} rows a chunk")
        reason = loss.obstacle(layout == "weighted")
        assert got.out.engine.name == ("one_pass" if reason is None else "recompute")
        assert reason is None or got.out.engine.reason == reason


@trains
@pytest.mark.parametrize("name", BY_LAYOUT)
def test_losses_that_see_more_than_ratios_with_ref_logps(name: str, train: tuple[str, ...]) -> None:
    batch = make_batch(UNEVEN, seed=33)
    options = {n: v for n, v in LOSSES[name].items() if n != "ld_alpha"}
    expected = oracle("dpo", batch, train, **options)
    sums = expected_sums(batch.policy.logits(), batch.ref.logits(), batch.labels)
    ref_logps = sums.ref_logps / sums.lengths.clamp(min=1) if options.get("average_log_prob") else sums.ref_logps
    alone = replace(batch, ref=None)
    for rows in (3, 100):
        got = run(make("dpo", max_chunk_bytes=alone.budget(rows), **options), alone, train, ref_logps=ref_logps)
        near("losses", got.out.losses, expected.out.losses)
        for grad in train:
            near(f"gradient of {grad}", got.grads[grad], expected.grads[grad])


def test_sft_refuses_one_pass_where_tokens_have_weights() -> None:
    batch = make_batch()
    loss = make("dpo", loss_type="sft", engine="one_pass")
    with pytest.raises(ValueError, match=r"(?s)one_pass.*'sft'.*NLL.*weights.*recompute"):
        run(loss, batch, token_weights=torch.ones(batch.labels.shape))


EXTRAS = ("entropy", "ref_entropy", "accuracy", "mean_logit")


@families
@engines
@trains
@pytest.mark.parametrize("layout", ["padded", "packed", "interleaved", "weighted", "average", "shared head"])
def test_extras(layout: str, train: tuple[str, ...], engine: str, family: str) -> None:
    """From groups of pairs and from long ones: the metrics of the loss on logits, which are means over tokens."""
    batch = make_batch(UNEVEN, V=5, seed=29, shared=layout == "shared head")
    keywords: dict[str, Any] = {"extras": EXTRAS, "average_log_prob": layout == "average"}
    if layout == "weighted":
        keywords["token_weights"] = torch.rand(batch.labels.shape).double()
    expected = oracle(family, batch, train, **keywords)
    assert 0 < expected.out.metrics["mean_token_accuracy"] < 1
    options = {name: keywords.pop(name) for name in ("extras", "average_log_prob")}
    if layout == "interleaved":
        order = [s for p in range(6) for s in (p, p + 6)]
        batch, options["interleaved"] = batch.sequences(order), True
        expected.grads["hidden"] = expected.grads["hidden"][order]
    if layout == "packed":
        expected.grads["hidden"] = batch.pack(expected.grads["hidden"])
        keywords["cu_seqlens"], batch = batch.cu_seqlens(), batch.packed()
    for rows in (1, 3, 8, 100):
        loss = make(family, engine=engine, max_chunk_bytes=batch.budget(rows), **options)
        got = run(loss, batch, train, **keywords)
        assert_same(got, expected, what=f"{rows} rows a chunk")
        for name in ("entropy", "ref_entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"):
            assert not got.out.metrics[name].requires_grad


@engines
def test_extras_of_the_policy_need_no_reference(engine: str) -> None:
    batch = make_batch(UNEVEN, seed=30)
    ref_logps = expected_sums(batch.policy.logits(), batch.ref.logits(), batch.labels).ref_logps
    expected = oracle("dpo", batch, extras=("mean_logit", "entropy")).out.metrics
    alone = replace(batch, ref=None)
    loss = make("dpo", engine=engine, extras=["mean_logit", "entropy"], max_chunk_bytes=alone.budget(8))
    metrics = run(loss, alone, ref_logps=ref_logps).out.metrics
    for name in ("entropy", "logits/chosen", "logits/rejected"):
        near(name, metrics[name], expected[name])
    with pytest.raises(ValueError, match=r"(?s)ref_entropy.*ref_hidden"):
        run(make("dpo", engine=engine, extras=("ref_entropy",)), alone, ref_logps=ref_logps)


# --- layouts ---------------------------------------------------------------------------------------------------------------


@families
@engines
@trains
@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}, {"average_log_prob": True}], ids=["sigmoid", "ipo", "average"])
def test_packing_equals_padding(options: dict[str, Any], train: tuple[str, ...], engine: str, family: str) -> None:
    """Sequences end to end, also where one starts with a label: the row before it must not predict it."""
    batch = make_batch(UNEVEN, seed=1)
    packed = batch.packed()
    expected = oracle(family, batch, train, **options)
    expected.grads["hidden"] = batch.pack(expected.grads["hidden"])
    for rows in (3, 8, 100):
        loss = make(family, engine=engine, max_chunk_bytes=batch.budget(rows), **options)
        for dtype in (torch.int32, torch.int64):
            assert_same(run(loss, packed, train, cu_seqlens=batch.cu_seqlens(dtype)), expected)


@families
@engines
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_interleaved(packed: bool, engine: str, family: str) -> None:
    """chosen, rejected, chosen, ...: the same pairs, the same numbers."""
    batch = make_batch(UNEVEN, seed=2)
    order = [s for p in range(6) for s in (p, p + 6)]
    moved = batch.sequences(order)
    expected = oracle(family, batch)
    expected.grads["hidden"] = expected.grads["hidden"][order]
    keywords = {"cu_seqlens": moved.cu_seqlens()} if packed else {}
    if packed:
        expected.grads["hidden"] = moved.pack(expected.grads["hidden"])
        moved = moved.packed()
    for rows in (3, 8, 100):
        assert_same(
            run(make(family, engine=engine, interleaved=True, max_chunk_bytes=batch.budget(rows)), moved, **keywords), expected
        )


@families
@engines
@trains
def test_what_no_label_uses_does_not_matter(train: tuple[str, ...], engine: str, family: str) -> None:
    """Prompt, padding, holes, the last position may hold NaN, in hidden states and in weights; their gradient is exactly 0."""
    batch = make_batch(seed=3)
    unused = torch.ones(batch.labels.shape, dtype=torch.bool)
    unused[:, :-1] = batch.labels[:, 1:] == IGNORE
    models = [replace(m, hidden=m.hidden.masked_fill(unused[..., None], math.nan)) for m in (batch.policy, batch.ref)]
    dirty = replace(batch, policy=models[0], ref=models[1])
    weights = torch.rand(batch.labels.shape).double()
    uncounted = batch.labels == IGNORE
    uncounted[:, 0] = True
    expected = oracle(family, batch, train, token_weights=weights)
    for rows in (2, 100):
        loss = make(family, engine=engine, max_chunk_bytes=batch.budget(rows))
        got = run(loss, dirty, train, token_weights=weights.masked_fill(uncounted, math.nan))
        assert_same(got, expected)
        assert_exactly_zero("gradient of unused rows", got.grads["hidden"][unused])


@families
@engines
def test_hidden_states_of_any_strides(engine: str, family: str) -> None:
    """Sequence-first models, and a head that is a slice of an embedding."""
    batch = make_batch(seed=4)
    hidden = [model.hidden.transpose(0, 1).contiguous().transpose(0, 1) for model in (batch.policy, batch.ref)]
    weight = torch.cat([torch.full((2, 6), math.nan), batch.policy.weight, torch.full((1, 6), math.nan)])[2:-1]
    strided = replace(
        batch, policy=replace(batch.policy, hidden=hidden[0], weight=weight), ref=replace(batch.ref, hidden=hidden[1])
    )
    assert_same(run(make(family, engine=engine, max_chunk_bytes=batch.budget(2)), strided), oracle(family, batch))


@families
@engines
@trains
@pytest.mark.parametrize("ignore_index", [-1, 0])
def test_ignore_index(ignore_index: int, train: tuple[str, ...], engine: str, family: str) -> None:
    batch = make_batch(seed=5)
    labels = batch.labels.masked_fill(batch.labels == ignore_index, 5).masked_fill(batch.labels == IGNORE, ignore_index)
    moved = replace(batch, labels=labels.int())
    check(family, moved, train, engine=engine, ignore_index=ignore_index, max_chunk_bytes=batch.budget(2))


# --- weights, normalisers, upstream gradients ------------------------------------------------------------------------------

WEIGHTED = [
    pytest.param(family, names, id=f"{family}-{'+'.join(names)}")
    for family in ("dpo", "tdpo1", "tdpo2")
    for names in (("token_weights",), ("kl_weights",), ("token_weights", "kl_weights"))
    if family != "dpo" or names == ("token_weights",)
]


@engines
@pytest.mark.parametrize(("family", "names"), WEIGHTED)
@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}], ids=["sigmoid", "ipo"])
def test_weights(options: dict[str, Any], family: str, names: tuple[str, ...], engine: str) -> None:
    """Constant ones, of any sign; learned ones, whose gradient is the slope of their sequence times what they weigh."""
    batch = make_batch(UNEVEN, seed=6)
    weights = {name: torch.randn(batch.labels.shape, dtype=fp64) for name in names}
    for rows in (3, 8, 100):
        fixed = {"engine": engine, "max_chunk_bytes": batch.budget(rows), **options, **weights}
        check(family, batch, TRAINED, average_log_prob=True, **fixed)
        check(family, batch, FROZEN, **fixed)
        check(family, batch, TRAINED, learned=names, **fixed)
        check(family, batch, FROZEN, learned=names, **fixed)
        check(family, batch, (), learned=names[:1], **fixed)  # nothing of the model learns


@engines
def test_packed_learned_weights(engine: str) -> None:
    batch = make_batch(UNEVEN, seed=7)
    weights = {name: torch.rand(batch.labels.shape).double() for name in ("token_weights", "kl_weights")}
    expected = oracle("tdpo1", batch, learned=weights, **weights)
    expected = Outcome(
        expected.out, {n: batch.pack(g) if g.dim() > 1 and n != "weight" else g for n, g in expected.grads.items()}
    )
    packed = {name: batch.pack(w) for name, w in weights.items()}
    for rows in (3, 100):
        loss = make("tdpo1", engine=engine, max_chunk_bytes=batch.budget(rows))
        assert_same(run(loss, batch.packed(), learned=packed, cu_seqlens=batch.cu_seqlens(), **packed), expected)


@engines
def test_weights_of_another_dtype(engine: str) -> None:
    """A learned weight in float32 beside a model in float64 gets a gradient in float32."""
    batch = make_batch(seed=8)
    weights = torch.rand(batch.labels.shape)
    got = run(
        make("tdpo2", engine=engine, max_chunk_bytes=batch.budget(2)), batch, learned=["token_weights"], token_weights=weights
    )
    expected = oracle("tdpo2", batch, learned=["token_weights"], token_weights=weights.double())
    assert got.grads["token_weights"].dtype == fp32
    assert_same(got, expected, 1e-6)


@families
@engines
@trains
@pytest.mark.parametrize("upstream", [0.37, 1024.0, 0.0])
def test_upstream_gradient(upstream: float, train: tuple[str, ...], engine: str, family: str) -> None:
    """Gradient accumulation divides, a loss scaler multiplies: what comes down reaches everything."""
    batch = make_batch(UNEVEN, seed=9)
    for rows in (3, 8, 100):
        check(family, batch, train, engine=engine, max_chunk_bytes=batch.budget(rows), upstream=upstream)


@families
@engines
@pytest.mark.parametrize("num_pairs", [7, 2.5, torch.tensor(9)], ids=str)
def test_num_pairs(num_pairs: Any, engine: str, family: str) -> None:
    batch = make_batch(UNEVEN, seed=10)
    for rows in (3, 8, 100):
        check(family, batch, engine=engine, max_chunk_bytes=batch.budget(rows), num_pairs=num_pairs)


# --- references ------------------------------------------------------------------------------------------------------------


@families
@engines
@trains
@pytest.mark.parametrize("bias", [False, True], ids=["tensor", "LMHead"])
def test_shared_head(bias: bool, train: tuple[str, ...], engine: str, family: str) -> None:
    """One head for both models, as when only adapters train: the gradient is that of the policy's part alone."""
    batch = make_batch(UNEVEN, shared=True, bias=bias, seed=11)
    for rows in (3, 8, 100):
        check(family, batch, train, engine=engine, max_chunk_bytes=batch.budget(rows))
        check(family, replace(batch, shared=False), train, engine=engine, max_chunk_bytes=batch.budget(rows))


@engines
def test_one_weight_in_two_heads(engine: str) -> None:
    """The same tensor behind another scale is another head."""
    batch = make_batch(ref_D=6, bias=False, scale=1.5, seed=12)
    policy = batch.policy.map(lambda t: t.detach().clone().requires_grad_())
    ref = Model(batch.ref.hidden, policy.weight)
    out = make("tdpo2", engine=engine, max_chunk_bytes=batch.budget(2))(
        policy.hidden, policy.head, ref.hidden, ref.head, batch.labels
    )
    grads = dict(zip(("hidden", "weight"), torch.autograd.grad(out.loss, [policy.hidden, policy.weight]), strict=True))
    apart = replace(batch, ref=Model(batch.ref.hidden, batch.policy.weight))
    assert_same(Outcome(out, grads), oracle("tdpo2", apart))


@engines
@trains
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("layout", ["padded", "packed", "weighted"])
def test_ref_logps_equal_a_reference(layout: str, loss_type: str, train: tuple[str, ...], engine: str) -> None:
    """Precomputed sums instead of a reference: the same loss, and no KL."""
    batch = make_batch(UNEVEN, seed=13)
    weights = {"token_weights": torch.rand(batch.labels.shape).double()} if layout == "weighted" else {}
    sums = expected_sums(batch.policy.logits(), batch.ref.logits(), batch.labels)
    ref_logps = sums.ref_logps
    if weights:
        plain = expected_sums(batch.policy.logits(), torch.zeros_like(batch.ref.logits()), batch.labels, **weights)
        zero = -math.log(23) * (weights["token_weights"][:, 1:] * (batch.labels[:, 1:] != IGNORE)).sum(-1)
        full = expected_sums(batch.policy.logits(), batch.ref.logits(), batch.labels, **weights)
        ref_logps = plain.ratio + zero - full.ratio
    expected = oracle("dpo", batch, train, loss_type=loss_type, **weights)
    alone, keywords = replace(batch, ref=None), dict(weights)
    if layout == "packed":
        alone = replace(batch.packed(), ref=None)
        expected.grads["hidden"] = batch.pack(expected.grads["hidden"])
        keywords["cu_seqlens"] = batch.cu_seqlens()
    for rows in (3, 8, 100):
        loss = make("dpo", engine=engine, loss_type=loss_type, max_chunk_bytes=alone.budget(rows))
        got = run(loss, alone, train, ref_logps=ref_logps, **keywords)
        for name in ("loss", "losses", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps"):
            near(name, getattr(got.out, name), getattr(expected.out, name))
        for name, grad in expected.grads.items():
            near(f"gradient of {name}", got.grads[name], grad)
        assert got.out.chosen_kl is None
        assert not any(name.startswith("kl/") for name in got.out.metrics)


@engines
def test_the_reference_gets_no_gradient(engine: str) -> None:
    batch = make_batch(seed=14)
    policy, ref = (model.map(lambda t: t.detach().clone().requires_grad_()) for model in (batch.policy, batch.ref))
    make("tdpo1", engine=engine)(policy.hidden, policy.head, ref.hidden, ref.head, batch.labels).loss.backward()
    for name in TRAINABLE:
        assert getattr(policy, name).grad is not None, name
        assert getattr(ref, name).grad is None, name


@engines
def test_models_of_different_dtype(engine: str) -> None:
    """A float32 policy beside a bfloat16 reference. The rounding of the reference's logits is the reference's own."""
    batch = make_batch(V=131, D=16, ref_D=8, dtype=fp32, seed=15)
    mixed = replace(batch, ref=batch.ref.map(lambda t: t.to(bf16)))
    for rows in (2, 100):
        got = run(make("tdpo1", engine=engine, max_chunk_bytes=batch.budget(rows)), mixed)
        exact, naive = oracle("tdpo1", mixed.to(fp64)), oracle("tdpo1", mixed)
        assert_half(got, naive, exact, mixed)


# --- edges -----------------------------------------------------------------------------------------------------------------


@families
@engines
@trains
@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}, {"average_log_prob": True}], ids=["sigmoid", "ipo", "average"])
def test_sequences_without_labels(options: dict[str, Any], train: tuple[str, ...], engine: str, family: str) -> None:
    """A chosen side, a rejected side, a whole pair: their sums are 0, their length 1, and the other side still learns."""
    batch = make_batch((*UNEVEN[:4], *UNEVEN[6:10]), seed=16)
    batch.labels[[0, 5, 2, 6]] = IGNORE
    for rows in (1, 8, 100):
        got = check(family, batch, train, engine=engine, max_chunk_bytes=batch.budget(rows), **options)
        assert_exactly_zero("gradient", got.grads["hidden"][[0, 5, 2, 6]])


@families
@engines
@trains
@pytest.mark.parametrize("layout", [((1, 9), (0, 4)), ((0, 1), (0, 1)), ((2, 0), (3, 0))], ids=["long", "one token", "prompts"])
def test_a_single_pair(layout: Any, train: tuple[str, ...], engine: str, family: str) -> None:
    """Also one that predicts nothing: log 2 and no gradient."""
    batch = make_batch(layout, holes=0.0, seed=17)
    for rows in (1, 3, 100):
        check(family, batch, train, engine=engine, max_chunk_bytes=batch.budget(rows))


@families
@engines
@trains
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_no_pairs(packed: bool, train: tuple[str, ...], engine: str, family: str) -> None:
    """A rank whose share is empty: loss 0, gradients of the right shape, nothing NaN."""
    batch, keywords = make_batch(()), {}
    if packed:
        keywords["cu_seqlens"] = torch.zeros(1, dtype=torch.int32)
        models = [replace(model, hidden=model.hidden.flatten(0, 1)) for model in (batch.policy, batch.ref)]
        batch = replace(batch, policy=models[0], ref=models[1], labels=batch.labels.flatten())
    for more in ({}, {"num_pairs": 4}, {"reduction": "sum"}, {"valid_rows": []}):
        got = check(family, batch, train, engine=engine, **keywords, **more)
        assert got.out.loss.item() == 0
        assert got.out.losses.shape == (0,)


@families
@engines
def test_nothing_needs_a_gradient(engine: str, family: str) -> None:
    """Evaluation: under no_grad, in inference mode, and with inputs that require none; the same numbers."""
    batch = make_batch(UNEVEN, seed=18)
    loss = make(family, engine=engine, max_chunk_bytes=batch.budget(8))
    expected = run(loss, batch)
    plain = run(loss, batch, ())
    assert not plain.out.loss.requires_grad
    assert_same(plain, Outcome(expected.out, {}))
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            policy = batch.policy.map(lambda t: t.detach().clone().requires_grad_())
            out = call(loss, policy, batch)
            assert not out.loss.requires_grad
            assert_same(Outcome(out, {}), Outcome(expected.out, {}))


# --- rows counted beforehand -----------------------------------------------------------------------------------------------


@families
@engines
@trains
@pytest.mark.parametrize("form", ["list", "tensor"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_valid_rows_changes_nothing(packed: bool, form: str, train: tuple[str, ...], engine: str, family: str) -> None:
    batch = make_batch(UNEVEN, seed=19)
    counts = batch.counts() if form == "list" else torch.tensor(batch.counts())
    keywords = {"cu_seqlens": batch.cu_seqlens()} if packed else {}
    batch_ = batch.packed() if packed else batch
    for rows in (3, 8, 100):
        loss = make(family, engine=engine, max_chunk_bytes=batch.budget(rows))
        got, expected = run(loss, batch_, train, valid_rows=counts, **keywords), run(loss, batch_, train, **keywords)
        for name in ("losses", "chosen_logps", "rejected_kl"):
            assert_same_bits(name, getattr(got.out, name), getattr(expected.out, name))
        for name, grad in expected.grads.items():
            assert_same_bits(f"gradient of {name}", got.grads[name], grad)


def _wrong_counts() -> list[Any]:
    counts = make_batch(seed=20).counts()
    return [
        pytest.param([counts[0] - 1, *counts[1:]], id="fewer"),
        pytest.param([counts[0] + 1, *counts[1:]], id="more"),
        pytest.param([counts[0] + 1, counts[1] - 1, *counts[2:]], id="moved"),
        pytest.param(counts[:-1], id="short"),
        pytest.param([*counts, 0], id="long"),
        pytest.param([-1, *counts[1:]], id="negative"),
        pytest.param(torch.tensor(counts) + 1, id="tensor"),
        pytest.param(torch.tensor(counts).double(), id="float"),
    ]


@engines
@pytest.mark.parametrize("counts", _wrong_counts())
def test_wrong_valid_rows_are_refused(counts: Any, engine: str) -> None:
    """On a CPU looking costs nothing. The right total over wrong sequences is wrong, too."""
    with pytest.raises((ValueError, TypeError), match="valid_rows"):
        run(make("tdpo2", engine=engine), make_batch(seed=20), valid_rows=counts)


# --- what autograd sees ----------------------------------------------------------------------------------------------------


@families
@engines
@trains
def test_a_second_backward_of_a_kept_graph(train: tuple[str, ...], engine: str, family: str) -> None:
    batch = make_batch(UNEVEN, seed=21)
    for rows in (3, 8, 100):
        policy = batch.policy.map(Tensor.detach)
        leaves = [getattr(policy, name).requires_grad_() for name in train]
        loss = call(make(family, engine=engine, max_chunk_bytes=batch.budget(rows)), policy, batch).loss
        first, second = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
        for name, a, b in zip(train, first, second, strict=True):
            assert_same_bits(f"second backward: {name}", b, a)
        (scaled,) = torch.autograd.grad(4.0 * loss, leaves[:1])  # another upstream gradient: nothing of the first one stuck
        near("gradient of hidden", scaled, 4.0 * first[0])


@families
@engines
@trains
def test_gradients_add_up(train: tuple[str, ...], engine: str, family: str) -> None:
    """Gradient accumulation: autograd may adopt a gradient as .grad and add the next one in place."""
    batches = [make_batch(UNEVEN, seed=22), make_batch(UNEVEN, seed=23)]
    batches[1] = replace(batches[1], policy=replace(batches[0].policy, hidden=batches[1].policy.hidden))
    for rows in (3, 8, 100):
        loss = make(family, engine=engine, max_chunk_bytes=batches[0].budget(rows))
        policy = batches[0].policy.map(lambda t: t.detach().clone())
        leaves = {name: getattr(policy, name).requires_grad_() for name in train}
        outs = [
            call(loss, replace(policy, hidden=policy.hidden * factor), b) for b, factor in zip(batches, (1.0, 0.5), strict=True)
        ]
        outs[0].loss.backward(retain_graph=True)
        outs[1].loss.backward()
        outs[0].loss.backward()
        moved = replace(batches[1], policy=replace(batches[1].policy, hidden=0.5 * policy.hidden.detach()))
        first, second = oracle(family, batches[0], train).grads, oracle(family, moved, train).grads
        for name, leaf in leaves.items():
            near(f"gradient of {name}", leaf.grad, 2 * first[name] + (0.5 if name == "hidden" else 1.0) * second[name])


@engines
def test_gradients_reach_a_body_and_a_tied_embedding(engine: str) -> None:
    batch = make_batch(UNEVEN, bias=False, seed=24)
    body, tokens = torch.randn(6, 6, dtype=fp64), batch.labels.clamp(min=0)
    grads = []
    for loss in (
        make("tdpo2", engine=engine, max_chunk_bytes=batch.budget(8)),
        make("tdpo2", linear=False, backend="reference"),
    ):
        leaves = [t.clone().requires_grad_() for t in (body, batch.policy.weight)]
        hidden = torch.tanh(torch.nn.functional.embedding(tokens, leaves[1]) @ leaves[0])
        out = call(loss, Model(hidden, leaves[1]), batch)
        grads.append(torch.autograd.grad(out.loss, leaves))
    for what, got, expected in zip(("body", "embedding"), *grads, strict=True):
        near(f"gradient of the {what}", got, expected)


@engines
@trains
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("around", ["model", "step"])
def test_gradient_checkpointing(around: str, reentrant: bool, train: tuple[str, ...], engine: str) -> None:
    """Of the model in front of the loss, or of both: slower, never different."""
    batch = make_batch(UNEVEN, seed=25)
    body, x = torch.randn(6, 6, dtype=fp64), torch.randn(12, batch.labels.shape[1], 6, dtype=fp64)
    loss = make("tdpo2", engine=engine, max_chunk_bytes=batch.budget(8))

    def gradients(wrap: Callable[..., Tensor]) -> dict[str, Tensor]:
        policy = batch.policy.map(lambda t: t.detach().clone())
        leaves = {"x": x.clone().requires_grad_(), "body": body.clone().requires_grad_()}
        leaves |= {name: getattr(policy, name).requires_grad_() for name in train if name != "hidden"}

        def model(x: Tensor) -> Tensor:
            return torch.tanh(x @ leaves["body"])

        def step(hidden: Tensor) -> Tensor:
            return call(loss, replace(policy, hidden=hidden), batch).loss

        value = wrap(lambda x: step(model(x)), leaves["x"]) if around == "step" else step(wrap(model, leaves["x"]))
        (0.37 * value).backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    expected = gradients(lambda function, x: function(x))
    got = gradients(lambda function, x: checkpoint(function, x, use_reentrant=reentrant))
    for name, grad in expected.items():
        near(f"gradient of {name}", got[name], grad)


@families
@engines
@trains
def test_double_backward_is_refused(train: tuple[str, ...], engine: str, family: str) -> None:
    batch = make_batch(seed=26)
    policy = batch.policy.map(Tensor.detach)
    leaves = [getattr(policy, name).requires_grad_() for name in train]
    loss = call(make(family, engine=engine), policy, batch).loss

    def twice() -> None:
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)

    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)twice|double|second"):
        twice()


@engines
def test_no_input_is_written(engine: str) -> None:
    batch = make_batch(UNEVEN, seed=27)
    weights = torch.rand(batch.labels.shape).double()
    tensors = [getattr(model, name) for model in (batch.policy, batch.ref) for name in TRAINABLE] + [batch.labels, weights]
    copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    run(make("tdpo1", engine=engine, max_chunk_bytes=batch.budget(8)), batch, learned=["token_weights"], token_weights=weights)
    for tensor, kept, version in zip(tensors, copies, versions, strict=True):
        assert_same_bits("input", tensor, kept)
        assert tensor._version == version, "the version of an input changed"


@families
@engines
@trains
def test_the_same_bits_every_time(train: tuple[str, ...], engine: str, family: str) -> None:
    batch = make_batch(UNEVEN, V=101, dtype=bf16, seed=28)
    loss = make(family, engine=engine, max_chunk_bytes=batch.budget(8))
    got, again = run(loss, batch, train), run(loss, batch, train)
    assert_same_bits("losses", again.out.losses, got.out.losses)
    for name, grad in got.grads.items():
        assert_same_bits(f"gradient of {name}", again.grads[name], grad)


# --- dtypes, autocast, compilation -----------------------------------------------------------------------------------------


def assert_half(got: Outcome, naive: Outcome, exact: Outcome, batch: Batch, scale: float = 1.0) -> None:
    """Log-probabilities within the rounding of their logits, everything else as near to the truth as naive code."""
    dtypes = {model.weight.dtype for model in (batch.policy, batch.ref)}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    for name in ("chosen_logps", "rejected_logps", "chosen_kl", "rejected_kl"):
        want = getattr(exact.out, name)
        rows = torch.tensor(batch.counts(), dtype=fp64).chunk(2)[name.startswith("rejected")]
        slack = eps * rows * 8 + 1e-5
        assert_within_budget(name, getattr(got.out, name), getattr(naive.out, name), want, slack)
    for name, want in exact.grads.items():
        assert got.grads[name].dtype == naive.grads[name].dtype, f"gradient of {name} is {got.grads[name].dtype}"
        as_near_as_naive(f"gradient of {name}", got.grads[name].double() / scale, naive.grads[name].double() / scale, want, eps)


@families
@engines
@trains
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
def test_half_precision(dtype: torch.dtype, train: tuple[str, ...], engine: str, family: str) -> None:
    """As near to float64 on the same rounded inputs as naive code in that dtype, in groups and in long pairs."""
    batch = make_batch(UNEVEN, V=131, D=24, ref_D=16, dtype=dtype, seed=29)
    naive, exact = oracle(family, batch, train), oracle(family, batch.to(fp64), train)
    for budget in budgets(batch).values():
        got = run(make(family, engine=engine, max_chunk_bytes=budget), batch, train)
        assert got.out.loss.dtype == fp32
        assert_half(got, naive, exact, batch)


@families
@engines
@trains
def test_a_loss_scaler_keeps_what_float16_would_lose(train: tuple[str, ...], engine: str, family: str) -> None:
    """Scaled by 1024 on the way down and divided afterwards: nothing overflows, and small gradients survive."""
    batch = make_batch(UNEVEN, V=131, D=24, ref_D=16, dtype=fp16, seed=30)
    options = {"beta": 0.01}  # small gradients: unscaled, many would be below the smallest float16
    naive, exact = oracle(family, batch, train, upstream=1024.0, **options), oracle(family, batch.to(fp64), train, **options)
    for rows in (3, 8, 100):
        got = run(make(family, engine=engine, max_chunk_bytes=batch.budget(rows), **options), batch, train, upstream=1024.0)
        assert_half(got, naive, exact, batch, scale=1024.0)


@engines
@trains
@pytest.mark.parametrize("dtype", [bf16, fp16], ids=str)
def test_float32_tiles(dtype: torch.dtype, train: tuple[str, ...], engine: str) -> None:
    """Half-precision models, float32 logits: the values are float32's, the gradients at least half precision's."""
    batch = make_batch(UNEVEN, V=131, D=24, ref_D=16, dtype=dtype, seed=31)
    exact, naive = oracle("tdpo2", batch.to(fp64), train), oracle("tdpo2", batch, train)
    for rows in (3, 100):
        got = run(make("tdpo2", engine=engine, logits_dtype=fp32, max_chunk_bytes=batch.budget(rows)), batch, train)
        assert_same(Outcome(got.out, {}), Outcome(exact.out, {}), SINGLE)
        assert_half(got, naive, exact, batch)


@families
@engines
@trains
def test_autocast(train: tuple[str, ...], engine: str, family: str) -> None:
    """Float32 parameters under bfloat16 autocast: the values of rounded inputs, gradients in the parameters' own dtype."""
    batch = make_batch(UNEVEN, V=131, D=24, ref_D=16, dtype=fp32, seed=32)
    rounded = batch.to(bf16)
    loss = make(family, engine=engine, max_chunk_bytes=rounded.budget(8))
    policy = batch.policy.map(Tensor.detach)
    leaves = {name: getattr(policy, name).requires_grad_() for name in train}
    with torch.autocast("cpu", dtype=bf16):
        out = call(loss, policy, batch)
    grads = torch.autograd.grad(out.loss, list(leaves.values()))
    expected = run(loss, rounded, train)
    for name in ("losses", "chosen_logps", "rejected_kl"):
        assert_same_bits(name, getattr(out, name), getattr(expected.out, name))
    naive, exact = oracle(family, rounded, train), oracle(family, rounded.to(fp64), train)
    for name, grad in zip(leaves, grads, strict=True):
        assert grad.dtype == fp32, f"gradient of {name} is {grad.dtype}"
        as_near_as_naive(f"gradient of {name}", grad, naive.grads[name], exact.grads[name], eps=torch.finfo(bf16).eps)


@engines
def test_autocast_of_a_whole_step(engine: str) -> None:
    """Model and loss in one autocast region, in float32: hidden states arrive in bfloat16, the head in float32."""
    batch = make_batch(UNEVEN, V=131, D=24, dtype=fp32, shared=True, seed=33)
    body = torch.randn(24, 24) / 24**0.5
    grads = []
    for cast in (torch.autocast("cpu", dtype=bf16), nullcontext()):
        leaves = [t.clone().requires_grad_() for t in (body, batch.policy.weight)]
        with cast:
            hidden = torch.nn.functional.linear(batch.policy.hidden, leaves[0])
            policy = replace(batch.policy, hidden=hidden, weight=leaves[1])
            ref = replace(batch, ref=replace(batch.ref, hidden=hidden.detach() + 0.25, weight=leaves[1]))
            out = call(make("tdpo1", engine=engine, max_chunk_bytes=batch.budget(8)), policy, ref)
        grads.append(torch.autograd.grad(out.loss, leaves))
    for what, got, expected in zip(("body", "head"), *grads, strict=True):
        assert got.dtype == fp32
        as_near_as_naive(f"gradient of the {what}", got, expected, expected.double(), eps=0.05)


@engines
@trains
def test_torch_compile(train: tuple[str, ...], engine: str) -> None:
    """A compiled step around the loss gives the same. Where a callable is needed the graph breaks there, and only there."""
    torch._dynamo.reset()
    batch = make_batch(UNEVEN, seed=34)
    loss = make("tdpo2", engine=engine, max_chunk_bytes=batch.budget(8))
    body = torch.randn(6, 6, dtype=fp64)

    def step(hidden: Tensor, body: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        head = LMHead(weight, bias)
        out = loss(torch.tanh(hidden @ body), head, batch.ref.hidden, batch.ref.head, batch.labels)
        return 0.37 * out.loss, out.metrics["rewards/margins"]

    results, counter = [], CompileCounterWithBackend("aot_eager")
    for function in (torch.compile(step, backend=counter), step):
        policy = batch.policy.map(lambda t: t.detach().clone())
        leaves = [getattr(policy, name).requires_grad_() for name in train] + [body.clone().requires_grad_()]
        value, margin = function(policy.hidden, leaves[-1], policy.weight, policy.bias)
        results.append((value, margin, *torch.autograd.grad(value, leaves)))
    for got, expected in zip(*results, strict=True):
        near("compiled", got, expected)
    graphs = counter.frame_count  # of three nested frames: what is in front of the break, what is behind it
    assert graphs <= (1 if engine == "recompute" else 5), f"{graphs} graphs"


# --- triton, interpreted ---------------------------------------------------------------------------------------------------


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
@families
@engines
@trains
def test_triton(train: tuple[str, ...], engine: str, family: str) -> None:
    """The same seam over the kernels: groups, and a pair longer than a chunk."""
    batch = make_batch(dtype=fp32, seed=35)
    for rows in (4, 100):
        options = {"backend": "triton", "max_chunk_bytes": batch.budget(rows), "extras": EXTRAS, "use_weighting": True}
        check(family, batch, train, SINGLE, engine=engine, **options)


# --- which engine ----------------------------------------------------------------------------------------------------------


@families
@trains
def test_auto_says_what_it_took_and_why(train: tuple[str, ...], family: str) -> None:
    got = check(family, make_batch(UNEVEN), train)
    assert got.out.engine._fields == ("name", "reason")
    assert got.out.engine.name in ENGINES
    assert len(got.out.engine.reason) > 5, got.out.engine
    if train == TRAINED:
        assert got.out.engine.name == "one_pass", f"every loss of this version goes in one pass: {got.out.engine}"


@families
@engines
def test_a_named_engine_is_that_engine_or_an_error(engine: str, family: str) -> None:
    batch = make_batch()
    for train, keywords in itertools.product((TRAINED, FROZEN, ()), ({}, {"valid_rows": batch.counts()})):
        out = run(make(family, engine=engine), batch, train, **keywords).out
        assert out.engine.name == engine, out.engine
        assert out.engine.reason, out.engine


@families
def test_the_naive_backend(family: str) -> None:
    """`backend="reference"` is autograd over all logits: by an engine that can, or an error that names the two options."""
    check(family, make_batch(), backend="reference")
    for engine in ENGINES:
        try:
            check(family, make_batch(), backend="reference", engine=engine)
        except ValueError as error:
            assert "engine" in str(error) and "backend" in str(error), error


@engines
def test_an_in_place_gradient_is_right_or_refused(engine: str) -> None:
    """No logits are kept at this level, so the option has nothing to write over; but it may not be wrong."""
    for family in ("tdpo1", "dpo"):
        try:
            got = run(make(family, engine=engine, inplace_backward=True), make_batch())
        except ValueError as error:
            assert "inplace_backward" in str(error), error
        else:
            assert_same(got, oracle(family, make_batch()))


def test_losses_on_logits_have_no_engine() -> None:
    batch = make_batch()
    assert PreferenceOutput._fields[-2:] == ("metrics", "engine")
    for family in ("tdpo2", "dpo"):
        assert oracle(family, batch).out.engine is None


def test_the_backend_is_passed_on() -> None:
    """float64 is what Triton refuses."""
    for family in ("tdpo2", "dpo"):
        with pytest.raises((TypeError, ValueError, RuntimeError), match=r"(?is)float64|triton"):
            run(make(family, backend="triton"), make_batch())


# --- refused input ---------------------------------------------------------------------------------------------------------

GOOD = make_batch(((1, 2), (0, 3)), V=5, D=3, ref_D=4, bias=False, dtype=fp32)
H, W, RH, RW, LABELS = GOOD.policy.hidden, GOOD.policy.weight, GOOD.ref.hidden, GOOD.ref.weight, GOOD.labels
S, T = LABELS.shape
BOTH = r"(?is)(?=.*ref_hidden)(?=.*ref_logps)"

CALLS: list[Any] = [
    # id, call, pattern in the message
    ("odd", lambda loss: loss(H[:1], W, RH[:1], RW, LABELS[:1]), r"(?is)even|pair|odd"),
    ("labels-shape", lambda loss: loss(H, W, RH, RW, LABELS[:, 1:]), r"(?is)labels.*\(2, 2\)"),
    ("labels-float", lambda loss: loss(H, W, RH, RW, LABELS.float()), r"(?is)labels.*float32"),
    ("labels-out-of-range", lambda loss: loss(H, W, RH, RW, LABELS.clamp(min=5)), r"(?i)label"),
    ("labels-elsewhere", lambda loss: loss(H, W, RH, RW, LABELS.to("meta")), r"(?i)meta"),
    ("labels-first", lambda loss: loss(H, W, LABELS, RH, RW), r"(?is)label|order|ref_hidden"),
    ("hidden-and-head-swapped", lambda loss: loss(W, H, RH, RW, LABELS), r"(?is)order|swap|policy_hidden"),
    ("reference-swapped", lambda loss: loss(H, W, RW, RH, LABELS), r"(?is)order|swap|ref_h"),
    ("called-as-on-logits", lambda loss: loss(H, RH, LABELS, None, None), r"(?is)order|label|policy_head"),
    ("hidden-too-narrow", lambda loss: loss(H[..., :2], W, RH, RW, LABELS), r"(?is)(?=.*2)(?=.*\(5, 3\))"),
    ("ref-hidden-too-narrow", lambda loss: loss(H, W, RH[..., :2], RW, LABELS), r"(?is)(?=.*2)(?=.*\(5, 4\))"),
    ("ref-positions", lambda loss: loss(H, W, RH[:, 1:], RW, LABELS), r"(?is)ref_hidden.*\(2, 2, 4\)"),
    ("ref-width", lambda loss: loss(H, W, RH, RW[:4], LABELS), r"(?is)vocab_size"),
    ("mixed-dtypes", lambda loss: loss(H.bfloat16(), W, RH, RW, LABELS), r"(?is)(?=.*bfloat16)(?=.*float32)"),
    ("rows-without-boundaries", lambda loss: loss(H[0], W, RH[0], RW, LABELS[0]), r"cu_seqlens"),
    ("boundaries-short", lambda loss: loss(H.flatten(0, 1), W, RH.flatten(0, 1), RW, LABELS.flatten(),
                                           cu_seqlens=torch.tensor([0, 3, 5])), r"(?is)cu_seqlens.*[56]"),
    ("token-weights-shape", lambda loss: loss(H, W, RH, RW, LABELS, token_weights=torch.ones(S, T - 1)), r"token_weights"),
    ("kl-weights-shape", lambda loss: loss(H, W, RH, RW, LABELS, kl_weights=torch.ones(S)), r"kl_weights"),
    ("num-pairs", lambda loss: loss(H, W, RH, RW, LABELS, num_pairs=0), r"num_pairs.*0"),
    ("num-pairs-shape", lambda loss: loss(H, W, RH, RW, LABELS, num_pairs=torch.ones(1)), r"num_pairs"),
    ("no-reference", lambda loss: loss(H, W, None, None, LABELS), r"(?i)ref_hidden"),
    ("half-a-reference", lambda loss: loss(H, W, RH, None, LABELS), r"(?is)(?=.*ref_hidden)(?=.*ref_head)"),
    ("the-other-half", lambda loss: loss(H, W, None, RW, LABELS), r"(?is)ref_hidden"),
    ("two-references", lambda loss: loss(H, W, RH, RW, LABELS, ref_logps=torch.zeros(S)), r"(?is)ref_logps"),
]  # fmt: skip

ONE_FAMILY: list[Any] = [
    ("tdpo-ref-logps", LinearTDPOLoss, lambda loss: loss(H, W, None, None, LABELS, ref_logps=torch.zeros(S)),
     r"(?is)ref_logps.*(distribution|vocabulary|logits)|(distribution|vocabulary|logits).*ref_logps"),
    ("dpo-no-reference", LinearDPOLoss, lambda loss: loss(H, W, None, None, LABELS), BOTH),
    ("dpo-two-references", LinearDPOLoss, lambda loss: loss(H, W, RH, RW, LABELS, ref_logps=torch.zeros(S)), BOTH),
    ("dpo-ref-logps-shape", LinearDPOLoss, lambda loss: loss(H, W, None, None, LABELS, ref_logps=torch.zeros(S - 1)),
     r"(?s)ref_logps.*\(1,\)"),
    ("dpo-kl-weights-without-kl", LinearDPOLoss,
     lambda loss: loss(H, W, None, None, LABELS, ref_logps=torch.zeros(S), kl_weights=torch.ones(S, T)), r"kl_weights"),
]  # fmt: skip

BAD_CALLS = [
    *(pytest.param(make, call, message, id=f"{make.__name__}-{name}")
      for name, call, message in CALLS for make in (LinearTDPOLoss, LinearDPOLoss)),
    *(pytest.param(*case[1:], id=case[0]) for case in ONE_FAMILY),
]  # fmt: skip


@engines
@pytest.mark.parametrize(("make", "bad", "message"), BAD_CALLS)
def test_bad_calls_are_refused(make: type, bad: Callable[[torch.nn.Module], object], message: str, engine: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        bad(make(engine=engine))


def test_good_calls_are_not_refused() -> None:
    """Guards the table above."""
    for make_ in (LinearTDPOLoss, LinearDPOLoss):
        assert make_(check_labels=True)(H, W, RH, RW, LABELS).loss.isfinite()


SETTINGS: list[Any] = [
    # arguments, pattern in the message
    ({"engine": "fast"}, r"(?s)(?=.*engine)(?=.*fast)(?=.*one_pass)(?=.*recompute)"),
    ({"max_chunk_bytes": 0}, r"max_chunk_bytes"),
    ({"max_chunk_bytes": -5}, r"(?s)max_chunk_bytes.*-5"),
    ({"logits_dtype": torch.int32}, r"logits_dtype"),
    ({"beta": 0.0}, r"beta"),
    ({"loss_type": "nonsense"}, r"(?s)loss_type.*nonsense|nonsense.*loss_type"),
    ({"label_smoothing": 0.1, "loss_type": "ipo"}, r"(?s)(?=.*label_smoothing)(?=.*ipo)"),
    ({"reduction": "median"}, r"(?s)(?=.*reduction)(?=.*median)"),
    ({"divergence": "tv"}, r"(?s)(?=.*divergence)(?=.*forward_kl)"),
    ({"backend": "cuda"}, r"(?s)(?=.*backend)(?=.*triton)"),
    ({"vocab_size": 0}, r"vocab_size"),
    ({"temperature": -1.0}, r"temperature"),
    ({"reduction": "none"}, r"token_stats"),  # with the recipe
]  # fmt: skip


@pytest.mark.parametrize("make", [LinearTDPOLoss, LinearDPOLoss])
@pytest.mark.parametrize(("arguments", "message"), SETTINGS, ids=[str(arguments) for arguments, _ in SETTINGS])
def test_bad_settings_are_refused_when_the_loss_is_made(make: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError, NotImplementedError), match=message):
        make(**arguments)


# --- module manners --------------------------------------------------------------------------------------------------------

PAIRS = [pytest.param(LinearTDPOLoss, TDPOLoss, id="tdpo"), pytest.param(LinearDPOLoss, DPOLoss, id="dpo")]


@pytest.mark.parametrize(("linear", "on_logits"), PAIRS)
def test_options_are_those_of_the_loss_on_logits(linear: type, on_logits: type) -> None:
    """With the same defaults, and three more."""
    ours, theirs = ({n: p.default for n, p in inspect.signature(make).parameters.items()} for make in (linear, on_logits))
    assert {name: ours[name] for name in theirs} == theirs
    assert {name: ours[name] for name in ours.keys() - theirs.keys()} == {
        "engine": "auto",
        "max_chunk_bytes": None,
        "logits_dtype": None,
    }
    assert next(iter(ours)) == "beta"
    assert linear.__name__ in fused_tdpo.__all__


@pytest.mark.parametrize(("linear", "on_logits"), PAIRS)
def test_call_signature(linear: type, on_logits: type) -> None:
    ours, theirs = (dict(inspect.signature(make.forward).parameters) for make in (linear, on_logits))
    assert list(ours)[1:6] == ["policy_hidden", "policy_head", "ref_hidden", "ref_head", "labels"]
    keywords = [name for name, p in ours.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert set(keywords) == {"token_weights", "kl_weights", "cu_seqlens", "num_pairs", "valid_rows", "ref_logps"}
    assert all(ours[name].default is None for name in keywords)
    assert set(keywords) == {name for name, p in theirs.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


MODULES = [
    pytest.param(
        lambda: LinearTDPOLoss(0.2, alpha=0.7, variant="tdpo1", engine="recompute", max_chunk_bytes=4096, logits_dtype=fp32),
        ("0.2", "0.7", "tdpo1", "recompute", "4096", "float32"),
        id="tdpo",
    ),
    pytest.param(lambda: LinearDPOLoss(0.3, loss_type="robust", label_smoothing=0.15), ("0.3", "robust", "0.15"), id="dpo"),
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
    loss, batch = make(), make_batch(seed=36)
    twin = duplicate(loss)
    assert repr(twin) == repr(loss)
    for mode in (twin.train(), twin.eval()):
        got, expected = run(mode, batch), run(loss, batch)
        assert_same_bits("losses", got.out.losses, expected.out.losses)
        assert_same_bits("gradient of weight", got.grads["weight"], expected.grads["weight"])


# --- any layout ------------------------------------------------------------------------------------------------------------

try:
    from hypothesis import given
    from hypothesis import strategies as st
except ImportError:

    @pytest.mark.skip(reason="needs Hypothesis, which is not installed")
    def test_any_layout() -> None: ...

else:
    spans = st.tuples(st.integers(0, 2), st.integers(0, 6)).map(lambda span: span if sum(span) else (0, 1))

    @engines
    @families
    @given(
        pairs=st.lists(st.tuples(spans, spans), min_size=1, max_size=5),
        rows=st.integers(1, 12),
        holes=st.sampled_from([0.0, 0.5, 1.0]),
        flags=st.sets(st.sampled_from(["shared", "bias", "packed", "counted", "weighted"])),
        train=st.sampled_from([TRAINED, FROZEN, ("weight",)]),
        name=st.sampled_from(list(LOSSES)),
        seed=st.integers(0, 2**16),
    )
    def test_any_layout(
        family: str, engine: str, pairs: list[Any], rows: int, holes: float, flags: set[str], train: Any, name: str, seed: int
    ) -> None:
        """Whatever the lengths, the chunk, the layout and the loss."""
        layout = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        batch = make_batch(layout, 7, 3, bias="bias" in flags, shared="shared" in flags, holes=holes, seed=seed)
        keywords: dict[str, Any] = {"engine": engine, "max_chunk_bytes": batch.budget(rows)}
        keywords |= {n: v for n, v in LOSSES[name].items() if family != "dpo" or n not in ("reward", "alpha")}
        if "counted" in flags:
            keywords["valid_rows"] = batch.counts()
        if "weighted" in flags:
            weights = torch.randn(batch.labels.shape, dtype=fp64)
            keywords["token_weights"] = batch.pack(weights) if "packed" in flags else weights
            keywords["learned"] = ["token_weights"] if name != "sft" else []  # which does not see them
        if "packed" in flags:
            keywords["cu_seqlens"], batch = batch.cu_seqlens(), batch.packed()
        if make(family, **{n: v for n, v in LOSSES[name].items() if n in keywords}).obstacle("weighted" in flags):
            keywords["engine"] = "auto"
        check(family, batch, train, **keywords)
