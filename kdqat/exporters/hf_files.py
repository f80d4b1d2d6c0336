"""The Hugging Face files that lie beside the weights of any format: config, tokenizer, plan."""

from __future__ import annotations

import copy
from pathlib import Path

from kdqat.student import Student


def save_hf_files(student: Student, out_dir: Path) -> None:
    """Write config.json (naming the model's class), tokenizer and quant_plan.json into `out_dir`."""
    config = copy.deepcopy(student.model.config)
    config.architectures = [type(student.model).__name__]
    config.save_pretrained(out_dir)
    student.tokenizer.save_pretrained(out_dir)
    student.plan.save(out_dir)
