"""The README's table of losses, from the code: docstrings, forms, and what the losses say of themselves.

    python tests/loss_table.py       prints it, and rewrites what stands between `<!-- table: losses -->` and `<!-- end -->`

Not a view of benchmarks/report.py, which makes what is `generated` from records.
"""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import fused_tdpo
from fused_tdpo.linear_losses import choose_engine
from fused_tdpo.losses import PairLoss, PreferenceLoss
from fused_tdpo.pair_losses import PAIR_FORMS, PAIR_LOSSES, SMOOTHED

README = Path(__file__).resolve().parents[1] / "README.md"
SECTION = re.compile(r"(?<=<!-- table: losses -->\n).*?(?=<!-- end -->)", re.DOTALL)

CITED = re.compile(r"\(arXiv ([\d.]+)(?:, (eq\. [\d.]+(?:(?:,| and| to) [\d.]+)*))?.*?\)")


def described(documented: object) -> tuple[str, str, str]:
    """(before the colon, after it, source) of the first sentence of a docstring, the source without its parentheses."""
    text = " ".join(inspect.getdoc(documented).split())
    cited = CITED.search(text)
    source = ", ".join(part for part in cited.groups() if part) if cited else ""
    sentence = re.split(r"\. |;|\.$", CITED.sub("", text, count=1), maxsplit=1)[0]
    before, _, after = sentence.partition(": ")
    return before.strip().replace("|", "\\|"), after.strip().replace("|", "\\|"), source


def from_hidden_states(loss: Any) -> str:
    """The engine that a loss with a trained head takes, and the form of a loss of pairs, which decides it."""
    engine = choose_engine("auto", "torch", loss.obstacle(weighted=False)).name.replace("_", " ")
    return f"{engine}, {loss.form().kind}" if isinstance(loss, PairLoss) else engine


def loss_type(name: str) -> tuple[str, ...]:
    formula, _, source = described(PAIR_LOSSES[name])
    loss = fused_tdpo.LinearTDPOLoss(loss_type=name, label_smoothing=0.1 if name in SMOOTHED else 0.0)
    kl = "over \\|y\\|" if PAIR_FORMS[name].by_length else "whole" if any(loss.kl_slopes()) else "none"
    return f"`{name}`{' ε' if name in SMOOTHED else ''}", formula, source, kl, from_hidden_states(loss)


def module(name: str) -> tuple[str, ...]:
    before, after, source = described(getattr(fused_tdpo, name))
    loss = getattr(fused_tdpo, f"Linear{name}")()
    smoothed = not isinstance(loss, PreferenceLoss) and hasattr(loss, "label_smoothing")
    kl = "whole" if any(loss.kl_slopes()) else "none"
    return f"`{name}`{' ε' if smoothed else ''}", after or before, source, kl, from_hidden_states(loss)


def rows() -> list[tuple[str, ...]]:
    """Cells: every loss type, then every class, first those that take loss types."""
    classes = [name for name in fused_tdpo.__all__ if name.endswith("Loss") and not name.startswith("Linear")]
    classes.sort(key=lambda name: not issubclass(getattr(fused_tdpo, name), PreferenceLoss))
    return [*map(loss_type, PAIR_LOSSES), *map(module, classes)]


def table() -> str:
    """Markdown."""
    columns = ("`loss_type` or class", "formula", "arXiv", "K", "from hidden states")
    return "".join(f"| {' | '.join(row)} |\n" for row in (columns, ("---",) * len(columns), *rows()))


def updated(text: str) -> str:
    """The README with the table made anew. ValueError: without its marks."""
    if not SECTION.search(text):
        raise ValueError("README.md needs a line `<!-- table: losses -->`, and after it a line `<!-- end -->`")
    return SECTION.sub(lambda _: table(), text, count=1)


if __name__ == "__main__":
    sys.stdout.write(table())
    README.write_text(updated(README.read_text()))
