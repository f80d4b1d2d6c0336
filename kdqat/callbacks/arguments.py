"""What callbacks ask of the numbers that they are given."""

from __future__ import annotations


def check_numbers(who: str, **numbers: int | None) -> None:
    """
    Raises:
        ValueError: for a number below 1, naming the key.
    """
    for key, value in numbers.items():
        if value is not None and value < 1:
            raise ValueError(f"{who}: {key} must be at least 1, not {value}")
