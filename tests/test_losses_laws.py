"""Laws of the preference losses: what must not change when something irrelevant does, and what must change by how much.

In float64, for every backend that runs on a CPU; exact where the law is exact. Values against oracles are in test_losses.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_tdpo import DPOLoss, PreferenceOutput, TDPOLoss
from fused_tdpo.pair_losses import PAIR_FORMS, PAIR_LOSSES
from official_tdpo import (
    IGNORE,
    UNEVEN,
    Batch,
    effective_ratios,
    expected_sums,
    make_batch,
    official_tdpo,
    pair_losses,
    value_and_grad,
)
from tolerances import assert_exactly_zero, assert_same_bits

EXACT = {"rtol": 1e-10, "atol": 1e-13}  # float64: only the order of summation may differ
BACKENDS = ("reference", "torch")
P = len(UNEVEN) // 2

backends = pytest.mark.parametrize("backend", BACKENDS)
variants = pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
families = pytest.mark.parametrize("family", ["tdpo1", "tdpo2", "dpo"])


def make_loss(family: str, **options: Any) -> torch.nn.Module:
    return DPOLoss(**options) if family == "dpo" else TDPOLoss(variant=family, **options)


def run(loss: torch.nn.Module, batch: Batch, **keywords: Any) -> tuple[PreferenceOutput, Tensor]:
    """The output and d loss / d policy logits."""
    return value_and_grad(lambda x: loss(x, batch.ref, batch.labels, **keywords), batch.policy)


def assert_same(out: PreferenceOutput, expected: PreferenceOutput, tolerance: dict[str, float] = EXACT) -> None:
    """All fields and metrics agree."""
    for name in PreferenceOutput._fields[:-2]:
        a, e = getattr(out, name), getattr(expected, name)
        assert (a is None) == (e is None), name
        if a is not None:
            torch.testing.assert_close(a, e, **tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert set(out.metrics) == set(expected.metrics)
    for name in expected.metrics:
        torch.testing.assert_close(out.metrics[name], expected.metrics[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def pairs_of(batch: Batch, chosen: Sequence[int]) -> Batch:
    """The batch of these pairs only."""
    total = len(batch.lengths) // 2
    rows = [*chosen, *(p + total for p in chosen)]
    return Batch(*(x[rows] for x in batch[:3]), tuple(batch.lengths[r] for r in rows))


# --- step 0 -----------------------------------------------------------------------------------------------------------------


@backends
@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_step_0_is_log_2_exactly(backend: str, family: str, dtype: torch.dtype) -> None:
    """Equal policy and reference: no log-ratio, no KL, no reward; the loss is the float32 nearest to log 2."""
    batch = make_batch(dtype=dtype, drift=0.0, V=101, seed=1)
    out = make_loss(family, backend=backend)(*batch[:3])
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.loss, torch.tensor(math.log(2))), out.loss.item()
    for name in ("chosen_kl", "rejected_kl", "chosen_rewards", "rejected_rewards"):
        assert_exactly_zero(name, getattr(out, name))
    for name in ("kl/chosen", "kl/rejected", "kl/margin", "rewards/margins", "rewards/accuracies"):
        assert out.metrics[name] == 0, f"{name}: a tie is not a win"


@backends
def test_at_step_0_tdpo2_pushes_as_dpo_does(backend: str) -> None:
    """p = q: every variant's row gradient is -+ beta / 2P (e_y - p), so the KL terms give nothing yet."""
    batch = make_batch(drift=0.0, seed=2)
    _, expected = run(DPOLoss(backend=backend), batch)
    for variant in ("tdpo1", "tdpo2"):
        _, grad = run(TDPOLoss(variant=variant, backend=backend), batch)
        torch.testing.assert_close(grad, expected, **EXACT)


# --- TDPO beside DPO --------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
def test_tdpo2_with_alpha_0_is_dpo(backend: str, loss_type: str) -> None:
    batch = make_batch(holes=0.2, seed=3)
    out, grad = run(TDPOLoss(alpha=0.0, loss_type=loss_type, backend=backend, reward="effective"), batch)
    dpo, dpo_grad = run(DPOLoss(loss_type=loss_type, backend=backend), batch)
    assert_same(out, dpo)
    torch.testing.assert_close(grad, dpo_grad, **EXACT)


@backends
@pytest.mark.parametrize(
    ("variant", "alpha", "chosen", "rejected"),
    [
        # gradient of a row = c * (coefficients of e_y, p, q)
        ("tdpo1", 0.4, (-1, 0, 1), (1, 0, -1)),
        ("tdpo2", 0.4, (-1, 1, 0), (1, -0.6, -0.4)),
        ("tdpo2", 1.0, (-1, 1, 0), (1, 0, -1)),
        ("tdpo2", 1.5, (-1, 1, 0), (1, 0.5, -1.5)),
        ("dpo", 0.4, (-1, 1, 0), (1, -1, 0)),
    ],
)
def test_row_gradients(
    backend: str, variant: str, alpha: float, chosen: tuple[float, ...], rejected: tuple[float, ...]
) -> None:
    """c = beta (1 - sigmoid(beta h)) / P with the variant's own h, to which TDPO2's chosen KL adds; it has no gradient."""
    batch, beta = make_batch(holes=0.2, seed=4), 0.3
    options = {} if variant == "dpo" else {"alpha": alpha}
    _, grad = run(make_loss(variant, beta=beta, backend=backend, **options), batch)

    r_w, r_l = effective_ratios(expected_sums(*batch[:3]), variant=variant, alpha=alpha)
    c = beta * torch.sigmoid(-beta * (r_w - r_l)) / P
    p, q = batch.policy[:, :-1].softmax(-1), batch.ref[:, :-1].softmax(-1)
    counted = (batch.labels[:, 1:] != IGNORE)[..., None]
    e_y = torch.zeros_like(p).scatter_(-1, batch.labels[:, 1:, None].clamp(min=0), 1.0)
    expected = torch.zeros_like(batch.policy)
    for rows, slopes, (of_y, of_p, of_q) in ((slice(0, P), c, chosen), (slice(P, None), c, rejected)):
        direction = of_y * e_y[rows] + of_p * p[rows] + of_q * q[rows]
        expected[rows, :-1] = (slopes[:, None, None] * direction) * counted[rows]
    torch.testing.assert_close(grad, expected, **EXACT)
    torch.testing.assert_close(grad.sum(-1), torch.zeros_like(grad[..., 0]), rtol=0, atol=1e-15)


@backends
def test_tdpo2_chosen_rows_are_dpo_rows_of_another_size(backend: str) -> None:
    """Same direction; the sizes differ as sigmoid(-beta h) does between the two h."""
    batch, beta = make_batch(seed=5), 0.5
    tdpo, grad = run(TDPOLoss(beta, backend=backend), batch)
    dpo, dpo_grad = run(DPOLoss(beta, backend=backend), batch)
    slope, dpo_slope = ((-(-out.losses).expm1())[:, None, None] for out in (tdpo, dpo))  # 1 - exp(-loss) = sigmoid(-beta h)
    assert (slope - dpo_slope).abs().max() > 1e-2, "alpha must have changed h"
    torch.testing.assert_close(grad[:P] * dpo_slope, dpo_grad[:P] * slope, **EXACT)


@backends
def test_the_chosen_kl_moves_the_value_of_tdpo2_but_has_no_gradient(backend: str) -> None:
    """Doubling its weight changes the loss by what alpha * K_w says; the gradient only through the slope of the pair."""
    batch, beta, alpha = make_batch(seed=6), 0.5, 0.8
    loss = TDPOLoss(beta, alpha=alpha, backend=backend)
    heavier = torch.ones(batch.labels.shape, dtype=torch.float64)
    heavier[:P] = 2.0
    out, grad = run(loss, batch)
    out2, grad2 = run(loss, batch, kl_weights=heavier)

    def margin(out: PreferenceOutput) -> Tensor:  # loss = log(1 + exp(-beta h))
        return -out.losses.expm1().log() / beta

    torch.testing.assert_close(margin(out2) - margin(out), alpha * out.chosen_kl, rtol=1e-9, atol=1e-12)
    slope, slope2 = ((-(-o.losses).expm1()).repeat(2)[:, None, None] for o in (out, out2))
    torch.testing.assert_close(grad2 * slope, grad * slope2, **EXACT)


@backends
def test_swapping_chosen_and_rejected(backend: str) -> None:
    """TDPO1: h -> -h, and -log sigmoid(-z) + log sigmoid(z) = z, so each loss changes by beta * h exactly. Gradients: each row
    changes sign and is rescaled from 1 - sigmoid(z) to sigmoid(z)."""
    batch = make_batch(seed=7)
    swapped = Batch(*(torch.cat([x[P:], x[:P]]) for x in batch[:3]), batch.lengths[P:] + batch.lengths[:P])
    loss = TDPOLoss(beta=0.4, variant="tdpo1", backend=backend)
    out, grad = run(loss, batch)
    other, other_grad = run(loss, swapped)
    z = out.chosen_rewards - out.rejected_rewards
    torch.testing.assert_close(other.losses - out.losses, z, **EXACT)
    assert_same_bits("rewards", other.chosen_rewards, out.rejected_rewards)
    assert_same_bits("kl", other.rejected_kl, out.chosen_kl)
    back = torch.cat([other_grad[P:], other_grad[:P]])
    z = z.repeat(2)[:, None, None]
    torch.testing.assert_close(back * torch.sigmoid(-z), -grad * torch.sigmoid(z), **EXACT)


# --- layout -----------------------------------------------------------------------------------------------------------------


@backends
@families
@pytest.mark.parametrize("garbage", [None, math.nan, math.inf, -math.inf], ids=str)
def test_what_no_label_uses_does_not_matter(backend: str, family: str, garbage: float | None) -> None:
    """Prompt, padding, holes and the last position may hold anything, NaN too; their gradient is exactly 0."""
    batch = make_batch(holes=0.2, seed=8)
    dirty = make_batch(holes=0.2, seed=8, garbage=garbage)
    loss = make_loss(family, backend=backend)
    (out, grad), (expected, expected_grad) = run(loss, dirty), run(loss, batch)
    assert_same(out, expected, {"rtol": 0, "atol": 0})
    torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)
    unused = torch.ones(batch.labels.shape, dtype=torch.bool)
    unused[:, :-1] = batch.labels[:, 1:] == IGNORE
    assert_exactly_zero("gradient of unused rows", grad[unused])
    assert (grad[~unused] != 0).any(-1).all(), "every counted row takes part"


@backends
@families
def test_padding_changes_nothing(backend: str, family: str) -> None:
    batch = make_batch(seed=9)
    shape = (*batch.labels.shape[:1], 5)
    noise = torch.randn(*shape, batch.policy.shape[-1], dtype=torch.float64)
    padded = Batch(
        torch.cat([batch.policy, noise], 1),
        torch.cat([batch.ref, -noise], 1),
        torch.cat([batch.labels, torch.full(shape, IGNORE)], 1),
        batch.lengths,
    )
    loss = make_loss(family, backend=backend)
    (out, grad), (expected, expected_grad) = run(loss, padded), run(loss, batch)
    assert_same(out, expected)
    T = batch.labels.shape[1]
    torch.testing.assert_close(grad[:, :T], expected_grad, **EXACT)
    assert_exactly_zero("gradient of padding", grad[:, T:])


@backends
@families
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_packing_equals_padding(backend: str, family: str, loss_type: str, dtype: torch.dtype) -> None:
    """Sequences end to end, also where one starts with a label: the row before it must not predict it."""
    batch = make_batch(holes=0.1, padding=1, seed=10)
    packed = batch.packed()
    starts = batch.cu_seqlens().long()[1:-1]
    assert (packed.labels[starts] != IGNORE).any(), "some sequence must start with a label"
    loss = make_loss(family, loss_type=loss_type, backend=backend)
    out, grad = run(loss, packed, cu_seqlens=batch.cu_seqlens(dtype))
    expected, expected_grad = run(loss, batch)
    assert_same(out, expected)
    torch.testing.assert_close(grad, batch.pack(expected_grad), **EXACT)


@backends
@families
def test_packed_weights_belong_to_packed_labels(backend: str, family: str) -> None:
    batch = make_batch(seed=11)
    weights = {"token_weights": torch.rand(batch.labels.shape).double()}
    if family != "dpo":
        weights["kl_weights"] = torch.rand(batch.labels.shape).double()
    loss = make_loss(family, backend=backend)
    packed_weights = {name: batch.pack(w) for name, w in weights.items()}
    out, grad = run(loss, batch.packed(), cu_seqlens=batch.cu_seqlens(), **packed_weights)
    expected, expected_grad = run(loss, batch, **weights)
    assert_same(out, expected)
    torch.testing.assert_close(grad, batch.pack(expected_grad), **EXACT)


@backends
@families
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_interleaved_equals_chosen_first(backend: str, family: str, packed: bool) -> None:
    """Rows 0, 2, 4, ... chosen; rows 1, 3, 5, ... rejected."""
    batch = make_batch(seed=12)
    order = [s for p in range(P) for s in (p, p + P)]
    mixed = Batch(*(x[order] for x in batch[:3]), tuple(batch.lengths[s] for s in order))
    expected, expected_grad = run(make_loss(family, backend=backend), batch)
    loss = make_loss(family, interleaved=True, backend=backend)
    if packed:
        out, grad = run(loss, mixed.packed(), cu_seqlens=mixed.cu_seqlens())
        torch.testing.assert_close(grad, mixed.pack(expected_grad[order]), **EXACT)
    else:
        out, grad = run(loss, mixed)
        torch.testing.assert_close(grad, expected_grad[order], **EXACT)
    assert_same(out, expected)


@backends
@families
def test_pairs_are_independent(backend: str, family: str) -> None:
    """Each pair alone gives its entry of every field; a permutation of the pairs permutes them."""
    batch = make_batch(holes=0.2, seed=13)
    loss = make_loss(family, backend=backend)
    whole, _ = run(loss, batch)
    order = [2, 0, 3, 1]
    parts = [run(loss, pairs_of(batch, [p]))[0] for p in range(P)]
    permuted, _ = run(loss, pairs_of(batch, order))
    for name in PreferenceOutput._fields[1:-2]:
        torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name), **EXACT)
        torch.testing.assert_close(getattr(permuted, name), getattr(whole, name)[order], **EXACT)


SMOOTHING = {"exo_pair": 0.05}


@backends
@families
@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_the_order_of_pairs_does_not_matter(backend: str, family: str, loss_type: str) -> None:
    """Whatever couples them: the same loss, and the gradients go with their pairs. Losses of the others go with them, too."""
    batch = make_batch(holes=0.2, seed=40)
    loss = make_loss(family, loss_type=loss_type, label_smoothing=SMOOTHING.get(loss_type, 0.0), backend=backend)
    order = [2, 0, 3, 1]
    (whole, grad), (permuted, permuted_grad) = run(loss, batch), run(loss, pairs_of(batch, order))
    coupled = PAIR_FORMS[loss_type].kind == "batch"
    torch.testing.assert_close(permuted.loss, whole.loss, **EXACT)
    torch.testing.assert_close(permuted.losses, whole.losses if coupled else whole.losses[order], **EXACT)
    torch.testing.assert_close(permuted_grad, grad[[*order, *(p + P for p in order)]], **EXACT)
    alone = torch.stack([run(loss, pairs_of(batch, [p]))[0].loss for p in range(P)])
    if coupled or loss_type == "sft":
        assert (alone - whole.losses).abs().max() > 1e-3, "the losses of pairs alone are as good"
    else:
        torch.testing.assert_close(alone, whole.losses, **EXACT)


@backends
@families
@pytest.mark.parametrize("size", [1, 2, 4], ids=["8x1", "4x2", "2x4"])
def test_gradient_accumulation_with_a_global_normaliser(backend: str, family: str, size: int) -> None:
    """num_pairs=8 in every micro-batch: losses and gradients add up to those of the whole batch, whatever the split."""
    batch = make_batch(UNEVEN[:4] * 2 + UNEVEN[4:] * 2, seed=14)
    loss = make_loss(family, backend=backend)
    expected, expected_grad = run(loss, batch)
    total, grad = torch.zeros((), dtype=torch.float64), torch.zeros_like(batch.policy)
    for first in range(0, 8, size):
        pairs = list(range(first, first + size))
        out, part = run(loss, pairs_of(batch, pairs), num_pairs=8)
        total += out.loss.detach()
        grad[[*pairs, *(p + 8 for p in pairs)]] += part
    torch.testing.assert_close(total, expected.loss.detach(), **EXACT)
    torch.testing.assert_close(grad, expected_grad, **EXACT)


@backends
@families
def test_the_first_label_of_a_sequence_is_never_predicted(backend: str, family: str) -> None:
    """It changes neither sums nor lengths, whatever it is."""
    batch = make_batch(seed=15)
    loss = make_loss(family, loss_type="ipo", backend=backend)
    expected, expected_grad = run(loss, batch)
    for first in (IGNORE, 3):
        labels = batch.labels.clone()
        labels[:, 0] = first
        out, grad = run(loss, batch._replace(labels=labels))
        assert_same(out, expected)
        torch.testing.assert_close(grad, expected_grad, **EXACT)


# --- the reference, precomputed ---------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge"])
@pytest.mark.parametrize("layout", ["padded", "packed", "interleaved"])
def test_ref_logps_equal_ref_logits(backend: str, loss_type: str, layout: str) -> None:
    """Precomputed sums, one for each sequence in the order of the sequences."""
    batch = make_batch(holes=0.2, seed=16)
    keywords: dict[str, Any] = {}
    if layout == "interleaved":
        order = [s for p in range(P) for s in (p, p + P)]
        batch = Batch(*(x[order] for x in batch[:3]), tuple(batch.lengths[s] for s in order))
    ref_logps = expected_sums(*batch[:3]).ref_logps
    if layout == "packed":
        keywords["cu_seqlens"], batch = batch.cu_seqlens(), batch.packed()
    loss = DPOLoss(loss_type=loss_type, interleaved=layout == "interleaved", backend=backend)
    expected, expected_grad = run(loss, batch, **keywords)
    out, grad = run(loss, batch._replace(ref=None), ref_logps=ref_logps, **keywords)
    torch.testing.assert_close(grad, expected_grad, **EXACT)
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards", "chosen_logps", "rejected_logps"):
        torch.testing.assert_close(getattr(out, name), getattr(expected, name), **EXACT)


# --- weights ----------------------------------------------------------------------------------------------------------------


@backends
@families
def test_weights_of_one_change_nothing(backend: str, family: str) -> None:
    batch = make_batch(holes=0.2, seed=17)
    ones = torch.ones(batch.labels.shape, dtype=torch.float64)
    loss = make_loss(family, backend=backend)
    out, grad = run(loss, batch, token_weights=ones, **({} if family == "dpo" else {"kl_weights": ones}))
    expected, expected_grad = run(loss, batch)
    assert_same(out, expected)
    torch.testing.assert_close(grad, expected_grad, **EXACT)


@backends
@families
def test_weights_of_zero_equal_ignored_labels(backend: str, family: str) -> None:
    """For the log-ratio by `token_weights`, for the KL by `kl_weights`."""
    batch = make_batch(seed=18)
    drop = torch.rand(batch.labels.shape) < 0.4
    weights = (~drop).double()
    loss = make_loss(family, backend=backend)
    out, grad = run(loss, batch, token_weights=weights, **({} if family == "dpo" else {"kl_weights": weights}))
    expected, expected_grad = run(loss, batch._replace(labels=batch.labels.masked_fill(drop, IGNORE)))
    torch.testing.assert_close(out.losses, expected.losses, **EXACT)
    torch.testing.assert_close(out.chosen_rewards, expected.chosen_rewards, **EXACT)
    torch.testing.assert_close(grad, expected_grad, **EXACT)


WEIGHTED = [
    ("dpo", ["token_weights"]),
    *((v, names) for v in ("tdpo1", "tdpo2") for names in (["token_weights"], ["kl_weights"], ["token_weights", "kl_weights"])),
]


@backends
@pytest.mark.parametrize(("family", "names"), WEIGHTED, ids=lambda x: x if isinstance(x, str) else "+".join(x))
def test_weights(backend: str, family: str, names: list[str]) -> None:
    """Each weights its own sum: token_weights the log-ratio, kl_weights the KL. A weight may be negative."""
    batch, beta = make_batch(holes=0.2, seed=19), 0.2
    weights = {name: torch.randn(batch.labels.shape, dtype=torch.float64) for name in names}

    def expected(policy: Tensor) -> Tensor:
        sums = expected_sums(policy, batch.ref, batch.labels, **weights)
        r_w, r_l = effective_ratios(sums, variant=family, alpha=0.5)
        return pair_losses("sigmoid", r_w, r_l, *sums.lengths.chunk(2), beta, 0.0)

    out, grad = run(make_loss(family, beta=beta, backend=backend), batch, **weights)
    _, expected_grad = value_and_grad(lambda x: expected(x).mean(), batch.policy)
    torch.testing.assert_close(out.losses, expected(batch.policy), **EXACT)
    torch.testing.assert_close(grad, expected_grad, **EXACT)


@backends
def test_a_weight_is_shifted_with_its_label(backend: str) -> None:
    """token_weights[s, t] weights labels[s, t], which the logits at t - 1 predict: they alone move with it."""
    batch, beta = make_batch(seed=20), 0.2
    s, t = 1, 2  # inside the second chosen response
    assert batch.labels[s, t] != IGNORE
    only = torch.zeros(batch.labels.shape, dtype=torch.float64)
    only[s, t] = 3.0
    out, grad = run(DPOLoss(beta, backend=backend), batch, token_weights=only)
    rho = (batch.policy.log_softmax(-1) - batch.ref.log_softmax(-1))[s, t - 1, batch.labels[s, t]]
    torch.testing.assert_close(out.chosen_rewards[s], beta * 3 * rho, **EXACT)
    torch.testing.assert_close(out.losses[s], -torch.nn.functional.logsigmoid(beta * 3 * rho), **EXACT)
    moved = (grad != 0).any(-1).nonzero().tolist()
    assert moved == [[s, t - 1]]


@backends
@families
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_learned_token_weights_get_their_gradient(backend: str, family: str, packed: bool) -> None:
    """d loss / d w_t = slope of the sequence times rho_t, at the position of the label; 0 where no label is counted."""
    batch, beta = make_batch(holes=0.2, seed=21), 0.3
    weights = torch.rand(batch.labels.shape).double()
    loss = make_loss(family, beta=beta, backend=backend)
    sums = expected_sums(*batch[:3], token_weights=weights)
    r_w, r_l = effective_ratios(sums, variant=family, alpha=0.5)
    c = beta * torch.sigmoid(-beta * (r_w - r_l)) / P
    mask = batch.labels[:, 1:] != IGNORE
    y = batch.labels[:, 1:, None].clamp(min=0)
    rho = (batch.policy.log_softmax(-1) - batch.ref.log_softmax(-1))[:, :-1].gather(-1, y)[..., 0]
    expected = torch.zeros_like(weights)
    expected[:, 1:] = torch.where(mask, torch.cat([-c, c])[:, None] * rho, 0.0)

    if packed:
        expected, weights, keywords = batch.pack(expected), batch.pack(weights), {"cu_seqlens": batch.cu_seqlens()}
        batch = batch.packed()
    else:
        keywords = {}
    _, grad = value_and_grad(lambda w: loss(*batch[:3], token_weights=w, **keywords), weights)
    torch.testing.assert_close(grad, expected, **EXACT)
    joint = batch.policy.clone().requires_grad_()
    leaf = weights.clone().requires_grad_()
    both = torch.autograd.grad(loss(joint, *batch[1:3], token_weights=leaf, **keywords).loss, (joint, leaf))
    torch.testing.assert_close(both[1], expected, **EXACT)
    torch.testing.assert_close(both[0], run(loss, batch, token_weights=weights, **keywords)[1], **EXACT)


@backends
def test_learned_kl_weights_get_their_gradient(backend: str) -> None:
    """TDPO1, as SparsePO trains its masks: slope times KL_t."""
    batch = make_batch(holes=0.2, seed=22)
    weights = torch.rand(batch.labels.shape).double()
    loss = TDPOLoss(variant="tdpo1", backend=backend)
    _, grad = value_and_grad(lambda w: loss(*batch[:3], kl_weights=w), weights)

    def expected(w: Tensor) -> Tensor:
        sums = expected_sums(*batch[:3], kl_weights=w)
        r_w, r_l = effective_ratios(sums, variant="tdpo1", alpha=0.5)
        return pair_losses("sigmoid", r_w, r_l, *sums.lengths.chunk(2), 0.1, 0.0).mean()

    torch.testing.assert_close(grad, value_and_grad(expected, weights)[1], **EXACT)


# --- edges ------------------------------------------------------------------------------------------------------------------


@backends
@families
@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}, {"loss_type": "hinge"}], ids=["sigmoid", "ipo", "hinge"])
def test_a_sequence_without_labels(backend: str, family: str, options: dict[str, str]) -> None:
    """Its sums are 0 and its length counts as 1: the pair's loss is finite, and the other side still learns."""
    batch = make_batch(seed=23)
    labels = batch.labels.clone()
    labels[0] = IGNORE
    labels[[1, P + 1]] = IGNORE
    batch = batch._replace(labels=labels)
    loss = make_loss(family, backend=backend, **options)
    out, grad = run(loss, batch)
    sums = expected_sums(*batch[:3])
    r_w, r_l = effective_ratios(sums, variant=family, alpha=0.5)
    expected = pair_losses(options.get("loss_type", "sigmoid"), r_w, r_l, *sums.lengths.chunk(2), 0.1, 0.0)
    torch.testing.assert_close(out.losses, expected, **EXACT)
    assert out.chosen_logps[0] == 0
    assert_exactly_zero("gradient of sequences without labels", grad[[0, 1, P + 1]])
    assert grad[P].any()


@backends
@variants
def test_average_log_prob_of_a_sequence_without_labels(backend: str, variant: str) -> None:
    """The mean over no tokens is 0, not 0 / 0."""
    batch = make_batch(seed=24)
    labels = batch.labels.clone()
    labels[0] = IGNORE
    out, grad = run(TDPOLoss(variant=variant, average_log_prob=True, backend=backend), batch._replace(labels=labels))
    assert out.chosen_logps[0] == 0
    assert out.chosen_kl[0] == 0
    assert out.loss.isfinite()
    assert grad.isfinite().all()


@backends
@families
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}], ids=["mean", "sum"])
def test_no_pairs(backend: str, family: str, packed: bool, options: dict[str, str]) -> None:
    """A rank whose share is empty: loss 0, gradient of the right shape, nothing NaN."""
    V = 7
    shape, keywords = ((0,), {"cu_seqlens": torch.zeros(1, dtype=torch.int32)}) if packed else ((0, 5), {})
    empty = Batch(torch.zeros(*shape, V), torch.zeros(*shape, V), torch.zeros(shape, dtype=torch.int64), ())
    out, grad = run(make_loss(family, backend=backend, **options), empty, **keywords)
    assert out.loss.item() == 0
    assert out.losses.shape == (0,)
    assert grad.shape == empty.policy.shape
    for name, metric in out.metrics.items():
        assert not metric.isnan(), name


@backends
@families
def test_no_pairs_of_a_global_batch(backend: str, family: str) -> None:
    """The empty share of a batch that has pairs elsewhere."""
    empty = Batch(torch.zeros(0, 5, 7), torch.zeros(0, 5, 7), torch.zeros(0, 5, dtype=torch.int64), ())
    out, _ = run(make_loss(family, backend=backend), empty, num_pairs=4)
    assert out.loss.item() == 0


@backends
@families
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_one_position_predicts_nothing(backend: str, family: str, packed: bool) -> None:
    """Sequences of one token have no row that predicts it: log 2, and no gradient."""
    batch = make_batch(((0, 1), (0, 1)), seed=25)
    keywords = {"cu_seqlens": batch.cu_seqlens()} if packed else {}
    out, grad = run(make_loss(family, backend=backend), batch.packed() if packed else batch, **keywords)
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-15)
    assert_exactly_zero("gradient", grad)


@backends
@families
def test_responses_of_one_token(backend: str, family: str) -> None:
    batch = make_batch(((2, 1), (1, 1), (1, 1), (3, 1)), seed=26)
    out, grad = run(make_loss(family, backend=backend), batch)
    r_w, r_l = effective_ratios(expected_sums(*batch[:3]), variant=family, alpha=0.5)
    torch.testing.assert_close(out.losses, -torch.nn.functional.logsigmoid(0.1 * (r_w - r_l)), **EXACT)
    assert (grad != 0).any(-1).sum() == 4


@backends
@families
def test_a_vocabulary_of_one_word(backend: str, family: str) -> None:
    """p = q = 1: log 2 and no gradient."""
    batch = make_batch(V=1, seed=27)
    out, grad = run(make_loss(family, backend=backend), batch)
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-15)
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-15)


@backends
@families
def test_no_input_is_written(backend: str, family: str) -> None:
    batch = make_batch(seed=28)
    weights = torch.rand(batch.labels.shape).double()
    keep = [x.clone() for x in (*batch[:3], weights)]
    leaf = batch.policy.requires_grad_()
    make_loss(family, backend=backend)(leaf, *batch[1:3], token_weights=weights).loss.backward()
    for before, after in zip(keep, (leaf.detach(), *batch[1:3], weights), strict=True):
        assert_same_bits("input", after, before)


@backends
@families
def test_the_same_bits_every_time(backend: str, family: str) -> None:
    batch = make_batch(dtype=torch.float32, V=201, seed=29)
    loss = make_loss(family, backend=backend)
    (out, grad), (again, grad_again) = run(loss, batch), run(loss, batch)
    assert_same_bits("losses", again.losses, out.losses)
    assert_same_bits("gradient", grad_again, grad)


# --- any layout -------------------------------------------------------------------------------------------------------------

try:
    from hypothesis import given
    from hypothesis import strategies as st
except ImportError:

    @pytest.mark.skip(reason="needs Hypothesis, which is not installed")
    def test_any_layout() -> None: ...

else:
    spans = st.tuples(st.integers(0, 2), st.integers(0, 4)).map(lambda span: span if sum(span) else (0, 1))

    @backends
    @variants
    @given(
        pairs=st.lists(st.tuples(spans, spans), min_size=1, max_size=4),
        V=st.sampled_from([2, 3, 17, 64]),
        holes=st.sampled_from([0.0, 0.5, 1.0]),
        padding=st.integers(0, 2),
        seed=st.integers(0, 2**16),
    )
    def test_any_layout(
        backend: str, variant: str, pairs: list[tuple[Any, Any]], V: int, holes: float, padding: int, seed: int
    ) -> None:
        """Padded equals packed equals the official code, in every field and in the gradient."""
        layout = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
        batch = make_batch(layout, V, holes=holes, padding=padding, seed=seed, drift=1.0)
        official, official_grad = value_and_grad(
            lambda x: official_tdpo(x, *batch[1:3], beta=0.2, alpha=0.6, tdpo2=variant == "tdpo2"), batch.policy
        )
        loss = TDPOLoss(beta=0.2, alpha=0.6, variant=variant, backend=backend)
        padded, padded_grad = run(loss, batch)
        packed, packed_grad = run(loss, batch.packed(), cu_seqlens=batch.cu_seqlens())
        for name in official._fields:
            expected = getattr(official, name).detach()
            for out in (padded, packed):
                torch.testing.assert_close(getattr(out, name).detach(), expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(padded_grad, official_grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(packed_grad, batch.pack(official_grad), rtol=1e-9, atol=1e-12)
