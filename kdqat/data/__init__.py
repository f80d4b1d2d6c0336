"""Text on its way to the model: sources, packing, shuffling that resumes exactly, chat labels, evaluation windows.

    row {"text": ...} -> texts -> blocks (tokenize, pack) -> cache -> loader -> Batch

A data module is what a recipe names under `data`: `PackedText`, `PythonDocs`, `ChatTurns`. It gets the student's
tokenizer through `bind` and serves `kdqat.types.Batch`.
"""

from kdqat.data.base import TextData
from kdqat.data.blocks import Rows, pack_documents
from kdqat.data.chat import ChatTurns
from kdqat.data.loader import BlockLoader
from kdqat.data.python_docs import PythonDocs
from kdqat.data.stream import StreamLoader
from kdqat.data.text import PackedText
from kdqat.data.texts import Texts, TextSource, iter_documents, read_documents
from kdqat.data.windows import windows

__all__ = [
    "BlockLoader",
    "ChatTurns",
    "PackedText",
    "PythonDocs",
    "Rows",
    "StreamLoader",
    "TextData",
    "TextSource",
    "Texts",
    "iter_documents",
    "pack_documents",
    "read_documents",
    "windows",
]
