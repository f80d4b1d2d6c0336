"""How much each block or layer matters: scorers that measure it, for allocators that spend bits by it.

Scores point one way whatever the method's own direction is: higher means "give this one more bits".
"""

from kdqat.importance.activation_norm import ActivationNorm
from kdqat.importance.base import ImportanceScorer, Measured
from kdqat.importance.fisher import Fisher
from kdqat.importance.hessian_trace import HessianTrace
from kdqat.importance.lim import LIM
from kdqat.importance.output_kl import OutputKL
from kdqat.importance.run import Scoring, score_model
from kdqat.importance.weight_sqnr import WeightSQNR
from kdqat.importance.zd import ZD

__all__ = [
    "LIM",
    "ZD",
    "ActivationNorm",
    "Fisher",
    "HessianTrace",
    "ImportanceScorer",
    "Measured",
    "OutputKL",
    "Scoring",
    "WeightSQNR",
    "score_model",
]
