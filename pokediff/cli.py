"""The command line: `pokediff COMMAND`. COMMANDS is the table; a command parses its options and calls one function.

Options are the fields of the configurations (config.py) under the names of the Python API; ALIASES lists short ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import io
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_origin

import tyro
from tyro.conf import Positional
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from pokediff import __version__
from pokediff.config import (
    DEFAULT_CLIP,
    BaselineConfig,
    DemoConfig,
    EvaluateConfig,
    SampleConfig,
    Sampling,
    TrainConfig,
    load_yaml,
)
from pokediff.errors import PokediffError, first_line, one_line_errors
from pokediff.paths import shipped
from pokediff.training.launch import processes

ALIASES = {  # of the fields of SampleConfig and Sampling
    "num_images_per_prompt": ("-n", "--num-images"),
    "num_inference_steps": ("--steps", "--num-steps"),
    "guidance_scale": ("--cfg",),
}
ELSEWHERE = {  # names in other programs, and ours
    **dict.fromkeys(("--lr", "--learning-rate"), "--stages.base-32.learning-rate, for each stage"),
    **dict.fromkeys(("--batch-size", "--train-batch-size"), "--stages.base-32.batch-size, for each stage"),
    **dict.fromkeys(("--epochs", "--num-epochs", "--num-train-epochs"), "--max-steps or --max-minutes"),
    **dict.fromkeys(("--steps", "--max-train-steps", "--iterations"), "--max-steps"),
    **dict.fromkeys(("--resolution", "--height", "--width", "--image-size"), "--size"),
    **dict.fromkeys(("--output", "--output-dir", "--outdir", "--output-path"), "--out"),
    **dict.fromkeys(("--train-data-dir", "--dataset", "--data-dir", "--instance-data-dir"), "--data, or the folder"),
    **dict.fromkeys(("--num-samples", "--samples", "--number", "--count", "--num-pictures"), "-n"),
    **dict.fromkeys(("--scale", "--guidance", "--cfg-scale"), "--guidance-scale"),
    **dict.fromkeys(("--model", "--ckpt", "--weights", "--pretrained-model-name-or-path"), "--checkpoint"),
    "--negative": "--negative-prompt",
}
NUMBERS = {"INT": "a whole number", "FLOAT": "a number"}
C = TypeVar("C", TrainConfig, BaselineConfig)
FLAT = ("settings", "sampling")  # fields whose own fields are options without a prefix


@dataclass(frozen=True)
class Command:
    """A row of COMMANDS."""

    help: str
    options: type | Callable[[], type]  # a dataclass, or a function that imports it
    run: Callable[[Any], None]
    defaults: Callable[[list[str]], Any] | None = None  # defaults of the options that depend on an argument
    shares: bool = False  # its work, among the processes that torchrun starts


# ---------------------------------------------------------------------------------------------------------- options


def positional(metavar: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class TrainOptions:
    """Train a cascade.

    `train FOLDER` fine-tunes the checkpoint creatures on a folder of pictures; `train --config FILE` follows a
    configuration. Every key of the configuration is an option too, which overrides the file: --dataset.flip 0,
    and for one stage --stages.base-32.batch-size 16.
    """

    folder: Annotated[Positional[Path | None], positional("[FOLDER]")] = None  # a folder of pictures
    config: Path | None = None  # a YAML file, or the name of a shipped one (pokemon)
    only: Annotated[tuple[str, ...], tyro.conf.arg(name="stages", metavar="NAME ...", help_behavior_hint="")] = ()
    """train only these stages"""
    size: Literal[32, 64, 128] | None = None  # px, for FOLDER (default: from the size of its pictures)
    max_steps: int | None = None  # optimizer steps of each trained stage; warmup and decay shrink in proportion
    trial: bool = False  # run a few steps of every stage, draw, and estimate the time of the whole run
    resume: str = "never"  # auto (from the newest state, if any), never, or a folder .../state/STAGE/step-N
    settings: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class DistillOptions:
    """Distil a few-step base for `sample --fast` from a checkpoint. Takes the options of train, too."""

    checkpoint: str | None = None  # the teacher (default: the shipped pokediff)
    steps: int = 7  # sampler steps at the smallest size, those of the refiner included
    max_steps: int | None = None  # optimizer steps
    resume: str = "never"  # as in train
    settings: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class BaselineOptions:
    """Train one of the older systems that pokediff is compared with (docs/baselines.md)."""

    config: Path | None = None  # a YAML file, or the name of a shipped one (pikapikagen-1)
    settings: BaselineConfig = field(default_factory=BaselineConfig)


@dataclass(frozen=True)
class SampleOptions:
    """Draw pictures from prompts, with an animation of the denoising."""

    prompts: Annotated[Positional[tuple[str, ...]], positional("[PROMPT ...]")] = ()  # each in quotes
    from_json: Path | None = None  # sample.json of an earlier drawing: repeat it; other options override its settings
    settings: SampleConfig = field(default_factory=SampleConfig)


@dataclass(frozen=True)
class EmbedOptions:
    """Write the text embeddings of a data set's captions to FOLDER/embeddings-<encoder>.safetensors."""

    folder: Annotated[Positional[Path], positional("FOLDER")]  # a data set
    text_encoder: str = DEFAULT_CLIP  # builtin, clip:REPOSITORY or open_clip:ARCHITECTURE:TAG


@dataclass(frozen=True)
class ExportOptions:
    """Write a checkpoint as ONNX and verify that it draws the same pictures."""

    checkpoint: str | None = None  # a folder, the name of a shipped model, or a hub repository (default: pokediff)
    out: Path | None = None  # folder of the exported checkpoint (default: exports/<checkpoint>)
    size: int | None = None  # export only the denoisers for this size in px (default: all)
    fast: bool | None = None  # only the few-step denoisers, or only the others (default: all)


@dataclass(frozen=True)
class WebOptions:
    """Write a static page that draws in the browser, for any web server; the pictures are those of sample."""

    checkpoint: str | None = None  # a folder, the name of a shipped model, or a hub repository (default: pokediff)
    out: Path = Path("site")  # folder of the page
    size: int | None = None  # only the denoisers for this size in px (default: all)
    fast: bool = False  # draw in few steps, with the checkpoint's few-step denoisers
    serve: bool = False  # then serve it on 127.0.0.1
    port: int = 8000  # with --serve


@dataclass(frozen=True)
class CompareOptions:
    """Write one table and one page that compare several reports."""

    reports: Annotated[Positional[tuple[Path, ...]], positional("FOLDER ...")]  # folders with a report.json
    out: Path = Path("reports/comparison")  # output folder


@dataclass(frozen=True)
class SurveyOptions:
    """Make an offline page for a blind rating of pictures, or with --collect evaluate the answers."""

    images: tuple[Path, ...] = ()  # folders of pictures with prompts, one for each system
    out: Path = Path("survey")  # folder of survey.html and key.json
    # rating: four criteria from 0 to 5; likeness: four others, one of them likeness to --examples; count: yes or no
    questions: Literal["rating", "likeness", "count"] = "rating"
    examples: tuple[Path, ...] = ()  # data sets whose training pictures are shown before the rating
    number: int = 50  # pictures of all systems together
    repeats: int = 5  # pictures that are shown twice, to detect inattentive raters
    seed: int = 0  # seed of the order
    collect: tuple[Path, ...] = ()  # answer files of the raters


# ---------------------------------------------------------------------------------------------------------- commands


def scrape_options() -> type:
    from pokediff.scraper.crawl import ScrapeOptions  # the folder scraper/, mapped by setup.cfg

    return ScrapeOptions


def scrape(options: Any) -> None:
    from pokediff.scraper.crawl import run

    raise SystemExit(run(options))


def embed(options: EmbedOptions) -> None:
    from pokediff.data.dataset import embed
    from pokediff.progress import ProgressBar

    print(embed(options.folder, options.text_encoder, progress=ProgressBar))


def train_defaults(args: list[str]) -> TrainOptions:
    """The configuration of --config, or of the folder; without both, one with the names of all stages."""
    if file := early(args, "--config"):
        return TrainOptions(settings=read_config(file, TrainConfig))
    generic = TrainOptions(settings=load_yaml(shipped("configs", "pokemon.yaml"), TrainConfig))
    given = parse(TrainOptions, args, "pokediff train", generic)
    if given.folder is None:
        data = early(args, "--data")
        cure = f": --data goes with --config; without it: pokediff train {data}" if data else ""
        cure = cure or ": give a folder of pictures, or --config FILE; the folder before --stages"
        raise PokediffError(f"no training data{cure}")
    from pokediff.data.layouts import require_folder

    require_folder(given.folder)  # before the seconds that it takes to import torch
    from pokediff.training.recipes import recipe_for

    return TrainOptions(settings=recipe_for(given.folder, size=given.size, start_from=given.settings.start_from))


def read_config(file: str, kind: type[C], place: str = "") -> C:
    """A YAML file, or the shipped one of that name in configs/`place`; its default output is named after it.

    Raises PokediffError when there is neither.
    """
    found = shipped("configs", f"{place}{file}.yaml")
    if not Path(file).suffix and not found.is_file() and not Path(file).exists():
        names = sorted(path.stem for path in found.parent.glob("*.yaml"))
        raise PokediffError(f"there is no shipped configuration {file!r}; there are {', '.join(names)}")
    path = Path(file) if Path(file).exists() or not found.is_file() else found
    config = load_yaml(path, kind)
    return replace(config, out=config.out or f"checkpoints/{path.stem}")


def train(options: TrainOptions) -> None:
    from pokediff.training.stages import select, train, with_steps

    config = options.settings
    if options.folder and options.config:
        config = replace(config, data=(options.folder.as_posix(),))
    if options.max_steps is not None:
        config = with_steps(config, dict.fromkeys(select(config, options.only), options.max_steps))
    train(config, options.resume, options.only, options.trial)


def distill_defaults(args: list[str]) -> DistillOptions:
    from pokediff.training.distillation import distillation_recipe

    steps = early(args, "--steps") or "7"
    if not steps.isdigit() or int(steps) < 1:
        raise PokediffError(f"--steps {steps}: must be a whole number from 1")
    checkpoint = early(args, "--checkpoint") or shipped("checkpoints", "pokediff")
    return DistillOptions(settings=distillation_recipe(checkpoint, int(steps), TrainConfig().data))


def distill(options: DistillOptions) -> None:
    train(TrainOptions(settings=options.settings, max_steps=options.max_steps, resume=options.resume))


def baseline_defaults(args: list[str]) -> BaselineOptions:
    file = early(args, "--config")
    if file is None:
        raise PokediffError("give --config FILE, such as configs/baselines/pikapikagen-1.yaml")
    return BaselineOptions(settings=read_config(file, BaselineConfig, "baselines/"))


def baseline(options: BaselineOptions) -> None:
    from pokediff.baselines.training import train_baseline

    train_baseline(options.settings)


def sample_defaults(args: list[str]) -> SampleOptions:
    file = early(args, "--from-json")
    if file is None:
        return SampleOptions()
    from pokediff.drawing.sample import read_settings

    return SampleOptions(settings=read_settings(file))


def sample(options: SampleOptions) -> None:
    from pokediff.drawing.sample import sample

    config = options.settings
    if len(options.prompts) > 1 and not any(" " in prompt for prompt in options.prompts):
        raise PokediffError(
            f'{len(options.prompts)} prompts of one word each: write "{" ".join(options.prompts)}" in quotes, or '
            f"--prompt {' '.join(options.prompts)} for a picture of each"
        )
    if options.prompts:
        given = () if options.from_json else config.prompt
        config = replace(config, prompt=(*options.prompts, *given))
    sample(config)


def evaluate(options: EvaluateConfig) -> None:
    from pokediff.evaluation.evaluate import evaluate

    print(evaluate(options) / "report.html")


def export(options: ExportOptions) -> None:
    from pokediff.drawing.export import export
    from pokediff.model.pipeline import quiet

    quiet()
    checkpoint = options.checkpoint or "pokediff"
    out = options.out or Path("exports") / Path(checkpoint).name
    result = export(checkpoint, out, options.size, fast=options.fast)
    print(f"{out}: {result['megabytes']} MB, pictures at most {result['largest_difference']} of 255 levels apart")


def web(options: WebOptions) -> None:
    from pokediff.drawing.web import make_server, serve, web
    from pokediff.model.pipeline import quiet

    quiet()
    server = make_server(options.out, options.port) if options.serve else None  # a taken port is told at once
    facts = web(options.checkpoint, options.out, options.size, options.fast)
    difference = f"drawings at most {facts['largest_difference']} of 255 levels apart"
    print(f"{options.out}: {facts['megabytes']} MB of networks, {difference}")
    if server is not None:
        serve(server)


def compare(options: CompareOptions) -> None:
    from pokediff.evaluation.report import compare

    print(compare(options.reports, options.out))


def demo(options: DemoConfig) -> None:
    from pokediff.demo.server import serve

    serve(options)


def survey(options: SurveyOptions) -> None:
    from pokediff.evaluation.survey import collect, make_survey, table_of

    if options.collect:
        print(table_of(collect(options.collect, options.out)))
    else:
        numbers = options.number, options.repeats, options.seed
        print(make_survey(options.images, options.out, *numbers, options.questions, options.examples))


COMMANDS = {
    "scrape": Command(
        "build a data set from Bulbapedia: pictures, metadata.jsonl, text embeddings", scrape_options, scrape
    ),
    "embed": Command("write the text embeddings of a data set's captions", EmbedOptions, embed),
    "train": Command("train a cascade; `train FOLDER` on your own pictures", TrainOptions, train, train_defaults, True),
    "distill": Command("add a few-step base to a checkpoint", DistillOptions, distill, distill_defaults, True),
    "baseline": Command("train an older system to compare with", BaselineOptions, baseline, baseline_defaults),
    "sample": Command("draw pictures from prompts", SampleOptions, sample, sample_defaults, True),
    "evaluate": Command(
        "measure a checkpoint or a folder of pictures against test pictures", EvaluateConfig, evaluate, shares=True
    ),
    "export": Command("write a checkpoint as ONNX, for machines without PyTorch", ExportOptions, export),
    "web": Command("write a page that draws in the browser, without a server", WebOptions, web),
    "compare": Command("compare several reports", CompareOptions, compare),
    "demo": Command("serve a web page that draws and shows every step", DemoConfig, demo),
    "survey": Command("make a blind survey of pictures, or evaluate its answers", SurveyOptions, survey),
}


def main(args: Sequence[str] | None = None, command: str | None = None, prog: str = "pokediff") -> None:
    """The console script `pokediff`; with `command`, the script `prog` of that command alone.

    Exits with 2 for an error that the user can fix, after one line that says how.
    """
    words = list(sys.argv[1:] if args is None else args)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other libraries
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with one_line_errors():
        if command is None:
            if not words or words[0] in ("-h", "--help", "help"):
                print(usage())
                return
            if words[0] == "--version":
                print(f"pokediff {__version__}")
                return
            command, *words = words
            if command not in COMMANDS:
                raise PokediffError(f"unknown command {command!r}; {right_command(command, words)}")
            prog = f"{prog} {command}"
        row = COMMANDS[command]
        refuse_duplicates(words)
        options = row.options if isinstance(row.options, type) else row.options()
        wants_help = {"-h", "--help"} & set(words)
        default = row.defaults(words) if row.defaults and not wants_help else None
        options = parse(options, words, prog, default)
        with processes(row.shares):
            row.run(options)


def right_command(command: str, words: Sequence[str]) -> str:
    """What to write in place of a command that there is not."""
    if near := difflib.get_close_matches(command, COMMANDS, 1, 0.7):
        return f"did you mean {near[0]}?"
    if command.startswith("-"):
        return 'the command comes before its options, as in: pokediff sample "a blue turtle" --size 64'
    if Path(command).is_dir():
        return f"to train on this folder: pokediff train {command}"
    if " " in command:
        return f'to draw: pokediff sample "{command}"'
    return f"commands: {', '.join(COMMANDS)}"


def usage() -> str:
    lines = [f"  {name:9} {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: pokediff COMMAND [options]", "", *lines, "", "pokediff COMMAND --help lists its options."]
    )


# ----------------------------------------------------------------------------------------------------------- parsing


def parse(options: type, args: Sequence[str], prog: str, default: Any = None) -> Any:
    """The options of a command. Prints help and exits. Raises PokediffError for options that do not fit."""
    registry = ConstructorRegistry()
    registry.struct_rule(plain_fields({"-h", "--help"} & set(args) != set()))
    given = {} if default is None else {"default": default}
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(options, args=args, prog=prog, registry=registry, config=(tyro.conf.DisallowNone,), **given)
    except SystemExit as exit:
        if not exit.code:
            raise
    raise PokediffError(f"{plain_error(printed.getvalue(), prog)} ({prog} --help lists all options)")


def plain_error(box: str, prog: str) -> str:
    """The one line of an error that tyro prints in a box of several sections."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]  # below the title
    rules = groupby(filter(None, lines), lambda line: re.fullmatch("[─-]+", line) is not None)
    sections = [" ".join(part) for is_rule, part in rules if not is_rule]
    text = sections[0] if sections else first_line(PokediffError(box))
    if match := re.match(r"Unrecognized options: (.*)", text):
        return unknown_option(match[1].split(", "), sections, prog)
    if match := re.match(r"invalid choice (.*) for argument '([^/']*).*Expected one of \((.*)\)", text):
        choices = sorted((set(re.findall(r"'([^']*)'", match[3])) - {"None"}), key=lambda name: (len(name), name))
        return f"{match[2]} {match[1]} is none of {', '.join(choices)}"
    if match := re.match(r"Error parsing ([^/:]*).*no type matching (.*?) could.*from \[(.*?)\]", text):
        wanted = plain_metavar(match[2])
        return f"{match[1]} {match[3]} is not {NUMBERS.get(wanted, wanted)}"
    if match := re.match(r"Missing value for argument '([^/']*)", text):
        return f"{match[1]} needs a value after it"
    if match := re.match(r"Missing from .*?: (.*?) \(required\)", text):
        return f"missing: {match[1]}"
    return text


def unknown_option(words: Sequence[str], sections: Sequence[str], prog: str) -> str:
    """What to say of words that are no options: their names in other programs, and ours that are spelt alike."""
    option = next((word for word in words if word.startswith("-")), None)
    if option is None:
        quoted = " ".join(words)
        several = ": join data sets with --data A B and --config FILE" if prog.endswith("train") else ""
        return f"unexpected {quoted!r}{several}"
    name = option.partition("=")[0]
    near = [found for part in sections if part.startswith("Perhaps") for found in re.findall(r"(--[\w.-]+)", part)]
    if cure := ELSEWHERE.get(name.replace("_", "-")):
        return f"unknown option {name}: use {cure}"
    return f"unknown option {name}" + (f": did you mean {' or '.join(dict.fromkeys(near[:2]))}?" if near else "")


def plain_fields(for_help: bool) -> Callable[[StructTypeInfo], StructConstructorSpec | None]:
    """A tyro rule for our dataclasses: aliases, no prefix for FLAT, short metavars, informative defaults only.

    With `for_help` it omits the options of stages, of which there are a hundred.
    """
    inside: list[type] = []

    def adapted(options: type, one: StructFieldSpec) -> StructFieldSpec:
        kind: Any = one.type
        if get_origin(kind) is Annotated:
            return one
        if one.name == "stages" and for_help:
            return replace(one, type=tyro.conf.Suppress[kind])  # type: ignore[misc]
        spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, {tyro.conf.DisallowNone}))
        has_value = isinstance(spec, PrimitiveConstructorSpec) and kind not in (bool, bool | None)
        settings = tyro.conf.arg(
            name="" if one.name in FLAT else None,
            metavar=plain_metavar(spec.metavar) if has_value else None,  # type: ignore[union-attr]
            aliases=ALIASES.get(one.name) if options in (SampleConfig, Sampling) else None,
            help_behavior_hint=plain_default,
        )
        return replace(one, type=Annotated[kind, settings])  # type: ignore[arg-type]

    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if not dataclasses.is_dataclass(info.type) or info.type in inside:
            return None
        inside.append(info.type)  # now tyro's own rule
        spec = ConstructorRegistry.get_struct_spec(info)
        inside.remove(info.type)
        assert isinstance(spec, StructConstructorSpec)
        return replace(spec, fields=tuple(adapted(info.type, one) for one in spec.fields))

    return rule


def plain_metavar(metavar: str) -> str:
    """'[INT [INT ...]]' as 'INT ...', '{FLOAT FLOAT}' as 'FLOAT FLOAT'."""
    without_braces = re.sub(r"^\{([^,]*)\}$", r"\1", metavar)
    return re.sub(r"^\[(.+?) \[\1 \.\.\.\]\]$", r"\1 ...", without_braces)


def plain_default(value: str) -> str:
    return "" if value in ("None", "False", "", "''") or len(value) > 80 else f"(default: {value})"


def refuse_duplicates(args: Sequence[str]) -> None:
    """Raise PokediffError for an option that is given twice, also by an alias: tyro would keep the last one."""
    names = {alias: f"--{name.replace('_', '-')}" for name, aliases in ALIASES.items() for alias in aliases}
    words = [word.partition("=")[0].replace("_", "-") for word in args]
    options = [names.get(word, word) for word in words if word.startswith("--") or word in names]
    for option in options:
        if option != "--" and options.count(option) > 1:
            raise PokediffError(f'{option} is given twice; several values follow one option: {option} "one" "two"')


def early(args: Sequence[str], option: str) -> str | None:
    """The value of an option on which the defaults of the others depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, option.replace("-", "_").replace("__", "--"), dest="value")
    return parser.parse_known_args(args)[0].value
