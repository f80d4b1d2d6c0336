"""GPTQ's checkpoint format, versions 1 and 2: the widest installed base of 4-bit models.

The codes are the student's own; nothing of the GPTQ *algorithm* is run. desc_act is false, so groups lie in order.
Layers of another scheme, or left in full precision, stand in `dynamic`, GPTQModel's overrides by regular expression;
vLLM reads them too, under the names of the layers it fuses. https://github.com/ModelCloud/GPTQModel
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from kdqat.exporters.base import Exporter, refuses_besides_weights
from kdqat.exporters.hf_folder import FUSED, counted_from_zero, linears_left, refuses_layer, write_hf_folder
from kdqat.exporters.use import loaded, served
from kdqat.files import write_text
from kdqat.quant.layouts import gptq
from kdqat.spec import QuantSpec
from kdqat.student import Student

GPTQFormat = Literal["gptq", "gptq_v2"]
_BITS = (2, 3, 4, 8)
_Settings = tuple[int, int, bool]  # bits, group size (-1: a channel), symmetric


class GPTQ(Exporter):
    """Integer weights of 2, 3, 4 or 8 bits with fp16 scales, by channel or group.

    Args:
        format: "gptq" (version 1: symmetric grids only, its zero points are stored less one) or "gptq_v2".
    """

    words: ClassVar[dict[str, dict[str, Any]]] = {"gptq": {"format": "gptq"}, "gptq-v2": {"format": "gptq_v2"}}
    reader: ClassVar[str] = "gptq_reader.py"

    def __init__(self, *, format: GPTQFormat = "gptq") -> None:
        if format not in get_args(GPTQFormat):
            raise ValueError(f"format {format!r} is unknown: use {' or '.join(get_args(GPTQFormat))}")
        self.format: GPTQFormat = format

    @property
    def name(self) -> str:
        return self.format.replace("_", "-")

    @property
    def compute_dtype(self) -> str:
        return "float16"

    def refuses(self, student: Student) -> str | None:
        if reason := refuses_besides_weights(student.plan, "GPTQ"):
            return reason
        for name, layer in student.layers.items():
            if reason := refuses_layer(name, layer):
                return reason
            spec = student.plan[name].weight
            assert spec is not None
            if reason := self._refuses_spec(spec) or _refuses_shape(spec, layer.matrix_shape):
                return f"{name}: {reason}"
        return None

    def _refuses_spec(self, spec: QuantSpec) -> str | None:
        if reason := refuses_integers(spec, _BITS, "GPTQ"):
            return reason
        if self.format == "gptq" and not spec.symmetric:
            symmetric = f"W{int(spec.bits)}A16 without _ASYM"
            return f"GPTQ version 1 stores zero point - 1 and has no 0; use format gptq_v2, or {symmetric}"
        return None

    def serving(self, student: Student, folder: str) -> Mapping[str, str]:
        return served(student, folder, "--dtype float16") | loaded(student, folder, package="gptqmodel")

    @torch.no_grad()
    def export(self, student: Student, out_dir: Path) -> None:
        if reason := self.refuses(student):
            raise ValueError(reason)
        version = 1 if self.format == "gptq" else 2
        settings: dict[str, _Settings] = {}
        quantized: dict[str, dict[str, Tensor]] = {}
        for name, layer in student.layers.items():
            spec, codes, scale, zero_point = counted_from_zero(layer)
            bits, width = int(spec.bits), codes.shape[1]
            settings[name] = (bits, spec.group_size or -1, spec.symmetric)
            quantized[name] = {
                "qweight": gptq.pack_weight(codes, bits),
                "qzeros": gptq.pack_zero_points(zero_point, bits, version=version),
                "scales": scale.t().half(),
                "g_idx": gptq.group_index(width, spec.group_size or width),
            }
        config = _config(settings, [name for name in linears_left(student) if name != "lm_head"], self.format)
        write_hf_folder(student, out_dir, quantized, dtype=torch.float16, quantization_config=config)
        write_text(out_dir / "quantize_config.json", json.dumps(config, indent=2) + "\n")


def refuses_integers(spec: QuantSpec, bits: tuple[int, ...], what: str) -> str | None:
    """What formats of unsigned integers with fp16 scales and integer zero points ask of a spec."""
    if spec.format not in {f"int{b}" for b in bits}:
        return f"{what} holds int{', int'.join(map(str, bits))}, not {spec.format}; {_instead(spec, bits)}"
    if spec.zero_point not in ("none", "integer"):
        return f"{what} holds integer zero points, not {spec.zero_point!r}; use W4A16_G32 or W4A16_ASYM_G32"
    if spec.scale_dtype != "float16":
        return f"{what} stores scales in float16, not {spec.scale_dtype}; use scale_dtype: float16"
    if spec.granularity == "tensor":
        return f"{what} has a scale for each channel or group; use granularity channel"
    return None


def _instead(spec: QuantSpec, bits: tuple[int, ...]) -> str:
    """What holds the same bits; of a grid that is no integer at all, the integers nearest to it."""
    number = int(spec.bits)
    if spec.format == f"int{number}":
        if number in _BITS and spec.zero_point in ("none", "integer"):
            return f"export with {'gptq' if spec.symmetric else 'gptq-v2'}, which holds {number} bits"
        return "export with compressed-tensors, which holds 2 to 8 bits"
    near = min(bits, key=lambda held: (held < spec.bits, abs(held - spec.bits)))
    return f"train under W{near}A16 ({near} bits, another grid), or export DequantizedHF"


def _refuses_shape(spec: QuantSpec, shape: torch.Size) -> str | None:
    bits, (rows, width) = int(spec.bits), shape
    for size, kind in ((width, "inputs"), (rows, "outputs")):
        if size * bits % 32:
            return (
                f"GPTQ packs {bits}-bit codes of {kind} into whole words, and {size} of them end within one; "
                "use CompressedTensors, or leave the layer out of the plan"
            )
    return None


def _config(settings: dict[str, _Settings], left: list[str], form: GPTQFormat) -> dict[str, Any]:
    """Most layers' settings, and the others by name."""
    common = Counter(settings.values()).most_common(1)[0][0]
    others: dict[str, _Settings | None] = {name: own for name, own in settings.items() if own != common}
    others |= dict.fromkeys(left)
    dynamic: dict[str, Any] = {}
    for name, own in _with_fused(others).items():
        pattern = f"^{re.escape(name)}$"
        if own is None:
            dynamic[f"-:{pattern}"] = {}
        else:
            dynamic[f"+:{pattern}"] = {"bits": own[0], "group_size": own[1], "sym": own[2]}
    return {
        "quant_method": "gptq",
        "bits": common[0],
        "group_size": common[1],
        "sym": common[2],
        "desc_act": False,
        "lm_head": "lm_head" in settings,
        "checkpoint_format": form,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
    }


def _with_fused(others: dict[str, _Settings | None]) -> dict[str, _Settings | None]:
    """The same, and what engines call the matmul of several layers where all of them are alike."""
    known = dict(others)
    for name, own in others.items():
        owner, _, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            siblings = [f"{owner}.{part}" for part in parts]
            if last == parts[0] and all(other in others and others[other] == own for other in siblings):
                known[f"{owner}.{fused}"] = own
    return known
