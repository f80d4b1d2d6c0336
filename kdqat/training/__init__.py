"""Training: the Lightning module, its optimizer groups, its checkpoints."""

from kdqat.training.checkpoint import Checkpoints, WholeFileIO, newest_complete
from kdqat.training.edits import Observer, Phase, Steer, StudentEdit
from kdqat.training.logger import CSVMetrics
from kdqat.training.module import KDQATModule
from kdqat.training.nonfinite import NonFiniteLossError
from kdqat.training.optim import WarmupCosine, parameter_groups
from kdqat.training.parallel import Parallel
from kdqat.training.stochastic import AdamWSR

__all__ = [
    "AdamWSR",
    "CSVMetrics",
    "Checkpoints",
    "KDQATModule",
    "NonFiniteLossError",
    "Observer",
    "Parallel",
    "Phase",
    "Steer",
    "StudentEdit",
    "WarmupCosine",
    "WholeFileIO",
    "newest_complete",
    "parameter_groups",
]
