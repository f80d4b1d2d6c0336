"""The parity gate on students in 16 bits: engines multiply by scale * code, whatever latent weights are."""

from __future__ import annotations

import json

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.exporters.parity import verify_export
from kdqat.exporters.words import exporter_of
from kdqat.initializers import RTN
from kdqat.models import ModelSource
from kdqat.quant import LSQ
from kdqat.student import Student, prepare_student


def in_16_bits(dtype: str, source: str = "toy:llama", ignore: str = "lm_head") -> Student:
    """A student in `dtype` whose scales have moved."""
    student = prepare_student(ModelSource(source, dtype=dtype), Uniform("W4A16_G32", ignore=(ignore,)), LSQ, RTN())
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in student.layers.values():
            scale = layer.weight_fake_quantizer.scale
            scale.mul_(torch.rand_like(scale) * 0.2 + 0.85)
    return student


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "word", ["gptq", "awq", "compressed-tensors", "compressed-tensors:float32", "torchao", "gguf:q4_0", "dequantized"]
)
def test_correct_files_of_a_student_in_16_bits_are_verified(word, dtype, reader_here, tmp_path):
    exporter, student = exporter_of(word), in_16_bits(dtype)
    if missing := exporter.reader_missing():
        pytest.skip(missing)
    exporter.export(student, tmp_path)
    parity = verify_export(student, exporter, tmp_path)
    assert parity.verified, parity.why


def test_correct_onnx_of_an_encoder_in_16_bits_is_verified(reader_here, tmp_path):
    exporter, student = exporter_of("onnx"), in_16_bits("bfloat16", "toy:bert_encoder", "pooler*")
    if missing := exporter.reader_missing():
        pytest.skip(missing)
    exporter.export(student, tmp_path)
    parity = verify_export(student, exporter, tmp_path)
    assert parity.verified, parity.why


def test_a_torchao_folder_of_a_student_in_16_bits_is_loaded_in_the_float32_of_its_tensors(tmp_path):
    pytest.importorskip("torchao")
    student = in_16_bits("bfloat16")
    student.model.config.dtype = torch.bfloat16  # as a model of the hub has it
    exporter_of("torchao").export(student, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float32"
    assert student.model.config.dtype == torch.bfloat16  # left as it was
