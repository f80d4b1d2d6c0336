"""A plan that was made before: another run's `quant_plan.json`, or one written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdqat.allocate.base import BitAllocator
from kdqat.spec import QuantPlan
from kdqat.types import EMBEDDING, LayerRef


class FromFile(BitAllocator):
    """The plan in `path`, a file or a folder that holds `quant_plan.json`."""

    def __init__(self, path: str) -> None:
        self.path = path

    def allocate(self, layers: Sequence[LayerRef]) -> QuantPlan:
        """
        Raises:
            ValueError: if the file is no plan, or the plan and the model do not name the same layers.
        """
        plan = QuantPlan.load(Path(self.path))
        names = {layer.name for layer in layers}
        for name in plan:
            if name not in names:
                raise ValueError(f"{self.path}: the model has no layer {name!r}; was the plan made for another model?")
        for layer in layers:
            if layer.role != EMBEDDING and layer.name not in plan and layer.name not in plan.ignored:
                raise ValueError(f"{self.path}: layer {layer.name!r} is neither planned nor in `ignored`")
        return plan
