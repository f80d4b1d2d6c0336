"""What stands in a folder's config, its static input ranges and its tokenizer are read too, and wrong ones rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.initializers import RTN
from kdqat.models import ModelSource
from kdqat.quant import LSQ
from kdqat.student import prepare_student
from tests.contracts.test_exporters import trained
from tests.exporters.test_parity_besides import judged, tensors

UP = "model.layers.0.mlp.up_proj"


def config(change):
    """A change of `quantization_config`, wherever it stands."""

    def changed(folder: Path) -> None:
        for name in ("config.json", "quantize_config.json"):
            if (folder / name).is_file():
                found = json.loads((folder / name).read_text())
                change(found.get("quantization_config", found))
                (folder / name).write_text(json.dumps(found))

    return changed


@pytest.fixture(scope="module")
def partly():
    """A student with layers left in floats."""
    return prepare_student(ModelSource("toy:llama"), Uniform("W4A16_G32", ignore=("lm_head", "*k_proj")), LSQ, RTN())


@pytest.mark.parametrize("word, change, says", [
    ("gptq", lambda c: c.update(group_size=64), "g_idx is not that of groups of 64"),
    ("gptq", lambda c: c.pop("dynamic"), "k_proj is in floats, which `dynamic` does not say"),
    ("gptq", lambda c: c.update(dynamic={"-:.*": {}}), "`dynamic` says that it is not"),
    ("gptq", lambda c: c.update(lm_head=True), "`lm_head` of the config"),
    ("awq", lambda c: c.update(group_size=64), "groups of 64"),
    ("awq", lambda c: c.update(modules_to_not_convert=["lm_head"]), "k_proj is in floats"),
    ("awq", lambda c: c.update(modules_to_not_convert=["proj"]), "says that it is not"),
    ("awq", lambda c: c.update(zero_point=False), "`zero_point` must be true"),
])  # fmt: skip
def test_a_config_that_engines_would_read_otherwise_is_rejected(partly, reader_here, tmp_path, word, change, says):
    parity = judged(partly, word, tmp_path, config(change))
    assert parity.rejected and says in parity.why


def test_the_first_rule_of_gptq_that_matches_wins(partly, reader_here, tmp_path):
    def add_last(found):
        found["dynamic"]["-:.*"] = {}
        found["dynamic"] = {r"+:.*\.[qvo]_proj$": {}, "+:.*mlp": {}} | found["dynamic"]

    parity = judged(partly, "gptq", tmp_path, config(add_last))
    assert parity.verified, parity.why


@pytest.mark.parametrize("word", ["gptq", "awq", "compressed-tensors"])
def test_a_folder_without_its_tokenizer_is_rejected(partly, reader_here, tmp_path, word):
    parity = judged(partly, word, tmp_path, lambda folder: [file.unlink() for file in folder.glob("tokenizer*")])
    assert parity.rejected


def test_asymmetric_awq_whose_zero_points_are_all_in_the_middle_is_verified(reader_here, tmp_path):
    student = prepare_student(ModelSource("toy:llama"), Uniform("W4A16_ASYM_G32", ignore=("lm_head",)), LSQ, RTN())
    with torch.no_grad():
        student.layers[UP].weight_fake_quantizer.zero_point.fill_(8)
    parity = judged(student, "awq", tmp_path, lambda folder: None)
    assert parity.verified, parity.why


def times(last: str, factor: float):
    return tensors(lambda found: [found[key].mul_(factor) for key in found if key.endswith(last)])


@pytest.mark.parametrize("scheme, change, says", [
    ("W8A8_STATIC", times("input_scale", 7), "1 of 1 input scales differ"),
    ("W8A8_STATIC", tensors(lambda t: t.pop(f"{UP}.input_scale")), "input_scale"),
    ("W8A8_STATIC", config(lambda c: c["config_groups"]["group_0"].update(input_activations=None)), "input_scale"),
    ("W8A8", config(lambda c: c["config_groups"]["group_0"].update(input_activations=None)), "without input bits"),
    ("W8A8", config(lambda c: c["config_groups"]["group_0"]["input_activations"].update(num_bits=4)), "input bits"),
    ("NVFP4", times("input_global_scale", 7), "1 of 1 input global scales differ"),
])  # fmt: skip
def test_inputs_that_engines_would_quantize_otherwise_are_rejected(reader_here, tmp_path, scheme, change, says):
    student = trained("toy:llama", scheme)
    parity = judged(student, "compressed-tensors", tmp_path, change)
    assert parity.rejected and says in " ".join([parity.why, *parity.numbers.get("faults", [])])
    (tmp_path / "good").mkdir()
    assert judged(student, "compressed-tensors", tmp_path / "good", lambda folder: None).verified
