"""The contract of `token_stats`, run by the pure PyTorch backend on a CPU, and what that backend alone promises."""

import pytest
import torch

from allocations import counted_allocations
from contract_token_stats import (
    EXTRAS,
    Backend,
    Float64Contract,
    FusedTokenStatsContract,
    Outcome,
    RefusesBadLabels,
    assert_same_outcome,
    bf16,
    check,
    fp32,
    make_case,
    noise,
    run,
)
from fused_tdpo import TokenStats, token_stats


class TestTorch(FusedTokenStatsContract, Float64Contract, RefusesBadLabels):
    backend = Backend("torch")


@pytest.mark.parametrize("dtype", [fp32, bf16], ids=["fp32", "bf16"])
def test_auto_computes_the_same_thing(dtype):
    # Which backend it picks is test_api.py's; that it passes every option on to it is ours.
    options = {"vocab_size": 130, "widths": (140, 137), "temperature": 0.7, "ignore_index": 7, "extras": EXTRAS}
    case = make_case("cpu", (5,), 130, dtype=dtype, **options)
    check(token_stats, case)


def test_the_number_of_threads_changes_nothing():
    # Rows are shared out between threads by their number, and a single wide one would be cut; a row's bits must not tell.
    backend, before = Backend("torch"), torch.get_num_threads()
    for lead, V in (((64,), 1031), ((1,), 40_001)):
        case = make_case("cpu", lead, V, dtype=bf16, extras=EXTRAS)
        try:
            torch.set_num_threads(1)
            alone = run(backend, case)
            torch.set_num_threads(2)
            assert_same_outcome(f"two threads, {lead[0]} rows", run(backend, case), alone)
        finally:
            torch.set_num_threads(before)


def test_a_wide_row_does_not_see_its_neighbours():
    # Three rows a chunk: what is left out where no row of a chunk needs it changes no bit of the others.
    case = make_case("cpu", (7,), 151_936, extras=EXTRAS, ignore_every=99)
    distance = torch.tensor([3.0, 0.3, 0.0, 0.01, 0.0, 1e-4, 3.0])[:, None]
    case = case.with_(policy=case.ref + distance * noise(7, 151_936, seed=9))
    backend = Backend("torch")
    whole = run(backend, case)
    for i in range(7):
        stats = TokenStats(*(getattr(whole.stats, name)[i : i + 1] for name in TokenStats._fields))
        assert_same_outcome(f"row {i}", run(backend, case.rows(slice(i, i + 1))), Outcome(stats, whole.grad[i : i + 1]))


@pytest.mark.slow
def test_memory_is_bounded():
    # Row-chunked: at no moment anything that grows as N*V, here 256 MiB in float32; the gradient goes over the logits.
    N, V = 4096, 16384
    policy, ref = (torch.zeros(N, V, dtype=bf16) for _ in range(2))
    labels = torch.zeros(N, dtype=torch.int64)
    logits = policy.requires_grad_().view(N, V)  # not a leaf, no copy
    with counted_allocations() as allocations:
        stats = token_stats(logits, ref, labels, backend="torch", inplace_backward=True)
        torch.autograd.grad(stats.logp.sum() + stats.kl.sum(), logits)
    peak = allocations.peak
    assert allocations.changes, "the profiler saw no allocation: this test saw nothing"
    assert peak <= N * V * 4 // 2, f"{peak / 2**20:.0f} MiB beside the inputs, expected at most {N * V * 2 / 2**20:.0f} MiB"
