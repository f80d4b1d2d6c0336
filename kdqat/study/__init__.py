"""Many runs of one recipe: variations, seeds, screening, mean and spread. Imports no torch; its runs do."""

from kdqat.study.expand import Trial, Variation, trials, variations
from kdqat.study.file import Screen, Study, read_study
from kdqat.study.study import planned, run_study

__all__ = ["Screen", "Study", "Trial", "Variation", "planned", "read_study", "run_study", "trials", "variations"]
