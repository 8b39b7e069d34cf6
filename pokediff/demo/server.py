"""Serves the page: to this machine alone unless told otherwise, without tunnel or telemetry, no file but its own."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pokediff.config import DemoConfig
from pokediff.demo.studio import LIMITS, Studio
from pokediff.drawing.sample import DEFAULT_CHECKPOINT
from pokediff.errors import PokediffError

# The page needs nothing from elsewhere, and a browser shall not fetch anything there (fonts, telemetry).
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "connect-src 'self' data: blob:",
        "media-src 'self' blob:",
        "worker-src 'self' blob:",
    )
)
Send = Callable[[dict[str, Any]], Awaitable[None]]


def serve(config: DemoConfig) -> None:
    """Load the model, open the page, and stay until Ctrl-C. Raises PokediffError when it cannot be served."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder goes then too
    folder = Path(tempfile.mkdtemp(prefix="pokediff-demo-")).resolve()
    page: Any = None
    try:
        page, options = prepare(config, folder)
        print(f"pokediff demo: http://{config.host}:{config.port} (Ctrl-C ends it)")
        page.launch(**options)
    except OSError as error:
        raise PokediffError(f"cannot serve on {config.host}:{config.port}: {error}") from None
    finally:
        if page is not None:
            page.close()
        shutil.rmtree(folder, ignore_errors=True)


def prepare(config: DemoConfig, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The page, and what `launch` wants to know. `folder` holds all files that it may serve."""
    # Read when Gradio is imported: nothing is reported, files lie in our folder, who left is noticed soon.
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=str(folder),
        GRADIO_HEARTBEAT_INTERVAL="0.4",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    try:
        import gradio.processing_utils
    except ImportError:
        raise PokediffError("the demo needs Gradio: pip install 'pokediff[demo]'") from None
    from PIL import Image
    from starlette.middleware import Middleware

    from pokediff.demo import show
    from pokediff.demo.page import make_page

    Image.MAX_IMAGE_PIXELS = LIMITS.upload_pixels // 2  # Pillow refuses twice that: a bomb is not decoded anywhere
    found = (index.parent for index in DEFAULT_CHECKPOINT.parent.glob("pokediff-*/model_index.json"))
    shipped = sorted(found, key=lambda folder: (len(folder.name), folder.name))  # 32, 64, 128: the smallest is chosen
    studio = Studio(config.checkpoint or shipped, folder, config.data)
    page = make_page(studio, Path(config.reports), Path(config.runs))
    page.queue(max_size=config.queue, api_open=False, status_update_rate=1)
    # Answers that nobody fetches are kept for so many sessions; 2,000, as it would be, are gigabytes.
    page._queue.pending_messages_per_session.max_size = 4 * (config.queue + 4)
    gradio.processing_utils.async_ssrf_protected_download = refuse_addresses
    font = ["ui-sans-serif", "system-ui", "sans-serif"]
    options: dict[str, Any] = dict(
        server_name=config.host,
        server_port=config.port,
        inbrowser=config.open,
        share=False,
        run_history=False,
        quiet=True,
        show_error=True,
        ssr_mode=False,
        enable_monitoring=False,
        state_session_capacity=32,  # every program that asks is a session of .4 MB, a page's holds its last film too
        max_file_size=LIMITS.upload_mb * 2**20,
        theme=gradio.themes.Soft(primary_hue="violet", font=font, font_mono=["ui-monospace", "monospace"]).set(
            button_primary_background_fill_hover="*primary_700",
            button_primary_background_fill_hover_dark="*primary_700",
        ),
        css=show.CSS,
        head=f"<script>{show.SCRIPT}</script>",
        footer_links=["settings"],
        app_kwargs={"middleware": [Middleware(Guard, folder=folder)]},
    )
    return page, options


class Guard:
    """In front of everything: files of our folder alone, wherever links lead; no fetching for others; a policy."""

    def __init__(self, app: Any, folder: Path) -> None:
        self.app, self.folder = app, folder

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if not self.allowed(scope["path"]):
            await answer(send, 403, "This file is not for you.")
            return

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await self.app(scope, receive, guarded)

    def allowed(self, path: str) -> bool:
        """Is this request for no file, or for one of ours? Where a link leads counts, not where it lies."""
        if any(name in path for name in ("/proxy=", "/deep_link", "/run-history")):
            return False
        for marker in ("/file=", "/file/"):
            if marker in path:
                try:
                    wanted = Path(unquote(path.partition(marker)[2]))
                    found = wanted.resolve()
                    return wanted.is_absolute() and found.is_relative_to(self.folder) and found.is_file()
                except (ValueError, OSError):  # no name that a file could have
                    return False
        return True


async def refuse_addresses(url: str, cache_dir: str) -> str:
    """In place of Gradio's download of whatever address a client sends for a file."""
    from gradio import Error

    raise Error("Send the file itself: addresses are not fetched.", print_exception=False)


HEADERS: Sequence[tuple[bytes, bytes]] = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


async def answer(send: Send, status: int, words: str) -> None:
    """A short plain answer."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": words.encode()})
