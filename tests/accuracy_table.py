"""The error tables of docs/numerics.md: how wrong KL(q || p) comes out, here and in the two forms that are common elsewhere.

    python tests/accuracy_table.py                    measures on the CPU and rewrites the tables in docs/numerics.md
    python tests/accuracy_table.py --device cuda      prints the same tables, measured on the GPU that is here

Logits are float32, z = 3 N(0, 1) and x = z + distance·N(0, 1), and then what a problem changes about them. Truth is
`kl_from_delta` in float64 on the same rounded logits. On a CPU the Triton kernels run in Triton's interpreter, which takes
about a second a row: the smallest vocabulary alone.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from contract_token_stats import kl_from_delta, noise
from fused_tdpo import token_stats

NUMERICS = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"


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

ROWS = {3_001: 2, 32_000: 16, 151_936: 8}
"""V -> rows. The error shown is the worst of them."""

SMALLEST = min(ROWS)


@dataclass(frozen=True)
class Problem:
    """Rows whose KL is wanted."""

    name: str
    distance: float
    V: int = SMALLEST
    shift: float = 0.0
    """Added to all x."""
    jump: float = 0.0
    """Added to x and z beyond the first half."""
    quiet: float = 0.0
    """Taken from x and z in the first 1,100 columns, which hold the label and more than the kernel takes its pivot from..."""
    quiet_shift: float = 0.0
    """... and added to x there."""

    def logits(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """(policy, reference), each (N, V) float32."""
        z = 3.0 * noise(ROWS[self.V], self.V, seed=1)
        z[:, self.V // 2 :] += self.jump
        z[:, :1100] -= self.quiet
        x = z + self.distance * noise(ROWS[self.V], self.V, seed=2) + self.shift
        x[:, :1100] += self.quiet_shift
        return x.to(device), z.to(device)

    def contenders(self, device: str = "cpu") -> tuple[str, ...]:
        """Those that have the time for it."""
        return tuple(name for name in CONTENDERS if name != "triton" or device != "cpu" or self.V == SMALLEST)


DISTANCES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.5)

TABLES = {
    "kl-errors": [Problem(f"V = {V:,}", distance, V) for V in ROWS for distance in DISTANCES],
    "kl-limits": [
        *(Problem(f"x + {shift:g}", 1e-4, shift=shift) for shift in (1.0, 10.0, 100.0)),
        Problem("x and z rise by 200 half way", 1e-4, jump=200.0),
        *(
            Problem(f"quiet start, x + {shift:g} there", 1e-4, quiet=20.0, quiet_shift=shift)
            for shift in (0.0, 0.01, 1.0, 10.0)
        ),
    ],
}
"""By the name of the section that holds them."""


class Line(NamedTuple):
    """One line of a table."""

    name: str
    kl: float
    """Mean of the true values."""
    errors: dict[str, tuple[float, int] | None]
    """Contender -> worst relative error, and the number of rows below 0; None where it did not run."""


def measure(problem: Problem, names: tuple[str, ...], device: str = "cpu") -> Line:
    """Runs the contenders `names` on a problem."""
    x, z = problem.logits(device)
    exact = kl_from_delta(x, z)
    errors: dict[str, tuple[float, int] | None] = dict.fromkeys(CONTENDERS)
    for name in names:
        kl = CONTENDERS[name](x, z).double()
        errors[name] = float(((kl - exact) / exact).abs().max()), int((kl < 0).sum())
    return Line(problem.name, float(exact.mean()), errors)


HEADER = "| rows | true KL | log_softmax | lse | torch | triton |\n| :-- | --: | --: | --: | --: | --: |\n"


def render(lines: list[Line]) -> str:
    """Markdown, read back by `parse`."""

    def cell(error: tuple[float, int] | None) -> str:
        if error is None:
            return ""
        worst, negative = error
        return f"{worst:.0e}" + (f" ({negative})" if negative else "")

    rows = [f"| {line.name} | {line.kl:.1e} | " + " | ".join(map(cell, line.errors.values())) + " |\n" for line in lines]
    return HEADER + "".join(rows)


def section(name: str) -> re.Pattern[str]:
    """What stands in docs/numerics.md between a section's marks."""
    return re.compile(rf"(?<=<!-- measured: {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)


def parse(name: str, text: str) -> Iterator[Line]:
    """The lines of a section's table."""
    for row in section(name).search(text).group().removeprefix(HEADER).splitlines():
        problem, kl, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        found = [re.fullmatch(r"(\S+)(?: \((\d+)\))?", cell) for cell in cells]
        errors = [match and (float(match[1]), int(match[2] or 0)) for match in found]
        yield Line(problem, float(kl), dict(zip(CONTENDERS, errors, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nobody has done yet
    for name, problems in TABLES.items():
        table = render([measure(problem, problem.contenders(device), device) for problem in problems])
        sys.stdout.write(f"{name}\n\n{table}\n")
        if device == "cpu":
            NUMERICS.write_text(section(name).sub(lambda _, table=table: table, NUMERICS.read_text(), count=1))


if __name__ == "__main__":
    main()
