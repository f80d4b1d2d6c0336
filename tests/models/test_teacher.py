"""A frozen teacher: outside of the module, without a graph, in its own dtype, untouched by what befalls the student."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from kdqat.allocate import Uniform
from kdqat.losses import ForwardKL
from kdqat.models import FrozenTeacher, ModelSource, SplitModel
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.quant import LSQ, MinMax, apply_plan, fake_quant_layers
from kdqat.spec import QuantPlan, preset
from kdqat.training import KDQATModule
from kdqat.types import Batch

IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = Batch(IDS, IDS)
SOURCE = ModelSource("toy:llama")


def ready(dtype: str = "float32", path: str | None = None, *, pristine: bool = True, student: SplitModel | None = None):
    """A placed teacher of a toy student, and the student."""
    student = student or SplitModel(SOURCE.load_model())
    teacher = FrozenTeacher(path, dtype=dtype)
    teacher.prepare(SOURCE, student, toy_tokenizer(), pristine=pristine)
    teacher.place(torch.device("cpu"))
    return teacher, student


def test_building_one_loads_nothing_and_preparing_twice_loads_once():
    teacher = FrozenTeacher("no/such-model")
    assert teacher.split is None and not isinstance(teacher, nn.Module)
    teacher, student = ready()
    loaded = teacher.split
    teacher.prepare(SOURCE, student, toy_tokenizer(), pristine=False)
    assert teacher.split is loaded


@pytest.mark.parametrize("pristine", [True, False], ids=["copied", "loaded"])
def test_it_is_frozen_in_eval_and_shares_no_tensor_with_the_student(pristine):
    teacher, student = ready(pristine=pristine)
    parameters = list(teacher.split.parameters())
    assert not any(p.requires_grad for p in parameters) and not any(m.training for m in teacher.split.modules())
    assert not {p.data_ptr() for p in parameters} & {p.data_ptr() for p in student.parameters()}
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("pristine", [True, False], ids=["copied", "loaded"])
def test_a_teacher_of_a_rounded_student_has_weights_that_nobody_rounded(pristine):
    source = ModelSource("toy:llama", "bfloat16")
    teacher = FrozenTeacher(dtype="float32")
    teacher.prepare(source, SplitModel(source.load_model()), toy_tokenizer(), pristine=pristine)
    expected = dict(SOURCE.load_model().named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in teacher.split.model.named_parameters())


def test_its_outputs_have_no_graph_and_can_still_be_saved_for_backward():
    teacher, student = ready()
    outputs = teacher.outputs(BATCH)
    assert not outputs.hidden.requires_grad and not outputs.hidden.is_inference()
    ForwardKL()(student(BATCH), outputs, BATCH).sum.backward()
    assert all(p.grad is None for p in teacher.split.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_under_autocast_it_answers_in_its_own_dtype(dtype):
    teacher, _ = ready(dtype)
    expected = teacher.outputs(BATCH).hidden
    with torch.autocast("cpu", torch.bfloat16):
        hidden = teacher.outputs(BATCH).hidden
    assert hidden.dtype == getattr(torch, dtype) and torch.equal(hidden, expected)


@pytest.mark.parametrize("pristine", [True, False], ids=["copied", "loaded"])
def test_fake_quantizing_or_training_the_student_leaves_the_teacher_as_it_was(pristine):
    teacher, student = ready(pristine=pristine)
    expected = teacher.outputs(BATCH).hidden
    apply_plan(student.model, QuantPlan({"model.layers.0.mlp.up_proj": preset("W2A16")}), MinMax)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert not fake_quant_layers(teacher.split) and torch.equal(teacher.outputs(BATCH).hidden, expected)


def test_a_copy_in_bf16_is_what_a_load_in_bf16_gives(tmp_path):
    toy_model("llama").save_pretrained(tmp_path)
    student = SplitModel(ModelSource(str(tmp_path)).load_model())
    teacher, _ = ready("bfloat16", student=student)
    copied = teacher.split
    loaded = SplitModel(ModelSource(str(tmp_path), "bfloat16").load_model())
    assert copied.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(copied(BATCH).hidden, loaded(BATCH).hidden)


def test_a_student_that_is_swapped_already_gets_a_teacher_from_its_source():
    student = SplitModel(SOURCE.load_model())
    full = student(BATCH).hidden.detach()
    apply_plan(student.model, QuantPlan({"model.layers.0.mlp.up_proj": preset("W2A16")}), MinMax)
    teacher, _ = ready(student=student, pristine=False)
    assert torch.equal(teacher.outputs(BATCH).hidden, full)


def test_another_revision_of_the_students_source_is_not_the_students_source():
    teacher = FrozenTeacher(revision="v2")
    source = ModelSource("/no/such/folder", revision="v1")
    with pytest.raises(ValueError, match="/no/such/folder"):  # it is looked up, not copied from the student
        teacher.prepare(source, SplitModel(toy_model("llama")), toy_tokenizer(), pristine=True)


def test_in_the_lightning_module_it_is_no_parameter_no_state_and_not_switched_to_train():
    module = KDQATModule(
        SOURCE, Uniform("W4A16"), LSQ, ForwardKL(), partial(torch.optim.AdamW, lr=1e-4), teacher=FrozenTeacher()
    )
    module.build()
    module.train()
    assert not any(m.training for m in module.teacher.split.modules())
    theirs = {p.data_ptr() for p in module.teacher.split.parameters()}
    assert not theirs & {p.data_ptr() for p in module.parameters()}
    assert not theirs & {t.data_ptr() for t in module.state_dict().values()}
    assert not any("teacher" in key for key in module.state_dict())


class Other(ModelSource):
    """A source with a padded head, for the vocabulary guard."""

    def load_model(self):
        return toy_model("qwen2", vocab_size=272).eval()


def test_a_teacher_with_a_padded_head_is_cut_to_the_students_tokens(monkeypatch):
    monkeypatch.setattr("kdqat.models.teacher.ModelSource", Other)
    teacher, student = ready(path="toy:qwen2")
    assert teacher.split.vocab_size == student.vocab_size == 260
    assert ForwardKL()(student(BATCH), teacher.outputs(BATCH), BATCH).sum.isfinite()


def test_a_teacher_with_another_tokenizer_is_refused(monkeypatch):
    monkeypatch.setattr("kdqat.models.teacher.ModelSource", Other)
    tokenizer = copy.deepcopy(toy_tokenizer())
    tokenizer.add_tokens(["<mine>"])
    with pytest.raises(ValueError, match="vocabulary mismatch"):
        FrozenTeacher("toy:qwen2").prepare(SOURCE, SplitModel(SOURCE.load_model()), tokenizer, pristine=True)
