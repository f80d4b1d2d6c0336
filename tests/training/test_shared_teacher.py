"""The student is its own teacher as long as its latent weights rest; `trainable: scales` lets them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.data import PackedText
from kdqat.evaluators import TeacherAgreement
from kdqat.initializers import FPQ
from kdqat.losses import ForwardKL
from kdqat.models import FrozenTeacher, SharedTeacher, blocks_of
from kdqat.quant import FakeQuantizer, LearnedClipping, MinMax, QuEST
from kdqat.training import KDQATModule, Parallel
from kdqat.types import Batch
from tests.training.toy import batch, make_module, train

BATCHES = [batch(2, seed=seed) for seed in range(3)]
W4A4KV4: dict[str, Any] = {
    "scheme": {
        "weight": {"format": "int4", "granularity": "group", "group_size": 32},
        "activation": {"format": "int4", "granularity": "token", "dynamic": True},
    },
    "kv_cache": "KV4",
}


def shared(**changes: Any) -> KDQATModule:
    """Scales of toy:llama under its own full precision, at a rate that moves them."""
    arguments = {"teacher": SharedTeacher(), "trainable": "scales", "scale_lr_ratio": 10.0}
    return make_module(**{**arguments, **changes})


def loss_of(module: KDQATModule, data: Batch = BATCHES[0]) -> torch.Tensor:
    module.build()
    assert module.split is not None and module.teacher is not None
    return ForwardKL()(module.split(data), module.teacher.outputs(data), data).sum


@pytest.mark.parametrize(
    "plan",
    [Uniform("W4A16_G32"), Uniform("W4A16_G32", ignore=[], embeddings="W4A16_G32"), Uniform(**W4A4KV4),
     Uniform(**W4A4KV4, deploy_only=["activation", "kv_cache"])],
    ids=["weights", "head and embeddings", "activations and cache", "deploy only"],
)  # fmt: skip
def test_its_loss_is_that_of_a_second_model_in_float32(plan: Uniform) -> None:
    for mode in (True, False):
        modules = [shared(plan=plan), make_module(plan=plan, teacher=FrozenTeacher(dtype="float32"))]
        losses = []
        for module in modules:
            module.build().split.train(mode)
            losses.append(loss_of(module))
        assert losses[0] > 1e-4 and torch.equal(*losses)


def test_it_still_is_after_its_scales_were_trained() -> None:
    module, data = shared(), batch(2, seed=9)
    student = module.build()
    reference = FrozenTeacher(dtype="float32")
    reference.prepare(module.source, student.split, student.tokenizer, pristine=False)
    before = loss_of(module, data).item()
    train(module, BATCHES)
    assert module.teacher is not None and loss_of(module, data).item() != before
    answers = [t.outputs(data) for t in (module.teacher, reference)]
    assert torch.equal(*[a.head(a.hidden) for a in answers])  # type: ignore[union-attr]


def test_asking_it_leaves_modes_flags_and_the_students_graph_alone() -> None:
    module = shared()
    split = module.build().split.train()
    split.model.model.norm.eval()
    modes = [m.training for m in split.modules()]
    expected = split(BATCHES[0]).hidden
    answer = module.teacher.outputs(BATCHES[0])  # type: ignore[union-attr]
    assert not answer.head(answer.hidden).requires_grad  # type: ignore[union-attr]
    assert [m.training for m in split.modules()] == modes
    again = split(BATCHES[0]).hidden
    assert torch.equal(again, expected) and again.requires_grad and not torch.equal(again, answer.hidden)  # type: ignore[union-attr]


def test_dropout_is_off_for_the_teacher_and_on_for_the_student() -> None:
    module = shared()
    split = module.build().split.train()
    for layer in split.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ours = [split(BATCHES[0]).hidden for _ in range(2)]
    theirs = [module.teacher.outputs(BATCHES[0]).hidden for _ in range(2)]  # type: ignore[union-attr]
    assert torch.equal(*theirs) and not torch.equal(*ours)


def test_it_follows_the_trainers_autocast() -> None:
    module = shared()
    module.build()
    with torch.autocast("cpu", torch.bfloat16):
        answer = module.teacher.outputs(BATCHES[0])  # type: ignore[union-attr]
        with torch.autocast("cpu", enabled=False):  # as a loss calls a teacher's head
            assert answer.head(answer.hidden).dtype == torch.bfloat16  # type: ignore[union-attr]
        assert answer.head(answer.hidden).dtype == torch.bfloat16  # type: ignore[union-attr]


@pytest.mark.parametrize("parallel", [Parallel(checkpoint_blocks=True), Parallel()], ids=["checkpointed", "plain"])
def test_training_with_it_is_training_with_a_second_model(parallel: Parallel) -> None:
    ends = []
    for teacher in (SharedTeacher(), FrozenTeacher(dtype="float32")):
        module = shared(teacher=teacher, parallel=parallel)
        train(module, BATCHES, accumulate_grad_batches=1)
        ends.append(dict(module.split.named_parameters()))  # type: ignore[union-attr]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_compiled_blocks_have_one_variant_more_for_the_teacher_and_no_step_adds_any() -> None:
    torch._dynamo.reset()
    module, counter = shared(), CompileCounter()
    split = module.build().split.train()
    for block in blocks_of(split.model):
        block.compile(backend=counter)
    frames = []
    for data in BATCHES:
        loss_of(module, data).backward()
        frames.append(counter.frame_count)
    torch._dynamo.reset()
    assert frames == [3, 3, 3]  # the student's first block, whose input has no gradient, the others, and the teacher's


def test_only_scales_are_trained_and_the_weights_go_on_as_they_came() -> None:
    module = shared()
    split = module.build().split
    own = {id(p) for m in split.modules() if isinstance(m, FakeQuantizer) for p in m.parameters()}
    before = {name: p.detach().clone() for name, p in split.named_parameters()}
    trainer = train(module, BATCHES)
    for name, parameter in split.named_parameters():
        assert torch.equal(before[name], parameter) != (id(parameter) in own), name
    assert [group["name"] for group in trainer.optimizers[0].param_groups] == ["scales"]
    assert all(p.requires_grad for p in split.parameters())
    train(module, BATCHES)  # once more: they are frozen again
    assert all(torch.equal(before[n], p) for n, p in split.named_parameters() if id(p) not in own)


@pytest.mark.parametrize("quantizer", [MinMax, QuEST], ids=lambda cls: cls.__name__)
def test_a_quantizer_without_parameters_leaves_nothing_to_train(quantizer: Any) -> None:
    plan = Uniform("QUEST_W4A16") if quantizer is QuEST else Uniform("W4A16_G32")
    module = shared(quantizer=quantizer, plan=plan, initializer=None)
    with pytest.raises(ValueError, match=r"trainable: scales leaves nothing to train.*use LSQ.*or trainable: all"):
        module.build()
    assert all(p.requires_grad for p in module.split.parameters())  # type: ignore[union-attr]


def test_learned_clipping_trains_its_shares() -> None:
    train(shared(quantizer=LearnedClipping, initializer=None), BATCHES[:1])


def test_a_teacher_of_weights_that_will_move_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"SharedTeacher computes with the student's own weights.*trainable: scales"):
        train(shared(trainable="all"), BATCHES[:1])
    with pytest.raises(ValueError, match=r"FPQ rewrites them before the first step.*FrozenTeacher"):
        shared(initializer=FPQ(mode="range_checked"))
    shared(initializer=FPQ())


def test_the_python_functions_take_it_and_evaluate_with_it() -> None:
    student = api.quantize("toy:llama", "W4A16_G32")
    data = PackedText("kdqat:prose", seq_len=32, batch_size=2, val_rows=2)
    arguments: dict[str, Any] = {"optimizer": partial(torch.optim.AdamW, lr=1e-2), "enable_progress_bar": False}
    api.fit(student, data=data, teacher=SharedTeacher(), trainable="scales", steps=2, accelerator="cpu", **arguments)
    text = TeacherAgreement("kdqat:prose", seq_len=32, limit=2)
    assert api.evaluate(student, [text], SharedTeacher()) == api.evaluate(student, [text])


def test_a_resumed_run_ends_with_the_same_scales(tmp_path: Path) -> None:
    def run(name: str, steps: int, resume: Path | None = None) -> dict[str, torch.Tensor]:
        module, data = shared(), PackedText("kdqat:prose", seq_len=32, batch_size=2, val_rows=0)
        args = {"accelerator": "cpu", "enable_progress_bar": False, "max_steps": steps, "devices": 1}
        api.bind_data(data, module.build())
        api.make_trainer(args, tmp_path / name).fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
        return dict(module.split.named_parameters())  # type: ignore[union-attr]

    whole, _ = run("whole", 3), run("cut", 2)
    resumed = run("cut", 3, tmp_path / "cut" / "checkpoints" / "step=00000002.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
