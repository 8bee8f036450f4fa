"""Times `token_stats` and its rivals, logits in, and appends a record of each to benchmarks/results/<device>.jsonl.

    make bench                                                           all cases for this device, for eight minutes
    make bench ARGS="--case N4096-V151936-bf16 --provider fused"         some; both may be repeated
    make bench ARGS="--tune"                                             sweep the block sizes of the kernels instead (GPU)

Cases come in the order of their worth, and each is written down when it is done: a run that is stopped has lost nothing.
What is measured, and how: measure.py. What to measure: cases.py. Whom: providers.py. Tables for the documents: report.py.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cases import CASES, Case
from measure import measure
from providers import PROVIDERS
from report import RESULTS, ROOT, Record, newest, slug, status
from report import time as time_view


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
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or output_of("git", "rev-parse", "HEAD"),
        "changed": bool(output_of("git", "status", "--porcelain", "fused_tdpo", "kernels", "benchmarks/*.py")),
        "device": name,
        "driver": driver,
        "threads": threads,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


def describe(case: Case) -> Record:
    """The part of a record that is the case's."""
    return {
        "case": case.name,
        "model": case.model,
        "N": case.N,
        "V": case.V,
        "dtype": str(case.dtype).removeprefix("torch."),
        "masked": case.masked,
        "forward_bytes": case.forward_bytes,
        "backward_bytes": case.backward_bytes,
    }


def append(records: list[Record], path: Path, out: Path | None) -> None:
    """Adds records to a file, and copies that to another folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out)


def sweep(args: argparse.Namespace, device: torch.device, born: Record, deadline: float) -> int:
    """`--tune`: every choice of block sizes, on a few cases."""
    import tune  # imports Triton

    for name in args.case or tune.CASES:
        case = next(case for case in CASES if case.name == name)
        for phase in tune.SWEEPS:
            if time.monotonic() > deadline:
                print(f"not swept: {phase} of {name}")
                continue
            with status(f"{case.model} {name}: {phase}") as say:
                found, floor = tune.tune(case, phase, device, args.rounds, say)
            new = [born | describe(case) | {"phase": phase, "floor_ms": floor} | choice for choice in found]
            append(new, args.results / "tune" / f"{slug(born['device'])}.jsonl", args.out)
            tune.best(found, floor).show(f"{case.model} {name}: {phase}")
            print(f"{sum(bool(choice['refused']) for choice in found)} of {len(found)} choices refused")
    return 0


def main(arguments: list[str] | None = None) -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tag = "gpu" if device.type == "cuda" else "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], metavar="NAME", help="default: all")
    parser.add_argument("--provider", action="append", choices=PROVIDERS, metavar="NAME", help="default: all")
    parser.add_argument("--rounds", type=int, default=20 if tag == "gpu" else 3)
    parser.add_argument("--minutes", type=float, default=8, help="begin no further case after that long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--out", type=Path, help="folder that gets a copy of the records of this device")
    parser.add_argument("--commit", default="", help="what the records name where this is not a git checkout")
    parser.add_argument("--tune", action="store_true", help="sweep the kernels' block sizes instead; needs a GPU")
    args = parser.parse_args(arguments)

    deadline = time.monotonic() + 60 * args.minutes
    born = birth_certificate(device, args.commit)
    path = args.results / f"{slug(born['device'])}.jsonl"
    if args.tune:
        if device.type != "cuda":
            parser.error("--tune needs a GPU: torch.cuda.is_available() is False")
        return sweep(args, device, born, deadline)
    cases = [case for case in CASES if (case.name in args.case if args.case else tag in case.tags)]
    providers = [(name, PROVIDERS[name]) for name in PROVIDERS if not args.provider or name in args.provider]

    records, left_out = [], []
    for number, case in enumerate(cases, 1):
        if records and time.monotonic() > deadline:
            left_out.append(case.name)
            continue
        with status(f"{number} of {len(cases)}: {case.model} {case.name}") as say:
            try:
                found = measure(case, providers, device, args.rounds, lambda: time.monotonic() > deadline, say)
            except torch.OutOfMemoryError:
                left_out.append(f"{case.name} (its inputs do not fit)")
                continue
        born["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        new = [born | describe(case) | vars(measurement) for measurement in found]
        append(new, path, args.out)
        records += new

    for device_name, own in newest(records).items():  # one, or none where nothing fits
        text, table = time_view(own)
        table.show(f"{device_name}. {text}")
    refused = [record for record in records if record["refused"]]
    for record in refused:
        print(f"{record['case']}: {record['provider']}: {record['refused']}")
    if left_out:
        print(f"not measured: {', '.join(left_out)}")
    print(f"{len(records)} records in {path}; python benchmarks/report.py brings the documents up to date")
    return 1 if any(record["failed"] for record in refused) else 0


if __name__ == "__main__":
    sys.exit(main())
