"""The "Use" section of a card is run as it stands: its programs import what they name, and compute what was trained."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.exporters.card import About, front_matter, write_card
from kdqat.exporters.parity import Parity
from kdqat.exporters.words import exporter_of, format_words
from kdqat.initializers import RTN
from kdqat.models.toy import toy_model
from kdqat.student import Student
from tests.exporters.gguf_students import IDS, logits_of, trained

MIXED = {"overrides": {"down": "W8A16_G32", "*.0.self_attn.q_proj": "W3A16_ASYM"}, "ignore": ("lm_head", "*k_proj")}


def student_of(path: str, scheme: str = "W4A16_G32", **plan: Any) -> Student:
    return api.quantize(path, Uniform(scheme, **plan), initializer=RTN())


def programs(student: Student, word: str, folder: str) -> dict[str, str]:
    return {engine: text for engine, text in exporter_of(word).serving(student, folder).items() if "import " in text}


def needs(word: str) -> None:
    """Skip where the package is missing."""
    if missing := exporter_of(word).writer_missing() or exporter_of(word).reader_missing():
        pytest.skip(missing)


@pytest.mark.parametrize("word, path, scheme", [
    ("dequantized", "toy:llama", "NF4"),
    ("dequantized", "toy:bert", "W4A16_G32"),
    ("compressed-tensors:float32", "toy:llama", "W4A16_G32"),
    ("compressed-tensors:float32", "toy:llama", "W4A16_ASYM_G32"),
    ("compressed-tensors:float32", "toy:bert_encoder", "W4A16_G32"),
    ("torchao", "toy:llama", "TORCHAO_8DA4W_G32"),
    ("torchao", "toy:bert_encoder", "W8A16_ASYM"),
    ("onnx", "toy:bert_encoder", "W4A16_G32"),
])  # fmt: skip
def test_every_program_of_a_card_runs(word, path, scheme, tmp_path, monkeypatch, capsys):
    needs(word)
    student = student_of(path, scheme)
    (tmp_path / "served").mkdir()
    exporter_of(word).export(student, tmp_path / "served")
    monkeypatch.chdir(tmp_path)
    (program,) = programs(student, word, "served").values()
    names: dict[str, Any] = {}
    exec(compile(program, word, "exec"), names)
    assert capsys.readouterr().out.strip()
    if "model" in names:
        assert type(names["model"]).__name__ == type(student.model).__name__


@pytest.mark.parametrize("word", format_words())
@pytest.mark.parametrize("path", ["toy:llama", "toy:bert_encoder", "toy:bert"])
def test_a_program_imports_what_it_names_and_an_encoder_is_no_decoder(word, path):
    student = student_of(path, "W4A16_ASYM_G32")
    serving = exporter_of(word).serving(student, "served")
    for text in programs(student, word, "served").values():
        imported = set(re.findall(r"\w+", " ".join(re.findall(r"import (.*)", text))))
        assert {name for name in re.findall(r"\b[A-Z]\w+(?=[.(])", text) if name != "InferenceSession"} <= imported
    if path != "toy:llama" and not word.startswith("gguf"):  # which refuses encoders
        assert not any("vllm" in text or "sglang" in text or "CausalLM" in text for text in serving.values())
    assert serving


@pytest.mark.parametrize("plan", [{}, MIXED, {"ignore": ()}], ids=["alike", "mixed", "with its head"])
@pytest.mark.parametrize("scheme", ["W4A16_G32", "TORCHAO_8DA4W_G32"])
def test_transformers_loads_a_torchao_folder_as_what_it_is(scheme, plan, tmp_path):
    needs("torchao")
    student = trained("toy:llama", scheme, model=toy_model("llama", tie=bool(plan.get("ignore", True))), **plan)
    exporter_of("torchao").export(student, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(model.model.layers[1].mlp.up_proj.weight).__name__ == "IntxUnpackedToInt8Tensor"
    with torch.no_grad():
        ours, theirs = logits_of(student), model(input_ids=IDS).logits
    assert (ours - theirs).abs().max() <= (1e-2 if "8DA" in scheme else 0)  # a tie may fall to the other code


def test_the_card_of_a_torchao_folder_says_how_it_is_used(tmp_path):
    student = student_of("toy:llama")
    write_card(student, exporter_of("torchao"), tmp_path, Parity(why="nobody asked"), About(), name="out")
    text = (tmp_path / "README.md").read_text()
    assert "## Use" in text and "pip install torchao" in text and 'AutoModelForCausalLM.from_pretrained("out")' in text
    assert "torchao" in front_matter(student, exporter_of("torchao"))


@pytest.mark.parametrize("word", ["dequantized", "torchao", "gguf:q4_0", "gptq", "awq", "compressed-tensors"])
def test_how_a_model_generates_goes_with_it(word, tmp_path):
    needs(word)
    student = student_of("toy:llama")
    student.model.generation_config = GenerationConfig(eos_token_id=[2, 5], temperature=0.6, do_sample=True)
    exporter_of(word).export(student, tmp_path)
    assert json.loads((Path(tmp_path) / "generation_config.json").read_text())["eos_token_id"] == [2, 5]
