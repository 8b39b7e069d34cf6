from __future__ import annotations

import json

import pytest

from pokediff.data.records import Record, has_license
from pokediff.data.vocabulary import attribution, prompt_note, read_words, vocabulary
from pokediff.errors import PokediffError
from pokediff.model.text import load_text_encoder


def things(number: int, **fields) -> list[Record]:
    return [Record(f"{fields['name']}-{fields.get('style')}-{index}.png", **fields) for index in range(number)]


def test_words_of_things_belong_to_the_kind_of_most_of_their_pictures():
    records = [
        *things(20, name="red fox", kind="animal", style="emoji-flat", colors=("red",)),
        *things(10, name="fox face", kind="face", style="emoji-flat", colors=("orange", "white")),
        *things(30, name="woman with a hat", kind="person", style="pixel-tile"),
        *things(29, name="newt", kind="animal", style="pixel-tile"),
    ]
    words = vocabulary(records)
    assert words["animals"] == {"fox": 30}  # red: 20 pictures, newt: 29
    assert words["people"] == {"woman": 30, "hat": 30}
    assert words["styles"] == {"pixel tile": 59, "flat emoji": 30}
    assert "colours" not in words
    assert "faces" not in words
    assert vocabulary(records, fewest=10)["colours"] == {"red": 20, "orange": 10, "white": 10}


def test_species_have_bodies_types_and_genera_and_no_names():
    records = [
        Record(f"{n}.png", dex=n, name="Foo", shape="wings", types=("Fire", "Flying"), genus="Flame Pokémon")
        for n in range(1, 31)
    ]
    words = vocabulary(records)
    assert words == {"bodies": {"winged": 30}, "types": {"fire": 30, "flying": 30}, "things": {"flame": 30}}
    assert "foo" not in json.dumps(words).lower()


def test_attribution_names_author_licence_and_origin_once_each():
    records = [
        *things(3, name="fox", author="Ann | Bob", license="CC-BY-4.0", source_url="example.org/foxes"),
        *things(1, name="owl", author=None, license="CC0-1.0", source="owls"),
        *things(1, name="cat", source_url="example.org/1.png"),
        *things(1, name="cat", source_url="example.org/2.png"),
    ]
    rows = [line for line in attribution(records).splitlines() if line.startswith("|")][2:]
    assert rows == [
        "| Ann \\| Bob | CC-BY-4.0 | example.org/foxes | 3 |",
        "| unknown | unknown |  | 2 |",
        "| unknown | CC0-1.0 | owls | 1 |",
    ]
    assert attribution(things(2, name="fox", source_url="example.org/foxes")) == ""


def test_attribution_goes_on_with_that_of_the_weights_before():
    before = attribution(things(1, name="owl", author="Ann", license="CC-BY-4.0"))
    unnamed, named = things(2, name="fox"), things(2, name="fox", author="Bob", license="CC0-1.0")
    assert attribution(unnamed, [before]).startswith("# Of the weights before this training")
    both = attribution(named, [before])
    assert both.index("| Bob |") < both.index("# Of the weights") < both.index("| Ann |")


@pytest.mark.parametrize(
    ("license", "kept"),
    [("CC0-1.0", True), ("CC-BY-4.0", True), ("CC-BY-SA-4.0", False), ("GPL-2.0-only", False), (None, False)],
)
def test_share_alike_is_not_attribution_alone(license, kept):
    assert has_license(Record("a.png", license=license), ("CC0-1.0", "CC-BY-[0-9]*")) is kept


@pytest.fixture(scope="module")
def pieces():
    return load_text_encoder("builtin").tokenizer.tokenize


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a crimson dragon with spiky wings", ""),
        ("two blue turtles walking", ""),
        ("", ""),
        ("7", ""),
        ("a red squirtle", "not known, so not drawn: squirtle"),
        ("un dragon bleu", "not known, so not drawn: bleu"),
        ("una tartaruga azzurra", "prompts are in English"),
        ("une tortue verte", "prompts are in English"),
        ("червоний дракон", "prompts are in English"),
        ("红色的龙", "prompts are in English"),
        ("🐢", "no words"),
        ("a blue turtle, " * 30, "the last 58 of 122 tokens are not read"),
    ],
)
def test_a_prompt_that_will_not_work_is_told(pieces, prompt, words):
    note = prompt_note(prompt, {"animals": {"turtle": 40}}, pieces, 64)
    assert words in note
    assert (note == "") == (words == "")


def test_a_model_knows_the_words_of_its_pictures(pieces):
    words = {"things": {"червоний дракон": 30, "squirtle": 30}}
    for prompt in ("червоний дракон", "a red squirtle"):
        assert prompt_note(prompt, words, pieces, 64) == ""


@pytest.mark.parametrize("text", ["[]", '{"animals": ["cat"]}', "7"])
def test_words_json_of_another_kind_is_named(tmp_path, text):
    assert read_words(tmp_path) == {}
    (tmp_path / "words.json").write_text(text)
    with pytest.raises(PokediffError, match=r"words\.json holds no words: delete it"):
        read_words(tmp_path)
