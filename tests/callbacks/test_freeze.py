"""What is frozen stays at its quantized values, bit for bit, is in no optimizer, and goes on as it came."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from kdqat.allocate import Uniform
from kdqat.callbacks import Freeze, LoraAdapters
from kdqat.data import PackedText
from kdqat.initializers import RTN
from kdqat.models import ModelSource, SharedTeacher
from kdqat.quant import LSQ, SEQ, AIMETRange, FakeQuantizer, Fixed, LearnedClipping, MinMax, MSEClip, QuEST
from kdqat.spec import LayerScheme, preset
from kdqat.student import Student, load_student, save_student
from kdqat.training.gather import gather_student
from kdqat.training.planner import plan_memory
from tests.callbacks.runs import fit as run_with
from tests.callbacks.runs import resumed_ends_the_same
from tests.training.toy import batch, make_module, train

BATCHES = [batch(2, seed=n) for n in range(3)]
LOOSE: dict[str, Any] = {
    "SEQ": {"format": "int2", "granularity": "channel", "zero_point": "half"},
    "LSQ": {"format": "int4", "granularity": "group", "group_size": 32, "symmetric": False, "zero_point": "minimum"},
}


def weight_of(name: str) -> LayerScheme:
    """A preset without its activations."""
    return LayerScheme(weight=preset(name).weight)


def new_student(quantizer: Any = LSQ, scheme: Any = "W4A16_G32", model: str = "toy:llama", **plan: Any) -> Student:
    return make_module(
        student=ModelSource(model), quantizer=quantizer, plan=Uniform(scheme, **plan), initializer=RTN()
    ).build()


def values(student: Student) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {name: layer.fake_quantized_weight(torch.float32).clone() for name, layer in student.layers.items()}


def fit(student: Student, *callbacks: Any, **trainer: Any) -> Any:
    module = make_module(student=student.source)
    module.adopt(student)
    train(module, BATCHES, callbacks=list(callbacks), **trainer)
    return module


@pytest.mark.parametrize(
    ("quantizer", "scheme"),
    [
        (LSQ, "W4A16"), (LSQ, "W3A16_ASYM_G32"), (LSQ, {"weight": LOOSE["LSQ"]}), (MinMax, "W4A16_G32"),
        (MSEClip, "W4A16_G32"), (LearnedClipping, "W4A16_G32"), (AIMETRange, "W4A16"),
        (SEQ, {"weight": LOOSE["SEQ"]}), (QuEST, "QUEST_W4A16"), (LSQ, weight_of("MXFP4")),
        (MinMax, weight_of("NVFP4")),
    ],
    ids=lambda v: getattr(v, "__name__", v if isinstance(v, str) else "mapping"),
)  # fmt: skip
def test_a_frozen_weight_is_its_quantized_value_and_quantizes_to_itself(quantizer: Any, scheme: Any) -> None:
    student = new_student(quantizer, scheme)
    before = values(student)
    Freeze(roles=["o", "v"]).edit(student)
    for name, layer in student.layers.items():
        frozen = name.endswith(("o_proj", "v_proj"))
        assert torch.equal(layer.weight, before[name]) == frozen
        assert torch.equal(values(student)[name], before[name])
        assert isinstance(layer.weight_fake_quantizer, Fixed) == frozen
        assert layer.weight.requires_grad == (not frozen)


def test_training_moves_everything_but_what_is_frozen_and_gives_it_no_optimizer_state() -> None:
    student = new_student()
    at_first = {name: p.detach().clone() for name, p in student.split.named_parameters()}
    freeze = Freeze(roles=["o", "v"])
    module = make_module(student=student.source)
    module.adopt(student)
    trainer = train(module, BATCHES, callbacks=[freeze])
    frozen = values(student)
    for name, parameter in student.split.named_parameters():
        assert parameter.requires_grad == (not name.endswith(("o_proj.weight", "v_proj.weight"))), name
        assert not torch.equal(parameter, at_first[name]), name  # the frozen ones were rounded
        assert (parameter in trainer.optimizers[0].state) == parameter.requires_grad, name
    student = gather_student(trainer, module)
    assert all(p.requires_grad for p in student.split.parameters())
    assert all(torch.equal(values(student)[name], frozen[name]) for name in frozen)
    assert not any("o_proj.weight_fake_quantizer.scale" in name for name, _ in student.split.named_parameters())


def test_a_layer_with_an_adapter_is_not_frozen_and_its_neighbours_are() -> None:
    student = new_student()
    LoraAdapters(roles=["q", "o"]).edit(student)
    before = {name: p.detach().clone() for name, p in student.split.named_parameters()}
    with pytest.raises(ValueError, match="o_proj: its adapter would train what is frozen"):
        Freeze(roles=["v", "o"]).edit(student)
    assert all(torch.equal(p, before[name]) for name, p in student.split.named_parameters())
    module = make_module(student=student.source)
    module.adopt(student)
    adapters, freeze = LoraAdapters(roles=["q", "o"]), Freeze(roles=["v"])
    trainer = train(module, BATCHES, callbacks=[freeze, adapters])
    frozen = {name: layer for name, layer in student.layers.items() if name.endswith("v_proj")}
    held = {name: layer.weight.clone() for name, layer in frozen.items()}
    student = gather_student(trainer, module)
    assert not student.adapters and all(torch.equal(layer.weight, held[name]) for name, layer in frozen.items())
    assert not any(
        torch.equal(layer.weight, before[f"model.{name}.weight"])
        for name, layer in student.layers.items()
        if name.endswith(("q_proj", "o_proj"))
    )  # merged


def test_a_second_fit_freezes_the_same_values_again_and_one_without_it_trains_them() -> None:
    student, freeze = new_student(), Freeze(roles=["o"])
    fit(student, freeze)
    freeze.finish(student)
    frozen = values(student)
    fit(student, freeze)
    freeze.finish(student)
    name = "model.layers.0.self_attn.o_proj"
    assert torch.equal(values(student)[name], frozen[name])
    latent = student.layers[name].weight.detach().clone()
    fit(student)
    assert not torch.equal(student.layers[name].weight, latent)


def test_scales_that_train_move_while_their_weights_rest() -> None:
    student = new_student()
    name = "model.layers.0.self_attn.o_proj"
    layer = student.layers[name]
    weight, scale = layer.weight.detach().clone(), layer.weight_fake_quantizer.scale.detach().clone()
    fit(student, Freeze(roles=["o"], scales="train"))
    assert isinstance(layer.weight_fake_quantizer, LSQ) and not layer.weight.requires_grad
    assert torch.equal(layer.weight, weight)
    assert not torch.equal(layer.weight_fake_quantizer.scale, scale)


@pytest.mark.parametrize("quantizer", [LSQ, MinMax])
def test_tied_weights_are_frozen_with_all_their_owners(quantizer: Any) -> None:
    student = new_student(quantizer, "W4A16_G32", ignore=[], embeddings="W4A16_G32")
    layers = student.layers
    assert layers["lm_head"].weight is layers["model.embed_tokens"].weight
    before = values(student)["lm_head"]
    Freeze(roles=["lm_head"]).edit(student)
    assert layers["lm_head"].weight_fake_quantizer is layers["model.embed_tokens"].weight_fake_quantizer
    assert isinstance(layers["lm_head"].weight_fake_quantizer, Fixed)
    assert torch.equal(layers["lm_head"].weight, before) and torch.equal(values(student)["model.embed_tokens"], before)
    assert not layers["model.embed_tokens"].weight.requires_grad


def test_each_weight_of_fused_experts_is_frozen_by_itself() -> None:
    student = new_student(model="toy:qwen3_moe")
    before = values(student)
    Freeze(roles=["down"]).edit(student)
    for name, layer in student.layers.items():
        assert torch.equal(layer.weight, before[name]) == name.endswith("down_proj"), name
        assert layer.weight.requires_grad == (not name.endswith("down_proj")), name


def test_a_bias_is_frozen_and_activation_quantizers_are_left_alone() -> None:
    scheme = {"weight": {"format": "int4"}, "activation": {"format": "int8", "granularity": "token", "dynamic": True}}
    student = new_student(scheme=scheme, model="toy:qwen2")
    layer = student.layers["model.layers.0.self_attn.v_proj"]
    activation = layer.activation_fake_quantizer
    Freeze(roles=["v"]).edit(student)
    assert layer.bias is not None and not layer.bias.requires_grad
    assert layer.activation_fake_quantizer is activation


def refused(student: Student, freeze: Freeze, match: str) -> None:
    state = {name: tensor.clone() for name, tensor in student.split.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        freeze.edit(student)
    after = student.split.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[name], after[name]) for name in state)
    assert all(p.requires_grad for p in student.split.parameters())


def test_what_cannot_be_frozen_is_named_and_changes_nothing() -> None:
    refused(new_student(), Freeze(roles=["oo"]), "Freeze: roles 'oo' matches no layer")
    refused(new_student(MinMax), Freeze(roles=["o"], scales="train"), "MinMax has no scale to train")
    student = new_student(model="toy:qwen3_moe", ignore=["lm_head", "down"])
    refused(student, Freeze(roles=["v", "down"]), "down_proj: its scheme leaves the weight in full precision")


def test_a_quantizer_whose_stored_scale_gives_other_values_is_refused() -> None:
    class Shifted(LSQ):
        def fake_quantize(self, groups: Any, qparams: Any) -> Any:
            return super().fake_quantize(groups, qparams) * 1.5

    refused(new_student(Shifted), Freeze(roles=["o"]), "give other values")


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="say what to freeze"):
        Freeze()
    with pytest.raises(ValueError, match="scales 'maybe' is unknown"):
        Freeze(roles=["o"], scales="maybe")  # type: ignore[arg-type]


def test_a_teacher_that_computes_with_the_students_weights_is_refused() -> None:
    module = make_module(teacher=SharedTeacher(), trainable="scales")
    with pytest.raises(ValueError, match="use a FrozenTeacher"):
        train(module, BATCHES, callbacks=[Freeze(roles=["o"])])


def test_the_teacher_stays_in_full_precision() -> None:
    module, pristine = make_module(), make_module().source.load_model().state_dict()
    train(module, BATCHES, callbacks=[Freeze(roles=["o"])])
    teacher = module.teacher.split.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(teacher[name], pristine[name]) for name in pristine)


class Nudge(Freeze):
    """Changes one element of a frozen weight in the last step, by one bit."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        weight = module.student.layers["model.layers.1.self_attn.o_proj"].weight
        with torch.no_grad():
            weight.view(-1)[7] = torch.nextafter(weight.view(-1)[7], torch.tensor(9.0))


def test_a_frozen_weight_that_moves_by_one_bit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"model\.layers\.1\.self_attn\.o_proj is frozen and changed during"):
        fit(new_student(), Nudge(roles=["o"]))


def test_a_resumed_run_verifies_against_the_first_start_and_ends_with_the_same_bits(tmp_path: Path) -> None:
    assert resumed_ends_the_same(lambda: Freeze(roles=["o"]), tmp_path)
    saved = tmp_path / "whole" / "checkpoints" / "step=00000003.ckpt"
    content = torch.load(saved, weights_only=True)
    (key,) = [key for key in content["callbacks"] if key.startswith("Freeze")]
    assert len(content["callbacks"][key]["sums"]) == 6  # weight, scale and zero point of two layers
    content["state_dict"]["split.model.model.layers.1.self_attn.o_proj.weight"][0, 0] += 1
    torch.save(content, tmp_path / "changed.ckpt")
    with pytest.raises(RuntimeError, match="o_proj is frozen and changed when the run was resumed"):
        run_with([Freeze(roles=["o"])], tmp_path / "changed", resume=tmp_path / "changed.ckpt")


def test_a_frozen_student_is_saved_and_loaded_with_its_values(tmp_path: Path) -> None:
    student = new_student()
    Freeze(roles=["o", "v"]).edit(student)
    tmp_path.joinpath("student").mkdir()
    save_student(student, tmp_path / "student")
    loaded = values(load_student(tmp_path / "student"))
    assert all(torch.equal(loaded[name], value) for name, value in values(student).items())


def test_bf16_latent_weights_are_frozen_at_the_same_values() -> None:
    student = new_student()
    student.split.model.to(torch.bfloat16)
    for module in student.split.modules():
        if isinstance(module, FakeQuantizer):
            module.float()
    before = values(student)
    Freeze(roles=["o"]).edit(student)
    assert all(torch.equal(value, before[name]) for name, value in values(student).items())


def test_the_planner_counts_gradients_and_state_of_what_trains_only() -> None:
    def plan(*callbacks: Any) -> Any:
        args = {"accelerator": "cpu", "max_steps": 3, "callbacks": list(callbacks)}
        return plan_memory(make_module(optimizer=partial(torch.optim.AdamW, lr=1e-3)), PackedText("kdqat:prose"), args)

    freeze = Freeze(roles=["o", "v"])
    everything, without = plan(), plan(freeze)
    frozen = 2 * (64 * 64 + 64 * 32) * (1 + 1 / 32)  # two blocks: o, v, and the scales of their groups of 32
    assert everything.counts["trainable"] - without.counts["trainable"] == frozen
    step, less = everything.moments["optimizer step"], without.moments["optimizer step"]
    assert step["gradients"] - less["gradients"] == 4 * frozen
    assert step["optimizer state"] - less["optimizer state"] == 8 * frozen
    assert not freeze._switched_off
    with pytest.raises(ValueError, match="matches no layer"):
        plan(Freeze(roles=["oo"]))


def test_the_log_says_how_much_is_frozen(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kdqat"):
        Freeze(roles=["o"]).edit(new_student())
    (line,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Freeze")]
    assert line.startswith("Freeze: 2 layers, 0.008192 M parameters, ") and line.endswith("at their quantized values")
