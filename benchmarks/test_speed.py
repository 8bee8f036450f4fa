"""Times of the small cases, for pytest-benchmark: is this change slower than what was there before?

pytest benchmarks --benchmark-autosave         before
pytest benchmarks --benchmark-compare          after
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules of this folder, as its programs see them

from cases import CASES, HIDDEN_CASES
from linear import HIDDEN
from measure import LOGITS
from providers import HIDDEN_PROVIDERS, PROVIDERS

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

CONTENDERS = [
    pytest.param(level, case, table[name], id=f"{case.name}-{name}")
    for level, cases, table, names in (
        (LOGITS, CASES, PROVIDERS, ("fused", "eager")),
        (HIDDEN, HIDDEN_CASES, HIDDEN_PROVIDERS, ("ours", "ours_recompute")),
    )
    for case in cases
    if "small" in case.tags
    for name in names
]


@pytest.mark.parametrize(("level", "case", "provider"), CONTENDERS)
@pytest.mark.parametrize("phase", ["forward", "both"])
def test_speed(benchmark, level, case, provider, phase):
    contender = level.contender(provider, level.inputs(case, DEVICE))

    def call() -> None:
        getattr(contender, phase)()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
