"""What an initializer is: it sets the first scales of a student, block by block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from kdqat.types import BlockView


class Initializer(ABC):
    """Sets scales and zero points, and in some methods formats or the starting weights.

    Attributes:
        needs_calibration: whether blocks come with a `call`, which runs them on calibration text.
        sequential: blocks are called on what the blocks before them give as they are by now, quantized (GPTQ's
            practice); False: on what they give in full precision.
        rewrites_weights: the latent weights are afterwards no longer the teacher's.
    """

    needs_calibration: ClassVar[bool] = False
    sequential: bool = False
    rewrites_weights: bool = False

    @abstractmethod
    def initialize(self, block: BlockView) -> None:
        """Set the quantizers of one block's layers, in place.

        Raises:
            ValueError: naming the layer, if its quantizer takes no scales and this method has other ones to set.
        """
