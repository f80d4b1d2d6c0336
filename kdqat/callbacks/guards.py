"""What looks after every run unless the recipe lists its own: zero gradients, nothing moved, divergence.

They warn and change nothing, and read the device in one step of ten at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L

from kdqat.callbacks.divergence import Divergence
from kdqat.callbacks.nothing_moved import NothingMoved
from kdqat.callbacks.zero_gradients import ZeroGradients

GUARDS: tuple[type[L.Callback], ...] = (ZeroGradients, NothingMoved, Divergence)


def missing_guards(callbacks: Sequence[L.Callback]) -> list[L.Callback]:
    """A guard of each kind that `callbacks` has none of."""
    return [guard() for guard in GUARDS if not any(isinstance(callback, guard) for callback in callbacks)]
