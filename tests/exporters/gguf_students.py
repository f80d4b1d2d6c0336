"""Students for the GGUF tests: trained a few steps, so that weights and scales are where no initializer puts them."""

from __future__ import annotations

from pathlib import Path
from runpy import run_path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import kdqat.exporters
from kdqat.allocate import Uniform
from kdqat.exporters import GGUF
from kdqat.initializers import RTN
from kdqat.models import ModelSource, SplitModel
from kdqat.quant import LSQ
from kdqat.student import Student, prepare_student

IDS = torch.randint(3, 256, (2, 32), generator=torch.Generator().manual_seed(0))
READERS = Path(kdqat.exporters.__file__).parent / "readers"
EXACT = {"embeddings": "f32", "ignored": "f32"}


def trained(
    path: str, scheme: str, *, ignore=("lm_head",), model=None, num_steps: int = 3, lr: float = 1e-3, **plan
) -> Student:
    """The model of `path` under `scheme` after a few steps of cross-entropy."""
    split = None if model is None else SplitModel(model.eval())
    student = prepare_student(ModelSource(path), Uniform(scheme, ignore=ignore, **plan), LSQ, RTN(), split=split)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=lr)
    for _ in range(num_steps):
        logits = student.model(input_ids=IDS).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


@torch.no_grad()
def moved(student: Student) -> Student:
    """The student with weights and scales off their start, as training moves them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in student.layers.values():
            layer.weight.add_(torch.randn_like(layer.weight) * layer.weight.std() * 0.1)
            layer.weight_fake_quantizer.scale.mul_(torch.rand_like(layer.weight_fake_quantizer.scale) * 0.2 + 0.85)
    return student


def exported(student: Student, folder: Path, **arguments) -> Path:
    """`folder` with the student's GGUF file in it."""
    exporter = GGUF(**arguments)
    assert exporter.refuses(student) is None
    folder.mkdir(exist_ok=True)
    exporter.export(student, folder)
    return folder


def answer_of(folder: Path) -> dict[str, torch.Tensor]:
    """What the reader makes of the folder, in this process: `readers/gguf_file.py` is run as a script elsewhere."""
    save_file({"input_ids": IDS}, folder / "request")
    run_path(str(READERS / "gguf_file.py"))["main"](str(folder), str(folder / "request"), str(folder / "answer"))
    return load_file(folder / "answer")


def differing(student: Student, answer: dict[str, torch.Tensor]) -> dict[str, int]:
    """How many codes, scales and zero points of the answer are not the student's, by kind; 0 are left out."""
    found: dict[str, int] = {}
    for name, layer in student.layers.items():
        quantizer, matrix = layer.weight_fake_quantizer, layer.latent_matrix()
        stored = quantizer.stored_qparams(matrix)
        ours = {"codes": quantizer.codes(matrix), "scales": stored.scale.squeeze(2)}
        if quantizer.spec.zero_point == "minimum":
            ours["zero_points"] = stored.zero_point.squeeze(2)
        for kind, numbers in ours.items():
            found[kind] = found.get(kind, 0) + int((answer[f"{kind}/{name}"] != numbers).sum())
    return {kind: count for kind, count in found.items() if count}


@torch.no_grad()
def logits_of(student: Student) -> torch.Tensor:
    return student.model(input_ids=IDS).logits
