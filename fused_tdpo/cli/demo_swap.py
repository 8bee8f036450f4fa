"""The swap: one training step of TDPO2 with a vocabulary of real size, in three ways.

Model, batch and optimizer are the same; what differs is how the loss comes from the hidden states of policy and reference.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fused_tdpo import LinearTDPOLoss
from fused_tdpo.cli._measure import available_bytes, peak_bytes, wall_clock
from fused_tdpo.cli._rivals import ALPHA, Loss, naive_all, trl
from fused_tdpo.cli.plan import WAYS, Workload
from fused_tdpo.heads import backbone

BETA = 0.1
NAIVE, TRL, OURS = "naive PyTorch", "TRL's kernels", "fused-tdpo"
FORMULAS = {NAIVE: "naive_all", TRL: "trl", OURS: "ours"}
"""Way -> its key in `plan.WAYS`."""
SMOLLM2_LAYERS = 30
CPU_CHUNK = 128 * 2**20
"""What our loss may spend on logits on a CPU; on a GPU it is left to it."""

Say = Callable[[str, float], None]
"""Told what is going on, and the share of the part that is done."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the comparison."""

    lengths: dict[int, tuple[int, ...]]
    """Vocabulary -> lengths T of the two sequences of the pair. The losses are compared at the first of all."""
    layers: int
    dtype: torch.dtype
    budget: float
    """Bytes that a step may take beyond what lay there before; what needs more is not run."""
    patience: float = 12.0
    """Seconds that a step may take; what is expected to take more is not run."""
    hidden: int = 576
    curve: int = 3
    """Steps of the loss curves."""
    repeats: int = 1
    """Steps elsewhere. All are timed, the fastest counts; of the last one memory is measured."""
    learning_rate: float = 3e-6


@dataclass(frozen=True)
class Cell:
    """One way at one size."""

    vocabulary: int
    length: int
    way: str
    peak: float
    """Bytes at the worst moment of a step, beyond what lay there before."""
    ms: float
    skipped: Literal["", "memory", "time"] = ""
    """Why it was not run; `peak` and `ms` are what was expected then, or NaN."""


@dataclass
class Result:
    """What the comparison found."""

    settings: Settings
    cells: list[Cell] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    """Way -> loss at each step."""
    absent: dict[str, str] = field(default_factory=dict)
    """Way -> why it could not be run at all."""

    @property
    def apart(self) -> float:
        """The largest difference between two ways' losses at a step; NaN if one is."""
        losses = torch.tensor(list(self.curves.values()))
        return float((losses.amax(0) - losses.amin(0)).max())

    @property
    def equal(self) -> bool:
        """Whether that is rounding: of sums over a sequence, of logits in the compute dtype. NaN is not."""
        return self.apart <= (1e-4 if self.settings.dtype == torch.float32 else 2e-2)

    def cell(self, vocabulary: int, length: int, way: str) -> Cell | None:
        """The one of that size, or None."""
        key = (vocabulary, length, way)
        return next((cell for cell in self.cells if (cell.vocabulary, cell.length, cell.way) == key), None)


def new_settings(device: torch.device, quick: bool = False) -> Settings:
    """What the device can do within a minute or two; `quick`: in seconds, with a model of no size."""
    if quick:
        return Settings({40_000: (64, 96), 60_000: (64,)}, 1, torch.float32, 190e6, hidden=72)
    if device.type == "cuda":
        lengths = tuple(2**k for k in range(10, 15))
        budget = 0.8 * torch.cuda.mem_get_info(device)[0]
        return Settings({49_152: lengths, 151_936: lengths}, SMOLLM2_LAYERS, torch.bfloat16, budget, repeats=3)
    budget = min(5 * 2**30, 0.7 * available_bytes())
    return Settings({49_152: (512, 1024, 2048), 151_936: (512, 1024)}, 1, torch.float32, budget)


def new_model(vocabulary: int, layers: int, hidden: int = 576) -> Any:
    """SmolLM2-135M's shape with random weights; head and embedding are one, as there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65_536,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def new_pair(vocabulary: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, labels), (2, T) each: chosen and rejected after the same prompt, which is their first half."""
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(length))
    ids[1, : length // 2] = ids[0, : length // 2]
    labels = ids.clone()
    labels[:, : length // 2] = -100
    return ids.to(device), labels.to(device)


def ours(device: torch.device) -> Loss:
    """`LinearTDPOLoss`, called as the rivals are."""
    chunk = CPU_CHUNK if device.type == "cpu" else None

    def loss(beta: float, x: Tensor, head: Tensor, z: Tensor, ref_head: Tensor, labels: Tensor) -> Tensor:
        rows = [labels.shape[-1] // 2] * 2  # a collator knows them
        return LinearTDPOLoss(beta=beta, alpha=ALPHA, max_chunk_bytes=chunk)(x, head, z, ref_head, labels, valid_rows=rows).loss

    return loss


class Bench:
    """A policy, its reference and its optimizer, which every way uses in turn from the same start."""

    def __init__(self, vocabulary: int, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(0)
        self.device, self.vocabulary = device, vocabulary
        self.model = new_model(vocabulary, settings.layers, settings.hidden).to(device, settings.dtype)
        self.ref = deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.learning_rate, fused=True)
        self.reset()

    def reset(self) -> None:
        """Policy = reference, and an optimizer that has its memory already, and none of the past."""
        self.model.load_state_dict(self.ref.state_dict())
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.state.clear()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, loss: Loss, ids: Tensor, labels: Tensor) -> float:
        """One step of training: reference, policy, loss, backward, optimizer. Returns the loss."""
        with torch.no_grad():
            ref_hidden = backbone(self.ref)(ids).last_hidden_state
        hidden = backbone(self.model)(ids).last_hidden_state
        value = loss(BETA, hidden, self.model.lm_head.weight, ref_hidden, self.ref.lm_head.weight, labels)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(value.detach())

    def time(self, loss: Loss, ids: Tensor, labels: Tensor) -> tuple[float, float]:
        """(Milliseconds, loss) of one step."""
        return wall_clock(self.device, lambda: self.step(loss, ids, labels))

    def measure(self, loss: Loss, ids: Tensor, labels: Tensor) -> tuple[float, float, float]:
        """(Peak bytes, milliseconds, loss) of one step."""
        found: list[tuple[float, float]] = []
        (peak,) = peak_bytes(self.device, lambda: found.append(self.time(loss, ids, labels)))
        return peak, *found[0]


def expected(result: Result, vocabulary: int, length: int, way: str, device: torch.device) -> tuple[float, float]:
    """(Peak bytes, milliseconds) of a step, by the formula of its loss and by what was measured: ours at this length or the one
    before, for what is not the loss's; the same way at the length before. NaN where nothing tells."""
    settings = result.settings

    def formula(way: str, length: int) -> float:
        chunk = CPU_CHUNK if device.type == "cpu" else None
        on_gpu = device.type == "cuda"
        work = Workload(vocabulary, settings.hidden, length, dtype=settings.dtype, max_chunk_bytes=chunk, on_gpu=on_gpu)
        return WAYS[FORMULAS[way]].peak(work).total

    peak, ms = formula(way, length), float("nan")
    for before in result.cells:
        if before.vocabulary == vocabulary and not before.skipped:
            if before.way == OURS:
                others = before.peak - formula(OURS, before.length)
                peak = formula(way, length) + max(0.0, others) * length / before.length
            if before.way == way:
                ms = before.ms * length / before.length
    return peak, ms


def run(settings: Settings, device: torch.device, say: Say) -> Result:
    """The whole comparison; ours comes first at each size, since it tells what the others need besides the loss."""
    result, ways = Result(settings), {OURS: ours(device), NAIVE: naive_all}
    try:
        ways[TRL] = trl()
    except ImportError as error:
        result.absent[TRL] = f"{error}; pip install 'fused-tdpo[demo]'"
    plan = list(_sizes(settings, list(ways)))
    work, done = sum(V * T for V, T, _ in plan), 0
    bench = None
    for vocabulary, length, way in plan:
        say(f"{way}: V = {vocabulary:,}, T = {length:,}", done / work)
        done += vocabulary * length
        if bench is None or bench.vocabulary != vocabulary:
            bench = None  # before the next one is made
            bench = Bench(vocabulary, settings, device)
        peak, ms = expected(result, vocabulary, length, way, device)
        skipped: Literal["", "memory", "time"] = (
            "memory" if peak > settings.budget else "time" if ms > 1e3 * settings.patience else ""
        )
        if not skipped:
            batch = new_pair(vocabulary, length, device)
            if first := (vocabulary, length) == plan[0][:2]:
                bench.reset()
            timed = [bench.time(ways[way], *batch) for _ in range((settings.curve if first else settings.repeats) - 1)]
            peak, *measured = bench.measure(ways[way], *batch)
            times, losses = zip(*timed, measured, strict=True)
            ms = min(times)
            if first:
                result.curves[way] = list(losses)
        result.cells.append(Cell(vocabulary, length, way, peak, ms, skipped))
    say("done", 1.0)
    return result


def _sizes(settings: Settings, ways: list[str]) -> Iterator[tuple[int, int, str]]:
    for vocabulary, lengths in settings.lengths.items():
        for length in lengths:
            for way in ways:
                yield vocabulary, length, way
