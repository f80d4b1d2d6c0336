"""Which layer of a model has which scheme: the artifact that travels with every checkpoint and export."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, get_args

from kdqat.files import read_json_as, write_json_as
from kdqat.spec.layer_scheme import DeployOnly, KVCacheScheme, LayerScheme
from kdqat.spec.parse import parse_kv_cache, parse_scheme, preset_name

PLAN_FILE = "quant_plan.json"


class LayerShape(Protocol):
    """What the bit accounting needs to know of a layer; `kdqat.types.LayerRef` is one."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class QuantPlan(Mapping[str, LayerScheme]):
    """Layer name -> scheme, for one model.

    Args:
        layers: the planned layers.
        ignored: matmul layers deliberately left in full precision.
        kv_cache: of keys and values after RoPE, in every block.
        deploy_only: fake quantizers that are off while training and on in evaluation and exports, of "activation",
            "output" and "kv_cache": train W4A16, deploy W4A4. Weights are the same in both, or codes would differ.
        families: planned layers that a serving engine fuses into one matmul (q, k and v; gate and up; the experts of a
            layer), as far as the plan's maker gave each family one scheme.

    Raises:
        ValueError: for an unknown word in deploy_only, or a family of layers that are not planned, or in two families.
    """

    layers: Mapping[str, LayerScheme]
    ignored: tuple[str, ...] = field(default=())
    kv_cache: KVCacheScheme | None = None
    deploy_only: tuple[DeployOnly, ...] = ()
    families: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        for word in self.deploy_only:
            if word not in get_args(DeployOnly):
                raise ValueError(f"deploy_only: {word!r} is unknown: use {', '.join(get_args(DeployOnly))}")
        seen: set[str] = set()
        for name in (name for family in self.families for name in family):
            if name not in self.layers or name in seen:
                fault = "is in two families" if name in seen else "is in a family but not planned"
                raise ValueError(f"families: layer {name!r} {fault}")
            seen.add(name)

    def __getitem__(self, name: str) -> LayerScheme:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def average_bits(self, layers: Sequence[LayerShape]) -> float:
        """Bits per weight of the planned layers, *counted*: scales and zero points included."""
        return self._average(layers, lambda spec, shape: spec.storage_bits(shape))

    def nominal_bits(self, layers: Sequence[LayerShape]) -> float:
        """Bits per weight of the planned layers without their scales: the figure papers print."""
        return self._average(layers, lambda spec, shape: spec.bits * math.prod(shape))

    def _average(self, layers: Sequence[LayerShape], bits_of: Any) -> float:
        planned = [(spec, layer.shape) for layer in layers if layer.name in self and (spec := self[layer.name].weight)]
        if not planned:
            raise ValueError("the plan quantizes none of these layers, so it has no average bits")
        return sum(bits_of(spec, shape) for spec, shape in planned) / sum(math.prod(shape) for _, shape in planned)

    def to_json(self) -> dict[str, Any]:
        """Plain data; equal schemes are written once."""
        names: dict[LayerScheme, str] = {}
        for scheme in self.values():
            names.setdefault(scheme, preset_name(scheme) or f"scheme{len(names)}")
        return {
            "version": 1,
            "schemes": {name: asdict(scheme) for scheme, name in names.items()},
            "layers": {layer: names[scheme] for layer, scheme in self.items()},
            "ignored": list(self.ignored),
            "kv_cache": None if self.kv_cache is None else asdict(self.kv_cache),
            "deploy_only": list(self.deploy_only),
            "families": [list(family) for family in self.families],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> QuantPlan:
        """Inverse of `to_json`.

        Raises:
            ValueError: if the data is no plan of this version.
        """
        if not isinstance(data, Mapping) or data.get("version") != 1 or not {"schemes", "layers"} <= set(data):
            raise ValueError("this is no quantization plan of version 1 (keys: version, schemes, layers, ignored)")
        schemes = {name: parse_scheme(scheme) for name, scheme in data["schemes"].items()}
        missing = set(data["layers"].values()) - set(schemes)
        if missing:
            raise ValueError(f"the plan's layers name schemes it does not define: {sorted(missing)}")
        return cls(
            {n: schemes[s] for n, s in data["layers"].items()},
            tuple(data.get("ignored", ())),
            None if data.get("kv_cache") is None else parse_kv_cache(data["kv_cache"]),
            tuple(data.get("deploy_only", ())),
            tuple(tuple(family) for family in data.get("families", ())),
        )

    def save(self, path: Path) -> None:
        """Write JSON to `path` (a file, or a folder that gets `quant_plan.json`), whole or not at all."""
        write_json_as(path, PLAN_FILE, self.to_json())

    @classmethod
    def load(cls, path: Path) -> QuantPlan:
        """Read a plan from a file, or from the folder that holds one.

        Raises:
            ValueError: if there is none, or it is not valid; the message names the file.
        """
        return read_json_as(path, PLAN_FILE, cls.from_json, "a plan is written by `kdqat quantize` and `fit`")
