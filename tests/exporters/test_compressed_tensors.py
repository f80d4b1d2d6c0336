"""compressed-tensors by channel, with zero points and an FP8 cache; and transformers that loads it without kdqat."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdqat.exporters import CompressedTensors
from kdqat.exporters.parity import verify_export
from tests.exporters.test_packed_formats import small, written
from tests.models.stories import stories260k

LOAD = """
import sys
sys.modules["kdqat"] = None  # whoever imports it fails
import torch, transformers
folder, dequantize = sys.argv[1], sys.argv[2] == "True"
how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
model = transformers.AutoModelForCausalLM.from_pretrained(folder, **how)
transformers.AutoTokenizer.from_pretrained(folder)
logits = model(input_ids=torch.arange(3, 35)[None]).logits.float()
weight = model.model.layers[0].mlp.up_proj.weight
print(weight.float().sum().item(), logits.std().item())
"""


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("scheme", ["W8A16", "W8A16_ASYM", "W4A16_ASYM"])
def test_channels_with_and_without_zero_points_are_proved(scheme, dtype, reader_here, tmp_path):
    student, exporter = small(stories260k(), scheme), CompressedTensors(dtype=dtype)
    parity = verify_export(student, exporter, written(exporter, student, tmp_path / "out"))
    assert parity.verified, parity.why
    channels = sum(layer.matrix_shape[0] for layer in student.layers.values())
    asymmetric = scheme.endswith("ASYM")
    assert parity.numbers["scales"] == {"compared": channels, "changed": 0}
    assert parity.numbers["zero_points"] == {"compared": channels * asymmetric, "changed": 0}
    assert dtype == "float16" or parity.numbers["logits"]["max_difference"] == 0


@pytest.mark.parametrize("scheme", ["W8A16", "W4A16_ASYM"])
def test_an_fp8_cache_is_that_of_the_student_bit_for_bit_in_float32(scheme, reader_here, tmp_path):
    student, exporter = small(stories260k(), scheme, kv_cache="KV_FP8"), CompressedTensors(dtype="float32")
    parity = verify_export(student, exporter, written(exporter, student, tmp_path / "out"))
    assert parity.verified and parity.numbers["kv_cache"] == "as planned", parity.why
    assert parity.numbers["logits"]["max_difference"] == 0


def test_of_an_fp8_cache_in_16_bits_the_scales_are_compared_and_the_logits_do_without(reader_here, tmp_path):
    student, exporter = small(stories260k(), "W8A16", kv_cache="KV_FP8"), CompressedTensors()
    folder = written(exporter, student, tmp_path / "out")
    parity = verify_export(student, exporter, folder)
    assert parity.verified and parity.numbers["kv_cache"].startswith("in full precision"), parity.why
    caches = 2 * student.model.config.num_hidden_layers
    channels = sum(layer.matrix_shape[0] for layer in student.layers.values())
    assert parity.numbers["scales"] == {"compared": channels + caches, "changed": 0}


def test_a_cache_scale_off_by_one_ulp_is_seen(reader_here, tmp_path):
    student, exporter = small("toy:llama", kv_cache="KV_FP8"), CompressedTensors()
    folder = written(exporter, student, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"].view(torch.int32)[0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    parity = verify_export(student, exporter, folder)
    assert parity.rejected and "model.layers.1.self_attn.value: 1 of 1 scales differ" in parity.why


def test_a_reader_that_forgets_the_cache_proves_nothing(reader_here, tmp_path, monkeypatch):
    student, exporter = small("toy:llama", kv_cache="KV_FP8"), CompressedTensors()
    monkeypatch.setattr(CompressedTensors, "reader", str(forgetful_reader(tmp_path)))
    parity = verify_export(student, exporter, written(exporter, student, tmp_path / "out"))
    assert parity.rejected and "self_attn.key: the reader answered without the scale of this cache" in parity.why


def forgetful_reader(folder):
    from kdqat.exporters.parity_reader import READERS

    text = (READERS / CompressedTensors.reader).read_text()
    (folder / "forgetful.py").write_text(text.replace("found |= cache_scales", "cache_scales"))
    return folder / "forgetful.py"


def test_a_cache_that_engines_do_not_have_is_refused_before_training():
    reason = CompressedTensors().refuses(small("toy:llama", kv_cache="KV8", moved=False))
    assert reason is not None and reason.startswith("kv_cache: ") and "use kv_cache: KV_FP8" in reason


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16_ASYM_G32", "W4A16_ASYM"])
def test_transformers_loads_the_folder_where_kdqat_cannot_be_imported(scheme, tmp_path):
    student = small("toy:llama", scheme)
    folder = written(CompressedTensors(), student, tmp_path / "out")
    asymmetric = "ASYM" in scheme
    said = CompressedTensors().serving(student, str(folder))["transformers"]
    assert ("CompressedTensorsConfig(dequantize=True)" in said) == asymmetric  # the card says what is done here
    command = [sys.executable, "-I", "-c", LOAD, str(folder), str(asymmetric)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    weight, spread = map(float, done.stdout.split())
    ours = student.layers["model.layers.0.mlp.up_proj"].dequantized_weight().detach().half().float()
    assert weight == pytest.approx(float(ours.sum()), abs=1e-3) and spread > 0


@pytest.mark.parametrize("scheme, otherwise", [
    ("W8A8", True), ("W4A4_G32", True), ("MXFP4", True),
    ("W8A8_STATIC", False), ("NVFP4", False), ("TORCHAO_8DA4W_G32", False), ("MXFP4_A16", False), ("W4A16_G32", False),
])  # fmt: skip
def test_live_ranges_that_the_engine_takes_by_its_own_rule_are_told(scheme, otherwise, tmp_path, caplog):
    student = small("toy:llama", scheme, moved=False)
    assert bool(CompressedTensors().leaves(student.plan)) is otherwise
    CompressedTensors().export(student, tmp_path)
    assert ("takes live ranges of activations by its own rule" in caplog.text) is otherwise
    assert "holds weights only" not in caplog.text


def test_its_own_rule_is_still_what_the_page_says():
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    arguments = pytest.importorskip("compressed_tensors.quantization").QuantizationArgs(
        num_bits=8, type="int", symmetric=True, strategy="token", dynamic=True
    )
    scale, _ = utils.calculate_qparams(torch.tensor([-1.0]), torch.tensor([2.0]), arguments)
    torch.testing.assert_close(scale, torch.tensor([2 / 127.5]))  # and training's is 2 / 127
