"""SwiftEP for PyTorch 2.4 and later, under `torch.compile` 2.11 and later.

    import swiftep, swiftep.torch

    buffer = swiftep.torch.Buffer(swiftep.torch.communicator(), plan)      # of the default process group
    received = buffer.dispatch(x, indices, weights, layout=swiftep.Layout.BY_EXPERT)
    rows = experts(received.rows, received.tokens_per_expert)
    y = buffer.combine(rows, received.handle, row_weights=weights)          # on the current stream, with gradients

Dispatch and combine are each other's gradient. They are opaque operators, which `torch.compile` leaves as they are; it does
not order them among each other, so all ranks compile the same.

On a GPU they run on PyTorch's current stream, return at once (a dispatch of exact size once it knows the counts), and can be
captured in a `torch.cuda.graph` where sizes are those of the worst case. Tensors that they return are arena memory:
`record_stream` holds for them, too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import weakref
from collections.abc import Iterator
from typing import Any, Optional, Union

import torch
import torch.distributed as dist
from torch import Tensor

from . import _native, _streams
from . import buffer as _plain
from . import dispatch as _results
from ._native_types import ERROR_OUT, NULL, lib, new
from .combine import CombineResult
from .communicator import AllGather, Communicator
from .dispatch import Sizing
from .dtypes import DType
from .errors import check
from .events import Event
from .plan import Layout, Plan, Scales
from .tensors import Tensor as _ArenaTensor

__all__ = ["Buffer", "Dispatched", "Handle", "communicator"]


def communicator(group: Optional[dist.ProcessGroup] = None, *, timeout: Optional[float] = None) -> Communicator:
    """The ranks of a process group, in its order, which are processes of one host. Collective.

    Args:
        group: of any back end that gathers uint8 tensors; None: the default one. It is used within this call only.
        timeout: how long each other process is waited for, in seconds; None: 100.

    Raises:
        InvalidArgument, RanksDisagree, RankMissing, RendezvousFailed, SystemCallError; ValueError where this process is not
        in the group; what the group's all-gather raises.
    """
    rank, rank_count = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError("group: expected one that this process is in, found another")
    return Communicator.processes(rank, rank_count, all_gather(group), timeout=timeout)


def all_gather(group: Optional[dist.ProcessGroup]) -> AllGather:
    """Of a group's ranks, all of as many bytes."""
    is_on_gpu = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_on_gpu else torch.device("cpu")

    def gather(mine: bytes) -> list[bytes]:
        ours = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
        gathered = [torch.empty_like(ours) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, ours, group=group)
        return [bytes(theirs.tolist()) for theirs in gathered]

    return gather


# Where a parameter has that name.
_of_group = communicator


class Handle:
    """What repeats a dispatch, or undoes it. Belongs to the buffer that made it.

    Attributes:
        indices: that tokens were routed by.
        token_count: tokens that this rank has dispatched.
        row_shape: `[rows]`, grouped `[local experts, rows of a group]`.
        layout: how the rows are ordered.
        expert_alignment: by expert.
        sizing: of the dispatch.
    """

    __slots__ = ("_plain", "_made_key", "indices", "token_count", "row_shape", "layout", "expert_alignment", "sizing")

    def __init__(
        self,
        plain: Optional[_results.Handle],
        key: Optional[Tensor],
        indices: Tensor,
        token_count: int,
        row_shape: list[int],
        layout: Layout,
        expert_alignment: int,
        sizing: Sizing,
    ) -> None:
        self._plain, self._made_key = plain, key
        self.indices = indices
        self.token_count = token_count
        self.row_shape = row_shape
        self.layout = layout
        self.expert_alignment = expert_alignment
        self.sizing = sizing

    @property
    def _key(self) -> Tensor:
        """int64 `[1]`, which stands for the library's handle among operators, and keeps it."""
        if self._made_key is None:
            self._made_key = _key_of(self.plain)
        return self._made_key

    @property
    def plain(self) -> _results.Handle:
        """The library's own."""
        if self._plain is None:
            self._plain = _handle(self._made_key)
        return self._plain


class Dispatched:
    """What has arrived at this rank. Tensors are arena memory, given back when the last on it is gone.

    Rows that no token fills hold anything, between groups by expert zeros. Where `[rows, ...]` is written, grouped tensors
    have `[local experts, rows of a group, ...]`.

    Attributes:
        rows: `[rows, hidden]`; its gradient goes back to `x`.
        handle: what repeats the dispatch, or undoes it.
    """

    __slots__ = ("rows", "handle", "_result", "_made")

    def __init__(
        self, rows: Tensor, handle: Handle, result: Optional[_results.DispatchResult], made: dict[str, Any]
    ) -> None:
        self.rows, self.handle = rows, handle
        self._result, self._made = result, made

    def _tensor(self, name: str) -> Any:
        if name not in self._made:
            tensor = getattr(self._result, name)
            self._made[name] = None if tensor is None else as_tensor(tensor)
        return self._made[name]

    @property
    def scales(self) -> Optional[Tensor]:
        """Of quantized rows; see `swiftep.Scales`."""
        return self._tensor("scales")

    @property
    def top_k_indices(self) -> Tensor:
        """`[rows, top_k]`, by expert and grouped `[rows, 1]`: local experts, -1 for those of other ranks."""
        return self._tensor("top_k_indices")

    @property
    def top_k_weights(self) -> Optional[Tensor]:
        """fp32, as `top_k_indices`; their gradient goes back to `weights`. None where no weights were given."""
        return self._tensor("top_k_weights")

    @property
    def origins(self) -> Tensor:
        """int32 `[rows, 2]`: source rank and token; -1 in rows that no token fills, except grouped ones."""
        return self._tensor("origins")

    @property
    def tokens_per_expert(self) -> Tensor:
        """int32 `[local experts]`: rounded up to the alignment."""
        return self._tensor("tokens_per_expert")

    @property
    def unaligned_tokens_per_expert(self) -> Tensor:
        """int32 `[local experts]`: as they are."""
        return self._tensor("unaligned_tokens_per_expert")


class Buffer:
    """A `swiftep.Buffer` whose calls take and return PyTorch's tensors. Creating it, and its calls, are collective.

    What the calls of this class have not, those of `buffer` have: they take and return the same memory
    (`torch.from_dlpack(result.rows)`), without gradients, with `stream=torch.cuda.current_stream()`.

    A peer's failure is raised on a GPU by the next call, and by `synchronize`.

    Ranks that are threads of one process can share a GPU for what has no gradients: PyTorch runs the backward of one GPU on one
    thread.

    Args:
        communicator: the group, or a process group; None: the default process group.
        plan: see `swiftep.Buffer`. A layer that is trained needs `result_count` for the results that are alive together.
        device: None: the current CUDA device where there is one.
        workers, timeout: see `swiftep.Buffer`.

    Raises:
        As `swiftep.Buffer` and `communicator`.
    """

    def __init__(
        self,
        communicator: Union[Communicator, dist.ProcessGroup, None],
        plan: Plan,
        *,
        workers: Optional[int] = None,
        device: Union[torch.device, str, None] = None,
        timeout: Optional[float] = None,
    ) -> None:
        if not isinstance(communicator, Communicator):
            communicator = _of_group(communicator, timeout=timeout)
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        if place.type == "cuda" and place.index is None:
            place = torch.device("cuda", torch.cuda.current_device())
        #: What the calls run on.
        self.device: torch.device = place
        #: The buffer itself.
        self.buffer = _plain.Buffer(
            communicator, plan, workers=workers, device=str(place), timeout=timeout
        )
        self._is_on_gpu = place.type == "cuda"
        self._last: Optional[Event] = None
        self._pool: Any = None
        self._key = next(_keys)
        _buffers[self._key] = self

    def close(self) -> None:
        """See `swiftep.Buffer.close`."""
        self._pool = None
        self.buffer.close()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def synchronize(self) -> None:
        """Returns when the last call's work is done.

        Raises:
            Error: what it has failed with.
        """
        if self._last is not None:
            self._last.wait()

    # Operations

    def dispatch(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Optional[Tensor] = None,
        *,
        layout: Layout = Layout.BY_SOURCE,
        expert_alignment: int = 1,
        sizing: Sizing = Sizing.EXACT,
        quantization: Scales = Scales.NONE,
    ) -> Dispatched:
        """Sends each token to the ranks of its experts, once a rank (by expert: once an expert).

        Args:
            x: `[tokens, hidden]`. Its gradient is summed in Float, and rounded once.
            indices: experts of each token, int32 or int64 `[tokens, top_k]`, -1 for none.
            weights: fp32 `[tokens, top_k]`.
            layout: how received rows are ordered.
            expert_alignment: by expert: each group of rows begins at a multiple of this.
            sizing: how large the result is.
            quantization: bf16 rows arrive as FP8 or NVFP4, and nothing has a gradient.

        Raises:
            As `swiftep.Buffer.dispatch`.
        """
        if quantization:
            x, weights = x.detach(), None if weights is None else weights.detach()
        result: Optional[_results.DispatchResult] = None
        if not _is_traced(x, weights):
            result = self._dispatch(x, indices, weights, layout, expert_alignment, sizing, quantization)
            rows, key, plain, made = as_tensor(result.rows), None, result.handle, {}
        else:
            plain = None
            rows, scales, top_k_indices, top_k_weights, origins, aligned, unaligned, key = _dispatch_op(
                x, indices, weights, self._key, int(layout), expert_alignment, int(sizing), int(quantization), False
            )
            made = {
                "scales": scales if quantization else None,
                "top_k_indices": top_k_indices,
                "top_k_weights": None if weights is None else top_k_weights,
                "origins": origins,
                "tokens_per_expert": aligned,
                "unaligned_tokens_per_expert": unaligned,
            }
        handle = Handle(
            plain, key, indices, x.shape[0], list(rows.shape[:-1]), layout, expert_alignment, sizing
        )
        return Dispatched(rows, handle, result, made)

    def repeat(self, x: Tensor, handle: Handle) -> Tensor:
        """Sends other rows to where a dispatch sent its own.

        Args:
            x: `[tokens, hidden]`, as many as then.
            handle: of that dispatch.

        Returns:
            `[rows, hidden]`, grouped `[local experts, rows of a group, hidden]`; zeros in rows that no token fills.

        Raises:
            As `swiftep.Buffer.dispatch`.
        """
        if not _is_traced(x):
            return self._repeat(x, handle.plain)
        return _repeat_op(x, handle._key, handle.row_shape, handle.token_count, self._key)

    def combine(
        self, rows: Tensor, handle: Handle, *, row_weights: Optional[Tensor] = None, bias: Optional[Tensor] = None
    ) -> Tensor:
        """Brings rows back to their tokens' owners and sums them, in Float, rounded once.

        Args:
            rows: `[rows, hidden]`, grouped `[local experts, rows of a group, hidden]`: bf16, fp16 or fp32. Those that no token
                fills are not read, and have a gradient of zero. In memory of the buffer's (what a dispatch returned, or
                `combine_input`), nothing is copied.
            handle: of a dispatch of this buffer.
            row_weights: by expert and grouped: fp32 `[tokens, top_k]`, this rank's own.
            bias: `[tokens, hidden]`, added last.

        Returns:
            `[tokens, hidden]`.

        Raises:
            As `swiftep.Buffer.combine`.
        """
        if not _is_traced(rows, row_weights, bias):
            return as_tensor(self._combine(rows, handle.plain, row_weights, None, bias).tokens)
        tokens, _ = _combine_op(
            rows,
            handle._key,
            handle.indices,
            row_weights,
            None,
            bias,
            handle.token_count,
            self._key,
            int(handle.layout),
            handle.expert_alignment,
            int(handle.sizing),
        )
        return tokens

    def combine_input(self, handle: Handle, hidden: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """A tensor for `combine`'s rows that lies where peers read it. Not collective.

        Returns:
            `[rows, hidden]`, grouped `[local experts, rows of a group, hidden]`, with whatever lay there before.

        Raises:
            As `swiftep.Buffer.combine_input`.
        """
        made = self.buffer.combine_input(handle.plain, hidden, DType.of(dtype))
        tensor = as_tensor(made)
        if self._is_on_gpu:
            made.note_use(torch.cuda.current_stream(self.device))
        return tensor

    @contextlib.contextmanager
    def arena_memory(self) -> Iterator[None]:
        """What this thread's PyTorch allocates on the GPU in the `with` block lies in the arena, where `combine` reads it
        without a copy: the place to compute experts' outputs. PyTorch takes it in pieces of megabytes, which the plan does not
        count and the buffer keeps (`torch.cuda.MemPool`), so that the arena grows once. On a CPU, nothing changes.

        Raises:
            BufferClosed; torch.OutOfMemoryError: an allocation, where the arena can hold no more.
        """
        if not self._is_on_gpu:
            yield
            return
        # That the buffer is closed would reach the caller as memory that there is none of.
        self.buffer.make_arena_tensor((0,), DType.UINT8)
        if self._pool is None:
            self._pool = torch.cuda.MemPool(_arena_allocator().allocator())
        lib.swiftep_py_allocate_from(self.buffer._c)
        try:
            with torch.cuda.use_mem_pool(self._pool, self.device):
                yield
        finally:
            lib.swiftep_py_allocate_from(NULL)

    # What runs

    def _dispatch(
        self,
        x: Tensor,
        indices: Tensor,
        weights: Optional[Tensor],
        layout: int,
        expert_alignment: int,
        sizing: int,
        quantization: int,
    ) -> _results.DispatchResult:
        result = self.buffer.dispatch(
            x,
            indices,
            weights,
            layout=layout,  # type: ignore[arg-type]
            expert_alignment=expert_alignment,
            zeroes_padding=layout == Layout.BY_EXPERT,
            sizing=sizing,  # type: ignore[arg-type]
            quantization=quantization,  # type: ignore[arg-type]
            **self._options(),
        )
        self._note(result)
        return result

    def _repeat(self, x: Tensor, handle: _results.Handle) -> Tensor:
        # As many rows as the first time, which the handle knows: nobody waits for counts.
        result = self.buffer.dispatch(x, handle=handle, sizing=Sizing.WORST_CASE, **self._options())
        self._note(result)
        rows = as_tensor(result.rows)
        _zero_unfilled(as_tensor(result.origins), as_tensor(result.unaligned_tokens_per_expert), rows)
        return rows

    def _combine(
        self,
        rows: Tensor,
        handle: _results.Handle,
        row_weights: Optional[Tensor],
        top_k_weights: Optional[Tensor],
        bias: Optional[Tensor],
    ) -> CombineResult:
        result = self.buffer.combine(
            rows,
            handle,
            row_weights=row_weights,
            top_k_weights=top_k_weights,
            biases=() if bias is None else (bias,),
            **self._options(),
        )
        self._note(result)
        return result

    def _options(self) -> dict[str, Any]:
        if not self._is_on_gpu:
            return {}
        # PyTorch uses memory again behind what its stream has been told to do, as for any operation of its own.
        stream = torch.cuda.current_stream(self.device).cuda_stream
        return {"asynchronous": True, "stream": stream, "_keeps": False}

    def _note(self, result: Union[_results.DispatchResult, CombineResult]) -> None:
        if self._is_on_gpu and not torch.cuda.is_current_stream_capturing():
            self._last = result.event


@functools.lru_cache(maxsize=None)
def _arena_allocator() -> Any:
    """One for all, and for good: tensors of a pool may be there longer than their buffer."""
    return torch.cuda.memory.CUDAPluggableAllocator(_native.__file__, "swiftep_py_allocate", "swiftep_py_free")


_keys = itertools.count(1)
_buffers: weakref.WeakValueDictionary[int, Buffer] = weakref.WeakValueDictionary()


def _buffer(key: int) -> Buffer:
    try:
        return _buffers[key]
    except KeyError:
        raise ValueError("the buffer is gone") from None


class _HandleBytes(bytearray):
    """The memory of a handle's tensor: lives as long as that, and keeps the handle."""

    __slots__ = ("handle", "__weakref__")

    handle: _results.Handle


_handles: weakref.WeakValueDictionary[int, _HandleBytes] = weakref.WeakValueDictionary()


def _key_of(handle: _results.Handle) -> Tensor:
    number = next(_keys)
    memory = _HandleBytes(number.to_bytes(8, "little"))
    memory.handle = handle
    _handles[number] = memory
    return torch.frombuffer(memory, dtype=torch.int64)


def _handle(key: Tensor) -> _results.Handle:
    return _handles[int(key.item())].handle


def _is_traced(*tensors: Optional[Tensor]) -> bool:
    """Whether a call goes through its operator, which has gradients and can be compiled; otherwise that costs nothing."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def as_tensor(tensor: _ArenaTensor) -> Tensor:
    """The same memory as a tensor of PyTorch's, which keeps it. No stream waits for it, nor is any noted."""
    dtype = _VIEWED.get(tensor._c.dtype)
    if dtype is None:
        return _from_dlpack(tensor._capsule(tensor._c.dtype))
    # Not every PyTorch knows these by DLPack.
    return _from_dlpack(tensor._capsule(DType.UINT8)).view(dtype)


# Without what the public function makes of arguments that there are none of.
_from_dlpack = getattr(torch._C, "_from_dlpack", torch.from_dlpack)

_VIEWED: dict[int, torch.dtype] = {DType.FP8_E4M3: torch.float8_e4m3fn}
_VIEWED[DType.FP4_E2M1_X2] = getattr(torch, "float4_e2m1fn_x2", torch.uint8)


# Operators. What is not there is an empty tensor. `zeroes`: rows that no token fills are zeros.


def _dispatch(
    x: Tensor,
    indices: Tensor,
    weights: Optional[Tensor],
    buffer: int,
    layout: int,
    expert_alignment: int,
    sizing: int,
    quantization: int,
    zeroes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    result = _buffer(buffer)._dispatch(x, indices, weights, layout, expert_alignment, sizing, quantization)
    rows, origins = as_tensor(result.rows), as_tensor(result.origins)
    unaligned = as_tensor(result.unaligned_tokens_per_expert)
    scales, top_k_indices, top_k_weights = result.scales, result.top_k_indices, result.top_k_weights
    received_weights = None if top_k_weights is None else as_tensor(top_k_weights)
    if zeroes:
        _zero_unfilled(origins, unaligned, rows, received_weights)
    return (
        rows,
        x.new_empty(0) if scales is None else as_tensor(scales),
        indices.new_empty(0) if top_k_indices is None else as_tensor(top_k_indices),
        x.new_empty(0, dtype=torch.float32) if received_weights is None else received_weights,
        origins,
        as_tensor(result.tokens_per_expert),
        unaligned,
        _key_of(result.handle),
    )


def _zero_unfilled(origins: Tensor, unaligned: Tensor, *tensors: Optional[Tensor]) -> None:
    if origins.dim() == 3:
        filled = torch.arange(origins.shape[1], device=origins.device) < unaligned.unsqueeze(1)
    else:
        filled = origins[:, 0] >= 0
    for tensor in tensors:
        if tensor is not None:
            tensor.masked_fill_(~filled.unsqueeze(-1), 0)


def _repeat(x: Tensor, handle: Tensor, row_shape: list[int], token_count: int, buffer: int) -> Tensor:
    return _buffer(buffer)._repeat(x, _handle(handle))


def _combine(
    rows: Tensor,
    handle: Tensor,
    indices: Tensor,
    row_weights: Optional[Tensor],
    top_k_weights: Optional[Tensor],
    bias: Optional[Tensor],
    token_count: int,
    buffer: int,
    layout: int,
    expert_alignment: int,
    sizing: int,
) -> tuple[Tensor, Tensor]:
    result = _buffer(buffer)._combine(rows, _handle(handle), row_weights, top_k_weights, bias)
    weights = result.top_k_weights
    return (
        as_tensor(result.tokens),
        rows.new_empty(0, dtype=torch.float32) if weights is None else as_tensor(weights),
    )


def _operator(name: str, function: Any, arguments: str, result: str) -> Any:
    return torch.library.custom_op(
        f"swiftep::{name}", function, mutates_args=(), schema=f"({arguments}) -> {result}"
    )


_dispatch_op = _operator(
    "dispatch",
    _dispatch,
    "Tensor x, Tensor indices, Tensor? weights, int buffer, int layout, SymInt expert_alignment, int sizing, int quantization,"
    " bool zeroes",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_repeat_op = _operator(
    "repeat", _repeat, "Tensor x, Tensor handle, SymInt[] row_shape, SymInt token_count, int buffer", "Tensor"
)
_combine_op = _operator(
    "combine",
    _combine,
    "Tensor rows, Tensor handle, Tensor indices, Tensor? row_weights, Tensor? top_k_weights, Tensor? bias,"
    " SymInt token_count, int buffer, int layout, SymInt expert_alignment, int sizing",
    "(Tensor, Tensor)",
)


# What they return, without a call


def _fake_dispatch(
    x: Tensor,
    indices: Tensor,
    weights: Optional[Tensor],
    buffer: int,
    layout: int,
    expert_alignment: int,
    sizing: int,
    quantization: int,
    zeroes: bool,
) -> tuple[Tensor, ...]:
    plain = _buffer(buffer).buffer
    top_k, hidden = indices.shape[1], x.shape[1]
    if layout == Layout.GROUPED or sizing == Sizing.WORST_CASE:
        shape = plain.worst_case_row_shape(Layout(layout), top_k, expert_alignment)
    else:
        shape = (torch.library.get_ctx().new_dynamic_size(),)
    slots = top_k if layout == Layout.BY_SOURCE else min(1, top_k)
    local_experts = plain.local_expert_count
    row_dtype, row_size, scale_dtype, scale_size = x.dtype, hidden, x.dtype, 0
    if quantization == Scales.NVFP4:
        row_dtype, row_size = _VIEWED[DType.FP4_E2M1_X2], hidden // 2
        scale_dtype, scale_size = torch.float8_e4m3fn, hidden // 16
    elif quantization:
        row_dtype = torch.float8_e4m3fn
        is_packed = quantization == Scales.UE8M0
        scale_dtype = torch.int32 if is_packed else torch.float32
        scale_size = -(-hidden // (512 if is_packed else 128))
    return (
        x.new_empty([*shape, row_size], dtype=row_dtype),
        x.new_empty([*shape, scale_size] if quantization else [0], dtype=scale_dtype),
        x.new_empty([*shape, slots], dtype=indices.dtype),
        x.new_empty([0] if weights is None else [*shape, slots], dtype=torch.float32),
        x.new_empty([*shape, 2], dtype=torch.int32),
        x.new_empty([local_experts], dtype=torch.int32),
        x.new_empty([local_experts], dtype=torch.int32),
        torch.empty(1, dtype=torch.int64),
    )


def _fake_repeat(x: Tensor, handle: Tensor, row_shape: list[int], *_: Any) -> Tensor:
    return x.new_empty([*row_shape, x.shape[1]])


def _fake_combine(
    rows: Tensor,
    handle: Tensor,
    indices: Tensor,
    row_weights: Optional[Tensor],
    top_k_weights: Optional[Tensor],
    bias: Optional[Tensor],
    token_count: int,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return (
        rows.new_empty([token_count, rows.shape[-1]]),
        rows.new_empty([0] if top_k_weights is None else [token_count, indices.shape[1]], dtype=torch.float32),
    )


_dispatch_op.register_fake(_fake_dispatch)
_repeat_op.register_fake(_fake_repeat)
_combine_op.register_fake(_fake_combine)


# Gradients: each is the other's


def _keep_dispatch(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, indices, weights, ctx.buffer, ctx.layout, ctx.expert_alignment, ctx.sizing, _, _ = inputs
    ctx.has_weights = weights is not None
    ctx.token_count = x.shape[0]
    ctx.save_for_backward(indices, output[2], output[7])


def _dispatch_backward(ctx: Any, rows: Tensor, *others: Tensor) -> tuple[Any, ...]:
    indices, top_k_indices, key = ctx.saved_tensors
    # Weights of other ranks' experts have come as zeros, whatever they are.
    weights = torch.where(top_k_indices >= 0, others[2], 0.0) if ctx.has_weights else None
    x, summed = _bring_back(ctx, rows.contiguous(), key, indices, weights)
    return x, None, summed if ctx.has_weights else None, None, None, None, None, None, None


def _bring_back(ctx: Any, rows: Tensor, key: Tensor, indices: Tensor, weights: Optional[Tensor]) -> Any:
    """The sums of rows and of top-k weights."""
    return _combine_op(
        rows,
        key,
        indices,
        None,
        weights,
        None,
        ctx.token_count,
        ctx.buffer,
        ctx.layout,
        ctx.expert_alignment,
        ctx.sizing,
    )


def _keep_repeat(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, key, _, ctx.token_count, ctx.buffer = inputs
    ctx.layout, ctx.expert_alignment, ctx.sizing = 0, 1, 0
    ctx.save_for_backward(key)


def _repeat_backward(ctx: Any, rows: Tensor) -> tuple[Any, ...]:
    (key,) = ctx.saved_tensors
    x, _ = _bring_back(ctx, rows.contiguous(), key, rows.new_empty((0, 0), dtype=torch.int64), None)
    return x, None, None, None, None


def _keep_combine(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, key, indices, row_weights, _, bias, ctx.token_count = inputs[:7]
    ctx.buffer, ctx.layout, ctx.expert_alignment, ctx.sizing = inputs[7:]
    ctx.row_shape = list(rows.shape[:-1])
    ctx.has_bias = bias is not None
    # The rows themselves are needed for the gradients of their weights alone.
    ctx.save_for_backward(key, indices, *(() if row_weights is None else (row_weights, rows)))


def _combine_backward(ctx: Any, tokens: Tensor, _: Any) -> tuple[Any, ...]:
    tokens = tokens.contiguous()
    key, indices, *weighted = ctx.saved_tensors
    if not weighted:
        rows = _repeat_op(tokens, key, ctx.row_shape, ctx.token_count, ctx.buffer)
        summed = None
    else:
        row_weights, combined = weighted
        # As the first time, with the weights that this rank's tokens gave the rows.
        sent, _, _, weights, _, _, _, _ = _dispatch_op(
            tokens, indices, row_weights, ctx.buffer, ctx.layout, ctx.expert_alignment, ctx.sizing, 0, True
        )
        products = (sent.float() * combined.float()).sum(-1, keepdim=True)
        # Weights travel with rows; these have the least that rows can have.
        _, summed = _bring_back(ctx, products.new_zeros([*ctx.row_shape, 4]), key, indices, products)
        rows = (sent.float() * weights).to(tokens.dtype)
    bias = tokens if ctx.has_bias else None
    return rows, None, None, summed, None, bias, None, None, None, None, None


_dispatch_op.register_autograd(_dispatch_backward, setup_context=_keep_dispatch)
_repeat_op.register_autograd(_repeat_backward, setup_context=_keep_repeat)
_combine_op.register_autograd(_combine_backward, setup_context=_keep_combine)


# Streams

_record_stream = torch.Tensor.record_stream


def _record_any_stream(tensor: Tensor, stream: Any) -> None:
    """`torch.Tensor.record_stream`, which alone does nothing of memory that PyTorch has not allocated."""
    if tensor.is_cuda:
        error = new(ERROR_OUT)
        address = tensor.untyped_storage().data_ptr()
        check(lib.swiftep_py_note_use(address, _streams.pointer(stream), error), error)
    _record_stream(tensor, stream)


torch.Tensor.record_stream = _record_any_stream
