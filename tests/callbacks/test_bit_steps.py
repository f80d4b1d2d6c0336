"""Schedules of bits as plain functions: when which width comes, and where it ends."""

from __future__ import annotations

import pytest

from kdqat.callbacks.bit_steps import bits_at, by_milestones, progressive_steps, ranked_steps, spread


def test_a_width_holds_from_its_step_until_the_next_one() -> None:
    steps = by_milestones({0: 8, 200: 4, 400: None}, 2)
    assert [bits_at(steps, step, 2) for step in (0, 199, 200, 399, 400, 10_000)] == [8, 8, 4, 4, 2, 2]


def test_before_the_first_milestone_a_layer_has_its_plans_bits_and_their_order_does_not_matter() -> None:
    steps = by_milestones({7: None, 3: 8}, 4)
    assert steps == ((3, 8), (7, 4)) and bits_at(steps, 2, 4) == 4


def test_what_changes_nothing_is_no_change() -> None:
    assert by_milestones({0: 4, 10: 8, 20: 8, 30: 4, 40: None}, 4) == ((10, 8), (30, 4))


def test_widths_one_after_another_are_spread_evenly_or_as_under_a_cosine() -> None:
    assert progressive_steps([8, 4, 2], 400, "linear", 2) == ((0, 8), (200, 4), (400, 2))
    assert progressive_steps([8, 6, 4, None], 300, "linear", 2) == ((0, 8), (100, 6), (200, 4), (300, 2))
    assert progressive_steps([8, 6, 4, 2], 300, "cosine", 2) == ((0, 8), (118, 6), (182, 4), (300, 2))


def test_no_layer_gets_fewer_bits_than_its_plan_says() -> None:
    assert progressive_steps([8, 4, 2], 400, "linear", 3) == ((0, 8), (200, 4), (400, 3))
    assert progressive_steps([8, 4, 2], 400, "linear", 4) == ((0, 8), (200, 4))


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_layers_come_down_in_their_order_from_the_first_step_to_the_last(shape) -> None:
    units, plan = [["a", "b"], ["c"], ["d"]], {"a": 4, "b": 8, "c": 2, "d": 4}
    steps = ranked_steps(units, 8, 10, 50, shape, plan)
    assert steps == {"a": ((0, 8), (10, 4)), "b": (), "c": ((0, 8), (30, 2)), "d": ((0, 8), (50, 4))}


def test_a_unit_that_comes_down_at_step_0_never_goes_up() -> None:
    assert ranked_steps([["a"], ["b"]], 8, 0, 5, "linear", {"a": 4, "b": 4})["a"] == ()


def test_one_unit_alone_comes_down_at_the_end() -> None:
    assert spread(1, 10, 50, "linear") == [50]
