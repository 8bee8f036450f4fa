"""Every pair loss, mixture, weighting and f-divergence: values worked by hand, gradients, and what the modules make of them.

The oracles are the formulas of the papers, written literally, with logarithms of sigmoids and no care for overflow: float64 on
sums of the naive oracle in `official_tdpo`. From hidden states, test_linear_losses.py; beside TRL, test_loss_parity.py.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_tdpo.pair_losses
from fused_tdpo import DPOLoss, LinearDPOLoss, LinearTDPOLoss, PreferenceOutput, TDPOLoss
from fused_tdpo.pair_losses import PAIR_FORMS, PAIR_LOSSES, SMOOTHED, PairOptions, Pairs, f_dpo_scores
from official_tdpo import IGNORE, Batch, effective_ratios, expected_sums, make_batch, value_and_grad
from tolerances import assert_exactly_zero, assert_same_bits, assert_within_budget

BACKENDS = ("reference", "torch")
backends = pytest.mark.parametrize("backend", BACKENDS)
families = pytest.mark.parametrize("family", ["dpo", "tdpo1", "tdpo2"])
fp64 = torch.float64


def near(what: str, got: Tensor, expected: Tensor, relative: float = 1e-9) -> None:
    """float64 against float64: every element within `relative` of the largest, or of 1e-3 where all are smaller."""
    size = max(1e-3, float(expected.detach().abs().max())) if expected.numel() else 1.0
    assert_within_budget(what, got, expected, expected, torch.full_like(expected, relative * size).detach())


# --- the formulas -----------------------------------------------------------------------------------------------------------


def literal(name: str, r_w: Tensor, r_l: Tensor, n_w: Tensor, n_l: Tensor, beta: float, eps: float = 0.0) -> Tensor:
    """(P,) losses, as printed. "sft" and "aot", which see more, are in the tests that are about them."""
    sigmoid, log = torch.sigmoid, torch.log
    z, z_w, z_l = beta * (r_w - r_l), beta * r_w, beta * r_l
    mean = r_w / n_w - r_l / n_l
    if name in ("sigmoid", "aot_unpaired"):
        if name == "aot_unpaired":
            z = beta * (torch.stack(sorted(r_w)) - torch.stack(sorted(r_l)))
        return -(1 - eps) * log(sigmoid(z)) - eps * log(sigmoid(-z))
    if name == "exo_pair":
        p, q = torch.stack([sigmoid(z), sigmoid(-z)]), torch.tensor([[1 - eps], [eps]], dtype=fp64)
        return (p * (p / q).log()).sum(0)
    if name == "discopop":
        m = sigmoid(z / 0.05)
        return (1 - m) * -log(sigmoid(z)) + m * torch.exp(-z)
    formulas: dict[str, Callable[[], Tensor]] = {
        "sigmoid_norm": lambda: -log(sigmoid(beta * mean)),
        "ipo": lambda: (mean - 1 / (2 * beta)) ** 2,
        "hinge": lambda: (1 - z).clamp(min=0),
        "robust": lambda: (-(1 - eps) * log(sigmoid(z)) + eps * log(sigmoid(-z))) / (1 - 2 * eps),
        "nca_pair": lambda: -log(sigmoid(z_w)) - (log(sigmoid(-z_w)) + log(sigmoid(-z_l))) / 2,
        "bco_pair": lambda: -log(sigmoid(z_w)) - log(sigmoid(-z_l)),
        "sppo_hard": lambda: (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2,
        "apo_zero": lambda: 1 - sigmoid(z_w) + sigmoid(z_l),
        "apo_down": lambda: sigmoid(z_w) + 1 - sigmoid(z),
    }
    return formulas[name]()


OF_RATIOS = [name for name in PAIR_LOSSES if name not in ("sft", "aot")]
SMOOTHING = {"exo_pair": 0.05}
CASES = [(name, SMOOTHING.get(name, 0.0)) for name in OF_RATIOS]
CASES += [("sigmoid", 0.2), ("robust", 0.1), ("exo_pair", 0.3), ("aot_unpaired", 0.2)]
cases = pytest.mark.parametrize(("name", "smoothing"), CASES)

# r_w = log 3, r_l = -log 2, |y_w| = 2, |y_l| = 1, β = 1, ε = 1/4: σ(z) = 6/7, σ(z_w) = 3/4, σ(z_l) = 1/3, mean margin log 2√3
BY_HAND = {
    "sigmoid": math.log(7 / 6) + 1 / 4 * math.log(6),
    "sigmoid_norm": math.log(1 + 1 / (2 * math.sqrt(3))),
    "ipo": (math.log(2 * math.sqrt(3)) - 1 / 2) ** 2,
    "hinge": 0.0,
    "robust": (3 / 4 * math.log(7 / 6) - 1 / 4 * math.log(7)) / (1 / 2),
    "exo_pair": 6 / 7 * math.log(8 / 7) + 1 / 7 * math.log(4 / 7),
    "nca_pair": math.log(4 / 3) + math.log(4) / 2 + math.log(3 / 2) / 2,
    "bco_pair": math.log(4 / 3) + math.log(3 / 2),
    "sppo_hard": (math.log(3) - 1 / 2) ** 2 + (math.log(2) - 1 / 2) ** 2,
    "apo_zero": 1 / 4 + 1 / 3,
    "apo_down": 3 / 4 + 1 / 7,
    "sft": 0.7,
    "aot": math.log(7 / 6) + 1 / 4 * math.log(6),  # a single pair is sorted
    "aot_unpaired": math.log(7 / 6) + 1 / 4 * math.log(6),
    # τ = 1 makes m = σ(z): log(7/6)/7 + 6/7·1/6
    "discopop": math.log(7 / 6) / 7 + 1 / 7,
}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_by_hand(name: str) -> None:
    one = torch.ones(1, dtype=fp64)
    pairs = Pairs(math.log(3) * one, -math.log(2) * one, 2 * one, one, 0.7 * one, 3 * one)
    options = PairOptions(1.0, 0.25 if name in SMOOTHED else 0.0, 1.0)
    near(name, PAIR_LOSSES[name](pairs, options), torch.tensor([BY_HAND[name]], dtype=fp64), 1e-14)


@cases
def test_formula_and_gradient(name: str, smoothing: float) -> None:
    r = torch.randn(2, 30, dtype=fp64, requires_grad=True)
    n = torch.randint(1, 9, (2, 30)).double()
    options = PairOptions(0.6, smoothing)
    got, expected = PAIR_LOSSES[name](Pairs(*r, *n), options), literal(name, *r, *n, 0.6, smoothing)
    near("losses", got, expected)
    upstream = torch.rand(30, dtype=fp64)
    (grad,), (expected_grad,) = (torch.autograd.grad(losses, r, upstream) for losses in (got, expected))
    near("gradient", grad, expected_grad)
    assert expected_grad.abs().max() > 1e-3
    assert torch.autograd.gradcheck(lambda r: PAIR_LOSSES[name](Pairs(*r, *n), options), r)


@pytest.mark.parametrize("dtype", [torch.float32, fp64], ids=str)
@pytest.mark.parametrize("size", [50.0, 1e3, 1e6])
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_far_from_the_reference(name: str, size: float, dtype: torch.dtype) -> None:
    """Sums over thousands of tokens: values and slopes stay finite, and no NaN comes from 0·∞; e^(−z) is what may overflow."""
    signs = torch.tensor([[1, 1, -1, -1, 1, 0], [1, -1, 1, -1, 0, -1]], dtype=dtype)
    r = (size * signs).requires_grad_()
    pairs = Pairs(*r, 7.0, 5.0, -r[0], r.detach()[1])
    losses = PAIR_LOSSES[name](pairs, PairOptions(0.9, SMOOTHING.get(name, 0.0)))
    (grad,) = torch.autograd.grad(losses.sum(), r)
    assert losses.isfinite().all()
    assert grad.isfinite().all()


def test_every_loss_has_a_case_here() -> None:
    assert BY_HAND.keys() == PAIR_LOSSES.keys() == PAIR_FORMS.keys()
    assert set(SMOOTHED) <= {name for name, smoothing in CASES if smoothing} | {"aot"}


@pytest.mark.parametrize("name", ["sft", "aot"])
def test_what_is_missing_is_asked_for(name: str) -> None:
    with pytest.raises(ValueError, match="Pairs"):
        PAIR_LOSSES[name](Pairs(torch.zeros(2), torch.zeros(2)), PairOptions(0.1))


# --- modules ----------------------------------------------------------------------------------------------------------------


def make(family: str, **options: Any) -> torch.nn.Module:
    return DPOLoss(**options) if family == "dpo" else TDPOLoss(variant=family, alpha=0.7, **options)


def run(loss: torch.nn.Module, batch: Batch, **keywords: Any) -> tuple[PreferenceOutput, Tensor]:
    return value_and_grad(lambda x: loss(x, *batch[1:3], **keywords), batch.policy)


def check(
    loss: torch.nn.Module, batch: Batch, expected: Callable[[Tensor], Tensor], what: str = "", **keywords: Any
) -> PreferenceOutput:
    """Losses (P,), their mean, and the gradient of the logits; `expected` gives losses from these."""
    out, grad = run(loss, batch, **keywords)
    losses = expected(batch.policy)
    mean, expected_grad = value_and_grad(lambda x: expected(x).mean(), batch.policy)
    near(f"{what}losses", out.losses, losses)
    near(f"{what}loss", out.loss, mean)
    near(f"{what}gradient", grad, expected_grad)
    assert expected_grad.abs().max() > 1e-4, "the case must move something"
    return out


def ratios(x: Tensor, batch: Batch, family: str, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r_w, r_l, |y_w|, |y_l|."""
    average = options.pop("average", False)
    sums = expected_sums(x, *batch[1:3], **options)
    counts = torch.ones_like(sums.lengths) if average else sums.lengths
    return *effective_ratios(sums, variant=family, alpha=0.7, average=average), *counts.chunk(2)


@backends
@families
@pytest.mark.parametrize("average", [False, True], ids=["", "average"])
@cases
def test_every_loss_of_every_family(name: str, smoothing: float, average: bool, family: str, backend: str) -> None:
    """TDPO is DPO on effective log-ratios, whatever the loss; one that divides by length divides the KL, too."""
    batch, beta = make_batch(seed=61, holes=0.1), 0.4
    loss = make(family, beta=beta, loss_type=name, label_smoothing=smoothing, average_log_prob=average, backend=backend)
    check(loss, batch, lambda x: literal(name, *ratios(x, batch, family, average=average), beta, smoothing))


@backends
@families
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
def test_aot_sorts_margins_of_policy_and_reference(weighted: bool, smoothing: float, family: str, backend: str) -> None:
    """Policy's margins, with the KL that a family adds, against the reference's, each sorted."""
    batch, beta = make_batch(seed=62), 0.4
    weights = {"token_weights": torch.rand(batch.labels.shape).double()} if weighted else {}
    equal = torch.zeros_like(batch.ref)  # a uniform reference: the log-ratio less its own constant is the log-prob

    def expected(x: Tensor) -> Tensor:
        r_w, r_l, *_ = ratios(x, batch, family, **weights)
        ref_w, ref_l = (expected_sums(batch.ref, equal, batch.labels, **weights).ratio - uniform(batch, **weights)).chunk(2)
        policy = torch.stack(sorted(r_w + ref_w - r_l - ref_l))
        z = beta * (policy - torch.stack(sorted(ref_w - ref_l)))
        return -(1 - smoothing) * torch.sigmoid(z).log() - smoothing * torch.sigmoid(-z).log()

    loss = make(family, beta=beta, loss_type="aot", label_smoothing=smoothing, backend=backend)
    check(loss, batch, expected, **weights)


def uniform(batch: Batch, token_weights: Tensor | None = None) -> Tensor:
    """(S,) weighted sums of log V over tokens that count."""
    w = torch.ones(batch.labels.shape, dtype=fp64) if token_weights is None else token_weights
    return math.log(batch.policy.shape[-1]) * torch.where(batch.labels[:, 1:] != IGNORE, w[:, 1:], 0.0).sum(-1)


@backends
def test_aot_with_ref_logps(backend: str) -> None:
    batch = make_batch(seed=63)
    ref_logps = expected_sums(*batch[:3]).ref_logps
    for average in (False, True):
        loss = DPOLoss(loss_type="aot", average_log_prob=average, backend=backend)
        given = ref_logps / expected_sums(*batch[:3]).lengths if average else ref_logps
        (out, grad), (expected, expected_grad) = run(loss, batch._replace(ref=None), ref_logps=given), run(loss, batch)
        near("losses", out.losses, expected.losses)
        near("gradient", grad, expected_grad)


@backends
@families
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sft_is_the_mean_over_chosen_tokens(reduction: str, family: str, backend: str) -> None:
    """As a model's own loss, labels of rejected sequences aside; no part for KL, β or weights of tokens."""
    batch = make_batch(seed=64, holes=0.2)
    P = len(batch.labels) // 2
    loss = make(family, loss_type="sft", reduction=reduction, backend=backend)
    for weights in ({}, {"token_weights": torch.rand(batch.labels.shape).double()}):
        out, grad = run(loss, batch, **weights)
        expected, expected_grad = value_and_grad(
            lambda x: torch.nn.functional.cross_entropy(x[:P, :-1].flatten(0, 1), batch.labels[:P, 1:].flatten()), batch.policy
        )
        factor = P if reduction == "sum" else 1
        near("loss", out.loss, factor * expected)
        near("gradient", grad, factor * expected_grad)
        assert_exactly_zero("gradient of rejected sequences", grad[P:])


@backends
def test_sft_of_a_batch_without_chosen_tokens_is_0(backend: str) -> None:
    batch = make_batch(seed=65)
    batch.labels[:4] = IGNORE
    out, grad = run(DPOLoss(loss_type="sft", backend=backend), batch)
    assert out.loss == 0
    assert_exactly_zero("gradient", grad)
    batch.labels[1, 2] = 3  # one token in four sequences
    out, _ = run(DPOLoss(loss_type="sft", backend=backend), batch)
    near("loss", out.loss, -batch.policy[1, 1].log_softmax(-1)[3])


@backends
def test_sft_with_average_log_prob_is_a_mean_of_means(backend: str) -> None:
    batch = make_batch(seed=66)
    out, _ = run(DPOLoss(loss_type="sft", average_log_prob=True, backend=backend), batch)
    near("losses", out.losses, -out.chosen_logps)


@backends
@families
def test_mixtures_are_weighted_sums(family: str, backend: str) -> None:
    batch = make_batch(seed=67)
    names, weights = ("sigmoid", "bco_pair", "sft"), [0.8, 0.2, 1.0]
    common = {"beta": 0.3, "backend": backend}
    out, grad = run(make(family, loss_type=list(names), loss_weights=weights, **common), batch)
    parts = [run(make(family, loss_type=name, **common), batch) for name in names]
    near("losses", out.losses, sum(w * part.losses for w, (part, _) in zip(weights, parts, strict=True)))
    near("gradient", grad, sum(w * part for w, (_, part) in zip(weights, parts, strict=True)))
    plain, _ = run(make(family, loss_type=names, **common), batch)
    near("losses without weights", plain.losses, sum(part.losses for part, _ in parts))
    one, _ = run(make(family, loss_type=["sigmoid"], **common), batch)
    assert_same_bits("a mixture of one", one.losses, parts[0][0].losses)


@backends
@families
def test_label_smoothing_of_a_mixture_reaches_what_takes_it(family: str, backend: str) -> None:
    batch = make_batch(seed=68)
    common = {"beta": 0.3, "backend": backend}
    both, _ = run(make(family, loss_type=["hinge", "exo_pair"], label_smoothing=0.1, **common), batch)
    hinge, _ = run(make(family, loss_type="hinge", **common), batch)
    exo, _ = run(make(family, loss_type="exo_pair", label_smoothing=0.1, **common), batch)
    near("losses", both.losses, hinge.losses + exo.losses)


@backends
@families
def test_discopop_tau(family: str, backend: str) -> None:
    batch = make_batch(seed=69)
    loss = make(family, beta=0.3, loss_type="discopop", discopop_tau=1.5, backend=backend)

    def expected(x: Tensor) -> Tensor:
        r_w, r_l, *_ = ratios(x, batch, family)
        z = 0.3 * (r_w - r_l)
        m = torch.sigmoid(z / 1.5)
        return -(1 - m) * torch.sigmoid(z).log() + m * torch.exp(-z)

    check(loss, batch, expected)


# --- LD-DPO and WPO -----------------------------------------------------------------------------------------------------------


def ld_weights(batch: Batch, alpha: float) -> Tensor:
    """(S, T) token by token: the n-th that counts weighs `alpha` if the other sequence of the pair has fewer than n."""
    weights = torch.full(batch.labels.shape, math.nan, dtype=fp64)
    counts = (batch.labels[:, 1:] != IGNORE).sum(-1).tolist()
    half = len(counts) // 2
    for s, row in enumerate(batch.labels.tolist()):
        n = 0
        for t, label in enumerate(row):
            if t and label != IGNORE:
                n += 1
                weights[s, t] = 1.0 if n <= counts[(s + half) % len(counts)] else alpha
    return weights


@backends
@families
@pytest.mark.parametrize("layout", ["padded", "packed", "interleaved"])
@pytest.mark.parametrize("options", [{}, {"loss_type": "ipo"}, {"average_log_prob": True}], ids=["sigmoid", "ipo", "average"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_ld_dpo(ld_alpha: float, options: dict[str, Any], layout: str, family: str, backend: str) -> None:
    """Weights of log-ratio and KL, the same for both; given weights come on top."""
    batch = make_batch(seed=70, holes=0.2)
    weights = ld_weights(batch, ld_alpha)
    assert (weights == ld_alpha).any()
    extra = torch.rand(batch.labels.shape).double()
    kl_weights = {} if family == "dpo" else {"kl_weights": weights}
    expected, expected_grad = run(make(family, backend=backend, **options), batch, token_weights=weights * extra, **kl_weights)
    keywords = {"token_weights": extra}
    if layout == "interleaved":
        order = [s for p in range(4) for s in (p, p + 4)]
        batch = Batch(*(x[order] for x in batch[:3]), tuple(batch.lengths[s] for s in order))
        keywords["token_weights"], expected_grad = extra[order], expected_grad[order]
    if layout == "packed":
        keywords = {"token_weights": batch.pack(extra), "cu_seqlens": batch.cu_seqlens()}
        expected_grad, batch = batch.pack(expected_grad), batch.packed()
    loss = make(family, ld_alpha=ld_alpha, interleaved=layout == "interleaved", backend=backend, **options)
    out, grad = run(loss, batch, **keywords)
    near("losses", out.losses, expected.losses)
    near("gradient", grad, expected_grad)
    near("log-probabilities, which stay plain", out.chosen_logps, expected.chosen_logps)
    if family != "dpo":
        near("KL", out.rejected_kl, expected.rejected_kl)


@backends
@families
@pytest.mark.parametrize("name", ["sigmoid", "nca_pair", "ipo", "apo_down"])
@pytest.mark.parametrize("average", [False, True], ids=["", "average"])
def test_wpo(average: bool, name: str, family: str, backend: str) -> None:
    """A constant factor: exp of the mean of log p(y) − log Σ p² over the tokens of both sequences."""
    batch = make_batch(seed=71, holes=0.2)
    loss = make(family, beta=0.3, loss_type=name, use_weighting=True, average_log_prob=average, backend=backend)
    log_p = batch.policy[:, :-1].log_softmax(-1)
    mask = batch.labels[:, 1:] != IGNORE
    likelihood = log_p.gather(-1, batch.labels[:, 1:, None].clamp(min=0))[..., 0] - (log_p.exp() ** 2).sum(-1).log()
    mean = torch.where(mask, likelihood, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)
    factor = mean.view(2, -1).sum(0).exp()
    assert factor.max() / factor.min() > 1.5
    out = check(loss, batch, lambda x: factor * literal(name, *ratios(x, batch, family, average=average), 0.3))
    assert not any("sq_probs" in metric for metric in out.metrics)


# --- f-DPO --------------------------------------------------------------------------------------------------------------------

DIVERGENCES: dict[str, tuple[float | None, Callable[[Tensor], Tensor]]] = {
    # α, f' of the paper's table 1 at u = e^ρ
    "reverse_kl": (None, lambda u: u.log() + 1),
    "forward_kl": (None, lambda u: -1 / u),
    "js": (None, lambda u: (2 * u / (1 + u)).log()),
    "alpha": (0.3, lambda u: (1 - u**-0.3) / 0.3),
}
divergences = pytest.mark.parametrize("divergence", DIVERGENCES)
F_LOSSES = [name for name, form in PAIR_FORMS.items() if form.kind == "margin"]


@divergences
def test_scores_are_f_prime(divergence: str) -> None:
    """Up to the constant that makes s(0) = 0, as TRL has it; it matters where scores are divided by different lengths."""
    alpha, derivative = DIVERGENCES[divergence]
    rho = torch.linspace(-4, 4, 41, dtype=fp64).requires_grad_()
    scores = f_dpo_scores(rho, divergence, alpha)
    near("scores", scores, derivative(rho.exp()) - derivative(torch.ones((), dtype=fp64)), 1e-12)
    assert torch.autograd.gradcheck(lambda rho: f_dpo_scores(rho, divergence, alpha), rho)
    assert f_dpo_scores(torch.zeros(1, dtype=fp64), divergence, alpha) == 0


def test_alpha_lies_between_reverse_and_forward_kl() -> None:
    rho = torch.linspace(-3, 3, 13, dtype=fp64)
    near("α → 0", f_dpo_scores(rho, "alpha", 1e-9), f_dpo_scores(rho, "reverse_kl"), 1e-8)
    near("α → 1", f_dpo_scores(rho, "alpha", 1 - 1e-9), f_dpo_scores(rho, "forward_kl"), 1e-7)


@backends
@divergences
@pytest.mark.parametrize("name", F_LOSSES)
def test_f_dpo(name: str, divergence: str, backend: str) -> None:
    """Scores where DPO has log-ratios; rewards stay β ρ."""
    batch, smoothing = make_batch(seed=72), SMOOTHING.get(name, 0.0)
    alpha, derivative = DIVERGENCES[divergence]
    options = {"f_divergence": divergence, "f_alpha": alpha, "label_smoothing": smoothing, "backend": backend}
    loss = DPOLoss(0.3, loss_type=name, **options)

    def expected(x: Tensor) -> Tensor:
        r_w, r_l, *counts = ratios(x, batch, "dpo")
        scores = [derivative(r.exp()) - derivative(torch.ones((), dtype=fp64)) for r in (r_w, r_l)]
        return literal(name, *scores, *counts, 0.3, smoothing)

    out = check(loss, batch, expected)
    r_w, r_l, *_ = ratios(batch.policy, batch, "dpo")
    near("rewards", torch.cat([out.chosen_rewards, out.rejected_rewards]), 0.3 * torch.cat([r_w, r_l]))


@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", None), ("alpha", 0.5)])
def test_overflow_is_never_silent(divergence: str, alpha: float | None) -> None:
    """Two sequences of log-ratio −200 and 1: without a bound the loss is not finite, with one it is, and the output says so."""
    options = {"f_divergence": divergence, "f_alpha": alpha}
    policy = torch.zeros(2, 2, 2)
    policy[0, 0, 0] = -200.0
    labels = torch.tensor([[IGNORE, 0], [IGNORE, 0]])
    ref_logps = torch.tensor([0.0, -1.0 + math.log(0.5)])
    out, _ = value_and_grad(lambda x: DPOLoss(**options)(x, None, labels, ref_logps=ref_logps), policy)
    assert not out.loss.isfinite()
    assert "f_divergence/clamped" not in out.metrics
    out, grad = value_and_grad(lambda x: DPOLoss(**options, f_max_exponent=20.0)(x, None, labels, ref_logps=ref_logps), policy)
    scale = alpha or 1.0
    score = [(1 - math.exp(20.0)) / scale, (1 - math.exp(-scale)) / scale]
    near("loss", out.loss, torch.tensor(0.1 * (score[1] - score[0])), 1e-5)
    assert out.metrics["f_divergence/clamped"] == 0.5
    assert_exactly_zero("gradient beyond the bound", grad[0])
    assert grad[1].any()


# --- refused ----------------------------------------------------------------------------------------------------------------

REFUSED: list[Any] = [
    (DPOLoss, {"loss_type": "exo_pair"}, r"(?s)exo_pair.*label_smoothing"),
    (TDPOLoss, {"loss_type": ["sigmoid", "exo_pair"]}, r"(?s)exo_pair.*label_smoothing"),
    (DPOLoss, {"loss_type": "nca_pair", "label_smoothing": 0.1}, r"label_smoothing"),
    (DPOLoss, {"loss_type": ["sigmoid", "sigmod"]}, r"(?s)loss_type.*sigmod"),
    (DPOLoss, {"loss_type": []}, r"loss_type"),
    (DPOLoss, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, r"(?s)loss_weights.*2"),
    (DPOLoss, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, math.nan]}, r"loss_weights"),
    (DPOLoss, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, "a"]}, r"loss_weights"),
    (DPOLoss, {"loss_type": "discopop", "discopop_tau": 0.0}, r"discopop_tau"),
    (DPOLoss, {"discopop_tau": 0.1}, r"(?s)discopop_tau.*discopop"),
    (DPOLoss, {"ld_alpha": 1.5}, r"ld_alpha"),
    (TDPOLoss, {"ld_alpha": -0.1}, r"ld_alpha"),
    (DPOLoss, {"use_weighting": True, "loss_type": "aot"}, r"(?s)use_weighting.*aot"),
    (TDPOLoss, {"use_weighting": True, "loss_type": ["sigmoid", "sft"]}, r"(?s)use_weighting.*sft"),
    (DPOLoss, {"f_divergence": "js", "loss_type": "nca_pair"}, r"(?s)f_divergence.*nca_pair"),
    (DPOLoss, {"f_divergence": "js", "loss_type": "sft"}, r"(?s)f_divergence.*sft"),
    (DPOLoss, {"f_divergence": "js", "f_max_exponent": 20.0}, r"f_max_exponent"),
    (DPOLoss, {"f_divergence": "forward_kl", "f_max_exponent": 0.0}, r"f_max_exponent"),
    (DPOLoss, {"f_divergence": "alpha", "f_alpha": 1.0}, r"f_alpha"),
    (DPOLoss, {"f_divergence": "forward_kl", "f_alpha": 0.5}, r"f_alpha"),
    (DPOLoss, {"extras": ("log_sum_sq_probs",)}, r"(?s)extras.*'entropy'"),
    (TDPOLoss, {"extras": "entropy"}, r"extras"),
    (TDPOLoss, {"extras": ("entropy", "entropy")}, r"extras"),
    (LinearDPOLoss, {"loss_type": "aot", "engine": "one_pass"}, r"(?s)one_pass.*aot.*recompute"),
    (LinearTDPOLoss, {"loss_type": "aot_unpaired", "engine": "one_pass"}, r"(?s)one_pass.*aot_unpaired.*recompute"),
    (LinearTDPOLoss, {"loss_type": ("sigmoid", "sft"), "variant": "tdpo1", "engine": "one_pass"}, r"(?s)one_pass.*sft"),
]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [pytest.param(*case, id=f"{case[0].__name__}-" + "-".join(f"{k}={v}" for k, v in case[1].items())) for case in REFUSED],
)
def test_refused_when_the_loss_is_made(make: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_the_recipe_for_differentiable_pairs_runs() -> None:
    """The message of reduction='none', carried out."""
    batch = make_batch(seed=73)
    with pytest.raises(ValueError, match=r"(?s)token_stats.*SequenceSums.*tdpo_log_ratios.*PAIR_LOSSES.*Pairs.*PairOptions"):
        TDPOLoss(reduction="none")
    labels = torch.nn.functional.pad(batch.labels, (0, 1), value=IGNORE)[:, 1:]
    stats = fused_tdpo.token_stats(batch.policy, batch.ref, labels)
    rows = (stats.logp - stats.ref_logp, stats.kl, stats.logp, (labels != IGNORE).double())
    chosen, rejected = fused_tdpo.pair_losses.SequenceSums(*(row.sum(-1) for row in rows)).split()
    found = fused_tdpo.pair_losses.tdpo_log_ratios(chosen, rejected, alpha=0.5)
    losses = PAIR_LOSSES["ipo"](Pairs(*found, chosen.num_tokens, rejected.num_tokens), PairOptions(0.1))
    near("losses", losses, TDPOLoss(loss_type="ipo")(*batch[:3]).losses)
