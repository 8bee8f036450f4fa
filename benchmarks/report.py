"""Turns records into tables, and keeps those in the documents equal to the records.

    python benchmarks/report.py            rewrites what stands between `<!-- generated: NAME -->` and `<!-- end -->`
    python benchmarks/report.py --check    fails where that would change anything
    python benchmarks/report.py --plot     draws results/<device>.png, -hidden.png and -accuracy.png, which needs matplotlib

A record is a line of results/<device>.jsonl, written by run.py. Those of a case that were measured together carry one date. Of
each case on a device the newest such run counts, of those that hold ours beside another if there are any: what is compared was
measured side by side.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cases import CASES, HIDDEN_CASES, PROBLEMS, model_name
from fused_tdpo.cli._measure import as_bytes, as_time, digits
from providers import HIDDEN_PROVIDERS, PROVIDERS, ROW_PROVIDERS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")

Record = dict  # as run.py writes it


# -------------------------------------------------------------------------------------------------------------------- showing


@dataclass
class Table:
    """Text in columns; the first is set left, the others right."""

    columns: tuple[str, ...]
    rows: list[tuple[str, ...]] = field(default_factory=list)

    def markdown(self) -> str:
        rule = (":--", *("--:" for _ in self.columns[1:]))
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows))

    def show(self, title: str = "") -> None:
        """Prints it, with rich where that is installed."""
        title = title.replace("`", "")
        columns, *rows = [tuple(cell.replace("`", "") for cell in row) for row in (self.columns, *self.rows)]
        try:
            from rich.console import Console
            from rich.table import Table as RichTable
        except ImportError:
            widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
            print(f"\n{title}" if title else "")
            for row in (columns, tuple("-" * width for width in widths), *rows):
                cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
                print("  ".join((row[0].ljust(widths[0]), *cells[1:])))
            return
        table = RichTable(title=title or None, title_justify="left")
        for i, name in enumerate(columns):
            table.add_column(name, justify="right" if i else "left", no_wrap=i == 0, overflow="fold")
        for row in rows:
            table.add_row(*row)
        Console(width=None if sys.stdout.isatty() else 160).print(table)


@contextmanager
def status(text: str) -> Iterator[Callable[[str], None]]:
    """Shows what is going on, and yields a function that says what is going on now."""
    try:
        from rich.console import Console
    except ImportError:
        Console = None
    if Console is not None and sys.stdout.isatty():
        with Console().status(text) as spinner:
            yield spinner.update
    else:
        print(text, flush=True)
        yield lambda text: print(f"  {text}", flush=True)


# -------------------------------------------------------------------------------------------------------------------- records


def load(folder: Path = RESULTS) -> list[Record]:
    """All records of a folder, oldest first."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda record: record["date"])


FLOORS = ("copy", "bare")

Newest = dict[str, dict[str, Record]]
"""Case -> provider -> record, of one device; cases and providers in the order of their tables."""


def newest(records: list[Record], level: str = "logits") -> dict[str, Newest]:
    """Device -> its newest records, GPUs first. What is no longer in the tables of the level is left out."""
    cases, names = {
        "logits": (CASES, ("copy", *PROVIDERS)),
        "hidden": (HIDDEN_CASES, ("bare", *HIDDEN_PROVIDERS)),
        "accuracy": (PROBLEMS, ROW_PROVIDERS),
    }[level]
    runs: dict[tuple[str, str], dict[str, dict[str, Record]]] = {}
    for record in records:
        together = runs.setdefault((record["device"], record["case"]), {}).setdefault(record["date"], {})
        together[record["provider"]] = record
    found = {key: max(own.items(), key=lambda run: (compares(run[1]), run[0]))[1] for key, own in runs.items()}
    result = {}
    for _, device in sorted({(not r["driver"], r["device"]) for r in records}):
        own = {c.name: {n: run[n] for n in names if n in run} for c in cases if (run := found.get((device, c.name)))}
        result[device] = {case: providers for case, providers in own.items() if providers}
    return {device: own for device, own in result.items() if own}


def compares(run: dict[str, Record]) -> bool:
    """Whether two besides the floor were measured in it."""
    return sum(name not in FLOORS and not r["refused"] for name, r in run.items()) > 1


def share(record: Record, phase: str) -> float:
    """The floor's time over the provider's: how much of the bandwidth of a copy it reaches, by the bytes it has to move."""
    return record["floor_ms"][phase] / record["ms"][phase][1]


def is_absent(record: Record) -> bool:
    """Whether the provider could not run on that machine at all."""
    return record["refused"].startswith("not available")


def why_not(record: Record) -> str:
    """A short word for a refusal."""
    return "—" if is_absent(record) else record["refused"].partition(":")[0]


def caption(records: list[Record]) -> str:
    """The birth certificate of a table."""

    def values(key: str) -> str:
        return ", ".join(sorted({str(r[key] or "none") for r in records}))

    commits = {f"{(r['commit'] or 'unknown')[:10]}{' + changes' if r['changed'] else ''}" for r in records}
    driver = f"driver {values('driver')}, " if records[0]["driver"] else f"{values('threads')} threads, "
    dates = sorted({r["date"][:10] for r in records})
    rounds = sorted({r["rounds"] for r in records if r["rounds"]})
    peers = sorted({f"{name} {version}" for r in records for name, version in r.get("peers", {}).items()})
    versions = [f"torch {values('torch')}", f"triton {values('triton')}", *peers, f"Python {values('python')}"]
    medians = f"; medians of {' to '.join(map(str, dict.fromkeys((rounds[0], rounds[-1]))))} rounds" if rounds else ""
    return (
        f"**{records[0]['device']}**, {driver}{', '.join(versions)}; commit {', '.join(sorted(commits))}; "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}{medians}."
    )


# --------------------------------------------------------------------------------------------------------------------- tables


def headline(records: Newest) -> tuple[str, Table]:
    """A case in full."""
    (own,) = records.values()
    table = Table(("", "forward ms", "backward ms", "both ms", "GB/s", "of copy's speed", "peak memory"))
    for name, r in own.items():
        if r["refused"]:
            if why_not(r) != "—":
                table.rows.append((f"`{name}`", why_not(r), *[""] * 5))
            continue
        times = [digits(r["ms"][phase][1]) for phase in ("forward", "backward", "both")]
        rates = [r[f"{phase}_bytes"] / r["ms"][phase][1] / 1e6 for phase in ("forward", "backward")]
        shares = [f"{share(r, phase):.0%}" for phase in ("forward", "backward")]
        memory = as_bytes(r["peak_bytes"]) if name != "copy" else ""
        table.rows.append(
            (
                f"`{name}`",
                *times,
                " / ".join(digits(rate) for rate in rates),
                " / ".join(shares),
                memory,
            )
        )
    case = next(iter(own.values()))
    masked = f", {case['masked']:.0%} of the rows masked" if case["masked"] else ""
    return f"{case['model']}: {case['N']:,} token rows, V = {case['V']:,}, {case['dtype']}{masked}.", table


Column = tuple[str, str, Callable[[Record], str]]
"""Heading, provider, what its record says."""


def by_case(records: Newest, columns: list[Column]) -> Table:
    """A row for each case, and those columns whose provider ran on the device at all."""
    ran = {name for own in records.values() for name, r in own.items() if not r["refused"]}
    columns = [column for column in columns if column[1] in ran]
    table = Table(("", *(heading for heading, _, _ in columns)))
    for case, own in records.items():
        cells = [
            (why_not(own[name]) if own[name]["refused"] else cell(own[name])) if name in own else ""
            for _, name, cell in columns
        ]
        table.rows.append((named(case, next(iter(own.values()))), *cells))
    return table


def named(case: str, record: Record) -> str:
    """A case and its model, if any."""
    return f"{model_name(record['V'], record.get('D'), record.get('softcap'))} `{case}`".strip()


def time(records: Newest) -> tuple[str, Table]:
    """Every case: both phases of the fused op, and their sum for all."""

    def ms(phase: str) -> Callable[[Record], str]:
        return lambda r: digits(r["ms"][phase][1]) + ("" if r["provider"] == "copy" else f" ({share(r, phase):.0%})")

    own: list[Column] = [(f"`fused` {phase}", "fused", ms(phase)) for phase in ("forward", "backward")]
    everyone: list[Column] = [(f"`{name}`", name, ms("both")) for name in ("copy", *PROVIDERS)]
    text = "Milliseconds of forward and backward (share of a copy's speed); of `fused` also each alone."
    return text, by_case(records, everyone + own)


def memory(records: Newest) -> tuple[str, Table]:
    """Peak memory of every case."""
    columns: list[Column] = [(f"`{name}`", name, lambda r: as_bytes(r["peak_bytes"])) for name in PROVIDERS]
    return "Peak memory over the inputs, forward and backward; the gradient counts.", by_case(records, columns)


def beside_bare(record: Record) -> str:
    """How many times as long as the bare products."""
    return f"{record['ms']['both'][1] / record['floor_ms']['both']:.2f}×"


def losses(records: Newest, computes: tuple[str, ...]) -> Table:
    """Every case, and those providers that compute such a loss."""

    def cell(r: Record) -> str:
        time = as_time(r["ms"]["both"][1])
        return time if r["provider"] == "bare" else f"{time} ({beside_bare(r)}), {as_bytes(r['peak_bytes'])}"

    return by_case(records, [(f"`{name}`", name, cell) for name in ("bare", *who(*computes))])


def who(*computes: str) -> list[str]:
    """The providers of such losses."""
    return [name for name, provider in HIDDEN_PROVIDERS.items() if provider.computes in computes]


def cases_of(*computes: str) -> Callable[[Newest], Newest]:
    """Chooses the cases where such a loss was measured."""
    return lambda own: {case: found for case, found in own.items() if any(name in found for name in who(*computes))}


TIMES_AND_MEMORY = "forward and backward from hidden states (of the bare products' time); peak memory over the inputs."


def hidden(records: Newest) -> tuple[str, Table]:
    """TDPO2 on each case."""
    return f"TDPO2, {TIMES_AND_MEMORY}", losses(records, ("tdpo2",))


def hidden_others(records: Newest) -> tuple[str, Table]:
    """DPO and the KL alone on each case."""
    return f"DPO, and of `ours_kl` and `fla` the mean KL, {TIMES_AND_MEMORY}", losses(records, ("dpo", "kl"))


def hidden_family(records: Newest) -> tuple[str, Table]:
    """SimPO and KTO on each case."""
    text = f"SimPO, which makes three of the four bare products, and KTO, {TIMES_AND_MEMORY}"
    return text, losses(records, ("simpo", "kto"))


def hidden_phases(records: Newest) -> tuple[str, Table]:
    """Every provider on every case in a row."""
    names = ("", "forward", "backward", "both", "20 % to 80 %", "of bare", "TFLOP/s", "peak memory", "of it gradients")
    table = Table(names)
    for case, own in records.items():
        for name, r in own.items():
            if r["refused"]:
                if why_not(r) != "—":
                    table.rows.append((f"`{case}` `{name}`", why_not(r), *[""] * (len(names) - 2)))
                continue
            low, middle, high = r["ms"]["both"]
            alone = [as_time(r["ms"][phase][1]) if phase in r["ms"] else "" for phase in ("forward", "backward")]
            spread, rate = f"{as_time(low)} to {as_time(high)}", digits(r["flops"] / middle / 1e9)
            memory = [as_bytes(r[key]) if name != "bare" else "" for key in ("peak_bytes", "gradient_bytes")]
            table.rows.append((f"`{case}` `{name}`", *alone, as_time(middle), spread, beside_bare(r), rate, *memory))
    return "From hidden states to gradients; TFLOP/s of the bare products' operations.", table


def summary(records: Newest) -> tuple[str, Table]:
    """Ours on every case, and whoever else computes the same in the least time."""
    table = Table(("", "ours", "of the floor's time", "fastest other", "times as long", "memory", "of the other"))
    for case, own in records.items():
        measured = {name: r for name, r in own.items() if not r["refused"]}
        ours = measured.get("ours", measured.get("fused"))
        others = [name for name in ("compiled", "eager", "official", "naive_valid", "naive_all", "trl") if name in measured]
        if ours is None:
            continue
        time = ours["ms"]["both"][1]
        cells = (as_time(time), f"{time / ours['floor_ms']['both']:.2f}×")
        if others:
            other = min((measured[name] for name in others), key=lambda r: r["ms"]["both"][1])
            ratio = f"{other['ms']['both'][1] / time:.2f}×"
            compared = (f"`{other['provider']}`", ratio, as_bytes(ours["peak_bytes"]), as_bytes(other["peak_bytes"]))
        else:
            compared = ("", "", as_bytes(ours["peak_bytes"]), "")
        table.rows.append((named(case, ours), *cells, *compared))
    date = max(r["date"][:10] for own in records.values() for r in own.values())
    return f"Forward and backward, ours beside the fastest other that computes the same, as of {date}.", table


def accuracy(records: Newest) -> tuple[str, Table]:
    """Errors of the KL, or of log-probs where there is none; of what is spoilt, whether the results are right."""
    columns = tuple(dict.fromkeys(name for own in records.values() for name, r in own.items() if not is_absent(r)))
    table = Table(("", "true KL", *(f"`{name}`" for name in columns)))
    for problem, own in records.items():
        facts = next(iter(own.values()))
        kl = "" if facts["kl"] is None else f"{facts['kl']:.1e}"
        table.rows.append((problem, kl, *(exactness(own[name]) if name in own else "" for name in columns)))
    text = (
        f"Worst relative error of the KL (of log-probs where there is none) from float32 logits, V = {facts['V']:,}; in "
        f"brackets how many of {facts['N']} came out below 0. Of NaN and -inf: whether values and gradients are right."
    )
    return text, table


RIGHT = 1e-3
"""Relative error of what is right although something is spoilt."""


def exactness(record: Record) -> str:
    """A provider's errors on a problem, in a few characters."""
    errors = record["errors"]
    if record["refused"]:
        return why_not(record)
    if record["spoilt"]:
        wrong = [f"{name} {'NaN' if error != error else 'wrong'}" for name, error in errors.items() if not error <= RIGHT]
        return ", ".join(wrong) or "right"
    below = f" ({errors['kl below 0']})" if errors.get("kl below 0") else ""
    return f"{errors.get('kl', errors.get('logp')):.0e}{below}"


def everything(records: Newest) -> Newest:
    """All cases."""
    return records


def first(records: Newest) -> Newest:
    """The first case."""
    return dict(list(records.items())[:1])


def main_cases(records: Newest) -> Newest:
    """Those that are tagged "main"."""
    tagged = {case.name for case in (*CASES, *HIDDEN_CASES, *PROBLEMS) if "main" in case.tags}
    return {case: own for case, own in records.items() if case in tagged}


VIEWS = {
    "headline": ("logits", first, headline),
    "time": ("logits", everything, time),
    "memory": ("logits", everything, memory),
    "hidden-all": ("hidden", cases_of("tdpo2"), hidden),
    "hidden-others": ("hidden", cases_of("dpo", "kl"), hidden_others),
    "hidden-family": ("hidden", cases_of("simpo", "kto"), hidden_family),
    "hidden-phases": ("hidden", main_cases, hidden_phases),
    "summary": ("hidden", main_cases, summary),
    "accuracy": ("accuracy", everything, accuracy),
}
"""What a document may ask for: level, which of its cases, function."""


def generated(view: str, records: list[Record]) -> str:
    """Markdown of a view: a caption and a table for each device."""
    level, choose, make = VIEWS[view]
    parts = []
    for own in filter(None, map(choose, newest(records, level).values())):
        text, table = make(own)
        parts.append(f"{caption([r for providers in own.values() for r in providers.values()])} {text}\n\n{table.markdown()}")
    return "\n\n".join(parts) or "_No records yet: `make bench` makes them._"


def updated(text: str, records: list[Record]) -> str:
    """A document with what is generated in it made anew. KeyError: it asks for a view that does not exist."""
    pattern = r"(<!-- generated: ([\w-]+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match[1]}\n{generated(match[2], records)}\n\n{match[3]}", text, flags=re.DOTALL)


def plot(device: str, records: Newest, path: Path) -> None:
    """Time of forward and backward over the vocabulary, a line for each provider; at the rows with the most vocabularies."""
    import matplotlib.pyplot as plt

    cases = [case for case in CASES if case.name in records and case.dtype.itemsize == 2 and not case.masked]
    numbers = [case.N for case in cases]
    N = max(numbers, key=numbers.count, default=0)
    if numbers.count(N) < 3:
        return
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set_prop_cycle(color=OTHERS)
    for name in ("copy", *PROVIDERS):
        own = {case.V: records[case.name].get(name) for case in cases if case.N == N}
        points = sorted((V, r["ms"]["both"][1]) for V, r in own.items() if r and not r["refused"])
        if points:
            style = LINES.get(name, {"marker": "o"})
            axes.plot(*zip(*points, strict=True), label="copy (floor)" if name == "copy" else name, **style)
    axes.set(xscale="log", yscale="log", xlabel="vocabulary", ylabel="forward + backward, ms", title=f"{device}, {N:,} rows")
    axes.set_xticks([thousands * 1024 for thousands in (32, 64, 128, 256)], ["32k", "64k", "128k", "256k"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


LINES: dict[str, dict[str, Any]] = {
    "copy": {"color": "black", "linestyle": "--"},
    "bare": {"color": "black", "linestyle": "--"},
    "ours": {"color": "tab:blue", "marker": "D", "linewidth": 3},
    "fused": {"color": "tab:blue", "marker": "D", "linewidth": 3},
}
"""How who stands out in plots is drawn; the others take `OTHERS` in turn."""

OTHERS = [f"tab:{name}" for name in ["orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan"]]


def plot_hidden(device: str, records: Newest, path: Path) -> None:
    """Time and memory of one pair over its length, a line for each provider; at the shape with the most lengths."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    plain = [case for case in HIDDEN_CASES if case.trained and case.pairs == 1 and case.masked == 0.5 and case.softcap is None]
    cases = [case for case in plain if case.name in records]
    shapes = [(case.D, case.V, case.dtype) for case in cases]
    D, V, dtype = shape = max(shapes, key=shapes.count, default=(0, 0, None))
    if shapes.count(shape) < 3:
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for axes in (left, right):
        axes.set_prop_cycle(color=OTHERS)
    own = {case.T: records[case.name] for case in cases if (case.D, case.V, case.dtype) == shape}
    for name in ("bare", *HIDDEN_PROVIDERS):
        there = [(T, r[name]) for T, r in own.items() if name in r and not r[name]["refused"]]
        if there:
            style, label = LINES.get(name, {"marker": "o"}), name
            memory = "gradient_bytes" if name == "bare" else "peak_bytes"
            if name == "bare":
                label = "floor: bare products, gradients"
            elif HIDDEN_PROVIDERS[name].computes != "tdpo2":
                style, label = {"marker": "o", "markerfacecolor": "none", "linestyle": ":"}, f"{name}, not TDPO"
            left.plot([T for T, _ in there], [r["ms"]["both"][1] for _, r in there], label=label, **style)
            right.plot([T for T, _ in there], [r[memory] for _, r in there], **style)
    for axes, text in ((left, "forward + backward"), (right, "peak memory over the inputs")):
        axes.set(xscale="log", yscale="log", xlabel="positions of a sequence", ylabel=text)
        axes.set_xticks(list(own), [f"{T:,}" for T in own])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter(lambda ms, _: as_time(ms))
    right.yaxis.set_major_locator(LogLocator(base=2))
    right.yaxis.set_major_formatter(lambda size, _: as_bytes(size))
    figure.suptitle(f"{device}: a pair, half of it prompts; D = {D:,}, V = {V:,}, {str(dtype).removeprefix('torch.')}")
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_accuracy(device: str, records: Newest, path: Path) -> None:
    """Worst error of the KL over the true KL, a line for each provider."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set_prop_cycle(color=OTHERS)
    plain = [records[problem.name] for problem in PROBLEMS if problem.name in records and not (problem.spoilt or problem.shift)]
    for name in ROW_PROVIDERS:
        points = [(own[name]["kl"], own[name]["errors"]["kl"]) for own in plain if name in own and "kl" in own[name]["errors"]]
        if points:
            style = {"markersize": 12, "alpha": 0.4} if name == "ours" else {}  # the two lie on each other
            axes.plot(*zip(*points, strict=True), label=name, **LINES.get(name, {"marker": "o"}) | style)
    axes.set(xscale="log", yscale="log", xlabel="true KL, nats", ylabel="worst relative error", title=device)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None, documents: tuple[Path, ...] = DOCUMENTS, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a document differs from the records")
    parser.add_argument("--plot", action="store_true", help="draw each device that has three vocabularies or lengths")
    args = parser.parse_args(arguments)

    records = load(folder)
    stale = []
    for path in documents:
        if path.exists() and (text := path.read_text()) != (new := updated(text, records)):
            stale.append(path.name)
            if not args.check:
                path.write_text(new)
    if args.plot:
        for device, own in newest(records).items():
            plot(device, own, folder / f"{slug(device)}.png")
        for device, own in newest(records, "hidden").items():
            plot_hidden(device, own, folder / f"{slug(device)}-hidden.png")
        for device, own in newest(records, "accuracy").items():
            plot_accuracy(device, own, folder / f"{slug(device)}-accuracy.png")
    print(f"{'differ from' if args.check else 'rewritten from'} the records: {', '.join(stale)}" if stale else "up to date")
    return 1 if args.check and stale else 0


def slug(device: str) -> str:
    """A device's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
