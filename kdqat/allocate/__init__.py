"""Which layer gets which scheme."""

from kdqat.allocate.base import BitAllocator
from kdqat.allocate.by_importance import ByImportance
from kdqat.allocate.from_checkpoint import FromCheckpoint
from kdqat.allocate.from_file import FromFile
from kdqat.allocate.knapsack import Knapsack
from kdqat.allocate.uniform import Uniform

__all__ = ["BitAllocator", "ByImportance", "FromCheckpoint", "FromFile", "Knapsack", "Uniform"]
