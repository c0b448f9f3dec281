"""DeepEP's calls for few tokens."""

from __future__ import annotations

import functools
from typing import Any, Optional

import torch
from torch import Tensor

from .. import torch as _torch
from ..dispatch import ScaleOrder, Sizing
from ..errors import refusal
from ..plan import Encoding, Layout, Scales
from ._checks import required
from ._groups import Groups, PackedGroups, in_slots
from ._masks import Masks
from ._order import Hook, Order, finished
from ._shared import Known, Rows, keep_known, shape_of
from .utils import EventOverlap


class LowLatency(Masks):
    """Of `Buffer`."""

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
    ) -> tuple[Rows, Tensor, tuple[Any, ...], EventOverlap, Hook]:
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
            f"{x.dtype} {shape_of(x)}",
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

        used = (x, topk_idx, cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats, waits)
        hook = finished(result, finish, order, return_recv_hook, used)
        received: Rows = groups.rows if groups.scales is None else (groups.rows, groups.scales)
        handle = (groups.source_tokens, groups.ranges, num_max_dispatch_tokens_per_rank, x.shape[1], num_experts)
        keep_known(groups.ranges, Known(buffer, result.handle, topk_idx, groups.places))
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
            topk_idx: int64 `[tokens, top_k]`, as the dispatch's, or -1 for terms that are left out, whose rows are not read.
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
            f"{x.dtype} {shape_of(x)}",
        )
        required(
            topk_idx.dim() == 2 and topk_idx.is_contiguous() and topk_idx.dtype == torch.int64,
            "topk_idx",
            "a dense int64 [tokens, top_k]",
            f"{topk_idx.dtype} {shape_of(topk_idx)}",
        )
        required(
            topk_weights.shape == topk_idx.shape and topk_weights.is_contiguous() and topk_weights.dtype == torch.float32,
            "topk_weights",
            f"a dense fp32 {shape_of(topk_idx)}",
            f"{topk_weights.dtype} {shape_of(topk_weights)}",
        )
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
            weights = topk_weights
            if not known.has_routed_by(topk_idx):
                # Without a look at the indices on the host: where none is left out, the weights stay what they are.
                weights = torch.where(topk_idx >= 0, topk_weights, 0)
            result = known.buffer.combine(
                given if known.places is None else in_slots(given, known.places),
                known.handle,
                row_weights=weights,
                output=tokens,
                encoding=Encoding.LOGFMT if use_logfmt else Encoding.NONE,
                wait_statistics=waits,
                receives_later=return_recv_hook,
                **order.options,
            )

        def finish() -> None:
            if stats is not None and waits is not None:
                stats.add_(_cycles(waits, x.device))

        used = (given, topk_idx, topk_weights, weights, stats, waits, known.places)
        hook = finished(result, finish, order, return_recv_hook, used)
        event = order.end(used, (tokens,))
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


def _cycles(nanoseconds: Tensor, device: torch.device) -> Tensor:
    """Of the GPU's clock, or of 1 GHz where PyTorch does not tell it, as on CPUs."""
    return (nanoseconds.double() * _gigahertz(device)).long()


@functools.lru_cache(maxsize=None)
def _gigahertz(device: torch.device) -> float:
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return float(getattr(properties, "clock_rate", 1_000_000)) / 1e6
