"""What happens around training steps."""

from kdqat.callbacks.bit_schedule import BitSchedule
from kdqat.callbacks.divergence import Divergence, DivergenceError
from kdqat.callbacks.freeze import Freeze
from kdqat.callbacks.freeze_window import BlockProgressive, FreezeWindow, ScalesFirst
from kdqat.callbacks.gradient_log import GradientLog
from kdqat.callbacks.guards import missing_guards
from kdqat.callbacks.lora import LoraAdapters
from kdqat.callbacks.nothing_moved import NothingMoved
from kdqat.callbacks.oscillation_log import OscillationLog
from kdqat.callbacks.progress import ProgressLine
from kdqat.callbacks.signal_log import SignalLog
from kdqat.callbacks.stop import StopOnSignal
from kdqat.callbacks.zero_gradients import ZeroGradients

__all__ = [
    "BitSchedule",
    "BlockProgressive",
    "Divergence",
    "DivergenceError",
    "Freeze",
    "FreezeWindow",
    "GradientLog",
    "LoraAdapters",
    "NothingMoved",
    "OscillationLog",
    "ProgressLine",
    "ScalesFirst",
    "SignalLog",
    "StopOnSignal",
    "ZeroGradients",
    "missing_guards",
]
