"""DeepEP's interface, on CPUs: ranks that are processes of a group, against what each rank can work out by itself."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from typing import AbstractSet, Any, Callable

import pytest

pytest.importorskip("torch")

import swiftep  # noqa: E402
import swiftep.deep_ep as deep_ep  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

HIDDEN, TOP_K, EXPERTS = 1024, 4, 12
FP8 = torch.float8_e4m3fn


def tokens_of(rank: int, rank_count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Other numbers of tokens on each rank, some of which go nowhere."""
    random = torch.Generator().manual_seed(rank)
    count = 24 + 9 * rank
    x = torch.randn(count, HIDDEN, generator=random).bfloat16()
    indices = torch.stack([torch.randperm(EXPERTS, generator=random)[:TOP_K] for _ in range(count)])
    indices[::5, 1] = -1
    indices[3] = -1
    return x, indices, torch.rand(count, TOP_K, generator=random)


def quantized(x: Tensor, rank: int = 0) -> tuple[Tensor, Tensor]:
    """In FP8, with scales of other strides on each rank: in columns, in columns with gaps, in rows, in every other column."""
    blocks = x.float().view(len(x), x.shape[1] // 128, 128)
    scales = blocks.abs().amax(2).clamp(min=1e-4) / 448
    places = [
        scales.T.contiguous().T,
        scales.new_full((scales.shape[1], len(scales) + 3), torch.nan).T[: len(scales)],
        scales.clone(),
        scales.new_full((len(scales), 2 * scales.shape[1]), torch.nan)[:, ::2],
    ]
    place = places[rank % len(places)]
    return (blocks / scales.unsqueeze(2)).to(FP8).view(x.shape), place.copy_(scales)


def as_bytes(rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return rows[0].view(torch.uint8), rows[1]


def restored(rows: tuple[Tensor, Tensor]) -> Tensor:
    values, scales = rows
    blocks = values.view(FP8).float().view(*values.shape[:-1], values.shape[-1] // 128, 128)
    return (blocks * scales.unsqueeze(-1)).view(values.shape)


class Oracle:
    """Of one rank: what it receives from all."""

    def __init__(self, rank: int, rank_count: int) -> None:
        self.local_count = EXPERTS // rank_count
        self.everything = [tokens_of(source, rank_count) for source in range(rank_count)]
        self.x, self.indices, self.weights = self.everything[rank]
        first = rank * self.local_count
        self.here = [(indices >= first) & (indices < first + self.local_count) for _, indices, _ in self.everything]
        self.goes = [here.any(1) for here in self.here]
        self.rows = torch.cat([x[goes] for (x, _, _), goes in zip(self.everything, self.goes)])
        self.row_indices = torch.cat(
            [
                torch.where(here, indices - first, -1)[goes]
                for (_, indices, _), here, goes in zip(self.everything, self.here, self.goes)
            ]
        )
        self.row_weights = torch.cat(
            [
                torch.where(here, weights, 0)[goes]
                for (_, _, weights), here, goes in zip(self.everything, self.here, self.goes)
            ]
        )
        owners = torch.where(self.indices >= 0, self.indices // self.local_count, rank_count)
        self.is_token_in_rank = torch.stack([(owners == other).any(1) for other in range(rank_count)], 1)
        self.copies = self.is_token_in_rank.sum(1, keepdim=True)

    def expert_counts(self, alignment: int = 1) -> list[int]:
        counts = [int((self.row_indices == expert).sum()) for expert in range(self.local_count)]
        return [-(-count // alignment) * alignment for count in counts]


def check_throughput(buffer: deep_ep.Buffer) -> None:
    rank, rank_count = buffer.rank, buffer.group_size
    oracle = Oracle(rank, rank_count)
    x, indices, weights = oracle.x, oracle.indices, oracle.weights
    per_rank, none, per_expert, is_token_in_rank, event = buffer.get_dispatch_layout(indices, EXPERTS)
    assert none is None and event.event is None
    assert torch.equal(is_token_in_rank, oracle.is_token_in_rank)
    assert torch.equal(per_rank, oracle.is_token_in_rank.sum(0, dtype=torch.int32))
    assert per_expert.tolist() == [int((indices == expert).sum()) for expert in range(EXPERTS)]
    layout = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": is_token_in_rank,
        "num_tokens_per_expert": per_expert,
    }
    worst = sum(len(other) for other, _, _ in oracle.everything)
    kept = []
    for given in (x, quantized(x, rank), as_bytes(quantized(x, rank + 1))):
        plain = restored(given).bfloat16() if isinstance(given, tuple) else given
        wanted = restored(quantized(oracle.rows)) if isinstance(given, tuple) else oracle.rows
        for is_async in (False, True):
            for has_top_k in (False, True):
                options: dict[str, Any] = {"async_finish": is_async}
                if is_async:
                    options["previous_event"] = buffer.capture()
                top_k = {"topk_idx": indices, "topk_weights": weights} if has_top_k else {}
                rows, row_indices, row_weights, counts, handle, event = buffer.dispatch(
                    given, expert_alignment=8, **layout, **top_k, **options
                )
                if is_async:
                    event.current_stream_wait()
                kept.append(rows)
                received = restored(rows) if isinstance(rows, tuple) else rows
                assert torch.equal(received, wanted)
                assert counts == oracle.expert_counts(8)
                assert len(handle) == 6 and torch.equal(handle[4], is_token_in_rank)
                sent = [[int(goes.sum()) for goes in Oracle(to, rank_count).goes] for to in range(rank_count)]
                assert handle[0].is_contiguous() and handle[0].dtype == torch.int32
                assert torch.equal(handle[0].long(), torch.tensor(sent).T.cumsum(0))
                assert torch.equal(handle[3].long(), torch.cat([goes.nonzero()[:, 0] for goes in oracle.goes]))
                if has_top_k:
                    assert row_indices is not None and row_weights is not None
                    assert torch.equal(row_indices, oracle.row_indices) and row_indices.dtype == deep_ep.topk_idx_t
                    assert torch.equal(row_weights, oracle.row_weights)
                    more, more_indices, more_weights, no_counts, more_handle, _ = buffer.dispatch(
                        given, num_worst_tokens=worst, **layout, **top_k, **options
                    )
                    more = more[0] if isinstance(more, tuple) else more
                    first = rows[0] if isinstance(rows, tuple) else rows
                    assert no_counts == [] and len(more) == len(more_indices) == len(more_weights) == worst
                    assert torch.equal(more[: len(first)].view(torch.uint8), first.view(torch.uint8))
                    assert torch.equal(more_indices[: len(first)], row_indices)
                    assert bool((more_indices[len(first) :] == -1).all())
                else:
                    assert row_indices is None and row_weights is None
                    # As a caller keeps it that saves tensors one by one.
                    again, *nothing, _ = buffer.dispatch(given, handle=tuple(part.detach() for part in handle), **options)
                    assert nothing == [None] * 4
                    received = restored(again) if isinstance(again, tuple) else again
                    assert torch.equal(received, wanted)
                bias = torch.ones_like(x) if is_async else None
                tokens, summed, event = buffer.combine(
                    received.bfloat16(),
                    handle,
                    topk_weights=row_weights,
                    bias=None if bias is None else (bias, bias),
                    **options,
                )
                added = 0 if bias is None else 2
                torch.testing.assert_close(tokens, (plain.float() * oracle.copies + added).bfloat16(), rtol=0.02, atol=0.02)
                if has_top_k:
                    assert summed is not None
                    torch.testing.assert_close(summed, torch.where(indices >= 0, weights, 0))
    # What has been returned stays what it was, however much has come since.
    for rows in kept[:4]:
        assert torch.equal(rows, oracle.rows)


KINDS: tuple[dict[str, bool], ...] = (
    {"use_fp8": False},
    {},
    {"round_scale": True},
    {"round_scale": True, "use_ue8m0": True},
)


def low_latency_dispatch(buffer: deep_ep.Buffer, hooks: bool, kind: dict[str, bool], **options: Any) -> Any:
    """The rows, their counts and the handle, when they are there."""
    oracle = Oracle(buffer.rank, buffer.group_size)
    received, counts, handle, event, hook = buffer.low_latency_dispatch(
        oracle.x,
        oracle.indices,
        24 + 9 * buffer.group_size,
        EXPERTS,
        async_finish=not hooks,
        return_recv_hook=hooks,
        **kind,
        **options,
    )
    if hook is None:
        event.current_stream_wait()
    else:
        hook()
    return received, counts, handle


def check_low_latency_dispatch(
    buffer: deep_ep.Buffer, hooks: bool, kind: dict[str, bool], absent: AbstractSet[int]
) -> tuple[Tensor, Any]:
    """Returns the rows as BF16, and the handle."""
    rank, rank_count = buffer.rank, buffer.group_size
    oracle = Oracle(rank, rank_count)
    most, first = 24 + 9 * rank_count, rank * oracle.local_count
    statistics = torch.zeros(oracle.local_count, dtype=torch.int32)
    waits = torch.zeros(rank_count, dtype=torch.int64)
    received, counts, handle = low_latency_dispatch(
        buffer,
        hooks,
        kind,
        cumulative_local_expert_recv_stats=statistics,
        dispatch_wait_recv_cost_stats=waits,
    )
    assert int(waits[rank]) == 0 and bool((waits >= 0).all())
    assert torch.equal(counts, statistics) and (absent or counts.tolist() == oracle.expert_counts())
    source_tokens, ranges, *numbers = handle
    assert numbers == [most, HIDDEN, EXPERTS]
    rows = received
    if isinstance(received, tuple):
        values, scales = received
        if kind.get("use_ue8m0"):
            assert scales.dtype == torch.int32 and scales.shape[-1] == HIDDEN // 512
            exponents = scales.contiguous().view(torch.uint8).view(*scales.shape[:2], -1).int()
            scales = (exponents << 23).view(torch.float32)
        else:
            assert scales.stride(1) == 1 and scales.shape[-1] == HIDDEN // 128
        rows = restored((values, scales))
    assert list(rows.shape) == [oracle.local_count, rank_count * most, HIDDEN]
    for expert, count in enumerate(counts.tolist()):
        found = []
        for source, (other, there, _) in enumerate(oracle.everything):
            goes = (there == first + expert).any(1) & (source not in absent)
            found.append((other[goes], goes.nonzero()[:, 0]))
        wanted = torch.cat([part for part, _ in found]).float()
        tolerance = 0.0 if not isinstance(received, tuple) else 0.13
        torch.testing.assert_close(rows[expert, :count].float(), wanted, rtol=tolerance, atol=tolerance / 10)
        assert torch.equal(source_tokens[expert, :count].long(), torch.cat([tokens for _, tokens in found]))
        begin = 0
        for source, (part, _) in enumerate(found):
            assert (int(ranges[expert, source]) >> 32, int(ranges[expert, source]) & 0xFFFFFFFF) == (begin, len(part))
            begin += len(part)
    return rows.bfloat16(), handle


def check_low_latency_combine(
    buffer: deep_ep.Buffer, experts: Tensor, handle: Any, hooks: bool, is_quantized: bool, absent: AbstractSet[int]
) -> None:
    oracle = Oracle(buffer.rank, buffer.group_size)
    x, indices, weights = oracle.x, oracle.indices, oracle.weights
    waits = torch.zeros(buffer.group_size, dtype=torch.int64)
    there = indices >= 0
    for rank in absent:
        there = there & (indices // oracle.local_count != rank)
    wanted = restored(quantized(x)) if is_quantized else x.float()
    wanted = wanted * torch.where(there, weights, 0).sum(1, keepdim=True)
    for zero_copy in (False, True):
        given = experts
        if zero_copy:
            buffer.get_next_low_latency_combine_buffer(handle)[:] = experts
            given = torch.full_like(experts, float("nan"))
        out = torch.empty_like(x)
        tokens, event, hook = buffer.low_latency_combine(
            given,
            indices,
            weights,
            handle,
            zero_copy=zero_copy,
            async_finish=not hooks,
            return_recv_hook=hooks,
            out=out,
            combine_wait_recv_cost_stats=waits,
        )
        if hook is not None:
            hook()
        assert tokens.data_ptr() == out.data_ptr()
        torch.testing.assert_close(tokens.float(), wanted, rtol=0.1, atol=0.1)
    assert int(waits[buffer.rank]) == 0 and bool((waits >= 0).all())
    exact, _, _ = buffer.low_latency_combine(experts, indices, weights, handle)
    coded, _, hook = buffer.low_latency_combine(
        experts, indices, weights, handle, use_logfmt=True, return_recv_hook=hooks
    )
    if hook is not None:
        hook()
    torch.testing.assert_close(coded.float(), exact.float(), rtol=0.02, atol=1e-3)
    assert not torch.equal(coded, exact)


def check_low_latency(buffer: deep_ep.Buffer, absent: AbstractSet[int] = frozenset()) -> None:
    for hooks in (False, True):
        for kind in KINDS:
            experts, handle = check_low_latency_dispatch(buffer, hooks, kind, absent)
            check_low_latency_combine(buffer, experts, handle, hooks, kind.get("use_fp8", True), absent)
    buffer.clean_low_latency_buffer(24 + 9 * buffer.group_size, HIDDEN, EXPERTS)


def check_terms_left_out(buffer: deep_ep.Buffer) -> None:
    """A combine leaves out what is -1 in its indices, wherever they lie: it cannot bring in what no dispatch has sent."""
    oracle = Oracle(buffer.rank, buffer.group_size)
    x, indices, weights = oracle.x, oracle.indices, oracle.weights
    most = 24 + 9 * buffer.group_size
    fewer = indices.clone()
    fewer[1::3, 0] = fewer[4] = -1

    def wanted(there: Tensor) -> Tensor:
        return x.float() * torch.where(there >= 0, weights, 0).sum(1, keepdim=True)

    for is_inference in (False, True):
        with torch.inference_mode(is_inference):
            own = indices.clone()
            rows, _, handle, _, _ = buffer.low_latency_dispatch(x, own, most, EXPERTS, use_fp8=False)
            for hooks in (False, True):

                def check(given: Tensor, there: Tensor, rows: Tensor = rows, **options: Any) -> None:
                    # The weights of what is left out are of no matter; nor does the caller have to keep them for the hook.
                    of_no_matter = torch.where(given < 0, float("nan"), weights)
                    tokens, _, hook = buffer.low_latency_combine(
                        rows, given, of_no_matter, handle, return_recv_hook=hooks, **options
                    )
                    del of_no_matter
                    if hook is not None:
                        hook()
                    torch.testing.assert_close(tokens.float(), wanted(there), rtol=0.02, atol=0.02)

                check(own, indices)
                check(fewer, fewer)
                check(fewer, fewer, use_logfmt=True)
                # Nor are their rows: each rank's first expert has none.
                without = torch.where(indices % oracle.local_count == 0, -1, indices)
                check(without, without, torch.cat([torch.full_like(rows[:1], float("nan")), rows[1:]]))
                check(indices.clamp(min=0), indices)
                own.copy_(fewer)
                check(own, fewer)
                own.copy_(indices)
                check(own, indices)


def check_nothing(buffer: deep_ep.Buffer) -> None:
    """A rank without tokens; and all tokens to the first expert, so that the other ranks receive nothing."""
    count = 0 if buffer.rank == 0 and buffer.group_size > 1 else 5
    x = torch.full((count, HIDDEN), 1.0 + buffer.rank).bfloat16()
    indices, weights = torch.zeros((count, 1), dtype=torch.int64), torch.full((count, 1), 2.0)
    per_rank, _, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(indices, EXPERTS)
    assert int(per_rank.sum()) == int(per_expert[0]) == count
    layout = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": is_token_in_rank,
        "num_tokens_per_expert": per_expert,
    }
    total = 5 * max(1, buffer.group_size - 1) if buffer.rank == 0 else 0
    for given in (x, quantized(x, buffer.rank)):
        for top_k in ({}, {"topk_idx": indices, "topk_weights": weights}):
            rows, _, row_weights, counts, handle, _ = buffer.dispatch(given, **layout, **top_k)
            received = restored(rows).bfloat16() if isinstance(rows, tuple) else rows
            assert len(received) == total == sum(counts) and counts[0] == total
            tokens, summed, _ = buffer.combine(received, handle, topk_weights=row_weights)
            torch.testing.assert_close(tokens, x)
            assert summed is None or torch.equal(summed, weights)
            again, *_ = buffer.dispatch(given, handle=handle)
            assert len(again[0] if isinstance(again, tuple) else again) == total
    for use_fp8 in (False, True):
        _, counts, handle, _, _ = buffer.low_latency_dispatch(x, indices, 8, EXPERTS, use_fp8=use_fp8)
        assert int(counts.sum()) == int(counts[0]) == total
        experts = torch.ones((len(counts), 8 * buffer.group_size, HIDDEN), dtype=torch.bfloat16)
        tokens, _, _ = buffer.low_latency_combine(experts, indices, weights, handle)
        assert torch.equal(tokens, torch.full_like(x, 2))


def check_bad_input(buffer: deep_ep.Buffer) -> None:
    """The same on all ranks, which go on."""
    oracle = Oracle(buffer.rank, buffer.group_size)
    x, indices, weights = oracle.x, oracle.indices, oracle.weights
    per_rank, _, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(indices, EXPERTS)
    layout = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": is_token_in_rank,
        "num_tokens_per_expert": per_expert,
    }

    def refused(argument: str, call: Callable[[], Any]) -> None:
        with pytest.raises(swiftep.InvalidArgument) as raised:
            call()
        assert str(raised.value.argument).startswith(argument), raised.value

    top_k = {"topk_idx": indices, "topk_weights": weights}
    refused("topk_idx", lambda: buffer.get_dispatch_layout(indices.int(), EXPERTS))
    refused("num_experts", lambda: buffer.get_dispatch_layout(indices, 0))
    beyond = buffer.get_dispatch_layout(indices + EXPERTS * (indices >= 0), EXPERTS)
    assert not any(bool(part.any()) for part in (beyond[0], beyond[2], beyond[3]))
    refused("config", lambda: buffer.dispatch(x, config=deep_ep.Config(7), **layout, **top_k))
    refused("x", lambda: buffer.dispatch(x.T, **layout))
    refused("x", lambda: buffer.dispatch((x, torch.ones(len(x), 4)), **layout))
    refused("x", lambda: buffer.dispatch((x.to(FP8), torch.ones(1, 4)), **layout))
    refused("num_tokens_per_rank", lambda: buffer.dispatch(x))
    refused("is_token_in_rank", lambda: buffer.dispatch(x, **{**layout, "is_token_in_rank": None}))
    refused("is_token_in_rank", lambda: buffer.dispatch(x, **{**layout, "is_token_in_rank": is_token_in_rank.int()}))
    refused("topk_weights", lambda: buffer.dispatch(x, topk_idx=indices, **layout))
    refused("topk_idx", lambda: buffer.dispatch(x, num_worst_tokens=64, **layout))
    refused("allocate_on_comm_stream", lambda: buffer.dispatch(x, allocate_on_comm_stream=True, **layout, **top_k))
    refused("indices", lambda: buffer.dispatch(x, topk_idx=indices + EXPERTS, topk_weights=weights, **layout))
    handle = buffer.dispatch(x, **layout, **top_k)[4]
    refused("handle", lambda: buffer.dispatch(x, handle=handle, **top_k))
    refused("handle", lambda: buffer.dispatch(x, handle=handle[:5]))
    refused("handle", lambda: buffer.combine(oracle.rows, tuple(part.clone() for part in handle)))
    refused("x", lambda: buffer.combine(oracle.rows.T, handle))
    refused("bias", lambda: buffer.combine(oracle.rows, handle, bias=(x, x, x)))
    refused("rows", lambda: buffer.combine(oracle.rows[1:].contiguous(), handle))
    refused("group", lambda: buffer.internode_dispatch(x))
    most = 24 + 9 * buffer.group_size
    refused("x", lambda: buffer.low_latency_dispatch(x.float(), indices, most, EXPERTS))
    refused("x", lambda: buffer.low_latency_dispatch(x, indices, len(x) - 1, EXPERTS))
    refused("x", lambda: buffer.low_latency_dispatch(x[:, :64].contiguous(), indices, most, EXPERTS))
    refused("topk_idx", lambda: buffer.low_latency_dispatch(x, indices.int(), most, EXPERTS))
    if buffer.group_size > 1:
        refused("num_experts", lambda: buffer.low_latency_dispatch(x, indices, most, EXPERTS + 1))
        fewer = {**layout, "num_tokens_per_expert": per_expert[1:]}
        refused("num_tokens_per_expert", lambda: buffer.dispatch(x, **fewer))
    refused("round_scale", lambda: buffer.low_latency_dispatch(x, indices, most, EXPERTS, use_ue8m0=True))
    refused(
        "async_finish",
        lambda: buffer.low_latency_dispatch(x, indices, most, EXPERTS, async_finish=True, return_recv_hook=True),
    )
    low = buffer.low_latency_dispatch(x, indices, most, EXPERTS, use_fp8=False)
    refused("x", lambda: buffer.low_latency_combine(low[0][:, 1:], indices, weights, low[2]))
    refused("zero_copy", lambda: buffer.low_latency_combine(low[0], indices, weights, low[2], zero_copy=True))
    for bad in (indices.int(), indices[0], indices.T.contiguous().T):
        refused("topk_idx", lambda bad=bad: buffer.low_latency_combine(low[0], bad, weights, low[2]))
    for bad in (weights.double(), weights[:, 1:], weights.T.contiguous().T):
        refused("topk_weights", lambda bad=bad: buffer.low_latency_combine(low[0], indices, bad, low[2]))
    both = {"use_logfmt": True, "zero_copy": True}
    refused("use_logfmt", lambda: buffer.low_latency_combine(low[0], indices, weights, low[2], **both))
    refused("enable_shrink", lambda: buffer.low_latency_update_mask_buffer(0, True))
    refused("enable_shrink", lambda: buffer.low_latency_query_mask_buffer(torch.zeros(buffer.group_size, dtype=torch.int32)))
    refused("enable_shrink", buffer.low_latency_clean_mask_buffer)
    tokens, *_ = buffer.low_latency_combine(low[0], indices, weights, low[2])
    wanted = x.float() * torch.where(indices >= 0, weights, 0).sum(1, keepdim=True)
    torch.testing.assert_close(tokens.float(), wanted, rtol=0.02, atol=0.02)


def check_all(buffer: deep_ep.Buffer, has_group: bool) -> None:
    runtime = buffer.runtime
    assert runtime is not None and runtime.is_available() and runtime.get_num_rdma_ranks() == 1
    check_throughput(buffer)
    check_low_latency(buffer)
    check_terms_left_out(buffer)
    check_nothing(buffer)
    check_bad_input(buffer)
    raw = buffer.get_local_buffer_tensor(torch.bfloat16, torch.Size([2, 3]), offset=1)
    assert list(raw.shape) == [2, 3] and raw.dtype == torch.bfloat16
    other = deep_ep.Buffer(buffer.group if has_group else None, comm=buffer.group, explicitly_destroy=True, timeout=20)
    ranks_rows = torch.zeros((1, 16), dtype=torch.bfloat16)
    indices = torch.full((1, 1), -1, dtype=torch.int64)
    per_rank, _, per_expert, goes, _ = other.get_dispatch_layout(indices, EXPERTS)
    theirs = other.dispatch(ranks_rows, None, per_rank, None, goes, per_expert)[4]
    with pytest.raises(swiftep.InvalidArgument):
        buffer.combine(ranks_rows[:0], theirs)
    other.destroy()
    buffer.destroy()
    for call in (
        buffer.destroy,
        lambda: buffer.get_dispatch_layout(torch.zeros(1, 1, dtype=torch.int64), 2),
        lambda: buffer.combine(torch.zeros(1, 8), (None,) * 6),
        lambda: buffer.low_latency_dispatch(torch.zeros(1, 512).bfloat16(), torch.zeros(1, 1).long(), 1, EXPERTS),
    ):
        with pytest.raises(swiftep.InvalidArgument):
            call()


class FakeMPI:
    """What is used of mpi4py's communicators."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def Get_rank(self) -> int:  # noqa: N802
        return int(self.group.rank())

    def Get_size(self) -> int:  # noqa: N802
        return int(self.group.size())

    def allgather(self, given: Any) -> list[Any]:
        gathered = [None] * self.Get_size()
        dist.all_gather_object(gathered, given, group=self.group)
        return gathered


def check_everything(group: Any) -> None:
    """One and two ranks have a process group, three a communicator of MPI's interface."""
    has_group = group.size() < 3
    given: dict[str, Any] = {"group": group} if has_group else {"group": None, "comm": FakeMPI(group)}
    buffer = deep_ep.Buffer(num_nvl_bytes=1 << 12, low_latency_mode=True, explicitly_destroy=True, timeout=20, **given)
    check_all(buffer, has_group)


def masked_ranks(buffer: deep_ep.Buffer) -> set[int]:
    status = torch.full([buffer.group_size], -1, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    assert bool(((status == 0) | (status == 1)).all())
    return set(status.nonzero()[:, 0].tolist())


def check_as_without_masks(plain: deep_ep.Buffer, buffer: deep_ep.Buffer) -> None:
    """To the bit, of what is valid."""
    oracle = Oracle(buffer.rank, buffer.group_size)
    for hooks in (False, True):
        for kind in KINDS:
            received, counts, handle = low_latency_dispatch(plain, hooks, kind)
            ours, our_counts, our_handle = low_latency_dispatch(buffer, hooks, kind)
            assert torch.equal(our_counts, counts) and our_counts.dtype == counts.dtype
            assert torch.equal(our_handle[1], handle[1]) and our_handle[2:] == handle[2:]
            parts = [received] if not isinstance(received, tuple) else [*received]
            our_parts = [ours] if not isinstance(ours, tuple) else [*ours]
            for part, our_part in zip([*parts, handle[0]], [*our_parts, our_handle[0]]):
                assert our_part.shape == part.shape and our_part.dtype == part.dtype
                assert part is handle[0] or our_part.stride() == part.stride()
                for expert, count in enumerate(counts.tolist()):
                    theirs = part[expert, :count].contiguous().view(torch.uint8)
                    assert torch.equal(our_part[expert, :count].contiguous().view(torch.uint8), theirs)
            assert our_handle[0].is_contiguous()
            random = torch.Generator().manual_seed(1)
            shape = (oracle.local_count, ours[0].shape[1] if isinstance(ours, tuple) else ours.shape[1], HIDDEN)
            experts = torch.randn(shape, generator=random).bfloat16()
            wanted = plain.low_latency_combine(experts, oracle.indices, oracle.weights, handle)[0]
            # Nobody reads rows that no token fills.
            for expert, count in enumerate(counts.tolist()):
                experts[expert, count:] = float("nan")
            for _ in range(2):
                tokens, _, hook = buffer.low_latency_combine(
                    experts, oracle.indices, oracle.weights, our_handle, return_recv_hook=hooks
                )
                if hook is not None:
                    # What is under way is not disturbed by what comes in between.
                    low_latency_dispatch(buffer, False, kind)
                    buffer.get_next_low_latency_combine_buffer(our_handle).fill_(7)
                    buffer.low_latency_combine(torch.zeros_like(experts), oracle.indices, oracle.weights, our_handle)
                    hook()
                assert torch.equal(tokens, wanted)


def check_masks_by_hand(buffer: deep_ep.Buffer) -> None:
    """The last rank is masked by the others, at first before any call, learns it, and returns: by its number, then with all."""
    last = buffer.group_size - 1
    for takes_back in (lambda: buffer.low_latency_update_mask_buffer(last), buffer.low_latency_clean_mask_buffer):
        # Nobody masks it before it has ended its last call.
        dist.barrier()
        if buffer.rank == last:
            with pytest.raises(swiftep.RankMasked):
                low_latency_dispatch(buffer, False, {})
        else:
            buffer.low_latency_update_mask_buffer(last, True)
            assert masked_ranks(buffer) == {last}
            for hooks in (False, True):
                experts, handle = check_low_latency_dispatch(buffer, hooks, {}, {last})
                check_low_latency_combine(buffer, experts, handle, hooks, True, {last})
            assert masked_ranks(buffer) == {last}
        takes_back()
        assert masked_ranks(buffer) == set()
        check_low_latency_dispatch(buffer, False, {}, set())

    throughput = deep_ep.Buffer(buffer.group, enable_shrink=True, explicitly_destroy=True, timeout=20)
    for call in (
        lambda: throughput.low_latency_query_mask_buffer(torch.zeros(buffer.group_size, dtype=torch.int32)),
        lambda: throughput.clean_low_latency_buffer(1, HIDDEN, EXPERTS),
    ):
        with pytest.raises(swiftep.InvalidArgument) as raised:
            call()
        assert raised.value.argument == "low_latency_mode"
    throughput.destroy()
    for bad in (-1, buffer.group_size, buffer.rank):
        with pytest.raises(swiftep.InvalidArgument) as raised:
            buffer.low_latency_update_mask_buffer(bad, True)
        assert raised.value.argument == "rank_to_mask"
    for status in (torch.zeros(buffer.group_size), torch.zeros(buffer.group_size + 1, dtype=torch.int32)):
        with pytest.raises(swiftep.InvalidArgument) as raised:
            buffer.low_latency_query_mask_buffer(status)
        assert raised.value.argument == "mask_status"


#: How long a rank is waited for that does not come: long against what others are late by.
SILENCE = 2.0


def check_silence(buffer: deep_ep.Buffer) -> None:
    """The first rank does not come, and returns later."""
    dist.barrier()
    if buffer.rank == 0:
        dist.barrier()
        with pytest.raises(swiftep.RankMasked):
            low_latency_dispatch(buffer, False, {})
    else:
        began = time.monotonic()
        experts, handle = check_low_latency_dispatch(buffer, False, {}, {0})
        assert SILENCE / 2 < time.monotonic() - began < 5 * SILENCE
        assert masked_ranks(buffer) == {0}
        check_low_latency_combine(buffer, experts, handle, False, True, {0})
        dist.barrier()
    buffer.low_latency_update_mask_buffer(0)
    assert masked_ranks(buffer) == set()
    check_low_latency_dispatch(buffer, False, {}, set())


def check_ranks_that_go(buffer: deep_ep.Buffer) -> None:
    """One does before its first call, one before a combine, one before a barrier. The first is left alone."""
    rank, kind = buffer.rank, {"use_fp8": False}
    gone = set()

    def goes(which: int) -> bool:
        gone.add(which)
        if rank == which:
            buffer.destroy()
        return rank == which

    if goes(1):
        return
    experts, handle = check_low_latency_dispatch(buffer, True, kind, gone)
    assert masked_ranks(buffer) == gone
    if goes(2):
        return
    check_low_latency_combine(buffer, experts, handle, True, False, gone)
    assert masked_ranks(buffer) == gone
    if goes(3):
        return
    buffer.clean_low_latency_buffer(24 + 9 * buffer.group_size, HIDDEN, EXPERTS)
    assert masked_ranks(buffer) == gone
    check_low_latency(buffer, gone)
    # Nobody is there to be taken back.
    with pytest.raises(swiftep.RankMissing):
        buffer.low_latency_clean_mask_buffer()
    assert masked_ranks(buffer) == gone


def check_early_combine(buffer: deep_ep.Buffer) -> None:
    """Before the rows have been received, all ranks refuse it; behind the hook it works."""
    oracle = Oracle(buffer.rank, buffer.group_size)
    most = 24 + 9 * buffer.group_size
    rows, _, handle, _, hook = buffer.low_latency_dispatch(
        oracle.x, oracle.indices, most, EXPERTS, use_fp8=False, return_recv_hook=True
    )
    assert isinstance(rows, torch.Tensor) and hook is not None
    with pytest.raises(swiftep.InvalidArgument) as raised:
        buffer.low_latency_combine(torch.ones_like(rows), oracle.indices, oracle.weights, handle)
    assert raised.value.argument == "handle"
    hook()
    tokens, _, _ = buffer.low_latency_combine(torch.ones_like(rows), oracle.indices, oracle.weights, handle)
    wanted = torch.where(oracle.indices >= 0, oracle.weights, 0).sum(1, keepdim=True).expand(tokens.shape)
    torch.testing.assert_close(tokens.float(), wanted, rtol=0.01, atol=0.01)


def check_hint_of_one_rank(made: Callable[..., deep_ep.Buffer], rank: int) -> None:
    """Only the first rank has asked for the bytes: no rank makes a buffer of them before the others do."""
    sizes = [deep_ep.Buffer.get_low_latency_rdma_size_hint(3, HIDDEN, dist.get_world_size(), EXPERTS) if rank == 0 else 0]
    dist.broadcast_object_list(sizes, 0)
    buffer = made(enable_shrink=True, num_rdma_bytes=sizes[0])
    assert not buffer._buffers
    check_low_latency_dispatch(buffer, False, {}, set())


def check_shrink(group: Any) -> None:
    def made(timeout: float = 20, **options: Any) -> deep_ep.Buffer:
        return deep_ep.Buffer(group, low_latency_mode=True, explicitly_destroy=True, timeout=timeout, **options)

    plain, buffer = made(), made(enable_shrink=True)
    buffer.low_latency_clean_mask_buffer()
    check_as_without_masks(plain, buffer)
    check_low_latency(buffer)
    check_terms_left_out(buffer)
    check_early_combine(buffer)
    check_hint_of_one_rank(made, group.rank())
    check_masks_by_hand(made(enable_shrink=True))
    size = deep_ep.Buffer.get_low_latency_rdma_size_hint(24 + 9 * group.size(), HIDDEN, group.size(), EXPERTS)
    check_silence(made(SILENCE, enable_shrink=True, num_rdma_bytes=size))
    check_ranks_that_go(made(enable_shrink=True, num_rdma_bytes=size))


def _rank(rank: int, rank_count: int, port: int, check: Callable[[Any], None], results: Any) -> None:
    try:
        torch.set_num_threads(1)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=rank_count)
        check(dist.new_group(list(range(rank_count))))
        dist.barrier()
        dist.destroy_process_group()
        results.put("")
    except BaseException:
        results.put(f"rank {rank}: {traceback.format_exc()}")


@pytest.mark.parametrize("rank_count, check", [*((count, check_everything) for count in (1, 2, 3)), (4, check_shrink)])
def test_against_an_oracle(rank_count: int, check: Callable[[Any], None]) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    spawning = multiprocessing.get_context("spawn")
    results = spawning.Queue()
    processes = [
        spawning.Process(target=_rank, args=(rank, rank_count, port, check, results)) for rank in range(rank_count)
    ]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            found = results.get(timeout=120)
            assert not found, found
    finally:
        for process in processes:
            process.join(10)
            process.kill()


def test_configs() -> None:
    before = deep_ep.Buffer.num_sms
    try:
        deep_ep.Buffer.set_num_sms(8)
        assert deep_ep.Buffer.get_dispatch_config(5).num_sms == deep_ep.Buffer.get_combine_config(8).num_sms == 8
    finally:
        deep_ep.Buffer.set_num_sms(before)
    for bad in ((-1,), (20, 0), (20, 8, 8), (20, 6, 256, 0), (20, 6, 256, 8, 8)):
        with pytest.raises(swiftep.InvalidArgument):
            deep_ep.Config(*bad)
    with pytest.raises(swiftep.InvalidArgument):
        deep_ep.Buffer.set_num_sms(7)
    assert deep_ep.Config(24, 8, 256).get_nvl_buffer_size_hint(7168 * 2, 8) > 0
    assert deep_ep.Config().get_rdma_buffer_size_hint(7168 * 2, 8) == 0
    small, large = (deep_ep.Buffer.get_low_latency_rdma_size_hint(tokens, 1024, 2, 8) for tokens in (16, 128))
    assert large > small > 2 * 8 // 2 * 32 * 2048
    for given in ({}, {"comm": object(), "num_nvl_bytes": 100}):
        with pytest.raises(swiftep.InvalidArgument):
            deep_ep.Buffer(None, **given)
