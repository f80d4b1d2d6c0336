"""What a callback may do, by its kind.

An *edit* changes the student's structure or what of it is trained, once, in `configure_model`, before blocks are
compiled and sharded and before there is an optimizer (Lightning calls `setup` earlier, when there is no student). A
*steering* callback changes values during training: buffers, scales, gradients, the loop. An *observer* only reads: the
loss curve is bit-identical without it. Callbacks run in this order, so that an observer sees gradients before a
steering callback drops them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import ClassVar

import lightning as L

from kdqat.student import Student


class Phase(IntEnum):
    """When an edit's turn is: what is added must be there before somebody freezes it."""

    ADAPT = 0
    FREEZE = 1


class StudentEdit(L.Callback, ABC):
    """Changes the student once, before training.

    Attributes:
        rests_weights: it leaves the model's own weights untrained, so that a teacher may compute with them.
    """

    phase: ClassVar[Phase]
    rests_weights: ClassVar[bool] = False

    @abstractmethod
    def edit(self, student: Student) -> None:
        """Change `student` in place; it may lie on the meta device (the planner's), where nothing has a value.

        Raises:
            ValueError: if there is nothing to change; then nothing is changed.
        """

    def finish(self, student: Student) -> None:
        """Training is over: leave a student that can be saved and exported. It is whole, on the CPU, as trained."""


class Observer(L.Callback):
    """Reads and logs, and changes nothing."""

    def require_matches(self, student: Student) -> None:
        """Refuse, before anything is computed, layers that do not exist; `student` may lie on the meta device.

        Raises:
            ValueError: for a selection that matches nothing.
        """


class Steer(L.Callback):
    """Changes values during training, as a function of the step or with a state that is resumed."""

    def require_matches(self, student: Student) -> None:
        """Refuse, before anything is computed, layers that do not exist; `student` may lie on the meta device.

        Raises:
            ValueError: for a selection that matches nothing.
        """


def edits_among(callbacks: Iterable[L.Callback]) -> list[StudentEdit]:
    """The edits, in the order in which they are made."""
    return sorted((c for c in callbacks if isinstance(c, StudentEdit)), key=lambda edit: edit.phase)


def in_order(callbacks: Sequence[L.Callback]) -> list[L.Callback]:
    """Edits, observers, then all others in the order given, steering ones last.

    Raises:
        ValueError: for two of a kind whose states a checkpoint could not tell apart.
    """
    known = set()
    for callback in callbacks:
        if type(callback).state_dict is not L.Callback.state_dict:
            if callback.state_key in known:
                raise ValueError(
                    f"trainer.callbacks: there are two {type(callback).__name__} with the same settings, and a "
                    "checkpoint could not tell their states apart: leave one out, or let them differ in what they "
                    "choose or how often they look, where they can"
                )
            known.add(callback.state_key)

    def turn(callback: L.Callback) -> int:
        kinds = (StudentEdit, Observer)
        return next((i for i, kind in enumerate(kinds) if isinstance(callback, kind)), 2 + isinstance(callback, Steer))

    return sorted(callbacks, key=turn)
