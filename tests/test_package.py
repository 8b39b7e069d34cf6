"""What is installed: the wheel away from the repository, the requirements, the shipped files."""

from __future__ import annotations

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from test_recipes import own_folder

from pokediff.errors import PokediffError
from pokediff.model.checkpoint import find_folder
from pokediff.paths import shipped

DISTRIBUTIONS = {  # where the name to import is not the name to install
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python-headless",
    "importlinter": "import-linter",
    "open_clip": "open-clip-torch",
    "pil": "pillow",
    "yaml": "pyyaml",
}
EXTRAS = {  # what a part of the package may import beside the hard requirements
    "pokediff/baselines": ["lora", "eval"],
    "pokediff/demo": ["demo", "eval", "mp4"],
    "pokediff/evaluation": ["eval"],
    "pokediff/drawing/export.py": ["onnx"],
    "pokediff/data": ["mp4", "parquet"],
    "tests": ["dev"],
    "benchmarks": ["dev", "benchmarks"],
    "scripts": ["dev", "benchmarks"],
}
OURS = {"pokediff", "scraper"} | {
    path.stem for name in ("tests", "benchmarks", "scripts") for path in ROOT.glob(f"{name}/*.py")
}


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def required(config: configparser.ConfigParser, extra: str | None = None) -> set[str]:
    """Names of the distributions that an installation with this extra, or with none, asks for."""
    text = config["options"]["install_requires"] if extra is None else config["options.extras_require"][extra]
    names = set()
    for line in text.split("\n"):
        if line.startswith("pokediff["):  # an extra that is the sum of others
            for other in re.split(r"[\[\],]", line)[1:-1]:
                names |= required(config, other)
        elif line:
            names.add(normalized(re.match(r"[\w.-]+", line)[0]))
    return names


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(path: Path) -> set[str]:
    """Distributions that a file imports anywhere, standard library and our own modules left out."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules.add(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip"):
            modules.add(node.args[0].value)
    names = {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - OURS
    return {DISTRIBUTIONS.get(name.lower(), normalized(name)) for name in names}


FOLDERS = ("pokediff", "scraper", "tests", "benchmarks", "scripts")
FILES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_import_is_declared(path, config):
    name = path.relative_to(ROOT).as_posix()
    allowed = required(config)
    for part, extras in EXTRAS.items():
        if name.startswith(part):
            allowed = allowed.union(*(required(config, extra) for extra in extras))
    assert imported(path) <= allowed


def test_every_hard_requirement_is_imported_by_the_package(config):
    everything = set().union(*(imported(path) for path in FILES if path.is_relative_to(ROOT / "pokediff")))
    everything |= set().union(*(imported(path) for path in FILES if path.is_relative_to(ROOT / "scraper")))
    assert required(config) - everything == {"tensorboard"}  # which accelerate's tracker imports


def test_every_folder_of_modules_is_installed(config):
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in ROOT.glob("pokediff/**/*.py")}
    mapped = {"pokediff.scraper", "pokediff.configs", "pokediff.checkpoints", "pokediff.web"}
    assert set(config["options"]["packages"].split()) == folders | mapped


# ------------------------------------------------------------------------------------------------------ shipped files


def test_a_folder_comes_before_a_shipped_checkpoint_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("pokediff", {}) == shipped("checkpoints", "pokediff")
    shutil.copytree(shipped("checkpoints", "pokediff"), "pokediff", ignore=shutil.ignore_patterns("*.safetensors"))
    assert find_folder("pokediff", {}) == Path("pokediff")
    with pytest.raises(PokediffError, match="pokedif"):
        find_folder("pokedif", {})


# ------------------------------------------------------------------------------------------------------------ imports

LAZY = """
import sys
import pokediff
heavy = [name for name in ("torch", "diffusers", "cv2", "open_clip", "bs4") if name in sys.modules]
assert not heavy, f"import pokediff loads {heavy}"
pipe = pokediff.PokeDiffPipeline.from_pretrained("pokediff")
pipe("a red cat", num_inference_steps=1)
heavy = [name for name in ("open_clip", "bs4", "gradio", "tensorboard", "matplotlib") if name in sys.modules]
assert not heavy, f"drawing loads {heavy}"
"""


@pytest.mark.slow
def test_importing_and_drawing_load_only_what_they_need(tmp_path):
    done = subprocess.run([sys.executable, "-c", LAZY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------- the wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the sdist, of the tracked files and a training run that must stay out."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pokediff", "scraper", "configs", "web", "checkpoints/pokediff", "checkpoints/creatures"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    shutil.copytree(ROOT / "checkpoints" / "pokediff", source / "checkpoints" / "my-run")
    for name in ("setup.cfg", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "sample.py", "train.py"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """pokediff(*args): the command of an environment that has the wheel, in an empty folder, with no repository near.

    The environment sees this one's libraries by path, so not its editable pokediff, which a .pth file would add.
    """
    home, empty = tmp_path_factory.mktemp("venv"), tmp_path_factory.mktemp("empty")
    venv.create(home, symlinks=os.name != "nt")
    scheme = {"base": str(home), "platbase": str(home), "installed_base": str(home)}
    python = Path(sysconfig.get_path("scripts", "venv", scheme)) / Path(sys.executable).name
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    (site / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--ignore-installed", str(wheel)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    show = [python, "-c", "import pokediff; print(pokediff.__file__)"]
    where = subprocess.check_output(show, cwd=empty, env=environment, text=True)
    assert Path(where).is_relative_to(home)

    def pokediff(*args: str) -> str:
        command = [str(python.with_name("pokediff")), *args]
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pokediff.folder = empty
    return pokediff


@pytest.mark.slow
def test_the_wheel_holds_the_shipped_files_and_no_run(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"pokediff"}  # and its dist-info
    assert not any("my-run" in name for name in names)
    assert not any(name.startswith(("pokediff/web/src", "pokediff/web/test")) for name in names)
    kinds = ("checkpoints/pokediff", "configs", "scraper", "web/dist")
    mapped = [path for kind in kinds for path in (ROOT / kind).rglob("*")]
    for path in [ROOT / "py.typed", *(path for path in mapped if path.is_file() and path.suffix != ".pyc")]:
        assert f"pokediff/{path.relative_to(ROOT).as_posix()}" in names
    assert wheel.stat().st_size < 100e6


@pytest.mark.slow
def test_the_wheel_draws_and_scrapes(installed):
    assert re.search(r"\d+\.\d+", installed("--version"))
    installed("sample", "--prompt", "a red cat", "--num-inference-steps", "2", "--size", "32", "--out", "cat")
    assert (installed.folder / "cat" / "0000.png").is_file()
    assert "--contact" in installed("scrape", "--help")
    assert "--port" in installed("demo", "--help")


@pytest.mark.slow
def test_the_wheel_trains_on_a_folder(installed):
    """From the checkpoint of the wheel, its base and refiner, both in small batches and drawn in few steps."""
    own_folder(installed.folder / "mine")
    limits = "--max-steps 2 --max-minutes 30 --metrics.number 4 --preview-prompts x".split()
    for stage in ("base-32", "refiner-32"):
        limits += [f"--stages.{stage}.batch-size", "4", f"--stages.{stage}.model.steps", "3"]
    said, run = installed("train", "mine", "--out", "run", *limits), installed.folder / "run"
    assert (run / "model_index.json").is_file()
    assert "captions: " in said
    assert "base-32: 2 steps of 4 pictures, about" in said
    assert "M weights from" in said
    assert "| CC-BY-4.0 |" in (run / "ATTRIBUTION.md").read_text("utf-8")  # of the weights
    assert "draw with: pokediff sample" in said
    installed("sample", "--checkpoint", "run", "--prompt", "a round creature", "--out", "drawn")
    assert (installed.folder / "drawn" / "0000.png").is_file()
