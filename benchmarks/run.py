"""Times ours and their rivals, asks how exact they are, and appends a record of each to benchmarks/results/<device>.jsonl.

    make bench                                                           all for this device: per-token statistics from logits,
                                                                         whole losses from hidden states, exactness
    make bench PYTHON_BIN=python3 ARGS="--gpu --out DIR"                 what is worth most, in less than ten minutes of a GPU;
                                                                         nothing is installed, records are copied to DIR
    make bench ARGS="--level hidden"                                     one level
    make bench ARGS="--case N4096-V151936-bf16 --provider fused"         some; both may be repeated
    make bench ARGS="--tune"                                             sweep the block sizes of the kernels instead (GPU)

Cases come in the order of their worth, and each is written down when it is done: a run that is stopped has lost nothing.
What is measured, and how: measure.py, linear.py, accuracy.py. What to measure: cases.py. Whom: providers.py. Tables for the
documents: report.py.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from accuracy import ACCURACY
from cases import CASES, HIDDEN_CASES, PROBLEMS, Case, HiddenCase, Problem
from linear import HIDDEN
from measure import LOGITS, measure
from providers import HIDDEN_PROVIDERS, PROVIDERS, ROW_PROVIDERS
from report import RESULTS, ROOT, Record, accuracy, is_absent, newest, slug, status, summary

LEVELS = {"hidden": HIDDEN, "logits": LOGITS, "accuracy": ACCURACY}
ROUNDS = {("logits", "cuda"): 20, ("hidden", "cuda"): 10}
"""Of a case, unless told otherwise; else 3."""

GPU_MINUTES = 8.5
"""No further case of `--gpu` begins after that long: the longest takes a minute."""

PEERS = ("trl", "liger-kernel", "cut-cross-entropy", "fla-core")


def output_of(*command: str) -> str:
    """What a command prints; nothing if it fails or does not exist."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def birth_certificate(device: torch.device, commit: str) -> Record:
    """What a measurement depends on besides its case."""
    if device.type == "cuda":
        name, threads = torch.cuda.get_device_name(device), None
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    else:
        cpuinfo = Path("/proc/cpuinfo")
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name, driver, threads = (models or [platform.processor() or platform.machine()])[0], "", torch.get_num_threads()
    versions = {}
    for package in ("triton", *PEERS):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or output_of("git", "rev-parse", "HEAD"),
        "changed": not commit and bool(output_of("git", "status", "--porcelain", "fused_tdpo", "kernels", "benchmarks/*.py")),
        "device": name,
        "driver": driver,
        "threads": threads,
        "torch": torch.__version__,
        "triton": versions.pop("triton", ""),
        "peers": versions,
        "python": platform.python_version(),
    }


def describe(case: Case | HiddenCase | Problem) -> Record:
    """The part of a record that is the case's."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"case": case.name, "model": case.model, "V": case.V, "dtype": dtype} | case.facts


def append(records: list[Record], path: Path, out: Path | None) -> None:
    """Adds records to a file, and copies that to another folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out)


def sweep(args: argparse.Namespace, device: torch.device, born: Record) -> int:
    """`--tune`: every choice of block sizes, on a few cases."""
    import tune  # imports Triton

    deadline = time.monotonic() + 60 * (args.minutes or GPU_MINUTES)
    for name in args.case or tune.CASES:
        case = next(case for case in CASES if case.name == name)
        for phase in tune.SWEEPS:
            if time.monotonic() > deadline:
                print(f"not swept: {phase} of {name}")
                continue
            with status(f"{case.model} {name}: {phase}") as say:
                found, floor = tune.tune(case, phase, device, args.rounds or ROUNDS["logits", "cuda"], say)
            new = [born | describe(case) | {"phase": phase, "floor_ms": floor} | choice for choice in found]
            append(new, args.results / "tune" / f"{slug(born['device'])}.jsonl", args.out)
            tune.best(found, floor).show(f"{case.model} {name}: {phase}")
            print(f"{sum(bool(choice['refused']) for choice in found)} of {len(found)} choices refused")
    return 0


def measure_all(args: argparse.Namespace, device: torch.device, born: Record, path: Path) -> dict[str, list[Record]]:
    """Level -> its records; says what was left out."""
    tables = {"hidden": (HIDDEN_CASES, HIDDEN_PROVIDERS), "logits": (CASES, PROVIDERS), "accuracy": (PROBLEMS, ROW_PROVIDERS)}
    tag = "gpu" if device.type == "cuda" else "cpu"
    work = []
    for level in [args.level] if args.level else LEVELS:
        cases, providers = tables[level]
        for case in cases:
            if case.name in args.case if args.case else tag in case.tags:
                chosen = [
                    name for name in providers if name in (case.only or providers) and name in (args.provider or providers)
                ]
                work += [(level, case, [(name, providers[name]) for name in chosen])] if chosen else []
    work.sort(key=lambda item: "main" not in item[1].tags)

    begun, records, left_out = time.monotonic(), {level: [] for level in LEVELS}, []

    def out_of_time() -> bool:
        return args.minutes is not None and time.monotonic() > begun + 60 * args.minutes

    for number, (level, case, chosen) in enumerate(work, 1):
        if number > 1 and out_of_time():
            left_out.append(case.name)
            continue
        minutes = (time.monotonic() - begun) / 60
        with status(f"{number} of {len(work)}, after {minutes:.1f} minutes: {case.model} {case.name}") as say:
            rounds = args.rounds or ROUNDS.get((level, device.type), 3)
            try:
                found = measure(case, chosen, device, rounds, out_of_time, say, LEVELS[level])
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises where a provider has broken the device: what came after it means nothing
            except torch.OutOfMemoryError:
                left_out.append(f"{case.name} (its inputs do not fit)")
                continue
        born["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        new = [born | describe(case) | vars(measurement) for measurement in found]
        append(new, path, args.out)
        records[level] += new
    if left_out:
        print(f"not measured: {', '.join(left_out)}")
    return records


def main(arguments: list[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases, providers = [case.name for case in (*CASES, *HIDDEN_CASES, *PROBLEMS)], PROVIDERS | HIDDEN_PROVIDERS | ROW_PROVIDERS
    parser.add_argument("--level", choices=LEVELS, help="default: all")
    parser.add_argument("--case", action="append", choices=cases, metavar="NAME", help="default: all for this device")
    parser.add_argument("--provider", action="append", choices=providers, metavar="NAME", help="default: all")
    parser.add_argument("--rounds", type=int, help="default: 20 or 10 on a GPU, 3 on a CPU")
    parser.add_argument("--minutes", type=float, help="begin no further case after that long")
    parser.add_argument("--gpu", action="store_true", help=f"refuse to run without a GPU, and --minutes {GPU_MINUTES}")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--out", type=Path, help="folder that gets a copy of the records of this device")
    parser.add_argument("--commit", default="", help="what the records name where this is not a git checkout")
    parser.add_argument("--tune", action="store_true", help="sweep the kernels' block sizes instead; needs a GPU")
    args = parser.parse_args(arguments)
    if (args.tune or args.gpu) and device.type != "cuda":
        parser.error("--tune and --gpu need a GPU: torch.cuda.is_available() is False")
    if args.gpu and args.minutes is None:
        args.minutes = GPU_MINUTES

    born = birth_certificate(device, args.commit)
    path = args.results / f"{slug(born['device'])}.jsonl"
    if args.tune:
        return sweep(args, device, born)
    found = measure_all(args, device, born, path)
    records = [record for own in found.values() for record in own]
    refused = [record for record in records if record["refused"]]
    reasons = [
        f"{r['provider']}: {r['refused']}" if is_absent(r) else f"{r['case']}: {r['provider']}: {r['refused']}" for r in refused
    ]
    print("\n".join(dict.fromkeys(reasons)))
    for level, own in found.items():
        for device_name, newest_records in newest(own, level).items():  # one, or none where nothing fits
            text, table = (accuracy if level == "accuracy" else summary)(newest_records)
            table.show(f"{device_name}. {text}")
    print(f"{len(records)} records in {path}; python benchmarks/report.py brings the documents up to date")
    return 1 if any(record["failed"] for record in refused) else 0


if __name__ == "__main__":
    sys.exit(main())
