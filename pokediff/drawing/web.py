"""web(checkpoint, out): a static page that draws in the browser, the pictures of `sample --precision fp32`.

    index.html, assets/    the page, built from web/, with ONNX Runtime
    model.json             the model: denoisers, noise schedule, known words, rights
    model/                 its networks as ONNX, weights in 16 or 8 bits; tokenizer; authors of the training pictures
    service-worker.js      keeps the site for offline use
    site.json              the files of the site: which to keep offline, and to delete when a new one replaces it

File names in model/ and assets/ hold a hash of the content, so that a browser may keep them for ever.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pokediff import __version__
from pokediff.data.vocabulary import ATTRIBUTION, WORDS, read_words
from pokediff.drawing.export import MODEL, export, load_exported
from pokediff.drawing.sheets import checkpoint_folder
from pokediff.errors import PokediffError
from pokediff.files import aside, move_whole, own_folder, read_json, write_whole
from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import schedule_sigmas
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.model.text import ClipTextEncoder, load_text_encoder
from pokediff.paths import shipped

SITE, INDEX = "site.json", "model.json"
TEMPORARY = ".web.tmp"  # folder in the output folder
BUILD = "cd web && npm ci && npm run build"
HEADERS = {  # cross-origin isolation lets ONNX Runtime use several threads
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def web(checkpoint: str | Path | None, out: Path, size: int | None = None, fast: bool = False) -> dict[str, Any]:
    """Write the site of a checkpoint to `out`; an earlier site there is replaced.

    Args:
        checkpoint: as `sample --checkpoint`.
        out: a new or empty folder, or one that this function wrote.
        size: only the denoisers for this size in px (default: all).
        fast: with the few-step denoisers, instead of those whose places they take.

    Returns {"megabytes": of the model, "largest_difference": levels of 255, see `export`}.
    Raises PokediffError when the page is not built, `out` holds other files, or the checkpoint cannot be exported or
    uses a text encoder or sampler that the page does not have.
    """
    page = find_page()
    if out.is_file():
        raise PokediffError(f"{out} is a file: choose another --out")
    folder = checkpoint_folder(None if checkpoint is None else str(checkpoint))
    with own_folder(out, SITE), aside(out / TEMPORARY, SITE) as temporary:
        old = listed_files(out / SITE)
        exported, new = temporary / "exported", temporary / "site"
        pipeline = PokeDiffPipeline.from_pretrained(folder)
        whole = with_text_encoder(pipeline, folder, temporary / "whole")
        facts = export(whole, exported, size, small=True, fast=fast)
        shutil.copytree(page, new)
        model = write_model(exported, new, Path(checkpoint).name if checkpoint else folder.name)
        replace_site(new, out, old)
    files = [model["tokenizer"], model["textEncoder"], *model["denoisers"]]
    return {**facts, "megabytes": round(sum(file["bytes"] for file in files) / 1e6, 1)}


def find_page() -> Path:
    """The built page. Raises PokediffError when it is not built."""
    page = shipped("web", "dist")
    if not (page / "index.html").is_file():
        raise PokediffError(f"the page is not built; with Node.js 20 or newer, in the checkout: {BUILD}")
    return page


def with_text_encoder(pipeline: PokeDiffPipeline, folder: Path, whole: Path) -> Path:
    """The folder of the checkpoint, or if its text encoder is one by name, a copy in `whole` that contains it.

    Raises PokediffError when that is no CLIP of transformers.
    """
    if pipeline.text_encoder is not None:
        return folder
    encoder = load_text_encoder(pipeline.config.text_encoder_name)
    if not isinstance(encoder, ClipTextEncoder):
        raise PokediffError(f"the page cannot run the text encoder {encoder.name}: train with builtin or clip:...")
    pipeline.with_components(text_encoder=encoder.model, tokenizer=encoder.tokenizer).save_pretrained(whole)
    for name in ("README.md", WORDS, ATTRIBUTION):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, whole / name)
    return whole


def write_model(exported: Path, site: Path, name: str) -> dict[str, Any]:
    """model.json and model/ of an exported checkpoint. Returns the content of model.json (`Model` in
    web/src/cascade.ts).
    """
    pipeline = load_exported(exported)
    assert pipeline.text_encoder is not None
    assert pipeline.tokenizer is not None
    if pipeline.sampler != "dpmpp_2m":
        raise PokediffError(f"{name} is sampled by {type(pipeline.scheduler).__name__}; the page has dpmpp_2m only")
    attributed = exported / ATTRIBUTION
    folder = site / "model"
    folder.mkdir()
    encoder = store(exported / "text_encoder" / MODEL, folder, "text_encoder")
    tokenizer = store(exported / "tokenizer" / "tokenizer.json", folder, "tokenizer")
    model = {
        "name": name,
        "version": __version__,
        "channels": pipeline.base.config.in_channels,
        "defaultSize": pipeline.image_size,
        "pixelArt": pipeline.pixel_art,
        "sigmas": schedule_sigmas(pipeline.scheduler).tolist(),
        "denoisers": [
            describe(name, denoiser) | store(exported / "cascade" / name / MODEL, folder, name)
            for name, denoiser in pipeline.cascade.items()
        ],
        "nullText": pipeline.base.null_text.tolist(),
        "textEncoder": {
            **encoder,
            "maxTokens": pipeline.text_encoder.config.max_position_embeddings,
            "endToken": pipeline.tokenizer.eos_token_id,
        },
        "tokenizer": {
            **tokenizer,
            "config": json.loads((exported / "tokenizer" / "tokenizer_config.json").read_text(encoding="utf-8")),
        },
        "runtimeBytes": sum(path.stat().st_size for path in site.glob("assets/*.wasm")),
        "words": read_words(exported),
        "rights": rights_of(exported),
        "attribution": store(attributed, folder, "attribution")["file"] if attributed.is_file() else None,
    }
    write_whole(site / INDEX, json.dumps(model, ensure_ascii=False) + "\n")
    return model


def describe(name: str, denoiser: Denoiser) -> dict[str, Any]:
    """A denoiser's configuration, as far as drawing needs it."""
    config = denoiser.config
    return {
        "name": name,
        "imageSize": config.image_size,
        "below": config.below,
        "upscale": config.upscale,
        "steps": config.steps,
        "guidanceScale": config.guidance_scale,
        "highNoiseGuidance": config.get("high_noise_guidance", 1.0),
        "fast": config.fast,
    }


def store(path: Path, folder: Path, name: str) -> dict[str, Any]:
    """Copy a file under a name that holds a hash of its content."""
    content = path.read_bytes()
    suffix = ".txt" if path.suffix == ".md" else path.suffix  # shown by a browser, not saved
    file = f"{name}-{hashlib.sha256(content).hexdigest()[:12]}{suffix}"
    write_whole(folder / file, content)
    return {"file": f"{folder.name}/{file}", "bytes": len(content)}


def rights_of(checkpoint: Path) -> str:
    """The paragraph of the model card on whose pictures a model was trained on, without Markdown."""
    card = checkpoint / "README.md"
    paragraphs = card.read_text(encoding="utf-8").split("\n\n") if card.is_file() else []
    found = [text for text in paragraphs if text.startswith("**Rights.**")]
    if not found:
        return "The model card names no authors of the training pictures; ask whoever trained the model."
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", r"\1", found[-1].removeprefix("**Rights.**"))
    return " ".join(plain.split())


def replace_site(new: Path, out: Path, old: set[str]) -> None:
    """Move the files of a new site into `out`, then delete those `old` ones that it does not have. Until all is done
    the list names both, so that after a kill the next run knows what to delete.
    """
    files = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
    model = [file for file in files if file.startswith("model/")]
    page = [file for file in files if file not in model and file != "service-worker.js"]
    write_list(out, page, sorted({*model, *old}))
    move_whole(new, out, last=(INDEX, "index.html", "service-worker.js"))
    for file in old.difference(files):
        (out / file).unlink(missing_ok=True)
    write_list(out, page, model)


def write_list(site: Path, page: Sequence[str], model: Sequence[str]) -> None:
    """site.json: the files of the page and of the model."""
    write_whole(site / SITE, json.dumps({"page": page, "model": model}, indent=1) + "\n")


def listed_files(path: Path) -> set[str]:
    """The files in the folders of a site, by its site.json; none without one. Names that lead out are left.

    Raises PokediffError for another site.json.
    """
    if not path.is_file():
        return set()
    listed = read_json(path)
    try:
        return {file for file in listed["page"] + listed["model"] if re.fullmatch(r"(?:assets|model)/[\w.-]+", file)}
    except (TypeError, KeyError):
        raise PokediffError(f"{path} is no list of this command: choose another --out, a new folder") from None


# ------------------------------------------------------------------------------------------------------------ serving


class Handler(SimpleHTTPRequestHandler):
    """Static files with HEADERS, and the page's own policy."""

    extensions_map = {  # noqa: RUF012 (the base class's own form)
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".js": "text/javascript",
        ".wasm": "application/wasm",
        ".webmanifest": "application/manifest+json",
    }

    def end_headers(self) -> None:
        for name, value in {**HEADERS, "Content-Security-Policy": policy_of(self.directory)}.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not printed."""


@cache
def policy_of(site: str) -> str:
    """The Content-Security-Policy of a site, in its index.html: the page's worker takes it from a header only."""
    page = (Path(site) / "index.html").read_text(encoding="utf-8")
    found = re.search(r'Content-Security-Policy"\s+content="([^"]*)"', page)
    if found is None:
        raise PokediffError(f"{site}/index.html has no Content-Security-Policy")
    return found[1]


def make_server(site: Path, port: int = 8000) -> ThreadingHTTPServer:
    """A server of the site on 127.0.0.1; port 0: any free one. Raises PokediffError when the port is taken."""
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=site.as_posix()))
    except OSError as error:
        raise PokediffError(f"port {port}: {error.strerror}; choose another with --port") from None


def serve(server: ThreadingHTTPServer) -> None:
    """Serve until Ctrl-C."""
    with server:
        print(f"http://127.0.0.1:{server.server_address[1]} (Ctrl-C stops)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
