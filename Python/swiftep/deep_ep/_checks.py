"""What DeepEP asserts, as errors that say what was expected and found."""

from __future__ import annotations

from typing import Any

from ..errors import refusal


def required(holds: bool, argument: str, expected: str, found: Any) -> None:
    """Raises where something does not hold."""
    if not holds:
        raise refusal(argument, expected, found)
