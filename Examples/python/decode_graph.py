"""Decoding with an MoE layer in a CUDA graph: captured once, replayed for every step, with routing that changes.

    python Examples/python/decode_graph.py [steps]

Needs swiftep, PyTorch and an NVIDIA GPU. One rank a process; `torchrun --nproc-per-node N` starts more.
"""

from __future__ import annotations

import os
import sys

import swiftep
import swiftep.torch
import torch
import torch.distributed as dist
from swiftep import Layout, Sizing

TOKENS, HIDDEN, EXPERTS, TOP_K = 16, 1024, 8, 2


def reference(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Each token times the matrices of its experts, without any of this."""
    rows = torch.einsum("th,tkho->tko", x.float(), matrices.float()[indices])
    return (rows.bfloat16().float() * weights[..., None]).sum(1)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use: this example captures a CUDA graph")
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    rank, rank_count = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100

    torch.manual_seed(0)
    matrices = (torch.randn(EXPERTS, HIDDEN, HIDDEN, device=device) / HIDDEN**0.5).bfloat16()
    mine = matrices.tensor_split(rank_count)[rank]
    plan = swiftep.Plan(rank_count, TOKENS, HIDDEN, TOP_K, EXPERTS, layout=Layout.GROUPED, result_count=4)
    buffer = swiftep.torch.Buffer(None, plan, device=device)

    x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, device=device)
    indices = torch.zeros(TOKENS, TOP_K, dtype=torch.int64, device=device)
    weights = torch.zeros(TOKENS, TOP_K, device=device)

    def layer() -> torch.Tensor:
        # `[local experts, rows of a group, hidden]`, of which the first rows are there: nothing waits for their number.
        received = buffer.dispatch(x, indices, layout=Layout.GROUPED, sizing=Sizing.WORST_CASE)
        rows = buffer.combine_input(received.handle, HIDDEN)
        torch.bmm(received.rows, mine, out=rows)
        return buffer.combine(rows, received.handle, row_weights=weights)

    def route() -> None:
        """What the layers before this one do: the graph reads what lies in these tensors."""
        x.normal_()
        weights.uniform_()
        indices.copy_(torch.rand(TOKENS, EXPERTS, device=device).topk(TOP_K).indices)

    torch.manual_seed(1 + rank)
    with torch.inference_mode():
        route()
        # Once outside of the graph, as PyTorch asks for.
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            layer()
        stream.synchronize()
        buffer.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = layer()
        dist.barrier()
        worst = 0.0
        for _ in range(steps):
            route()
            graph.replay()
            wanted = reference(x, indices, weights, matrices)
            worst = max(worst, ((y.float() - wanted).abs().max() / wanted.abs().max()).item())
    print(f"rank {rank}: {steps} steps differ by at most {worst:.1e} from the layer on one rank", flush=True)
    dist.barrier()
    buffer.close()
    dist.destroy_process_group()
    if not worst < 0.02:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
