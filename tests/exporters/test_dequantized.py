"""DequantizedHF: a plain folder in the dtype that was asked for, whole or not at all."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from kdqat import api
from kdqat.exporters import DequantizedHF, Exporter
from kdqat.initializers import RTN
from tests.contracts.test_exporters import IDS, trained
from tests.exporters.reading import loaded


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["toy:llama", "toy:llama untied"])
def test_weights_are_rounded_to_the_dtype_once_and_the_config_says_so(tmp_path, dtype, name):
    student, kind = trained(name), getattr(torch, dtype)
    api.export(student, DequantizedHF(dtype=dtype), tmp_path / "out", verify=False)
    model = loaded(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert {p.dtype for p in model.parameters()} == {kind} and not model.training
    for key, layer in student.layers.items():
        assert torch.equal(model.get_submodule(key).weight, layer.fake_quantized_weight().to(kind))
    assert torch.equal(model.lm_head.weight, student.model.lm_head.weight.to(kind))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "toy:llama")
    assert student.model.config.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_is_written_once(tmp_path, dtype):
    api.export(trained("toy:llama"), DequantizedHF(dtype=dtype), tmp_path / "out", verify=False)
    keys = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert "model.embed_tokens.weight" in keys and "lm_head.weight" not in keys
    assert not any("fake_quantizer" in key for key in keys)


def test_a_reader_gets_the_same_answers_in_bf16_as_the_student_in_bf16(tmp_path):
    student = trained("toy:llama")
    api.export(student, DequantizedHF(dtype="bfloat16"), tmp_path / "out", verify=False)
    with torch.no_grad():
        read = loaded(tmp_path / "out")(input_ids=IDS).logits.float()
        exact = student.model(input_ids=IDS).logits
    assert (read - exact).abs().max() < 0.05 * exact.abs().max()


def test_an_existing_folder_is_refused_and_kept_unless_overwritten(tmp_path):
    student = api.quantize("toy:llama", "W4A16", initializer=RTN())
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"exists already: use --overwrite"):
        api.export(student, DequantizedHF(), out, verify=False)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    api.export(student, DequantizedHF(), out, overwrite=True, verify=False)
    assert (out / "model.safetensors").is_file() and not (out / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Failing(DequantizedHF):
    def export(self, student, out_dir) -> None:
        super().export(student, out_dir)
        raise OSError(28, "No space left on device")


def test_a_failed_export_leaves_what_was_there_and_nothing_half_written(tmp_path):
    student = api.quantize("toy:llama", "W4A16", initializer=RTN())
    with pytest.raises(OSError, match="No space"):
        api.export(student, Failing(), tmp_path / "out", verify=False)
    assert list(tmp_path.iterdir()) == []
    api.export(student, DequantizedHF(), tmp_path / "out", verify=False)
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    with pytest.raises(OSError, match="No space"):
        api.export(student, Failing(), tmp_path / "out", overwrite=True, verify=False)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class Picky(Exporter):
    name = "picky"
    reader = None

    def refuses(self, student):
        return "layer x: no 4-bit codes; use DequantizedHF"

    def export(self, student, out_dir):
        raise AssertionError("asked to export what it refused")


def test_a_plan_that_the_format_refuses_is_not_written(tmp_path):
    student = api.quantize("toy:llama", "W4A16", initializer=RTN())
    with pytest.raises(
        ValueError, match=r"export picky: layer x: no 4-bit codes.* \(formats that hold this plan: .*dequantized"
    ):
        api.export(student, Picky(), tmp_path / "out", verify=False)
    assert list(tmp_path.iterdir()) == []


def test_the_public_verbs_are_functions_whatever_was_imported_before():
    import kdqat

    assert kdqat.export is api.export and kdqat.evaluate is api.evaluate
