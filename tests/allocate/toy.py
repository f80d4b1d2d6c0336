"""Layers of a small Llama, and scores for them, without a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kdqat.spec import Scores, preset
from kdqat.types import LayerRef

SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
          "self_attn.o_proj": (64, 64), "mlp.gate_proj": (128, 64), "mlp.up_proj": (128, 64),
          "mlp.down_proj": (64, 128)}  # fmt: skip


def llama(num_blocks: int = 4) -> list[LayerRef]:
    layers = [
        LayerRef(f"model.layers.{i}.{name}", i, name.rpartition(".")[2].removesuffix("_proj"), shape)
        for i in range(num_blocks)
        for name, shape in SHAPES.items()
    ]
    return [*layers, LayerRef("lm_head", None, "lm_head", (300, 64))]


def block_scores(importance: Sequence[float], cost: Sequence[Sequence[float]] = (), schemes: Sequence[str] = ()):
    """One score for each block of `llama`, and its costs by scheme."""
    units = [f"model.layers.{i}" for i in range(len(importance))]
    return Scores(
        "Toy",
        "block",
        dict(zip(units, importance, strict=True)),
        {unit: tuple(f"{unit}.{name}" for name in SHAPES) for unit in units},
        {unit: dict(zip(schemes, row, strict=True)) for unit, row in zip(units, cost, strict=False)},
        {name: preset(name) for name in schemes},
    )


def layer_scores(score: Callable[[LayerRef], float], layers: Sequence[LayerRef], **costs: Callable[[LayerRef], float]):
    """A score for each layer inside the blocks, and costs by scheme."""
    scored = [layer for layer in layers if layer.block is not None]
    return Scores(
        "Toy",
        "layer",
        {layer.name: score(layer) for layer in scored},
        {layer.name: (layer.name,) for layer in scored},
        {layer.name: {name: cost(layer) for name, cost in costs.items()} for layer in scored} if costs else {},
        {name: preset(name) for name in costs},
    )
