"""Heatmaps block x role of one metric, a panel for each run, under one colour scale and one slider over steps.

The last step is drawn here; the slider (page.js) paints the cells anew from the values in `data-values`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape

from kdqat.report.page_chart import Bounds, log_ticks, place, scale_of, short, ticks
from kdqat.report.page_data import OUTSIDE, Cell, Signals, in_order

VIRIDIS = ("#440154", "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151", "#bddf26",
           "#fde725")  # fmt: skip
ABOUT = {
    "gradient/energy": "energy of weight gradients (sum of squares), before clipping",
    "gradient/energy_per_element": "mean square of weight gradients",
    "gradient/snr": "signal-to-noise of weight gradients",
    "gradient/update_ratio": "how far weights moved in one step, in grid steps",
    "gradient/probe_weight_energy": "energy of weight gradients on the probe, frozen layers included",
    "gradient/probe_activation_energy": "energy of gradients at layer outputs, on the probe",
    "gradient/ce_weight_energy_ratio": "weight gradient energy of the cross-entropy over the full-precision model's",
    "signal/sqnr_db": "SQNR of layer outputs to the teacher's, dB",
    "signal/gain": "energy of outputs over the teacher's",
    "signal/cosine": "cosine of outputs to the teacher's",
    "oscillation/flipped": "share of codes that one step flipped",
    "oscillation/oscillating": "share of codes that flipped back",
    "oscillation/clipped": "share of clipped weights",
    "oscillation/near_threshold": "share of weights next to a rounding threshold",
    "oscillation/scale_drift": "drift of scales, in factors of two",
}
MAIN = ("gradient/energy", "gradient/probe_weight_energy", "signal/sqnr_db", "oscillation/flipped")


def heatmaps(name: str, runs: Mapping[str, Signals]) -> str:
    """A figure: a panel for each run that has this metric.

    Args:
        name: "SOURCE/METRIC".
        runs: by the run's name.
    """
    values = [value for run in runs.values() for cells in run.steps.values() for value in cells.values()]
    bounds, log = scale_of(values, log=True if "energy" in name or _skewed(values) else None)
    cells = {cell for run in runs.values() for at in run.steps.values() for cell in at}
    blocks = sorted({block for block, _ in cells}, key=lambda block: (block == OUTSIDE, block))
    roles = in_order(role for _, role in cells)
    kind = "heat one" if len(runs) == 1 else "heat"
    steps = sorted({step for run in runs.values() for step in run.steps})
    panels = "".join(_panel(run, signals, cells, blocks, roles, bounds, log) for run, signals in runs.items())
    slider = (
        f'<label class="slider">step <input type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}" '
        f'data-steps="{json.dumps(steps)}" aria-label="step of {escape(name, quote=True)}"> '
        f"<output>{steps[-1]}</output></label>"
        if len(steps) > 1
        else f'<p class="slider">step {steps[-1]}</p>'
    )
    return (
        f'<figure class="{kind}" data-low="{bounds[0]!r}" data-high="{bounds[1]!r}" data-log="{int(log)}">'
        f"<figcaption><b>{escape(name)}</b> {escape(ABOUT.get(name, ''))}</figcaption>"
        f'<div class="controls">{slider}{_legend(bounds, log)}</div><div class="panels">{panels}</div></figure>'
    )


def _skewed(values: Sequence[float]) -> bool:
    """Whether most of a linear scale would stay empty: shares of codes that flip fall by orders of magnitude."""
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    return bool(positive) and min(finite) >= 0 and max(positive) > 30 * min(positive)


def colour(value: float, bounds: Bounds, log: bool) -> str:
    """The colour of a value; none ("") for what has no place on the scale: NaN, and zero under a logarithm."""
    if not math.isfinite(value) or (log and value <= 0):
        return ""
    where = place(value, bounds, log) * (len(VIRIDIS) - 1)
    index = min(int(where), len(VIRIDIS) - 2)
    share = where - index
    channels = zip(*(bytes.fromhex(VIRIDIS[i][1:]) for i in (index, index + 1)), strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in channels)


def _panel(
    run: str,
    signals: Signals,
    cells: Collection[Cell],
    blocks: Sequence[int],
    roles: Sequence[str],
    bounds: Bounds,
    log: bool,
) -> str:
    width, height, left, top = 38, (22 if len(blocks) <= 12 else 13), 46, 20
    steps = sorted(signals.steps)
    last = signals.steps[steps[-1]]
    parts = [
        f'<text x="{left + (i + 0.5) * width}" y="{top - 6}" text-anchor="middle">{escape(_short_role(role))}</text>'
        for i, role in enumerate(roles)
    ]
    for row, block in enumerate(blocks):
        label = "other" if block == OUTSIDE else str(block)
        parts.append(f'<text x="{left - 6}" y="{top + (row + 0.5) * height + 4}" text-anchor="end">{label}</text>')
        for column, role in enumerate(roles):
            series = [signals.steps[step].get((block, role)) for step in steps]
            if (block, role) not in cells:
                continue
            value = last.get((block, role))
            fill = "" if value is None else colour(value, bounds, log)
            parts.append(
                f'<rect x="{left + column * width}" y="{top + row * height}" width="{width - 1}" height="{height - 1}" '
                f'{f"fill={fill}" if fill else "class=none"} data-cell="{_cell_name((block, role))}" '
                f'data-tip="{_tip((block, role), value)}" data-values="{" ".join(map(_written, series))}"/>'
            )
    size = left + len(roles) * width, top + len(blocks) * height + 2
    finite = [value for value in last.values() if math.isfinite(value)]
    label = f"{signals.name} of {run} at step {steps[-1]}: {len(blocks)} blocks by roles {', '.join(roles)}"
    label += f"; from {short(min(finite))} to {short(max(finite))}" if finite else ""
    return (
        f'<div class="panel" data-steps="{json.dumps(steps)}"><h4>{escape(run)}</h4>'
        f'<svg viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" role="img" aria-label="{escape(label, quote=True)}">'
        f"{''.join(parts)}</svg></div>"
    )


def _legend(bounds: Bounds, log: bool) -> str:
    stops = ", ".join(VIRIDIS)
    marks = [mark for mark in (log_ticks(bounds) if log else ticks(bounds)) if bounds[0] <= mark <= bounds[1]]
    labels = "".join(f'<span style="left:{100 * place(mark, bounds, log):.1f}%">{short(mark)}</span>' for mark in marks)
    note = "log colour; grey: no value" + (", or zero" if log else "") if log else "grey: no value"
    return (
        f'<div class="scale"><div style="background:linear-gradient(to right, {stops})"></div><p>{labels}</p></div>'
        f'<span class="note">{note}</span>'
    )


def _cell_name(cell: Cell) -> str:
    block, role = cell
    return escape(f"block {block}, {role}" if block != OUTSIDE else role, quote=True)


def _tip(cell: Cell, value: float | None) -> str:
    return f"{_cell_name(cell)}: " + ("no value" if value is None else f"{value:.4g}")


def _written(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _short_role(role: str) -> str:
    return {"attention": "attn", "embedding": "emb", "lm_head": "head", "gate_up": "g+u"}.get(role, role[:6])
