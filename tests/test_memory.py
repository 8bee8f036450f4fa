"""What the CPU allocates while `token_stats` runs, to the byte: all that the profiler sees, temporaries within operators too.

Documented: forward keeps its outputs and four numbers a row; the Triton backend allocates besides only the records of the
segments, the torch backend a few tensors of CHUNK_ELEMENTS. Backward makes one gradient, and none with `inplace_backward`.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from allocations import counted_allocations
from fused_tdpo import _torch_backend, token_stats

fp32, bf16 = torch.float32, torch.bfloat16
EXTRAS = ("entropy", "ref_entropy", "accuracy", "mean_logit", "log_sum_sq_probs")

CHUNK = 4096
"""Elements of a chunk of the torch backend here: two rows."""

SLACK = 64
"""Bytes for scalars."""

# Tensors of CHUNK_ELEMENTS float32 that the torch backend makes before the first chunk; none is made later.
FORWARD_CHUNKS, BACKWARD_CHUNKS = 4, 2
# Numbers a row that live besides, at the worst moment.
FORWARD_NUMBERS, BACKWARD_NUMBERS = 4, 6

BACKENDS = [pytest.param("torch", id="torch"), pytest.param("triton", id="triton", marks=pytest.mark.interpreter)]
DTYPES = [pytest.param(fp32, id="fp32"), pytest.param(bf16, id="bf16")]


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection() -> Iterator[None]:
    """`counted_allocations` collects: let it look only at what is made here."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one chunk is far smaller than the logits."""
    monkeypatch.setattr(_torch_backend, "CHUNK_ELEMENTS", CHUNK)


@dataclass
class Call:
    """Arguments of `token_stats`, and a backward with contiguous upstream gradients, which need no copy."""

    backend: str
    dtype: torch.dtype = bf16
    times: int = 1
    """As many rows."""

    def __post_init__(self) -> None:
        N, self.V = (4, 256) if self.backend == "triton" else (16, 2048)  # the interpreter has no time for more
        self.N = N * self.times
        self.leaf = torch.randn(self.N, self.V).to(self.dtype).requires_grad_()
        self.ref = torch.randn(self.N, self.V).to(self.dtype)
        self.labels = torch.zeros(self.N, dtype=torch.int64)
        self.upstream = [torch.ones(self.N), torch.ones(self.N)]

    @property
    def elements(self) -> int:
        return self.N * self.V

    def forward(self, logits: Tensor, **options: object) -> Callable[[], None]:
        """Runs it and returns its backward."""
        n = len(logits)
        stats = token_stats(logits, self.ref[:n], self.labels[:n], backend=self.backend, **options)
        return lambda: torch.autograd.backward([stats.logp, stats.kl], [g[:n] for g in self.upstream])


def test_counter_counts_to_the_byte():
    with counted_allocations() as allocations:
        kept = torch.empty(1000)
        torch.empty(500, dtype=torch.int64)
    assert allocations.changes == [4000, 4000, -4000]
    assert (allocations.live, allocations.peak) == (kept.nbytes, 8000)
    assert allocations.of_at_least(4001) == []


def test_counter_sees_within_operators():
    # What a naive forward makes, and the fused ones must not: the bounds below would see it.
    call = Call("reference")
    logits = call.leaf + 0
    with counted_allocations() as allocations:
        call.forward(logits)
    assert len(allocations.of_at_least(call.elements * 4)) >= 5
    assert allocations.peak >= 3 * call.elements * 4


# ------------------------------------------------------------------------------------------------------------------- forward


def kept_bytes(call: Call, extras: tuple[str, ...] = ()) -> int:
    """Outputs, and what is saved for backward: the logits are the caller's."""
    return call.N * 4 * (3 + len(extras) + 4)


def record_bytes(call: Call) -> int:
    """What the Triton kernels hand on, of one segment a row."""
    if call.backend != "triton":
        return 0
    from fused_tdpo.kernels.token_stats import NUM_FIELDS

    return NUM_FIELDS * call.N * 4


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["", "extras"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_allocates_no_logits(backend, dtype, extras):
    call = Call(backend, dtype)
    logits = call.leaf + 0
    with counted_allocations() as allocations:
        backward = call.forward(logits, extras=extras)
    assert not allocations.of_at_least(call.elements), "at a byte an element"
    assert kept_bytes(call, extras) <= allocations.live <= kept_bytes(call, extras) + SLACK, "more is kept for backward"
    temporary = allocations.peak - kept_bytes(call, extras)
    if backend == "triton":
        assert record_bytes(call) <= temporary <= record_bytes(call) + SLACK
    else:
        assert 0 <= temporary - FORWARD_CHUNKS * CHUNK * 4 <= FORWARD_NUMBERS * call.N * 4
    del backward


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_memory_is_flat_in_the_number_of_rows(backend):
    temporaries = []
    for times in (1, 3):
        call = Call(backend, times=times)
        logits = call.leaf + 0
        with counted_allocations() as allocations:
            call.forward(logits)
        temporaries.append(allocations.peak - kept_bytes(call) - record_bytes(call))
    assert abs(temporaries[1] - temporaries[0]) <= SLACK, temporaries


def test_forward_chunks_are_at_least_a_row(monkeypatch):
    call = Call("torch")
    monkeypatch.setattr(_torch_backend, "CHUNK_ELEMENTS", call.V // 2)
    logits = call.leaf + 0
    with counted_allocations() as allocations:
        call.forward(logits)
    temporary = allocations.peak - kept_bytes(call)
    assert 0 <= temporary - FORWARD_CHUNKS * call.V * 4 <= FORWARD_NUMBERS * call.N * 4


# ------------------------------------------------------------------------------------------------------------------ backward


def assert_temporaries_of_backward(call: Call, size: int) -> None:
    if call.backend == "triton":
        assert 0 <= size <= SLACK
    else:
        assert 0 <= size - BACKWARD_CHUNKS * CHUNK * 4 <= BACKWARD_NUMBERS * call.N * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_allocates_one_gradient(backend, dtype):
    call = Call(backend, dtype)
    backward = call.forward(call.leaf + 0)
    with counted_allocations() as allocations:
        backward()
    gradient = call.elements * dtype.itemsize
    assert allocations.of_at_least(call.elements) == [gradient]
    assert call.leaf.grad.nbytes == gradient
    assert_temporaries_of_backward(call, allocations.peak - gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_in_place_allocates_no_gradient(backend, dtype):
    call = Call(backend, dtype)
    logits = call.leaf + 0
    backward = call.forward(logits, inplace_backward=True)
    with counted_allocations() as allocations:
        backward()
    assert not allocations.of_at_least(call.elements)
    assert call.leaf.grad.data_ptr() == logits.data_ptr(), "autograd made a copy of it"
    assert_temporaries_of_backward(call, allocations.peak)


@pytest.mark.parametrize("kind", ["leaf", "slice"])
def test_backward_in_place_allocates_after_all(kind):
    # Documented: for a leaf, and for a slice of logits, autograd makes the gradient itself.
    call = Call("torch")
    logits = call.leaf if kind == "leaf" else (call.leaf + 0)[:-1]
    backward = call.forward(logits, inplace_backward=True)
    with counted_allocations() as allocations:
        backward()
    assert allocations.of_at_least(call.elements) == [call.elements * 2]


@pytest.mark.parametrize("in_place", [False, True], ids=["", "in-place"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_memory_is_flat_in_the_number_of_rows(backend, in_place):
    temporaries, rows = [], []
    for times in (1, 3):
        call = Call(backend, times=times)
        backward = call.forward(call.leaf + 0, inplace_backward=in_place)
        with counted_allocations() as allocations:
            backward()
        temporaries.append(allocations.peak - (0 if in_place else call.elements * 2))
        rows.append(call.N)
    numbers = BACKWARD_NUMBERS if backend == "torch" else 0
    assert -SLACK <= temporaries[1] - temporaries[0] <= numbers * 4 * (rows[1] - rows[0]) + SLACK, temporaries
