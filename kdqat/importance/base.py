"""What an importance scorer is: it gives each block, or each layer, of a full-precision model a number."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from rich.console import Console
from rich.progress import track

from kdqat.calibrate import text_digest
from kdqat.models import SplitModel, block_prefix
from kdqat.spec import LayerScheme, Scores, Unit, parse_scheme, preset_name, scheme_names
from kdqat.types import EMBEDDING, ROUTER, Batch, LayerRef

T = TypeVar("T")
Units = Mapping[str, tuple[str, ...]]  # unit name -> its layers
Costs = dict[str, dict[str, float]]  # unit name -> scheme name -> cost


@dataclass(frozen=True)
class Measured:
    """What `measure` found: unit -> importance, and where candidates were measured unit -> scheme name -> cost."""

    importance: Mapping[str, float]
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class ImportanceScorer(ABC):
    """Scores the units of a model: its blocks, or the layers in them.

    Attributes:
        needs: what `measure` must be given besides weights: "text".
        units: what this method can score.
        unit: what this scorer scores.
        schemes: the candidates it measures; empty for a method without costs.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    units: ClassVar[tuple[Unit, ...]] = ("block", "layer")
    unit: Unit
    schemes: Sequence[LayerScheme] = ()

    @abstractmethod
    def measure(self, split: SplitModel, units: Units, batches: Sequence[Batch]) -> Measured:
        """Importance of every unit, higher = more bits, and costs by the names of `scheme_names(self.schemes)`.

        The model comes in eval mode and full precision and must be left as it was.

        Args:
            units: unit name ("model.layers.3", or a layer's name) -> full names of its layers.
            batches: text for methods that need it; may be read several times.
        """

    def score(self, split: SplitModel, layers: Sequence[LayerRef], batches: Sequence[Batch] | None = None) -> Scores:
        """Scores of `layers`: those inside the blocks; routers, embeddings and what lies outside are left out.

        Raises:
            ValueError: if text is needed and there is none, or there is nothing to score.
        """
        name = type(self).__name__
        if self.needs and not batches:
            raise ValueError(
                f"score: {name} needs text, e.g. score.calibration: {{text: python_docs:train}} (or model.calibration)"
            )
        units = units_of(layers, self.unit, block_prefix(split.model))
        training = split.training
        try:
            measured = self.measure(split.eval(), units, batches or ())
        finally:
            split.train(training)
        schemes = scheme_names(list(self.schemes)) if measured.cost else {}
        text = text_digest(batches) if batches and self.needs else None
        return Scores(
            name, self.unit, measured.importance, units, measured.cost, schemes, settings=self.settings(), text=text
        )

    def settings(self) -> dict[str, Any]:
        """The arguments as plain data."""
        return {key: _plain(value) for key, value in vars(self).items()}


def check_unit(scorer: ImportanceScorer, unit: Unit) -> Unit:
    """`unit`, if this method can score it.

    Raises:
        ValueError: naming those it can.
    """
    if unit not in scorer.units:
        raise ValueError(f"{type(scorer).__name__}: unit is {' or '.join(scorer.units)}, not {unit!r}")
    return unit


def candidates(scorer: ImportanceScorer, schemes: Sequence[str | LayerScheme | dict]) -> list[LayerScheme]:
    """`schemes` parsed, the most bits first.

    Raises:
        ValueError: for one without a weight, or two that are equal.
    """
    parsed = [parse_scheme(scheme) for scheme in schemes]
    for scheme in parsed:
        if scheme.weight is None or parsed.count(scheme) > 1:
            raise ValueError(f"{type(scorer).__name__}: schemes are different ones, each with a weight: {schemes}")
    return sorted(parsed, key=lambda scheme: -scheme.weight.bits if scheme.weight else 0.0)


def gain(cost: Mapping[str, float], schemes: Sequence[LayerScheme]) -> float:
    """What the candidate with the most bits saves over that with the fewest; of a single candidate its cost."""
    names = list(scheme_names(list(schemes)))
    return cost[names[-1]] - (cost[names[0]] if len(names) > 1 else 0.0)


def units_of(layers: Sequence[LayerRef], unit: Unit, prefix: str) -> dict[str, tuple[str, ...]]:
    """Unit name -> its layers, in the model's order; `prefix` stands in front of a block's number.

    Raises:
        ValueError: if no layer lies in a block.
    """
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.block is not None and layer.role not in (ROUTER, EMBEDDING):
            found.setdefault(f"{prefix}{layer.block}" if unit == "block" else layer.name, []).append(layer.name)
    if not found:
        raise ValueError("score: none of the layers lies in a transformer block, so there is nothing to score")
    return {name: tuple(names) for name, names in found.items()}


def progress(items: Sequence[T], text: str) -> Iterable[T]:
    """`items` with a progress bar, on a terminal."""
    console = Console(stderr=True)
    return track(items, text, console=console, transient=True, disable=not console.is_terminal)


def _plain(value: Any) -> Any:
    if isinstance(value, LayerScheme):
        return preset_name(value) or repr(value.weight)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
