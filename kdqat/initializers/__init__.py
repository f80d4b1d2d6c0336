"""How a student's first scales are chosen."""

from kdqat.initializers.base import Initializer
from kdqat.initializers.fpq import FPQ
from kdqat.initializers.mse_grid import MSEGrid
from kdqat.initializers.rtn import RTN
from kdqat.initializers.stored_scales import StoredScales

__all__ = ["FPQ", "RTN", "Initializer", "MSEGrid", "StoredScales"]
