"""The format contract: everything that decides the stored bits of a model, as plain data.

Three nested descriptions: a `QuantSpec` says how one tensor is stored, a `LayerScheme` what one layer does, a
`QuantPlan` which layer of a model has which scheme. The plan travels with every checkpoint and export, so that
loading never asks for bits and group sizes again. Training rounds to exactly what the spec says is stored; an
export therefore writes codes and never recomputes them.

This file imports no torch: `kdqat report` and `kdqat --help` read it too.
"""

from kdqat.spec.allocation import ALLOCATION_FILE, Allocation, Choice, describe_budget, explain_allocation
from kdqat.spec.formats import NumberFormat, number_format
from kdqat.spec.layer_scheme import DeployOnly, KVCacheScheme, LayerScheme
from kdqat.spec.parse import parse_kv_cache, parse_scheme, preset, preset_name
from kdqat.spec.plan import PLAN_FILE, LayerShape, QuantPlan
from kdqat.spec.presets import KV_PRESETS, PRESETS
from kdqat.spec.quant_spec import QuantSpec
from kdqat.spec.quanto import quanto_group_size, quanto_scheme
from kdqat.spec.scale_dtype import ScaleDtype
from kdqat.spec.scores import SCORES_FILE, Scores, Unit, scheme_names

__all__ = [
    "ALLOCATION_FILE",
    "KV_PRESETS",
    "PLAN_FILE",
    "PRESETS",
    "SCORES_FILE",
    "Allocation",
    "Choice",
    "DeployOnly",
    "KVCacheScheme",
    "LayerScheme",
    "LayerShape",
    "NumberFormat",
    "QuantPlan",
    "QuantSpec",
    "ScaleDtype",
    "Scores",
    "Unit",
    "describe_budget",
    "explain_allocation",
    "number_format",
    "parse_kv_cache",
    "parse_scheme",
    "preset",
    "preset_name",
    "quanto_group_size",
    "quanto_scheme",
    "scheme_names",
]
