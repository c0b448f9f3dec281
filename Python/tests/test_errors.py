"""What cannot be used raises the same on all ranks, with what was expected, and they can go on."""

from __future__ import annotations

import pickle
import threading

import numpy as np
import pytest
from ranks import TIMEOUT, errors, errors_on_buffers, on_buffers, results

import swiftep
from swiftep import Encoding, InvalidArgument, Layout, Masking, Scales, Sizing

RANKS, TOKENS, HIDDEN, TOP_K, EXPERTS = 2, 4, 16, 2, 4


def make_plan(**options):
    options = {"dtype": "float32", "combine_dtype": "float32", "result_count": 2, **options}
    return swiftep.Plan(RANKS, TOKENS, HIDDEN, TOP_K, EXPERTS, **options)


def x(dtype=np.float32, shape=(TOKENS, HIDDEN)):
    return np.ones(shape, dtype)


def indices(dtype=np.int64, shape=(TOKENS, TOP_K)):
    return np.zeros(shape, dtype) + np.arange(shape[-1], dtype=dtype)


def works(buffer):
    """The ranks can go on."""
    result = buffer.dispatch(x(), indices())
    assert result.rows.shape == ((RANKS * TOKENS, HIDDEN) if buffer.rank == 0 else (0, HIDDEN))


def foreign_handle():
    return results(1, lambda c: swiftep.Buffer(c, swiftep.Plan(1, 4, 16, 2, 4)).dispatch(
        np.ones((4, 16), np.float16), indices()
    ).handle)[0]


DISPATCHES = {
    "dtype": (lambda b: b.dispatch(x(np.float64), indices()), "x"),
    "byte order": (lambda b: b.dispatch(x(">f4"), indices()), "x"),
    "objects": (lambda b: b.dispatch(x(object), indices()), "x"),
    "dimensions": (lambda b: b.dispatch(x(shape=(TOKENS, 2, HIDDEN)), indices()), "x"),
    "scalar": (lambda b: b.dispatch(np.float32(1), indices()), "x"),
    "many dimensions": (lambda b: b.dispatch(x(shape=(1,) * 20), indices()), "x"),
    "strides": (lambda b: b.dispatch(x(shape=(TOKENS, 2 * HIDDEN))[:, ::2], indices()), "x"),
    "transposed": (lambda b: b.dispatch(x(shape=(HIDDEN, TOKENS)).T, indices()), "x"),
    "reversed": (lambda b: b.dispatch(x()[::-1], indices()), "x"),
    "odd strides": (lambda b: b.dispatch(np.zeros(TOKENS, "V3,f4,V58")["f1"].reshape(TOKENS, 1), indices()), "x"),
    "row bytes": (lambda b: b.dispatch(x(shape=(TOKENS, 3)), indices()), "x"),
    "indices' dtype": (lambda b: b.dispatch(x(), indices(np.int16)), "indices"),
    "indices' shape": (lambda b: b.dispatch(x(), indices(shape=(TOKENS + 1, TOP_K))), "indices"),
    "weights' dtype": (lambda b: b.dispatch(x(), indices(), x(np.float16, (TOKENS, TOP_K))), "weights"),
    "weights' shape": (lambda b: b.dispatch(x(), indices(), x(shape=(TOKENS, TOP_K + 1))), "weights"),
    "an expert too far": (lambda b: b.dispatch(x(), indices() + EXPERTS), "indices"),
    "an expert twice": (lambda b: b.dispatch(x(), 0 * indices()), "indices"),
    "table's shape": (lambda b: b.dispatch(x(), table=np.ones((TOKENS, RANKS + 1), np.uint8)), "table"),
    "scales of fp32": (lambda b: b.dispatch(x(), indices(), scales=x(shape=(TOKENS, 1))), "scales"),
    "four sidecars": (lambda b: b.dispatch(x(), indices(), sidecars=[x()] * 4), "sidecars"),
    "a sidecar's length": (lambda b: b.dispatch(x(), indices(), sidecars=[x(shape=(1, 4))]), "sidecars"),
    "layout": (lambda b: b.dispatch(x(), indices(), layout=7), "layout"),
    "sizing": (lambda b: b.dispatch(x(), indices(), sizing=7), "sizing"),
    "waiting": (lambda b: b.dispatch(x(), indices(), waiting=7), "waiting"),
    "quantization": (lambda b: b.dispatch(x(), indices(), quantization=7), "quantization"),
    "quantization of fp32": (lambda b: b.dispatch(x(), indices(), quantization=Scales.FP32), "x"),
    "alignment 0": (
        lambda b: b.dispatch(x(), indices(), layout=Layout.BY_EXPERT, expert_alignment=0),
        "expert_alignment",
    ),
    "alignment beyond 32 bits": (lambda b: b.dispatch(x(), indices(), expert_alignment=2**40), "expert_alignment"),
    "rows of exact size": (lambda b: b.dispatch(x(), indices(), rows_max=4), "rows_max"),
    "rows 0": (lambda b: b.dispatch(x(), indices(), rows_max=0, sizing=Sizing.WORST_CASE), "rows_max"),
    "workers 0": (lambda b: b.dispatch(x(), indices(), workers=0), "workers"),
    "too many workers": (lambda b: b.dispatch(x(), indices(), workers=2**40), "workers"),
    "too many tokens": (
        lambda b: b.dispatch(x(shape=(9, HIDDEN)), indices(shape=(9, TOP_K)), sizing=Sizing.WORST_CASE),
        "x",
    ),
    "statistics' dtype": (lambda b: b.dispatch(x(), indices(), expert_statistics=np.zeros(2)), "expert_statistics"),
    "statistics' shape": (
        lambda b: b.dispatch(x(), indices(), wait_statistics=np.zeros(5, np.int64)),
        "wait_statistics",
    ),
}


@pytest.mark.parametrize("name", DISPATCHES)
def test_dispatch_refuses(name):
    call, argument = DISPATCHES[name]

    def body(buffer):
        with pytest.raises(InvalidArgument) as raised:
            if buffer.rank == 1:
                call(buffer)
            else:
                buffer.dispatch(x(), indices())
        works(buffer)
        return raised.value

    raised = on_buffers(make_plan(), RANKS, body)
    for error in raised:
        assert isinstance(error, ValueError)
        assert error.rank == 1
        assert names(error.argument, argument)
        assert error.expected and error.found and error.message
        assert error.step is None and error.cause is None and error.system_code is None
    assert vars(raised[0]) == vars(raised[1])


def names(found, expected):
    """Whether an error is about an argument, or about something of it, as `x.strides[0]`."""
    return found.partition(".")[0].partition("[")[0] == expected


@pytest.mark.parametrize("given", ["none", "indices and table", "weights alone"])
def test_dispatch_wants_one_routing(given):
    def body(buffer):
        arguments = {
            "none": {},
            "indices and table": {"indices": indices(), "table": np.ones((TOKENS, RANKS), np.uint8)},
            "weights alone": {"weights": x(shape=(TOKENS, TOP_K))},
        }[given]
        with pytest.raises(InvalidArgument) as raised:
            if buffer.rank == 1:
                buffer.dispatch(x(), **arguments)
            else:
                buffer.dispatch(x(), indices())
        works(buffer)
        return raised.value

    for error in on_buffers(make_plan(), RANKS, body):
        assert error.rank == 1


COMBINES = {
    "rows' shape": (lambda b, r: b.combine(x(shape=(99, HIDDEN)), r.handle), "rows"),
    "rows' dtype": (lambda b, r: b.combine(r.rows.numpy().astype(np.int32), r.handle), "rows"),
    "rows' strides": (lambda b, r: b.combine(r.rows.numpy()[:, ::-1], r.handle), "rows"),
    "weights by source": (
        lambda b, r: b.combine(r.rows, r.handle, row_weights=x(shape=(TOKENS, TOP_K))),
        "handle",
    ),
    "weights' shape": (lambda b, r: b.combine(r.rows, r.handle, top_k_weights=x(shape=(1, 1))), "top_k_weights"),
    "three biases": (lambda b, r: b.combine(r.rows, r.handle, biases=[x()] * 3), "biases"),
    "a bias's shape": (lambda b, r: b.combine(r.rows, r.handle, biases=[x(shape=(1, 1))]), "biases"),
    "output's shape": (lambda b, r: b.combine(r.rows, r.handle, output=x(shape=(1, 1))), "output"),
    "output's dtype": (lambda b, r: b.combine(r.rows, r.handle, output=x(np.float16)), "output"),
    "encoding": (lambda b, r: b.combine(r.rows, r.handle, encoding=7), "encoding"),
    "encoding beyond 32 bits": (lambda b, r: b.combine(r.rows, r.handle, encoding=2**40), "encoding"),
    "encoding of fp32": (lambda b, r: b.combine(r.rows, r.handle, encoding=Encoding.LOGFMT), "rows"),
}


@pytest.mark.parametrize("name", COMBINES)
def test_combine_refuses(name):
    call, argument = COMBINES[name]

    def body(buffer):
        result = buffer.dispatch(x(), indices())
        with pytest.raises(InvalidArgument) as raised:
            if buffer.rank == 0:
                call(buffer, result)
            else:
                buffer.combine(result.rows, result.handle)
        buffer.combine(result.rows, result.handle)
        return raised.value

    for error in on_buffers(make_plan(), RANKS, body):
        assert error.rank == 0
        assert names(error.argument, argument)
        assert error.expected and error.found


def test_foreign_handle():
    handle = foreign_handle()

    def body(buffer):
        result = buffer.dispatch(x(), indices())
        for call in (
            lambda: buffer.dispatch(x(), handle=handle if buffer.rank else result.handle),
            lambda: buffer.combine(result.rows, handle if buffer.rank else result.handle),
        ):
            with pytest.raises(InvalidArgument) as raised:
                call()
            assert raised.value.rank == 1
            assert raised.value.argument == "handle"
        works(buffer)

    on_buffers(make_plan(), RANKS, body)


def test_read_only_memory_that_is_to_be_written():
    """Refused on all ranks; the rank that passed it learns why."""

    def body(buffer):
        result = buffer.dispatch(x(), indices())
        output = x()
        output.flags.writeable = buffer.rank == 0
        with pytest.raises(ValueError) as raised:
            buffer.combine(result.rows, result.handle, output=output)
        works(buffer)
        return raised.value

    other, own = on_buffers(make_plan(), RANKS, body)
    assert isinstance(other, InvalidArgument) and other.rank == 1 and other.argument == "output"
    assert "read-only" in str(own) and str(own.__cause__) == str(other)


def test_read_only_input():
    def body(buffer):
        tokens = x()
        tokens.flags.writeable = False
        buffer.dispatch(tokens, indices())

    on_buffers(make_plan(), RANKS, body)


@pytest.mark.parametrize(
    "call",
    [
        lambda b: b.dispatch([[1.0] * HIDDEN] * TOKENS, indices()),
        lambda b: b.dispatch(None, indices()),
        lambda b: b.dispatch(x(), "indices"),
        lambda b: b.dispatch(x(), handle=3),
        lambda b: b.dispatch(x(), indices(), after=[3]),
        lambda b: b.dispatch(x(), indices(), stream="stream"),
        lambda b: b.dispatch(x(), indices(), layout="by source"),
        lambda b: b.dispatch(np.ndarray, indices()),
        lambda b: b.combine(x(), None),
        lambda b: b.make_tensor([1], "complex64"),
    ],
)
def test_what_is_no_argument_at_all(call):
    [communicator] = swiftep.Communicator.threads(1)
    with swiftep.Buffer(communicator, swiftep.Plan(1, TOKENS, HIDDEN, TOP_K, EXPERTS)) as buffer:
        with pytest.raises(TypeError):
            call(buffer)


def test_ranks_that_call_in_different_order():
    def body(buffer):
        result = buffer.dispatch(x(), indices())
        with pytest.raises(swiftep.RanksDisagree) as raised:
            if buffer.rank == 0:
                buffer.dispatch(x(), indices())
            else:
                buffer.combine(result.rows, result.handle)
        works(buffer)
        return raised.value

    for error in on_buffers(make_plan(), RANKS, body):
        assert error.rank == 1
        assert error.argument and error.expected and error.found
        assert error.expected != error.found


def test_ranks_that_disagree_about_options():
    def body(buffer):
        with pytest.raises(swiftep.RanksDisagree) as raised:
            buffer.dispatch(x(), indices(), layout=Layout(buffer.rank))
        works(buffer)
        return raised.value

    first, second = on_buffers(make_plan(), RANKS, body)
    assert first.rank == 1
    assert vars(first) == vars(second)


def test_missing_rank():
    def body(buffer):
        works(buffer)
        if buffer.rank == 1:
            buffer.close()
            return None
        with pytest.raises(swiftep.RankMissing) as raised:
            buffer.dispatch(x(), indices())
        with pytest.raises(swiftep.BufferLost) as lost:
            buffer.dispatch(x(), indices())
        assert isinstance(lost.value.cause, swiftep.RankMissing)
        assert lost.value.__cause__ is lost.value.cause
        assert lost.value.cause.rank == 1
        return raised.value

    error, _ = on_buffers(make_plan(), RANKS, body)
    assert error.rank == 1
    assert error.step == "exchange"
    assert error.argument is None


def test_silent_rank():
    def body(buffer):
        if buffer.rank == 1:
            return None
        with pytest.raises(swiftep.RankMissing) as raised:
            buffer.dispatch(x(), indices())
        return raised.value

    error, _ = on_buffers(make_plan(), RANKS, body, timeout=0.2)
    assert error.rank == 1


def test_use_after_close():
    def body(buffer):
        result = buffer.dispatch(x(), indices())
        rows = result.rows.numpy()
        buffer.close()
        buffer.close()
        for call in (
            lambda: buffer.dispatch(x(), indices()),
            lambda: buffer.combine(result.rows, result.handle),
            lambda: buffer.combine_input(result.handle, HIDDEN),
        ):
            with pytest.raises(swiftep.BufferClosed):
                call()
        assert (rows == 1).all()
        assert result.tokens_per_source.numpy().tolist() == ([TOKENS] * 2 if buffer.rank == 0 else [0] * 2)
        assert (buffer.rank_count, buffer.rank) == (RANKS, buffer.rank)

    on_buffers(make_plan(), RANKS, body)


@pytest.mark.parametrize("rank_count", [0, -1, (1 << 16) + 1, 2**40])
def test_rank_counts(rank_count):
    with pytest.raises(InvalidArgument) as raised:
        swiftep.Communicator.threads(rank_count)
    assert raised.value.rank is None


def test_closed_communicator():
    [communicator] = swiftep.Communicator.threads(1)
    communicator.close()
    communicator.close()
    with pytest.raises(ValueError):
        communicator.rank
    with pytest.raises(ValueError):
        communicator.shrink()
    with pytest.raises(ValueError):
        swiftep.Buffer(communicator, make_plan())


def test_buffer_of_another_rank_count():
    for error in errors(RANKS, lambda c: swiftep.Buffer(c, swiftep.Plan(3, 1, 16, 1, 3), timeout=TIMEOUT)):
        assert isinstance(error, InvalidArgument)


def test_plans_that_disagree():
    def body(communicator):
        return swiftep.Buffer(communicator, swiftep.Plan(2, 1 + communicator.rank, 16, 1, 4), timeout=TIMEOUT)

    for error in errors(2, body):
        assert isinstance(error, swiftep.RanksDisagree)
        assert error.rank == 1


def test_no_gpu_here():
    [communicator] = swiftep.Communicator.threads(1)
    with pytest.raises(swiftep.MachineUnavailable):
        swiftep.Buffer(communicator, swiftep.Plan(1, 1, 16, 1, 1), device="cuda:63")
    with pytest.raises(ValueError):
        swiftep.Buffer(communicator, swiftep.Plan(1, 1, 16, 1, 1), device="tpu")


@pytest.mark.parametrize("timeout", [-1, float("nan")])
def test_timeouts(timeout):
    [communicator] = swiftep.Communicator.threads(1)
    with pytest.raises(ValueError):
        communicator.shrink(timeout=timeout)


def test_out_of_memory():
    """Results that are kept take all that the arena may grow to."""
    plan = make_plan(arena_byte_count_max=1)

    def body(buffer):
        kept = []
        for _ in range(10_000):
            kept.append(buffer.dispatch(x(), indices()))

    for error in errors_on_buffers(plan, RANKS, body):
        assert isinstance(error, swiftep.OutOfMemory) and isinstance(error, MemoryError)
        assert error.needed_byte_count is not None and error.available_byte_count is not None


PLANS = {
    "rank_count": {"rank_count": 0},
    "hidden": {"hidden": 3},
    "top_k": {"top_k": 33},
    "expert_count": {"expert_count": -1},
    "expert_owners": {"expert_owners": [0, 1, 2, 9]},
    "expert_owners' count": {"expert_owners": [0, 1]},
    "sidecar_byte_counts": {"sidecar_byte_counts": [3]},
    "expert_alignment": {"expert_alignment": 0},
    "index_byte_count": {"index_byte_count": 5},
    "result_count": {"result_count": 0},
    "workers": {"workers": 1 << 30},
    "tokens_per_rank_max": {"tokens_per_rank_max": 2**40},
    "scales": {"scales": Scales.FP32},
    "layout": {"layout": 9},
    "masking": {"masking": 9},
    "received_tokens_max": {"received_tokens_max": -1},
    "staged_tokens_per_step": {"is_staged": True, "staged_tokens_per_step": 0},
    "arena_byte_count_max": {"arena_byte_count_max": 0},
}


@pytest.mark.parametrize("name", PLANS)
def test_plan_refuses(name):
    good = {"rank_count": 2, "tokens_per_rank_max": 4, "hidden": 16, "top_k": 2, "expert_count": 4}
    swiftep.Plan(**good)
    with pytest.raises(InvalidArgument) as raised:
        swiftep.Plan(**{**good, **PLANS[name]})
    assert raised.value.rank is None
    assert raised.value.argument == name.split("'")[0].replace(" ", "_")


def test_plan():
    plan = swiftep.Plan(2, 4, 16, 2, 4, dtype="float32", layout=Layout.BY_EXPERT)
    assert plan.byte_count == sum(plan.parts.values())
    assert 0 < plan.arena_byte_count < plan.arena_byte_count_max
    assert plan.rows_per_result == 16
    for dtype in ("int32", "complex64", object):
        with pytest.raises((TypeError, InvalidArgument)):
            swiftep.Plan(2, 4, 16, 2, 4, dtype=dtype)


def test_errors_travel():
    cause = swiftep.RankMissing("gone", rank=1, step="exchange", code=3)
    lost = pickle.loads(pickle.dumps(swiftep.BufferLost("lost", cause=cause, code=5)))
    assert str(lost) == "lost"
    assert lost.cause.rank == 1
    assert lost.__cause__ is lost.cause


def test_masks():
    plan = make_plan(masking=Masking.MANUAL)
    meeting = threading.Barrier(2)

    def body(buffer):
        works_with_masks(buffer)
        meeting.wait()
        if buffer.rank == 0:
            buffer.mask([1])
            assert buffer.masked_ranks == [1]
            result = buffer.dispatch(x(), indices())
            assert result.tokens_per_source.numpy().tolist() == [TOKENS, 0]
            assert result.source_counts.numpy().tolist() == [[TOKENS, 0], [TOKENS, 0]]
        else:
            with pytest.raises(swiftep.RankMasked) as raised:
                buffer.dispatch(x(), indices())
            assert raised.value.rank == 1
            assert raised.value.masking_rank == 0
        buffer.unmask([1])
        assert buffer.masked_ranks == []
        works_with_masks(buffer)

    on_buffers(plan, RANKS, body)


def works_with_masks(buffer):
    result = buffer.dispatch(x(), indices())
    sent = TOKENS if buffer.rank == 0 else 0
    assert result.tokens_per_source.numpy().tolist() == [sent] * 2


def test_rank_that_is_masked_by_itself():
    def body(buffer):
        if buffer.rank == 1:
            buffer.close()
            return
        result = buffer.dispatch(x(), indices())
        assert result.tokens_per_source.numpy().tolist() == [TOKENS, 0]
        assert buffer.masked_ranks == [1]

    on_buffers(make_plan(masking=Masking.AUTOMATIC), RANKS, body)


def test_bad_masks():
    def body(buffer):
        for ranks in ([buffer.rank], [RANKS], [64], [-1], [2**70]):
            with pytest.raises(InvalidArgument) as raised:
                buffer.mask(ranks)
            assert raised.value.argument == "ranks"
            assert raised.value.rank == buffer.rank

    on_buffers(make_plan(masking=Masking.MANUAL), RANKS, body)

    def without(buffer):
        with pytest.raises(InvalidArgument):
            buffer.mask([1 - buffer.rank])

    on_buffers(make_plan(), RANKS, without)


def test_flight_record():
    def body(buffer):
        works(buffer)
        return buffer.flight_record()

    for text in on_buffers(make_plan(), RANKS, body):
        assert "dispatch" in text
