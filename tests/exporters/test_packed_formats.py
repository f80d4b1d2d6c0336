"""compressed-tensors, GPTQ and AWQ through the parity gate: what fits is proved, what is wrong is seen."""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file

from kdqat.allocate import FromCheckpoint, Uniform
from kdqat.calibrate import Calibration
from kdqat.exporters import AWQ, GPTQ, CompressedTensors
from kdqat.exporters.parity import verify_export
from kdqat.initializers import RTN, StoredScales
from kdqat.models import ModelSource, SplitModel
from kdqat.models.toy import toy_model
from kdqat.quant import LSQ
from kdqat.student import prepare_student
from tests.models.stories import stories260k

MLP = "model.layers.0.mlp"
ATTENTION_ONLY = {"ignore": ("lm_head", "*.mlp.*")}


def small(path: str, scheme="W4A16_G32", *, moved: bool = True, **arguments):
    """A student whose weights and scales have moved since they were initialized, as training moves them."""
    text = Calibration("kdqat:prose", seq_len=32, num_rows=4)
    plan = Uniform(scheme, **{"ignore": ("lm_head",), **arguments})
    student = prepare_student(ModelSource(path), plan, LSQ, RTN(), calibration=text)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for layer in student.layers.values() if moved else ():
            layer.weight.add_(torch.randn_like(layer.weight) * layer.weight.std() * 0.1)
            layer.weight_fake_quantizer.scale.mul_(torch.rand_like(layer.weight_fake_quantizer.scale) * 0.2 + 0.85)
    return student


def written(exporter, student, folder):
    folder.mkdir()
    exporter.export(student, folder)
    return folder


def stored_config(folder):
    return json.loads((folder / "config.json").read_text())["quantization_config"]


FITS = {
    "W4A16 symmetric groups": (CompressedTensors, "toy:llama", {}),
    "asymmetric groups": (CompressedTensors, "toy:llama", {"scheme": "W4A16_ASYM_G32"}),
    "int8 with int8 activations": (CompressedTensors, "toy:llama", {"scheme": "W8A8"}),
    "NVFP4": (CompressedTensors, "toy:llama", {"scheme": "NVFP4"}),
    "MXFP4 weights": (CompressedTensors, "toy:llama", {"scheme": "MXFP4_A16"}),
    "mixed config groups": (
        CompressedTensors, "toy:llama", {"overrides": {"down": "W8A16", "o": "NVFP4_A16"}}),
    "odd widths by channel": (CompressedTensors, "stories", {"scheme": "W4A16"}),
    "GPTQ version 1": (GPTQ, "toy:llama", {"scheme": "GPTQ_4BIT_G32", "overrides": {"down": "W8A16"}}),
    "GPTQ version 2, asymmetric": (
        lambda: GPTQ(format="gptq_v2"), "toy:llama", {"scheme": "W4A16_ASYM", "ignore": ("lm_head", "*.o_proj")}),
    "GPTQ of odd widths in 8 bits": (GPTQ, "stories", {"scheme": "W8A16"}),
    "AWQ": (AWQ, "toy:llama", {"scheme": "AWQ_4BIT_G32"}),
    "AWQ of attention alone": (AWQ, "stories", {"scheme": "AWQ_4BIT_G64", **ATTENTION_ONLY}),
}  # fmt: skip


@pytest.mark.parametrize("make, path, arguments", FITS.values(), ids=FITS.keys())
def test_the_reader_finds_the_students_own_codes_and_scales(make, path, arguments, reader_here, tmp_path):
    student = small(stories260k() if path == "stories" else path, **arguments)
    exporter = make()
    folder = written(exporter, student, tmp_path / "out")
    parity = verify_export(student, exporter, folder)
    assert parity.verified, parity.why
    numbers = parity.numbers
    weights = sum(layer.weight.numel() for layer in student.layers.values())
    assert numbers["codes"] == {"compared": weights, "changed": 0}
    assert numbers["weights"]["compared"] > weights and numbers["weights"]["changed"] == 0
    assert numbers["scales"]["compared"] > 0 and numbers["scales"]["changed"] == 0


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16_ASYM_G32", "NVFP4_A16"])
def test_in_float32_another_process_has_the_students_logits_bit_for_bit(scheme, tmp_path):
    student, exporter = small("toy:llama", scheme), CompressedTensors(dtype="float32")
    parity = verify_export(student, exporter, written(exporter, student, tmp_path / "out"))
    assert parity.verified and parity.numbers["logits"]["max_difference"] == 0, parity.why


@pytest.mark.parametrize("make", [GPTQ, AWQ])
def test_the_readers_by_layout_know_no_kdqat(make, tmp_path):
    student, exporter = small("toy:llama"), make()
    parity = verify_export(student, exporter, written(exporter, student, tmp_path / "out"))
    assert parity.verified, parity.why  # the gate refuses a reader that imported it


def flip(tensor):
    tensor.view(-1)[3] ^= 1


def ulp(tensor):
    tensor.view(torch.int16).view(-1)[3] += 1


def swap_nibbles(tensor):
    low, high = tensor & 0x0F0F0F0F, (tensor >> 4) & 0x0F0F0F0F
    tensor.copy_((low << 4) | high)


CORRUPTED = {
    "one code": ({"weight_packed": flip, "qweight": flip}, "1 of 8192 codes differ"),
    "one scale by one ulp": ({"weight_scale": ulp, "scales": ulp}, "1 of 256 scales differ"),
    "nibbles swapped": ({"weight_packed": swap_nibbles, "qweight": swap_nibbles}, "codes differ"),
}


@pytest.mark.parametrize("changes, says", CORRUPTED.values(), ids=CORRUPTED.keys())
@pytest.mark.parametrize("make", [CompressedTensors, GPTQ, AWQ])
def test_the_least_corruption_is_seen(make, changes, says, reader_here, tmp_path):
    student, exporter = small("toy:llama"), make()
    folder = written(exporter, student, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    for last, change in changes.items():
        if f"{MLP}.up_proj.{last}" in tensors:
            change(tensors[f"{MLP}.up_proj.{last}"])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    parity = verify_export(student, exporter, folder)
    assert parity.rejected and f"{MLP}.up_proj" in parity.why and says in parity.why


REFUSED = {
    "GPTQ, MLP of width 172": (GPTQ, "stories", {"scheme": "W4A16"}, "172 of them end within one; use"),
    "AWQ, 172 outputs": (AWQ, "stories", {"scheme": "W4A16"}, "172 outputs are no multiple"),
    "GPTQ version 1, asymmetric": (GPTQ, "toy:llama", {"scheme": "W4A16_ASYM"}, "use format gptq_v2"),
    "AWQ in 8 bits": (
        AWQ, "toy:llama", {"scheme": "W8A16"}, "AWQ holds int4, not int8; export with gptq, which holds 8 bits"),
    "AWQ in 8 bits, asymmetric": (AWQ, "toy:llama", {"scheme": "W8A16_ASYM"}, "export with gptq-v2, which holds 8"),
    "GPTQ, ternary": (GPTQ, "toy:llama", {"scheme": "TERNARY"}, "not ternary; train under W2A16 (2 bits, another"),
    "AWQ, ternary": (AWQ, "toy:llama", {"scheme": "TERNARY"}, "not ternary; train under W4A16 (4 bits, another grid)"),
    "GPTQ with activations": (
        GPTQ, "toy:llama", {"overrides": {"down": "W4A8"}},
        "model.layers.0.mlp.down_proj: GPTQ has no place for activations"),
    "AWQ, two group sizes": (AWQ, "toy:llama", {"overrides": {"down": "W4A16_G64"}}, "one group size"),
    "AWQ with activations": (AWQ, "toy:llama", {"scheme": "W4A8"}, "no place for activations"),
    "a minimum": (CompressedTensors, "toy:llama", {"scheme": "GGUF_Q4_1"}, "use W4A16_ASYM_G32"),
    "a grid without a zero": (CompressedTensors, "toy:llama", {"scheme": "W2A16_HALF"}, "zero_point 'half'"),
    "ternary": (CompressedTensors, "toy:llama", {"scheme": "TERNARY"}, "format ternary has no place"),
    "a rotation": (CompressedTensors, "toy:llama", {"scheme": "QUEST_W4A16"}, "hadamard"),
    "other 4-bit floats": (CompressedTensors, "toy:llama", {"scheme": "FP4_E3M0"}, "use NVFP4 or MXFP4"),
    "dtype of scales": (
        lambda: CompressedTensors(dtype="bfloat16"), "toy:llama", {}, "use CompressedTensors with dtype float16"),
    "an embedding": (CompressedTensors, "toy:llama", {"embeddings": "W4A16_G32", "ignore": ()}, "no Embedding"),
    "transposed linears": (GPTQ, "toy:gpt2", {}, "no Conv1D"),
}  # fmt: skip


@pytest.mark.parametrize("make, path, arguments, says", REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_naming_layer_reason_and_remedy(make, path, arguments, says, tmp_path):
    student = small(stories260k() if path == "stories" else path, moved=False, **arguments)
    reason = make().refuses(student)
    assert reason is not None and says in reason
    with pytest.raises(ValueError):
        make().export(student, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_config_is_one_that_compressed_tensors_accepts_and_names_what_is_left(tmp_path):
    student = small("toy:llama", moved=False, overrides={"down": "W8A16"}, kv_cache="KV_FP8")
    config = stored_config(written(CompressedTensors(), student, tmp_path / "out"))
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.format == "pack-quantized" and parsed.ignore == ["lm_head"]
    assert {g.weights.num_bits: len(g.targets) for g in parsed.config_groups.values()} == {4: 12, 8: 2}
    assert parsed.kv_cache_scheme.type == "float" and parsed.kv_cache_scheme.strategy == "tensor"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["model.layers.1.self_attn.k_scale"].shape == (1,)
    assert "lm_head.weight" not in tensors  # it is tied


def test_static_and_nested_activation_scales_are_stored_as_engines_read_them(tmp_path):
    static = small("toy:llama", "W8A8_STATIC", moved=False)
    tensors = load_file(written(CompressedTensors(), static, tmp_path / "static") / "model.safetensors")
    stored = static.layers[f"{MLP}.up_proj"].activation_fake_quantizer
    assert torch.equal(tensors[f"{MLP}.up_proj.input_scale"], stored.scale.detach().reshape(1))
    zero_point = tensors[f"{MLP}.up_proj.input_zero_point"]
    assert zero_point.dtype == torch.int8 and int(zero_point) + 128 == round(stored.zero_point.item())
    nested = small("toy:llama", "NVFP4", moved=False)
    tensors = load_file(written(CompressedTensors(), nested, tmp_path / "nested") / "model.safetensors")
    stored = nested.layers[f"{MLP}.up_proj"].activation_fake_quantizer
    assert torch.equal(tensors[f"{MLP}.up_proj.input_global_scale"], stored.global_scale)


def test_gptq_names_exceptions_under_their_own_and_the_fused_names(tmp_path):
    student = small("toy:llama", overrides={"gate": "W8A16", "up": "W8A16"}, ignore=("lm_head", "*.o_proj"))
    folder = written(GPTQ(), student, tmp_path / "out")
    config = stored_config(folder)
    assert config == json.loads((folder / "quantize_config.json").read_text())
    names = [rule.replace("\\", "") for rule in config["dynamic"]]
    assert "-:^model.layers.0.self_attn.o_proj$" in names and "+:^model.layers.1.mlp.gate_up_proj$" in names
    assert (config["bits"], config["group_size"], config["sym"], config["lm_head"]) == (4, 32, True, False)


IMPORTED = {
    "compressed-tensors": (CompressedTensors, {}),
    "compressed-tensors, asymmetric": (CompressedTensors, {"scheme": "W4A16_ASYM_G32"}),
    "compressed-tensors, mixed": (
        CompressedTensors,
        {"overrides": {"down": "W8A8", "o": "NVFP4_A16", "v": "MXFP4_A16"}},
    ),
    "GPTQ": (GPTQ, {"scheme": "GPTQ_4BIT_G32", "overrides": {"down": "W8A16"}}),
    "GPTQ version 2": (lambda: GPTQ(format="gptq_v2"), {"scheme": "W4A16_ASYM_G32"}),
    "AWQ": (AWQ, {"scheme": "AWQ_4BIT_G32"}),
}


@pytest.mark.parametrize("make, arguments", IMPORTED.values(), ids=IMPORTED.keys())
def test_an_imported_checkpoint_exports_again_with_the_same_bits(make, arguments, tmp_path):
    first = written(make(), small("toy:llama", **arguments), tmp_path / "first")
    source = ModelSource(str(first))
    student = prepare_student(source, FromCheckpoint(str(first)), LSQ, StoredScales())
    again = written(make(), student, tmp_path / "again")
    before, after = load_file(first / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys() and stored_config(first) == stored_config(again)
    assert all(torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)) for key in before)


def test_a_checkpoint_of_stories260k_is_imported_and_trains(reader_here, tmp_path):
    first = written(GPTQ(), small(stories260k(), "W8A16"), tmp_path / "first")
    student = prepare_student(ModelSource(str(first)), FromCheckpoint(str(first)), LSQ, StoredScales())
    exported = written(GPTQ(), student, tmp_path / "again")
    assert (exported / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    ids = torch.randint(3, 256, (2, 16))
    optimizer = torch.optim.SGD(student.model.parameters(), lr=0.05)
    losses = []
    for _ in range(3):
        loss = student.model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    parity = verify_export(student, GPTQ(), written(GPTQ(), student, tmp_path / "trained"))
    assert parity.verified, parity.why


def test_a_reordered_checkpoint_is_refused_naming_the_layer(tmp_path):
    folder = written(GPTQ(), small("toy:llama", moved=False), tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{MLP}.up_proj.g_idx"] = tensors[f"{MLP}.up_proj.g_idx"].flip(0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{MLP}.up_proj: its inputs are reordered \(desc_act\)"):
        ModelSource(str(folder)).load_model()


def test_another_models_checkpoint_gives_no_plan(tmp_path):
    folder = written(GPTQ(), small("toy:llama", moved=False), tmp_path / "out")
    split = SplitModel(toy_model("gpt2").eval())
    with pytest.raises(ValueError, match="is this another model's checkpoint"):
        prepare_student(ModelSource("toy:gpt2"), FromCheckpoint(str(folder)), LSQ, StoredScales(), split=split)
