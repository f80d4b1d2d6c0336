"""A student is prepared once, and what is saved computes bit for bit what was trained."""

from __future__ import annotations

import json
import logging
import math
from itertools import repeat

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdqat.allocate import Uniform
from kdqat.initializers import RTN, MSEGrid
from kdqat.models import ModelSource, SplitModel
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ, Fixed, MinMax, full_precision
from kdqat.spec import PLAN_FILE, QuantPlan
from kdqat.student import (
    QPARAMS_FILE,
    STUDENT_FILE,
    as_rtn,
    block_views,
    load_student,
    prepare_student,
    save_student,
    stored_bytes,
)
from tests.contracts.test_exporters import IDS, trained
from tests.models.stories import stories260k

OTHER_FORMATS = ["NVFP4", "MXFP4_A16", "NF4_DOUBLE", "GGUF_Q4_0", "GGUF_Q4_1", "TERNARY", "BINARY_G64", "W2A16_HALF"]
OTHER_FORMATS += ["FP8", "W4A8_G32", "W8A8_STATIC", "FP4_W4A4_PRE_SHIFT"]  # activations, live and stored


def logits(student) -> torch.Tensor:
    with torch.no_grad():
        return student.model(input_ids=IDS).logits


def prepare(scheme="W4A16_G32", quantizer=LSQ, initializer=None, source="toy:llama", **plan):
    return prepare_student(ModelSource(source), Uniform(scheme, **plan), quantizer, initializer or RTN())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A student with moved weights and scales, and the folder it was saved to."""
    student, folder = trained("toy:llama"), tmp_path_factory.mktemp("student")
    save_student(student, folder)
    return student, folder


@pytest.fixture
def damaged(saved, tmp_path):
    """A copy of the folder to damage."""
    for file in saved[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_preparing_plans_swaps_initializes_and_says_what_it_left_out(caplog):
    with caplog.at_level(logging.INFO, "kdqat"):
        student = prepare()
    assert len(student.plan) == len(student.layers) == 14
    assert all((layer.weight_fake_quantizer.scale != 1).all() for layer in student.layers.values())
    text = caplog.text
    assert "plan: 14 layers, 4.500 bits a weight" in text and "left in full precision: lm_head" in text


def test_the_summary_counts_bits_by_hand():
    summary = prepare("W4A16").summary()
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    scales = 64 + 64 + 32 + 32 + 128 + 128 + 64  # one fp16 scale per output channel
    assert summary == {
        "layers": 14,
        "ignored": ["lm_head"],
        "nominal_bits": 4.0,
        "average_bits": round(4 + 16 * scales / block, 4),
        "share_full_precision": round(260 * 64 / (260 * 64 + 2 * block), 6),
    }


def test_stored_bytes_are_counted_by_hand():
    block = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    rest = 260 * 64 + 5 * 64  # the embedding, tied to the head and stored once, and five norms
    size = stored_bytes(prepare("W4A16_G32"))
    assert size == {"student": 2 * (block * 4 // 8 + block // 32 * 2) + 2 * rest, "teacher": 2 * (2 * block + rest)}
    asymmetric = stored_bytes(prepare("W3A16_ASYM_G32"))["student"]
    assert asymmetric == math.ceil(2 * (block * 3 + block // 32 * (16 + 3)) / 8) + 2 * rest
    assert stored_bytes(prepare("W4A16_G32", MinMax)) == size  # learned scales are no weights of the model
    model = SplitModel(toy_model("llama", tie=False))
    untied = prepare_student(ModelSource("toy:llama"), Uniform("W4A16_G32"), LSQ, RTN(), split=model)
    assert stored_bytes(untied)["student"] == size["student"] + 2 * 260 * 64


def test_blocks_come_in_order_and_the_head_last():
    model = SplitModel(toy_model("llama", tie=False))
    student = prepare_student(ModelSource("toy:llama"), Uniform("W4A16", ignore=()), LSQ, RTN(), split=model)
    views = list(block_views(student.model, repeat(None)))
    assert [view.index for view in views] == [0, 1, None]
    assert list(views[2].layers) == ["lm_head"]
    assert all(name.startswith("model.layers.1.") for name in views[1].layers) and len(views[1].layers) == 7
    assert views[0].layers["model.layers.0.mlp.up_proj"] is student.layers["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize("quantizer", [Fixed, LSQ])
@pytest.mark.parametrize("scheme", ["W4A16", "W3A16_G32", "W2A16_ASYM_G64", "W8A16_ASYM", *OTHER_FORMATS])
def test_logits_and_codes_survive_saving_and_loading_bit_for_bit(tmp_path, scheme, quantizer):
    student = trained("toy:llama", scheme)
    save_student(student, tmp_path)
    again = load_student(tmp_path, quantizer)
    assert torch.equal(logits(again), logits(student))
    for name, layer in student.layers.items():
        other = again.layers[name]
        assert torch.equal(other.weight, layer.weight)
        codes = [x.weight_fake_quantizer.codes(x.weight) for x in (layer, other)]
        assert torch.equal(*codes)
    assert again.plan == student.plan and again.coverage == student.coverage and again.source == student.source
    assert again.summary() == student.summary() and again.tokenizer.get_vocab() == student.tokenizer.get_vocab()
    assert again.model.lm_head.weight is again.model.model.embed_tokens.weight


def test_a_real_model_survives_saving_twice(tmp_path):
    student = prepare("W3A16", initializer=MSEGrid(num_steps=5), source=stories260k())
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_student(student, tmp_path / "a")
    save_student(load_student(tmp_path / "a"), tmp_path / "b")
    assert torch.equal(logits(load_student(tmp_path / "b")), logits(student))
    for file in (PLAN_FILE, QPARAMS_FILE, STUDENT_FILE, "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_a_student_with_live_ranges_is_saved_with_the_ranges_it_has(tmp_path):
    student = prepare("W4A16_ASYM_G32", MinMax)
    save_student(student, tmp_path)
    for quantizer in (Fixed, MinMax):
        assert torch.equal(logits(load_student(tmp_path, quantizer)), logits(student))


def test_a_saved_student_loads_as_a_plain_folder_of_its_latent_weights(saved):
    student, folder = saved
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with full_precision(student.model), torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, student.model(input_ids=IDS).logits)
    assert AutoTokenizer.from_pretrained(folder)("x").input_ids == student.tokenizer("x").input_ids
    assert QuantPlan.load(folder) == student.plan
    about = json.loads((folder / STUDENT_FILE).read_text())
    assert about["source"]["path"] == "toy:llama" and about["average_bits"] == 4.5


def test_the_loaded_student_can_be_trained_on(saved):
    again = load_student(saved[1], LSQ)
    again.model(input_ids=IDS).logits.square().sum().backward()
    for layer in again.layers.values():
        assert layer.weight.grad.any() and layer.weight_fake_quantizer.scale.grad.any()


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W2A16_ASYM_G32"])
def test_inside_as_rtn_it_is_the_rtn_baseline_and_afterwards_itself_again(scheme):
    student = prepare(scheme, initializer=MSEGrid())
    before, objects = logits(student), [layer.weight_fake_quantizer for layer in student.layers.values()]
    with as_rtn(student) as rtn:
        assert torch.equal(logits(rtn), logits(prepare(scheme, MinMax)))
        assert not torch.equal(logits(rtn), before)
    assert torch.equal(logits(student), before)
    assert all(a is b.weight_fake_quantizer for a, b in zip(objects, student.layers.values(), strict=True))


def test_a_model_moved_inside_as_rtn_gets_its_quantizers_back_on_the_device_where_it_now_is():
    student = prepare("W4A16_G32")
    with as_rtn(student):
        student.model.to("meta")  # as an evaluation on a GPU does
    assert all(tensor.is_meta for layer in student.layers.values() for tensor in layer.weight_fake_quantizer.buffers())


def test_as_rtn_takes_absmax_whatever_the_students_rule_and_restores_after_an_error():
    spec = {"format": "int4", "scale_rule": "signed_max", "scale_dtype": "float16"}
    student = prepare({"weight": spec})
    before = logits(student)
    with pytest.raises(KeyError), as_rtn(student):
        assert torch.equal(logits(student), logits(prepare("W4A16")))
        raise KeyError
    assert torch.equal(logits(student), before)


@pytest.mark.parametrize("file", [PLAN_FILE, QPARAMS_FILE, STUDENT_FILE, "config.json"])
def test_a_missing_file_is_named_with_what_writes_it(damaged, file):
    (damaged / file).unlink()
    with pytest.raises(ValueError, match=f"{file} is missing, so this is no saved student; `kdqat quantize`"):
        load_student(damaged)


@pytest.mark.parametrize("file", [PLAN_FILE, QPARAMS_FILE, STUDENT_FILE, "config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe damaged", b"[1, 2]"])
def test_a_damaged_file_is_an_error_that_names_the_folder(damaged, file, content):
    (damaged / file).write_bytes(content)
    with pytest.raises(ValueError, match=str(damaged)):
        load_student(damaged)


def test_a_truncated_file_is_an_error_that_names_the_folder(damaged):
    whole = (damaged / QPARAMS_FILE).read_bytes()
    (damaged / QPARAMS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=f"{QPARAMS_FILE} or {STUDENT_FILE} is damaged"):
        load_student(damaged)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM_G64"])
def test_scales_of_another_plan_are_refused_by_layer(damaged, scheme):
    data = json.loads((damaged / PLAN_FILE).read_text())
    other = QuantPlan({name: Uniform(scheme).scheme for name in data["layers"]}, ("lm_head",))
    other.save(damaged)
    with pytest.raises(ValueError, match=r"does not fit quant_plan\.json: layer model\.layers\.0"):
        load_student(damaged)


def test_scales_that_are_missing_for_a_layer_are_named(damaged):
    from safetensors.torch import load_file, save_file

    qparams = load_file(damaged / QPARAMS_FILE)
    del qparams["model.layers.1.mlp.up_proj.scale"]
    save_file(qparams, damaged / QPARAMS_FILE)
    with pytest.raises(ValueError, match=r"does not fit quant_plan\.json: layer model\.layers\.1\.mlp\.up_proj"):
        load_student(damaged)
