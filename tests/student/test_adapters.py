"""Which layers take an adapter, what is refused, and what adapters weigh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kdqat.allocate import Uniform
from kdqat.callbacks import LoraAdapters
from kdqat.initializers import RTN
from kdqat.models.source import ModelSource
from kdqat.quant import LoraAdapter
from kdqat.student import Student, stored_bytes
from kdqat.training.planner.student import count, meta_student
from tests.training.toy import make_module


def prepared(path: str = "toy:llama", **plan: Any) -> Student:
    return make_module(student=ModelSource(path), plan=Uniform("W4A16_G32", **plan), initializer=RTN()).build()


def test_what_can_have_no_adapter_is_an_error_where_it_was_asked_for_and_said_where_not(caplog: Any) -> None:
    tied = prepared(ignore=[], embeddings="W4A16_G32")
    experts = prepared("toy:qwen3_moe")
    cases = [
        (tied, {"roles": ["lm_head"]}, r"lm_head: its weight is tied to model.embed_tokens.*leave it out"),
        (tied, {"roles": ["embedding"]}, "embed_tokens: adapters are for linear layers, this is of FakeQuantEmbedding"),
        (
            experts,
            {"roles": ["q", "down"]},
            "experts.down_proj: adapters are for linear layers, this is of ExpertWeight",
        ),
        (experts, {"layers": ["*.experts.*"]}, "this is of ExpertWeight"),
        (tied, {"roles": ["w"]}, "LoraAdapters: roles 'w' matches no layer"),
        (tied, {"rank": 65}, "layer model.layers.0.self_attn.q_proj: rank 65 does not fit"),
    ]
    for student, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            LoraAdapters(**{"rank": 4, **arguments}).edit(student)
        assert not student.adapters and all(p.requires_grad for p in student.model.parameters())
    LoraAdapters(rank=4).edit(experts)
    assert len(experts.adapters) == 8 and "LoraAdapters: 4 layers get no adapter" in caplog.text
    LoraAdapters(rank=4).edit(tied)
    assert len(tied.adapters) == 14


def test_an_edited_student_is_left_alone_and_another_adapter_refused() -> None:
    student = prepared()
    edit = LoraAdapters(rank=4, roles=["q"])
    edit.edit(student)
    first = dict(student.adapters)
    edit.edit(student)
    LoraAdapters(rank=2, roles=["v"]).edit(student)
    assert first.items() < student.adapters.items() and len(student.adapters) == 4
    for other in (LoraAdapters(rank=2, roles=["q"]), LoraAdapters(rank=4, placement="outside", roles=["k"])):
        with pytest.raises(ValueError, match=r"has an adapter already|all inside or all outside"):
            other.edit(student)
    assert len(student.adapters) == 4


def test_on_the_meta_device_it_makes_shapes() -> None:
    module = make_module()
    student = module.build()
    split = meta_student(module)
    LoraAdapters(rank=4, train_scales=False).edit(replace(student, split=split))
    assert {p.device.type for p in split.parameters()} == {"meta"}
    assert count(split).trainable == sum(4 * sum(layer.matrix_shape) for layer in student.layers.values())


def test_an_adapter_outside_is_part_of_the_size() -> None:
    student = prepared()
    before = stored_bytes(student)
    LoraAdapters(rank=4, placement="outside").edit(student)
    numbers = sum(p.numel() for m in student.model.modules() if isinstance(m, LoraAdapter) for p in m.parameters())
    assert stored_bytes(student) == {"student": before["student"] + 2 * numbers, "teacher": before["teacher"]}


def test_the_refs_of_a_student_are_its_planned_layers_embeddings_last() -> None:
    student = prepared(ignore=["q"], embeddings="W4A16_G32")
    refs = student.refs
    assert {ref.name for ref in refs} == set(student.layers) and refs[-1].role == "embedding"
    assert not any(ref.role == "q" for ref in refs)
