"""How a provider is measured at the hidden level: a whole preference loss, from hidden states and heads to their gradients.

As in measure.py, but for these. Right: the loss, the hidden states' gradient on rows spread over the batch, and the head's by a
projection. Memory: the peak of the call by which the provider is judged. Time: `both` is the sum of forward and backward, which
share the work differently in each provider. `bare` is the floor: the matrix products that all must make, and nothing else.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import HiddenCase
from fused_tdpo import LMHead, TokenStats
from fused_tdpo.cli._measure import as_bytes, available_bytes, peak_bytes
from fused_tdpo.cli._rivals import ALPHA, shifted, spread, tdpo2
from fused_tdpo.reference import token_stats_reference
from measure import Clock, Level, relative_error
from providers import CPU_CHUNK_BYTES, KAPPA, SIMPO, Provider, desirable, project

LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Relative error that the gate allows, by the dtype of the case: bf16 logits alone make 1e-2, a forgotten KL 5e-2 and more."""


def loss_of(computes: str, stats: TokenStats, beta: float, counted: Tensor) -> Tensor:
    """What a provider of that name is held to, from logp, ref_logp and kl (S, T), 0 where nothing is `counted`."""
    if computes == "kl":
        return stats.kl.sum() / counted.sum()
    if computes == "simpo":
        chosen, rejected = (stats.logp.sum(-1) / counted.sum(-1)).chunk(2)
        return -F.logsigmoid(SIMPO["beta"] * (chosen - rejected) - SIMPO["gamma"]).mean()
    if computes == "kto":
        z = beta * ((stats.logp - stats.ref_logp).sum(-1) - KAPPA)
        return torch.sigmoid(torch.where(desirable(z), -z, z)).mean()
    return tdpo2(stats, beta, ALPHA if computes == "tdpo2" else 0.0)


CHECKED_ROWS = 64
TRUTH_ROWS = 512
"""That many rows go through the specification at once."""

NAIVE_BYTES = 28
"""Of each logit held: seven tensors of float32."""

SHARE = 0.75
"""Of the memory that is available, on a CPU: what needs more is not begun, as the system would end the whole program."""


class Inputs:
    """Hidden states, heads and labels of a case. Logits have a standard deviation of 3, and are 1.1 apart in the two models."""

    def __init__(self, case: HiddenCase, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(seed)
        S, T, D, V = 2 * case.pairs, case.T, case.D, case.V

        def normal(*shape: int, scale: float) -> Tensor:
            return torch.empty(shape, dtype=case.dtype, device=device).normal_(0, scale, generator=generator)

        self.ref_hidden = normal(S, T, D, scale=1)
        self.policy_hidden = normal(S, T, D, scale=1 / 3).add_(self.ref_hidden).requires_grad_()
        self.policy_head = self.ref_head = normal(V, D, scale=3 * D**-0.5)
        if case.trained or case.apart:
            self.policy_head = normal(V, D, scale=0.5 * D**-0.5).add_(self.ref_head).requires_grad_(case.trained)
        self.labels = torch.randint(V, (S, T), generator=generator, device=device)
        self.labels[:, : case.prompt] = -100
        self.leaves = (self.policy_hidden, self.policy_head) if case.trained else (self.policy_hidden,)

    def heads(self, dtype: torch.dtype | None = None) -> tuple[Tensor | LMHead, Tensor | LMHead]:
        """The policy's head and the reference's, as providers get them."""
        weights = (self.policy_head, self.ref_head)
        if dtype is not None:
            weights = tuple(weight.detach().to(dtype) for weight in weights)
        return weights if self.case.softcap is None else tuple(LMHead(weight, softcap=self.case.softcap) for weight in weights)


class Contender:
    """A provider on inputs. It is given hidden states that are no leaf, as a model's are not."""

    def __init__(self, provider: Provider, inputs: Inputs) -> None:
        self.inputs, self.computes = inputs, provider.computes
        rows = {"": 0, "valid": inputs.case.N, "all": inputs.labels.numel()}[provider.holds]
        needed, free = rows * inputs.case.V * NAIVE_BYTES, available_bytes()
        if inputs.device.type == "cpu" and needed > SHARE * free:
            raise MemoryError(f"about {as_bytes(needed)} of {as_bytes(free)} that are available")
        self.function = provider.load()

    def forward(self) -> Tensor:
        i = self.inputs
        hidden = i.policy_hidden.view_as(i.policy_hidden)
        head, ref_head = i.heads()
        return self.function(i.case.beta, hidden, head, i.ref_hidden, ref_head, i.labels)

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, self.inputs.leaves)

    def both(self) -> tuple[str, Tensor, tuple[Tensor, ...]]:
        """(What loss it is, the loss, its gradients)."""
        loss = self.forward()
        return self.computes, loss, self.backward(loss)

    def examine(self, truth: "Truth") -> tuple[dict[str, float], list[str], int]:
        """(Relative errors, what is wrong in words, peak memory), all of one call."""
        if self.inputs.device.type == "cuda":
            self.both()  # compiles; on a CPU nothing does, and a call takes long
        outcomes = []
        (peak,) = peak_bytes(self.inputs.device, lambda: outcomes.append(self.both()))
        return *truth.judge(*outcomes.pop()), peak

    def round(self, clock: Clock) -> dict[str, float]:
        """Milliseconds of each phase."""
        forward, loss = clock(self.forward)
        backward, _ = clock(partial(self.backward, loss))
        return {"forward": forward, "backward": backward, "both": forward + backward}


class Bare:
    """The floor: the products of one loss on rows that count, in chunks of them and into buffers that are there. The head's
    gradient is summed in float32, as that of any provider must be."""

    name, must, bounds = "bare", "products", ("both",)

    def __init__(self, inputs: Inputs) -> None:
        case = inputs.case
        on_cpu = CPU_CHUNK_BYTES // (2 * case.V * case.dtype.itemsize)  # both models' logits, as in ours
        self.chunk = min(case.N, on_cpu if inputs.device.type == "cpu" else max(2048, case.D))
        self.head, self.ref_head = inputs.policy_head.detach(), inputs.ref_head
        self.hidden, self.ref_hidden = (h.detach().flatten(0, 1)[: case.N] for h in (inputs.policy_hidden, inputs.ref_hidden))
        self.logits, self.ref_logits = self.hidden.new_empty(2, self.chunk, case.V)
        self.d_hidden = torch.empty_like(self.hidden)
        self.d_head = torch.zeros_like(self.head, dtype=torch.float32) if case.trained else None
        self.sum_dtype = {} if case.dtype == torch.float32 else {"out_dtype": torch.float32}
        self.run()

    def run(self) -> None:
        for x, z, d_x in zip(*(rows.split(self.chunk) for rows in (self.hidden, self.ref_hidden, self.d_hidden)), strict=True):
            logits = self.logits[: len(x)]
            torch.mm(z, self.ref_head.T, out=self.ref_logits[: len(x)])
            torch.mm(x, self.head.T, out=logits)
            torch.mm(logits, self.head, out=d_x)
            if self.d_head is not None:
                torch.addmm(self.d_head, logits.T, x, out=self.d_head, **self.sum_dtype)

    def round(self, clock: Clock) -> dict[str, float]:
        """Milliseconds of the whole."""
        return {"both": clock(self.run)[0]}


class Truth:
    """What is right, by the specification one precision up: the loss, and the gradient of hidden states spread over the batch.

    The head's gradient follows from theirs. With G the gradient of the logits they are G W and Gᵀ h, so

        (Gᵀ h)ᵀ W = hᵀ (G W)

    in D × D numbers, at a small part of what another pair of products would cost.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.labels = inputs, shifted(inputs.labels)
        self.dtype = torch.float64 if inputs.case.dtype == torch.float32 else torch.float32
        counted = self.labels != -100
        with torch.no_grad():
            chunks = counted.flatten().nonzero().squeeze(1).split(TRUTH_ROWS)
            parts = zip(*(self._stats(rows, self._hidden(rows))[:3] for rows in chunks), strict=True)
        self.stats = spread(TokenStats(*map(torch.cat, parts)), counted)
        positions = self.labels.numel()
        self.rows = torch.arange(0, positions, -(-positions // CHECKED_ROWS), device=inputs.device)

    def judge(self, computes: str, loss: Tensor, gradients: tuple[Tensor, ...]) -> tuple[dict[str, float], list[str]]:
        """(Relative error of each result, what is wrong in words)."""
        case, stats = self.inputs.case, TokenStats(*(stat.detach().requires_grad_() for stat in self.stats[:3]))
        true_loss = loss_of(computes, stats, case.beta, self.labels != -100)
        slopes = torch.autograd.grad(true_loss, (stats.logp, stats.kl), materialize_grads=True)
        upstream = [slope.flatten()[self.rows] for slope in slopes]
        x = self._hidden(self.rows).requires_grad_()
        stats = self._stats(self.rows, x)
        (true_d_x,) = torch.autograd.grad((stats.logp, stats.kl), x, upstream)
        d_hidden, *d_head = (gradient.flatten(0, -2) for gradient in gradients)
        errors = {
            "loss": relative_error(loss, true_loss),
            "gradient of the hidden states": relative_error(d_hidden[self.rows], true_d_x),
        }
        if d_head:
            hidden, head = (leaf.detach().flatten(0, -2) for leaf in self.inputs.leaves)
            errors["gradient of the head"] = relative_error(d_head[0].T @ head, hidden.T @ d_hidden)
        limit = LIMITS[case.dtype]
        return errors, [f"relative error {error:.2g} of {name}" for name, error in errors.items() if not error <= limit]

    def _hidden(self, rows: Tensor) -> Tensor:
        return self.inputs.policy_hidden.detach().flatten(0, 1)[rows].to(self.dtype)

    def _stats(self, rows: Tensor, x: Tensor) -> TokenStats:
        """Statistics of some positions, the policy's hidden states of which are `x`."""
        z = self.inputs.ref_hidden.flatten(0, 1)[rows].to(self.dtype)
        logits = map(project, self.inputs.heads(self.dtype), (x, z))
        return token_stats_reference(*logits, self.labels.flatten()[rows])


HIDDEN = Level(Inputs, Truth, Contender, Bare, warm_up=False)
