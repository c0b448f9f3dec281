"""On GPUs, as many as SWIFTEP_TEST_GPUS says; without it, nothing here runs. `scripts/check-python-gpu` runs it so that it must."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Optional

import pytest
import ranks
import swiftep
from swiftep import Layout, Scales, Sizing

PROMISED = int(os.environ.get("SWIFTEP_TEST_GPUS", "0"))
if not PROMISED:
    pytest.skip("SWIFTEP_TEST_GPUS is not set", allow_module_level=True)

import swiftep.torch  # noqa: E402
import torch  # noqa: E402

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


def test_a_process_that_ends_is_missed() -> None:
    import multiprocessing
    import socket

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = str(listening.getsockname()[1])
    spawning = multiprocessing.get_context("spawn")
    results = spawning.Queue()
    processes = [spawning.Process(target=_ends, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    assert results.get(timeout=120) == 1
    for process in processes:
        process.join(30)


@pytest.mark.parametrize("arguments", (["moe_torch.py", "2"], ["decode_graph.py", "50"]))
def test_examples(arguments: list[str]) -> None:
    script, *rest = arguments
    found = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *rest], capture_output=True, text=True, timeout=180
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "differ by" in found.stdout
