"""The command line: `pokediff VERB`. Each verb parses its settings and calls one function."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import tyro

from pokediff.config import DEFAULT_CLIP, DemoConfig, EvaluateConfig, SampleConfig, TrainConfig, load_yaml
from pokediff.errors import PokediffError, one_line_errors

T = TypeVar("T")

HELP = """usage: pokediff VERB [options]        pokediff VERB --help tells a verb's options

  scrape   build a data set from Bulbapedia: pictures, metadata.jsonl, text embeddings
  embed    write the text embeddings of a data set's captions
  train    train a model on a data set; `train FOLDER` chooses the settings for your own pictures
  distill  teach a network to draw in few steps, four say, instead of twenty
  sample   draw pictures from prompts
  evaluate measure a checkpoint, or a folder of pictures, on held-out families
  export   write the network as ONNX, for machines without PyTorch
  compare  several reports side by side
  demo     open a web page to draw, play and look inside
  survey   ask people: make a page for raters, or collect what they answered"""


@dataclass(frozen=True)
class TrainCommand:
    """Train a text-to-sprite model: `train FOLDER` on a folder of pictures with settings that fit it and this machine,
    or `train --config FILE`. Every key of the configuration is an option too, and the option wins.
    """

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    config: Path | None = None  # a YAML file, see configs/
    resume: str = "never"  # auto: go on from the newest state, or start; never; or a folder .../state/step-N


@dataclass(frozen=True)
class DistillCommand:
    """Teach a network of the same shape to draw in few steps: a training, with all its options in `settings`."""

    settings: Annotated[TrainConfig, tyro.conf.arg(name="")] = field(default_factory=TrainConfig)
    checkpoint: Path | None = None  # the teacher (default: the shipped one)
    steps: int = 4  # in which the student draws
    resume: str = "never"  # as in train


@dataclass(frozen=True)
class SampleCommand:
    """Draw pictures from prompts, and show how they emerge from noise."""

    settings: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    from_json: Path | None = None  # an earlier run's sample.json: the same settings, other options win


@dataclass(frozen=True)
class EmbedCommand:
    """Write the text embeddings of a data set's captions to DATA/embeddings-<encoder>.safetensors."""

    data: tyro.conf.Positional[Path]  # a folder of pictures with a metadata.jsonl
    text_encoder: str = DEFAULT_CLIP  # builtin, clip:REPOSITORY or open_clip:ARCHITECTURE:TAG


@dataclass(frozen=True)
class ExportCommand:
    """Write a checkpoint's network and text encoder as ONNX, and try that they draw the same pictures."""

    checkpoint: Path | None = None  # a folder made by training (default: the shipped one)
    out: Path | None = None  # folder of the exported checkpoint (default: exports/<checkpoint>)


@dataclass(frozen=True)
class CompareCommand:
    """Put several reports side by side: one table, one page."""

    reports: tyro.conf.Positional[tuple[Path, ...]]  # folders with a report.json
    out: Path = Path("reports/comparison")


@dataclass(frozen=True)
class SurveyCommand:
    """Make an offline page on which people rate pictures blind; with --collect, count what they answered."""

    images: tuple[Path, ...] = ()  # folders of pictures with prompts, one for each system
    out: Path = Path("survey")  # folder of survey.html and key.json
    number: int = 50  # pictures, of all systems together
    repeats: int = 5  # of them are shown twice, to see who looks
    seed: int = 0
    collect: tuple[Path, ...] = ()  # the files that raters saved


def train(args: Sequence[str] | None = None, prog: str = "train.py") -> None:
    if (processes := forgotten_processes()) > 1:
        start_processes(processes)
    args = list(sys.argv[1:] if args is None else args)
    file = _early(args, "--config")
    base = load_yaml(file, TrainConfig) if file else TrainConfig()
    if args and not args[0].startswith("-"):
        from pokediff.training.recipes import recipe_for

        folder, *args = args
        base = replace(base, data=folder) if file else recipe_for(folder)
    if base.out is None and file:
        base = replace(base, out=f"checkpoints/{Path(file).stem}")
    command = _parse(TrainCommand, args, prog, TrainCommand(base))

    from pokediff.training.loop import train

    train(command.settings, command.resume)


def distill(args: Sequence[str] | None = None, prog: str = "pokediff distill") -> None:
    from pokediff.drawing.sample import DEFAULT_CHECKPOINT
    from pokediff.training.distillation import recipe
    from pokediff.training.loop import train

    checkpoint, steps = _early(args, "--checkpoint") or DEFAULT_CHECKPOINT, _early(args, "--steps") or "4"
    if not steps.isdigit() or int(steps) < 1:
        raise PokediffError(f"--steps {steps}: a whole number from 1")
    base = recipe(checkpoint, int(steps), TrainConfig().data)
    command = _parse(DistillCommand, args, prog, DistillCommand(base))
    train(command.settings, command.resume)


def forgotten_processes() -> int:
    """How many processes `accelerate launch --cpu --num_processes N` was asked for and did not start; 0 for none.

    On a CPU without MPI accelerate 1.x names a meeting point (MASTER_ADDR), starts one process and forgets the others.
    N stands on the command line of the launcher, our parent, alone.
    """
    by_mpi_or_torchrun = {"WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"} & os.environ.keys()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if not on_cpu or "MASTER_ADDR" not in os.environ or by_mpi_or_torchrun:
        return 0
    import psutil

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", type=int)
    number = parser.parse_known_args(psutil.Process(os.getppid()).cmdline())[0].num_processes
    if number is None:
        raise PokediffError(
            "accelerate launch starts one process only on a CPU: give it --num_processes N on the command line, or use "
            "torchrun --nproc_per_node N train.py ..."
        )
    return number


def start_processes(number: int) -> NoReturn:
    """Become the launcher that starts `number` processes of this very command."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number)]
    command = [sys.executable, *torchrun, *sys.argv]
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if os.name == "nt":  # where exec returns to the shell at once
        raise SystemExit(subprocess.call(command))
    os.execv(sys.executable, command)


def sample(args: Sequence[str] | None = None, prog: str = "sample.py") -> None:
    file = _early(args, "--from-json")
    base = SampleConfig()
    if file:
        from pokediff.drawing.sample import read_settings

        base = read_settings(file)
    command = _parse(SampleCommand, args, prog, SampleCommand(base))

    from pokediff.drawing.sample import sample

    sample(command.settings)


def embed(args: Sequence[str] | None = None, prog: str = "pokediff embed") -> None:
    command = _parse(EmbedCommand, args, prog)

    from tqdm import tqdm

    from pokediff.data.dataset import embed

    print(embed(command.data, command.text_encoder, progress=tqdm))


def evaluate(args: Sequence[str] | None = None, prog: str = "pokediff evaluate") -> None:
    command = _parse(EvaluateConfig, args, prog)

    from pokediff.evaluation.evaluate import evaluate

    print(evaluate(command) / "report.html")


def export(args: Sequence[str] | None = None, prog: str = "pokediff export") -> None:
    command = _parse(ExportCommand, args, prog)

    from pokediff.drawing.export import export
    from pokediff.drawing.sample import DEFAULT_CHECKPOINT

    checkpoint = command.checkpoint or DEFAULT_CHECKPOINT
    out = command.out or Path("exports") / checkpoint.name
    tried = export(checkpoint, out)
    print(f"{out}: {tried['megabytes']} MB, pictures at most {tried['largest_difference']} of 255 levels apart")


def compare(args: Sequence[str] | None = None, prog: str = "pokediff compare") -> None:
    command = _parse(CompareCommand, args, prog)

    from pokediff.evaluation.report import compare

    print(compare(command.reports, command.out))


def survey(args: Sequence[str] | None = None, prog: str = "pokediff survey") -> None:
    command = _parse(SurveyCommand, args, prog)

    from pokediff.evaluation.survey import collect, make_survey, table_of

    if command.collect:
        print(table_of(collect(command.collect, command.out)))
    else:
        print(make_survey(command.images, command.out, command.number, command.repeats, command.seed))


def demo(args: Sequence[str] | None = None, prog: str = "pokediff demo") -> None:
    command = _parse(DemoConfig, args, prog)

    from pokediff.demo.server import serve

    serve(command)


def scrape(args: Sequence[str] | None = None, prog: str = "pokediff scrape") -> None:
    from pokediff.scraper.crawl import main  # the folder scraper/, mapped by setup.cfg

    raise SystemExit(main(args, prog))


VERBS: dict[str, Callable[[Sequence[str] | None, str], None]] = {
    "scrape": scrape,
    "embed": embed,
    "train": train,
    "distill": distill,
    "sample": sample,
    "evaluate": evaluate,
    "export": export,
    "compare": compare,
    "demo": demo,
    "survey": survey,
}


def main() -> None:
    """The console script `pokediff`."""
    verb, args = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    if verb in ("-h", "--help"):
        print(HELP)
    elif verb in VERBS:
        run(VERBS[verb], args, f"pokediff {verb}")
    else:
        print(f"error: unknown verb {verb!r}\n\n{HELP}", file=sys.stderr)
        raise SystemExit(2)


def run(command: Callable[[Sequence[str] | None, str], None], args: Sequence[str] | None, prog: str) -> None:
    """Run one command at the edge: errors in one line, other libraries' advice kept to themselves."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with one_line_errors():
        command(args, prog)


def _early(args: Sequence[str] | None, option: str) -> str | None:
    """The value of an option that decides what the defaults of all others are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, option.replace("-", "_").replace("__", "--"), dest="value")
    return parser.parse_known_args(args)[0].value


def _parse(kind: type[T], args: Sequence[str] | None, prog: str, default: T | None = None) -> T:
    given = [word.partition("=")[0] for word in (sys.argv[1:] if args is None else args) if word.startswith("--")]
    for option in given:
        if given.count(option) > 1:  # the parser would keep the last one and say nothing
            raise PokediffError(f'{option} is given twice; several values stand behind one: {option} "one" "two"')
    if default is None:
        return tyro.cli(kind, args=args, prog=prog)
    return tyro.cli(kind, args=args, prog=prog, default=default)
