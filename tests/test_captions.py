from __future__ import annotations

import re
from collections import Counter

from pokediff.captions import CAPTIONS_PER_PICTURE, captions_of, visible_sentences
from pokediff.records import Record, read_records

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


def test_an_unknown_style_is_asked_for_by_its_own_name():
    assert captions_of(Record("a.png", style="oil-painting"))[0] == "oil painting of a creature"


def test_real_captions_name_nobody_and_are_shared(shared):
    records = read_records(shared / "data" / "pokemon")
    captions = {record.file_name: captions_of(record) for record in records}
    for record in records:
        name = re.compile(rf"(?<!\w){re.escape(record.name)}(?!\w)", re.IGNORECASE)
        assert not any(name.search(caption) for caption in captions[record.file_name]), record.name
    count = Counter(caption for several in captions.values() for caption in several)
    shared_ones = [sum(count[caption] > 1 for caption in several) for several in captions.values()]
    assert sum(number > 0 for number in shared_ones) > 0.98 * len(records)
    assert min(len(several) for several in captions.values()) >= 4
