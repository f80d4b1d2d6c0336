"""What lies beside planned weights is compared exactly in every format: norms, biases, embeddings, none left out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kdqat.allocate import Uniform
from kdqat.exporters import GGUF
from kdqat.exporters.parity import Parity, verify_export
from kdqat.exporters.parity_layers import compare_layers
from kdqat.exporters.words import exporter_of
from kdqat.initializers import RTN
from kdqat.models import ModelSource
from kdqat.quant import LSQ
from kdqat.student import plain_state, prepare_student
from tests.contracts.test_exporters import trained

NORM = "model.norm.weight"
FOLDERS = ["dequantized", "compressed-tensors", "gptq", "awq", "torchao"]


@pytest.fixture(scope="module")
def student():
    return trained("toy:llama")


def judged(student, word: str, folder: Path, change) -> Parity:
    """What the gate says of an export that `change` was done to."""
    exporter = exporter_of(word)
    if missing := exporter.reader_missing():
        pytest.skip(missing)
    exporter.export(student, folder)
    change(folder)
    return verify_export(student, exporter, folder)


def tensors(change):
    """A change of the tensors in model.safetensors."""

    def changed(folder: Path) -> None:
        path = folder / "model.safetensors"
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata()
        found = load_file(path)
        change(found)
        save_file(found, path, metadata)

    return changed


CHANGES = {
    "a norm scaled by a hundredth": (lambda t: t[NORM].mul_(1.01), "model.norm: 64 of 64 weights differ"),
    "a norm that is missing": (lambda t: t.pop(NORM), NORM),
    "a tensor too many": (lambda t: t.update({"model.norm.bias": torch.zeros(64)}), "model.norm.bias"),
}


@pytest.mark.parametrize("change, says", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("word", FOLDERS)
def test_a_folder_with_other_plain_tensors_is_rejected(student, reader_here, tmp_path, word, change, says):
    parity = judged(student, word, tmp_path, tensors(change))
    assert parity.rejected and says in parity.why


@pytest.mark.parametrize("word", ["compressed-tensors", "gptq", "torchao"])
def test_a_pooler_whose_output_is_not_compared_is_compared_by_its_weight(reader_here, tmp_path, word):
    student = prepare_student(ModelSource("toy:bert_encoder"), Uniform("W4A16_G32", ignore=("pooler*",)), LSQ, RTN())
    parity = judged(student, word, tmp_path, tensors(lambda t: t["pooler.dense.weight"].mul_(5)))
    assert parity.rejected and parity.why.startswith("pooler.dense: ")


def in_gguf(name: str, change):
    def changed(folder: Path) -> None:
        from gguf import GGUFReader

        (path,) = folder.glob("*.gguf")
        (tensor,) = [tensor for tensor in GGUFReader(path, "r+").tensors if tensor.name == name]
        change(tensor.data)

    return changed


def grow(data) -> None:
    data[...] = data * data.dtype.type(1.01)


@pytest.mark.parametrize(
    "name, module", [("output_norm.weight", "model.norm"), ("blk.1.attn_norm.weight", "model.layers.1.input_layernorm"),
                     ("token_embd.weight", "model.embed_tokens")],
)  # fmt: skip
def test_a_gguf_file_with_other_plain_tensors_is_rejected(student, reader_here, tmp_path, name, module):
    parity = judged(student, "gguf:q4_0", tmp_path, in_gguf(name, grow))
    assert parity.rejected and f"{module}: " in parity.why and "weights differ" in parity.why


@pytest.mark.parametrize("embeddings, ignored", [("q8_0", "f16"), ("f32", "f32")])
def test_gguf_files_with_embeddings_of_any_type_are_verified(student, reader_here, tmp_path, embeddings, ignored):
    exporter = GGUF(embeddings=embeddings, ignored=ignored)
    exporter.export(student, tmp_path)
    parity = verify_export(student, exporter, tmp_path)
    assert parity.verified, parity.why


@pytest.mark.parametrize("key, value", [
    ("llama.rope.freq_base", 11000.0), ("llama.rope.dimension_count", 8), ("llama.context_length", 64),
    ("llama.attention.layer_norm_rms_epsilon", 1e-4), ("llama.attention.head_count_kv", 4),
    ("tokenizer.ggml.eos_token_id", 77), ("tokenizer.ggml.bos_token_id", 77),
])  # fmt: skip
def test_a_gguf_file_whose_metadata_are_not_those_of_the_config_is_rejected(student, reader_here, tmp_path, key, value):
    def changed(folder: Path) -> None:
        from gguf import GGUFReader

        (path,) = folder.glob("*.gguf")
        field = GGUFReader(path, "r+").fields[key]
        field.parts[field.data[0]][0] = value

    parity = judged(student, "gguf:q4_0", tmp_path, changed)
    assert parity.rejected and f"{key.removeprefix('tokenizer.ggml.')} is {value:g}"[:20] in parity.why


def test_what_no_reader_answered_and_what_the_student_has_not_are_faults(student, tmp_path):
    answer = {key: value.detach().clone() for key, value in plain_state(student).items() if key != "lm_head.weight"}
    answer |= {f"{name}.weight": layer.dequantized_weight().detach() for name, layer in student.layers.items()}

    def faults() -> list[str]:
        save_file({f"weights/{key.removesuffix('.weight')}": t for key, t in answer.items()}, tmp_path / "answer")
        return compare_layers(student, tmp_path / "answer", "float32").faults

    assert faults() == []  # lm_head is tied
    answer["bogus"] = answer.pop(NORM)
    assert faults() == ["model.norm: the reader answered without this tensor", "bogus: the student has no such tensor"]
