"""What is run, and how one of it is: bounded, with what it printed kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Callable, Iterator, Optional, Union


@dataclasses.dataclass
class Step:
    """One command. Its record ends up in raw/NAME.json."""

    part: str
    name: str
    command: list[str]
    timeout_seconds: float
    parameters: dict = dataclasses.field(default_factory=dict)
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    folder: Optional[str] = None
    # Of what it printed, the figures; whatever this raises makes the step fail.
    parse: Optional[Callable[[str], object]] = None
    # Whether several of its processes share a GPU, which MPS then divides.
    shares_gpus: bool = False


@dataclasses.dataclass
class Skipped:
    """What is not run, and why."""

    part: str
    why: str


def bench_json(output: str) -> object:
    return json.loads(output[output.index("{") :])


def passed_jobs(output: str) -> object:
    return {"jobs": int(re.findall(r"^(\d+) jobs passed$", output, re.M)[-1])}


def deep_ep_intranode(output: str) -> object:
    """Microseconds of the best setting of each operation: `Best dispatch (FP8): SMs 24, ... t: 123.45 us`."""
    found = re.findall(r"\[tuning\] Best (dispatch \(\w+\)|combine): SMs (\d+),.*?(?:avg_)?t: ([0-9.]+) us", output)
    names = {"dispatch (BF16)": "dispatch_bf16", "dispatch (FP8)": "dispatch_fp8", "combine": "combine"}
    figures = {names[name]: float(time) for name, _, time in found}
    return {"workers": int(found[0][1]), **{name: figures[name] for name in names.values()}}


def deep_ep_low_latency(output: str) -> object:
    """Microseconds: the slowest rank's means."""
    pattern = r"Dispatch bandwidth: [0-9.]+ GB/s, avg_t=([0-9.]+) us \| Combine bandwidth: [0-9.]+ GB/s, avg_t=([0-9.]+) us"
    found = re.findall(pattern, output)
    return {"dispatch": max(float(pair[0]) for pair in found), "combine": max(float(pair[1]) for pair in found)}


def mps_control() -> Optional[str]:
    """The program that starts MPS, and talks to it; it lies among the driver's."""
    name = "nvidia-cuda-mps-control"
    return shutil.which(name) or shutil.which(name, path="/usr/local/nvidia/bin:/usr/bin")


def tell_mps(control: str, command: str, environment: dict[str, str]) -> bool:
    """Whether there was an MPS to be told."""
    try:
        answer = subprocess.run(
            [control], input=command + "\n", text=True, env={**os.environ, **environment}, timeout=60, capture_output=True
        )
    except subprocess.TimeoutExpired:
        return False
    return answer.returncode == 0


def unless_mps_is_missing(step: Union[Step, Skipped]) -> Union[Step, Skipped]:
    """Without it, processes that share a GPU take turns: what is measured then says nothing."""
    if isinstance(step, Skipped) or not step.shares_gpus or mps_control() is not None:
        return step
    return Skipped(step.part, f"{step.name}: processes that share a GPU want MPS; there is no nvidia-cuda-mps-control")


@contextlib.contextmanager
def mps() -> Iterator[dict[str, str]]:
    """The environment in which processes share GPUs under MPS: one that runs, or one for as long as this lasts."""
    control = mps_control()
    if control is None or tell_mps(control, "get_server_list", {}):
        yield {}
        return
    # A short path, since it becomes that of a socket.
    folder = tempfile.mkdtemp(prefix="mps")
    environment = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
    try:
        subprocess.run([control, "-d"], env={**os.environ, **environment}, timeout=60)
        time.sleep(1)
        yield environment
    finally:
        tell_mps(control, "quit", environment)
        shutil.rmtree(folder, ignore_errors=True)


def end(process: subprocess.Popen) -> None:
    """Ends a command with all that it has started."""
    for kind, patience_seconds in ((signal.SIGTERM, 10), (signal.SIGKILL, 30)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_seconds)


def run(step: Step, raw: Path) -> dict:
    """Runs a step and writes its record, with "failure" where it has one."""
    began = time.monotonic()
    record = {"part": step.part, "name": step.name, "command": step.command, "parameters": step.parameters}
    log = raw / f"{step.name}.txt"
    failure, result = None, None
    try:
        with contextlib.ExitStack() as stack:
            added = stack.enter_context(mps()) if step.shares_gpus else {}
            environment = {**os.environ, **added, **step.environment}
            output = stack.enter_context(log.open("w"))
            errors = stack.enter_context((raw / f"{step.name}.errors.txt").open("w"))
            process = subprocess.Popen(
                step.command, stdout=output, stderr=errors, stdin=subprocess.DEVNULL, env=environment, cwd=step.folder,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(step.timeout_seconds)
                if code != 0:
                    failure = f"exit code {code}"
            except subprocess.TimeoutExpired:
                failure = f"not done after {step.timeout_seconds:g} s"
            finally:
                # Also those that it has left behind.
                end(process)
    except OSError as error:
        failure = str(error)
    if failure is None and step.parse is not None:
        try:
            result = step.parse(log.read_text(errors="replace"))
        except (ValueError, KeyError, IndexError) as error:
            failure = f"printed no figures: {error!r}"
    record.update(seconds=round(time.monotonic() - began, 1), failure=failure, result=result)
    (raw / f"{step.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def last_words(step: Step, raw: Path, count: int = 8) -> list[str]:
    """The last lines that it printed."""
    lines = []
    for suffix in (".txt", ".errors.txt"):
        path = raw / (step.name + suffix)
        if path.exists():
            lines += path.read_text(errors="replace").strip().splitlines()[-count:]
    return lines[-count:]
