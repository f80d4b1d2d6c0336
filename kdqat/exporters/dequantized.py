"""A plain Hugging Face folder with the dequantized weights: no smaller, and loads everywhere transformers does.

Every planned weight is scale * (code - zero_point) in the chosen dtype. In float32 these are the very numbers the
student computed with, so logits are equal bit for bit; bfloat16 and float16 round each weight once more. A LoRA adapter
that the student computes beside Q(W) is added to it: one float weight where there were two products, so that sums are
rounded in another order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from kdqat.exporters.base import Exporter
from kdqat.exporters.hf_files import save_hf_model
from kdqat.exporters.use import loaded, served
from kdqat.models.source import Dtype
from kdqat.student import Student, plain_state


class DequantizedHF(Exporter):
    """Dequantized safetensors for transformers' auto classes, with tokenizer and `quant_plan.json`.

    Args:
        dtype: of the written weights; float32 is exact.
    """

    name: ClassVar[str] = "dequantized"
    words: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "dequantized": {},
        "dequantized:bfloat16": {"dtype": "bfloat16"},
        "dequantized:float16": {"dtype": "float16"},
    }
    reader: ClassVar[str | None] = "transformers_weights.py"

    def __init__(self, *, dtype: Dtype = "float32") -> None:
        self.dtype = dtype

    @property
    def compute_dtype(self) -> str:
        return self.dtype

    def refuses(self, student: Student) -> str | None:
        return None  # every grid is a set of numbers

    @torch.no_grad()
    def export(self, student: Student, out_dir: Path) -> None:
        self.say_what_is_left(student.plan)
        dtype = getattr(torch, self.dtype)
        state = plain_state(student)
        for name, layer in student.layers.items():
            state[name if name in state else f"{name}.weight"] = layer.dequantized_weight()  # experts name weights
        converted: dict[Any, torch.Tensor] = {}  # what is tied is converted and written once
        for key, value in state.items():
            if value.is_floating_point():
                same = (value.data_ptr(), value.shape)
                state[key] = converted.setdefault(same, value.detach().to("cpu", dtype))
        save_hf_model(student, out_dir, state, dtype=dtype)

    def serving(self, student: Student, folder: str) -> Mapping[str, str]:
        vllm = "vLLM (as fast as the base model, since the weights are plain floats)"
        commands = served(student, folder)
        return loaded(student, folder) | ({vllm: commands["vLLM"]} if commands else {})
