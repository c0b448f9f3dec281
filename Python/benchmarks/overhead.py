"""What the Python layer adds to a call: the package's calls against the same calls of the C library with prepared structs.

One rank, tiny tensors, so that the library itself takes as little as it can. They take turns; medians in microseconds. With
`--torch`, `swiftep.torch` is a third way; with `--device cuda`, which needs PyTorch, calls are asynchronous, of worst-case size
and on a stream, and what is measured is the time until they return.

    python Python/benchmarks/overhead.py [--calls N] [--device cpu|cuda] [--torch] [--check LIMIT]

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

    name = "C"

    def __init__(self, buffer: swiftep.Buffer, x, indices, weights, stream) -> None:
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
        if stream is not None:
            self.dispatch_options.sizing = lib.SWIFTEP_WORST_CASE
            for options in (self.dispatch_options, self.combine_options):
                options.uses_stream = options.is_asynchronous = 1
                options.stream = ffi.cast("void *", stream)

    def empty(self):
        tensor = ffi.new("swiftep_tensor *")
        tensor.size = ffi.sizeof("swiftep_tensor")
        self.held.append(tensor)
        return tensor

    def tensor(self, array, dtype):
        tensor = self.empty()
        shape = ffi.new("int64_t[]", array.shape)
        if isinstance(array, numpy.ndarray):
            tensor.data = ffi.cast("void *", array.ctypes.data)
        else:
            tensor.data = ffi.cast("void *", array.data_ptr())
            tensor.device_type = lib.SWIFTEP_CUDA if array.is_cuda else lib.SWIFTEP_CPU
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

    name = "Python"

    def __init__(self, buffer: swiftep.Buffer, x, indices, weights, stream) -> None:
        self.buffer = buffer
        self.arguments = (x, indices, weights)
        self.combine_options = {} if stream is None else {"asynchronous": True, "stream": stream}
        self.dispatch_options = dict(self.combine_options)
        if stream is not None:
            self.dispatch_options["sizing"] = swiftep.Sizing.WORST_CASE

    def dispatch(self):
        x, indices, weights = self.arguments
        self.dispatched = self.buffer.dispatch(x, indices, weights, **self.dispatch_options)
        self.rows = self.dispatched.rows

    def combine(self):
        self.combined = self.buffer.combine(self.rows, self.dispatched.handle, **self.combine_options)
        self.tokens = self.combined.tokens

    def release(self):
        self.dispatched = self.rows = self.combined = self.tokens = None


class Torch:
    """The same through `swiftep.torch`, without gradients."""

    name = "PyTorch"

    def __init__(self, buffer, x, indices, weights) -> None:
        self.buffer = buffer
        self.arguments = (x, indices, weights)
        is_on_gpu = buffer.device.type == "cuda"
        self.sizing = swiftep.Sizing.WORST_CASE if is_on_gpu else swiftep.Sizing.EXACT

    def dispatch(self):
        x, indices, weights = self.arguments
        self.dispatched = self.buffer.dispatch(x, indices, weights, sizing=self.sizing)
        self.rows = self.dispatched.rows

    def combine(self):
        self.tokens = self.buffer.combine(self.rows, self.dispatched.handle)

    def release(self):
        self.dispatched = self.rows = self.tokens = None


def measure(ways, call_count, synchronize):
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
            synchronize()
    return {key: statistics.median(values) / 1000 for key, values in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--check", type=float, metavar="LIMIT")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--torch", action="store_true")
    options = parser.parse_args()

    [communicator] = swiftep.Communicator.threads(1)
    plan = swiftep.Plan(1, 4, 32, 2, 4, dtype="float32", combine_dtype="float32", result_count=4)
    x = numpy.ones((4, 32), numpy.float32)
    indices = numpy.array([[0, 1], [1, 2], [2, 3], [3, 0]])
    weights = numpy.ones((4, 2), numpy.float32)
    arguments, stream, synchronize = (x, indices, weights), None, lambda: None
    if options.torch or options.device == "cuda":
        from swiftep import torch as swiftep_torch
        import torch

        tensors = [torch.from_numpy(array).to(options.device) for array in arguments]
    if options.device == "cuda":
        arguments, stream, synchronize = tensors, torch.cuda.current_stream().cuda_stream, torch.cuda.synchronize
    with swiftep.Buffer(communicator, plan, workers=1, device=options.device) as buffer:
        ways = [Prepared(buffer, *arguments, stream), Packaged(buffer, *arguments, stream)]
        if options.torch:
            ways.append(Torch(swiftep_torch.Buffer(communicator, plan, workers=1, device=options.device), *tensors))
        measure(ways, options.calls // 10, synchronize)
        medians = measure(ways, options.calls, synchronize)
    prepared, *others = ways
    print(
        f"Python {platform.python_version()}, swiftep {swiftep.__version__}, {options.device}, {options.calls} calls, medians in us"
    )
    print(f"{'':30}{'C':>8}" + "".join(f"{way.name:>8}{'added':>8}" for way in others))
    names = {"dispatch": "dispatch, rows", "combine": "handle, combine, tokens", "release": "release of all"}
    added = {}
    for step, name in names.items():
        line = f"{name:30}{medians[prepared, step]:8.2f}"
        for way in others:
            added[way.name, step] = medians[way, step] - medians[prepared, step]
            line += f"{medians[way, step]:8.2f}{added[way.name, step]:8.2f}"
        print(line)
    if options.check is not None and added["Python", "dispatch"] > options.check:
        print(f"a dispatch takes {added['Python', 'dispatch']:.2f} us more, expected at most {options.check}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
