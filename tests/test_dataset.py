from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import write_data
from safetensors.torch import save

from pokediff.config import DatasetConfig
from pokediff.data import cache, decoding
from pokediff.data.colors import measured_colors
from pokediff.data.dataset import (
    TrainingBatches,
    caption_vectors,
    draw_chances,
    embed,
    load_pictures,
    translate,
    warp,
)
from pokediff.data.images import fit_square, premultiply, read_image, unpremultiply
from pokediff.data.records import Record, picture_bytes, read_records, split_of, write_records
from pokediff.errors import PokediffError
from pokediff.model.text import load_embeddings


@pytest.fixture(scope="module")
def pictures(data):
    return load_pictures(data, 40)


@pytest.fixture(scope="module")
def batches(pictures, data):
    """batches(**changes): training batches of the pictures."""
    vectors = caption_vectors(data, pictures, "builtin")

    def make(**changes) -> TrainingBatches:
        values = dict(config=DatasetConfig(), batch_size=16, caption_dropout=0.25, seed=3)
        return TrainingBatches(pictures, vectors, **{**values, **changes})

    return make


def test_pictures_captions_and_splits(data, pictures):
    assert len(pictures) == 80
    assert pictures.pixels.shape == (80, 40, 40, 4)
    first = pictures.records[0]
    np.testing.assert_array_equal(pictures.pixels[0], premultiply(read_image((data / first.file_name).read_bytes())))
    assert first.style == "sprite"
    assert pictures.captions[0][0] == "sprite of a red round water creature"
    parts = [pictures.split(split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 80
    families = [{record.family for record in part.records} for part in parts]
    assert not families[0] & families[1] | families[1] & families[2] | families[0] & families[2]
    assert all(split_of(record) == "train" for record in parts[0].records)


def test_the_digest_tells_other_pictures_and_other_words(tmp_path, pictures):
    folder = write_data(tmp_path / "copy")
    assert load_pictures(folder, 16).digest == pictures.digest
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text(
        "\n".join([json.dumps({**json.loads(rows[0]), "types": ["fire"]}), *rows[1:]])
    )
    assert load_pictures(folder, 16).digest != pictures.digest


def test_broken_pictures_are_named_skipped_and_bounded(tmp_path):
    folder = write_data(tmp_path / "d", number=120)
    (folder / "images" / "0007.png").write_bytes(b"<html>")
    said: list[str] = []
    assert len(load_pictures(folder, 16, report=said.append)) == 119
    assert said[0] == "captions: 120 of 120, from metadata.jsonl"
    assert len(said) == 2
    assert "images/0007.png" in said[1]
    for number in range(8, 18):
        (folder / "images" / f"{number:04}.png").unlink()
    said.clear()
    assert len(load_pictures(folder, 16, report=said.append)) == 109
    assert said[-1] == "skipped 1 more"  # ten are named
    (folder / "images" / "0018.png").unlink()
    with pytest.raises(PokediffError, match=r"12 of 120 pictures .* broken"):
        load_pictures(folder, 16, report=said.append)


def test_a_selection_has_validation_pictures_too(tmp_path):
    """The hash gives this style none, though it gives the whole set some."""
    folder = write_data(tmp_path / "d")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        record = Record(row["file_name"], family=row["family"])
        row["style"] = "sprite" if split_of(record) == "train" else "artwork"
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chosen = load_pictures(folder, 16, DatasetConfig(styles={"sprite": 1.0}))
    for split in ("validation", "test"):
        assert len(chosen.split(split)) >= 3
    assert len(chosen.split("train")) > len(chosen) / 2


def test_styles_can_be_chosen(data):
    chosen = load_pictures(data, 16, select=DatasetConfig(styles={"sprite": 1}))
    assert {record.style for record in chosen.records} == {"sprite"}
    said: list[str] = []
    assert len(
        load_pictures(data, 16, select=DatasetConfig(styles={"sprite": 1, "home": 1}), report=said.append)
    ) == len(chosen)
    assert said[1:] == [f"{data} has no pictures of style home; it has: artwork, sprite. The rest is used"]
    with pytest.raises(PokediffError, match=r"no pictures of style home; it has: artwork, sprite"):
        load_pictures(data, 16, select=DatasetConfig(styles={"home": 1}))
    with pytest.raises(PokediffError, match=r"no pictures of style fresco; it has: artwork, sprite"):
        load_pictures(data, 16, select=DatasetConfig(styles={"sprite": 1, "fresco": 1}))


def test_a_batch_is_a_function_of_seed_and_step(batches):
    a, b = batches(), batches()
    for field in ("pixels", "text", "augment"):
        torch.testing.assert_close(getattr(a[5], field), getattr(b[5], field), rtol=0, atol=0)
    assert (a[5].pixels != a[6].pixels).any()
    assert (a[5].pixels != batches(seed=4)[5].pixels).any()


def test_processes_take_slices_of_the_same_batch(batches):
    whole = batches()[9]
    halves = [batches(rank=rank, world=2)[9] for rank in (0, 1)]
    for field in ("pixels", "text", "augment"):
        torch.testing.assert_close(
            torch.cat([getattr(half, field) for half in halves]), getattr(whole, field), rtol=0, atol=0
        )
    with pytest.raises(PokediffError, match="shared by 3"):
        batches(rank=0, world=3)


def test_the_label_says_what_was_done_to_the_picture(pictures, batches):
    made = batches(config=DatasetConfig(flip=0.5, shift=0.5, max_shift=0.1), caption_dropout=0.0)
    seen = {tuple(np.sign(row)) for step in range(20) for row in made[step].augment.tolist()}
    assert len(seen) > 6
    for step in range(3):
        batch = made[step]
        for pixels, (mirrored, right, down) in zip(batch.pixels.numpy(), batch.augment.tolist(), strict=True):
            back = translate(pixels, -round(right * 4), -round(down * 4))
            back = back[:, ::-1] if mirrored else back
            distance = np.abs(pictures.pixels[:].astype(int) - back.astype(int)).mean(axis=(1, 2, 3))
            assert distance.min() < 0.5  # it is one of the pictures again
    plain = batches(config=DatasetConfig(flip=0, shift=0))[0]
    assert plain.augment.abs().max() == 0


def test_more_labels_are_zero_without_warp(batches):
    three, eight, ten = (batches(augment_dim=number)[4] for number in (3, 8, 10))
    assert (three.augment.shape, eight.augment.shape, ten.augment.shape) == ((16, 3), (16, 8), (16, 10))
    torch.testing.assert_close(eight.augment[:, :3], three.augment, rtol=0, atol=0)
    assert eight.augment[:, 3:].abs().max() == ten.augment[:, 3:].abs().max() == 0
    torch.testing.assert_close(eight.pixels, three.pixels, rtol=0, atol=0)


def test_warped_pictures_have_labels(batches):
    with pytest.raises(PokediffError, match="needs 8 augmentation labels"):
        batches(config=DatasetConfig(warp=0.5))
    made = batches(config=DatasetConfig(warp=0.5), augment_dim=8)
    plain = batches(augment_dim=8)
    changed = 0
    for step in range(5):
        a, b = made[step], plain[step]
        torch.testing.assert_close(a.augment[:, :3], b.augment[:, :3], rtol=0, atol=0)
        for k in range(16):
            same = bool((a.pixels[k] == b.pixels[k]).all())
            assert same == bool((a.augment[k, 3:] == 0).all())
            changed += not same
        assert a.augment.abs().max() <= 2
        assert (a.pixels[..., :3] <= a.pixels[..., 3:]).all()  # still premultiplied
    assert 0.75 < changed / 80 < 0.98  # 1 - 0.5 ** 3 = 0.875


def test_warp_does_what_its_numbers_say():
    square = np.zeros((32, 32, 4), np.uint8)
    square[12:20, 12:20] = 255
    area = square[..., 3].sum() / 255

    def sides(picture: np.ndarray) -> tuple[int, int]:
        mask = picture[..., 3] > 127
        return int(mask.any(1).sum()), int(mask.any(0).sum())

    assert abs(warp(square, 0, 0, 0, 0).astype(int) - square).max() <= 64  # the edge is averaged
    assert sides(warp(square, 1, 0, 0, 0)) == (16, 16)
    assert sides(warp(square, 0, 0, 1, 0)) == (4, 16)  # along the x axis
    assert sides(warp(square, 0, np.pi / 4, 0, 0)) in ((12, 12), (10, 10), (11, 11))
    for values in ((0, 0.3, 0, 0), (0, 0, 0.3, 0.7), (0, -0.2, 0.2, 2.0)):  # these keep the area
        assert warp(square, *values)[..., 3].sum() / 255 == pytest.approx(area, rel=0.02)


def test_straight_is_what_the_files_hold(data, pictures):
    straight = pictures.straight()
    expected = unpremultiply(fit_square(read_image((data / pictures.records[7].file_name).read_bytes()), 40))
    np.testing.assert_array_equal(straight[7], expected)
    assert straight.shape == (80, 40, 40, 4)


def test_data_sets_can_be_joined(tmp_path, data, pictures):
    other = write_data(tmp_path / "other", number=40)
    embed(other, "builtin", report=lambda _: None)
    both = load_pictures([data, other], 40)
    assert len(both) == 120
    assert {record.root for record in both.records} == {str(data), str(other)}
    np.testing.assert_array_equal(both.pixels[80:], load_pictures(other, 40).pixels[:])
    assert len({both.digest, pictures.digest, load_pictures([other, data], 40).digest}) == 3
    vectors = caption_vectors([data, other], both, "builtin")
    saved = load_embeddings(other / "embeddings-builtin.safetensors", "builtin")
    row = int(vectors.rows[100][0])
    torch.testing.assert_close(vectors.table[row], saved[both.captions[100][0]], rtol=0, atol=0)


def test_colours_in_the_row_are_not_measured(tmp_path, monkeypatch):
    folder = write_data(tmp_path / "d", number=40)
    first = load_pictures(folder, 16)
    assert first.records[1].colors == ("green",)
    rows = [
        replace(record, colors=measured_colors(read_image(picture_bytes(record)))) for record in read_records(folder)
    ]
    write_records(folder, rows)

    def no_measuring(_):
        raise AssertionError("colours are in the rows")

    monkeypatch.setattr(decoding, "measured_colors", no_measuring)
    again = load_pictures(folder, 16)
    assert again.captions == first.captions
    assert again.digest == first.digest
    for path in (folder / "images").glob("*.png"):  # embed needs no picture
        path.unlink()
    saved = load_embeddings(embed(folder, "builtin"), "builtin")
    assert saved.keys() == {""} | {caption for several in first.captions for caption in several}


def test_pictures_of_a_parquet_file(tmp_path, data):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    records = read_records(data)[:30]
    images = [{"bytes": (data / record.file_name).read_bytes(), "path": None} for record in records]
    table = pyarrow.table({"image": images, "text": [f"picture {k}" for k in range(30)]})
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=7)
    found = load_pictures(tmp_path, 40)
    np.testing.assert_array_equal(found.pixels[:], load_pictures(data, 40).pixels[:30])
    assert found.captions[29] == ("picture 29",)
    assert min(len(found.split(split)) for split in ("train", "validation", "test")) >= 3


def test_captions_are_dropped_at_the_given_rate_and_chosen_at_random(batches):
    made = batches(caption_dropout=0.25)
    null = made.vectors.table[0]
    rows = torch.cat([made[step].text for step in range(100)])
    assert (rows == null).all(1).float().mean().item() == pytest.approx(0.25, abs=0.04)
    assert len({tuple(row[:4].tolist()) for row in rows}) > 50


def test_styles_get_their_shares(pictures):
    chances = draw_chances(pictures.records, {"artwork": 1.0, "sprite": 3.0})
    share = sum(chance for chance, record in zip(chances, pictures.records, strict=True) if record.style == "sprite")
    assert share == pytest.approx(0.75)
    assert draw_chances(pictures.records, None) == pytest.approx(np.full(80, 1 / 80))


def test_kinds_weigh_within_a_style():
    records = [
        Record(f"{style}-{kind}-{n}.png", style=style, kind=kind)
        for style, kind, number in (("flat", "animal", 2), ("flat", "object", 6), ("tile", "animal", 5))
        for n in range(number)
    ]
    chances = draw_chances(records, {"flat": 0.4, "tile": 0.6}, {"animal": 3.0})
    assert chances[:2].sum() == pytest.approx(0.4 * 6 / 12)
    assert chances[2:8].sum() == pytest.approx(0.4 * 6 / 12)
    assert chances[8:].sum() == pytest.approx(0.6)
    assert draw_chances(records, None, {"object": 0.5})[2:8].sum() == pytest.approx(0.3)


def test_kinds_of_weight_0_are_left_out_and_unknown_ones_are_named(data, tmp_path):
    shutil.copytree(data, tmp_path / "d")
    records = read_records(tmp_path / "d")
    write_records(tmp_path / "d", [replace(r, kind=("animal", "object")[n % 2]) for n, r in enumerate(records)])
    kept = load_pictures(tmp_path / "d", 16, DatasetConfig(kinds={"object": 0.0}))
    assert {record.kind for record in kept.records} == {"animal"}
    assert len(kept) == 40
    with pytest.raises(PokediffError, match="no pictures of kind animl; it has: animal, object"):
        load_pictures(tmp_path / "d", 16, DatasetConfig(kinds={"animl": 2.0}))
    with pytest.raises(PokediffError, match="no picture with a positive weight"):
        load_pictures(tmp_path / "d", 16, DatasetConfig(kinds={"animal": 0.0, "object": 0.0}))


def test_pictures_of_other_licences_are_left_out(data, tmp_path):
    shutil.copytree(data, tmp_path / "d")
    licenses = ("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", None)
    records = [replace(record, license=licenses[n % 4]) for n, record in enumerate(read_records(tmp_path / "d"))]
    write_records(tmp_path / "d", records)
    said: list[str] = []
    kept = load_pictures(tmp_path / "d", 16, DatasetConfig(licenses=("CC0-1.0", "CC-BY-[0-9]*")), said.append)
    assert {record.license for record in kept.records} == {"CC0-1.0", "CC-BY-4.0"}
    assert len(kept) == 40
    assert "licences: 40 of 80 pictures are used" in said
    with pytest.raises(PokediffError, match=r"no pictures of licence MIT; it has: .*CC-BY-4\.0"):
        load_pictures(tmp_path / "d", 16, DatasetConfig(licenses=("MIT",)))


def test_translate_brings_in_nothing():
    picture = np.arange(1, 10, dtype=np.uint8).reshape(3, 3, 1).repeat(4, axis=2)
    assert translate(picture, 1, 0)[..., 0].tolist() == [[0, 1, 2], [0, 4, 5], [0, 7, 8]]
    assert translate(picture, 0, -2)[..., 0].tolist() == [[7, 8, 9], [0, 0, 0], [0, 0, 0]]


@pytest.mark.slow
def test_embed_writes_every_caption_and_training_uses_the_file(data, tmp_path, monkeypatch):
    folder = tmp_path / "d"
    shutil.copytree(data, folder)
    path = embed(folder, "builtin")
    saved = load_embeddings(path, "builtin")
    pictures = load_pictures(folder, 16)
    assert set(saved) == {""} | {caption for several in pictures.captions for caption in several}

    def no_encoder(_):
        raise AssertionError("everything is in the file")

    monkeypatch.setattr("pokediff.data.dataset.load_text_encoder", no_encoder)
    vectors = caption_vectors(folder, pictures, "builtin")
    torch.testing.assert_close(vectors.table[0], saved[""])
    row = int(vectors.rows[4][1])
    torch.testing.assert_close(vectors.table[row], saved[pictures.captions[4][1]])


def test_embeddings_that_were_cut_are_made_again(tmp_path):
    folder, said = write_data(tmp_path / "d", number=24), []
    path = embed(folder, "builtin", report=said.append)
    whole, captions = path.read_bytes(), list(load_embeddings(path, "builtin"))
    for length in (0, 5, 200, len(whole) - 9):
        path.write_bytes(whole[:length])
        pictures = load_pictures(folder, 16, report=said.append)
        assert len(caption_vectors(folder, pictures, "builtin", report=said.append).table)
        assert f"{path} is damaged" in said[-1]
        embed(folder, "builtin", report=said.append)
        assert list(load_embeddings(path, "builtin")) == captions


@pytest.mark.parametrize("earlier", [{"encoder_sha256": "0" * 64}, {}], ids=["other weights", "version 0.1"])
def test_embeddings_of_an_encoder_that_has_changed_are_made_again(tmp_path, earlier):
    folder, said = write_data(tmp_path / "d", number=24), []
    path = embed(folder, "builtin", report=said.append)
    saved = load_embeddings(path, "builtin")
    metadata = {"encoder": "builtin", "captions": json.dumps(list(saved)), **earlier}
    path.write_bytes(save({"pooled": torch.zeros(len(saved), 384)}, metadata))
    pictures = load_pictures(folder, 16, report=said.append)
    table = caption_vectors(folder, pictures, "builtin", report=said.append).table
    assert said[-1] == f"{path} was made with other weights of builtin: its vectors are made again"
    assert table.norm(dim=1).min() > 0.99
    embed(folder, "builtin", report=said.append)
    assert set(load_embeddings(path, "builtin")) == set(saved)


def test_a_set_too_big_for_memory_lies_on_disk_and_gives_the_same_batches(data, monkeypatch):
    in_memory = load_pictures(data, 16)
    monkeypatch.setattr(cache, "MEMORY_SHARE", 0.0)
    on_disk = load_pictures(data, 16)
    assert isinstance(on_disk.pixels.array, np.memmap)
    assert on_disk.digest == in_memory.digest
    assert on_disk.pixels.shape == in_memory.pixels.shape
    batches = []
    for pictures in (in_memory, on_disk):
        train = pictures.split("train").with_shared_captions()
        vectors = caption_vectors(data, train, "builtin")
        config = DatasetConfig()
        batches.append(TrainingBatches(train, vectors, config, batch_size=8, caption_dropout=0.1, seed=0)[3])
        spread = pictures.split("validation").spread(2)
        assert isinstance(spread.pixels[:2], np.ndarray)
    torch.testing.assert_close(batches[0].pixels, batches[1].pixels)
    assert on_disk.split("train").pixels.array is on_disk.pixels.array  # not copied
