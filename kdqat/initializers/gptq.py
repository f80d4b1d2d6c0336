"""GPTQ (https://arxiv.org/abs/2210.17323): rounding that lets later columns make good what earlier ones lost.

Each layer alone, for the least error of its output on calibration text: `gptq_solve.py`. Inputs are what the quantized
blocks before give (`sequential`). Inside a block all layers hear the block in full precision, in one pass; the
authors' "true sequential" order would need four, and a table of which layers share an input.

The latent weight becomes what its codes mean (`rewrite.py`), so that the student has exactly the codes found here.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from kdqat.calibrate import Hessian
from kdqat.initializers.base import Initializer
from kdqat.initializers.gptq_solve import solve
from kdqat.initializers.rewrite import (
    naming,
    quantized_layers,
    require_rows,
    round_to_nearest,
    without_inputs,
    write_values,
)
from kdqat.quant import QuantizedLayer, full_precision
from kdqat.types import BlockView


class GPTQ(Initializer):
    """Codes and scales of least layer output error, column by column.

    Embeddings have no inputs and round to nearest, with a warning; so does an lm_head tied to one. Fused experts and
    convolutions, whose inputs are not heard as rows of the weight's width, are refused.

    Args:
        damping: share of the mean diagonal that is added to the Hessian ("percdamp").
        act_order: columns in the order of falling input energy ("desc_act"); needs static_groups.
        static_groups: scales of groups from the weight as given, not as compensated when the group's turn comes.
        block_size: columns whose updates of the rest are gathered; changes speed and nothing else. With groups whose
            scales are found on the way it is rounded to whole groups.
        mse: scales of the least weight error |w - w^|^2.4 instead of the spec's rule.

    Raises:
        ValueError: for numbers that make no sense, or act_order without static_groups.
    """

    needs_calibration: ClassVar[bool] = True
    sequential = True  # nothing else is to be had: the latent weights before are quantized ones by then
    rewrites_weights = True

    def __init__(
        self,
        *,
        damping: float = 0.01,
        act_order: bool = False,
        static_groups: bool = False,
        block_size: int = 128,
        mse: bool = False,
    ) -> None:
        if damping < 0 or block_size < 1:
            raise ValueError("GPTQ needs damping >= 0 and block_size >= 1")
        if act_order and not static_groups:
            raise ValueError(
                "GPTQ: act_order permutes inputs, and formats here hold no list of who is in which group (g_idx): "
                "set static_groups: true with it"
            )
        self.damping, self.act_order, self.static_groups = damping, act_order, static_groups
        self.block_size, self.mse = block_size, mse

    @torch.no_grad()
    def initialize(self, block: BlockView) -> None:
        layers = quantized_layers(block.layers)
        tables = without_inputs(layers)
        round_to_nearest(tables, method="GPTQ", reason="an embedding is a lookup and has no inputs")
        heard = {name: Hessian() for name in layers if name not in tables}
        if not heard:
            return
        with full_precision(block.call.module):
            block.call.run(on_input={name: hessian.update for name, hessian in heard.items()})
        for name in list(heard):
            with naming(name):
                self._initialize(layers[name], heard.pop(name).matrix)

    def _initialize(self, layer: QuantizedLayer, hessian: Tensor) -> None:
        weight, quantizer = layer.as_matrix(layer.weight), layer.weight_fake_quantizer
        assert quantizer is not None
        require_rows(hessian, weight)
        solution = solve(
            weight,
            hessian,
            quantizer,
            damping=self.damping,
            act_order=self.act_order,
            static_groups=self.static_groups,
            block_size=self.block_size,
            mse=self.mse,
        )
        write_values(layer, solution.values, solution.qparams, quantizer.second_level(weight))
