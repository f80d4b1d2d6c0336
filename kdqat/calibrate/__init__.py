"""Calibration: one pass over text that shows every block's layer inputs while holding one block's at a time.

text -> calibration_batches -> stream_blocks -> BlockCall.run -> AbsMax, Range, InputSample, Hessian
"""

from kdqat.calibrate.block_call import BlockCall, calibrating, layer_inputs
from kdqat.calibrate.kept import KeptStatistics
from kdqat.calibrate.ranges import calibrate_ranges, needs_range, set_range
from kdqat.calibrate.statistics import AbsMax, AbsMean, Hessian, InputSample, Range
from kdqat.calibrate.stream import stream_blocks
from kdqat.calibrate.text import Calibration, calibration_batches, text_digest
from kdqat.calibrate.visit import visiting

__all__ = [
    "AbsMax",
    "AbsMean",
    "BlockCall",
    "Calibration",
    "Hessian",
    "InputSample",
    "KeptStatistics",
    "Range",
    "calibrate_ranges",
    "calibrating",
    "calibration_batches",
    "layer_inputs",
    "needs_range",
    "set_range",
    "stream_blocks",
    "text_digest",
    "visiting",
]
