"""Four tiers of tests, sorted by what they need. A tier is a marker; a test without one is in the first.

cpu          anything that runs Python and torch: the specification, the losses, dispatch, errors, packaging.
interpreter  the Triton kernels, interpreted on CPU tensors of tiny shapes (a row costs milliseconds, not nanoseconds). Needs
             TRITON_INTERPRET=1 before Triton is first imported: this file sets it where there is no GPU, unless it is set.
compile      the Triton kernels, compiled ahead of time for several GPU generations, none of which need be here. Runs in a
             subprocess with the environment of `compiler_env`: the interpreter must be off there.
gpu          the real thing. The tier that decides.

A tier that cannot run here is skipped, never left out: each skip is listed with its reason, and the last lines of a run count
every tier. `-m gpu` or `-m "not slow"` selects. Each test starts from the same seed; Hypothesis draws the same examples every
time, and more of them, new ones, with HYPOTHESIS_PROFILE=deep.
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("contract_linear", "contract_token_stats", "official_tdpo", "tolerances")

TIERS = ("cpu", "interpreter", "compile", "gpu")
GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):  # else every worker starts a thread per core
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))

with contextlib.suppress(ImportError):  # tests that need it say so with `pytest.importorskip`
    import hypothesis

    class _TorchRandom:
        """Lets Hypothesis seed torch before each example, as it does with `random`: a failure replays from its inputs."""

        seed = staticmethod(torch.manual_seed)
        getstate = staticmethod(torch.get_rng_state)
        setstate = staticmethod(torch.set_rng_state)

    _torch_random = _TorchRandom()  # Hypothesis keeps only a weak reference
    hypothesis.register_random(_torch_random)
    # A first example may compile or import: no deadline. The seed fixture below is the same for each example, so harmless.
    common = {"deadline": None, "database": None, "suppress_health_check": [hypothesis.HealthCheck.function_scoped_fixture]}
    hypothesis.settings.register_profile("fast", derandomize=True, max_examples=25, **common)
    hypothesis.settings.register_profile("deep", max_examples=1000, print_blob=True, **common)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Random tensors are the same in every run, in any order, on any worker."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def interpreter() -> None:
    """Makes the interpreter round as GPUs do, and twice as fast."""
    if "interpreter" not in _why_not():
        from interpreter_fixes import repair_interpreter

        repair_interpreter()


@pytest.fixture
def compiler_env() -> dict[str, str]:
    """Environment of a subprocess in which Triton compiles instead of interpreting."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def _triton_version() -> tuple[int, ...] | None:
    """(major, minor) of the installed Triton, which is not imported; None where there is none."""
    if importlib.util.find_spec("triton") is None:
        return None
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


def _why_not() -> dict[str, str]:
    """Tier -> the reason why it cannot run here, for those that cannot."""
    reasons = {}
    if not GPU:
        reasons["gpu"] = "needs a GPU: torch.cuda.is_available() is False"
    elif INTERPRETED:
        reasons["gpu"] = "needs compiled kernels, but TRITON_INTERPRET=1 is set"

    triton = _triton_version()
    if triton is None:
        reasons["compile"] = reasons["interpreter"] = "needs Triton, which is not installed"
    elif not INTERPRETED:
        reasons["interpreter"] = (
            f"needs TRITON_INTERPRET=1, which is {'not the default beside a GPU' if GPU else 'set otherwise'}"
        )
    elif triton < (3, 7):
        reasons["interpreter"] = (
            f"needs Triton >= 3.7, found {triton[0]}.{triton[1]}: its interpreter fails in loops with numpy >= 2.4"
        )
    elif importlib.util.find_spec("numpy") is None:
        reasons["interpreter"] = "needs numpy, which is not installed"
    return reasons


def pytest_report_header() -> str:
    """What a log must say to be understood later."""
    triton = _triton_version()
    device = torch.cuda.get_device_name() if GPU else "no GPU"
    return f"torch {torch.__version__}, triton {'.'.join(map(str, triton)) if triton else 'absent'}, {device}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reasons = _why_not()
    for item in items:
        marked = [tier for tier in TIERS if item.get_closest_marker(tier)]
        if len(marked) > 1:
            raise pytest.UsageError(f"{item.nodeid} is in {' and '.join(marked)}: a test belongs to one tier")
        tier = marked[0] if marked else "cpu"
        item.user_properties.append(("tier", tier))  # travels with the report, also from an xdist worker
        if tier in reasons:
            item.add_marker(pytest.mark.skip(reason=f"tier {tier} {reasons[tier]}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per tier, so that a tier that did not run cannot be mistaken for one that passed."""
    column = {"error": "failed", "xfailed": "skipped", "xpassed": "passed"}
    counts: Counter[tuple[str, str]] = Counter()
    seconds: Counter[str] = Counter()
    for outcome, tier, duration in _reports(terminalreporter):
        counts[tier, column.get(outcome, outcome)] += 1
        seconds[tier] += duration
    terminalreporter.section("tiers")
    for tier in TIERS:
        passed, failed, skipped = (counts[tier, outcome] for outcome in ("passed", "failed", "skipped"))
        line = f"{tier:<12}{passed:>6} passed{failed:>6} failed{skipped:>6} skipped{seconds[tier]:>9.1f} s"
        terminalreporter.line(line, red=failed > 0, yellow=not failed and passed == 0, green=not failed and passed > 0)


def _reports(terminalreporter: pytest.TerminalReporter) -> Iterator[tuple[str, str, float]]:
    """(outcome, tier, seconds) of every phase of every test; the outcome of an uneventful setup or teardown is ''."""
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            if isinstance(report, pytest.TestReport):  # else a warning, a collection error or a deselected test
                yield outcome, dict(report.user_properties)["tier"], report.duration


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Products of tiny models take less time than waking a thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def few_objects_to_collect() -> Iterator[None]:
    """A trainer collects garbage when training begins: half a second among the objects of all that is imported here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
