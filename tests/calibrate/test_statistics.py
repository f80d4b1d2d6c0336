"""What is remembered micro-batch by micro-batch is what the whole would have given."""

from __future__ import annotations

import itertools

import pytest
import torch

from kdqat.calibrate import AbsMax, Hessian, InputSample, Range


def inputs(rows: int = 50, width: int = 6) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0))


def in_parts(statistic, x):
    for part in (x[:7], x[7:7], x[7:30], x[30:]):  # one is empty, as an expert's may be
        statistic.update(part)
    return statistic


def test_absmax_is_the_largest_magnitude_of_every_feature():
    x = inputs()
    x[3, 2] = -9
    seen = in_parts(AbsMax(), x)
    assert torch.equal(seen.per_feature, x.abs().amax(0)) and seen.per_feature[2] == 9
    assert seen.overall.shape == () and seen.overall == 9


def test_range_covers_everything_seen():
    x = inputs() + 5
    seen = in_parts(Range(), x)
    assert torch.equal(seen.min, x.min()) and torch.equal(seen.max, x.max())


def test_hessian_is_the_sum_of_outer_products():
    x = inputs()
    seen = in_parts(Hessian(), x)
    torch.testing.assert_close(seen.sum, x.T @ x)
    assert seen.num_tokens == 50


def test_hessian_is_summed_in_fp32_whatever_the_model_computes_in():
    x = inputs(4000).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        seen = in_parts(Hessian(), x)
    assert seen.sum.dtype == torch.float32
    torch.testing.assert_close(seen.sum.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("statistic", [AbsMax, Range])
def test_results_are_fp32(statistic):
    seen = in_parts(statistic(), inputs().bfloat16())
    results = [seen.per_feature] if statistic is AbsMax else [seen.min, seen.max]
    assert {result.dtype for result in results} == {torch.float32}


@pytest.mark.parametrize("max_tokens", [1, 7, 49, 50, 99])
def test_a_sample_is_even_and_does_not_depend_on_the_parts(max_tokens):
    x = inputs()
    rows = in_parts(InputSample(max_tokens, 50), x).rows
    positions = [int((x == row).all(1).nonzero()) for row in rows]
    gaps = {b - a for a, b in itertools.pairwise(positions)}
    assert len(positions) == min(max_tokens, 50) and positions[0] == 0
    assert not gaps or (max(gaps) - min(gaps) <= 1 and min(gaps) >= 1)


def test_a_sample_is_a_copy_that_does_not_keep_its_micro_batch():
    x = inputs()
    sample = InputSample(5, 50)
    sample.update(x)
    x.zero_()
    assert sample.rows.abs().min() > 0
    assert sample.rows.untyped_storage().nbytes() == 5 * 6 * 4


def test_nothing_seen_is_an_error_and_so_is_a_size_below_one():
    sample, absmax = InputSample(3, 3), AbsMax()
    for statistic in (sample, absmax):
        statistic.update(torch.empty(0, 6))
    for result in (lambda: absmax.overall, lambda: sample.rows):
        with pytest.raises(ValueError, match="has seen no input"):
            result()
    with pytest.raises(ValueError, match="max_tokens >= 1"):
        InputSample(0, 10)
