"""`scripts/bench-gpus` without a GPU: what it runs, what it makes of figures, and that failures show."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "Python/benchmarks/gpus"
sys.path.insert(0, str(FOLDER))

import machine  # noqa: E402
import plot  # noqa: E402
import report  # noqa: E402
import steps  # noqa: E402

TOPOLOGY = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV18\t0-31\nGPU1\tNV18\t X \t0-31\n"


def bench_result(gpus: int, dispatch_us: float, combine_us: float) -> dict:
    """As `swiftep bench --json -` prints it, of what is read here: 100 MB cross the link of a GPU."""
    link = {"linkWriteGigabytesPerSecond": 400.0, "linkReadGigabytesPerSecond": 360.0} if gpus > 1 else {}
    times = {"dispatch": dispatch_us, "combine": combine_us, "combine of an ordinary tensor": 2 * combine_us}
    operations = [
        {"name": name, "medianMicroseconds": time, "gigabytesPerSecond": 200_000 / time,
         **({"linkBytesPerGPU": 100_000_000} if gpus > 1 else {})}
        for name, time in times.items()
    ]  # fmt: skip
    return {"ranks": max(gpus, 2), "gpus": gpus, "operations": operations, **link}


def filled(folder: Path, gpus: int) -> Path:
    """A folder of records: 4 multiprocessors reach half of the limits, 8 reach nearly all, 12 all."""
    facts = {"gpus": gpus, "gpu": "H <200>", "link": "NV18" if gpus > 1 else "", "driver": "580.1", "clocks": "1980 MHz / 3201 MHz"}
    facts.update(commit="abc", date="2026-11-29", skipped={"deep-ep": ["no built checkout"], "link": []})
    (folder / "machine.json").write_text(json.dumps(facts))
    (folder / "raw").mkdir()

    def add(part: str, name: str, result: object, failure: object = None, **parameters: object) -> None:
        record = {"part": part, "name": name, "parameters": parameters, "seconds": 1, "failure": failure, "result": result}
        (folder / f"raw/{name}.json").write_text(json.dumps(record))

    for workers, dispatch_us, combine_us in ((4, 500.0, 550.0), (8, 262.0, 310.0), (12, 250.0, 278.0)):
        for dtype in ("bf16", "fp8"):
            add("throughput", f"throughput-{dtype}-4096-{workers}", bench_result(gpus, dispatch_us, combine_us),
                dtype=dtype, tokens=4096, workers=workers)  # fmt: skip
    add("throughput", "processes-4096-12", bench_result(gpus, 251, 279), tokens=4096, workers=12, processes=True)
    add("latency", "latency-128-16", bench_result(gpus, 26, 44), tokens=128, workers=16, ranks=8)
    add("latency", "latency-128-24", bench_result(gpus, 24, 39), tokens=128, workers=24, ranks=8)
    kernels = [{"kind": "bulk", "workers": 8, "write": 390.0, "read": 350.0}]
    add("link", "link", {"own_memory": gpus == 1, "engine": {"write": 399.0, "read": 359.0}, "kernels": kernels})
    exchange = {"exchange": 300.0, "dispatch": 400.0, "dispatch_with_counts": 500.0, "combine": 600.0}
    add("nccl", "nccl", {"figures": [{"tokens": 4096, "dtype": dtype, **exchange} for dtype in ("bf16", "fp8")]})
    if gpus > 1:
        add("deep-ep", "deep-ep-low-latency-128", {"dispatch": 76.0, "combine": 140.0}, tokens=128)
    add("verify", "verify-threads-8", {"jobs": 77})
    add("conformance", "conformance-threads", None, failure="exit code 1")
    return folder


def test_tables_and_plot(tmp_path: Path) -> None:
    report.write(filled(tmp_path, gpus=8))
    text = (tmp_path / "tables.md").read_text()
    assert "8 x H <200>, joined by NV18; driver 580.1; at most 1980 MHz / 3201 MHz" in text
    assert "Limits: 400.0 for writes, 360.0 for reads, the best of these: reads are 10.0% slower than writes." in text
    assert "| kernel, bulk copies | 8 | 390.0 | 350.0 |" in text
    assert "| 8 | 262.0 | 381.7 | 95.4% | 262.0 | 381.7 | 95.4% | 310.0 | 322.6 | 89.6% |" in text
    assert "- dispatch BF16, 95% of the limit of writes: from 8 SMs on\n" in text
    assert "- combine, 95% of the limit of reads: from 12 SMs on\n" in text
    assert "| 128 | 24 | 24.0 | 39.0 | 78.0 | 25 / 40 |" in text
    assert "| 4096 | SwiftEP | 250.0 (12 SMs) | 250.0 (12 SMs) | 278.0 (12 SMs) |" in text
    assert "| 4096 | NCCL, rows gathered | 400.0 | 400.0 | 600.0 |" in text
    assert "| 128 | SwiftEP, grouped |  | 24.0 (24 SMs) | 39.0 (24 SMs) |\n| 128 | DeepEP, low latency |  | 76.0 | 140.0 |" in text
    assert "| `--tokens 4096 --workers 12 --processes` | 251.0 | 279.0 | 558.0 |" in text
    assert "| verify-threads-8 | done, 77 jobs | 1.0 |" in text
    assert "| conformance-threads | exit code 1 | 1.0 |" in text
    assert "- deep-ep: no built checkout\n" in text
    # Every row of a table has as many cells as its titles.
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in lines}) == 1 for lines in tables)
    drawn = xml.etree.ElementTree.parse(tmp_path / "throughput.svg").getroot()
    words = [node.text for node in drawn.iter() if node.tag.endswith("}text")]
    assert {"dispatch FP8, 4096 tokens", "combine, 4096 tokens", "the link's limit of reads"} <= set(words)
    curves = [node.get("points", "").split() for node in drawn.iter() if node.tag.endswith("}polyline")]
    assert [len(points) for points in curves] == [3, 3, 3]


def test_aims_that_are_missed(tmp_path: Path) -> None:
    filled(tmp_path, gpus=8)
    for path in (tmp_path / "raw").glob("throughput-*-8.json"):
        path.unlink()
    for path in (tmp_path / "raw").glob("throughput-bf16-4096-12.json"):
        record = json.loads(path.read_text())
        record["result"] = bench_result(8, 250, 400)
        path.write_text(json.dumps(record))
    report.write(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "dispatch BF16, 95% of the limit of writes: from 12 SMs on, not from 8\n" in text
    assert "combine, 95% of the limit of reads: missed: at best 69.4%, with 12 SMs\n" in text


def test_one_gpu_has_no_link(tmp_path: Path) -> None:
    report.write(filled(tmp_path, gpus=1))
    text = (tmp_path / "tables.md").read_text()
    assert "## The link" not in text and "of the limit" not in text and "NCCL" not in text
    assert "GB/s received by a rank" in text
    assert "GB/s received by a rank" in (tmp_path / "throughput.svg").read_text()


@pytest.mark.parametrize("highest, step", [(400, 100), (399, 50), (90, 20), (4.2, 1), (1, 0.2)])
def test_steps_of_an_axis(highest: float, step: float) -> None:
    assert plot.nice_step(highest) == pytest.approx(step)


def test_deep_ep_figures() -> None:
    text = (
        "[tuning] SMs 24, NVL chunk 4: 12.34 GB/s (NVL), 900.10 us\n"
        "[tuning] Best dispatch (FP8): SMs 24, NVL chunk 20, 151.22 GB/s (NVL), t: 469.10 us\n"
        "[tuning] Best dispatch (BF16): SMs 24, NVL chunk 26, 153.00 GB/s (NVL), t: 891.20 us\n"
        "[tuning] Best combine: SMs 24, NVL chunk 8: 140.00 GB/s (NVL), t: 845.10 us\n"
    )
    expected = {"workers": 24, "dispatch_bf16": 891.2, "dispatch_fp8": 469.1, "combine": 845.1}
    assert steps.deep_ep_intranode(text) == expected
    line = "[rank {}] Dispatch bandwidth: 99.10 GB/s, avg_t={} us | Combine bandwidth: 98.00 GB/s, avg_t={} us\n"
    text = line.format(0, "76.10", "140.00") + line.format(1, "77.00", "139.00")
    assert steps.deep_ep_low_latency(text) == {"dispatch": 77, "combine": 140}
    with pytest.raises((ValueError, IndexError)):
        steps.deep_ep_low_latency("nothing")


def test_kind_of_link() -> None:
    assert machine.link_kind(TOPOLOGY) == "NV18"
    assert machine.link_kind("\tGPU0\tCPU Affinity\nGPU0\t X \t0-31\n") == ""


# The command itself, with programs in place of the driver's and ours.

SMI = f"""#!/bin/sh
case "$*" in
-L) echo "GPU 0: H200"; echo "GPU 1: H200" ;;
"topo -m") printf '{TOPOLOGY}' ;;
*) echo H200 ;;
esac
"""
SWIFTEP = """#!/bin/sh
case "$*" in
"verify "*"--ranks 4 "*processes*) [ -e "$(dirname "$0")/mps-runs" ] || echo "no MPS" >&2; echo "no job passed" >&2; exit 3 ;;
"verify "*processes*) [ -e "$(dirname "$0")/mps-runs" ] && echo "MPS" >&2; echo "no job passed" >&2; exit 3 ;;
"verify "*) echo "12 jobs passed" ;;
*"--tokens 2 "*) sleep 60 ;;
*) echo '{"ranks": 2, "gpus": 2, "linkWriteGigabytesPerSecond": 400, "linkReadGigabytesPerSecond": 380, "operations": ['
   for name in dispatch combine "combine of an ordinary tensor"; do
     [ "$name" = dispatch ] || echo ,
     echo '{"name": "'"$name"'", "medianMicroseconds": 300, "gigabytesPerSecond": 500, "linkBytesPerGPU": 100000000}'
   done
   echo ']}' ;;
esac
"""


# Runs between -d and quit, as a file says beside it.
MPS = """#!/bin/sh
runs="$(dirname "$0")/mps-runs"
[ "$1" = -d ] && { touch "$runs"; exit; }
read -r command
[ -e "$runs" ] || exit 1
[ "$command" != quit ] || rm "$runs"
"""


def run(folder: Path, *words: str, with_gpus: bool = True, with_mps: bool = True) -> subprocess.CompletedProcess[str]:
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    mps = {"nvidia-cuda-mps-control": MPS} if with_mps else {}
    for name, text in {"nvidia-smi": SMI, "swiftep": SWIFTEP, **mps}.items() if with_gpus else ():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:/usr/bin:/bin" if with_gpus else str(programs)
    environment = {"PATH": path, "HOME": os.environ.get("HOME", "/")}
    return subprocess.run(
        [sys.executable, str(FOLDER), *words, "--output", str(folder / "out")], env=environment, capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip


def words_of_tool(folder: Path) -> list[str]:
    return ["--swiftep", str(folder / "programs/swiftep"), "--tokens", "64", "--workers", "2,4", "--latency-tokens", "1"]


def test_no_gpu(tmp_path: Path) -> None:
    done = run(tmp_path, with_gpus=False)
    assert done.returncode == 1 and done.stderr.startswith("bench-gpus: no NVIDIA GPU: nvidia-smi")
    assert not (tmp_path / "out").exists()


def test_fewer_gpus_and_no_tool(tmp_path: Path) -> None:
    done = run(tmp_path, "--gpus", "3")
    assert done.returncode == 1 and "--gpus: expected 1 to 2, as many as there are, found 3" in done.stderr
    done = run(tmp_path, "--swiftep", "/nonexistent")
    assert done.returncode == 1 and "--swiftep: expected a program, found /nonexistent" in done.stderr


@pytest.mark.parametrize("words", [["--parts", "all"], ["--workers", "0"], ["--tokens", "x"], ["--dtypes", "fp4"]])
def test_bad_words(tmp_path: Path, words: list[str]) -> None:
    assert run(tmp_path, *words).returncode == 2


def test_a_failure_keeps_no_other_from_running(tmp_path: Path) -> None:
    done = run(tmp_path, *words_of_tool(tmp_path), "--parts", "verify,throughput,deep-ep", "--verify-seconds", "4")
    assert done.returncode == 1
    assert done.stderr == "bench-gpus: failed: verify-processes-2, verify-processes-4\n"
    assert "not run: deep-ep: no built checkout was named" in done.stdout
    assert "no job passed" in done.stdout
    # Two ranks a GPU have MPS, and they alone.
    assert "MPS" not in done.stdout and not (tmp_path / "programs/mps-runs").exists()
    text = (tmp_path / "out/tables.md").read_text()
    assert "| verify-processes-2 | exit code 3 |" in text and "| verify-threads-2 | done, 12 jobs |" in text
    assert "333.3 | 83.3%" in text and "- latency: not asked for\n" in text
    assert (tmp_path / "out/throughput.svg").exists()
    assert (tmp_path / "out/machine/topology.txt").read_text() == TOPOLOGY
    # A second run adds to the first.
    done = run(tmp_path, *words_of_tool(tmp_path), "--parts", "latency")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/tables.md").read_text()
    assert "| 1 | 8 | 300.0 |" in text and "333.3 | 83.3%" in text
    assert "- latency" not in text and "- deep-ep: no built checkout" in text and "- nccl: not asked for" in text


def test_a_step_that_hangs_is_ended(tmp_path: Path) -> None:
    words = words_of_tool(tmp_path)
    words[words.index("64")] = "2"
    done = run(tmp_path, *words, "--parts", "throughput", "--dtypes", "bf16", "--workers", "4", "--step-seconds", "1")
    assert done.returncode == 1 and "throughput-bf16-2-4" in done.stderr
    record = json.loads((tmp_path / "out/raw/throughput-bf16-2-4.json").read_text())
    assert record["failure"] == "not done after 1 s" and record["seconds"] < 30


def test_what_would_be_run(tmp_path: Path) -> None:
    done = run(tmp_path, "--list", "--gpus", "8", with_gpus=False)
    assert done.returncode == 0, done.stderr
    for words in (
        "bench --machine cuda --gpus 8 --ranks 8 --iterations 10 --dtype fp8 --tokens 8192 --workers 6 --replays 20 --json -",
        "verify --machine cuda --gpus 8 --ranks 16 --processes --seconds 150",
        "--dtype fp8 --layout grouped --tokens 128",
        "not run: conformance: neither packed tests",
    ):
        assert words in done.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(steps.mps_control() is not None, reason="there is an MPS to be found")
def test_no_mps(tmp_path: Path) -> None:
    done = run(tmp_path, *words_of_tool(tmp_path), "--parts", "verify", "--verify-seconds", "4", with_mps=False)
    assert "not run: verify: verify-processes-4: processes that share a GPU want MPS" in done.stdout
    assert done.stderr == "bench-gpus: failed: verify-processes-2\n"
