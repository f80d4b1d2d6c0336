"""What a saved student keeps of its fake quantizers: scales and zero points as stored, under plain names.

`NAME.scale` and `NAME.zero_point` are the weight's of layer NAME, with its second level (`NAME.global_scale` ...)
beside them; `NAME.activation.scale`, `NAME.output.scale` those of static activation ranges, `ATTENTION.key.scale` and
`ATTENTION.value.scale` those of a KV cache. A dynamic range leaves nothing but a second level. Whatever quantizer
trained them, `Fixed` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from kdqat.quant.kv import kv_caches
from kdqat.quant.quantizer import FakeQuantizer
from kdqat.quant.swap import fake_quant_layers
from kdqat.types import QParams


@torch.no_grad()
def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """Every stored number of the model's fake quantizers, contiguous, on the CPU, sharing no memory."""
    state: dict[str, Tensor] = {}
    for key, quantizer, example in _quantizers(model):
        tensor = example()
        numbers = dict(quantizer.second_level(tensor))
        if not quantizer.spec.dynamic:
            numbers |= quantizer.stored_qparams(tensor)._asdict()
        state |= {f"{key}.{name}": value.detach().cpu().clone().contiguous() for name, value in numbers.items()}
    return state


def load_stored_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give every fake quantizer that takes them the numbers of `stored_state`.

    Raises:
        ValueError: naming what is missing or does not fit.
    """
    for key, quantizer, _ in _quantizers(model):
        own = {name.removeprefix(f"{key}."): value for name, value in state.items() if name.startswith(f"{key}.")}
        try:
            if quantizer.uses_stored_qparams:
                quantizer.load_qparams(QParams(own["scale"], own["zero_point"]), own)
            elif quantizer.spec.dynamic:
                quantizer.load_second_level(own)
        except KeyError as error:
            raise ValueError(f"{key}.{error.args[0]} is missing") from None
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None


def _quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantizer, Callable[[], Tensor]]]:
    """(key, fake quantizer, a tensor of its kind); the tensor counts only where ranges are live: weights."""
    for name, layer in fake_quant_layers(model).items():
        if layer.weight_fake_quantizer is not None:
            yield name, layer.weight_fake_quantizer, layer.latent_matrix
        kinds = {"activation": layer.activation_fake_quantizer, "output": layer.output_fake_quantizer}
        for kind, quantizer in kinds.items():
            if quantizer is not None:
                yield f"{name}.{kind}", quantizer, partial(quantizer.scale.new_zeros, quantizer.shape)
    for name, cache in kv_caches(model).items():
        for part, quantizer in cache.quantizers().items():
            yield f"{name}.{part}", quantizer, partial(quantizer.scale.new_zeros, quantizer.shape)
