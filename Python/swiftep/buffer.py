"""One rank's end of an expert-parallel group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Callable, Optional

from . import _keeping, _streams, graphs, tensors
from ._arguments import Element, count_or_refused, int32, read, set_argument
from ._native_types import (
    ARGUMENTS,
    COMBINE_CALL,
    DISPATCH_CALL,
    ERROR_OUT,
    EVENTS,
    INT64S,
    TENSORS,
    ffi,
    lib,
    new,
)
from ._timeouts import nanoseconds
from .combine import CombineResult
from .communicator import Communicator
from .dispatch import DispatchResult, Handle, ScaleOrder, Sizing, Waiting
from .dtypes import DType
from .errors import InvalidArgument, check, taken
from .events import Event
from .graphs import Graph
from .plan import Encoding, Layout, Plan, Scales
from .tensors import Tensor

_dispatch = lib.swiftep_py_dispatch
_combine = lib.swiftep_py_combine


class Buffer:
    """Dispatches tokens to the ranks of their experts, and combines what comes back.

    Dispatches and combines are collective: all ranks call the same ones in the same order, each from a thread or process of
    its own. A call that one rank makes with arguments that cannot be used raises the same on all ranks, and they can go on.
    Calls on one buffer may come from any thread; they run one at a time.

    Arrays are given as they are, of any library that has `__dlpack__`, `__array_interface__` or `__cuda_array_interface__`:
    dense, row-major, in memory that the buffer reaches. What is no array at all raises a TypeError on this rank alone, before
    the others are told anything.

    Args:
        communicator: the group; its rank count is the plan's.
        plan: what to hold, the same on all ranks. Its memory is taken at once.
        workers: threads, or multiprocessors, that one call can use; None: this rank's share of the cores, or of half of the
            GPU.
        device: what operations run on, "cpu", "cuda" or "cuda:INDEX".
        timeout: how long a rank is waited for before it is missing, in seconds; None: 100.

    Raises:
        InvalidArgument, RanksDisagree, OutOfMemory, RankMissing, SystemCallError, DriverError, MachineUnavailable: the same on
        all ranks.
    """

    __slots__ = ("_c", "__weakref__")

    def __init__(
        self,
        communicator: Communicator,
        plan: Plan,
        *,
        workers: Optional[int] = None,
        device: str = "cpu",
        timeout: Optional[float] = None,
    ) -> None:
        options = new("swiftep_buffer_options *")
        options.size = ffi.sizeof(options[0])
        if workers is not None:
            options.workers = count_or_refused(workers)
        options.device_type, options.device_index = _device(device)
        options.timeout = nanoseconds(timeout)
        made, error = new("swiftep_buffer **"), new(ERROR_OUT)
        check(lib.swiftep_buffer_create(communicator._open, plan._c, options, made, error), error)
        self._c = ffi.gc(made[0], lib.swiftep_buffer_free)

    def close(self) -> None:
        """Ends the buffer after what was queued has finished. Results stay readable. Not collective, but for when this rank
        has made its last call: ranks that call on find it missing."""
        lib.swiftep_buffer_close(self._c)
        _keeping.drain()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    # Operations

    def dispatch(
        self,
        x: Any,
        indices: Any = None,
        weights: Any = None,
        *,
        table: Any = None,
        handle: Optional[Handle] = None,
        scales: Any = None,
        sidecars: Sequence[Any] = (),
        layout: Layout = Layout.BY_SOURCE,
        expert_alignment: int = 1,
        zeroes_padding: bool = False,
        sizing: Sizing = Sizing.EXACT,
        rows_max: Optional[int] = None,
        quantization: Scales = Scales.NONE,
        global_scale: Optional[float] = None,
        scale_order: ScaleOrder = ScaleOrder.ROW_MAJOR,
        workers: Optional[int] = None,
        waiting: Waiting = Waiting.WORKERS,
        expert_statistics: Any = None,
        wait_statistics: Any = None,
        receives_later: bool = False,
        asynchronous: bool = False,
        after: Iterable[Event] = (),
        stream: Any = None,
        _keeps: bool = True,
    ) -> DispatchResult:
        """Sends each token to the ranks of its experts, once a rank (by expert: once an expert). Collective.

        Received rows are in the same order in every run. One of `indices`, `table` and `handle` says where tokens go.

        Args:
            x: `[tokens, hidden]`, in rows of a multiple of 16 bytes: bf16, fp16, fp32, fp8 E4M3 or, opaque, uint8.
            indices: experts of each token, int32 or int64 `[tokens, top_k]`, -1 for none, none twice in a token.
            weights: fp32 `[tokens, top_k]`.
            table: uint8 or bool `[tokens, ranks]`: not zero where a token goes to a rank.
            handle: as an earlier dispatch of this buffer, with its layout and alignment.
            scales: of fp8 rows: fp32 `[tokens, ceil(hidden / 128)]` or, packed UE8M0, int32 `[tokens, ceil(hidden / 512)]`; of
                strides of 1 and at least `tokens` as well, that is in columns.
            sidecars: up to three arrays `[tokens, ...]` that travel with the rows, in rows of a multiple of 4 bytes.
            layout: how received rows are ordered.
            expert_alignment: by expert: each group of rows begins at a multiple of this.
            zeroes_padding: by expert: rows between groups are zero bytes.
            sizing: how large the result is. Grouped rows, and those of buffers with masks, are of worst-case size in any case.
            rows_max: by source and by expert, of worst-case size: rows of the result, whatever the plan says; None: as many as
                the plan does. Where more arrive on any rank, all raise `OutOfMemory`.
            quantization: bf16 rows arrive as FP8 with scales in this format, or as NVFP4.
            global_scale: of NVFP4 rows; None: 1.
            scale_order: of grouped rows that are quantized on the way.
            workers: used where there is that much to do; None: all that the buffer has.
            waiting: what waits for the peers.
            expert_statistics: int32 `[local experts]`, to which the tokens of each are added.
            wait_statistics: int64 `[ranks]`, to which the nanoseconds are added that each was waited for.
            receives_later: the call only sends, and the result's `receive` does the rest. Of worst-case size only.
            asynchronous: the call returns while rows still travel. It keeps its arrays until the result's event is complete;
                they are not to be changed before.
            after: events that what is given is ready after.
            stream: a CUDA stream on the buffer's GPU, as an integer (0: the default stream) or an object of torch's, CuPy's or
                cuda.core's: the operation comes behind what is queued there, and what is queued there later behind the operation.

        Raises:
            InvalidArgument, RanksDisagree, OutOfMemory: the same on all ranks, which can go on. An array that is to be
                written, and is read-only, is a ValueError here, and its cause an InvalidArgument on all ranks.
            RankMissing: the same on all ranks that are left; the buffer is lost.
            RankMasked, BufferLost, BufferClosed, DriverError.
            TypeError: an argument is no array, handle, event or stream.
        """
        call = new(DISPATCH_CALL)
        held: list[Any] = []
        x_capsule, x_dtype = read(call, "x", x, held)
        indices_capsule = indices_dtype = weights_capsule = weights_dtype = 0
        if indices is not None:
            indices_capsule, indices_dtype = read(call, "indices", indices, held)
        if weights is not None:
            weights_capsule, weights_dtype = read(call, "weights", weights, held)
        if table is not None:
            set_argument(call, "table", table, held)
        options = call.options
        if handle is not None:
            options.handle = _handle(handle)
        if scales is not None:
            set_argument(call, "scales", scales, held)
        if sidecars:
            call.sidecars, call.sidecar_tensors = _read_each(sidecars, held)
            options.sidecar_count = len(sidecars)
        if layout:
            options.layout = int32(layout)
        if expert_alignment != 1:
            options.expert_alignment = count_or_refused(expert_alignment)
        if zeroes_padding:
            options.zeroes_padding = 1
        if sizing:
            options.sizing = int32(sizing)
        if rows_max is not None:
            options.rows_max = count_or_refused(rows_max)
        if quantization:
            options.quantization = int32(quantization)
        if global_scale is not None:
            # The library reads 0 as 1: it is to refuse it.
            options.global_scale = global_scale or -1
        if scale_order:
            options.scale_order = int32(scale_order)
        if expert_statistics is not None:
            set_argument(call, "expert_statistics", expert_statistics, held)
        if workers is not None or waiting or wait_statistics is not None or after or stream is not None:
            _set_common(call, workers, waiting, wait_statistics, after, stream, held)
        returns_early = receives_later or asynchronous
        if returns_early:
            options.receives_later = bool(receives_later)
            options.is_asynchronous = bool(asynchronous)
        # Not of those who order what they do with the memory by the stream.
        keeps = returns_early and _keeps
        if keeps:
            call.owner = owner = _keeping.keep(
                (x, indices, weights, table, scales, sidecars, expert_statistics, wait_statistics, held)
            )
        try:
            code = _dispatch(
                self._c,
                call,
                x_capsule,
                x_dtype,
                indices_capsule,
                indices_dtype,
                weights_capsule,
                weights_dtype,
            )
        finally:
            if keeps:
                _keeping.end_use(owner)
        if code:
            raise _failure(code, call, ("expert_statistics", "wait_statistics"))
        return DispatchResult._owning(call, len(sidecars))

    def combine(
        self,
        rows: Any,
        handle: Handle,
        *,
        row_weights: Any = None,
        top_k_weights: Any = None,
        biases: Sequence[Any] = (),
        output: Any = None,
        encoding: Encoding = Encoding.NONE,
        workers: Optional[int] = None,
        waiting: Waiting = Waiting.WORKERS,
        wait_statistics: Any = None,
        receives_later: bool = False,
        asynchronous: bool = False,
        after: Iterable[Event] = (),
        stream: Any = None,
        _keeps: bool = True,
    ) -> CombineResult:
        """Brings rows back to their tokens' owners and sums them in Float, rounded once: the inverse, and the gradient, of the
        dispatch that made `handle`. Collective.

        Args:
            rows: `[rows, hidden]`, grouped `[local experts, rows of a group, hidden]`: bf16, fp16 or fp32, as many as the
                dispatch returned. In memory of the buffer's (what a dispatch returned, or `combine_input`), nothing is copied.
            handle: of a dispatch of this buffer, any number of times.
            row_weights: by expert and grouped: fp32 `[tokens, top_k]`, this rank's own, multiplied into its experts' rows; those
                of weight 0 are not read.
            top_k_weights: fp32 `[rows, top_k]`, by expert `[rows, 1]`: brought back to the tokens' owners and summed.
            biases: up to two arrays `[tokens, hidden]` in the rows' dtype, added last.
            output: where to put the sums, `[tokens, hidden]` in the rows' dtype; None: memory that the result owns.
            encoding: how rows travel, the same on all ranks.
            workers, waiting, wait_statistics, asynchronous, after, stream: see `dispatch`.
            receives_later: the call only tells the peers that the rows are ready; the result's `receive`, which is
                collective, does the rest.

        Raises:
            As `dispatch`.
        """
        call = new(COMBINE_CALL)
        options = call.options
        held: list[Any] = []
        rows_capsule, rows_dtype = read(call, "rows", rows, held)
        options.handle = _handle(handle)
        if row_weights is not None:
            set_argument(call, "row_weights", row_weights, held)
        if top_k_weights is not None:
            set_argument(call, "top_k_weights", top_k_weights, held)
        if biases:
            call.biases, call.bias_tensors = _read_each(biases, held)
            options.bias_count = len(biases)
        if output is not None:
            set_argument(call, "output", output, held)
        if workers is not None or waiting or wait_statistics is not None or after or stream is not None:
            _set_common(call, workers, waiting, wait_statistics, after, stream, held)
        if encoding:
            options.encoding = int32(encoding)
        returns_early = receives_later or asynchronous
        if returns_early:
            options.receives_later = bool(receives_later)
            options.is_asynchronous = bool(asynchronous)
        # Not of those who order what they do with the memory by the stream.
        keeps = returns_early and _keeps
        if keeps:
            call.owner = owner = _keeping.keep(
                (rows, row_weights, top_k_weights, biases, output, wait_statistics, held)
            )
        try:
            code = _combine(self._c, call, rows_capsule, rows_dtype)
        finally:
            if keeps:
                _keeping.end_use(owner)
        if code:
            raise _failure(code, call, ("output", "wait_statistics"))
        return CombineResult._owning(call, output)

    def combine_input(self, handle: Handle, hidden: int, dtype: Any = DType.BF16) -> Tensor:
        """A tensor for `combine`'s rows that lies where peers read it, so that nothing is copied. Not collective.

        Returns:
            `[rows, hidden]`, grouped `[local experts, rows of a group, hidden]`, with whatever lay there before.

        Raises:
            OutOfMemory, InvalidArgument, BufferClosed.
        """
        filled, error = tensors.empty(), new(ERROR_OUT)
        check(
            lib.swiftep_combine_input(self._c, _handle(handle), int32(hidden), DType.of(dtype), filled, error), error
        )
        return tensors.owned(filled)

    def make_tensor(self, shape: Sequence[int], dtype: Any) -> Tensor:
        """A new tensor of zeros that calls of this buffer can be given. Not collective.

        Raises:
            InvalidArgument, OutOfMemory, SystemCallError, DriverError; TypeError where `dtype` is none of SwiftEP's.
        """
        filled, error = tensors.empty(), new(ERROR_OUT)
        sizes = new(INT64S, list(shape))
        check(
            lib.swiftep_buffer_make_tensor(self._c, DType.of(dtype), len(sizes), sizes, filled, error), error
        )
        return tensors.owned(filled)

    def make_arena_tensor(self, shape: Sequence[int], dtype: Any) -> Tensor:
        """A tensor in the arena, for what `combine` is to read where it lies: memory that the caller divides, and that the
        plan does not count. Not collective.

        Returns:
            `shape`, with whatever lay there before.

        Raises:
            As `make_tensor`; OutOfMemory where the arena can hold no more.
        """
        filled, error = tensors.empty(), new(ERROR_OUT)
        sizes = new(INT64S, list(shape))
        check(
            lib.swiftep_buffer_make_arena_tensor(self._c, DType.of(dtype), len(sizes), sizes, filled, error), error
        )
        return tensors.owned(filled)

    def record(self, body: Callable[[], Any]) -> Graph:
        """Records what `body` calls on this buffer, instead of running it. Not collective.

        Calls are asynchronous, dispatches of worst-case size. Nothing else calls the buffer meanwhile, and where ranks are
        threads, none launches before all have recorded.

        Returns:
            The graph; its `result` is what `body` has returned, which holds nothing before the first launch has run.

        Raises:
            What `body` raises; InvalidArgument where it records nothing, or what cannot be recorded; OutOfMemory, DriverError.
        """
        return graphs.record(self._c, body)

    # Masks

    @property
    def masked_ranks(self) -> list[int]:
        """The ranks that this one goes on without, in order."""
        ranks, error = new("uint64_t *"), new(ERROR_OUT)
        check(lib.swiftep_buffer_masked_ranks(self._c, ranks, error), error)
        return [rank for rank in range(64) if ranks[0] >> rank & 1]

    def mask(self, ranks: Iterable[int]) -> None:
        """Goes on without these ranks too. Not collective: the others learn it in the next call.

        Raises:
            InvalidArgument: the plan has no masks, or a rank is the caller's own or does not exist.
        """
        error = new(ERROR_OUT)
        check(lib.swiftep_buffer_mask(self._c, self._bits(ranks), error), error)

    def unmask(self, ranks: Iterable[int]) -> None:
        """Takes masked ranks back. Collective for all that are not masked, and those that return.

        Raises:
            InvalidArgument: as `mask`, or where results are to be received.
            RankMissing: step "regrouping"; the mask stays as it was, and the call can be made again, by all.
            BufferLost, BufferClosed, DriverError.
        """
        error = new(ERROR_OUT)
        check(lib.swiftep_buffer_unmask(self._c, self._bits(ranks), error), error)

    def _bits(self, ranks: Iterable[int]) -> int:
        bits = 0
        for rank in ranks:
            if not 0 <= rank < 64:
                raise InvalidArgument(
                    f"ranks of rank {self.rank}: expected ranks of 0..<{self.rank_count}, found {rank}",
                    code=lib.SWIFTEP_INVALID_ARGUMENT,
                    rank=self.rank,
                    argument="ranks",
                    expected=f"ranks of 0..<{self.rank_count}",
                    found=str(rank),
                )
            bits |= 1 << rank
        return bits

    # What it is

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""
        return int(lib.swiftep_buffer_rank(self._c))

    @property
    def rank_count(self) -> int:
        """How many ranks there are."""
        return int(lib.swiftep_buffer_rank_count(self._c))

    @property
    def worker_count_max(self) -> int:
        """Workers that one call can use."""
        return int(lib.swiftep_buffer_worker_count_max(self._c))

    @property
    def local_expert_count(self) -> int:
        """Experts that this rank holds."""
        return int(lib.swiftep_buffer_local_expert_count(self._c))

    def worst_case_row_shape(self, layout: Layout, top_k: int, expert_alignment: int = 1) -> tuple[int, ...]:
        """The sizes before the last of what a dispatch of worst-case size returns here: `[rows]`, grouped `[local experts, rows
        of a group]`."""
        count = int(
            lib.swiftep_buffer_worst_case_row_count(self._c, int32(layout), int32(top_k), int32(expert_alignment))
        )
        return (self.local_expert_count, count) if layout == Layout.GROUPED else (count,)

    @property
    def arena_byte_count(self) -> int:
        """Bytes of this rank's arena now: the plan's, or more where routing made it grow."""
        return int(lib.swiftep_buffer_arena_byte_count(self._c))

    def flight_record(self) -> str:
        """What this rank's operations did lately and do now."""
        text, error = new("char **"), new(ERROR_OUT)
        check(lib.swiftep_buffer_flight_record(self._c, text, error), error)
        try:
            return str(ffi.string(text[0]).decode())
        finally:
            lib.swiftep_text_free(text[0])

    def __repr__(self) -> str:
        return f"<swiftep.Buffer of rank {self.rank} of {self.rank_count}>"


def _device(device: str) -> tuple[int, int]:
    kind, _, index = device.partition(":")
    if kind == "cpu" and not index:
        return lib.SWIFTEP_CPU, 0
    if kind == "cuda" and (not index or index.isdecimal()):
        return lib.SWIFTEP_CUDA, int32(int(index or 0))
    raise ValueError(f'device: expected "cpu", "cuda" or "cuda:INDEX", found {device!r}')


def _handle(handle: Any) -> Any:
    if not isinstance(handle, Handle):
        raise TypeError(f"expected a Handle, found {type(handle).__name__}")
    return handle._c


def _read_each(given: Sequence[Any], held: list[Any]) -> tuple[Any, Any]:
    """The arguments, and the tensors that the library is given of them."""
    arguments, pointers = new(ARGUMENTS, len(given)), new(TENSORS, len(given))
    held += (arguments, pointers)
    for index, element in enumerate(given):
        set_argument(Element(arguments[index]), "element", element, held)
    return arguments, pointers


def _set_common(
    call: Any,
    workers: Optional[int],
    waiting: Waiting,
    wait_statistics: Any,
    after: Iterable[Event],
    stream: Any,
    held: list[Any],
) -> None:
    """What dispatches and combines have in common, most of which is mostly not given."""
    options = call.options
    if workers is not None:
        options.workers = count_or_refused(workers)
    if waiting:
        options.waiting = int32(waiting)
    if wait_statistics is not None:
        set_argument(call, "wait_statistics", wait_statistics, held)
    if after:
        events = list(after)
        for event in events:
            if not isinstance(event, Event):
                raise TypeError(f"expected an Event, found {type(event).__name__}")
        pointers = new(EVENTS, [event._c for event in events])
        held += (events, pointers)
        options.after = pointers
        options.after_count = len(events)
    if stream is not None:
        options.uses_stream = 1
        options.stream = _streams.pointer(stream)


def _failure(code: int, call: Any, written: tuple[str, ...]) -> Exception:
    """What a call has failed with, or why it was made so that it had to."""
    error = taken(code, call.error)
    if isinstance(error, InvalidArgument):
        for name in written:
            if getattr(call, name).is_read_only:
                refusal = ValueError(f"{name}: expected an array that can be written to, found one that is read-only")
                refusal.__cause__ = error
                return refusal
    return error

