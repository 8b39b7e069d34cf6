from __future__ import annotations

import re
from collections import Counter

import pytest

from pokediff.data.captions import (
    CAPTIONS_PER_PICTURE,
    STYLES,
    captions_of,
    shared_captions,
    visible_sentences,
    with_article,
)
from pokediff.data.records import Record, read_records, split_of

SEEDY = Record(
    "images/1.png",
    name="Seedy",
    style="artwork",
    types=("grass", "poison"),
    color="green",
    shape="quadruped",
    genus="Seed Pokémon",
    descriptions=("Seedy’s back carries a seed. SEEDY likes the sun. The POKéMON has two long ears.",),
)


def test_a_picture_has_several_captions_always_the_same_ones():
    captions = captions_of(SEEDY)
    assert captions == captions_of(SEEDY)
    assert len(captions) == len(set(captions)) == CAPTIONS_PER_PICTURE
    assert captions[0] == "official artwork of a green four-legged grass poison seed creature"


def test_the_name_is_in_no_caption():
    assert all("seedy" not in caption.lower() for caption in captions_of(SEEDY))
    assert visible_sentences(SEEDY) == ["Its back carries a seed.", "The creature has two long ears."]


def test_measured_colours_come_before_the_species_colour_and_shiny_has_none():
    assert "yellow and red" in captions_of(SEEDY, ("yellow", "red"))[0]
    shiny = Record("a.png", color="green", shiny=True, style="artwork")
    assert all("green" not in caption for caption in captions_of(shiny))


def test_what_people_wrote_is_kept():
    assert captions_of(Record("a.png", captions=("my own words",), color="red")) == ("my own words",)


def test_a_picture_of_which_nothing_is_known_has_a_caption():
    assert captions_of(Record("a.png"))[0] == "a creature"


def test_an_unknown_style_is_prompted_by_its_own_name():
    assert captions_of(Record("a.png", style="oil-painting"))[0] == "oil painting of a creature"


def test_the_text_may_leave_the_sign_of_a_sex_out():
    record = Record("a.png", name="Horny♀", descriptions=("A female Horny’s horn is short.",))
    assert visible_sentences(record) == ["A female its horn is short."]


def test_only_captions_in_common_are_trained_on():
    records = [Record("1.png", name="Seedy", dex=1), Record("2.png", name="Leafy", dex=2), Record("3.png")]
    records += [Record("4.png"), Record("5.png", captions=("my own words",))]
    made = [
        ("a green creature", "a green seed creature"),
        ("a green creature", "a leaf. Seedy sleeps on it", "a creature"),
        ("a leaf. Seedy sleeps on it", "a creature"),
        ("a blue snake with two heads", "a blue snake"),
        ("my own words",),
    ]
    kept = shared_captions(records, made)
    assert kept[:3] == [("a green creature",), ("a green creature", "a creature"), ("a creature",)]
    assert kept[3:] == [("a blue snake",), ("my own words",)]


def test_a_thing_is_called_by_its_name():
    cow = Record(
        "cow.png", name="Cow", style="emoji-flat", kind="animal", genus="cow", descriptions=("farm, cow, milk",)
    )
    captions = captions_of(cow, ("brown", "white"))
    assert captions[:5] == (
        "flat emoji of a cow",
        "a cow",
        "flat emoji of a brown cow",
        "a brown cow, flat emoji",
        "flat emoji of a brown animal",
    )
    assert "flat emoji of a brown and white cow" in captions
    assert {"flat emoji of a cow, farm, milk", "flat emoji of a cow, milk, farm"}.intersection(captions)
    assert all("cow, cow" not in caption for caption in captions)
    measured = Record("cow.png", name="Cow", style="emoji-flat", kind="animal", colors=("black",))
    assert captions_of(measured)[2] == "flat emoji of a black cow"


def test_the_same_things_may_share_their_name():
    cows = [Record(f"{index}.png", name="Cow", kind="animal", colors=("brown",)) for index in range(2)]
    assert "a brown cow" in shared_captions(cows, [captions_of(cow) for cow in cows])[0]


@pytest.mark.parametrize(
    ("values", "colors", "caption"),
    [
        (dict(name="black cat"), ("black", "pink"), "pixel tile of a pink black cat"),
        (dict(name="woman: red hair", kind="person"), (), "pixel tile of a woman with red hair"),
        (dict(name="alien blue climb2"), (), "an alien blue climb"),
        (
            dict(name="Shrab", genus="water Muscly Crab monster"),
            ("red",),
            "pixel tile of a red water muscly crab monster",
        ),
        (dict(name="Fencer", genus="human Fencer, teal team colour"), (), "pixel tile of a human fencer"),
        (dict(name="Shrab", descriptions=("a crab; tags: sea, sea",)), (), "pixel tile of a shrab, sea"),
        (dict(name="cartoon person", kind="face", genus="big smile style cartoon face"), (), "a cartoon face"),
        (dict(name="imp", kind="monster"), ("red",), "pixel tile of a red imp creature"),
    ],
)
def test_names_of_other_collections(values, colors, caption):
    assert caption in captions_of(Record("a.png", style="pixel-tile", **{"kind": "monster", **values}), colors)


def test_articles():
    for words, right in {
        "cow": "a cow",
        "owl": "an owl",
        "unicorn": "a unicorn",
        "unusual bird": "an unusual bird",
        "hourglass": "an hourglass",
        "euro": "a euro",
        "one-eyed imp": "a one-eyed imp",
        "blue and white jeans": "blue and white jeans",
        "octopus": "an octopus",
        "wine glass": "a wine glass",
        "bear with glasses": "a bear with glasses",
        "women holding hands": "women holding hands",
        "the witch-king": "the witch-king",
    }.items():
        assert with_article(words) == right


@pytest.mark.slow
def test_open_captions_share_words_and_are_several(shared):
    folder = shared / "data" / "creatures"
    if not folder.is_dir():
        pytest.skip("needs the open pictures in ../shared")
    records = read_records(folder)
    captions = [captions_of(record, ("red", "black")) for record in records]
    assert all(several[0].startswith(tuple(STYLES.values())) for several in captions)
    assert not any(re.search(r"\b(a|an) (a|an|the)\b|  |None", caption) for several in captions for caption in several)
    count = Counter(caption for several in captions for caption in several)
    assert sum(all(count[c] == 1 for c in several) for several in captions) <= 0.001 * len(records)
    assert sum(map(len, captions)) / len(captions) > 7


@pytest.mark.slow
def test_real_captions_name_nobody_and_belong_to_no_picture_alone(shared):
    records = [record for record in read_records(shared / "data" / "pokemon") if split_of(record) == "train"]
    captions = shared_captions(records, [captions_of(record) for record in records])
    for record, several in zip(records, captions, strict=True):
        name = re.compile(rf"(?<!\w){re.escape(record.name.strip('♀♂'))}(?!\w)", re.IGNORECASE)
        assert not any(name.search(caption) for caption in several), record.name
    count = Counter(caption for several in captions for caption in several)
    alone = [several for several in captions if any(count[caption] == 1 for caption in several)]
    assert len(alone) <= 0.002 * len(records)  # they have nothing in common with any other
    assert sum(map(len, captions)) / len(captions) > 4
