"""What DeepEP asserts, as errors that say what was expected and found."""

from __future__ import annotations

from typing import Any

from .._native_types import lib
from ..errors import InvalidArgument


def refusal(argument: str, expected: str, found: Any) -> InvalidArgument:
    """An error of this rank alone, before the others are told anything."""
    return InvalidArgument(
        f"{argument}: expected {expected}, found {found}",
        code=lib.SWIFTEP_INVALID_ARGUMENT,
        argument=argument,
        expected=expected,
        found=str(found),
    )


def required(holds: bool, argument: str, expected: str, found: Any) -> None:
    """Raises where something does not hold."""
    if not holds:
        raise refusal(argument, expected, found)
