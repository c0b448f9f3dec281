"""DeepEP's `Buffer`."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
from torch import Tensor

from .. import torch as _torch
from ..buffer import Buffer as _Plain
from ..communicator import Communicator
from ..dispatch import DispatchResult, Sizing
from ..errors import refusal
from ..plan import Masking, Plan
from ._checks import required
from ._low_latency import LowLatency
from ._masks import low_latency_plan
from ._order import Order
from ._shared import ARENA_BYTE_COUNT_MAX, Known, Rows, keep_known, shape_of
from .config import Config
from .utils import EventHandle, EventOverlap

#: Tokens of a rank in a call that the host waits for nothing in.
_TOKENS_MAX = 1 << 17

_FROM_LAYOUT = "what get_dispatch_layout returns"


class Buffer(LowLatency):
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
        self._buffers = {}
        self._masked_by_hand = set()
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
        byte_count = -(-low_latency_plan(num_ranks, *job, Masking.NONE).byte_count // 128) * 128
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
        required(topk_idx.dim() == 2 and topk_idx.is_contiguous(), "topk_idx", "a dense [tokens, top_k]", shape_of(topk_idx))
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
        x: Rows,
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
        required(rows.dim() == 2 and rows.is_contiguous(), "x", "a dense [tokens, hidden]", shape_of(rows))
        if scales is not None:
            required(rows.element_size() == 1, "x", "elements of a byte, where there are scales", rows.dtype)
            required(
                scales.dim() in (1, 2) and scales.shape[0] == rows.shape[0],
                "x",
                f"scales of {rows.shape[0]} tokens",
                shape_of(scales),
            )
        config = self._checked(config)
        order = Order(self, previous_event, async_finish, allocate_on_comm_stream)
        if handle is not None:
            required(topk_idx is None and topk_weights is None, "handle", "no topk_idx, nor topk_weights", "both")
            known = self._known(handle)
            with order.on_stream():
                result = known.buffer.dispatch(
                    **_sent(rows, scales),
                    handle=known.handle,
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
            f"{is_token_in_rank.dtype} {shape_of(is_token_in_rank)}",
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
                **_sent(rows, scales),
                sizing=Sizing.WORST_CASE if num_worst_tokens else Sizing.EXACT,
                rows_max=num_worst_tokens or None,
                expert_alignment=expert_alignment,
                workers=self._workers(buffer, config),
                **routing,
                **order.options,
            )
            received = _received(result, rows, scales)
            prefix = _torch.as_tensor(result.tokens_per_pair).cumsum(0, dtype=torch.int32)
            if topk_idx is not None and not num_worst_tokens:
                per_expert = self._told(result.tokens_per_expert)
        indices, weights = result.top_k_indices, result.top_k_weights
        recv_topk_idx = None if indices is None else _torch.as_tensor(indices)
        recv_topk_weights = None if weights is None else _torch.as_tensor(weights)
        source_index = _torch.as_tensor(result.origins)[:, 1]
        keep_known(prefix, Known(buffer, result.handle))
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
        required(x.dim() == 2 and x.is_contiguous(), "x", "a dense [rows, hidden]", shape_of(x))
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

    # What runs

    @staticmethod
    def _checked(config: Optional[Config]) -> Config:
        config = config or Config(Buffer.num_sms)
        required(config.num_sms % 2 == 0, "config", "an even num_sms", config.num_sms)
        return config

    def _known(self, handle: tuple[Any, ...]) -> Known:
        required(len(handle) == 6, "handle", "six tensors", len(handle))
        return self._find_known(handle[0])

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
                arena_byte_count_max=ARENA_BYTE_COUNT_MAX,
            )

        return self._made(("throughput", expert_count, 0), plan, config.num_sms or None)

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


def _sent(rows: Tensor, scales: Optional[Tensor]) -> dict[str, Any]:
    """What a dispatch sends, as its arguments."""
    if scales is None:
        return {"x": rows}
    if _are_scales(rows, scales):
        lie_in_columns = scales.stride(0) == 1 and scales.stride(1) >= len(scales)
        return {"x": rows, "scales": scales if lie_in_columns else scales.contiguous()}
    # Otherwise rows travel as bytes, what is said of them beside them, whatever it looks like.
    return {"x": rows.view(torch.uint8), "sidecars": (scales.contiguous(),)}


def _are_scales(rows: Tensor, scales: Tensor) -> bool:
    """Whether they are such as SwiftEP knows of: the same on all ranks, whose strides may differ."""
    if rows.dtype != torch.float8_e4m3fn or scales.dim() != 2:
        return False
    channel_count = {torch.float32: 128, torch.int32: 512}.get(scales.dtype, 0)
    return channel_count != 0 and scales.shape[1] == -(-rows.shape[1] // channel_count)


def _received(result: DispatchResult, rows: Tensor, scales: Optional[Tensor]) -> Rows:
    received = _torch.as_tensor(result.rows)
    if scales is None:
        return received
    if result.scales is not None:
        return received, _torch.as_tensor(result.scales)
    return received.view(rows.dtype), _torch.as_tensor(result.sidecars[0])
