"""`swiftep.torch` on CPUs: ranks that are threads, and processes of a process group."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any, Callable

import pytest
import ranks
import swiftep
from swiftep import Layout, Scales, Sizing

torch = pytest.importorskip("torch")

import swiftep.torch  # noqa: E402

RANKS, TOKENS, HIDDEN, TOP_K, EXPERTS = 3, 7, 16, 2, 6


def plan(layout: Layout = Layout.BY_SOURCE, **changes: Any) -> swiftep.Plan:
    options = {"dtype": torch.float32, "combine_dtype": torch.float32, "result_count": 8, "layout": layout, **changes}
    return swiftep.Plan(RANKS, TOKENS, HIDDEN, TOP_K, EXPERTS, **options)


def on_ranks(plan: swiftep.Plan, body: Callable[[swiftep.torch.Buffer], Any], rank_count: int = RANKS) -> list[Any]:
    barrier = threading.Barrier(rank_count)

    def run(communicator: swiftep.Communicator) -> Any:
        with swiftep.torch.Buffer(communicator, plan, device="cpu", workers=1, timeout=ranks.TIMEOUT) as buffer:
            try:
                return body(buffer)
            finally:
                barrier.wait(3 * ranks.TIMEOUT)

    return ranks.results(rank_count, run)


def tokens_of(rank: int, dtype: Any = None) -> tuple[Any, Any, Any, Any]:
    """Of a rank: tokens, experts, weights, and a gradient; fewer tokens on the last rank."""
    random = torch.Generator().manual_seed(rank)
    count = TOKENS if rank < RANKS - 1 else 3
    x = torch.randn(count, HIDDEN, generator=random).to(dtype or torch.float32)
    indices = torch.stack([torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(count)])
    indices[0, 1] = -1
    weights = torch.rand(count, TOP_K, generator=random)
    return x.requires_grad_(), indices, weights.requires_grad_(), torch.randn(count, HIDDEN, generator=random)


def factors(experts: Any) -> Any:
    """What each expert multiplies by; expert -1 is none."""
    return torch.where(experts >= 0, 1 + experts.float(), 0.0)


def expected(x: Any, indices: Any, weights: Any) -> Any:
    return x * (factors(indices) * weights).sum(1, keepdim=True)


def experts_by_source(buffer: Any, received: Any) -> Any:
    """The sum of the local experts of each row."""
    first = buffer.buffer.rank * (EXPERTS // RANKS)
    local = received.top_k_indices
    mine = torch.where(local >= 0, factors(local + first), 0.0)
    return received.rows * (mine * received.top_k_weights).sum(1, keepdim=True)


def experts_by_expert(buffer: Any, received: Any) -> Any:
    """Each row times its expert, in all rows that a token fills; the others are NaN."""
    first = buffer.buffer.rank * (EXPERTS // RANKS)
    local = torch.arange(EXPERTS // RANKS)
    if received.rows.dim() == 3:
        scales = factors(local + first)[:, None].expand(received.rows.shape[:2])
        filled = torch.arange(received.rows.shape[1]) < received.unaligned_tokens_per_expert[:, None]
    else:
        ends = received.tokens_per_expert.cumsum(0)
        expert = torch.searchsorted(ends, torch.arange(received.rows.shape[0]), right=True)
        scales = factors(expert.clamp(max=EXPERTS // RANKS - 1) + first)
        filled = received.origins[:, 0] >= 0
    rows = received.rows * scales.unsqueeze(-1)
    return torch.where(filled.unsqueeze(-1), rows, float("nan"))


CASES = [
    (layout, sizing, alignment)
    for layout in Layout
    for sizing in Sizing
    for alignment in ((1, 4) if layout == Layout.BY_EXPERT else (1,))
]


def forward(buffer: Any, x: Any, indices: Any, weights: Any, layout: Any, sizing: Any, alignment: int) -> Any:
    if layout == Layout.BY_SOURCE:
        received = buffer.dispatch(x, indices, weights, sizing=sizing)
        return buffer.combine(experts_by_source(buffer, received), received.handle)
    received = buffer.dispatch(x, indices, layout=layout, sizing=sizing, expert_alignment=alignment)
    return buffer.combine(experts_by_expert(buffer, received), received.handle, row_weights=weights)


@pytest.mark.parametrize("layout, sizing, alignment", CASES)
def test_gradients_are_those_of_one_rank(layout: Layout, sizing: Sizing, alignment: int) -> None:
    def body(buffer: Any) -> None:
        x, indices, weights, gradient = tokens_of(buffer.buffer.rank)
        y = forward(buffer, x, indices, weights, layout, sizing, alignment)
        wanted = expected(x, indices, weights)
        torch.testing.assert_close(y, wanted)
        found = torch.autograd.grad(y, (x, weights), gradient)
        for ours, theirs in zip(found, torch.autograd.grad(wanted, (x, weights), gradient)):
            torch.testing.assert_close(ours, theirs)

    on_ranks(plan(layout, expert_alignment=alignment), body)


@pytest.mark.parametrize("layout, sizing, alignment", CASES)
def test_compiled_calls_are_the_same(layout: Layout, sizing: Sizing, alignment: int) -> None:
    # PyTorch compiles on one thread at a time: one rank.
    def body(buffer: Any) -> None:
        torch._dynamo.reset()
        x, indices, weights, gradient = tokens_of(0)

        def layer(x: Any, weights: Any) -> Any:
            received = buffer.dispatch(x * 2, indices, weights, layout=layout, sizing=sizing, expert_alignment=alignment)
            # The experts' place; the library says what is filled.
            row_weights = None if layout == Layout.BY_SOURCE else weights
            return buffer.combine(received.rows * 3, received.handle, row_weights=row_weights, bias=x) * 2

        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        found, wanted = compiled(x, weights), layer(x, weights)
        assert torch.equal(found, wanted)
        inputs = (x,) if layout == Layout.BY_SOURCE else (x, weights)
        for ours, theirs in zip(
            torch.autograd.grad(found, inputs, gradient), torch.autograd.grad(wanted, inputs, gradient)
        ):
            assert torch.equal(ours, theirs)

    one = swiftep.Plan(
        1, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype="float32", combine_dtype="float32", layout=layout,
        expert_alignment=alignment, result_count=8,
    )
    on_ranks(one, body, 1)


def test_operators_say_what_they_return() -> None:
    """Compiled, nothing runs to find out."""

    def body(buffer: Any) -> None:
        x, indices, weights, _ = tokens_of(0, torch.bfloat16)
        for layout in Layout:
            for quantization in (Scales.NONE, Scales.FP32, Scales.UE8M0):
                for alignment in (1, 3) if layout == Layout.BY_EXPERT else (1,):
                    call = (x.detach(), indices, weights.detach(), buffer._key)
                    how = (int(layout), alignment, int(Sizing.WORST_CASE), int(quantization), False)
                    torch.library.opcheck(
                        swiftep.torch._dispatch_op, call + how, test_utils=("test_schema", "test_faketensor")
                    )
                    shape = buffer.buffer.worst_case_row_shape(layout, TOP_K, alignment)
                    assert buffer.dispatch(*call[:2], **_how(layout, alignment)).rows.shape[:-1] == shape

    # A grouped plan has room for the rows of the others.
    on_ranks(swiftep.Plan(1, TOKENS, HIDDEN, TOP_K, EXPERTS, layout=Layout.GROUPED, result_count=32), body, 1)


def _how(layout: Layout, alignment: int) -> dict[str, Any]:
    return {"layout": layout, "expert_alignment": alignment, "sizing": Sizing.WORST_CASE}


@pytest.mark.parametrize("layout", Layout)
def test_nothing_to_send_and_nothing_received(layout: Layout) -> None:
    """Rank 0 has no tokens, and nobody's go to rank 2; rows of 16 bytes."""

    def body(buffer: Any) -> None:
        rank = buffer.buffer.rank
        count = 3 * rank
        x = torch.randn(count, 4, requires_grad=True)
        indices = torch.arange(count * TOP_K).reshape(count, TOP_K) % 4
        weights = torch.rand(count, TOP_K, requires_grad=True)
        received = buffer.dispatch(x, indices, weights, layout=layout)
        if layout != Layout.GROUPED:
            assert (received.rows.shape[0] == 0) == (rank == 2)
        is_by_source = layout == Layout.BY_SOURCE
        if is_by_source:
            y = buffer.combine(received.rows * received.top_k_weights.sum(1, keepdim=True), received.handle)
        else:
            y = buffer.combine(received.rows * 1, received.handle, row_weights=weights)
        wanted = x * weights.sum(1, keepdim=True)
        torch.testing.assert_close(y, wanted)
        gradient = torch.ones_like(y)
        for ours, theirs in zip(
            torch.autograd.grad(y, (x, weights), gradient), torch.autograd.grad(wanted, (x, weights), gradient)
        ):
            torch.testing.assert_close(ours, theirs)

    on_ranks(plan(layout), body)


def test_repeat_has_gradients_too() -> None:
    def body(buffer: Any) -> None:
        x, indices, _, gradient = tokens_of(buffer.buffer.rank)
        with torch.no_grad():
            handle = buffer.dispatch(x, indices).handle
        y = buffer.combine(buffer.repeat(x, handle), handle, bias=x)
        # By source, a token goes to a rank once.
        size = EXPERTS // RANKS
        places = torch.tensor([len({int(e) // size for e in row if e >= 0}) for row in indices])
        torch.testing.assert_close(y, x * (1 + places[:, None]))
        (found,) = torch.autograd.grad(y, x, gradient)
        torch.testing.assert_close(found, gradient * (1 + places[:, None]))

    on_ranks(plan(), body)


@pytest.mark.parametrize("layout", Layout)
def test_rows_that_no_token_fills_have_no_gradient(layout: Layout) -> None:
    """Whatever lay there before, so that what experts make of them does not matter."""

    def body(buffer: Any) -> None:
        x, indices, weights, _ = tokens_of(buffer.buffer.rank)
        options = {"layout": layout, "sizing": Sizing.WORST_CASE}
        with torch.no_grad():
            for _ in range(4):
                received = buffer.dispatch(x, indices, **options)
                received.rows.fill_(float("nan"))
                received = None
            received = buffer.dispatch(x, indices, **options)
            handle, rows = received.handle, torch.zeros_like(received.rows).requires_grad_()
            if layout == Layout.GROUPED:
                counts = received.unaligned_tokens_per_expert.clone()
                filled = torch.arange(rows.shape[1]) < counts[:, None]
            else:
                filled = (received.origins[:, 0] >= 0).clone()
            del received
        assert not filled.all()
        for row_weights in (None,) if layout == Layout.BY_SOURCE else (None, weights.detach() + 1):
            y = buffer.combine(rows, handle, row_weights=row_weights)
            (gradient,) = torch.autograd.grad(y, rows, torch.ones_like(y))
            assert (gradient[~filled] == 0).all()
            assert (gradient[filled] != 0).all()

    on_ranks(plan(layout, result_count=2), body)


def test_weights_of_other_ranks_experts_have_no_gradient() -> None:
    def body(buffer: Any) -> None:
        x, indices, weights, _ = tokens_of(buffer.buffer.rank)
        received = buffer.dispatch(x, indices, weights)
        # Of every place in every row, filled or not.
        (gradient,) = torch.autograd.grad(received.top_k_weights.sum() + 0 * received.rows.sum(), weights)
        assert torch.equal(gradient, (indices >= 0).float())

    on_ranks(plan(), body)


def test_quantized_rows_have_scales_and_no_gradients() -> None:
    def body(buffer: Any) -> None:
        x, indices, weights, _ = tokens_of(buffer.buffer.rank, torch.bfloat16)
        received = buffer.dispatch(x, indices, weights, quantization=Scales.FP32)
        assert received.rows.dtype == torch.float8_e4m3fn and received.scales is not None
        assert not received.rows.requires_grad and not received.top_k_weights.requires_grad
        rows = received.rows.float() * received.scales
        sent = torch.cat([tokens_of(rank, torch.bfloat16)[0].detach().float() for rank in range(RANKS)])
        starts = torch.tensor([0, TOKENS, 2 * TOKENS])
        origins = received.origins.long()
        torch.testing.assert_close(rows, sent[starts[origins[:, 0]] + origins[:, 1]], rtol=0.08, atol=0.02)

    on_ranks(plan(dtype=torch.float8_e4m3fn, scales=Scales.FP32, combine_dtype=torch.bfloat16), body)


def test_rows_are_arena_memory_that_tensors_keep() -> None:
    def body(buffer: Any) -> Any:
        x, indices, _, _ = tokens_of(buffer.buffer.rank)
        x = x.detach()
        received = buffer.dispatch(x, indices)
        copy, rows, handle = received.rows.clone(), received.rows, received.handle
        before = buffer.buffer.arena_byte_count
        rows.mul_(2)
        y = buffer.combine(rows, handle)
        assert buffer.buffer.arena_byte_count == before
        view = rows[1:]
        del received, rows
        gc.collect()
        for _ in range(20):
            buffer.dispatch(x, indices)
        assert torch.equal(view, 2 * copy[1:])
        return y, view, 2 * copy[1:]

    # Also when the buffers are closed.
    for _, view, copy in on_ranks(plan(), body):
        assert torch.equal(view, copy)


def test_nothing_leaks() -> None:
    def body(buffer: Any) -> None:
        x, indices, weights, gradient = tokens_of(buffer.buffer.rank)
        for _ in range(200):
            y = forward(buffer, x, indices, weights, Layout.BY_EXPERT, Sizing.EXACT, 1)
            torch.autograd.grad(y, (x, weights), gradient)
        del y

    before = len(swiftep.torch._handles)
    on_ranks(plan(Layout.BY_EXPERT, arena_byte_count_max=1 << 20), body)
    gc.collect()
    assert len(swiftep.torch._handles) == before
    assert ranks.eventually(lambda: len(swiftep.torch._buffers) == 0)


def test_bad_input_is_refused_on_all_ranks() -> None:
    def body(buffer: Any) -> list[swiftep.Error]:
        x, indices, weights, _ = tokens_of(buffer.buffer.rank)
        is_bad = buffer.buffer.rank == 1
        found = []
        calls: list[Callable[[], Any]] = [
            lambda: buffer.dispatch(x.double() if is_bad else x, indices),
            lambda: buffer.dispatch(x[:, ::2] if is_bad else x[:, :8].contiguous(), indices),
            lambda: buffer.dispatch(x, indices, weights.half() if is_bad else weights),
            lambda: buffer.dispatch(x, indices + (99 if is_bad else 0)),
        ]
        for call in calls:
            with pytest.raises(swiftep.InvalidArgument) as raised:
                call()
            found.append((raised.value.rank, raised.value.argument))
        # All goes on.
        forward(buffer, x, indices, weights, Layout.BY_SOURCE, Sizing.EXACT, 1)
        return found

    wanted = [(1, "x"), (1, "x.strides[1]"), (1, "weights"), (1, "indices[0, 0]")]
    assert on_ranks(plan(), body) == [wanted] * RANKS


def test_ranks_that_disagree_and_buffers_that_are_closed() -> None:
    def body(buffer: Any) -> Any:
        x, indices, weights, gradient = tokens_of(buffer.buffer.rank)
        received = buffer.dispatch(x, indices)
        with pytest.raises(swiftep.RanksDisagree) as raised:
            if buffer.buffer.rank == 2:
                buffer.dispatch(x, indices)
            else:
                buffer.combine(received.rows, received.handle)
        return raised.value.rank, received, buffer, indices

    for rank, received, buffer, indices in on_ranks(plan(), body):
        assert rank == 2
        with pytest.raises(swiftep.BufferClosed):
            buffer.dispatch(torch.zeros(len(indices), HIDDEN), indices)


# Processes


@pytest.fixture
def port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _join(rank: int, rank_count: int, port: int) -> Any:
    import torch.distributed as dist

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=rank_count)
    return dist


def _in_group(rank: int, rank_count: int, port: int, results: Any) -> None:
    dist = _join(rank, rank_count, port)
    group = dist.new_group([0, 1])
    communicator = swiftep.torch.communicator(group, timeout=20)
    assert communicator.rank == dist.get_rank(group)
    wrong = swiftep.Plan(3, TOKENS, HIDDEN, TOP_K, EXPERTS)
    try:
        swiftep.torch.Buffer(communicator, wrong, device="cpu", timeout=20)
        raise AssertionError("a plan for three ranks was taken by two")
    except swiftep.InvalidArgument as error:
        found = str(error)
    small = swiftep.Plan(2, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype="float32", combine_dtype="float32", result_count=4)
    buffer = swiftep.torch.Buffer(communicator, small, device="cpu", workers=1, timeout=2)
    x, indices, _, gradient = tokens_of(0)
    received = buffer.dispatch(x, indices)
    buffer.combine(received.rows, received.handle).backward(gradient)
    if rank == 0:
        results.put((found, x.grad.tolist()))
        # Gone in the middle of things.
        results.close()
        results.join_thread()
        os._exit(0)
    try:
        buffer.dispatch(x, indices)
        results.put("nobody was missed")
    except swiftep.RankMissing as error:
        results.put(error.rank == 1 - communicator.rank)
    results.close()
    results.join_thread()
    os._exit(0)


@pytest.fixture
def spawning() -> Iterator[Any]:
    import multiprocessing

    yield multiprocessing.get_context("spawn")


def test_ranks_of_a_process_group(port: int, spawning: Any) -> None:
    results = spawning.Queue()
    processes = [spawning.Process(target=_in_group, args=(rank, 2, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=90) for _ in processes]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert True in found
    refusal, gradient = next(entry for entry in found if entry is not True)
    assert "rank_count" in refusal or "ranks" in refusal
    assert len(gradient) == TOKENS
