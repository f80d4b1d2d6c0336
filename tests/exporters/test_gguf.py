"""GGUF files are the student to the last bit, in llama.cpp's order of rows; what they cannot hold is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kdqat.exporters import GGUF, gguf
from kdqat.exporters.gguf_metadata import rope_factors
from kdqat.exporters.parity import verify_export
from kdqat.quant import LSQ
from kdqat.spec import LayerScheme, QuantSpec
from tests.exporters.gguf_students import EXACT, answer_of, differing, exported, logits_of, trained
from tests.models.stories import stories260k

KINDS = {"q4_0": "GGUF_Q4_0", "q4_1": "GGUF_Q4_1", "q8_0": "GGUF_Q8_0", "mxfp4": "MXFP4_A16"}
CASES = [("toy:llama", kind) for kind in KINDS] + [(f"toy:{name}", "q4_0") for name in ("mistral", "qwen2", "qwen3")]


def reader_of(folder) -> GGUFReader:
    (path,) = folder.glob("*.gguf")
    return GGUFReader(path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(student, its Q4_0 folder)."""
    student = trained("toy:llama", "GGUF_Q4_0")
    return student, exported(student, tmp_path_factory.mktemp("llama"), **EXACT)


@pytest.mark.parametrize(("path", "kind"), CASES)
def test_codes_scales_weights_and_logits_of_the_file_are_the_students(path, kind, tmp_path):
    student = trained(path, KINDS[kind])
    untrained = trained(path, KINDS[kind], num_steps=0)
    answer = answer_of(exported(student, tmp_path, type=kind, **EXACT))
    assert differing(student, answer) == {} and differing(untrained, answer)["codes"] > 100
    for name, layer in student.layers.items():
        assert torch.equal(answer[f"weights/{name}"], layer.fake_quantized_weight())
    assert torch.equal(answer["logits"], logits_of(student))


def test_stories260k_with_grouped_queries_heads_of_8_and_a_width_of_172(tmp_path):
    student = trained(stories260k(), "GGUF_Q4_0", ignore=("lm_head", "down"))
    folder = exported(student, tmp_path, **EXACT)
    answer = answer_of(folder)
    assert differing(student, answer) == {} and len(student.layers) == 30
    assert torch.equal(answer["logits"], logits_of(student))
    fields = {key: field.contents() for key, field in reader_of(folder).fields.items()}
    assert fields["llama.attention.head_count_kv"] == 4 and fields["llama.rope.dimension_count"] == 8
    assert fields["llama.context_length"] == 512 and fields["llama.feed_forward_length"] == 172


def test_every_block_type_may_lie_in_one_file_and_q4_k_only_where_256_divides_the_width(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 1, "vocab_size": 260}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    schemes = {"down": "GGUF_Q4_K", "v": "GGUF_Q8_0", "o": "GGUF_Q4_1"}
    student = trained("toy:llama", "GGUF_Q4_0", ignore=(), model=LlamaForCausalLM(config), overrides=schemes)
    folder = exported(student, tmp_path, type="mixed", **EXACT)
    answer = answer_of(folder)
    assert differing(student, answer) == {} and torch.equal(answer["logits"], logits_of(student))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader_of(folder).tensors}
    assert kinds["blk.0.ffn_down.weight"] == "Q4_K" and kinds["output.weight"] == "Q4_0"
    with pytest.raises(ValueError, match=r"256 inputs, which do not divide input width 64: use GGUF_Q4_1"):
        trained("toy:llama", "GGUF_Q4_K")


def test_an_embedding_that_is_planned_keeps_its_codes_and_is_stored_once(tmp_path):
    student = trained("toy:llama", "GGUF_Q4_0", ignore=(), embeddings="GGUF_Q8_0", overrides={"lm_head": "GGUF_Q8_0"})
    folder = exported(student, tmp_path, type="mixed", **EXACT)
    answer = answer_of(folder)
    assert differing(student, answer) == {} and torch.equal(answer["logits"], logits_of(student))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader_of(folder).tensors}
    assert kinds["token_embd.weight"] == "Q8_0" and "output.weight" not in kinds


@pytest.mark.parametrize(("embeddings", "error"), [("f16", 1e-3), ("q8_0", 2e-2)])
def test_embeddings_may_be_rounded_and_nothing_that_is_planned_is(embeddings, error, tmp_path):
    student = trained("toy:llama", "GGUF_Q4_0")
    answer = answer_of(exported(student, tmp_path, embeddings=embeddings))
    assert differing(student, answer) == {} and "codes/lm_head" not in answer
    difference = (answer["logits"] - logits_of(student)).abs().max()
    assert 0 < difference < error


def test_the_parity_gate_lets_it_pass_through_a_reader_without_kdqat(llama, tmp_path):
    student, _ = llama
    parity = verify_export(student, GGUF(), exported(student, tmp_path / "out"))
    assert parity.verified, parity.why
    assert parity.numbers["codes"] == {"compared": 73728, "changed": 0} and parity.numbers["logits"]["top1"] > 0.99


def test_queries_and_keys_in_the_wrong_order_show(llama, tmp_path, monkeypatch):
    student, _ = llama
    monkeypatch.setattr(gguf, "to_neighbours", lambda rows, heads: rows)
    answer = answer_of(exported(student, tmp_path, **EXACT))
    assert differing(student, answer)["codes"] > 100 and differing(student, answer)["scales"] > 100
    assert (answer["logits"] - logits_of(student)).abs().max() > 1e-3


@pytest.mark.parametrize("damage", ["one code", "nibbles", "one ulp of a scale"])
def test_a_damaged_file_shows(llama, damage, tmp_path):
    student, folder = llama
    (source,) = folder.glob("*.gguf")
    content = bytearray(source.read_bytes())
    tensor = next(tensor for tensor in GGUFReader(source).tensors if tensor.name == "blk.1.ffn_down.weight")
    start = tensor.data_offset
    if damage == "one code":
        content[start + 5] ^= 0x01
    elif damage == "nibbles":
        for i in range(start + 2, start + 18):
            content[i] = content[i] >> 4 | (content[i] & 0x0F) << 4
    else:
        content[start] ^= 0x01
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes() if path != source else content)
    answer = answer_of(tmp_path)
    found = differing(student, answer)
    assert found == {"scales": 1} if "scale" in damage else 1 <= found["codes"] <= 32 and "scales" not in found
    assert not torch.equal(answer["logits"], logits_of(student))


def test_llama3s_rope_goes_along_as_divisors_of_frequencies(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 260}
    config = LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=512, rope_parameters=rope)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 32, 2) / 32)
    assert torch.allclose(plain / rope_factors(config), scaled, rtol=1e-6) and rope_factors(config).max() == 8
    student = trained("toy:llama", "GGUF_Q4_0", model=LlamaForCausalLM(config))
    answer = answer_of(exported(student, tmp_path, **EXACT))
    assert torch.allclose(answer["logits"], logits_of(student), atol=1e-5)


REFUSED = [
    ("toy:gemma", "GGUF_Q4_0", "model type gemma"),
    ("toy:llama", "GGUF_Q4_1", "q_proj: its scheme is that of q4_1, not q4_0; use gguf:q4_1"),
    ("toy:llama", "W4A16_ASYM_G32", "q_proj: int4, asymmetric .integer., .* train under GGUF_Q4_1"),
    ("toy:llama", "W4A16_G64", "q_proj: int4, symmetric, group of 64, .* train under GGUF_Q4_0"),
    ("toy:llama", "W3A16", "q_proj: int3.*export DequantizedHF"),
]


@pytest.mark.parametrize(("path", "scheme", "reason"), REFUSED)
def test_what_it_cannot_hold_is_refused_by_name_with_the_nearest_that_fits(path, scheme, reason):
    student = trained(path, scheme, num_steps=0)
    assert re.search(reason, GGUF().refuses(student))


def test_biases_that_llama_cpp_does_not_add_are_refused_before_training():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 260, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    for bias in (False, True):
        config = AutoConfig.for_model("qwen3", **sizes, **heads, attention_bias=bias)
        student = trained("toy:llama", "GGUF_Q4_0", model=AutoModelForCausalLM.from_config(config), num_steps=0)
        reason = GGUF().refuses(student)
        assert "self_attn.q_proj.bias has no place" in reason if bias else reason is None


def test_float32_scales_and_foreign_words_are_refused():
    student = trained("toy:llama", "GGUF_Q4_0", num_steps=0)
    layer = student.layers["model.layers.1.mlp.up_proj"]
    spec = QuantSpec(format="int4", granularity="group", group_size=32)
    layer.replace_quantizers(weight=LSQ(LayerScheme(weight=spec).weight, layer.matrix_shape))
    assert "1.mlp.up_proj: int4" in GGUF().refuses(student) and "float32" in GGUF().refuses(student)
    with pytest.raises(ValueError, match="type 'q5_0' is unknown: use q4_0"):
        GGUF(type="q5_0")


def test_plan_config_and_tokenizer_lie_beside_the_file(llama):
    student, folder = llama
    assert AutoConfig.from_pretrained(folder).model_type == "llama"
    assert json.loads((folder / "quant_plan.json").read_text())["layers"].keys() == student.layers.keys()
    assert (folder / "tokenizer.json").is_file() and GGUF().name == "gguf_q4_0"
    assert GGUF().serving(student, "out")["llama.cpp"] == "llama-cli -m out/model-Q4_0.gguf"
