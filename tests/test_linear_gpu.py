"""The hidden level on a GPU: the contract of the op, and the losses of both engines in the dtypes that are trained in."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from contract_linear import FusedLinearTokenStatsContract, LinearBackend, PoisonsBadLabels
from fused_tdpo import LinearDPOLoss, LinearTDPOLoss, LMHead
from tolerances import assert_within_budget

pytestmark = pytest.mark.gpu

IGNORE = -100
fp64, fp32, fp16, bf16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


class TestTriton(FusedLinearTokenStatsContract, PoisonsBadLabels):
    backend = LinearBackend("triton", device="cuda", compiler="inductor")


class Batch:
    """Two pairs, one long and one short, and two heads; the policy near its reference."""

    def __init__(self, dtype: torch.dtype, V: int = 5003, D: int = 128) -> None:
        gen = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=gen)).to("cuda", dtype)

        self.hidden, self.weight, self.bias = normal(4, 160, D), normal(V, D, scale=3 * D**-0.5), normal(V)
        self.ref = self.hidden + normal(4, 160, D, scale=0.2), self.weight + normal(V, D, scale=0.3 * D**-0.5), self.bias
        labels = torch.randint(V, (4, 160), generator=gen)
        labels[:, :40] = IGNORE
        labels[1::2, 60:] = IGNORE
        self.labels = labels.cuda()

    def run(self, loss: Any, dtype: torch.dtype, head: dict[str, Any], trained: bool) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients, with everything cast to a dtype; the upstream gradient is 100, as of a scaled loss."""
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (self.hidden, self.weight, self.bias)]
        if not trained:
            leaves = [leaves[0], *(t.detach() for t in leaves[1:])]
        ref_hidden, ref_weight, ref_bias = (t.to(dtype) for t in self.ref)
        out = loss(leaves[0], LMHead(*leaves[1:], **head), ref_hidden, LMHead(ref_weight, ref_bias, **head), self.labels)
        gradients = torch.autograd.grad(out.loss, [t for t in leaves if t.requires_grad], torch.full_like(out.loss, 100.0))
        return out.loss.detach(), list(gradients)


def relative(got: Tensor, exact: Tensor) -> Tensor:
    return (got.double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("head", [{}, {"scale": 0.5, "softcap": 20.0}], ids=["plain", "capped"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("rows", [50, 100_000], ids=["long", "groups"])
@pytest.mark.parametrize("engine", ["one_pass", "recompute"])
@pytest.mark.parametrize("logits_dtype", [None, fp32], ids=["", "fp32-logits"])
@pytest.mark.parametrize("dtype", [bf16, fp16, fp32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("make", [LinearTDPOLoss, LinearDPOLoss])
def test_losses(
    make: type,
    dtype: torch.dtype,
    logits_dtype: torch.dtype | None,
    engine: str,
    rows: int,
    trained: bool,
    head: dict[str, Any],
):
    """No further from float64 than naive code of the same dtype, but for a fifth: one more rounding of a direction."""
    batch = Batch(dtype)
    loss = make(beta=0.05, engine=engine, logits_dtype=logits_dtype, max_chunk_bytes=rows * 5008 * 4 if rows < 1000 else None)
    naive = replace(loss, backend="reference", engine="auto", logits_dtype=None)
    value, gradients = batch.run(loss, dtype, head, trained)
    naive_value, naive_gradients = batch.run(naive, dtype, head, trained)
    exact_value, exact_gradients = batch.run(naive, fp64, head, trained)
    assert_within_budget("loss", value, naive_value, exact_value, 1e-4 * exact_value.abs())
    for got, plain, exact in zip(gradients, naive_gradients, exact_gradients, strict=True):
        error, budget = relative(got, exact), 1.2 * relative(plain, exact) + (1e-5 if dtype == fp32 else torch.finfo(dtype).eps)
        assert error <= budget, f"{error} against {budget}"


@pytest.mark.parametrize("V", [151_936, 50_257])
@pytest.mark.parametrize("engine", ["one_pass", "recompute"])
def test_memory_of_real_vocabularies(engine: str, V: int):
    """Beyond inputs and gradients: the chunk, a float32 gradient of the head, N·D numbers."""
    S, T, D, budget = 2, 4096, 512, 256 * 2**20
    hidden, ref_hidden = (torch.randn(S, T, D, device="cuda", dtype=bf16) for _ in range(2))
    weight, ref_weight = (torch.randn(V, D, device="cuda", dtype=bf16) * D**-0.5 for _ in range(2))
    labels = torch.randint(V, (S, T), device="cuda")
    hidden.requires_grad_(), weight.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = LinearTDPOLoss(engine=engine, max_chunk_bytes=budget)
    loss(hidden, weight, ref_hidden, ref_weight, labels).loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    head = V * D * (4 + 2)  # summed in float32, and handed on in bfloat16
    most = budget + head + 6 * S * T * D * 4
    assert peak <= most, f"{peak / 2**20:.0f} MiB, expected at most {most / 2**20:.0f}"
