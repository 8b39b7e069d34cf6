"""Parsing of Bulbapedia pages; no I/O.

Tables and columns are found by the texts of their headers, never by position or style.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from bs4 import BeautifulSoup, Tag

from pokediff.errors import PokediffError

LIST_TITLE = "List_of_Pokémon_by_National_Pokédex_number"
MOST_CELLS = 1_000_000  # of one table, spanned ones included: a cell may span 100 rows and columns
EXPECTED_SPECIES = 1025  # as of generation IX; to notice a page that is no longer the list
HOSTS = {"bulbapedia.bulbagarden.net", "archives.bulbagarden.net", "cdn.bulbagarden.net"}

NUMBER_HEADERS = {"ndex", "national", "national dex", "no.", "no", "#", "number"}
NAME_HEADERS = {"pokémon", "pokemon", "name"}
TYPE_HEADERS = {"type", "types"}
IMAGE_HEADERS = {"ms", "image", "sprite", "picture", "artwork"}
REGIONS = {"alolan": "alola", "galarian": "galar", "hisuian": "hisui", "paldean": "paldea"}


class PageChanged(PokediffError):
    """A page no longer has the structure that the parser expects."""


@dataclass(frozen=True)
class Entry:
    """One row of the list: a species, or one of its forms."""

    dex: int
    name: str
    form: str  # "" for the species itself, else as on the page: "Alolan Form"
    types: tuple[str, ...]  # lower case
    page_url: str
    image_urls: tuple[str, ...]  # the best first: the original, then the largest thumbnail


@dataclass(frozen=True)
class Species:
    """The facts on a species' own page."""

    category: str | None  # "Seed Pokémon"
    biology: str | None  # first paragraph of the section, about its appearance
    relatives: tuple[str, ...]  # titles of the pages of its evolution line, such as "Ivysaur_(Pokémon)"


# ------------------------------------------------------------------------------------------------------- the list


def parse_list(html: str | bytes, page_url: str) -> list[Entry]:
    """All rows of all tables of the National Pokédex list, in page order.

    Raises PageChanged when fewer than half of EXPECTED_SPECIES numbers are found.
    """
    soup = BeautifulSoup(html, "html.parser")
    entries: dict[tuple[int, str, str], Entry] = {}
    for table in soup.find_all("table"):
        rows = _grid(table)
        header, columns = _header(rows)
        for row in rows[header + 1 :] if columns else ():
            entry = _entry(row, columns, page_url)
            if entry:
                entries.setdefault((entry.dex, entry.name, entry.form), entry)
    numbers = {entry.dex for entry in entries.values()}
    if len(numbers) < EXPECTED_SPECIES / 2:
        raise PageChanged(
            f"only {len(numbers)} of about {EXPECTED_SPECIES} Pokédex numbers found at {page_url}: "
            "the page no longer looks like the list"
        )
    return list(entries.values())


def missing_numbers(entries: list[Entry]) -> list[int]:
    """The Pokédex numbers between 1 and the largest one that no entry has."""
    numbers = {entry.dex for entry in entries}
    return sorted(set(range(1, max(numbers) + 1)) - numbers)


def _grid(table: Tag) -> list[list[Tag | None]]:
    """The rows of a table, with a cell repeated in each row and column that it spans, without nested tables."""
    rows = [row for row in table.find_all("tr") if row.find_parent("table") is table]
    cells: dict[tuple[int, int], Tag] = {}
    for y, row in enumerate(rows):
        x = 0
        for cell in row.find_all(["td", "th"], recursive=False):
            while (y, x) in cells:
                x += 1
            spanned = product(range(_span(cell, "rowspan")), range(_span(cell, "colspan")))
            cells.update({(y + down, x + right): cell for down, right in spanned})
            if len(cells) > MOST_CELLS:
                raise PageChanged(f"a table of the page has more than {MOST_CELLS:,} cells: it is not the list")
    width = max((x + 1 for _, x in cells), default=0)
    return [[cells.get((y, x)) for x in range(width)] for y in range(len(rows))]


def _span(cell: Tag, name: str) -> int:
    value = str(cell.get(name) or "1").strip()
    return min(100, max(1, int(value))) if value.isdigit() else 1


def _header(rows: list[list[Tag | None]]) -> tuple[int, dict[str, list[int]]]:
    """(index of the header row, {"number", "name", "type", "image": columns}); (0, {}) for another table."""
    wanted = {"number": NUMBER_HEADERS, "name": NAME_HEADERS, "type": TYPE_HEADERS, "image": IMAGE_HEADERS}
    for index, row in enumerate(rows[:5]):
        titles = [_text(cell).lower() if cell is not None else "" for cell in row]
        columns = {kind: [i for i, title in enumerate(titles) if title in names] for kind, names in wanted.items()}
        if columns["number"] and columns["name"] and columns["type"]:
            return index, columns
    return 0, {}


def _entry(row: list[Tag | None], columns: dict[str, list[int]], page_url: str) -> Entry | None:
    def cells(kind: str) -> list[Tag]:
        found = [row[i] for i in columns[kind]]
        return [cell for i, cell in enumerate(found) if cell is not None and cell not in found[:i]]

    number = next((m for cell in cells("number") if (m := re.search(r"\d{3,4}", _text(cell)))), None)
    name_cell = next(iter(cells("name")), None)
    if number is None or name_cell is None:
        return None
    link = name_cell.find("a", href=True)
    own_page = _absolute(page_url, str(link["href"])) if link is not None else ""
    if link is None or not own_page:
        return None
    form = " ".join(_text(small) for small in name_cell.find_all("small")).strip()
    types = [_text(part).lower() for cell in cells("type") for part in (cell.find_all("a") or [cell])]
    picture = next(
        (image for cell in cells("image") or row if cell is not None for image in cell.find_all("img")), None
    )
    return Entry(
        dex=int(number[0]),
        name=_text(link),
        form=form,
        types=tuple(dict.fromkeys(kind for kind in types if re.fullmatch(r"[a-z]+", kind))),
        page_url=own_page,
        image_urls=_image_urls(picture, page_url) if picture is not None else (),
    )


def _image_urls(image: Tag, page_url: str) -> tuple[str, ...]:
    """The original, then the largest picture of the srcset."""
    sources = [(1.0, str(image.get("src") or image.get("data-src") or ""))]
    for candidate in str(image.get("srcset") or "").split(","):
        address, _, density = candidate.strip().partition(" ")
        size = re.fullmatch(r"([\d.]+)[xw]", density.strip())
        sources.append((float(size[1]) if size else 1.0, address))
    found = [(size, url) for size, address in sources if address and (url := _absolute(page_url, address))]
    if not found:
        return ()
    largest = max(found)[1]
    return tuple(dict.fromkeys((original_url(largest), largest)))


def _absolute(page_url: str, link: str) -> str:
    """The absolute address of a link on a page, "" for a malformed one."""
    try:
        return urlunsplit(urlsplit(urljoin(page_url, link)))
    except ValueError:
        return ""


def original_url(url: str) -> str:
    """The full-size file of a thumbnail, .../f/fb/A.png of .../thumb/f/fb/A.png/70px-A.png; other addresses stay."""
    parts = urlsplit(url)
    match = re.fullmatch(r"(.*?)/thumb/(.+)/[^/]*\d+px-[^/]+", parts.path)
    return urlunsplit(parts._replace(path=f"{match[1]}/{match[2]}")) if match else url


# -------------------------------------------------------------------------------------------------- a species page


def parse_species(html: str | bytes) -> Species:
    """Category, first paragraph of Biology, and evolution line; None or empty if missing."""
    soup = BeautifulSoup(html, "html.parser")
    category = next(
        (_text(a) for a in soup.find_all("a", href=True) if page_title(str(a["href"])) == "Pokémon_category"), None
    )
    paragraphs = (node for node in _section(soup, "Biology") if node.name == "p")
    biology = next((text for p in paragraphs if len(text := _prose(p)) >= 40), None)
    links = (a for node in _section(soup, "Evolution") for a in node.find_all("a", href=True))
    relatives = dict.fromkeys(title for a in links if (title := page_title(str(a["href"]))).endswith("_(Pokémon)"))
    return Species(category, biology, tuple(relatives))


def _section(soup: BeautifulSoup, heading_id: str) -> Iterator[Tag]:
    """The elements between a heading and the next heading of any level."""
    heading = soup.select_one(f"#{heading_id}")
    if heading is not None and heading.name == "span":  # older MediaWiki
        heading = heading.parent
    if heading is None:
        return
    wrapper = heading.find_parent("div", class_="mw-heading") or heading  # newer MediaWiki
    for node in wrapper.find_next_siblings():
        if re.fullmatch(r"h[1-6]", node.name) or "mw-heading" in (node.get("class") or []):
            return
        yield node


def _prose(paragraph: Tag) -> str:
    """The text of a paragraph without footnote marks."""
    text = "".join(part for part in paragraph.strings if part.find_parent("sup") is None)
    return " ".join(text.split())


def page_title(url: str) -> str:
    """The wiki title in an address, decoded, or "": "Ivysaur_(Pokémon)" in "/wiki/Ivysaur_(Pok%C3%A9mon)#x"."""
    return unquote(urlsplit(url).path).partition("/wiki/")[2]


def _text(cell: Tag) -> str:
    return " ".join(cell.get_text(" ", strip=True).split())


# ---------------------------------------------------------------------------------------------------------- names


def list_url(base_url: str) -> str:
    """Address of the National Pokédex list on a wiki."""
    return f"{base_url.rstrip('/')}/wiki/{quote(LIST_TITLE)}"


def file_stem(entry: Entry) -> str:
    """The file name of an entry's picture without suffix, in ASCII: 0019-rattata-alola."""
    form = re.sub(r"\b(form|forme|pattern|mode|style|cloak|size|plumage|trim)\b", "", entry.form, flags=re.IGNORECASE)
    words = [REGIONS.get(word, word) for word in _slug(form).split("-")]
    return "-".join(part for part in (f"{entry.dex:04}", _slug(entry.name), *words) if part)[:80].strip("-")


def _slug(text: str) -> str:
    text = text.replace("♀", " f").replace("♂", " m").replace("'", "").replace("’", "")
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
