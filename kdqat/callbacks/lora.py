"""LoraAdapters: train a low-rank update of the weights, and let the weights themselves rest.

Placement "inside" (Q(W + s B A) x, L4Q's, https://arxiv.org/abs/2402.04902) merges exactly: after training the student
is an ordinary one. "outside" (Q(W) x + s B A x, QLoRA's) keeps its adapters, because no low-bit weight is their sum;
`adapters.json` says what a merge would change. docs/lora.md has the maths and when to use which.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import lightning as L
import torch

from kdqat.files import whole_folder, write_text
from kdqat.models.lora import save_adapters
from kdqat.quant import FakeQuantizer, LoraAdapter, Placement
from kdqat.student import Student, attach_adapters, merge_adapters, merge_change
from kdqat.training import Checkpoints, Phase, StudentEdit
from kdqat.training.trainable import freeze_all_but

log = logging.getLogger(__name__)

ADAPTERS_FILE, ADAPTER_FOLDER = "adapters.json", "adapter"


class LoraAdapters(StudentEdit):
    """Adapters on linear layers of the plan; everything else but scales is frozen.

    Args:
        placement: inside the fake quantizer, or outside.
        roles, blocks, layers: which layers (see `select_layers`); without any of them all linear layers of the blocks.
        rank: of the update s B A.
        alpha: s times the rank.
        dropout: on the input of an adapter outside.
        train_scales: train what fake quantizers learn as well: all of them, LSQ's scales for one.

    Raises:
        ValueError: in `edit`, naming the layer.
    """

    phase: ClassVar[Phase] = Phase.ADAPT
    rests_weights: ClassVar[bool] = True

    def __init__(
        self,
        *,
        placement: Placement = "inside",
        roles: Collection[str] | None = None,
        blocks: Collection[int] | None = None,
        layers: Collection[str] | None = None,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        train_scales: bool = True,
    ) -> None:
        self.settings = {"placement": placement, "rank": rank, "alpha": alpha, "dropout": dropout}
        LoraAdapter(torch.Size((rank, rank)), **self.settings)  # type: ignore[arg-type]  # refuses what never fits
        self.roles, self.blocks, self.layers = roles, blocks, layers
        self.train_scales = train_scales
        self._frozen: list[torch.nn.Parameter] = []
        self._run: Path | None = None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        kept = any(isinstance(callback, Checkpoints) for callback in trainer.checkpoint_callbacks)
        self._run = Path(trainer.default_root_dir) if kept else None  # without checkpoints a run writes nothing

    def edit(self, student: Student) -> None:
        who = type(self).__name__
        new = attach_adapters(
            student, roles=self.roles, blocks=self.blocks, layers=self.layers, who=who, **self.settings
        )
        kinds = (LoraAdapter, FakeQuantizer) if self.train_scales else (LoraAdapter,)
        self._frozen += freeze_all_but(student.model, kinds)
        count = sum(p.numel() for adapter in student.adapters.values() for p in adapter.parameters())
        log.info("%s: %d adapters new, %d in all, %s numbers", who, new, len(student.adapters), f"{count:,}")

    def finish(self, student: Student) -> None:
        """Merge what is inside, measure what a merge would change outside, and write both down in the run directory."""
        inside = {n: layer for n, layer in student.layers.items() if n in student.adapters and _merges(layer.adapter)}
        if inside and self._run is not None:  # what student/ will hold merged; an adapter outside is saved with it
            with whole_folder(self._run / ADAPTER_FOLDER, overwrite=True) as folder:
                save_adapters(inside, folder, base=student.source.path)
        merged = merge_adapters(student)
        found = {"merged": merged, "outside": merge_change(student)}
        if self._run is not None and any(found.values()):
            about = {"layers": len(merged), "largest_change": max(merged.values(), default=0.0)}
            write_text(self._run / ADAPTERS_FILE, json.dumps({"merged": about, "outside": found["outside"]}, indent=1))
        for parameter in self._frozen:  # the student goes on as it came
            parameter.requires_grad_(True)
        self._frozen = []


def _merges(adapter: LoraAdapter | None) -> bool:
    return adapter is not None and adapter.placement == "inside"
