"""The steps of a run, from what the command line asks for."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Union

from steps import Skipped, Step, bench_json, deep_ep_intranode, deep_ep_low_latency, passed_jobs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
PARTS = ("conformance", "verify", "link", "throughput", "latency", "nccl", "deep-ep")


def steps(options: argparse.Namespace) -> list[Union[Step, Skipped]]:
    """All of the parts that are asked for, in their order."""
    makers = {
        "link": link, "throughput": throughput, "latency": latency, "nccl": nccl, "deep-ep": deep_ep,
        "conformance": conformance, "verify": verify,
    }  # fmt: skip
    return [step for part in PARTS if part in options.parts for step in makers[part](options)]


def link(options: argparse.Namespace) -> list[Union[Step, Skipped]]:
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return [Skipped("link", "copies by kernels: there is no nvcc")]
    program = str(options.output.resolve() / "link")
    build = Step(
        "link", "link-build",
        [nvcc, "-O3", "-std=c++17", f"-arch=sm_{options.architecture}", "-o", program, str(HERE / "link.cu")], 300,
    )  # fmt: skip
    workers = ",".join(map(str, options.workers))
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(options.gpus)))}
    run = Step(
        "link", "link", [program, "--workers", workers], 300, environment={} if options.all_gpus else visible, parse=bench_json
    )
    alone = [Skipped("link", "one GPU has no link; the copies are tried in its own memory, and in no table")]
    return [build, run] + (alone if options.gpus == 1 else [])


def bench(options: argparse.Namespace, part: str, name: str, **parameters: object) -> Step:
    """A run of `swiftep bench`, with flags of the parameters' names; True: without a value."""
    flags = {"gpus": options.gpus, "ranks": options.ranks, "iterations": options.iterations, **parameters}
    words = [word for flag, value in flags.items() for word in ([f"--{flag}"] if value is True else [f"--{flag}", str(value)])]
    return Step(
        part, name, [options.swiftep, "bench", "--machine", "cuda", *words, "--json", "-"], options.step_seconds,
        parameters=flags, parse=bench_json, shares_gpus="processes" in flags and int(str(flags["ranks"])) > options.gpus,
    )  # fmt: skip


def throughput(options: argparse.Namespace) -> list[Union[Step, Skipped]]:
    every = [
        bench(
            options, "throughput", f"throughput-{dtype}-{tokens}-{workers}", dtype=dtype, tokens=tokens, workers=workers,
            replays=options.replays)
        for tokens in options.tokens for dtype in options.dtypes for workers in options.workers
    ]  # fmt: skip
    tokens, workers = options.tokens[0], options.workers[-1]
    every.append(
        bench(
            options, "throughput", f"processes-{tokens}-{workers}", dtype="bf16", tokens=tokens, workers=workers,
            replays=options.replays, processes=True)
    )  # fmt: skip
    if options.gpus > 1:
        every += [
            bench(
                options, "throughput", f"two-ranks-{dtype}-{tokens}-{workers}", dtype=dtype, tokens=tokens, workers=workers,
                replays=options.replays, ranks=2 * options.gpus)
            for dtype in options.dtypes for workers in options.workers[-1:]
        ]  # fmt: skip
    else:
        every.append(Skipped("throughput", "shares of a link: one GPU has none"))
    return every


def latency(options: argparse.Namespace) -> list[Union[Step, Skipped]]:
    return [
        bench(
            options, "latency", f"latency-{tokens}-{workers}", dtype="fp8", layout="grouped", tokens=tokens, workers=workers,
            replays=100)
        for tokens in options.latency_tokens for workers in options.latency_workers
    ]  # fmt: skip


def nccl(options: argparse.Namespace) -> list[Union[Step, Skipped]]:
    tokens = ",".join(map(str, options.tokens + [128]))
    step = Step(
        "nccl", "nccl", [sys.executable, str(HERE / "all_to_all.py"), "--gpus", str(options.gpus), "--tokens", tokens],
        options.step_seconds, environment={"NCCL_NVLS_ENABLE": "0"}, parse=bench_json,
    )  # fmt: skip
    alone = [Skipped("nccl", "exchanges between GPUs: there is one, with one rank that sends to itself, in no table")]
    return [step] + (alone if options.gpus == 1 else [])


def deep_ep(options: argparse.Namespace) -> list[Union[Step, Skipped]]:
    if options.deep_ep is None:
        return [Skipped("deep-ep", "no built checkout was named (--deep-ep, or DEEP_EP in the environment)")]
    if options.gpus == 1:
        return [Skipped("deep-ep", "its tests want a GPU for each process")]
    folder = Path(options.deep_ep).resolve()
    environment = {
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "NCCL_NVLS_ENABLE": "0",
    }
    processes = ["--num-processes", str(options.gpus)]
    every: list[Union[Step, Skipped]] = [
        Step(
            "deep-ep", f"deep-ep-intranode-{tokens}",
            [sys.executable, "tests/test_intranode.py", *processes, "--num-tokens", str(tokens)], options.step_seconds,
            parameters={"tokens": tokens}, environment=environment, folder=str(folder), parse=deep_ep_intranode)
        for tokens in options.tokens
    ]  # fmt: skip
    words = ["--num-experts", "256"]
    every += [
        Step(
            "deep-ep", f"deep-ep-low-latency-{tokens}",
            [sys.executable, "tests/test_low_latency.py", *processes, *words, "--num-tokens", str(tokens)],
            options.step_seconds, parameters={"tokens": tokens}, environment=environment, folder=str(folder),
            parse=deep_ep_low_latency)
        for tokens in options.latency_tokens if tokens >= 8
    ]  # fmt: skip
    return every


def conformance(options: argparse.Namespace) -> list[Union[Step, Skipped]]:
    if options.packed_tests is not None:
        command, environment = [str(Path(options.packed_tests).resolve() / "run")], {"SWIFTEP_TEST_GPUS": str(options.gpus)}
    elif shutil.which("swift") is not None:
        command, environment = [str(ROOT / "scripts/test-gpu"), str(options.gpus)], {}
    else:
        return [Skipped("conformance", "neither packed tests (--packed-tests) nor a Swift toolchain")]
    return [
        Step(
            "conformance", f"conformance-{kind}", command, max(600, options.step_seconds),
            environment={**environment, "SWIFTEP_TEST_FABRIC": kind}, shares_gpus=kind == "processes")
        for kind in ("threads", "processes")
    ]  # fmt: skip


def verify(options: argparse.Namespace) -> list[Union[Step, Skipped]]:
    """Random jobs, as threads and as processes; of several GPUs with one rank each, and two."""
    counts = [options.gpus, 2 * options.gpus] if options.gpus > 1 else [None]
    seconds = max(1, options.verify_seconds // (2 * len(counts)))
    every: list[Union[Step, Skipped]] = []
    for kind in ("threads", "processes"):
        for count in counts:
            words = [] if count is None else ["--ranks", str(count)]
            if kind == "processes":
                words.append("--processes")
            every.append(
                Step(
                    "verify", f"verify-{kind}" + (f"-{count}" if count else ""),
                    [options.swiftep, "verify", "--machine", "cuda", "--gpus", str(options.gpus), *words,
                     "--seconds", str(seconds), "--seed", str(options.seed)],
                    seconds + options.step_seconds, parse=passed_jobs,
                    shares_gpus=kind == "processes" and count != options.gpus)
            )  # fmt: skip
    every.append(
        Step(
            "verify", "verify-graphs",
            [options.swiftep, "verify", "--machine", "cuda", "--gpus", str(options.gpus), "--replays", "1000"],
            options.step_seconds)
    )  # fmt: skip
    return every
