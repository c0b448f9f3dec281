"""Two micro-batches take turns: while the experts compute on one, the rows of the other travel. Prints what that gains over
running them one after the other, where there is as much to compute as to move.

    python Examples/python/micro_batches.py [--ranks N] [--tokens N] [--hidden N] [--experts N] [--topk N] [--iterations N]
    torchrun --nproc-per-node 2 Examples/python/micro_batches.py

Needs swiftep and PyTorch. Rows move on the buffer's own stream, or thread, and experts compute on the caller's. On a GPU,
communication takes a few multiprocessors (`--workers`), in turn and overlapped, and the experts what is left; processes share a
GPU where there are fewer, best under MPS. On a CPU, each rank wants two cores.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from typing import Callable, Union

import swiftep
import swiftep.torch
import torch
import torch.distributed as dist
import torch.multiprocessing

#: That the experts compute a batch in.
PART_COUNT = 4

Result = Union[swiftep.DispatchResult, swiftep.CombineResult]


class Layer:
    """One rank, with a batch of tokens for each turn. One feed-forward network stands for all its experts."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        self.rank, rank_count = dist.get_rank(), dist.get_world_size()
        self.device, self.is_on_gpu = device, device.type == "cuda"
        self.hidden = arguments.hidden
        self.dtype = torch.bfloat16 if self.is_on_gpu else torch.float32
        plan = swiftep.Plan(
            rank_count,
            arguments.tokens,
            arguments.hidden,
            arguments.topk,
            arguments.experts,
            dtype=self.dtype,
            combine_dtype=self.dtype,
            # Two batches, and those that the host is ahead by.
            result_count=6,
            workers=arguments.workers,
        )
        self.buffer = swiftep.Buffer(
            swiftep.torch.communicator(), plan, workers=arguments.workers, device=str(device)
        )
        torch.manual_seed(self.rank)
        self.batches = []
        for _ in range(2):
            x = torch.randn(arguments.tokens, self.hidden, device=device).to(self.dtype)
            chosen = torch.rand(arguments.tokens, arguments.experts, device=device).topk(arguments.topk)
            self.batches.append((x, chosen.indices))
        if self.is_on_gpu:
            # Calls come behind what PyTorch does where they are told so; batches stay what they are.
            torch.cuda.synchronize(device)

    def set_width(self, width: int) -> None:
        """How much the experts compute: each row becomes so many values, and a row again."""
        self.width = width
        shape = (self.hidden, width)
        torch.manual_seed(self.rank)
        self.up = (torch.randn(shape, device=self.device) / self.hidden**0.5).to(self.dtype)
        self.down = (torch.randn(shape[::-1], device=self.device) / width**0.5).to(self.dtype)

    # What a turn consists of. On a GPU, none of it waits: what comes later on the current stream does.

    def send(self, batch: int) -> swiftep.DispatchResult:
        x, indices = self.batches[batch]
        return self.buffer.dispatch(x, indices, sizing=swiftep.Sizing.WORST_CASE, asynchronous=True)

    def received(self, result: Result) -> torch.Tensor:
        """The rows, or the sums, once they are there."""
        if not self.is_on_gpu:
            result.event.wait()
        return torch.from_dlpack(result.rows if isinstance(result, swiftep.DispatchResult) else result.tokens)

    def compute(self, rows: torch.Tensor, out: torch.Tensor) -> None:
        # Part by part, as expert by expert: on a GPU, another stream's kernel begins when all blocks of one have begun.
        for part, out_part in zip(rows.chunk(PART_COUNT), out.chunk(PART_COUNT)):
            torch.mm(torch.nn.functional.silu(torch.mm(part, self.up)), self.down, out=out_part)

    def combine(self, result: swiftep.DispatchResult) -> swiftep.CombineResult:
        computed = []
        if self.is_on_gpu:
            computed = [swiftep.Event.recorded(torch.cuda.current_stream(self.device), self.device.index)]
        return self.buffer.combine(result.rows, result.handle, after=computed, asynchronous=True)

    # Both batches, so many times over. Returns the last sums of each.

    def run_in_turn(self, count: int, computes: bool = True) -> list[torch.Tensor]:
        def turns() -> Iterator[swiftep.CombineResult]:
            for turn in range(2 * count):
                result = self.send(turn % 2)
                rows = self.received(result)
                if computes:
                    # In place, where combine reads them without a copy.
                    self.compute(rows, rows)
                sums = self.combine(result)
                # So that nothing comes before it, on a CPU either.
                self.received(sums)
                yield sums

        return self.last_sums(turns())

    def run_overlapped(self, count: int) -> list[torch.Tensor]:
        def turns() -> Iterator[swiftep.CombineResult]:
            result = self.send(0)
            for turn in range(2 * count):
                rows = self.received(result)
                # The other batch's rows leave, behind its sums of the turn before, while the experts have this one.
                following = self.send((turn + 1) % 2) if turn + 1 < 2 * count else None
                self.compute(rows, rows)
                yield self.combine(result)
                if following is not None:
                    result = following

        return self.last_sums(turns())

    def last_sums(self, turns: Iterable[swiftep.CombineResult]) -> list[torch.Tensor]:
        last: list[swiftep.CombineResult] = []
        for sums in turns:
            last.append(sums)
            if len(last) > 2:
                # Not far ahead of the GPU: what turns have used is used again when they are done.
                last.pop(0).event.wait()
        return [self.received(sums) for sums in last]

    def milliseconds(self, count: int, body: Callable[[], object]) -> float:
        """Of one of the `count` times that `body` does something, on the average of ranks."""
        dist.barrier()
        if self.is_on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize(self.device)
            begin.record()
            body()
            end.record()
            end.synchronize()
            taken = begin.elapsed_time(end)
        else:
            began = time.perf_counter()
            body()
            taken = 1e3 * (time.perf_counter() - began)
        total = torch.tensor(taken)
        dist.all_reduce(total)
        return float(total) / dist.get_world_size() / count

    def find_width(self, count: int, wanted: float) -> float:
        """Lets the experts take about so many milliseconds for a batch, on all ranks alike. Returns what they take alone."""
        rows = self.received(self.send(0))
        out = torch.empty_like(rows)

        def compute() -> None:
            for _ in range(count):
                self.compute(rows, out)

        step = 64 if self.is_on_gpu else 4
        self.set_width(step)
        for turn in range(4):
            compute()
            taken = self.milliseconds(count, compute)
            if turn < 3:
                self.set_width(max(1, round(self.width * wanted / taken / step)) * step)
        return taken


def run(arguments: argparse.Namespace) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    # What is right for one is large for the other.
    defaults = {"tokens": 1024, "hidden": 1024, "workers": 1}
    if device.type == "cuda":
        sharing = -(-dist.get_world_size() // torch.cuda.device_count())
        defaults = {"tokens": 8192, "hidden": 7168, "workers": max(4, min(24, 48 // sharing))}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    count = arguments.iterations

    layer = Layer(arguments, device)
    with torch.inference_mode():
        layer.run_in_turn(3, computes=False)
        moving = layer.milliseconds(2 * count, lambda: layer.run_in_turn(count, computes=False))
        computing = layer.find_width(count, moving)
        wanted = [sums.clone() for sums in layer.run_in_turn(1)]
        found = layer.run_overlapped(3)
        is_same = all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted))
        difference = max((ours.float() - theirs.float()).abs().max().item() for ours, theirs in zip(found, wanted))
        del found
        # The better of a few each, as something else may have run beside one.
        in_turn = overlapped = float("inf")
        for _ in range(3):
            in_turn = min(in_turn, layer.milliseconds(count, lambda: layer.run_in_turn(count)))
            overlapped = min(overlapped, layer.milliseconds(count, lambda: layer.run_overlapped(count)))
    if rank == 0:
        print(
            f"{dist.get_world_size()} ranks, {arguments.tokens} tokens a batch, which take {moving:.3f} ms to move and "
            f"{computing:.3f} ms to compute: both in turn {in_turn:.3f} ms, overlapped {overlapped:.3f} ms, "
            f"a gain of {100 * (in_turn / overlapped - 1):.0f}%; sums differ by {difference:.1e}",
            flush=True,
        )
    if not is_same:
        raise SystemExit(f"rank {rank}: other sums")
    # A rank that closes its buffer is missing to those that still call.
    dist.barrier()
    layer.buffer.close()
    dist.destroy_process_group()


def _start(rank: int, rank_count: int, port: str, arguments: argparse.Namespace) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(rank_count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    run(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description="Two micro-batches take turns.")
    parser.add_argument("--ranks", type=int, default=1, help="processes, unless torchrun starts them")
    parser.add_argument("--tokens", type=int, help="of a batch on each rank")
    parser.add_argument("--hidden", type=int, help="channels of a token")
    parser.add_argument("--experts", type=int, default=64, help="of all ranks")
    parser.add_argument("--topk", type=int, default=8, help="experts of a token")
    parser.add_argument("--workers", type=int, help="that a call takes: on a GPU, multiprocessors")
    parser.add_argument("--iterations", type=int, default=20, help="times that both batches run in what is measured")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        return run(arguments)
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    torch.multiprocessing.spawn(_start, (arguments.ranks, port, arguments), nprocs=arguments.ranks)


if __name__ == "__main__":
    main()
