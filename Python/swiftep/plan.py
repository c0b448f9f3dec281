"""What a buffer holds."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Optional

from ._native_types import ERROR_OUT, INT64S, ffi, lib, new
from .dtypes import DType
from .errors import check, refusal


class Layout(enum.IntEnum):
    """How received rows are ordered."""

    #: One row a token, by source rank, then token.
    BY_SOURCE = lib.SWIFTEP_BY_SOURCE
    #: One row per token and expert, grouped by local expert; in a group by source rank, then token.
    BY_EXPERT = lib.SWIFTEP_BY_EXPERT
    #: The same with a group of fixed size for each local expert, `[local experts, ranks * tokens_per_rank_max, ...]`.
    GROUPED = lib.SWIFTEP_GROUPED


class Scales(enum.IntEnum):
    """How the scales of quantized rows are stored."""

    NONE = lib.SWIFTEP_NO_SCALES
    #: Of FP8 rows: fp32 `[rows, ceil(hidden / 128)]`.
    FP32 = lib.SWIFTEP_SCALES_FP32
    #: Of FP8 rows: powers of two as biased exponents, packed by four: int32 `[rows, ceil(hidden / 512)]`.
    UE8M0 = lib.SWIFTEP_SCALES_UE8M0
    #: As fp32, each rounded up to a power of two.
    POWER_OF_TWO = lib.SWIFTEP_SCALES_POWER_OF_TWO
    #: Of NVFP4 rows: fp8 E4M3 `[rows, hidden / 16]`, and a global scale.
    NVFP4 = lib.SWIFTEP_SCALES_NVFP4


class Encoding(enum.IntEnum):
    """How rows travel in a combine."""

    NONE = lib.SWIFTEP_ENCODING_NONE
    #: bf16 rows of a multiple of 128 channels as 10 bits a channel: a sign, and the logarithm of the magnitude in 510 steps
    #: between the least and the largest of a block of 128 channels. A block that this would change by more than 1.1% of a
    #: value is read as it is. All rows are coded first, in memory of the arena, wherever they lie, and not in steps; where the
    #: plan has none for that (`combine_encoding`), the arena grows.
    LOGFMT = lib.SWIFTEP_ENCODING_LOGFMT


class Masking(enum.IntEnum):
    """Whether a buffer can go on without some of its ranks."""

    NONE = lib.SWIFTEP_MASKING_NONE
    MANUAL = lib.SWIFTEP_MASKING_MANUAL
    #: A missing rank is masked, and the operation goes on without it.
    AUTOMATIC = lib.SWIFTEP_MASKING_AUTOMATIC


class Plan:
    """A job, and how much of it a buffer holds at a time: what it takes, to the byte, before anything is allocated.

    Args:
        rank_count: how many ranks there are.
        tokens_per_rank_max: tokens that one rank dispatches at most.
        hidden: channels of a token.
        top_k: experts of a token, at most; 0 where tokens are routed by table alone.
        expert_count: experts of all ranks.
        expert_owners: the rank of each expert; None: the same number for each rank, the first ranks one more.
        dtype: of received rows; anything that `DType.of` takes.
        scales: that arrive with FP8 or NVFP4 rows.
        sidecar_byte_counts: bytes per token of each sidecar.
        layout: of received rows.
        expert_alignment: by expert: each group of rows begins at a multiple of this.
        combine_dtype: of the rows that combine sums.
        combine_encoding: how they travel.
        index_byte_count: of a top-k index, 4 or 8.
        result_count: results that are alive at the same time.
        workers: that one call uses.
        masking: whether the buffer can go on without some of its ranks.
        received_tokens_max: tokens that one rank receives at most; None: all tokens of all ranks.
        is_staged: whether there is memory for rows of combines that lie outside the arena.
        staged_tokens_per_step: with `is_staged`: so many tokens at a time; None: all at once.
        arena_byte_count_max: how far the arena may grow; None: eight times the plan, at least 1 GiB.

    Raises:
        InvalidArgument: with the argument's name, and no rank.
    """

    __slots__ = ("_c", "__weakref__")

    def __init__(
        self,
        rank_count: int,
        tokens_per_rank_max: int,
        hidden: int,
        top_k: int,
        expert_count: int,
        *,
        expert_owners: Optional[Sequence[int]] = None,
        dtype: Any = DType.BF16,
        scales: Scales = Scales.NONE,
        sidecar_byte_counts: Sequence[int] = (),
        layout: Layout = Layout.BY_SOURCE,
        expert_alignment: int = 1,
        combine_dtype: Any = DType.BF16,
        combine_encoding: Encoding = Encoding.NONE,
        index_byte_count: int = 8,
        result_count: int = 1,
        workers: int = 1,
        masking: Masking = Masking.NONE,
        received_tokens_max: Optional[int] = None,
        is_staged: bool = False,
        staged_tokens_per_step: Optional[int] = None,
        arena_byte_count_max: Optional[int] = None,
    ) -> None:
        options = new("swiftep_plan_options *")
        options.size = ffi.sizeof(options[0])
        held = []
        if expert_owners is not None:
            owners = [_int32("expert_owners", owner) for owner in expert_owners]
            if len(owners) != expert_count:
                raise refusal("expert_owners", f"{expert_count} ranks", len(owners))
            held.append(new("int32_t[]", owners))
            options.expert_owners = held[-1]
        if len(sidecar_byte_counts):
            held.append(new(INT64S, [_count("sidecar_byte_counts", size) for size in sidecar_byte_counts]))
            options.sidecar_byte_counts = held[-1]
            options.sidecar_count = len(sidecar_byte_counts)
        if received_tokens_max is not None:
            held.append(new(INT64S, [received_tokens_max]))
            options.received_tokens_max = held[-1]
        options.rank_count = _int32("rank_count", rank_count)
        options.tokens_per_rank_max = _int32("tokens_per_rank_max", tokens_per_rank_max)
        options.hidden = _int32("hidden", hidden)
        options.top_k = _int32("top_k", top_k)
        options.expert_count = _int32("expert_count", expert_count)
        options.dtype = DType.of(dtype)
        options.scales = scales
        options.layout = layout
        options.expert_alignment = _count("expert_alignment", expert_alignment)
        options.combine_dtype = DType.of(combine_dtype)
        options.combine_encoding = combine_encoding
        options.index_byte_count = _count("index_byte_count", index_byte_count)
        options.result_count = _count("result_count", result_count)
        options.workers = _count("workers", workers)
        options.masking = masking
        options.is_staged = bool(is_staged)
        if staged_tokens_per_step is not None:
            options.staged_tokens_per_step = _count("staged_tokens_per_step", staged_tokens_per_step)
        if arena_byte_count_max is not None:
            if arena_byte_count_max < 1:
                raise refusal("arena_byte_count_max", "at least 1", arena_byte_count_max)
            options.arena_byte_count_max = min(arena_byte_count_max, 2**63 - 1)
        made, error = new("swiftep_plan **"), new(ERROR_OUT)
        check(lib.swiftep_plan_create(options, made, error), error)
        self._c = ffi.gc(made[0], lib.swiftep_plan_free)

    @property
    def byte_count(self) -> int:
        """Bytes of one rank, of everything."""
        return int(lib.swiftep_plan_byte_count(self._c))

    @property
    def arena_byte_count(self) -> int:
        """Bytes of the memory that peers reach."""
        return int(lib.swiftep_plan_arena_byte_count(self._c))

    @property
    def arena_byte_count_max(self) -> int:
        """Bytes that this memory grows to where routing overflows the plan."""
        return int(lib.swiftep_plan_arena_byte_count_max(self._c))

    @property
    def rows_per_result(self) -> int:
        """Rows that one result of a dispatch holds."""
        return int(lib.swiftep_plan_rows_per_result(self._c))

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of each part, by its name."""
        parts = {}
        for index in range(lib.swiftep_plan_part_count(self._c)):
            name = new("const char **")
            byte_count = lib.swiftep_plan_part(self._c, index, name)
            parts[ffi.string(name[0]).decode()] = int(byte_count)
        return parts

    def __repr__(self) -> str:
        return f"<swiftep.Plan of {self.byte_count} bytes a rank>"


def _int32(argument: str, value: int) -> int:
    if not -(2**31) <= value < 2**31:
        raise refusal(argument, "a 32-bit integer", value)
    return value


def _count(argument: str, value: int) -> int:
    # 0 is the library's default.
    if value < 1:
        raise refusal(argument, "at least 1", value)
    return _int32(argument, value)
