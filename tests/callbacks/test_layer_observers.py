"""What observers of layers have in common: how a checkpoint tells them apart, and a selection that matches nothing."""

from __future__ import annotations

from typing import Any

import pytest

from kdqat.callbacks import GradientLog, OscillationLog, SignalLog
from tests.training.toy import make_module

PERIODS: dict[type, str] = {
    GradientLog: "'every_n_steps': 3, 'probe_every_n_steps': 20",
    SignalLog: "'every_n_steps': 3",
    OscillationLog: "'every_n_steps': 3",
}
each = pytest.mark.parametrize("cls", PERIODS, ids=lambda cls: cls.__name__)


@each
def test_a_state_has_the_key_under_which_checkpoints_hold_it(cls: Any) -> None:
    key = cls(every_n_steps=3, roles=["o"], blocks=[-1]).state_key
    assert key == f"{cls.__name__}{{{PERIODS[cls]}, 'roles': ['o'], 'blocks': [-1], 'layers': None}}"


@each
def test_a_selection_that_matches_nothing_is_refused_before_training(cls: Any) -> None:
    student = make_module().build()
    cls(roles=["o"]).require_matches(student)
    with pytest.raises(ValueError, match=f"{cls.__name__}: roles 'ov' matches no layer"):
        cls(roles=["ov"]).require_matches(student)
