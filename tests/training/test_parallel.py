"""Checkpointed and compiled blocks compute what plain ones do."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from kdqat.models import blocks_of
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


@pytest.mark.parametrize(("kept", "times"), [(False, 1), (True, 2), ("selective", 2)])
def test_checkpointed_blocks_run_again_give_the_same_bits_and_are_left_as_they_came(kept, times) -> None:
    plain, checkpointed = trained(Parallel()), make_module(parallel=Parallel(checkpoint_blocks=kept), optimizer=SGD)
    block, calls = blocks_of(checkpointed.build().model)[0], []
    block.mlp.act_fn.register_forward_hook(lambda *_: calls.append(1))
    train(checkpointed, [batch(2, seed=i) for i in range(4)])
    assert len(calls) == 4 * times
    assert largest_difference(plain, checkpointed) == 0
    assert "forward" not in block.__dict__ and not block.gradient_checkpointing


def test_a_module_is_trained_twice_with_the_same_settings() -> None:
    twice, once = (make_module(parallel=Parallel(checkpoint_blocks="selective"), optimizer=SGD) for _ in range(2))
    for i in range(2):
        train(twice, [batch(2, seed=i)])
    train(once, [batch(2, seed=i) for i in range(2)])
    assert largest_difference(once, twice) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kept", [False, True, "selective"])
def test_compiled_blocks_give_the_same_student_and_so_does_a_second_one_in_the_process(kept) -> None:
    for seed in (0, 10):
        parallel = Parallel(compile_blocks=True, checkpoint_blocks=kept)
        plain, compiled = trained(Parallel(), seed), trained(parallel, seed)
        assert largest_difference(plain, compiled) < 1e-6
        assert largest_difference(plain, make_built()) > 1e-5  # the student did move
        assert set(plain.state_dict()) == set(compiled.state_dict())


def make_built() -> KDQATModule:
    module = make_module()
    module.build()
    return module
