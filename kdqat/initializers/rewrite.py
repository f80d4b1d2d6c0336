"""How an initializer that chooses codes leaves them: a latent weight that fake quantization gives back as it is.

GPTQ and SignRound choose codes that rounding the source's weight would not give. The latent weight becomes what the
codes mean, scale * (level - zero point): every weight lies in the middle of its code, so that the quantizer, a saved
student and an export give exactly these codes, also from bf16 latent weights. (The compensated weights that GPTQ
rounds would give them too, but not after a rotation or in bf16, and clipped ones would have no gradient.)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kdqat.quant import FakeQuantizer, QuantizedLayer
from kdqat.quant.grouping import rotate
from kdqat.types import QParams

log = logging.getLogger(__name__)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Puts the layer's name in front of a ValueError."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith("layer "):
            raise
        raise ValueError(f"layer {name}: {error}") from None


def quantized_layers(layers: Mapping[str, QuantizedLayer]) -> dict[str, QuantizedLayer]:
    """The layers whose weight has a quantizer.

    Raises:
        ValueError: naming a layer whose quantizer reads its ranges off the live weight and takes no scales.
    """
    found = {name: layer for name, layer in layers.items() if layer.weight_fake_quantizer is not None}
    for name, layer in found.items():
        quantizer = layer.weight_fake_quantizer
        if quantizer is not None and not quantizer.uses_stored_qparams:
            raise ValueError(
                f"layer {name}: {type(quantizer).__name__} recomputes its ranges from the live weight and cannot take "
                "scales: use the RTN initializer with it, or the LSQ or Fixed quantizer"
            )
    return found


def without_inputs(layers: Mapping[str, QuantizedLayer]) -> dict[str, QuantizedLayer]:
    """Embeddings, which are lookups, and the heads that share their weight and its quantizer."""
    tables = {id(layer.weight) for layer in layers.values() if isinstance(layer, nn.Embedding)}
    return {name: layer for name, layer in layers.items() if id(layer.weight) in tables}


def require_rows(hessian: Tensor, weight: Tensor) -> None:
    """A ValueError where inputs [tokens, features] are not what the columns of `weight` [O, I] multiply."""
    if len(hessian) != weight.shape[1]:
        raise ValueError(
            f"its inputs have {len(hessian)} features and its weight {weight.shape[1]} columns, as in a convolution: "
            "use MSEGrid, or put it into `ignore`"
        )


def round_to_nearest(layers: Mapping[str, QuantizedLayer], *, method: str, reason: str) -> None:
    """RTN's scales for layers that a method has to leave out, said aloud."""
    for name, layer in layers.items():
        quantizer = layer.weight_fake_quantizer
        assert quantizer is not None
        log.warning("%s rounds layer %s to nearest (RTN): %s", method, name, reason)
        quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(layer.as_matrix(layer.weight))))


@torch.no_grad()
def write_values(
    layer: QuantizedLayer,
    values: Tensor,
    qparams: QParams,
    second_level: Mapping[str, Tensor] | None = None,
) -> None:
    """Give `layer` the scales `qparams`, and the latent weight that fake quantization turns into `values`.

    Args:
        values: [O, I] fp32 on the grid, as they are rounded: rotated where the spec rotates.
        second_level: of the scales; None fits it to them.

    Raises:
        ValueError: if the layer's quantizer computes other values from these scales.
    """
    quantizer: FakeQuantizer = layer.weight_fake_quantizer  # type: ignore[assignment]
    quantizer.load_qparams(qparams, second_level)
    layer.weight.copy_(layer.from_matrix(rotate(values, quantizer.spec.hadamard)))
    latent = layer.as_matrix(layer.weight)
    moved = quantizer.groups(quantizer(latent).float() - latent.float()).abs()
    if (moved > 1e-2 * quantizer.scale.abs()).any():
        raise ValueError(
            f"{type(quantizer).__name__} does not give back the values that were found for it: use Fixed or LSQ"
        )
