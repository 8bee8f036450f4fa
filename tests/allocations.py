"""What is allocated, to the byte: also within operators and custom ops."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


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
