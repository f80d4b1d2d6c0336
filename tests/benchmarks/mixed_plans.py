"""Plans of mixed bits for SmolLM2-135M at given budgets, to be trained by `smollm2_sweep.py` beside uniform ones.

    python tests/benchmarks/mixed_plans.py MODEL DATA_DIR OUT_DIR BUDGET [BUDGET ...] [rows=N]

For each BUDGET (average bits, counted with scales), of symmetric 4, 3 and 2 bits in groups of 64: `knapsack` on costs
of OutputKL by layer, `lim` (4 and 2 bits by LIM's ranking of blocks, the paper's two levels), `random-S` (the
knapsack's candidates in a random order, families tied as in it, at the same bytes), and of the two widths next to the
budget alone `pair` (a knapsack), `lim-pair` and `pair-random-S`. OUT_DIR/NAME-BUDGET.json is what `FromFile` reads;
the scores lie beside them, and are not measured again. Calibration is text that evaluation does not see.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from kdqat.allocate import BitAllocator, ByImportance, Knapsack, Uniform
from kdqat.importance import LIM, ImportanceScorer, OutputKL
from kdqat.models import ModelSource, SplitModel, layer_refs, plannable_refs
from kdqat.spec import Scores
from kdqat.types import LayerRef
from tests.benchmarks.smollm2_sweep import calibration

LEVELS = ["W4A16_G64", "W3A16_G64", "W2A16_HALF_G64"]
SEEDS = 3


def main(path: str, data_dir: str, out_dir: str, *arguments: str) -> None:
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    rows = [int(a.removeprefix("rows=")) for a in arguments if a.startswith("rows=")]
    source = ModelSource(path)
    split = SplitModel(source.load_model()).to("cuda" if torch.cuda.is_available() else "cpu")
    text = calibration(Path(data_dir))
    batches = replace(text, num_rows=rows[0] if rows else text.num_rows).batches(source.load_tokenizer())
    refs = layer_refs(split.model)
    started = time.monotonic()
    costs = scored(OutputKL(LEVELS, unit="layer"), out / "output_kl", split, refs, batches)
    lim = scored(LIM(), out / "lim", split, refs, batches)
    print(f"scored in {time.monotonic() - started:.0f} s", flush=True)
    widths = {level: Uniform(level).allocate(plannable_refs(split.model)).average_bits(refs) for level in LEVELS}
    for budget in (float(a) for a in arguments if "=" not in a):
        allocators: dict[str, BitAllocator] = {
            "knapsack": Knapsack(costs, average_bits=budget),
            "lim": ByImportance(lim, [LEVELS[0], LEVELS[-1]], average_bits=budget),
        }
        below = next(level for level in LEVELS if widths[level] <= budget)
        pair = [LEVELS[LEVELS.index(below) - 1], below]
        allocators["pair"] = Knapsack(costs, schemes=pair, average_bits=budget)
        allocators["lim-pair"] = ByImportance(lim, pair, average_bits=budget)
        for prefix, levels in (("random", LEVELS), ("pair-random", pair)):
            for seed in range(SEEDS):
                random = ByImportance(costs, levels, average_bits=budget, order="random", seed=seed)
                allocators[f"{prefix}-{seed}"] = random
        for name, allocator in allocators.items():
            plan = allocator.allocate(plannable_refs(split.model))
            plan.save(out / f"{name}-{budget}.json")
            counts = [sum(s.weight is not None and s.weight.bits == bits for s in plan.values()) for bits in (4, 3, 2)]
            print(f"{name}-{budget}: {plan.average_bits(refs):.3f} bits, layers at 4, 3, 2: {counts}")


def scored(scorer: ImportanceScorer, path: Path, split: SplitModel, refs: list[LayerRef], batches: list) -> Scores:
    """What `scorer` says, or what it said."""
    if path.exists():
        return Scores.load(path)
    scores = scorer.score(split, refs, batches)
    scores.save(path)
    return scores


if __name__ == "__main__":
    main(*sys.argv[1:])
