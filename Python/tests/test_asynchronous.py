"""Events, results that are received later, and graphs."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from ranks import on_buffers

import swiftep
from swiftep import Event, InvalidArgument, Sizing

RANKS, TOKENS, HIDDEN, TOP_K, EXPERTS = 2, 4, 16, 2, 4
INDICES = np.array([[0, 2], [1, 3], [2, -1], [3, 0]])
#: To how many ranks each token goes.
SPREAD = np.array([2, 2, 1, 2])[:, None]
WORST = {"sizing": Sizing.WORST_CASE}


def make_plan(**options):
    return swiftep.Plan(
        RANKS, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype="float32", combine_dtype="float32", result_count=4, **options
    )


def tokens(rank):
    return np.arange(TOKENS * HIDDEN, dtype=np.float32).reshape(TOKENS, HIDDEN) + 1000 * rank


@pytest.mark.parametrize("sizing", Sizing, ids=lambda sizing: sizing.name)
def test_asynchronous(sizing):
    def body(buffer):
        x = tokens(buffer.rank)
        result = buffer.dispatch(x, INDICES, sizing=sizing, asynchronous=True)
        combined = buffer.combine(result.rows, result.handle, asynchronous=True, after=[result.event])
        combined.event.wait()
        assert combined.event.is_complete and result.event.is_complete
        assert (combined.tokens.numpy() == x * SPREAD).all()

    on_buffers(make_plan(), RANKS, body)


def test_event_of_the_caller():
    def body(buffer):
        x = np.zeros((TOKENS, HIDDEN), np.float32)
        ready = Event()
        assert not ready.is_complete
        result = buffer.dispatch(x, INDICES, asynchronous=True, after=[ready], **WORST)
        assert not result.event.is_complete
        x[:] = tokens(buffer.rank)
        ready.signal()
        result.event.wait()
        ready.wait()
        first = result.origins.numpy()[0]
        assert (result.rows.numpy()[0] == tokens(first[0])[first[1]]).all()

    on_buffers(make_plan(), RANKS, body)


def test_failure_of_an_asynchronous_call():
    def body(buffer):
        result = None
        if buffer.rank == 0:
            result = buffer.dispatch(tokens(0), INDICES, asynchronous=True, **WORST)
        else:
            buffer.close()
        if result is not None:
            with pytest.raises(swiftep.RankMissing) as raised:
                result.event.wait()
            assert raised.value.rank == 1

    on_buffers(make_plan(), RANKS, body)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_receives_later(asynchronous):
    def body(buffer):
        x = [tokens(buffer.rank) + 100 * index for index in range(2)]
        options = {"receives_later": True, "asynchronous": asynchronous}
        results = [buffer.dispatch(each, INDICES, **WORST, **options) for each in x]
        with pytest.raises(InvalidArgument):
            results[0].event.wait()
        for result in reversed(results):
            result.receive()
            result.event.wait()
        combined = [buffer.combine(result.rows, result.handle, **options) for result in results]
        for each, result in zip(x, combined):
            result.receive()
            result.event.wait()
            assert (result.tokens.numpy() == each * SPREAD).all()
        with pytest.raises(InvalidArgument):
            results[0].receive()

    on_buffers(make_plan(), RANKS, body)


def test_receive_of_what_has_been_received():
    def body(buffer):
        result = buffer.dispatch(tokens(buffer.rank), INDICES)
        with pytest.raises(InvalidArgument):
            result.receive()
        with pytest.raises(InvalidArgument):
            buffer.combine(result.rows, result.handle).receive()

    on_buffers(make_plan(), RANKS, body)


def test_graph():
    recorded = threading.Barrier(RANKS)

    def body(buffer):
        x = np.zeros((TOKENS, HIDDEN), np.float32)

        def layer():
            result = buffer.dispatch(x, INDICES, asynchronous=True, **WORST)
            return result, buffer.combine(result.rows, result.handle, asynchronous=True)

        graph = buffer.record(layer)
        _, combined = graph.result
        recorded.wait()
        for run in range(3):
            x[:] = tokens(buffer.rank) + run
            event = graph.launch()
            event.wait()
            assert event.is_complete
            assert (combined.tokens.numpy() == x * SPREAD).all()
        graph.close()
        graph.close()
        with pytest.raises(ValueError):
            graph.launch()
        assert (combined.tokens.numpy() == x * SPREAD).all()

    on_buffers(make_plan(), RANKS, body)


def test_recordings_that_fail():
    class Mine(BaseException):
        pass

    def body(buffer):
        def raises():
            buffer.dispatch(tokens(buffer.rank), INDICES, asynchronous=True, **WORST)
            raise Mine("mine")

        with pytest.raises(Mine, match="mine"):
            buffer.record(raises)
        with pytest.raises(InvalidArgument) as raised:
            buffer.record(lambda: None)
        assert raised.value.argument == "body"
        # The library's own error, through the caller's function.
        with pytest.raises(InvalidArgument) as raised:
            buffer.record(lambda: buffer.dispatch(tokens(buffer.rank), INDICES))
        assert raised.value.rank == buffer.rank
        result = buffer.dispatch(tokens(buffer.rank), INDICES)
        assert len(result.rows) > 0

    on_buffers(make_plan(), RANKS, body)


def test_graph_outlives_the_buffer_object():
    recorded = threading.Barrier(RANKS)

    def body(communicator):
        buffer = swiftep.Buffer(communicator, make_plan(), workers=1, timeout=20)
        x = tokens(communicator.rank)
        graph = buffer.record(lambda: buffer.dispatch(x, INDICES, asynchronous=True, **WORST))
        recorded.wait()
        graph.launch().wait()
        del buffer
        graph.launch().wait()
        rows = graph.result.rows.numpy()
        recorded.wait()
        del graph
        return float(rows[0, 0])

    from ranks import results

    assert results(RANKS, body) == [0.0, 0.0]
