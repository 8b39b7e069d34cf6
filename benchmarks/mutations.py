"""Inputs of a stranger: whole ones, made small, and what becomes of them when they are mutated.

A target is one kind of input: `make` writes a whole one into a folder, `read` reads it as a command does. `mutate`
changes one to three places of such a folder, as a pure function of a random generator: bytes, JSON and YAML values,
headers of safetensors and PNG files, links, pipes. benchmarks/robustness.py reads thousands, tests/test_robustness.py
some.
"""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
import shutil
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from pokediff.config import BaselineConfig, SampleConfig, Sampling, TrainConfig, load_yaml
from pokediff.data.dataset import caption_vectors, load_pictures
from pokediff.data.images import encode_png, read_image
from pokediff.data.records import read_records
from pokediff.data.vocabulary import read_words
from pokediff.demo.uploads import decode
from pokediff.drawing.export import load_exported
from pokediff.drawing.jobs import make_jobs, read_prompts, slug
from pokediff.drawing.pixelart import is_pixel_prompt, read_palette
from pokediff.drawing.sample import draw, load_checkpoint, make_finish, read_settings
from pokediff.drawing.sheets import listed_files, weights_sha256
from pokediff.drawing.table import read_manifest, read_table
from pokediff.evaluation.generators import read_generated
from pokediff.model.cascade import Cascade
from pokediff.model.checkpoint import find_folder
from pokediff.model.denoiser import Denoiser
from pokediff.model.diffusion import make_noise_schedule
from pokediff.model.pipeline import PokeDiffPipeline, quiet
from pokediff.model.text import embeddings_path, load_embeddings, save_embeddings
from pokediff.scraper import bulbapedia
from pokediff.scraper.client import PoliteClient
from pokediff.scraper.journal import Journal, write_failures
from pokediff.training.runs import damage_of, read_facts

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = "outside"  # a folder beside that of an input, which no reader may open
COLORS = ("red", "green", "blue", "yellow")


@dataclass(frozen=True)
class Target:
    """A kind of input."""

    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    weight: int  # of all inputs
    links: bool = False  # may lead out: files that a user names one by one, and the folder of an own run


# ------------------------------------------------------------------------------------------------------- checkpoints


def small_checkpoint(folder: Path) -> None:
    """A cascade of a base and an upscaler, a scorer and a small text encoder, with random weights, 1 MB in all."""
    from diffusers import DPMSolverMultistepScheduler
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    from pokediff.config import DiffusionConfig
    from pokediff.model.scorer import Scorer, feature_count

    torch.manual_seed(0)
    small = dict(
        widths=(16,), attention=(False,), blocks=(1,), embedding_dim=16, text_dim=24, noise_range=(0.006, 100, 1)
    )
    base = Denoiser(image_size=16, guidance_scale=2.0, steps=2, **small)
    upscaler = Denoiser(image_size=32, patch=2, upscale=2, below=2.0, steps=2, norm_free=True, **small)
    text = CLIPTextConfig(
        vocab_size=9000, hidden_size=16, intermediate_size=16, projection_dim=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "checkpoints" / "pokediff" / "tokenizer", local_files_only=True)
    schedule = DPMSolverMultistepScheduler.from_config(make_noise_schedule(DiffusionConfig()).config)
    cascade = Cascade({"base-16": base, "upscaler-32": upscaler})
    scorer = Scorer(feature_count(base.config.widths))
    pipeline = PokeDiffPipeline(cascade, schedule, CLIPTextModelWithProjection(text), tokenizer, scorer=scorer)
    for part in (cascade, scorer, pipeline.text_encoder):
        part.half()
    pipeline.save_pretrained(folder)


def draw_with(pipeline: Any) -> None:
    """Draw a picture at the smallest size, and at the largest in one step; the best of two where there is a scorer."""
    pipeline.set_progress_bar_config(disable=True)
    sizes, best_of = pipeline.sizes, 1 if pipeline.scorer is None else 2
    for size in {sizes[0], sizes[-1]}:
        sampling = Sampling(size=size, num_inference_steps=1, best_of=best_of, precision="fp32")
        pipeline.generate(["a red creature"], [0], sampling)


def read_checkpoint(folder: Path) -> None:
    """As `pokediff sample --checkpoint` does."""
    pipeline = load_checkpoint(str(folder), "cpu")
    weights_sha256(folder)
    read_words(folder)
    draw_with(pipeline)


def small_part(folder: Path) -> None:
    """A part of a checkpoint that lies beside it, as `best/` of a training run."""
    from pokediff.model.checkpoint import write_part_index

    small_checkpoint(folder)
    part = folder / "best"
    shutil.copytree(folder / "cascade" / "base-16", part / "cascade" / "base-16")
    (part / "cascade" / "config.json").write_text('{"_class_name": "Cascade", "denoisers": ["base-16"]}')
    write_part_index(part, "..")


def small_export(folder: Path) -> None:
    from pokediff.drawing.export import export

    small_checkpoint(folder / "whole")
    export(folder / "whole", folder / "exported")
    shutil.rmtree(folder / "whole")


def small_baseline(folder: Path) -> None:
    from dataclasses import replace

    from pokediff.baselines.generator import save_baseline
    from pokediff.baselines.systems import SYSTEMS

    config = load_yaml(ROOT / "configs" / "baselines" / "digits-a.yaml", BaselineConfig)
    config = replace(config, losses={"l1": 1.0}, network=replace(config.network, width=8))
    torch.manual_seed(0)
    save_baseline(folder, config, SYSTEMS[config.system](config, config.words))


def read_baseline(folder: Path) -> None:
    load_checkpoint(str(folder), "cpu").generate(["3"], [0])


# -------------------------------------------------------------------------------------------------------- data sets


def picture(number: int, size: int = 12) -> np.ndarray:
    """A disc of some colour, straight RGBA (size, size, 4)."""
    y, x = np.mgrid[:size, :size] - size // 2
    inside = x**2 + y**2 < (size // 3 + number % 3) ** 2
    rgba = np.zeros((size, size, 4), np.uint8)
    rgba[inside] = (*np.random.default_rng(number).integers(0, 256, 3), 255)
    return rgba


def pictures(folder: Path, number: int = 12, kind: str = "png") -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"{COLORS[k % 4]}_creature_{k}.{kind}" for k in range(number)]
    for k, name in enumerate(names):
        Image.fromarray(picture(k)).save(folder / name)
    return names


def rows_of(names: list[str]) -> list[dict[str, Any]]:
    facts = {"style": "artwork", "types": ["fire"], "shape": "quadruped", "colors": ["red"], "dex": 1}
    return [{"file_name": name, "text": f"a creature, number {k}", **facts} for k, name in enumerate(names)]


def data_jsonl(folder: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows_of(pictures(folder)))
    (folder / "metadata.jsonl").write_text(text)
    vectors = torch.nn.functional.normalize(torch.ones(2, 384), dim=1)
    save_embeddings(embeddings_path(folder, "builtin"), "builtin", ["", "a creature, number 0"], vectors)


def data_csv(folder: Path) -> None:
    names, text = pictures(folder), io.StringIO()
    table = csv.DictWriter(text, ["file_name", "text", "style", "types"], extrasaction="ignore")
    table.writeheader()
    table.writerows({**row, "types": "fire, rock"} for row in rows_of(names))
    (folder / "metadata.csv").write_text(text.getvalue())


def data_json(folder: Path) -> None:
    (folder / "metadata.json").write_text(json.dumps(rows_of(pictures(folder))))


def data_sidecars(folder: Path) -> None:
    for k, name in enumerate(pictures(folder)):
        (folder / name).with_suffix(".txt").write_text(f"a creature, number {k}\na small one")


def data_parquet(folder: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"image": {"bytes": encode_png(picture(k)), "path": None}, "text": f"a creature {k}"} for k in range(12)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet", row_group_size=5)


def data_idx(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    digits = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    (folder / "train-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *digits.shape) + digits.tobytes())
    (folder / "train-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, 12) + bytes(k % 10 for k in range(12)))


def read_data(folder: Path) -> None:
    """As `pokediff train` does, up to the first batch."""
    found = load_pictures(folder, 16, report=lambda line: None)
    if embeddings_path(folder, "builtin").exists():
        known = {text for texts in found.captions for text in texts}
        stored = load_embeddings_or_report(folder)
        if known <= stored.keys():
            caption_vectors(folder, found, "builtin", report=lambda line: None)


def load_embeddings_or_report(folder: Path) -> dict[str, torch.Tensor]:
    from pokediff.data.dataset import _stored

    return _stored(embeddings_path(folder, "builtin"), "builtin", lambda line: None)


def single_pictures(folder: Path) -> None:
    for kind in ("png", "webp", "gif", "bmp", "tiff", "ppm", "tga"):
        pictures(folder, 1, kind)
    Image.fromarray(picture(0)[..., :3]).save(folder / "x.jpg", exif=Image.Exif().tobytes())
    frames = [Image.fromarray(picture(k)) for k in range(3)]
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    Image.fromarray(np.arange(144, dtype=np.uint16).reshape(12, 12) * 400).save(folder / "deep.png")
    Image.fromarray(picture(0)).quantize(8).save(folder / "palette.png", transparency=0)


def read_pictures(folder: Path) -> None:
    contents = [path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()]
    each(
        [(read, data) for data in contents for read in (partial(read_image, side=64), decode)], lambda it: it[0](it[1])
    )


# ------------------------------------------------------------------------------------------------------ small files


def configurations(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "configs").glob("*.yaml"):
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(ROOT / "configs" / "baselines" / "digits-a.yaml", folder / "baseline.yaml")


def read_configurations(folder: Path) -> None:
    each(
        sorted(folder.glob("*.yaml")),
        lambda path: load_yaml(path, BaselineConfig if path.stem == "baseline" else TrainConfig),
    )


def each(items: list[Any], read: Callable[[Any], Any]) -> None:
    """Read all; raise the last error of a kind that a user sees in one line."""
    from pokediff.errors import PokediffError

    refused = None
    for item in items:
        try:
            read(item)
        except PokediffError as error:
            refused = error
    if refused is not None:
        raise refused


def palettes(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.hex").write_text("ff0000\n#00ff00\n0000ff\n")
    (folder / "b.gpl").write_text("GIMP Palette\nName: x\nColumns: 2\n# c\n255 0 0 red\n0 255 0\n0 0 255\n")


def read_palettes(folder: Path) -> None:
    each(sorted(folder.glob("*.*")), lambda path: read_palette(str(path)))


def drawing(folder: Path) -> None:
    """What a drawing leaves: pictures, sample.json, and an input of img2img."""
    names = [f"{k:04}.png" for k in range(3)]
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate([*names, "image.png"]):
        (folder / name).write_bytes(encode_png(picture(k)))
    settings = {
        "prompt": ["a red creature"], "seed": 1, "image": "image.png", "num_images_per_prompt": 3,
        "palette": "8", "sampling": {"size": 64, "num_inference_steps": 4, "guidance_interval": [0.1, 10.0]},
    }  # fmt: skip
    rows = [{"file": name, "prompt": "a red creature", "seed": k} for k, name in enumerate(names)]
    facts = {"settings": settings, "weights_sha256": "0" * 64, "pictures": rows, "files": [*names, "sample.json"]}
    (folder / "sample.json").write_text(json.dumps(facts))


def read_drawing(folder: Path) -> None:
    if (folder / "sample.json").is_symlink():
        return  # a user who gives a link means it
    listed_files(folder)
    each([read_settings], lambda read: read(folder / "sample.json"))
    read_generated(folder)


def tables(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "t.csv").write_text('name,prompt,seed,number\nslime,a green slime,7,\ndragon,"a dragon, red",,4\n')
    (folder / "t.tsv").write_text("prompt\tseed\na green slime\t7\n")
    (folder / "manifest.csv").write_text("file,prompt,seed,settings\nslime.png,a green slime,7,abc\n")


def read_tables(folder: Path) -> None:
    each(sorted(folder.glob("t.*")), lambda path: read_table(SampleConfig(prompts_file=str(path))))
    read_manifest(folder / "manifest.csv")


def run_folder(folder: Path) -> None:
    """The files of a training run and of a scraper that a later run reads."""
    from safetensors.torch import save_file

    state = folder / "state" / "base-16" / "step-00000003"
    state.mkdir(parents=True)
    for part in ("denoiser", "average", "optimizer"):
        save_file({"0.weight": torch.ones(3, 4), "1.bias": torch.ones(3)}, state / f"{part}.safetensors")
    progress = {"step": 3, "images_seen": 24, "losses": [[3, 0.5, 0.6]], "best_score": 0.6}
    (state / "progress.json").write_text(json.dumps({"config": {}, "updates": 3, "progress": progress}))
    (folder / "run.json").write_text(json.dumps({"stages": {"base-16": {"steps": 3, "finished": None}}}))
    (folder / "words.json").write_text(json.dumps({"animal": {"dragon": 60}}))
    (folder / "images").mkdir()
    (folder / "images" / "a.png").write_bytes(encode_png(picture(0)))
    (folder / ".scrape").mkdir()
    page = {"page": "A_(Pokémon)", "category": "Seed", "biology": "x", "relatives": ["B_(Pokémon)"]}
    row = {"file_name": "images/a.png", "sha256": "0" * 64, "source_url": "u", "retrieved_at": "t"}
    (folder / ".scrape" / "journal.jsonl").write_text(f"{json.dumps(page)}\n{json.dumps(row)}\n")
    (folder / "failures.jsonl").write_text(json.dumps({"url": "u", "reason": "r", "gone": True}) + "\n")


def read_run(folder: Path) -> None:
    damage_of(folder / "state" / "base-16" / "step-00000003")
    each([read_facts, read_words], lambda read: read(folder))
    if (folder / ".scrape").is_dir():
        write_failures(folder, [], Journal(folder))


def prompts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    words = "a blue water turtle\n# comment\na red dragon, pixel sprite\nофіційний арт дракона\n🐉 青い亀\n"
    (folder / "p.txt").write_text(words, encoding="utf-8")


SMALL: dict[str, Any] = {}  # what is made once in a process


def read_prompt_files(folder: Path) -> None:
    """Read the prompts, draw the first one at 16 px, and name its files."""
    config = SampleConfig(prompts_file=str(folder / "p.txt"), seed=0)
    if "pipeline" not in SMALL:
        where = folder.parent / "prompt-checkpoint"
        small_checkpoint(where)
        SMALL["pipeline"] = load_checkpoint(str(where), "cpu")
        SMALL["pipeline"].set_progress_bar_config(disable=True)
    texts = read_prompts(config)
    make_jobs(texts, config)
    finish = make_finish(config)
    for text in texts[:3]:
        name = slug(text)
        assert name == Path(name).name, name
        assert name not in (".", ".."), name
        SMALL["pipeline"].encode_prompt([text])
        finish(picture(0), text)
        is_pixel_prompt(text)
    sampling = Sampling(size=16, num_inference_steps=1, precision="fp32")
    list(
        draw(
            SMALL["pipeline"],
            make_jobs(texts[:1], config),
            SampleConfig(prompt=tuple(texts[:1]), seed=0, sampling=sampling),
        )
    )


# -------------------------------------------------------------------------------------------------------- the wiki

LIST_ROW = (
    '<tr><td rowspan="1">#{n:04}</td><td><img src="/media/upload/thumb/a/aa/{n:04}Creature{n}.png/70px-x.png" '
    'srcset="/media/upload/a/aa/{n:04}Creature{n}.png 2x"></td><td><a href="/wiki/Creature{n}_(Pok%C3%A9mon)">'
    "Creature{n}</a><br><small>Alolan Form</small></td><td><a>Grass</a></td></tr>"
)


def wiki_pages(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    head = "<tr><th>Ndex</th><th>MS</th><th>Pokémon</th><th>Type</th></tr>"
    rows = "".join(LIST_ROW.format(n=n) for n in range(1, 60))
    (folder / "list.html").write_text(f"<html><table>{head}{rows}</table></html>", encoding="utf-8")
    (folder / "species.html").write_text(
        '<html><body><p><a href="/wiki/Pok%C3%A9mon_category">Seed Pokémon</a></p><h2><span id="Biology">Biology</span>'
        "</h2><p>It is a small, quadruped creature with a plant bulb on its back, in blue and green.<sup>[1]</sup></p>"
        '<h2 id="Evolution">Evolution</h2><table><tr><td><a href="/wiki/Ivysaur_(Pok%C3%A9mon)">I</a></td></tr>'
        "</table>",
        encoding="utf-8",
    )


def page(path: Path) -> bytes:
    """What the client has downloaded: always plain bytes."""
    return path.read_bytes() if path.is_file() and not path.is_symlink() else b""


def read_wiki(folder: Path) -> None:
    expected, bulbapedia.EXPECTED_SPECIES = bulbapedia.EXPECTED_SPECIES, 60
    try:
        bulbapedia.parse_species(page(folder / "species.html"))
        entries = bulbapedia.parse_list(page(folder / "list.html"), "https://bulbapedia.bulbagarden.net/wiki/L")
    finally:
        bulbapedia.EXPECTED_SPECIES = expected
    bulbapedia.missing_numbers(entries)
    for entry in entries:
        stem = bulbapedia.file_stem(entry)
        assert stem == Path(stem).name, stem
        assert stem.isascii(), stem


ANSWERS = {
    "robots.http": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 46\r\n\r\n"
    b"User-agent: *\nCrawl-delay: 0\nDisallow: /private",
    "page.http": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n",
    "zipped.http": b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n"
    b"Content-Length: %d\r\n\r\n%s",
    "busy.http": b"HTTP/1.1 503 Busy\r\nRetry-After: Wed, 21 Oct 2015 07:28:00 GMT\r\nContent-Length: 2\r\n\r\nno",
    "moved.http": b"HTTP/1.1 301 Moved\r\nLocation: /page\r\nContent-Length: 0\r\n\r\n",
}


def http_answers(folder: Path) -> None:
    import gzip

    folder.mkdir(parents=True, exist_ok=True)
    packed = gzip.compress(b"<p>" + b"x" * 300, mtime=0)
    for name, answer in ANSWERS.items():
        (folder / name).write_bytes(answer % (len(packed), packed) if b"%d" in answer else answer)


@contextmanager
def raw_server(answers: Callable[[str], bytes]) -> Iterator[str]:
    """A server on loopback that sends these bytes for a path and closes: its host and port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return  # closed
            with connection:
                try:
                    connection.settimeout(5)
                    request = connection.recv(65536)
                    connection.sendall(answers(request.split(b" ")[1].decode(errors="replace")))
                    connection.shutdown(socket.SHUT_WR)
                except (OSError, IndexError):
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def read_answers(folder: Path) -> None:
    from pokediff.scraper.client import FetchError, StopRun

    def answer(path: str) -> bytes:
        name = folder / f"{path.strip('/').partition('.')[0]}.http"
        return page(name) or b"HTTP/1.1 404 None\r\nContent-Length: 0\r\n\r\n"

    with raw_server(answer) as host:
        client = PoliteClient({host}, "pokediff/test", sleep=lambda seconds: None)
        for name in ("page", "zipped", "busy", "moved"):
            try:
                client.get(f"http://{host}/{name}", 100_000, "text/")
            except (FetchError, StopRun) as error:
                reason = str(error)
                if not reason.isprintable() or len(reason) > 500:
                    raise ValueError(f"not one line: {reason[:200]!r}") from None


# ------------------------------------------------------------------------------------------------------- demo calls


def calls(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "prompt": ["a red creature"], "seed": 3, "negative_prompt": "blue", "num_inference_steps": 1, "enlarge": 2,
        "guidance_scale": 2.0, "sampler": "ddim", "size": 16, "fast": False, "num_images_per_prompt": 2,
        "palette": "4", "hard_alpha": True, "background": "white", "variation": 0.2, "strength": 0.5,
    }  # fmt: skip
    (folder / "call.json").write_text(json.dumps(values))


def read_calls(folder: Path) -> None:
    """Settings as a page or program sends them, then the drawing that they ask for."""
    from pokediff.demo.studio import Studio
    from pokediff.errors import PokediffError

    if "studio" not in SMALL:
        small_checkpoint(folder.parent / "demo-checkpoint")
        SMALL["studio"] = Studio([folder.parent / "demo-checkpoint"])
    try:
        values = json.loads(page(folder / "call.json"))
    except (ValueError, RecursionError, OSError):
        return  # the web server has refused it
    if not isinstance(values, dict) or any(
        key in values for key in ("image", "mask", "out", "prompts_file", "lora", "self")
    ):
        return  # not an argument of any call
    if isinstance(values.get("prompt"), str | None):
        raise PokediffError("not a list")
    config = SMALL["studio"].settings(**values)
    if config.num_images_per_prompt * len(config.prompt) * (config.sampling.num_inference_steps or 1) < 20:
        for _ in SMALL["studio"].draw(config):
            pass


TARGETS = {
    "configurations": Target(configurations, read_configurations, 8, links=True),
    "metadata.jsonl": Target(data_jsonl, read_data, 9),
    "metadata.csv": Target(data_csv, read_data, 6),
    "metadata.json": Target(data_json, read_data, 5),
    "captions beside pictures": Target(data_sidecars, read_data, 4),
    "parquet": Target(data_parquet, read_data, 4),
    "idx": Target(data_idx, read_data, 3),
    "pictures": Target(single_pictures, read_pictures, 12, links=True),
    "checkpoint": Target(small_checkpoint, read_checkpoint, 18),
    "part of a checkpoint": Target(small_part, lambda folder: read_checkpoint(find_folder(folder / "best", {})), 4),
    "ONNX": Target(small_export, lambda folder: draw_with(load_exported(folder / "exported")), 6),
    "baseline": Target(small_baseline, read_baseline, 4),
    "palettes": Target(palettes, read_palettes, 5, links=True),
    "sample.json": Target(drawing, read_drawing, 6),
    "tables of prompts": Target(tables, read_tables, 6, links=True),
    "prompts": Target(prompts, read_prompt_files, 5, links=True),
    "state and journal": Target(run_folder, read_run, 5, links=True),
    "wiki pages": Target(wiki_pages, read_wiki, 6),
    "HTTP and robots.txt": Target(http_answers, read_answers, 6),
    "calls of the demo": Target(calls, read_calls, 6),
}


# --------------------------------------------------------------------------------------------------------- mutations

EVIL: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    " ", ".", "..", "../../outside/secret.png", "../outside", "/etc/passwd", "/dev/zero", "C:\\x", "\\\\host\\share",
    "a" * 100_000, "\x1b[2J\x1b]0;x\x07", "\x00", "\ud800", "\u202e", "new\nline", "os.system", "__class__", "{0}",
    "%s", "http://127.0.0.1:1/x", "user/repository", [], {}, [[]], [None], list(range(100_000)), {"a": {"b": {}}},
    [1e999], ["transformers", "AutoModel"], ["pipeline", "Evil"], ["diffusers", "DiffusionPipeline"],
    99999999999999999999999,
]  # fmt: skip
WORDS = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n\n", b'"', b"'", b",", b";", b"\t", b"{", b"[", b"}", b"]]",
    b"<", b">", b"&#x110000;", b"<table>", b"</table>", b"<td rowspan=99999999 colspan=99999999>", b"<!--",
    b"<![CDATA[", b"\xed\xa0\x80", b"1e999", b"-1", b"99999999999999999999", b"NaN", b"../../outside/secret.png",
    b"%s%n", b"\x1b[2J", b"!!python/object/apply:" b"os.system ['true']", b"&a [*a, *a]", b"*a", b"<<: *x", b"? ",
    b"Content-Length: 99999999\r\n", b"Location: //evil.example/\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Retry-After: 999999999999999999\r\n", b"Content-Encoding: gzip\r\n", b"\r\n\r\n",
]  # fmt: skip


def mutate(rng: random.Random, folder: Path) -> str:
    """Change one to three places of a folder. Returns what was done."""
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            break
        # Small files, which say what large ones mean, as often as large ones.
        path = rng.choice(files)
        ways: list[Callable[[random.Random, Path], str]] = [in_bytes, in_bytes, as_a_whole]
        if path.suffix in (".json", ".jsonl"):
            ways += [in_json] * 5
        elif path.suffix in (".yaml", ".yml"):
            ways += [in_yaml] * 4
        elif path.suffix == ".safetensors":
            ways += [in_safetensors] * 6
        elif path.suffix == ".png":
            ways += [in_png] * 4
        elif path.suffix in (".csv", ".tsv", ".txt", ".gpl", ".hex", ".html", ".http"):
            ways += [in_text] * 4
        way = rng.choice(ways)
        name = path.relative_to(folder).as_posix()
        done.append(f"{name}: {way(rng, path)}")
    return "; ".join(done)


def put(path: Path, data: bytes) -> None:
    """Replace a file that may be a hard link to the whole one."""
    path.unlink()
    path.write_bytes(data)


def in_bytes(rng: random.Random, path: Path) -> str:
    data = bytearray(path.read_bytes())
    way = rng.choice(("flip", "cut", "insert", "repeat", "zero", "swap", "tail"))
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.5:
        at = min(at, rng.randrange(200))  # headers lie at the beginning
    if way == "flip" and data:
        for _ in range(rng.choice((1, 1, 4, 32))):
            data[rng.randrange(len(data)) if rng.random() < 0.5 else min(at, len(data) - 1)] = rng.randrange(256)
    elif way == "cut":
        del data[at:]
    elif way == "insert":
        data[at:at] = rng.randbytes(rng.choice((1, 3, 100)))
    elif way == "repeat":
        data[at:at] = data[at : at + rng.randrange(1, 500)] * rng.choice((1, 20))
    elif way == "zero":
        data[at : at + 16] = bytes(16)
    elif way == "swap":
        other = rng.randrange(len(data) + 1)
        data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
    else:
        data += rng.randbytes(64)
    put(path, bytes(data))
    return f"{way} at {at}"


def as_a_whole(rng: random.Random, path: Path) -> str:
    way = rng.choice(
        ("gone", "empty", "random", "link", "broken link", "pipe", "folder", "device", "deep", "wide", "another")
    )
    outside = path
    while outside != outside.parent and not (outside / OUTSIDE).is_dir():
        outside = outside.parent
    secret = next(iter(sorted((outside / OUTSIDE).glob(f"*{path.suffix}"))), outside / OUTSIDE / "secret")
    path.unlink()
    if way == "empty":
        path.touch()
    elif way == "random":
        path.write_bytes(rng.randbytes(rng.randrange(2000)))
    elif way == "link":
        path.symlink_to(secret)
    elif way == "broken link":
        path.symlink_to("nowhere")
    elif way == "pipe":
        os.mkfifo(path)
    elif way == "folder":
        path.mkdir()
    elif way == "device":
        path.symlink_to("/dev/zero")
    elif way == "deep":
        path.write_bytes(rng.choice((b"[", b'{"a":', b"<b>", b"- ")) * 10_000)
    elif way == "wide":
        path.write_bytes(rng.choice((b"a", b'"a",', b"a: b\n", b"<td>", b"\n", b"1 ")) * 200_000)
    elif way == "another":
        others = sorted(other for other in path.parent.iterdir() if other.is_file())
        if others:
            shutil.copyfile(rng.choice(others), path)
    return way


def in_text(rng: random.Random, path: Path) -> str:
    data = path.read_bytes()
    spots = [match.start() for match in re.finditer(rb"\b", data)] or [0]
    at, word = rng.choice(spots), rng.choice(WORDS)
    end = at + rng.choice((0, 0, 1, 4))
    put(path, data[:at] + word + data[end:])
    return f"{word!r} at {at}"


def in_json(rng: random.Random, path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # mutated before
        return in_bytes(rng, path)
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    row = rng.randrange(len(lines)) if lines else 0
    try:
        value = json.loads(lines[row])
    except (ValueError, IndexError, RecursionError):
        return in_bytes(rng, path)
    holder = [value]
    what = change(rng, holder)
    text = json.dumps(holder[0], ensure_ascii=rng.random() < 0.9)
    if "deep" in what:
        text = text.replace('"DEEP"', "[" * 10_000 + "]" * 10_000)
    lines[row] = text
    joined = "\n".join(lines)
    codec = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    put(path, joined.encode(codec, errors="surrogatepass" if codec != "latin-1" else "replace"))
    return what


def in_yaml(rng: random.Random, path: Path) -> str:
    if rng.random() < 0.4:
        return in_text(rng, path)
    try:
        holder = [yaml.safe_load(path.read_text(encoding="utf-8"))]
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        return in_bytes(rng, path)
    if rng.random() < 0.1:
        laughs = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" for k in range(1, 12))
        put(path, laughs.encode() + path.read_bytes())
        return "aliases of aliases"
    what = change(rng, holder)
    put(path, yaml.safe_dump(holder[0], allow_unicode=True).encode("utf-8", errors="surrogatepass"))
    return what


def change(rng: random.Random, holder: list[Any]) -> str:
    """Change one value somewhere in `holder`, a list of one."""
    parent: Any = holder
    key: Any = 0
    trail = []
    while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.85:
        parent = parent[key]
        keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
        key = rng.choice(keys)
        trail.append(str(key)[:20])
    way = rng.choice(("value", "value", "value", "value", "gone", "name", "deep", "twist"))
    if way == "gone" and parent is not holder:
        del parent[key]
    elif way == "name" and isinstance(parent, dict):
        new = rng.choice([name for name in EVIL if isinstance(name, str)] + list(parent))
        parent[new] = parent.pop(key)
    elif way == "deep":
        parent[key] = "DEEP"
    elif way == "twist":
        old = parent[key]
        parent[key] = [old] if rng.random() < 0.3 else str(old) if rng.random() < 0.5 else {str(old)[:50]: old}
    else:
        parent[key] = rng.choice(EVIL)
    return f"{way} at {'.'.join(trail) or 'the top'}: {str(parent[key])[:40] if way == 'value' else ''}"


def is_whole(entry: Any, size: int) -> bool:
    """Whether an entry of a header of safetensors tells a place in its `size` bytes, so can be mutated (again)."""
    match entry:
        case {"data_offsets": [int(begin), int(end)], "shape": list()}:
            return 0 <= begin <= end <= size
    return False


def in_safetensors(rng: random.Random, path: Path) -> str:
    data = path.read_bytes()
    try:
        length = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    except (struct.error, ValueError, RecursionError, OverflowError):
        return in_bytes(rng, path)
    names = [name for name in header if is_whole(header[name], len(body))] if isinstance(header, dict) else []
    if not names:
        return in_bytes(rng, path)
    name = rng.choice(names)
    entry = header[name]
    way = rng.choice(
        ("offsets", "shape", "huge", "type", "name", "twice", "values", "length", "deep", "any", "padding")
    )
    if way == "offsets":
        entry["data_offsets"] = [rng.choice((0, -1, 2**40, 2**63, number + 8)) for number in entry["data_offsets"]]
    elif way == "shape":
        entry["shape"] = rng.choice(([], [0], [1], [-1], entry["shape"][::-1], [*entry["shape"], 1], [2] * 1000))
    elif way == "huge":
        entry["shape"] = rng.choice(([2**40], [2**32, 2**32], [2**31 - 1, 4], [10**9]))
    elif way == "type":
        entry["dtype"] = rng.choice(("F64", "F32", "I64", "BOOL", "U8", "F8_E4M3", "C64", "x", "BF16"))
    elif way == "name":
        header[rng.choice(("", "a" * 1000, "__proto__", "\x1b[2J", f"{name}.x"))] = header.pop(name)
    elif way == "twice":
        header[f"{name}2"] = dict(entry)
    elif way == "values":
        start, end = entry["data_offsets"]
        bad = rng.choice((b"\x00\x7c", b"\x00\x7e", b"\x00\xfc", b"\xff\x7b"))  # float16: inf, nan, -inf, 65504
        body[start:end] = bad * ((end - start) // 2) if rng.random() < 0.5 else bad + body[start + 2 : end]
    elif way == "any":
        holder = [header]
        change(rng, holder)
        header = holder[0]
    text = json.dumps(header).encode()
    if way == "deep":
        text = b'{"a":' * 10_000 + b"}" * 10_000
    text += b" " * (-len(text) % 8)
    number = rng.choice((0, 1, len(text) + 1, 2**40, 2**64 - 1)) if way == "length" else len(text)
    put(path, struct.pack("<Q", number) + text + bytes(body) + (b"x" if way == "padding" else b""))
    return f"{way} of {name[:40]}"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def in_png(rng: random.Random, path: Path) -> str:
    data = path.read_bytes()
    way = rng.choice(("huge", "thin", "mode", "bomb", "text", "order", "many"))
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 40:
        return in_bytes(rng, path)
    head, rest = bytearray(data[16:29]), data[33:]
    if way in ("huge", "thin"):
        sides = rng.choice(((60_000, 60_000), (2**31 - 1, 2**31 - 1), (8000, 8000), (0, 0)))
        head[:8] = struct.pack(">II", *sides if way == "huge" else (sides[0], 1))
    elif way == "mode":
        head[8 + rng.randrange(5)] = rng.randrange(256)
    elif way == "bomb":
        rest = chunk(rng.choice((b"zTXt", b"iCCP")), b"x\0\0" + zlib.compress(bytes(50_000_000), 9)) + rest
    elif way == "text":
        rest = (
            chunk(rng.choice((b"tEXt", b"iTXt", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fcTL")), rng.randbytes(50)) + rest
        )
    elif way == "order":
        rest = rest[len(rest) // 2 :] + rest[: len(rest) // 2]
    else:
        rest = chunk(b"tEXt", b"a\0b") * 20_000 + rest
    put(path, data[:8] + chunk(b"IHDR", bytes(head)) + rest)
    return f"png {way}"


__all__ = ["OUTSIDE", "TARGETS", "Target", "load_embeddings", "mutate", "quiet", "read_records", "small_checkpoint"]
