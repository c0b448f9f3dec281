"""What dispatch and combine do, in plain NumPy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

import numpy as np

from swiftep import Layout

#: Where a row comes from: source rank, token, and its slot among the top-k, -1 by source. None: no token fills it.
Origin = Optional["tuple[int, int, int]"]


@dataclass
class Job:
    """The tokens of all ranks."""

    x: list[np.ndarray]
    indices: list[np.ndarray]
    weights: list[np.ndarray]
    owners: np.ndarray

    @staticmethod
    def random(rank_count, token_counts, hidden, top_k, expert_count, dtype, index_dtype, seed=0) -> Job:
        """Elements and weights are such that no sum is ever rounded, in whatever order."""
        random = np.random.default_rng(seed)
        x, indices, weights = [], [], []
        for rank in range(rank_count):
            count = token_counts[rank]
            x.append(random.integers(-4, 5, (count, hidden)).astype(dtype))
            chosen = np.array([random.permutation(expert_count)[:top_k] for _ in range(count)], index_dtype)
            chosen = chosen.reshape(count, top_k)
            # Some slots have no expert.
            chosen[random.random(chosen.shape) < 0.2] = -1
            indices.append(chosen)
            weights.append(random.choice(np.array([0.5, 1, 2], np.float32), (count, top_k)))
        owners = np.repeat(np.arange(rank_count), -(-expert_count // rank_count))[:expert_count]
        return Job(x, indices, weights, owners)

    @property
    def rank_count(self) -> int:
        return len(self.x)

    def local_experts(self, rank: int) -> list[int]:
        return [expert for expert, owner in enumerate(self.owners) if owner == rank]

    def goes(self, source: int, token: int, rank: int) -> bool:
        return any(expert >= 0 and self.owners[expert] == rank for expert in self.indices[source][token])

    def slots(self, expert: int) -> list[tuple[int, int, int]]:
        """Who sends to an expert, by source rank, then token."""
        return [
            (source, token, slot)
            for source, chosen in enumerate(self.indices)
            for token, slot in zip(*np.nonzero(chosen == expert))
        ]

    def received(self, rank: int, layout: Layout, alignment: int = 1) -> list[Origin]:
        """The rows that a rank receives, by source or by expert."""
        if layout == Layout.BY_SOURCE:
            return [
                (source, token, -1)
                for source in range(self.rank_count)
                for token in range(len(self.x[source]))
                if self.goes(source, token, rank)
            ]
        rows: list[Origin] = []
        for expert in self.local_experts(rank):
            rows += self.slots(expert)
            rows += [None] * (-len(rows) % alignment)
        return rows

    def combined(self, source: int, returned: dict[tuple[int, int, int, int], np.ndarray]) -> np.ndarray:
        """Sums the rows that come back, which are keyed by (rank, source, token, slot)."""
        sums = np.zeros(self.x[source].shape, np.float32)
        for (_, from_source, token, _), row in returned.items():
            if from_source == source:
                sums[token] += row.astype(np.float32)
        return sums
