"""The signed 8-bit dynamic map: the 256 numbers on which QLoRA stores its scales a second time.

i = 0 ... 6: 2^i equal bins of [0.1, 1], times 10^(i-6), by their midpoints and with both signs; and 0 and 1
(bitsandbytes, functional.create_dynamic_map; 8-bit optimizers, arXiv 2110.02861).
"""

from __future__ import annotations

import torch


def dynamic_map() -> tuple[float, ...]:
    """Its 256 numbers in ascending order, in fp32."""
    values = [torch.zeros(1), torch.ones(1)]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        values += [middles, -middles]
    return tuple(torch.cat(values).sort().values.tolist())


DYNAMIC_MAP = dynamic_map()
