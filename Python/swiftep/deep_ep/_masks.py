"""The buffers of calls for few tokens, and the ranks that these go on without."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..buffer import Buffer as Plain
from ..plan import Layout, Masking, Plan
from ._checks import required
from ._shared import ARENA_BYTE_COUNT_MAX, Shared, shape_of

_LOW_LATENCY = "low latency"


class Masks(Shared):
    """Of `Buffer`."""

    #: What callers have masked, also before a buffer was made.
    _masked_by_hand: set[int]

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
            f"{mask_status.dtype} {shape_of(mask_status)}",
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

    def _maskable(self) -> list[Plain]:
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

    # What they are of

    def _check_low_latency(self, async_finish: bool = False, return_recv_hook: bool = False) -> None:
        required(self.low_latency_mode, "low_latency_mode", "True", False)
        required(not (async_finish and return_recv_hook), "async_finish", "False, with return_recv_hook", True)

    def _low_latency_buffer(self, token_count: int, hidden: int, expert_count: int) -> Plain:
        masking = Masking.AUTOMATIC if self.enable_shrink else Masking.NONE

        def plan() -> Plan:
            return low_latency_plan(self.group_size, token_count, hidden, expert_count, masking)

        key = (_LOW_LATENCY, expert_count, token_count)
        is_new = key not in self._buffers
        buffer = self._made(key, plan, None)
        if is_new and self._masked_by_hand:
            buffer.mask(self._masked_by_hand)
        return buffer


def low_latency_plan(
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
        arena_byte_count_max=ARENA_BYTE_COUNT_MAX,
    )
