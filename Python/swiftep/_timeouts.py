"""Timeouts."""

from __future__ import annotations

from typing import Optional

_CENTURY = 3_155_760_000.0


def nanoseconds(timeout: Optional[float]) -> int:
    """As the library takes them: None is its default of 100 seconds.

    Raises:
        ValueError: `timeout` is negative or no number.
    """
    if timeout is None:
        return 0
    if not timeout >= 0:
        raise ValueError(f"timeout: expected at least 0 seconds, found {timeout}")
    # 0 nanoseconds are the default.
    return max(1, int(min(float(timeout), _CENTURY) * 1e9))
