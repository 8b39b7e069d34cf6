"""Configurations: frozen dataclasses, read from YAML and written to YAML; an unknown key is an error with its path.

The comment beside a field is its help text on the command line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pokediff.errors import PokediffError

T = TypeVar("T")
DEFAULT_CLIP = "open_clip:ViT-B-32:laion2b_s34b_b79k"  # what the scraper embeds captions with
DEFAULT_STEPS, DEFAULT_GUIDANCE = 20, 1.5  # more of either costs: docs/LOG.md, guidance and steps
Sampler = Literal["ddpm", "ddim", "dpmpp_2m", "unipc", "heun", "euler", "euler_a"]
STRICT = {"extra": "forbid"}  # for pydantic, which reads the dataclasses at the border


@dataclass(frozen=True)
class DatasetConfig:
    __pydantic_config__ = STRICT

    image_size: int = 32  # px, a multiple of 16
    channels: Literal["rgba", "rgb", "grey"] = "rgba"  # rgba: transparent; rgb: on white; grey: digits
    styles: dict[str, float] | None = (
        None  # share of the draws each style gets, the others are left out; none: all alike
    )
    flip: float = 0.3  # chance to mirror a picture; the network is told, so samples are never mirrored by it
    shift: float = 0.3  # chance to move a picture; the network is told
    max_shift: float = 0.06  # at most so much of the picture's side


@dataclass(frozen=True)
class ModelConfig:
    __pydantic_config__ = STRICT

    patch: int | None = None  # px a side that the stem folds into channels (default: the first level is 16x16)
    widths: tuple[int, ...] = (96, 160, 192)  # channels at the first level, at half its side, at a quarter ...
    blocks: tuple[int, ...] = (2, 2, 1)  # residual blocks at each level, on the way down and again on the way up
    attention: tuple[bool, ...] = (False, True, True)  # self-attention at which levels
    head_dim: int = 32  # channels of an attention head
    embedding_dim: int = 256  # of timestep, text and augmentation together
    dropout: float = 0.1
    plain: bool = False  # the first level without norms, its skips added: learns fine detail, and faster
    upscale: int = 1  # above 1: enlarges the pictures of refine.base so many times; must divide the patch
    sigma_data: float | None = (
        None  # EDM's skip from input to output for data of this deviation (prediction_type sample)
    )


@dataclass(frozen=True)
class DiffusionConfig:
    __pydantic_config__ = STRICT

    prediction_type: Literal["v_prediction", "epsilon", "sample"] = "v_prediction"  # what the network predicts
    num_train_timesteps: int = 1000
    sigma_min: float = 0.006  # noise at the last step, relative to the picture's unit scale
    sigma_max: float = 100.0  # at the first: nothing is left of the picture
    noise_shift: float = 1.0  # where half of the steps lie above; larger pictures want more, about their side / 32 px
    caption_dropout: float = 0.15  # share of captions replaced by the empty one, for guidance

    @property
    def range(self) -> tuple[float, float, float]:
        """sigma_min, sigma_max, noise_shift: what the schedule is made of."""
        return self.sigma_min, self.sigma_max, self.noise_shift


@dataclass(frozen=True)
class QuickLookConfig:
    __pydantic_config__ = STRICT

    every: int = 0  # steps between two looks at likeness, colours and copies; 0 is never
    number: int = 64  # pictures drawn for each
    features: str | None = None  # inception, dinov2, clip:MODEL, mobilenet_v2:FILE: for the kernel distance
    best_by: Literal["validation_loss", "kernel_distance"] = "validation_loss"  # which pipeline best/ keeps
    early_stop: bool = False  # stop when it begins to copy


@dataclass(frozen=True)
class DistillConfig:
    __pydantic_config__ = STRICT

    teacher: str = "checkpoints/pokediff-32"  # the checkpoint to learn from; the student starts as it
    steps: int = 4  # evaluations that the student draws with
    substeps: int = 4  # of the teacher for one of the student's
    guidance_scale: float = DEFAULT_GUIDANCE  # of the teacher; the student needs none


@dataclass(frozen=True)
class RefineConfig:
    __pydantic_config__ = STRICT

    base: str = "checkpoints/pokediff-32"  # the checkpoint whose last evaluations this network takes over
    below: float = 1.0  # where the noise is less than this sigma
    guidance_scale: float | None = None  # what suits the base from then on (default: what it had)
    # With model.upscale: the small pictures are shown with noise of up to this sigma (conditioning augmentation, Ho et
    # al. 2022, "Cascaded Diffusion Models", section 4), for those to be enlarged later are drawn ones.
    low_res_noise: float = 0.25


@dataclass(frozen=True)
class TrainConfig:
    __pydantic_config__ = STRICT

    data: str = "data/bulbapedia"  # a folder of pictures with a metadata.jsonl
    out: str | None = None  # where the run is written (default: checkpoints/<name of the config>)
    start_from: str | None = None  # a checkpoint whose network this one starts as, where the two are alike
    text_encoder: str = "builtin"  # builtin, clip:REPOSITORY or open_clip:ARCHITECTURE:TAG
    seed: int = 0

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    evaluation: QuickLookConfig = field(default_factory=QuickLookConfig)
    distill: DistillConfig | None = (
        None  # learn from a checkpoint to draw in few steps, instead of from pictures to draw
    )
    refine: RefineConfig | None = None  # learn the last steps only, for a checkpoint that does the others

    max_steps: int = 20_000  # optimizer steps
    max_minutes: float | None = None  # stop after so many minutes, with a checkpoint
    batch_size: int = 64  # pictures a step, over all processes together
    learning_rate: float = 6e-4
    warmup_steps: int = 500  # the rate rises from 0
    decay_steps: int = 0  # over the last so many steps the rate falls to 0
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9995
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the processor has it
    threads: int | None = None  # of a CPU, for each process (default: all cores, shared by the processes)
    workers: int = 0  # processes that prepare batches
    compile: bool = False  # compile the network first: a minute or two that pay for themselves within an hour

    log_every: int = 20  # steps
    validate_every: int = 1000
    preview_every: int = 1000
    checkpoint_every: int = 1000
    preview_prompts: tuple[str, ...] = (
        "official artwork of a blue water turtle creature",
        "official artwork of a red fire dragon creature",
        "official artwork of a green grass four-legged creature",
        "official artwork of a yellow electric mouse creature",
        "pixel sprite of a purple ghost creature",
        "pixel sprite of a brown bird creature",
        "vector drawing of a pink fairy creature",
        "vector drawing of a black snake-like dragon creature",
    )
    wandb: bool = False  # log to Weights & Biases too (pip install wandb)

    def __post_init__(self) -> None:
        size, levels = self.dataset.image_size, len(self.model.widths)
        _require(size % 16 == 0 and size > 0, "dataset.image_size", "must be a multiple of 16")
        _require(1 <= levels <= 5, "model.widths", "must have one to five levels")
        patch = self.model.patch or size // 16
        _require(
            patch > 0 and size % (patch * 2 ** (levels - 1)) == 0, "model.patch", f"must leave whole maps of {size} px"
        )
        for name in ("blocks", "attention"):
            _require(
                len(getattr(self.model, name)) == levels, f"model.{name}", "must have as many entries as model.widths"
            )
        noise = self.diffusion
        if self.model.sigma_data is not None:
            _require(self.model.sigma_data > 0, "model.sigma_data", "must be positive")
            _require(noise.prediction_type == "sample", "model.sigma_data", "needs diffusion.prediction_type sample")
        _require(
            0 < noise.sigma_min < noise.noise_shift < noise.sigma_max,
            "diffusion.noise_shift",
            "must lie between the sigmas",
        )
        if self.distill is not None:
            _require(self.distill.steps > 0, "distill.steps", "must be positive")
            _require(
                self.distill.substeps > 1, "distill.substeps", "must be at least 2: there is nothing to learn else"
            )
            fits = self.distill.steps * self.distill.substeps <= noise.num_train_timesteps
            _require(fits, "distill.substeps", "must leave the teacher no more steps than there are timesteps")
        if self.refine is not None:
            _require(self.distill is None, "refine", "cannot be had together with distill")
            between = noise.sigma_min < self.refine.below < noise.sigma_max
            _require(between, "refine.below", "must lie between the sigmas")
            scale = self.refine.guidance_scale
            _require(scale is None or scale >= 0, "refine.guidance_scale", "must not be negative")
            _require(self.refine.low_res_noise >= 0, "refine.low_res_noise", "must not be negative")
        upscale = self.model.upscale
        _require(upscale > 0 and patch % upscale == 0, "model.upscale", f"must divide the patch, {patch}")
        _require(
            upscale == 1 or self.refine is not None, "model.upscale", "needs refine.base, whose pictures to enlarge"
        )
        every = ("log_every", "validate_every", "preview_every", "checkpoint_every")
        for name in ("batch_size", "max_steps", "learning_rate", "max_grad_norm", *every):
            _require(getattr(self, name) > 0, name, "must be positive")
        look = self.evaluation
        _require(look.every >= 0, "evaluation.every", "must not be negative")
        _require(look.number > 1, "evaluation.number", "must be at least 2")
        _require(not look.early_stop or look.every > 0, "evaluation.early_stop", "needs evaluation.every")
        by_distance = look.best_by == "kernel_distance"
        _require(
            not by_distance or (look.every > 0 and look.features is not None),
            "evaluation.best_by",
            "kernel_distance needs evaluation.every and evaluation.features",
        )
        for name in ("seed", "workers", "warmup_steps", "decay_steps", "weight_decay"):
            _require(getattr(self, name) >= 0, name, "must not be negative")
        _require(self.threads is None or self.threads > 0, "threads", "must be positive")
        _require(len(self.preview_prompts) > 0, "preview_prompts", "must hold a prompt")
        _require(self.dataset.styles != {}, "dataset.styles", "must name a style, or be left out")
        embedding = self.model.embedding_dim
        _require(embedding > 0 and embedding % 2 == 0, "model.embedding_dim", "must be a positive even number")
        for name in ("flip", "shift"):
            _require(0 <= getattr(self.dataset, name) <= 1, f"dataset.{name}", "must be a chance, 0 to 1")
        _require(0 <= self.dataset.max_shift < 0.5, "dataset.max_shift", "must be in [0, 0.5)")
        _require(0 <= self.model.dropout < 1, "model.dropout", "must be in [0, 1)")
        _require(0 <= self.ema_decay < 1, "ema_decay", "must be in [0, 1)")
        _require(0 <= self.diffusion.caption_dropout < 1, "diffusion.caption_dropout", "must be in [0, 1)")
        _require(self.model.head_dim > 0, "model.head_dim", "must be positive")
        for width, attends in zip(self.model.widths, self.model.attention, strict=True):
            _require(width > 0, "model.widths", "must be positive")
            fits = not attends or width % self.model.head_dim == 0
            _require(fits, "model.widths", "must be multiples of model.head_dim where there is attention")
        for style, share in (self.dataset.styles or {}).items():
            _require(share > 0, f"dataset.styles.{style}", "must be positive: leave a style out to leave it out")


@dataclass(frozen=True)
class SampleConfig:
    __pydantic_config__ = STRICT

    prompt: tuple[str, ...] = ()  # one or several, each in quotes
    prompts_file: str | None = None  # a text file, one prompt a line; empty lines and lines with # are left out
    checkpoint: str | None = None  # a folder made by training, or a hub repository (default: the shipped one)
    out: str | None = None  # folder for what is written (default: outputs/<the first prompt>)
    num_images: int = 1  # pictures for each prompt
    seed: int = 0  # of the first picture; the k-th picture has seed + k
    num_steps: int | None = None  # steps of the sampler (default: the checkpoint's own, 20 if it was not distilled)
    guidance_scale: float | None = None  # how much the prompt counts; 1 is off (default: the checkpoint's own)
    guidance_interval: tuple[float, float] | None = None  # guide only while sigma lies between these
    negative_prompt: str = ""  # what guidance moves away from
    image: str | None = None  # a picture to begin with instead of noise; a plain backdrop is taken away
    strength: float = 0.6  # how much of it is drawn anew, 0 to 1
    mask: str | None = None  # a picture of its shape, white where it is drawn anew (strength 1); the rest stays
    variation: float = 0.0  # how far the pictures of one prompt are from the first, 0 to 1, instead of new seeds
    interpolate: int = 0  # so many pictures on the way from one prompt to the next, and interpolation.gif
    sampler: Sampler | None = None  # how the way from noise is walked (default: the checkpoint's own, dpmpp_2m)
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the processor has it
    batch_size: int = 16  # pictures drawn at once; changes speed and memory, not the pictures
    palette: str | None = None  # a number of colours for each picture, or a .gpl or .hex file with the colours
    hard_alpha: bool = False  # every pixel either there or transparent
    clean: bool = True  # remove specks that float beside the figure
    enlarge: int = 1  # make every pixel so many pixels wide and high
    background: str | None = None  # a colour name or #rrggbb behind the pictures (default: transparent)
    animations: tuple[Literal["gif", "mp4", "apng"], ...] = ("gif",)  # how the denoising of the first batch is shown
    save_frames: int = 0  # keep so many intermediate frames of every picture in frames/
    device: str | None = None  # cpu, cuda, mps (default: the fastest there is)
    compile: bool = False  # compile the network first: minutes that pay for hundreds of pictures

    def __post_init__(self) -> None:
        _require(self.num_images > 0, "num_images", "must be positive")
        _require(self.num_steps is None or self.num_steps > 0, "num_steps", "must be positive")
        _require(self.batch_size > 0, "batch_size", "must be positive")
        _require(1 <= self.enlarge <= 64, "enlarge", "must be 1 to 64")
        _require(self.save_frames >= 0, "save_frames", "must not be negative")
        _require(0 <= self.seed < 2**63, "seed", "must be a whole number from 0")
        _require(0 < self.strength <= 1, "strength", "must be above 0 and at most 1")
        _require(0 <= self.variation <= 1, "variation", "must be in [0, 1]")
        _require(not self.mask or self.image is not None, "mask", "needs an image")
        _require(self.interpolate == 0 or self.interpolate >= 2, "interpolate", "must be at least 2, or 0 for none")
        _require(not (self.interpolate and self.variation), "variation", "cannot be given together with interpolate")
        low, high = self.guidance_interval or (0.0, 1.0)
        _require(0 <= low < high, "guidance_interval", "must be two numbers, the smaller first")


@dataclass(frozen=True)
class EvaluateConfig:
    __pydantic_config__ = STRICT

    checkpoint: str | None = None  # a folder made by training, or a hub repository (default: the shipped one)
    images: str | None = None  # measure this folder of pictures instead (with sample.json or metadata.jsonl)
    data: str = "data/bulbapedia"  # the data set that the model was trained on
    split: Literal["test", "validation"] = "test"  # the families that are the reference
    styles: tuple[str, ...] | None = None  # of the reference (default: artwork, else all)
    out: str | None = None  # folder of the report (default: reports/<checkpoint>)
    number: int = 500  # pictures to draw, from the captions of the reference
    features: tuple[str, ...] = ("inception",)  # inception, dinov2, clip:MODEL, mobilenet_v2:FILE
    lpips: str | None = None  # squeeze:FILE.safetensors, for the variety within a prompt
    clip: str | None = None  # a CLIP of transformers for score and retrieval; another one than the model listens to
    background: str = "white"  # behind both sides
    kid_subsets: int = 100  # random subsets for the mean and standard deviation that papers give
    kid_subset_size: int = 100  # at most as many as there are pictures
    seed: int = 0  # of resampling
    num_steps: int | None = None  # these three: the checkpoint's own by default
    guidance_scale: float | None = None
    sampler: Sampler | None = None
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the processor has it
    batch_size: int = 16
    device: str | None = None  # cpu, cuda, mps (default: the fastest there is)

    def __post_init__(self) -> None:
        _require(not (self.checkpoint and self.images), "images", "cannot be given together with checkpoint")
        _require(self.number > 1, "number", "must be at least 2")
        _require(self.kid_subsets > 1, "kid_subsets", "must be at least 2")
        _require(self.kid_subset_size > 1, "kid_subset_size", "must be at least 2")
        _require(self.batch_size > 0, "batch_size", "must be positive")


@dataclass(frozen=True)
class DemoConfig:
    __pydantic_config__ = STRICT

    checkpoint: tuple[str, ...] = ()  # folders made by training, the first is chosen (default: the shipped ones)
    data: str | None = "data/bulbapedia"  # the data set they were trained on, to look up the nearest training pictures
    reports: str = "reports"  # folder of the reports that the page shows
    runs: str = "checkpoints"  # folder of the training runs that the page shows
    host: str = "127.0.0.1"  # 0.0.0.0 lets other machines in
    port: int = 7860
    queue: int = 32  # how many may wait; who comes then is told to come again
    open: bool = False  # open the page in a browser

    def __post_init__(self) -> None:
        _require(0 < self.port < 2**16, "port", "must be 1 to 65535")
        _require(self.queue > 0, "queue", "must be positive")


def _require(holds: bool, path: str, what: str) -> None:
    if not holds:
        raise PokediffError(f"configuration: {path} {what}")


def load_yaml(path: str | Path, kind: type[T]) -> T:
    """A configuration of `kind` from a YAML file. Raises PokediffError with the path of the key that is wrong."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise PokediffError(f"{path} not found")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise PokediffError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    return from_values(values, kind, str(path))


def from_values(values: Any, kind: type[T], where: str) -> T:
    """A configuration of `kind` from plain values. `where` stands at the head of the PokediffError for a bad one."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        problems = [(".".join(map(str, problem["loc"])), problem["type"], problem["msg"]) for problem in error.errors()]
        path, problem, message = problems[0]
        if problem in ("unexpected_keyword_argument", "extra_forbidden"):
            message = "unknown key"
        raise PokediffError(f"{where}: {path}: {message}") from None


def dump_yaml(config: Any) -> str:
    """The YAML text of a configuration, complete, in the order of its fields."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


def plain(config: Any) -> Any:
    """Dataclasses and tuples to dicts and lists."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {item.name: plain(getattr(config, item.name)) for item in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [plain(value) for value in config]
    return config
