"""The contract of `token_stats` on a GPU, at the sizes of the contract and at those of real models."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from accuracy_table import divergence_from_ratio
from contract_token_stats import (
    EXTRAS,
    POLICY_EXTRAS,
    SHORT,
    Backend,
    Case,
    Float64Contract,
    FusedTokenStatsContract,
    Outcome,
    PoisonsBadLabels,
    TritonContract,
    assert_same_outcome,
    bf16,
    check,
    compare,
    fp16,
    fp32,
    make_case,
    noise,
    run,
)
from fused_tdpo import TokenStats, token_stats
from tolerances import TINY_KL_RELATIVE, assert_exactly_zero, assert_relative, assert_same_bits

pytestmark = pytest.mark.gpu

GIB = 2**30


def need_memory(gib: float) -> None:
    """Skip, visibly, where the GPU has less free memory than a test needs."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / GIB
    if free < gib:
        pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, {free:.0f} are there")


def peak_of(function: Callable[[], object]) -> int:
    """Bytes that a call allocated at its worst moment beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class RealSizes(FusedTokenStatsContract):
    """What only shows at real sizes; any backend on a GPU."""

    # llama-2 · llama-3 · qwen · gemma · gpt-2 (odd: rows misaligned) · qwen's unpadded (odd) · beyond every real one
    @pytest.mark.parametrize("V", [32000, 128256, 151936, 262144, 50257, 151665, 1048583])
    @pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=SHORT.get)
    def test_real_vocabulary(self, dtype, V):
        check(self.backend, self.case((16,), V, dtype=dtype, extras=EXTRAS))

    @pytest.mark.parametrize("V", [32000, 151665])
    def test_real_vocabulary_without_reference(self, V):
        check(self.backend, self.case((16,), V, dtype=bf16, ref=False, extras=POLICY_EXTRAS))

    @pytest.mark.parametrize("layout", ["shifted", "pitched", "offset1", "transposed"])
    def test_real_strides(self, layout):
        check(self.backend, self.case((2, 9), 50257, dtype=bf16, layout=layout, ref_layout="shifted"))

    def test_real_mismatch_of_widths(self):
        # Qwen: 151,936 columns of logits, 151,665 tokens; the reference is padded to another width.
        check(self.backend, self.case((8,), 151665, dtype=bf16, widths=(151936, 152064), vocab_size=151665, extras=EXTRAS))

    @pytest.mark.parametrize("V", [67, 131, 1024])
    def test_more_rows_than_a_grid_axis(self, V):
        # 65,535 is the limit of the second and third axis of a CUDA grid.
        check(self.backend, self.case((70_001,), V, dtype=bf16, extras=EXTRAS))

    @pytest.mark.parametrize("V", [32000, 151936])
    @pytest.mark.parametrize("distance", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    def test_tiny_kl_of_a_real_vocabulary(self, distance, V):
        z = 3.0 * noise(8, V, seed=1)
        self.check_tiny("real vocabulary", z + distance * noise(8, V, seed=2), z)

    @pytest.mark.slow
    def test_more_than_2_to_the_31_elements(self):
        # Offsets of rows outgrow 32 bits; a wrong one reads another row, or writes it.
        need_memory(32)
        N, V = 16_500, 131_072
        policy = torch.empty(N, V, device="cuda", dtype=bf16).normal_(generator=torch.Generator("cuda").manual_seed(1))
        ref = policy.clone()
        ref[:, ::2] += 0.5
        labels = torch.arange(N, device="cuda") * 7 % V
        labels[5::11] = -100
        case = Case(policy, ref, labels, noise(N, seed=2, device="cuda"), noise(N, seed=3, device="cuda"), {"extras": EXTRAS})
        got = run(self.backend, case)
        edge = 2**31 // V
        rows = torch.tensor([0, 1, edge // 2 - 1, edge // 2, edge - 1, edge, edge + 1, N - 2, N - 1], device="cuda")
        stats = TokenStats(*(getattr(got.stats, name)[rows] for name in TokenStats._fields))
        compare(Outcome(stats, got.grad[rows]), case.rows(rows), f"rows {rows.tolist()}")
        for name in TokenStats._fields:
            assert getattr(got.stats, name).isfinite().all(), f"{name} of some row is not finite"
        assert (got.stats.logp[labels >= 0] < 0).all(), "some row was not computed"

    @pytest.mark.slow
    def test_a_pitch_beyond_32_bits(self):
        # Few rows, far apart: the offset of the third is 2^31 and more.
        need_memory(16)
        case = self.case((3,), 32000, dtype=bf16, ignore_every=99)
        pitch = 2**30 + 8
        buffer = torch.zeros(2 * pitch + 32000, device="cuda", dtype=bf16)
        policy = buffer.as_strided((3, 32000), (pitch, 1))
        policy.copy_(case.policy)
        check(self.backend, case.with_(policy=policy))

    def test_nothing_synchronises(self):
        # At the logits level there is no synchronisation at all, forward or backward.
        case = self.case((64,), 1031, dtype=bf16, extras=EXTRAS)
        expected = run(self.backend, case)  # compiles
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            got = run(self.backend, case)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_outcome("unsynchronised", got, expected)

    def test_another_stream(self):
        # Kernels go where the caller is, not to the default stream.
        case = self.case((64,), 32000, dtype=bf16, extras=EXTRAS)
        expected = run(self.backend, case)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # a kernel on the wrong stream would overtake the copies below
            late = case.with_(policy=case.policy.clone(), ref=case.ref.clone())
            got = run(self.backend, late)
        torch.cuda.current_stream().wait_stream(stream)
        assert_same_outcome("other stream", got, expected)


class TestTritonGPU(TritonContract, RealSizes):
    backend = Backend("triton", "cuda", rows=2000, compiler="inductor")

    @pytest.mark.parametrize("dtype", [fp32, bf16], ids=SHORT.get)
    def test_memory(self, dtype):
        """Nothing of size N*V beside the gradient, and with `inplace_backward` nothing at all."""
        N, V = 2048, 32000
        leaf, ref = (torch.zeros(N, V, device="cuda", dtype=dtype) for _ in range(2))
        labels = torch.zeros(N, device="cuda", dtype=torch.int64)
        logits = leaf.requires_grad_().view(N, V)  # not a leaf, no copy
        size, little = N * V * leaf.element_size(), N * V * leaf.element_size() // 100
        outputs: list[TokenStats] = []

        def forward(**options: bool) -> None:
            outputs[:] = [token_stats(logits, ref, labels, extras=EXTRAS, backend="triton", **options)]

        def backward() -> None:
            torch.autograd.grad(outputs[0].logp.sum() + outputs[0].kl.sum(), logits)

        forward()
        backward()  # compile
        for what, function, allowed in (
            ("forward", forward, 0),
            ("backward", backward, size),
            ("forward in place", lambda: forward(inplace_backward=True), 0),
            ("backward in place", backward, 0),
        ):
            peak = peak_of(function)
            assert peak <= allowed + little, f"{what} allocated {peak / 2**20:.1f} MiB, expected {allowed / 2**20:.1f}"

    def test_auto_is_this(self):
        case = make_case("cuda", (64,), 32000, dtype=bf16, extras=EXTRAS)
        assert_same_outcome("auto", run(token_stats, case), run(self.backend, case))

    def test_ignored_rows_cost_no_reads(self):
        # 15 of 16 rows are ignored; large enough (4 GiB, a millisecond) for the launch itself not to matter.
        N, V = 32768, 32000
        need_memory(8)
        policy, ref = (torch.zeros(N, V, device="cuda", dtype=bf16) for _ in range(2))
        labels = torch.zeros(N, device="cuda", dtype=torch.int64)
        few = torch.where(torch.arange(N, device="cuda") % 16 == 0, 0, -100)

        def milliseconds(labels: Tensor) -> float:
            times = []
            for _ in range(7):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                token_stats(policy, ref, labels, backend="triton")
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end))
            return sorted(times)[3]

        milliseconds(labels)  # compile
        every, some = milliseconds(labels), milliseconds(few)
        assert some < 0.5 * every, f"all rows take {every:.3f} ms, a sixteenth of them {some:.3f} ms"


DIVERGENCES = [
    pytest.param({"divergence": "reverse_kl"}, id="reverse_kl"),
    pytest.param({"divergence": "js"}, id="js"),
    *(pytest.param({"divergence": "alpha", "divergence_alpha": a}, id=f"alpha{a}") for a in (0.3, 0.7, 2.0)),
]
divergences = pytest.mark.parametrize("kind", DIVERGENCES)


class RealDivergences:
    """The other divergences at real sizes; small ones are in test_divergences.py, which runs here, too."""

    backend: Backend

    @divergences
    @pytest.mark.parametrize("V", [32000, 151936, 151665])
    @pytest.mark.parametrize("dtype", [fp32, bf16, fp16], ids=SHORT.get)
    def test_real_vocabulary(self, dtype, V, kind):
        check(self.backend, make_case("cuda", (16,), V, dtype=dtype, extras=EXTRAS, **kind))

    @divergences
    def test_real_strides_and_widths(self, kind):
        check(self.backend, make_case("cuda", (2, 9), 50257, dtype=bf16, layout="shifted", ref_layout="offset1", **kind))
        widths = {"widths": (151936, 152064), "vocab_size": 151665}
        check(self.backend, make_case("cuda", (4,), 151665, dtype=bf16, **widths, **kind))

    @divergences
    @pytest.mark.parametrize("V", [32000, 151936])
    @pytest.mark.parametrize("distance", [1e-5, 1e-3, 1e-1])
    def test_tiny_values_of_a_real_vocabulary(self, distance, V, kind):
        z = 3.0 * noise(8, V, seed=1, device="cuda")
        x = z + distance * noise(8, V, seed=2, device="cuda")
        got = self.backend(x, z, torch.zeros(8, dtype=torch.int64, device="cuda"), **kind).kl
        assert (got >= 0).all(), f"{got.min().item()} is negative"
        assert_relative("real vocabulary", got, divergence_from_ratio(x, z, **kind), TINY_KL_RELATIVE)

    @divergences
    def test_equal_logits_and_masked_columns_of_a_real_vocabulary(self, kind):
        case = make_case("cuda", (8,), 151936, dtype=bf16, ignore_every=99, **kind)
        case = case.with_(labels=case.labels % 151665)
        columns = torch.arange(151936, device="cuda")
        mask = (columns >= 151665) | (columns % 5 == 0)
        mask = mask.repeat(8, 1).scatter(-1, case.labels.unsqueeze(-1), False)
        policy, ref = case.policy.masked_fill(mask, float("-inf")), case.ref.masked_fill(mask, float("-inf"))
        stats, grad = check(self.backend, case.with_(policy=policy, ref=ref))
        assert stats.kl.isfinite().all() and grad.isfinite().all(), f"{stats.kl.tolist()}"
        assert_exactly_zero("equal logits", self.backend(policy, policy.clone(), case.labels, **kind).kl)

    @divergences
    def test_twice_in_place_and_without_synchronising(self, kind):
        case = make_case("cuda", (64,), 32000, dtype=bf16, **kind)
        expected = run(self.backend, case)  # compiles
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            got = run(self.backend, case)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_same_outcome("second run", got, expected)
        leaf = case.policy.clone().requires_grad_()
        stats = self.backend(leaf + 0, case.ref, case.labels, inplace_backward=True, **case.options)
        torch.autograd.backward([stats.logp, stats.kl], [case.g_logp, case.g_kl])
        assert_same_bits("the gradient in place", leaf.grad, expected.grad)


class TestTritonDivergencesGPU(RealDivergences):
    backend = Backend("triton", "cuda")

    @divergences
    def test_memory(self, kind):
        """No logits beside the gradient, also where forward reads them twice."""
        N, V = 2048, 32000
        leaf, ref = (torch.zeros(N, V, device="cuda", dtype=bf16) for _ in range(2))
        labels = torch.zeros(N, device="cuda", dtype=torch.int64)
        logits = leaf.requires_grad_().view(N, V)  # not a leaf, no copy
        outputs: list[TokenStats] = []

        def forward() -> None:
            outputs[:] = [self.backend(logits, ref, labels, **kind)]

        def backward() -> None:
            torch.autograd.grad(outputs[0].logp.sum() + outputs[0].kl.sum(), logits)

        forward()
        backward()  # compile
        size = N * V * leaf.element_size()
        for what, function, allowed in (("forward", forward, 0), ("backward", backward, size)):
            peak = peak_of(function)
            assert peak <= allowed + size // 100, f"{what} allocated {peak / 2**20:.1f} MiB, expected {allowed / 2**20:.1f}"


class TestTorchDivergencesGPU(RealDivergences):
    backend = Backend("torch", "cuda")


class TestTorchGPU(RealSizes, Float64Contract, PoisonsBadLabels):
    backend = Backend("torch", "cuda", rows=2000, compiler="inductor")

    # torch's sums on a GPU share a row out by how many rows there are: the same bits again, but others among other rows
    test_a_row_does_not_see_its_neighbours = None
    test_a_row_alone_is_a_row_among_others = None
    test_strides_change_no_bit = None

    def test_memory(self):
        """Row-chunked: at no moment a second tensor of N*V float32."""
        N, V = 8192, 65536
        need_memory(8)
        policy, ref = (torch.zeros(N, V, device="cuda", dtype=bf16) for _ in range(2))
        labels = torch.zeros(N, device="cuda", dtype=torch.int64)
        peak = peak_of(lambda: token_stats(policy, ref, labels, extras=EXTRAS, backend="torch"))
        assert peak <= N * V * 4 // 2, f"forward allocated {peak / GIB:.2f} GiB, expected at most {N * V * 2 / GIB:.2f}"


class TestReferenceGPU(Float64Contract):
    backend = Backend("reference", "cuda", compiler="inductor")
