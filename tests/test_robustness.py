"""The attack of benchmarks/robustness.py in short, and one test for each thing that it found.

A checkpoint, a data set and a page are data from a stranger: reading one runs no code, opens no file outside of it, and
takes no more memory than its files justify.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import shutil
import socket
import struct
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ended, forked
from safetensors.torch import load_file, save_file

from pokediff.config import DemoConfig, TrainConfig, load_yaml
from pokediff.data import idx
from pokediff.data.dataset import load_pictures
from pokediff.data.records import read_records
from pokediff.demo.server import called, is_foreign, is_own, own_names
from pokediff.drawing.sample import read_settings
from pokediff.errors import PokediffError
from pokediff.evaluation.generators import read_generated
from pokediff.files import move_whole, own_folder, write_whole
from pokediff.model.checkpoint import INDEX, base_of, write_part_index
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.scraper import bulbapedia, client, crawl
from pokediff.scraper.client import FetchError, PoliteClient, StopRun

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import mutations  # noqa: E402 (benchmarks/ is no package)

WEIGHTS = "cascade/base-16/diffusion_pytorch_model.safetensors"
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, limits and /proc")
EVIL_CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A checkpoint of 1 MB."""
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    mutations.small_checkpoint(folder)
    return folder


@pytest.fixture
def stranger(small, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(small, tmp_path / "stranger")


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder: Path, words: str) -> None:
    with pytest.raises(PokediffError, match=words) as error:
        PokeDiffPipeline.from_pretrained(folder)
    assert len(str(error.value).splitlines()) == 1


# ------------------------------------------------------------------------------------- a checkpoint from a stranger


@pytest.mark.parametrize(
    ("name", "component", "words"),
    [
        ("cascade", ["pipeline", "Cascade"], "is of 'pipeline'"),
        ("cascade", ["os", "system"], "is of 'os'"),
        ("text_encoder", ["transformers", "AutoModel"], "not CLIPTextModelWithProjection of transformers"),
        ("text_encoder", ["diffusers", "DiffusionPipeline"], "not CLIPTextModelWithProjection"),
        ("scheduler", ["diffusers", "ModularPipeline"], "not DDIMParallelScheduler"),
        ("scheduler", ["diffusers"], "not DDIMParallelScheduler"),
        ("scheduler", [["diffusers"], "DDIMScheduler"], "is of"),
        ("vae", ["diffusers", "AutoencoderKL"], "vae is no component"),
        ("text_encoder_name", {"a": 1}, "must be a text"),
    ],
)
def test_an_index_names_no_other_class(stranger, name, component, words):
    change_json(stranger / INDEX, **{name: component})
    refused(stranger, words)


def test_code_in_a_checkpoint_is_not_run(stranger, tmp_path, monkeypatch):
    marker = tmp_path / "marker"
    for place in ("pipeline.py", "modeling.py", "text_encoder/modeling_clip.py", "tokenizer/tokenization.py"):
        (stranger / place).write_text(EVIL_CODE.format(marker=str(marker)))
    change_json(stranger / INDEX, _class_name=["pipeline", "PokeDiffPipeline"])
    monkeypatch.chdir(stranger)
    PokeDiffPipeline.from_pretrained(stranger, trust_remote_code=True, custom_pipeline="pipeline")
    for part, key in (("text_encoder/config.json", "auto_map"), ("tokenizer/tokenizer_config.json", "auto_map")):
        before = (stranger / part).read_text()
        change_json(stranger / part, **{key: {"AutoModel": "modeling_clip.Evil"}})
        refused(stranger, "auto_map is not allowed")
        (stranger / part).write_text(before)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["quantization_config", "attn_implementation", "_attn_implementation_internal"])
def test_a_text_encoder_asks_for_no_other_library(stranger, key):
    change_json(stranger / "text_encoder/config.json", **{key: "someone/kernels"})
    refused(stranger, f"{key} is not allowed")


class Evil:
    """Its pickle makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("part", ["cascade/base-16", "text_encoder"])
def test_no_pickle_is_loaded_in_place_of_weights(stranger, tmp_path, part):
    (weights,) = (stranger / part).glob("*.safetensors")
    tensors = load_file(weights)
    weights.unlink()
    for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        torch.save({**tensors, "x": Evil(tmp_path / "marker")}, stranger / part / name)
    refused(stranger, "safetensors not found")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_leads_to_no_other_model(stranger, tmp_path, file):
    (stranger / "text_encoder" / file).write_text(json.dumps({"base_model_name_or_path": str(tmp_path)}))
    refused(stranger, "adapters are not read")


@pytest.mark.parametrize(
    "file", [WEIGHTS, "text_encoder/model.safetensors", "tokenizer/tokenizer.json", INDEX, "words.json", "README.md"]
)
def test_a_link_out_of_a_checkpoint_is_not_followed(stranger, small, tmp_path, file):
    outside = shutil.copytree(small, tmp_path / "outside")
    (outside / file).touch()
    (stranger / file).unlink(missing_ok=True)
    (stranger / file).symlink_to(outside / file)
    refused(stranger, "is a link out of the checkpoint")


def test_a_linked_folder_is_not_followed_and_a_download_of_the_hub_is(stranger, small, tmp_path):
    shutil.rmtree(stranger / "cascade" / "base-16")
    (stranger / "cascade" / "base-16").symlink_to(small / "cascade" / "base-16")
    refused(stranger, "is a link out of the checkpoint")

    repository = tmp_path / "models--someone--creatures"
    snapshot = shutil.copytree(small, repository / "snapshots" / "0123")
    (repository / "blobs").mkdir()
    for number, path in enumerate(path for path in sorted(snapshot.rglob("*")) if path.is_file()):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(os.path.relpath(repository / "blobs" / str(number), path.parent))
    assert PokeDiffPipeline.from_pretrained(snapshot).sizes == (16, 32)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
@pytest.mark.parametrize("file", [WEIGHTS, INDEX, "scheduler/scheduler_config.json", "tokenizer/tokenizer.json"])
def test_a_pipe_is_not_waited_for(stranger, file):
    (stranger / file).unlink()
    os.mkfifo(stranger / file)
    with pytest.raises(PokediffError):
        PokeDiffPipeline.from_pretrained(stranger)


def test_a_base_is_not_downloaded(tmp_path, monkeypatch):
    """Whoever wrote the folder would decide what is fetched, and learn of it."""
    asked = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *address, **_: asked.append(address) or [])
    write_part_index(tmp_path, "someone/creatures")
    refused(tmp_path, "someone/creatures is not on this machine")
    assert asked == []


def test_a_base_is_a_name_or_a_relative_path_and_no_circle(small, tmp_path):
    for base in ("/etc", "C:\\windows", "\\\\host\\share", "C:x", "a\nb", ["x"]):
        (tmp_path / INDEX).write_text(json.dumps({"base": base}))
        refused(tmp_path, "base must be a name or a relative path")
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, other in ((one, "../two"), (two, "../one")):
        folder.mkdir()
        write_part_index(folder, other)
    refused(one, "is itself or a part of it")
    with pytest.raises(PokediffError, match="is itself or a part of it"):
        base_of(two)


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("cascade/base-16/config.json", {"widths": [10**9]}, "no network of these settings"),
        ("cascade/base-16/config.json", {"blocks": [10**9]}, "blocks are more than"),
        ("cascade/base-16/config.json", {"text_dim": 10**12}, "by config.json"),
        ("cascade/base-16/config.json", {"image_size": 2**20}, "image_size 1048576 is not 1 to 1024"),
        ("cascade/base-16/config.json", {"image_size": 0}, "image_size 0"),
        ("cascade/base-16/config.json", {"in_channels": 2}, "in_channels 2 is none of"),
        ("cascade/base-16/config.json", {"steps": 10**9}, "more than num_train_timesteps"),
        ("cascade/base-16/config.json", {"steps": "5"}, "steps is '5', not 5"),
        ("cascade/base-16/config.json", {"num_train_timesteps": 10**9}, "within reason"),
        ("cascade/base-16/config.json", {"sigma_data": float("inf")}, "not finite"),
        ("cascade/base-16/config.json", {"sigma_data": 10**30}, "not finite, or beyond"),
        ("cascade/upscaler-32/config.json", {"below": 10**30}, "not finite, or beyond"),
        ("cascade/base-16/config.json", {"patch": 3}, "whole maps"),
        ("cascade/base-16/config.json", {"widths": "wide"}, "widths"),
        ("cascade/upscaler-32/config.json", {"in_channels": 3}, "by config.json"),
        ("cascade/config.json", {"denoisers": ["../../x"]}, "not a valid denoiser name"),
        ("cascade/config.json", {"denoisers": []}, "1 to 64 names"),
        ("cascade/config.json", {"denoisers": ["base-16"] * 2}, "1 to 64 names"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}, "2 to 100,000"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.5]}, "must be 1000 numbers"),
        ("scheduler/scheduler_config.json", {"solver_order": False}, "takes no steps"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "does not fit"),
        ("text_encoder/config.json", {"vocab_size": 10**9}, "by config.json"),
        ("tokenizer/tokenizer_config.json", {"vocab_file": "../../outside.json"}, "a file elsewhere"),
        ("tokenizer/tokenizer_config.json", {"fast_tokenizer_files": ["tokenizer.1/../../x.json"]}, "a file elsewhere"),
    ],
)
def test_a_configuration_asks_for_no_more_than_its_files_hold(stranger, file, values, words):
    change_json(stranger / file, **values)
    refused(stranger, words)


@pytest.mark.parametrize("file", [WEIGHTS, "text_encoder/model.safetensors"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(stranger, file, number):
    change_tensors(stranger / file, lambda tensors: next(iter(tensors.values())).view(-1)[0:1].fill_(number))
    refused(stranger, "holds numbers that are not finite")


def test_weights_of_another_shape_or_kind_are_refused(stranger):
    whole = (stranger / WEIGHTS).read_bytes()
    change_tensors(stranger / WEIGHTS, lambda tensors: tensors.update({"out.bias": torch.zeros(2)}))
    refused(stranger, r"out.bias is \(2,\), but by config.json")
    (stranger / WEIGHTS).write_bytes(whole)
    change_tensors(stranger / WEIGHTS, lambda tensors: tensors.pop("out.bias"))
    refused(stranger, "out.bias is missing")
    (stranger / WEIGHTS).write_bytes(whole)
    change_tensors(stranger / WEIGHTS, lambda tensors: tensors.update({"x": torch.zeros(2)}))
    refused(stranger, "x is no tensor of the network")
    (stranger / WEIGHTS).write_bytes(whole)
    change_tensors(stranger / WEIGHTS, lambda tensors: tensors.update({"out.bias": torch.zeros(4, dtype=torch.int64)}))
    refused(stranger, "no floating-point numbers")


@pytest.mark.parametrize("way", ["offsets", "huge", "length", "deep"])
def test_a_header_that_lies_is_refused(stranger, way):
    data = (stranger / WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entry = next(value for name, value in header.items() if name != "__metadata__")
    if way == "offsets":
        entry["data_offsets"] = [0, 2**40]
    elif way == "huge":
        entry["shape"] = [2**40, 2**20]
    text = b'{"a":' * 10_000 + b"}" * 10_000 if way == "deep" else json.dumps(header).encode()
    size = 2**60 if way == "length" else len(text)
    (stranger / WEIGHTS).write_bytes(size.to_bytes(8, "little") + text + data[8 + length :])
    refused(stranger, "is no whole safetensors file")


@pytest.mark.parametrize(
    "file", [INDEX, "cascade/config.json", "cascade/base-16/config.json", "tokenizer/tokenizer.json"]
)
@pytest.mark.parametrize("text", ["[" * 10_000, '{"a":' * 10_000, "[]", "null", "\ufeff", "1e999"])
def test_json_of_another_form_is_one_line(stranger, file, text):
    (stranger / file).write_text(text, encoding="utf-8")
    refused(stranger, "cannot be loaded")


def test_parts_that_do_not_fit_each_other_are_refused(stranger, tmp_path):
    vocabulary = json.loads((stranger / "tokenizer" / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["a</w>"] = 10**6
    (stranger / "tokenizer" / "tokenizer.json").write_text(json.dumps(vocabulary))
    refused(stranger, "knows words that the model does not")


def test_a_baseline_is_data_likewise(tmp_path):
    folder = tmp_path / "digits"
    mutations.small_baseline(folder)
    mutations.read_baseline(folder)
    before = (folder / "baseline.json").read_text()
    values = json.loads(before)
    for key, number in (("latent", 10**9), ("width", -1)):
        (folder / "baseline.json").write_text(json.dumps({**values, "network": {**values["network"], key: number}}))
        with pytest.raises(PokediffError, match=f"{key} {number} does not fit"):
            mutations.read_baseline(folder)
    (folder / "baseline.json").unlink()
    (tmp_path / "outside.json").write_text(before)
    (folder / "baseline.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(PokediffError, match="is a link out of the checkpoint"):
        mutations.read_baseline(folder)


def test_settings_of_a_stranger_do_not_say_where_to_write(tmp_path):
    mutations.drawing(tmp_path)
    settings = json.loads((tmp_path / "sample.json").read_text())
    settings["settings"]["out"] = str(tmp_path / "elsewhere")
    (tmp_path / "sample.json").write_text(json.dumps(settings))
    assert read_settings(tmp_path / "sample.json").out is None


LAUGHS = "a: &a [x, x]\n" + "".join(f"{k}: &{k} [*{p}, *{p}, *{p}]\n" for p, k in itertools.pairwise("abcdefghijklmno"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "values, some of them by aliases"),
        ("seed: &a [*a, *a]", "values, some of them by aliases"),
        ("data: [" + "x, " * 100_000 + "]", "more than 200 kB"),
        ("seed: !!python/object/apply:os.system ['true']", "not YAML"),
        ("[" * 10_000, "not YAML"),
    ],
)
def test_a_configuration_of_a_stranger(tmp_path, text, words):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(PokediffError, match=words):
        load_yaml(tmp_path / "x.yaml", TrainConfig)


def test_a_list_of_pictures_that_is_none_is_one_line(tmp_path):
    mutations.drawing(tmp_path)
    for value in (-(10**30), "x", {"a": 1}, None):
        change_json(tmp_path / "sample.json", pictures=value)
        with pytest.raises(PokediffError, match="lists no pictures"):
            read_generated(tmp_path)


# ------------------------------------------------------------------------------------------------ a data set likewise


def write_set(folder: Path, **row: Any) -> Path:
    names = mutations.pictures(folder, 20)
    rows = [{"file_name": name, "text": "a creature"} for name in names[1:]]
    text = "".join(json.dumps(one) + "\n" for one in [{"file_name": names[0], "text": "a creature", **row}, *rows])
    (folder / "metadata.jsonl").write_text(text)
    return folder


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "C:\\secret.png", "a\0.png", "~"]
)
def test_a_row_names_no_file_outside(tmp_path, name):
    shutil.copyfile(ROOT / "docs" / "images" / "grid.png", tmp_path / "secret.png")
    folder = write_set(tmp_path / "set", file_name=name)
    if name == "~":  # a file of that name, not a home
        assert next(iter(read_records(folder))).file_name == "~"
        return
    with pytest.raises(PokediffError, match="must lie inside the folder"):
        read_records(folder)


@pytest.mark.parametrize("kind", ["link", "linked folder", "pipe", "device"])
def test_links_and_pipes_of_a_data_set_are_left_out(tmp_path, kind):
    outside = tmp_path / "outside"
    mutations.pictures(outside, 1)
    name = "x/red_creature_0.png" if kind == "linked folder" else "x.png"
    folder = write_set(tmp_path / "set", file_name=name)
    if kind == "pipe":
        os.mkfifo(folder / name)
    else:
        target = {"link": outside / "red_creature_0.png", "device": Path("/dev/zero"), "linked folder": outside}[kind]
        (folder / Path(name).parts[0]).symlink_to(target)
    said: list[str] = []
    loaded = load_pictures(folder, 16, report=said.append)
    assert name not in [record.file_name for record in loaded.records]
    assert any(name in line and "link out of the folder, or no file" in line for line in said)


def test_a_picture_inside_by_way_of_a_link_is_read(tmp_path):
    folder = write_set(tmp_path / "set", file_name="x.png")
    (folder / "x.png").symlink_to("red_creature_0.png")
    assert len(load_pictures(folder, 16, report=lambda line: None)) == 20


def test_a_small_file_does_not_unpack_to_a_large_one(tmp_path):
    folder = tmp_path / "set"
    mutations.data_idx(folder)
    (folder / "train-images-idx3-ubyte").unlink()
    block = gzip.compress(bytes(1 << 24))  # 16 MB, in 16 kB
    head = gzip.compress(struct.pack(">4i", 2051, 2**20, 64, 64))
    (folder / "train-images-idx3-ubyte.gz").write_bytes(head + block * (idx.LARGEST >> 24))
    labels = folder / "train-labels-idx1-ubyte"
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels.read_bytes()))
    with pytest.raises(PokediffError, match=r"more than 1024 MB"):
        read_records(folder)


@pytest.mark.parametrize("way", ["huge", "bomb"])
def test_a_picture_that_would_fill_the_memory_is_skipped(tmp_path, way):
    data = (write_set(tmp_path / "set") / "red_creature_0.png").read_bytes()
    sides = struct.pack(">II", 60_000, 60_000)
    packed = mutations.chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(200_000_000), 9))
    head = mutations.chunk(b"IHDR", sides + data[24:29]) if way == "huge" else data[8:33] + packed
    (tmp_path / "set" / "red_creature_0.png").write_bytes(data[:8] + head + data[33:])
    said: list[str] = []
    assert len(load_pictures(tmp_path / "set", 16, report=said.append)) == 19
    assert any("bomb" in line or "Decompressed data too large" in line for line in said)


# ------------------------------------------------------------------------------------------------------ the worst wiki

OK = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n"


def answer(status: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]).encode() + body


def fetch(answers: dict[str, bytes], **options: Any) -> tuple[bytes, list[float]]:
    """The body of /page from a server with these raw answers, and the pauses that were made."""
    pauses: list[float] = []
    whole = {"/robots.txt": answer("404 Not Found"), **answers}
    with mutations.raw_server(lambda path: whole[path]) as host:
        polite = PoliteClient({host}, "pokediff/test", sleep=pauses.append, clock=lambda: 0.0)
        return polite.get(f"http://{host}/page", 1_000_000, **options), pauses


def test_redirects_in_circles_end():
    with pytest.raises(FetchError, match="more than 5 redirects"):
        fetch({"/page": answer("302 Found", "Location: /other"), "/other": answer("302 Found", "Location: /page")})


@pytest.mark.parametrize(
    "location", ["http://evil.example/x", "//evil.example/", "file:///etc/passwd", "ftp://x/", "http://["]
)
def test_a_redirect_leads_to_no_other_host(location):
    with pytest.raises(FetchError):
        fetch({"/page": answer("301 Moved", f"Location: {location}")})


def endless(start: bytes, more: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        connection.sendall(start)
        while True:
            connection.sendall(more)
            time.sleep(0.02)

    return send


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (OK + b"Content-Length: 99999999\r\n\r\n", b"x"),  # a letter now and then: no timeout of a socket ends it
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\n", b"X"),  # a header without an end
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_an_answer_that_never_ends_is_hung_up(monkeypatch, start, more):
    monkeypatch.setattr(client, "WHOLE_S", 0.3)
    monkeypatch.setattr(client, "ATTEMPTS", 2)
    listener = socket.create_server(("127.0.0.1", 0))
    ended: list[type[BaseException]] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                path = connection.recv(65536).split(b" ")[1]
                if path == b"/robots.txt":
                    connection.sendall(answer("404 Not Found", "Connection: close"))
                    continue
                try:
                    endless(start, more)(connection)
                except OSError as error:
                    ended.append(type(error))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    host = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(FetchError, match=r"(connection: .*|did not end .*) \(2 attempts\)"):
        PoliteClient({host}, "pokediff/test", sleep=lambda _: None).get(f"http://{host}/page", 1_000_000)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(600)
    assert ended


def test_a_gzip_bomb_is_cut_off():
    bomb = gzip.compress(bytes(300_000_000), 9)  # 300 kB
    tracemalloc.start()
    try:
        with pytest.raises(FetchError, match="longer than 1,000,000 bytes"):
            fetch({"/page": answer("200 OK", "Content-Encoding: gzip", "Content-Type: text/html", body=bomb)})
        assert tracemalloc.get_traced_memory()[1] < 60_000_000
    finally:
        tracemalloc.stop()
    twice = gzip.compress(bomb)
    with pytest.raises(FetchError, match="content encoding gzip, gzip"):
        fetch({"/page": answer("200 OK", "Content-Encoding: gzip, gzip", body=twice)})


def test_not_modified_without_a_cache_is_a_failure():
    with pytest.raises(FetchError, match="status 304"):
        fetch({"/page": b"HTTP/1.1 304 Not Modified\r\nETag: x\r\n\r\n"})


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        # the server's clock is years away from ours, and its dates are half a minute apart
        (["Date: Wed, 21 Oct 2015 07:28:00 GMT", "Retry-After: Wed, 21 Oct 2015 07:28:30 GMT"], 30),
        (["Date: Wed, 21 Oct 2099 07:28:00 GMT", "Retry-After: Wed, 21 Oct 2099 07:28:30 GMT"], 30),
        (["Retry-After: Wed, 21 Oct 2015 07:28:30 GMT"], 0),  # past: the ordinary pauses
        (["Retry-After: -5"], 0),
        (["Retry-After: Wed, 99 Foo 99999 07:28:30 GMT"], 0),
    ],
)
def test_the_pause_of_a_server_with_another_clock(monkeypatch, headers, expected):
    monkeypatch.setattr(client, "ATTEMPTS", 2)
    pauses: list[float] = []
    answers = {"/robots.txt": answer("404 Not Found"), "/page": answer("503 Busy", *headers)}
    with mutations.raw_server(lambda path: answers[path]) as host, pytest.raises(FetchError, match="status 503"):
        PoliteClient({host}, "x", sleep=pauses.append, clock=lambda: 0.0).get(f"http://{host}/page", 1000)
    assert max(pauses) == pytest.approx(max(expected, max(pauses) if not expected else 0))
    assert max(pauses) >= max(expected, 0.5)  # never less than the ordinary pause
    assert max(pauses) <= max(expected, 2.0)


def test_a_pause_of_years_stops_the_run():
    with pytest.raises(StopRun, match="requests a pause"):
        fetch({"/page": answer("429 Slow", f"Retry-After: {'9' * 400}")})


def test_robots_of_five_megabytes_are_read_as_far_as_required():
    first = b"User-agent: *\nCrawl-delay: 0\nDisallow: /page\n"
    filling = b"Disallow: /x/some/other/place\n" * 170_000
    with pytest.raises(FetchError, match=r"robots\.txt disallows"):
        fetch({"/robots.txt": answer("200 OK", "Content-Type: text/plain", body=first + filling), "/page": b""})
    body, _ = fetch({"/robots.txt": answer("200 OK", body=filling), "/page": answer("200 OK", body=b"here")})
    assert body == b"here"


@pytest.mark.parametrize("delay", ["1e9", "999999"])
def test_robots_that_ask_for_days_stop_the_run(delay):
    with pytest.raises(StopRun, match="between two requests"):
        fetch({"/robots.txt": answer("200 OK", body=f"User-agent: *\nCrawl-delay: {delay}\n".encode()), "/page": b""})


@pytest.mark.parametrize("delay", ["nan", "-1", "inf", "soon"])
def test_robots_without_a_real_delay_keep_the_ordinary_one(delay):
    robots = answer("200 OK", body=f"User-agent: *\nCrawl-delay: {delay}\n".encode())
    _, pauses = fetch({"/robots.txt": robots, "/page": answer("200 OK", body=b"x")})
    assert max(pauses) == pytest.approx(client.DEFAULT_INTERVAL_S)


def test_a_rule_of_many_wildcards_takes_no_time():
    rule = "Disallow: /" + "*a" * 30 + "*b"
    assert client.simple_rules(rule) == "Disallow: /*a*a*a*a"
    assert client.simple_rules("Allow: /" + "*a" * 30) == ""
    assert client.simple_rules("Disallow: /w/*?x=*&y=*") == "Disallow: /w/*?x=*&y=*"
    robots = answer("200 OK", body=f"User-agent: *\nCrawl-delay: 0\n{rule}\n".encode())
    whole = {"/robots.txt": robots}
    with mutations.raw_server(lambda path: whole.get(path, answer("200 OK", body=b"x"))) as host:
        polite = PoliteClient({host}, "x", sleep=lambda _: None)
        with pytest.raises(FetchError, match="disallows"):  # the shorter rule forbids more
            polite.get(f"http://{host}/{'a' * 40}", 1000)


def test_what_a_server_says_does_not_reach_the_terminal_as_it_is():
    with pytest.raises(FetchError) as error:
        fetch({"/page": b"HTTP/1.1 301 Moved\r\nLocation: http://\x1b[2Jevil/\r\nContent-Length: 0\r\n\r\n"})
    assert str(error.value).isprintable()


def list_page(columns: list[str], rows: list[dict[str, str]]) -> str:
    cells = ["".join(f"<th>{name}</th>" for name in columns)]
    cells += ["".join(f"<td>{row[name]}</td>" for name in columns) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in cells)}</table>"


def test_columns_that_moved_and_two_creatures_of_one_number(monkeypatch):
    monkeypatch.setattr(bulbapedia, "EXPECTED_SPECIES", 3)
    rows = [
        {"Ndex": f"#{number:04}", "MS": f'<img src="/a/{name}.png">', "Type": "<a>Fire</a>", "New": "x",
         "Pokémon": f'<a href="/wiki/{name}_(Pok%C3%A9mon)">{name}</a>'}
        for number, name in ((1, "Aa"), (2, "Bb"), (2, "Cc"))
    ]  # fmt: skip
    columns = ["Ndex", "MS", "Pokémon", "Type", "New"]
    found = bulbapedia.parse_list(list_page(columns, rows), "https://x/wiki/L")
    for moved in (columns[::-1], [columns[k] for k in (4, 2, 0, 3, 1)]):
        assert bulbapedia.parse_list(list_page(moved, rows), "https://x/wiki/L") == found
    assert list(crawl.by_file_name(found)) == ["images/0001-aa.png", "images/0002-bb.png", "images/0002-cc.png"]
    with pytest.raises(bulbapedia.PageChanged):
        bulbapedia.parse_list(list_page(["MS", "Type", "New"], rows), "https://x/wiki/L")


def test_a_table_of_spanned_cells_is_no_list():
    html = f"<table>{'<tr>' + '<td rowspan=9999 colspan=9999>' * 50 + '</tr>'}</table>" * 5
    wide = "<table>" + ("<tr>" + "<td rowspan=100 colspan=100>x</td>" * 200 + "</tr>") * 3 + "</table>"
    for page in (html, wide):
        with pytest.raises(bulbapedia.PageChanged):
            bulbapedia.parse_list(page, "https://x/wiki/L")


# ----------------------------------------------------------------------------------------- the order of a whole write


def test_files_are_on_the_disk_before_they_move_and_a_list_moves_last(tmp_path, monkeypatch):
    done: list[tuple[str, str]] = []
    names = {"model_index.json", "cascade/config.json", "cascade/base/config.json", "cascade/base/model.onnx"}
    for name in names:
        (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "new" / name).write_text(name)
    sync, replace = os.fsync, os.replace
    opened = {}

    def fsync(handle: int) -> None:
        opened[handle] = os.readlink(f"/proc/self/fd/{handle}") if Path("/proc/self/fd").exists() else str(handle)
        done.append(("fsync", Path(opened[handle]).name))
        sync(handle)

    def move(old: Path, new: Path) -> None:
        done.append(("rename", Path(new).relative_to(tmp_path / "out").as_posix()))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", move)
    move_whole(tmp_path / "new", tmp_path / "out", last=("cascade/config.json", "model_index.json"))
    assert [what for what, _ in done] == ["fsync"] * 4 + ["rename"] * 4
    assert [name for _, name in done[-2:]] == ["cascade/config.json", "model_index.json"]
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")} == names
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------- the attack, in short


def attack(log: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows that benchmarks/robustness.py prints, in a process of its own: it forks, and threads would be lost."""
    code = ended(forked(run_attack, arguments, log=log))
    lines = log.read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert code == 0, (rows, lines[-20:])
    return rows


def run_attack(arguments: list[str]) -> None:
    import robustness

    sys.exit(robustness.main(arguments))


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    ("names", "number"), [(("embed", "sample", "sample, a table"), 4), (("trainer",), 2), (("export",), 1)]
)
def test_a_killed_command_ends_as_an_undisturbed_one(names, number, tmp_path):
    rows = attack(tmp_path / "log", "kills", "--only", *names, "--number", str(number), "--no-time", "--seed", "3")
    assert [(row["number"], row["findings"]) for row in rows] == [(number, 0)] * len(names)


@pytest.mark.slow
@linux
def test_a_full_disk_is_one_line_and_with_room_the_work_ends(tmp_path):
    jobs = ("embed", "sample", "sample, a table")
    rows = attack(tmp_path / "log", "disk", "--only", *jobs, "--number", "2", "--no-mount")
    assert [row["findings"] for row in rows] == [0, 0, 0]
    assert all(row["full"] for row in rows)


@pytest.mark.slow
@linux
def test_mutated_inputs_of_every_kind(tmp_path):
    *rows, last = attack(tmp_path / "log", "inputs", "--number", "150", "--seed", "11")
    assert last["findings"] == 0
    assert {row["inputs"] for row in rows} == set(mutations.TARGETS)
    assert all(row["read"] + row["refused_in_one_line"] >= 3 for row in rows)


@pytest.mark.slow
@linux
def test_a_crowd_at_the_demo(tmp_path):
    pytest.importorskip("gradio")
    row, restart = attack(tmp_path / "log", "load", "--clients", "8", "--minutes", "0.08")
    assert (restart["findings"], restart["answered_after_it"]) == (0, restart["requests"])
    assert row["findings"] == 0
    assert row["draw: own picture"] > 0
    assert row["after_the_crowd"] == "own picture"


@pytest.mark.parametrize(
    ("headers", "foreign"),
    [
        ({}, False),  # a program
        ({"origin": "http://127.0.0.1:7860", "host": "127.0.0.1:7860"}, False),
        ({"origin": "http://evil.example", "host": "127.0.0.1:7860"}, True),
        ({"origin": "null", "host": "127.0.0.1:7860"}, True),
        ({"origin": "https://draw.example", "host": "127.0.0.1:7860", "x-forwarded-host": "draw.example"}, False),
        ({"sec-fetch-site": "same-origin", "origin": "https://draw.example", "host": "inside:1"}, False),
        ({"sec-fetch-site": "cross-site", "origin": "http://127.0.0.1:7860", "host": "127.0.0.1:7860"}, True),
    ],
)
def test_what_the_page_of_another_site_sends_is_known(headers, foreign):
    assert is_foreign(headers) is foreign


@pytest.mark.parametrize(
    ("options", "host", "own"),
    [
        ({}, "127.0.0.1:7860", True),
        ({}, "localhost", True),
        ({}, "LOCALHOST.:7860", True),
        ({}, "pokediff.localhost:7860", True),
        ({}, "[::1]:7860", True),
        ({}, "192.168.1.7:7860", True),  # a tunnel, a port of a container: nobody looks an address up
        ({}, "evil.example:7860", False),
        ({}, "127.0.0.1.evil.example", False),
        ({}, "localhost.evil.example", False),
        ({}, "[evil", False),
        ({}, "", False),
        ({"host": "localhost"}, "evil.example", False),
        ({"host": "::1"}, "evil.example", False),
        ({"allowed_hosts": ("Draw.example",)}, "draw.example", True),
        ({"allowed_hosts": ("draw.example",)}, "evil.example", False),
        ({"host": "0.0.0.0", "allowed_hosts": ("draw.example",)}, "evil.example", False),
    ],
)
def test_a_name_that_was_made_to_lead_here_is_not_ours(options, host, own):
    assert is_own(host, own_names(DemoConfig(**options))) is own


@pytest.mark.parametrize("host", ["0.0.0.0", "workshop.local"])
def test_a_demo_for_other_machines_has_names_that_it_does_not_know(host):
    assert own_names(DemoConfig(host=host)) is None


def test_actions_are_named_by_commit():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    actions = re.findall(r"uses: (\S+)", workflow)
    assert actions
    assert [action for action in actions if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", action)] == []


def test_what_a_killed_write_leaves_makes_no_folder_foreign(tmp_path):
    (tmp_path / ".run.json.tmp").write_text("{")
    (tmp_path / ".lock").touch()
    with own_folder(tmp_path, "run.json"):
        write_whole(tmp_path / "run.json", "{}")
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/gradio_api/call/sprite", "sprite"),
        ("/gradio_api/call/sprite/0123", "sprite"),
        ("/gradio_api/call/none", "none"),
        ("/gradio_api/run/predict", None),  # what the page calls, by number
        ("/", None),
    ],
)
def test_the_function_that_a_program_calls(path, name):
    assert called(path) == name
