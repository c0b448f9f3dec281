"""DeepEP's `Buffer`."""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from typing import Any, Callable, Optional, Union

import torch
from torch import Tensor

from .. import torch as _torch
from ..buffer import Buffer as _Plain
from ..communicator import Communicator
from ..dispatch import DispatchResult, ScaleOrder, Sizing
from ..dispatch import Handle as _Handle
from ..errors import refusal
from ..plan import Encoding, Layout, Masking, Plan, Scales
from ._checks import required
from ._groups import Groups, PackedGroups, in_slots
from ._order import Hook, Order, finished
from .config import Config
from .utils import EventHandle, EventOverlap

#: Address space for the rows that callers keep; memory is taken as they come.
_ARENA_BYTE_COUNT_MAX = 64 << 30
#: Tokens of a rank in a call that the host waits for nothing in.
_TOKENS_MAX = 1 << 17

_LOW_LATENCY = "low latency"
_FROM_LAYOUT = "what get_dispatch_layout returns"

_Rows = Union[Tensor, "tuple[Tensor, Tensor]"]


class Buffer:
    """The ranks of a group that send each other tokens, as DeepEP's: `dispatch` and `combine` for many tokens,
    `low_latency_dispatch` and `low_latency_combine` for few. Calls are collective.

    Memory is taken by the first call of a kind, which knows how many tokens there are: `num_nvl_bytes` and `num_rdma_bytes` are
    kept, and mean nothing, but to `enable_shrink`. Without a GPU, the same runs on CPUs.

    Args:
        group: a process group whose ranks are processes of one host; None: `comm`.
        num_nvl_bytes, num_rdma_bytes: as the size hints say, which see.
        low_latency_mode: whether the calls for few tokens are made.
        num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: of no meaning here.
        explicitly_destroy: `destroy` is called, instead of leaving it to the garbage collector.
        enable_shrink: calls for few tokens go on without ranks that are masked: by `low_latency_update_mask_buffer`, or since
            they are gone, or silent for the timeout. Rows are copied once more on both ways. At most 64 ranks.
        comm: a communicator of mpi4py's, instead of a group.
        timeout: how long another rank is waited for, in seconds; None: 100. SwiftEP's own.

    Raises:
        InvalidArgument; what `swiftep.torch.communicator` raises.
    """

    #: Multiprocessors that a call of the throughput path takes, where no `Config` says otherwise.
    num_sms: int = 20
    #: Tokens, channels and experts of low-latency calls, by the bytes and ranks of the size hint.
    _hinted: dict[tuple[int, int], tuple[int, int, int]] = {}

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        timeout: Optional[float] = None,
    ) -> None:
        required(group is not None or comm is not None, "group", "a process group, or one of mpi4py's as comm", None)
        for name, byte_count in (("num_nvl_bytes", num_nvl_bytes), ("num_rdma_bytes", num_rdma_bytes)):
            required(byte_count >= 0 and byte_count % 128 == 0, name, "a multiple of 128", byte_count)
        if group is not None:
            self.rank, self.group_size, self.group = group.rank(), group.size(), group
            self._communicator = _torch.communicator(group, timeout=timeout)
        else:
            self.rank, self.group_size, self.group = comm.Get_rank(), comm.Get_size(), comm
            self._communicator = Communicator.processes(
                self.rank, self.group_size, comm.allgather, timeout=timeout
            )
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self._timeout = timeout
        self._is_on_gpu = torch.cuda.is_available()
        self._device = (
            torch.device("cuda", torch.cuda.current_device()) if self._is_on_gpu else torch.device("cpu")
        )
        self._streams = [torch.cuda.Stream(self._device) for _ in range(2)] if self._is_on_gpu else []
        self._buffers: dict[tuple[str, int, int], _Plain] = {}
        self._masked_by_hand: set[int] = set()
        self._raw: dict[bool, Tensor] = {}
        self.runtime: Optional[_Runtime] = _Runtime(self)
        if low_latency_mode and enable_shrink:
            # So that a rank can be gone before its first call, as only a buffer that is there can go on without it.
            job = Buffer._hinted.get((num_rdma_bytes, self.group_size), (-1, 0, 0))
            gather = comm.allgather if group is None else _torch.all_gather(group)
            is_same = len(set(gather(struct.pack("<3q", *job)))) == 1
            if is_same and job[0] >= 0:
                self._low_latency_buffer(*job)

    # What a buffer is

    def destroy(self) -> None:
        """Ends the buffer; rows that it has returned stay readable. What is called afterwards raises.

        Raises:
            InvalidArgument: `explicitly_destroy` was not set.
        """
        required(self.explicitly_destroy, "explicitly_destroy", "True, for destroy to be called", False)
        self._open()
        if self._is_on_gpu:
            torch.cuda.synchronize(self._device)
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        self._communicator.close()
        self.runtime = None

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether FP8 rows can be sent: always."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """How many multiprocessors a call of the throughput path takes from now on; an even number."""
        required(new_num_sms % 2 == 0, "new_num_sms", "an even number", new_num_sms)
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        """An event of what the current stream has been told to do by now."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes that one rank takes for two results of `low_latency_dispatch` of BF16 rows, and their combines.

        A buffer with `enable_shrink` that is then given them as `num_rdma_bytes` is ready for such calls when it is made.
        """
        job = (num_max_dispatch_tokens_per_rank, hidden, num_experts)
        byte_count = -(-_low_latency_plan(num_ranks, *job, Masking.NONE).byte_count // 128) * 128
        Buffer._hinted[byte_count, num_ranks] = job
        return byte_count

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The tuning of a dispatch of so many ranks: any number, since there is nothing to tune."""
        required(num_ranks >= 1, "num_ranks", "at least 1", num_ranks)
        return Config(Buffer.num_sms)

    #: The same for a combine.
    get_combine_config = get_dispatch_config

    def get_comm_stream(self) -> Any:
        """The stream that calls run on: a `torch.cuda.Stream`."""
        self._open()
        required(self._is_on_gpu, "device", "a GPU", "CPUs, which have no streams")
        return self._streams[0]

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: Optional[Sequence[int]] = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> Tensor:
        """Memory of `num_nvl_bytes` (`num_rdma_bytes`) bytes, the same in every call. Nothing is received in it.

        Args:
            size: the shape; None: all of it.
            offset: elements before the first.
        """
        self._open()
        if use_rdma_buffer not in self._raw:
            byte_count = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
            self._raw[use_rdma_buffer] = torch.zeros(byte_count, dtype=torch.uint8, device=self._device)
        raw = self._raw[use_rdma_buffer]
        tensor = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)[offset:]
        if size is None:
            return tensor
        count = torch.Size(size).numel()
        required(tensor.numel() >= count, "size", f"at most {tensor.numel()} elements", count)
        return tensor[:count].view(torch.Size(size))

    # Many tokens

    def get_dispatch_layout(
        self,
        topk_idx: Tensor,
        num_experts: int,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Optional[Tensor], Tensor, Tensor, EventOverlap]:
        """Counts where tokens go. Not collective.

        Args:
            topk_idx: int64 `[tokens, top_k]`: experts, -1 for none.
            num_experts: of all ranks.
            previous_event, async_finish, allocate_on_comm_stream: see `dispatch`.

        Returns:
            int32 `[ranks]`: tokens for each rank; None, where the network would be; int32 `[experts]`: tokens for each expert;
            bool `[tokens, ranks]`: whether a token goes to a rank; the event.
        """
        self._open()
        required(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "topk_idx", "a dense [tokens, top_k]", _shape(topk_idx))
        required(topk_idx.dtype == torch.int64, "topk_idx", "torch.int64", topk_idx.dtype)
        required(num_experts > 0, "num_experts", "at least 1", num_experts)
        order = Order(self, previous_event, async_finish, allocate_on_comm_stream)
        with order.on_stream():
            # Experts that do not exist count as none; dispatch refuses them.
            none = (topk_idx < 0) | (topk_idx >= num_experts)
            owners = topk_idx.div(num_experts // self.group_size or 1, rounding_mode="floor")
            owners = owners.clamp(max=self.group_size - 1).masked_fill(none, self.group_size)
            goes = torch.zeros(
                (topk_idx.shape[0], self.group_size + 1), dtype=torch.bool, device=topk_idx.device
            ).scatter_(1, owners, True)
            is_token_in_rank = goes[:, :-1].contiguous()
            experts = topk_idx.masked_fill(none, num_experts).flatten()
            per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
            per_expert.scatter_add_(0, experts, torch.ones_like(experts, dtype=torch.int32))
            per_rank = is_token_in_rank.sum(0, dtype=torch.int32)
        event = order.end((topk_idx,), (per_rank, per_expert, is_token_in_rank))
        return per_rank, None, per_expert[:-1], is_token_in_rank, event

    def dispatch(
        self,
        x: _Rows,
        handle: Optional[tuple[Any, ...]] = None,
        num_tokens_per_rank: Optional[Tensor] = None,
        num_tokens_per_rdma_rank: Optional[Tensor] = None,
        is_token_in_rank: Optional[Tensor] = None,
        num_tokens_per_expert: Optional[Tensor] = None,
        topk_idx: Optional[Tensor] = None,
        topk_weights: Optional[Tensor] = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Optional[Tensor], Optional[Tensor], Any, Any, EventOverlap]:
        """Sends each token to the ranks of its experts, once a rank.

        Args:
            x: `[tokens, hidden]`, or FP8 rows with their scales, `[tokens, ...]` of any strides.
            handle: as an earlier dispatch: what follows, up to `num_worst_tokens`, is left out then.
            num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank: what `get_dispatch_layout` returns.
            num_tokens_per_rdma_rank: None.
            topk_idx, topk_weights: int64 and fp32 `[tokens, top_k]`; both or neither.
            expert_alignment: counts of each expert are rounded up to multiples of this.
            num_worst_tokens: so many rows are returned, the host waits for nothing, and the call can be captured in a CUDA
                graph; 0: as many as have come.
            config: how many multiprocessors are taken; None: `num_sms`.
            previous_event: what the call waits for, instead of all that the current stream has been told to do.
            async_finish: the current stream does not wait for the rows; the event does.
            allocate_on_comm_stream: of no meaning, since what is returned is the buffer's memory; needs the two before.

        Returns:
            rows as `x`, by source rank, then token, kept as long as the caller likes, on any stream that `record_stream` has
            been told of; their int64 local experts, -1 for others; their weights; tokens of each local expert, a list, empty
            with `num_worst_tokens`; the handle; the event. With `handle`: rows, four times None, the event.

            Of the handle's six tensors, the first is int32 `[ranks, ranks]`: in this rank's column, the rows that came from each
            source and those before it, -1 in the others; its memory stands for SwiftEP's own handle. The fourth holds each row's
            token at its source, the fifth is `is_token_in_rank`; the others are empty.

        Raises:
            As `swiftep.Buffer.dispatch`.
        """
        self._open()
        rows, scales = x if isinstance(x, tuple) else (x, None)
        required(rows.dim() == 2 and rows.is_contiguous(), "x", "a dense [tokens, hidden]", _shape(rows))
        if scales is not None:
            required(rows.element_size() == 1, "x", "elements of a byte, where there are scales", rows.dtype)
            required(
                scales.dim() in (1, 2) and scales.shape[0] == rows.shape[0],
                "x",
                f"scales of {rows.shape[0]} tokens",
                _shape(scales),
            )
        config = self._checked(config)
        order = Order(self, previous_event, async_finish, allocate_on_comm_stream)
        if handle is not None:
            required(topk_idx is None and topk_weights is None, "handle", "no topk_idx, nor topk_weights", "both")
            known = self._known(handle)
            with order.on_stream():
                result = known.buffer.dispatch(
                    _sent(rows, scales),
                    handle=known.handle,
                    sidecars=_sidecars(scales),
                    sizing=Sizing.EXACT if rows.shape[0] > _TOKENS_MAX else Sizing.WORST_CASE,
                    workers=self._workers(known.buffer, config),
                    **order.options,
                )
            received = _received(result, rows, scales)
            event = order.end((rows, scales), (), result)
            return received, None, None, None, None, event

        if num_tokens_per_rank is None:
            raise refusal("num_tokens_per_rank", _FROM_LAYOUT, None)
        if is_token_in_rank is None:
            raise refusal("is_token_in_rank", _FROM_LAYOUT, None)
        if num_tokens_per_expert is None:
            raise refusal("num_tokens_per_expert", _FROM_LAYOUT, None)
        required(
            is_token_in_rank.dtype == torch.bool and list(is_token_in_rank.shape) == [rows.shape[0], self.group_size],
            "is_token_in_rank",
            f"bool [{rows.shape[0]}, {self.group_size}]",
            f"{is_token_in_rank.dtype} {_shape(is_token_in_rank)}",
        )
        expert_count = num_tokens_per_expert.numel()
        required(
            expert_count % self.group_size == 0, "num_tokens_per_expert", f"[a multiple of {self.group_size}]", expert_count
        )
        required((topk_idx is None) == (topk_weights is None), "topk_weights", "with topk_idx, or neither", "one")
        if num_worst_tokens:
            required(topk_idx is not None, "topk_idx", "indices, with num_worst_tokens", None)
        buffer = self._throughput_buffer(expert_count, config)
        routing: dict[str, Any] = (
            {"table": is_token_in_rank.view(torch.uint8)}
            if topk_idx is None
            else {"indices": topk_idx, "weights": topk_weights}
        )
        with order.on_stream():
            per_expert: list[int] = []
            if topk_idx is None:
                per_expert = self._counted(buffer, num_tokens_per_expert, expert_alignment, order)
            result = buffer.dispatch(
                _sent(rows, scales),
                sidecars=_sidecars(scales),
                sizing=Sizing.WORST_CASE if num_worst_tokens else Sizing.EXACT,
                rows_max=num_worst_tokens or None,
                expert_alignment=expert_alignment,
                workers=self._workers(buffer, config),
                **routing,
                **order.options,
            )
            received = _received(result, rows, scales)
            prefix = torch.full((self.group_size, self.group_size), -1, dtype=torch.int32, device=rows.device)
            prefix[:, self.rank] = _torch.as_tensor(result.tokens_per_source).cumsum(0)
            if topk_idx is not None and not num_worst_tokens:
                per_expert = self._told(result.tokens_per_expert)
        indices, weights = result.top_k_indices, result.top_k_weights
        recv_topk_idx = None if indices is None else _torch.as_tensor(indices)
        recv_topk_weights = None if weights is None else _torch.as_tensor(weights)
        source_index = _torch.as_tensor(result.origins)[:, 1]
        _keep_known(prefix, _Known(buffer, result.handle))
        none = torch.empty((self.group_size, 0), dtype=torch.int32, device=rows.device)
        send_head = torch.empty((rows.shape[0], 0), dtype=torch.int32, device=rows.device)
        made = (prefix, none, none, source_index, is_token_in_rank, send_head)
        event = order.end((rows, scales, topk_idx, topk_weights, is_token_in_rank), (prefix,), result)
        return received, recv_topk_idx, recv_topk_weights, per_expert, made, event

    def combine(
        self,
        x: Tensor,
        handle: tuple[Any, ...],
        topk_weights: Optional[Tensor] = None,
        bias: Union[Tensor, tuple[Tensor, Tensor], None] = None,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Optional[Tensor], EventOverlap]:
        """Brings rows back to their tokens' owners and sums them, without weights, in Float, rounded once.

        Args:
            x: `[rows, hidden]`, as many as the dispatch returned. In the buffer's own memory, nothing is copied.
            handle: of a dispatch, or what its caller has saved of it.
            topk_weights: fp32 `[rows, top_k]`, summed, too.
            bias: one or two `[tokens, hidden]`, added last.
            config, previous_event, async_finish, allocate_on_comm_stream: see `dispatch`.

        Returns:
            `[tokens, hidden]`; fp32 `[tokens, top_k]` or None; the event.

        Raises:
            As `swiftep.Buffer.combine`.
        """
        self._open()
        required(x.dim() == 2 and x.is_contiguous(), "x", "a dense [rows, hidden]", _shape(x))
        biases = () if bias is None else bias if isinstance(bias, tuple) else (bias,)
        required(len(biases) <= 2, "bias", "two at most", len(biases))
        known = self._known(handle)
        config = self._checked(config)
        order = Order(self, previous_event, async_finish, allocate_on_comm_stream)
        output = torch.empty((handle[4].shape[0], x.shape[1]), dtype=x.dtype, device=x.device)
        with order.on_stream():
            result = known.buffer.combine(
                x,
                known.handle,
                top_k_weights=topk_weights,
                biases=biases,
                output=output,
                workers=self._workers(known.buffer, config),
                **order.options,
            )
        weights = result.top_k_weights
        summed = None if weights is None else _torch.as_tensor(weights)
        event = order.end((x, topk_weights, *biases), (output,) if summed is None else (output, summed))
        return output, summed, event

    def internode_dispatch(self, *_: Any, **__: Any) -> Any:
        """Raises: the ranks of other hosts are not reached yet."""
        raise refusal("group", "ranks of one host: others come with the network", "a call between hosts")

    internode_combine = internode_dispatch

    # Few tokens

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """There is nothing to be cleaned. With `enable_shrink`, ranks find out who is missing: collective then."""
        self._open()
        self._check_low_latency()
        if not self.enable_shrink:
            return
        buffer = self._low_latency_buffer(num_max_dispatch_tokens_per_rank, hidden, num_experts)
        order = Order(self, None, False)
        with order.on_stream():
            buffer.dispatch(
                torch.empty((0, hidden), dtype=torch.bfloat16, device=self._device),
                torch.empty((0, 1), dtype=torch.int64, device=self._device),
                layout=Layout.GROUPED,
                sizing=Sizing.WORST_CASE,
                **order.options,
            )

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Optional[Tensor] = None,
        dispatch_wait_recv_cost_stats: Optional[Tensor] = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[_Rows, Tensor, tuple[Any, ...], EventOverlap, Hook]:
        """Sends each token to each of its experts, in groups of fixed size.

        Args:
            x: bf16 `[tokens, hidden]`.
            topk_idx: int64 `[tokens, top_k]`: experts, -1 for none.
            num_max_dispatch_tokens_per_rank: tokens of any rank at most; the same on all ranks.
            num_experts: of all ranks.
            cumulative_local_expert_recv_stats: int32 `[local experts]`, to which the tokens of each are added.
            dispatch_wait_recv_cost_stats: int64 `[ranks]`, to which the time that each was waited for is added, in clock cycles.
            use_fp8: rows arrive as FP8 E4M3, with a scale for 128 channels.
            round_scale: scales are powers of two.
            use_ue8m0: and packed by four.
            async_finish: the current stream does not wait for the rows; the event does.
            return_recv_hook: the call only sends, and the hook does the rest. In between, nothing of it takes a multiprocessor.

        Returns:
            `[local experts, ranks * num_max_dispatch_tokens_per_rank, hidden]`, valid rows first, and with FP8 their scales,
            column-major; int32 `[local experts]`: valid rows; the handle, of which the first is int32 `[local experts, rows]`,
            each row's token at its source, and the second int64 `[local experts, ranks]`, where a source's rows begin, times
            2**32, plus their number; the event; the hook or None. What is returned can be kept as long as the caller likes.

        Raises:
            As `swiftep.Buffer.dispatch`.
        """
        self._open()
        self._check_low_latency(async_finish, return_recv_hook)
        required(
            x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16,
            "x",
            "a dense bf16 [tokens, hidden]",
            f"{x.dtype} {_shape(x)}",
        )
        required(x.shape[1] % 128 == 0, "x", "a multiple of 128 channels", x.shape[1])
        required(
            x.shape[0] <= num_max_dispatch_tokens_per_rank,
            "x",
            f"at most {num_max_dispatch_tokens_per_rank} tokens",
            x.shape[0],
        )
        required(topk_idx.dtype == torch.int64, "topk_idx", "torch.int64", topk_idx.dtype)
        required(num_experts % self.group_size == 0, "num_experts", f"a multiple of {self.group_size}", num_experts)
        required(round_scale or not use_ue8m0, "round_scale", "True, with use_ue8m0", round_scale)
        required(x.shape[1] % 512 == 0 or not use_ue8m0, "x", "a multiple of 512 channels, with use_ue8m0", x.shape[1])
        buffer = self._low_latency_buffer(num_max_dispatch_tokens_per_rank, x.shape[1], num_experts)
        quantization = Scales.NONE
        if use_fp8:
            quantization = Scales.UE8M0 if use_ue8m0 else Scales.POWER_OF_TWO if round_scale else Scales.FP32
        order = Order(self, None, async_finish, runs_here=return_recv_hook)
        with order.on_stream():
            waits = None if dispatch_wait_recv_cost_stats is None else torch.zeros_like(dispatch_wait_recv_cost_stats)
            result = buffer.dispatch(
                x,
                topk_idx,
                layout=Layout.GROUPED,
                sizing=Sizing.WORST_CASE,
                quantization=quantization,
                scale_order=ScaleOrder.COLUMN_MAJOR if use_fp8 else ScaleOrder.ROW_MAJOR,
                expert_statistics=cumulative_local_expert_recv_stats,
                wait_statistics=waits,
                receives_later=return_recv_hook,
                **order.options,
            )
            groups = PackedGroups(result, num_max_dispatch_tokens_per_rank) if self.enable_shrink else Groups(result)

        def finish() -> None:
            groups.finish()
            if waits is not None and dispatch_wait_recv_cost_stats is not None:
                dispatch_wait_recv_cost_stats.add_(_cycles(waits, x.device))

        hook = finished(result, finish, order, return_recv_hook)
        received: _Rows = groups.rows if groups.scales is None else (groups.rows, groups.scales)
        handle = (groups.source_tokens, groups.ranges, num_max_dispatch_tokens_per_rank, x.shape[1], num_experts)
        _keep_known(groups.ranges, _Known(buffer, result.handle, groups.places))
        used = (x, topk_idx, cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats, waits)
        event = order.end(used, groups.made, result)
        return received, groups.counts, handle, event, hook

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Optional[Tensor] = None,
        combine_wait_recv_cost_stats: Optional[Tensor] = None,
    ) -> tuple[Tensor, EventOverlap, Hook]:
        """Brings rows back to their tokens' owners, and sums them, multiplied by the tokens' weights, in Float, rounded once.

        Args:
            x: bf16 `[local experts, ranks * num_max_dispatch_tokens_per_rank, hidden]`. In the buffer's own memory, nothing is
                copied, but with `enable_shrink`.
            topk_idx: as the dispatch's.
            topk_weights: fp32 `[tokens, top_k]`.
            handle: of the dispatch; twice, if the caller likes.
            use_logfmt: rows travel as LogFMT (`swiftep.Encoding`), which changes a value by at most 1.1%. Not with `zero_copy`.
            zero_copy: the rows are those that were written to `get_next_low_latency_combine_buffer(handle)`.
            async_finish, return_recv_hook: see `low_latency_dispatch`; the hook is collective.
            out: bf16 `[tokens, hidden]`, where to put the sums; None: a new tensor.
            combine_wait_recv_cost_stats: see `dispatch_wait_recv_cost_stats`.

        Returns:
            `[tokens, hidden]`; the event; the hook or None.

        Raises:
            As `swiftep.Buffer.combine`.
        """
        self._open()
        self._check_low_latency(async_finish, return_recv_hook)
        known, row_count, hidden = self._find_known(handle[1]), self.group_size * handle[2], handle[3]
        wanted = [known.buffer.local_expert_count, row_count, hidden]
        required(
            list(x.shape) == wanted and x.is_contiguous() and x.dtype == torch.bfloat16,
            "x",
            f"a dense bf16 {wanted}",
            f"{x.dtype} {_shape(x)}",
        )
        required(topk_idx.shape == topk_weights.shape, "topk_weights", str(_shape(topk_idx)), _shape(topk_weights))
        required(not (use_logfmt and zero_copy), "use_logfmt", "False, with zero_copy", use_logfmt)
        given = x
        if zero_copy:
            if known.combine_input is None:
                raise refusal("zero_copy", "rows in get_next_low_latency_combine_buffer(handle)", "no such call")
            given = known.combine_input
        tokens = out
        if tokens is None:
            tokens = torch.empty((topk_weights.shape[0], hidden), dtype=x.dtype, device=x.device)
        order = Order(self, None, async_finish, runs_here=return_recv_hook)
        stats = combine_wait_recv_cost_stats
        with order.on_stream():
            waits = None if stats is None else torch.zeros_like(stats)
            result = known.buffer.combine(
                given if known.places is None else in_slots(given, known.places),
                known.handle,
                row_weights=topk_weights,
                output=tokens,
                encoding=Encoding.LOGFMT if use_logfmt else Encoding.NONE,
                wait_statistics=waits,
                receives_later=return_recv_hook,
                **order.options,
            )

        def finish() -> None:
            if stats is not None and waits is not None:
                stats.add_(_cycles(waits, x.device))

        hook = finished(result, finish, order, return_recv_hook)
        event = order.end((given, topk_weights, stats, waits, known.places), (tokens,))
        return tokens, event, hook

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> Tensor:
        """Where to write a combine's rows, for `zero_copy`.

        Returns:
            bf16 `[local experts, ranks * num_max_dispatch_tokens_per_rank, hidden]`, with whatever lay there before.
        """
        self._open()
        known, hidden = self._find_known(handle[1]), handle[3]
        if known.places is None:
            made = _torch.as_tensor(known.buffer.combine_input(known.handle, hidden))
        else:
            shape = (known.buffer.local_expert_count, self.group_size * handle[2], hidden)
            made = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        if self._is_on_gpu:
            made.record_stream(torch.cuda.current_stream(self._device))
            made.record_stream(self._streams[0])
        known.combine_input = made
        return made

    # Masks

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Masks another rank: not collective, the others learn it in the next call, and so does the rank, by `RankMasked`. Or takes
        one back: collective, for all that are not masked and for the one that returns; handles of before are refused then.

        What the current stream has been told to do is done first.

        Raises:
            InvalidArgument; RankMissing: the rank to be taken back, or another, is not there; all can call again.
        """
        buffers = self._maskable()
        is_other = 0 <= rank_to_mask < self.group_size and not (mask and rank_to_mask == self.rank)
        required(is_other, "rank_to_mask", f"another of {self.group_size} ranks", rank_to_mask)
        if not mask:
            self._unmask([rank_to_mask])
            return
        self._masked_by_hand.add(rank_to_mask)
        for buffer in buffers:
            buffer.mask([rank_to_mask])

    def low_latency_query_mask_buffer(self, mask_status: Tensor) -> None:
        """Fills int32 `[ranks]`: 1 for ranks that are masked when what the current stream has been told to do is done, for which
        the call waits."""
        buffers = self._maskable()
        required(
            mask_status.dtype == torch.int32 and mask_status.numel() == self.group_size,
            "mask_status",
            f"int32 [{self.group_size}]",
            f"{mask_status.dtype} {_shape(mask_status)}",
        )
        masked = self._masked_by_hand.union(*(buffer.masked_ranks for buffer in buffers))
        status = torch.tensor([int(rank in masked) for rank in range(self.group_size)], dtype=torch.int32)
        mask_status.copy_(status.view(mask_status.shape))

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes all ranks back. Collective for all, masked ones too.

        Raises:
            RankMissing: as `low_latency_update_mask_buffer`.
        """
        self._unmask(range(self.group_size))

    def _maskable(self) -> list[_Plain]:
        """The buffers whose masks are up to date, since what the current stream has been told to do is done."""
        self._open()
        self._check_low_latency()
        required(self.enable_shrink, "enable_shrink", "True", self.enable_shrink)
        if self._is_on_gpu:
            torch.cuda.current_stream(self._device).synchronize()
        return [buffer for (kind, _, _), buffer in self._buffers.items() if kind == _LOW_LATENCY]

    def _unmask(self, ranks: Iterable[int]) -> None:
        for buffer in self._maskable():
            buffer.unmask(ranks)
        self._masked_by_hand.difference_update(ranks)

    # What runs

    def _open(self) -> None:
        if self.runtime is None:
            raise refusal("buffer", "one that has not been destroyed", "a destroyed one")

    @staticmethod
    def _checked(config: Optional[Config]) -> Config:
        config = config or Config(Buffer.num_sms)
        required(config.num_sms % 2 == 0, "config", "an even num_sms", config.num_sms)
        return config

    def _known(self, handle: tuple[Any, ...]) -> _Known:
        required(len(handle) == 6, "handle", "six tensors", len(handle))
        return self._find_known(handle[0])

    def _find_known(self, tensor: Any) -> _Known:
        known = getattr(tensor.untyped_storage(), "_swiftep", None) if isinstance(tensor, Tensor) else None
        if not isinstance(known, _Known) or all(known.buffer is not buffer for buffer in self._buffers.values()):
            raise refusal("handle", "what a dispatch of this buffer has returned", "another")
        return known

    def _check_low_latency(self, async_finish: bool = False, return_recv_hook: bool = False) -> None:
        required(self.low_latency_mode, "low_latency_mode", "True", False)
        required(not (async_finish and return_recv_hook), "async_finish", "False, with return_recv_hook", True)

    def _made(self, key: tuple[str, int, int], plan: Callable[[], Plan], workers: Optional[int]) -> _Plain:
        buffer = self._buffers.get(key)
        if buffer is None:
            buffer = self._buffers[key] = _Plain(
                self._communicator,
                plan(),
                workers=workers if self._is_on_gpu else None,
                device=str(self._device),
                timeout=self._timeout,
            )
        return buffer

    def _throughput_buffer(self, expert_count: int, config: Config) -> _Plain:
        """All ranks make it in the same call, with the same plan, however many tokens each has and of whatever width: the arena
        grows with what is received and kept."""

        def plan() -> Plan:
            return Plan(
                self.group_size,
                _TOKENS_MAX,
                16,
                1,
                expert_count,
                received_tokens_max=0,
                arena_byte_count_max=_ARENA_BYTE_COUNT_MAX,
            )

        return self._made(("throughput", expert_count, 0), plan, config.num_sms or None)

    def _low_latency_buffer(self, token_count: int, hidden: int, expert_count: int) -> _Plain:
        masking = Masking.AUTOMATIC if self.enable_shrink else Masking.NONE

        def plan() -> Plan:
            return _low_latency_plan(self.group_size, token_count, hidden, expert_count, masking)

        key = (_LOW_LATENCY, expert_count, token_count)
        is_new = key not in self._buffers
        buffer = self._made(key, plan, None)
        if is_new and self._masked_by_hand:
            buffer.mask(self._masked_by_hand)
        return buffer

    def _workers(self, buffer: _Plain, config: Config) -> Optional[int]:
        if not self._is_on_gpu or config.num_sms < 1:
            return None
        return min(config.num_sms, buffer.worker_count_max)

    def _counted(
        self, buffer: _Plain, num_tokens_per_expert: Tensor, expert_alignment: int, order: Order
    ) -> list[int]:
        """Tokens of this rank's experts, where no top-k indices have told: each rank sends its counts to their owners."""
        counts = num_tokens_per_expert.to(torch.int32).view(self.group_size, -1)
        local_count = counts.shape[1]
        sent = torch.nn.functional.pad(counts, (0, -local_count % 4)).contiguous()
        table = torch.eye(self.group_size, dtype=torch.uint8, device=counts.device)
        result = buffer.dispatch(sent.view(torch.uint8), table=table, **order.options)
        received = _torch.as_tensor(result.rows).view(torch.int32)[:, :local_count].sum(0)
        aligned = (received + (expert_alignment - 1)).div(expert_alignment, rounding_mode="floor") * expert_alignment
        return [int(count) for count in aligned.tolist()]

    def _told(self, counts: Any) -> list[int]:
        """Counts that the host knows to be there, read while rows still travel."""
        tensor = _torch.as_tensor(counts)
        if not self._is_on_gpu:
            return [int(count) for count in tensor.tolist()]
        with torch.cuda.stream(self._streams[1]):
            return [int(count) for count in tensor.tolist()]


class _Runtime:
    """What callers ask of DeepEP's C++ object."""

    def __init__(self, buffer: Buffer) -> None:
        self._buffer = buffer

    def is_available(self) -> bool:
        return True

    def get_num_rdma_ranks(self) -> int:
        return 1

    def get_rdma_rank(self) -> int:
        return 0

    def get_root_rdma_rank(self, is_global: bool) -> int:
        return 0

    def get_local_device_id(self) -> int:
        return self._buffer._device.index or 0

    def get_comm_stream(self) -> Any:
        return self._buffer.get_comm_stream()


class _Known:
    """SwiftEP's own handle, and whose it is."""

    __slots__ = ("buffer", "handle", "places", "combine_input")

    def __init__(self, buffer: _Plain, handle: _Handle, places: Optional[Tensor] = None) -> None:
        self.buffer, self.handle = buffer, handle
        #: See `Groups`.
        self.places = places
        #: What `get_next_low_latency_combine_buffer` has returned last.
        self.combine_input: Optional[Tensor] = None


def _keep_known(tensor: Tensor, known: _Known) -> None:
    """The memory of a handle's tensor stands for it, and keeps it: also where a caller has saved the tensors one by one."""
    tensor.untyped_storage()._swiftep = known


def _sent(rows: Tensor, scales: Optional[Tensor]) -> Tensor:
    # Rows that are quantized already travel as bytes, their scales beside them, whatever they look like.
    return rows if scales is None else rows.view(torch.uint8)


def _sidecars(scales: Optional[Tensor]) -> tuple[Tensor, ...]:
    return () if scales is None else (scales.contiguous(),)


def _received(result: DispatchResult, rows: Tensor, scales: Optional[Tensor]) -> _Rows:
    received = _torch.as_tensor(result.rows)
    if scales is None:
        return received
    return received.view(rows.dtype), _torch.as_tensor(result.sidecars[0])


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _low_latency_plan(
    rank_count: int, token_count: int, hidden: int, expert_count: int, masking: Masking
) -> Plan:
    return Plan(
        rank_count,
        token_count,
        hidden,
        1,
        expert_count,
        layout=Layout.GROUPED,
        result_count=2,
        masking=masking,
        arena_byte_count_max=_ARENA_BYTE_COUNT_MAX,
    )


def _cycles(nanoseconds: Tensor, device: torch.device) -> Tensor:
    """Of the GPU's clock, or of 1 GHz where PyTorch does not tell it, as on CPUs."""
    return (nanoseconds.double() * _gigahertz(device)).long()


@functools.lru_cache(maxsize=None)
def _gigahertz(device: torch.device) -> float:
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return float(getattr(properties, "clock_rate", 1_000_000)) / 1e6
