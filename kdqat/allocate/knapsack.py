"""The least sum of measured costs within a budget: an exact multiple-choice knapsack.

Scores with costs say what each candidate scheme costs each unit (OutputKL: KL to full precision with only this unit
quantized). Their sum is what the plan is expected to cost, as if units did not interact; under about 4 bits they do, so
measure the plan as well (docs/layerwise.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from kdqat.allocate.base import BitAllocator
from kdqat.allocate.budget import Budget, Split, read_scores, require_levels, scheme_label
from kdqat.allocate.knapsack_solver import solve
from kdqat.allocate.uniform import DEFAULT_IGNORE, Uniform
from kdqat.spec import Allocation, DeployOnly, KVCacheScheme, LayerScheme, QuantPlan, Scores, parse_scheme
from kdqat.types import LayerRef


class Knapsack(BitAllocator):
    """Chooses for every unit one of the schemes that were measured: the least sum of costs that the budget allows.

    Args:
        scores: a `scores.json` with costs (`OutputKL`, `WeightSQNR`, `Fisher`, `HessianTrace`), or the folder that
            holds one; in Python also the scores.
        schemes: the candidates, two or more of those that were measured; None: all of them.
        average_bits: of all planned layers, counted with scales and zero points, overrides and embeddings included.
        megabytes: instead of it, 10^6 bytes that their weights may take.
        tie_families: q, k and v, gate and up, and the experts of a layer get one scheme, as engines fuse them.
        ignore, overrides, embeddings, kv_cache, kv_position, deploy_only: see Uniform; overrides are paid for too.

    Raises:
        ValueError: for arguments that do not go together; from `allocate`, for scores that are not there, of another
            model or without these costs, and for a budget that cannot be met, naming the nearest one.
    """

    def __init__(
        self,
        scores: str | Scores,
        *,
        schemes: Sequence[str | LayerScheme | dict] | None = None,
        average_bits: float | None = None,
        megabytes: float | None = None,
        tie_families: bool = True,
        ignore: Sequence[str] = DEFAULT_IGNORE,
        overrides: dict[str, str | LayerScheme | dict] | None = None,
        embeddings: str | LayerScheme | dict | None = None,
        kv_cache: str | KVCacheScheme | dict | None = None,
        kv_position: Literal["after_rope", "before_rope"] = "after_rope",
        deploy_only: Sequence[DeployOnly] = (),
    ) -> None:
        self.schemes = None if schemes is None else [parse_scheme(scheme) for scheme in schemes]
        if self.schemes is not None:
            require_levels("schemes", self.schemes, 2)
        self.scores, self.budget, self.tie_families = scores, Budget(average_bits, megabytes), tie_families
        self.base: dict[str, Any] = {
            "ignore": ignore,
            "overrides": overrides,
            "embeddings": embeddings,
            "kv_cache": kv_cache,
            "kv_position": kv_position,
            "deploy_only": deploy_only,
        }
        Uniform("W4A16", **self.base)  # refuses what it refuses now, before a model is loaded

    def allocate(self, layers: Sequence[LayerRef]) -> QuantPlan:
        split, chosen, _ = self._decide(layers)
        return split.plan(chosen)

    def explain(self, layers: Sequence[LayerRef]) -> dict[str, Any]:
        split, chosen, scores = self._decide(layers)
        ranked = sorted(split.atoms, key=lambda atom: -atom.importance)
        return Allocation(
            type(self).__name__,
            scores.method,
            "least cost",
            str(self.budget),
            self.budget.bits(split.numel),
            split.bits(chosen),
            split.choices(chosen, ranked),
            split.labels_of_fixed,
        ).to_json()

    def _decide(self, layers: Sequence[LayerRef]) -> tuple[Split, dict[str, LayerScheme], Scores]:
        scores, where = read_scores(self.scores)
        if not scores.cost:
            raise ValueError(
                f"{where}: {scores.method} measured no costs; Knapsack needs scores of OutputKL, WeightSQNR, or of "
                "Fisher or HessianTrace with schemes"
            )
        measured = list(scores.schemes.values())
        for scheme in self.schemes or ():
            if scheme not in measured:
                known = ", ".join(scores.schemes)
                raise ValueError(f"{where}: {scheme_label(scheme)} was not measured; there are costs of {known}")
        candidates = self.schemes or measured
        lowest = min(candidates, key=lambda scheme: scheme.weight.bits if scheme.weight else 0.0)
        split = Split(Uniform(lowest, **self.base), layers, scores, tie_families=self.tie_families, where=where)
        items = [[(atom.bits(scheme), atom.cost[scheme]) for scheme in candidates] for atom in split.atoms]
        ends = [split.fixed_bits + sum(end(option)[0] for option in items) for end in (min, max)]
        self.budget.require_between(ends[0], ends[1], split.numel)
        chosen = solve(items, self.budget.bits(split.numel) - split.fixed_bits)
        assert chosen is not None  # the budget holds the smallest options
        picked = {atom.name: candidates[option] for atom, option in zip(split.atoms, chosen, strict=True)}
        return split, picked, scores
