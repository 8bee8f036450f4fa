"""What the compiler made of every kernel: registers, spills, access widths, and instructions per logit pair. Needs no GPU.

    make audit                                                all kernels, variants and targets: about three minutes
    make audit ARGS="--case bf16 --target sm_90 --lines"      some of them, and which source lines cost what

Each launcher is called on CPU tensors while the launches are recorded instead of run; Triton then compiles what was recorded,
specialised for its arguments as at a real launch, for targets that need not be here. So what is audited is what is launched.

Per pair of logits (x, z), counts are those of the main loop, all of it, divided by the pairs a thread handles per iteration:

    instr    issued instructions; on AMD vector and memory instructions, since scalar ones issue beside them
    SFU      of these, special functions (exp2 and the like)
    fixed    instructions outside the main loop, in the code, not divided: what a program pays before and after

The main loop is the cheapest loop that moves the right bytes: those of each logit once, and those of each gradient once. Two
conditions hold everywhere: no spills, and no shuffle, barrier, shared or local memory access in the main loop. Where the pitch
allows, its accesses are 128 bits wide (less only beside a wider dtype). A case may set `Limits` for sm_90.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}
"""Name -> (backend, architecture, threads of a warp)."""


# --------------------------------------------------------------------------------------------------------------- what to audit


@dataclass(frozen=True)
class Limits:
    """The budget of a kernel on sm_90."""

    instructions: float = inf
    sfu: float = inf
    registers: float = inf


FORWARD = Limits(instructions=28, sfu=2.3, registers=72)
BACKWARD = Limits(instructions=14, sfu=2.1, registers=40)
CAPPED_FORWARD = Limits(instructions=62, sfu=6.3, registers=128)  # a cap is 16 instructions a logit, two of them SFU
CAPPED_BACKWARD = Limits(instructions=50, sfu=6.1, registers=128)
OTHERS = {  # of other divergences: they count log p/q of every column, and js a logarithm more
    ("reverse-kl", "bwd"): Limits(instructions=24, sfu=2.1, registers=80),
    ("js", "compare"): Limits(instructions=74, sfu=4.1, registers=104),
    ("js", "bwd"): Limits(instructions=67, sfu=3.1, registers=112),
    ("alpha", "compare"): Limits(instructions=67, sfu=5.2, registers=64),
    ("alpha", "bwd"): Limits(instructions=65, sfu=5.2, registers=128),
}


@dataclass(frozen=True)
class Case:
    """A launch to compile, and what to expect of it."""

    name: str
    kernel: object  # triton.JITFunction
    args: dict[str, object]  # arguments and options by name, as launched
    pairs: int = 0  # that a program handles per iteration of its main loop; 0: there is no main loop
    reads: int = 0  # bytes of logits per pair
    writes: int = 0  # bytes of gradient per pair
    width: int = 0  # bits of the narrowest access allowed in the main loop
    limits: Limits = field(default_factory=Limits)


def token_stats_cases(target: str) -> Iterator[Case]:
    """The launches of `token_stats`, forward and backward, in every variant that compiles differently."""
    import torch

    from fused_tdpo.kernels import token_stats as op
    from fused_tdpo.types import EXTRAS, FORWARD_KL, Divergence

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    variants = {  # name -> dtypes of policy, reference and gradient, V, extras
        "bf16": (bf16, bf16, bf16, 151_936, ()),  # the vocabulary decides the number of warps
        "bf16-32k": (bf16, bf16, bf16, 32_000, ()),
        "bf16-1k": (bf16, bf16, bf16, 1_024, ()),
        "fp16": (fp16, fp16, fp16, 151_936, ()),
        "fp32": (fp32, fp32, fp32, 151_936, ()),
        "bf16-fp32": (bf16, fp32, bf16, 151_936, ()),
        "fp32-to-bf16": (fp32, fp32, bf16, 151_936, ()),
        "bf16-to-fp32": (bf16, bf16, fp32, 151_936, ()),
        "bf16-no-ref": (bf16, None, bf16, 151_936, ()),
        "bf16-extras": (bf16, bf16, bf16, 151_936, EXTRAS),
        "bf16-narrow": (bf16, bf16, bf16, 151_937, ()),  # odd: most rows start off a 16-byte boundary
        "fp32-narrow": (fp32, fp32, fp32, 151_937, ()),
    }
    uncapped = (None, None)
    launches = {name: (variant, uncapped, FORWARD_KL) for name, variant in variants.items()}
    capped = ("bf16", "fp16", "fp32", "fp32-to-bf16", "bf16-no-ref", "bf16-extras", "bf16-narrow")
    launches |= {f"{name}-capped": (variants[name], (30.0, 50.0), FORWARD_KL) for name in capped}
    divergences = {
        "reverse-kl": Divergence("reverse_kl"), "js": Divergence("js"), "alpha": Divergence("alpha", 0.3),
        "alpha-above-half": Divergence("alpha", 0.7),
    }  # fmt: skip
    launches |= {f"bf16-{suffix}": (variants["bf16"], uncapped, divergence) for suffix, divergence in divergences.items()}
    launches |= {f"{n}-reverse-kl": (variants[n], uncapped, divergences["reverse-kl"]) for n in ("fp32-narrow", "bf16-fp32")}
    for suffix in ("reverse-kl", "js", "alpha"):
        launches[f"bf16-32k-{suffix}"] = (variants["bf16-32k"], uncapped, divergences[suffix])
        launches[f"bf16-narrow-{suffix}"] = (variants["bf16-narrow"], uncapped, divergences[suffix])
        launches[f"fp32-{suffix}"] = (variants["fp32"], uncapped, divergences[suffix])
        launches[f"bf16-{suffix}-capped"] = (variants["bf16"], (30.0, 50.0), divergences[suffix])
    N = 2
    labels, g = torch.zeros(N, dtype=torch.int64), torch.zeros(N)
    for name, ((policy_dtype, ref_dtype, d_dtype, V, extras), softcaps, divergence) in launches.items():
        policy, d_policy = (torch.empty(1, N, V, dtype=dtype) for dtype in (policy_dtype, d_dtype))
        ref = torch.empty(1, N, V, dtype=ref_dtype) if ref_dtype else None
        options = {"V": V, "ignore_index": -100, "temperature": 1.0, "softcaps": softcaps, "divergence": divergence}

        def launch(policy=policy, ref=ref, d_policy=d_policy, options=options, extras=extras):
            _, saved = op.token_stats_fwd(policy, ref, labels, extras=extras, **options)
            op.token_stats_bwd(policy, ref, labels, saved, g, g if ref is not None else None, d_policy, **options)

        for kernel, args in recorded(launch, hip=TARGETS[target][0] == "hip"):
            step = kernel.__name__.removeprefix("token_stats_").removesuffix("_kernel")
            expected = {}
            itemsizes = [t.element_size() for t in (policy, ref) if t is not None]
            accessed = [*itemsizes, d_policy.element_size()] if step == "bwd" else itemsizes
            if step not in ("finish", "settle"):
                expected = {
                    "pairs": args["K"] * args["T"] * args["E"],
                    "reads": sum(itemsizes),
                    "writes": d_policy.element_size() if step == "bwd" else 0,
                    "width": 8 * 16 * min(accessed) // max(accessed) if V % 2 == 0 else 0,
                }
            suffix = name.removeprefix("bf16-").removeprefix("32k-")
            if suffix in divergences and name.startswith("bf16-") and step not in ("finish", "settle"):
                expected["limits"] = OTHERS.get((suffix, step), FORWARD if step == "fold" else Limits())
            if name in ("bf16", "bf16-32k", "bf16-capped") and step != "finish":
                forward, backward = (CAPPED_FORWARD, CAPPED_BACKWARD) if softcaps != uncapped else (FORWARD, BACKWARD)
                expected["limits"] = forward if step == "fold" else backward
            yield Case(f"token_stats {step} {name}", kernel, args, **expected)


def cases(target: str) -> Iterator[Case]:
    """Every launch of the package."""
    yield from token_stats_cases(target)
    yield from scaled_copy_cases(target)


def scaled_copy_cases(target: str) -> Iterator[Case]:
    """The launches of `scaled_copy`: the sums of a head's gradient, into each dtype of a head."""
    import torch

    from fused_tdpo.kernels.scaled_copy import scaled_copy

    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        x, factor, y = torch.empty(8192), torch.empty(()), torch.empty(8192, dtype=dtype)
        launched = recorded(lambda x=x, factor=factor, y=y: scaled_copy(x, factor, y), hip=TARGETS[target][0] == "hip")
        for kernel, args in launched:
            yield Case(f"scaled_copy {name}", kernel, args)


def recorded(launch: Callable[[], object], hip: bool) -> list[tuple[object, dict[str, object]]]:
    """(kernel, arguments and options by name) of everything `launch` launches. Nothing runs."""
    import torch
    from triton.runtime.jit import JITFunction

    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        launches.append((kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs))

    hip_version = mock.patch.object(torch.version, "hip", "audit" if hip else None)  # what launchers tell vendors apart by
    with mock.patch.object(JITFunction, "run", record), hip_version:
        launch()
    return launches


# ----------------------------------------------------------------------------------------------------------- reading assembly


@dataclass(frozen=True)
class Dialect:
    """How an assembly language is read, by regular expressions."""

    instruction: str  # groups: opcode, operands
    label: str
    line: str  # groups: file and line that the following instructions come from
    branch: str  # opcodes
    counted: str  # opcodes
    kinds: dict[str, str]  # kind -> opcodes


SASS = Dialect(
    instruction=r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);",
    label=r"(\.L\w+):",
    line=r"\s*//## File \"(?:.*/)?(.*?)\", line (\d+)",
    branch=r"U?BRA\b",
    counted=r"(?!NOP)",
    kinds={
        "sfu": r"MUFU",
        "load": r"LDG",
        "store": r"STG",
        "shuffle": r"SHFL|REDUX",
        "barrier": r"BAR",
        "shared": r"LDS|STS|ATOMS",
        "local": r"LDL|STL",
    },
)
AMDGCN = Dialect(
    instruction=r"\t([a-z]+_\w+)\b([^;]*)",
    label=r"(\.LBB\w+):",
    line=r"\t\.loc\s.*; (?:.*/)?(\S*?):(\d+):",
    branch=r"s_c?branch",
    counted=r"v_|global_|buffer_|flat_|scratch_|ds_",
    kinds={
        "sfu": r"v_(?:exp|log|rcp|rsq|sqrt)_",
        "load": r"(?:global|buffer|flat)_load",
        "store": r"(?:global|buffer|flat)_store",
        "shuffle": r"ds_(?:b?permute|swizzle)|v_(?:readlane|writelane|permlane)|\w+_dpp",
        "barrier": r"s_barrier",
        "shared": r"ds_(?:read|write|load|store)",
        "local": r"scratch_",
    },
)
WIDTHS = {  # what says so in either language -> bits; 32 where nothing does
    r"\.256": 256,
    r"\.128|x4": 128,
    r"x3": 96,
    r"\.64|x2": 64,
    r"\.[US]16|short|d16": 16,
    r"\.[US]8|[us]byte": 8,
}


@dataclass
class Loop:
    """What a piece of code holds, by kind."""

    instructions: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    loads: Counter[int] = field(default_factory=Counter)  # bits -> accesses
    stores: Counter[int] = field(default_factory=Counter)
    opcodes: Counter[str] = field(default_factory=Counter)
    lines: Counter[tuple[str, int]] = field(default_factory=Counter)  # file and line of the source

    @property
    def bytes_moved(self) -> tuple[int, int]:
        """Bytes that a thread loads and stores in one iteration."""
        return tuple(sum(bits // 8 * n for bits, n in accesses.items()) for accesses in (self.loads, self.stores))


def count(code: list[tuple[str, tuple[str, int]]], dialect: Dialect) -> Loop:
    """Sorts instructions, (opcode, (file, line) of the source), by kind."""
    loop = Loop()
    for opcode, line in code:
        kind = next((kind for kind, pattern in dialect.kinds.items() if re.match(pattern, opcode)), "other")
        loop.kinds[kind] += 1
        if re.match(dialect.counted, opcode):
            loop.instructions += 1
            loop.opcodes[opcode.partition(".")[0]] += 1
            loop.lines[line] += 1
        if kind in ("load", "store"):
            width = next((bits for pattern, bits in WIDTHS.items() if re.search(pattern, opcode)), 32)
            (loop.loads if kind == "load" else loop.stores)[width] += 1
    return loop


def parse(text: str, dialect: Dialect) -> tuple[Loop, list[Loop]]:
    """(the whole code, its loops): a loop is what lies between a label and a later branch back to it."""
    code, labels, loops, line = [], {}, [], ("", 0)
    for row in text.splitlines():
        if match := re.match(dialect.label, row):
            labels[match[1]] = len(code)
        elif match := re.match(dialect.line, row):
            line = match[1], int(match[2])
        elif match := re.match(dialect.instruction, row):
            opcode, operands = match.groups()
            code.append((opcode, line))
            target = re.search(r"\.L\w+", operands) if re.match(dialect.branch, opcode) else None
            if target and target[0] in labels:
                loops.append(count(code[labels[target[0]] :], dialect))
    return count(code, dialect), loops


# ------------------------------------------------------------------------------------------------------------------- one audit


@dataclass
class Report:
    """The figures of one case on one target, as read from the assembly; `failures` is empty where all conditions hold."""

    case: str
    target: str
    registers: int
    spilled: int  # bytes of local memory per thread
    shared: int  # bytes per program
    fixed: int
    loop: Loop
    pairs: float  # that a thread handles in the loop as compiled; 0: no main loop
    failures: list[str] = field(default_factory=list)

    @property
    def instructions_per_pair(self) -> float:
        return self.loop.instructions / self.pairs if self.pairs else 0.0

    @property
    def sfu_per_pair(self) -> float:
        return self.loop.kinds["sfu"] / self.pairs if self.pairs else 0.0


def compiled(case: Case, target: str):
    """The case, specialised and compiled as its launch would be on the target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    gpu = GPUTarget(*TARGETS[target])
    backend, kernel = make_backend(gpu), case.kernel
    # the three steps of JITFunction.run, which has no entry point for a GPU that is not here
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(**case.args)
    options, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target=gpu, options=options.__dict__)


def disassembled(binary) -> tuple[str, Dialect, int, int]:
    """(assembly, its dialect, registers, bytes of local memory) of a compiled kernel."""
    from triton import knobs

    def resource(pattern: str, text: str) -> int:
        return sum(int(n) for n in re.findall(pattern, text))

    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        return text, AMDGCN, resource(r"\.vgpr_count:\s*(\d+)", text), resource(r"\.private_segment_fixed_size:\s*(\d+)", text)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        tools = ([knobs.nvidia.nvdisasm.path, "-c", "-g"], [knobs.nvidia.cuobjdump.path, "-res-usage"])
        text, usage = (subprocess.run([*tool, cubin], capture_output=True, text=True, check=True).stdout for tool in tools)
    return text, SASS, resource(r"\bREG:(\d+)", usage), resource(r"\b(?:STACK|LOCAL):(\d+)", usage)


def audit(case: Case, target: str) -> Report:
    """Compiles a case for a target, reads the result and judges it."""
    binary = compiled(case, target)
    text, dialect, registers, spilled = disassembled(binary)
    whole, loops = parse(text, dialect)
    report = Report(case.name, target, registers, spilled, binary.metadata.shared, whole.instructions, Loop(), pairs=0)
    if case.pairs:
        threads = binary.metadata.num_warps * TARGETS[target][2]
        report.loop, report.pairs = main_loop(loops, case, case.pairs / threads)
        report.fixed -= report.loop.instructions
    report.failures = failures(report, case)
    return report


def main_loop(loops: list[Loop], case: Case, pairs: float) -> tuple[Loop, float]:
    """(loop, pairs a thread handles in it): the cheapest loop that moves the bytes of its pairs once, unrolled or not."""
    candidates = []
    for loop in loops:
        loads, stores = loop.bytes_moved
        unrolled = loads / (case.reads * pairs)
        if unrolled >= 1 and unrolled.is_integer() and stores == case.writes * pairs * unrolled:
            candidates.append((loop.instructions / unrolled, unrolled, loop))
    if not candidates:
        return Loop(), 0
    _, unrolled, loop = min(candidates, key=lambda candidate: candidate[:2])
    return loop, pairs * unrolled


def failures(report: Report, case: Case) -> list[str]:
    """The conditions that a report breaks, in words."""
    broken = []
    if report.spilled:
        broken.append(f"{report.spilled} bytes spilled")
    if not case.pairs:
        return broken
    if not report.pairs:
        return [*broken, f"no loop reads {case.reads} and writes {case.writes} bytes a pair: not once, or not in a loop"]
    for kind in ("shuffle", "barrier", "shared", "local"):
        if n := report.loop.kinds[kind]:
            broken.append(f"{n} {kind} instructions in the main loop")
    narrowest = min(report.loop.loads | report.loop.stores)
    if narrowest < case.width:
        broken.append(f"{narrowest}-bit accesses, {case.width} are possible")
    if report.target == "sm_90":
        figures = {
            "instructions a pair": (report.instructions_per_pair, case.limits.instructions),
            "special functions a pair": (report.sfu_per_pair, case.limits.sfu),
            "registers": (report.registers, case.limits.registers),
        }
        broken += [f"{value:.4g} {name}, limit {limit}" for name, (value, limit) in figures.items() if value > limit]
    return broken


# ---------------------------------------------------------------------------------------------------------------------- output


COLUMNS = ("kernel", "target", "regs", "spill B", "smem B", "load", "store", "instr/pair", "SFU/pair", "fixed", "")


def cells(report: Report) -> tuple[str, ...]:
    def widths(accesses: Counter[int]) -> str:
        return "+".join(str(bits) for bits in sorted(accesses, reverse=True)) or "-"

    per_pair = (f"{report.instructions_per_pair:.1f}", f"{report.sfu_per_pair:.2f}") if report.pairs else ("-", "-")
    resources = (str(report.registers), str(report.spilled), str(report.shared))
    verdict = "FAIL" if report.failures else "ok"
    access = (widths(report.loop.loads), widths(report.loop.stores))
    return (report.case, report.target, *resources, *access, *per_pair, str(report.fixed), verdict)


def show(reports: list[Report]) -> None:
    rows = [cells(report) for report in reports]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(COLUMNS, *rows, strict=True)]
        for row in (COLUMNS, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    else:
        table = Table()
        for i, name in enumerate(COLUMNS):
            table.add_column(name, justify="left" if i < 2 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row, style="red" if row[-1] == "FAIL" else None)
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    for report in reports:
        if report.failures:
            print(f"FAIL  {report.case} on {report.target}: {'; '.join(report.failures)}")


def show_lines(report: Report, source: Path) -> None:
    """The main loop by opcode and by source line, per pair."""
    if not report.pairs:
        return
    text = source.read_text().splitlines()
    opcodes = ", ".join(f"{opcode} {n / report.pairs:.2f}" for opcode, n in report.loop.opcodes.most_common())
    print(f"\n{report.case} on {report.target}, per pair: {opcodes}")
    for (file, line), n in sorted(report.loop.lines.items()):
        own = file == source.name and 0 < line <= len(text)
        print(f"{n / report.pairs:8.2f}  {line:5d}  {text[line - 1].strip() if own else file}")


def record(reports: list[Report]) -> dict[str, object]:
    """All figures, and what they depend on."""
    import torch
    import triton

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "--verify", "-q", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain")),
        "versions": {"triton": triton.__version__, "torch": torch.__version__},
        "reports": [
            vars(r)
            | {"loop": {name: value for name, value in vars(r.loop).items() if name != "lines"}}
            | {"instructions_per_pair": r.instructions_per_pair, "sfu_per_pair": r.sfu_per_pair}
            for r in reports
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="may be repeated")
    parser.add_argument("--case", action="append", metavar="WORDS", help="words of a case's name; may be repeated")
    parser.add_argument("--lines", action="store_true", help="show what each source line costs in the main loop")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write a record of all figures")
    args = parser.parse_args()

    os.environ.pop("TRITON_INTERPRET", None)  # read when Triton is imported, which nobody has done yet
    reports = []
    for target in args.target or TARGETS:
        for case in cases(target):
            if args.case and not any(set(text.split()) <= set(case.name.split()) for text in args.case):
                continue
            report = audit(case, target)
            reports.append(report)
            if args.lines:
                show_lines(report, Path(case.kernel.__globals__["__file__"]))
    if not reports:
        parser.error("no case matches")
    show(reports)
    if args.json:
        args.json.write_text(json.dumps(record(reports), indent=1) + "\n")
    failed = sum(bool(report.failures) for report in reports)
    print(f"{len(reports)} audits, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
