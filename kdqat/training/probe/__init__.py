"""The probe: teacher and student on one small fixed batch, apart from training, to look at every layer."""

from kdqat.training.probe.batch import cut
from kdqat.training.probe.capture import Seen, watched
from kdqat.training.probe.compare import compare
from kdqat.training.probe.energy import gradient_energies
from kdqat.training.probe.passes import ProbePass, live_split, require_live
from kdqat.training.probe.plain import plainly
from kdqat.training.probe.probe import Probe
from kdqat.training.probe.stacks import Values

__all__ = [
    "Probe",
    "ProbePass",
    "Seen",
    "Values",
    "compare",
    "cut",
    "gradient_energies",
    "live_split",
    "plainly",
    "require_live",
    "watched",
]
