"""Quantized folders as a start: whose settings a layer has, and what is refused or said aloud."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from safetensors.torch import load_file, save_file

from kdqat.allocate import FromCheckpoint
from kdqat.calibrate import Calibration
from kdqat.exporters import GPTQ, CompressedTensors
from kdqat.initializers import StoredScales
from kdqat.models import ModelSource
from kdqat.models.packed_config import group_of
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ
from kdqat.student import prepare_student
from tests.exporters.test_packed_formats import MLP, small, stored_config, written


def with_config(folder, change):
    """The folder with `change` made to its quantization config."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSource(str(folder))


def test_config_groups_are_searched_by_name_then_by_regex_then_by_class(tmp_path):
    folder = written(CompressedTensors(), small("toy:llama", "W4A16_ASYM_G32"), tmp_path / "out")
    groups = stored_config(folder)["config_groups"]
    right, wrong = groups["group_0"], {**groups["group_0"], "weights": {"strategy": "no such"}}
    named = sorted({key.removesuffix(".weight_packed") for key in load_file(folder / "model.safetensors")})
    named = [name for name in named if name.endswith("_proj")]

    def load(*targets):
        found = [{**(wrong if i < len(targets) - 1 else right), "targets": list(t)} for i, t in enumerate(targets)]

        def change(config):
            config["config_groups"] = {f"group_{i}": group for i, group in enumerate(found)}

        return with_config(folder, change).load_model()

    load(["Linear"], ["re:.*proj"])
    load(["re:.*proj"], named)
    load(["Linear"], named)
    with pytest.raises(ValueError, match="no config group targets it"):
        load(["re:.*no_such"])


def test_overlapping_config_groups_are_resolved_as_compressed_tensors_resolves_them():
    """Bits are marks here: each group has its own."""
    targets = [["Linear"], ["re:.*up_proj", "re:.*proj"], ["re:.*mlp.*", f"{MLP}.up_proj"], ["re:.*proj"]]
    groups = {
        f"group_{i}": {"targets": t, "weights": {"num_bits": i + 2, "symmetric": True, "strategy": "channel"}}
        for i, t in enumerate(targets)
    }
    config = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["lm_head", "re:.*o_proj"]}
    model = toy_model("llama")
    apply_quantization_config(model, QuantizationConfig.model_validate(config))
    theirs = {name: m.quantization_scheme.weights.num_bits for name, m in linears(model) if is_quantized(m)}
    assert {name: group_of(name, config)["weights"]["num_bits"] for name in theirs} == theirs
    assert len(set(theirs.values())) == 2 and len(theirs) == 12
    for name in {name for name, _ in linears(model)} - set(theirs):
        with pytest.raises(ValueError, match="ignore has it"):
            group_of(name, config)


def linears(model):
    return [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]


def is_quantized(module):
    return hasattr(module, "quantization_scheme")


def test_a_layer_that_the_config_ignores_and_the_files_quantize_is_refused(tmp_path):
    folder = written(CompressedTensors(), small("toy:llama", moved=False), tmp_path / "out")
    for ignored in (f"{MLP}.up_proj", "re:.*up_proj"):
        source = with_config(folder, lambda config: config.update(ignore=["lm_head", ignored]))  # noqa: B023
        with pytest.raises(ValueError, match=r"up_proj: its scales are stored, but ignore has it by"):
            source.load_model()


def test_a_zero_point_left_over_in_a_symmetric_layer_is_refused(tmp_path):
    folder = written(CompressedTensors(), small("toy:llama", "W4A16_ASYM_G32", moved=False), tmp_path / "out")
    source = with_config(folder, lambda config: config["config_groups"]["group_0"]["weights"].update(symmetric=True))
    with pytest.raises(ValueError, match="says symmetric, but a weight_zero_point is stored"):
        source.load_model()
    folder = written(CompressedTensors(), small("toy:llama", "W8A8", moved=False), tmp_path / "zero")
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if key.endswith("weight_scale")]:
        tensors[key.replace("scale", "zero_point")] = torch.zeros_like(tensors[key], dtype=torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    ModelSource(str(folder)).load_model()  # zeros say what symmetric says


def test_of_gptqs_dynamic_rules_the_first_that_matches_counts(tmp_path):
    folder = written(GPTQ(), small("toy:llama", "GPTQ_4BIT_G32", moved=False), tmp_path / "out")
    rules = {"+:.*up_proj": {"bits": 4}, ".*down_proj": {}, "+:.*(up|down)_proj": {"bits": 8}}
    model = with_config(folder, lambda config: config.update(dynamic=rules)).load_model()
    plain = ModelSource(str(written(GPTQ(), small("toy:llama", "GPTQ_4BIT_G32", moved=False), tmp_path / "plain")))
    plain = plain.load_model()
    assert torch.equal(model.get_submodule(f"{MLP}.up_proj").weight, plain.get_submodule(f"{MLP}.up_proj").weight)
    source = with_config(folder, lambda config: config.update(dynamic={"up_proj": {}, ".*": {"bits": 8}}))
    with pytest.raises(ValueError, match=r"in 8 bits, as its config says, it has \d+ inputs, but its g_idx \d+"):
        source.load_model()
    source = with_config(folder, lambda config: config.update(dynamic={"-:.*up_proj": {}, "+:.*up_proj": {}}))
    with pytest.raises(ValueError, match="up_proj: it is packed, but dynamic leaves it out"):
        source.load_model()


def imported(folder, dtype="float32", **arguments):
    return prepare_student(
        ModelSource(str(folder), dtype), FromCheckpoint(str(folder)), LSQ, StoredScales(), **arguments
    )


def test_codes_that_a_loading_dtype_would_change_are_refused_naming_the_layer_and_float32(tmp_path):
    folder = written(GPTQ(format="gptq_v2"), small("toy:llama", "W8A16_ASYM"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"layer model\.layers\.\d\..*: in bfloat16 \d+ of its weights .* in float32"):
        imported(folder, "bfloat16")
    imported(folder, "float16")
    four = written(GPTQ(), small("toy:llama"), tmp_path / "four")
    imported(four, "bfloat16")  # four bits survive it


def test_a_negative_zero_among_fp4_codes_stays_one(tmp_path):
    folder = written(CompressedTensors(), small("toy:llama", "MXFP4_A16"), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{MLP}.up_proj.weight_packed"][0, :2] = torch.tensor([0x08, 0x80], dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    layer = imported(folder).layers[f"{MLP}.up_proj"]
    assert layer.weight_fake_quantizer.codes(layer.latent_matrix())[0, :4].tolist() == [8, 0, 0, 8]


TEXT = Calibration("kdqat:prose", seq_len=32, num_rows=4)
RANGES = {
    "static activations": ({"scheme": "W8A8_STATIC"}, "28 stored ranges", "input_scale"),
    "fp8 cache": ({"kv_cache": "KV_FP8"}, "4 stored ranges", "k_scale"),
}


@pytest.mark.parametrize("arguments, says, name", RANGES.values(), ids=RANGES.keys())
def test_stored_ranges_are_planned_and_calibrated_anew_which_is_said(arguments, says, name, tmp_path, caplog):
    first = small("toy:llama", **arguments)
    folder = written(CompressedTensors(), first, tmp_path / "first")
    student = imported(folder, calibration=TEXT)
    assert says in caplog.text and name in caplog.text and "model.calibration" in caplog.text
    assert dict(student.plan) == dict(first.plan) and student.plan.kv_cache == first.plan.kv_cache
    again = written(CompressedTensors(), student, tmp_path / "again")
    assert stored_config(again) == stored_config(folder)
    before, after = load_file(folder / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    kept = [key for key in before if not key.endswith(("input_scale", "input_zero_point", "k_scale", "v_scale"))]
    assert all(torch.equal(before[key], after[key]) for key in kept) and len(kept) < len(before)
    with pytest.raises(ValueError, match="calibration is missing"):
        imported(folder)


@pytest.mark.parametrize("bits, symmetric", [(8, False), (4, True)])
def test_other_dynamic_activations_by_token_are_imported(bits, symmetric, tmp_path):
    folder = written(CompressedTensors(), small("toy:llama", "W8A8", moved=False), tmp_path / "out")
    wanted = {"num_bits": bits, "symmetric": symmetric}
    with_config(folder, lambda config: config["config_groups"]["group_0"]["input_activations"].update(wanted))
    spec = imported(folder).plan[f"{MLP}.up_proj"].activation
    assert (spec.format, spec.symmetric, spec.dynamic) == (f"int{bits}", symmetric, True)


def test_what_no_student_starts_from_is_named_and_not_blamed_on_transformers(tmp_path):
    folder = written(CompressedTensors(), small("toy:llama", "W8A8", moved=False), tmp_path / "out")
    group = stored_config(folder)["config_groups"]["group_0"]
    inputs = {**group["input_activations"], "strategy": "tensor"}
    weights = {**group["weights"], "type": "float"}
    for change, says in (
        ({"weights": weights}, "float 8 weights are not known; integers, NVFP4 and MXFP4 are"),
        ({"input_activations": inputs}, "dynamic activations of int 8 by tensor are not known; int 8 and 4 by token"),
    ):
        source = with_config(folder, lambda config: config["config_groups"].update(group_0={**group, **change}))  # noqa: B023
        with pytest.raises(ValueError, match=says) as error:
            source.load_model()
        assert "transformers" not in str(error.value) and str(folder) in str(error.value)


def test_an_unknown_cache_is_left_to_the_plan_and_said(tmp_path, caplog):
    folder = written(CompressedTensors(), small("toy:llama", kv_cache="KV_FP8", moved=False), tmp_path / "out")
    with_config(folder, lambda config: config["kv_cache_scheme"].update(type="int"))
    assert imported(folder).plan.kv_cache is None and "its kv_cache_scheme is none that kdqat knows" in caplog.text
