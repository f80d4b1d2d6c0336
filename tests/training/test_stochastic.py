"""bf16 weights arrive where float32 ones do, on average, and a resumed optimizer rounds as the first one would have."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from kdqat.training import AdamWSR
from kdqat.training.stochastic import round_stochastically

RATE = 2e-6


def weights(dtype: torch.dtype, numbers: int = 1 << 16) -> nn.Parameter:
    start = torch.randn(numbers, generator=torch.Generator().manual_seed(0)) * 0.02
    return nn.Parameter(start.bfloat16().to(dtype))


def descend(
    parameter: nn.Parameter, optimizer: torch.optim.Optimizer, steps: int = 100, first: int = 0
) -> nn.Parameter:
    """Noisy gradients with a mean of half their deviation, the same for every parameter of this size."""
    for step in range(first, first + steps):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
        parameter.grad = (noise + 0.5).to(parameter.dtype)
        optimizer.step()
    return parameter


def moved(make: Any, dtype: torch.dtype) -> torch.Tensor:
    parameter = weights(dtype)
    return (descend(parameter, make([parameter])).detach().float() - weights(dtype).float()).detach()


def test_at_a_tiny_rate_bf16_weights_move_as_float32_ones_on_average_and_plain_adamw_moves_few() -> None:
    exact = moved(partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0), torch.float32)
    rounded = moved(partial(AdamWSR, lr=RATE, weight_decay=0.0), torch.bfloat16)
    nearest = moved(partial(torch.optim.AdamW, lr=RATE, weight_decay=0.0), torch.bfloat16)
    assert float(rounded.mean() / exact.mean()) == pytest.approx(1, abs=0.03)
    assert float((nearest != 0).float().mean()) < 0.15 and float((exact != 0).float().mean()) == 1
    assert abs(float(nearest.mean() / exact.mean())) < 0.5
    # and every group of weights by itself, not only their sum: large weights have coarse steps
    size = weights(torch.float32).detach().abs()
    for low, high in ((0, 0.01), (0.01, 0.03), (0.03, 1)):
        chosen = (size >= low) & (size < high)
        assert float(rounded[chosen].mean() / exact[chosen].mean()) == pytest.approx(1, abs=0.1)


def test_rounding_takes_the_two_neighbours_as_often_as_makes_it_right() -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.25, 0.9):
        value = torch.full((100_000,), -(1 + share * 2**-7))  # bf16 numbers near 1 are 2^-7 apart
        rounded = round_stochastically(value, generator)
        assert set(rounded.tolist()) <= {-1.0, -(1 + 2**-7)}
        assert float((rounded != -1).float().mean()) == pytest.approx(share, abs=0.01)
        assert torch.equal(rounded.bfloat16().float(), rounded)


def test_what_is_not_finite_becomes_nan_and_never_a_number() -> None:
    all_ones = torch.tensor([0x7FFFFFFF], dtype=torch.int32).view(torch.float32)  # CUDA's NaN
    values = torch.cat([all_ones, torch.tensor([torch.nan, torch.inf, -torch.inf])]).repeat(64)
    assert round_stochastically(values, torch.Generator().manual_seed(0)).isnan().all()


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 4)], ids=str)
def test_any_shape_is_rounded_and_numbers_of_bf16_stay(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape).bfloat16().float()
    assert torch.equal(round_stochastically(values, torch.Generator()), values)


def test_a_bf16_second_moment_decays_as_a_float32_one_does() -> None:
    moments = []
    for state_dtype in ("float32", "bfloat16"):
        parameter = weights(torch.bfloat16, 4096)
        optimizer = AdamWSR([parameter], lr=RATE, state_dtype=state_dtype)
        for step in range(300):
            parameter.grad = torch.full_like(parameter, 1.0 if step < 50 else 0.01)
            optimizer.step()
        moments.append(float(optimizer.state[parameter]["exp_avg_sq"].float().mean()))
    assert moments[1] == pytest.approx(moments[0], rel=0.02)


def test_float32_parameters_are_trained_as_by_adamw() -> None:
    ours, theirs = weights(torch.float32), weights(torch.float32)
    descend(ours, AdamWSR([ours], lr=1e-3, weight_decay=0.1), 10)
    descend(theirs, torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1), 10)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_resumed_optimizer_goes_on_with_the_same_bits(state_dtype: str, tmp_path: Any) -> None:
    make = partial(AdamWSR, lr=1e-4, state_dtype=state_dtype, seed=3)
    whole = weights(torch.bfloat16, 999)
    descend(whole, make([whole]), 8)
    half = weights(torch.bfloat16, 999)
    optimizer = make([half])
    descend(half, optimizer, 4)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    resumed = nn.Parameter(half.detach().clone())
    optimizer = make([resumed])
    optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    torch.randn(7)  # the global generator is nobody's here
    assert optimizer.state[resumed]["exp_avg_sq"].dtype == getattr(torch, state_dtype)
    assert torch.equal(descend(resumed, optimizer, 4, first=4), whole)


def test_two_parameters_and_two_seeds_draw_different_noise() -> None:
    one, other = weights(torch.bfloat16), weights(torch.bfloat16)
    optimizer = AdamWSR([one, other], lr=RATE)
    one.grad = other.grad = torch.ones_like(one)
    optimizer.step()
    third = weights(torch.bfloat16)
    third.grad = torch.ones_like(third)
    AdamWSR([third], lr=RATE, seed=1).step()
    assert not torch.equal(one, other) and not torch.equal(one, third)


def test_a_parameter_draws_the_same_noise_whoever_else_has_a_gradient() -> None:
    results = []
    for busy in (True, False):
        first, second = weights(torch.bfloat16), weights(torch.bfloat16)
        optimizer = AdamWSR([first, second], lr=RATE)
        second.grad = torch.ones_like(second)
        first.grad = torch.ones_like(first) if busy else None
        optimizer.step()
        results.append(second.detach().clone())
    assert torch.equal(*results)


def test_a_step_cut_into_buckets_is_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> list[torch.Tensor]:
        group = [weights(torch.bfloat16, 100), weights(torch.float32, 50), weights(torch.bfloat16, 70)]
        optimizer = AdamWSR(group, lr=1e-3)
        for parameter in group:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return copy.deepcopy(group)

    one_by_one = step()  # as on every CPU
    monkeypatch.setattr("kdqat.training.stochastic.BUCKET", 170)
    monkeypatch.setattr("kdqat.training.stochastic._on_gpu", lambda parameter: True)
    assert all(torch.equal(a, b) for a, b in zip(one_by_one, step(), strict=True))


@pytest.mark.parametrize("wrong", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"state_dtype": "float16"}], ids=str)
def test_numbers_that_make_no_optimizer_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="AdamWSR"):
        AdamWSR([weights(torch.bfloat16, 8)], **wrong)


def test_float16_parameters_are_refused() -> None:
    parameter = weights(torch.float16, 8)
    with pytest.raises(ValueError, match=r"bfloat16 and float32 parameters, not torch\.float16"):
        descend(parameter, AdamWSR([parameter]), 1)
