"""Tables and plot of what the steps have found: of all records in a folder, whichever runs they are from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Callable, Iterable, Optional

from plot import COLORS, Curve, Limit, svg

# Aims: shares of the link's limits, and microseconds of 128 tokens on 8 GPUs.
LINK_SHARE, WORKERS_MAX = 0.95, 8
LATENCY_AIMS = {(8, 128): (25, 40)}


def table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(titles)] + [[str(cell) for cell in row] for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value: Optional[float], places: int = 1) -> str:
    return "" if value is None else f"{value:.{places}f}"


class Results:
    """The records of a folder that have figures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.machine = json.loads((folder / "machine.json").read_text())
        self.records = [json.loads(path.read_text()) for path in sorted((folder / "raw").glob("*.json"))]
        self.found = {record["name"]: record for record in self.records if record["result"] is not None}

    def of(self, part: str, prefix: str = "") -> list[dict]:
        return [record for name, record in self.found.items() if record["part"] == part and name.startswith(prefix)]

    @property
    def gpu_count(self) -> int:
        return self.machine["gpus"]

    @property
    def kernels(self) -> list[dict]:
        """Copies by kernels, of several GPUs."""
        record = self.found.get("link")
        return [] if record is None or record["result"]["own_memory"] else record["result"]["kernels"]

    def limit(self, direction: str) -> Optional[float]:
        """GB/s: the best of all copies that were measured; None of one GPU."""
        key = f"link{direction.title()}GigabytesPerSecond"
        rates = [record["result"][key] for record in self.of("throughput") if key in record["result"]]
        rates += [kernel[direction] for kernel in self.kernels]
        if self.kernels:
            rates.append(self.found["link"]["result"]["engine"][direction])
        return max(rates, default=None)

    def throughput(self, dtype: str, tokens: int) -> dict[int, dict]:
        """Runs by multiprocessors of a rank."""
        runs = {}
        for record in self.of("throughput", "throughput-"):
            parameters = record["parameters"]
            if (parameters["dtype"], parameters["tokens"]) == (dtype, tokens):
                runs[parameters["workers"]] = record["result"]
        return dict(sorted(runs.items()))

    def latency(self, tokens: int) -> dict[int, dict]:
        """Runs by multiprocessors of a rank."""
        runs = [record for record in self.of("latency") if record["parameters"]["tokens"] == tokens]
        return {record["parameters"]["workers"]: record["result"] for record in runs}

    @property
    def token_counts(self) -> list[int]:
        return sorted({record["parameters"]["tokens"] for record in self.of("throughput", "throughput-")})


def operation(result: dict, name: str) -> dict:
    return next(found for found in result["operations"] if found["name"] == name)


def rate(found: dict) -> float:
    """GB/s across the link of a GPU; of one GPU, those that a rank received."""
    moved = found.get("linkBytesPerGPU")
    return found["gigabytesPerSecond"] if moved is None else moved / (1000 * found["medianMicroseconds"])


# What the tables and the plot have: title, rows, operation, the link's direction.
OPERATIONS = (
    ("dispatch BF16", "bf16", "dispatch", "write"),
    ("dispatch FP8", "fp8", "dispatch", "write"),
    ("combine", "bf16", "combine", "read"),
    ("combine of an ordinary tensor", "bf16", "combine of an ordinary tensor", "read"),
)


def machine_text(results: Results) -> str:
    machine = results.machine
    link = f", joined by {machine['link']}" if machine["link"] else ""
    words = f"{machine['gpus']} x {machine['gpu']}{link}; driver {machine['driver']}; at most {machine['clocks']} (multiprocessors / memory)"
    return f"{words}; commit {machine['commit'] or 'unknown'}; {machine['date']}.\n"


def link_text(results: Results) -> str:
    if results.limit("write") is None:
        return ""
    rows = []
    bench = [record["result"] for record in results.of("throughput") if "linkWriteGigabytesPerSecond" in record["result"]]
    if bench:
        best = [max(run[f"link{direction}GigabytesPerSecond"] for run in bench) for direction in ("Write", "Read")]
        rows.append(["copy engines, by `swiftep bench`", "", *map(number, best)])
    if results.kernels:
        engine = results.found["link"]["result"]["engine"]
        rows.append(["copy engines", "", number(engine["write"]), number(engine["read"])])
        for kernel in results.kernels:
            rows.append(
                [f"kernel, {kernel['kind']} copies", kernel["workers"], number(kernel["write"]), number(kernel["read"])])  # fmt: skip
    write, read = results.limit("write"), results.limit("read")
    assert write is not None and read is not None
    slower = f"{100 * (1 - read / write):.1f}% slower" if read < write else f"{100 * (read / write - 1):.1f}% faster"
    return (
        "## The link\n\nGB/s of the slowest GPU, all GPUs at once, each with all its peers.\n\n"
        + table(["copies by", "SMs", "writes", "reads"], rows)
        + f"\nLimits: {write:.1f} for writes, {read:.1f} for reads, the best of these: reads are {slower} than writes.\n"
    )


def throughput_text(results: Results) -> str:
    text = ""
    for tokens in results.token_counts:
        runs = {dtype: results.throughput(dtype, tokens) for dtype in ("bf16", "fp8")}
        titles, rows = ["SMs"], []
        for title, *_ in OPERATIONS:
            titles += [f"{title} us", "GB/s"] + (["of the limit"] if results.limit("write") else [])
        for workers in sorted(set(runs["bf16"]) | set(runs["fp8"])):
            row: list[object] = [workers]
            for _, dtype, name, direction in OPERATIONS:
                limit = results.limit(direction)
                if workers not in runs[dtype]:
                    row += [""] * (3 if limit else 2)
                    continue
                found = operation(runs[dtype][workers], name)
                row += [number(found["medianMicroseconds"]), number(rate(found))]
                if limit:
                    row.append(f"{100 * rate(found) / limit:.1f}%")
            rows.append(row)
        kind = "across the link of a GPU" if results.limit("write") else "received by a rank, its own tokens' included"
        ranks = next(iter((runs["bf16"] or runs["fp8"]).values()))["ranks"]
        text += f"### {tokens} tokens, {ranks} ranks\n\nGB/s {kind}.\n\n" + table(titles, rows) + "\n" + aims(results, runs)
    others = [record for record in results.of("throughput") if not record["name"].startswith("throughput-")]
    if others:
        rows = [
            [f"`{flags(record['parameters'])}`"]
            + [number(found["medianMicroseconds"]) for found in record["result"]["operations"]]
            for record in others
        ]
        text += "### Processes, and two ranks a GPU\n\n"
        text += table(["`swiftep bench --machine cuda ...`", "dispatch us", "combine us", "of an ordinary tensor us"], rows)
    return "## Throughput\n\n" + text if text else ""


def aims(results: Results, runs: dict[str, dict[int, dict]]) -> str:
    """With how many multiprocessors an operation reaches what it should."""
    lines = []
    for title, dtype, name, direction in OPERATIONS[:3]:
        limit = results.limit(direction)
        if limit is None or not runs[dtype]:
            continue
        shares = {workers: rate(operation(run, name)) / limit for workers, run in runs[dtype].items()}
        enough = [workers for workers, share in shares.items() if share >= LINK_SHARE]
        best = max(shares, key=lambda workers: shares[workers])
        if enough:
            misses = direction == "write" and enough[0] > WORKERS_MAX
            verdict = f"from {enough[0]} SMs on" + (f", not from {WORKERS_MAX}" if misses else "")
        else:
            verdict = f"missed: at best {100 * shares[best]:.1f}%, with {best} SMs"
        lines.append(f"- {title}, {100 * LINK_SHARE:.0f}% of the limit of {direction}s: {verdict}\n")
    return "".join(lines) + ("\n" if lines else "")


def flags(parameters: dict) -> str:
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in parameters.items())


def latency_text(results: Results) -> str:
    records = sorted(
        results.of("latency"), key=lambda record: (record["parameters"]["tokens"], record["parameters"]["workers"]))  # fmt: skip
    if not records:
        return ""
    rows = []
    for record in records:
        tokens = record["parameters"]["tokens"]
        times = [operation(record["result"], name)["medianMicroseconds"] for _, _, name, _ in OPERATIONS[1:]]
        aim = LATENCY_AIMS.get((results.gpu_count, tokens))
        rows.append(
            [tokens, record["parameters"]["workers"], *map(number, times), f"{aim[0]} / {aim[1]}" if aim else ""])  # fmt: skip
    titles = ["tokens", "SMs", "dispatch us", "combine us", "of an ordinary tensor us", "aim us"]
    ranks = records[0]["parameters"]["ranks"]
    return f"## Few tokens\n\n`--dtype fp8 --layout grouped`, {ranks} ranks, replayed.\n\n" + table(titles, rows)


def best_time(runs: dict[int, dict], name: str) -> str:
    """Of the run in which the operation was fastest, and its multiprocessors."""
    times = {workers: operation(run, name)["medianMicroseconds"] for workers, run in runs.items()}
    if not times:
        return ""
    workers = min(times, key=lambda count: times[count])
    return f"{times[workers]:.1f} ({workers} SMs)"


def others_text(results: Results) -> str:
    rows: list[list[object]] = []
    record = results.found.get("nccl")
    figures = record["result"]["figures"] if record and results.gpu_count > 1 else []
    for tokens in sorted({*results.token_counts, *(figure["tokens"] for figure in figures)}):
        if tokens in results.token_counts:
            keys = (("bf16", "dispatch"), ("fp8", "dispatch"), ("bf16", "combine"))
            rows.append([tokens, "SwiftEP", *(best_time(results.throughput(dtype, tokens), name) for dtype, name in keys)])
        by_dtype = {figure["dtype"]: figure for figure in figures if figure["tokens"] == tokens}
        if by_dtype:
            bf16, fp8 = by_dtype["bf16"], by_dtype["fp8"]
            for title, key in (("exchange alone", "exchange"), ("rows gathered", "dispatch"), ("and counts", "dispatch_with_counts")):
                combine = number(bf16["combine"]) if key == "dispatch" else ""
                rows.append([tokens, f"NCCL, {title}", number(bf16[key]), number(fp8[key]), combine])
        theirs = results.found.get(f"deep-ep-intranode-{tokens}")
        if theirs:
            times = theirs["result"]
            rows.append(
                [tokens, f"DeepEP ({times['workers']} SMs)",
                 *(number(times[key]) for key in ("dispatch_bf16", "dispatch_fp8", "combine"))])  # fmt: skip
    for theirs in sorted(results.of("deep-ep", "deep-ep-low-latency-"), key=lambda record: record["parameters"]["tokens"]):
        times, tokens = theirs["result"], theirs["parameters"]["tokens"]
        ours = results.latency(tokens)
        rows.append([tokens, "SwiftEP, grouped", "", best_time(ours, "dispatch"), best_time(ours, "combine")])
        rows.append(
            [tokens, "DeepEP, low latency", "", number(times["dispatch"]), number(times["combine"])])  # fmt: skip
    if not figures and not results.of("deep-ep"):
        return ""
    return (
        "## Beside others\n\nNCCL through PyTorch: splits are known to the host unless counts are exchanged; a combine gathers and sums "
        "what came back. Its FP8 rows, and those of DeepEP's intranode mode, are quantized already; the other FP8 times include "
        "that. DeepEP's low-latency times are its kernels' alone, by a profiler; SwiftEP's are those of whole operations.\n\n"
        + table(["tokens", "", "dispatch BF16 us", "dispatch FP8 us", "combine us"], rows)
    )


def outcome_text(results: Results) -> str:
    skipped = [f"{part}: {why}" for part, reasons in results.machine["skipped"].items() for why in reasons]
    rows = []
    for record in results.records:
        jobs = f", {record['result']['jobs']} jobs" if record["part"] == "verify" and record["result"] else ""
        rows.append([record["name"], record["failure"] or f"done{jobs}", number(record["seconds"])])
    text = "## What was run\n\n" + table(["step", "outcome", "seconds"], rows)
    return text + ("\nNot run:\n\n" + "".join(f"- {why}\n" for why in skipped) if skipped else "")


def curves(results: Results) -> list[Curve]:
    found = []
    for index, tokens in enumerate(results.token_counts[:2]):
        for (title, dtype, name, _), color in zip(OPERATIONS[:3], COLORS):
            runs = results.throughput(dtype, tokens)
            points = [(workers, rate(operation(run, name))) for workers, run in runs.items()]
            if points:
                found.append(Curve(f"{title}, {tokens} tokens", points, color, "6 4" if index else None))
    return found


def plot(results: Results) -> Optional[str]:
    drawn = curves(results)
    if not drawn:
        return None
    limits = []
    for direction, color in (("write", COLORS[0]), ("read", COLORS[2])):
        limit = results.limit(direction)
        if limit:
            limits.append(Limit(f"the link's limit of {direction}s", limit, color))
    y_title = "GB/s across the link of a GPU" if limits else "GB/s received by a rank"
    machine = results.machine
    return svg(f"{machine['gpus']} x {machine['gpu']}, driver {machine['driver']}, {machine['date']}", y_title, drawn, limits)


def write(folder: Path) -> None:
    """Writes tables.md and, where there is something to draw, throughput.svg."""
    results = Results(folder)
    drawn = plot(results)
    if drawn is not None:
        (folder / "throughput.svg").write_text(drawn)
    makers: list[Callable[[Results], str]] = [
        machine_text, link_text, throughput_text, latency_text, others_text, outcome_text
    ]  # fmt: skip
    texts = [make(results) for make in makers]
    (folder / "tables.md").write_text("\n".join(text for text in texts if text))
