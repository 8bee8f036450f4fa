"""TI-DPO: importance, TIDPOLoss and LinearTIDPOLoss against the paper's formulas, told with loops over single tokens.

Everything runs in float64 wherever a dtype is not the subject. Letters: P pairs, S = 2P sequences, T positions of a sequence,
T' of an anchor, D hidden size, V vocabulary.
"""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fused_tdpo.ti_dpo
from fused_tdpo import LinearTDPOLoss, LMHead, PreferenceOutput, TDPOLoss
from fused_tdpo.ti_dpo import LinearTIDPOLoss, TIDPOLoss, token_importance
from fused_tdpo.types import FORWARD_KL
from tiny_models import ARCHITECTURES, lora, tiny_model
from tolerances import assert_exactly_zero, assert_same_bits, assert_within_budget

IGNORE = -100
EXACT = 1e-10  # float64 against float64, of the largest number: only the order of summation may differ
SINGLE = 1e-5  # float32 against float64

V, D = 13, 5
PAIRS = ((2, 4), (1, 6), (3, 1), (2, 5), (0, 3), (1, 7))  # (prompt, response) of S sequences: chosen ones, then rejected ones
ANCHORS = ((1, 5), (3, 2), (2, 9))  # of P: shorter and longer than what they are compared with


def close(what: str, got: Tensor, exact: Tensor, bound: float = EXACT) -> None:
    size = max(float(exact.detach().abs().max()), 1e-3) if exact.numel() else 1.0
    assert_within_budget(what, got, exact, exact, torch.full_like(exact, bound * size, dtype=torch.float64))


def make_labels(layout: tuple[tuple[int, int], ...], gen: torch.Generator, extra: int = 0) -> Tensor:
    """(S, T), `IGNORE` on prompt and padding, and on one token inside each response that has more than two."""
    labels = torch.full((len(layout), max(map(sum, layout)) + extra), IGNORE)
    for row, (prompt, response) in zip(labels, layout, strict=True):
        row[prompt : prompt + response] = torch.randint(V, (response,), generator=gen)
        if response > 2:
            row[prompt + 1] = IGNORE
    return labels


class Batch(NamedTuple):
    policy: Tensor
    """(S, T, V) logits, or hidden states (S, T, D)."""
    ref: Tensor
    labels: Tensor
    weights: Tensor
    anchor: tuple[Tensor, Tensor, Tensor]


def make_batch(width: int = V, seed: int = 0, dtype: torch.dtype = torch.float64) -> Batch:
    gen = torch.Generator().manual_seed(seed)

    def pair_of(labels: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.randn(*labels.shape, width, generator=gen, dtype=torch.float64)
        second = first + 0.7 * torch.randn(first.shape, generator=gen, dtype=torch.float64)
        return first.to(dtype), second.to(dtype)

    labels, anchor_labels = make_labels(PAIRS, gen, extra=1), make_labels(ANCHORS, gen)
    weights = torch.rand(labels.shape, generator=gen, dtype=torch.float64).to(dtype)
    return Batch(*pair_of(labels), labels, weights, (*pair_of(anchor_labels), anchor_labels))


# --- the paper --------------------------------------------------------------------------------------------------------------


def tokens(logits: Tensor, ref: Tensor, labels: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(position of the label, log-ratio, KL(ref || policy)) of the tokens of one response, in order."""
    found = []
    for t in range(1, len(labels)):
        y = int(labels[t])
        if y != IGNORE:
            p, q = logits[t - 1].softmax(0), ref[t - 1].softmax(0)
            found.append((t, p[y].log() - q[y].log(), (q * (q.log() - p.log())).sum()))
    return found


def naive(batch: Batch, *, anchored: bool = True, weighted: bool = True, **options: float) -> tuple[Tensor, Tensor]:
    """(P,) losses and (P,) triplet losses, from logits."""
    o = {"beta": 0.1, "alpha": 0.5, "gamma": 0.1, "margin": 0.01} | options
    P, zero = len(batch.labels) // 2, torch.zeros((), dtype=torch.float64)
    losses, triplets = [], []
    for w in range(P):
        chosen, rejected = (tokens(batch.policy[s], batch.ref[s], batch.labels[s]) for s in (w, w + P))
        r_w, r_l = (
            sum((ratio * batch.weights[s, t] if weighted else ratio for t, ratio, _ in response), zero)
            for s, response in ((w, chosen), (w + P, rejected))
        )
        delta = sum((kl for *_, kl in rejected), zero) - sum((kl.detach() for *_, kl in chosen), zero)
        loss = -torch.log(torch.sigmoid(o["beta"] * (r_w - r_l - o["alpha"] * delta)))
        triplet = zero
        if anchored:
            anchor = tokens(*(part[w] for part in batch.anchor))
            near = sum(((d - b) ** 2 for (_, d, _), (_, b, _) in zip(anchor, chosen, strict=False)), zero)
            far = sum(((c - d) ** 2 for (_, d, _), (_, c, _) in zip(anchor, rejected, strict=False)), zero)
            triplet = torch.clamp(near - far + o["margin"], min=0)
        losses.append(loss + o["gamma"] * triplet)
        triplets.append(triplet)
    return torch.stack(losses), torch.stack(triplets)


def leaves(batch: Batch) -> tuple[Batch, list[Tensor]]:
    """The batch with policy and anchor as leaves, and these."""
    policy, anchor = (t.detach().clone().requires_grad_() for t in (batch.policy, batch.anchor[0]))
    return batch._replace(policy=policy, anchor=(anchor, *batch.anchor[1:])), [policy, anchor]


def run(loss: TIDPOLoss, batch: Batch, **options: Any) -> PreferenceOutput:
    return loss(batch.policy, batch.ref, batch.labels, token_weights=batch.weights, anchor=batch.anchor, **options)


# --- from logits ------------------------------------------------------------------------------------------------------------

backends = pytest.mark.parametrize("backend", ["reference", "torch"])
STRONG = {"beta": 0.7, "alpha": 1.5, "gamma": 0.3, "margin": 4.0}


@backends
@pytest.mark.parametrize("options", [{}, STRONG], ids=["defaults", "strong"])
@pytest.mark.parametrize("length", [2, 5, 11, 14], ids=lambda length: f"anchors of {length}")
def test_equals_the_paper(backend: str, options: dict[str, float], length: int) -> None:
    """Losses, triplets and gradients; anchors cut or padded to a number of positions."""
    batch = make_batch(seed=length)
    x, z, y = batch.anchor
    x, z = (torch.cat([t, t.new_zeros(len(t), 9, V)], 1)[:, :length] for t in (x, z))
    y = torch.cat([y, torch.full((len(y), 9), IGNORE)], 1)[:, :length]
    batch, ours = leaves(batch._replace(anchor=(x, z, y)))
    out = run(TIDPOLoss(backend=backend, **options), batch)
    out.loss.backward()
    batch, theirs = leaves(batch)
    losses, triplets = naive(batch, **options)
    losses.mean().backward()
    close("losses", out.losses, losses)
    close("loss", out.loss, losses.mean())
    close("triplet", out.metrics["triplet"], triplets.mean())
    for name, a, b in zip(("policy", "anchor"), ours, theirs, strict=True):
        close(f"gradient of {name}", a.grad, b.grad)
        assert b.grad.abs().max() > 1e-4, "the case must move something, else it tests nothing"
    assert not batch.ref.requires_grad and out.losses.grad_fn is None and not out.metrics["triplet"].requires_grad


def test_options_have_the_papers_defaults() -> None:
    loss = TIDPOLoss()
    assert (loss.beta, loss.alpha, loss.gamma, loss.variant) == (0.1, 0.5, 0.1, "tdpo2")
    assert inspect.signature(token_importance).parameters["mix"].default == 0.7


@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
@pytest.mark.parametrize("weighted", [False, True])
def test_without_an_anchor_it_is_tdpo2_to_the_bit(linear: bool, weighted: bool) -> None:
    batch = make_batch(D if linear else V, dtype=torch.float32)
    head = torch.randn(V, D)
    options = {"token_weights": batch.weights} if weighted else {}
    results = []
    for loss in (LinearTIDPOLoss(), LinearTDPOLoss()) if linear else (TIDPOLoss(), TDPOLoss()):
        x, w = batch.policy.clone().requires_grad_(), head.clone().requires_grad_()
        arguments = (x, w, batch.ref, w, batch.labels) if linear else (x, batch.ref, batch.labels)
        out = loss(*arguments, **options)
        out.loss.backward()
        results.append((out.loss, out.losses, x.grad, w.grad, out.engine, sorted(out.metrics)))
    (*ours, engine, names), (*theirs, expected_engine, expected_names) = results
    for what, a, b in zip(("loss", "losses", "hidden or logits", "head"), ours, theirs, strict=True):
        assert_same_bits(what, a, b)
    assert engine == expected_engine and names == expected_names


def test_layouts_give_the_same() -> None:
    """Packed, interleaved, and left alone."""
    batch = make_batch()
    loss = TIDPOLoss(**STRONG)

    def grads(function: Callable[[Batch], PreferenceOutput]) -> list[Tensor]:
        copy_of, inputs = leaves(batch)
        out = function(copy_of)
        out.loss.backward()
        return [out.loss.detach(), out.losses, *(t.grad for t in inputs)]

    def packed(b: Batch) -> PreferenceOutput:
        lengths = torch.tensor([prompt + response for prompt, response in PAIRS])
        keep = torch.arange(b.labels.shape[1]) < lengths[:, None]
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return run(
            loss,
            b._replace(policy=b.policy[keep], ref=b.ref[keep], labels=b.labels[keep], weights=b.weights[keep]),
            cu_seqlens=cu_seqlens,
        )

    def interleaved(b: Batch) -> PreferenceOutput:
        order = [0, 3, 1, 4, 2, 5]
        parts = (t[order] for t in (b.policy, b.ref, b.labels, b.weights))
        return run(TIDPOLoss(**STRONG, interleaved=True), Batch(*parts, b.anchor))

    expected = grads(lambda b: run(loss, b))
    for layout in (packed, interleaved):
        for name, got, exact in zip(("loss", "losses", "policy", "anchor"), grads(layout), expected, strict=True):
            close(f"{layout.__name__}: {name}", got, exact)


def test_an_inactive_hinge_has_no_gradient() -> None:
    """Where the anchor is the chosen response, and far from the rejected one, the triplet is 0 and draws nothing."""
    batch = make_batch()
    y = torch.full_like(batch.labels[:3], IGNORE)
    y[:, 1:] = torch.arange(y.shape[1] - 1) % V  # one response without holes, chosen and anchor
    policy = batch.policy.clone()
    labels = torch.cat([y, batch.labels[3:]])
    anchor = (policy[:3].clone(), batch.ref[:3], y)
    batch, (x, d) = leaves(batch._replace(policy=policy, labels=labels, anchor=anchor))
    out = run(TIDPOLoss(), batch)
    _, triplets = naive(batch)
    assert_exactly_zero("the paper's triplets", triplets)
    out.loss.backward()
    assert_exactly_zero("triplet", out.metrics["triplet"])
    assert_exactly_zero("gradient of the anchor", d.grad)
    alone = batch.policy.detach().clone().requires_grad_()
    TIDPOLoss()(alone, batch.ref, labels, token_weights=batch.weights).loss.backward()
    assert_exactly_zero("what the triplet adds", x.grad - alone.grad)


@backends
def test_ignored_positions_may_hold_anything(backend: str) -> None:
    batch = make_batch()
    expected, exact = leaves(batch)
    loss = TIDPOLoss(backend=backend, **STRONG)
    wanted = run(loss, expected)
    wanted.loss.backward()
    nowhere = torch.cat([batch.labels[:, 1:], torch.full((6, 1), IGNORE)], 1) == IGNORE
    anchor_nowhere = torch.cat([batch.anchor[2][:, 1:], torch.full((3, 1), IGNORE)], 1) == IGNORE
    poisoned = Batch(
        batch.policy.masked_fill(nowhere[..., None], float("nan")),
        batch.ref.masked_fill(nowhere[..., None], float("inf")),
        batch.labels,
        batch.weights.masked_fill(batch.labels == IGNORE, float("nan")),
        (*(t.masked_fill(anchor_nowhere[..., None], float("nan")) for t in batch.anchor[:2]), batch.anchor[2]),
    )
    poisoned, inputs = leaves(poisoned)
    out = run(loss, poisoned)
    out.loss.backward()
    close("loss", out.loss, wanted.loss)
    for a, b in zip(inputs, exact, strict=True):
        close("gradient", a.grad, b.grad)


def test_means_and_sums() -> None:
    batch = make_batch()
    losses, triplets = naive(batch, **STRONG)
    close("num_pairs", run(TIDPOLoss(**STRONG), batch, num_pairs=7).loss, losses.sum() / 7)
    close("num_pairs on the device", run(TIDPOLoss(**STRONG), batch, num_pairs=torch.tensor(7)).loss, losses.sum() / 7)
    out = run(TIDPOLoss(**STRONG, reduction="sum"), batch)
    close("sum", out.loss, losses.sum())
    close("triplet", out.metrics["triplet"], triplets.mean())


def test_the_kl_has_weights_of_its_own() -> None:
    """token_weights leave it alone, and no weights enter the triplet."""
    batch = make_batch()
    plain, weighted = (TDPOLoss()(batch.policy, batch.ref, batch.labels), run(TIDPOLoss(), batch))
    assert_same_bits("K", weighted.chosen_kl, plain.chosen_kl)
    ones = run(TIDPOLoss(), batch._replace(weights=torch.ones_like(batch.weights)))
    assert_same_bits("triplet", weighted.metrics["triplet"], ones.metrics["triplet"])
    halved = run(TIDPOLoss(), batch, kl_weights=torch.full_like(batch.weights, 0.5))
    close("half of K", halved.chosen_kl, plain.chosen_kl / 2)


def test_no_pairs() -> None:
    empty, rows = torch.zeros(0, 4, V, requires_grad=True), torch.zeros(0, 4, dtype=torch.int64)
    out = TIDPOLoss()(empty, empty.detach(), rows, anchor=(empty, empty.detach(), rows))
    out.loss.backward()
    assert out.loss == 0 and out.metrics["triplet"] == 0


def test_one_graph() -> None:
    batch = make_batch(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(TIDPOLoss(**STRONG), backend="eager", fullgraph=True)
    close("loss", run(compiled, batch).loss, run(TIDPOLoss(**STRONG), batch).loss, SINGLE)


# --- in place ---------------------------------------------------------------------------------------------------------------


def test_gradients_in_place() -> None:
    batch = make_batch()
    expected, exact = leaves(batch)
    run(TIDPOLoss(**STRONG), expected).loss.backward()
    inputs = [t.clone().requires_grad_() for t in (batch.policy, batch.anchor[0])]
    x, d = (t * 1 for t in inputs)
    run(TIDPOLoss(**STRONG, inplace_backward=True), batch._replace(policy=x, anchor=(d, *batch.anchor[1:]))).loss.backward()
    for name, got, want in zip(("policy", "anchor"), inputs, exact, strict=True):
        close(name, got.grad, want.grad)


def test_views_of_one_forward_are_not_overwritten_in_silence() -> None:
    """Pairs and anchors as slices of the same logits: autograd notices that the first gradient overwrote the base."""
    batch = make_batch()
    T = batch.labels.shape[1]
    both = (torch.randn(9, T, V, dtype=torch.float64, requires_grad=True)) * 1
    anchor = (both[6:], batch.ref[:3], batch.labels[:3])
    out = run(TIDPOLoss(inplace_backward=True), batch._replace(policy=both[:6], anchor=anchor))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


# --- from hidden states -----------------------------------------------------------------------------------------------------


class Heads(NamedTuple):
    weight: Tensor
    bias: Tensor
    ref: Tensor


def make_heads(seed: int = 3) -> Heads:
    gen = torch.Generator().manual_seed(seed)
    return Heads(*(torch.randn(shape, generator=gen, dtype=torch.float64) for shape in ((V, D), (V,), (V, D))))


def logits_of(batch: Batch, heads: Heads) -> Batch:
    """With the logits in place of the hidden states."""
    anchor = (batch.anchor[0] @ heads.weight.T + heads.bias, batch.anchor[1] @ heads.ref.T, batch.anchor[2])
    return batch._replace(policy=batch.policy @ heads.weight.T + heads.bias, ref=batch.ref @ heads.ref.T, anchor=anchor)


def run_linear(loss: LinearTIDPOLoss, batch: Batch, heads: Heads, **options: Any) -> PreferenceOutput:
    return loss(
        batch.policy, LMHead(heads.weight, heads.bias), batch.ref, heads.ref, batch.labels, token_weights=batch.weights,
        **{"anchor": batch.anchor} | options,
    )  # fmt: skip


@backends
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("max_chunk_bytes", [None, 5 * V * 8 * 2], ids=["whole", "chunks"])
def test_hidden_states_equal_the_paper(backend: str, trained: bool, max_chunk_bytes: int | None) -> None:
    results = []
    for linear in (True, False):
        batch, inputs = leaves(make_batch(D))
        heads = make_heads()
        if trained:
            inputs += [tensor.requires_grad_() for tensor in heads[:2]]
        if linear:
            out = run_linear(LinearTIDPOLoss(backend=backend, max_chunk_bytes=max_chunk_bytes, **STRONG), batch, heads)
            loss, losses = out.loss, out.losses
        else:
            losses, triplets = naive(logits_of(batch, heads), **STRONG)
            loss = losses.mean()
        loss.backward()
        results.append([loss, losses, *(tensor.grad for tensor in inputs)])
    assert out.engine.name == "recompute"
    close("triplet", out.metrics["triplet"], triplets.mean())
    assert (triplets > 0).any()
    names = ("loss", "losses", "hidden", "anchor", "weight", "bias")
    for name, got, exact in zip(names, *results, strict=False):
        close(name, got, exact)


def test_packed_hidden_states_and_valid_rows() -> None:
    batch, heads = make_batch(D), make_heads()
    expected = run_linear(LinearTIDPOLoss(**STRONG), batch, heads)
    lengths = torch.tensor([prompt + response for prompt, response in PAIRS])
    keep = torch.arange(batch.labels.shape[1]) < lengths[:, None]
    packed = Batch(*(t[keep] for t in batch[:4]), batch.anchor)
    valid_rows = (batch.labels[:, 1:] != IGNORE).sum(-1).tolist()
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    out = run_linear(LinearTIDPOLoss(**STRONG), packed, heads, cu_seqlens=cu_seqlens, valid_rows=valid_rows)
    close("losses", out.losses, expected.losses)


def test_engines() -> None:
    """One pass without an anchor; with one it cannot, and says why."""
    batch, heads = make_batch(D), make_heads()
    out = run_linear(LinearTIDPOLoss(), batch, heads)
    assert out.engine.name == "recompute" and "triplet" in out.engine.reason
    assert run_linear(LinearTIDPOLoss(), batch, heads, anchor=None).engine.name == "one_pass"
    loss = LinearTIDPOLoss(engine="one_pass")
    close("one pass", run_linear(loss, batch, heads, anchor=None).losses, naive(logits_of(batch, heads), anchored=False)[0])
    with pytest.raises(ValueError, match=r"engine='one_pass' cannot: the triplet .*engine='recompute'"):
        run_linear(loss, batch, heads)


def test_ranks_have_no_anchors() -> None:
    batch = make_batch()
    assert run(TIDPOLoss(loss_type="aot"), batch._replace(anchor=None)).loss.isfinite()
    with pytest.raises(ValueError, match=r"(?s)anchor belongs to a pair.*'aot'"):
        run(TIDPOLoss(loss_type="aot"), batch)


@pytest.mark.parametrize(("make", "other"), [(TIDPOLoss, "DPOLoss"), (LinearTIDPOLoss, "LinearDPOLoss")])
def test_a_precomputed_reference_is_refused(make: type, other: str) -> None:
    batch, head = make_batch(D if make is LinearTIDPOLoss else V), torch.zeros(V, D, dtype=torch.float64)
    inputs = (batch.policy, head, None, None) if make is LinearTIDPOLoss else (batch.policy, None)
    with pytest.raises(ValueError, match=rf" use {other} with ref_logps"):
        make()(*inputs, batch.labels, ref_logps=torch.zeros(6))


def test_options_reach_the_anchor(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, calls = make_batch(D), make_heads(), []
    op = fused_tdpo.ti_dpo.linear_stats
    monkeypatch.setattr(fused_tdpo.ti_dpo, "linear_stats", lambda *a, **o: calls.append((a[3].V, o)) or op(*a, **o))
    options = {"temperature": 1.3, "logits_dtype": torch.float32, "max_chunk_bytes": 999, "backend": "torch"}
    run_linear(LinearTIDPOLoss(**options, vocab_size=V, divergence="js"), batch, heads)
    ((width, call),) = calls
    assert width == V and {name: call[name] for name in options} == options
    assert call["divergence"] == FORWARD_KL and not call["kl_gradient"] and "extras" not in call, "of which nothing is used"


# --- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, z, y: x, r"three tensors; got \(3, 11, 13\)"),
        (lambda x, z, y: (x, y), r"anchor must be \(logits, ref_logits, labels\) .* got \(3, 11, 13\) .*, \(3, 11\)"),
        (lambda x, z, y: (x, None, y), r"three tensors; got .*NoneType.*Run both models"),
        (lambda x, z, y: (x, z, y[:2]), r"labels must have shape \(3, 11\) on cpu; got \(2, 11\).*There are 3 pairs"),
        (lambda x, z, y: (x, z, y.flatten()), r"labels must have shape \(3, 33\)"),
        (lambda x, z, y: (x, z, y[0, 0]), r"labels must have shape \(3, 0\)"),
        (lambda x, z, y: (x[:, 1:], z, y), r"logits must have shape \(3, 11, 13\) on cpu; got \(3, 10, 13\)"),
        (lambda x, z, y: (x, z[..., 1:], y), r"ref_logits must have shape \(3, 11, 13\) on cpu; got \(3, 11, 12\)"),
        (lambda x, z, y: (x.to("meta"), z, y), r"logits must have shape .* on cpu; got .*meta"),
    ],
)
def test_wrong_anchors_are_refused(change: Callable[..., Any], message: str) -> None:
    batch = make_batch()
    with pytest.raises(ValueError, match=message):
        run(TIDPOLoss(), batch._replace(anchor=change(*batch.anchor)))


def test_wrong_hidden_anchors_are_refused() -> None:
    batch, heads = make_batch(D), make_heads()
    with pytest.raises(ValueError, match=r"anchor must be \(hidden, ref_hidden, labels\).*hidden must have shape \(3, 11, 5\)"):
        run_linear(LinearTIDPOLoss(), batch._replace(anchor=logits_of(batch, heads).anchor), heads)
    with pytest.raises(ValueError, match="needs ref_hidden"):
        LinearTIDPOLoss()(batch.policy, heads.weight, None, None, batch.labels, anchor=batch.anchor)


@pytest.mark.parametrize("option", [{"gamma": -1}, {"gamma": float("nan")}, {"margin": -0.1}, {"margin": "small"}], ids=str)
def test_wrong_options_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be a finite number >= 0"):
        TIDPOLoss(**option)


# --- importance -------------------------------------------------------------------------------------------------------------

SEQUENCES = ((3, 6), (2, 2), (4, 9), (1, 1))  # (prompt, response)


class Inputs(NamedTuple):
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def tiny(name: str = "llama", **options: Any) -> Any:
    pytest.importorskip("transformers")
    return tiny_model(name, **options).double().eval()


def alone(index: int) -> Inputs:
    """One sequence without padding; inside its response there is a token that does not count, if it is long."""
    prompt, response = SEQUENCES[index]
    gen = torch.Generator().manual_seed(index)
    ids = torch.randint(256, (1, prompt + response), generator=gen)
    labels = ids.clone()
    labels[:, :prompt] = IGNORE
    if response > 2:
        labels[:, prompt + 1] = IGNORE
    return Inputs(ids, torch.ones_like(ids), labels)


def padded(left: bool) -> Inputs:
    rows = [alone(index) for index in range(len(SEQUENCES))]
    T = max(row.input_ids.shape[1] for row in rows) + 1

    def pad(part: Tensor, value: int) -> Tensor:
        filler = part.new_full((1, T - part.shape[1]), value)
        return torch.cat([filler, part] if left else [part, filler], 1)

    return Inputs(*(torch.cat([pad(row[i], fill) for row in rows]) for i, fill in enumerate((7, 0, IGNORE))))


def naive_importance(model: Any, sequence: Inputs, *, mix: float, scheme: str, width: float) -> Tensor:
    """(T,) of one sequence without padding: the whole model on its embeddings, and loops over tokens."""
    embeddings = model.get_input_embeddings()(sequence.input_ids).detach().requires_grad_()
    model(inputs_embeds=embeddings).logits[0, -1].max().backward(inputs=[embeddings])
    norms = [float(gradient.abs().sum()) for gradient in embeddings.grad[0]]
    return mixed(norms, (sequence.labels[0] != IGNORE).tolist(), mix=mix, scheme=scheme, width=width)


def mixed(norms: list[float], counted: list[bool], *, mix: float, scheme: str, width: float) -> Tensor:
    span = [t for t in range(len(norms)) if counted[t] or scheme == "code"]
    n = len(span)
    sigma = n * width if scheme == "paper" else max(1.0, n * width)
    priors = [float(torch.tensor(-0.5 * ((i - (n - 1) / 2) / sigma) ** 2, dtype=torch.float64).exp()) for i in range(n)]
    if scheme == "code":
        priors = [prior / sum(priors) for prior in priors]
    shares = [norms[t] / sum(norms[t] for t in span) for t in span]
    weights = [mix * share + (1 - mix) * prior for share, prior in zip(shares, priors, strict=True)]
    if scheme == "code":
        weights = [weight * n / sum(weights) for weight in weights]
    result = torch.zeros(len(norms), dtype=torch.float64)
    for t, weight in zip(span, weights, strict=True):
        result[t] = weight if counted[t] else 0.0
    return result


def rows_of(weights: Tensor, inputs: Inputs) -> list[Tensor]:
    return [row[mask.bool()] for row, mask in zip(weights, inputs.attention_mask, strict=True)]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_importance_equals_the_paper(name: str, left: bool) -> None:
    """A padded batch against each sequence alone, in both schemes."""
    model, inputs = tiny(name).float(), padded(left)  # some of transformers cannot attend in float64
    head = LMHead.from_model(model)
    for scheme, width in (("paper", 1 / 4), ("code", 1 / 8)):
        weights = token_importance(model, *inputs, scheme=scheme, head=head)
        assert not weights.requires_grad and weights.dtype == torch.float32
        assert_exactly_zero("positions that do not count", weights[inputs.labels == IGNORE])
        for index, row in enumerate(rows_of(weights, inputs)):
            exact = naive_importance(model, alone(index), mix=0.7, scheme=scheme, width=width)
            close(f"{scheme}, sequence {index}", row, exact, SINGLE)


@pytest.mark.parametrize(("scheme", "mix", "width"), [("paper", 0.2, 0.5), ("code", 0.9, 0.05), ("paper", 1.0, 2.0)])
def test_options_of_importance(scheme: str, mix: float, width: float) -> None:
    model, inputs = tiny(), padded(left=False)
    weights = token_importance(model, *inputs, scheme=scheme, mix=mix, prior_width=width)
    for index, row in enumerate(rows_of(weights, inputs)):
        close(f"sequence {index}", row, naive_importance(model, alone(index), mix=mix, scheme=scheme, width=width), 1e-8)
    if mix == 1.0:
        close("shares of the gradient", weights.sum(-1), torch.ones(len(weights), dtype=torch.float64))


def test_importance_by_differences() -> None:
    """The L1 norm of the gradient, by moving each number of each embedding."""
    model, sequence = tiny("gpt2"), alone(0)  # whose norms stay in float64
    embeddings = model.get_input_embeddings()(sequence.input_ids).detach()
    step, norms = 1e-5, []
    with torch.no_grad():
        target = int(model(inputs_embeds=embeddings).logits[0, -1].argmax())
        for t in range(embeddings.shape[1]):
            moves = torch.zeros(embeddings.shape[2], *embeddings.shape[1:], dtype=torch.float64)
            moves[:, t] = step * torch.eye(embeddings.shape[2], dtype=torch.float64)
            ends = [model(inputs_embeds=embeddings + sign * moves).logits[:, -1, target] for sign in (1, -1)]
            norms.append(float((ends[0] - ends[1]).abs().sum()) / (2 * step))
    exact = mixed(norms, (sequence.labels[0] != IGNORE).tolist(), mix=0.7, scheme="paper", width=1 / 4)
    close("weights", token_importance(model, *sequence)[0], exact, 1e-6)


def test_sequences_do_not_see_each_other() -> None:
    model, inputs = tiny(), padded(left=False)
    together = token_importance(model, *inputs)
    apart = torch.cat([token_importance(model, *(part[s : s + 1] for part in inputs)) for s in range(len(SEQUENCES))])
    close("weights", together, apart, 1e-8)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
@pytest.mark.parametrize("state", ["train", "frozen", "checkpoints", "no_grad"])
def test_importance_leaves_nothing_behind(name: str, state: str) -> None:
    """Neither dropout nor checkpoints, nor what is trained, change it; gradients, modes and hooks stay as they were."""
    model, inputs = tiny(name), padded(left=False)
    exact = token_importance(model, *inputs)
    if state == "frozen":
        model.requires_grad_(False)
    if state == "checkpoints":
        model.gradient_checkpointing_enable()
    model.train()
    model.get_output_embeddings().training = False  # a mixture of modes
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 3.0) if index % 2 else None
    before = {module: (module.training, len(module._forward_hooks)) for module in model.modules()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    with torch.set_grad_enabled(state != "no_grad"):
        weights = token_importance(model, *inputs)
    assert_same_bits("weights", weights, exact)
    assert before == {module: (module.training, len(module._forward_hooks)) for module in model.modules()}
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert_same_bits("gradient", parameter.grad, grad)


def test_adapters_count() -> None:
    pytest.importorskip("peft")
    base, inputs = tiny(), padded(left=False)
    model = lora(base).double()
    weights = token_importance(model, *inputs)
    merged = copy.deepcopy(model).merge_and_unload()
    close("weights", weights, token_importance(merged, *inputs), 1e-8)
    assert (weights - token_importance(base, *inputs)).abs().max() > 1e-3, "the adapters must change something"


def test_only_last_positions_go_through_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(), padded(left=False)
    head, shapes = LMHead.from_model(model), []
    product = LMHead.logits
    monkeypatch.setattr(LMHead, "logits", lambda self, hidden: shapes.append(tuple(hidden.shape)) or product(self, hidden))
    monkeypatch.setattr(model.lm_head, "forward", lambda *_: pytest.fail("the model's own head was called"))
    token_importance(model, *inputs, head=head)
    assert [shape[:-1] for shape in shapes] == [(len(SEQUENCES), 1)]


def test_a_head_may_be_a_weight() -> None:
    model, inputs = tiny(), padded(left=False)
    weights = token_importance(model, *inputs, head=model.lm_head.weight)
    assert_same_bits("weights", weights, token_importance(model, *inputs))


def test_labels_of_padding_do_not_count() -> None:
    model, inputs = tiny(), padded(left=False)
    careless = inputs.labels.where(inputs.attention_mask.bool(), 3)
    assert (careless != inputs.labels).any()
    assert_same_bits("weights", token_importance(model, *inputs[:2], careless), token_importance(model, *inputs))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_tokens_have_no_weights(shape: tuple[int, int]) -> None:
    ids = torch.zeros(shape, dtype=torch.int64)
    assert token_importance(tiny(), ids, ids, ids).shape == shape


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"inference_mode.*no_grad"):
        token_importance(tiny(), *padded(left=False))


def test_half_precision() -> None:
    """Weights are float32, and not far off."""
    model, inputs = tiny(), padded(left=False)
    exact = token_importance(model, *inputs)
    weights = token_importance(model.bfloat16(), *inputs)
    assert weights.dtype == torch.float32
    close("weights", weights, exact, 0.1)


def test_without_a_gradient_the_prior_is_left() -> None:
    """A head of zeros; and a soft-cap so low that its slope rounds to 0 changes nothing."""
    model, inputs = tiny(), padded(left=False)
    head = LMHead.from_model(model)
    flat = LMHead(torch.zeros_like(head.weight))
    prior = token_importance(model, *inputs, mix=0.0)
    close("paper", token_importance(model, *inputs, head=flat), 0.3 * prior)
    prior = token_importance(model, *inputs, mix=0.0, scheme="code")
    close("code", token_importance(model, *inputs, head=flat, scheme="code"), prior)
    capped = token_importance(model, *inputs, head=dataclasses.replace(head, softcap=1e-3))
    close("capped", capped, token_importance(model, *inputs, head=head))


def test_a_sequence_without_a_response_has_no_weights() -> None:
    model, inputs = tiny(), padded(left=False)
    labels = inputs.labels.clone()
    labels[1] = IGNORE
    labels[2, 0] = 5  # the first token, which nothing predicts
    exact = token_importance(model, *inputs)
    for scheme in ("paper", "code"):
        weights = token_importance(model, inputs.input_ids, inputs.attention_mask, labels, scheme=scheme)
        assert_exactly_zero("weights", weights[1])
        assert_exactly_zero("first", weights[:, 0])
        if scheme == "paper":
            assert_same_bits("others", weights[2], exact[2])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"mix": 1.5}, r"mix must be a finite number in \[0, 1\]; got 1.5"),
        ({"scheme": "mean"}, "scheme must be one of paper, code; got 'mean'"),
        ({"prior_width": 0.0}, "prior_width must be a finite number > 0, or None; got 0.0"),
        ({"labels": torch.zeros(4, 3, dtype=torch.int64)}, r"got labels \(4, 3\) .* beside input_ids \(4, 14\)"),
        ({"attention_mask": None}, "got attention_mask NoneType"),
        ({"input_ids": torch.zeros(9, dtype=torch.int64)}, r"must be \(S, T\) on one device; got input_ids \(9,\)"),
    ],
)
def test_wrong_inputs_of_importance_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_importance(tiny(), **padded(left=False)._asdict() | option)


def test_a_model_that_looks_up_no_tokens_is_refused() -> None:
    model = tiny()
    model.get_input_embeddings = lambda: torch.nn.Embedding(3, 3)
    with pytest.raises(ValueError, match=r"LlamaModel must look tokens up once, .* it called Embedding 0 times"):
        token_importance(model, *padded(left=False))
