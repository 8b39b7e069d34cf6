"""Parsing, on small pages in the wiki's shapes of 2021, 2024 and 2025, and on the saved pages where they are."""

from __future__ import annotations

import pytest

from pokediff.scraper import bulbapedia
from pokediff.scraper.bulbapedia import (
    Entry,
    PageChanged,
    file_stem,
    missing_numbers,
    original_url,
    parse_list,
    parse_species,
)

URL = "https://bulbapedia.bulbagarden.net/wiki/List"
ART = "https://archives.bulbagarden.net/media/upload"

# 2021: another numbering first, three digits, protocol-relative addresses, menu sprites without thumbnails, one type cell.
PAGE_2021 = """
<table class="roundy" style="border-radius: 10px"><tr>
<th>Kdex</th><th>Ndex</th><th>MS</th><th>Pokémon</th><th colspan="2">Type</th></tr>
<tr><td>#001</td><td>#001</td>
<th><a href="/wiki/Bulbasaur_(Pok%C3%A9mon)"><img alt="" src="//cdn.bulbagarden.net/upload/e/ec/001MS.png" width="40"></a></th>
<td><a href="/wiki/Bulbasaur_(Pok%C3%A9mon)" title="Bulbasaur">Bulbasaur</a></td>
<td colspan="1"><a href="/wiki/Grass_(type)"><span>Grass</span></a></td><td colspan="1"><a href="/wiki/Poison_(type)">Poison</a></td></tr>
<tr><td>#019</td><td>#019</td><td><img src="//cdn.bulbagarden.net/upload/thumb/1/11/019MS.png/40px-019MS.png"></td>
<td><a href="/wiki/Rattata_(Pok%C3%A9mon)">Rattata</a></td><td colspan="2"><a href="/wiki/Normal_(type)">Normal</a></td></tr>
<tr><td>#019</td><td>#019</td><td><img src="//cdn.bulbagarden.net/upload/1/12/019AMS.png"></td>
<td><a href="/wiki/Rattata_(Pok%C3%A9mon)">Rattata</a><br><small>Alolan Form</small></td>
<td><a href="/wiki/Dark_(type)">Dark</a></td><td><a href="/wiki/Normal_(type)">Normal</a></td></tr></table>
"""

# 2024: numbers span the rows of the forms, thumbnails with srcset, another table on the page, nested tables.
PAGE_2024 = f"""
<table><tr><th>Region</th><th>Pokédex</th></tr><tr><td>Kanto</td><td>151</td></tr></table>
<table><tr><th>Ndex</th><th>Type</th></tr><tr><td>#0150</td><td>Psychic</td></tr></table>
<table><tbody><tr><th style="x">Ndex
</th><th>MS</th><th>Pokémon</th><th colspan="2">Type</th></tr>
<tr><td rowspan="2" style="font-family:monospace">#0019</td>
<td><a href="/wiki/R"><img src="{ART}/thumb/a/aa/0019Rattata.png/70px-0019Rattata.png"
 srcset="{ART}/thumb/a/aa/0019Rattata.png/105px-0019Rattata.png 1.5x, {ART}/thumb/a/aa/0019Rattata.png/140px-0019Rattata.png 2x"></a></td>
<td><a href="/wiki/Rattata_(Pok%C3%A9mon)">Rattata</a><br/><small></small></td>
<td colspan="2"><a href="/wiki/Normal_(type)"><span>Normal</span></a>
</td></tr>
<tr><td><img src="{ART}/thumb/b/be/0019Rattata-Alola.png/70px-0019Rattata-Alola.png"></td>
<td><a href="/wiki/Rattata_(Pok%C3%A9mon)">Rattata</a><br/><small>Alolan Form</small></td>
<td><a href="/wiki/Dark_(type)">Dark</a></td><td><a href="/wiki/Normal_(type)">Normal</a></td></tr>
<tr><td rowspan="1">#0029</td><td><img src="{ART}/b/b2/0029Nidoran.png"></td>
<td><a href="/wiki/Nidoran%E2%99%80_(Pok%C3%A9mon)">Nidoran♀</a><br/><small></small></td>
<td colspan="2"><table><tr><td><a href="/wiki/Poison_(type)">Poison</a></td></tr></table></td></tr>
<tr><td>????</td><td></td><td>Unreleased</td><td colspan="2">???</td></tr>
</tbody></table>
"""

# 2025: image wrapped by the newer MediaWiki, columns in another order, a tenth table with a new number.
PAGE_2025 = f"""
<div class="mw-heading mw-heading3"><h3 id="Generation_X">Generation X</h3></div>
<table class="sortable"><thead><tr><th scope="col">Type</th><th>Name</th><th>No.</th><th>Image</th></tr></thead>
<tbody><tr><td><a href="/wiki/Fire_(type)">Fire</a> <a href="/wiki/Ghost_(type)">Ghost</a></td>
<td><a href="https://bulbapedia.bulbagarden.net/wiki/Type:_Null_(Pok%C3%A9mon)">Type: Null</a></td>
<td>1026</td>
<td><figure typeof="mw:File/Thumb"><span><picture><source srcset="x.webp"><img class="mw-file-element"
 src="{ART}/thumb/1/19/1026Type_Null.png/120px-1026Type_Null.png.webp"
 srcset="{ART}/thumb/1/19/1026Type_Null.png/250px-1026Type_Null.png.webp 2x"></picture></span></figure></td></tr></tbody></table>
"""


@pytest.fixture(autouse=True)
def _short_lists_will_do(monkeypatch):
    monkeypatch.setattr(bulbapedia, "EXPECTED_SPECIES", 1)


def test_2021():
    entries = parse_list(PAGE_2021, URL)
    assert [(e.dex, e.name, e.form, e.types) for e in entries] == [
        (1, "Bulbasaur", "", ("grass", "poison")),
        (19, "Rattata", "", ("normal",)),
        (19, "Rattata", "Alolan Form", ("dark", "normal")),
    ]
    assert entries[0].page_url == "https://bulbapedia.bulbagarden.net/wiki/Bulbasaur_(Pok%C3%A9mon)"
    assert entries[0].image_urls == ("https://cdn.bulbagarden.net/upload/e/ec/001MS.png",)
    assert entries[1].image_urls[0] == "https://cdn.bulbagarden.net/upload/1/11/019MS.png"


def test_2024():
    entries = parse_list(PAGE_2024, URL)
    assert [(e.dex, e.name, e.form, e.types) for e in entries] == [
        (19, "Rattata", "", ("normal",)),
        (19, "Rattata", "Alolan Form", ("dark", "normal")),
        (29, "Nidoran♀", "", ("poison",)),
    ]
    assert entries[0].image_urls == (
        f"{ART}/a/aa/0019Rattata.png",
        f"{ART}/thumb/a/aa/0019Rattata.png/140px-0019Rattata.png",
    )
    assert missing_numbers(entries)[:3] == [1, 2, 3]
    assert 19 not in missing_numbers(entries)


def test_2025():
    (entry,) = parse_list(PAGE_2025, URL)
    assert (entry.dex, entry.name, entry.types) == (1026, "Type: Null", ("fire", "ghost"))
    assert entry.image_urls == (
        f"{ART}/1/19/1026Type_Null.png",
        f"{ART}/thumb/1/19/1026Type_Null.png/250px-1026Type_Null.png.webp",
    )


def test_a_torn_address_costs_one_picture_not_the_list():
    torn = PAGE_2021.replace('src="//cdn.bulbagarden.net/upload/e/ec/001MS.png"', 'src="http://[torn"')
    assert torn != PAGE_2021
    entries = parse_list(torn, URL)
    assert entries[0].image_urls == ()
    assert len(entries) == len(parse_list(PAGE_2021, URL))


def test_a_page_that_is_no_longer_the_list(monkeypatch):
    monkeypatch.setattr(bulbapedia, "EXPECTED_SPECIES", 1025)
    for html in (PAGE_2024, "<html><title>Just a moment...</title></html>", ""):
        with pytest.raises(PageChanged, match="no longer looks like the list"):
            parse_list(html, URL)


@pytest.mark.parametrize(
    ("dex", "name", "form", "stem"),
    [
        (19, "Rattata", "Alolan Form", "0019-rattata-alola"),
        (669, "Flabébé", "Red Flower", "0669-flabebe-red-flower"),
        (29, "Nidoran♀", "", "0029-nidoran-f"),
        (32, "Nidoran♂", "", "0032-nidoran-m"),
        (772, "Type: Null", "", "0772-type-null"),
        (83, "Farfetch'd", "Galarian Form", "0083-farfetchd-galar"),
        (122, "Mr. Mime", "", "0122-mr-mime"),
        (1, "../../etc/passwd\x00", "", "0001-etc-passwd"),
        (2, "龍", "", "0002"),
        (3, "x" * 500, "", "0003-" + "x" * 75),
    ],
)
def test_file_names_are_our_own(dex, name, form, stem):
    assert file_stem(Entry(dex, name, form, (), "", ())) == stem


def test_originals_behind_thumbnails():
    assert original_url(f"{ART}/thumb/f/fb/A%27b.png/70px-A%27b.png") == f"{ART}/f/fb/A%27b.png"
    assert original_url(f"{ART}/f/fb/A.png") == f"{ART}/f/fb/A.png"


@pytest.mark.parametrize(
    "heading",
    [
        '<h2><span class="mw-headline" id="{0}">{0}</span></h2>',
        '<h2 id="{0}">{0}</h2>',
        '<div class="mw-heading mw-heading2"><h2 id="{0}">{0}</h2><span>[edit]</span></div>',
    ],
)
def test_species_pages_old_and_new(heading):
    html = f"""<a href="/wiki/Pok%C3%A9mon_category" title="x"><span>Seed Pokémon</span></a>
    <p>Not this paragraph, though it is long enough to be taken for one.</p>{heading.format("Biology")}
    <p></p><div class="thumb"><p>caption</p></div>
    <p>Bulbasaur is a small, <a href="/wiki/Four">quadrupedal</a> Pokémon<sup>[1]</sup> with blue-green skin.</p>
    <p>As mentioned in the anime it is found in gardens of all regions.</p>{heading.format("Evolution")}
    <table><tr><td><a class="selflink">Bulbasaur</a></td><td><a href="/wiki/Ivysaur_(Pok%C3%A9mon)#top">Ivysaur</a>
    <a href="/wiki/Grass_(type)">Grass</a></td></tr></table>{heading.format("Trivia")}
    <p><a href="/wiki/Mew_(Pok%C3%A9mon)">Mew</a> is not of its line.</p>"""
    species = parse_species(html)
    assert species.category == "Seed Pokémon"
    assert species.biology == "Bulbasaur is a small, quadrupedal Pokémon with blue-green skin."
    assert species.relatives == ("Ivysaur_(Pokémon)",)
    assert parse_species("<p>nothing</p>") == bulbapedia.Species(None, None, ())


@pytest.mark.slow
def test_the_saved_list(shared, monkeypatch):
    monkeypatch.setattr(bulbapedia, "EXPECTED_SPECIES", 1025)
    html = (shared / "bulbapedia" / "national_dex_2024-05.html").read_text(encoding="utf-8")
    entries = parse_list(html, URL)
    assert len(entries) == 1180
    assert {e.dex for e in entries} == set(range(1, 1026))
    assert missing_numbers(entries) == []
    types = {kind for e in entries for kind in e.types}
    assert len(types) == 18
    assert all(1 <= len(e.types) <= 2 and e.image_urls for e in entries)
    assert {"Flabébé", "Nidoran♀", "Type: Null", "Farfetch'd", "Mr. Mime"} <= {e.name for e in entries}
    assert len({file_stem(e) for e in entries}) == len(entries)


def test_the_saved_species_page(shared):
    species = parse_species(
        (shared / "bulbapedia" / "bulbasaur_2021-03.html").read_text(encoding="utf-8", errors="replace")
    )
    assert species.category == "Seed Pokémon"
    assert species.biology.startswith("Bulbasaur is a small, quadrupedal Pokémon that has blue-green skin")
    assert species.relatives == ("Ivysaur_(Pokémon)", "Venusaur_(Pokémon)")
