"""How exact a provider is, and what it makes of NaN and −∞: no times, but errors against the specification in float64, or the
definition in more than that where the KL is so small that float64 would not do.

Rows of logits are handed over as hidden states and a head whose product they are, so that each provider gets the same ones,
wherever it begins. Of a problem of distances the hidden states are the unit matrix, and the product is exact. Of a spoilt one
they are positive, so that a column of −∞ in the head is one in the logits; a row of NaN spoils that row alone. An error is the
worst of all rows, relative to the true value; NaN where a NaN came that should not, infinite where an infinity or a NaN should
have come and did not.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cases import Problem
from fused_tdpo import TokenStats
from fused_tdpo.reference import token_stats_reference
from measure import Level
from providers import Provider

SPOILT_COLUMNS = slice(-7, None)
"""None of which is a label."""


class Inputs:
    """Hidden states (N, D), heads (V, D) and labels (N,) of a problem."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        N, spoilt = problem.N, problem.spoilt
        policy, ref = problem.logits()
        hidden = 0.1 + torch.rand(N, N, generator=torch.Generator().manual_seed(0)) if spoilt else torch.eye(N)
        policy_hidden = hidden.clone()
        if "NaN" in spoilt:
            policy_hidden[-1] = float("nan")
        if spoilt.endswith(("policy", "both")):
            policy[:, SPOILT_COLUMNS] = -float("inf")
        if spoilt.endswith(("reference", "both")):
            ref[:, SPOILT_COLUMNS] = -float("inf")
        self.kl = None if spoilt else defined_kl(policy, ref).to(device)
        self.policy_hidden, self.ref_hidden, self.labels = (t.to(device) for t in (policy_hidden, hidden, problem.labels()))
        self.policy_head, self.ref_head = (logits.T.contiguous().to(device) for logits in (policy, ref))


class Contender:
    """A provider on a problem."""

    def __init__(self, provider: Provider, inputs: Inputs) -> None:
        self.inputs, self.function = inputs, provider.load()

    def examine(self, truth: "Truth") -> tuple[dict[str, float], list[str], int]:
        """(Errors, nothing that is wrong, no peak memory)."""
        i = self.inputs
        x = i.policy_hidden.clone().requires_grad_()
        stats = self.function(x, i.policy_head, i.ref_hidden, i.ref_head, i.labels)
        return truth.judge(stats, x), [], 0


class Truth:
    """What is right, by the specification in float64."""

    def __init__(self, inputs: Inputs) -> None:
        self.x = inputs.policy_hidden.double().requires_grad_()
        logits = F.linear(self.x, inputs.policy_head.double()), F.linear(inputs.ref_hidden.double(), inputs.ref_head.double())
        self.stats = token_stats_reference(*logits, inputs.labels)
        self.kl = self.stats.kl.detach() if inputs.kl is None else inputs.kl
        self.differentiable = bool(inputs.policy_head.isfinite().all())  # else 0 · ∞ is NaN in any product

    def judge(self, stats: TokenStats, x: Tensor) -> dict[str, float]:
        """Worst error of each result, and how many divergences are below 0. The gradient is that of the KL, where there is one,
        and its errors are relative to the norm of a row."""
        names = [name for name in ("logp", "kl") if getattr(stats, name) is not None]
        truths = {"logp": self.stats.logp.detach(), "kl": self.kl}
        errors = {name: worst(getattr(stats, name).detach(), truths[name]) for name in names}
        if "kl" in names:
            errors["kl below 0"] = int((stats.kl < 0).sum())
        if self.differentiable:
            (got,) = torch.autograd.grad(getattr(stats, names[-1]).sum(), x)
            (truth,) = torch.autograd.grad(getattr(self.stats, names[-1]).sum(), self.x, retain_graph=True)
            norm = truth.norm(dim=-1)
            errors["gradient"] = worst((got - truth).norm(dim=-1) + norm, norm)
        return errors


def defined_kl(policy: Tensor, ref: Tensor) -> Tensor:
    """Σ q·(log q − log p) of rows, by the widest floats of this machine: 64 bits of mantissa on x86."""

    def log_softmax(logits: Tensor) -> np.ndarray:
        x = logits.numpy().astype(np.longdouble)
        x -= x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    log_p, log_q = log_softmax(policy), log_softmax(ref)
    return torch.from_numpy((np.exp(log_q) * (log_q - log_p)).sum(-1).astype(np.float64))


def worst(got: Tensor, truth: Tensor) -> float:
    """The largest |got − truth| / |truth|, absolute where the truth is 0. NaN or infinite as the module says."""
    got = got.double()
    error = (got - truth).abs() / truth.abs().where(truth != 0, 1.0)
    error = error.where(truth.isfinite() | got.isnan(), float("inf"))
    return float(error.where((got != truth) & ~(got.isnan() & truth.isnan()), 0.0).max())


ACCURACY = Level(Inputs, Truth, Contender, floor=None, warm_up=False)
