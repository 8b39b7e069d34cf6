"""From a record to the several captions of its picture.

A caption that belongs to one picture only lets a model memorize that picture (Gu et al., "On Memorization in Diffusion
Models", 2023; Somepalli et al., 2023). So every picture has several captions, each with some of the facts left out,
most of them shared with other pictures.

There are two wordings. A species (a Pokémon, `Record.is_species`) is described by its attributes, and its name is in
no caption. A thing (an emoji, a tile, a picture of your own) is called by its name.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

import numpy as np

from pokediff.data.packed import Captions, Records
from pokediff.data.records import Record

CAPTIONS_PER_PICTURE = 12

# Prompt words of the styles; the words of any other style are its name.
STYLES = {
    "artwork": "official artwork",
    "artwork-alt": "official artwork",
    "artwork-forms": "official artwork",
    "home": "cel-shaded render",
    "dream-world": "vector drawing",
    "sprite-gen5": "pixel sprite",
    "sprite-gen5-style": "pixel sprite",
    "sprite-gen4": "pixel sprite",
    "sprite-gen3": "pixel sprite",
    "sprite-gen2": "four-color pixel sprite",
    "sprite-gen1": "gray pixel sprite",
    "portrait-face": "portrait",
    "icon-gen7": "tiny pixel icon",
    "icon-gen8": "tiny pixel icon",
    "icon-gen9": "tiny pixel icon",
    "emoji-flat": "flat emoji",
    "emoji-3d": "3d emoji",
    "emoji-glossy": "glossy emoji",
    "emoji-outline": "outline emoji",
    "pixel-tile": "pixel tile",
    "pixel-sprite": "pixel sprite",
    "clip-art": "clip art",
    "avatar-flat": "flat avatar",
    "avatar-line": "line avatar",
    "cartoon-flat": "flat cartoon",
    "cartoon-painted": "painted cartoon",
    "painted": "painting",
    "photo-cutout": "photo",
    "rendered-3d": "3d render",
    "tinted-icon": "flat icon",
}

# The body shapes of the National Pokédex, as adjectives.
SHAPES = {
    "armor": ("armored", "insect-like"),
    "arms": ("two-armed",),
    "ball": ("round", "ball-shaped"),
    "blob": ("blob-shaped", "legless"),
    "bug-wings": ("insect-winged", "four-winged"),
    "fish": ("fish-shaped", "finned"),
    "heads": ("many-headed", "clustered"),
    "humanoid": ("humanoid", "human-shaped"),
    "legs": ("two-legged",),
    "quadruped": ("four-legged", "quadruped"),
    "squiggle": ("snake-like", "serpentine"),
    "tentacles": ("tentacled", "many-legged"),
    "upright": ("upright", "standing"),
    "wings": ("winged", "two-winged"),
}

NOUNS = ("creature", "monster", "pokemon")

# A sentence of a Pokédex text goes into a caption when it has a word for something visible.
VISIBLE = frozenset(
    """antenna antennae armor arm arms back beak belly body bone bones bulb bulbs cheek cheeks claw claws coat coil
    crest crystal crystals ear ears eye eyes eyebrows face fang fangs feather feathers fin fins fingers flame flames
    flower flowers foot forehead fur gem hair hand hands head heads hide hood horn horns iron jaw jaws jaw leaf leaves
    leg legs limbs mane mask mouth mustache neck needle needles nose patterns paw paws petal petals pincers plates
    pouch ring rings rock rocks round sac scale scales seed shell shells skin skull spike spikes spine spines spots
    steel stem stinger stomach stone stripes tail tails teeth tentacle tentacles thorns tongue trunk tusk tusks vine
    vines whiskers wing wings wool""".split()
)


# Words of a genus without information, and the avatar features that captions contain.
NO_SUBJECT = frozenset("style default base team colour color of a an the".split())
FEATURES = frozenset("hair accessories features glasses beard hat".split())
ARTICLE_A = re.compile(r"(uni(?!n)|eu|use|usu|uto|uku|ufo\b|one\b|once\b)", re.IGNORECASE)
ARTICLE_AN = re.compile(r"([aeiou]|hour|honest|heir|herb\b|x-ray)", re.IGNORECASE)
SINGULAR_S = frozenset("lens gas canvas christmas mars cyclops chaos pegasus atlas".split())
PLURALS = frozenset("men women people children teeth feet mice geese dice clothing hair rice".split())
HEAD_ENDS = re.compile(r",| (?:with|without|of|in|on|at|behind|from|to|for|\w+ing)\b")


def captions_of(record: Record, colors: Sequence[str] = ()) -> tuple[str, ...]:
    """The captions of one picture, at most CAPTIONS_PER_PICTURE, always the same for the same record.

    Captions that people wrote (`record.captions`) are returned as they are. `colors` overrides the colours of the
    record; where it has none, the species' colour is used, unless the picture is shiny. The first caption of a
    species is the fullest. `shared_captions` selects those for training.
    """
    if record.captions:
        return record.captions
    colors = tuple(colors) or record.colors
    if not colors and record.color and not record.shiny:
        colors = (record.color,)
    made = _species_captions(record, colors) if record.is_species else _thing_captions(record, colors)
    return tuple(dict.fromkeys(made))[:CAPTIONS_PER_PICTURE]


def _species_captions(record: Record, colors: Sequence[str]) -> list[str]:
    """From style, colours, shape, types, genus and descriptions, without the name."""
    style = style_phrase(record.style)
    shapes = SHAPES.get(record.shape, (record.shape.replace("-", " "),)) if record.shape else ()
    types = [kind.lower() for kind in record.types]
    genus = re.sub(r"\s*pok[ée]mon$", "", record.genus or "", flags=re.IGNORECASE).lower()
    sentences = visible_sentences(record)

    made = [_phrase(" and ".join(colors), shapes[0] if shapes else "", " ".join(types), genus, NOUNS[0], style)]
    for index in range(1, 3 * CAPTIONS_PER_PICTURE):  # more than are needed, for some are equal
        rng = random.Random(f"{record.file_name} {index}")
        # One or two facts beside colour and style: thousands of creatures share these.
        facts = rng.sample(("shape", "types", "genus"), rng.choice((0, 1, 1, 1, 1, 1, 2, 2)))
        caption = _phrase(
            color=" and ".join(colors[: 2 if rng.random() < 0.3 else 1]) if rng.random() < 0.9 else "",
            shape=rng.choice((shapes[0], shapes[0], *shapes)) if shapes and "shape" in facts else "",
            types=rng.choice((types[0], types[-1], " ".join(types))) if types and "types" in facts else "",
            genus=genus if "genus" in facts else "",
            noun=rng.choice((NOUNS[0],) * 4 + NOUNS) if rng.random() < 0.7 or genus.endswith("ing") else "",
            style=style if rng.random() < 0.9 else "",
            style_first=rng.random() < 0.75,
        )
        if sentences and rng.random() < 0.15:
            caption = f"{caption}. {rng.choice(sentences)}"
        made.append(caption)
    return made


def _thing_captions(record: Record, colors: Sequence[str]) -> list[str]:
    """From style, colours, name, genus, kind and keywords: "flat emoji of a brown cow", "a cow", "a brown animal"."""
    rng = random.Random(record.file_name)
    style = style_phrase(record.style)
    subject, genus, keywords = subject_of(record), genus_of(record), _keywords(record)
    noun = record.kind or NOUNS[0]
    thing = subject or genus or noun
    new = [color for color in colors if color not in re.findall(r"\w+", thing)]  # not "a black black cat"
    one, two = " ".join(new[:1]), " and ".join(new)

    def of(what: str, color: str = "", style_first: bool = True) -> str:
        return _with_style(with_article(f"{color} {what}".strip()), style, style_first)

    made = [of(thing), with_article(thing), of(thing, one), of(thing, one, style_first=False), of(noun, one)]
    if len(new) > 1:
        made.append(of(thing, two))
    if one:
        made.append(with_article(f"{one} {thing}"))
    if genus and genus != thing:
        made.append(of(genus, one))
    if record.kind == "monster" and not thing.endswith(("monster", "creature")):
        made.append(of(f"{thing} creature", one))
    if keywords:
        made.append(f"{of(thing)}, {', '.join(rng.sample(keywords, min(2, len(keywords))))}")
        made.append(f"{of(thing, one)}, {rng.choice(keywords)}")
    return made


def style_phrase(style: str | None) -> str:
    """The words of a style in a prompt; "" without one."""
    style = style or ""
    return STYLES.get(style, style.replace("-", " "))


def subject_of(record: Record) -> str:
    """What the thing is called, in lower case; "" when it has no name."""
    name = re.sub(r" \d+$|(?<=[a-z]{3})\d+$", "", _plain(record.name))  # "climb2" is the second picture of a thing
    name = name.replace(": ", " with ")  # "woman: red hair"
    return f"cartoon {record.kind}" if name == "cartoon person" and record.kind == "face" else name


def _plain(text: str | None) -> str:
    return (text or "").lower().replace("’", "'").strip()


def genus_of(record: Record) -> str:
    """The words of the genus, each once, in lower case; "" when it describes the style of the source."""
    text = _plain(record.genus)
    if re.search(r"\bstyle\b", text):
        return ""
    text = re.sub(r", \w+ team colour$|^portrait of (an? )?", "", text)
    return " ".join(dict.fromkeys(word for word in re.sub(r"[()]", " ", text).split() if word not in NO_SUBJECT))


def _keywords(record: Record) -> list[str]:
    """Keywords among the descriptions: "animal, antarctica", "...; tags: flier, sea", "hair: mohawk"; no sentences."""
    found: list[str] = []
    for text in record.descriptions:
        text = _plain(text).rpartition("tags:")[2]
        parts = [part.strip() for part in text.split(",")]
        if ":" in text:
            pairs = (part.partition(":")[::2] for part in parts)
            parts = [
                f"{value.strip()} {key}" if key == "hair" else value.strip()
                for key, value in pairs
                if key in FEATURES and not re.search(r"\d", value)  # "long09" is a name of its source
            ]
        elif re.search(r"[.!?]", text) or (len(parts) == 1 and len(text.split()) > 2):
            continue
        found += [part for part in parts if part and len(part.split()) <= 3]
    subject = set(re.findall(r"\w+", subject_of(record)))
    return [word for word in dict.fromkeys(found) if not subject.issuperset(re.findall(r"\w+", word))]


def shared_captions(records: Sequence[Record], captions: Sequence[Sequence[str]]) -> Captions:
    """The captions, of those made for these pictures, that do not identify one picture.

    A caption stays when another picture has it, too, and it names no species of the set ("Shellder bites its tail").
    Captions that people wrote stay. A picture that shares none keeps its shortest caption.
    """
    records, captions = Records.of(records), Captions.of(captions)
    texts, numbers = captions.texts, captions.numbers
    row = numbers.row()
    written = records.column("written", bool)[row]
    named, species = records.coded("species")
    names = {species[code] for code in np.unique(named)} - {""}
    common = np.bincount(numbers.values, minlength=len(texts)) > 1
    nameless = np.zeros(len(texts), bool)
    for number in np.unique(numbers.values[~written & common[numbers.values]]):
        nameless[number] = not names or names.isdisjoint(re.findall(r"\w+", texts[number]))
    keep = written | nameless[numbers.values]
    alone = (numbers.reduced(keep, np.add) == 0)[row]
    if alone.any():
        lengths = texts.lengths()[numbers.values]
        shortest = np.flatnonzero(alone & (lengths == numbers.reduced(lengths, np.minimum)[row]))
        keep[shortest[np.unique(row[shortest], return_index=True)[1]]] = True  # the first of them
    return Captions(texts, numbers.only(keep))


def with_article(noun: str) -> str:
    """ "a cow", "an owl", "a unicorn", "an hourglass", "grapes", "the witch"."""
    head = HEAD_ENDS.split(noun, maxsplit=1)[0].split()[-1]
    is_plural = head in PLURALS or (re.search(r"[^siu]s$", head) and head not in SINGULAR_S)
    if is_plural or re.match(r"(the|an?|two|three|my) ", noun):
        return noun
    return f"{'an' if ARTICLE_AN.match(noun) and not ARTICLE_A.match(noun) else 'a'} {noun}"


def _with_style(what: str, style: str, style_first: bool = True) -> str:
    if not style:
        return what
    return f"{style} of {what}" if style_first else f"{what}, {style}"


def _phrase(color: str, shape: str, types: str, genus: str, noun: str, style: str, style_first: bool = True) -> str:
    """One caption of a species: "official artwork of a green four-legged grass seed creature"; "" is left out."""
    noun = noun or ("" if genus else NOUNS[0])
    creature = " ".join(filter(None, (color, shape, types, genus, noun)))
    return _with_style(f"{'an' if creature[0] in 'aeiou' else 'a'} {creature}", style, style_first)


def visible_sentences(record: Record) -> list[str]:
    """The sentences of the descriptions about its looks, without the name, of 3 to 24 words."""
    found = []
    for text in record.descriptions:
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(text.split())):
            sentence = _without_name(sentence, record.name)
            words = re.findall(r"[a-zà-ÿ]+", sentence.lower())
            if 3 <= len(words) <= 24 and VISIBLE.intersection(words):
                found.append(sentence)
    return list(dict.fromkeys(found))


def _without_name(text: str, name: str | None) -> str:
    name = re.sub(r"[♀♂]", "", name or "").strip()  # texts say "a male Nidoran"
    if name:
        text = re.sub(rf"\b{re.escape(name)}(?:[’']s)\b", "its", text, flags=re.IGNORECASE)
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", "it", text, flags=re.IGNORECASE)
    text = re.sub(r"pok[ée]mon", "creature", text, flags=re.IGNORECASE)
    return text[:1].upper() + text[1:]
