"""What an allocator is: it turns the layers of a model into a plan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from kdqat.spec import QuantPlan
from kdqat.types import LayerRef


class BitAllocator(ABC):
    """Chooses a scheme for every layer, or leaves it in full precision on purpose."""

    @abstractmethod
    def allocate(self, layers: Sequence[LayerRef]) -> QuantPlan:
        """The plan for `layers`; every layer is either in it or among its `ignored`."""

    def explain(self, layers: Sequence[LayerRef]) -> dict[str, Any] | None:
        """Why each layer got its bits (`kdqat.spec.Allocation.to_json`); None where nothing was weighed up."""
        return None


def matches(pattern: str, layer: LayerRef) -> bool:
    """Whether `pattern`, a role ("lm_head", "o") or a glob on the full name ("*.layers.0.*"), means `layer`."""
    return pattern == layer.role or fnmatchcase(layer.name, pattern)


def require_matches(key: str, patterns: Sequence[str], layers: Sequence[LayerRef]) -> None:
    """Refuse a pattern that means no layer at all: it is a typo, and would pass in silence.

    Raises:
        ValueError: naming the pattern and the roles there are.
    """
    for pattern in patterns:
        if not any(matches(pattern, layer) for layer in layers):
            roles = sorted({layer.role for layer in layers})
            raise ValueError(
                f"{key}: {pattern!r} matches no layer; it is a role ({', '.join(roles)}) "
                f"or a glob on names such as {layers[0].name!r}"
            )
