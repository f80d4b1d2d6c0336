"""Fake-quantized experts: the fused 3-D weights of a mixture-of-experts block, as transformers 5 lays them out.

`gate_up_proj` [E, 2 M, H] and `down_proj` [E, H, M] are parameters of one module, for E experts of width M. A plan
names each of them ("model.layers.0.mlp.experts.gate_up_proj"), the swap replaces the module once, and every row of
every expert is an output channel. Classes of this layout are listed by their full name; any other one is left to the
coverage guard, which stops the run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdqat.quant.layer import autocast_dtype, default_activation_quantizer, make_activation_quantizer, twin
from kdqat.quant.quantizer import FakeQuantizer, QuantizerFactory
from kdqat.spec import LayerScheme

EXPERT_CLASSES = frozenset(
    {
        "transformers.models.mixtral.modeling_mixtral.MixtralExperts",
        "transformers.models.qwen2_moe.modeling_qwen2_moe.Qwen2MoeExperts",
        "transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts",
    }
)
EXPERT_WEIGHTS = ("gate_up_proj", "down_proj")


class FakeQuantExperts(nn.Module):
    """Experts whose weights (and inputs) pass fake quantizers.

    Attributes:
        gate_up_proj, down_proj: latent weights.
        {gate_up_proj,down_proj}_fake_quantizer: of the weight; None where the scheme leaves it alone.
        {gate_up_proj,down_proj}_activation_fake_quantizer: of the weight's input [tokens, I].
        fake_quantize, deploy_only, wrapped_class: as in FakeQuantLayer.
    """

    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter
    act_fn: nn.Module
    fake_quantize: bool
    deploy_only: frozenset[str]
    wrapped_class: type[nn.Module]

    @staticmethod
    def wraps(module: nn.Module) -> bool:
        """Whether `module` is an experts module of the known layout, swapped or not."""
        return (
            isinstance(module, FakeQuantExperts)
            or f"{type(module).__module__}.{type(module).__qualname__}" in EXPERT_CLASSES
        )

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        schemes: Mapping[str, LayerScheme],
        quantizer: QuantizerFactory,
        activation_quantizer: QuantizerFactory = default_activation_quantizer,
        deploy_only: Collection[str] = (),
    ) -> FakeQuantExperts:
        """`module` with fake quantizers for the weights that `schemes` names.

        Raises:
            ValueError: if a spec does not fit, a scheme asks for a quantized output, which experts do not have, or the
                module is swapped already.
        """
        if isinstance(module, cls):
            raise ValueError("it is fake-quantized already; strip_fake_quant first")
        experts: FakeQuantExperts = twin(module, cls)
        experts.wrapped_class = type(module)
        experts.fake_quantize = True
        experts.deploy_only = frozenset(deploy_only)
        for name in EXPERT_WEIGHTS:
            scheme, weight = schemes.get(name, LayerScheme()), getattr(module, name)
            if scheme.output is not None:
                raise ValueError(f"{name}: experts have no output of their own to quantize; leave `output` out")
            with torch.device(weight.device):
                shape = weight.flatten(0, 1).shape
                own = scheme.weight and quantizer(scheme.weight, shape)
                setattr(experts, f"{name}_fake_quantizer", own)
                inputs = make_activation_quantizer(
                    f"{name}: activation",
                    scheme.activation,
                    shape[1],
                    activation_quantizer,
                    "activation" in deploy_only,
                )
                setattr(experts, f"{name}_activation_fake_quantizer", inputs)
        return experts.train(module.training)

    def unwrap(self) -> nn.Module:
        """The plain experts, holding the fake-quantized weights; quantized activations are lost."""
        plain = twin(self, self.wrapped_class)
        for name in EXPERT_WEIGHTS:
            setattr(plain, name, nn.Parameter(self.part(name).fake_quantized_weight().detach().clone()))
            for extra in (f"{name}_fake_quantizer", f"{name}_activation_fake_quantizer"):
                plain._modules.pop(extra, None)
                plain.__dict__.pop(extra, None)
        del plain.wrapped_class, plain.fake_quantize, plain.deploy_only
        return plain

    def part(self, name: str) -> ExpertWeight:
        """One of the weights, as the rest of kdqat sees a layer."""
        return ExpertWeight(self, name)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs for each token.

        Args:
            hidden_states: [tokens, H].
            top_k_index, top_k_weights: [tokens, k], chosen experts and their shares; an index of E counts nothing.
        """
        parts = [self.part(name) for name in EXPERT_WEIGHTS]
        gate_up, down = (part.fake_quantized_weight(autocast_dtype(part.weight)) for part in parts)
        states = self._quantized_input(hidden_states, "gate_up_proj")
        out = torch.zeros_like(hidden_states)
        for expert in range(gate_up.shape[0]):
            token, choice = torch.where(top_k_index == expert)
            if token.numel() == 0:  # a live range of nothing does not exist
                continue
            gate, up = F.linear(states[token], gate_up[expert]).chunk(2, dim=-1)
            middle = self._quantized_input(self.act_fn(gate) * up, "down_proj")
            answer = F.linear(middle, down[expert]) * top_k_weights[token, choice, None]
            out = out.index_add(0, token, answer.to(out.dtype))
        return out

    def _quantized_input(self, x: Tensor, name: str) -> Tensor:
        quantizer: FakeQuantizer | None = getattr(self, f"{name}_activation_fake_quantizer")
        if quantizer is None or not self.fake_quantize or (self.training and "activation" in self.deploy_only):
            return x
        return quantizer(x)


@dataclass(frozen=True)
class ExpertWeight:
    """One weight of an experts module with the attributes of a FakeQuantLayer; it holds nothing itself."""

    experts: FakeQuantExperts
    name: str

    output_fake_quantizer = None
    adapter = None

    @property
    def weight(self) -> nn.Parameter:
        return getattr(self.experts, self.name)

    @property
    def weight_fake_quantizer(self) -> FakeQuantizer | None:
        return getattr(self.experts, f"{self.name}_fake_quantizer")

    def replace_quantizers(self, **quantizers: Any) -> None:
        """As `FakeQuantLayer.replace_quantizers`."""
        for kind, quantizer in quantizers.items():
            own = {"weight": "_fake_quantizer", "activation": "_activation_fake_quantizer"}[kind]
            setattr(self.experts, self.name + own, quantizer)

    @property
    def activation_fake_quantizer(self) -> FakeQuantizer | None:
        return getattr(self.experts, f"{self.name}_activation_fake_quantizer")

    @property
    def matrix_shape(self) -> torch.Size:
        return self.as_matrix(self.weight).shape

    @property
    def input_width(self) -> int:
        return int(self.matrix_shape[1])

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(0, 1)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.weight.shape)

    def fake_quantized_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        if self.weight_fake_quantizer is None or not self.experts.fake_quantize:
            return self.weight
        return self.from_matrix(self.weight_fake_quantizer(self.as_matrix(self.weight), dtype))

    def latent_matrix(self) -> Tensor:
        return self.as_matrix(self.weight)

    def dequantized_weight(self) -> Tensor:
        return self.fake_quantized_weight()
