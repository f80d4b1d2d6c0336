"""How a student's first scales are chosen."""

from kdqat.initializers.awq import AWQ
from kdqat.initializers.base import Initializer
from kdqat.initializers.fpq import FPQ
from kdqat.initializers.gptq import GPTQ
from kdqat.initializers.mse_grid import MSEGrid
from kdqat.initializers.quanto_max import QuantoMax
from kdqat.initializers.rtn import RTN
from kdqat.initializers.sign_round import SignRound
from kdqat.initializers.stored_scales import StoredScales

__all__ = ["AWQ", "FPQ", "GPTQ", "RTN", "Initializer", "MSEGrid", "QuantoMax", "SignRound", "StoredScales"]
