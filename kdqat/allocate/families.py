"""Which layers a serving engine fuses into one matmul, and must therefore store in one scheme.

vLLM, SGLang and TensorRT-LLM fuse q, k and v into one matmul, gate and up into another, and run the experts of a layer
in one kernel. A checkpoint that gives the parts different bits does not load there.
"""

from __future__ import annotations

from collections.abc import Sequence

from kdqat.types import LayerRef

_FUSED = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}


def families_of(layers: Sequence[LayerRef]) -> list[list[LayerRef]]:
    """`layers` by what is fused, each family and each lone layer in the model's order.

    q, k and v (gate and up) are one family where they are parts of one module; all weights below a module called
    "experts" are one.
    """
    found: dict[tuple[str, str], list[LayerRef]] = {}
    for layer in layers:
        found.setdefault(_key(layer), []).append(layer)
    return list(found.values())


def _key(layer: LayerRef) -> tuple[str, str]:
    parts = layer.name.split(".")
    if "experts" in parts[:-1]:
        return ".".join(parts[: parts.index("experts") + 1]), "experts"
    if layer.role in _FUSED:
        return ".".join(parts[:-1]), _FUSED[layer.role]
    return layer.name, ""
