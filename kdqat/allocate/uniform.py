"""The same scheme for every layer, with exceptions by role or name."""

from __future__ import annotations

from collections.abc import Sequence

from kdqat.allocate.base import BitAllocator, matches, require_matches
from kdqat.spec import LayerScheme, QuantPlan, parse_scheme
from kdqat.types import LayerRef


class Uniform(BitAllocator):
    """One scheme everywhere.

    Args:
        scheme: a preset ("W4A16_G64") or a mapping with a spec ({weight: {format: int4, ...}}).
        ignore: roles or name globs that stay in full precision.
        overrides: role or name glob -> another scheme; the last match counts.

    Raises:
        ValueError: for an unknown preset or key.
    """

    def __init__(
        self,
        scheme: str | LayerScheme | dict,
        *,
        ignore: Sequence[str] = ("lm_head",),
        overrides: dict[str, str | LayerScheme | dict] | None = None,
    ) -> None:
        self.scheme = parse_scheme(scheme)
        self.ignore = tuple(ignore)
        self.overrides = {pattern: parse_scheme(s) for pattern, s in (overrides or {}).items()}

    def allocate(self, layers: Sequence[LayerRef]) -> QuantPlan:
        require_matches("plan.ignore", self.ignore, layers)
        require_matches("plan.overrides", tuple(self.overrides), layers)
        planned: dict[str, LayerScheme] = {}
        ignored = []
        for layer in layers:
            if any(matches(pattern, layer) for pattern in self.ignore):
                ignored.append(layer.name)
                continue
            planned[layer.name] = self.scheme
            for pattern, scheme in self.overrides.items():
                if matches(pattern, layer):
                    planned[layer.name] = scheme
        if not planned:
            raise ValueError("plan: every layer is ignored, so there is nothing to quantize")
        return QuantPlan(planned, tuple(ignored))
