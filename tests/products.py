"""Counts matrix products by what torch's profiler records: also within custom ops, in place, or into a given output.

`torch.utils.flop_counter` sees neither. A *unit* is one product of N rows, V and D: 2·N·V·D operations.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod

import torch

MATRICES = {  # operator -> place of its first matrix among the arguments
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::baddbmm": 1,
    "aten::baddbmm_": 1,
    "aten::addbmm": 1,
    "aten::addbmm_": 1,
    "aten::mv": 0,
    "aten::addmv": 1,
    "aten::addmv_": 1,
    "aten::dot": 0,
}


@dataclass
class Products:
    """What was multiplied."""

    flops: list[int] = field(default_factory=list)
    """Of each product, in order."""

    def units(self, N: int, V: int, D: int) -> float:
        """All of them together."""
        return sum(self.flops) / (2 * N * V * D)


@contextmanager
def counted_products() -> Iterator[Products]:
    """Counts what runs within, in this thread and in those of autograd."""
    products = Products()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        yield products
    events = [event for event in profile.profiler.kineto_results.events() if event.name() in MATRICES]
    end = -1
    for event in sorted(events, key=lambda event: (event.start_ns(), -event.duration_ns())):
        if event.start_ns() < end:  # within another one: addmm within addmm_, say
            continue
        end = event.start_ns() + event.duration_ns()
        left, right = event.shapes()[MATRICES[event.name()] :][:2]
        products.flops.append(2 * prod(left) * (right[-1] if len(right) > 1 else 1))
