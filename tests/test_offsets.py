"""Rows that lie more than 2^31 elements apart, for real: logits in a sparse file, of which only the pages of the rows exist.

An offset computed in 32 bits wraps to another row or out of the tensor; the byte counter is a fence, so that shows as a failure
and not as a crash. The gpu tier does the same with gigabytes of memory.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from byte_counter import counted_traffic
from fused_tdpo import token_stats
from tolerances import assert_same_bits

triton = pytest.importorskip("triton")
tl = triton.language
pytestmark = pytest.mark.interpreter

bf16 = torch.bfloat16
FAR = 2**31
ROWS = 3


def sparse(path: Path, elements: int) -> Tensor:
    """bfloat16 zeros, mapped from a file that occupies next to nothing; skips where there are no such files."""
    try:
        with path.open("wb") as file:
            file.truncate(2 * elements)
        if path.stat().st_blocks * 512 > 2**20:
            pytest.skip(f"{path.parent} has no sparse files")
        return torch.from_file(str(path), shared=True, size=elements, dtype=bf16)
    except (OSError, RuntimeError) as error:
        pytest.skip(f"cannot map a sparse file of {2 * elements / 2**30:.0f} GiB: {error}")


# A pitch below 2^31 elements, so that it is the product with the row that outgrows 32 bits. Either path of the kernels counts
# in another unit: groups of eight columns, or single ones.
@pytest.mark.parametrize(("V", "pitch"), [(64, 2**30 + 8), (67, 2**30 + 1)], ids=["wide", "narrow"])
@pytest.mark.parametrize("axis", ["inner", "outer"])
@pytest.mark.parametrize("in_place", [False, True], ids=["", "in-place"])
def test_rows_far_apart(tmp_path, V, pitch, axis, in_place):
    if axis == "inner":  # rows of one stride
        shape, strides = (ROWS, V), (pitch, 1)
    else:  # two strides that do not merge, the larger one far
        shape, strides = (ROWS, 2, V), (pitch, V + 16, 1)
    memory = sparse(tmp_path / "logits", (ROWS - 1) * pitch + 512)
    assert memory.numel() > FAR
    far = memory.as_strided(shape, strides)
    near, ref = torch.randn(shape).to(bf16), torch.randn(shape).to(bf16)
    far.copy_(near)
    labels = torch.randint(V, shape[:-1])
    g_logp, g_kl = torch.randn(2, *shape[:-1])

    def both(policy: Tensor, ref: Tensor) -> tuple[Tensor, ...]:
        leaf = policy.requires_grad_()
        stats = token_stats(leaf.view_as(leaf), ref, labels, backend="triton", inplace_backward=in_place)
        (gradient,) = torch.autograd.grad([stats.logp, stats.kl], leaf, [g_logp, g_kl])
        return stats.logp, stats.ref_logp, stats.kl, gradient

    expected = both(near, ref)
    with counted_traffic() as traffic:
        got = both(far, ref)
    for name, value, truth in zip(("logp", "ref_logp", "kl", "gradient"), got, expected, strict=True):
        assert_same_bits(name, value, truth)
    assert traffic.argument(f"policy_{axis}", "finish") == pitch, "the rows were merged, or copied: this test saw nothing"
    assert traffic.argument("WIDE", "fold") == traffic.argument("WIDE", "bwd") == (V == 64)
    if in_place:
        assert got[-1].untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


def test_a_far_reference(tmp_path):
    V, pitch = 64, 2**30 + 8
    memory = sparse(tmp_path / "logits", (ROWS - 1) * pitch + V)
    far = memory.as_strided((ROWS, V), (pitch, 1))
    policy, near = torch.randn(2, ROWS, V).to(bf16)
    far.copy_(near)
    labels = torch.randint(V, (ROWS,))

    def both(ref: Tensor) -> tuple[Tensor, ...]:
        leaf = policy.clone().requires_grad_()
        stats = token_stats(leaf, ref, labels, backend="triton")
        return stats.ref_logp, stats.kl, *torch.autograd.grad(stats.kl.sum(), leaf)

    expected = both(near)
    with counted_traffic():
        got = both(far)
    for name, value, truth in zip(("ref_logp", "kl", "gradient"), got, expected, strict=True):
        assert_same_bits(name, value, truth)


@triton.jit
def _wrapping_kernel(in_ptr, out_ptr, row, pitch):
    tl.store(out_ptr, tl.load(in_ptr + row * pitch))


def test_a_wrapped_offset_would_be_seen(tmp_path):
    # The fault that this file is about, made on purpose.
    pitch = 2**30 + 8
    memory, out = sparse(tmp_path / "logits", 2 * pitch + 64), torch.zeros(1, dtype=bf16)
    with counted_traffic() as traffic:
        _wrapping_kernel[(1,)](memory, out, 1, pitch)
        with pytest.raises(Exception, match="1 addresses outside the tensors"):
            _wrapping_kernel[(1,)](memory, out, 2, pitch)
    assert traffic.bytes_read() == 2
