"""The demo: limits, files, the server and hostile requests; with -m slow its page in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch
from conftest import ROOT, free_port, make_denoiser
from PIL import Image

from pokediff.baselines.generator import save_baseline
from pokediff.baselines.systems import SYSTEMS
from pokediff.config import BaselineConfig, DemoConfig, LoraConfig, NetworkConfig
from pokediff.data.images import can_write_mp4, encode_png, premultiply
from pokediff.demo import server as server_module
from pokediff.demo import uploads
from pokediff.demo.downloads import Downloads, labelled_sheet
from pokediff.demo.studio import LIMITS, Studio
from pokediff.drawing.jobs import make_jobs
from pokediff.drawing.sample import read_settings, sample
from pokediff.errors import PokediffError
from pokediff.model.cascade import Cascade
from pokediff.model.pipeline import PokeDiffPipeline

PATIENCE = 600  # seconds until a test that waits fails: a slow machine is no failure


def wait_for(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint, tiny_pipe, tmp_path_factory) -> tuple[str, ...]:
    """Two tiny checkpoints: "tiny", 32 and 64 px, and "fast", 32 px with a few-step denoiser; and "gan", a baseline."""
    base, fast = make_denoiser(steps=4, guidance_scale=1.5), make_denoiser(1, steps=2, guidance_scale=1.5, fast=True)
    for denoiser in (base, fast):
        denoiser.null_text.copy_(tiny_pipe.base.null_text)
    cascade = Cascade({"base-32": base, "fast-32": fast})
    other = PokeDiffPipeline(cascade, tiny_pipe.scheduler, tiny_pipe.text_encoder, tiny_pipe.tokenizer)
    folder = tmp_path_factory.mktemp("other") / "fast"
    other.save_pretrained(folder)
    network = NetworkConfig(width=16, text_dim=32, heads=4, layers=1, noise=8)
    config = BaselineConfig(system="pikapikagen", network=network)
    torch.manual_seed(0)
    save_baseline(folder.with_name("gan"), config, SYSTEMS[config.system](config, "builtin"))
    return str(tiny_checkpoint), str(folder), str(folder.with_name("gan"))


@pytest.fixture(scope="module")
def studio(checkpoints, data) -> Studio:
    made = Studio(checkpoints, data)
    wait_for(lambda: made.training)
    return made


@pytest.fixture
def downloads(tmp_path) -> Downloads:
    return Downloads(tmp_path / "downloads")


# ------------------------------------------------------------------------------------------------- without a page


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(prompt=()), "Write a prompt first"),
        (dict(prompt=("  ",)), "Write a prompt first"),
        (dict(prompt=("x" * (LIMITS.prompt + 1),)), "characters in a prompt"),
        (dict(prompt=("a cat",) * (LIMITS.prompts + 1)), "prompts"),
        (dict(negative_prompt="x" * (LIMITS.prompt + 1)), "characters in a prompt"),
        (dict(num_images_per_prompt=LIMITS.pictures + 1), "pictures of a prompt"),
        (dict(prompt=("a cat",) * 64, num_images_per_prompt=3), "pictures"),
        (dict(num_inference_steps=LIMITS.steps + 1), "steps"),
        (dict(num_inference_steps=0), "num_inference_steps"),
        (dict(num_inference_steps="many"), "num_inference_steps"),
        (dict(guidance_scale=1e9), "guidance"),
        (dict(guidance_scale=float("nan")), "guidance"),
        (dict(guidance_scale=-1.0), "negative"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**40), "seed"),
        (dict(enlarge=1000), "enlarge"),
        (dict(interpolate=1000), "interpolation"),
        (dict(sampler="rm -rf"), "sampler"),
        (dict(size=48), "32, 64"),
        (dict(checkpoint="fast", size=64), "draws 32"),
        (dict(fast=True), "few-step"),
        (dict(background="nocolour"), "nocolour"),
        (dict(prompt=("a \udcff cat",)), "UTF-8"),
        (dict(negative_prompt="a \udcff cat"), "UTF-8"),
        (dict(checkpoint="/etc"), "unknown checkpoint"),
        (dict(guidance_interval=(5, 1)), "guidance_interval"),
        (dict(out="/tmp/x", nonsense=1), "unknown key"),
    ],
)
def test_values_beyond_the_limits_are_refused(studio, changes, words):
    with pytest.raises(PokediffError, match=words):
        studio.settings(**{"prompt": ("a cat",), **changes})


def test_a_size_that_the_checkpoint_does_not_draw_is_refused_at_the_start(checkpoints):
    with pytest.raises(PokediffError, match="32, 64"):
        Studio(checkpoints, size=128)
    assert Studio(checkpoints, size=32).settings(prompt=("a cat",)).sampling.size == 32


def test_settings_are_those_that_suit_the_checkpoint_and_the_denoisers(studio):
    own = studio.settings(prompt=("a cat",)).sampling
    assert (own.size, own.num_inference_steps, own.guidance_scale) == (64, 6, 1.5)
    other = studio.settings("fast", prompt=("a cat",)).sampling
    assert (other.size, other.num_inference_steps) == (32, 4)
    assert studio.settings("fast", prompt=("a cat",), fast=True).sampling.num_inference_steps == 2


def test_every_step_has_its_own_size_and_denoiser(studio):
    config = studio.settings(prompt=("a red dragon",), seed=5)
    evaluations, frames = studio.evaluations(config), list(studio.draw(config))
    names = [one.denoiser for one in evaluations]
    assert names == sorted(names)  # base-32, refiner-32, upscaler-64
    assert (names.count("base-32") + names.count("refiner-32"), names.count("upscaler-64")) == (6, 2)
    assert len(frames) == len(evaluations) + 1
    assert [frame.x0.shape[1] for frame in frames] == [one.size for one in evaluations] + [64]
    fast = studio.settings("fast", prompt=("a red dragon",), fast=True)
    assert [one.denoiser for one in studio.evaluations(fast)] == ["fast-32"] * 2


@pytest.mark.slow
def test_the_files_of_a_drawing_draw_the_same_pictures_again(studio, downloads, tmp_path):
    config = studio.settings(
        prompt=("a red dragon",), num_images_per_prompt=2, seed=5, num_inference_steps=3, enlarge=2, background="pink"
    )
    paths = downloads.write(studio.pipeline_of(config), config, list(studio.draw(config)))
    files = {path.name: path for path in paths}
    animations = {f"a-red-dragon-5.{kind}" for kind in ("gif", "mp4")[: 1 + can_write_mp4()]}
    pictures = ["a-red-dragon-5.png", "a-red-dragon-6.png"]
    assert set(files) == {*pictures, "a-red-dragon-5-all.png", "a-red-dragon-5.json", *animations}
    assert paths[-1].name == "a-red-dragon-5.json"
    facts = json.loads(paths[-1].read_text())
    assert [row["file"] for row in facts["pictures"]] == pictures
    assert set(facts["files"]) == set(files)
    again = sample(replace(read_settings(paths[-1]), out=str(tmp_path / "again")))
    for drawn, name in zip(("0000.png", "0001.png"), pictures, strict=True):
        assert (again / drawn).read_bytes() == files[name].read_bytes()
    assert Image.open(files[pictures[0]]).size == (128, 128)


@pytest.mark.parametrize("whole", [False, True], ids=["draw", "batch"])
def test_a_sprite_sheet_is_of_the_pictures_own_size_and_its_files_find_each_other(studio, downloads, tmp_path, whole):
    config = studio.settings(prompt=("a red dragon",), num_images_per_prompt=2, seed=5, num_inference_steps=2, size=32,
                             enlarge=8, sheet=["aseprite", "texturepacker", "godot", "tiled"])  # fmt: skip
    frames, pipeline = list(studio.draw(config)), studio.pipeline_of(config)
    if whole:
        archive = downloads.write_zip(pipeline, config, make_jobs(config.prompt, config), frames[-1].x0)
    else:
        archive, *others = downloads.write(pipeline, config, frames)
        assert archive.name == "a-red-dragon-5-sheet.zip"
        assert Image.open(others[-2]).size == (32, 32)
        assert "sheet.png" not in {path.name for path in others}
    with zipfile.ZipFile(archive) as bundle:
        bundle.extractall(tmp_path)
    found = {path.name for path in tmp_path.iterdir() if path.name.startswith("sheet")}
    assert found == {"sheet.png", "sheet.aseprite.json", "sheet.texturepacker.json", "sheet.tres", "sheet.tsx"}
    assert json.loads((tmp_path / "sheet.aseprite.json").read_text())["meta"]["image"] == "sheet.png"
    frame = json.loads((tmp_path / "sheet.texturepacker.json").read_text())["frames"]["a-red-dragon-6"]["frame"]
    left, top, sheet = frame["x"], frame["y"], np.asarray(Image.open(tmp_path / "sheet.png"))
    np.testing.assert_array_equal(sheet[top : top + 32, left : left + 32], frames[-1].x0[1])


def test_img2img_and_inpainting_files_include_their_inputs(studio, downloads, tmp_path, monkeypatch):
    picture = np.zeros((40, 40, 4), np.uint8)
    picture[8:32, 8:32] = (200, 30, 30, 255)
    mask = np.zeros((40, 40), bool)
    mask[:20] = True
    given = downloads.keep_input(picture, mask)
    config = studio.settings(prompt=("a red dragon",), num_inference_steps=3, **given)
    out = downloads.write(studio.pipeline_of(config), config, list(studio.draw(config)))[0].parent
    shutil.copytree(out, tmp_path / "moved")
    shutil.rmtree(downloads.folder)
    monkeypatch.chdir(tmp_path / "moved")  # downloaded to another machine
    name = f"a-red-dragon-{config.seed}"
    assert Path(f"{name}-image.png").is_file()
    assert Path(f"{name}-mask.png").is_file()
    again = sample(replace(read_settings(f"{name}.json"), out="again"))
    assert (again / "0000.png").read_bytes() == Path(f"{name}.png").read_bytes()


@pytest.mark.parametrize(("sampler", "steps", "strength"), [("ddim", 4, 0.05), ("heun", 20, 0.3), ("heun", 3, 0.9)])
def test_the_last_frame_is_finished_at_any_strength(studio, downloads, sampler, steps, strength):
    picture = np.zeros((32, 32, 4), np.uint8)
    picture[8:24, 8:24] = (200, 30, 30, 255)
    config = studio.settings(
        prompt=("a cat",), sampler=sampler, num_inference_steps=steps, strength=strength, hard_alpha=True,
        **downloads.keep_input(picture),
    )  # fmt: skip
    frames = list(studio.draw(config))
    assert len(frames) == len(studio.evaluations(config)) + 1
    assert set(np.unique(frames[-1].x0[..., 3])) <= {0, 255}


def test_many_pictures_as_one_zip(studio, downloads):
    config = studio.settings(
        prompt=("a red dragon", "a blue turtle"), num_images_per_prompt=3, num_inference_steps=2, size=32
    )
    parts = list(studio.draw_all(config, batch_size=4))
    assert [len(part[0]) for part in parts if part] == [4, 6]
    assert parts.count(None) == 2 * (2 + 1)  # it can be stopped at every step
    archive = downloads.write_zip(studio.pipeline_of(config), config, *parts[-1])
    first = f"a-red-dragon-{config.seed}"
    assert archive.name == f"{first}-and-5-more.zip"
    with zipfile.ZipFile(archive) as bundle:
        rows = json.loads(bundle.read(f"{first}.json"))["pictures"]
        names = [f"a-red-dragon-{config.seed + k}.png" for k in range(3)]
        names += [f"a-blue-turtle-{config.seed + k}.png" for k in range(3, 6)]
        assert [row["file"] for row in rows] == names
        assert set(bundle.namelist()) == {*names, f"{first}.json", "labelled.png"}
        assert [row["prompt"] for row in rows] == ["a red dragon"] * 3 + ["a blue turtle"] * 3
        sheet = Image.open(io.BytesIO(bundle.read("labelled.png")))
    assert sheet.size == (4 * 168, 2 * 208)


def test_the_labels_of_a_sheet_stay_in_their_place():
    sheet = labelled_sheet(np.zeros((2, 32, 32, 4), np.uint8), ["a", "a very long label " * 9])
    written = (sheet < 128).any(-1)
    assert written[:, :168].any()
    assert written[:, 168:].any()
    assert not written[:160].any()  # nothing over the (empty) pictures


def test_neighbours_and_verdicts(studio):
    assert studio.training is not None
    near = studio.neighbours(studio.training.pixels[:1])[0]
    assert near.distance < 1e-3
    assert near.record == studio.training.records[0] or near.distance == 0
    blank = studio.neighbours(np.full((1, 64, 64, 4), (255, 0, 255, 255), np.uint8))[0]
    assert blank.verdict == "new"


def test_without_a_data_set_nothing_is_said_about_copies(checkpoints, tmp_path):
    found = Studio(checkpoints[1:], tmp_path / "nothing").neighbours(np.zeros((1, 32, 32, 4), np.uint8))
    assert "not on this machine" in found


def png_of(width: int, height: int) -> bytes:
    """A small file whose header announces a huge picture."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture at all", "not a picture"),
        (encode_png(np.zeros((64, 64, 4), np.uint8))[:60], "cannot be used"),
        (b"\0" * (uploads.MAX_MB * 2**20 + 1), "larger than"),
        (png_of(5000, 5000), "16,?000,?000 pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    ],
    ids=["text", "cut", "large", "bomb", "svg"],
)
def test_uploads_are_checked_by_decoding(tmp_path, content, words):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(PokediffError, match=words):
        uploads.read_picture(path)


def test_the_content_of_an_upload_counts_not_its_name(tmp_path):
    path = tmp_path / "picture.txt"
    Image.new("RGB", (900, 300), "red").save(path, "JPEG")
    assert uploads.read_picture(path).shape == (171, 512, 4)


def test_old_drawings_are_deleted(downloads):
    old = downloads.new_folder()
    os.utime(old, (0, 0))
    new = downloads.new_folder()
    assert not old.exists()
    assert new.exists()


def test_a_baseline_draws_at_once(studio):
    own = studio.resolved("gan")
    assert (own.size, own.num_inference_steps) == (32, None)
    chosen = dict(checkpoint="gan", seed=3, size=32, num_inference_steps=0, guidance_scale=1.0)  # of hidden sliders
    settings = studio.settings(prompt=("a blue turtle",), **chosen)
    (frame,) = studio.draw(settings)
    assert frame.x0.shape == (1, 32, 32, 4)
    assert studio.evaluations(settings) == []
    found = studio.attention(settings)
    assert found.maps["4x4"].shape == (len(found.tokens), 4, 4)
    assert studio.attention(studio.settings(prompt=("a blue turtle",))) is None
    with pytest.raises(PokediffError, match="shows no time steps"):
        studio.cascade_of(settings)
    with pytest.raises(PokediffError, match="has no time steps: it draws at once; leave out num_inference_steps"):
        studio.settings(prompt=("a blue turtle",), checkpoint="gan", num_inference_steps=5)


def test_lora_folders_stand_among_the_checkpoints(checkpoints, downloads, tmp_path):
    pytest.importorskip("peft")
    from test_lora import make_pipeline

    from pokediff.baselines.lora import add_adapter, load_sdxl, save

    make_pipeline().save_pretrained(tmp_path / "sdxl")
    config = BaselineConfig(system="sdxl-lora", image_size=48, lora=LoraConfig(model=str(tmp_path / "sdxl")))
    pipeline = load_sdxl(config.lora.model, torch.float32)
    add_adapter(pipeline, 4, 0)
    (tmp_path / "lora").mkdir()
    save(config, pipeline, tmp_path / "lora")
    studio = Studio([*checkpoints, tmp_path / "lora"])
    assert list(studio.checkpoints) == ["tiny", "fast", "gan", "lora"]
    settings = studio.settings(
        "lora", prompt=("a cat",), num_images_per_prompt=2, num_inference_steps=2, seed=3, size=48
    )
    parts = [part for part in studio.draw_all(settings) if part]
    assert [len(jobs) for jobs, _ in parts] == [1, 2]  # one after another, so that it can be stopped
    jobs, drawn = parts[-1]
    assert drawn.shape == (2, 48, 48, 4)
    (frame,) = studio.draw(settings)
    np.testing.assert_array_equal(frame.x0, drawn)
    with zipfile.ZipFile(downloads.write_zip(studio.pipeline_of(settings), settings, jobs, drawn)) as bundle:
        assert {"a-cat-3.png", "a-cat-4.png", "a-cat-3.json"} <= set(bundle.namelist())


def test_a_checkpoint_that_cannot_be_loaded_says_so_beside_its_name(server, checkpoints, tmp_path):
    from pokediff.demo.controls import MODEL_INFO, SKIP, _choose

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    (tmp_path / "broken" / "baseline.json").write_text(
        json.dumps({"system": "sdxl-lora", "lora": {"model": "nowhere"}})
    )
    studio = Studio([checkpoints[1], tmp_path / "broken"])
    ((model, *others),) = _choose(studio, "broken")
    assert "nowhere" in model.info
    assert others == [SKIP] * 4
    ((model, *others),) = _choose(studio, "fast")
    assert model.info == MODEL_INFO


def test_denoisers_run_in_one_thread(studio):
    names = {studio.in_thread(lambda: threading.current_thread().name) for _ in range(3)}
    assert len(names) == 1
    assert names != {threading.current_thread().name}


# ------------------------------------------------------------------------------------------------------ the server


@dataclass
class Demo:
    """The running server. `gate` closed, every drawing waits at its next step; `drawn` counts the steps of each."""

    url: str
    folder: Path
    page: Any
    drawn: list[list[int]]
    ended: list[bool] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)


@pytest.fixture(scope="module")
def server(checkpoints, data) -> Iterator[Demo]:
    """The demo in this process, with a queue of 6. It sets what Gradio reads when it is imported: tests that import the
    page's modules need it first.
    """
    from pokediff.demo.server import prepare

    if find_spec("gradio") is None:
        pytest.skip("needs gradio")
    folder = Path(tempfile.mkdtemp(prefix="pokediff-demo-")).resolve()
    reports, pillow_limit = folder / "none", Image.MAX_IMAGE_PIXELS
    config = DemoConfig(checkpoints, data=str(data), reports=str(reports), runs=str(reports), queue=6)
    page, options = prepare(config, folder)
    options["server_port"] = port = free_port()  # now: another process may take it meanwhile
    page.launch(**options, prevent_thread_lock=True)
    yield Demo(f"http://127.0.0.1:{port}", folder, page, [])
    page.close()
    Image.MAX_IMAGE_PIXELS = pillow_limit
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def demo(server, monkeypatch) -> Demo:
    """The server with counted steps."""
    running = Demo(server.url, server.folder, server.page, [])
    running.gate.set()
    original = Studio.draw

    def counted(self: Studio, *args: Any) -> Iterator[Any]:
        counts = [0]
        running.drawn.append(counts)
        try:
            for frame in original(self, *args):
                running.gate.wait(PATIENCE)
                counts[0] += 1
                yield frame
        finally:
            running.ended.append(True)

    monkeypatch.setattr(Studio, "draw", counted)
    return running


def test_it_listens_on_this_machine_only_by_default():
    assert DemoConfig().host == "127.0.0.1"


def test_a_page_that_is_slow_to_answer_needs_no_tunnel(server):
    from gradio import networking

    assert networking.url_ok("http://127.0.0.1:1/")


@pytest.mark.parametrize("path", ["call/sprite/none", "queue/data?session_hash=none"])
def test_a_stream_of_a_server_before_the_restart_ends_with_an_error(server, path):
    answer = requests.get(f"{server.url}/gradio_api/{path}", timeout=PATIENCE)  # raises for an answer that is cut
    assert "404" in answer.text


def test_a_request_by_another_name_is_refused(server):
    """DNS rebinding: to the browser, that page and ours are one site."""
    for path in ("/", "/config", "/gradio_api/call/sprite"):
        answer = requests.get(f"{server.url}{path}", headers={"Host": "evil.example"}, timeout=PATIENCE)
        assert (answer.status_code, "allowed-hosts" in answer.text) == (403, True)
    assert requests.get(server.url, headers={"Host": "localhost:1"}, timeout=PATIENCE).ok


def test_an_unexpected_error_is_in_the_log_and_not_on_the_page(server, capsys):
    from pokediff.demo import controls

    def broken(_):
        raise ZeroDivisionError("secret")
        yield

    with pytest.raises(controls.gr.Error) as raised:
        list(controls.streamed(broken)("a path"))
    nothing, sentence = controls.uploaded(lambda path: next(broken(path)))("a path")
    assert nothing == controls.SKIP
    for words in (sentence, raised.value.message):
        assert "See the server log" in words
        assert "secret" not in words
    assert capsys.readouterr().err.count("ZeroDivisionError: secret") == 2


def test_a_film_shows_all_steps_at_one_size_each_with_its_denoiser(server, studio):
    from pokediff.demo import show

    config = studio.settings(prompt=('a "red" <dragon>',), num_images_per_prompt=2, seed=5)
    words, frames = show.step_words(studio.evaluations(config)), list(studio.draw(config))
    film = show.film(frames, config.prompt[0], words)
    strips = [base64.b64decode(part.partition(")")[0]) for part in film.split("base64,")[1:]]
    assert [Image.open(io.BytesIO(strip)).size for strip in strips] == [
        (64, 9 * 129)
    ] * 2  # 9 steps; 1 px between the pictures
    assert "base-32, 32 px, sigma" in film
    assert "upscaler-64, 64 px, sigma" in film
    assert "<dragon>" not in film
    assert "6 steps at 32 px and 2 steps at 64 px" in show.summary(config, studio.evaluations(config))


def test_reports_and_training_runs_are_shown_or_refused_in_a_sentence(server, tmp_path):
    from pokediff.demo import reports
    from pokediff.evaluation.report import Report, write_report

    settings = dict(styles=["artwork"], n_generated=8, size=32, n_real=9, split="test", n_training=60)
    settings |= dict(background="white", data_sha256="0" * 64, system={"images": "a folder"})
    for name, value in (("one", 0.25), ("two", 0.5)):
        found = Report(settings)
        found.add("Is it <good>?", "kernel distance", value, 8)
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, found)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text('{"figures": [{"floor": 1}]}')
    assert reports.found(tmp_path, "report.json") == ["old", "one", "two"]
    (table,) = reports.show_reports(tmp_path, ["one", "two", "../elsewhere"])
    assert "<td>0.25</td><td>0.5" in table.replace("0.250", "0.25").replace("0.500", "0.5")
    assert "Is it &lt;good&gt;?" in table
    assert "older version" in next(reports.show_reports(tmp_path, ["old"]))
    assert "Choose a report" in next(reports.show_reports(tmp_path, ["../elsewhere"]))
    rows = [{"stage": stage, "step": 20, "loss": 0.5} for stage in ("base-32", "upscaler-64")]
    (tmp_path / "one" / "log.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"stage": "ups')
    (tmp_path / "one" / "previews").mkdir()
    for name in ("base-32-00000010", "base-32-00000010-pairs", "base-32-00000020", "base-32-00000020-pairs",
                 "upscaler-64-00000020"):  # fmt: skip
        (tmp_path / "one" / "previews" / f"{name}.png").write_bytes(png_of(8, 8))
    (curves,) = reports.show_run(tmp_path, "one")
    assert "base-32 20 steps, upscaler-64 20 steps" in curves
    shown = re.findall(r"<figcaption>previews, (.+?)</figcaption>", curves)
    assert shown == ["base-32-00000020", "base-32-00000020-pairs", "upscaler-64-00000020"]
    assert "Choose a training run" in next(reports.show_run(tmp_path, "two"))


def test_a_gradio_without_the_patched_names_is_refused(server):
    from pokediff.demo import patches

    with pytest.raises(PokediffError, match="does not support Gradio"):
        patches.limit_sessions(object(), 3)


def test_only_files_of_its_own_folder_are_served(server, tmp_path, checkpoints):
    mine = server.folder / "run-history-7.png"  # of the prompt "run history", and no path of Gradio's
    mine.write_bytes(encode_png(np.zeros((2, 2, 4), np.uint8)))
    secret = tmp_path / "secret.png"
    secret.write_bytes(mine.read_bytes())
    link = server.folder / "link.png"
    link.symlink_to(secret)
    elsewhere = server.folder / "elsewhere"
    elsewhere.symlink_to(tmp_path)
    file = f"{server.url}/gradio_api/file="
    assert requests.get(f"{file}{mine}", timeout=PATIENCE).content == mine.read_bytes()
    for wanted in (
        "/etc/passwd",
        str(secret),
        str(link),
        f"{elsewhere}/secret.png",
        f"{server.folder}/../{tmp_path.name}/secret.png",
        f"{server.folder}/%2e%2e/{tmp_path.name}/secret.png",
        "setup.cfg",
        str(ROOT / "setup.cfg"),
        f"{checkpoints[0]}/model_index.json",
        "http://127.0.0.1:1/",
        "/%00",
        f"{server.folder}/{'x' * 5000}",
        "file:///etc/passwd",
    ):
        request = requests.Request("GET", server.url).prepare()
        request.url = file + wanted  # as it is: requests would resolve the dots
        with requests.Session() as session:
            found = session.send(request, timeout=PATIENCE)
        assert found.status_code in (400, 403, 404), wanted
        assert b"root:" not in found.content
        assert found.content != secret.read_bytes(), wanted


def test_it_downloads_no_address_for_a_client(server):
    """A client may send an address where a file is expected; Gradio would download it."""
    config = requests.get(f"{server.url}/config", timeout=PATIENCE).json()
    reports = next(row for row in config["dependencies"] if row["targets"] and row["inputs"] and not row["queue"])
    address = {"path": "https://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
    before = set(server.folder.rglob("*"))
    body = {"data": [address] * len(reports["inputs"]), "fn_index": reports["id"], "session_hash": "x"}
    answer = requests.post(f"{server.url}/gradio_api/run/predict", json=body, timeout=PATIENCE)
    assert answer.status_code >= 400
    assert "not fetched" in answer.text
    assert set(server.folder.rglob("*")) == before


@pytest.mark.parametrize(
    "path",
    ["deep_link", "run-history/x", "proxy=http://127.0.0.1:1/", "process_recording", "vibe-code/", "undo-vibe-edit"],
)
def test_what_gradio_does_beside_the_page_is_refused(server, path):
    for send in (requests.get, requests.post):
        answer = send(f"{server.url}/gradio_api/{path}", timeout=PATIENCE)
        assert (answer.status_code, answer.text) == (403, "Not served here.")


A_FILE = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    ("values", "words", "lines"),
    [
        ([], "needed: 9, got: 0", 1),
        (["a cat"], "needed: 9, got: 1", 1),
        (["a cat", A_FILE, "", None, None, None, None, None, False], "not uploaded by a user", 1),
        (["a cat", 1, "", None, None, None, ["tiny"], None, False], "unknown checkpoint", 0),
        (["a cat", 1, "", None, None, None, "x" * 10_000, None, False], "unknown checkpoint", 0),
        ([None, 1, "", None, None, None, None, None, False], "prompt", 0),
    ],
)
def test_values_that_no_drawing_takes_are_one_line_for_the_program_and_in_the_log(server, capsys, values, words, lines):
    joined = requests.post(f"{server.url}/gradio_api/call/sprite", json={"data": values}, timeout=PATIENCE)
    with listen(server.url, joined) as stream:
        event, told = [line.partition(": ")[2] for line in stream.iter_lines(decode_unicode=True) if line]
    assert event == "error"
    message = json.loads(told)["error"]
    assert words in message
    assert message.isprintable()
    assert len(message) <= 1000
    log = capsys.readouterr().err
    assert len(log.splitlines()) == lines
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("queue/join", {"data": [], "fn_index": 10**9, "session_hash": "x"}),
        ("run/predict", {"data": []}),
        ("component_server", {"session_hash": "x", "component_id": 10**9, "fn_name": "x", "data": None}),
    ],
)
def test_a_request_that_gradio_cannot_answer_is_one_line_in_the_log(server, capsys, path, body):
    answer = requests.post(f"{server.url}/gradio_api/{path}", json=body, timeout=PATIENCE)
    assert (answer.status_code, answer.text) == (500, "This request cannot be answered.")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"POST /gradio_api/{path}: ")


def test_a_text_box_without_a_text_is_an_empty_one(server, capsys):
    config = requests.get(f"{server.url}/config", timeout=PATIENCE).json()
    boxes = {component["id"]: component["props"] for component in config["components"]}
    rows = [(row["id"], [boxes[one] for one in row["inputs"]]) for row in config["dependencies"]]
    number, inputs = next(row for row in rows if {"From", "To"} <= {box.get("label") for box in row[1]})
    values = [None if box["label"] in ("From", "To") else box["value"] for box in inputs]
    body = {"data": values, "fn_index": number, "session_hash": "empty"}
    assert requests.post(f"{server.url}/gradio_api/queue/join", json=body, timeout=PATIENCE).ok
    with requests.get(
        f"{server.url}/gradio_api/queue/data?session_hash=empty", stream=True, timeout=PATIENCE
    ) as stream:
        done = next(line for line in stream.iter_lines(decode_unicode=True) if "process_completed" in line)
    assert "Write both prompts first" in done
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (dict(background=b"no picture"), "not a picture"),
        (dict(background=png_of(5000, 5000)), "16,?000,?000 pixels"),
        (dict(layers=[encode_png(np.zeros((4, 4, 4), np.uint8))] * 9), "Too many layers"),
    ],
    ids=["text", "bomb", "layers"],
)
def test_a_canvas_is_checked_as_an_upload(server, parts, words):
    from gradio.components.image_editor import EditorDataBlobs

    from pokediff.demo.patches import sketch_pad

    canvas = sketch_pad()
    canvas.blob_storage["x"] = EditorDataBlobs(**{"background": None, "layers": [], "composite": None, **parts})
    value = canvas.preprocess(type("Payload", (), {"id": "x"})())
    with pytest.raises(PokediffError, match=words):
        uploads.canvas_picture(value)
    assert not canvas.blob_storage


def test_at_most_so_many_canvases_wait_in_memory(server):
    from gradio.components.image_editor import AcceptBlobs

    from pokediff.demo.patches import MAX_CANVASES, sketch_pad

    canvas = sketch_pad()
    for number in range(MAX_CANVASES + 5):
        for kind in ("background", "composite"):
            data = {"id": str(number), "type": kind, "index": None, "file": b"x"}
            canvas.accept_blobs(AcceptBlobs(data=data, files=[("file", b"x")]))
    assert list(canvas.blob_storage) == [str(number) for number in range(5, MAX_CANVASES + 5)]


def test_strokes_are_part_of_the_picture_or_a_mask():
    picture = np.full((20, 20, 4), (200, 30, 30, 255), np.uint8)
    stroke = np.zeros((20, 20, 4), np.uint8)
    stroke[:5] = (0, 0, 255, 255)
    value = {"background": picture, "layers": [stroke]}
    np.testing.assert_array_equal(uploads.canvas_picture(value), np.where(stroke[..., 3:] > 0, stroke, picture))
    background, mask = uploads.canvas_mask(value)
    assert (background == picture).all()
    assert mask[:5].all()
    assert not mask[5:].any()
    for empty, words in ((None, "Upload a picture or draw"), ({"background": picture, "layers": []}, "Paint over")):
        with pytest.raises(PokediffError, match=words):
            uploads.canvas_mask(empty)


@pytest.mark.slow
def test_a_program_draws_and_errors_are_sentences(demo):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(demo.url, verbose=False)
    answer = client.predict("a red dragon", 3, num_inference_steps=4, api_name="/sprite")
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["png"]))))
    assert drawn.shape == (64, 64, 4)
    assert answer["settings"] == {
        "prompt": "a red dragon",
        "seed": 3,
        "checkpoint": "tiny",
        "negative_prompt": "",
        "num_inference_steps": 4,
        "guidance_scale": 1.5,
        "sampler": "dpmpp_2m",
        "size": 64,
        "fast": False,
    }
    again = client.predict("a red dragon", 3, num_inference_steps=4, size=64, api_name="/sprite")
    assert again["png"] == answer["png"]
    steps = [answer["step"] for answer in client.submit("a red dragon", 3, num_inference_steps=100, api_name="/sprite")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 100 + 2 + 1
    with pytest.raises(AppError, match="At most 100 steps"):
        client.predict("a red dragon", 3, num_inference_steps=5000, api_name="/sprite")
    with pytest.raises(AppError, match="Write a prompt first"):
        client.predict("", 3, api_name="/sprite")


def join(url: str, seed: int, steps: int = 4) -> requests.Response:
    """Join the queue, by plain HTTP."""
    values = ["a red dragon", seed, "", steps, 1.5, "dpmpp_2m", None, 32, False]
    return requests.post(f"{url}/gradio_api/call/sprite", json={"data": values}, timeout=PATIENCE)


def listen(url: str, joined: requests.Response) -> requests.Response:
    """The stream of answers."""
    return requests.get(f"{url}/gradio_api/call/sprite/{joined.json()['event_id']}", stream=True, timeout=PATIENCE)


def answer_of(url: str, joined: requests.Response) -> dict:
    """The last answer: the picture."""
    with listen(url, joined) as stream:
        rows = [line for line in stream.iter_lines(decode_unicode=True) if line.startswith("data: [")]
    return json.loads(rows[-1].removeprefix("data: "))[0]


@pytest.mark.slow
def test_every_client_gets_its_own_picture_and_a_full_queue_refuses(demo):
    alone = answer_of(demo.url, join(demo.url, 0))
    demo.gate.clear()
    joined = [join(demo.url, seed) for seed in range(4)]
    wait_for(lambda: len(demo.drawn) == 5)  # four take turns
    joined += [join(demo.url, seed) for seed in range(4, 10)]  # six wait
    refused = join(demo.url, 10)
    demo.gate.set()
    assert refused.status_code == 503
    assert "full" in refused.text
    with ThreadPoolExecutor(len(joined)) as pool:
        answers = list(pool.map(lambda one: answer_of(demo.url, one), joined))
    assert [answer["settings"]["seed"] for answer in answers] == list(range(10))
    assert len({answer["png"] for answer in answers}) == 10
    assert answers[0]["png"] == alone["png"]


@pytest.mark.slow
def test_nobody_draws_for_a_client_that_has_left(demo, monkeypatch):
    counted = Studio.draw

    def slowly(self: Studio, *args: Any) -> Iterator[Any]:
        for frame in counted(self, *args):
            time.sleep(0.05)  # so that the client leaves long before the end
            yield frame

    monkeypatch.setattr(Studio, "draw", slowly)
    streams = [listen(demo.url, join(demo.url, seed, 100)) for seed in range(4)]
    for stream in streams:
        next(stream.iter_content(1))  # the drawing has begun
        stream.close()
    joined = join(demo.url, 9, 2)
    assert answer_of(demo.url, joined)["settings"]["seed"] == 9
    wait_for(lambda: len(demo.ended) == 5)
    assert all(counts[0] < 101 for counts in demo.drawn[:4])


@pytest.mark.slow
def test_the_command_serves_and_tidies_up(checkpoints, tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "pokediff", "demo", "--port", str(port), "--checkpoint", checkpoints[1]]
    environment = {**os.environ, "TMPDIR": str(tmp_path), **PROXIES}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert f"http://127.0.0.1:{port}" in process.stdout.readline()
    wait_for(lambda: is_up(f"http://127.0.0.1:{port}"))
    assert list(tmp_path.glob("pokediff-demo-*"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 0
    assert not list(tmp_path.glob("pokediff-demo-*"))
    assert not (tmp_path / ".ses").exists()  # of ONNX Runtime's telemetry


# Of a user who has no exception for this machine; at this address nothing listens.
PROXIES = dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy"), "http://127.0.0.1:1")
PROXIES |= {"all_proxy": "socks5://127.0.0.1:1", "no_proxy": "", "NO_PROXY": ""}


def test_gradio_asks_its_own_page_by_no_proxy_and_others_are_asked_by_it(monkeypatch):
    for name, value in {**PROXIES, "no_proxy": "corp.example"}.items():
        monkeypatch.setenv(name, value)
    address = "http://127.0.0.1:7860/"
    assert requests.utils.get_environ_proxies(address)["http"] == PROXIES["http_proxy"]
    with server_module.no_proxy():
        assert requests.utils.get_environ_proxies(address) == {}
    assert os.environ["no_proxy"] == "corp.example"
    monkeypatch.delenv("no_proxy")
    with pytest.raises(KeyboardInterrupt), server_module.no_proxy():
        raise KeyboardInterrupt
    assert "no_proxy" not in os.environ


HOLD = """
import sys
from pokediff.demo.server import served_folder

with served_folder() as folder:
    (folder / "drawing").mkdir()
    print(folder.parent, flush=True)
    sys.stdin.read()
"""


@contextmanager
def living(place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process with the folder of a demo in `place`, and the folder."""
    environment = {**os.environ, "TMPDIR": str(place), "TEMP": str(place)}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", HOLD], env=environment, cwd=ROOT, **pipes) as process:
        yield process, Path(process.stdout.readline().strip())
        process.stdin.close()


def test_a_demo_removes_what_killed_ones_left_and_nothing_else(tmp_path, monkeypatch):
    place = (tmp_path / "place").resolve()
    place.mkdir()
    with living(place) as (process, dead):
        process.kill()
        process.wait()
    assert (dead / server_module.SERVED / "drawing").is_dir()
    work = place / "pokediff-demo-training"  # of a training that was killed
    shutil.copytree(dead, work)
    (work / "run.json").touch()
    notes = place / "pokediff-demo-notes"
    (notes / server_module.SERVED).mkdir(parents=True)
    linked = shutil.copytree(dead, tmp_path / "elsewhere")
    link = place / "pokediff-demo-link"
    link.symlink_to(linked)
    if hasattr(os, "getuid"):
        with monkeypatch.context() as other:
            other.setattr(os, "getuid", lambda: dead.stat().st_uid + 1)
            server_module.remove_left(place)
        assert dead.is_dir()
    with living(place) as (_, alive):
        server_module.remove_left(place)
        assert {*place.iterdir()} == {work, notes, link, alive}
        assert (alive / server_module.SERVED / "drawing").is_dir()
    assert {*place.iterdir()} == {work, notes, link}
    assert (linked / server_module.SERVED / "drawing").is_dir()


def test_a_demo_that_is_just_being_made_is_not_taken_for_a_killed_one(tmp_path):
    (tmp_path / "pokediff-demo-new").mkdir()
    server_module.remove_left(tmp_path)
    (tmp_path / "pokediff-demo-new" / ".lock").touch()
    server_module.remove_left(tmp_path)
    assert (tmp_path / "pokediff-demo-new" / ".lock").is_file()


def is_up(url: str) -> bool:
    try:
        return requests.get(url, timeout=PATIENCE).ok
    except requests.ConnectionError:
        return False


# ------------------------------------------------------------------------------------------------- in a browser


@contextmanager
def opened(browser, server, **options) -> Iterator[Any]:
    """The page, newly opened by another visitor; it must neither contact other hosts nor log errors."""
    context = browser.new_context(accept_downloads=True, **options)
    page = context.new_page()
    page.set_default_timeout(1000 * PATIENCE)
    elsewhere, broken = [], []
    own = (server.url, "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else elsewhere.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#draw")
    yield page
    context.close()
    assert elsewhere == []
    assert broken == []


@pytest.fixture
def page(browser, server):
    with opened(browser, server, viewport={"width": 1280, "height": 900}) as page:
        yield page


@pytest.fixture(scope="module")
def used_page(browser, server):
    """One page for tests that need no new one: it takes seconds to open."""
    with opened(browser, server, viewport={"width": 1280, "height": 900}) as page:
        yield page


@pytest.fixture(scope="module")
def phone(browser, server):
    """The page on a phone in dark mode, one for its tests."""
    with opened(browser, server, viewport={"width": 390, "height": 844}, color_scheme="dark") as page:
        yield page


DONE = "document.querySelector('#status').innerText.startsWith('Done')"
COUNT = """() => { window.seen = 0;
  new MutationObserver(() => { const strip = document.querySelector('#film .strip');
    if (strip && window.last !== strip.style.backgroundImage) { window.last = strip.style.backgroundImage;
      window.seen += 1; } })
    .observe(document.querySelector('#film'), {childList: true, subtree: true, attributes: true}); }"""


def save(page, end: str, folder: Path) -> Path:
    """Click the visible file whose name ends so, and keep it."""
    link = page.locator(f'a[download$="{end}"]').locator("visible=true").first
    with page.expect_download() as download:
        link.click()
    download.value.save_as(path := folder / download.value.suggested_filename)
    return path


def until_idle(page) -> None:
    """Until the last drawing is over: Gradio ignores a click before."""
    page.wait_for_function("!document.querySelector('#film .pending, #film .generating')")


def until_still(page) -> None:
    """Until the page, which scrolls to the picture of a drawing, has come to rest."""
    moved = "() => { const before = window.before; window.before = window.scrollY; return before === window.scrollY; }"
    page.wait_for_function(moved, polling=500)


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


@pytest.mark.slow
def test_type_click_and_watch_it_emerge(page, tmp_path):
    page.fill("#prompt textarea", "a green frog")
    page.wait_for_selector("#film", state="attached")
    page.evaluate(COUNT)
    page.click("#draw")
    page.wait_for_function(DONE)
    assert page.evaluate("window.seen") >= 4  # of 10: a browser on a busy machine may show two as one
    assert "6 steps at 32 px and 2 steps at 64 px" in page.inner_text("#status")
    page.wait_for_selector('a[download$=".json"]')
    # the slider shows every step
    strip = page.locator("#film .strip").last
    assert strip.evaluate("e => e.style.getPropertyValue('--frames')") == "9"
    page.locator("#scrub input[type=range]").fill("8")
    page.wait_for_function("document.querySelector('#film .step').innerText.includes('upscaler-64')")
    assert strip.evaluate("e => Number(e.style.getPropertyValue('--at'))") == pytest.approx(7 / 8)
    # download
    file = save(page, ".png", tmp_path)
    picture = Image.open(file)
    assert picture.size == (512, 512)
    assert picture.mode == "RGBA"
    assert Image.open(save(page, ".gif", tmp_path)).n_frames > 5
    facts = save(page, ".json", tmp_path)
    settings = read_settings(facts)
    assert (file.name, facts.name) == (f"a-green-frog-{settings.seed}.png", f"a-green-frog-{settings.seed}.json")
    assert settings.prompt == ("a green frog",)
    again = sample(replace(settings, out=str(tmp_path / "again")))
    assert (again / "0000.png").read_bytes() == file.read_bytes()
    page.wait_for_selector("#near .verdict-new, #near .verdict-close, #near .verdict-copy")


@pytest.mark.slow
def test_model_size_and_fast_are_offered_where_the_checkpoint_has_them(page):
    steps = "document.querySelector(\"input[aria-label='number input for Steps']\").value"
    page.get_by_text("More settings").first.click()
    assert not page.get_by_label("Fast").first.is_visible()
    page.get_by_label("32 px").first.check()
    page.click("#draw")
    page.wait_for_function(DONE)
    assert ", 6 steps at 32 px, guidance" in page.inner_text("#status")
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name="fast").click()
    page.wait_for_function(f"{steps} === '4'")
    assert not page.get_by_label("64 px").first.is_visible()
    page.get_by_label("Fast").first.check()
    page.wait_for_function(f"{steps} === '2'")
    page.click("#draw")
    page.wait_for_function(f"{DONE} && document.querySelector('#status').innerText.includes(', 2 steps at 32 px')")


@pytest.mark.slow
def test_a_baseline_in_the_page(page):
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name="gan").click()
    page.get_by_label("64 px").first.wait_for(state="hidden")  # the settings of its own, which has one size
    page.get_by_text("More settings").first.click()
    steps = page.locator("input[aria-label='number input for Steps']").first
    steps.wait_for(state="hidden")
    page.click("#draw")
    page.wait_for_function(DONE)
    assert page.locator("#film .strip").count() == 1  # the picture, and no noise
    assert not page.locator("#scrub").is_visible()
    page.get_by_label("Model").first.click()
    page.get_by_role("option", name="tiny").click()
    steps.wait_for(state="visible")
    page.click("#draw")
    page.wait_for_function(f"{DONE} && document.querySelectorAll('#film .strip').length === 2")
    page.locator("#scrub").wait_for(state="visible")
    open_tab(page, "Inside")
    page.get_by_label("Model").locator("visible=true").click()
    page.get_by_role("option", name="gan").locator("visible=true").click()
    page.get_by_label("Prompt").locator("visible=true").fill("a blue turtle")
    page.click("#words")
    page.wait_for_selector("#words-result img[alt='attention to each word of a blue turtle']")


@pytest.mark.slow
def test_a_waiting_client_sees_its_place(page, demo):
    demo.gate.clear()
    for seed in range(6):
        assert join(demo.url, seed).status_code == 200
    page.click("#draw")
    page.get_by_text("queue: 3/3").wait_for()
    demo.gate.set()
    page.wait_for_function(DONE)


@pytest.mark.slow
def test_the_keyboard_is_enough(used_page):
    page = used_page
    page.focus("#prompt textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type("a yellow mouse")
    page.keyboard.press("Enter")
    page.wait_for_function(DONE)


@pytest.mark.slow
def test_word_buttons_write_into_the_prompt(used_page):
    page = used_page
    page.fill("#prompt textarea", "official artwork of a cat")
    page.get_by_role("button", name="pixel sprite", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'pixel sprite of a cat'")
    page.get_by_role("button", name="pixel sprite", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'of a cat'")


@pytest.mark.slow
def test_stop_stops_at_the_next_step(page, demo):
    page.click("#draw")
    page.wait_for_selector('a[download$=".json"]')
    page.locator("#scrub").wait_for()
    page.get_by_text("More settings").first.click()
    page.locator("input[aria-label='number input for Steps']").first.fill("100")
    until_idle(page)
    page.click("#draw")
    page.wait_for_function("document.querySelector('#status').innerText.startsWith('Step')")
    demo.gate.clear()
    page.click("#draw-stop")
    page.wait_for_function("document.querySelector('#status').innerText === 'Stopped.'")
    demo.gate.set()
    wait_for(lambda: len(demo.ended) == 2)
    assert demo.drawn[1][0] < 100 + 2 + 1
    assert page.inner_text("#status") == "Stopped."
    assert not page.locator("#scrub, a[download]").locator("visible=true").count()  # of the drawing before
    assert page.locator(".past").count() == 1


@pytest.mark.slow
def test_a_bad_upload_is_refused_in_a_sentence_and_a_good_one_drawn_from(page, tmp_path):
    open_tab(page, "img2img")
    page.wait_for_selector("#canvas canvas")
    page.click("#img2img")
    page.get_by_text("Upload a picture or draw one first.").wait_for()
    bad, good = tmp_path / "bad.png", tmp_path / "good.jpg"
    bad.write_bytes(b"no picture")
    Image.new("RGB", (300, 200), "red").save(good)
    for path in (bad, good):
        with page.expect_file_chooser() as chooser:
            page.click("#upload")
        chooser.value.set_files(path)
        if path == bad:
            page.get_by_text("This file cannot be used: not a picture.").wait_for()
    page.get_by_text("This file cannot be used: not a picture.").wait_for(state="detached")
    until_seen(page, (255, 0, 0))
    page.click("#img2img")
    page.wait_for_selector("#img2img-result .strip")
    assert "Traceback" not in page.inner_text("body")


@pytest.mark.slow
def test_a_batch_is_one_zip(used_page, tmp_path):
    page = used_page
    open_tab(page, "Batch")
    upload = page.get_by_role("button", name="Read prompts from a text file")
    for content in (b"\xff\xfe\x00", b"a red cat\n# not this\na blue cat"):
        (tmp_path / "prompts.txt").write_bytes(content)
        with page.expect_file_chooser() as chooser:
            upload.click()
        chooser.value.set_files(tmp_path / "prompts.txt")
        if content[0] == 0xFF:
            page.get_by_text("This file cannot be used: not UTF-8 text.").wait_for()
    page.wait_for_function("document.querySelector('#prompts textarea').value.includes('not this')")
    page.click("#draw-all")
    page.wait_for_function("document.querySelector('#batch-status').innerText.includes('Done')")
    page.wait_for_selector('a[download="a-red-cat-7-and-3-more.zip"]')
    with zipfile.ZipFile(save(page, ".zip", tmp_path)) as bundle:
        rows = json.loads(bundle.read("a-red-cat-7.json"))["pictures"]
    assert [row["prompt"] for row in rows] == ["a red cat"] * 2 + ["a blue cat"] * 2


@pytest.mark.slow
def test_the_other_tabs(used_page):
    page = used_page
    open_tab(page, "Inside")
    page.click("#words")
    page.wait_for_selector("#words-result .bar")
    assert page.locator("#words-result th").filter(has_text="turtle").count() == 1
    page.get_by_text("Noise schedule").click()
    page.click("#schedule")
    page.wait_for_selector("#schedule-result img")
    assert page.locator("#schedule-result th").filter(has_text="upscaler-64").count() == 1
    page.get_by_text("Samplers and steps side by side").click()
    page.click("#compare")
    page.wait_for_function("document.querySelectorAll('#compare-result img').length === 9")
    open_tab(page, "Reports")
    page.get_by_text("Choose a report.").wait_for()
    for name, button, result in (
        ("Interpolation", "#interpolate", "#interpolation-result img[alt=animation]"),
        ("Variations", "#variations", "#variations-result .strip"),
        ("Palette", "#reduce", "#palette-result img"),
    ):
        open_tab(page, name)
        page.click(button)
        page.wait_for_selector(result)


def box(page, selector: str) -> tuple[float, float]:
    """Top and bottom of an element, px below the top of the window."""
    found = page.locator(selector).locator("visible=true").bounding_box()
    return found["y"], found["y"] + found["height"]


def panels(page) -> list[str]:
    """The panels of the film that are seen: x, x0."""
    seen = page.locator("#film .strip").locator("visible=true").all()
    return [strip.get_attribute("aria-label").rpartition(", ")[2] for strip in seen]


@pytest.mark.slow
def test_a_phone_in_dark_mode(phone):
    for tab in ("Draw", "Batch", "img2img", "Interpolation", "Variations", "Palette", "Inside", "Reports"):
        found = phone.get_by_role("tab", name=tab, exact=True).bounding_box()  # None if it were in a menu
        assert 0 <= found["x"] <= found["x"] + found["width"] <= 390
    assert not phone.get_by_label("More tabs").is_visible()
    assert phone.get_by_label("Model").first.is_visible()  # in no closed group
    assert not phone.locator("#scrub").is_visible()
    phone.click("#draw")
    phone.wait_for_function(DONE)
    phone.wait_for_selector('a[download$=".json"]')
    phone.wait_for_selector(".past")
    until_still(phone)
    heights = [box(phone, selector) for selector in ("#draw", "#status", "#film .frame", "#history")]
    assert heights[0][0] >= 0
    assert heights == sorted(heights)  # button, status and picture, nothing over them
    assert heights[2][1] <= heights[3][0] <= heights[3][1] <= 844
    assert heights[2][0] - heights[0][1] < 150
    assert heights[2][1] - heights[2][0] > 250
    assert panels(phone) == ["x0"]  # the picture, once
    assert not phone.locator("#film figcaption").locator("visible=true").count()
    place = phone.locator("#scrub").bounding_box()
    phone.locator("#scrub input[type=range]").fill("3")
    phone.wait_for_function("document.querySelector('#film .step').innerText.startsWith('Step 3 of 9')")
    assert panels(phone) == ["x", "x0"]
    assert phone.get_by_text("x0: the predicted clean picture; corner: x").is_visible()
    assert phone.locator("#scrub").bounding_box() == place  # it stays under the finger
    phone.click("#replay")
    phone.wait_for_function("document.querySelector('#film .step').innerText.startsWith('Step 9 of 9')")
    assert panels(phone) == ["x0"]
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.evaluate("document.body.classList.contains('dark')")
    for control in phone.locator("input:visible, textarea:visible").all():  # screen readers need a name for each
        named = (
            "e => !!(e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.title)"
        )
        assert control.evaluate(named), control.evaluate("e => e.outerHTML")


@pytest.mark.slow
def test_on_a_phone_every_tab_scrolls_to_its_pictures(phone):
    for tab, button, name in (
        ("Batch", "#draw-all", "batch"),
        ("Interpolation", "#interpolate", "interpolation"),
        ("Variations", "#variations", "variations"),
        ("Palette", "#reduce", "palette"),
    ):
        open_tab(phone, tab)
        phone.evaluate(f"document.querySelector('{button}').scrollIntoView({{block: 'end'}})")
        phone.click(button)
        phone.wait_for_function(f"document.querySelector('#{name}-status').innerText.startsWith('Done')")
        # The page scrolls, and takes a while: both places are read at once.
        phone.wait_for_function(
            """name => { const [status, result] = ['status', 'result'].map(part =>
                document.querySelector(`#${name}-${part}`).getBoundingClientRect().top);
                return 0 <= status && status < result && result < 844 - 250; }""",
            arg=name,
        )
        assert phone.evaluate("document.documentElement.scrollWidth") <= 390


# ------------------------------------------------------------------------------------------------------- the history


def choose(page, index: int) -> str:
    """Choose a picture of the history, 0 for the newest. Returns its words."""
    page.locator(".past").nth(index).click()
    page.locator("#reuse").wait_for()
    words = page.locator(".past").nth(index).get_attribute("title")
    page.wait_for_function("words => document.querySelector('#past-words').innerText.endsWith(words)", arg=words)
    return words


def send_to(page, tab: str) -> None:
    page.locator("#send").get_by_role("button", name=f"→ {tab}").click()
    until_tab(page, tab)


def until_tab(page, tab: str) -> None:
    page.wait_for_function(f"document.querySelector('[role=tab][aria-selected=true]').innerText === '{tab}'")


def value(page, label: str) -> str:
    return page.get_by_label(label).locator("visible=true").first.input_value()


@pytest.mark.slow
def test_a_picture_of_the_history_goes_on_in_any_tab_and_comes_back(page, tmp_path):
    page.fill("#prompt textarea", "a green frog")
    page.get_by_label("32 px").first.check()
    page.click("#draw")
    page.wait_for_selector('a[download^="a-green-frog"][download$=".json"]')
    seed = page.locator(".past").get_attribute("title").split("seed ")[1].split(",")[0]
    drawn = np.asarray(Image.open(save(page, ".png", tmp_path)))[::8, ::8]
    page.fill("#prompt textarea", "a red cat")
    page.get_by_label("64 px").first.check()
    until_idle(page)
    page.click("#draw")
    page.wait_for_selector('a[download^="a-red-cat"][download$=".json"]')
    assert page.locator(".past").count() == 2
    assert choose(page, 1) == f"a green frog, seed {seed}, 32 px"
    for tab in ("Interpolation", "Variations", "Inside"):
        send_to(page, tab)
        wait_for(lambda tab=tab: value(page, "From" if tab == "Interpolation" else "Prompt") == "a green frog")
        wait_for(lambda: value(page, "Seed") == seed)
        wait_for(page.get_by_role("radio", name="32 px").locator("visible=true").is_checked)
    send_to(page, "img2img")
    page.wait_for_selector("#canvas canvas")
    page.wait_for_timeout(1000)
    page.click("#img2img")
    given = np.asarray(Image.open(save(page, "-image.png", tmp_path)))
    assert given.shape == (256, 256, 4)
    difference = np.abs(premultiply(given[4::8, 4::8]).astype(int) - premultiply(drawn))
    assert difference.max() <= 12  # a browser rounds
    send_to(page, "Palette")
    page.locator(f'a[download="a-green-frog-{seed}.png"]').locator("visible=true").wait_for()
    page.click("#reduce")
    page.wait_for_selector('a[download$="-colours.png"]')
    reduced = np.asarray(Image.open(save(page, "-colours.png", tmp_path)))
    assert reduced.shape == (256, 256, 4)
    assert 0 < len(np.unique(reduced[reduced[..., 3] > 0], axis=0)) <= 12
    assert page.locator(".past").count() == 4
    page.click("#reuse")
    until_tab(page, "Draw")
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'a green frog'")
    wait_for(page.get_by_role("radio", name="32 px").locator("visible=true").is_checked)
    until_idle(page)
    page.click("#draw")
    page.wait_for_function("document.querySelectorAll('.past').length === 5")
    same = "e => e.map(past => past.querySelector('img').src + past.title)"
    pictures = page.locator(".past").evaluate_all(same)
    assert pictures[0] == pictures[4]
    assert len(set(pictures)) == 4


@pytest.mark.slow
def test_nobody_sees_the_history_of_another_and_a_closed_page_leaves_none(browser, server, monkeypatch):
    from pokediff.demo.history import History

    original, forgotten = History.forget, []

    def forget(self: History, session: str) -> None:
        before = self.drawn(session)
        original(self, session)
        forgotten.append((before, self.drawn(session)))

    monkeypatch.setattr(History, "forget", forget)
    with opened(browser, server) as other:
        with opened(browser, server) as mine:
            mine.click("#draw")
            mine.wait_for_selector(".past")
            other.click("#draw")
            other.wait_for_selector(".past")
            pictures = [page.locator(".past").evaluate_all("e => e.map(p => p.title)") for page in (mine, other)]
            assert len(pictures[0]) == len(pictures[1]) == 1
            assert pictures[0] != pictures[1]  # of random seeds
        wait_for(lambda: (1, 0) in forgotten)  # other pages may have been closed just before
        assert other.locator(".past").count() == 1


@pytest.fixture
def history(server):
    from pokediff.demo.history import History

    return History()


def kept(studio, history, tab: str, **settings: Any) -> list[Any]:
    """Past pictures of a drawing, the first one first."""
    config = studio.settings(**settings)
    jobs = make_jobs(config.prompt, config)
    history.add("me", tab, settings, config, jobs, [np.full((32, 32, 4), k, np.uint8) for k in range(len(jobs))])
    return [history.choose("me", history.drawn("me") - len(jobs) + k) for k in range(len(jobs))]


def test_the_history_is_bounded(studio, history, monkeypatch):
    from pokediff.demo import history as module

    rng, config = np.random.default_rng(0), studio.settings(prompt=("a cat",), num_images_per_prompt=16)
    noise = rng.integers(0, 256, (16, 32, 32, 4), np.uint8)
    for _ in range(5):
        history.add("me", "Draw", {}, config, make_jobs(config.prompt, config), noise)
    assert history.html("me").count('class="past"') == module.MOST
    assert history.choose("me", 0) is None  # the oldest ones go
    np.testing.assert_array_equal(history.choose("me", 79).picture, noise[15])
    monkeypatch.setattr(module, "MOST_BYTES", 10 * len(encode_png(noise[0])))
    history.add("me", "Draw", {}, config, make_jobs(config.prompt, config)[:1], noise[:1])
    assert history.html("me").count('class="past"') in (9, 10)
    assert history.html("other") == ""
    for number in range(module.VISITORS):
        history.drawn(str(number))
    assert history.drawn("me") == 0


def test_what_was_typed_is_escaped_in_the_history(studio, history):
    kept(studio, history, "Draw", prompt=('<b>"x"</b>',))
    assert "<b>" not in history.html("me")
    assert "&lt;b&gt;&quot;x&quot;" in history.html("me")


def test_prompt_seed_and_settings_of_a_past_picture(studio, history):
    from pokediff.demo.controls import DEFAULT_SAMPLER, SKIP
    from pokediff.demo.send import past_values, sampling_values

    third = kept(studio, history, "Draw", prompt=("a cat",), num_images_per_prompt=3, seed=5, sampler="ddim")[2]
    values = past_values(third, "Draw", again=True) | sampling_values(studio, third, "Draw")
    assert (values["prompt"], values["seed"], values["random"], values["num_images_per_prompt"]) == (
        "a cat",
        7,
        False,
        1,
    )
    assert (values["checkpoint"], values["sampler"], values["low"], values["high"]) == ("tiny", "ddim", 0, 100)
    assert values["size"].value == 64
    assert (values["best_of"].value, values["best_of"].visible) == (1, False)  # the tiny checkpoint has no scorer

    varied = kept(studio, history, "Variations", prompt=("a cat",), num_images_per_prompt=3, seed=5, variation=0.3)[2]
    assert past_values(varied, "Draw", again=False)["seed"] == 5  # it is near to the picture of that seed
    again = past_values(varied, "Variations", again=True)
    assert (again["seed"], again["num_images_per_prompt"], again["variation"]) == (5, 3, 0.3)

    between = dict(prompt=("a cat", "a dog"), interpolate=5, seed=5)
    near, far = (kept(studio, history, "Interpolation", **between)[k] for k in (1, 3))
    assert [past_values(one, "Draw", again=False)["prompt"] for one in (near, far)] == ["a cat", "a dog"]
    assert [past_values(one, "Draw", again=False)["seed"] for one in (near, far)] == [5, 6]
    assert past_values(far, "Interpolation", again=True)["seed"] == 5

    (one,) = kept(studio, history, "Draw", prompt=("a cat",), checkpoint="gan")
    assert sampling_values(studio, one, "Draw")["checkpoint"] == "gan"
    assert sampling_values(studio, one, "Draw")["sampler"] == DEFAULT_SAMPLER
    assert set(map(str, sampling_values(studio, one, "img2img").values())) == {str(SKIP)}  # it draws from prompts alone


# ------------------------------------------------------------------------------------------------ the sketch pad


BRUSH = (0x3B, 0x82, 0xF6)


def canvas_share(page, color: tuple[int, int, int]) -> float:
    """The share of the canvas that has this colour."""
    shot = Image.open(io.BytesIO(page.locator("#canvas canvas").first.screenshot())).convert("RGB")
    return float((np.abs(np.asarray(shot).astype(int) - color).max(-1) < 24).mean())


def until_seen(page, color: tuple[int, int, int], act: Callable[[], None] = lambda: None) -> None:
    for _ in range(PATIENCE):  # as a person would: look, and try again; the editor loses strokes while it is busy
        act()
        page.wait_for_timeout(1000)
        if canvas_share(page, color) > 0.05:
            return
    raise AssertionError(f"{color} is nowhere on the canvas")


def paint(page, top: int, bottom: int) -> None:
    """One stroke to and fro: where no graphics card helps, the editor takes seconds for each stroke and its moves."""
    page.click('#canvas button[aria-label="Brush"]')
    box = page.locator("#canvas canvas").first.bounding_box()
    middle, center = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    side = -80
    page.mouse.move(middle + side, center + top)
    page.mouse.down()
    for down in range(top, bottom, 20):
        page.mouse.move(middle + side, center + down)
        page.mouse.move(middle - side, center + down)
        side = -side
    page.mouse.up()


@pytest.mark.slow
def test_a_sketch_and_inpainting(page, tmp_path):
    open_tab(page, "img2img")
    page.wait_for_selector("#canvas canvas")
    until_seen(page, BRUSH, lambda: paint(page, -40, 41))
    page.click("#img2img")
    page.wait_for_selector('a[download$="-image.png"]')
    sketch = np.asarray(Image.open(save(page, "-image.png", tmp_path)).convert("RGB")).reshape(-1, 3)
    assert (np.abs(sketch.astype(int) - BRUSH).max(1) < 8).mean() > 0.1
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((128, 128, 4), (200, 30, 30, 255), np.uint8)).save(picture)
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(picture)
    page.get_by_label("inpainting").click()
    until_seen(page, (200, 30, 30))
    until_seen(page, BRUSH, lambda: paint(page, -60, -20))
    page.click("#img2img")
    page.wait_for_selector('a[download$="-mask.png"]')
    mask = np.asarray(Image.open(save(page, "-mask.png", tmp_path)).convert("L")) > 0
    assert 0.05 < mask.mean() < 0.6
    assert not mask[-30:].any()
