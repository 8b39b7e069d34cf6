from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from zipfile import ZipFile

import numpy as np
import pytest

from pokediff.config import SampleConfig, Sampling
from pokediff.data.images import premultiply, read_image
from pokediff.drawing import web as site_module
from pokediff.drawing.pixelart import PIXEL_COLORS, finish
from pokediff.drawing.sample import sample
from pokediff.drawing.web import HEADERS, find_page, listed_files, make_server, replace_site, rights_of, web
from pokediff.errors import PokediffError
from pokediff.paths import shipped

WEB = Path(__file__).parents[1] / "web"
built = (shipped("web", "dist") / "index.html").is_file()
needs_page = pytest.mark.skipif(not built, reason="the page is not built: cd web && npm ci && npm run build")


# ------------------------------------------------------------------------------------------------- without a browser


def test_a_page_that_is_not_built_names_the_line_that_builds_it(monkeypatch, tmp_path):
    monkeypatch.setattr(site_module, "shipped", lambda kind, name: tmp_path / name)
    with pytest.raises(PokediffError, match="npm ci && npm run build"):
        find_page()


@needs_page
def test_a_folder_with_other_files_is_not_written_into(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PokediffError, match="holds other files"):
        web(None, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(PokediffError, match="is a file"):
        web(None, tmp_path / "mine.txt")
    (tmp_path / "site.json").write_text('{"name": "my site"}')  # of another program
    with pytest.raises(PokediffError, match="no list of this command"):
        web(None, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt", "site.json"}


def new_site(folder: Path, files: dict[str, str]) -> Path:
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


OLD = {"index.html": "1", "model/a-1.onnx": "a", "assets/x-1.js": "x"}
NEW = {"index.html": "2", "model/a-2.onnx": "b", "assets/x-1.js": "x"}


def test_a_new_site_replaces_the_old_one_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    replace_site(new_site(tmp_path / "new", OLD), out, set())
    listed = json.loads((out / "site.json").read_text())
    (out / "CNAME").write_text("example.org")  # of the host, not ours
    listed["model"].append("../victim")
    (out / "site.json").write_text(json.dumps(listed))
    (tmp_path / "victim").write_text("")
    replace_site(new_site(tmp_path / "new", NEW), out, listed_files(out / "site.json"))
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files == {"CNAME", "assets/x-1.js", "index.html", "model/a-2.onnx", "site.json"}
    assert (out / "index.html").read_text() == "2"
    assert json.loads((out / "site.json").read_text()) == {
        "page": ["assets/x-1.js", "index.html"],
        "model": ["model/a-2.onnx"],
    }
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize("number", range(7))
def test_wherever_replacing_is_cut_the_next_run_deletes_the_old_files(tmp_path, monkeypatch, number):
    """Cut before the change of this number: list, three files, a deletion, list; and not at all."""
    out, done = tmp_path / "out", 0

    def counted(change: Callable[..., None]) -> Callable[..., None]:
        def cut(*arguments: Any, **options: Any) -> None:
            nonlocal done
            if done == number:
                raise KeyboardInterrupt
            done += 1
            change(*arguments, **options)

        return cut

    out.mkdir()
    replace_site(new_site(tmp_path / "new", OLD), out, set())
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        replace_site(new_site(tmp_path / "new", NEW), out, listed_files(out / "site.json"))
    replace_site(new_site(tmp_path / "new", NEW), out, listed_files(out / "site.json"))
    found = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert done == number
    assert list(json.loads(found.pop("site.json")).values()) == [["assets/x-1.js", "index.html"], ["model/a-2.onnx"]]
    assert found == NEW


def test_the_rights_are_those_of_the_model_card(tmp_path):
    assert "names no authors" in rights_of(tmp_path)
    (tmp_path / "README.md").write_text("# x\n\n**Rights.** By *Ann*; see\n[the list](ATTRIBUTION.md), `x`.\n\nMore.\n")
    assert rights_of(tmp_path) == "By Ann; see the list, x."
    assert "Nintendo" in rights_of(shipped("checkpoints", "pokediff"))


def test_the_values_of_the_typescript_tests_are_pythons(monkeypatch):
    monkeypatch.syspath_prepend(str(WEB.parent / "scripts"))
    import web_values

    def compare(ours, stored, place: str) -> None:
        if isinstance(ours, dict):
            assert ours.keys() == stored.keys(), place
            for key in ours:
                compare(ours[key], stored[key], f"{place}.{key}")
        elif isinstance(ours, list | tuple):
            assert len(ours) == len(stored), place
            for k, value in enumerate(ours):
                compare(value, stored[k], f"{place}[{k}]")
        elif isinstance(ours, float):
            assert ours == pytest.approx(stored, abs=2e-6), place
        elif place.endswith(".x0"):  # floats of another processor differ in their last digits
            one, other = (np.frombuffer(base64.b64decode(text), "<f4") for text in (ours, stored))
            np.testing.assert_allclose(one, other, atol=1e-5, err_msg=place)
        else:
            assert ours == stored, place

    for name, values in web_values.sections().items():
        stored = json.loads((WEB / "test" / "values" / f"{name}.json").read_text(encoding="utf-8"))
        compare(values, stored, name)


@pytest.mark.skipif(not (WEB / "node_modules").is_dir(), reason="needs Node.js: cd web && npm ci")
@pytest.mark.parametrize("script", ["test", "check"])
def test_the_typescript_tests_pass(script):
    npm = shutil.which("npm")
    assert npm
    done = subprocess.run([npm, "run", script], cwd=WEB, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --------------------------------------------------------------------------------------------------------- the site


@pytest.fixture(scope="module")
def printed(tiny_checkpoint, tmp_path_factory) -> Iterator[tuple[Path, str, str]]:
    """The folder of the site that the command writes and serves, and the two lines that it prints."""
    pytest.importorskip("onnxscript")
    out = tmp_path_factory.mktemp("web") / "site"
    command = [sys.executable, "-m", "pokediff", "web", "--checkpoint", str(tiny_checkpoint), "--out", str(out)]
    with subprocess.Popen([*command, "--serve", "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        yield out, process.stdout.readline(), process.stdout.readline()
        process.terminate()


@pytest.fixture(scope="module")
def site(printed) -> Path:
    return printed[0]


@pytest.fixture(scope="module")
def address(printed) -> str:
    return printed[2].split()[0] + "/"


@contextmanager
def served(server: ThreadingHTTPServer):
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def visit(browser):
    """A function that opens the page as a new visitor; the page must contact its own host only and log no errors."""
    contexts, faults = [], []

    def visit(url: str, width: int = 1280, script: str = "", **options):
        context = browser.new_context(viewport={"width": width, "height": 844}, accept_downloads=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.add_init_script(script)
        page.set_default_timeout(600_000)  # a slow machine is no failure
        host = url.split("#")[0]
        page.on("request", lambda r: None if r.url.startswith((host, "blob:", "data:")) else faults.append(r.url))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda line: faults.append(line.text) if line.type == "error" else None)
        page.faults = faults
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not faults


# `frames` of the page: the last step of every picture, as its worker gave it.
RECORD_FRAMES = """
window.frames = {};
window.Worker = class extends Worker {
  constructor(...given) {
    super(...given);
    this.addEventListener("message", ({ data }) => data.type === "frame" && (window.frames[data.job] = data.frame));
  }
};
"""


def link(url: str, **values) -> str:
    return f"{url}#{urlencode(values)}"


def wait_for(page, text: str) -> None:
    page.get_by_role("status").filter(has_text=re.compile(text)).first.wait_for()


def download(page, name: str) -> tuple[str, bytes]:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=name, exact=True).click()
    return waiting.value.suggested_filename, Path(waiting.value.path()).read_bytes()


def one_to_one(page) -> None:
    page.get_by_label("Enlarged").select_option("1")


def sampled(checkpoint, out: Path, prompt: str, **options) -> np.ndarray:
    """What sample.py draws in float32 from the seed itself."""
    sampling = Sampling(precision="fp32", best_of=1, size=options.pop("size", 64))
    folder = sample(
        SampleConfig(prompt=(prompt,), checkpoint=str(checkpoint), out=str(out), sampling=sampling, **options)
    )
    return read_image(sorted(folder.glob("[0-9]*.png"))[-1].read_bytes())


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(premultiply(one).astype(int) - premultiply(other)).max())


@needs_page
@pytest.mark.slow
def test_the_site_holds_its_files_and_its_list(site):
    model, listed = (json.loads((site / name).read_text()) for name in ("model.json", "site.json"))
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert files - {"site.json", "service-worker.js"} == set(listed["page"]) | set(listed["model"])
    assert [one["name"] for one in model["denoisers"]] == ["base-32", "refiner-32", "upscaler-64"]
    for file in [*model["denoisers"], model["textEncoder"], model["tokenizer"]]:
        assert (site / file["file"]).stat().st_size == file["bytes"]
    graph = pytest.importorskip("onnx").load((site / model["denoisers"][0]["file"]).as_posix()).graph
    stored = {math.prod(tensor.dims): tensor.data_type for tensor in graph.initializer}
    assert stored[max(stored)] == 10  # onnx.TensorProto.FLOAT16


@needs_page
@pytest.mark.slow
def test_the_command_writes_and_serves_it(printed, address):
    import requests

    assert "MB of networks" in printed[1]
    assert int(re.search(r"at most (\d+) of 255 levels apart", printed[1])[1]) <= 2
    assert "<title>" in requests.get(address, timeout=600).text


@needs_page
@pytest.mark.slow
def test_the_server_isolates_the_page(address, site):
    import requests

    answer = requests.get(address, timeout=600)
    assert HEADERS.items() <= dict(answer.headers).items()
    assert answer.headers["Content-Security-Policy"] in answer.text
    assert answer.headers["Content-Security-Policy"] in requests.get(f"{address}service-worker.js", timeout=600).text
    with pytest.raises(PokediffError, match="choose another with --port"):
        make_server(site, int(address.rsplit(":", 1)[1].strip("/")))


@needs_page
@pytest.mark.slow
def test_the_picture_emerges_and_is_that_of_sample(visit, address, tiny_checkpoint, tmp_path):
    page = visit(address)
    wait_for(page, "Ready")
    page.get_by_label("Prompt").fill("a red creature")
    page.get_by_label("Seed", exact=True).fill("7")
    page.keyboard.press("Enter")
    wait_for(page, "1 picture drawn")
    slider = page.get_by_label(re.compile(r"Step \d+ of"))
    of = int(slider.get_attribute("max"))
    shown = []
    for step in range(of + 1):
        slider.fill(str(step))
        page.get_by_text(f"Step {step} of").wait_for()
        shown.append(page.locator(".pictures canvas").evaluate("canvas => canvas.toDataURL()"))
    assert len(set(shown)) >= of  # every step shows another picture
    one_to_one(page)
    name, png = download(page, "PNG")
    assert name == "a-red-creature-7.png"
    assert distance(read_image(png), sampled(tiny_checkpoint, tmp_path / "a", "a red creature", seed=7)) <= 3
    name, gif = download(page, "GIF")
    assert (name, gif[:6]) == ("a-red-creature-7.gif", b"GIF89a")
    from PIL import Image

    assert Image.open(BytesIO(gif)).n_frames == of + 1


@needs_page
@pytest.mark.slow
def test_variations_and_pixel_sprites_are_those_of_sample(visit, address, tiny_checkpoint, tmp_path):
    prompt = "a pixel sprite of a blue creature"

    def check(job: int, name: str, **options) -> None:
        """What the networks gave is what they give here, and what the page made of it is what `finish` makes of it. A
        palette magnifies a last digit of a network, so both are compared, not the ends alone.
        """
        raw = np.array(page.evaluate(f"[...frames[{job}].x.data]"), np.uint8).reshape(64, 64, 4)
        assert distance(raw, sampled(tiny_checkpoint, tmp_path / name, prompt, raw=True, **options)) <= 3
        finished = finish(raw, PIXEL_COLORS, hard_alpha=True)
        assert (read_image(download(page, "PNG")[1]) == finished).all()
        assert len(np.unique(finished[finished[..., 3] > 0], axis=0)) == PIXEL_COLORS

    page = visit(link(address, prompt=prompt, seed=3), script=RECORD_FRAMES)
    wait_for(page, "1 picture drawn")
    one_to_one(page)
    check(0, "a", seed=3)
    page.get_by_role("button", name="Variations").click()
    wait_for(page, "9 pictures drawn")
    page.get_by_role("button", name="seed 4", exact=False).click()
    check(1, "b", seed=3, variation=0.3, num_images_per_prompt=2)


@needs_page
@pytest.mark.slow
def test_a_link_draws_its_picture_for_another_visitor(visit, address):
    page = visit(link(address, prompt="a green cat", seed=11, size=32, number=2))
    wait_for(page, "2 pictures drawn")
    shared = page.url
    assert {"seed=11", "size=32"} <= set(shared.split("#")[1].split("&"))
    other = visit(shared)
    wait_for(other, "2 pictures drawn")
    pixels = "canvases => canvases.map(canvas => canvas.toDataURL())"
    drawn, again = (one.locator(".pictures canvas").evaluate_all(pixels) for one in (page, other))
    assert drawn == again
    assert len(set(drawn)) == 2


@needs_page
@pytest.mark.slow
def test_it_draws_offline_after_the_first_visit(visit, address):
    page = visit(address)
    page.get_by_text("works offline now").wait_for()
    page.context.set_offline(True)
    page.goto(link(address, prompt="a red creature", seed=2, size=32))
    page.reload()
    wait_for(page, "1 picture drawn")
    page.faults[:] = [fault for fault in page.faults if "ERR_INTERNET_DISCONNECTED" not in fault]


@needs_page
@pytest.mark.slow
def test_a_plain_host_gets_threads_from_the_second_visit_on(visit, site):
    """No headers, in a folder of the host."""

    class Plain(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            pass

    handler = partial(Plain, directory=site.parent.as_posix())
    with served(ThreadingHTTPServer(("127.0.0.1", 0), handler)) as url:
        page = visit(link(f"{url}site/", prompt="a red creature", seed=2, size=32))
        wait_for(page, "1 picture drawn")
        assert not page.evaluate("crossOriginIsolated")
        page.get_by_text("works offline now").wait_for()
        page.reload()
        wait_for(page, "1 picture drawn")
        assert page.evaluate("crossOriginIsolated")


@needs_page
@pytest.mark.slow
def test_stop_stops_and_the_shelf_keeps(visit, address):
    page = visit(address)
    wait_for(page, "Ready")
    page.get_by_label("Pictures", exact=True).fill("16")
    page.get_by_label(re.compile("^Steps")).fill("100")
    page.get_by_label("Prompt").fill("a blue creature")
    page.get_by_role("button", name="Draw", exact=True).click()
    wait_for(page, "Drawing: step")
    page.keyboard.press("Escape")
    wait_for(page, "Stopped; ")
    shown = page.locator(".scrub label").first.inner_text()
    page.get_by_label("Pictures", exact=True).fill("2")
    page.get_by_label(re.compile("^Steps")).fill("3")
    page.get_by_role("button", name="Draw", exact=True).click()
    wait_for(page, "2 pictures drawn")
    assert page.locator(".scrub label").first.inner_text() != shown  # nothing of the stopped drawing came after it
    kept = page.locator(".shelf .picture")
    number = kept.count()
    assert number >= 2
    page.reload()
    wait_for(page, "pictures? drawn")  # the address draws again
    kept.last.click()
    wait_for(page, "From the shelf")
    page.get_by_role("button", name=re.compile("^Delete all")).click()
    kept.first.wait_for(state="detached")


@needs_page
@pytest.mark.slow
def test_sheets_are_those_of_sample(visit, address, tiny_checkpoint, tmp_path):
    tools = {
        "aseprite": "sheet.aseprite.json",
        "texturepacker": "sheet.texturepacker.json",
        "godot": "sheet.tres",
        "tiled": "sheet.tsx",
    }
    config = dict(seed=5, size=32, num_images_per_prompt=3, sheet=tuple(tools))
    sampled(tiny_checkpoint, tmp_path / "s", 'a "red" <cat> & 猫', **config)
    ours = read_image((tmp_path / "s" / "sheet.png").read_bytes())
    page = visit(link(address, prompt='a "red" <cat> & 猫', seed=5, size=32, number=3))
    wait_for(page, "3 pictures drawn")
    for tool, file in tools.items():
        page.get_by_label("Sheet for").select_option(tool)
        name, content = download(page, "Sprite sheet")
        assert name == "a-red-cat-猫-5.zip"
        with ZipFile(BytesIO(content)) as archive:
            assert set(archive.namelist()) == {"sheet.png", file}
            assert archive.read(file).decode() == (tmp_path / "s" / file).read_text()
            assert distance(read_image(archive.read("sheet.png")), ours) <= 3


@needs_page
@pytest.mark.slow
def test_on_a_phone_the_picture_lies_below_the_button(visit, address):
    page = visit(link(address, prompt="a red creature", seed=1), width=390, color_scheme="dark", has_touch=True)
    wait_for(page, "1 picture drawn")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.evaluate("scrollTo(0, 0)")
    page.get_by_role("button", name="Draw", exact=True).tap()
    wait_for(page, "1 picture drawn")
    canvas, end = page.locator(".pictures canvas"), time.monotonic() + 600
    while (box := canvas.bounding_box()) is None or box["y"] + box["height"] > 844:  # the page scrolls smoothly
        assert time.monotonic() < end, box
        page.wait_for_timeout(50)
    assert box["width"] > 250


@needs_page
@pytest.mark.slow
def test_a_network_that_cannot_be_loaded_is_told_in_a_sentence(visit, site, tmp_path):
    broken = shutil.copytree(site, tmp_path / "broken")
    next((broken / "model").glob("base-32-*")).unlink()
    with served(make_server(broken, 0)) as url:
        page = visit(url)
        page.get_by_role("alert").filter(has_text="base-32").filter(has_text="404").wait_for()
        page.faults.clear()  # the browser logs the 404


@needs_page
@pytest.mark.slow
def test_the_shipped_model_draws_the_same_picture_in_the_browser(visit, tmp_path):
    pytest.importorskip("onnxscript")
    facts = web(None, tmp_path / "site", size=64)
    assert facts["megabytes"] <= 30
    with served(make_server(tmp_path / "site", 0)) as url:
        page = visit(link(url, prompt="a blue water turtle", seed=7))
        wait_for(page, "1 picture drawn")
        one_to_one(page)
        drawn = read_image(download(page, "PNG")[1])
    expected = sampled(shipped("checkpoints", "pokediff"), tmp_path / "a", "a blue water turtle", seed=7)
    assert distance(drawn, expected) <= 3
