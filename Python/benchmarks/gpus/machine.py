"""What the machine is: GPUs, driver, clocks, topology."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


class NoGPU(Exception):
    pass


def gpu_count() -> int:
    """GPUs that nvidia-smi lists."""
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        raise NoGPU(f"no NVIDIA GPU: nvidia-smi: {error}") from None
    count = sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
    if listing.returncode != 0 or count == 0:
        raise NoGPU(f"no NVIDIA GPU: nvidia-smi -L: {(listing.stdout + listing.stderr).strip()}")
    return count


def query(field: str) -> str:
    """Of the first GPU; "" where nvidia-smi does not know."""
    answer = subprocess.run(
        ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader", "-i", "0"], capture_output=True, text=True
    )
    return answer.stdout.strip() if answer.returncode == 0 else ""


FILES = {
    "topology.txt": ["nvidia-smi", "topo", "-m"],
    "clocks.txt": ["nvidia-smi", "-q", "-d", "CLOCK"],
    "links.txt": ["nvidia-smi", "nvlink", "--status"],
    "gpus.txt": ["nvidia-smi"],
}


def describe(folder: Path, commit: str) -> dict:
    """Writes what nvidia-smi says into `folder`, and returns what the tables say of the machine."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, command in FILES.items():
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
            text = answer.stdout + answer.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            text = f"{error}\n"
        (folder / name).write_text(text)
    return {
        "gpu": query("name"),
        "driver": query("driver_version"),
        "clocks": " / ".join(query(field) for field in ("clocks.max.sm", "clocks.max.mem")),
        "link": link_kind((folder / "topology.txt").read_text()),
        "host": platform.processor() or platform.machine(),
        "commit": commit,
    }


def link_kind(topology: str) -> str:
    """How the first GPU reaches the second, as `nvidia-smi topo -m` has it: NV18, SYS ...; "" of one GPU."""
    for line in topology.splitlines():
        words = line.split()
        if words[:2] == ["GPU0", "X"] and len(words) > 2 and any(row.startswith("GPU1") for row in topology.splitlines()):
            return words[2]
    return ""
