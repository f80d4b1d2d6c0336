"""Checkpointed and compiled blocks compute what plain ones do."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kdqat.training import KDQATModule, Parallel
from tests.training.toy import batch, make_module, train

SGD = partial(torch.optim.SGD, lr=1.0)  # Adam would make whole steps of rounding differences


def trained(parallel: Parallel, seed: int = 0) -> KDQATModule:
    module = make_module(parallel=parallel, optimizer=SGD)
    train(module, [batch(2, seed=seed + i) for i in range(4)])
    return module


def largest_difference(one: KDQATModule, other: KDQATModule) -> float:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if torch.is_floating_point(a))


@pytest.mark.parametrize("kept", [True, "selective"])
def test_checkpointed_blocks_give_the_same_bits(kept) -> None:
    plain, checkpointed = trained(Parallel()), trained(Parallel(checkpoint_blocks=kept))
    assert checkpointed.split is not None and (
        kept == "selective" or checkpointed.split.model.is_gradient_checkpointing
    )
    assert largest_difference(plain, checkpointed) == 0


@pytest.mark.slow
def test_compiled_blocks_give_the_same_student_and_so_does_a_second_one_in_the_process() -> None:
    for seed in (0, 10):
        plain, compiled = trained(Parallel(), seed), trained(Parallel(compile_blocks=True), seed)
        assert largest_difference(plain, compiled) < 1e-6
        assert largest_difference(plain, make_built()) > 1e-5  # the student did move
        assert set(plain.state_dict()) == set(compiled.state_dict())


def make_built() -> KDQATModule:
    module = make_module()
    module.build()
    return module
