"""What a user of PyTorch has without a library for experts: NCCL's all-to-all, one process a GPU.

    python3 all_to_all.py [--gpus N] [--tokens 4096,8192] [--hidden 7168] [--experts 256] [--top-k 8] [--rounds 10]

Prints JSON. Each token goes once to every rank that has an expert of its top-k; routing is random. Times are microseconds by the
GPU's events, of ten calls in a row, the slowest rank's; medians of the rounds. With one GPU, its own rows alone are copied.

- "exchange": `all_to_all_single` of rows that lie in the order of their ranks, with splits that the host knows.
- "dispatch": the same, with the rows gathered into that order before (`index_select`).
- "dispatch_with_counts": the same, with an exchange of counts before it, for which the host waits.
- "combine": rows sent back, gathered by token and summed (`index_select`, `sum`).

FP8 rows are bytes that are quantized already, their scales behind them: 1 + 4 / 128 bytes a channel. Quantizing is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile

import torch
import torch.distributed
import torch.multiprocessing


class Exchange:
    """One rank's rows of a job, and where they go."""

    def __init__(self, rank: int, rank_count: int, options: argparse.Namespace, token_count: int, is_fp8: bool) -> None:
        random = torch.Generator(device="cuda").manual_seed(1000 + rank)
        scores = torch.rand(token_count, options.experts, device="cuda", generator=random)
        ranks = scores.topk(options.top_k, dim=1).indices * rank_count // options.experts
        goes = torch.zeros(token_count, rank_count, dtype=torch.bool, device="cuda").scatter_(1, ranks, True)
        # In the order of ranks, then tokens.
        destination, self.token = goes.T.nonzero(as_tuple=True)
        self.sent_counts = goes.sum(0)
        self.received_counts = torch.empty_like(self.sent_counts)
        torch.distributed.all_to_all_single(self.received_counts, self.sent_counts)
        self.sent = self.sent_counts.tolist()
        self.received = self.received_counts.tolist()
        if is_fp8:
            width = options.hidden + 4 * (options.hidden // 128)
            self.x = torch.randint(0, 120, (token_count, width), dtype=torch.uint8, device="cuda", generator=random)
        else:
            self.x = torch.randn(token_count, options.hidden, device="cuda", generator=random).to(torch.bfloat16)
        self.rows = torch.empty(sum(self.received), self.x.shape[1], dtype=self.x.dtype, device="cuda")
        self.ordered = self.x.index_select(0, self.token)
        # Where each token's row for each rank comes back; the last row is zero, for ranks that it does not go to.
        count = len(self.token)
        self.places = torch.full((token_count, rank_count), count, device="cuda")
        self.places[self.token, destination] = torch.arange(count, device="cuda")
        self.places = self.places.flatten()
        self.returned = torch.zeros(count + 1, self.x.shape[1], dtype=self.x.dtype, device="cuda")
        # Bytes that leave this GPU, or come to it, whichever is more.
        others = max(count - self.sent[rank], sum(self.received) - self.received[rank])
        self.link_byte_count = others * self.x.shape[1] * self.x.element_size()

    def exchange(self) -> None:
        torch.distributed.all_to_all_single(self.rows, self.ordered, self.received, self.sent)

    def dispatch(self) -> None:
        ordered = self.x.index_select(0, self.token)
        torch.distributed.all_to_all_single(self.rows, ordered, self.received, self.sent)

    def dispatch_with_counts(self) -> None:
        torch.distributed.all_to_all_single(self.received_counts, self.sent_counts)
        received, sent = self.received_counts.tolist(), self.sent_counts.tolist()
        rows = torch.empty(sum(received), self.x.shape[1], dtype=self.x.dtype, device="cuda")
        ordered = self.x.index_select(0, self.token)
        torch.distributed.all_to_all_single(rows, ordered, received, sent)

    def combine(self) -> torch.Tensor:
        torch.distributed.all_to_all_single(self.returned[:-1], self.rows, self.sent, self.received)
        gathered = self.returned.index_select(0, self.places)
        return gathered.view(self.x.shape[0], -1, self.x.shape[1]).sum(1)

    def check(self) -> None:
        """A combine of the rows that a dispatch brought returns each token as often as it was sent."""
        self.dispatch()
        copies = torch.bincount(self.token, minlength=self.x.shape[0]).unsqueeze(1)
        torch.testing.assert_close(self.combine().float(), self.x.float() * copies, rtol=0.02, atol=0.02)


def measure(call, round_count: int) -> float:
    call_count = 10
    times = []
    for round_index in range(-2, round_count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.distributed.barrier()
        start.record()
        for _ in range(call_count):
            call()
        end.record()
        end.synchronize()
        time = torch.tensor([1000 * start.elapsed_time(end) / call_count], device="cuda")
        torch.distributed.all_reduce(time, torch.distributed.ReduceOp.MAX)
        if round_index >= 0:
            times.append(time.item())
    return statistics.median(times)


def run(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=options.gpus, device_id=torch.device("cuda", rank)
    )
    figures = []
    for token_count in options.tokens:
        for dtype in ("bf16", "fp8"):
            exchange = Exchange(rank, options.gpus, options, token_count, dtype == "fp8")
            calls = {"exchange": exchange.exchange, "dispatch": exchange.dispatch}
            calls["dispatch_with_counts"] = exchange.dispatch_with_counts
            if dtype == "bf16":
                exchange.check()
                calls["combine"] = exchange.combine
            figure = {name: measure(call, options.rounds) for name, call in calls.items()}
            most = torch.tensor([exchange.link_byte_count], device="cuda")
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            figures.append({"tokens": token_count, "dtype": dtype, "link_bytes_per_gpu": most.item(), **figure})
    if rank == 0:
        version = ".".join(str(part) for part in torch.cuda.nccl.version())
        print(json.dumps({"gpus": options.gpus, "torch": torch.__version__, "nccl": version, "figures": figures}), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=None)
    parser.add_argument("--tokens", type=lambda text: [int(word) for word in text.split(",")], default=[4096, 8192])
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    found = torch.cuda.device_count()
    options.gpus = options.gpus or found
    if not 1 <= options.gpus <= found:
        parser.error(f"--gpus: expected 1 to {found}, as many as there are, found {options.gpus}")
    # Multicast over NVLink is not what is compared.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(run, (options, folder + "/store"), nprocs=options.gpus)


if __name__ == "__main__":
    main()
