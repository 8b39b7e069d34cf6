"""Serve the page: on this machine only by default, without tunnel or telemetry, and only its own files."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pokediff.config import DemoConfig
from pokediff.demo import uploads
from pokediff.errors import PokediffError, first_line, printable
from pokediff.files import LOCK, WRITER, own_folder
from pokediff.paths import shipped

FUNCTION = "sprite"  # the only public one
API = "/gradio_api/"
# What Gradio does there and the page does not need: requests to other servers, ffmpeg, editing a page's program.
REFUSED = ("proxy=", "deep_link", "run-history", "process_recording", "vibe-", "undo-vibe-edit")
LARGEST_BODY = 4 * uploads.MAX_MB * 2**20  # of a request: a canvas is up to three pictures
SHIPPED = ("pokediff", "creatures")  # the default checkpoints, as far as they exist
PREFIX, SERVED = "pokediff-demo-", "served"  # a temporary folder; inside it, beside its lock, that of the page's files
# The browser must not contact other hosts (fonts, telemetry).
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
    """Load the first checkpoint and serve the page until Ctrl-C.

    Raises PokediffError for a checkpoint or size that does not exist, without Gradio, and when the port is taken.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # the folder goes
    with served_folder() as folder:
        page: Any = None
        try:
            page, options = prepare(config, folder)
            print(f"pokediff demo: http://{config.host}:{config.port} (Ctrl-C ends it)", flush=True)
            with no_proxy():
                page.launch(**options, prevent_thread_lock=True)
            page.block_thread()
        except OSError as error:
            raise PokediffError(f"cannot serve on {config.host}:{config.port}: {error}") from None
        finally:
            if page is not None:
                page.close()


@contextmanager
def served_folder() -> Iterator[Path]:
    """A new temporary folder for the files of the page. It goes at the end; what a killed demo left goes before."""
    place = Path(tempfile.gettempdir()).resolve()
    remove_left(place)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    with own_folder(folder):
        (folder / SERVED).mkdir()
        try:
            yield folder / SERVED
        finally:
            shutil.rmtree(folder / SERVED, ignore_errors=True)


def remove_left(place: Path) -> None:
    """Remove the folders of killed demos in `place`: a lock ends with its process."""
    for folder in place.glob(f"{PREFIX}*"):
        with suppress(OSError, PokediffError):  # of another user; of a living demo
            if is_demo(folder):
                with own_folder(folder, SERVED):
                    shutil.rmtree(folder / SERVED)


def is_demo(folder: Path) -> bool:
    """Whether a demo of this user made `folder`, and no link leads to it. The file WRITER is there from when the demo
    has the lock: a folder that another demo is just making is not taken from it.
    """
    own = not hasattr(os, "getuid") or folder.lstat().st_uid == os.getuid()  # where not, the place is of one user
    if not own or folder.is_symlink():
        return False
    names = {path.name for path in folder.iterdir()}
    return WRITER in names and names <= {WRITER, LOCK, SERVED}


@contextmanager
def no_proxy() -> Iterator[None]:
    """No proxy of the environment: Gradio asks the page for an answer when it has started it, and a proxy has another
    localhost; with a SOCKS proxy, without a package of its own, Gradio cannot be imported. Programs that the page is
    not for, as the download of a model, go on using it.
    """
    before = os.environ.get("no_proxy")
    os.environ["no_proxy"] = "*"
    try:
        yield
    finally:
        os.environ.pop("no_proxy")
        if before is not None:
            os.environ["no_proxy"] = before


def prepare(config: DemoConfig, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The page and the options of its `launch`. `folder` holds all files that it may serve."""
    # Read when they are imported: no analytics, files in our folder, closed pages are noticed within a second.
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=str(folder),
        GRADIO_HEARTBEAT_INTERVAL="0.4",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
    try:
        with no_proxy():
            import gradio
    except ImportError:
        raise PokediffError("the demo needs Gradio: pip install 'pokediff[demo]'") from None
    from PIL import Image
    from starlette.middleware import Middleware

    from pokediff.demo import patches, show
    from pokediff.demo.downloads import Downloads
    from pokediff.demo.page import make_page
    from pokediff.demo.studio import Studio
    from pokediff.drawing.sheets import checkpoint_folder
    from pokediff.model.checkpoint import INDEX

    Image.MAX_IMAGE_PIXELS = uploads.MAX_PIXELS // 2  # Pillow refuses twice that, also where Gradio calls it
    patches.forbid_downloads()
    patches.start_on_a_busy_machine()
    offered = [name for name in SHIPPED if (shipped("checkpoints", name) / INDEX).is_file()]
    studio = Studio([checkpoint_folder(name) for name in config.checkpoint or offered], config.data, config.size)
    page = make_page(studio, Downloads(folder), Path(config.reports), Path(config.runs))
    page.queue(max_size=config.queue, api_open=False, status_update_rate=1)
    patches.limit_sessions(page, 4 * (config.queue + 4))
    patches.refuse_wrong_values(page)
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
        state_session_capacity=32,  # a session of a program holds .4 MB, that of a page its last film too
        max_file_size=uploads.MAX_MB * 2**20,
        theme=gradio.themes.Soft(primary_hue="violet", font=font, font_mono=["ui-monospace", "monospace"]).set(
            button_primary_background_fill_hover="*primary_700",
            button_primary_background_fill_hover_dark="*primary_700",
        ),
        css=show.CSS,
        head=f"<script>{show.SCRIPT}</script>",
        footer_links=["settings"],
        app_kwargs={"middleware": [Middleware(Guard, folder=folder, names=own_names(config))]},
    )
    return page, options


class Guard:
    """Before every request: no other names than ours; only files of our folder, links resolved first; nothing REFUSED;
    nothing that the page of another site sends from a visitor's browser; no body beyond LARGEST_BODY; the content
    policy. A request that Gradio cannot answer is a line in the log.
    """

    def __init__(self, app: Any, folder: Path, names: Collection[str] | None) -> None:
        self.app, self.folder, self.names = app, folder, names

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.names is not None and not is_own(headers.get("host", ""), self.names):
            await answer(send, 403, "Not a name of this demo: --allowed-hosts adds one.")
            return
        if not self.allowed(scope["path"]):
            await answer(send, 403, "Not served here.")
            return
        if (name := called(scope["path"])) is not None and name != FUNCTION:
            await answer(send, 404, "There is no such function.")
            return
        if scope["method"] not in ("GET", "HEAD", "OPTIONS") and is_foreign(headers):
            await answer(send, 403, "Sent by the page of another site.")
            return
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST_BODY:
            await answer(send, 413, "Too large.")
            return
        received, begun = 0, False

        async def limited() -> dict[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= LARGEST_BODY else {"type": "http.disconnect"}

        async def guarded(message: dict[str, Any]) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        try:
            await self.app(scope, limited, guarded)
        except Exception as error:  # of Gradio: what fails in our functions is a sentence by then
            if not begun:
                what = f"{scope['method']} {scope['path']}: {type(error).__name__}: {first_line(error)}"
                print(printable(what), file=sys.stderr)
                await answer(send, 500, "This request cannot be answered.")
            elif getattr(error.__cause__, "status_code", None) is not None:
                await send({"type": "http.response.body"})  # the stream has said it: no such event or session
            else:
                raise

    def allowed(self, path: str) -> bool:
        """Whether the request is for no file, or for one inside our folder after all links are resolved."""
        if path.partition(API)[2].startswith(REFUSED):
            return False
        for marker in ("/file=", "/file/"):
            if marker in path:
                try:
                    wanted = Path(unquote(path.partition(marker)[2]))
                    found = wanted.resolve()
                    return wanted.is_absolute() and found.is_relative_to(self.folder) and found.is_file()
                except (ValueError, OSError):  # not a possible file name
                    return False
        return True


def called(path: str) -> str | None:
    """The name of the function that a program calls by this path (Gradio meets an unknown one with a traceback)."""
    name = path.partition(f"{API}call/")[2]
    return name.partition("/")[0] if name else None


def own_names(config: DemoConfig) -> Collection[str] | None:
    """The names by which browsers may address the demo; None for all: when it listens to other machines, they have
    names for this one that we do not know.
    """
    host, address = config.host.lower(), address_of(config.host)
    local = host == "localhost" or (address is not None and address.is_loopback)
    return {"localhost", host, *map(str.lower, config.allowed_hosts)} if local or config.allowed_hosts else None


def is_own(host: str, names: Collection[str]) -> bool:
    """Whether a Host header names us. A site whose name is made to lead to this machine (DNS rebinding) has the right
    of our own page in its visitors' browsers; but its name is in the header. An address is looked up nowhere.
    """
    try:
        name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    return name in names or name.endswith(".localhost") or address_of(name) is not None


def address_of(name: str) -> IPv4Address | IPv6Address | None:
    """The IP address that `name` is; None when it is another name."""
    try:
        return ip_address(name)
    except ValueError:
        return None


def is_foreign(headers: Mapping[str, str]) -> bool:
    """Whether a request comes from the page of another site: by the browser's own header or, where a browser sends none
    (plain HTTP in a local network), by its origin. Programs send neither.
    """
    if site := headers.get("sec-fetch-site"):
        return site == "cross-site"
    if (origin := headers.get("origin")) is None:
        return False
    return urlsplit(origin).netloc not in (headers.get("host"), headers.get("x-forwarded-host"))


HEADERS: Sequence[tuple[bytes, bytes]] = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


async def answer(send: Send, status: int, words: str) -> None:
    """A short plain answer."""
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": words.encode()})
