"""Who gets which learning rate and decay, and when."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from kdqat.initializers import RTN
from kdqat.quant import FakeQuantizer, MinMax
from kdqat.training import WarmupCosine, parameter_groups
from tests.training.toy import batch, make_module, train


def test_parameters_are_grouped_by_their_owner() -> None:
    module = make_module()
    model = module.build().model
    groups = {group["name"]: group for group in parameter_groups(model)}
    scales = {id(p) for m in model.modules() if isinstance(m, FakeQuantizer) for p in m.parameters()}
    assert {id(p) for p in groups["scales"]["params"]} == scales and len(scales) == 14
    assert all(p.ndim == 1 for p in groups["vectors"]["params"])  # norms
    assert all(p.ndim == 2 for p in groups["weights"]["params"])
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted({id(p) for p in model.parameters()})  # each once, tied ones too


def test_scales_and_vectors_have_no_weight_decay() -> None:
    optimizer = torch.optim.AdamW(parameter_groups(make_module().build().model), lr=1.0, weight_decay=0.3)
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {
        "weights": 0.3, "scales": 0.0, "vectors": 0.0,
    }  # fmt: skip


def test_frozen_parameters_and_empty_groups_are_left_out() -> None:
    model = make_module(quantizer=MinMax, initializer=RTN()).build().model  # learns no scale
    assert [group["name"] for group in parameter_groups(model)] == ["weights", "vectors"]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(model)
    model.lm_head.weight.requires_grad_(True)
    assert [group["name"] for group in parameter_groups(model)] == ["weights"]


def test_the_learning_rate_of_scales_is_a_share_of_the_weights() -> None:
    module = make_module(optimizer=partial(torch.optim.AdamW, lr=1e-3), scheduler=WarmupCosine, scale_lr_ratio=0.25)
    trainer = train(module, [batch(2)], max_steps=4)
    (optimizer,) = trainer.optimizers
    rates = {group["name"]: group["initial_lr"] for group in optimizer.param_groups}
    assert rates == {"weights": 1e-3, "scales": 2.5e-4, "vectors": 1e-3}
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}  # the cosine's end


def schedule(**arguments: float) -> WarmupCosine:
    return WarmupCosine(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0), **arguments)  # type: ignore[arg-type]


def test_warmup_is_linear_and_the_cosine_ends_at_its_share() -> None:
    scheduler = schedule(warmup_steps=3, total_steps=11, final_ratio=0.2)
    rates = []
    for _ in range(13):
        rates += scheduler.get_last_lr()
        scheduler.optimizer.step()
        scheduler.step()
    warmup = [2 * 1 / 4, 2 * 2 / 4, 2 * 3 / 4]
    cosine = [2 * (0.2 + 0.8 * (1 + math.cos(math.pi * k / 8)) / 2) for k in range(9)]
    assert rates == pytest.approx([*warmup, *cosine, 2 * 0.2])
    assert rates[3] == 2.0 and rates[7] == pytest.approx(2 * 0.6) and rates[11] == pytest.approx(0.4)


def test_the_end_of_the_cosine_is_the_end_of_the_run_unless_given() -> None:
    scheduler = schedule(warmup_steps=1)
    scheduler.finish_at(5)
    assert scheduler.factor(5) == 0.0 and scheduler.factor(3) == pytest.approx(0.5)
    given = schedule(total_steps=10)
    given.finish_at(5)
    assert given.factor(5) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "wrong", [{"warmup_steps": -1}, {"final_ratio": 1.5}, {"warmup_steps": 5, "total_steps": 5}], ids=str
)
def test_a_schedule_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="WarmupCosine needs"):
        schedule(**wrong)


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps 7 does not fit into a run of 7 steps"):
        schedule(warmup_steps=7).finish_at(7)
