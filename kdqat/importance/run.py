"""Scoring a model from its source: what `kdqat score` does, and a recipe's `score` section as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kdqat.calibrate import Calibration
from kdqat.importance.base import ImportanceScorer
from kdqat.models import ModelSource, SplitModel, layer_refs
from kdqat.spec import Scores


@dataclass(frozen=True)
class Scoring:
    """How the units of a model are scored. Building one reads nothing.

    Args:
        scorer: the method.
        calibration: its text; None: the recipe's model.calibration. Never what is evaluated on.
    """

    scorer: ImportanceScorer
    calibration: Calibration | None = None


def score_model(
    source: ModelSource,
    scorer: ImportanceScorer,
    calibration: Calibration | None = None,
    *,
    device: torch.device | str = "cpu",
) -> Scores:
    """Load a model, score it in full precision on `device`.

    Raises:
        ValueError: if the model or the text cannot be had, or the method does not fit the model.
    """
    if scorer.needs and calibration is None:
        scorer_name = type(scorer).__name__
        raise ValueError(
            f"score.calibration is missing: {scorer_name} is measured on text, e.g. calibration: "
            "{text: python_docs:train}; model.calibration would do as well"
        )
    split = SplitModel(source.load_model())
    batches = None
    if scorer.needs and calibration is not None:
        batches = calibration.batches(source.load_tokenizer())
    layers = layer_refs(split.model)
    scores = scorer.score(split.to(device), layers, batches)
    return replace(scores, model=source.fingerprint())
