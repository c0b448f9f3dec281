"""What a low-latency dispatch has received, as DeepEP's callers want it: in each expert's group, valid rows first."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .. import torch as _torch
from ..dispatch import DispatchResult
from ..errors import refusal


class Groups:
    """In the buffer's own memory, where rows lie so. Complete behind `finish`.

    Attributes:
        rows: `[local experts, rows, hidden]`.
        scales: `[local experts, rows, scales]`, column-major; None: rows are not quantized.
        counts: int32 `[local experts]`: rows that are valid.
        source_tokens: int32 `[local experts, rows]`: each row's token at its source.
        ranges: int64 `[local experts, ranks]`: where a source's rows begin, times 2**32, plus their number.
        places: see `PackedGroups`; None: a combine reads rows as they lie.
        made: which of them are memory of PyTorch's.
    """

    rows: Tensor
    scales: Optional[Tensor]
    counts: Tensor
    source_tokens: Tensor
    ranges: Tensor
    places: Optional[Tensor] = None
    made: tuple[Tensor, ...]

    def __init__(self, result: DispatchResult) -> None:
        if result.source_offsets is None:
            raise refusal("handle", "where the rows of each source begin", None)
        self._offsets = _torch.as_tensor(result.source_offsets)
        self.rows = _torch.as_tensor(result.rows)
        self.scales = None if result.scales is None else _torch.as_tensor(result.scales).transpose(1, 2)
        self.counts = _torch.as_tensor(result.unaligned_tokens_per_expert)
        self.source_tokens = _torch.as_tensor(result.origins)[..., 1]
        self.ranges = torch.empty_like(self._offsets[:, 1:], dtype=torch.int64)
        self.made = (self.ranges,)

    def finish(self) -> None:
        """The rows have arrived."""
        begins, ends = self._offsets[:, :-1], self._offsets[:, 1:]
        self.ranges.copy_(_ranges(begins.long(), ends - begins))


class PackedGroups(Groups):
    """The same of a buffer whose ranks can be masked, copied: there, each source has slots of its own in each group, whoever is
    masked, and source `s` fills those from `s * token_count_max` on. Shapes do not depend on what arrives, so the host waits
    for nothing.

    Attributes:
        places: int64 `[local experts * rows]`: the row that belongs in each slot, of all groups; any, where none does.
    """

    places: Tensor

    def __init__(self, result: DispatchResult, token_count_max: int) -> None:
        if result.source_counts is None:
            raise refusal("handle", "how many rows of each source there are", None)
        self._token_count_max = token_count_max
        # As they lie in the slots.
        self._source_counts = _torch.as_tensor(result.source_counts)
        self._slot_rows = _torch.as_tensor(result.rows)
        self._slot_scales = None if result.scales is None else _torch.as_tensor(result.scales)
        self._slot_tokens = _torch.as_tensor(result.origins)[..., 1]
        self.rows = torch.empty_like(self._slot_rows)
        # Columns, as in memory.
        self._columns = None if self._slot_scales is None else torch.empty_like(self._slot_scales)
        self.scales = None if self._columns is None else self._columns.transpose(1, 2)
        self.source_tokens = self._slot_tokens.new_empty(self._slot_tokens.shape)
        self.counts = self._source_counts.new_empty(len(self._source_counts))
        self.ranges = torch.empty_like(self._source_counts, dtype=torch.int64)
        # A combine that comes before they are known is refused behind them.
        self.places = self.ranges.new_zeros(self.source_tokens.numel())
        columns = () if self._columns is None else (self._columns,)
        self.made = (self.rows, *columns, self.counts, self.source_tokens, self.ranges, self.places)

    def finish(self) -> None:
        # Whatever a dispatch that has failed leaves here leads nowhere else.
        counts = self._source_counts.long().clamp(0, self._token_count_max)
        ends = counts.cumsum(1)
        begins, total = ends - counts, ends[:, -1:]
        self.ranges.copy_(_ranges(begins, counts))
        self.counts.copy_(total[:, 0])

        group_count, row_count = self.source_tokens.shape
        firsts = torch.arange(group_count, device=ends.device).unsqueeze(1) * row_count
        row = torch.arange(row_count, device=ends.device).repeat(group_count, 1)
        source = torch.searchsorted(ends, row, right=True).clamp(max=counts.shape[1] - 1)
        slot = source * self._token_count_max + row - begins.gather(1, source)
        slot = torch.where(row < total, slot, 0)
        torch.index_select(_words(self._slot_rows), 0, (firsts + slot).flatten(), out=_words(self.rows))
        torch.gather(self._slot_tokens, 1, slot, out=self.source_tokens)
        if self._slot_scales is not None and self._columns is not None:
            torch.gather(self._slot_scales, 2, slot.unsqueeze(1).expand(self._slot_scales.shape), out=self._columns)

        token = torch.arange(self._token_count_max, device=ends.device)
        place = torch.where(token < counts.unsqueeze(2), begins.unsqueeze(2) + token, 0)
        self.places.copy_((firsts + place.flatten(1)).flatten())


def in_slots(rows: Tensor, places: Tensor) -> Tensor:
    """A caller's rows, as a combine of a buffer with masks reads them: `[local experts, rows, hidden]`, too."""
    return rows.flatten(0, 1).index_select(0, places).view(rows.shape)


def _ranges(begins: Tensor, counts: Tensor) -> Tensor:
    return (begins << 32) | counts


def _words(rows: Tensor) -> Tensor:
    """`[rows, words]`: the same bytes, which are of no matter, in the largest pieces that there are."""
    return rows.flatten(0, 1).view(torch.int64)
