"""A saved student: a plain Hugging Face folder of latent weights (transformers loads it as it is) with three files of
ours beside them: `quant_plan.json`, `quantizers.safetensors` (scales and zero points as stored) and `student.json`. If
the student has adapters they belong to it and lie in `adapter/`, as peft takes them; `student.json` has the placement.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kdqat.files import write_text
from kdqat.models import ModelSource, SplitModel
from kdqat.models.lora import load_adapters, save_adapters
from kdqat.quant import Coverage, FakeQuantizer, Fixed, MinMax, QuantizerFactory, load_stored_state, stored_state
from kdqat.spec import PLAN_FILE, QuantPlan, QuantSpec
from kdqat.student.prepare import install_plan
from kdqat.student.student import Student, plain_state

QPARAMS_FILE, STUDENT_FILE, ADAPTER_FOLDER = "quantizers.safetensors", "student.json", "adapter"


def save_student(student: Student, folder: Path) -> None:
    """Write the student into the empty `folder`: latent weights, scales as stored, plan, tokenizer, adapters."""
    student.model.save_pretrained(folder, state_dict=plain_state(student))
    student.tokenizer.save_pretrained(folder)
    student.plan.save(folder)
    save_file(stored_state(student.model), folder / QPARAMS_FILE)
    about = {"source": asdict(student.source), "coverage": asdict(student.coverage), **student.summary()}
    if student.adapters:
        (folder / ADAPTER_FOLDER).mkdir()
        save_adapters(student.layers, folder / ADAPTER_FOLDER, base=student.source.path)
        about["adapters"] = {name: adapter.settings for name, adapter in student.adapters.items()}
    write_text(folder / STUDENT_FILE, json.dumps(about, indent=1))


def load_student(
    folder: Path, quantizer: QuantizerFactory = Fixed, activation_quantizer: QuantizerFactory | None = None
) -> Student:
    """Read what `save_student` wrote.

    Args:
        quantizer: Fixed computes with the scales as stored; another factory takes them as its start.
        activation_quantizer: likewise; None: ranges as stored, or live where they are dynamic.

    Raises:
        ValueError: naming the file that is missing or damaged.
    """
    for file in (PLAN_FILE, QPARAMS_FILE, STUDENT_FILE, "config.json"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: {file} is missing, so this is no saved student; `kdqat quantize` writes one")
    try:
        about = json.loads((folder / STUDENT_FILE).read_text())
        qparams = load_file(folder / QPARAMS_FILE)
        origin, coverage = ModelSource(**about["source"]), Coverage(**about["coverage"])
        adapters = dict(about.get("adapters", {}))
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder}: {QPARAMS_FILE} or {STUDENT_FILE} is damaged ({error}); write it anew") from error
    here = ModelSource(str(folder), origin.dtype, trust_remote_code=origin.trust_remote_code)
    split = SplitModel(here.load_model())
    plan = QuantPlan.load(folder)
    install_plan(split.model, plan, quantizer, activation_quantizer if activation_quantizer else stored_activation)
    try:
        load_stored_state(split.model, qparams)
    except ValueError as error:
        raise ValueError(f"{folder}: {QPARAMS_FILE} does not fit {PLAN_FILE}: layer {error}") from error
    student = Student(split, here.load_tokenizer(), origin, plan, coverage)
    if adapters:
        load_adapters(student.layers, folder / ADAPTER_FOLDER, adapters)
    return student


def stored_activation(spec: QuantSpec, shape: torch.Size) -> FakeQuantizer:
    """The activation quantizer of a saved student: ranges as stored, or live where they are dynamic."""
    return MinMax(spec, shape) if spec.dynamic else Fixed(spec, shape)
