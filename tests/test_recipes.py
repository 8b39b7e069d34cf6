from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from pokediff.data.records import read_records
from pokediff.errors import PokediffError
from pokediff.training.recipes import recipe_for


def own_folder(folder, number: int = 60, side: int = 24):
    """A folder of somebody's pictures: no metadata, some with captions beside them, some in a folder."""
    rng = np.random.default_rng(0)
    (folder / "ghosts").mkdir(parents=True)
    for k in range(number):
        picture = np.zeros((side, side, 4), np.uint8)
        picture[4:-4, 4:-4] = [*rng.integers(0, 256, 3), 255]
        place = folder / "ghosts" if k % 3 == 0 else folder
        Image.fromarray(picture).save(place / f"fire_dragon_{k:03}.png")
    (folder / "fire_dragon_001.txt").write_text("a box\na red box\n")
    return folder


def test_files_tell_what_they_are(tmp_path):
    records = {record.file_name: record for record in read_records(own_folder(tmp_path / "mine"))}
    assert len(records) == 60
    assert records["fire_dragon_001.png"].captions == ("a box", "a red box")
    assert records["fire_dragon_002.png"].genus == "fire dragon"
    assert records["ghosts/fire_dragon_000.png"].style == "ghosts"


def test_names_of_cameras_tell_nothing(tmp_path):
    Image.new("RGBA", (8, 8)).save(tmp_path / "IMG_1234.png")
    assert read_records(tmp_path)[0].genus is None


@pytest.mark.parametrize(("side", "size"), [(16, 32), (40, 32), (96, 64)])
def test_the_size_follows_the_pictures(tmp_path, side, size):
    config = recipe_for(own_folder(tmp_path / "mine", side=side))
    assert config.dataset.image_size == size
    assert config.out == "checkpoints/mine"
    assert config.max_steps == 1500


def test_more_pictures_more_steps(tmp_path):
    assert recipe_for(own_folder(tmp_path / "mine", number=300)).max_steps == 3000


def test_too_few_pictures_are_refused(tmp_path):
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(PokediffError, match="has 10 pictures"):
        recipe_for(own_folder(tmp_path / "mine", number=10))
    with pytest.raises(PokediffError, match="neither"):
        recipe_for(empty)
    with pytest.raises(PokediffError, match="not found"):
        recipe_for(tmp_path / "nowhere")


def test_a_folder_is_all_that_train_needs(tmp_path):
    folder, out = own_folder(tmp_path / "mine"), tmp_path / "run"
    short = ["--max-steps", "2", "--decay-steps", "0", "--batch-size", "4", "--evaluation.every", "100"]
    command = [sys.executable, "-m", "pokediff", "train", str(folder), "--out", str(out), *short]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (out / "model_index.json").is_file()
    assert "steps of 4 pictures, about" in done.stdout
    assert "weights taken from" in done.stdout
