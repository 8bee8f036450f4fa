"""Times of `token_stats` on the small cases, for pytest-benchmark: is this change slower than what was there before?

pytest benchmarks --benchmark-autosave         before
pytest benchmarks --benchmark-compare          after
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the modules of this folder, as its programs see them

from cases import CASES
from measure import Contender, Inputs
from providers import PROVIDERS

pytest.importorskip("pytest_benchmark")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module", params=[case for case in CASES if "small" in case.tags], ids=lambda case: case.name)
def inputs(request):
    return Inputs(request.param, DEVICE)


@pytest.mark.parametrize("provider", ["fused", "eager"])
@pytest.mark.parametrize("phase", ["forward", "both"])
def test_speed(benchmark, inputs, provider, phase):
    contender = Contender(PROVIDERS[provider], inputs)

    def call() -> None:
        getattr(contender, phase)()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=5, warmup_rounds=1)
