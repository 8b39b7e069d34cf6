"""evaluate(config): draw for held-out captions, measure, write report.json, report.md, report.html.

OUT caches drawings by their settings, and features by the pictures, for the next run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from pokediff.baselines.interface import DrawsAtOnce
from pokediff.config import EvaluateConfig, plain
from pokediff.data.dataset import load_pictures
from pokediff.data.images import pairs
from pokediff.errors import PokediffError
from pokediff.evaluation import measures, model_measures, prompts, recognition, shape_measures, survey
from pokediff.evaluation.distances import NEIGHBOURS
from pokediff.evaluation.features import CachedFeatures, FeatureNet, Lpips, clip_similarity, load_features
from pokediff.evaluation.generators import Drawer, Generated, ImageGenerator, denoisers_used, read_generated
from pokediff.evaluation.reference import Reference, load_reference
from pokediff.evaluation.report import GENERATED, PAIRS, REAL, Report, write_report
from pokediff.files import own_folder, read_json, refuse_inside
from pokediff.model.denoiser import Denoiser
from pokediff.model.pipeline import PokeDiffPipeline, quiet
from pokediff.progress import ProgressBar
from pokediff.training.launch import join

MARKS = ("report.json", "pictures/settings.json", "cache", "survey/result.json")  # by which an earlier run is known
FEWEST_DRAWN = NEIGHBOURS + 2  # precision and recall of all but one need more than NEIGHBOURS
JUDGED = 20  # pictures of each style for the second judge
SHOWN = 64  # generated pictures on the page, or pairs


def evaluate(config: EvaluateConfig, generator: ImageGenerator | None = None) -> Path:
    """Measure a checkpoint, a folder of pictures (`config.images`), or another generator. Returns the report's folder.

    `generator` needs `config.sampling.size` and takes the place of the checkpoint, whose name it keeps. Several
    processes share the drawing and the features. Raises PokediffError before anything is drawn when data, checkpoint,
    pictures or a network that a figure needs cannot be used; a figure that the data does not allow is a row of the
    report with the reason.
    """
    quiet()
    state = join()
    nets = load_networks(config, str(state.device))
    generated: Generated | None = None
    drawer: Drawer | None = None
    if config.images:
        generated = read_generated(Path(config.images))
        if len(generated.pixels) < FEWEST_DRAWN:
            found = f"{config.images} lists {len(generated.pixels)} pictures"
            raise PokediffError(f"{found}; an evaluation needs at least {FEWEST_DRAWN}, better hundreds")
        size = generated.pixels.shape[1]
        out = Path(config.out or Path("reports") / Path(config.images).name)
    else:
        drawer = make_drawer(config, generator, str(state.device))
        size, out = drawer.size, drawer.folder
    refuse_inside(out, (*config.data, *config.concepts))
    reference = load_reference(config, size)
    with own_folder(out, *MARKS) if state.is_main_process else nullcontext():
        state.wait_for_everyone()
        cached = [CachedFeatures(net, config.background, out / "cache") for net in nets]
        measure(config, generated, drawer, reference, cached, out)
    return out


def measure(
    config: EvaluateConfig,
    generated: Generated | None,
    drawer: Drawer | None,
    reference: Reference,
    nets: Sequence[CachedFeatures],
    out: Path,
) -> None:
    """Draw, or take what is drawn, measure, and write the report into OUT."""
    from accelerate import PartialState

    state, size = PartialState(), drawer.size if drawer else reference.pixels.shape[1]
    sets, drawn = None, {}
    if drawer:
        generated = drawer.draw("pictures", prompts.held_out_captions(reference.real.captions, config.number))
        sets = PromptSets(reference, config, size)
        drawn = {name: drawer.draw(name, texts, seeds) for name, (texts, seeds) in sets.of.items()}
    assert generated is not None
    for net in nets:
        net.share(generated.pixels, reference.pixels, reference.same_style.straight())
    if nets and sets and sets.concepts:
        nets[0].share(drawn["concepts"].pixels, sets.concepts.pictures.straight())
    report = Report(facts_of(config, drawer, reference, size, len(generated.pixels), state.num_processes))
    if state.is_main_process:
        if not nets:
            report.skip("Distance of distributions", "all of it", "--features none")
        for net in nets:
            measures.measure_distances(report, net, generated, reference, config)
        measures.measure_looks(report, generated.pixels, reference.pixels)
        if sets:
            measure_prompts(report, sets, drawn, nets, reference, config, out / "cache")
        measures.measure_copies(report, generated, reference)
        measures.measure_clip(report, generated, config)
        measures.measure_reconstruction(report, generated, reference, config)
        if drawer:
            measure_model(report, drawer, generated, reference)
        show(report, generated, reference, out)
        write_report(out, report)


def facts_of(
    config: EvaluateConfig, drawer: Drawer | None, reference: Reference, size: int, number: int, processes: int
) -> dict[str, object]:
    """The settings of the report: generator, sampling, reference, numbers of pictures."""
    facts = plain(config) | {"system": drawer.facts if drawer else {"images": config.images}}
    if drawer:
        facts["sampling"] = plain(drawer.sampling)
    return facts | {
        "styles": list(reference.styles or []),
        "size": size,
        "n_real": len(reference.real),
        "n_generated": number,
        "n_training": len(reference.training),
        "processes": processes,
        "data_sha256": reference.everything.digest,
    }


def make_drawer(config: EvaluateConfig, generator: ImageGenerator | None, device: str) -> Drawer:
    """The generator with its settings; missing ones are the defaults of the checkpoint."""
    from pokediff.drawing.sample import load_checkpoint
    from pokediff.drawing.sheets import checkpoint_folder, weights_sha256

    sampling, facts = config.sampling, {"checkpoint": Path(config.checkpoint or "pokediff").name}
    if generator is None:
        pipeline = load_checkpoint(config.checkpoint, config.device or device)
        if isinstance(pipeline, DrawsAtOnce) and pipeline.name == "digits":
            raise PokediffError("digits draws digits alone, and a report draws creatures: see docs/baselines.md")
        sampling, generator = pipeline.resolved(sampling), pipeline
        facts["weights_sha256"] = str(weights_sha256(checkpoint_folder(config.checkpoint), sampling.chooses))
        if isinstance(pipeline, PokeDiffPipeline):
            facts["denoisers"] = denoisers_used(pipeline, sampling)  # type: ignore[assignment]
    if sampling.size is None:
        raise PokediffError("evaluate: this generator needs --size")
    out = Path(config.out or Path("reports") / f"{facts['checkpoint']}-{sampling.size}")
    return Drawer(generator, sampling, out, config.batch_size, facts)


def load_networks(config: EvaluateConfig, device: str) -> list[FeatureNet]:
    """The feature networks; LPIPS and CLIP, if any, are tried. Raises PokediffError for what cannot be loaded."""
    if missing := [name for name in ("jinja2", "matplotlib", "torchmetrics") if find_spec(name) is None]:
        raise PokediffError(f'evaluate needs {" and ".join(missing)}: pip install "pokediff[eval]"')
    if config.lpips:
        Lpips(config.lpips)
    if config.clip:
        clip_similarity(config.clip, np.zeros((1, 32, 32, 4), np.uint8), ["a"])
    return [load_features(name, config.device or device) for name in config.features if name != "none"]


class PromptSets:
    """Prompts with a known correct result: colours, paraphrases, animals, named things, styles.

    `of` holds for each set, by the name of its folder, the prompts and their seeds (None: 0, 1, 2 ...).
    """

    def __init__(self, reference: Reference, config: EvaluateConfig, size: int) -> None:
        everything = reference.everything
        self.styles = config.styles or prompts.grid_styles(everything.records)
        self.grid = prompts.color_grid(self.styles, prompts.subjects(everything.records))
        self.judged = shape_measures.judged(reference, self.styles, config.split, JUDGED)
        source = reference.training  # concepts that were trained on
        if config.concepts:
            source = load_pictures(config.concepts, size, progress=ProgressBar).split("train")
        self.concepts = recognition.find_concepts(source, config.concept_style)
        pairs = prompts.paraphrase_pairs(self.styles[0])
        self.of: dict[str, tuple[list[str], list[int] | None]] = {
            "colors": ([cell.prompt for cell in self.grid], None),
            "rare-words": ([rare for rare, _ in pairs], None),
            "common-words": ([common for _, common in pairs], None),
            "one-prompt": (prompts.repeated(reference.real.captions), None),
            "judged": ([everything.captions[i][0] for i in self.judged], None),
            "animals": (recognition.animal_prompts(self.styles[0]), recognition.animal_seeds()),
        }
        if self.concepts:
            self.of["concepts"] = (self.concepts.prompts()[0], None)


def measure_prompts(
    report: Report,
    sets: PromptSets,
    drawn: dict[str, Generated],
    nets: Sequence[CachedFeatures],
    reference: Reference,
    config: EvaluateConfig,
    cache: Path,
) -> None:
    """Measure the drawings of all prompt sets."""
    colors = drawn["colors"].pixels
    measures.measure_colors(report, sets.grid, colors, reference)
    measures.measure_paraphrases(report, drawn["rare-words"].pixels, drawn["common-words"].pixels)
    measures.measure_styles(report, sets.grid, colors, reference.everything.split(config.split))
    shape_measures.measure_silhouettes(report, drawn["animals"], reference)
    if sets.concepts is None:
        reason = f"no names that {recognition.FEWEST_SOURCES} sources draw in the training data (--concepts FOLDER)"
        report.skip(shape_measures.RECOGNITION, "of named things", reason)
    elif not nets:
        report.skip(shape_measures.RECOGNITION, "of named things", "no feature network")
    else:
        concepts = sets.concepts
        shape_measures.measure_recognition(report, concepts, drawn["concepts"].pixels, concepts.prompts()[1], nets[0])
    shape_measures.measure_judge(report, drawn["judged"].pixels, sets.judged, sets.styles, reference, cache)
    measures.measure_variety(report, drawn["one-prompt"].pixels, reference.pixels, config)


def measure_model(report: Report, drawer: Drawer, generated: Generated, reference: Reference) -> None:
    """Loss and cost, as far as the generator has them."""
    model = drawer.generator
    if isinstance(model, PokeDiffPipeline):
        if isinstance(model.base, Denoiser):  # not an exported one
            model_measures.measure_loss(report, model, reference.real, reference.same_style, drawer.sampling)
        model_measures.measure_cost(report, model, generated, drawer.sampling, drawer.batch_size)
    elif isinstance(model, DrawsAtOnce):
        model_measures.measure_speed(report, generated, drawer.batch_size, model.device)
        report.add(model_measures.COST, "parameters, M", model.parameters / 1e6, 1)


def show(report: Report, generated: Generated, reference: Reference, out: Path) -> None:
    """Real pictures above those that were drawn for their captions, and what people counted (OUT/survey)."""
    # of each real picture, the first one drawn for a caption of it
    below = {real: drawn for drawn, real in reversed(reference.captioned(generated.prompts))}
    if below:
        above, rows = _spread(np.array(sorted(below.items()))).T
        both = pairs(reference.pixels[above], generated.pixels[rows], 16)
        report.pictures[PAIRS] = ("Below each held-out picture the one drawn for its caption, not selected.", both, 16)
    else:  # other prompts
        rows = _spread(np.arange(len(generated.pixels)))
        report.pictures[GENERATED] = ("Not selected.", generated.pixels[rows], 16)
        report.pictures[REAL] = ("Held out, for other captions.", reference.real.spread(SHOWN).straight(), 16)
    report.tables["captions of the pictures shown"] = [{"caption": generated.prompts[i]} for i in rows[:16]]
    counted = out / "survey" / survey.RESULT
    if counted.is_file():
        report.tables["counted by eye"] = survey.rows_of(read_json(counted))


def _spread(rows: np.ndarray) -> np.ndarray:
    """At most SHOWN rows, evenly spaced."""
    return rows[np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(int)]
