"""Bits in the middle of a run: what changes with them, what does not, and what is refused."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from kdqat import api
from kdqat.allocate import Uniform
from kdqat.callbacks import BitSchedule, Freeze, FreezeWindow, LoraAdapters
from kdqat.callbacks.bit_change import change_bits, current_bits
from kdqat.initializers import RTN
from kdqat.models import blocks_of
from kdqat.quant import LSQ, SEQ, Fixed, LearnedClipping, MinMax
from kdqat.spec import Scores
from kdqat.student import load_student, save_student
from kdqat.training import Checkpoints
from tests.callbacks.runs import SAME, fit, resumed_ends_the_same, same, state
from tests.training.toy import Loader, make_module

DOWN = {"milestones": {0: 8, 2: 6, 4: None}}
TOP = {8: 127, 6: 31, 5: 15, 4: 7, 3: 3, 2: 1}


class Looks(L.Callback):
    """Notes the highest code of every layer, and how often each scale's moments were moved, in every forward pass."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.tops: list[dict[str, float]] = []
        self.counted: list[dict[str, int]] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        quantizers = {name: layer.weight_fake_quantizer for name, layer in module.student.layers.items()}
        self.tops.append({name: quantizer.qmax.item() for name, quantizer in quantizers.items()})
        states = optimizer.state
        self.counted.append({
            name: int(states[p]["step"]) if states.get(p) else 0 for name, p in module.split.named_parameters()
        })  # fmt: skip


def looks(*callbacks: Any, steps: int = 6, **changes: Any) -> Looks:
    seen = Looks()
    fit([*callbacks, seen], steps=steps, module=make_module(**changes))
    return seen


def test_every_layer_has_the_bits_of_the_step() -> None:
    assert [set(tops.values()) for tops in looks(BitSchedule(**DOWN)).tops] == [{127}, {127}, {31}, {31}, {7}, {7}]


def test_with_gradient_accumulation_bits_change_between_optimizer_steps() -> None:
    seen = Looks()
    fit([BitSchedule(**DOWN), seen], accumulate_grad_batches=3)
    assert [set(tops.values()) for tops in seen.tops] == [{127}, {127}, {31}, {31}, {7}, {7}]


def test_the_others_keep_their_plans_bits() -> None:
    tops = looks(BitSchedule(roles=["down"], blocks=[-1], milestones={1: 8, 2: None}), steps=3).tops
    assert tops[0] == tops[2] and set(tops[0].values()) == {7}
    assert {name for name, top in tops[1].items() if top == 127} == {"model.layers.1.mlp.down_proj"}


def test_the_least_important_layers_come_down_first(tmp_path: Path) -> None:
    layers = make_module().build().layers
    members = {f"model.layers.{i}": tuple(n for n in layers if f".layers.{i}." in n) for i in range(2)}
    Scores("LIM", "block", {"model.layers.0": 1.0, "model.layers.1": 2.0}, members).save(tmp_path / "scores.json")
    schedule = BitSchedule(scores=str(tmp_path), first_bits=6, start=1, stop=3)
    for step, tops in enumerate(looks(schedule, steps=4).tops):
        for name, top in tops.items():
            assert top == (31 if step < (1 if ".layers.0." in name else 3) else 7), (step, name)


def test_only_the_moments_of_changed_scales_begin_anew() -> None:
    counted = looks(BitSchedule(roles=["q"], milestones={2: 8, 3: None})).counted
    for step, counts in enumerate(counted):  # before the update of this step
        for name, count in counts.items():
            anew = "q_proj.weight_fake_quantizer" in name and step >= 2
            assert count == (max(0, step - 3) if anew else step), (name, step)


@pytest.mark.parametrize(("bits", "clips"), [(8, False), (2, True)])
def test_scales_are_those_with_the_least_error_for_the_weights_of_now(bits: int, clips: bool) -> None:
    student = make_module().build()
    name, layer = next(iter(student.layers.items()))
    quantizer = layer.weight_fake_quantizer
    with torch.no_grad():
        layer.weight.mul_(3)  # the weights have moved since scales were set
    change_bits(student.split, student.layers, {name: bits})
    groups = quantizer.groups(layer.weight.detach())
    full = groups.abs().amax(-1, keepdim=True) / TOP[bits]
    assert torch.allclose(quantizer.scale, full.clamp(min=1e-7), rtol=0.15) is not clips

    def error(scale: torch.Tensor) -> float:
        quantizer.scale.data.copy_(scale)
        return (quantizer(layer.weight) - layer.weight).square().sum().item()

    best = quantizer.scale.detach().clone()
    assert error(best) <= min(error(full), error(best * 0.9), error(best * 1.1))
    assert current_bits({name: quantizer}) == {name: bits}


@pytest.mark.parametrize("scheme", ["W4A16_G32", "W4A16_ASYM_G32", "W2A16_HALF", "W4A16"])
def test_the_width_is_read_off_the_code_range(scheme: str) -> None:
    student = make_module(plan=Uniform(scheme)).build()
    quantizers = {name: layer.weight_fake_quantizer for name, layer in student.layers.items()}
    for bits in (2, 3, 4, 8):
        change_bits(student.split, student.layers, dict.fromkeys(student.layers, bits))
        assert set(current_bits(quantizers).values()) == {bits}


@pytest.mark.parametrize("quantizer", [MinMax, LearnedClipping, LSQ, Fixed, partial(LSQ, learn_zero_point=True)])
def test_every_quantizer_trains_and_resumes_through_a_change(quantizer: Any, tmp_path: Path) -> None:
    scheme = "W4A16_ASYM_G32" if isinstance(quantizer, partial) else "W4A16_G32"
    for run, resume in (("whole", None), ("again", tmp_path / "whole" / "checkpoints" / "step=00000003.ckpt")):
        module = make_module(quantizer=quantizer, plan=Uniform(scheme), initializer=RTN())
        _, module = fit([BitSchedule(milestones={0: 8, 3: None})], tmp_path / run, module=module, resume=resume)
        if resume is None:
            whole = state(module)
    assert same(whole, state(module))


def test_a_method_with_a_start_of_its_own_begins_there_again() -> None:
    student = make_module(quantizer=SEQ, plan=Uniform("W2A16_HALF"), initializer=RTN()).build()
    name, layer = next(iter(student.layers.items()))
    scale = layer.weight_fake_quantizer.scale.detach().clone()
    change_bits(student.split, student.layers, {name: 4})
    assert not torch.allclose(layer.weight_fake_quantizer.scale, scale)
    change_bits(student.split, student.layers, {name: 2})
    assert torch.equal(layer.weight_fake_quantizer.scale, scale)


@pytest.mark.parametrize("what", ["layer", pytest.param("block", marks=pytest.mark.slow)])
def test_it_compiles_nothing_anew(what: str) -> None:
    counts = []
    for schedule in ([], [BitSchedule(**DOWN)]):
        counter = CompileCounter()

        class Compiled(L.Callback):
            def on_fit_start(self, trainer: Any, module: Any, counter: Any = counter) -> None:
                down = module.student.layers["model.layers.0.mlp.down_proj"]
                (down if what == "layer" else blocks_of(module.student.model)[0]).compile(backend=counter)

        torch._dynamo.reset()
        fit([*schedule, Compiled()])
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] > 0


def test_layers_with_adapters_inside_are_fitted_with_them(tmp_path: Path) -> None:
    _, module = fit([LoraAdapters(rank=2), BitSchedule(**DOWN)], tmp_path / "whole")
    saved = tmp_path / "whole" / "checkpoints" / "step=00000004.ckpt"
    _, again = fit([LoraAdapters(rank=2), BitSchedule(**DOWN)], tmp_path / "again", resume=saved)
    assert same(state(module), state(again))
    adapted = [layer for layer in module.student.layers.values() if layer.adapter is not None]
    with torch.no_grad():
        for layer in adapted:
            layer.adapter.lora_B.normal_()
    name, layer = next((n, x) for n, x in module.student.layers.items() if x.adapter is not None)
    before = layer.weight_fake_quantizer.scale.detach().clone()
    change_bits(module.split, module.student.layers, {name: 4})
    assert layer.weight_fake_quantizer.scale.mean() > 2 * before.mean()


def test_a_window_that_holds_scales_lets_them_be_fitted() -> None:
    assert looks(BitSchedule(**DOWN), FreezeWindow(part="scales", start=1)).tops[-1].popitem()[1] == 7


def test_changes_and_averages_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kdqat"):
        fit([BitSchedule(roles=["gate", "up"], **DOWN)], tmp_path, log_every_n_steps=1)
    said = [r.getMessage() for r in caplog.records if "BitSchedule" in r.getMessage()]
    assert len(said) == 3 and said[1].startswith("BitSchedule: step 2: 4 layers from 8 to 6 bits; ")
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("bits/average")
    averages = [float(row.split(",")[column]) for row in rows[1:7]]
    share = (averages[0] - 4) / 4  # of gate and up in all weights of the plan
    assert 0.3 < share < 0.6 and averages == pytest.approx([4 + share * extra for extra in (4, 4, 2, 2, 0, 0)])


def test_what_is_saved_has_the_plans_bits_even_if_training_stops_early(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 3

    _, module = fit([BitSchedule(**DOWN), Stop()], tmp_path / "run")
    assert "training ended at step 3, before the schedule did" in caplog.text
    saved = torch.load(tmp_path / "run" / "checkpoints" / "step=00000003.ckpt", weights_only=True)["state_dict"]
    assert {float(value) for key, value in saved.items() if key.endswith("weight_fake_quantizer.qmax")} == {31}
    (tmp_path / "student").mkdir()
    save_student(module.student, tmp_path / "student")
    loaded = load_student(tmp_path / "student")
    for name, layer in module.student.layers.items():
        there = loaded.layers[name]
        assert layer.weight_fake_quantizer.qmax == there.weight_fake_quantizer.qmax == 7
        assert torch.equal(layer.fake_quantized_weight(), there.fake_quantized_weight())


def refused(schedule: BitSchedule, *others: Any, steps: int = 6, **changes: Any) -> str:
    with pytest.raises(ValueError, match="BitSchedule") as error:
        fit([*others, schedule], steps=steps, module=make_module(**changes))
    return str(error.value)


def test_what_does_not_end_on_the_plans_bits_is_refused_by_name() -> None:
    says = refused(BitSchedule(milestones={0: 8, 2: 5}))
    assert "model.layers.0.self_attn.q_proj ends with 5 bits, and its plan says 4" in says
    says = refused(BitSchedule(progressive=[8, 6, 5], until=3))
    assert "ends with 5 bits" in says


def test_a_schedule_that_is_longer_than_the_run_is_refused_with_both_numbers() -> None:
    assert "step 6 and the run has 6 steps" in refused(BitSchedule(milestones={0: 8, 6: None}))
    fit([BitSchedule(milestones={0: 8, 5: None})])


@pytest.mark.parametrize(("scheme", "what"), [("MXFP4", "e2m1"), ("NF4", "nf4"), ("TERNARY", "ternary")])
def test_formats_of_one_width_are_refused_by_name(scheme: str, what: str) -> None:
    says = refused(BitSchedule(**DOWN), plan=Uniform(scheme), quantizer=MinMax, initializer=RTN())
    assert "layer model.layers.0.self_attn.q_proj is in format " in says and what in says


def test_widths_that_a_format_does_not_have_are_refused_by_name() -> None:
    assert "layer model.layers.0.self_attn.q_proj: int1 has no" in refused(BitSchedule(milestones={0: 1, 2: None}))


def test_frozen_layers_are_refused_by_name_and_others_go_on() -> None:
    assert "layer model.layers.0.self_attn.o_proj is frozen" in refused(BitSchedule(**DOWN), Freeze(roles=["o"]))
    fit([Freeze(roles=["o"]), BitSchedule(roles=["q"], **DOWN)])


def test_layers_without_a_score_are_refused_by_name() -> None:
    layers = [name for name in make_module().build().layers if ".layers.0." in name]
    scores = Scores("LIM", "block", {"model.layers.0": 1.0}, {"model.layers.0": tuple(layers)})
    says = refused(BitSchedule(scores=scores, stop=3))
    assert "layer model.layers.1.self_attn.q_proj has no score (7 have none)" in says
    fit([BitSchedule(scores=scores, stop=3, blocks=[0])])


def test_what_does_nothing_and_what_would_keep_other_weights_is_refused(tmp_path: Path) -> None:
    assert "nothing to do" in refused(BitSchedule(milestones={0: 4}))
    assert "list one" in refused(BitSchedule(**DOWN), BitSchedule(**DOWN))
    with pytest.raises(ValueError, match=r"nowhere\.json: no such file"):
        fit([BitSchedule(scores="nowhere.json", stop=3)])
    with pytest.raises(ValueError, match=r"BitSchedule.*select: last"):
        api.make_trainer({"max_steps": 6}, tmp_path, [BitSchedule(**DOWN), Checkpoints(select="best")]).fit(
            make_module(), Loader([SAME] * 6)
        )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({}, "one of"), ({"milestones": {0: 8}, "progressive": [8, 4], "until": 3}, "only one"),
     ({"progressive": [8, 4]}, "until"), ({"milestones": {0: 8}, "until": 4}, "until"), ({"scores": "s"}, "stop"),
     ({"milestones": {0: 8, 5: None}, "start": 3}, "go with scores"), ({"milestones": {}}, "milestones are"),
     ({"milestones": {-1: 8}}, "milestones are"), ({"milestones": {0: 9}}, "not 9"),
     ({"progressive": [8], "until": 3}, "two widths"), ({"progressive": [8, 6, 4], "until": 1}, "a step for each"),
     ({"scores": "s", "start": 5, "stop": 5}, "start < stop"), ({"progressive": [8, 4], "until": 3, "shape": "x"}, "x"),
     ({"scores": "s", "stop": 5, "first_bits": 16}, "not 16")],
)  # fmt: skip
def test_arguments_that_do_not_go_together_say_so(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"BitSchedule.*{says}"):
        BitSchedule(**arguments)


def test_a_resumed_run_ends_with_the_same_bits_at_and_between_changes(tmp_path: Path) -> None:
    for at in (2, 3, 4):
        assert resumed_ends_the_same(lambda: BitSchedule(**DOWN), tmp_path / str(at), at=at)
