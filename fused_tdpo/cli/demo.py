"""The command `fused-tdpo demo`: what the swap saves, and what the method does, in one picture and one table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fused_tdpo.cli import demo_method as method
from fused_tdpo.cli import demo_smollm2 as smollm2
from fused_tdpo.cli import demo_swap as swap
from fused_tdpo.cli._console import parse_device, refuse, show, table
from fused_tdpo.cli._measure import as_bytes, as_time

Section = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Columns and rows."""
WAYS = (swap.NAIVE, swap.TRL, swap.OURS)


class Part(StrEnum):
    """What is shown."""

    BOTH = "both"
    SWAP = "swap"
    METHOD = "method"


class Model(StrEnum):
    """What is trained."""

    SMALL = "small"
    SMOLLM2 = "smollm2"


def demo(
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("fused-tdpo-demo.png"),
    part: Annotated[
        Part, typer.Option(help="swap: memory and time of a training step. method: DPO, TDPO1 and TDPO2 on movie reviews.")
    ] = Part.BOTH,
    model: Annotated[
        Model, typer.Option(help="small: new models. smollm2: in place of both parts, TDPO2 trains SmolLM2-135M by LoRA.")
    ] = Model.SMALL,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; default: the GPU, if there is one.")] = "",
    seed: Annotated[int, typer.Option(help="Of the method's first training.")] = 0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each training of the method.")] = None,
    quick: Annotated[bool, typer.Option(help="Seconds, not minutes: shows that it runs, and nothing else.")] = False,
) -> None:
    """One step of TDPO2 in three ways, then DPO, TDPO1 and TDPO2 on movie reviews; nothing is downloaded."""
    if not out.parent.is_dir():
        refuse(f"--out: there is no directory {str(out.parent)!r}; make it, or name another")
    if find_spec("matplotlib") is None:
        refuse("the picture needs matplotlib: pip install 'fused-tdpo[demo]'")
    where = parse_device(device)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, torch {torch.__version__}"
    if model is Model.SMOLLM2:
        _smollm2(out, where, seed, steps, quick, title)
        return

    swapped, trained, absent = None, None, ""
    with _progress() as part_of:
        if part is not Part.METHOD:
            swapped = swap.run(swap.new_settings(where, quick), where, part_of("the swap"))
        if part is not Part.SWAP:
            settings = method.QUICK if quick else method.Settings()
            settings = replace(settings, steps=steps, looks=min(steps, settings.looks)) if steps else settings
            try:
                trained = method.run(settings, where, seed, part_of("the method"))
            except ImportError as error:
                absent = str(error)
    if absent and swapped is None:
        refuse(absent)
    from fused_tdpo.cli.demo_plot import draw

    draw(out, swapped, trained, title)
    sections = [section for section in (swapped and swap_section(swapped), trained and method_section(trained)) if section]
    texts = [
        *([swap_verdict(swapped)] if swapped else []),
        *([trained.facts + ".", method_verdict(trained)] if trained else []),
        *([f"The method was not run: {absent}."] if absent else []),
    ]
    show(one_table(title, sections), *texts, f"Picture: {out}")
    if swapped and not swapped.equal:
        refuse("the losses are not the same: this is a bug")


def _smollm2(out: Path, device: torch.device, seed: int, steps: int | None, quick: bool, title: str) -> None:
    settings = smollm2.Settings(steps=2, batch=2, samples=2, reviews=1500) if quick else smollm2.Settings()
    try:
        with _progress() as part_of:
            result = smollm2.run(replace(settings, steps=steps or settings.steps), device, seed, part_of("SmolLM2"))
    except ImportError as error:
        refuse(str(error))
    from fused_tdpo.cli.demo_plot import draw_smollm2

    draw_smollm2(out, result, title)
    show(one_table(title, [smollm2_section(result)]), result.facts + ".", f"Picture: {out}")


@contextmanager
def _progress() -> Iterator[Callable[[str], Callable[[str, float], None]]]:
    """Bars on stderr; yields a function that adds one, and returns the one that moves it."""
    columns = (TextColumn("[bold]{task.fields[part]}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:

        def part_of(part: str) -> Callable[[str, float], None]:
            task = bars.add_task("", total=1.0, part=part)
            return lambda text, share: bars.update(task, description=text, completed=share)

        yield part_of


# -------------------------------------------------------------------------------------------------------------- table and text


def one_table(title: str, sections: list[Section]) -> Table:
    """Sections with as many columns as each other, one below the other."""
    (columns, rows), *others = sections
    made = table(title, columns)
    for row in rows:
        made.add_row(*row)
    for columns, rows in others:
        made.add_section()
        made.add_row(*columns, style="bold", end_section=True)
        for row in rows:
            made.add_row(*row)
    return made


def swap_section(result: swap.Result) -> Section:
    """Memory and time of every way and size, and the loss."""
    rows = []
    for V, lengths in result.settings.lengths.items():
        for T in lengths:
            rows.append((f"V = {V:,}, T = {T:,}", *(_cell(result.cell(V, T, way)) for way in WAYS)))
    number = max(map(len, result.curves.values()))
    losses = (f"{result.curves[way][-1]:.6f}" if way in result.curves else "" for way in WAYS)
    rows.append((f"loss after {number - 1} steps", *losses))
    return ("one step of TDPO2: peak memory, time", *WAYS), rows


def _cell(cell: swap.Cell | None) -> str:
    if cell is None:
        return "not available"
    if cell.skipped == "memory":
        return f"needs {as_bytes(cell.peak)}: not run"
    if cell.skipped == "time":
        return f"needs about {as_time(cell.ms)}: not run"
    return f"{as_bytes(cell.peak)}, {as_time(cell.ms)}"


def swap_verdict(result: swap.Result) -> str:
    """What the comparison shows, and what it does not."""
    settings = result.settings
    texts = [
        f"A training step of SmolLM2-135M's shape, {settings.layers} of its {swap.SMOLLM2_LAYERS} layers, "
        f"{str(settings.dtype)[6:]}, one pair of T tokens each, half of them prompt; memory is beyond models and optimizer.",
        f"Not run is what needs more than {as_bytes(settings.budget)} or {settings.patience:.0f} s.",
        f"The losses of {len(result.curves)} ways differ by {result.apart:.0e} at most.",
    ]
    for way in (swap.NAIVE, swap.TRL):
        both = [(cell, result.cell(cell.vocabulary, cell.length, swap.OURS)) for cell in result.cells if cell.way == way]
        measured = [(cell, own) for cell, own in both if own and not cell.skipped and not own.skipped]
        if measured:
            cell, own = max(measured, key=lambda pair: pair[0].vocabulary * pair[0].length)
            texts.append(
                f"{way}: {cell.peak / own.peak:.1f} times the memory and {cell.ms / own.ms:.1f} times the time of {swap.OURS} "
                f"at V = {cell.vocabulary:,}, T = {cell.length:,}."
            )
    texts += [f"{way} was not run: {reason}." for way, reason in result.absent.items()]
    texts.append("Not measured: naive code that drops the prompt's logits first, which needs about half.")
    return " ".join(texts)


def _spread(values: list[float], digits: int = 2) -> str:
    """Mean and half the range."""
    half = (max(values) - min(values)) / 2
    return f"{fmean(values):.{digits}f} ± {half:.{digits}f}"


def method_section(result: method.Result) -> Section:
    """The final points of the methods: means over seeds, and half the range."""
    names = list(method.METHODS)
    last = {name: result.last(name) for name in names}

    def row(text: str, *fields: str) -> tuple[str, ...]:
        cells = (", ".join(_spread([getattr(point, field) for point in last[name]]) for field in fields) for name in names)
        return text, *cells

    rows = [
        row(f"reward of own samples (before: {result.base_reward:.2f})", "reward"),
        row("KL(reference ‖ policy) of these, nats", "kl"),
        row("the same of held-out chosen, rejected ones", "chosen_kl", "rejected_kl"),
        row("held-out pairs in the right order", "accuracy"),
    ]
    return (f"after {result.settings.steps} steps of training", *names), rows


def method_verdict(result: method.Result) -> str:
    """What the experiment shows, and how sure that is."""
    ends = {name: result.frontier(name)[-1] for name in method.METHODS}
    least = min(reward for _, reward in ends.values())
    at = {name: result.kl_at(name, least) for name in method.METHODS}
    paid = ", ".join(f"{name} {'never' if kl is None else f'{kl:.1f}'}" for name, kl in at.items())
    final = ", ".join(f"{name} {reward:.2f} at {kl:.1f} nats" for name, (kl, reward) in ends.items())
    return (
        f"After equally many steps: {final}. The smallest of these rewards is reached at (nats): {paid}. Means over "
        f"{result.settings.seeds} seeds, of {result.settings.samples} samples each: enough to see a tendency, not to rank what "
        f"is close."
    )


def smollm2_section(result: smollm2.Result) -> Section:
    """The first and last steps, and an answer before and after."""
    first, last = result.history[0], result.history[-1]

    def row(text: str, key: str) -> tuple[str, ...]:
        return text, f"{first[key]:.3f}", f"{last[key]:.3f}"

    rows = [
        row("loss", "loss"),
        row("rewards/margins", "rewards/margins"),
        row("kl/chosen, nats", "kl/chosen"),
        row("kl/rejected, nats", "kl/rejected"),
        (f"mean reward of {result.settings.samples} answers", *(f"{reward:.2f}" for reward in result.rewards)),
        *(("an answer", *texts) for texts in list(zip(*result.answers, strict=True))[:4]),
    ]
    return (f"TDPO2, {result.settings.steps} steps", "first", "last"), rows
