"""How the commands speak: tables and lines on stdout, refusals on stderr, sizes as people write them."""

import re
import sys
from collections.abc import Sequence
from math import isfinite
from typing import NoReturn

import torch
import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_PIPED_WIDTH = 160
"""Columns where nobody's window says how many."""


def show(*things: RenderableType) -> None:
    """Prints texts and tables, one below the other."""
    console = Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False, markup=False)
    for thing in things:
        console.print(thing)


def refuse(message: str) -> NoReturn:
    """Ends the command with exit code 2 and a message on stderr, which says what was expected, what came, and the next step."""
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error: ", "bold red"), message))
    raise typer.Exit(2)


def table(title: str, columns: Sequence[str], left: int = 1) -> Table:
    """An empty table, whose first columns are set left and the others right."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right", overflow="fold")
    return made


def parse_size(text: str) -> float:
    """Bytes, from "80GiB", "80G", "512 MiB", "80GB" or "1e9"; a unit without i and B counts in powers of 1024, as memory does.

    Raises:
        typer.BadParameter: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d+)?)\s*([kmgt]?)(i?b?)\s*", text, re.IGNORECASE)
    number, unit, rest = found.groups() if found else ("inf", "", "")
    size = float(number) * (1000 if rest.lower() == "b" else 1024) ** _UNITS[unit.lower()]
    if not isfinite(size):
        raise typer.BadParameter(f"a size such as 80GiB, 512MiB or a number of bytes is expected; got {text!r}")
    return size


def parse_device(name: str) -> torch.device:
    """The one that was asked for, or the one that is here."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        refuse(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type not in ("cpu", "cuda"):
        refuse(f"--device must be cpu, cuda or cuda:N, for which there are backends; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        refuse(f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs. Take another, or cpu.")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device
