"""A GGUF checkpoint as a student: its block types become the plan, its codes and scales the start of training.

`ModelSource` gives the file's dequantized weights. Planned with `GGUFPlan` and given the file's own scales by
`GGUFScales`, every weight falls back on the code it came from: untrained, the student exports the file's codes again.
Both can stand in a recipe, under `allocator` and `initializer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kdqat.allocate import BitAllocator
from kdqat.initializers import Initializer
from kdqat.models import ModelSource
from kdqat.models.gguf_codes import StoredLayer, stored_kinds, stored_layers
from kdqat.models.gguf_file import gguf_path
from kdqat.quant import QuantizerFactory
from kdqat.quant.layouts.gguf import LAYOUTS
from kdqat.spec import QuantPlan, preset
from kdqat.student.prepare import prepare_student
from kdqat.student.student import Student
from kdqat.types import BlockView, LayerRef, QParams


class GGUFPlan(BitAllocator):
    """Every layer as the file stores it; layers that it holds in floats are left in full precision.

    Args:
        source: the model's path: a .gguf file, or "package:NAME" with one inside.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def allocate(self, layers: Sequence[LayerRef]) -> QuantPlan:
        """
        Raises:
            ValueError: if the file is missing or has other block types, or other layers than the model.
        """
        path, config = _located(self.source)
        kinds = stored_kinds(path, config)
        names = [layer.name for layer in layers]
        for name in kinds:
            if name not in names:
                raise ValueError(f"{path}: the model has no layer {name!r}; is it the model of this file?")
        planned = {name: preset(LAYOUTS[kinds[name]].preset) for name in names if name in kinds}
        ignored = tuple(layer.name for layer in layers if layer.name not in kinds and layer.role != "embedding")
        return QuantPlan(planned, ignored=ignored)


class GGUFScales(Initializer):
    """The scales that the file stores; with them its weights are their codes again.

    Args:
        source: as of GGUFPlan.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        """
        Raises:
            ValueError: naming the layer, if the file has no scales for it, its quantizer takes none, or its weight is
                not the file's.
        """
        for name, layer in block.layers.items():
            quantizer = layer.weight_fake_quantizer
            if quantizer is None:
                continue
            stored = self._stored.get(name)
            if stored is None or preset(stored.preset).weight != quantizer.spec:
                raise ValueError(f"layer {name}: {self.source} does not store it so: plan it with GGUFPlan")
            codes, scale, minimum, _ = stored.blocks
            zero_point = torch.zeros_like(scale) if minimum is None else minimum
            try:
                quantizer.load_qparams(QParams(scale.unsqueeze(2), zero_point.unsqueeze(2)))
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None
            changed = int((quantizer.codes(layer.latent_matrix()).cpu() != codes)[_used(scale)].sum())
            if changed:
                raise ValueError(
                    f"layer {name}: {changed} of its weights are not what {self.source} stores: load the model from "
                    "that file, in float32"
                )

    @cached_property
    def _stored(self) -> dict[str, StoredLayer]:
        return stored_layers(*_located(self.source))


def student_from_gguf(source: ModelSource, quantizer: QuantizerFactory) -> Student:
    """The model of a GGUF file as a student with its codes and scales.

    Args:
        quantizer: one that stores scales: LSQ trains them, Fixed keeps them.

    Raises:
        ValueError: as `GGUFPlan` and `GGUFScales`.
    """
    return prepare_student(source, GGUFPlan(source.path), quantizer, GGUFScales(source.path))


def _used(scale: torch.Tensor) -> torch.Tensor:
    """Which weights [O, I] lie in blocks with a scale: one of 0 makes every code the same value, and training none."""
    return (scale != 0).repeat_interleave(32, dim=1)


def _located(source: str) -> tuple[Path, Any]:
    path = gguf_path(ModelSource(source))
    if path is None:
        raise ValueError(f"model {source}: there is no GGUF file; name one, or package:NAME of one with a GGUF inside")
    return path, ModelSource(source).load_config()
