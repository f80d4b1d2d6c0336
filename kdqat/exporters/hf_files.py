"""The Hugging Face files that lie beside the weights of any format: config, generation config, tokenizer, plan."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdqat.student import Student


def save_hf_model(
    student: Student,
    out_dir: Path,
    state: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype,
    quantization_config: Mapping[str, Any] | None = None,
) -> None:
    """Write `state` as the model's safetensors, and the files of `save_hf_files`; leaves the student's config alone."""
    before = student.model.config.dtype
    student.model.save_pretrained(out_dir, state_dict=state)
    student.model.config.dtype = before  # save_pretrained puts the model's own there
    save_hf_files(student, out_dir, dtype=dtype, quantization_config=quantization_config)


def save_hf_files(
    student: Student,
    out_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    quantization_config: Mapping[str, Any] | None = None,
) -> None:
    """Write config.json (naming the model's class), tokenizer and quant_plan.json into `out_dir`, and
    generation_config.json of a model that generates.

    Args:
        dtype: of the tensors beside it, in which transformers loads; None: the student's own.
        quantization_config: for config.json.
    """
    config = copy.deepcopy(student.model.config)
    if dtype is not None:
        config.dtype = dtype
    config.architectures = [type(student.model).__name__]
    if quantization_config is not None:
        config.quantization_config = dict(quantization_config)
    config.save_pretrained(out_dir)
    if student.model.can_generate():
        student.model.generation_config.save_pretrained(out_dir)
    student.tokenizer.save_pretrained(out_dir)
    student.plan.save(out_dir)
