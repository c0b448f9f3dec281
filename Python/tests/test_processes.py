"""Ranks that are processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback

import numpy as np
import pytest

import swiftep

TOKENS, HIDDEN, TOP_K = 4, 16, 2
spawning = multiprocessing.get_context("spawn")


class Hub:
    """Gathers bytes from all ranks over pipes."""

    def __init__(self, rank_count):
        self.pipes = [spawning.Pipe() for _ in range(rank_count)]

    def serve(self):
        def gather():
            try:
                while True:
                    pieces = [ours.recv_bytes() for ours, _ in self.pipes]
                    for ours, _ in self.pipes:
                        for piece in pieces:
                            ours.send_bytes(piece)
            except (EOFError, OSError):
                pass

        threading.Thread(target=gather, daemon=True).start()


def gatherer(pipe, rank_count):
    def all_gather(mine):
        pipe.send_bytes(mine)
        return [pipe.recv_bytes() for _ in range(rank_count)]

    return all_gather


def entry(function, rank, rank_count, pipe, outcome, arguments):
    try:
        outcome.send(function(rank, rank_count, gatherer(pipe, rank_count), *arguments))
    except BaseException as error:
        traceback.print_exc()
        outcome.send(error)


def run(function, rank_count, *arguments, dies=(), context=spawning):
    """What `function(rank, rank_count, all_gather, *arguments)` returned in each process."""
    hub = Hub(rank_count)
    outcomes = [spawning.Pipe() for _ in range(rank_count)]
    processes = [
        context.Process(
            target=entry, args=(function, rank, rank_count, hub.pipes[rank][1], outcomes[rank][1], arguments)
        )
        for rank in range(rank_count)
    ]
    for process in processes:
        process.start()
    hub.serve()
    found = []
    for rank, (ours, _) in enumerate(outcomes):
        if rank in dies:
            found.append(None)
            continue
        assert ours.poll(60), f"rank {rank} hangs"
        found.append(ours.recv())
    for process in processes:
        process.join(60)
        assert process.exitcode is not None
    for outcome in found:
        if isinstance(outcome, BaseException):
            raise outcome
    return found


def make_buffer(communicator, **options):
    plan = swiftep.Plan(
        communicator.rank_count, TOKENS, HIDDEN, TOP_K, 6, dtype="float32", combine_dtype="float32", **options
    )
    return swiftep.Buffer(communicator, plan, workers=1, timeout=20)


def step(buffer):
    """A dispatch and a combine, checked."""
    x = np.full((TOKENS, HIDDEN), buffer.rank + 1, np.float32)
    indices = np.array([[token % 6, (token + 3) % 6] for token in range(TOKENS)])
    result = buffer.dispatch(x, indices)
    origins = result.origins.numpy()
    assert (result.rows.numpy() == origins[:, :1] + 1).all()
    sums = buffer.combine(result.rows, result.handle).tokens.numpy()
    owners = indices // (6 // buffer.rank_count)
    spread = np.array([len(set(each)) for each in owners])
    assert (sums == x * spread[:, None]).all()


def exchanges(rank, rank_count, all_gather):
    communicator = swiftep.Communicator.processes(rank, rank_count, all_gather, timeout=20)
    assert (communicator.rank, communicator.rank_count, communicator.generation) == (rank, rank_count, 0)
    with make_buffer(communicator) as buffer:
        for _ in range(3):
            step(buffer)
        with pytest.raises(swiftep.InvalidArgument) as raised:
            if rank == 1:
                buffer.dispatch(np.ones((TOKENS, HIDDEN)), np.zeros((TOKENS, 1), np.int64))
            else:
                buffer.dispatch(np.ones((TOKENS, HIDDEN), np.float32), np.zeros((TOKENS, 1), np.int64))
        step(buffer)
        all_gather(b"done")
    return raised.value.rank, str(raised.value)


def test_processes():
    found = run(exchanges, 3)
    assert len({message for _, message in found}) == 1
    assert all(rank == 1 for rank, _ in found)


def test_forked_processes():
    """The parent has used the library before: its threads are not the children's."""
    [communicator] = swiftep.Communicator.threads(1)
    with make_buffer(communicator) as buffer:
        buffer.dispatch(np.ones((TOKENS, HIDDEN), np.float32), np.zeros((TOKENS, 1), np.int64))
        for _ in range(10):
            run(exchanges, 2, context=multiprocessing.get_context("fork"))


class Unexpected(Exception):
    pass


def fails_to_gather(rank, rank_count, all_gather, kind):
    def raises(mine):
        raise kind("no way to gather")

    with pytest.raises(kind, match="no way") as raised:
        swiftep.Communicator.processes(rank, rank_count, raises, timeout=5)
    assert isinstance(raised.value.__context__, swiftep.Error)
    with pytest.raises(kind, match="no way"):
        swiftep.Communicator.join(raises, timeout=5)
    with pytest.raises(ValueError, match="all_gather"):
        swiftep.Communicator.processes(rank, rank_count, lambda mine: [mine], timeout=5)
    with pytest.raises(ValueError, match="all_gather"):
        swiftep.Communicator.processes(rank, rank_count, lambda mine: [mine, b""], timeout=5)
    with pytest.raises(TypeError):
        swiftep.Communicator.processes(rank, rank_count, lambda mine: None, timeout=5)
    return True


@pytest.mark.parametrize("kind", [Unexpected, KeyboardInterrupt])
def test_exceptions_of_all_gather(kind):
    assert fails_to_gather(0, 2, None, kind)


def survives(rank, rank_count, all_gather):
    communicator = swiftep.Communicator.processes(rank, rank_count, all_gather, timeout=20)
    buffer = make_buffer(communicator)
    step(buffer)
    if rank == 1:
        os._exit(0)
    with pytest.raises(swiftep.RankMissing) as raised:
        while True:
            step(buffer)
    buffer.close()
    assert raised.value.rank == 1
    smaller = communicator.shrink(timeout=20)
    assert (smaller.rank_count, smaller.generation) == (2, 1)
    assert smaller.rank == (0 if rank == 0 else 1)
    buffer = make_buffer(smaller)
    step(buffer)
    return smaller.rank


def test_survivors_go_on():
    assert run(survives, 3, dies=[1]) == [0, None, 1]


def joins(rank, rank_count, all_gather):
    """Ranks 0 and 1 are a group, which 2 joins once it is there."""
    point = swiftep.MeetingPoint(token="a secret of these tests", job=str(os.getppid()))
    first = swiftep.Communicator.at(point, rank, 2, timeout=20) if rank < 2 else None
    all_gather(b"made")
    if first is None:
        communicator = swiftep.Communicator.join_at(point, timeout=20)
    else:
        communicator, refusal = first.admit(timeout=20)
        assert refusal is None
    assert (communicator.rank, communicator.rank_count, communicator.generation) == (rank, 3, 1)
    step(make_buffer(communicator))
    all_gather(b"done")
    return communicator.rank


def test_a_process_joins():
    assert run(joins, 3) == [0, 1, 2]


def nobody_joins(rank, rank_count, all_gather):
    first = swiftep.Communicator.processes(rank, rank_count, all_gather, timeout=20)

    def fails(mine):
        raise Unexpected("nobody there")

    communicator, refusal = first.admit(fails, timeout=1)
    assert communicator.rank_count == 2
    assert isinstance(refusal, swiftep.Error)
    if rank == 0:
        assert isinstance(refusal.__cause__, Unexpected)
    step(make_buffer(communicator))
    all_gather(b"done")
    return True


def test_nobody_joins():
    assert run(nobody_joins, 2) == [True, True]


def from_environment(rank, rank_count, all_gather, job):
    os.environ.update(
        SWIFTEP_TOKEN="a secret of these tests",
        SWIFTEP_RANK=str(rank),
        SWIFTEP_RANK_COUNT=str(rank_count),
        SWIFTEP_JOB=job,
        RANK=str(rank),
        WORLD_SIZE=str(rank_count),
    )
    communicator = swiftep.Communicator.from_environment(timeout=20)
    step(make_buffer(communicator))
    all_gather(b"done")
    return communicator.rank


def test_environment():
    assert run(from_environment, 2, f"job-{os.getpid()}-{time.monotonic_ns()}") == [0, 1]


def test_meeting_points():
    point = swiftep.MeetingPoint(token="a secret of these tests")
    assert "secret" not in repr(point)
    with pytest.raises(swiftep.Error):
        swiftep.Communicator.at(swiftep.MeetingPoint(token="short"), 0, 1, timeout=5)
    with pytest.raises(swiftep.InvalidArgument) as raised:
        swiftep.Communicator.at(point, 5, 2, timeout=5)
    assert raised.value.argument == "rank"
