"""How much memory a preference loss takes, and how long sequences may be: formulas, and the command that tabulates them.

A formula counts what lives at the worst moments of one forward and backward, beyond the inputs (hidden states, heads, labels),
as the code that it is about allocates it: the ways of `fused_tdpo.cli._rivals`, and LinearTDPOLoss with the one-pass engine.
tests/test_plan.py holds each against peaks that are measured, here on a CPU and in the benchmark's records on GPUs.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from fused_tdpo._chunks import plan_pairs, rows_per_chunk
from fused_tdpo._projection import row_bytes
from fused_tdpo._torch_backend import CHUNK_ELEMENTS
from fused_tdpo.cli._console import parse_size, refuse, show, table
from fused_tdpo.cli._measure import as_bytes, available_bytes

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_name(dtype: torch.dtype) -> str:
    """As the options call it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True)
class Workload:
    """One step of a preference loss on one device, from hidden states: 2·pairs sequences of T positions, V × D heads."""

    V: int
    D: int
    T: int
    pairs: int = 1
    dtype: torch.dtype = torch.bfloat16
    trained: bool = True
    """The policy's head gets a gradient. Frozen, as with adapters, it is the reference's as well."""
    share: float = 0.5
    """Of a sequence's positions whose label counts."""
    max_chunk_bytes: int | None = None
    """As in LinearTDPOLoss."""
    on_gpu: bool = True

    @property
    def positions(self) -> int:
        """Of all sequences."""
        return 2 * self.pairs * self.T

    @property
    def length(self) -> int:
        """Rows that count of one sequence: the last position predicts none."""
        return min(round(self.share * self.T), self.T - 1)

    @property
    def N(self) -> int:
        """Rows that count of all sequences."""
        return 2 * self.pairs * self.length

    @property
    def head(self) -> int:
        """Numbers in the gradient of the head."""
        return self.V * self.D if self.trained else 0

    @property
    def words(self) -> str:
        """What the head and its dtype are."""
        return f"V {self.V:,}, D {self.D:,}, {dtype_name(self.dtype)}, head {'trained' if self.trained else 'frozen'}"


# ------------------------------------------------------------------------------------------------------------------- formulas


class Moment(NamedTuple):
    """Bytes that live at once, beyond the inputs."""

    logits: float
    """Logits, and whatever else has a vocabulary axis and rows."""
    hidden: float
    """Gradients of hidden states, and copies of rows of these."""
    head: float
    """Gradients of the head, and sums that become them."""
    other: float = 0
    """Statistics and indices of rows."""

    @property
    def total(self) -> float:
        """Bytes in all."""
        return sum(self)


def _worst(*moments: Moment) -> Moment:
    return max(moments, key=lambda moment: moment.total)


def naive_all(work: Workload) -> Moment:
    """Peak of `_rivals.naive_all`. Forward holds both models' logits, as they came and in float32, and five tensors more:
    log-softmax, softmax, its log, and two of the sum; backward two of these, the same in gradients."""
    e, rows = work.dtype.itemsize, work.positions - 2 * work.pairs
    given = work.positions if e < 4 else work.positions - rows  # float32 logits are not copied, but one row is cut off
    return _worst(
        Moment((28 * rows + 2 * e * given) * work.V, 0, 0),
        Moment(16 * rows * work.V, 0, 0),
        Moment(e * work.positions * work.V, e * work.positions * work.D, e * work.head),
    )


def naive_valid(work: Workload) -> Moment:
    """Peak of `_rivals.naive_valid`: as `naive_all`, of the rows that count, which are copied; nothing holds the logits as they
    came, once they are in float32."""
    e, N, copy = work.dtype.itemsize, work.N, work.dtype.itemsize * work.N * work.D
    return _worst(
        Moment(28 * N * work.V, 2 * copy, 0),
        Moment(16 * N * work.V, copy, 0),
        Moment(e * N * work.V, 2 * copy, e * work.head),
        Moment(0, copy + e * work.positions * work.D, e * work.head),
    )


TRL_ROWS, TRL_COLUMNS = 4096, 32768
"""A tile in TRL's kernels."""


def trl(work: Workload) -> Moment:
    """Peak of `_rivals.trl` (trl 1.16): two float32 tiles in the divergence, one in the compute dtype in the log-prob; each
    backward sums both gradients in float32, then casts them, and the log-prob's comes second. Without Triton, folds of tiles
    are written in torch, and hold up to nine more; there, half-precision heads are multiplied as float32 copies."""
    e, N, D, V = work.dtype.itemsize, work.N, work.D, work.V
    half, on_cpu = e < 4, not work.on_gpu
    rows, columns = min(N, TRL_ROWS), min(V, TRL_COLUMNS)
    many = V > TRL_COLUMNS or N > TRL_ROWS  # a tile's gradient lives until the next one's is made
    tile = rows * TRL_COLUMNS
    fold, cast = (4 * rows * columns, 4 * columns * D * half) if on_cpu else (0, 0)
    sums = 4 * N * D, 4 * work.head
    casts = (e * N * D, e * work.head) if half else (0, 0)
    last = e * rows * (V % TRL_COLUMNS or TRL_COLUMNS) * half
    other = 72 * N
    return _worst(
        Moment(8 * tile + 6 * fold, 2 * e * N * D, 0, other),
        Moment(8 * tile, 2 * e * N * D, cast, other),
        Moment(8 * tile + max(9 * fold, (1 + many) * e * rows * columns * half), sums[0] + 2 * e * N * D, sums[1], other),
        Moment(8 * tile + last, sums[0] + 2 * e * N * D, sums[1] + cast, other),
        Moment(8 * tile + last, sums[0] + casts[0] + 2 * e * N * D, sums[1] + casts[1], other),
        Moment(e * tile + 7 * fold, sums[0] + 2 * e * N * D, e * work.head + sums[1], other),
        Moment(e * tile, sums[0] + casts[0] + 2 * e * N * D, e * work.head + sums[1] + max(casts[1], cast), other),
    )


def liger_dpo(work: Workload) -> Moment:
    """Peak of `_rivals.liger_dpo` (liger-kernel 0.8.5): every position of one pair at a time, gradients in forward. Compiled,
    as it is on a GPU, both models' logits and one log-softmax live at once, else two of each in float32."""
    e, rows = work.dtype.itemsize, 2 * work.T
    before = (work.pairs - 1) * rows * e * work.D
    first, second = (2 * e + 4, e) if work.on_gpu else (16, 12)
    return _worst(
        Moment(first * rows * work.V, before + 2 * rows * e * work.D, e * work.head),
        Moment(second * rows * work.V, before + 3 * rows * e * work.D, 2 * e * work.head),
    )


def ours(work: Workload) -> Moment:
    """Peak of LinearTDPOLoss: the logits of one chunk, the hidden states' gradient before it is scaled and after, the head's in
    float32, once more where several pairs are longer than a chunk, and as the gradient that is returned."""
    e, N, D, V = work.dtype.itemsize, work.N, work.D, work.V
    of_row = row_bytes(V, work.dtype, work.dtype, None)
    rows = rows_per_chunk(of_row, D, work.trained, work.max_chunk_bytes)
    plan = plan_pairs([(work.length, work.length)] * work.pairs, rows)
    sizes = [group.rows.stop - group.rows.start for group in plan.groups] if work.trained else [N]
    part = max(-(-size // max(1, -(-size // rows))) for size in sizes)  # rows of the largest piece that `split` makes
    sums = 4 * work.head * (2 if sum(group.is_long for group in plan.groups) > 1 else 1)
    tiles, scratch, cast = of_row * min(rows, N), 0, 0
    if not work.on_gpu:  # the torch backend's, in float32
        scratch = 4 * 4 * V * max(1, min(part, CHUNK_ELEMENTS // V))
        cast = 4 * work.head * (e < 4)
    scaled = e * D * (N + work.positions)
    return _worst(
        Moment(tiles, e * D * (N + (2 if work.trained else 4) * part), sums, 32 * work.positions + 28 * N),
        Moment(tiles + scratch, e * D * (N + part), sums, 32 * work.positions + 28 * N),
        Moment(0, scaled + (4 + e) * D * part, 4 * work.head, 8 * work.positions + 4 * N),
        Moment(0, scaled, (4 + e) * work.head + cast, 8 * work.positions + 4 * N),
    )


class Way(NamedTuple):
    """One way to compute the loss."""

    label: str
    peak: Callable[[Workload], Moment]


WAYS = {
    "naive_all": Way("PyTorch, every position", naive_all),
    "naive_valid": Way("PyTorch, rows that count", naive_valid),
    "trl": Way("composed of TRL's kernels", trl),
    "liger_dpo": Way("Liger's DPO, without the KL", liger_dpo),
    "ours": Way("fused-tdpo", ours),
}


# ---------------------------------------------------------------------------------------------------- what else is in memory


class Sizes(NamedTuple):
    """Of a model."""

    V: int
    D: int
    layers: int | None
    parameters: int | None


class Others(NamedTuple):
    """What lies in memory besides the loss, as words -> bytes: once, and for each of the positions of all sequences."""

    fixed: dict[str, float]
    per_position: dict[str, float]

    def total(self, positions: int) -> float:
        """Bytes in all."""
        return sum(self.fixed.values()) + positions * sum(self.per_position.values())


def estimate(sizes: Sizes, work: Workload) -> Others:
    """Of full training, or of adapters where the head is frozen, with gradient checkpointing and nothing sharded or offloaded.

    One layer at work holds 34·D bytes a position in half precision without attention's scores: arXiv 2205.05198, section 4.1.
    """
    e, layers, parameters = work.dtype.itemsize, sizes.layers or 0, sizes.parameters
    told = "" if parameters else ", 12·layers·D² + V·D numbers"
    parameters = parameters or 12 * layers * work.D**2 + work.V * work.D
    fixed: dict[str, float]
    if work.trained:
        fixed = {
            f"weights of policy and reference{told}": 2 * e * parameters,
            "gradients but the head's, which is the loss's": e * (parameters - work.V * work.D),
            "two moments of AdamW, in the weights' dtype": 2 * e * parameters,
        }
    else:
        fixed = {f"weights, shared by policy and reference; adapters not counted{told}": e * parameters}
    return Others(
        fixed | {"CUDA's context and fragmentation": 2.0**30 * work.on_gpu},
        {
            "hidden states of both models": 2 * e * work.D,
            f"inputs of {layers} checkpointed layers": layers * e * work.D,
            "one layer at work": 17 * e * work.D,
        },
    )


def refuse_absent(source: str) -> None:
    """Refuses a path to nothing, before the hub is asked for a model of that name."""
    if not Path(source).exists() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        refuse(f"no such file or directory: {source!r}. Give a model's directory, its config.json, or its id on the hub.")


def read_sizes(source: str) -> Sizes:
    """Of the model that a directory, a config.json or a hub id describes: built on the meta device, no weights are loaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    refuse_absent(source)
    try:
        config = AutoConfig.from_pretrained(source)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        V, D = model.get_output_embeddings().weight.shape
    except Exception as error:  # transformers has many
        reason = str(error).strip().partition("\n")[0]
        refuse(f"no causal language model can be made of {source!r}: {reason} Give --vocab, --hidden and --layers instead.")
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    return Sizes(V, D, layers, sum(parameter.numel() for parameter in model.parameters()))


# -------------------------------------------------------------------------------------------------------------- what fits


def longest(peak: Callable[[Workload], Moment], work: Workload, others: Others, memory: float) -> int:
    """The largest T with which the loss and all else fit; 0 if there is none from 2 on."""

    def fits(T: int) -> bool:
        at = replace(work, T=T)
        return peak(at).total + others.total(at.positions) <= memory

    if not fits(2):
        return 0
    low, high = 2, 4
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


LEAST_ROWS = 256
"""Of a chunk: with fewer, products are slow."""


class Advice(NamedTuple):
    """What to pass as `max_chunk_bytes`."""

    max_chunk_bytes: int | None
    longest: int
    """The largest T that fits then."""
    text: str


def advise(work: Workload, others: Others, memory: float) -> Advice:
    """The largest chunk with which T fits: the one that was asked for or the default, or else its half, and so on."""
    of_row = row_bytes(work.V, work.dtype, work.dtype, None)
    rows = rows_per_chunk(of_row, work.D, work.trained, work.max_chunk_bytes)
    chunks = [work.max_chunk_bytes]
    while (rows := rows // 2) >= LEAST_ROWS:
        chunks.append(rows * of_row)
    reach = [longest(ours, replace(work, max_chunk_bytes=chunk), others, memory) for chunk in chunks]
    found = next((i for i, T in enumerate(reach) if T >= work.T), None)
    if found is None:
        best = max(range(len(chunks)), key=lambda i: reach[i])
        text = f"T = {work.T:,} does not fit, whatever the chunk. {_setting(chunks[best])} reaches T = {reach[best]:,}"
        text += "." if reach[best] else ": nothing fits. Take fewer pairs, or less of what else is in memory."
        return Advice(chunks[best], reach[best], text)
    text = f"T = {work.T:,} fits with {_setting(chunks[found])}, and so does every T up to {reach[found]:,}."
    if reach[-1] > 1.05 * reach[found]:
        text += f" Smaller chunks reach farther: T = {reach[-1]:,} with {_setting(chunks[-1])}."
    return Advice(chunks[found], reach[found], text)


def _setting(chunk: int | None) -> str:
    return "max_chunk_bytes left alone" if chunk is None else f"max_chunk_bytes={chunk} ({as_bytes(chunk)})"


# -------------------------------------------------------------------------------------------------------------------- command


def plan(
    model: Annotated[str | None, typer.Argument(help="A model's directory, its config.json, or its id on the hub.")] = None,
    vocab: Annotated[int | None, typer.Option(min=1, help="Rows of the head, V; without a MODEL.")] = None,
    hidden: Annotated[int | None, typer.Option(min=1, help="Hidden size, D; without a MODEL.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Number of layers, to estimate what else is in memory.")] = None,
    length: Annotated[int, typer.Option("--length", "-T", min=2, help="Positions of a sequence, T.")] = 4096,
    pairs: Annotated[int, typer.Option("--pairs", "-P", min=1, help="Pairs on one device.")] = 1,
    memory: Annotated[
        float | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="Of the device, such as 80GiB; default: the GPU here."),
    ] = None,
    frozen: Annotated[bool, typer.Option("--frozen-head", help="The head gets no gradient, as with adapters.")] = False,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bf16",
    share: Annotated[float, typer.Option(min=0.001, max=1, help="Of the positions whose label counts: the answers'.")] = 0.5,
    max_chunk_bytes: Annotated[
        float | None, typer.Option(parser=parse_size, metavar="SIZE", help="As LinearTDPOLoss takes it; default: its own.")
    ] = None,
    other_bytes: Annotated[
        float | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="All else in memory; default: an estimate, which is shown."),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Plan for the CPU of this machine, not for a GPU.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell how much memory the loss takes, each way, and the longest sequence that fits."""
    if dtype not in DTYPES:
        refuse(f"--dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if model is not None and (vocab or hidden or layers):
        refuse("a MODEL has its own sizes: leave out --vocab, --hidden and --layers, or the MODEL")
    if model is None and not (vocab and hidden):
        refuse("give a MODEL, or both --vocab and --hidden, such as --vocab 151936 --hidden 4096 --layers 36")
    sizes = Sizes(vocab or 0, hidden or 0, layers, None) if model is None else read_sizes(model)
    chunk = None if max_chunk_bytes is None else int(max_chunk_bytes)
    work = Workload(sizes.V, sizes.D, length, pairs, DTYPES[dtype], not frozen, share, chunk, not cpu)
    if other_bytes is not None:
        others = Others({"as --other-bytes says": other_bytes}, {})
    elif sizes.layers is None:
        refuse("what else is in memory? Give --other-bytes, such as --other-bytes 40GiB, or with --vocab also --layers")
    else:
        others = estimate(sizes, work)
    memory = _memory(cpu) if memory is None else memory
    found = {name: (way.peak(work), longest(way.peak, work, others, memory)) for name, way in WAYS.items()}
    advice = advise(work, others, memory)
    if as_json:
        json.dump(_record(work, others, memory, found, advice), sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        show(*_tables(work, others, memory, found), advice.text)


def _memory(cpu: bool) -> float:
    """Of the device that is here."""
    if cpu:
        size = available_bytes()
        return size if isfinite(size) else refuse("this system does not say how much memory is free: pass --memory")
    if not torch.cuda.is_available():
        refuse("no GPU is here to plan for: say how much memory one has, with --memory 80GiB, or plan for this CPU, with --cpu")
    return torch.cuda.get_device_properties(0).total_memory


Found = dict[str, tuple[Moment, int]]


def _record(work: Workload, others: Others, memory: float, found: Found, advice: Advice) -> dict[str, Any]:
    return {
        "workload": vars(work) | {"dtype": dtype_name(work.dtype), "N": work.N},
        "memory_bytes": memory,
        "other_bytes": others._asdict() | {"total": others.total(work.positions)},
        "ways": {
            name: peak._asdict() | {"total": peak.total, "longest": T} for name, (peak, T) in found.items()
        },
        "advice": advice._asdict(),
    }  # fmt: skip


def _tables(work: Workload, others: Others, memory: float, found: Found) -> list[Any]:
    pairs = f"{work.pairs} pair{'s' * (work.pairs > 1)}"
    title = f"{pairs} of 2 × {work.T:,} positions, of which {work.N:,} in all count; {work.words}. Peak over the inputs:"
    rest = others.total(work.positions)
    ways = table(title, ("", *Moment._fields, "sum", f"fits in {as_bytes(max(memory - rest, 0))}", "longest T"))
    for name, (peak, T) in found.items():
        fits = "yes" if peak.total + rest <= memory else "no"
        sizes = [as_bytes(size) if size else "–" for size in (*peak, peak.total)]
        ways.add_row(WAYS[name].label, *sizes, fits, f"{T:,}" if T else "–")
    besides = table(f"Besides, of {as_bytes(memory)}:", ("", ""))
    for words, size in others.fixed.items():
        besides.add_row(words, as_bytes(size))
    for words, size in others.per_position.items():
        besides.add_row(f"{words}, {as_bytes(size)} a position", as_bytes(size * work.positions))
    return [ways, besides]
