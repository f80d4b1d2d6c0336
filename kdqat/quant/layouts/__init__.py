"""Packed layouts: how serving formats lay integer codes into words and bytes, as pure functions and their inverses.

One file a format. A layout moves bits and knows neither scales nor models: codes go in as the format stores them
(unsigned), words come out. Exporters write with them and `kdqat.models.packed` reads with them; their oracles in the
tests are the formats' own libraries.
"""
