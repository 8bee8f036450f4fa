"""Peak memory and time of a call, the memory that there is, and such numbers in words: for the commands and benchmarks/."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


def wall_clock(device: torch.device, function: Callable[[], Result]) -> tuple[float, Result]:
    """(Milliseconds, result) of a call, by the host's clock; on a GPU from idle to idle."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = function()
    wait()
    return 1e3 * (time.perf_counter() - start), result


def peak_bytes(device: torch.device, *steps: Callable[[], object]) -> list[int]:
    """Runs the steps one after the other. Bytes at the worst moment of each, beyond what was allocated before the first.

    On a GPU torch's allocator says so. On a CPU torch's profiler lists all allocations and releases, inside operators too.
    """
    if device.type == "cuda":
        before, peaks = torch.cuda.memory_allocated(), []
        for step in steps:
            torch.cuda.reset_peak_memory_stats()
            step()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        return peaks

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it announces itself otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for step in steps:
            with torch.profiler.record_function("a step"):
                step()
    live, peaks = 0, []
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "a step":
            peaks.append(live)
        elif event.name() == "[memory]" and peaks:
            live += event.nbytes()
            peaks[-1] = max(peaks[-1], live)
    return peaks


def available_bytes() -> float:
    """Memory of the host that a new process could have; without bound where the system does not say."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))


def digits(value: float) -> str:
    """Three significant digits, or all of an integer part."""
    return f"{value:#.3g}".rstrip(".") if value < 999.5 else f"{value:,.0f}"


def as_time(ms: float) -> str:
    """Milliseconds in words."""
    return f"{digits(ms)} ms" if ms < 999.5 else f"{digits(ms / 1000)} s"


def as_bytes(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "KiB", "MiB"):
        if count < 999.5:
            return f"{digits(count)} {unit}"
        count /= 1024
    return f"{digits(count)} GiB"
