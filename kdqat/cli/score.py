"""The verb `score`: measure how much each block or layer of a recipe's model matters, into scores.json and a plot."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning as L

from kdqat.cli.parser import parse_recipe
from kdqat.cli.session import console, device_of, quiet
from kdqat.importance import score_model
from kdqat.importance.plot import plot_scores
from kdqat.spec import SCORES_FILE

PLOT_FILE = "scores.png"


def score(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Score the full-precision student by the recipe's score section; nothing else of the run is touched.

    Other verbs' outputs may be there: a plan that was made from earlier scores stays what it is.
    """
    quiet()
    recipe = parse_recipe(options.recipe, overrides)
    if recipe.scoring is None:
        raise ValueError(
            f"{options.recipe}: score needs a score section, e.g. score: {{scorer: {{class_path: LIM}}, "
            "calibration: {text: python_docs:train}}"
        )
    file = recipe.run.path / SCORES_FILE
    if file.exists() and not options.overwrite:
        raise ValueError(f"{file} exists already: use --overwrite to replace it, or another trainer.default_root_dir")
    recipe.run.make()
    L.seed_everything(recipe.seed, verbose=False)
    scores = score_model(
        recipe.model.source,
        recipe.scoring.scorer,
        recipe.scoring.calibration or recipe.model.calibration,
        device=device_of(recipe.trainer.get("accelerator")),
    )
    scores.save(file)
    (recipe.run.path / PLOT_FILE).unlink(missing_ok=True)  # of earlier scores
    for place, unit in enumerate(scores.ranking()[:5], start=1):
        console.print(f"{place}. {unit}  {scores.importance[unit]:.5g}")
    console.print(f"scores of {len(scores.importance)} {scores.unit}s by {scores.method}: {file}")
    try:
        plot_scores(scores, recipe.run.path / PLOT_FILE)
    except ModuleNotFoundError:
        console.print("no plot: matplotlib is missing (`pip install kdqat[report]`)")
