"""What the CPU allocates while `token_stats` runs, to the byte: all that the profiler sees, temporaries within operators too.

Documented: forward keeps its outputs and four numbers a row; the Triton backend allocates besides only the records of the
segments, the torch backend a few tensors of CHUNK_ELEMENTS. Backward makes one gradient, and none with `inplace_backward`.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fused_tdpo import _torch_backend, token_stats

fp32, bf16 = torch.float32, torch.bfloat16
EXTRAS = ("entropy", "ref_entropy", "accuracy", "mean_logit", "log_sum_sq_probs")

N, V = 16, 2048
CHUNK = 2 * V  # elements
SLACK = 256
"""Bytes for scalars."""

# Tensors of CHUNK_ELEMENTS float32 that live at the worst moment of the torch backend, masks counted by their bytes.
FORWARD_CHUNKS, BACKWARD_CHUNKS = 13, 5
# Numbers a row that its backward makes before the first chunk.
BACKWARD_NUMBERS = 4

BACKENDS = [pytest.param("torch", id="torch"), pytest.param("triton", id="triton", marks=pytest.mark.interpreter)]
DTYPES = [pytest.param(fp32, id="fp32"), pytest.param(bf16, id="bf16")]


@dataclass
class Allocations:
    changes: list[int] = field(default_factory=list)
    """Bytes that were allocated (> 0) and freed (< 0), in order."""

    @property
    def live(self) -> int:
        """Bytes allocated and not freed at the end."""
        return sum(self.changes)

    @property
    def peak(self) -> int:
        """The same at the worst moment."""
        live = peak = 0
        for change in self.changes:
            live += change
            peak = max(peak, live)
        return peak

    def of_at_least(self, size: int) -> list[int]:
        return [change for change in self.changes if change >= size]


@contextmanager
def counted_allocations() -> Iterator[Allocations]:
    allocations = Allocations()
    gc.collect()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        yield allocations
        gc.collect()  # the interpreter leaves cycles behind
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    allocations.changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that one chunk is far smaller than the logits."""
    monkeypatch.setattr(_torch_backend, "CHUNK_ELEMENTS", CHUNK)


@dataclass
class Call:
    """Arguments of `token_stats`, and a backward with contiguous upstream gradients, which need no copy."""

    dtype: torch.dtype = bf16
    rows: int = N

    def __post_init__(self) -> None:
        self.leaf = torch.randn(self.rows, V).to(self.dtype).requires_grad_()
        self.ref = torch.randn(self.rows, V).to(self.dtype)
        self.labels = torch.zeros(self.rows, dtype=torch.int64)
        self.upstream = [torch.ones(self.rows), torch.ones(self.rows)]

    def forward(self, backend: str, logits: Tensor | None = None, **options: object) -> Callable[[], None]:
        """Runs it and returns its backward."""
        logits = self.leaf + 0 if logits is None else logits
        stats = token_stats(logits, self.ref[: len(logits)], self.labels[: len(logits)], backend=backend, **options)
        return lambda: torch.autograd.backward([stats.logp, stats.kl], [g[: len(logits)] for g in self.upstream])


def test_counter_counts_to_the_byte():
    with counted_allocations() as allocations:
        kept = torch.empty(1000)
        torch.empty(500, dtype=torch.int64)
    assert allocations.changes == [4000, 4000, -4000]
    assert (allocations.live, allocations.peak) == (kept.nbytes, 8000)
    assert allocations.of_at_least(4001) == []


def test_counter_sees_within_operators():
    # What a naive forward makes, and the fused ones must not: the bound below would see it.
    call = Call(bf16)
    logits = call.leaf + 0
    with counted_allocations() as allocations:
        call.forward("reference", logits)
    assert len(allocations.of_at_least(N * V * 4)) >= 5
    assert allocations.peak >= 3 * N * V * 4


# ------------------------------------------------------------------------------------------------------------------- forward


def kept_bytes(rows: int, extras: tuple[str, ...] = ()) -> int:
    """Outputs, and what is saved for backward: the logits are the caller's."""
    return rows * 4 * (3 + len(extras) + 4)


def record_bytes(rows: int) -> int:
    from fused_tdpo.kernels.token_stats import NUM_FIELDS

    return NUM_FIELDS * rows * 4  # one segment


@pytest.mark.parametrize("extras", [(), EXTRAS], ids=["", "extras"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_allocates_no_logits(backend, dtype, extras):
    call = Call(dtype)
    logits = call.leaf + 0
    with counted_allocations() as allocations:
        backward = call.forward(backend, logits, extras=extras)
    assert not allocations.of_at_least(N * V), "at a byte an element"
    assert kept_bytes(N, extras) <= allocations.live <= kept_bytes(N, extras) + SLACK, "more is kept for backward"
    temporary = allocations.peak - kept_bytes(N, extras)
    if backend == "triton":
        assert record_bytes(N) <= temporary <= record_bytes(N) + SLACK
    else:
        assert CHUNK * 4 <= temporary <= FORWARD_CHUNKS * CHUNK * 4
    del backward


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_memory_is_flat_in_the_number_of_rows(backend):
    temporaries = []
    for rows in (N, 3 * N):
        call = Call(rows=rows)
        logits = call.leaf + 0
        with counted_allocations() as allocations:
            call.forward(backend, logits)
        records = record_bytes(rows) if backend == "triton" else 0
        temporaries.append(allocations.peak - kept_bytes(rows) - records)
    assert abs(temporaries[1] - temporaries[0]) <= SLACK, temporaries


def test_forward_chunks_are_at_least_a_row(monkeypatch):
    monkeypatch.setattr(_torch_backend, "CHUNK_ELEMENTS", V // 2)
    call = Call()
    logits = call.leaf + 0
    with counted_allocations() as allocations:
        call.forward("torch", logits)
    assert V * 4 <= allocations.peak - kept_bytes(N) <= FORWARD_CHUNKS * V * 4


# ------------------------------------------------------------------------------------------------------------------ backward


def assert_temporaries_of_backward(backend: str, size: int, rows: int = N) -> None:
    if backend == "triton":
        assert 0 <= size <= SLACK
    else:
        assert CHUNK * 4 <= size <= BACKWARD_CHUNKS * CHUNK * 4 + BACKWARD_NUMBERS * rows * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_allocates_one_gradient(backend, dtype):
    call = Call(dtype)
    backward = call.forward(backend)
    with counted_allocations() as allocations:
        backward()
    gradient = N * V * dtype.itemsize
    assert allocations.of_at_least(N * V) == [gradient]
    assert call.leaf.grad.nbytes == gradient
    assert_temporaries_of_backward(backend, allocations.peak - gradient)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_in_place_allocates_no_gradient(backend, dtype):
    call = Call(dtype)
    logits = call.leaf + 0
    backward = call.forward(backend, logits, inplace_backward=True)
    with counted_allocations() as allocations:
        backward()
    assert not allocations.of_at_least(N * V)
    assert call.leaf.grad.data_ptr() == logits.data_ptr(), "and autograd made no copy of it"
    assert_temporaries_of_backward(backend, allocations.peak)


@pytest.mark.parametrize("rows", ["leaf", "sliced"])
def test_backward_in_place_allocates_after_all(rows):
    # Documented: for a leaf, and for a slice of logits, autograd makes the gradient itself.
    call = Call()
    logits = call.leaf if rows == "leaf" else (call.leaf + 0)[:-1]
    backward = call.forward("torch", logits, inplace_backward=True)
    with counted_allocations() as allocations:
        backward()
    assert allocations.of_at_least(N * V) == [N * V * 2]


@pytest.mark.parametrize("in_place", [False, True], ids=["", "in-place"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_memory_is_flat_in_the_number_of_rows(backend, in_place):
    temporaries = []
    for rows in (N, 3 * N):
        call = Call(rows=rows)
        backward = call.forward(backend, inplace_backward=in_place)
        with counted_allocations() as allocations:
            backward()
        temporaries.append(allocations.peak - (0 if in_place else rows * V * 2))
    numbers = 0 if backend == "triton" else BACKWARD_NUMBERS * 2 * N * 4
    assert -SLACK <= temporaries[1] - temporaries[0] <= numbers + SLACK, temporaries
