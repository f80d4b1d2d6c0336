"""The format contract: everything that decides the stored bits of a model, as plain data.

Three nested descriptions: a `QuantSpec` says how one tensor is stored, a `LayerScheme` what one layer does, a
`QuantPlan` which layer of a model has which scheme. The plan travels with every checkpoint and export, so that
loading never asks for bits and group sizes again. Training rounds to exactly what the spec says is stored; an
export therefore writes codes and never recomputes them.

This file imports no torch: `kdqat report` and `kdqat --help` read it too.
"""

from kdqat.spec.plan import PLAN_FILE, LayerShape, QuantPlan
from kdqat.spec.presets import PRESETS, parse_scheme, preset, preset_name
from kdqat.spec.quant_spec import LayerScheme, QuantSpec, ScaleDtype

__all__ = [
    "PLAN_FILE",
    "PRESETS",
    "LayerScheme",
    "LayerShape",
    "QuantPlan",
    "QuantSpec",
    "ScaleDtype",
    "parse_scheme",
    "preset",
    "preset_name",
]
