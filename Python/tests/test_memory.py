"""Who keeps what alive, and for how long."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest
from ranks import eventually, on_buffers, results

import swiftep
from swiftep import DType, Event, Sizing, _keeping

TOKENS, HIDDEN, TOP_K, EXPERTS = 4, 32, 2, 4
#: DLPack's versions that this NumPy has; without one, what it takes is read-only.
VERSIONS = [None, (1, 0)] if np.lib.NumpyVersion(np.__version__) >= "2.1.0" else [None]
INDICES = np.array([[0, 2], [1, 3], [2, 1], [3, 0]])


def alone(**options):
    """A buffer of one rank."""
    [communicator] = swiftep.Communicator.threads(1)
    options = {"dtype": "float32", "combine_dtype": "float32", "result_count": 4, **options}
    return swiftep.Buffer(communicator, swiftep.Plan(1, TOKENS, HIDDEN, TOP_K, EXPERTS, **options), workers=1)


def x(value=1):
    return np.full((TOKENS, HIDDEN), value, np.float32)


class Watched(np.ndarray):
    """An array that weak references can be made to, and that is read as any other."""


def test_synchronous_calls_keep_nothing():
    with alone() as buffer:
        tokens, weights = x(), np.ones((TOKENS, TOP_K), np.float32)
        counts = [sys.getrefcount(array) for array in (tokens, INDICES, weights)]
        result = buffer.dispatch(tokens, INDICES, weights)
        buffer.combine(result.rows, result.handle)
        assert [sys.getrefcount(array) for array in (tokens, INDICES, weights)] == counts
        assert not _keeping._kept


@pytest.mark.parametrize("ends", ["event", "failure", "close"])
def test_asynchronous_calls_keep_their_arrays(ends):
    with alone() as buffer:
        tokens = x(3).view(Watched)
        indices = INDICES.copy().view(Watched)
        watched = [weakref.ref(tokens), weakref.ref(indices)]
        ready = Event()
        result = buffer.dispatch(tokens, indices, asynchronous=True, sizing=Sizing.WORST_CASE, after=[ready])
        del tokens, indices
        gc.collect()
        assert all(each() is not None for each in watched)
        if ends == "failure":
            # The next call fails, and takes nothing with it.
            with pytest.raises(swiftep.InvalidArgument):
                ready.signal()
                buffer.dispatch(x(), 0 * INDICES - 7, asynchronous=True, sizing=Sizing.WORST_CASE).event.wait()
        ready.signal()
        if ends == "close":
            buffer.close()
        else:
            result.event.wait()
        assert eventually(lambda: all(each() is None for each in watched))
        assert eventually(lambda: not _keeping._kept)
        assert (result.rows.numpy() == 3).all()


def test_refused_asynchronous_calls_keep_nothing():
    with alone() as buffer:
        tokens = x().astype(np.float64).view(Watched)
        watched = weakref.ref(tokens)
        with pytest.raises(swiftep.InvalidArgument):
            buffer.dispatch(tokens, INDICES, asynchronous=True, sizing=Sizing.WORST_CASE)
        del tokens
        gc.collect()
        assert eventually(lambda: watched() is None)


def test_results_to_be_received_keep_their_arrays():
    with alone() as buffer:
        tokens = x(2).view(Watched)
        watched = weakref.ref(tokens)
        result = buffer.dispatch(tokens, INDICES, receives_later=True, sizing=Sizing.WORST_CASE)
        del tokens
        gc.collect()
        result.receive()
        assert eventually(lambda: watched() is None)


def test_graphs_keep_their_arrays():
    with alone() as buffer:
        tokens = x(5).view(Watched)
        watched = weakref.ref(tokens)
        graph = buffer.record(
            lambda: buffer.dispatch(tokens, INDICES, asynchronous=True, sizing=Sizing.WORST_CASE)
        )
        result = graph.result
        del tokens
        gc.collect()
        for _ in range(3):
            graph.launch().wait()
            assert watched() is not None
        assert (result.rows.numpy() == 5).all()
        del result
        graph.close()
        assert eventually(lambda: watched() is None)


def test_what_is_returned_is_released():
    """Arena memory is given back with the last array that was made from it: more results than there is memory for."""
    with alone(arena_byte_count_max=1, result_count=2) as buffer:
        for way in (
            lambda result: result.rows.numpy(),
            lambda result: np.from_dlpack(result.rows),
            lambda result: np.asarray(result.rows),
            lambda result: memoryview(result.rows.numpy()),
        ):
            for value in range(50):
                result = buffer.dispatch(x(value), INDICES)
                kept = way(result)
                watched = weakref.ref(result)
                del result
                assert watched() is None
                assert (np.asarray(kept)[:TOKENS] == value).all()
                del kept


def test_arrays_outlive_everything():
    def make(communicator):
        buffer = swiftep.Buffer(
            communicator,
            swiftep.Plan(2, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype="float32", combine_dtype="float32"),
            workers=1,
            timeout=20,
        )
        result = buffer.dispatch(x(7), INDICES)
        combined = buffer.combine(result.rows, result.handle)
        watched = weakref.ref(buffer)
        arrays = [
            result.rows.numpy(),
            np.from_dlpack(result.rows),
            np.asarray(result.rows),
            combined.tokens.numpy()[1:],
            result.tokens_per_source.numpy(),
        ]
        del buffer, result, combined
        assert watched() is None
        return arrays

    made = results(2, make)
    gc.collect()
    for rows, capsule, again, tokens, counts in made:
        assert rows.base is not None
        assert (rows == 7).all() and (capsule == 7).all() and (again == 7).all()
        assert set(np.unique(tokens)) <= {7, 14}
        assert counts.tolist() == [TOKENS, TOKENS]
        # Still memory that can be written, and the same.
        rows[:] = 9
        assert (capsule == 9).all() and (again == 9).all()


def test_dlpack():
    with alone() as buffer:
        for dtype, expected in ((np.float32, np.float32), ("int64", np.int64), (DType.UINT8, np.uint8)):
            tensor = buffer.make_tensor([2, 3], dtype)
            assert (tensor.ndim, tensor.size, len(tensor), tensor.device) == (2, 6, 2, "cpu")
            assert tensor.nbytes == 6 * np.dtype(expected).itemsize
            assert tensor.__dlpack_device__() == (1, 0)
            for version in VERSIONS:
                array = np.from_dlpack(Exported(tensor, version))
                assert array.dtype == expected and array.shape == (2, 3)
                assert array.ctypes.data == tensor.address
            array = np.from_dlpack(tensor)
            tensor.numpy()[1, 2] = 5
            assert array[1, 2] == 5
            assert array.flags.writeable == ((1, 0) in VERSIONS)
            # And the way in again.
            if dtype is np.float32:
                tokens = buffer.make_tensor([TOKENS, HIDDEN], dtype).numpy()
                tokens[:] = 4
                for version in VERSIONS:
                    result = buffer.dispatch(Exported(tokens, version), INDICES)
                    assert (result.rows.numpy() == 4).all()
        # A capsule that nobody takes, and one that outlives its tensor.
        for version in (None, (1, 0)):
            capsule = buffer.make_tensor([4], np.float32).__dlpack__(max_version=version)
            gc.collect()
            del capsule
        with pytest.raises(BufferError):
            tensor.__dlpack__(copy=True)
        with pytest.raises(BufferError):
            tensor.__dlpack__(dl_device=(2, 0))


class Exported:
    """Has `__dlpack__` and nothing else."""

    def __init__(self, array, version):
        self.array, self.version = array, version

    def __dlpack__(self, stream=None, max_version=None, **_):
        return self.array.__dlpack__(**({"max_version": self.version} if self.version else {}))

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Interface:
    """Has `__array_interface__` and nothing else."""

    def __init__(self, array):
        self.array = array

    @property
    def __array_interface__(self):
        return self.array.__array_interface__


def test_other_arrays():
    with alone() as buffer:
        tokens = x(6)
        for given in (Exported(tokens, None), Interface(tokens), tokens.view(Watched), buffer.make_tensor(tokens.shape, "float32")):
            if isinstance(given, swiftep.Tensor):
                given.numpy()[:] = 6
            result = buffer.dispatch(given, Interface(INDICES))
            assert (result.rows.numpy() == 6).all()
        for bad in (Interface(x()[:, ::2]), Exported(x()[:, ::2], None), Exported(x().astype(np.float64), None)):
            with pytest.raises(swiftep.InvalidArgument) as raised:
                buffer.dispatch(bad, INDICES)
            assert raised.value.argument.startswith("x")
        read_only = x()
        read_only.flags.writeable = False
        for given in [Interface(read_only)] + [Exported(read_only, version) for version in VERSIONS[1:]]:
            buffer.dispatch(given, INDICES)
            handle = buffer.dispatch(x(), INDICES).handle
            with pytest.raises(ValueError, match="read-only"):
                buffer.combine(x(), handle, output=given)


def test_bf16_and_fp8_arrays():
    with alone(dtype=DType.BF16, combine_dtype=ml_dtypes.bfloat16) as buffer:
        result = buffer.dispatch(x().astype(ml_dtypes.bfloat16), INDICES)
        assert result.rows.dtype == DType.BF16
        assert not hasattr(result.rows, "__array_interface__")
        for array in (result.rows.numpy(), np.asarray(result.rows)):
            assert array.dtype == ml_dtypes.bfloat16
            assert array.base is not None and (array == 1).all()
        assert np.asarray(result.rows, dtype=np.float32).dtype == np.float32
        for dtype in DType:
            tensor = buffer.make_tensor([4, 16], dtype)
            assert tensor.numpy().shape == (4, 16)
            assert tensor.numpy().dtype == dtype.numpy
            assert not tensor.numpy().view(np.uint8).any()
            assert DType.of(dtype.numpy) == (DType.UINT8 if dtype == DType.FP4_E2M1_X2 else dtype)
            tensor.__dlpack__(max_version=(1, 0))
        assert buffer.make_tensor([0, 3], "float32").numpy().shape == (0, 3)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ten_thousand_calls_leak_nothing(asynchronous):
    options = {"asynchronous": True, "sizing": Sizing.WORST_CASE} if asynchronous else {}
    weights = np.ones((TOKENS, TOP_K), np.float32)
    with alone() as buffer:

        def calls(count):
            for index in range(count):
                result = buffer.dispatch(x(), INDICES, weights, **options)
                combined = buffer.combine(result.rows, result.handle, asynchronous=asynchronous)
                combined.event.wait()
                np.from_dlpack(combined.tokens)
                result.origins.numpy()
                if index % 10 == 0:
                    with pytest.raises(swiftep.InvalidArgument):
                        buffer.dispatch(x().astype(np.int64), INDICES, **options)

        calls(1000)
        gc.collect()
        resident, arena, objects = resident_bytes(), buffer.arena_byte_count, len(gc.get_objects())
        calls(10_000)
        gc.collect()
        assert buffer.arena_byte_count == arena
        assert eventually(lambda: not _keeping._kept)
        assert len(gc.get_objects()) < objects + 500
        assert resident_bytes() < resident + (4 << 20)


def test_many_threads_on_one_buffer():
    with alone(result_count=16) as buffer:

        def work(value):
            for _ in range(200):
                result = buffer.dispatch(x(value), INDICES, asynchronous=True, sizing=Sizing.WORST_CASE)
                result.event.wait()
                assert (result.rows.numpy() == value).all()

        threads = [threading.Thread(target=work, args=[value]) for value in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert eventually(lambda: not _keeping._kept)


def test_interpreter_ends_with_calls_under_way():
    """Nothing is called in an interpreter that has ended, whatever is left behind."""
    program = """
import numpy as np, swiftep
[communicator] = swiftep.Communicator.threads(1)
buffer = swiftep.Buffer(communicator, swiftep.Plan(1, 4, 32, 2, 4, result_count=4), workers=1, timeout=0.5)
kept = [buffer.dispatch(np.ones((4, 32), np.float32), np.array([[0, 1]] * 4), asynchronous=True, sizing=1)
        for _ in range(20)]
kept.append(kept)
rows = kept[0].rows.numpy()
held = buffer.dispatch(np.ones((4, 32), np.float32), np.array([[0, 1]] * 4), asynchronous=True, sizing=1,
                       after=[swiftep.Event()])
print("end")
"""
    for _ in range(3):
        environment = {**os.environ, "SWIFTEP_FLIGHT_RECORDER": "off"}
        run = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment
        )
        assert (run.returncode, run.stdout, run.stderr) == (0, "end\n", "")


def test_without_numpy():
    program = """
import sys
sys.modules["numpy"] = None
import swiftep
[communicator] = swiftep.Communicator.threads(1)
buffer = swiftep.Buffer(communicator, swiftep.Plan(1, 4, 32, 2, 4, dtype="float32"))
x = buffer.make_tensor([4, 32], "float32")
indices = buffer.make_tensor([4, 1], swiftep.DType.INT64)
print(buffer.dispatch(x, indices).rows)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (run.stdout, run.stderr) == ("<swiftep.Tensor FP32 [4, 32] on cpu>\n", "")


def test_two_ranks_do_not_hold_each_other_up():
    """Calls let go of the interpreter's lock: ranks that are threads meet each other."""

    def body(buffer):
        for _ in range(100):
            result = buffer.dispatch(x(), INDICES)
            buffer.combine(result.rows, result.handle)

    plan = swiftep.Plan(2, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype="float32", combine_dtype="float32", result_count=2)
    on_buffers(plan, 2, body)


@pytest.mark.parametrize("layout", (swiftep.Layout.BY_SOURCE, swiftep.Layout.BY_EXPERT))
def test_rows_of_the_callers_number(layout):
    """More and fewer than the plan has."""
    plan = swiftep.Plan(
        2, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype="float32", combine_dtype="float32", received_tokens_max=6, result_count=2
    )

    def body(buffer):
        given = x(1 + buffer.rank) * np.arange(1, TOKENS + 1, dtype=np.float32)[:, None]
        wanted = buffer.dispatch(given, INDICES, layout=layout)
        count = wanted.rows.shape[0]
        for rows_max in (count, count + 7, 100 * count):
            rows_max += 3 * buffer.rank
            options = {"layout": layout, "sizing": Sizing.WORST_CASE, "rows_max": rows_max}
            found = buffer.dispatch(given, INDICES, **options)
            rows, origins = found.rows.numpy(), found.origins.numpy()
            assert len(rows) == len(origins) == rows_max
            assert np.array_equal(rows[:count], wanted.rows.numpy()) and np.all(origins[count:] == -1)
            again = buffer.dispatch(2 * given, handle=found.handle, sizing=Sizing.WORST_CASE).rows.numpy()
            assert len(again) == rows_max and np.array_equal(again[:count], 2 * rows[:count])
            copies = 2 if layout == swiftep.Layout.BY_EXPERT else 1 + (INDICES[:, :1] // 2 != INDICES[:, 1:] // 2)
            assert np.array_equal(buffer.combine(rows.copy(), found.handle).tokens.numpy(), copies * given)
            with pytest.raises(swiftep.OutOfMemory):
                buffer.dispatch(given, INDICES, **{**options, "rows_max": count - 1})
        return count

    assert all(on_buffers(plan, 2, body))


def test_arena_memory_that_the_caller_divides_is_combined_in_place():
    plan = swiftep.Plan(
        2, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype="float32", combine_dtype="float32", arena_byte_count_max=1
    )

    def body(buffer):
        received = buffer.dispatch(x(), INDICES)
        assert buffer.worst_case_row_shape(swiftep.Layout.BY_SOURCE, TOP_K) == (8,) == received.rows.shape[:1]
        assert buffer.worst_case_row_shape(swiftep.Layout.GROUPED, TOP_K) == (2, 8)
        assert buffer.local_expert_count == 2
        held = [buffer.make_arena_tensor((9 * HIDDEN,), "float32")]
        # An arena that cannot grow, to its last byte.
        with pytest.raises(swiftep.OutOfMemory):
            while True:
                held.append(buffer.make_arena_tensor((1,), "uint8"))
        rows = held[0].numpy()[HIDDEN:].reshape(8, HIDDEN)
        rows[:] = 3
        output = np.zeros((TOKENS, HIDDEN), np.float32)
        buffer.combine(rows, received.handle, output=output)
        assert (output == 6).all()
        with pytest.raises(swiftep.OutOfMemory):
            buffer.combine(rows.copy(), received.handle, output=output)
        return buffer

    for buffer in on_buffers(plan, 2, body):
        with pytest.raises(swiftep.BufferClosed):
            buffer.make_arena_tensor((0,), "uint8")
