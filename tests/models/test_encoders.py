"""Models without a head: the body of a family alone, such as a sentence encoder."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.initializers import RTN
from kdqat.losses import ForwardKL
from kdqat.models import FrozenTeacher, ModelSource, SplitModel, block_prefix, blocks_of, cut_vocabulary, layer_refs
from kdqat.models.roles import FAMILIES
from kdqat.models.toy import toy_model, toy_tokenizer
from kdqat.quant import MinMax
from kdqat.student import load_student, prepare_student, save_student
from kdqat.types import Batch

IDS = torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = Batch(IDS, IDS)
NO_HEAD = "this encoder has no language-model head; judge it with EmbeddingAgreement"

every_family = pytest.mark.parametrize("kind", FAMILIES)


def whole_and_body(kind: str):
    """A toy, and the module of it that is everything but the head."""
    model = toy_model(kind).eval()
    return model, model.get_submodule(FAMILIES[kind].body)


@every_family
def test_the_body_alone_has_the_layers_blocks_and_roles_of_the_whole_model(kind):
    whole, body = whole_and_body(kind)
    prefix = FAMILIES[kind].body + "."
    inside = [replace(ref, name=ref.name.removeprefix(prefix)) for ref in layer_refs(whole) if ref.block is not None]
    assert layer_refs(body) == inside and len(inside) > 0
    assert blocks_of(body) == blocks_of(whole) and prefix + block_prefix(body) == block_prefix(whole)


@torch.no_grad()
@every_family
def test_the_body_alone_gives_the_hidden_states_of_the_whole_model(kind):
    whole, body = whole_and_body(kind)
    expected, outputs = SplitModel(whole)(BATCH), SplitModel(body)(BATCH)
    assert outputs.hidden.shape == (2, 12, 64) and torch.equal(outputs.hidden, expected.hidden)


def encoder() -> SplitModel:
    return SplitModel(toy_model("bert_encoder")).eval()


def test_an_encoder_has_one_layer_outside_its_blocks_and_that_is_the_pooler():
    outside = [ref for ref in layer_refs(toy_model("bert_encoder")) if ref.block is None]
    assert [(ref.name, ref.role) for ref in outside] == [("pooler.dense", "pooler")]


@pytest.mark.parametrize(
    "ask",
    [
        lambda split: split.head(torch.zeros(1, 64)),
        lambda split: split.num_logits,
        lambda split: ForwardKL()(split(BATCH), split(BATCH), BATCH),
    ],
    ids=["head", "num_logits", "a loss on logits"],
)
def test_what_needs_logits_is_told_that_there_is_no_head(ask):
    assert not encoder().has_head and SplitModel(toy_model("bert")).has_head
    with pytest.raises(ValueError, match=NO_HEAD):
        ask(encoder())


def tokenizers(same: bool = True):
    ours, theirs = toy_tokenizer(), toy_tokenizer()
    if not same:
        theirs.add_tokens(["<theirs>"])
    return ours, theirs


@pytest.mark.parametrize("headless", ["both", "student", "teacher"])
def test_without_a_head_no_vocabulary_is_cut_but_the_tokenizers_must_agree(headless):
    student = encoder() if headless != "teacher" else SplitModel(toy_model("bert", vocab_size=272))
    teacher = encoder() if headless != "student" else SplitModel(toy_model("bert", vocab_size=272))
    assert cut_vocabulary(student, teacher, tokenizers) is None
    assert student.vocab_size is None and teacher.vocab_size is None
    with pytest.raises(ValueError, match="the student has 259 tokens, the teacher 260, numbered differently"):
        cut_vocabulary(student, teacher, partial(tokenizers, same=False))


@pytest.mark.parametrize("path", [None, "toy:bert_encoder", "toy:bert"], ids=["own source", "same path", "with a head"])
@pytest.mark.parametrize("pristine", [True, False], ids=["copied", "loaded"])
def test_an_encoder_gets_a_frozen_teacher(path, pristine):
    teacher, student = FrozenTeacher(path, dtype="float32"), encoder()
    teacher.prepare(ModelSource("toy:bert_encoder"), student, toy_tokenizer(), pristine=pristine)
    teacher.place(torch.device("cpu"))
    outputs = teacher.outputs(BATCH)
    assert outputs.hidden.shape == (2, 12, 64) and not outputs.hidden.requires_grad
    assert torch.equal(outputs.hidden, student(BATCH).hidden) == (path != "toy:bert")


def test_a_teacher_with_another_tokenizer_is_refused_for_encoders_too():
    tokenizer = copy.deepcopy(toy_tokenizer())
    tokenizer.add_tokens(["<mine>"])
    with pytest.raises(ValueError, match="vocabulary mismatch"):
        FrozenTeacher("toy:bert").prepare(ModelSource("toy:bert_encoder"), encoder(), tokenizer, pristine=True)


def test_a_prepared_encoder_is_saved_and_read_as_the_same_encoder(tmp_path):
    student = prepare_student(ModelSource("toy:bert_encoder"), Uniform("W3A16_G32"), MinMax, RTN())
    assert len(student.plan) == 13 and student.coverage.share_full_precision == 0
    save_student(student, tmp_path)
    again = load_student(tmp_path)
    assert type(again.model).__name__ == "BertModel" and not again.split.has_head
    with torch.no_grad():
        assert torch.equal(again.split.eval()(BATCH).hidden, student.split.eval()(BATCH).hidden)


def test_the_pooler_can_be_left_in_full_precision_by_its_role():
    allocator = Uniform("W3A16_G32", ignore=["pooler"])
    assert prepare_student(ModelSource("toy:bert_encoder"), allocator, MinMax, RTN()).plan.ignored == ("pooler.dense",)
