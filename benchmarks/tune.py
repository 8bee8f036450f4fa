"""Sweeps what kernels/token_stats.py decides by pure functions (tile, segment, chunk, register cap), best choices first.

Run by `run.py --tune`. The default choice is in every sweep twice, first and last: what lies between these two is noise. A
choice whose results are wrong is refused, as in measure.py.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from unittest import mock

import torch
from torch import Tensor

from cases import Case
from fused_tdpo import TokenStats, token_stats
from fused_tdpo.kernels import token_stats as kernels
from measure import Clock, Contender, Copy, Inputs, Truth, quantiles
from providers import Provider
from report import Table, digits

CASES = ("N4096-V151936-bf16", "N4096-V32000-bf16", "N4096-V262144-bf16", "N128-V151936-bf16")

Config = Mapping[str, int]
SWEEPS: dict[str, dict[str, tuple[int, ...]]] = {
    "forward": {
        "warps": (1, 2, 4, 8),
        "pairs": (8, 16, 32),
        "registers": (72, 80, 96, 128),
        "segment": (2**15, 2**16, 2**17, 2**30),
    },
    "backward": {"warps": (1, 2, 4, 8), "pairs": (8, 16, 32), "registers": (40, 64), "tiles": (4, 8, 16)},
}
"""Phase -> choices: warps of a program, logit pairs of a tile that a thread holds, cap of its registers; then the most columns
of a segment, or the tiles of a chunk."""


@contextmanager
def configured(config: Config) -> Iterator[None]:
    """The launchers, with other choices for one phase."""
    default = kernels.tiling

    def tiling(V: int, itemsize: int, wide: bool) -> kernels.Tiling:
        tile = default(V, itemsize, wide)
        return replace(tile, K=max(1, config["pairs"] // tile.E), T=32 * config["warps"])

    choices: dict[str, object] = {"tiling": tiling}
    if "segment" in config:
        choices |= {"SEGMENT_COLUMNS": config["segment"], "fold_registers": lambda *_: config["registers"]}
    if "tiles" in config:
        choices["backward_chunk"] = lambda tile: config["tiles"] * tile.columns
        choices["backward_registers"] = lambda tile, dtype: config["registers"]
    with mock.patch.multiple(kernels, **choices):
        yield


def default_config(phase: str, inputs: Inputs) -> Config:
    """What the launchers choose."""
    V = inputs.policy.shape[-1]
    tile = kernels.tiling(V, inputs.policy.element_size(), kernels.is_wide(V, inputs.policy[None], inputs.ref[None]))
    common = {"warps": tile.num_warps, "pairs": tile.K * tile.E}
    if phase == "forward":
        return common | {
            "registers": kernels.fold_registers(tile, extras=False, reverse=False),
            "segment": kernels.SEGMENT_COLUMNS,
        }
    registers = kernels.backward_registers(tile, inputs.policy.dtype)
    return common | {"registers": registers, "tiles": kernels.backward_chunk(tile) // tile.columns}


def tune(
    case: Case,
    phase: str,
    device: torch.device,
    rounds: int,
    say: Callable[[str], None],
    sweep: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[list[dict], float]:
    """(Each choice with its times or the reason why it has none, the default first and last; the floor's milliseconds)."""
    inputs, clock = Inputs(case, device), Clock(device)
    truth, contender = Truth(inputs), Contender(Provider(lambda: partial(token_stats, backend="triton")), inputs)
    sweep = sweep or SWEEPS[phase]
    default = default_config(phase, inputs)
    configs = [dict(zip(sweep, values, strict=True)) for values in product(*sweep.values())]
    found = [{"config": config, "refused": "", "errors": {}, "ms": []} for config in (default, *configs, default)]

    for number, choice in enumerate(found, 1):
        if number % 10 == 1:
            say(f"compiling and checking {phase} {number} of {len(found)}")
        try:
            _, stats, grad = call(contender, phase, choice["config"], clock)
            choice["errors"], wrong = truth.judge(stats, grad)
            choice["refused"] = ", ".join(wrong)
        except Exception as error:  # a choice that cannot be compiled or launched is no reason to stop
            choice["refused"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

    say(f"timing {phase}")
    admitted = [choice for choice in found if not choice["refused"]]
    times: list[list[float]] = [[] for _ in admitted]
    copy, floor = Copy(case, device), []
    for _ in range(rounds):
        floor.append(copy.round(clock)[phase])
        for choice, own in zip(admitted, times, strict=True):
            own.append(call(contender, phase, choice["config"], clock)[0])
    for choice, own in zip(admitted, times, strict=True):
        choice["ms"] = quantiles(own)
    return found, quantiles(floor)[1]


def call(contender: Contender, phase: str, config: Config, clock: Clock) -> tuple[float, TokenStats, Tensor]:
    """(Milliseconds of the phase with these choices, the statistics, the gradient)."""
    ms = {}
    with configured(config) if phase == "forward" else nullcontext():
        ms["forward"], (logits, stats) = clock(contender.forward)
    with configured(config) if phase == "backward" else nullcontext():
        ms["backward"], grad = clock(lambda: contender.backward(logits, stats))
    return ms[phase], stats, grad


def best(found: list[dict], floor: float, count: int = 6) -> Table:
    """The fastest choices, and the default as measured first and last."""
    measured = [choice for choice in found if not choice["refused"]]
    fastest = sorted(measured, key=lambda choice: choice["ms"][1])[:count]
    names = tuple(found[0]["config"])
    table = Table(("", *names, "ms", "of copy's speed"))
    for place, choice in [*enumerate(fastest, 1), ("default", found[0]), ("default again", found[-1])]:
        times = (digits(choice["ms"][1]), f"{floor / choice['ms'][1]:.0%}") if choice["ms"] else (choice["refused"], "")
        table.rows.append((str(place), *(str(choice["config"][name]) for name in names), *times))
    return table
