"""What an initializer is: it sets the first scales of a student, block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from kdqat.types import BlockView


class Initializer(ABC):
    """Sets scales and zero points, and in some methods the starting weights."""

    rewrites_weights: ClassVar[bool] = False  # True: the latent weights are no longer the teacher's

    @abstractmethod
    def initialize(self, block: BlockView) -> None:
        """Set the quantizers of one block's layers, in place.

        Raises:
            ValueError: naming the layer, if its quantizer takes no scales and this method has other ones to set.
        """
