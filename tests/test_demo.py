"""The demo: what the studio allows and writes, the server against those who mean it no good, the page in a browser."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import requests
from conftest import ROOT
from PIL import Image

from pokediff.config import DemoConfig
from pokediff.data.images import encode_png
from pokediff.demo.studio import LIMITS, Studio, labelled_sheet
from pokediff.drawing.attribution import without, word_influence, words_of
from pokediff.drawing.sample import read_settings, sample
from pokediff.errors import PokediffError
from pokediff.model.pipeline import PokeDiffPipeline

CHECKPOINT = ROOT / "checkpoints" / "pokediff-32"


# ------------------------------------------------------------------------------------------------- without a page


@pytest.fixture(scope="module")
def studio(tmp_path_factory, data) -> Studio:
    made = Studio((CHECKPOINT,), tmp_path_factory.mktemp("demo"), data)
    for _ in range(600):
        if not isinstance(made.neighbours(np.zeros((1, 32, 32, 4), np.uint8)), str):
            return made
        time.sleep(0.1)
    raise AssertionError("the training pictures were not read")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(prompt=()), "Write what to draw first"),
        (dict(prompt=("  ",)), "Write what to draw first"),
        (dict(prompt=("x" * (LIMITS.prompt + 1),)), "characters in a prompt"),
        (dict(prompt=("a cat",) * (LIMITS.prompts + 1)), "prompts"),
        (dict(negative_prompt="x" * (LIMITS.prompt + 1)), "characters in a prompt"),
        (dict(num_images=LIMITS.pictures + 1), "pictures of a prompt"),
        (dict(prompt=("a cat",) * 64, num_images=3), "pictures"),
        (dict(num_steps=LIMITS.steps + 1), "steps"),
        (dict(num_steps=0), "num_steps"),
        (dict(num_steps="many"), "num_steps"),
        (dict(guidance_scale=1e9), "guidance"),
        (dict(guidance_scale=float("nan")), "guidance"),
        (dict(guidance_scale=-1.0), "negative"),
        (dict(seed=-1), "seed"),
        (dict(seed=2**40), "seed"),
        (dict(enlarge=1000), "enlarge"),
        (dict(interpolate=1000), "on the way"),
        (dict(sampler="rm -rf"), "sampler"),
        (dict(background="nocolour"), "nocolour"),
        (dict(checkpoint="/etc"), "no checkpoint"),
        (dict(guidance_interval=(5, 1)), "guidance_interval"),
        (dict(out="/tmp/x", nonsense=1), "unknown key"),
    ],
)
def test_what_is_beyond_the_limits_is_refused(studio, changes, words):
    with pytest.raises(PokediffError, match=words):
        studio.settings(**{"prompt": ("a cat",), **changes})


def test_the_files_of_a_drawing_make_the_same_pictures_again(studio, tmp_path):
    config = studio.settings(prompt=("a red dragon",), num_images=2, seed=5, num_steps=4, enlarge=2, background="pink")
    frames = list(studio.draw(config))
    assert len(frames) == studio.frames(config) == 5
    files = {path.name: path for path in studio.write(config, frames)}
    assert {"0000.png", "0001.png", "denoising.gif", "denoising.mp4", "sample.json"} <= set(files)
    again = sample(
        read_settings(files["sample.json"]).__class__(
            **{**vars(read_settings(files["sample.json"])), "out": str(tmp_path)}
        )
    )
    for name in ("0000.png", "0001.png"):
        assert (again / name).read_bytes() == files[name].read_bytes()
    assert Image.open(files["0000.png"]).size == (64, 64)


def test_a_drawing_from_a_picture_carries_it_along(studio, tmp_path, monkeypatch):
    picture = np.zeros((40, 40, 4), np.uint8)
    picture[8:32, 8:32] = (200, 30, 30, 255)
    mask = np.zeros((40, 40), bool)
    mask[:20] = True
    image, cover = studio.keep_input(picture, mask)
    config = studio.settings(prompt=("a red dragon",), num_steps=3, image=str(image), mask=str(cover))
    frames = list(studio.draw(config))
    out = studio.write(config, frames)[0].parent
    shutil.copytree(out, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")  # as somebody who took the files home
    settings = read_settings("sample.json")
    assert (settings.image, settings.mask) == ("image.png", "mask.png")
    again = sample(settings.__class__(**{**vars(settings), "out": "again"}))
    assert (again / "0000.png").read_bytes() == (out / "0000.png").read_bytes()


@pytest.mark.parametrize(("sampler", "steps", "strength"), [("ddim", 4, 0.05), ("heun", 20, 0.3), ("heun", 3, 0.9)])
def test_whatever_the_strength_the_last_frame_is_the_finished_one(studio, tmp_path, sampler, steps, strength):
    picture = np.zeros((32, 32, 4), np.uint8)
    picture[8:24, 8:24] = (200, 30, 30, 255)
    image, _ = studio.keep_input(picture)
    config = studio.settings(
        prompt=("a cat",), image=str(image), sampler=sampler, num_steps=steps, strength=strength, hard_alpha=True
    )
    frames = list(studio.draw(config))
    assert len(frames) == studio.frames(config)
    assert set(np.unique(frames[-1].x0[..., 3])) <= {0, 255}


def test_many_pictures_as_one_zip(studio):
    config = studio.settings(prompt=("a red dragon", "a blue turtle"), num_images=3, num_steps=2)
    parts = list(studio.draw_all(config, batch_size=4))
    assert [len(part[0]) for part in parts if part] == [4, 6]
    assert parts.count(None) == 6  # at every step one may stop
    with zipfile.ZipFile(studio.write_zip(config, *parts[-1])) as bundle:
        rows = json.loads(bundle.read("sample.json"))["pictures"]
        assert {row["file"] for row in rows} <= set(bundle.namelist())
        assert [row["prompt"] for row in rows] == ["a red dragon"] * 3 + ["a blue turtle"] * 3
        sheet = Image.open(io.BytesIO(bundle.read("sheet.png")))
    assert sheet.size == (4 * 168, 2 * 208)


def test_the_labels_of_a_sheet_stay_in_their_place():
    sheet = labelled_sheet(np.zeros((2, 32, 32, 4), np.uint8), ["a", "a very long label " * 9])
    written = (sheet[..., :3] < 128).any(-1)
    assert written[:, :168].any()
    assert written[:, 168:].any()
    assert not written[:160].any()  # nothing over the (empty) pictures


def test_neighbours_and_verdicts(studio):
    training = studio._training
    itself = training.pixels[:1]
    near = studio.neighbours(itself)[0]
    assert near.distance < 1e-3
    assert near.record == training.records[0] or near.distance == 0
    blank = studio.neighbours(np.full((1, 32, 32, 4), (255, 0, 255, 255), np.uint8))[0]
    assert blank.verdict == "new"


def test_without_a_data_set_nothing_is_said_about_copies(tmp_path):
    found = Studio((CHECKPOINT,), tmp_path, tmp_path / "nothing").neighbours(np.zeros((1, 32, 32, 4), np.uint8))
    assert "not on this machine" in found


def png_of(width: int, height: int) -> bytes:
    """A small file that says it is a huge picture."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no picture at all", "not a picture"),
        (encode_png(np.zeros((64, 64, 4), np.uint8))[:60], "cannot be used"),
        (b"\0" * (LIMITS.upload_mb * 2**20 + 1), "larger than"),
        (png_of(5000, 5000), "beyond"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
    ],
    ids=["text", "cut", "large", "bomb", "svg"],
)
def test_uploads_are_checked_by_decoding(studio, tmp_path, content, words):
    path = tmp_path / "upload.png"
    path.write_bytes(content)
    with pytest.raises(PokediffError, match=words):
        studio.read_upload(path)


def test_an_upload_is_what_its_bytes_are_whatever_it_is_called(studio, tmp_path):
    path = tmp_path / "picture.txt"
    Image.new("RGB", (900, 300), "red").save(path, "JPEG")
    assert studio.read_upload(path).shape == (171, 512, 4)


def test_old_drawings_go(studio):
    old = studio.new_folder()
    os.utime(old, (0, 0))
    new = studio.new_folder()
    assert not old.exists()
    assert new.exists()


def test_networks_run_in_one_thread(studio):
    names = {studio.in_thread(lambda: threading.current_thread().name) for _ in range(3)}
    assert len(names) == 1
    assert names != {threading.current_thread().name}


# ---------------------------------------------------------------------------------------------------- words inside


def test_the_words_of_a_prompt():
    assert words_of("a blue, four-legged dragon's egg") == ["a", "blue", "four-legged", "dragon's", "egg"]
    assert without("a blue, four-legged cat", 2) == "a blue, cat"
    assert without("red red", 1) == "red"


def test_leaving_the_colour_out_changes_more_than_leaving_an_article_out():
    pipeline = PokeDiffPipeline.from_pretrained(CHECKPOINT)
    found = word_influence(pipeline, "a blue turtle", 7, num_steps=8)
    assert found.maps.shape == (3, len(found.sigmas), 32, 32)
    assert list(found.sigmas) == sorted(found.sigmas, reverse=True)
    np.testing.assert_allclose(found.shares.sum(0), 1, rtol=1e-5)
    article, color, _ = found.shares.mean(1)
    assert color > 2 * article
    with pytest.raises(PokediffError, match="words"):
        word_influence(pipeline, "...", 7)


# ------------------------------------------------------------------------------------------------------ the server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_an_error_that_nobody_foresaw_is_in_the_log_and_not_on_the_page(capsys):
    def broken(_):
        raise ZeroDivisionError("secret")

    page = pytest.importorskip("pokediff.demo.page")
    nothing, sentence = page.reader(broken)("a path")
    with pytest.raises(page.gr.Error) as raised:
        list(page.spoken(broken)("a path"))
    assert nothing == page.SKIP
    for said in (sentence, raised.value.message):
        assert "went wrong" in said
        assert "secret" not in said
    assert capsys.readouterr().err.count("ZeroDivisionError: secret") == 2


@pytest.fixture(scope="module")
def server(data, tmp_path_factory):
    """`pokediff demo` as a process of its own, on the drawn data set; its address, and where it keeps its files."""
    port, temporary = free_port(), tmp_path_factory.mktemp("tmp")
    command = [sys.executable, "-m", "pokediff", "demo", "--port", str(port), "--data", str(data), "--queue", "6"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    log = (temporary / "log.txt").open("w")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (temporary / "log.txt").read_text()
            try:
                requests.get(url, timeout=5)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        yield url, next(temporary.glob("pokediff-demo-*"))
    finally:
        process.terminate()
        process.wait(20)
        log.close()
    assert not list(temporary.glob("pokediff-demo-*"))  # it tidies up


def test_it_listens_to_this_machine_alone_unless_told_otherwise():
    assert DemoConfig().host == "127.0.0.1"


def test_it_serves_no_file_but_its_own(server, tmp_path):
    url, folder = server
    mine = folder / "mine.png"
    mine.write_bytes(encode_png(np.zeros((2, 2, 4), np.uint8)))
    secret = tmp_path / "secret.png"
    secret.write_bytes(mine.read_bytes())
    link = folder / "link.png"
    link.symlink_to(secret)
    elsewhere = folder / "elsewhere"
    elsewhere.symlink_to(tmp_path)
    file = f"{url}/gradio_api/file="
    assert requests.get(f"{file}{mine}", timeout=10).content == mine.read_bytes()
    for wanted in (
        "/etc/passwd",
        str(secret),
        str(link),
        f"{elsewhere}/secret.png",
        f"{folder}/../{tmp_path.name}/secret.png",
        f"{folder}/%2e%2e/{tmp_path.name}/secret.png",
        "setup.cfg",
        str(ROOT / "setup.cfg"),
        str(CHECKPOINT / "model_index.json"),
        "http://127.0.0.1:1/",
        "/%00",
        f"{folder}/{'x' * 5000}",
        "file:///etc/passwd",
    ):
        request = requests.Request("GET", url).prepare()
        request.url = file + wanted  # as it stands: the library would tidy up the dots
        with requests.Session() as session:
            found = session.send(request, timeout=10)
        assert found.status_code in (400, 403, 404), wanted
        assert b"root:" not in found.content
        assert found.content != secret.read_bytes(), wanted


def test_it_fetches_nothing_for_others(server):
    """A client may send an address where a file is expected; the library would download it."""
    url, folder = server
    config = requests.get(f"{url}/config", timeout=10).json()
    reports = next(d for d in config["dependencies"] if "reports" in d["api_name"])
    address = {"path": "https://example.com/x.png", "meta": {"_type": "gradio.FileData"}}
    before = set(folder.rglob("*"))
    body = {"data": [address], "fn_index": reports["id"], "session_hash": "x"}
    answer = requests.post(f"{url}/gradio_api/run/predict", json=body, timeout=20)
    assert answer.status_code >= 400
    assert "not fetched" in answer.text
    assert set(folder.rglob("*")) == before
    for page in ("deep_link", "run-history/x", "proxy=http://127.0.0.1:1/"):
        assert requests.get(f"{url}/gradio_api/{page}", timeout=10).status_code in (403, 404)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (dict(background=b"no picture"), "not a picture"),
        (dict(background=png_of(5000, 5000)), "beyond"),
        (dict(layers=[encode_png(np.zeros((4, 4, 4), np.uint8))] * 9), "Too many layers"),
    ],
    ids=["text", "bomb", "layers"],
)
def test_a_canvas_passes_the_same_gate_as_an_upload(parts, words):
    from gradio.components.image_editor import EditorDataBlobs

    from pokediff.demo.page import editor_parts, sketch_pad

    canvas = sketch_pad()
    canvas.blob_storage["x"] = EditorDataBlobs(**{"background": None, "layers": [], "composite": None, **parts})
    value = canvas.preprocess(type("Payload", (), {"id": "x"})())
    with pytest.raises(PokediffError, match=words):
        editor_parts(value, repaint=False)
    assert not canvas.blob_storage


def test_a_program_draws_and_is_told_what_it_did_wrong(server):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(server[0], verbose=False)
    answer = client.predict("a red dragon", 3, num_steps=4, api_name="/sprite")
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["png"]))))
    assert drawn.shape == (32, 32, 4)
    assert answer["settings"]["seed"] == 3
    again = client.predict("a red dragon", 3, num_steps=4, api_name="/sprite")
    assert again["png"] == answer["png"]
    steps = [answer["step"] for answer in client.submit("a red dragon", 3, num_steps=100, api_name="/sprite")]
    assert len(steps) > 3
    assert steps == sorted(set(steps))
    assert steps[-1] == 101
    with pytest.raises(AppError, match="At most 100 steps"):
        client.predict("a red dragon", 3, num_steps=5000, api_name="/sprite")
    with pytest.raises(AppError, match="Write what to draw"):
        client.predict("", 3, api_name="/sprite")


def join(url: str, seed: int, num_steps: int) -> requests.Response:
    """Stand in the queue, by plain HTTP."""
    values = ["a red dragon", seed, "", num_steps, 1.5, "dpmpp_2m", None]
    return requests.post(f"{url}/gradio_api/call/sprite", json={"data": values}, timeout=60)


def hear(url: str, joined: requests.Response) -> requests.Response:
    """What comes, as it comes."""
    return requests.get(f"{url}/gradio_api/call/sprite/{joined.json()['event_id']}", stream=True, timeout=60)


def ask(url: str, seed: int, num_steps: int = 8) -> dict | str:
    """One picture; or what was said where it was refused."""
    joined = join(url, seed, num_steps)
    if joined.status_code != 200:
        return f"{joined.status_code} {joined.text}"
    with hear(url, joined) as answer:
        rows = [line for line in answer.iter_lines(decode_unicode=True) if line.startswith("data: [")]
    return json.loads(rows[-1].removeprefix("data: "))[0]


def test_a_crowd_gets_its_own_pictures_or_a_clear_no(server):
    url, _ = server
    alone = {seed: ask(url, seed)["png"] for seed in range(3)}
    answers: dict[int, dict | str] = {}
    threads = [threading.Thread(target=lambda k=k: answers.update({k: ask(url, k)})) for k in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    drawn = {k: answer for k, answer in answers.items() if not isinstance(answer, str)}
    refused = [answer for answer in answers.values() if isinstance(answer, str)]
    assert len(drawn) >= 6
    assert all(answer["settings"]["seed"] == k for k, answer in drawn.items())
    assert len({answer["png"] for answer in drawn.values()}) == len(drawn)
    for seed, png in alone.items():
        assert seed not in drawn or drawn[seed]["png"] == png
    assert all(answer.startswith("503") and "full" in answer for answer in refused)
    assert refused, "30 at once do not fit into a queue of 6"


def test_who_leaves_makes_room_within_a_second(server):
    url, _ = server
    begin = time.monotonic()
    ask(url, 1, 100)
    alone = time.monotonic() - begin
    events = [hear(url, join(url, seed, 100)) for seed in range(4)]  # as many as draw at a time
    for answer in events:
        next(answer.iter_content(1))  # it has begun
        answer.close()
    begin = time.monotonic()
    assert not isinstance(ask(url, 9, 2), str)
    assert time.monotonic() - begin < 1 + 0.2 * alone
    begin = time.monotonic()
    ask(url, 1, 100)
    assert time.monotonic() - begin < 2 * alone  # nobody draws for those who left


# ------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser, server):
    """The page, freshly opened; it must not ask for anything elsewhere, nor complain."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(120_000)  # a slow machine is no failure
    elsewhere, broken = [], []
    own = (server[0], "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(own) else elsewhere.append(request.url))
    page.on("pageerror", lambda error: broken.append(str(error)))
    page.goto(server[0])
    page.wait_for_selector("#draw")
    yield page
    context.close()
    assert elsewhere == []
    assert broken == []


DONE = "document.querySelector('#status').innerText.startsWith('Done')"
COUNT = """() => { window.seen = []; window.begun = performance.now();
  new MutationObserver(() => { const strip = document.querySelector('#film .strip');
    if (strip && window.last !== strip.style.backgroundImage) { window.last = strip.style.backgroundImage;
      window.seen.push(performance.now() - window.begun); } })
    .observe(document.querySelector('#film'), {childList: true, subtree: true, attributes: true}); }"""


def save(page, name: str, folder: Path) -> Path:
    """Click the file called `name` and keep it."""
    with page.expect_download() as download:
        page.locator(f'a[download="{name}"]').first.click()
    download.value.save_as(folder / name)
    return folder / name


def test_type_click_and_watch_it_emerge(page, tmp_path):
    page.fill("#prompt textarea", "a green frog")
    page.evaluate(COUNT)
    page.click("#draw")
    page.wait_for_function(DONE)
    frames = page.evaluate("window.seen")
    assert len(frames) >= 10  # of 21: a browser on a busy machine may show two as one
    page.wait_for_selector('a[download="sample.json"]')
    # the film can be walked through afterwards
    strip = page.locator("#film .strip").last
    assert strip.evaluate("e => e.style.getPropertyValue('--frames')") == "21"
    page.locator("#scrub input[type=range]").fill("3")
    page.wait_for_function("document.querySelector('#film .strip').style.getPropertyValue('--at') === '0.15'")
    # and taken home
    picture = Image.open(save(page, "0000.png", tmp_path))
    assert picture.size == (256, 256)
    assert picture.mode == "RGBA"
    assert Image.open(save(page, "denoising.gif", tmp_path)).n_frames > 5
    film = cv2.VideoCapture(str(save(page, "denoising.mp4", tmp_path)))
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) > 5
    settings = read_settings(save(page, "sample.json", tmp_path))
    assert settings.prompt == ("a green frog",)
    again = sample(settings.__class__(**{**vars(settings), "out": str(tmp_path / "again")}))
    assert (again / "0000.png").read_bytes() == (tmp_path / "0000.png").read_bytes()
    page.wait_for_selector("#near .verdict-new, #near .verdict-close, #near .verdict-copy")


def test_who_waits_sees_the_place(page, server):
    url, _ = server
    for seed in range(6):
        assert join(url, seed, 100).status_code == 200
    page.click("#draw")
    page.get_by_text("queue: 3/3").wait_for()
    page.wait_for_function(DONE)


def test_the_keyboard_is_enough(page):
    page.focus("#prompt textarea")
    page.keyboard.press("Control+A")
    page.keyboard.type("a yellow mouse")
    page.keyboard.press("Enter")
    page.wait_for_function(DONE)


def test_chips_write_into_the_prompt(page):
    page.fill("#prompt textarea", "official artwork of a cat")
    page.get_by_role("button", name="pixel sprite", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'pixel sprite of a cat'")
    page.get_by_role("button", name="pixel sprite", exact=True).click()
    page.wait_for_function("document.querySelector('#prompt textarea').value === 'of a cat'")


def test_stop_stops(page):
    page.get_by_text("More settings").click()
    page.locator("input[aria-label='number input for Steps']").fill("100")
    page.evaluate(COUNT)
    page.click("#draw")
    page.wait_for_selector("#film .strip")
    page.click("#stop")
    page.wait_for_function("document.querySelector('#status').innerText === 'Stopped.'")
    page.wait_for_timeout(500)
    shown = page.evaluate("window.seen.length")
    page.wait_for_timeout(1000)
    assert page.evaluate("window.seen.length") == shown < 101


def test_a_bad_upload_is_answered_by_a_sentence_and_a_good_one_is_drawn_from(page, tmp_path):
    page.get_by_role("tab", name="Play", exact=True).click()
    page.wait_for_selector("#canvas canvas")
    page.click("#draw-from")
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
    page.wait_for_timeout(1000)
    page.click("#draw-from")
    page.wait_for_selector("#from-result .strip")
    assert "Traceback" not in page.inner_text("body")


def test_a_batch_arrives_as_a_zip(page, tmp_path):
    page.get_by_role("tab", name="Batch", exact=True).click()
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
    page.wait_for_selector('a[download="pictures.zip"]')
    with zipfile.ZipFile(save(page, "pictures.zip", tmp_path)) as bundle:
        rows = json.loads(bundle.read("sample.json"))["pictures"]
    assert [row["prompt"] for row in rows] == ["a red cat"] * 2 + ["a blue cat"] * 2


def test_the_other_rooms(page):
    page.get_by_role("tab", name="Inside", exact=True).click()
    page.click("#words")
    page.wait_for_selector("#words-result .bar")
    assert page.locator("#words-result th").filter(has_text="turtle").count() == 1
    page.get_by_text("The noise, step by step").click()
    page.click("#schedule")
    page.wait_for_selector("#schedule-result img")
    page.get_by_text("Samplers and steps side by side").click()  # the shipped 64 px model is offered beside the first
    page.click("#compare")
    page.wait_for_function("document.querySelectorAll('#compare-result img').length === 9")
    page.get_by_role("tab", name="Measures", exact=True).click()
    page.wait_for_selector("#report table")
    page.get_by_role("tab", name="Play", exact=True).click()
    for name, button, result in (
        ("Between two prompts", "#walk", "#walk-result img[alt=animation]"),
        ("Relatives", "#relatives", "#relatives-result .strip"),
        ("Few colours", "#reduce", "#reduce-result img"),
    ):
        page.get_by_role("tab", name=name, exact=True).click()
        page.click(button)
        page.wait_for_selector(result)


def test_a_phone_in_the_dark(browser, server):
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page.goto(server[0])
    page.wait_for_selector("#draw")
    page.click("#draw")
    page.wait_for_function(DONE)
    page.wait_for_selector('a[download="sample.json"]')
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.body.classList.contains('dark')")
    for control in page.locator("input:visible, textarea:visible").all():  # each has a name that can be read out
        named = (
            "e => !!(e.labels?.length || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.title)"
        )
        assert control.evaluate(named), control.evaluate("e => e.outerHTML")
    page.close()


BRUSH = (0x3B, 0x82, 0xF6)


def test_a_sketch_and_a_repainting(page, tmp_path):
    page.get_by_role("tab", name="Play", exact=True).click()
    page.wait_for_selector("#canvas canvas")

    def share(color: tuple[int, int, int]) -> float:
        shot = Image.open(io.BytesIO(page.locator("#canvas canvas").first.screenshot())).convert("RGB")
        return float((np.abs(np.asarray(shot).astype(int) - color).max(-1) < 24).mean())

    def until_seen(color: tuple[int, int, int], act: Callable[[], None] | None = None) -> None:
        for _ in range(20):  # as a person would: look, and try again; the editor swallows strokes while it is busy
            if act is not None:
                act()
            page.wait_for_timeout(1000)
            if share(color) > 0.05:
                return
        raise AssertionError(f"{color} is nowhere on the canvas")

    def paint(top: int, bottom: int) -> None:
        page.click('#canvas button[aria-label="Brush"]')
        box = page.locator("#canvas canvas").first.bounding_box()
        middle, center = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for down in range(top, bottom, 12):
            page.mouse.move(middle - 50, center + down)
            page.mouse.down()
            page.mouse.move(middle + 50, center + down, steps=8)
            page.mouse.up()

    until_seen(BRUSH, lambda: paint(-40, 41))
    page.click("#draw-from")
    page.wait_for_selector('a[download="image.png"]')
    sketch = np.asarray(Image.open(save(page, "image.png", tmp_path)).convert("RGB")).reshape(-1, 3)
    assert (np.abs(sketch.astype(int) - BRUSH).max(1) < 8).mean() > 0.1
    picture = tmp_path / "picture.png"
    Image.fromarray(np.full((128, 128, 4), (200, 30, 30, 255), np.uint8)).save(picture)
    with page.expect_file_chooser() as chooser:
        page.click("#upload")
    chooser.value.set_files(picture)
    page.get_by_label("Draw anew what is painted over").click()
    until_seen((200, 30, 30))
    until_seen(BRUSH, lambda: paint(-60, -20))
    page.click("#draw-from")
    page.wait_for_selector('a[download="mask.png"]')
    mask = np.asarray(Image.open(save(page, "mask.png", tmp_path)).convert("L")) > 0
    assert 0.05 < mask.mean() < 0.6
    assert not mask[-30:].any()
