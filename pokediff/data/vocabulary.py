"""What a model can know: the words that enough of its training pictures share, and whose pictures they are."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from pokediff.data.captions import SHAPES, genus_of, style_phrase, subject_of
from pokediff.data.layouts import split_words
from pokediff.data.records import Record
from pokediff.errors import PokediffError
from pokediff.files import read_json, write_whole

WORDS, ATTRIBUTION = "words.json", "ATTRIBUTION.md"  # files of a checkpoint
UNNAMED = ("unknown", "unknown", "")  # author, licence, origin
FEWEST_PICTURES = 30  # a word of fewer pictures is hardly learnt
PLURALS = {"person": "people"}  # of the kinds
ENDINGS = frozenset("s es ed d er ers ing y ly".split())
NO_WORDS = frozenset("a an and as at by for from in into its lot no non not of off on or out the to up with".split())

Words = dict[str, dict[str, int]]


def vocabulary(records: Sequence[Record], fewest: int = FEWEST_PICTURES) -> Words:
    """The words of prompts by group, each with the number of pictures that have it, the most frequent first; only those
    of at least `fewest` pictures.

    Groups: styles, colours, bodies, types, things (of species), and one for each kind of thing: animals, monsters,
    people, faces, plants, objects. A word of a name belongs to the kind of most of its pictures.
    """
    groups: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for record in records:
        groups["styles"].update(filter(None, [style_phrase(record.style)]))
        groups["colours"].update(set(record.colors))
        if record.is_species:
            groups["bodies"].update(SHAPES.get(record.shape or "", ())[:1])
            groups["types"].update(kind.lower() for kind in set(record.types))
            groups["things"].update(_words(re.sub(r"pok[ée]mon", "", genus_of(record))))
        else:
            for word in _words(subject_of(record) or genus_of(record)):
                kinds[word][record.kind or "thing"] += 1
    for word, of_kinds in kinds.items():
        kind = of_kinds.most_common(1)[0][0]
        groups[PLURALS.get(kind, f"{kind}s")][word] = of_kinds.total()
    known = {}
    for group, count in groups.items():
        ordered = sorted(count.items(), key=lambda item: (-item[1], item[0]))
        known[group] = {word: number for word, number in ordered if number >= fewest}
    return {group: words for group, words in known.items() if words}


def write_words(folder: Path, records: Sequence[Record]) -> None:
    """Write words.json into a checkpoint."""
    write_whole(folder / WORDS, json.dumps(vocabulary(records), indent=1, ensure_ascii=False) + "\n")


def read_words(folder: str | Path) -> Words:
    """words.json of a checkpoint, {} where there is none. Raises PokediffError for one that holds something else."""
    path = Path(folder) / WORDS
    words = read_json(path) if path.is_file() else {}
    if not isinstance(words, dict) or not all(isinstance(group, dict) for group in words.values()):
        raise PokediffError(f"{path} holds no words: delete it, the checkpoint draws without it")
    return words


def prompt_note(prompt: str, words: Words, pieces: Callable[[str], Sequence[str]], most: int) -> str:
    """What a user should know of a prompt that will not draw what it says, in one line; "" for any other.

    A word is known that training pictures share (words.json), or that the text encoder has as one token; so are its
    English endings. `pieces` cuts a text into tokens, of which the encoder reads `most`, with a mark at either end.
    """
    known = {word for group in words.values() for phrase in group for word in split_words(phrase, 2)}

    def is_known(word: str) -> bool:
        stems = (word.removesuffix(ending) for ending in ENDINGS if word.endswith(ending))
        forms = [word, *(stem for stem in stems if len(stem) > 2)]
        return any(form in known or len(pieces(form)) == 1 for form in forms)

    shown = prompt if len(prompt) <= 60 else f"{prompt[:60]}…"
    content = [word for word in dict.fromkeys(split_words(prompt, 2)) if word not in NO_WORDS]
    unknown = [word for word in content if not is_known(word)]
    if prompt.strip() and not content and not any(sign.isalnum() for sign in prompt):
        return f"no words in {shown!r}: it says as much as an empty prompt"
    if len(unknown) > len(content) / 2:
        return f"few words of {shown!r} are known; prompts are in English, such as 'a blue water turtle'"
    if (length := len(pieces(prompt)) + 2) > most:
        return f"{shown!r} is too long: the last {length - most} of {length} tokens are not read"
    if unknown:
        return f"not known, so not drawn: {', '.join(unknown)} (in {shown!r})"
    return ""


def word_list(words: Words) -> str:
    """A line of Markdown for each group of words."""
    return "\n\n".join(f"**{group}**: {', '.join(known)}" for group, known in words.items())


def _words(text: str) -> set[str]:
    return set(split_words(text, 2)) - NO_WORDS


def attribution(records: Sequence[Record], inherited: Sequence[str] = ()) -> str:
    """ATTRIBUTION.md: author, licence, origin and number of the pictures, the largest share first, then `inherited`,
    the texts of the checkpoints that training starts from; "" when neither names an author or a licence.
    """
    texts = [text.replace("# Attribution", "# Of the weights before this training", 1) for text in inherited]
    rows = Counter(map(_author, records))
    if rows.keys() - {UNNAMED}:
        lines = "\n".join(
            f"| {_cell(author)} | {_cell(license)} | {_cell(origin)} | {number} |"
            for (author, license, origin), number in sorted(rows.items(), key=lambda item: (-item[1], item[0]))
        )
        own = f"""# Attribution

The {len(records):,} pictures of this training, from the rows of its data set.

| author | licence | origin | pictures |
| --- | --- | --- | --- |
{lines}
"""
        texts.insert(0, own)
    return "\n".join(texts)


def _author(record: Record) -> tuple[str, str, str]:
    """Author, licence and origin of a picture; one row for all that name neither of the first two."""
    if not record.author and not record.license:
        return UNNAMED
    return record.author or "unknown", record.license or "unknown", record.source_url or record.source or ""


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
