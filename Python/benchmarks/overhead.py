"""What the Python layer adds to a call: the package's calls against the same calls of the C library with prepared structs.

One rank, tiny tensors, so that the library itself takes as little as it can. Both take turns; medians in microseconds.

    python Python/benchmarks/overhead.py [--calls N] [--check LIMIT]

`--check` fails where a dispatch with x, indices and weights, and reading `rows`, takes longer than that many microseconds more.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time

import numpy

import swiftep
from swiftep._native import ffi, lib


class Prepared:
    """A dispatch and a combine whose structs are filled once."""

    def __init__(self, buffer: swiftep.Buffer, x, indices, weights) -> None:
        self.buffer = buffer._c
        self.held = []
        self.dispatch_options = ffi.new("swiftep_dispatch_options *")
        self.dispatch_options.size = ffi.sizeof("swiftep_dispatch_options")
        self.dispatch_options.x = self.tensor(x, lib.SWIFTEP_FP32)
        self.dispatch_options.indices = self.tensor(indices, lib.SWIFTEP_INT64)
        self.dispatch_options.weights = self.tensor(weights, lib.SWIFTEP_FP32)
        self.combine_options = ffi.new("swiftep_combine_options *")
        self.combine_options.size = ffi.sizeof("swiftep_combine_options")
        self.dispatched = ffi.new("swiftep_dispatch_result **")
        self.combined = ffi.new("swiftep_combine_result **")
        self.error = ffi.new("swiftep_error **")
        self.rows = self.empty()
        self.tokens = self.empty()
        self.combine_options.rows = self.rows

    def empty(self):
        tensor = ffi.new("swiftep_tensor *")
        tensor.size = ffi.sizeof("swiftep_tensor")
        self.held.append(tensor)
        return tensor

    def tensor(self, array, dtype):
        tensor = self.empty()
        shape = ffi.new("int64_t[]", array.shape)
        tensor.data = ffi.cast("void *", array.ctypes.data)
        tensor.dtype = dtype
        tensor.dimension_count = array.ndim
        tensor.shape = shape
        self.held += (array, shape)
        return tensor

    def dispatch(self):
        if lib.swiftep_dispatch(self.buffer, self.dispatch_options, self.dispatched, self.error):
            raise RuntimeError
        lib.swiftep_dispatch_result_tensor(self.dispatched[0], lib.SWIFTEP_ROWS, self.rows)

    def combine(self):
        handle = lib.swiftep_dispatch_result_handle(self.dispatched[0])
        self.combine_options.handle = handle
        if lib.swiftep_combine(self.buffer, self.combine_options, self.combined, self.error):
            raise RuntimeError
        lib.swiftep_combine_result_tensor(self.combined[0], lib.SWIFTEP_TOKENS, self.tokens)
        lib.swiftep_handle_free(handle)

    def release(self):
        lib.swiftep_tensor_release(self.rows)
        lib.swiftep_tensor_release(self.tokens)
        lib.swiftep_combine_result_free(self.combined[0])
        lib.swiftep_dispatch_result_free(self.dispatched[0])


class Packaged:
    """The same through the package."""

    def __init__(self, buffer: swiftep.Buffer, x, indices, weights) -> None:
        self.buffer = buffer
        self.arguments = (x, indices, weights)

    def dispatch(self):
        x, indices, weights = self.arguments
        self.dispatched = self.buffer.dispatch(x, indices, weights)
        self.rows = self.dispatched.rows

    def combine(self):
        self.combined = self.buffer.combine(self.rows, self.dispatched.handle)
        self.tokens = self.combined.tokens

    def release(self):
        self.dispatched = self.rows = self.combined = self.tokens = None


def measure(ways, call_count):
    """Nanoseconds of each step of each way, in turns."""
    times = {(way, step): [] for way in ways for step in ("dispatch", "combine", "release")}
    clock = time.perf_counter_ns
    for _ in range(call_count):
        for way in ways:
            begin = clock()
            way.dispatch()
            dispatched = clock()
            way.combine()
            combined = clock()
            way.release()
            end = clock()
            times[way, "dispatch"].append(dispatched - begin)
            times[way, "combine"].append(combined - dispatched)
            times[way, "release"].append(end - combined)
    return {key: statistics.median(values) / 1000 for key, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--check", type=float, metavar="LIMIT")
    options = parser.parse_args()

    [communicator] = swiftep.Communicator.threads(1)
    plan = swiftep.Plan(1, 4, 32, 2, 4, dtype="float32", combine_dtype="float32", result_count=4)
    x = numpy.ones((4, 32), numpy.float32)
    indices = numpy.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    weights = numpy.ones((4, 2), numpy.float32)
    with swiftep.Buffer(communicator, plan, workers=1) as buffer:
        ways = Prepared(buffer, x, indices, weights), Packaged(buffer, x, indices, weights)
        measure(ways, options.calls // 10)
        medians = measure(ways, options.calls)
    prepared, packaged = ways
    print(f"Python {platform.python_version()}, swiftep {swiftep.__version__}, {options.calls} calls, medians in us")
    print(f"{'':30}{'C':>8}{'Python':>8}{'added':>8}")
    names = {"dispatch": "dispatch, rows", "combine": "handle, combine, tokens", "release": "release of all"}
    added = {}
    for step, name in names.items():
        added[step] = medians[packaged, step] - medians[prepared, step]
        print(f"{name:30}{medians[prepared, step]:8.2f}{medians[packaged, step]:8.2f}{added[step]:8.2f}")
    if options.check is not None and added["dispatch"] > options.check:
        print(f"a dispatch takes {added['dispatch']:.2f} us more, expected at most {options.check}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
