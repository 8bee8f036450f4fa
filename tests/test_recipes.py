"""docs/recipes.md, run in float64, beside the formulas of the papers written out token by token: values and all gradients."""

import re
from collections.abc import Callable
from math import exp
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fused_tdpo import LinearTDPOLoss
from fused_tdpo.types import PreferenceOutput
from tolerances import assert_exactly_zero, assert_within_budget

RECIPES = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def doc() -> SimpleNamespace:
    """All that the document's code defines."""
    names: dict[str, object] = {}
    torch.set_default_dtype(torch.float64)
    try:
        for code in re.findall(r"^```python\n(.*?)^```$", RECIPES.read_text(), re.DOTALL | re.MULTILINE):
            exec(compile(code, RECIPES.name, "exec"), names)
    finally:
        torch.set_default_dtype(torch.float32)
    return SimpleNamespace(**names)


class Token:
    """A label that counts, and what predicts it."""

    def __init__(self, d: SimpleNamespace, x: Tensor, s: int, t: int) -> None:
        self.s, self.t, self.chosen, self.y = s, t, s < d.S // 2, int(d.labels[s, t])
        self.log_p, self.log_q = (z[s, t - 1].log_softmax(-1) for z in (x, d.ref_logits))
        self.logp, self.logq = self.log_p[self.y], self.log_q[self.y]
        self.rho = self.logp - self.logq
        self.reverse_kl = (self.log_p.exp() * (self.log_p - self.log_q)).sum()
        self.forward_kl = (self.log_q.exp() * (self.log_q - self.log_p)).sum()
        self.entropy = -(self.log_p.exp() * self.log_p).sum()

    def of(self, logits: Tensor) -> Tensor:
        """log-probability of the label under another model."""
        return logits[self.s, self.t - 1].log_softmax(-1)[self.y]


Response = list[Token]


def total(response: Response, term: Callable[[Token], Tensor]) -> Tensor:
    return torch.stack([term(token) for token in response]).sum()


def pair_loss(responses: list[Response], beta: float, r: Callable[[Response], Tensor]) -> Tensor:
    """Mean over pairs of −log σ(β (r_w − r_l))."""
    half = len(responses) // 2
    margins = [r(w) - r(rejected) for w, rejected in zip(responses[:half], responses[half:], strict=True)]
    return -torch.stack(margins).mul(beta).sigmoid().log().mean()


# --- the formulas -------------------------------------------------------------------------------------------------------------


def surrogate(d: SimpleNamespace, token: Token, advantage: Tensor) -> Tensor:
    r = (token.logp - d.old_logp[token.s, token.t - 1]).exp()
    return torch.min(r * advantage, torch.clip(r, 0.8, 1.2) * advantage)


def ppo(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    return -torch.stack([surrogate(d, k, d.advantages[k.s, k.t - 1]) for tokens in responses for k in tokens]).mean()


def grpo(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    advantages = (d.rewards - d.rewards.mean()) / d.rewards.std()

    def objective(token: Token) -> Tensor:
        ratio = token.logq.exp() / token.logp.exp()
        return surrogate(d, token, advantages[token.s, 0]) - 0.04 * (ratio - ratio.log() - 1)

    return -torch.stack([total(tokens, objective) / len(tokens) for tokens in responses]).mean()


def exact(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    return ppo(d, responses) + 0.05 * torch.stack([k.reverse_kl for tokens in responses for k in tokens]).mean()


def entropies(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    return torch.stack([total(tokens, lambda token: token.entropy) for tokens in responses]).sum()


def tis_weight(d: SimpleNamespace, token: Token) -> float:
    score = min(max(float(token.of(d.plus_logits) - token.of(d.minus_logits)), -0.5), 1.5)
    return exp(score if token.chosen else -score)


def tis(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    return pair_loss(responses, 0.1, lambda tokens: total(tokens, lambda k: tis_weight(d, k) * k.rho))


def tis_kl(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    return pair_loss(responses, 0.1, lambda tokens: total(tokens, lambda k: tis_weight(d, k) * (k.rho - 0.5 * k.reverse_kl)))


def sparse(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    def masks(token: Token) -> list[Tensor]:
        return [layer(d.ref_hidden[token.s, token.t - 1])[0].clamp(min=0) for layer in d.layers]

    def masked(token: Token) -> Tensor:
        m_u, m_d = masks(token)
        return m_u * token.rho + m_d * token.forward_kl

    norms = [1e-3 * total(tokens, lambda token: sum(masks(token))) for tokens in responses]
    return pair_loss(responses, 0.1, lambda tokens: total(tokens, masked)) + sum(norms) / (d.S // 2)


def tgdpo(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    def term(token: Token) -> Tensor:
        r = token.of(d.plus_logits) - token.logq
        return (1 + 0.5 * 0.1 * r if token.chosen else 1 - 0.5 * 0.1 * r) * token.rho

    return pair_loss(responses, 0.1, lambda tokens: total(tokens, term))


def confpo(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    def r(tokens: Response) -> Tensor:
        p = [exp(k.logp.detach()) for k in tokens]
        selected = [k for k, p_of_k in zip(tokens, p, strict=True) if p_of_k < sum(p) / len(p)]
        assert 0 < len(selected) < len(tokens), "the test itself is wrong: nothing was selected"
        return total(selected, lambda k: k.logp) / len(selected) - (1.6 / 1.5 if tokens[0].chosen else 0)

    return pair_loss(responses, 1.5, r)


def r_dpo(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    return pair_loss(responses, 0.1, lambda tokens: total(tokens, lambda k: k.rho) + 0.05 / 0.1 * len(tokens))


def dpop(d: SimpleNamespace, responses: list[Response]) -> Tensor:
    def r(tokens: Response) -> Tensor:
        rho = total(tokens, lambda k: k.rho)
        return rho - 50 * torch.clamp(-rho, min=0) if tokens[0].chosen else rho

    return pair_loss(responses, 0.1, r)


TOKEN_FORMULAS = {
    "ppo": ppo, "hidden_grpo": grpo, "exact": exact, "plain_bonus": entropies, "bonus": entropies, "hidden_bonus": entropies,
    "tis": tis, "hidden_tis": tis, "tis_kl": tis_kl, "hidden_tis_kl": tis_kl, "sparse": sparse, "hidden_sparse": sparse,
    "tgdpo": tgdpo, "hidden_tgdpo": tgdpo, "confpo": confpo, "hidden_confpo": confpo, "r_dpo": r_dpo, "dpop": dpop,
}  # fmt: skip
"""Result -> formula of a batch's tokens. What begins with `hidden_` comes from hidden states."""


def lta(d: SimpleNamespace) -> Tensor:
    kls = []
    for question, latents in zip(d.question, d.latent, strict=True):
        q = torch.exp(question) / torch.exp(question).sum()
        for latent in latents:
            p = torch.exp(latent) / torch.exp(latent).sum()
            kls.append((q * torch.log(q / p)).sum())
    return torch.stack(kls).mean()


def of_rewards(term: Callable[[Tensor], Tensor]) -> Callable[[SimpleNamespace], Tensor]:
    return lambda d: torch.stack([term(w - rejected) for w, rejected in zip(d.reward_w, d.reward_l, strict=True)]).mean()


OTHER_FORMULAS = {
    "lta": (lta, ("question", "latent")),
    "plain_lta": (lta, ("question", "latent")),
    "bradley_terry": (of_rewards(lambda z: torch.log(1 + torch.exp(-z))), ("reward_w", "reward_l")),
    "with_margin": (of_rewards(lambda z: torch.log(1 + torch.exp(0.5 - z))), ("reward_w", "reward_l")),
    "hinge": (of_rewards(lambda z: (1 - z).clamp(min=0)), ("reward_w", "reward_l")),
    "robust": (of_rewards(lambda z: (0.1 * (-z).sigmoid().log() - 0.9 * z.sigmoid().log()) / 0.8), ("reward_w", "reward_l")),
}
"""Result -> formula, and the names of what gets a gradient."""

# --- the tests ----------------------------------------------------------------------------------------------------------------


def near(what: str, got: Tensor, expected: Tensor) -> None:
    """Every element within 1e-11 of the largest one."""
    largest = float(expected.detach().abs().max())
    assert largest > 0, f"{what}: the test itself is wrong, all is 0"
    assert_within_budget(what, got, expected, expected, torch.full_like(expected, 1e-11 * largest))


def assert_same(got: Tensor | PreferenceOutput, expected: Tensor, leaves: list[Tensor]) -> None:
    """Values, and gradients to each of the leaves."""
    if isinstance(got, PreferenceOutput):
        got = got.loss
    near("value", got, expected)
    found, true = (torch.autograd.grad(value, leaves, retain_graph=True) for value in (got, expected))
    for i, pair in enumerate(zip(found, true, strict=True)):
        near(f"gradient {i}", *pair)


def responses_of(d: SimpleNamespace, logits: Tensor) -> list[Response]:
    counted = [[t for t in range(1, d.T) if d.labels[s, t] != -100] for s in range(d.S)]
    return [[Token(d, logits, s, t) for t in positions] for s, positions in enumerate(counted)]


@pytest.mark.parametrize("name", TOKEN_FORMULAS)
def test_recipe_of_tokens(doc: SimpleNamespace, name: str):
    logits, leaves = doc.logits, [doc.logits]
    if name.startswith("hidden_"):
        logits, leaves = doc.hidden @ doc.head.T, [doc.hidden, doc.head]
    if name.endswith("sparse"):
        leaves += doc.layers.parameters()
    got = getattr(doc, name)
    got = got.sum() if isinstance(got, Tensor) else got
    assert_same(got, TOKEN_FORMULAS[name](doc, responses_of(doc, logits)), leaves)


@pytest.mark.parametrize("name", OTHER_FORMULAS)
def test_recipe_without_tokens(doc: SimpleNamespace, name: str):
    formula, leaves = OTHER_FORMULAS[name]
    assert_same(getattr(doc, name), formula(doc), [getattr(doc, leaf) for leaf in leaves])


def test_every_result_of_the_document_has_a_formula(doc: SimpleNamespace):
    """All that has a gradient, but for what the results are made of."""
    made_of = {"logits", "hidden", "head", "question", "latent", "reward_w", "reward_l", "log_p", "log_q", "kl_to_uniform"}
    made_of |= {"m_u", "m_d", "rho_w", "rho_l"}
    results = {
        name
        for name, value in vars(doc).items()
        if isinstance(value, PreferenceOutput) or (isinstance(value, Tensor) and value.requires_grad)
    }
    assert results - made_of == TOKEN_FORMULAS.keys() | OTHER_FORMULAS.keys()


def test_statistics_of_policy_gradients(doc: SimpleNamespace):
    """All that is not differentiated, at both levels."""
    for stats, logits in ((doc.stats, doc.logits), (doc.hidden_stats, doc.hidden @ doc.head.T)):
        tokens = [token for response in responses_of(doc, logits) for token in response]
        expected = [torch.stack([k.logp, k.logq, k.reverse_kl, k.entropy]) for k in tokens]
        near("statistics", torch.stack(stats[:4])[:, doc.counted], torch.stack(expected, -1))
        assert_exactly_zero("ignored rows", torch.stack(stats[:4])[:, ~doc.counted])
        assert not stats.entropy.requires_grad and not stats.ref_logp.requires_grad
    near("entropy", doc.entropy, torch.stack([k.entropy for k in tokens]).mean())
    near("reward", doc.kl_reward[doc.counted], -0.05 * torch.stack([k.rho for k in tokens]))
    assert not doc.kl_reward.requires_grad


@pytest.mark.parametrize("name", ["tis_weights", "tgdpo_weights"])
def test_estimated_weights_are_constants(doc: SimpleNamespace, name: str):
    """Even of a model that is being trained."""
    assert not getattr(doc, name)(doc.logits, doc.ref_logits, doc.labels).requires_grad


def test_what_the_estimates_of_the_kl_estimate(doc: SimpleNamespace):
    """Expectations over all labels of one row: KL(p ‖ q) for k1 and k3; of gradients none, that of KL(p ‖ q), of KL(q ‖ p)."""
    x, z = torch.randn(2, doc.V, dtype=torch.float64)
    x.requires_grad_()
    rows = torch.arange(doc.V)
    stats = doc.token_stats(x.expand(doc.V, -1), z.expand(doc.V, -1), rows, divergence="reverse_kl")
    log_p, log_q = x.log_softmax(-1), z.log_softmax(-1)
    reverse, forward = (log_p.exp() * (log_p - log_q)).sum(), (log_q.exp() * (log_q - log_p)).sum()
    k1, k2, k3 = ((log_p.exp().detach() * estimate).sum() for estimate in doc.kl_estimates(stats))
    near("k1", k1, reverse)
    near("k3", k3, reverse)
    assert_same(stats.kl[0], reverse, [x])

    def gradient(value: Tensor) -> Tensor:
        return torch.autograd.grad(value, x, retain_graph=True)[0]

    assert gradient(k1).abs().max() < 1e-12
    near("gradient of k2", gradient(k2), gradient(reverse))
    near("gradient of k3", gradient(k3), gradient(forward))
    assert (gradient(forward) - gradient(reverse)).abs().max() > 1e-3, "the test itself is wrong: both KLs are alike"


def test_hidden_states_go_in_one_pass(doc: SimpleNamespace):
    outputs = [value for name, value in vars(doc).items() if name.startswith("hidden_") and isinstance(value, PreferenceOutput)]
    assert len(outputs) == 4
    assert {out.engine.name for out in outputs} == {"one_pass"}


@pytest.mark.parametrize("engine", ["one_pass", "recompute"])
def test_learned_masks_by_either_engine(doc: SimpleNamespace, engine: str):
    loss = LinearTDPOLoss(beta=0.1, variant="tdpo1", engine=engine)
    got = doc.sparse_po(loss, doc.from_hidden, doc.labels, doc.m_u, doc.m_d)
    expected = sparse(doc, responses_of(doc, doc.hidden @ doc.head.T))
    assert_same(got, expected, [doc.hidden, doc.head, *doc.layers.parameters()])
