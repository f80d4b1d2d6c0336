"""The plan of a checkpoint that is quantized already: its layers, each in the format it is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdqat.allocate.base import BitAllocator
from kdqat.allocate.families import families_of
from kdqat.models.packed import read_packed
from kdqat.spec import QuantPlan
from kdqat.types import EMBEDDING, LayerRef


class FromCheckpoint(BitAllocator):
    """The plan of the compressed-tensors, GPTQ or AWQ folder `path`; what is not quantized there is ignored.

    With the student loaded from the same folder and the initializer StoredScales, training starts from its codes.
    Static activations and an fp8 KV cache are planned too, but calibration sets their ranges anew.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def allocate(self, layers: Sequence[LayerRef]) -> QuantPlan:
        """
        Raises:
            ValueError: if the folder is no such checkpoint, or it is another model's.
        """
        checkpoint = read_packed(Path(self.path).expanduser())
        stored = checkpoint.layers
        names = {layer.name for layer in layers}
        for name in stored:
            if name not in names:
                raise ValueError(f"{self.path}: the model has no layer {name!r}; is this another model's checkpoint?")
        planned = {layer.name: stored[layer.name].scheme for layer in layers if layer.name in stored}
        ignored = tuple(layer.name for layer in layers if layer.role != EMBEDDING and layer.name not in planned)
        families = [[layer.name for layer in family] for family in families_of(layers)]
        alike = [f for f in families if len(f) > 1 and len({planned.get(n) for n in f}) == 1 and f[0] in planned]
        fused = tuple(tuple(family) for family in alike)
        return QuantPlan(planned, ignored, checkpoint.kv_cache, families=fused)
