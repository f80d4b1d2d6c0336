"""What all fake-quantized layers share: the quantizers they carry, and the way in and out of the plain layer.

A subclass of the plain layer that keeps its parameter names, not a parametrization or a tensor subclass: the student's
keys stay the HF keys plus `*_fake_quantizer.*` (and `adapter.*`), `save_pretrained` reloads in plain transformers
(docs/architecture.md, decision 3). Kinds of layers (`linear.py`, `conv.py` ...) say how their weight is a matrix [O, I]
and what they compute.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdqat.quant.lora import LoraAdapter
from kdqat.quant.quantizer import FakeQuantizer, QuantizerFactory
from kdqat.quant.quantizers.lsq_plus import LSQPlus
from kdqat.quant.quantizers.minmax import MinMax
from kdqat.spec import LayerScheme, QuantSpec


def default_activation_quantizer(spec: QuantSpec, shape: torch.Size) -> FakeQuantizer:
    """MinMax for dynamic ranges, LSQPlus for static ones."""
    return MinMax(spec, shape) if spec.dynamic else LSQPlus(spec, shape)


def autocast_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a matmul takes `weight`: writing it at once saves the cast, and the copy in between."""
    device = weight.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast and weight.dtype == torch.float32 else weight.dtype


def make_activation_quantizer(
    key: str, spec: QuantSpec | None, width: int, factory: QuantizerFactory, rests: bool
) -> FakeQuantizer | None:
    """What `factory` makes for activations of `width` features; None where there is no spec.

    Args:
        key: names it in errors.
        rests: off while training, so nothing of it learns: DDP waits for the gradient of all that could have one.

    Raises:
        ValueError: naming `key`, if the spec does not fit, or is static and the quantizer has no range to store.
    """
    if spec is None:
        return None
    try:
        quantizer = factory(spec, torch.Size((1, width)))
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    if not spec.dynamic and not quantizer.uses_stored_qparams:
        raise ValueError(
            f"{key}: {type(quantizer).__name__} takes its range from the live tensor, so that a static range "
            "(dynamic: false) would be stored from nothing: use LSQPlus or Fixed as activation_quantizer, or set "
            "dynamic: true"
        )
    return quantizer.requires_grad_(not rests)


class FakeQuantLayer(nn.Module):
    """A layer whose weight, input and output pass fake quantizers, where its scheme asks for them.

    Attributes:
        weight: the latent weight, in the plain layer's own shape.
        weight_fake_quantizer, activation_fake_quantizer, output_fake_quantizer: None where the scheme has no spec.
        adapter: a low-rank update that is trained in the weight's place; None without one.
        fake_quantize: False switches the layer to its latent weight in full precision, adapter left out (see
            `swap.full_precision`).
        deploy_only: of "activation" and "output": off in training mode, on in evaluation.
        wrapped_class: the plain layer's class.
    """

    plain_class: ClassVar[type[nn.Module]]

    wrapped_class: type[nn.Module]
    weight: Any  # the plain layer's Parameter
    weight_fake_quantizer: FakeQuantizer | None
    activation_fake_quantizer: FakeQuantizer | None
    output_fake_quantizer: FakeQuantizer | None
    adapter: LoraAdapter | None
    fake_quantize: bool
    deploy_only: frozenset[str]

    @classmethod
    def wraps(cls, module: nn.Module) -> bool:
        """Whether this is the kind of layer for `module`: its plain class, with its own forward."""
        return isinstance(module, cls.plain_class) and type(module).forward is cls.plain_class.forward

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        scheme: LayerScheme,
        quantizer: QuantizerFactory,
        activation_quantizer: QuantizerFactory = default_activation_quantizer,
        deploy_only: Collection[str] = (),
    ) -> Self:
        """`module` with fake quantizers, reusing its Parameter objects, so that tied weights stay tied.

        Raises:
            ValueError: if a spec does not fit the layer, or the layer cannot do what the scheme asks.
        """
        layer = twin(module, cls)
        layer.wrapped_class = type(module)
        layer.fake_quantize = True
        layer.adapter = None
        layer.deploy_only = frozenset(deploy_only)
        rows, width = layer.matrix_shape
        with torch.device(layer.weight.device):
            layer.weight_fake_quantizer = scheme.weight and quantizer(scheme.weight, torch.Size((rows, width)))
            layer.activation_fake_quantizer = make_activation_quantizer(
                "activation", scheme.activation, layer.input_width, activation_quantizer, "activation" in deploy_only
            )
            layer.output_fake_quantizer = make_activation_quantizer(
                "output", scheme.output, rows, activation_quantizer, "output" in deploy_only
            )
        return layer.train(module.training)

    def unwrap(self) -> nn.Module:
        """The plain layer, holding the dequantized weight; quantized activations are lost."""
        plain = twin(self, self.wrapped_class)
        for name in ("weight_fake_quantizer", "activation_fake_quantizer", "output_fake_quantizer", "adapter"):
            plain._modules.pop(name, None)  # a module
            plain.__dict__.pop(name, None)  # or None
        del plain.wrapped_class, plain.fake_quantize, plain.deploy_only
        plain.weight = nn.Parameter(self.dequantized_weight().detach().clone())
        return plain

    @property
    def matrix_shape(self) -> torch.Size:
        """Shape (O, I) of the weight as a matrix; I inputs share a group."""
        return self.as_matrix(self.weight).shape

    @property
    def input_width(self) -> int:
        """Features of the layer's input, along its last dimension."""
        return int(self.matrix_shape[1])

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The weight as [O, I]."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Inverse of `as_matrix`."""
        return matrix

    def replace_quantizers(self, **quantizers: FakeQuantizer | None) -> None:
        """Exchange fake quantizers by kind: weight=, activation=, output=."""
        for kind, quantizer in quantizers.items():
            setattr(self, f"{kind}_fake_quantizer", quantizer)

    def fake_quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as the layer computes with it, in its own shape and in `dtype` (None: its own), differentiable."""
        if not self.fake_quantize:
            return self.weight
        if self._inside is not None and torch.is_grad_enabled():
            # W + s B A is no parameter: kept for the backward pass it would be a second copy of the weights
            again = checkpoint(self._quantized_matrix, dtype, use_reentrant=False, preserve_rng_state=False)
            return self.from_matrix(again)
        if self._inside is None and self.weight_fake_quantizer is None:
            return self.weight
        return self.from_matrix(self._quantized_matrix(dtype))

    def latent_matrix(self) -> Tensor:
        """The latent weight [O, I] as it is quantized: with the adapter, where that is inside."""
        matrix = self.as_matrix(self.weight)
        return matrix if self._inside is None else self._inside.added_to(matrix)

    def dequantized_weight(self) -> Tensor:
        """The one float weight, in its own shape, that computes what the layer does to an input that is not quantized:
        the fake-quantized one, with the adapter where that is outside."""
        weight = self.fake_quantized_weight()
        if self._outside is None:
            return weight
        return self.from_matrix(self._outside.added_to(self.as_matrix(weight)))

    @property
    def _inside(self) -> LoraAdapter | None:
        return self.adapter if self.adapter is not None and self.adapter.placement == "inside" else None

    @property
    def _outside(self) -> LoraAdapter | None:
        return self.adapter if self.adapter is not None and self.adapter.placement == "outside" else None

    def _quantized_matrix(self, dtype: torch.dtype | None) -> Tensor:
        matrix, quantizer = self.latent_matrix(), self.weight_fake_quantizer
        return matrix if quantizer is None else quantizer(matrix, dtype)

    def _with_branch(self, y: Tensor, x: Tensor) -> Tensor:
        """`y` [.., O] plus what an adapter outside makes of `x` [.., I], the input before it is quantized: engines run
        adapters in full precision."""
        if self._outside is None or not self.fake_quantize:
            return y
        return y + self._outside(x).to(y.dtype)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input [.., I] as the layer computes with it."""
        return self._pass(x, self.activation_fake_quantizer, "activation")

    def quantized_output(self, y: Tensor) -> Tensor:
        """The output [.., O] as the rest of the model sees it."""
        return self._pass(y, self.output_fake_quantizer, "output")

    def _pass(self, x: Tensor, quantizer: FakeQuantizer | None, kind: str) -> Tensor:
        if quantizer is None or not self.fake_quantize or (self.training and kind in self.deploy_only):
            return x
        return quantizer(x)


def twin(module: nn.Module, cls: Any) -> Any:
    """An instance of `cls` with the attributes of `module`: the same Parameter objects in dictionaries of its own."""
    twin = cls.__new__(cls)
    twin.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[name] = dict(module.__dict__[name])
    return twin
