"""Freezing layers at their quantized values: "Oh! We Freeze", https://arxiv.org/abs/2403.18159.

Before training, the chosen layers' latent weights are set to what fake quantization makes of them, and stay there with
their scales; the rest of the network adapts to an error that no longer moves. `roles: [o, v]` is the paper's
ov-freeze, `[q, k, v]` its qkv-freeze. What is frozen has no gradient and no optimizer state, and is checksummed.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
from torch import Tensor, nn

from kdqat.callbacks.checksum import checksums
from kdqat.callbacks.choose import chosen_layers
from kdqat.quant import FakeQuantizer, Fixed, QuantizedLayer
from kdqat.student import Student
from kdqat.training import Phase, StudentEdit

log = logging.getLogger(__name__)

Scales = Literal["with_weights", "train"]


class Freeze(StudentEdit):
    """Freezes the layers for which every condition given holds, at their quantized values, for the whole run.

    Weights and biases are frozen; of tied weights (embedding and lm_head) all owners. Activation quantizers are left
    alone. A `FreezeWindow` freezes for a number of steps.

    Args:
        roles, blocks, layers: which layers of the plan, as `kdqat.models.select_layers`; at least one of them.
        scales: "with_weights" holds scale and zero point as they are stored, so that the layer's codes and values are
            constant. "train" leaves them to the quantizer, and the latent weights where they are: from the grid itself
            LSQ's gradient of the scale, round(w/s) - w/s, is zero. Codes may then still move where a scale does.

    Raises:
        ValueError: without a condition, or for another word.
    """

    phase: ClassVar[Phase] = Phase.FREEZE

    def __init__(
        self,
        *,
        roles: list[str] | None = None,
        blocks: list[int] | None = None,
        layers: list[str] | None = None,
        scales: Scales = "with_weights",
    ) -> None:
        if roles is None and blocks is None and layers is None:
            raise ValueError("Freeze: say what to freeze, e.g. roles: [o, v]; or blocks, or layers")
        if scales not in get_args(Scales):
            raise ValueError(f"Freeze: scales {scales!r} is unknown: use {', '.join(get_args(Scales))}")
        self.roles, self.blocks, self.layers, self.scales = roles, blocks, layers, scales
        self._switched_off: list[weakref.ref[nn.Parameter]] = []  # weak: FSDP2 replaces parameters by shards
        self._sums: dict[str, int] = {}  # at the start of the run, the first one if it was resumed

    @property
    def state_key(self) -> str:
        return self._generate_state_key(roles=self.roles, blocks=self.blocks, layers=self.layers)

    @torch.no_grad()
    def edit(self, student: Student) -> None:
        chosen = self._chosen(student)
        fixed: dict[int, FakeQuantizer] = {}  # by weight: tied layers share their quantizer
        for name, layer in chosen.items():
            if id(layer.weight) not in fixed:
                fixed[id(layer.weight)] = self._quantizer_to_be(name, layer)
        for layer in {id(layer.weight): layer for layer in chosen.values()}.values():
            if self.scales == "with_weights" and not layer.weight.is_meta:
                layer.weight.copy_(_value(layer, layer.weight_fake_quantizer))
        for layer in chosen.values():
            layer.replace_quantizers(weight=fixed[id(layer.weight)])
        parameters = {id(p): p for layer in chosen.values() for p in _parameters(layer)}
        self._switched_off = [weakref.ref(p) for p in parameters.values() if p.requires_grad]
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        if not next(student.model.parameters()).is_meta:
            self._describe(student, len(chosen), sum(p.numel() for p in parameters.values()))

    def finish(self, student: Student) -> None:
        for reference in self._switched_off:
            parameter = reference()
            if parameter is not None:
                parameter.requires_grad_(True)
        self._switched_off = []

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self._sums = {}
        if module.teacher is not None and module.teacher.shares_weights:
            raise ValueError(
                f"Freeze sets latent weights to their quantized values, and model.teacher "
                f"{type(module.teacher).__name__} computes with them: use a FrozenTeacher"
            )

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if self._sums:
            self._verify(module.student, "when the run was resumed")
        else:
            self._sums = checksums(self._watched(module.student))

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        self._verify(module.student, "during training")

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._sums = dict(state_dict["sums"])

    def _chosen(self, student: Student) -> dict[str, QuantizedLayer]:
        return chosen_layers(student, roles=self.roles, blocks=self.blocks, layers=self.layers, who="Freeze")

    def _quantizer_to_be(self, name: str, layer: QuantizedLayer) -> FakeQuantizer:
        """What will fake-quantize the frozen weight, checked to give back the values it is frozen at; changes nothing.

        Raises:
            ValueError: if the layer has no quantized value, no scale to train, or one that does not hold.
        """
        quantizer = layer.weight_fake_quantizer
        if quantizer is None:
            raise ValueError(
                f"Freeze: layer {name}: its scheme leaves the weight in full precision, so it has no quantized value "
                "to be frozen at; leave it out"
            )
        if layer.adapter is not None:
            raise ValueError(
                f"Freeze: layer {name}: its adapter would train what is frozen; name roles in LoraAdapters, or here, "
                "so that each layer has one of the two"
            )
        if self.scales == "train":
            if not any(parameter.requires_grad for parameter in quantizer.parameters()):
                raise ValueError(
                    f"Freeze: layer {name}: {type(quantizer).__name__} has no scale to train; leave out scales: train"
                )
            return quantizer
        with torch.device(layer.weight.device):
            fixed = Fixed(quantizer.spec, quantizer.shape)
        if layer.weight.is_meta:
            return fixed
        matrix = layer.as_matrix(layer.weight)
        fixed.load_qparams(quantizer.stored_qparams(matrix), quantizer.second_level(matrix))
        value = _value(layer, quantizer)
        if not torch.equal(_value(layer, fixed, value.to(layer.weight.dtype)), value):
            raise ValueError(
                f"Freeze: layer {name}: {type(quantizer).__name__} and its stored scale give other values than the "
                f"weight in {layer.weight.dtype} is frozen at; train in model.student.dtype: float32"
            )
        return fixed

    def _watched(self, student: Student) -> dict[str, Tensor]:
        watched: dict[str, Tensor] = {}
        for name, layer in self._chosen(student).items():
            for kind, parameter in zip(("", " (bias)"), _parameters(layer), strict=False):
                watched[name + kind] = parameter
            if self.scales == "with_weights":
                quantizer = layer.weight_fake_quantizer
                assert quantizer is not None
                watched |= {f"{name} (scale)": quantizer.scale, f"{name} (zero point)": quantizer.zero_point}
        return watched

    def _verify(self, student: Student, when: str) -> None:
        now = checksums(self._watched(student))
        moved = [name for name in self._sums if now.get(name) != self._sums[name]]
        if moved:
            raise RuntimeError(f"Freeze: layer {moved[0]} is frozen and changed {when} ({len(moved)} tensors did)")

    def _describe(self, student: Student, layers: int, frozen: int) -> None:
        ours = {id(p) for m in student.model.modules() if isinstance(m, FakeQuantizer) for p in m.parameters()}
        whole = sum(p.numel() for p in student.model.parameters() if id(p) not in ours)
        log.info(
            "Freeze: %d layers, %.4g M parameters, %.1f %% of all, %s",
            layers, frozen / 1e6, 100 * frozen / whole,
            "at their quantized values" if self.scales == "with_weights" else "whose scales train",
        )  # fmt: skip


def _parameters(layer: QuantizedLayer) -> list[nn.Parameter]:
    """Weight and bias."""
    return [p for p in (layer.weight, getattr(layer, "bias", None)) if p is not None]


def _value(layer: QuantizedLayer, quantizer: FakeQuantizer | None, weight: Tensor | None = None) -> Tensor:
    """The hard fake-quantized value of the layer's weight (or of `weight`) in fp32, in its shape."""
    assert quantizer is not None
    return layer.from_matrix(quantizer(layer.as_matrix(layer.weight if weight is None else weight), torch.float32))
