"""How much each part of a model matters: what importance scorers measure and allocators spend bits by.

A file `scores.json` between the two, so that a measurement of hours serves many budgets. Plain data, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from kdqat.files import read_json_as, write_json_as
from kdqat.spec.layer_scheme import LayerScheme
from kdqat.spec.parse import parse_scheme, preset_name

SCORES_FILE = "scores.json"
Unit = Literal["block", "layer"]


@dataclass(frozen=True)
class Scores:
    """What a method says about the blocks or the layers of one model.

    Args:
        method: the scorer's class name.
        unit: what is scored: "block" or "layer".
        importance: unit name ("model.layers.3", or a layer's full name) -> score. Higher: give it more bits.
        members: unit name -> the layers it is made of.
        cost: unit name -> scheme name -> what it costs to give the unit that scheme; empty where a method does not
            measure candidates. Costs of different units add up, roughly.
        schemes: what the names in `cost` mean.
        settings: the scorer's arguments.
        model: fingerprint of the scored model.
        text: digest of the token ids it was scored on; None for methods without text.

    Raises:
        ValueError: for numbers that are not finite, and for parts that do not fit together.
    """

    method: str
    unit: Unit
    importance: Mapping[str, float]
    members: Mapping[str, tuple[str, ...]]
    cost: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    schemes: Mapping[str, LayerScheme] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.unit not in get_args(Unit):
            raise ValueError(f"scores: unit {self.unit!r} is unknown: use {' or '.join(get_args(Unit))}")
        if not self.importance or set(self.importance) != set(self.members):
            raise ValueError("scores: importance and members must name the same units, and at least one")
        if self.cost and set(self.cost) != set(self.importance):
            raise ValueError("scores: cost must name the same units as importance, or none")
        for name, number in self.importance.items():
            if not math.isfinite(number):
                raise ValueError(f"scores: the importance of {name} is {number}, no finite number; score it again")
        for name, costs in self.cost.items():
            if set(costs) != set(self.schemes):
                raise ValueError(f"scores: the costs of {name} are not those of the schemes {sorted(self.schemes)}")
            if not all(map(math.isfinite, costs.values())):
                raise ValueError(f"scores: a cost of {name} is no finite number; score it again")

    def unit_of(self) -> dict[str, str]:
        """Layer name -> the unit it belongs to."""
        return {layer: unit for unit, layers in self.members.items() for layer in layers}

    def ranking(self) -> list[str]:
        """Units, the most important first; equal ones in the model's order."""
        return sorted(self.importance, key=lambda name: -self.importance[name])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "version": 1,
            "method": self.method,
            "unit": self.unit,
            "settings": dict(self.settings),
            "model": self.model,
            "text": self.text,
            "schemes": {name: asdict(scheme) for name, scheme in self.schemes.items()},
            "units": {
                name: {
                    "importance": self.importance[name],
                    **({"cost": dict(self.cost[name])} if self.cost else {}),
                    "layers": list(self.members[name]),
                }
                for name in self.importance
            },
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        """Inverse of `to_json`.

        Raises:
            ValueError: if the data is no scores of this version.
        """
        if not isinstance(data, Mapping) or data.get("version") != 1 or not {"method", "unit", "units"} <= set(data):
            raise ValueError("these are no scores of version 1 (keys: version, method, unit, units)")
        units = data["units"]
        return cls(
            method=data["method"],
            unit=data["unit"],
            importance={name: float(unit["importance"]) for name, unit in units.items()},
            members={name: tuple(unit["layers"]) for name, unit in units.items()},
            cost={name: dict(unit["cost"]) for name, unit in units.items() if "cost" in unit},
            schemes={name: parse_scheme(scheme) for name, scheme in data.get("schemes", {}).items()},
            settings=data.get("settings", {}),
            model=data.get("model"),
            text=data.get("text"),
        )

    def save(self, path: Path) -> None:
        """Write JSON to `path` (a file, or a folder that gets `scores.json`), whole or not at all."""
        write_json_as(path, SCORES_FILE, self.to_json())

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Read scores from a file, or from the folder that holds them.

        Raises:
            ValueError: if there are none, or they are not valid; the message names the file.
        """
        return read_json_as(path, SCORES_FILE, cls.from_json, "`kdqat score RECIPE` writes it")


def scheme_names(schemes: list[LayerScheme]) -> dict[str, LayerScheme]:
    """Schemes by the preset's name, or scheme0, scheme1 ... where there is none."""
    return {preset_name(scheme) or f"scheme{i}": scheme for i, scheme in enumerate(schemes)}
