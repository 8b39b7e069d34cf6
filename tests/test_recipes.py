"""Recipes for somebody's own folder. test_package.py trains with one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pokediff.config import plain
from pokediff.data.records import read_records
from pokediff.errors import PokediffError
from pokediff.model.denoiser import Denoiser
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.training.recipes import recipe_for, what_to_expect


def own_folder(folder, number: int = 60, side: int = 24, smooth: bool = False):
    """A folder of somebody's pictures: no metadata, one with captions beside it, some in a folder."""
    rng = np.random.default_rng(0)
    (folder / "ghosts").mkdir(parents=True)
    for k in range(number):
        picture = np.zeros((side, side, 4), np.uint8)
        picture[4:-4, 4:-4] = [*rng.integers(0, 256, 3), 255]
        if smooth:
            picture[4:-4, 4, 3] = 120
        place = folder / "ghosts" if k % 3 == 0 else folder
        Image.fromarray(picture).save(place / f"fire_dragon_{k:03}.png")
    (folder / "fire_dragon_001.txt").write_text("a box\na red box\n")
    return folder


def test_files_without_metadata_give_captions(tmp_path):
    records = {record.file_name: record for record in read_records(own_folder(tmp_path / "mine"), report=print)}
    assert len(records) == 60
    assert records["fire_dragon_001.png"].captions == ("a box", "a red box")
    assert records["fire_dragon_002.png"].genus == "fire dragon"


@pytest.mark.parametrize(("side", "sizes"), [(16, [32]), (40, [32]), (64, [32, 64]), (96, [32, 64, 128])])
def test_the_size_follows_the_pictures_and_every_stage_is_trained(tmp_path, side, sizes):
    config = recipe_for(own_folder(tmp_path / "mine", side=side), start_from="pokediff")
    assert sorted({stage.image_size for stage in config.stages.values()}) == sizes
    assert list(config.stages)[:2] == ["base-32", "refiner-32"]
    assert config.out == "checkpoints/mine"
    assert config.stages["base-32"].max_steps == 1500
    assert config.stages["refiner-32"].max_steps == 750
    assert config.fit_limit
    assert config.metrics.early_stop


def test_hard_edges_stay_hard(tmp_path):
    assert recipe_for(own_folder(tmp_path / "pixels")).pixel_art
    assert not recipe_for(own_folder(tmp_path / "smooth", smooth=True)).pixel_art


def test_more_pictures_more_steps(tmp_path):
    config = recipe_for(own_folder(tmp_path / "mine", number=300))
    assert config.stages["base-32"].max_steps == 3000


def test_the_start_is_open_and_another_brings_its_text_encoder(tmp_path):
    folder = own_folder(tmp_path / "mine")
    config, other = recipe_for(folder), recipe_for(folder, start_from="pokediff")
    assert (Path(config.start_from).name, config.text_encoder) == ("creatures", "builtin:creatures")
    assert (Path(other.start_from).name, other.text_encoder) == ("pokediff", "builtin")
    scales = [run.stages["base-32"].model.guidance_scale for run in (config, other)]
    assert scales == [2.5, 2.4]  # of the bases that they start from


@pytest.mark.parametrize("start", ["creatures", "pokediff"])
def test_every_stage_has_the_network_of_its_start(tmp_path, start):
    """So that all weights are taken over: a refiner of the recipe's own would be flat, and have those of one level."""
    config = recipe_for(own_folder(tmp_path / "mine", side=128), start_from=start, report=lambda _: None)
    cascade = PokeDiffPipeline.from_pretrained(start, text_encoder=None, tokenizer=None).cascade
    for name, stage in config.stages.items():
        known, text_dim = cascade[name], len(cascade[name].null_text)
        new = Denoiser(image_size=stage.image_size, text_dim=text_dim, **plain(stage.model))
        missing = sum(p.numel() for p in known.parameters()) + text_dim - new.start_from(known)
        assert missing in (0, known.augment.weight.numel()), name  # labels of augmentations that a folder does not use
        assert stage.model.below == known.config.below


def test_a_recipe_draws_no_more_than_its_start(tmp_path):
    folder, said = own_folder(tmp_path / "mine", side=128), []
    assert list(recipe_for(folder, report=said.append).stages)[-1] == "upscaler-64"
    assert list(recipe_for(folder, start_from="creatures", report=said.append).stages)[-1] == "upscaler-64"
    assert "size 64, the largest of creatures; for 128" in said[0]
    assert said[0] == said[1]
    assert list(recipe_for(folder, start_from="pokediff", report=said.append).stages)[-1] == "upscaler-128"
    with pytest.raises(PokediffError, match="creatures has no upscaler-128: give --size 32 or 64"):
        recipe_for(folder, size=128, start_from="creatures")
    assert len(said) == 2


def test_too_few_pictures_are_refused(tmp_path):
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(PokediffError, match="has 10 pictures"):
        recipe_for(own_folder(tmp_path / "mine", number=10))
    with pytest.raises(PokediffError):
        recipe_for(empty)
    with pytest.raises(PokediffError, match="not found"):
        recipe_for(tmp_path / "nowhere")


def test_what_to_expect_follows_the_steps():
    assert "After 1,500 steps expect your style" in what_to_expect(1500, 1500)
    assert "After 700 of 1,500 steps expect your colours" in what_to_expect(700, 1500)
    assert "After 11 of 1,500 steps, too few" in what_to_expect(11, 2)
