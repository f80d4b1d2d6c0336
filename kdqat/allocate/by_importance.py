"""More bits for what matters more: a ranking, levels, a budget (Layer-Wise Quantization, https://arxiv.org/abs/2406.17415).

The paper takes two levels, 4 and 2 bits, and gives the upper one to the k most important blocks, with
k = round(L * (B - low) / (high - low)) from nominal bits. Here the ranking is walked from the top and an upgrade is
made where the counted bits, weighted by parameters, still fit; blocks may differ in size, and scales are paid for.
`count="nominal"` is the paper's rule.

With more than two levels the next upgrade is the one with the most gain per bit, where a gain is the unit's rank (as a
share: 1 for the most important) times what the step takes off the noise of rounding, 4^-bits: 6 dB a bit.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal, get_args

from kdqat.allocate.base import BitAllocator
from kdqat.allocate.budget import Atom, Budget, Split, read_scores, require_levels
from kdqat.allocate.uniform import DEFAULT_IGNORE, Uniform
from kdqat.spec import Allocation, DeployOnly, KVCacheScheme, LayerScheme, QuantPlan, Scores, parse_scheme
from kdqat.types import LayerRef

Order = Literal["score", "reversed", "random"]
Count = Literal["counted", "nominal"]


class ByImportance(BitAllocator):
    """Spends a budget on the units with the highest scores.

    Args:
        scores: a `scores.json` (`kdqat score` writes it), or the folder that holds one; in Python also the scores.
        levels: two or more schemes, the highest first.
        average_bits: of all planned layers, overrides and embeddings included.
        megabytes: instead of it, 10^6 bytes that their weights may take.
        count: "counted" bits include scales and zero points; "nominal" is the paper's k, for two levels and
            average_bits: so many units of the ranking, whatever their size.
        order: "score", "reversed" (the least important first), or "random" without regard to the scores.
        seed: of the random order.
        tie_families: q, k and v, gate and up, and the experts of a layer get one scheme, as engines fuse them.
        ignore, overrides, embeddings, kv_cache, kv_position, deploy_only: see Uniform; overrides are paid for too.

    Raises:
        ValueError: for arguments that do not go together; from `allocate`, for scores that are not there or of another
            model, and for a budget that cannot be met, naming the nearest one.
    """

    def __init__(
        self,
        scores: str | Scores,
        levels: Sequence[str | LayerScheme | dict],
        *,
        average_bits: float | None = None,
        megabytes: float | None = None,
        count: Count = "counted",
        order: Order = "score",
        seed: int = 0,
        tie_families: bool = True,
        ignore: Sequence[str] = DEFAULT_IGNORE,
        overrides: dict[str, str | LayerScheme | dict] | None = None,
        embeddings: str | LayerScheme | dict | None = None,
        kv_cache: str | KVCacheScheme | dict | None = None,
        kv_position: Literal["after_rope", "before_rope"] = "after_rope",
        deploy_only: Sequence[DeployOnly] = (),
    ) -> None:
        self.levels = [parse_scheme(level) for level in levels]
        require_levels("levels", self.levels, 2)
        bits = [level.weight.bits for level in self.levels if level.weight]
        if bits != sorted(bits, reverse=True) or len(set(bits)) < len(bits):
            raise ValueError(f"plan.levels: the highest first, each with fewer bits than the one before; not {bits}")
        if order not in get_args(Order) or count not in get_args(Count):
            raise ValueError(f"plan: order is {', '.join(get_args(Order))}; count is {', '.join(get_args(Count))}")
        if count == "nominal" and (average_bits is None or len(bits) > 2):
            raise ValueError("plan.count: nominal is the paper's rule: it needs two levels and average_bits")
        self.scores, self.count, self.order, self.seed = scores, count, order, seed
        self.budget, self.tie_families = Budget(average_bits, megabytes), tie_families
        self.base = Uniform(
            self.levels[-1],
            ignore=ignore,
            overrides=overrides,
            embeddings=embeddings,
            kv_cache=kv_cache,
            kv_position=kv_position,
            deploy_only=deploy_only,
        )

    def allocate(self, layers: Sequence[LayerRef]) -> QuantPlan:
        split, chosen, _, _ = self._decide(layers)
        return split.plan(chosen)

    def explain(self, layers: Sequence[LayerRef]) -> dict[str, Any]:
        split, chosen, ranked, scores = self._decide(layers)
        used = split.bits(chosen)
        # the nominal rule has no budget of counted bits to fall short of
        wanted = used if self.count == "nominal" else self.budget.bits(split.numel)
        order = f"random, seed {self.seed}" if self.order == "random" else self.order
        return Allocation(
            type(self).__name__,
            scores.method,
            order,
            f"{self.budget}, {self.count}",
            wanted,
            used,
            split.choices(chosen, ranked),
            split.labels_of_fixed,
        ).to_json()

    def _decide(self, layers: Sequence[LayerRef]) -> tuple[Split, dict[str, LayerScheme], list[Atom], Scores]:
        """(the layers, unit -> its scheme, the units ranked, the scores)."""
        scores, where = read_scores(self.scores)
        split = Split(self.base, layers, scores, tie_families=self.tie_families, where=where)
        ranked = self._ranked(split.atoms)
        levels = self._nominal(ranked) if self.count == "nominal" else self._walk(split, ranked)
        return split, {name: self.levels[level] for name, level in levels.items()}, ranked, scores

    def _ranked(self, atoms: Sequence[Atom]) -> list[Atom]:
        if self.order == "random":
            return random.Random(self.seed).sample(list(atoms), len(atoms))
        sign = 1 if self.order == "reversed" else -1
        return sorted(atoms, key=lambda atom: sign * atom.importance)  # stable: equal ones in the model's order

    def _nominal(self, ranked: Sequence[Atom]) -> dict[str, int]:
        high, low = (level.weight.bits for level in self.levels if level.weight)
        wanted = self.budget.average_bits or 0.0
        if not low <= wanted <= high:
            nearest = min((low, high), key=lambda bits: abs(bits - wanted))
            raise ValueError(f"plan: {wanted} average_bits lie outside {low:g} to {high:g}; the nearest is {nearest:g}")
        k = round(len(ranked) * (wanted - low) / (high - low))
        return {atom.name: int(place >= k) for place, atom in enumerate(ranked)}

    def _walk(self, split: Split, ranked: Sequence[Atom]) -> dict[str, int]:
        """From everything at the lowest level, the upgrade with the most gain per bit that fits, until none does."""
        lowest = len(self.levels) - 1
        sizes = {atom.name: [atom.bits(level) for level in self.levels] for atom in ranked}
        used = split.fixed_bits + sum(size[lowest] for size in sizes.values())
        highest = split.fixed_bits + sum(size[0] for size in sizes.values())
        self.budget.require_between(used, highest, split.numel)
        budget = self.budget.bits(split.numel)
        noise = [4.0**-level.weight.bits for level in self.levels if level.weight]
        width = [level.weight.bits for level in self.levels if level.weight]
        steps = []
        for place, atom in enumerate(ranked):
            share = 1 - place / len(ranked)
            for to in range(lowest):
                gain = share * (noise[to + 1] - noise[to]) / (width[to] - width[to + 1])
                steps.append((-gain, place, to, atom.name))
        chosen = dict.fromkeys(sizes, lowest)
        for _, _, to, name in sorted(steps):  # of one unit the lower step comes first: its gain is larger
            more = sizes[name][to] - sizes[name][to + 1]
            if chosen[name] == to + 1 and used + more <= budget * (1 + 1e-12):
                chosen[name], used = to, used + more
        return chosen
