"""Learned scales of every format survive: save, start a fresh Python, build from the spec alone, load strictly."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from kdqat.quant import LSQ
from kdqat.spec import PRESETS
from tests.quant.specs import ALL_GRIDS, NESTED_GRIDS, SOME_GRIDS, STATIC_GRIDS

READER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from kdqat.quant import LSQ, Fixed
from kdqat.spec import QuantSpec
from kdqat.types import QParams

folder = Path(sys.argv[1])
state, bad = load_file(folder / "state.safetensors"), []
specs = [QuantSpec(**spec) for spec in json.loads((folder / "specs.json").read_text())]
for index, spec in enumerate(specs):
    own = {k.split(".", 1)[1]: v for k, v in state.items() if k.startswith(f"{index}.")}
    weight, values = own.pop("weight"), own.pop("values")
    stored = {k.removeprefix("stored_"): own.pop(k) for k in list(own) if k.startswith("stored_")}
    lsq, fixed = LSQ(spec, weight.shape), Fixed(spec, weight.shape)
    lsq.load_state_dict(own, strict=True)
    fixed.load_qparams(QParams(stored["scale"], stored["zero_point"]), stored)
    if not (torch.equal(lsq(weight), values) and torch.equal(fixed(weight), values)):
        bad.append(spec)
print(len(specs), "formats;", bad or "all the same")
"""


def test_lsq_on_every_format_is_saved_and_strictly_loaded_by_a_fresh_process(tmp_path: Path) -> None:
    presets = [scheme.weight for scheme in PRESETS.values()]
    wanted = list(dict.fromkeys([*ALL_GRIDS, *SOME_GRIDS, *NESTED_GRIDS, *STATIC_GRIDS, *presets]))
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    for index, spec in enumerate(wanted):
        weight = torch.randn(2, 256)
        quantizer = LSQ(spec, weight.shape)
        quantizer.load_qparams(quantizer.initial_qparams(quantizer.groups(weight)))
        optimizer = torch.optim.Adam([latent := nn.Parameter(weight), *quantizer.parameters()], lr=1e-3)
        quantizer(latent).square().sum().backward()
        optimizer.step()  # scales that no initializer would give
        own = {**quantizer.state_dict(), "weight": latent, "values": quantizer(latent)}
        stored = {**quantizer.stored_qparams(latent)._asdict(), **quantizer.second_level(latent)}
        own |= {f"stored_{name}": tensor for name, tensor in stored.items()}
        state |= {f"{index}.{name}": tensor.detach().clone().contiguous() for name, tensor in own.items()}
    save_file(state, tmp_path / "state.safetensors")
    (tmp_path / "specs.json").write_text(json.dumps([asdict(spec) for spec in wanted]))
    done = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == f"{len(wanted)} formats; all the same\n", done.stderr[-2000:]
