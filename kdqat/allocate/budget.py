"""What allocators with a budget share: what is fixed, what is free, what gets a scheme as one, and what it may take.

Weights are counted with their scales and zero points (`QuantSpec.storage_bits`), as `QuantPlan.average_bits` does: a
budget of 3.0 bits is 3.0 in every table. Overrides and embeddings are counted too; they are in the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdqat.allocate.base import matches
from kdqat.allocate.families import families_of
from kdqat.allocate.uniform import Uniform
from kdqat.spec import Choice, LayerScheme, QuantPlan, Scores, preset_name
from kdqat.types import EMBEDDING, LayerRef


@dataclass(frozen=True)
class Atom:
    """What gets one scheme: a block, a family, or a layer; with its score and, where measured, costs by scheme."""

    name: str
    layers: tuple[LayerRef, ...]
    importance: float
    cost: Mapping[LayerScheme, float]

    def bits(self, scheme: LayerScheme) -> float:
        """What its weights take in `scheme`, scales and zero points included.

        Raises:
            ValueError: naming the layer that the scheme does not fit.
        """
        assert scheme.weight is not None
        total = 0.0
        for layer in self.layers:
            try:
                total += scheme.weight.storage_bits(layer.shape)
            except ValueError as error:
                raise ValueError(f"layer {layer.name}: {error}") from None
        return total

    @property
    def numel(self) -> int:
        """Weights."""
        return sum(math.prod(layer.shape) for layer in self.layers)


@dataclass(frozen=True)
class Budget:
    """Either `average_bits` of all planned layers, or `megabytes` (10^6 bytes) that their weights may take.

    Raises:
        ValueError: unless exactly one of them is given, and above 0.
    """

    average_bits: float | None
    megabytes: float | None

    def __post_init__(self) -> None:
        if (self.average_bits is None) == (self.megabytes is None):
            raise ValueError("plan: give average_bits or megabytes, one of the two")
        if (self.average_bits or 0) <= 0 and (self.megabytes or 0) <= 0:
            raise ValueError(f"plan: a budget is above 0: {self}")

    def __str__(self) -> str:
        return f"{self.average_bits} average bits" if self.megabytes is None else f"{self.megabytes} MB"

    def bits(self, numel: int) -> float:
        """For `numel` weights in all."""
        return self.megabytes * 8e6 if self.megabytes is not None else (self.average_bits or 0) * numel

    def require_between(self, lowest: float, highest: float, numel: int) -> None:
        """
        Raises:
            ValueError: naming the nearest budget there is, if this one is less than everything at its lowest takes, or
                an average above what everything at its highest takes.
        """
        wanted = self.bits(numel)
        if wanted < lowest:
            nearest = self._named(lowest, numel, math.ceil)
            raise ValueError(f"plan: {self} are too few: the lowest schemes take {nearest}; use that or lower ones")
        if self.megabytes is None and wanted > highest + 1e-6 * numel:  # six digits, as the message gives them
            nearest = self._named(highest, numel, math.floor)
            raise ValueError(f"plan: {self} are too many: the highest schemes take {nearest}; give that or less")

    def _named(self, bits: float, numel: int, rounded: Callable[[float], int]) -> str:
        """`bits` for `numel` weights, said as the budget is, so that it can be given as one."""
        unit, size = ("megabytes", 8e6) if self.megabytes is not None else ("average_bits", float(numel))
        return f"{rounded(bits / size * 1e6) / 1e6:.6f} {unit}"


class Split:
    """A model's layers as a base plan has them, and what of it the budget decides.

    Attributes:
        base: the plan with everything undecided at the lowest scheme.
        atoms: what is free, in the model's order.
        fixed: layer -> scheme, for overrides and embeddings.
        fixed_bits, numel: what they take, and all planned weights.

    Raises:
        ValueError: if the scores are of another model, or a layer that the plan needs a scheme for has no score.
    """

    def __init__(self, base: Uniform, layers: Sequence[LayerRef], scores: Scores, *, tie_families: bool, where: str):
        self.base = base.allocate(layers)
        planned = [layer for layer in layers if layer.name in self.base]
        free = [layer for layer in planned if layer.role != EMBEDDING
                and not any(matches(pattern, layer) for pattern in base.overrides)]  # fmt: skip
        names = {layer.name for layer in free}
        self.fixed = {layer.name: self.base[layer.name] for layer in planned if layer.name not in names}
        self._families = families_of([layer for layer in layers if layer.role != EMBEDDING])
        self._tie, self._where = tie_families, where
        self.atoms = self._atoms(layers, free, scores)
        self.numel = sum(math.prod(layer.shape) for layer in planned if self.base[layer.name].weight)
        self.fixed_bits = sum(
            scheme.weight.storage_bits(layer.shape)
            for layer in planned
            if (scheme := self.fixed.get(layer.name)) is not None and scheme.weight is not None
        )

    def _atoms(self, layers: Sequence[LayerRef], free: Sequence[LayerRef], scores: Scores) -> list[Atom]:
        there = {layer.name for layer in layers}
        unit_of = scores.unit_of()
        for name in unit_of:
            if name not in there:
                raise ValueError(f"{self._where}: the model has no layer {name!r}; are these another model's scores?")
        for layer in free:
            if layer.name not in unit_of:
                raise ValueError(
                    f"{self._where}: layer {layer.name!r} has no score; put it into `ignore` or `overrides`, or score "
                    "the model again"
                )
        if scores.unit == "block":
            blocks: dict[str, list[LayerRef]] = {}
            for layer in free:
                blocks.setdefault(unit_of[layer.name], []).append(layer)
            return [_atom(name, group, scores, [name]) for name, group in blocks.items()]
        groups = families_of(free) if self._tie else [[layer] for layer in free]
        return [_atom(group[0].name, group, scores, [layer.name for layer in group]) for group in groups]

    def bits(self, chosen: Mapping[str, LayerScheme]) -> float:
        """What all planned weights take where each atom has the scheme `chosen` for its name."""
        return self.fixed_bits + sum(atom.bits(chosen[atom.name]) for atom in self.atoms)

    def choices(self, chosen: Mapping[str, LayerScheme], ranked: Sequence[Atom]) -> tuple[Choice, ...]:
        """What each atom got; `ranked` has the most important one first."""
        rank = {atom.name: place for place, atom in enumerate(ranked, start=1)}
        found = []
        for atom in self.atoms:
            scheme, layers = chosen[atom.name], tuple(layer.name for layer in atom.layers)
            bits = atom.bits(scheme) / atom.numel
            label, cost = scheme_label(scheme), atom.cost.get(scheme)
            found.append(Choice(atom.name, layers, rank[atom.name], atom.importance, label, bits, cost))
        return tuple(found)

    @property
    def labels_of_fixed(self) -> dict[str, str]:
        """Layer -> the name of its scheme, for what is fixed."""
        return {name: scheme_label(scheme) for name, scheme in self.fixed.items()}

    def plan(self, chosen: Mapping[str, LayerScheme]) -> QuantPlan:
        """The plan where each atom has the scheme `chosen` for its name; families are stated."""
        layers = dict(self.base.layers)
        for atom in self.atoms:
            scheme = chosen[atom.name]
            for layer in atom.layers:  # an output that the base gives (a KV cache before RoPE) stays
                layers[layer.name] = replace(scheme, output=scheme.output or layers[layer.name].output)
        names = [tuple(layer.name for layer in family) for family in self._families if len(family) > 1]
        # an override or `ignore` may have split one: then an engine cannot fuse it
        whole = [f for f in names if all(name in layers for name in f) and len({layers[n].weight for n in f}) == 1]
        return replace(self.base, layers=layers, families=tuple(whole))


def _atom(name: str, group: Sequence[LayerRef], scores: Scores, units: Sequence[str]) -> Atom:
    """Costs of a group add up; it is as important as its most important part."""
    cost = {}
    if scores.cost:
        cost = {s: sum(scores.cost[unit][key] for unit in units) for key, s in scores.schemes.items()}
    return Atom(name, tuple(group), max(scores.importance[unit] for unit in units), cost)


def read_scores(scores: str | Scores) -> tuple[Scores, str]:
    """The scores, and how to call them in errors.

    Raises:
        ValueError: naming the file, if it is not there or not valid.
    """
    if isinstance(scores, Scores):
        return scores, "scores"
    return Scores.load(Path(scores)), scores


def scheme_label(scheme: LayerScheme) -> str:
    """The preset's name, or the weight's format."""
    return preset_name(scheme) or (scheme.weight.format if scheme.weight else "full precision")


def require_levels(key: str, schemes: Sequence[LayerScheme], at_least: int) -> None:
    """
    Raises:
        ValueError: for too few schemes, one without a weight, or two that are equal.
    """
    if len(schemes) < at_least:
        raise ValueError(f"plan.{key}: give {at_least} or more schemes, e.g. [W4A16_G64, W2A16_ASYM_G64]")
    for scheme in schemes:
        if scheme.weight is None:
            raise ValueError(f"plan.{key}: a scheme without a weight costs no bits; leave such layers to `ignore`")
        if list(schemes).count(scheme) > 1:
            raise ValueError(f"plan.{key}: {scheme_label(scheme)} is there twice")
