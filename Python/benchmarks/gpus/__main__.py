"""All that is to be measured on a machine with GPUs, by one command: `scripts/bench-gpus`.

Parts, in this order (--parts takes some of them):

  conformance  the GPU tests, ranks as threads and as processes
  verify       random jobs: one rank a GPU and two, threads and processes
  link         copies between GPUs by kernels and copy engines (needs nvcc)
  throughput   bench of many tokens, over multiprocessors; its own measure of the link
  latency      bench of few tokens, FP8, grouped
  nccl         all-to-all through PyTorch
  deep-ep      DeepEP's own tests, of a checkout that is built

The folder --output gets raw/ (a record and the output of every step), machine/ (topology, clocks, links), tables.md and
throughput.svg. A folder that is there already is added to, so that parts can run one after the other; a step that runs
again replaces its record. A step that fails does not keep others from running; its name ends the run, with exit code 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Optional

import jobs
import machine
import report
import steps


def numbers(text: str) -> list[int]:
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise ValueError
    return values


def choices(known: tuple[str, ...]):
    def parse(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in known:
                raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}, found '{word}'")
        return words

    return parse


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="bench-gpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--output", type=Path, default=Path("bench-gpus"), help="the folder to fill (default bench-gpus)")
    add("--gpus", type=int, help="the first so many (default all that nvidia-smi lists)")
    add("--parts", type=choices(jobs.PARTS), default=list(jobs.PARTS), help="some of the parts, by commas")
    add("--swiftep", help="the tool (default SWIFTEP in the environment, .build/release/swiftep, or that of PATH)")
    add("--packed-tests", help="what scripts/pack-gpu-tests has made, where there is no Swift")
    add("--deep-ep", default=os.environ.get("DEEP_EP"), help="a built checkout (default DEEP_EP in the environment)")
    add("--ranks", type=int, help="of the benches (default one a GPU; 4 of one GPU)")
    add("--tokens", type=numbers, default=[4096, 8192], help="of throughput (default 4096,8192)")
    add("--dtypes", type=choices(("bf16", "fp8")), default=["bf16", "fp8"], help="of throughput (default bf16,fp8)")
    add("--workers", type=numbers, default=[2, 4, 6, 8, 12, 16, 24], help="of throughput (default 2,4,6,8,12,16,24)")
    add("--latency-tokens", type=numbers, default=[1, 8, 32, 128, 512], help="default 1,8,32,128,512")
    add("--latency-workers", type=numbers, default=[8, 16, 24], help="default 8,16,24")
    add("--iterations", type=int, default=10, help="of each bench (default 10)")
    add("--replays", type=int, default=20, help="of each throughput bench (default 20)")
    add("--verify-seconds", type=int, default=600, help="of all random jobs together (default 600)")
    add("--seed", type=int, default=1, help="of the first random job (default 1)")
    add("--step-seconds", type=float, default=300, help="after which a step is ended (default 300)")
    add("--list", action="store_true", help="print what would be run, and run nothing; wants --gpus where there is none")
    return made


def find_tool(given: Optional[str]) -> str:
    built = jobs.ROOT / ".build/release/swiftep"
    found = given or os.environ.get("SWIFTEP") or (str(built) if built.exists() else shutil.which("swiftep"))
    if found is None or shutil.which(found) is None:
        sys.exit(
            f"bench-gpus: --swiftep: expected a program, found {found or 'none'}; `swift build -c release --product swiftep` makes it"
        )
    return str(Path(shutil.which(found) or found).resolve())


def complete(options: argparse.Namespace) -> None:
    """Fills in what depends on the machine, or ends with what is wrong."""
    try:
        found = machine.gpu_count()
    except machine.NoGPU as absence:
        if not (options.list and options.gpus):
            sys.exit(f"bench-gpus: {absence}")
        found = options.gpus
    options.gpus = options.gpus or found
    if not 1 <= options.gpus <= found:
        sys.exit(f"bench-gpus: --gpus: expected 1 to {found}, as many as there are, found {options.gpus}")
    options.all_gpus = options.gpus == found
    options.ranks = options.ranks or (4 if options.gpus == 1 else options.gpus)
    options.swiftep = find_tool(options.swiftep) if not options.list else options.swiftep or "swiftep"
    options.architecture = "90" if options.list else machine.query("compute_cap").replace(".", "") or "90"


def commit() -> str:
    try:
        answer = subprocess.run(["git", "-C", str(jobs.ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return answer.stdout.strip()


def what_is_missing(options: argparse.Namespace, skipped: list[steps.Skipped]) -> dict[str, list[str]]:
    """Why things were not run, by part; of parts that are not asked for, what an earlier run into this folder said."""
    path = options.output / "machine.json"
    before = json.loads(path.read_text())["skipped"] if path.exists() else {}
    asked = {part: [step.why for step in skipped if step.part == part] for part in options.parts}
    return {part: asked.get(part, before.get(part, ["not asked for"])) for part in jobs.PARTS}


def main() -> int:
    options = parser().parse_args()
    complete(options)
    every = [step if options.list else steps.unless_mps_is_missing(step) for step in jobs.steps(options)]
    skipped = [step for step in every if isinstance(step, steps.Skipped)]
    runs = [step for step in every if isinstance(step, steps.Step)]
    if options.list:
        # Whoever reads it may have read enough.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        for step in runs:
            print(f"{step.name}: {' '.join(step.command)}")
        print("".join(f"not run: {step.part}: {step.why}\n" for step in skipped), end="")
        return 0
    # What has been started ends with this, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    raw = options.output / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    facts = {"gpus": options.gpus, "date": datetime.date.today().isoformat()}
    facts.update(machine.describe(options.output / "machine", commit()))
    facts["skipped"] = what_is_missing(options, skipped)
    (options.output / "machine.json").write_text(json.dumps(facts, indent=1) + "\n")
    for step in skipped:
        print(f"not run: {step.part}: {step.why}", flush=True)
    failed = []
    for index, step in enumerate(runs):
        print(f"[{index + 1}/{len(runs)}] {step.name} ...", end=" ", flush=True)
        record = steps.run(step, raw)
        print(f"{record['failure'] or 'done'} ({record['seconds']:.1f} s)", flush=True)
        if record["failure"] is not None:
            failed.append(step.name)
            print("".join(f"    {line}\n" for line in steps.last_words(step, raw)), end="", flush=True)
        # Each time, so that what ends this run early does not take the tables along.
        report.write(options.output)
    print(f"\n{options.output / 'tables.md'}")
    if failed:
        print(f"bench-gpus: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
