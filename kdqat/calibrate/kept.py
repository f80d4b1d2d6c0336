"""Statistics of layer inputs that outlive a run: a folder with one safetensors file for each block.

They belong to one model in one dtype and to one text, which every file names, so that nobody goes on with those of
another. Only what full-precision inputs give is kept: what quantized blocks give is of one plan and one method alone.

A Hessian of I inputs takes 4 * I^2 bytes: a block of SmolLM2-135M 13 MB, one of Llama-2-7B 0.7 GB.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kdqat.calibrate.statistics import Statistic
from kdqat.files import whole_file

log = logging.getLogger(__name__)

OUTSIDE = "outside_of_the_blocks"


class KeptStatistics:
    """Statistics in `folder`.

    Args:
        model: fingerprint of the source.
        dtype: of its weights and arithmetic.
        text: digest of the token ids.

    Attributes:
        used: something was read or kept.
    """

    def __init__(self, folder: Path, *, model: str, dtype: str, text: str) -> None:
        self.folder, self.about = Path(folder), {"model": model, "dtype": dtype, "text": text}
        self.used = self._said = False

    def fill(self, block: str, wanted: Mapping[str, Sequence[Statistic]], device: torch.device) -> bool:
        """Give `wanted`, by layer, what is kept of `block`; False, and nothing given, unless all of it is.

        Raises:
            ValueError: for statistics of another model, dtype or text, and for a file that cannot be read.
        """
        keys = {(name, i): _named(name, one) for name, several in wanted.items() for i, one in enumerate(several)}
        found = self._read(block, {key for names in keys.values() for key in names.values()})
        if found is None:
            return False
        for (name, i), names in keys.items():
            wanted[name][i].load({field: found[key].to(device) for field, key in names.items()})
        if not self._said:
            log.info("calibration: statistics of an earlier run are read from %s", self.folder)
        self.used = self._said = True
        return True

    def add(self, block: str, gathered: Mapping[str, Sequence[Statistic]]) -> None:
        """Keep `gathered` beside what is there of `block`."""
        tensors = self._read(block) or {}
        for name, several in gathered.items():
            for one in several:
                state = one.state()
                tensors |= {key: state[field].cpu().contiguous() for field, key in _named(name, one).items()}
        with whole_file(self._file(block)) as part:
            save_file(tensors, part, metadata=self.about)
        self.used = True

    def _file(self, block: str) -> Path:
        return self.folder / f"{block or OUTSIDE}.safetensors"

    def _read(self, block: str, wanted: set[str] | None = None) -> dict[str, Tensor] | None:
        """The tensors `wanted` of `block` (None: all there are); None if one is not there."""
        file = self._file(block)
        if not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as tensors:
                about, there = tensors.metadata() or {}, set(tensors.keys())
                for what, mine in self.about.items():
                    if about.get(what) != mine:
                        raise ValueError(
                            f"{file}: these statistics are of another {what}; name another folder "
                            "(model.calibration.keep), or remove this one"
                        )
                asked = there if wanted is None else wanted
                return {key: tensors.get_tensor(key) for key in asked} if asked <= there else None
        except SafetensorError as error:
            raise ValueError(f"{file}: {error}; remove it, and it is made again") from error


def _named(layer: str, statistic: Statistic) -> dict[str, str]:
    """Field -> the name of its tensor in a file."""
    return {field: f"{layer}/{type(statistic).__name__}/{field}" for field in statistic.fields}
