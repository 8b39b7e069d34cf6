"""Configurations: frozen dataclasses, read from YAML and written to YAML; an unknown key is an error with its path.

The comment beside a field is its help text on the command line.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pokediff.errors import PokediffError, first_line
from pokediff.files import is_text, read_text, require_file

T = TypeVar("T")
DEFAULT_CLIP = "open_clip:ViT-B-32:laion2b_s34b_b79k"  # text encoder of the scraper's caption embeddings
Sampler = Literal["ddpm", "ddim", "dpmpp_2m", "unipc", "heun", "euler", "euler_a"]
Precision = Literal["auto", "bf16", "fp32"]
LOSSES = ("l1", "bce", "edges", "perceptual", "lpips", "adversarial")  # of a baseline
STRICT = {"extra": "forbid"}  # for pydantic, which validates YAML and JSON input


# --------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True)
class DatasetConfig:
    __pydantic_config__ = STRICT

    channels: Literal["rgba", "rgb", "grey"] = "rgba"  # rgba: transparent; rgb: on white; grey: digits
    styles: dict[str, float] | None = None  # fraction of each style in the batches, others excluded (default: all)
    kinds: dict[str, float] | None = None  # weight of each kind within its style; 1 for those not named
    licenses: tuple[str, ...] | None = None  # use pictures of these licences only, e.g. CC0-1.0, CC-BY-[0-9]*
    flip: float = 0.3  # probability of a horizontal flip; augmentation parameters are inputs of the network
    shift: float = 0.3  # probability of a translation
    max_shift: float = 0.06  # largest translation, as a fraction of the picture's side
    warp: float = 0.0  # probability each of scaling, rotation and stretching (EDM, appendix F.2)

    def __post_init__(self) -> None:
        _require(self.styles != {}, "dataset.styles", "must name a style, or be left out")
        for style, share in (self.styles or {}).items():
            _require(share > 0, f"dataset.styles.{style}", "must be positive: leave the style out instead")
        for kind, weight in (self.kinds or {}).items():
            _require(weight >= 0, f"dataset.kinds.{kind}", "must not be negative")
        for name in ("flip", "shift", "warp"):
            _require(0 <= getattr(self, name) <= 1, f"dataset.{name}", "must be a probability, 0 to 1")
        _require(0 <= self.max_shift < 0.5, "dataset.max_shift", "must be in [0, 0.5)")


@dataclass(frozen=True)
class ModelConfig:
    __pydantic_config__ = STRICT

    patch: int | None = None  # side in px of the patches that the stem folds into channels (default: image_size / 16)
    widths: tuple[int, ...] = (96, 160, 192)  # channels at the first level, at half its side, at a quarter ...
    blocks: tuple[int, ...] = (2, 2, 1)  # residual blocks at each level, in the encoder and again in the decoder
    attention: tuple[bool, ...] = (False, True, True)  # levels with self-attention
    head_dim: int = 32  # channels of an attention head
    embedding_dim: int = 256  # channels of the sum of timestep, text and augmentation embeddings
    dropout: float = 0.0  # in the residual blocks below the first level
    norm_free: bool = False  # no norms and additive skips in the first level: better fine detail, and faster
    upscale: int = 1  # above 1: an upscaler by this factor; must divide the patch
    sigma_data: float = 1.0  # sigma_data of EDM's preconditioning; 1 is v-prediction
    gate: bool = False  # a weight per pixel between EDM's x0 and a second x0 without the skip from the input
    below: float | None = None  # of a refiner or upscaler: it is trained and used only below this sigma
    steps: int = 15  # default number of sampler steps; an upscaler with 1 is trained at the timestep of its drawing
    guidance_scale: float | None = None  # default guidance scale; None: never guided
    high_noise_guidance: float = 1.0  # above sigma 10, where shapes are decided, guidance is this many times as strong

    def __post_init__(self) -> None:
        _require(1 <= len(self.widths) <= 5, "model.widths", "must have one to five levels")
        for name in ("blocks", "attention"):
            fits = len(getattr(self, name)) == len(self.widths)
            _require(fits, f"model.{name}", "must have as many entries as model.widths")
        for width, attends in zip(self.widths, self.attention, strict=True):
            _require(width > 0, "model.widths", "must be positive")
            fits = not attends or width % self.head_dim == 0
            _require(fits, "model.widths", "must be multiples of model.head_dim where there is attention")
        _require(self.embedding_dim % 2 == 0, "model.embedding_dim", "must be even")
        _require(0 <= self.dropout < 1, "model.dropout", "must be in [0, 1)")
        _require(self.below is None or self.below > 0, "model.below", "must be positive")
        _require((self.guidance_scale or 0) >= 0, "model.guidance_scale", "must not be negative")
        _positive(self, "model", "head_dim", "embedding_dim", "upscale", "sigma_data", "steps", "high_noise_guidance")


@dataclass(frozen=True)
class DiffusionConfig:
    __pydantic_config__ = STRICT

    num_train_timesteps: int = 1000
    sigma_min: float = 0.006  # sigma of the last timestep, relative to a picture of unit scale
    sigma_max: float = 100.0  # sigma of the first timestep: pure noise
    noise_shift: float = 1.0  # median of the schedule: half of the timesteps have a larger sigma
    caption_dropout: float = 0.15  # fraction of captions replaced by the empty one, for classifier-free guidance

    @property
    def range(self) -> tuple[float, float, float]:
        """The parameters of the noise schedule: sigma_min, sigma_max, noise_shift."""
        return self.sigma_min, self.sigma_max, self.noise_shift

    def __post_init__(self) -> None:
        ordered = 0 < self.sigma_min < self.noise_shift < self.sigma_max
        _require(ordered, "diffusion.noise_shift", "must lie between sigma_min and sigma_max")
        _require(0 <= self.caption_dropout < 1, "diffusion.caption_dropout", "must be in [0, 1)")


@dataclass(frozen=True)
class ValidationMetricsConfig:
    __pydantic_config__ = STRICT

    every: int = 0  # steps between two measurements of kernel distance, colours and copies; 0: never
    number: int = 64  # pictures drawn for each measurement
    features: str | None = None  # inception, dinov2, clip:MODEL, mobilenet_v2:FILE: for the kernel distance
    best_by: Literal["validation_loss", "kernel_distance"] = "validation_loss"  # which weights best/ keeps
    early_stop: bool = False  # stop when drawings start to copy training pictures

    def __post_init__(self) -> None:
        _require(self.every >= 0, "metrics.every", "must not be negative")
        _require(self.number > 1, "metrics.number", "must be at least 2")
        _require(not self.early_stop or self.every > 0, "metrics.early_stop", "needs metrics.every")
        fits = self.best_by == "validation_loss" or (self.every > 0 and self.features is not None)
        _require(fits, "metrics.best_by", "kernel_distance needs metrics.every and metrics.features")


@dataclass(frozen=True)
class DistillConfig:
    """A student, which learns to draw in its own steps what the cascade draws in all of its."""

    __pydantic_config__ = STRICT

    teacher: str = "base-32"  # the denoiser whose place the student takes, and from whose weights it starts
    drawings: int = 4000  # pictures that the cascade draws beforehand, for the student to learn
    guidance_scale: float | None = None  # under which it draws them (default: the teacher's own)

    def __post_init__(self) -> None:
        _require(self.drawings > 1, "distill.drawings", "must be at least 2")
        _require((self.guidance_scale or 0) >= 0, "distill.guidance_scale", "must not be negative")


@dataclass(frozen=True)
class PreferenceConfig:
    """Learning from pairs of drawings which of them the scorer of a checkpoint rates higher."""

    __pydantic_config__ = STRICT

    checkpoint: str  # draws the pairs and rates them; the stage starts from its denoiser of the same name
    pairs: int = 2000  # captions of which it draws one
    best_of: int = 8  # drawings of a caption; the best and the worst become a pair
    beta: float = 300.0  # the larger, the nearer the denoiser stays to the checkpoint's
    weight: float = 4.0  # of the comparisons, relative to the error of real pictures

    def __post_init__(self) -> None:
        _positive(self, "preference", "pairs", "beta", "weight")
        _require(self.best_of > 1, "preference.best_of", "must be at least 2")


@dataclass(frozen=True)
class PerceptualConfig:
    """LPIPS between predicted and true x0, added to the loss: it asks for edges where the squared error blurs."""

    __pydantic_config__ = STRICT

    lpips: str  # squeeze:FILE.safetensors
    weight: float = 0.1
    share: float = 0.5  # fraction of each batch that it is computed for

    def __post_init__(self) -> None:
        _positive(self, "perceptual", "weight")
        _require(0 < self.share <= 1, "perceptual.share", "must be above 0 and at most 1")


@dataclass(frozen=True)
class CriticConfig:
    """A critic that is trained along and asks for likely pictures."""

    __pydantic_config__ = STRICT

    features: str  # squeeze:FILE.safetensors, the frozen network that it looks through
    weight: float = 0.3  # norm of its gradient at x0, relative to that of the other losses
    learning_rate: float = 2e-4
    share: float = 0.5  # fraction of each batch that it sees
    captions: bool = False  # whether it judges if pictures fit their captions, too
    # small pictures that the cascade draws beforehand; the critic sees them enlarged by an upscaler of one step, too
    drawings: int = 0

    def __post_init__(self) -> None:
        _positive(self, "critic", "weight", "learning_rate")
        _require(0 < self.share <= 1, "critic.share", "must be above 0 and at most 1")
        _require(self.drawings >= 0, "critic.drawings", "must not be negative")


@dataclass(frozen=True)
class StageConfig:
    """One denoiser of the cascade and its training."""

    __pydantic_config__ = STRICT

    image_size: int = 32  # px, a multiple of 16
    model: ModelConfig = field(default_factory=ModelConfig)
    styles: dict[str, float] | None = None  # as dataset.styles, for this stage (default: those of the run)
    # FOLDER or FOLDER:DENOISER each, whose weights to start from where shapes agree; a later one has precedence
    start_from: tuple[str, ...] = ()
    # conditioning augmentation of an upscaler: largest sigma of the noise on its small picture (Ho et al. 2022)
    low_res_noise: float = 0.25
    perceptual: PerceptualConfig | None = None  # a perceptual loss beside the error of x0
    critic: CriticConfig | None = None  # an adversarial loss beside it
    distill: DistillConfig | None = None  # learn to draw in few steps
    preference: PreferenceConfig | None = None  # learn from pairs of drawings, too
    fast: bool = False  # a few-step denoiser, used with --fast

    max_steps: int = 20_000  # optimizer steps
    batch_size: int = 32  # pictures a step, over all processes together
    learning_rate: float = 1e-3
    warmup_steps: int = 200  # the learning rate rises from 0 over the first steps
    decay_steps: int = 0  # the learning rate falls to 0 over this many last steps
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.9995
    patience: int | None = None  # validations without a lower validation loss after which the stage ends
    validate_every: int = 1000
    preview_every: int = 1000
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        size, levels = self.image_size, len(self.model.widths)
        _require(size > 0 and size % 16 == 0, "image_size", "must be a multiple of 16")
        patch = self.model.patch or size // 16
        whole = patch > 0 and size % (patch * 2 ** (levels - 1)) == 0
        _require(whole, "model.patch", f"must divide {size} px into whole maps at every level")
        _require(patch % self.model.upscale == 0, "model.upscale", f"must divide the patch, {patch}")
        _require(self.model.upscale == 1 or self.model.below is not None, "model.upscale", "needs model.below")
        _require(not (self.distill and self.model.upscale > 1), "distill", "is not implemented for upscalers")
        _require(self.fast or not self.distill, "distill", "needs fast: true")
        both = self.preference and (self.distill or self.model.upscale > 1)
        _require(not both, "preference", "is not implemented for students and upscalers")
        draws = self.model.upscale > 1 and self.model.steps == 1
        _require(
            draws or not (self.critic and self.critic.drawings), "critic.drawings", "needs an upscaler of one step"
        )
        _require(self.styles != {}, "styles", "must name a style, or be left out")
        _require(0 <= self.ema_decay < 1, "ema_decay", "must be in [0, 1)")
        _positive(self, "", "batch_size", "max_steps", "learning_rate", "max_grad_norm", "patience")
        _positive(self, "", "validate_every", "preview_every", "checkpoint_every")
        for name in ("warmup_steps", "decay_steps", "weight_decay", "low_res_noise"):
            _require(getattr(self, name) >= 0, name, "must not be negative")


@dataclass(frozen=True)
class TrainConfig:
    """A cascade: its stages, in the order in which they are trained, and what they share."""

    __pydantic_config__ = STRICT

    data: tuple[str, ...] = ("data/bulbapedia",)  # folders of pictures, joined
    out: str | None = None  # folder of the run (default: checkpoints/<name of the config>)
    base: str | None = None  # a checkpoint whose denoisers come before these stages and are not trained
    start_from: str | None = None  # a checkpoint: every stage starts from its denoiser of the same name
    text_encoder: str = "builtin"  # builtin, builtin:CHECKPOINT, clip:REPOSITORY or open_clip:ARCHITECTURE:TAG
    seed: int = 0

    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    metrics: ValidationMetricsConfig = field(default_factory=ValidationMetricsConfig)
    stages: dict[str, StageConfig] = field(default_factory=lambda: {"base-32": StageConfig()})

    max_minutes: float | None = None  # time limit of the whole run, previews and validation included
    fit_limit: bool = False  # shorten all stages in proportion, so that the whole cascade fits into max_minutes
    precision: Precision = "auto"  # auto: bf16 where the processor has it
    threads: int | None = None  # CPU threads of each process (default: all cores, shared by the processes)
    workers: int = 0  # processes that prepare batches
    compile: bool = False  # compile the denoiser: a minute or two, repaid within an hour
    log_every: int = 20  # steps
    pixel_art: bool = False  # drawings of this model end with hard edges (alpha 0 or 255)
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
        for name in ("data", "stages", "preview_prompts"):
            _require(len(getattr(self, name)) > 0, name, "must not be empty")
        for name in self.stages:
            fits = re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) is not None
            _require(fits, f"stages.{name}", "must be small letters, digits and hyphens")
        for name in ("seed", "workers"):
            _require(getattr(self, name) >= 0, name, "must not be negative")
        _positive(self, "", "threads", "max_minutes", "log_every")


# -------------------------------------------------------------------------------------------------------- baselines


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of the training pictures from one step on."""

    __pydantic_config__ = STRICT

    from_step: int = 0
    flip: float = 0.0  # probability
    rotation: float = 0.0  # largest angle, degrees
    translation: float = 0.0  # largest, as a fraction of the side
    scale: tuple[float, float] = (1.0, 1.0)
    brightness: float = 0.0  # largest change, as in torchvision's ColorJitter
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    erase: float = 0.0  # probability that a rectangle is replaced by random numbers


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of a baseline's network; each system reads those that it has."""

    __pydantic_config__ = STRICT

    width: int = 256  # channels of the first map, 4x4; latent: of the denoiser
    text_dim: int = 256  # numbers of a token's vector inside the network
    heads: int = 8  # of attention
    layers: int = 4  # transformer layers; digits: 0 for a network without attention
    noise: int = 100  # numbers of noise beside the text
    stages: int = 1  # pikapikagen: 2 draws a smaller picture first
    latent: int = 10  # digits: numbers that represent a digit; latent: channels of the 4x4 map


@dataclass(frozen=True)
class LoraConfig:
    __pydantic_config__ = STRICT

    model: str = "stabilityai/stable-diffusion-xl-base-1.0"  # a folder or hub repository of an SDXL pipeline
    rank: int = 4
    gradient_accumulation: int = 4  # batches for one optimizer step
    validation_prompt: str = "A red pokemon with ice cream."
    validation_images: int = 3
    hub_model_id: str | None = None  # upload the LoRA to this hub repository at the end

    def __post_init__(self) -> None:
        _positive(self, "lora", "rank", "gradient_accumulation", "validation_images")


@dataclass(frozen=True)
class BaselineConfig:
    """One of the older systems, and its training (docs/baselines.md)."""

    __pydantic_config__ = STRICT

    system: Literal["pikapikagenerator", "pikapikagen", "digits", "latent", "sdxl-lora"] = "pikapikagenerator"
    data: tuple[str, ...] = ("data/bulbapedia",)  # folders of pictures, joined
    out: str | None = None  # folder of the result (default: checkpoints/<name of the config>)
    image_size: int = 32  # px: 8, 16, 32 ... 256; digits: 28; sdxl-lora: a multiple of 8, 32 means 1024
    words: str = "builtin"  # where word vectors start from: builtin, builtin:CHECKPOINT or bert:FOLDER
    seed: int = 0
    dataset: DatasetConfig = field(default_factory=lambda: DatasetConfig(flip=0.0, shift=0.0))
    network: NetworkConfig = field(default_factory=NetworkConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    # of the generator: l1, bce, edges (Sobel), perceptual (VGG), lpips, adversarial
    losses: dict[str, float] = field(default_factory=lambda: {"l1": 1.0})
    # picture: sees the picture alone; text: the text too; pairs: real pictures with wrong texts count as false, too
    discriminator: Literal["none", "picture", "text", "pairs"] = "none"
    features: str | None = None  # of perceptual: vgg19:FILE.safetensors or squeeze:FILE.safetensors
    lpips: str | None = None  # squeeze:FILE.safetensors
    augment: tuple[AugmentationConfig, ...] = ()  # phases, by their first step

    max_steps: int = 10_000  # optimizer steps
    max_minutes: float | None = None  # time limit
    batch_size: int = 16
    learning_rate: float = 2e-4
    discriminator_rate: float = 1.0  # learning rate of the discriminator, times that of the generator
    betas: tuple[float, float] = (0.5, 0.999)  # of Adam
    max_grad_norm: float | None = None
    thaw_step: int | None = None  # from this step on the text encoder is trained, too (default: never)
    keep: Literal["best", "last"] = "best"  # the weights with the lowest validation loss, or the last ones
    validate_every: int = 200  # steps
    plateau: int | None = None  # the learning rate is halved after more validations than this without a lower loss
    patience: int | None = None  # validations without a lower validation loss after which training stops
    preview_every: int = 1000  # steps
    log_every: int = 20  # steps
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # auto: bf16 where the device has it, fp16 on other GPUs
    )
    threads: int | None = None  # CPU threads (default: all cores)
    preview_prompts: tuple[str, ...] = TrainConfig.preview_prompts
    wandb: bool = False  # log to Weights & Biases too (pip install wandb)

    def __post_init__(self) -> None:
        size = self.image_size
        fits = size % 4 == 0 and (size // 4).bit_count() == 1 and 8 <= size <= 256
        free = self.system in ("digits", "sdxl-lora")
        _require(free or fits, "image_size", "must be 8, 16, 32, 64, 128 or 256")
        _require(bool(self.losses), "losses", "must not be empty")
        for name, weight in self.losses.items():
            _require(name in LOSSES, f"losses.{name}", f"is unknown; losses: {', '.join(LOSSES)}")
            _require(weight > 0, f"losses.{name}", "must be positive: leave it out instead")
        against = self.discriminator != "none"
        _require(against == ("adversarial" in self.losses), "losses.adversarial", "and discriminator need each other")
        two = self.network.stages == 2
        _require(self.network.stages == 1 or (two and self.system == "pikapikagen"), "network.stages", "must be 1")
        _require(not two or size >= 16, "image_size", "must be at least 16 for two stages")
        dim = self.network.latent if self.system == "digits" else self.network.text_dim
        divides = self.network.layers == 0 or dim % self.network.heads == 0
        _require(divides, "network.heads", f"must divide {dim}, the numbers of a token")
        _require(self.system != "latent" or self.network.width % 32 == 0, "network.width", "must be a multiple of 32")
        regresses = self.system in ("pikapikagenerator", "pikapikagen")
        _require(not regresses or self.batch_size > 1, "batch_size", "must be at least 2 for BatchNorm")
        _require(self.seed >= 0, "seed", "must not be negative")
        for name in ("data", "preview_prompts"):
            _require(len(getattr(self, name)) > 0, name, "must not be empty")
        _positive(self, "", "max_steps", "max_minutes", "batch_size", "learning_rate", "discriminator_rate", "patience")
        _positive(self, "", "plateau", "max_grad_norm", "validate_every", "preview_every", "log_every", "threads")


# ---------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Sampling:
    """How a picture is drawn, passed whole from command line, demo and evaluation to `PokeDiffPipeline.denoise`."""

    __pydantic_config__ = STRICT

    size: int | None = None  # px (default: 64, or the largest size of the checkpoint)
    num_inference_steps: int | None = (
        None  # sampler steps at the smallest size (default: the checkpoint's own, e.g. 20)
    )
    guidance_scale: float | None = None  # classifier-free guidance; 1: off (default: the checkpoint's own, e.g. 2)
    guidance_interval: tuple[float, float] | None = None  # apply guidance only between these two sigmas
    negative_prompt: str = ""  # what guidance moves away from
    sampler: Sampler | None = None  # a diffusers scheduler (default: the checkpoint's own, dpmpp_2m)
    fast: bool = False  # use the checkpoint's few-step denoisers
    # begun drawings of each picture, of which the scorer chooses one (default: 8 for `sample`, 1 elsewhere)
    best_of: int | None = None
    precision: Precision = "auto"  # auto: bf16 where the processor has it
    exact: bool = False  # bit-identical at any batch size in float32 on a CPU; slower below four pictures

    def __post_init__(self) -> None:
        _positive(self, "", "size", "num_inference_steps", "best_of")
        _require((self.guidance_scale or 0) >= 0, "guidance_scale", "must not be negative")
        low, high = self.guidance_interval or (0.0, 1.0)
        _require(0 <= low < high, "guidance_interval", "must be two numbers, the smaller first")
        _require(is_text(self.negative_prompt), "negative_prompt", "must be UTF-8 text")

    @property
    def chooses(self) -> bool:
        """Whether the scorer chooses among several drawings."""
        return self.best_of is not None and self.best_of > 1


@dataclass(frozen=True)
class SampleConfig:
    __pydantic_config__ = STRICT

    prompt: tuple[str, ...] = ()  # one or several, each in quotes
    # a text file, one prompt a line, empty lines and # skipped; or a CSV file: name, prompt, seed, number
    prompts_file: str | None = None
    checkpoint: str | None = None  # a folder, the name of a shipped model, or a hub repository (default: pokediff)
    lora: str | None = None  # LoRA weights of SDXL (`pokediff baseline`); --checkpoint names another SDXL to draw with
    out: str | None = None  # output folder (default: outputs/<first prompt>-<seed>)
    num_images_per_prompt: int = 1  # pictures of each prompt
    seed: int | None = None  # seed of the first picture; the k-th has seed + k (default: random)
    sampling: Sampling = field(default_factory=Sampling)
    image: str | None = None  # img2img: a picture to start from; a plain backdrop is removed
    strength: float = 0.6  # img2img: fraction of the noise schedule that is run (1: start from pure noise)
    mask: str | None = None  # inpainting: a mask of the image's size; white is redrawn, at strength 1
    variation: float = 0.0  # variations: distance from the first picture of a prompt, 0 to 1 (0: independent seeds)
    interpolate: int = 0  # number of pictures from the first prompt to the last, also as interpolation.gif
    batch_size: int = 16  # pictures drawn at once; changes speed and memory
    palette: str | None = None  # number of colours per picture, or a palette file (.gpl, .hex); 14 for pixel sprites
    hard_alpha: bool | None = None  # make every pixel opaque or transparent (default: on for pixel art)
    clean: bool = True  # remove loose pieces smaller than 5 % of the figure
    raw: bool = False  # no post-processing: pictures as the denoisers leave them
    enlarge: int = 1  # integer scale of 0000.png ...; large/ holds copies of at least 256 px
    background: str | None = None  # a colour name or #rrggbb behind the pictures (default: transparent)
    animations: tuple[Literal["gif", "mp4", "apng"], ...] = ("gif",)  # formats of the denoising animation (first batch)
    save_frames: int = 0  # intermediate steps of every picture to save in frames/
    sheet: tuple[Literal["aseprite", "texturepacker", "godot", "tiled"], ...] = ()  # sprite sheet for these tools
    device: str | None = None  # cpu, cuda, mps (default: the fastest available)
    compile: bool = False  # compile the denoisers: takes minutes, pays off after hundreds of pictures

    def __post_init__(self) -> None:
        _positive(self, "", "num_images_per_prompt", "batch_size")
        _require(all(map(is_text, self.prompt)), "prompt", "must be UTF-8 text")
        _require(1 <= self.enlarge <= 64, "enlarge", "must be 1 to 64")
        _require(self.save_frames >= 0, "save_frames", "must not be negative")
        _require(not (self.raw and (self.palette or self.hard_alpha)), "raw", "excludes palette and hard_alpha")
        given = self.image or self.mask or self.variation or self.interpolate
        _require(not (self.sampling.chooses and given), "best_of", "excludes image, mask, variation, interpolate")
        _require(self.seed is None or 0 <= self.seed < 2**63, "seed", "must be from 0 to 2^63 - 1 (9.2e18)")
        _require(0 < self.strength <= 1, "strength", "must be above 0 and at most 1")
        _require(0 <= self.variation <= 1, "variation", "must be in [0, 1]")
        _require(not self.mask or self.image is not None, "mask", "needs an image")
        _require(self.interpolate == 0 or self.interpolate >= 2, "interpolate", "must be at least 2, or 0 for none")
        _require(not (self.interpolate and self.variation), "variation", "excludes interpolate")


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a checkpoint or a folder of pictures against real pictures and write a report."""

    __pydantic_config__ = STRICT

    checkpoint: str | None = None  # a folder, the name of a shipped model, or a hub repository (default: pokediff)
    images: str | None = None  # measure this folder of pictures instead (with sample.json or metadata.jsonl)
    data: tuple[str, ...] = ("data/bulbapedia",)  # the data sets that the model was trained on
    split: Literal["test", "validation"] = "test"  # split of the reference pictures
    styles: tuple[str, ...] | None = None  # styles of the reference pictures (default: artwork, else all)
    out: str | None = None  # folder of the report (default: reports/<checkpoint>-<size>)
    number: int = 500  # pictures to draw, from captions of the reference pictures
    features: tuple[str, ...] = ("inception",)  # inception, dinov2, clip:MODEL, mobilenet_v2:FILE, or none
    lpips: str | None = None  # squeeze:FILE.safetensors, for the diversity within a prompt
    clip: str | None = None  # a transformers CLIP for CLIP score and retrieval, other than the model's text encoder
    concepts: tuple[str, ...] = ()  # data sets with names, for the recognition figures (default: those of --data)
    concept_style: str | None = None  # style in the recognition prompts (default: the most frequent one)
    background: str = "white"  # colour behind drawn and real pictures
    kid_subsets: int = 100  # random subsets for KID as papers report it: mean and standard deviation
    kid_subset_size: int = 100  # pictures of each subset
    seed: int = 0  # seed of bootstrap and subsets
    sampling: Sampling = field(default_factory=Sampling)
    batch_size: int = 16
    device: str | None = None  # cpu, cuda, mps (default: the fastest available)

    def __post_init__(self) -> None:
        _require(not (self.checkpoint and self.images), "images", "excludes checkpoint")
        for name in ("number", "kid_subsets", "kid_subset_size"):
            _require(getattr(self, name) > 1, name, "must be at least 2")
        _require(self.number >= 7, "number", "must be at least 7, better hundreds")  # see evaluate.FEWEST_DRAWN
        _positive(self, "", "batch_size")


@dataclass(frozen=True)
class DemoConfig:
    """Serve a web page that draws and shows every step."""

    __pydantic_config__ = STRICT

    checkpoint: tuple[str, ...] = ()  # folders or names of shipped models; the first is selected (default: all shipped)
    size: int | None = None  # initially selected size in px (default: 64, or the largest size of the checkpoint)
    data: str | None = "data/bulbapedia"  # training data, for the nearest training pictures
    reports: str = "reports"  # folder of the reports that the page shows
    runs: str = "checkpoints"  # folder of the training runs that the page shows
    host: str = "127.0.0.1"  # 0.0.0.0: reachable from other machines
    port: int = 7860
    allowed_hosts: tuple[str, ...] = ()  # further names by which browsers may address it, as that of a reverse proxy
    queue: int = 32  # requests that may wait; further requests are refused
    open: bool = False  # open the page in a browser

    def __post_init__(self) -> None:
        _positive(self, "", "size", "queue")
        _require(0 < self.port < 2**16, "port", "must be 1 to 65535")


def _require(holds: bool, path: str, what: str) -> None:
    if not holds:
        raise PokediffError(f"configuration: {path} {what}")


def _positive(config: Any, path: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value > 0, f"{path}.{name}".lstrip("."), "must be positive")


LARGEST_YAML, MOST_VALUES = 200_000, 20_000  # bytes and values; a whole configuration has 5 kB and 250


def load_yaml(path: str | Path, kind: type[T]) -> T:
    """A configuration of `kind` from a YAML file. `extends: FILE`, relative to it, names a file to start from.

    Raises PokediffError with the path of the key that is wrong.
    """
    return from_values(_read_yaml(Path(path), ()), kind, str(path))


def _read_yaml(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a file, laid over those of the one that it extends."""
    import yaml

    require_file(path)
    if path.resolve() in extending:
        raise PokediffError(f"{path} extends itself")
    if path.stat().st_size > LARGEST_YAML:
        raise PokediffError(f"{path} has more than {LARGEST_YAML // 1000} kB, so it is no configuration")
    try:
        values = yaml.safe_load(read_text(path)) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PokediffError(f"{path}: not YAML ({first_line(error)})") from None
    if _number_of_values(values) > MOST_VALUES:
        raise PokediffError(
            f"{path} holds more than {MOST_VALUES:,} values, some of them by aliases: it is no configuration"
        )
    if not isinstance(values, dict) or (name := values.pop("extends", None)) is None:
        return values
    return _merged(_read_yaml(path.parent / str(name), (*extending, path.resolve())), values)


def _number_of_values(values: Any) -> int:
    """How many values there are, aliases counted each time, but at most one more than MOST_VALUES: aliases of aliases
    grow without limit, and may hold themselves.
    """
    waiting, number = [values], 0
    while waiting and number <= MOST_VALUES:
        value = waiting.pop()
        number += 1
        if isinstance(value, dict | list):
            waiting.extend(list(value.values() if isinstance(value, dict) else value)[: MOST_VALUES + 1])
    return number


def _merged(below: Any, above: Any) -> Any:
    """`above` over `below`: mappings key by key, anything else replaced; a key with null is removed."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    merged = below | {key: _merged(below.get(key), value) for key, value in above.items()}
    return {key: value for key, value in merged.items() if value is not None}


def from_values(values: Any, kind: type[T], where: str) -> T:
    """A configuration of `kind` from plain values. Raises PokediffError, prefixed with `where`, for a bad value."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        unknown = first["type"] in ("unexpected_keyword_argument", "extra_forbidden")
        message = "unknown key" if unknown else first["msg"]
        raise PokediffError(f"{where}: {'.'.join(map(str, first['loc']))}: {message}") from None


def dump_yaml(config: Any) -> str:
    """The YAML text of a configuration, complete, in the order of its fields."""
    import yaml

    return yaml.safe_dump(plain(config), sort_keys=False, allow_unicode=True, width=120)


def plain(config: Any) -> Any:
    """A dataclass as dicts and lists, for YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
