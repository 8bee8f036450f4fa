"""The pictures of the demo."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from fused_tdpo.cli import demo_method as method
from fused_tdpo.cli import demo_smollm2 as smollm2
from fused_tdpo.cli import demo_swap as swap

BLUE, RED, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"  # Okabe and Ito's, which colour-blind people tell apart
COLOURS = {swap.NAIVE: RED, swap.TRL: GREEN, swap.OURS: BLUE, "DPO": RED, "TDPO1": PURPLE, "TDPO2": BLUE}
MARKERS = {swap.NAIVE: "o", swap.TRL: "s", swap.OURS: "D", "DPO": "o", "TDPO1": "s", "TDPO2": "D"}
KL = "KL(reference ‖ policy), nats a sentence"

Label = tuple[float, float, str, str]
"""x, y, text, colour."""


def draw(path: Path, swapped: swap.Result | None, trained: method.Result | None, title: str) -> None:
    """Writes a PNG with a row of panels for each part that there is."""
    rows: list[Callable[[Any], None]] = []
    if swapped is not None:
        rows.append(lambda axes: _draw_swap(axes, swapped))
    if trained is not None:
        rows.append(lambda axes: _draw_method(axes, trained))
    _draw(path, rows, title)


def draw_smollm2(path: Path, result: smollm2.Result, title: str) -> None:
    """Writes a PNG with what the trainer logged."""
    _draw(path, [lambda axes: _draw_smollm2(axes, result)], f"TDPO2 on SmolLM2-135M-Instruct, LoRA; {title}")


def _draw(path: Path, rows: Sequence[Callable[[Any], None]], title: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(15, 4.7 * len(rows) + 0.4), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    figure.suptitle(title, fontsize=11, color="0.4")
    grid = figure.subplots(len(rows), 3, squeeze=False)
    for axes, function in zip(grid, rows, strict=True):
        for ax in axes:
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(color="0.92", linewidth=0.8)
            ax.set_axisbelow(True)
            ax.tick_params(labelsize=11)
            ax.xaxis.label.set_size(11)
            ax.yaxis.label.set_size(11)
        function(axes)
    figure.savefig(path)


def _label(ax: Any, labels: Sequence[Label], left: bool = False, size: float = 11) -> None:
    """Writes texts beside points, apart from each other. Needs the limits of the axes as they will be."""
    ax.figure.draw_without_rendering()
    labels = sorted(labels, key=lambda label: label[1])
    points = [72 / ax.figure.dpi * ax.transData.transform(label[:2])[1] for label in labels]
    places = points[:1]
    for point in points[1:]:
        places.append(max(point, places[-1] + 1.15 * size))
    down = fmean(place - point for place, point in zip(places, points, strict=True)) if points else 0.0
    for (x, y, text, colour), place, point in zip(labels, places, points, strict=True):
        offset = (-9 if left else 9, place - down - point)
        align = "right" if left else "left"
        ax.annotate(text, (x, y), offset, textcoords="offset points", ha=align, va="center", color=colour, fontsize=size)


# -------------------------------------------------------------------------------------------------------------------- the swap


def _draw_swap(axes: Any, result: swap.Result) -> None:
    memory, time, loss = axes
    budget = result.settings.budget / 2**30
    memory.axhline(budget, color="0.5", linewidth=1)
    memory.set(title="Peak memory of a training step", ylabel="GiB, beyond models and optimizer")
    time.set(title="Time of that step", ylabel="seconds")
    _draw_cells(memory, result, "peak", 2**30, f"hollow: computed, not run; grey: budget of {budget:.3g} GiB")
    _draw_cells(time, result, "ms", 1e3, "hollow: expected, not run")

    for way, width in zip((swap.NAIVE, swap.TRL, swap.OURS), (10, 5.5, 1.5), strict=True):
        if curve := result.curves.get(way):
            style = {"color": COLOURS[way], "linewidth": width, "markersize": width + 3, "marker": MARKERS[way]}
            loss.plot(range(len(curve)), curve, label=way, **style)
    V, lengths = next(iter(result.settings.lengths.items()))
    loss.set(title="Loss from the same start", xlabel=f"optimizer steps, V = {V:,}, T = {lengths[0]:,}", ylabel="loss of TDPO2")
    loss.xaxis.get_major_locator().set_params(integer=True)
    loss.legend(frameon=False, fontsize=11, labelspacing=0.9)
    loss.text(0.04, 0.06, f"at most {result.apart:.0e} apart", transform=loss.transAxes, color="0.35", fontsize=11)


def _draw_cells(ax: Any, result: swap.Result, name: str, unit: float, note: str) -> None:
    """Lines over T, one for each way and vocabulary; dotted and hollow where nothing was run."""
    lengths = sorted({cell.length for cell in result.cells})
    starts, ends = [], []
    for number, V in enumerate(result.settings.lengths):
        for way in (swap.NAIVE, swap.TRL, swap.OURS):
            cells = [cell for cell in result.cells if (cell.vocabulary, cell.way) == (V, way)]
            points = [(cell.length, getattr(cell, name) / unit, cell.skipped) for cell in cells]
            points = [point for point in points if point[1] == point[1]]  # not NaN
            if not points:
                continue
            colour = COLOURS[way]
            for (T, value, _), (next_T, next_value, skipped) in pairwise(points):
                ax.plot(
                    (T, next_T),
                    (value, next_value),
                    linestyle=":" if skipped else ("-", "--")[number],
                    linewidth=1.8,
                    color=colour,
                )
            for T, value, skipped in points:
                ax.plot(T, value, MARKERS[way], markersize=7, color=colour, markerfacecolor="white" if skipped else colour)
            starts.append((*points[0][:2], f"V = {V:,}", colour))
            if number == 0:
                ends.append((*points[-1][:2], way, colour))
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xlim(lengths[0] / 2**1.1, lengths[-1] * 2**0.85)
    ax.set_xticks(lengths, [f"{T:,}" for T in lengths])
    ax.yaxis.set_major_locator(_ticks())
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.minorticks_off()
    ax.set_xlabel(f"T, tokens of each of the pair's two sequences\n{note}")
    _label(ax, starts, left=True, size=9)
    _label(ax, ends)


def _ticks() -> Any:
    from matplotlib.ticker import LogLocator

    return LogLocator(subs=(1, 2, 5))


# ------------------------------------------------------------------------------------------------------------------ the method


def _draw_method(axes: Any, result: method.Result) -> None:
    frontier, chosen, rejected = axes
    for name in method.METHODS:
        for step in sorted({point.step for point in result.points}):
            group = [point for point in result.points if (point.method, point.step) == (name, step)]
            kls, rewards = [point.kl for point in group], [point.reward for point in group]
            bars = {"color": COLOURS[name], "alpha": 0.4, "linewidth": 1.5}
            frontier.plot((min(kls), max(kls)), [fmean(rewards)] * 2, **bars)
            frontier.plot([fmean(kls)] * 2, (min(rewards), max(rewards)), **bars)
        frontier.plot(*zip(*result.frontier(name), strict=True), color=COLOURS[name], marker=MARKERS[name], linewidth=1.8)
    frontier.plot(0, result.base_reward, "o", color="black", markersize=7)
    frontier.set(title="Reward against distance, of own samples", xlabel=KL, ylabel="P(positive), by the learned reward")
    frontier.margins(x=0.16)
    ends = [(*result.frontier(name)[-1], name, COLOURS[name]) for name in method.METHODS]
    _label(frontier, [*ends, (0.0, result.base_reward, "start", "black")])

    rejected.sharey(chosen)
    for ax, side in ((chosen, "chosen"), (rejected, "rejected")):
        labels = []
        for name in method.METHODS:
            logged = [entry for entry in result.history if entry["method"] == name]
            steps = sorted({entry["step"] for entry in logged})
            values = [[entry[f"kl/{side}"] for entry in logged if entry["step"] == step] for step in steps]
            ax.plot(steps, [fmean(v) for v in values], color=COLOURS[name], linewidth=1.8)
            band = [min(v) for v in values], [max(v) for v in values]
            ax.fill_between(steps, *band, color=COLOURS[name], alpha=0.2, linewidth=0)
            labels.append((steps[-1], fmean(values[-1]), name, COLOURS[name]))
        ax.set(title=f"KL of {side} sentences, in training", xlabel="optimizer steps", ylabel=KL)
        ax.set_xlim(0, 1.18 * result.settings.steps)
        _label(ax, labels)


# ------------------------------------------------------------------------------------------------------------------- one model


def _draw_smollm2(axes: Any, result: smollm2.Result) -> None:
    panels = (
        ("Loss", "loss of TDPO2", {"loss": ""}),
        ("Rewards, β(ρ + K)", "nats × β", {"rewards/chosen": "chosen", "rewards/rejected": "rejected"}),
        ("Sequential KL", KL, {"kl/chosen": "chosen", "kl/rejected": "rejected"}),
    )
    for ax, (title, unit, keys) in zip(axes, panels, strict=True):
        labels = []
        for (key, text), colour in zip(keys.items(), (BLUE, RED), strict=False):
            steps, values = [entry["step"] for entry in result.history], [entry[key] for entry in result.history]
            ax.plot(steps, values, color=colour, marker="o", markersize=4, linewidth=1.8)
            labels.append((steps[-1], values[-1], text, colour))
        ax.set(title=title, xlabel="optimizer steps", ylabel=unit)
        ax.set_xlim(0, 1.2 * result.settings.steps)
        _label(ax, labels)
