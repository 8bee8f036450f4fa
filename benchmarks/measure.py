"""How a provider is measured: whether it is right, then its memory, then its time.

Right: every value and the gradient, on rows spread over the batch, against the specification in float64. A provider that is
wrong gets no time. How exact ours are is the tests' business; this gate only keeps nonsense out of a comparison.

Memory: the peak beyond what lay in memory before, over one forward and backward; the gradient counts, the inputs do not.

Time: rounds in which each provider has its turn, so that a change of clocks or load meets all alike. On a GPU between device
events, with the L2 cache full of something else, and queued behind a pause in which the host runs ahead, as it does in
training. Logits are random, and restored where a provider overwrites them. `copy` is the floor: a copy within the device that
moves as many bytes as the case must (cases.py), measured in the same rounds.

What is special about the logits level stands here, about the hidden level in linear.py, about exactness in accuracy.py.
"""

import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from cases import Case, HiddenCase, Problem
from fused_tdpo import TokenStats
from fused_tdpo.cli._measure import peak_bytes, wall_clock
from fused_tdpo.reference import token_stats_reference
from providers import Provider, Unavailable

LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
"""Relative error ‖got − truth‖ / ‖truth‖ that the gate allows, by the dtype of the result."""

CHECKED_ROWS = 32
PHASES = ("forward", "backward", "both")
QUANTILES = (0.2, 0.5, 0.8)
TOO_FAST = 1.25
"""Times the floor's speed: reading alone may be a little faster than copying, more is a mistake in what is measured."""

PAUSE_CYCLES = 10_000_000
"""About five milliseconds: in training the host is further ahead."""

CASE_SECONDS = 15
"""No further round of a case begins after that long, but there is always one."""


class Inputs:
    """Logits, labels and upstream gradients of a case; none of the latter is 0, so that no row may skip the reference."""

    def __init__(self, case: Case, device: torch.device, seed: int = 0) -> None:
        self.case, self.device = case, device
        generator = torch.Generator(device).manual_seed(seed)
        self.ref = torch.empty(case.N, case.V, dtype=case.dtype, device=device)
        self.policy = torch.empty_like(self.ref)
        for x, z in zip(self.policy.split(1024), self.ref.split(1024), strict=True):
            z.normal_(0, 3, generator=generator)
            x.normal_(0, 0.5, generator=generator).add_(z)
        self.pristine = self.policy.clone()
        self.policy.requires_grad_()
        labels = torch.randint(case.V, (case.N,), generator=generator, device=device)
        self.labels = labels.masked_fill(case.ignored().to(device), -100)
        self.g_logp = 0.5 + torch.rand(case.N, generator=generator, device=device)
        self.g_kl = -0.5 - torch.rand(case.N, generator=generator, device=device)


class Contender:
    """A provider on inputs. It is given logits that are no leaf, as a model's are not."""

    def __init__(self, provider: Provider, inputs: Inputs) -> None:
        self.inputs, self.overwrites, self.function = inputs, provider.overwrites, provider.load()

    def restore(self) -> None:
        """Undoes what the provider wrote over the policy's logits; they are as drawn between any two measurements."""
        if self.overwrites:
            self.inputs.policy.detach().copy_(self.inputs.pristine)

    def forward(self) -> tuple[Tensor, TokenStats]:
        logits = self.inputs.policy.view_as(self.inputs.policy)
        return logits, self.function(logits, self.inputs.ref, self.inputs.labels)

    def backward(self, logits: Tensor, stats: TokenStats) -> Tensor:
        return gradient(logits, stats, self.inputs.g_logp, self.inputs.g_kl)

    def both(self) -> tuple[TokenStats, Tensor]:
        logits, stats = self.forward()
        return stats, self.backward(logits, stats)

    def examine(self, truth: "Truth") -> tuple[dict[str, float], list[str], int]:
        """(Relative errors, what is wrong in words, peak memory of a call that is not the first)."""
        errors, wrong = truth.judge(*self.both())
        self.restore()
        peak = 0 if wrong else peak_bytes(self.inputs.device, self.both)[0]
        self.restore()
        return errors, wrong, peak

    def round(self, clock: "Clock") -> dict[str, float]:
        """Milliseconds of each phase."""
        forward, results = clock(self.forward)
        backward = clock(partial(self.backward, *results))[0]
        del results
        self.restore()
        both = clock(self.both)[0]
        self.restore()
        return {"forward": forward, "backward": backward, "both": both}


class Copy:
    """The floor: moves the bytes of each phase, half of them read and half written."""

    name, must, bounds = "copy", "bytes", ("forward", "backward")

    def __init__(self, case: Case, device: torch.device) -> None:
        words = {"forward": case.forward_bytes // 8, "backward": case.backward_bytes // 8}
        self.source = torch.empty(max(words.values()), dtype=torch.int32, device=device).random_()
        self.target = torch.empty_like(self.source)
        self.words = words

    def round(self, clock: "Clock") -> dict[str, float]:
        """Milliseconds of each phase."""
        ms = {phase: clock(lambda n=n: self.target[:n].copy_(self.source[:n]))[0] for phase, n in self.words.items()}
        return ms | {"both": ms["forward"] + ms["backward"]}


def gradient(logits: Tensor, stats: TokenStats, g_logp: Tensor, g_kl: Tensor, retain_graph: bool = False) -> Tensor:
    """The gradient of `logits`, from upstream gradients of those statistics that are there."""
    pairs = [(stat, g.to(stat.dtype)) for stat, g in ((stats.logp, g_logp), (stats.kl, g_kl)) if stat is not None]
    outputs, upstream = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, logits, upstream, retain_graph=retain_graph)[0]


class Truth:
    """What is right, by the specification in float64, on some rows of a case."""

    def __init__(self, inputs: Inputs) -> None:
        N, device = len(inputs.labels), inputs.labels.device
        self.rows = torch.linspace(0, N - 1, min(N, CHECKED_ROWS), device=device, dtype=torch.float64).round().long()
        self.logits = inputs.pristine[self.rows].double().requires_grad_()
        self.labels = inputs.labels[self.rows]
        self.stats = token_stats_reference(self.logits, inputs.ref[self.rows].double(), self.labels)
        self.upstream = inputs.g_logp[self.rows], inputs.g_kl[self.rows]

    def judge(self, stats: TokenStats, grad: Tensor) -> tuple[dict[str, float], list[str]]:
        """(Relative error of each result, what is wrong in words). The gradient's is split: at the labels, which outweigh the
        rest, and elsewhere."""
        names = [name for name in ("logp", "ref_logp", "kl") if getattr(stats, name) is not None]
        true_stats = TokenStats(**{"logp": None} | {name: getattr(self.stats, name) for name in names})
        true_grad = gradient(self.logits, true_stats, *self.upstream, retain_graph=True)
        grad, label = grad[self.rows], self.labels.clamp(min=0)[:, None]
        results = {name: (getattr(stats, name)[self.rows], getattr(self.stats, name)) for name in names} | {
            "gradient": (grad.scatter(-1, label, 0.0), true_grad.scatter(-1, label, 0.0)),
            "gradient at the label": (grad.gather(-1, label), true_grad.gather(-1, label)),
        }
        errors = {name: relative_error(got, truth) for name, (got, truth) in results.items()}
        limits = {name: LIMITS[got.dtype] for name, (got, _) in results.items()}
        wrong = [f"relative error {error:.2g} of {name}" for name, error in errors.items() if not error <= limits[name]]
        return errors, wrong


def relative_error(got: Tensor, truth: Tensor) -> float:
    """‖got − truth‖ / ‖truth‖; NaN where either holds one."""
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    return float(norm(got.detach() - truth.detach()) / norm(truth.detach()))


class Clock:
    """Calls a function and returns (milliseconds, its result)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self.other = torch.ones(2 * cache // 4, dtype=torch.int32, device=device)

    def __call__(self, function: Callable[[], object]) -> tuple[float, object]:
        if self.device.type != "cuda":
            return wall_clock(self.device, function)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.other.max()  # read, not written: nothing is left to write back while the function runs
        torch.cuda._sleep(PAUSE_CYCLES)
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end), result


@dataclass
class Measurement:
    """What was found out about a provider on a case; `refused` is the reason why there are no times."""

    provider: str
    refused: str = ""
    failed: bool = False
    """Refused for a fault, not for what the machine lacks."""
    errors: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0
    rounds: int = 0
    ms: dict[str, list[float]] = field(default_factory=dict)
    """Phase -> QUANTILES."""
    floor_ms: dict[str, float] = field(default_factory=dict)
    """Phase -> median of `copy` in the same rounds."""

    def refuse(self, reason: str, failed: bool = False) -> None:
        self.refused, self.failed = reason, failed


@dataclass(frozen=True)
class Level:
    """What a measurement is made of, depending on where a loss begins. A floor has a name and the phases that it bounds."""

    inputs: Callable[[Case, torch.device], Inputs]
    truth: Callable[[Inputs], Truth]
    contender: Callable[[Provider, Inputs], Contender]
    floor: Callable[[Inputs], Copy] | None
    """None: nothing is timed."""
    warm_up: bool
    """Whether the first round does not count."""


LOGITS = Level(Inputs, Truth, Contender, lambda inputs: Copy(inputs.case, inputs.device), warm_up=True)


def admit(
    name: str, provider: Provider, inputs: Inputs, truth: Truth, level: Level = LOGITS
) -> tuple[Measurement, Contender | None]:
    """The gate: (errors and memory, the contender), or (the reason, None)."""
    found = Measurement(name)
    try:
        contender = level.contender(provider, inputs)
        found.errors, wrong, found.peak_bytes = contender.examine(truth)
        if not wrong:
            return found, contender
        found.refuse("wrong: " + ", ".join(wrong), failed=True)
    except (ImportError, Unavailable) as error:
        found.refuse(f"not available: {error}")
    except torch.OutOfMemoryError:
        found.refuse("out of memory")
    except MemoryError as error:
        found.refuse(f"too large: {error}")
    except Exception as error:  # one contender's fault must not end the comparison of the others
        found.refuse(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}", failed=True)
    return found, None


def measure(
    case: Case | HiddenCase | Problem,
    providers: Iterable[tuple[str, Provider]],
    device: torch.device,
    rounds: int,
    out_of_time: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
    level: Level = LOGITS,
) -> list[Measurement]:
    """The floor, then each provider. At least one round is made, and no more once the time is out."""
    say("drawing inputs")
    inputs = level.inputs(case, device)
    truth, floor = level.truth(inputs), level.floor and level.floor(inputs)
    found, contenders = ({floor.name: Measurement(floor.name)}, {floor.name: floor}) if floor else ({}, {})
    shares = {}
    for name, provider in providers:
        say(f"checking {name}")
        shares[name] = provider.products
        found[name], contender = admit(name, provider, inputs, truth, level)
        if contender is not None:
            contenders[name] = contender
        elif provider.overwrites:
            inputs.policy.detach().copy_(inputs.pristine)
        if floor is not None:
            gc.collect()  # takes longer than what is not timed
    del truth
    if floor is None:
        return list(found.values())

    say("timing")
    clock, start = Clock(device), time.monotonic()
    times = {name: [] for name in contenders}
    for turn in range(not level.warm_up, rounds + 1):  # the first one, 0, warms up
        if turn > 1 and (out_of_time() or time.monotonic() > start + CASE_SECONDS):
            break
        for name, contender in contenders.items():
            ms = contender.round(clock)
            if turn:
                times[name].append(ms)

    least = None
    for name, rows in times.items():
        result = found[name]
        result.rounds = len(rows)
        result.ms = {phase: quantiles([ms[phase] for ms in rows]) for phase in rows[0]}
        least = least or result.ms  # the floor is the first
        result.floor_ms = {phase: ms[1] for phase, ms in least.items()}
        bounds = {phase: shares.get(name, 1.0) * least[phase][0] for phase in floor.bounds}
        fast = [phase for phase, bound in bounds.items() if bound > TOO_FAST * result.ms[phase][1]]
        if fast:
            result.refuse(f"{' and '.join(fast)} faster than the {floor.must} allow: something is not measured", failed=True)
    return list(found.values())


def quantiles(values: list[float]) -> list[float]:
    """QUANTILES of the values."""
    return torch.tensor(values, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
