"""torchao reads the student's codes out of safetensors and computes its logits, bit for bit; no pickle is involved."""

from __future__ import annotations

from runpy import run_path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kdqat.exporters import TorchAO
from kdqat.exporters.parity import verify_export
from tests.exporters.gguf_students import IDS, READERS, differing, logits_of, trained
from tests.models.stories import stories260k

pytest.importorskip("torchao")


def answer_of(student, folder) -> dict[str, torch.Tensor]:
    assert TorchAO().refuses(student) is None
    folder.mkdir(exist_ok=True)
    TorchAO().export(student, folder)
    save_file({"input_ids": IDS}, folder / "request")
    run_path(str(READERS / "torchao_reader.py"))["main"](str(folder), str(folder / "request"), str(folder / "answer"))
    return load_file(folder / "answer")


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16_ASYM_G32", "W8A16", "W3A16_ASYM", "W2A16_G16", "GGUF_Q4_0"])
def test_codes_scales_zero_points_weights_and_logits_are_the_students(scheme, tmp_path):
    student = trained("toy:llama", scheme)
    answer = answer_of(student, tmp_path)
    assert differing(student, answer) == {}
    for name, layer in student.layers.items():
        zero_point = layer.weight_fake_quantizer.stored_qparams(layer.latent_matrix()).zero_point
        assert torch.equal(answer[f"zero_points/{name}"].float(), zero_point.squeeze(2))
        assert torch.equal(answer[f"weights/{name}"], layer.fake_quantized_weight())
    assert torch.equal(answer["logits"], logits_of(student))


def test_odd_widths_and_a_tied_head_that_is_left_alone(tmp_path):
    student = trained(stories260k(), "W4A16")
    answer = answer_of(student, tmp_path)
    assert differing(student, answer) == {} and torch.equal(answer["logits"], logits_of(student))
    assert not any(path.suffix in (".bin", ".pt", ".pth", ".pkl") for path in tmp_path.iterdir())


def test_torchao_quantizes_the_activations_that_its_8da4w_was_trained_with(tmp_path):
    student = trained("toy:llama", "TORCHAO_8DA4W_G32")
    assert TorchAO().leaves(student.plan) == "" and TorchAO().leaves(trained("toy:llama", "W4A8_G32").plan)
    assert differing(student, answer_of(student, tmp_path)) == {}
    model = run_path(str(READERS / "torchao_reader.py"))["load"](str(tmp_path))
    with torch.no_grad():
        theirs, ours = model(input_ids=IDS).logits, student.model(input_ids=IDS).logits
    without = load_file(tmp_path / "answer")["logits"]  # the gate's, of quantized weights alone
    assert (theirs - ours).abs().max() < 0.1 * (without - ours).abs().max()  # a tie may fall to the other code


def test_the_gate_finds_one_changed_code(tmp_path):
    student = trained("toy:llama", "W4A16_ASYM_G32")
    answer_of(student, tmp_path)
    for file in ("request", "answer"):
        (tmp_path / file).unlink()
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.layers.1.mlp.up_proj._weight_qdata"
    assert key in tensors and tensors[key].dtype == torch.int8
    tensors[key][3, 5] ^= 1
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        save_file(tensors, tmp_path / "model.safetensors", opened.metadata())
    parity = verify_export(student, TorchAO(), tmp_path)
    assert parity.rejected and "mlp.up_proj: 1 of 8192 codes differ" in parity.why


def test_grids_that_torchao_lacks_are_refused_with_the_nearest():
    for scheme, near in {"NF4": "W4A16", "GGUF_Q4_1": "W4A16", "TERNARY": "W4A16", "FP8": "W8A16"}.items():
        reason = TorchAO().refuses(trained("toy:llama", scheme, num_steps=0))
        assert "model.layers.0.self_attn.q_proj" in reason and f"train under {near}" in reason
    planned = trained("toy:llama", "W4A16_G32", ignore=(), embeddings="W4A16_G32", num_steps=0)
    assert "embed_tokens: torchao has quantized tensors for linear" in TorchAO().refuses(planned)
    assert TorchAO().reader_missing() is None
