"""Which optimizers are fused unasked, and which dtypes an optimizer may train."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from kdqat.initializers import RTN
from kdqat.models import ModelSource
from kdqat.quant import Fixed, MinMax
from kdqat.training import AdamWSR
from kdqat.training.optim import scale_learning_rate
from kdqat.training.optimizer import make_optimizer
from tests.training.toy import batch, make_module, train

ADAMW = partial(torch.optim.AdamW, lr=1e-3)


class Special(torch.optim.AdamW):
    """Somebody's own, whose step may be anything."""


def fused(factory: Any, **arguments: Any) -> bool:
    optimizer = make_optimizer(factory, nn.Linear(3, 2), **arguments)
    assert len({group["fused"] for group in optimizer.param_groups} | {optimizer.defaults["fused"]}) == 1
    return bool(optimizer.defaults["fused"])


def test_adam_and_adamw_are_fused_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "kdqat")
    assert fused(ADAMW)
    assert [record.message.partition(";")[0] for record in caplog.records] == ["optimizer: fused AdamW"]
    assert fused(partial(torch.optim.Adam, lr=1e-3))


@pytest.mark.parametrize(
    "factory",
    [partial(ADAMW, fused=False), partial(ADAMW, foreach=True), partial(ADAMW, foreach=False),
     partial(ADAMW, differentiable=True), partial(Special, lr=1e-3)],
    ids=["fused: false", "foreach", "no foreach", "differentiable", "a subclass"],
)  # fmt: skip
def test_what_the_recipe_chose_and_what_is_no_plain_adam_stays(factory: Any) -> None:
    assert not fused(factory)


def test_sixteen_bit_loss_scaling_keeps_the_plain_one_which_can_clip() -> None:
    assert not fused(ADAMW, precision="16-mixed") and fused(ADAMW, precision="bf16-mixed")


def test_parameters_on_devices_without_the_kernel_are_not_fused() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    assert not make_optimizer(ADAMW, model).defaults["fused"]


def test_the_fused_step_is_the_plain_one() -> None:
    models = [nn.Linear(64, 64), nn.Linear(64, 64)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_optimizer(ADAMW, models[0]), make_optimizer(partial(ADAMW, fused=False), models[1])]
    for _ in range(5):
        gradient = torch.randn(64, 64)
        for model, optimizer in zip(models, optimizers, strict=True):
            model.weight.grad = gradient.clone()
            optimizer.step()
    # an update near 1e-3 of two numbers that differ by roundings of 1e-7
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-6, atol=1e-7)


def test_training_fuses_and_clips() -> None:
    trainer = train(make_module(), [batch(2)], max_steps=2, gradient_clip_val=1.0)
    assert trainer.optimizers[0].defaults["fused"]


@pytest.mark.parametrize(
    ("dtype", "factory"),
    [("bfloat16", ADAMW), ("float16", ADAMW), ("float16", partial(AdamWSR, lr=1e-3))],
    ids=["AdamW", "float16", "float16, rounded stochastically"],
)
def test_weights_that_an_optimizer_cannot_train_are_refused(dtype: str, factory: Any) -> None:
    module = make_module(student=ModelSource("toy:llama", dtype), optimizer=factory)
    with pytest.raises(ValueError, match=f"{dtype} and Adam.*float32.*bf16-mixed.*AdamWSR.*AdamW8bit"):
        module.require_training()
    with pytest.raises(ValueError, match=f"{dtype} and Adam"):
        train(module, [batch(2)])


def test_a_module_that_trains_nothing_may_have_any_dtype() -> None:
    student = make_module(student=ModelSource("toy:llama", "bfloat16"), optimizer=None, loss=None).build()
    assert student.model.lm_head.weight.dtype == torch.bfloat16


def test_a_trainer_precision_that_casts_scales_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision bf16-true: scales are kept in float32; take bf16-mixed"):
        train(make_module(optimizer=partial(AdamWSR, lr=1e-3)), [batch(2)], precision="bf16-true")
    fixed = make_module(quantizer=Fixed, optimizer=partial(AdamWSR, lr=1e-3))  # learns no scale, and has some
    with pytest.raises(ValueError, match="precision bf16-true: scales"):
        train(fixed, [batch(2)], precision="bf16-true")


def test_shards_of_two_dtypes_are_refused_before_fsdp_does() -> None:
    module = make_module(student=ModelSource("toy:llama", "bfloat16"), optimizer=partial(AdamWSR, lr=1e-3))
    model = module.build().split
    with pytest.raises(ValueError, match="one dtype, and learned scales are float32"):
        make_optimizer(AdamWSR, model, sharded=True)
    plain = make_module(student=ModelSource("toy:llama", "bfloat16"), quantizer=MinMax, initializer=RTN())
    make_optimizer(AdamWSR, plain.build().split, sharded=True)


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_moments_that_cannot_be_gathered_from_shards_are_refused(package: str) -> None:
    optim = pytest.importorskip(f"{package}.optim")
    with pytest.raises(ValueError, match=r"the moments of AdamW8bit cannot be gathered.*torch\.optim\.AdamW"):
        make_optimizer(partial(optim.AdamW8bit, lr=1e-3), nn.Linear(64, 64), sharded=True)
    make_optimizer(partial(optim.AdamW8bit, lr=1e-3), nn.Linear(64, 64))


def test_the_rate_of_scales_is_set_where_rates_are_tensors() -> None:
    optim = pytest.importorskip("torchao.optim")
    module = make_module()
    optimizer = make_optimizer(partial(optim.AdamW8bit, lr=1e-3), module.build().split)
    scale_learning_rate(optimizer, 0.1)
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert all(isinstance(rate, torch.Tensor) for rate in rates.values())
    assert {name: float(rate) for name, rate in rates.items()} == pytest.approx(
        {"weights": 1e-3, "scales": 1e-4, "vectors": 1e-3}
    )


def test_copies_of_bf16_weights_may_not_be_rounded_apart() -> None:
    optim = pytest.importorskip("torchao.optim")
    rounds = partial(optim.AdamW8bit, lr=1e-3, bf16_stochastic_round=True)
    model = nn.Linear(64, 64, dtype=torch.bfloat16)
    make_optimizer(rounds, model)
    make_optimizer(AdamWSR, model, world_size=2)
    make_optimizer(rounds, nn.Linear(64, 64), world_size=2)
    with pytest.raises(ValueError, match="copies of bf16 weights would drift apart; take AdamWSR"):
        make_optimizer(rounds, model, world_size=2)
