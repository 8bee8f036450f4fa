"""The tables of docs/parity.md: every loss beside TRL's, Liger's and its paper's, by value and gradient, and numbers by hand.

    python tests/parity_table.py       measures on the CPU and rewrites the tables in docs/parity.md

TRL computes its DPO loss in one method of its trainer. It runs here on a stub of that, whose model hands out what TRL's fused
head would, from logits of ours. Liger takes hidden states. Papers are formulas written as printed, on sums that
`official_tdpo.expected_sums` makes without this package. An error is |ours − theirs| over |theirs|, of a gradient the largest
of both over all elements; the worst of two batches is shown.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import zip_longest
from math import exp, inf, log, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fused_tdpo
from accuracy_table import section
from fused_tdpo.pair_losses import PAIR_LOSSES, SMOOTHED, PairOptions, Pairs, f_dpo_scores
from official_tdpo import IGNORE, Batch, expected_sums, make_batch, official_tdpo, value_and_grad

PARITY = Path(__file__).resolve().parents[1] / "docs" / "parity.md"

BETA = 0.3
SEEDS = (62, 64)
"""Of batches without an empty sequence."""


# ----------------------------------------------------------------------------------------------------------------- the papers


Numbers = SimpleNamespace
"""What a formula may use: vectors (P,) in float64, _w of chosen and _l of rejected sequences, and the options of the loss.

    r_w = log π(y_w|x) − log π_ref(y_w|x), for f-DPO f'(π/π_ref) in its place · n_w = |y_w|, tokens
    p_w = log π(y_w|x) · q_w = log π_ref(y_w|x)
"""


def logσ(z: Tensor) -> Tensor:
    return torch.sigmoid(z).log()


def smoothed(z: Tensor, epsilon: float) -> Tensor:
    """−(1 − ε) log σ(z) − ε log σ(−z)."""
    return -(1 - epsilon) * logσ(z) - epsilon * logσ(-z)


def in_order(values: Tensor) -> Tensor:
    return torch.stack(sorted(values))


def kl_of_pairs(p: Tensor, epsilon: float) -> Tensor:
    """KL((p, 1 − p) ‖ (1 − ε, ε))."""
    return p * (p / (1 - epsilon)).log() + (1 - p) * ((1 - p) / epsilon).log()


def discopop(z: Tensor, tau: float) -> Tensor:
    m = torch.sigmoid(z / tau)
    return (1 - m) * -logσ(z) + m * torch.exp(-z)


def nll(x: Numbers) -> Tensor:
    """−log π(y_w|x) per token, over all chosen tokens."""
    return -x.p_w.sum() / x.n_w.sum()


def powers(mean: Tensor, alpha: float) -> Tensor:
    return (1 - mean.exp() ** -alpha) / alpha


def odds(mean: Tensor) -> Tensor:
    return mean.exp() / (1 - mean.exp())


PAPERS: dict[str, tuple[str, Callable[[Numbers], Tensor]]] = {
    "sigmoid": ("2305.18290, eq. 7", lambda x: smoothed(x.beta * x.r_w - x.beta * x.r_l, x.label_smoothing)),
    "sigmoid_norm": ("2411.15124", lambda x: -logσ(x.beta / x.n_w * x.r_w - x.beta / x.n_l * x.r_l)),
    "ipo": ("2310.12036, eq. 17", lambda x: (x.r_w / x.n_w - x.r_l / x.n_l - 1 / (2 * x.beta)) ** 2),
    "hinge": ("2305.10425", lambda x: (1 - x.beta * (x.r_w - x.r_l)).clamp(min=0)),
    "robust": (
        "2403.00409",
        lambda x: (
            ((1 - x.label_smoothing) * -logσ(x.beta * (x.r_w - x.r_l)) - x.label_smoothing * -logσ(x.beta * (x.r_l - x.r_w)))
            / (1 - 2 * x.label_smoothing)
        ),
    ),
    "exo_pair": ("2402.00856, eq. 16", lambda x: kl_of_pairs(torch.sigmoid(x.beta * (x.r_w - x.r_l)), x.label_smoothing)),
    "discopop": ("2406.08414, eq. 5", lambda x: discopop(x.beta * (x.r_w - x.r_l), x.discopop_tau)),
    "nca_pair": (
        "2402.05369",
        lambda x: -logσ(x.beta * x.r_w) - (logσ(-x.beta * x.r_w) + logσ(-x.beta * x.r_l)) / 2,
    ),
    "bco_pair": ("2404.04656", lambda x: -logσ(x.beta * x.r_w) - logσ(-x.beta * x.r_l)),
    "sppo_hard": ("2405.00675, eq. 4.7", lambda x: (x.r_w - 1 / (2 * x.beta)) ** 2 + (x.r_l + 1 / (2 * x.beta)) ** 2),
    "apo_zero": ("2408.06266, eq. 7", lambda x: 1 - torch.sigmoid(x.beta * x.r_w) + torch.sigmoid(x.beta * x.r_l)),
    "apo_down": (
        "2408.06266, eq. 8",
        lambda x: torch.sigmoid(x.beta * x.r_w) + 1 - torch.sigmoid(x.beta * (x.r_w - x.r_l)),
    ),
    "sft": ("", nll),
    "aot": (
        "2406.05882",
        lambda x: smoothed(x.beta * (in_order(x.p_w - x.p_l) - in_order(x.q_w - x.q_l)), x.label_smoothing),
    ),
    "aot_unpaired": ("2406.05882", lambda x: smoothed(x.beta * (in_order(x.r_w) - in_order(x.r_l)), x.label_smoothing)),
    "SimPOLoss": (
        "2405.14734, eq. 6",
        lambda x: smoothed(x.beta / x.n_w * x.p_w - x.beta / x.n_l * x.p_l - x.gamma, x.label_smoothing) + x.cpo_alpha * nll(x),
    ),
    "AlphaPO": (
        "2501.03884",
        lambda x: smoothed(
            x.beta * (powers(x.p_w / x.n_w, x.alpha) - powers(x.p_l / x.n_l, x.alpha)) - x.gamma, x.label_smoothing
        ),
    ),
    "CPOLoss": (
        "2401.08417, eq. 3",
        lambda x: smoothed(x.beta * x.p_w - x.beta * x.p_l, x.label_smoothing) + x.cpo_alpha * nll(x),
    ),
    "ORPOLoss": (
        "2403.07691, eq. 6, 7",
        lambda x: nll(x) - x.beta * logσ((odds(x.p_w / x.n_w) / odds(x.p_l / x.n_l)).log()),
    ),
    "KTOLoss": (
        "2402.01306, eq. 7, 8",
        lambda x: torch.cat(
            [1 - torch.sigmoid(x.beta * (x.r_w - x.reference_point)), 1 - torch.sigmoid(x.beta * (x.reference_point - x.r_l))]
        ),
    ),
    "apo_zero_unpaired": (
        "2408.06266, eq. 7",
        lambda x: torch.cat([1 - torch.sigmoid(x.beta * x.r_w), torch.sigmoid(x.beta * x.r_l)]),
    ),
    "BCOLoss": (
        "2404.04656",
        lambda x: torch.cat([-logσ(x.beta * x.r_w - x.reference_point), -logσ(-(x.beta * x.r_l - x.reference_point))]),
    ),
}
"""Loss type or class -> arXiv number with equation, and that as printed, but for lengths, which TRL divides by in "ipo", and
the NLL of CPO and ORPO: all code takes the mean over a batch's tokens, where the papers sum or average response by response."""

F_PRIME: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda u, alpha: u.log() + 1,
    "forward_kl": lambda u, alpha: -1 / u,
    "js": lambda u, alpha: (2 * u / (1 + u)).log(),
    "alpha": lambda u, alpha: (1 - u**-alpha) / alpha,
}
"""f'(u), arXiv 2309.16240, table 1."""


def ld_weights(labels: Tensor, alpha: float) -> Tensor:
    """LD-DPO, arXiv 2409.06411: of the tokens of a sequence those beyond the number of the pair's shorter one weigh α."""
    counted = [[t for t, label in enumerate(row) if t and label != IGNORE] for row in labels.tolist()]
    weights, half = torch.ones(labels.shape, dtype=torch.float64), len(counted) // 2
    for s, positions in enumerate(counted):
        weights[s, positions[len(counted[(s + half) % len(counted)]) :]] = alpha
    return weights


def wpo_weights(policy: Tensor, labels: Tensor) -> Tensor:
    """WPO, arXiv 2406.11827, eq. 2: exp of the mean over tokens of log π(y) − log Σ π², the product of both sequences."""
    log_p = policy.detach()[:, :-1].log_softmax(-1)
    rows = log_p.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0] - (log_p.exp() ** 2).sum(-1).log()
    counts = labels[:, 1:] != IGNORE
    w, l = (torch.where(counts, rows, 0.0).sum(-1) / counts.sum(-1).clamp(min=1)).exp().chunk(2)  # noqa: E741
    return w * l


def ti_dpo(policy: Tensor, ref: Tensor, labels: Tensor, x: Numbers) -> Tensor:
    """TI-DPO, arXiv 2505.19653, eq. 11 to 14, its base TDPO2 (α = ½); anchors are the rejected responses in reverse order."""
    log_p, log_q = policy[:, :-1].log_softmax(-1), ref[:, :-1].log_softmax(-1)
    rows = (log_p - log_q).gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0]
    b_c = [[rows[s, t] for t, label in enumerate(row[1:]) if label != IGNORE] for s, row in enumerate(labels.tolist())]
    triplets, P = [], len(labels) // 2
    for b, c, d in zip(b_c[:P], b_c[P:], reversed(b_c[P:]), strict=True):
        near, far = (sum((v - w) ** 2 for v, w in zip(d, other, strict=False)) for other in (b, c))
        triplets.append((near - far + x.margin).clamp(min=0))
    weighted = x.r_w - x.r_l - 0.5 * (x.k_l - x.k_w.detach())
    return -logσ(x.beta * weighted) + x.gamma * torch.stack(triplets)


def by_formula(row: "Row", batch: Batch, policy: Tensor) -> Tensor:
    """The loss of a row at the policy's logits, from `PAPERS`, or for TDPO from the authors' code."""
    ref, labels, options = batch.ref, batch.labels, row.options
    if row.loss == "TDPOLoss":
        return official_tdpo(policy, ref, labels, beta=BETA, alpha=0.5, tdpo2=options["variant"] == "tdpo2").loss
    weights = ld_weights(labels, options["ld_alpha"]) if "ld_alpha" in options else row.token_weights(labels)
    sums = expected_sums(policy, ref, labels, token_weights=weights)
    f_prime, alpha = F_PRIME[options.get("f_divergence", "reverse_kl")], options.get("f_alpha")
    score = f_prime(sums.ratio.exp(), alpha) - f_prime(torch.ones((), dtype=torch.float64), alpha)
    vectors = {"r": score, "n": sums.lengths, "p": sums.logps, "q": sums.ref_logps, "k": sums.kl}
    halves = {f"{name}_{side}": half for name, both in vectors.items() for side, half in zip("wl", both.chunk(2), strict=True)}
    defaults = {"beta": BETA, "label_smoothing": 0.0, "discopop_tau": 0.05, "cpo_alpha": 0.0}
    x = Numbers(**halves, **defaults | row.call | options)
    if row.loss == "TIDPOLoss":
        return ti_dpo(policy, ref, labels, x).mean()
    names = options.get("loss_type", "sigmoid") if row.loss == "DPOLoss" else row.paper or row.loss
    names = (names,) if isinstance(names, str) else names
    factor = wpo_weights(policy, labels) if options.get("use_weighting") else 1.0
    weighted = zip_longest(names, options.get("loss_weights") or (), fillvalue=1.0)
    parts = [weight * (factor * PAPERS[name][1](x)).mean() for name, weight in weighted]
    return sum(parts[1:], parts[0])


# ------------------------------------------------------------------------------------------------------------------------ TRL


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


TRL_DIVERGENCE = {"js": "js_divergence", "alpha": "alpha_divergence"}


class Stub:
    """The attributes of a trainer that its `_compute_loss` reads. `options` are those of our loss."""

    def __init__(self, batch: Batch, **options: Any) -> None:
        names = options.pop("loss_type", "sigmoid")
        self.loss_types = [names] if isinstance(names, str) else list(names)
        self.loss_weights = options.pop("loss_weights", None) or [1.0] * len(self.loss_types)
        self.args = SimpleNamespace(discopop_tau=options.pop("discopop_tau", 0.05), gradient_checkpointing_kwargs=None)
        divergence = options.pop("f_divergence", "reverse_kl")
        self.f_divergence_type = TRL_DIVERGENCE.get(divergence, divergence)
        self.f_alpha_divergence_coef = 1 - (options.pop("f_alpha", None) or 0.5)
        self.ld_alpha, self.use_weighting, self.label_smoothing = None, False, 0.0
        self.aux_loss_enabled = self.precompute_ref_logps = False
        vars(self).update({"beta": BETA} | options)
        self.model = torch.nn.Identity()
        self.model.is_gradient_checkpointing = False
        self.ref_model = lambda labels, **_: fused_head(batch.ref, labels)
        alone = lambda value: value  # noqa: E731
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=alone, gather_for_metrics=alone)
        self._metrics: Any = {"train": defaultdict(list)}
        self._total_train_tokens, self._tp_size = 0, 1

    def loss(self, batch: Batch, trainer: Any = None, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The loss of a trainer, DPO's by default, and its gradient at the policy's logits."""
        from trl import DPOTrainer

        ids = batch.labels.clamp(min=0)
        completion_mask = (batch.labels != IGNORE).long()
        completion_mask[:, 0] = 0  # a token that nothing predicts
        inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion_mask}

        def step(x: Tensor) -> Tensor:
            return (trainer or DPOTrainer)._compute_loss(self, lambda labels, **_: fused_head(x, labels), inputs, False)

        return value_and_grad(step, batch.policy)

    @property
    def metrics(self) -> dict[str, float]:
        """What it logged."""
        return {name: values[0] for name, values in self._metrics["train"].items()}


def by_trl_dpo(row: "Row", batch: Batch) -> tuple[Tensor, Tensor]:
    return Stub(batch, **row.options).loss(batch)


def by_trl_cpo(row: "Row", batch: Batch) -> tuple[Tensor, Tensor]:
    """CPO, and SimPO as a loss type of it."""
    from trl.experimental.cpo import CPOTrainer

    from test_reference_free import beside_trl

    simpo, o = row.loss == "SimPOLoss", row.options
    attributes = {
        "beta": o.get("beta", BETA),
        "loss_type": "simpo" if simpo else o.get("loss_type", "sigmoid"),
        "simpo_gamma": o.get("gamma"),
        "label_smoothing": o.get("label_smoothing", 0.0),
        "alpha": o.get("alpha", 0.0) if simpo else 0.0,
        "cpo_alpha": o.get("cpo_alpha", 0.0),
        "pad_token_id": 0,
    }
    return beside_trl(CPOTrainer, attributes, batch)[:2]


def by_trl_orpo(row: "Row", batch: Batch) -> tuple[Tensor, Tensor]:
    from trl.experimental.orpo import ORPOTrainer

    from test_reference_free import beside_trl

    return beside_trl(ORPOTrainer, {"beta": BETA, "padding_value": 0}, batch)[:2]


def by_trl_kto(row: "Row", batch: Batch) -> tuple[Tensor, Tensor]:
    from trl import KTOTrainer

    kappa = torch.tensor([row.call.get("reference_point", 0.0)], dtype=torch.float64)
    stub = Stub(batch, desirable_weight=1.0, undesirable_weight=1.0, calculate_KL=bool(row.call))
    stub.loss_type = row.options.get("loss_type", "kto")
    stub._compute_kl_logps = lambda model, _: 0 * kappa if model is stub.ref_model else kappa
    return stub.loss(batch, KTOTrainer, label=desirable(batch.labels))


BY_TRL = {"DPO": by_trl_dpo, "CPO": by_trl_cpo, "ORPO": by_trl_orpo, "KTO": by_trl_kto}
"""Its trainer -> loss and gradient of a row at the policy's logits."""


# ---------------------------------------------------------------------------------------------------------------------- Liger


def by_liger(row: "Row", x: "Hidden") -> Callable[[Tensor, Tensor], Tensor]:
    """Its loss of hidden states and weight. It takes labels that are shifted already."""
    import liger_kernel.chunked_loss as liger

    o, target = {"beta": BETA} | row.options, x.labels[:, 1:]
    ref = (x.ref_hidden[:, :-1], x.ref_weight)
    if row.liger == "DPO":
        dpo = liger.LigerFusedLinearDPOLoss(**{"average_log_prob": False, "compiled": False} | o)
        return lambda h, w: dpo(w, h[:, :-1], target, None, *ref)[0]
    if row.liger == "KTO":
        kto = liger.LigerFusedLinearKTOLoss(beta=o["beta"], compiled=False, use_ref_model=True)
        kappa = torch.tensor(row.call["reference_point"]) if row.call else None
        more = {"ref_input": ref[0], "ref_weight": ref[1], "kl": kappa}
        return lambda h, w: kto(h[:, :-1], w, target, preference_labels=desirable(target), **more)[0]
    if row.liger in ("SimPO", "CPO"):
        o["alpha"] = o.pop("cpo_alpha", 0.0)
        o["compute_nll_loss"] = o["alpha"] > 0
    loss = getattr(liger, f"LigerFusedLinear{row.liger}Loss")(compiled=False, **o)
    return lambda h, w: loss(w, h[:, :-1], target)[0]


# ------------------------------------------------------------------------------------------------------------------- the rows


def desirable(labels: Tensor) -> Tensor:
    """(S,): the first half, which is chosen where there are pairs."""
    return torch.arange(len(labels)) < len(labels) // 2


@dataclass(frozen=True)
class Row:
    """A loss with options, and who computes the same."""

    options: dict[str, Any]
    loss: str = "DPOLoss"
    trl: str = "DPO"
    """Its trainer; "" for none."""
    liger: str = ""
    source: str = ""
    note: str = ""
    call: dict[str, Any] = field(default_factory=dict)
    """What its call takes besides."""
    paper: str = ""
    """The key of its formula, where that is not the class or loss type."""

    @property
    def name(self) -> str:
        """As it is shown, and found again."""
        options = self.options | self.call
        names = options.pop("loss_type", "") if self.loss == "DPOLoss" else ""
        shown = [names if isinstance(names, str) else "(" + ", ".join(names) + ")"] if names else []
        text = ", ".join([*shown, *(f"{name}={value!r}" for name, value in options.items())])
        return f"`{text}`" if self.loss == "DPOLoss" else f"`{self.loss}({text})`"

    @property
    def double(self) -> bool:
        """Whether TRL takes float64."""
        return self.options.get("f_divergence") != "alpha" and self.trl != "ORPO"

    def batch(self, seed: int, dtype: torch.dtype = torch.float64) -> Batch:
        """TRL's ORPO has the prompt in its NLL: of one token at most there is nothing to predict in it."""
        if self.loss == "ORPOLoss":
            return make_batch(((1, 3), (0, 4), (1, 2), (0, 2), (1, 5), (1, 2)), seed=seed, dtype=dtype)
        return make_batch(seed=seed, holes=0.2, dtype=dtype)

    def token_weights(self, labels: Tensor) -> Tensor | None:
        return torch.linspace(0.5, 1.5, labels.numel()).view_as(labels).double() if self.loss == "TIDPOLoss" else None

    def ours(self, policy: tuple[Tensor, ...], ref: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Our loss, of logits (each of one tensor) or of hidden states and weight."""
        loss = getattr(fused_tdpo, ("Linear" if len(policy) == 2 else "") + self.loss)(**{"beta": BETA} | self.options)
        if self.loss in ("SimPOLoss", "CPOLoss", "ORPOLoss"):
            return loss(*policy, labels).loss
        if self.loss in ("KTOLoss", "BCOLoss"):
            return loss(*policy, *ref, labels, desirable(labels), **self.call).loss
        if self.loss == "TIDPOLoss":
            P, weights = len(labels) // 2, self.token_weights(labels)
            anchor = tuple(part[P:].flip(0) for part in (policy[0], ref[0], labels))
            return loss(*policy, *ref, labels, token_weights=weights, anchor=anchor).loss
        return loss(*policy, *ref, labels).loss


LIGER = (
    "sigmoid", "hinge", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
)  # fmt: skip
MPO: dict[str, Any] = {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)}
SMOOTHING: dict[str, Any] = {"exo_pair": {"label_smoothing": 0.05}, "robust": {"label_smoothing": 0.1}}
NOTES = {
    "exo_pair": "TRL and Liger round ε to float32",
    "hinge": "on log-ratios, as TRL",
    "ipo": "by length, as TRL; the paper sums",
    "sft": "the mean over chosen tokens",
}


def rows() -> Iterator[Row]:
    """Every loss that there is. KeyError: a loss type of which `PAPERS` has no formula."""
    for name in PAIR_LOSSES:
        options, liger = {"loss_type": name} | SMOOTHING.get(name, {}), "DPO" if name in LIGER else ""
        yield Row(options, liger=liger, source=PAPERS[name][0], note=NOTES.get(name, ""))
    cdpo = {"loss_type": "sigmoid", "label_smoothing": 0.2}
    yield Row(cdpo, trl="", source=PAPERS["sigmoid"][0], note="cDPO; TRL and Liger take no ε here")
    for name in ("aot", "aot_unpaired"):
        yield Row({"loss_type": name, "label_smoothing": 0.2}, source=PAPERS[name][0])
    f_dpo = "2309.16240, table 1"
    yield Row({"f_divergence": "forward_kl"}, source=f_dpo)
    yield Row({"f_divergence": "js"}, source=f_dpo)
    for alpha in (0.3, 0.8):
        note = f"TRL's coefficient {1 - alpha:.1f}, in float32"
        yield Row({"f_divergence": "alpha", "f_alpha": alpha}, source=f_dpo, note=note)
    yield Row(MPO, source="2411.10442", note="MPO")
    yield Row({"ld_alpha": 0.3}, source="2409.06411", note="LD-DPO")
    yield Row({"use_weighting": True}, source="2406.11827, eq. 2", note="WPO")
    for variant, equations in (("tdpo1", "eq. 15"), ("tdpo2", "eq. 17, 18")):
        yield Row({"variant": variant}, "TDPOLoss", "", source=f"2404.11999, {equations}", note="the authors' code")
    ti_dpo = {"gamma": 0.1, "margin": 0.01}
    yield Row(ti_dpo, "TIDPOLoss", "", source="2505.19653, eq. 11 to 14", note="with weights and anchors")

    simpo = {"beta": 2.0, "gamma": 0.5}
    for more, liger, paper, note in (
        ({}, "SimPO", "SimPOLoss", ""),
        ({"label_smoothing": 0.1}, "SimPO", "SimPOLoss", ""),
        ({"cpo_alpha": 1.0}, "SimPO", "SimPOLoss", "CPO-SimPO"),
        ({"alpha": 0.25}, "", "AlphaPO", "AlphaPO"),
    ):
        yield Row(simpo | more, "SimPOLoss", "CPO", liger, PAPERS[paper][0], note, paper=paper)
    yield Row(
        {"cpo_alpha": 1.0}, "CPOLoss", "CPO", "CPO", PAPERS["CPOLoss"][0], "NLL a mean over tokens, as TRL; the paper sums"
    )
    yield Row({}, "ORPOLoss", "ORPO", "ORPO", PAPERS["ORPOLoss"][0], "TRL takes the odds in float32; NLL a mean over tokens")
    kappa = {"reference_point": 0.3}
    yield Row({}, "KTOLoss", "KTO", "KTO", PAPERS["KTOLoss"][0], call=kappa)
    apo = {"loss_type": "apo_zero_unpaired"}
    yield Row(apo, "KTOLoss", "KTO", "KTO", PAPERS["apo_zero"][0], "not of pairs", paper="apo_zero_unpaired")
    yield Row({}, "BCOLoss", "", source=PAPERS["BCOLoss"][0], call=kappa)


ROWS = list(rows())


# ------------------------------------------------------------------------------------------------------------- the comparison


class Found(NamedTuple):
    """A loss, and its gradients."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


class Hidden(NamedTuple):
    """What a loss from hidden states takes."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor

    def found(self, loss: Callable[[Tensor, Tensor], Tensor]) -> Found:
        """Of a function of the policy's hidden states and weight."""
        leaves = [tensor.clone().requires_grad_() for tensor in self[:2]]
        value = loss(*leaves)
        return Found(value.detach(), torch.autograd.grad(value, leaves))


def make_hidden(row: Row, seed: int, dtype: torch.dtype) -> Hidden:
    labels = row.batch(seed).labels
    gen = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(*labels.shape, 6, generator=gen).to(dtype) for _ in range(2)]
    weights = [torch.randn(23, 6, generator=gen).to(dtype) for _ in range(2)]
    return Hidden(hidden[0], weights[0], hidden[1], weights[1], labels)


def at_logits(loss: Callable[[Tensor], Tensor], batch: Batch) -> Found:
    value, gradient = value_and_grad(loss, batch.policy)
    return Found(value.detach(), (gradient,))


def beside_trl(row: Row, seed: int) -> tuple[Found, Found] | None:
    if not row.trl:
        return None
    batch = row.batch(seed, torch.float64 if row.double else torch.float32)
    loss, gradient = BY_TRL[row.trl](row, batch)
    return at_logits(lambda x: row.ours((x,), batch[1:2], batch.labels), batch), Found(loss.detach(), (gradient,))


def beside_liger(row: Row, seed: int) -> tuple[Found, Found] | None:
    """In float32, which its log-probabilities are in."""
    if not row.liger:
        return None
    x = make_hidden(row, seed, torch.float32)
    return x.found(lambda h, w: row.ours((h, w), x[2:4], x.labels)), x.found(by_liger(row, x))


def beside_paper(row: Row, seed: int) -> tuple[Found, Found]:
    batch = row.batch(seed)
    return (
        at_logits(lambda x: row.ours((x,), batch[1:2], batch.labels), batch),
        at_logits(lambda x: by_formula(row, batch, x), batch),
    )


def beside_logits(row: Row, seed: int) -> tuple[Found, Found]:
    """Our loss from hidden states, beside ours from their logits."""
    x = make_hidden(row, seed, torch.float64)
    ref_logits = x.ref_hidden @ x.ref_weight.T
    return (
        x.found(lambda h, w: row.ours((h, w), x[2:4], x.labels)),
        x.found(lambda h, w: row.ours((h @ w.T,), (ref_logits,), x.labels)),
    )


PEERS: dict[str, Callable[[Row, int], tuple[Found, Found] | None]] = {
    "TRL": beside_trl,
    "Liger": beside_liger,
    "paper": beside_paper,
    "hidden states": beside_logits,
}
"""Column -> what is compared with what; None: it does not have that loss."""

FACTOR = 10.0
"""How many times its documented error a loss may be off by, on a machine that sums in another order."""


class Errors(NamedTuple):
    """Relative errors."""

    value: float
    gradient: float


def floor(row: Row, peer: str) -> float:
    """A documented error below it counts as this much: a few roundings."""
    return 1e-6 if peer == "Liger" or (peer == "TRL" and not row.double) else 1e-13


def ceiling(row: Row, peer: str) -> float:
    """What no document may call right."""
    return 1e-4 if floor(row, peer) == 1e-6 else 1e-7 if (peer, row.options.get("loss_type")) == ("TRL", "exo_pair") else 1e-10


def relative(got: Tensor, expected: Tensor) -> float:
    """NaN where there is one, and where nothing is expected to move."""
    return float((got - expected).abs().max() / expected.abs().max())


def measure(row: Row, peer: str) -> Errors | None:
    """The worst of all batches; None where the peer does not have the loss."""
    errors = []
    for seed in SEEDS:
        both = PEERS[peer](row, seed)
        if both is None:
            return None
        got, expected = both
        of_gradients = [relative(*pair) for pair in zip(got.gradients, expected.gradients, strict=True)]
        errors.append((relative(got.loss, expected.loss), *of_gradients))
    worst = torch.tensor(errors, dtype=torch.float64).amax(0).tolist()  # which keeps a NaN, as max() does not
    return Errors(worst[0], float(torch.tensor(worst[1:], dtype=torch.float64).max()))


def within(measured: float, written: float, least: float, most: float) -> bool:
    """Whether an error is as it is documented, with room for another machine. False of any NaN."""
    return written <= most and measured <= FACTOR * (least if written < least else written)


# ------------------------------------------------------------------------------------------------------------- numbers by hand

LETTERS: dict[str, Any] = {
    "log": log, "exp": exp, "sqrt": sqrt, "oo": inf, "β": 0.1, "ε": 0.05, "τ": 0.05, "n_w": 2, "n_l": 4, "V": 7,
}  # fmt: skip
"""What the expressions below may use: β, label smoothing, DiscoPOP's τ, numbers of tokens, size of the vocabulary."""

AT_REFERENCE = {
    "sigmoid": ("log(2)", "-β*(1 - 2*ε)/2", "β*(1 - 2*ε)/2"),
    "sigmoid_norm": ("log(2)", "-β/(2*n_w)", "β/(2*n_l)"),
    "ipo": ("1/(4*β**2)", "-1/(β*n_w)", "1/(β*n_l)"),
    "hinge": ("1", "-β", "β"),
    "robust": ("log(2)", "-β/(2*(1 - 2*ε))", "β/(2*(1 - 2*ε))"),
    "exo_pair": ("-log(2) - log(ε*(1 - ε))/2", "β/4*log(ε/(1 - ε))", "-β/4*log(ε/(1 - ε))"),
    "discopop": ("log(2)/2 + 1/2", "β*((1 - log(2))/(4*τ) - 3/4)", "-β*((1 - log(2))/(4*τ) - 3/4)"),
    "nca_pair": ("2*log(2)", "-β/4", "β/4"),
    "bco_pair": ("2*log(2)", "-β/2", "β/2"),
    "sppo_hard": ("1/(2*β**2)", "-1/β", "1/β"),
    "apo_zero": ("1", "-β/4", "β/4"),
    "apo_down": ("1", "0", "β/4"),
    "sft": ("log(V)", "0", "0"),
    "aot": ("log(2)", "-β*(1 - 2*ε)/2", "β*(1 - 2*ε)/2"),
    "aot_unpaired": ("log(2)", "-β*(1 - 2*ε)/2", "β*(1 - 2*ε)/2"),
}
"""Loss type -> the loss, and its slopes by r_w and by r_l, at step 0: where policy and reference are equal, r_w = r_l = 0."""


def at_reference(name: str) -> tuple[float, float, float]:
    """The loss of a uniform policy and reference, and the slopes of the pair loss there."""
    smoothing = LETTERS["ε"] if name in SMOOTHED else 0.0
    labels = torch.full((2, 5), IGNORE)
    labels[0, 3:], labels[1, 1:] = 1, 1
    logits = torch.zeros(2, 5, LETTERS["V"], dtype=torch.float64)
    loss = fused_tdpo.DPOLoss(LETTERS["β"], loss_type=name, label_smoothing=smoothing)(logits, logits, labels).loss
    r_w, r_l = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    pairs = Pairs(r_w, r_l, LETTERS["n_w"], LETTERS["n_l"], 0 * r_w + log(LETTERS["V"]), torch.zeros(1))
    losses = PAIR_LOSSES[name](pairs, PairOptions(LETTERS["β"], smoothing))
    slopes = torch.autograd.grad(losses, (r_w, r_l), allow_unused=True, materialize_grads=True)
    return float(loss), float(slopes[0]), float(slopes[1])


def two_tokens(loss: str, **options: Any) -> fused_tdpo.PreferenceOutput:
    """A pair of one token each, the first of two words; β = 1. Chosen: π = (1/2, 1/2), π_ref = (1/4, 3/4). Rejected: equal."""
    policy = torch.zeros(2, 2, 2, dtype=torch.float64)
    ref = policy.clone()
    ref[0, 0, 1] = log(3)
    return getattr(fused_tdpo, loss)(1.0, **options)(policy, ref, torch.tensor([[IGNORE, 0], [IGNORE, 0]]))


def uniform(loss: str, reference_point: float | None = None, **options: Any) -> float:
    """The loss of uniform policy and reference, as at step 0, of sequences of equal length; β = 0.1 unless given."""
    logits, labels = torch.zeros(2, 5, LETTERS["V"], dtype=torch.float64), torch.ones(2, 5, dtype=torch.int64)
    call = {} if reference_point is None else {"reference_point": reference_point}
    return float(Row({"beta": LETTERS["β"]} | options, loss, call=call).ours((logits,), (logits,), labels))


def score(rho: float, *options: Any, dtype: torch.dtype = torch.float64) -> float:
    return float(f_dpo_scores(torch.tensor(rho, dtype=dtype), *options))


WORKED: dict[str, tuple[str, Callable[[], float]]] = {
    "TDPO1 at step 0": ("log(2)", lambda: uniform("TDPOLoss", variant="tdpo1")),
    "TDPO2 at step 0": ("log(2)", lambda: uniform("TDPOLoss")),
    "a pair of a token each: K_w = KL((1/4, 3/4) ‖ (1/2, 1/2))": (
        "log(1/2)/4 + 3*log(3/2)/4",
        lambda: float(two_tokens("TDPOLoss").chosen_kl),
    ),
    "… DPO: ρ_w − ρ_l = log 2": ("log(3/2)", lambda: float(two_tokens("DPOLoss").loss)),
    "… TDPO1: ρ_w + K_w = ¾ log 3": ("log(1 + 3**(-3/4))", lambda: float(two_tokens("TDPOLoss", variant="tdpo1").loss)),
    "… TDPO2, α = ½": ("log(1 + 2**(-1/2)*3**(-3/8))", lambda: float(two_tokens("TDPOLoss", alpha=0.5).loss)),
    "… TDPO2's reward, β (ρ_w + K_w), without α": ("3*log(3)/4", lambda: float(two_tokens("TDPOLoss").chosen_rewards)),
    "… f-DPO, forward KL": ("log(1 + exp(-1/2))", lambda: float(two_tokens("DPOLoss", f_divergence="forward_kl").loss)),
    "… f-DPO, Jensen–Shannon": ("log(7/4)", lambda: float(two_tokens("DPOLoss", f_divergence="js").loss)),
    "… f-DPO, α = ½": (
        "log(1 + exp(-(2 - sqrt(2))))",
        lambda: float(two_tokens("DPOLoss", f_divergence="alpha", f_alpha=0.5).loss),
    ),
    "f-DPO's score at ρ = log 2, the paper's α = 0.3": ("(1 - 2**-0.3)/0.3", lambda: score(log(2), "alpha", 0.3)),
    "… as TRL writes it, coefficient 0.7": ("(2**(0.7 - 1) - 1)/(0.7 - 1)", lambda: score(log(2), "alpha", 0.3)),
    "… α = 0.7, which is another one": ("(1 - 2**-0.7)/0.7", lambda: score(log(2), "alpha", 0.7)),
    "forward KL's score in float32 at ρ = −88": ("1 - exp(88)", lambda: score(-88.0, "forward_kl", dtype=torch.float32)),
    "… at ρ = −89": ("-oo", lambda: score(-89.0, "forward_kl", dtype=torch.float32)),
    "… with `f_max_exponent=20`": ("1 - exp(20)", lambda: score(-89.0, "forward_kl", None, 20.0, dtype=torch.float32)),
    "MPO, 0.8 sigmoid + 0.2 bco_pair + sft, at step 0": (
        "0.8*log(2) + 0.2*2*log(2) + log(V)",
        lambda: uniform("DPOLoss", **MPO),
    ),
    "SimPO, β = 2, γ = ½, at step 0": ("log(1 + exp(1/2))", lambda: uniform("SimPOLoss", beta=2.0, gamma=0.5)),
    "CPO, α = 1, at step 0": ("log(2) + log(V)", lambda: uniform("CPOLoss")),
    "ORPO at step 0": ("log(V) + β*log(2)", lambda: uniform("ORPOLoss")),
    "KTO at step 0, κ = 0": ("1/2", lambda: uniform("KTOLoss", reference_point=0.0)),
    "BCO at step 0, δ = 0": ("log(2)", lambda: uniform("BCOLoss", reference_point=0.0)),
    "WPO of a uniform policy: log π(y) − log Σ π² = 0": ("log(2)", lambda: uniform("DPOLoss", use_weighting=True)),
}
"""What -> the number as an expression, and ours."""


def number(expression: str) -> float:
    return float(eval(expression, {"__builtins__": {}}, LETTERS))


def distance(got: float, expected: float) -> float:
    """Relative, absolute from 0; 0 between equal infinities."""
    return 0.0 if got == expected else abs(got - expected) / (abs(expected) or 1.0)


# ------------------------------------------------------------------------------------------------------------------ documents


def table(columns: dict[str, str], lines: list[tuple[str, ...]]) -> str:
    """Markdown, read back by `parse`. `columns`: head -> rule."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (tuple(columns), tuple(columns.values()), *lines))


def parse(name: str, text: str) -> dict[str, list[str]]:
    """First cell -> the others, of the table in a section of docs/parity.md."""
    lines = section(name).search(text).group().strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")]
    return {first: others for first, *others in cells[2:]}


def readable(expression: str) -> str:
    """A Python expression as it is printed."""
    return expression.replace("-oo", "−∞").replace("**2", "²").replace("**", "^").replace("*", "·").replace("-", "−")


def decimal(value: float, digits: int) -> str:
    return f"{value:.{digits}g}".replace("-inf", "−∞").replace("-", "−")


def small(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def show(errors: Errors | None) -> str:
    return "–" if errors is None else ", ".join(map(small, errors))


def read(cell: str) -> Errors | None:
    return None if cell == "–" else Errors(*map(float, cell.split(", ")))


def losses() -> str:
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "trl", "liger-kernel"))
    columns = {"loss": ":--"} | dict.fromkeys(PEERS, "--:") | {"arXiv": ":--", "": ":--"}
    lines = [(row.name, *(show(measure(row, peer)) for peer in PEERS), row.source, row.note) for row in ROWS]
    return f"Measured with {versions}.\n\n{table(columns, lines)}"


def step_0() -> str:
    lines = []
    for name, expressions in AT_REFERENCE.items():
        numbers = [number(expression) for expression in expressions]
        shown = [
            f"{readable(text)} = {decimal(value, 6)}" if set(text) - set("01") else text
            for text, value in zip(expressions, numbers, strict=True)
        ]
        lines.append((f"`{name}`", *shown, small(max(map(distance, at_reference(name), numbers)))))
    columns = {"`loss_type`": ":--", "loss": ":--", "slope by r_w": ":--", "slope by r_l": ":--", "ours off by": "--:"}
    return table(columns, lines)


def worked() -> str:
    lines = []
    for what, (expression, ours) in WORKED.items():
        expected, got = number(expression), ours()
        lines.append((what, readable(expression), decimal(expected, 8), decimal(got, 8), small(distance(got, expected))))
    return table({"what": ":--", "by hand": ":--", "is": "--:", "ours": "--:", "off by": "--:"}, lines)


TABLES = {"losses": losses, "step-0": step_0, "worked": worked}
"""By the name of the section that holds them."""


def main() -> None:
    text = PARITY.read_text()
    for name, make in TABLES.items():
        made = make()
        sys.stdout.write(f"{name}\n\n{made}\n")
        text = section(name).sub(lambda _, made=made: made, text, count=1)
    PARITY.write_text(text)


if __name__ == "__main__":
    main()
