"""On GPUs, as many as SWIFTEP_TEST_GPUS says; without it, nothing here runs. `scripts/check-python-gpu` runs it so that it must."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Optional

import pytest
import ranks
import swiftep
from swiftep import Layout, Scales, Sizing

PROMISED = int(os.environ.get("SWIFTEP_TEST_GPUS", "0"))
if not PROMISED:
    pytest.skip("SWIFTEP_TEST_GPUS is not set", allow_module_level=True)

import swiftep.torch  # noqa: E402
import torch  # noqa: E402
from swiftep import deep_ep  # noqa: E402
from test_deep_ep import quantized, restored  # noqa: E402

if torch.cuda.device_count() < PROMISED:
    pytest.fail(f"SWIFTEP_TEST_GPUS: expected {PROMISED}, found {torch.cuda.device_count()}", pytrace=False)

EXAMPLES = Path(__file__).resolve().parents[2] / "Examples/python"
TOKENS, HIDDEN, TOP_K, EXPERTS = 64, 256, 2, 4


def plan(rank_count: int = 1, layout: Layout = Layout.BY_SOURCE, **changes: Any) -> swiftep.Plan:
    options = {"dtype": torch.float32, "combine_dtype": torch.float32, "result_count": 4, "layout": layout, **changes}
    return swiftep.Plan(rank_count, TOKENS, HIDDEN, TOP_K, EXPERTS, **options)


@pytest.fixture
def make_buffer() -> Any:
    made = []

    def make(plan: swiftep.Plan) -> swiftep.torch.Buffer:
        communicator = swiftep.Communicator.threads(1)[0]
        made.append(swiftep.torch.Buffer(communicator, plan, workers=8, timeout=ranks.TIMEOUT))
        return made[-1]

    yield make
    torch.cuda.synchronize()
    for buffer in made:
        buffer.close()


def tokens_of(rank: int) -> tuple[Any, Any, Any]:
    random = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=random)
    indices = torch.stack([torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(TOKENS)])
    return x.cuda(), indices.cuda(), torch.rand(TOKENS, TOP_K, generator=random).cuda()


@pytest.mark.parametrize("sizing", Sizing)
@pytest.mark.parametrize("layout", Layout)
@pytest.mark.parametrize("backend", (None, "aot_eager", "inductor"))
def test_gradients(make_buffer: Any, layout: Layout, sizing: Sizing, backend: Optional[str]) -> None:
    if backend == "inductor" and layout != Layout.BY_EXPERT:
        pytest.skip("one layout is enough to see that what Inductor makes of the operators holds: it takes seconds")
    buffer = make_buffer(plan(layout=layout, result_count=8))
    assert buffer.device.type == "cuda"
    x, indices, weights = tokens_of(0)
    x.requires_grad_()
    weights.requires_grad_()

    def layer(x: Any, weights: Any) -> Any:
        is_by_source = layout == Layout.BY_SOURCE
        received = buffer.dispatch(x, indices, weights, layout=layout, sizing=sizing)
        rows = received.rows * 3
        if is_by_source:
            rows = rows * received.top_k_weights.sum(1, keepdim=True)
        return buffer.combine(rows, received.handle, row_weights=None if is_by_source else weights, bias=x)

    call = torch.compile(layer, backend=backend, fullgraph=True) if backend else layer
    wanted = x * (1 + 3 * weights.sum(1, keepdim=True))
    gradient = torch.randn_like(x)
    # On a stream that is not the default one, too.
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            y = call(x, weights)
            found = torch.autograd.grad(y, (x, weights), gradient)
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(y, wanted)
        for ours, theirs in zip(found, torch.autograd.grad(wanted, (x, weights), gradient, retain_graph=True)):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_ranks_that_are_threads_of_one_gpu() -> None:
    """Forward: PyTorch runs the backward of one GPU on one thread, on which ranks would wait for each other."""
    barrier = threading.Barrier(2)

    def run(communicator: swiftep.Communicator) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            two = plan(2, Layout.BY_EXPERT)
            with swiftep.torch.Buffer(communicator, two, workers=8, timeout=ranks.TIMEOUT) as buffer:
                x, indices, weights = tokens_of(communicator.rank)
                for _ in range(10):
                    received = buffer.dispatch(x, indices, layout=Layout.BY_EXPERT)
                    y = buffer.combine(received.rows, received.handle, row_weights=weights)
                    torch.testing.assert_close(y, x * weights.sum(1, keepdim=True))
                    del received, y
                buffer.synchronize()
                barrier.wait(60)

    ranks.results(2, run)


def _survives(buffer: Any, records: bool) -> bool:
    """Whether a side stream reads what rows were, long after the last reference to them is gone."""
    x, indices, _ = tokens_of(0)
    side = torch.cuda.Stream()
    rows = buffer.dispatch(x, indices).rows
    wanted = rows.clone()
    read = torch.empty_like(rows)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)
        read.copy_(rows[:])
    if records:
        # Of a view, as callers have it.
        rows[1:].record_stream(side)
    # Not a cycle: what is left of it would take longer to collect than the other stream sleeps.
    del rows
    # So that the library knows, too, that the dispatch is over.
    time.sleep(0.02)
    for _ in range(8):
        buffer.dispatch(x + 1, indices)
    torch.cuda.synchronize()
    return torch.equal(read, wanted)


@pytest.mark.parametrize("records", (True, False))
def test_record_stream_holds(make_buffer: Any, records: bool) -> None:
    # Room for one result, and no more: the next one takes its place.
    buffer = make_buffer(plan(result_count=1, arena_byte_count_max=1))
    # The GPU has one queue for several streams, where what is behind the reader waits for it anyway: on several.
    found = [_survives(buffer, records) for _ in range(6)]
    # Without it, there is something to hold.
    assert all(found) == records, found


def test_record_stream_of_other_tensors_is_pytorchs() -> None:
    tensor = torch.ones(1 << 20, device="cuda")
    tensor.record_stream(torch.cuda.Stream())
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(4).record_stream(torch.cuda.Stream())


def test_arena_memory_is_combined_in_place(make_buffer: Any) -> None:
    buffer = make_buffer(plan(result_count=8))
    x, indices, _ = tokens_of(0)
    received = buffer.dispatch(x, indices)

    def lies_in_arena(tensor: Any) -> bool:
        distance = tensor.data_ptr() - received.rows.data_ptr()
        return 0 <= int(distance) < buffer.buffer.arena_byte_count

    with buffer.arena_memory():
        rows = received.rows * 2
        big = torch.ones(1 << 20, device="cuda")
    elsewhere = received.rows * 3
    assert lies_in_arena(rows) and lies_in_arena(big) and not lies_in_arena(elsewhere)
    for _ in range(3):
        torch.testing.assert_close(buffer.combine(rows, received.handle), 2 * x)
        torch.testing.assert_close(buffer.combine(elsewhere, received.handle), 3 * x)
    # Used again by PyTorch itself.
    before = buffer.buffer.arena_byte_count
    address = big.data_ptr()
    del big
    with buffer.arena_memory():
        again = torch.zeros(1 << 20, device="cuda")
    assert again.data_ptr() == address and buffer.buffer.arena_byte_count == before


def test_arena_memory_outlives_the_buffer(make_buffer: Any) -> None:
    buffer = make_buffer(plan())
    with buffer.arena_memory():
        ones = torch.ones(1 << 20, device="cuda")
    buffer.close()
    with pytest.raises(swiftep.BufferClosed):
        with buffer.arena_memory():
            pass
    del buffer
    gc.collect()
    # Somebody else takes what was given back.
    other = make_buffer(plan())
    x, indices, _ = tokens_of(0)
    with other.arena_memory():
        zeros = torch.zeros(1 << 20, device="cuda")
    received = other.dispatch(x, indices)
    torch.testing.assert_close(other.combine(received.rows, received.handle), x)
    assert int(ones.sum()) == 1 << 20 and not zeros.any()
    del ones, zeros
    torch.cuda.empty_cache()
    torch.testing.assert_close(other.combine(received.rows, received.handle), x)


def test_arena_memory_has_a_limit(make_buffer: Any) -> None:
    buffer = make_buffer(plan(arena_byte_count_max=64 << 20))
    with pytest.raises(torch.OutOfMemoryError):
        with buffer.arena_memory():
            torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    x, indices, _ = tokens_of(0)
    torch.testing.assert_close(buffer.combine(buffer.dispatch(x, indices).rows, buffer.dispatch(x, indices).handle), x)


def test_fp8_rows(make_buffer: Any) -> None:
    buffer = make_buffer(
        plan(dtype=torch.float8_e4m3fn, scales=Scales.FP32, combine_dtype=torch.bfloat16, layout=Layout.GROUPED)
    )
    x, indices, _ = tokens_of(0)
    received = buffer.dispatch(x.bfloat16(), indices, layout=Layout.GROUPED, quantization=Scales.FP32)
    assert received.rows.dtype == torch.float8_e4m3fn and received.scales.shape[-1] == HIDDEN // 128
    count = int(received.unaligned_tokens_per_expert[0])
    rows = received.rows[0, :count].float().view(count, -1, 128) * received.scales[0, :count, :, None]
    token = received.origins[0, :count, 1].long()
    torch.testing.assert_close(rows.view(count, -1), x.bfloat16().float()[token], rtol=0.08, atol=0.02)


def test_graphs_of_pytorchs(make_buffer: Any) -> None:
    """Two graphs share a buffer; routing changes; what they return is the graph's."""
    buffer = make_buffer(plan(layout=Layout.GROUPED))
    x, indices, weights = tokens_of(0)

    def layer(factor: int) -> Any:
        received = buffer.dispatch(x, indices, layout=Layout.GROUPED, sizing=Sizing.WORST_CASE)
        return buffer.combine(received.rows.mul_(factor), received.handle, row_weights=weights)

    with torch.no_grad():
        stream = torch.cuda.Stream()
        graphs = []
        for factor in (2, 3):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                y = layer(factor)
            graphs.append((factor, graph, y))
        gc.collect()
        for step in range(100):
            x.normal_()
            indices.copy_(torch.rand(TOKENS, EXPERTS, device="cuda").topk(TOP_K).indices)
            factor, graph, y = graphs[step % 2]
            graph.replay()
            torch.testing.assert_close(y, factor * x * weights.sum(1, keepdim=True))
        # Outside of them, too.
        torch.testing.assert_close(layer(4), 4 * x * weights.sum(1, keepdim=True))


def test_what_cannot_be_captured_is_refused(make_buffer: Any) -> None:
    buffer = make_buffer(plan())
    x, indices, _ = tokens_of(0)
    with pytest.raises(swiftep.InvalidArgument):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            buffer.dispatch(x, indices, sizing=Sizing.EXACT)
    torch.cuda.synchronize()
    received = buffer.dispatch(x, indices)
    torch.testing.assert_close(buffer.combine(received.rows, received.handle), x)


def test_tensors_of_elsewhere_are_refused(make_buffer: Any) -> None:
    buffer = make_buffer(plan())
    x, indices, _ = tokens_of(0)
    for given in ((x.cpu(), indices), (x, indices.cpu())):
        with pytest.raises(swiftep.InvalidArgument):
            buffer.dispatch(*given)
    if torch.cuda.device_count() > 1:
        with pytest.raises(swiftep.InvalidArgument):
            buffer.dispatch(x.to("cuda:1"), indices)
    buffer.close()
    with pytest.raises(swiftep.BufferClosed):
        buffer.dispatch(x, indices)


def test_the_plain_package() -> None:
    """Without `swiftep.torch`: streams as they are, DLPack, `__cuda_array_interface__`, events, recorded graphs."""
    communicator = swiftep.Communicator.threads(1)[0]
    with swiftep.Buffer(communicator, plan(), device="cuda", workers=8, timeout=ranks.TIMEOUT) as buffer:
        x, indices, _ = tokens_of(0)
        torch.cuda.synchronize()
        received = buffer.dispatch(x, indices)
        assert received.rows.device == "cuda:0"
        rows = torch.from_dlpack(received.rows)
        assert rows.data_ptr() == received.rows.address
        assert torch.equal(rows, torch.as_tensor(received.rows, device="cuda"))
        with pytest.raises(TypeError):
            received.rows.numpy()
        assert torch.equal(torch.from_dlpack(buffer.combine(rows, received.handle).tokens), x)

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            later = x * 2
            result = buffer.dispatch(later, indices, asynchronous=True, stream=stream)
            assert torch.equal(torch.from_dlpack(result.rows), 2 * rows)
        event = swiftep.Event.recorded(stream)
        event.wait()
        assert event.is_complete and result.event.is_complete

        def body() -> Any:
            made = buffer.dispatch(x, indices, sizing=Sizing.WORST_CASE, asynchronous=True)
            return buffer.combine(made.rows, made.handle, asynchronous=True)

        graph = buffer.record(body)
        for factor in range(1, 4):
            x.fill_(factor)
            graph.launch(stream=torch.cuda.current_stream()).wait()
            torch.cuda.synchronize()
            assert torch.equal(torch.from_dlpack(graph.result.tokens), x)


def test_calls_that_run_ahead_take_no_more_memory(make_buffer: Any) -> None:
    """The host is far ahead of the GPU: what it has let go of is used again behind what still uses it."""
    buffer = make_buffer(plan(result_count=2))
    x, indices, _ = tokens_of(0)

    def step() -> Any:
        received = buffer.dispatch(x, indices, sizing=Sizing.WORST_CASE)
        return buffer.combine(received.rows * 1, received.handle)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = buffer.buffer.arena_byte_count
    torch.cuda._sleep(1_000_000_000)
    for _ in range(200):
        last = step()
    assert not torch.cuda.current_stream().query(), "the host was not ahead"
    torch.testing.assert_close(last, x)
    # Each keeps 128 KiB.
    assert buffer.buffer.arena_byte_count - before <= 2 << 20


def test_nothing_leaks(make_buffer: Any) -> None:
    buffer = make_buffer(plan(layout=Layout.BY_EXPERT))
    x, indices, weights = tokens_of(0)
    x.requires_grad_()

    def step() -> None:
        received = buffer.dispatch(x, indices, layout=Layout.BY_EXPERT)
        buffer.combine(received.rows, received.handle, row_weights=weights).sum().backward()

    step()
    before, arena = torch.cuda.mem_get_info()[0], buffer.buffer.arena_byte_count
    for _ in range(300):
        step()
    torch.cuda.synchronize()
    assert buffer.buffer.arena_byte_count <= 2 * arena
    assert before - torch.cuda.mem_get_info()[0] < 64 << 20


def _ends(rank: int, port: str, results: Any) -> None:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo")
    buffer = swiftep.torch.Buffer(None, plan(2), workers=8, timeout=5)
    x, indices, _ = tokens_of(rank)
    buffer.combine(buffer.dispatch(x, indices).rows, buffer.dispatch(x, indices).handle)
    buffer.synchronize()
    dist.barrier()
    if rank == 1:
        os._exit(0)
    try:
        buffer.dispatch(x, indices, sizing=Sizing.WORST_CASE)
        buffer.synchronize()
        results.put("nobody was missed")
    except swiftep.RankMissing as error:
        results.put(error.rank)
    results.close()
    results.join_thread()
    os._exit(0)


def spawned(body: Callable[..., None], *arguments: Any) -> Any:
    """What the first of two processes says that says anything."""
    import multiprocessing
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    spawning = multiprocessing.get_context("spawn")
    results = spawning.Queue()
    processes = [spawning.Process(target=body, args=(rank, port, *arguments, results)) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        return results.get(timeout=120)
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def test_a_process_that_ends_is_missed() -> None:
    assert spawned(_ends) == 1


# DeepEP's interface: two ranks, which share a GPU where there is one.

WIDE = 1024


def wide_tokens_of(rank: int, seed: int = 0) -> tuple[Any, Any, Any]:
    random = torch.Generator().manual_seed(2 * seed + rank)
    x = torch.randn(TOKENS, WIDE, generator=random).bfloat16()
    indices = torch.stack([torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(TOKENS)])
    indices[:: 3 + seed % 3, 0] = -1
    return x.cuda(), indices.cuda(), torch.rand(TOKENS, TOP_K, generator=random).cuda()


def received_from(rank: int, buffer: deep_ep.Buffer, seed: int = 0) -> tuple[Any, Any]:
    """The rows that this rank receives from another, and their local experts."""
    x, indices, _ = wide_tokens_of(rank, seed)
    local_count = EXPERTS // buffer.group_size
    first = buffer.rank * local_count
    here = (indices >= first) & (indices < first + local_count)
    return x[here.any(1)], torch.where(here, indices - first, -1)[here.any(1)]


def check_streams(buffer: deep_ep.Buffer) -> None:
    """A caller's own stream, on which things take long; what calls take and return is let go of at once."""
    x, indices, weights = wide_tokens_of(buffer.rank)
    rows_of = [received_from(rank, buffer) for rank in range(2)]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    options = {"async_finish": True, "allocate_on_comm_stream": True}
    found = []
    with torch.cuda.stream(stream):
        for factor in range(1, 9):
            torch.cuda._sleep(10_000_000)
            given = x * factor
            before = buffer.capture()
            per_rank, _, per_expert, goes, event = buffer.get_dispatch_layout(
                indices, EXPERTS, previous_event=before, **options
            )
            sent = given if factor % 2 else quantized(given)
            rows, row_indices, row_weights, counts, handle, event = buffer.dispatch(
                sent, None, per_rank, None, goes, per_expert, indices, weights, previous_event=event, **options
            )
            del given, sent
            event.current_stream_wait()
            rows = rows if factor % 2 else restored(rows).bfloat16()
            kept = rows.clone()
            tokens, summed, event = buffer.combine(
                rows, handle, topk_weights=row_weights, previous_event=buffer.capture(), **options
            )
            del rows
            event.current_stream_wait()
            found.append((factor, kept, row_indices, counts, tokens, summed, goes))
            # Whoever has these takes the memory that was let go of.
            for _ in range(4):
                torch.full_like(x, float("nan"))
    torch.cuda.synchronize()
    for factor, rows, row_indices, counts, tokens, summed, goes in found:
        assert torch.equal(row_indices, torch.cat([experts for _, experts in rows_of]))
        assert counts == [int((row_indices == expert).sum()) for expert in range(EXPERTS // 2)]
        sources = (torch.cat([part for part, _ in rows_of]) * factor, x * factor)
        wanted, own = sources if factor % 2 else (restored(quantized(source)).bfloat16() for source in sources)
        assert torch.equal(rows, wanted)
        assert torch.equal(tokens, own * goes.sum(1, keepdim=True))
        torch.testing.assert_close(summed, torch.where(indices >= 0, weights, 0))


def check_worst_case_graph(buffer: deep_ep.Buffer) -> None:
    x, indices, weights = wide_tokens_of(buffer.rank)

    def step() -> tuple[Any, ...]:
        per_rank, _, per_expert, goes, _ = buffer.get_dispatch_layout(indices, EXPERTS)
        rows, row_indices, row_weights, counts, handle, _ = buffer.dispatch(
            x, None, per_rank, None, goes, per_expert, indices, weights, num_worst_tokens=2 * TOKENS
        )
        assert counts == []
        return (rows, row_indices, goes, *buffer.combine(rows, handle, topk_weights=row_weights)[:2])

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, row_indices, goes, tokens, summed = step()
    for seed in range(20):
        for tensor, changed in zip((x, indices, weights), wide_tokens_of(buffer.rank, seed)):
            tensor.copy_(changed)
        graph.replay()
        wanted, experts = (torch.cat(parts) for parts in zip(*(received_from(rank, buffer, seed) for rank in range(2))))
        assert torch.equal(rows[: len(wanted)], wanted) and torch.equal(row_indices[: len(wanted)], experts)
        assert bool((row_indices[len(wanted) :] == -1).all())
        assert torch.equal(tokens, x * goes.sum(1, keepdim=True))
        torch.testing.assert_close(summed, torch.where(indices >= 0, weights, 0))


def low_latency_rows(buffer: deep_ep.Buffer, received: Any, is_packed: bool) -> Any:
    """As BF16."""
    if not isinstance(received, tuple):
        return received
    values, scales = received
    assert scales.stride(1) == 1
    if is_packed:
        exponents = scales.contiguous().view(torch.uint8).view(*scales.shape[:2], -1).int()
        scales = (exponents << 23).view(torch.float32)
    return restored((values, scales)).bfloat16()


def check_groups(buffer: deep_ep.Buffer, rows: Any, counts: Any, seed: int, sources: list[int]) -> None:
    """Valid rows come first, by source, then token."""
    for expert, count in enumerate(counts.tolist()):
        parts = [received_from(source, buffer, seed) for source in sources]
        wanted = torch.cat([part[(experts == expert).any(1)] for part, experts in parts])
        assert count == len(wanted)
        torch.testing.assert_close(rows[expert, :count], wanted, rtol=0.13, atol=0.02)


def summed_of(buffer: deep_ep.Buffer, x: Any, indices: Any, weights: Any, ranks: list[int]) -> Any:
    """What comes back of tokens from the experts of these ranks, which change nothing."""
    there = (indices >= 0) & torch.isin(indices // (EXPERTS // buffer.group_size), torch.tensor(ranks, device="cuda"))
    return x.float() * torch.where(there, weights, 0).sum(1, keepdim=True)


def check_low_latency(buffer: deep_ep.Buffer) -> None:
    """With hooks and without, on the default stream and on another; the next dispatch is sent while a combine is under way."""
    x, indices, weights = wide_tokens_of(buffer.rank)
    wanted = summed_of(buffer, x, indices, weights, [0, 1])
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        for hooks in (False, True):
            for kind in ({"use_fp8": False}, {}, {"round_scale": True, "use_ue8m0": True}):
                with torch.cuda.stream(stream):
                    options = {"async_finish": not hooks, "return_recv_hook": hooks}
                    received, counts, handle, event, hook = buffer.low_latency_dispatch(
                        x, indices, TOKENS, EXPERTS, **options, **kind
                    )
                    hook() if hook is not None else event.current_stream_wait()
                    rows = low_latency_rows(buffer, received, "use_ue8m0" in kind)
                    check_groups(buffer, rows, counts, 0, [0, 1])
                    buffer.get_next_low_latency_combine_buffer(handle).copy_(rows)
                    for zero_copy in (False, True):
                        given = torch.full_like(rows, float("nan")) if zero_copy else rows
                        tokens, event, hook = buffer.low_latency_combine(
                            given, indices, weights, handle, zero_copy=zero_copy, **options
                        )
                        if hook is not None:
                            buffer.low_latency_dispatch(x + 1, indices, TOKENS, EXPERTS, return_recv_hook=True)[4]()
                            hook()
                        else:
                            event.current_stream_wait()
                        torch.testing.assert_close(tokens.float(), wanted, rtol=0.1, atol=0.1)
                stream.synchronize()


def check_logfmt(buffer: deep_ep.Buffer) -> None:
    """Each term is changed by at most 1.1%, those of blocks that cannot be coded not at all."""
    x, indices, weights = wide_tokens_of(buffer.rank)
    # The last block's magnitudes are too far apart.
    x[:, -128] = 2.0**20
    there = torch.where(indices >= 0, weights, 0)
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        for hooks in (False, True):
            with torch.cuda.stream(stream):
                options = {"async_finish": not hooks, "return_recv_hook": hooks}
                rows, _, handle, _, _ = buffer.low_latency_dispatch(x, indices, TOKENS, EXPERTS, use_fp8=False)
                # Powers of two, so that a row is known where its token is.
                first = buffer.rank * (EXPERTS // buffer.group_size)
                for expert in range(len(rows)):
                    rows[expert] *= 2.0 ** (first + expert)
                found = []
                for is_coded in (False, True):
                    tokens, event, hook = buffer.low_latency_combine(
                        rows, indices, weights, handle, use_logfmt=is_coded, **options
                    )
                    hook() if hook is not None else event.current_stream_wait()
                    found.append(tokens)
                exact, coded = (tokens.float() for tokens in found)
                # No term is negative after another has been positive: their magnitudes sum to the sum's. BF16 rounds both.
                sums = x.float().abs() * (there * 2.0 ** indices.clamp(min=0)).sum(1, keepdim=True)
                torch.testing.assert_close(exact.abs(), sums, rtol=2**-8, atol=0)
                difference = (coded - exact).abs()
                assert bool((difference <= (0.011 * (1 + 2**-8) + 2**-7) * sums).all())
                assert 0.001 < difference[:, :-128].norm() / exact[:, :-128].norm() < 0.005
                assert torch.equal(coded[:, -128:], exact[:, -128:])
            stream.synchronize()


def check_shrink(buffer: deep_ep.Buffer) -> None:
    """Calls as without masks, and in a graph; both go on when the other rank has gone."""
    check_low_latency(buffer)
    x, indices, weights = wide_tokens_of(buffer.rank)

    def step() -> tuple[Any, ...]:
        rows, counts, handle, _, _ = buffer.low_latency_dispatch(x, indices, TOKENS, EXPERTS, use_fp8=False)
        return (rows, counts, buffer.low_latency_combine(rows, indices, weights, handle)[0])

    def check(seed: int, ranks: list[int]) -> None:
        check_groups(buffer, rows, counts, seed, ranks)
        wanted = summed_of(buffer, x, indices, weights, ranks)
        torch.testing.assert_close(tokens.float(), wanted, rtol=0.02, atol=0.02)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, counts, tokens = step()
    for seed in range(20):
        for tensor, changed in zip((x, indices, weights), wide_tokens_of(buffer.rank, seed)):
            tensor.copy_(changed)
        graph.replay()
        check(seed, [0, 1])
    status = torch.ones(2, dtype=torch.int32, device="cuda")
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0, 0]
    if buffer.rank == 1:
        return
    for _ in range(2):
        graph.replay()
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0, 1]
        check(19, [0])
    rows, counts, tokens = step()
    check(19, [0])
    buffer.clean_low_latency_buffer(TOKENS, WIDE, EXPERTS)


def _deep_ep_rank(rank: int, port: str, check: Callable[[deep_ep.Buffer], None], results: Any) -> None:
    import torch.distributed as dist

    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group("gloo", rank=rank, world_size=2)
        buffer = deep_ep.Buffer(
            dist.group.WORLD,
            low_latency_mode=True,
            explicitly_destroy=True,
            enable_shrink=check is check_shrink,
            timeout=ranks.TIMEOUT,
        )
        check(buffer)
        buffer.destroy()
        dist.barrier()
        results.put("")
    except BaseException:
        results.put(f"rank {rank}: {traceback.format_exc()}")


@pytest.mark.parametrize("check", (check_streams, check_worst_case_graph, check_low_latency, check_logfmt, check_shrink))
def test_deep_ep(check: Callable[[deep_ep.Buffer], None]) -> None:
    found = spawned(_deep_ep_rank, check)
    assert not found, found


@pytest.mark.parametrize(
    "arguments",
    (
        ["moe_torch.py", "2"],
        ["decode_graph.py", "50"],
        ["micro_batches.py", "--iterations", "5"],
        ["micro_batches.py", "--ranks", "2", "--tokens", "512", "--hidden", "1024", "--iterations", "3"],
    ),
)
def test_examples(arguments: list[str]) -> None:
    script, *rest = arguments
    found = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *rest], capture_output=True, text=True, timeout=180
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "differ by" in found.stdout
