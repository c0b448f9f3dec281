"""One MoE layer, forward, with its experts spread over processes: the same sums as on one rank that has them all.

    python Examples/python/moe_numpy.py [ranks]

Needs swiftep and NumPy. This process starts the ranks, and passes on the bytes that they gather to find each other.
"""

from __future__ import annotations

import multiprocessing
import sys

import numpy as np
import swiftep

TOKENS, HIDDEN, EXPERTS, TOP_K = 64, 128, 8, 2


def make_layer():
    """The router's weights `[hidden, experts]`, the experts' `[experts, hidden, hidden]`, and all tokens."""
    random = np.random.default_rng(0)
    router = random.normal(size=(HIDDEN, EXPERTS)).astype(np.float32)
    experts = random.normal(size=(EXPERTS, HIDDEN, HIDDEN)).astype(np.float32) / np.float32(np.sqrt(HIDDEN))
    return router, experts, random.normal(size=(TOKENS, HIDDEN)).astype(np.float32)


def route(x, router):
    """The experts of each token, best first, and their weights, which sum to 1."""
    logits = x @ router
    # Calls take dense arrays.
    chosen = np.ascontiguousarray(np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K])
    weights = np.exp(np.take_along_axis(logits, chosen, 1))
    return chosen, (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def expert(rows, matrix):
    return np.maximum(rows @ matrix, 0)


def on_one_rank():
    router, experts, x = make_layer()
    chosen, weights = route(x, router)
    y = np.zeros_like(x)
    for token in range(TOKENS):
        for slot in range(TOP_K):
            y[token] += weights[token, slot] * expert(x[token], experts[chosen[token, slot]])
    return y


def on_rank(rank, rank_count, all_gather):
    router, experts, x = make_layer()
    x = np.array_split(x, rank_count)[rank]
    # As a plan spreads them that does not say how.
    mine = np.array_split(experts, rank_count)[rank]
    chosen, weights = route(x, router)

    communicator = swiftep.Communicator.processes(rank, rank_count, all_gather)
    plan = swiftep.Plan(
        rank_count,
        tokens_per_rank_max=-(-TOKENS // rank_count),
        hidden=HIDDEN,
        top_k=TOP_K,
        expert_count=EXPERTS,
        dtype=np.float32,
        layout=swiftep.Layout.BY_EXPERT,
        combine_dtype=np.float32,
    )
    with swiftep.Buffer(communicator, plan) as buffer:
        received = buffer.dispatch(x, chosen, layout=swiftep.Layout.BY_EXPERT)
        # The rows of each expert lie together, where the other ranks wrote them; what the experts make of them takes their
        # place, and is summed from there.
        rows = received.rows.numpy()
        end = np.cumsum(received.tokens_per_expert.numpy())
        for matrix, group in zip(mine, np.split(rows, end[:-1])):
            group[:] = expert(group, matrix)
        y = buffer.combine(received.rows, received.handle, row_weights=weights).tokens.numpy()
        print(f"rank {rank}: {len(x)} tokens, {len(rows)} rows for {len(mine)} experts", flush=True)
        # A rank that closes its buffer is missing to those that still call: all have their sums when all have met.
        all_gather(b"")
    return y


def run(rank, rank_count, pipe):
    def all_gather(mine):
        pipe.send_bytes(mine)
        return [pipe.recv_bytes() for _ in range(rank_count)]

    pipe.send(on_rank(rank, rank_count, all_gather))


def main():
    rank_count = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    spawning = multiprocessing.get_context("spawn")
    pipes = [spawning.Pipe() for _ in range(rank_count)]
    processes = [
        spawning.Process(target=run, args=(rank, rank_count, theirs)) for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    # To find each other, and to part.
    for _ in range(2):
        pieces = [ours.recv_bytes() for ours, _ in pipes]
        for ours, _ in pipes:
            for piece in pieces:
                ours.send_bytes(piece)
    y = np.concatenate([ours.recv() for ours, _ in pipes])
    for process in processes:
        process.join()

    difference = np.abs(y - on_one_rank()).max()
    print(f"{rank_count} ranks and one rank differ by {difference:.1e}")
    return 0 if difference < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
