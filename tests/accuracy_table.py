"""The error tables of docs/numerics.md: how wrong divergences come out, here and in the forms that are common elsewhere.

    python tests/accuracy_table.py                    measures on the CPU and rewrites the tables in docs/numerics.md
    python tests/accuracy_table.py --device cuda      prints the same tables, measured on the GPU that is here

Logits are float32, z = 3 N(0, 1) and x = z + distance·N(0, 1), and then what a problem changes about them. Truth is
`kl_from_delta`, or `divergence_from_ratio`, in float64 on the same rounded logits. On a CPU the Triton kernels run in Triton's
interpreter, which takes about a second a row: the smallest vocabulary alone.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from contract_token_stats import kl_from_delta, noise
from fused_tdpo import token_stats

NUMERICS = Path(__file__).resolve().parents[1] / "docs" / "numerics.md"


def by_backend(backend: str) -> Callable[..., Tensor]:
    """A divergence (N,) of policy and reference logits (N, V), as `token_stats` gives it."""
    return lambda x, z, **kind: (
        token_stats(x, z, torch.zeros(len(x), dtype=torch.int64, device=x.device), backend=backend, **kind).kl
    )


def kl_by_logsumexp(x: Tensor, z: Tensor) -> Tensor:
    """lse(x) - lse(z) - E_q[x - z]: what an online softmax gives without more ado."""
    return x.logsumexp(-1) - z.logsumexp(-1) - (z.softmax(-1) * (x - z)).sum(-1)


def divergence_from_ratio(x: Tensor, z: Tensor, divergence: str, divergence_alpha: float | None = None) -> Tensor:
    """Another divergence in float64, by Σ q·f(e^t) with series of t, t = log p/q: f(r) = r log r - r + 1, and so on."""
    x, z = x.double(), z.double()
    kl = kl_from_delta(x, z)
    delta, q = x - z, z.softmax(-1)
    t = delta - (q * delta).sum(-1, keepdim=True) - kl.unsqueeze(-1)

    def phi(h: Tensor) -> Tensor:  # e^h - 1 - h
        series = sum(h**k / math.factorial(k) for k in range(2, 14))
        return torch.where(h.abs() < 0.5, series, torch.expm1(h) - h)

    if divergence == "reverse_kl":
        return (q * t.exp() * phi(-t)).sum(-1)
    if divergence == "js":  # u tanh u - log cosh u
        u, s = t / 2, torch.tanh(t / 2)
        series = sum(s ** (2 * k) / (2 * k * (2 * k - 1)) for k in range(1, 30))
        plain = u * s - u.abs() - torch.log1p(torch.exp(-2 * u.abs())) + math.log(2)
        return (q * (1 + t.exp()) / 2 * torch.where(u.abs() < 0.5, series, plain)).sum(-1)
    a = divergence_alpha
    return (q * (phi(a * t) - a * phi(t)) / (a * (a - 1))).sum(-1)


CONTENDERS: dict[str, Callable[..., Tensor]] = {
    "log_softmax": by_backend("reference"),
    "lse": kl_by_logsumexp,
    "torch": by_backend("torch"),
    "triton": by_backend("triton"),
}

ROWS = {3_001: 2, 32_000: 16, 151_936: 8}
"""V -> rows. The error shown is the worst of them."""

SMALLEST = min(ROWS)


@dataclass(frozen=True)
class Problem:
    """Rows whose KL, or other divergence, is wanted."""

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
    divergence: str = "forward_kl"
    divergence_alpha: float | None = None

    @property
    def kind(self) -> dict[str, Any]:
        """Options of `token_stats`; none for KL(q || p)."""
        named = {"divergence": self.divergence, "divergence_alpha": self.divergence_alpha}
        return {} if self.divergence == "forward_kl" else named

    def truth(self, x: Tensor, z: Tensor) -> Tensor:
        return divergence_from_ratio(x, z, **self.kind) if self.kind else kl_from_delta(x, z)

    def logits(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """(policy, reference), each (N, V) float32."""
        z = 3.0 * noise(ROWS[self.V], self.V, seed=1)
        z[:, self.V // 2 :] += self.jump
        z[:, :1100] -= self.quiet
        x = z + self.distance * noise(ROWS[self.V], self.V, seed=2) + self.shift
        x[:, :1100] += self.quiet_shift
        return x.to(device), z.to(device)

    def contenders(self, device: str = "cpu") -> tuple[str, ...]:
        """Those that have the time for it, and the divergence."""
        absent = {"lse"} if self.kind else set()
        absent |= {"triton"} if device == "cpu" and self.V != SMALLEST else set()
        return tuple(name for name in CONTENDERS if name not in absent)


DISTANCES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.5)
SIZES = {"tiny": 1e-5, "ordinary": 1.5, "huge": 20.0}
"""Of the distance between policy and reference."""

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
    "divergence-errors": [
        Problem(f"{name}{'' if a is None else f' {a:g}'}, {size}", distance, divergence=name, divergence_alpha=a)
        for name, a in (("reverse_kl", None), ("js", None), *(("alpha", a) for a in (0.3, 0.7, 2.0, -0.7)))
        for size, distance in SIZES.items()
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
    exact = problem.truth(x, z)
    errors: dict[str, tuple[float, int] | None] = dict.fromkeys(CONTENDERS)
    for name in names:
        kl = CONTENDERS[name](x, z, **problem.kind).double()
        errors[name] = float(((kl - exact) / exact).abs().max()), int((kl < 0).sum())
    return Line(problem.name, float(exact.mean()), errors)


def render(lines: list[Line]) -> str:
    """Markdown, read back by `parse`."""
    names = [name for name in CONTENDERS if any(line.errors[name] for line in lines)]
    header = f"| rows | true value | {' | '.join(names)} |\n| :-- | --: |{' --: |' * len(names)}\n"

    def cell(error: tuple[float, int] | None) -> str:
        if error is None:
            return ""
        worst, negative = error
        return f"{worst:.0e}" + (f" ({negative})" if negative else "")

    rows = [f"| {line.name} | {line.kl:.1e} | {' | '.join(cell(line.errors[name]) for name in names)} |\n" for line in lines]
    return header + "".join(rows)


def section(name: str) -> re.Pattern[str]:
    """What stands in docs/numerics.md between a section's marks."""
    return re.compile(rf"(?<=<!-- measured: {name} -->\n).*?(?=<!-- end -->)", re.DOTALL)


def parse(name: str, text: str) -> Iterator[Line]:
    """The lines of a section's table."""
    header, _, *rows = (row.strip("|").split("|") for row in section(name).search(text).group().splitlines())
    names = [cell.strip() for cell in header[2:]]
    for row in rows:
        problem, kl, *cells = map(str.strip, row)
        found = [re.fullmatch(r"(\S+)(?: \((\d+)\))?", cell) for cell in cells]
        errors = [match and (float(match[1]), int(match[2] or 0)) for match in found]
        yield Line(problem, float(kl), dict(zip(names, errors, strict=True)))


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
