"""What happens around training steps."""

from kdqat.callbacks.divergence import Divergence, DivergenceError
from kdqat.callbacks.freeze import Freeze
from kdqat.callbacks.freeze_window import BlockProgressive, FreezeWindow, ScalesFirst
from kdqat.callbacks.guards import missing_guards
from kdqat.callbacks.nothing_moved import NothingMoved
from kdqat.callbacks.progress import ProgressLine
from kdqat.callbacks.stop import StopOnSignal
from kdqat.callbacks.zero_gradients import ZeroGradients

__all__ = [
    "BlockProgressive",
    "Divergence",
    "DivergenceError",
    "Freeze",
    "FreezeWindow",
    "NothingMoved",
    "ProgressLine",
    "ScalesFirst",
    "StopOnSignal",
    "ZeroGradients",
    "missing_guards",
]
