"""The error table of docs/numerics.md: how wrong KL(q || p) comes out near 0, here and in the two forms that are common elsewhere.

    python tests/accuracy_table.py                    measures on the CPU and rewrites the table in docs/numerics.md
    python tests/accuracy_table.py --device cuda      prints the same table, measured on the GPU that is here

float32 logits z = 3 N(0, 1) and x = z + distance N(0, 1). Truth is `kl_from_delta` in float64 on the same rounded logits. On a
CPU the Triton kernels run in Triton's interpreter, which takes about a second a row: the smallest vocabulary alone.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from contract_token_stats import kl_from_delta, noise
from fused_tdpo import token_stats

NUMERICS = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"
SECTION = re.compile(r"(?<=<!-- generated: kl errors -->\n).*?(?=<!-- end -->)", re.DOTALL)

ROWS = {3_001: 2, 32_000: 16, 151_936: 8}
"""V -> rows. The error shown is the worst of them."""

DISTANCES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.5)


class Line(NamedTuple):
    """One line of the table."""

    V: int
    kl: float
    """Mean of the true values."""
    errors: dict[str, tuple[float, int] | None]
    """Contender -> worst relative error, and the number of rows below 0; None where it did not run."""


def kl_by_backend(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    """KL (N,) of policy and reference logits (N, V), as `token_stats` gives it."""
    return lambda x, z: token_stats(x, z, torch.zeros(len(x), dtype=torch.int64, device=x.device), backend=backend).kl


def kl_by_logsumexp(x: Tensor, z: Tensor) -> Tensor:
    """lse(x) - lse(z) - E_q[x - z]: what an online softmax gives without more ado."""
    return x.logsumexp(-1) - z.logsumexp(-1) - (z.softmax(-1) * (x - z)).sum(-1)


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "log_softmax": kl_by_backend("reference"),
    "lse": kl_by_logsumexp,
    "torch": kl_by_backend("torch"),
    "triton": kl_by_backend("triton"),
}


def measure(V: int, names: tuple[str, ...] = tuple(CONTENDERS), device: str = "cpu") -> Iterator[Line]:
    """The lines of one vocabulary; contenders that are not in `names` do not run."""
    z = 3.0 * noise(ROWS[V], V, seed=1, device=device)
    for distance in DISTANCES:
        x = z + distance * noise(ROWS[V], V, seed=2, device=device)
        exact = kl_from_delta(x, z)
        errors: dict[str, tuple[float, int] | None] = dict.fromkeys(CONTENDERS)
        for name in names:
            kl = CONTENDERS[name](x, z).double()
            errors[name] = float(((kl - exact) / exact).abs().max()), int((kl < 0).sum())
        yield Line(V, float(exact.mean()), errors)


def runs(V: int, device: str = "cpu") -> tuple[str, ...]:
    """The contenders that are measured at this V."""
    return tuple(name for name in CONTENDERS if name != "triton" or device != "cpu" or V == min(ROWS))


HEADER = "| V | true KL | log_softmax | lse | torch | triton |\n| ---: | ---: | ---: | ---: | ---: | ---: |\n"


def render(lines: list[Line]) -> str:
    """Markdown, read back by `parse`."""

    def cell(error: tuple[float, int] | None) -> str:
        if error is None:
            return ""
        worst, negative = error
        return f"{worst:.0e}" + (f" ({negative})" if negative else "")

    rows = [f"| {line.V:,} | {line.kl:.1e} | " + " | ".join(map(cell, line.errors.values())) + " |\n" for line in lines]
    return HEADER + "".join(rows)


def parse(text: str) -> list[Line]:
    """The lines of a rendered table."""
    lines = []
    for row in SECTION.search(text).group().removeprefix(HEADER).splitlines():
        V, kl, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        found = [re.fullmatch(r"(\S+)(?: \((\d+)\))?", cell) for cell in cells]
        errors = [match and (float(match[1]), int(match[2] or 0)) for match in found]
        lines.append(Line(int(V.replace(",", "")), float(kl), dict(zip(CONTENDERS, errors, strict=True))))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nobody has done yet
    table = render([line for V in ROWS for line in measure(V, runs(V, device), device)])
    if device == "cpu":
        NUMERICS.write_text(SECTION.sub(lambda _: table, NUMERICS.read_text(), count=1))
    sys.stdout.write(table)


if __name__ == "__main__":
    main()
