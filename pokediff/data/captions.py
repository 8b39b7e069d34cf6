"""From a record to the several captions its picture has.

A caption that belongs to one picture alone is a key under which a model learns that picture by heart (Gu et al., "On
Memorization in Diffusion Models", 2023; Somepalli et al., 2023). So every picture has several captions, each with some
of what is known left out, most of them shared with other pictures, and the species name is in none of them.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence

from pokediff.data.records import Record

CAPTIONS_PER_PICTURE = 12

# What a data set calls a style, and how a person would ask for it. Any other style is asked for by its own name.
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

# A sentence of a Pokédex text goes into a caption when it speaks of something to be seen.
VISIBLE = frozenset(
    """antenna antennae armor arm arms back beak belly body bone bones bulb bulbs cheek cheeks claw claws coat coil
    crest crystal crystals ear ears eye eyes eyebrows face fang fangs feather feathers fin fins fingers flame flames
    flower flowers foot forehead fur gem hair hand hands head heads hide hood horn horns iron jaw jaws jaw leaf leaves
    leg legs limbs mane mask mouth mustache neck needle needles nose patterns paw paws petal petals pincers plates
    pouch ring rings rock rocks round sac scale scales seed shell shells skin skull spike spikes spine spines spots
    steel stem stinger stomach stone stripes tail tails teeth tentacle tentacles thorns tongue trunk tusk tusks vine
    vines whiskers wing wings wool""".split()
)


def captions_of(record: Record, colors: Sequence[str] = ()) -> tuple[str, ...]:
    """The captions of one picture, always the same ones for the same record; the first is the fullest.

    Captions that people wrote (`record.captions`) are returned as they are. Otherwise up to CAPTIONS_PER_PICTURE
    different ones are made from style, colours, shape, types, genus and description. `colors` are the colours measured
    on the picture (`images.main_colors`); without them the species' colour is used, unless the picture is shiny.
    The species name never occurs. Which of them a model may be trained on, `shared_captions` says.
    """
    if record.captions:
        return record.captions
    if not colors and record.color and not record.shiny:
        colors = (record.color,)
    style = STYLES.get(record.style, record.style.replace("-", " ")) if record.style else ""
    shapes = SHAPES.get(record.shape, (record.shape.replace("-", " "),)) if record.shape else ()
    types = [kind.lower() for kind in record.types]
    genus = re.sub(r"\s*pok[ée]mon$", "", record.genus or "", flags=re.IGNORECASE).lower()
    sentences = visible_sentences(record)

    made = [_phrase(" and ".join(colors), shapes[0] if shapes else "", " ".join(types), genus, NOUNS[0], style)]
    for index in range(1, 3 * CAPTIONS_PER_PICTURE):  # some come out equal: draw more than are needed
        rng = random.Random(f"{record.file_name} {index}")
        # One or two facts beside colour and style: that much, thousands of creatures have in common.
        told = rng.sample(("shape", "types", "genus"), rng.choice((0, 1, 1, 1, 1, 1, 2, 2)))
        caption = _phrase(
            color=" and ".join(colors[: 2 if rng.random() < 0.3 else 1]) if rng.random() < 0.9 else "",
            shape=rng.choice((shapes[0], shapes[0], *shapes)) if shapes and "shape" in told else "",
            types=rng.choice((types[0], types[-1], " ".join(types))) if types and "types" in told else "",
            genus=genus if "genus" in told else "",
            noun=rng.choice((NOUNS[0],) * 4 + NOUNS) if rng.random() < 0.7 or genus.endswith("ing") else "",
            style=style if rng.random() < 0.9 else "",
            style_first=rng.random() < 0.75,
        )
        if sentences and rng.random() < 0.15:
            caption = f"{caption}. {rng.choice(sentences)}"
        made.append(caption)
    return tuple(dict.fromkeys(made))[:CAPTIONS_PER_PICTURE]


def shared_captions(records: Sequence[Record], captions: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Of the captions that were made for these pictures, those that are no key to one picture.

    A caption stays when another picture has it too and it names no creature of the set, not even another one ("Shellder
    bites its tail"). What people wrote stays as it is. A picture that has nothing in common keeps its shortest caption.
    """
    count = Counter(caption for several in captions for caption in several)
    names = {record.name for record in records if record.name}

    def kept(record: Record, several: tuple[str, ...]) -> tuple[str, ...]:
        if record.captions:
            return several
        common = [caption for caption in several if count[caption] > 1]
        nameless = tuple(caption for caption in common if names.isdisjoint(re.findall(r"\w+", caption)))
        return nameless or (min(several, key=len),)

    return [kept(record, several) for record, several in zip(records, captions, strict=True)]


def _phrase(color: str, shape: str, types: str, genus: str, noun: str, style: str, style_first: bool = True) -> str:
    """One caption, e.g. "official artwork of a green four-legged grass seed creature"; what is "" is left out."""
    noun = noun or ("" if genus else NOUNS[0])
    creature = " ".join(filter(None, (color, shape, types, genus, noun)))
    creature = f"{'an' if creature[0] in 'aeiou' else 'a'} {creature}"
    if not style:
        return creature
    return f"{style} of {creature}" if style_first else f"{creature}, {style}"


def visible_sentences(record: Record) -> list[str]:
    """The sentences of the descriptions that tell how it looks, the name taken out, at most 24 words each."""
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
