"""A PyTorch MoE layer with its experts spread over processes, forward and backward: loss and gradients are those of one rank.

    torchrun --nproc-per-node 2 Examples/python/moe_torch.py
    python Examples/python/moe_torch.py [ranks]

Needs swiftep and PyTorch. On a CPU, or on the GPU that each process's PyTorch has as its current one; processes share it where
there are fewer.
"""

from __future__ import annotations

import os
import sys

import swiftep
import swiftep.torch
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

TOKENS, HIDDEN, FFN, EXPERTS, TOP_K = 96, 64, 128, 8, 2


class Experts(nn.Module):
    """Feed-forward networks, one for each expert, of an initial state that does not depend on ranks."""

    def __init__(self, experts: range) -> None:
        super().__init__()
        states = [torch.Generator().manual_seed(expert) for expert in experts]
        up = [torch.randn(HIDDEN, FFN, generator=state) / HIDDEN**0.5 for state in states]
        down = [torch.randn(FFN, HIDDEN, generator=state) / FFN**0.5 for state in states]
        self.up, self.down = nn.Parameter(torch.stack(up)), nn.Parameter(torch.stack(down))

    def forward(self, rows: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """`rows` are grouped by expert, `counts` of each."""
        groups = rows.split(counts)
        return torch.cat([nn.functional.silu(x @ up) @ down for x, up, down in zip(groups, self.up, self.down)])


def experts_of(rank: int, rank_count: int) -> range:
    """As many for each rank, for the first ones one more: as a plan has it that does not say."""
    count, more = divmod(EXPERTS, rank_count)
    first = rank * count + min(rank, more)
    return range(first, first + count + (rank < more))


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(HIDDEN, EXPERTS, generator=torch.Generator().manual_seed(99)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, indices = (x @ self.weight).softmax(-1).topk(TOP_K)
        return indices, weights / weights.sum(-1, keepdim=True)


class ExpertParallel(nn.Module):
    """The layer. A rank has some of the experts, and brings its own tokens."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        super().__init__()
        rank, rank_count = dist.get_rank(group), dist.get_world_size(group)
        self.router, self.experts = Router(), Experts(experts_of(rank, rank_count))
        plan = swiftep.Plan(
            rank_count,
            tokens_per_rank_max=-(-TOKENS // rank_count),
            hidden=HIDDEN,
            top_k=TOP_K,
            expert_count=EXPERTS,
            dtype=torch.float32,
            combine_dtype=torch.float32,
            layout=swiftep.Layout.BY_EXPERT,
            # What forward has received is kept for backward.
            result_count=4,
        )
        self.buffer = swiftep.torch.Buffer(swiftep.torch.communicator(group), plan, device=device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        indices, weights = self.router(x)
        received = self.buffer.dispatch(x, indices, layout=swiftep.Layout.BY_EXPERT)
        rows = self.experts(received.rows, received.tokens_per_expert.tolist())
        return self.buffer.combine(rows, received.handle, row_weights=weights)


class OneRank(nn.Module):
    """The same layer without any of this."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = Router(), Experts(range(EXPERTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        indices, weights = self.router(x)
        y = torch.zeros_like(x)
        for expert in range(EXPERTS):
            token, slot = (indices == expert).nonzero(as_tuple=True)
            rows = nn.functional.silu(x[token] @ self.experts.up[expert]) @ self.experts.down[expert]
            y = y.index_add(0, token, rows * weights[token, slot, None])
        return y


def run() -> None:
    dist.init_process_group("gloo")
    rank, rank_count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.set_num_threads(1)

    state = torch.Generator().manual_seed(7)
    x = torch.randn(TOKENS, HIDDEN, generator=state).to(device)
    target = torch.randn(TOKENS, HIDDEN, generator=state).to(device)

    reference = OneRank().to(device)
    x_whole = x.clone().requires_grad_()
    wanted = (reference(x_whole) - target).square().sum()
    wanted.backward()

    layer = ExpertParallel(None, device).to(device)
    begin, end = (TOKENS * place // rank_count for place in (rank, rank + 1))
    x_mine = x[begin:end].clone().requires_grad_()
    loss = (layer(x_mine) - target[begin:end]).square().sum()
    loss.backward()

    # Experts' gradients are complete on their rank; the router's, and the loss, are sums over ranks.
    total, router = loss.detach().cpu(), layer.router.weight.grad.cpu()
    dist.all_reduce(total)
    dist.all_reduce(router)
    mine = list(experts_of(rank, rank_count))
    pairs = {
        "loss": (total, wanted.cpu()),
        "tokens": (x_mine.grad, x_whole.grad[begin:end]),
        "router": (router, reference.router.weight.grad.cpu()),
        "experts, up": (layer.experts.up.grad, reference.experts.up.grad[mine]),
        "experts, down": (layer.experts.down.grad, reference.experts.down.grad[mine]),
    }
    for name, (ours, theirs) in pairs.items():
        difference = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if rank == 0:
            print(f"{name}: {rank_count} ranks and one rank differ by {difference:.1e}", flush=True)
        if difference > 1e-5:
            raise SystemExit(f"rank {rank}: {name} differ by {difference}")
    # A rank that closes its buffer is missing to those that still call.
    dist.barrier()
    layer.buffer.close()
    dist.destroy_process_group()


def _start(rank: int, rank_count: int, store: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(rank_count), MASTER_ADDR="127.0.0.1", MASTER_PORT=store)
    run()


def main() -> None:
    if "RANK" in os.environ:
        return run()
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    rank_count = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    torch.multiprocessing.spawn(_start, (rank_count, port), nprocs=rank_count)


if __name__ == "__main__":
    main()
