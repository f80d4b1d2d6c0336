"""Which layer gets which scheme."""

from kdqat.allocate.base import BitAllocator
from kdqat.allocate.from_file import FromFile
from kdqat.allocate.uniform import Uniform

__all__ = ["BitAllocator", "FromFile", "Uniform"]
