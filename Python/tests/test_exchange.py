"""Dispatch and combine against the oracle."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracle import Job
from ranks import on_buffers

import swiftep
from swiftep import Layout, Scales, Sizing

RANKS, TOKENS, HIDDEN, TOP_K, EXPERTS = 3, 6, 32, 3, 8
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


def make_plan(dtype=np.float32, **options):
    options.setdefault("combine_dtype", dtype)
    return swiftep.Plan(RANKS, TOKENS, HIDDEN, TOP_K, EXPERTS, dtype=dtype, **options)


def check_rows(job, rank, result, layout, alignment):
    """Compares what a rank has received, row by row; returns where each comes from, None where no token fills it."""
    rows, origins = result.rows.numpy(), result.origins.numpy()
    indices, weights = result.top_k_indices.numpy(), result.top_k_weights.numpy()
    experts = job.local_experts(rank)
    expected = job.received(rank, layout, alignment)
    assert len(rows) == len(expected)
    assert result.row_count.numpy().tolist() == [len(expected)]
    for row, origin in enumerate(expected):
        if origin is None:
            assert origins[row].tolist() == [-1, -1]
            assert indices[row].tolist() == [-1]
            continue
        source, token, slot = origin
        assert origins[row].tolist() == [source, token]
        assert (rows[row] == job.x[source][token]).all()
        slots = range(TOP_K) if slot < 0 else [slot]
        for place, each in enumerate(slots):
            expert = job.indices[source][token, each]
            if expert in experts:
                assert indices[row, place] == experts.index(expert)
                assert weights[row, place] == job.weights[source][token, each]
            else:
                assert indices[row, place] == -1
                assert weights[row, place] == 0
    return expected


def check_counts(job, rank, result, layout, alignment):
    experts = job.local_experts(rank)
    counts = [len(job.slots(expert)) for expert in experts]
    assert result.unaligned_tokens_per_expert.numpy().tolist() == counts
    assert result.tokens_per_expert.numpy().tolist() == [-(-count // alignment) * alignment for count in counts]
    sent = [
        [sum(job.goes(source, token, to) for token in range(len(job.x[source]))) for to in range(RANKS)]
        for source in range(RANKS)
    ]
    assert result.tokens_per_source.numpy().tolist() == [counts[rank] for counts in sent]
    assert result.tokens_per_pair.numpy().tolist() == sent
    assert result.source_counts is None
    if layout == Layout.BY_SOURCE:
        assert result.source_offsets is None
        return
    offsets = result.source_offsets.numpy()
    for local, expert in enumerate(experts):
        sources = [source for source, _, _ in job.slots(expert)]
        assert offsets[local].tolist() == [sum(s < source for s in sources) for source in range(RANKS + 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index_dtype", [np.int32, np.int64])
@pytest.mark.parametrize("layout, alignment", [(Layout.BY_SOURCE, 1), (Layout.BY_EXPERT, 1), (Layout.BY_EXPERT, 4)])
@pytest.mark.parametrize("sizing", Sizing, ids=lambda sizing: sizing.name)
def test_dispatch_and_combine(dtype, index_dtype, layout, alignment, sizing):
    job = Job.random(RANKS, [TOKENS, 4, 0], HIDDEN, TOP_K, EXPERTS, dtype, index_dtype)
    plan = make_plan(
        dtype, layout=layout, expert_alignment=alignment, index_byte_count=np.dtype(index_dtype).itemsize
    )

    def body(buffer):
        rank = buffer.rank
        result = buffer.dispatch(
            job.x[rank],
            job.indices[rank],
            job.weights[rank],
            layout=layout,
            expert_alignment=alignment,
            sizing=sizing,
        )
        assert result.rows.numpy().dtype == dtype
        assert result.top_k_indices.numpy().dtype == index_dtype
        assert result.handle.layout == layout
        assert result.handle.token_count == len(job.x[rank])
        assert result.handle.top_k == TOP_K
        check_counts(job, rank, result, layout, alignment)
        if sizing == Sizing.EXACT:
            rows = check_rows(job, rank, result, layout, alignment)
        else:
            rows = job.received(rank, layout, alignment)
            assert result.handle.row_capacity == len(result.rows) >= len(rows)
            assert (result.origins.numpy()[len(rows) :] == -1).all()
        # The rank's experts: each multiplies by something of its own.
        scaled = result.rows.numpy()
        scaled *= np.asarray(rank + 1, dtype)
        weights = job.weights[rank] if layout == Layout.BY_EXPERT else None
        combined = buffer.combine(result.rows, result.handle, row_weights=weights)
        returned = {(rank, *origin): scaled[row].copy() for row, origin in enumerate(rows) if origin}
        return returned, combined.tokens.numpy().copy()

    outcomes = on_buffers(plan, RANKS, body)
    returned = {key: row for rows, _ in outcomes for key, row in rows.items()}
    if layout == Layout.BY_EXPERT:
        returned = {
            (rank, source, token, slot): row.astype(np.float32) * job.weights[source][token, slot]
            for (rank, source, token, slot), row in returned.items()
        }
    for rank, (_, tokens) in enumerate(outcomes):
        assert tokens.dtype == dtype
        assert (tokens.astype(np.float32) == job.combined(rank, returned)).all()


def test_grouped():
    job = Job.random(RANKS, [TOKENS, 0, 3], HIDDEN, TOP_K, EXPERTS, np.float32, np.int64)
    plan = make_plan(layout=Layout.GROUPED)

    def body(buffer):
        rank = buffer.rank
        result = buffer.dispatch(job.x[rank], job.indices[rank], job.weights[rank], layout=Layout.GROUPED)
        experts = job.local_experts(rank)
        assert result.rows.shape == (len(experts), RANKS * TOKENS, HIDDEN)
        rows, origins = result.rows.numpy(), result.origins.numpy()
        for local, expert in enumerate(experts):
            slots = job.slots(expert)
            assert result.tokens_per_expert.numpy()[local] == len(slots)
            for row, (source, token, slot) in enumerate(slots):
                assert origins[local, row].tolist() == [source, token]
                assert (rows[local, row] == job.x[source][token]).all()
                assert result.top_k_weights.numpy()[local, row, 0] == job.weights[source][token, slot]
        check_counts(job, rank, result, Layout.GROUPED, 1)
        combined = buffer.combine(result.rows, result.handle, row_weights=job.weights[rank])
        chosen = job.indices[rank] >= 0
        expected = job.x[rank] * (job.weights[rank] * chosen).sum(1, keepdims=True)
        assert (combined.tokens.numpy() == expected).all()

    on_buffers(plan, RANKS, body)


@pytest.mark.parametrize("table_dtype", [np.uint8, np.bool_])
def test_table(table_dtype):
    random = np.random.default_rng(1)
    tables = [random.integers(0, 2, (TOKENS, RANKS)).astype(table_dtype) for _ in range(RANKS)]
    x = [random.integers(-4, 5, (TOKENS, HIDDEN)).astype(np.float32) for _ in range(RANKS)]

    def body(buffer):
        rank = buffer.rank
        result = buffer.dispatch(x[rank], table=tables[rank])
        expected = [(s, t) for s in range(RANKS) for t in range(TOKENS) if tables[s][t, rank]]
        assert result.origins.numpy().tolist() == [list(origin) for origin in expected]
        assert (result.rows.numpy() == np.array([x[s][t] for s, t in expected]).reshape(-1, HIDDEN)).all()
        assert result.top_k_indices is None
        assert result.top_k_weights is None
        assert result.scales is None
        tokens = buffer.combine(result.rows, result.handle).tokens.numpy()
        assert (tokens == x[rank] * tables[rank].sum(1, keepdims=True)).all()

    on_buffers(make_plan(), RANKS, body)


@pytest.mark.parametrize("layout", [Layout.BY_SOURCE, Layout.BY_EXPERT])
def test_cached_handle(layout):
    job = Job.random(RANKS, [TOKENS] * RANKS, HIDDEN, TOP_K, EXPERTS, np.float32, np.int64)

    def body(buffer):
        rank = buffer.rank
        first = buffer.dispatch(job.x[rank], job.indices[rank], job.weights[rank], layout=layout)
        again = buffer.dispatch(2 * job.x[rank], handle=first.handle)
        assert (again.rows.numpy() == 2 * first.rows.numpy()).all()
        assert (again.origins.numpy() == first.origins.numpy()).all()
        assert again.top_k_indices is None
        assert again.handle.layout == layout

    on_buffers(make_plan(layout=layout, result_count=2), RANKS, body)


def test_sidecars():
    job = Job.random(RANKS, [TOKENS] * RANKS, HIDDEN, TOP_K, EXPERTS, np.float32, np.int64)

    def body(buffer):
        rank = buffer.rank
        labels = np.arange(TOKENS, dtype=np.int32) + 100 * rank
        matrices = np.arange(TOKENS * 6, dtype=np.float32).reshape(TOKENS, 2, 3) + 1000 * rank
        result = buffer.dispatch(job.x[rank], job.indices[rank], sidecars=[labels, matrices])
        origins = result.origins.numpy()
        first, second = result.sidecars
        assert second.shape == (len(origins), 2, 3)
        assert (first.numpy() == origins[:, 0] * 100 + origins[:, 1]).all()
        assert (second.numpy()[:, 0, 0] == origins[:, 0] * 1000 + origins[:, 1] * 6).all()

    on_buffers(make_plan(sidecar_byte_counts=[4, 24]), RANKS, body)


def test_combine_options():
    job = Job.random(RANKS, [TOKENS] * RANKS, HIDDEN, TOP_K, EXPERTS, np.float32, np.int64)

    def body(buffer):
        rank = buffer.rank
        result = buffer.dispatch(job.x[rank], job.indices[rank], job.weights[rank])
        rows = buffer.combine_input(result.handle, HIDDEN, np.float32)
        assert rows.shape == result.rows.shape
        rows.numpy()[:] = result.rows.numpy()
        output = np.full((TOKENS, HIDDEN), np.nan, np.float32)
        biases = [np.full((TOKENS, HIDDEN), value, np.float32) for value in (1, 10)]
        combined = buffer.combine(
            rows, result.handle, top_k_weights=result.top_k_weights, biases=biases, output=output
        )
        assert combined.tokens is output
        ranks = np.array([[job.goes(rank, token, to) for to in range(RANKS)] for token in range(TOKENS)]).sum(1)
        assert (output == job.x[rank] * ranks[:, None] + 11).all()
        expected = np.where(job.indices[rank] >= 0, job.weights[rank], 0)
        assert (combined.top_k_weights.numpy() == expected).all()

    on_buffers(make_plan(result_count=2), RANKS, body)


def test_rows_outside_of_the_arena():
    job = Job.random(RANKS, [TOKENS] * RANKS, HIDDEN, TOP_K, EXPERTS, np.float32, np.int64)

    def body(buffer):
        rank = buffer.rank
        result = buffer.dispatch(job.x[rank], job.indices[rank])
        inside = buffer.combine(result.rows, result.handle).tokens.numpy().copy()
        outside = buffer.combine(result.rows.numpy().copy(), result.handle).tokens.numpy()
        assert (inside == outside).all()

    on_buffers(make_plan(is_staged=True, result_count=2), RANKS, body)


@pytest.mark.parametrize("layout", [Layout.BY_SOURCE, Layout.GROUPED])
@pytest.mark.parametrize("scales", [Scales.FP32, Scales.UE8M0, Scales.POWER_OF_TWO], ids=lambda s: s.name)
def test_fp8_quantization(layout, scales):
    hidden = 256
    random = np.random.default_rng(2)
    x = [random.normal(size=(TOKENS, hidden)).astype(ml_dtypes.bfloat16) for _ in range(RANKS)]
    indices = np.array([[(token + k) % EXPERTS for k in range(TOP_K)] for token in range(TOKENS)])
    plan = swiftep.Plan(
        RANKS, TOKENS, hidden, TOP_K, EXPERTS, dtype=ml_dtypes.float8_e4m3fn, scales=scales, layout=layout
    )

    def body(buffer):
        result = buffer.dispatch(x[buffer.rank], indices, layout=layout, quantization=scales)
        assert result.rows.dtype == swiftep.DType.FP8_E4M3
        rows = result.rows.numpy()
        assert rows.dtype == ml_dtypes.float8_e4m3fn
        factors = result.scales.numpy()
        if scales == Scales.UE8M0:
            assert factors.dtype == np.int32
            assert factors.shape == rows.shape[:-1] + (1,)
            exponents = np.ascontiguousarray(factors).view(np.uint8)[..., :2]
            factors = np.exp2(exponents.astype(np.float32) - 127)
        assert factors.shape == rows.shape[:-1] + (2,)
        if scales == Scales.POWER_OF_TWO and layout == Layout.BY_SOURCE:
            assert (np.log2(factors) % 1 == 0).all()
        values = rows.astype(np.float32).reshape(*factors.shape, 128) * factors[..., None]
        values = values.reshape(rows.shape)
        origins = result.origins.numpy()
        counts = [len(rows)] if layout == Layout.BY_SOURCE else result.tokens_per_expert.numpy()
        values, origins = values.reshape(len(counts), -1, hidden), origins.reshape(len(counts), -1, 2)
        for group, count in enumerate(counts):
            for row in range(count):
                source, token = origins[group, row]
                assert np.allclose(values[group, row], x[source][token].astype(np.float32), rtol=0.07, atol=0.02)

    on_buffers(plan, RANKS, body)


def test_scales_in_columns():
    hidden = 256
    plan = swiftep.Plan(
        RANKS, TOKENS, hidden, TOP_K, EXPERTS, dtype="float8_e4m3fn", scales=Scales.FP32, layout=Layout.GROUPED
    )

    def body(buffer):
        x = np.ones((TOKENS, hidden), ml_dtypes.bfloat16)
        indices = np.zeros((TOKENS, 1), np.int64) + np.arange(1)
        result = buffer.dispatch(
            x,
            indices,
            layout=Layout.GROUPED,
            quantization=Scales.FP32,
            scale_order=swiftep.ScaleOrder.COLUMN_MAJOR,
        )
        assert result.scales.shape == (result.rows.shape[0], 2, RANKS * TOKENS)

    on_buffers(plan, RANKS, body)


def test_nvfp4_quantization():
    hidden = 128
    plan = swiftep.Plan(RANKS, TOKENS, hidden, TOP_K, EXPERTS, dtype=swiftep.DType.FP4_E2M1_X2, scales=Scales.NVFP4)

    def body(buffer):
        x = np.full((TOKENS, hidden), 6, ml_dtypes.bfloat16)
        indices = np.zeros((TOKENS, 1), np.int64)
        result = buffer.dispatch(x, indices, quantization=Scales.NVFP4, global_scale=2.0)
        rows, scales = result.rows, result.scales
        count = RANKS * TOKENS if buffer.rank == 0 else 0
        assert rows.dtype == swiftep.DType.FP4_E2M1_X2
        assert rows.shape == (count, hidden // 2)
        assert scales.shape == (count, hidden // 16)
        # 6 is the largest E2M1, 0b0111; its block's scale is the global one.
        assert (rows.numpy() == 0x77).all()
        assert (scales.numpy().astype(np.float32) == 2).all()

    on_buffers(plan, RANKS, body)


def in_columns(array, gap):
    """The same array, one column behind the other, with so many elements between that are not of it."""
    columns = np.full((array.shape[1], len(array) + gap), np.nan, array.dtype)
    columns[:, : len(array)] = array.T
    return columns.T[: len(array)]


# As they lie on rank 1, where they lie in rows on rank 0.
@pytest.mark.parametrize("place", [np.copy, lambda scales: in_columns(scales, 0), lambda scales: in_columns(scales, 5)])
def test_fp8_rows_with_scales(place):
    hidden = 384
    plan = swiftep.Plan(RANKS, TOKENS, hidden, TOP_K, EXPERTS, dtype="float8_e4m3fn", scales=Scales.FP32)

    def body(buffer):
        x = np.full((TOKENS, hidden), buffer.rank + 1, ml_dtypes.float8_e4m3fn)
        every = 1000 * np.arange(RANKS)[:, None, None] + 10 * np.arange(TOKENS)[:, None] + np.arange(3, dtype=np.float32)
        scales = every[buffer.rank].astype(np.float32)
        target = np.zeros((TOKENS, 1), np.int32)
        result = buffer.dispatch(x, target, scales=scales if buffer.rank == 0 else place(scales))
        sources, tokens = result.origins.numpy().T
        assert (result.rows.numpy().astype(np.float32) == sources[:, None] + 1).all()
        assert (result.scales.numpy() == every[sources, tokens]).all()
        for wrong in (np.ones((TOKENS, 6), np.float32)[:, ::2], np.broadcast_to(np.float32(1), (TOKENS, 3))):
            with pytest.raises(swiftep.InvalidArgument) as refused:
                buffer.dispatch(x, target, scales=wrong if buffer.rank == 1 else scales)
            assert refused.value.argument.startswith("scales.strides") and refused.value.rank == 1

    on_buffers(plan, RANKS, body)


def test_zeroed_padding():
    plan = make_plan(layout=Layout.BY_EXPERT, expert_alignment=8)

    def body(buffer):
        x = np.ones((TOKENS, HIDDEN), np.float32)
        indices = np.zeros((TOKENS, 1), np.int64)
        indices[3:] = EXPERTS - 1
        result = buffer.dispatch(
            x, indices, layout=Layout.BY_EXPERT, expert_alignment=8, zeroes_padding=True
        )
        filled = result.origins.numpy()[:, 0] >= 0
        assert (result.rows.numpy()[~filled] == 0).all()
        assert (result.rows.numpy()[filled] == 1).all()
        if buffer.rank != 1:
            assert 0 < filled.sum() < len(filled)

    on_buffers(plan, RANKS, body)


def test_statistics():
    def body(buffer):
        rank = buffer.rank
        local = EXPERTS // RANKS + (rank < EXPERTS % RANKS)
        statistics = np.zeros(local, np.int32)
        waits = buffer.make_tensor([RANKS], np.int64)
        indices = np.array([[token % EXPERTS] for token in range(TOKENS)])
        for _ in range(2):
            result = buffer.dispatch(
                np.ones((TOKENS, HIDDEN), np.float32),
                indices,
                expert_statistics=statistics,
                wait_statistics=waits,
            )
            buffer.combine(result.rows, result.handle, wait_statistics=waits)
        assert (statistics == 2 * result.unaligned_tokens_per_expert.numpy()).all()
        assert (waits.numpy() >= 0).all()

    on_buffers(make_plan(result_count=2), RANKS, body)


def test_growth():
    """More tokens than the plan has: with exact sizing the arena grows."""

    def body(buffer):
        before = buffer.arena_byte_count
        x = np.ones((100 * TOKENS, HIDDEN), np.float32)
        indices = np.zeros((100 * TOKENS, 1), np.int64)
        result = buffer.dispatch(x, indices)
        assert buffer.arena_byte_count >= before
        return len(result.rows), buffer.arena_byte_count > before

    assert on_buffers(make_plan(), RANKS, body) == [(300 * TOKENS, True), (0, False), (0, False)]
