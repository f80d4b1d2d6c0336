"""What the student learns from: divergences to the teacher's logits, its hidden states and attention, and labels.

A loss sees `Outputs`, never a model, and returns a sum with the number it is to be divided by. The logits of a
whole batch never exist at once. One method, one file; `WeightedSum` combines them.
"""

from kdqat.losses.attention import AttentionTransfer
from kdqat.losses.base import DistillLoss
from kdqat.losses.cakld import CAKLD
from kdqat.losses.combine import WeightedSum
from kdqat.losses.cross_entropy import CrossEntropy
from kdqat.losses.forward_kl import ForwardKL
from kdqat.losses.hidden import HiddenStates
from kdqat.losses.jsd import GeneralizedJSD
from kdqat.losses.logits import LogitLoss
from kdqat.losses.reverse_kl import ReverseKL
from kdqat.losses.select import Reduction, num_targets, target_mask
from kdqat.losses.tvd import TVD

__all__ = [
    "CAKLD",
    "TVD",
    "AttentionTransfer",
    "CrossEntropy",
    "DistillLoss",
    "ForwardKL",
    "GeneralizedJSD",
    "HiddenStates",
    "LogitLoss",
    "Reduction",
    "ReverseKL",
    "WeightedSum",
    "num_targets",
    "target_mask",
]
