"""Choosing layers of a model by what they are for, where they are, or what they are called."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

from kdqat.types import LayerRef


def select_layers(
    refs: Sequence[LayerRef],
    *,
    roles: Collection[str] | None = None,
    blocks: Collection[int] | None = None,
    layers: Collection[str] | None = None,
    who: str,
) -> list[LayerRef]:
    """Those of `refs` for which every condition given holds; all of them without one.

    Args:
        roles: "q", "o", "down" ...
        blocks: indices of transformer blocks; negative ones count from the last.
        layers: globs on full names ("*.layers.0.*").
        who: asks, for the errors.

    Raises:
        ValueError: for a condition that no layer meets, or if no layer meets all: it is a typo, and would pass in
            silence.
    """
    there = {ref.block for ref in refs if ref.block is not None}
    count = max(there, default=-1) + 1
    tests = {
        "roles": (roles, lambda ref, role: ref.role == role, sorted({ref.role for ref in refs})),
        "blocks": (
            blocks,
            lambda ref, block: ref.block == (block if block >= 0 else count + block),
            f"0 to {count - 1}",
        ),
        "layers": (layers, lambda ref, glob: fnmatchcase(ref.name, glob), [ref.name for ref in refs[:2]]),
    }
    chosen = list(refs)
    for key, (wanted, meets, known) in tests.items():
        if wanted is None:
            continue
        for value in wanted:
            if not any(meets(ref, value) for ref in refs):
                raise ValueError(f"{who}: {key} {value!r} matches no layer of the plan; there are {known}")
        chosen = [ref for ref in chosen if any(meets(ref, value) for value in wanted)]
    if not chosen:
        raise ValueError(f"{who}: roles {roles}, blocks {blocks} and layers {layers} together match no layer")
    return chosen
