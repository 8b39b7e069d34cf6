"""Five patches of Gradio, where its public interface has no option.

Each checks that the attribute it replaces exists: with another version of Gradio the demo does not start, rather than
start without its limits. setup.cfg bounds the version.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio import networking, processing_utils
from gradio.components.base import server
from gradio.components.image_editor import AcceptBlobs

from pokediff.demo.uploads import decode
from pokediff.errors import PokediffError, first_line, printable

MAX_LAYERS, MAX_CANVASES = 4, 32


async def refuse_addresses(url: str, cache_dir: str) -> str:
    """Replaces Gradio's download of a URL that a client sends instead of a file."""
    raise gr.Error("Send the file itself: addresses are not fetched.", print_exception=False)


def forbid_downloads() -> None:
    """Disable Gradio's download of public URLs from clients, for which it has no option."""
    _require(processing_utils, "async_ssrf_protected_download")
    processing_utils.async_ssrf_protected_download = refuse_addresses


def start_on_a_busy_machine() -> None:
    """Gradio asks for the page once before it goes on, and ends when that takes 3 s, as if it needed a tunnel."""
    _require(networking, "url_ok")
    networking.url_ok = lambda url: True


def limit_sessions(page: gr.Blocks, number: int) -> None:
    """Keep unfetched results of this many sessions instead of Gradio's 2,000, which take gigabytes."""
    _require(page, "_queue")
    _require(page._queue, "pending_messages_per_session")
    _require(page._queue.pending_messages_per_session, "max_size")
    page._queue.pending_messages_per_session.max_size = number


def refuse_wrong_values(page: gr.Blocks) -> None:
    """Too few values, or values of another kind than a function takes, are one line for the client and in the log: to
    Gradio they are a mistake in the program, with a traceback, and it tells the client the addresses of its objects.
    A text that is missing is an empty one.
    """
    _require(page, "preprocess_data")
    preprocess = page.preprocess_data

    async def refusing(function: Any, *given: Any, **options: Any) -> list[Any]:
        try:
            values = await preprocess(function, *given, **options)
        except Exception as error:
            line = error.message if isinstance(error, gr.Error) else first_line(error)
            print(printable(f"refused: {line}"), file=sys.stderr)
            raise gr.Error(printable(line), print_exception=False) from None
        boxes = zip(function.inputs, values, strict=True)
        return ["" if value is None and isinstance(box, gr.Textbox) else value for box, value in boxes]

    page.preprocess_data = refusing  # type: ignore[method-assign, assignment]


def sketch_pad(**options: Any) -> gr.ImageEditor:
    """An image editor whose pictures are decoded by `uploads.decode`, with at most MAX_CANVASES waiting in memory.

    Its value is {"background": straight RGBA or None, "layers": [...]}, or {"refused": a sentence}. Methods are
    replaced on the instance: for a subclass Gradio would write a stub file beside this one.
    """
    editor = gr.ImageEditor(type="numpy", **options)
    for name in ("accept_blobs", "blob_storage", "preprocess"):
        _require(editor, name)
    canvas = Canvas(editor)
    editor.accept_blobs, editor.preprocess = canvas.accept, canvas.preprocess  # type: ignore[method-assign, assignment]
    return editor


class Canvas:
    """Replacements for the methods of one image editor."""

    def __init__(self, editor: gr.ImageEditor) -> None:
        self.editor, self.accepted = editor, editor.accept_blobs

    @server  # the mark of functions that a browser may call
    def accept(self, data: AcceptBlobs) -> None:
        """Keep the picture that the browser sends ahead of a request until the request arrives; drop the oldest."""
        index = data.data["index"]
        if index and index != "null" and int(index) >= MAX_LAYERS:
            raise gr.Error("Too many layers.", print_exception=False)
        waiting = self.editor.blob_storage
        while data.data["id"] not in waiting and len(waiting) >= MAX_CANVASES:
            waiting.pop(next(iter(waiting)))
        self.accepted(data)

    def preprocess(self, payload: Any) -> dict[str, Any] | None:
        """The value of the editor in a request."""
        if payload is not None and payload.id is not None:
            payload = self.editor.blob_storage.pop(payload.id, None)
        if payload is None:
            return None
        layers = [layer for layer in payload.layers or [] if layer]
        if len(layers) > MAX_LAYERS:
            return {"refused": "Too many layers."}
        try:
            background = _decoded(payload.background) if payload.background else None
            return {"background": background, "layers": [_decoded(layer) for layer in layers]}
        except PokediffError as error:
            return {"refused": str(error)}


def _decoded(part: Any) -> np.ndarray:
    return decode(part if isinstance(part, bytes) else Path(part.path).read_bytes())


def _require(owner: Any, name: str) -> None:
    if not hasattr(owner, name):
        raise PokediffError(f"the demo does not support Gradio {gr.__version__}: pip install 'pokediff[demo]'")
