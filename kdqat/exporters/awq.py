"""AWQ's GEMM format: 4 bits with fp16 scales and 4-bit zero points.

The codes are the student's own; nothing of the AWQ *algorithm* is run, and no weight is rescaled. One group size holds
for the whole folder. https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from kdqat.exporters.base import Exporter, refuses_besides_weights
from kdqat.exporters.gptq import refuses_integers
from kdqat.exporters.hf_folder import counted_from_zero, linears_left, refuses_layer, write_hf_folder
from kdqat.exporters.use import loaded, served
from kdqat.quant.layouts import awq
from kdqat.student import Student

_PER_WORD = 8


class AWQ(Exporter):
    """4-bit weights, asymmetric or symmetric (zero point 8), by group or channel."""

    name: ClassVar[str] = "awq"
    reader: ClassVar[str] = "awq_reader.py"

    @property
    def compute_dtype(self) -> str:
        return "float16"

    def refuses(self, student: Student) -> str | None:
        if reason := refuses_besides_weights(student.plan, "AWQ"):
            return reason
        sizes: dict[int, str] = {}
        for name, layer in student.layers.items():
            if reason := refuses_layer(name, layer):
                return reason
            spec, (rows, _) = student.plan[name].weight, layer.matrix_shape
            assert spec is not None
            if reason := refuses_integers(spec, (awq.BITS,), "AWQ"):
                return f"{name}: {reason}"
            if rows % _PER_WORD:
                return (
                    f"{name}: AWQ packs {_PER_WORD} outputs to a word, and {rows} outputs are no multiple of it; use "
                    "CompressedTensors, or leave the layer out of the plan"
                )
            sizes.setdefault(spec.group_size or -1, name)
        if len(sizes) > 1:
            found = ", ".join(f"{size} ({name})" for size, name in sizes.items())
            return f"AWQ has one group size for all layers, and the plan has {found}; use one, or CompressedTensors"
        return None

    def serving(self, student: Student, folder: str) -> Mapping[str, str]:
        return served(student, folder, "--dtype float16") | loaded(student, folder, package="gptqmodel")

    @torch.no_grad()
    def export(self, student: Student, out_dir: Path) -> None:
        if reason := self.refuses(student):
            raise ValueError(reason)
        quantized: dict[str, dict[str, Tensor]] = {}
        group_size = -1
        for name, layer in student.layers.items():
            spec, codes, scale, zero_point = counted_from_zero(layer)
            group_size = spec.group_size or -1
            quantized[name] = {
                "qweight": awq.pack(codes),
                "qzeros": awq.pack(zero_point),
                "scales": scale.t().half(),
            }
        config: dict[str, Any] = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": awq.BITS,
            "group_size": group_size,
            "zero_point": True,
            "modules_to_not_convert": list(linears_left(student)),
        }
        write_hf_folder(student, out_dir, quantized, dtype=torch.float16, quantization_config=config)
