"""Line charts as inline SVG: axes with round numbers, a logarithm where values span decades, colours from the style."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from kdqat.report.page_data import Curve

COLOURS = 10  # --c0 to --c9 in page.css
WIDTH, HEIGHT = 430, 250
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 12, 38

Bounds = tuple[float, float]


def chart(
    title: str, curves: Mapping[str, Curve], colours: Sequence[str], *, bounds: Bounds, log: bool, steps: Bounds
) -> str:
    """One panel with its legend.

    Args:
        title: stands above it.
        curves: (step, value) points by name.
        colours: names in the order of colours, so that a name has one colour in all panels.
        bounds: of the values; panels that are compared share them.
        steps: of the steps.
    """

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - steps[0]) / max(steps[1] - steps[0], 1e-12)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * place(value, bounds, log)

    parts = []
    for tick in log_ticks(bounds) if log else ticks(bounds):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(steps):
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(tick)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    legend = []
    for name, curve in curves.items():
        index = colours.index(name)
        style = f'style="--c:var(--c{index % COLOURS})"' + (' class="dashed"' if index >= COLOURS else "")
        points = [(x(step), y(value), step, value) for step, value in curve if not log or value > 0]
        if points:
            line = " ".join(f"{px:.1f},{py:.1f}" for px, py, _, _ in points)
            parts.append(f'<g {style}><polyline points="{line}"/>{_dots(name, points)}</g>')
        legend.append(f"<li {style}><i></i>{escape(name)}</li>")
    label = escape(
        f"{title}: {', '.join(curves)} over steps, from {short(bounds[0])} to {short(bounds[1])}", quote=True
    )
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{" (log)" if log else ""}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f'<ul class="legend">{"".join(legend)}</ul></figure>'
    )


def _dots(name: str, points: Sequence[tuple[float, float, float, float]]) -> str:
    """Points with tooltips; of a long curve some can be seen, and all can be pointed at."""
    seen = 2.2 if len(points) <= 40 else 0
    return "".join(
        f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{seen or 3}"{"" if seen else " class=unseen"} '
        f'data-tip="{escape(name, quote=True)}, step {step:g}: {value:.4g}"/>'
        for px, py, step, value in points
    )


def place(value: float, bounds: Bounds, log: bool) -> float:
    """Where a value lies between the bounds, from 0 to 1."""
    low, high = bounds
    if log:
        value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def scale_of(values: Sequence[float], *, log: bool | None = None) -> tuple[Bounds, bool]:
    """Bounds of finite values, and whether a logarithm suits them: all positive, more than a factor of 30 apart.

    Args:
        log: ask for it, wherever there are positive values; None: decide.
    """
    finite = [value for value in values if math.isfinite(value)]
    positive = [value for value in finite if value > 0]
    if log is None:
        log = len(positive) == len(finite) and bool(finite) and max(finite) > 30 * min(finite)
    if log and positive:
        high = max(positive)
        return (max(min(positive), high * 1e-9), high), True
    return ((min(finite), max(finite)) if finite else (0.0, 1.0)), False


def ticks(bounds: Bounds) -> list[float]:
    """About five round numbers within the bounds."""
    low, high = bounds
    if high <= low:
        return [low]
    raw = (high - low) / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(bounds: Bounds) -> list[float]:
    """Powers of ten within the bounds, at most six; where there are fewer than two, round numbers."""
    low, high = math.ceil(math.log10(bounds[0]) - 1e-9), math.floor(math.log10(bounds[1]) + 1e-9)
    if high - low < 1:
        return [tick for tick in ticks(bounds) if tick > 0]
    stride = -(-(high - low + 1) // 6)
    return [10.0**power for power in range(low, high + 1, stride)]


def short(value: float) -> str:
    """A number in few letters."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
