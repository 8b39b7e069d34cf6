"""A checkpoint is data from a stranger: it is inspected here before a library opens any file of it.

A library takes a configuration at its word: it makes networks as large as it says, follows links and paths, and imports
or downloads what it names. So every component is first checked against its own files: plain files inside the folder,
classes of a short list, configurations of known keys, and tensors of exactly the shapes that the configuration means,
which are computed without memory (torch's meta device). Errors are PokediffErrors that name the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from safetensors import SafetensorError, safe_open
from torch import nn

from pokediff.config import ModelConfig, from_values, plain
from pokediff.data.images import CHANNELS
from pokediff.errors import PokediffError, first_line
from pokediff.files import as_row, is_own_file, read_json
from pokediff.model.denoiser import Denoiser
from pokediff.model.samplers import SAMPLERS, SCHEDULERS, make_scheduler
from pokediff.model.scorer import Scorer, feature_count

Shapes = Mapping[str, tuple[int, ...]]

COMPONENTS = {  # library and classes of each component of model_index.json
    "cascade": ("pokediff", {"Cascade"}),
    "scheduler": ("diffusers", set(SCHEDULERS)),
    "text_encoder": ("transformers", {"CLIPTextModelWithProjection"}),
    "tokenizer": ("transformers", {"CLIPTokenizer", "CLIPTokenizerFast"}),
    "scorer": ("pokediff", {"Scorer"}),
}
LIBRARIES = sorted({library for library, _ in COMPONENTS.values()})
LIST, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # of a cascade, and of a denoiser
TEXT_WEIGHTS = "model.safetensors"
LARGEST_JSON = 16_000_000  # bytes; a tokenizer of 49,408 words has 3.6 MB
MOST_DENOISERS, LARGEST_SIDE, MOST_TIMESTEPS = 64, 1024, 100_000
LARGEST_NUMBER = 1_000_000  # of sigmas and scales
FLOATS = {"F64", "F32", "F16", "BF16"}
COUNTERS = ("num_batches_tracked", "position_ids")  # whole numbers, of batch norms and of early CLIP models
# Keys of a text encoder by which transformers imports, downloads, or computes otherwise.
FOREIGN_KEYS = ("auto_map", "custom_pipelines", "quantization_config", "attn_implementation", "compression_config")


@dataclass(frozen=True)
class Facts:
    """The arguments of `Denoiser` that are not fields of ModelConfig."""

    image_size: int = 32
    in_channels: int = 4
    text_dim: int = 384
    augment_dim: int = 3
    fast: bool = False
    noise_range: tuple[float, float, float] = (0.006, 100.0, 1.0)
    num_train_timesteps: int = 1000

    def __post_init__(self) -> None:
        if not 0 < self.image_size <= LARGEST_SIDE:
            raise PokediffError(f"image_size {self.image_size} is not 1 to {LARGEST_SIDE}")
        if self.in_channels not in CHANNELS.values():
            raise PokediffError(f"in_channels {self.in_channels} is none of 1, 3, 4")
        if min(self.text_dim, self.augment_dim) < 1 or not 1 < self.num_train_timesteps <= MOST_TIMESTEPS:
            raise PokediffError("text_dim, augment_dim and num_train_timesteps must be positive, and within reason")
        low, high, shift = self.noise_range
        if not (0 < low < high < math.inf and 0 < shift < math.inf):
            raise PokediffError(f"noise_range {self.noise_range} must be two sigmas, the smaller first, and a shift")


# -------------------------------------------------------------------------------------------------------- the index


def check_index(index: Any, path: Path) -> dict[str, Any]:
    """The content of a model_index.json. Raises PokediffError when a component is not of COMPONENTS."""
    index = as_row(index, str(path))
    for name, value in index.items():
        if not isinstance(value, list) or name.startswith("_") or value[:1] == [None]:
            continue
        library = value[0] if value else None
        if library not in LIBRARIES:
            raise PokediffError(f"{path}: {name} is of {library!r}, not of {', '.join(LIBRARIES)}")
        if name not in COMPONENTS:
            raise PokediffError(f"{path}: {name} is no component; there are {', '.join(COMPONENTS)}")
        allowed, kinds = COMPONENTS[name]
        if len(value) != 2 or library != allowed or value[1] not in kinds:
            raise PokediffError(f"{path}: {name} is {str(value)[:80]}, not {', '.join(sorted(kinds))} of {allowed}")
    if not isinstance(index.get("text_encoder_name", ""), str) or not isinstance(index.get("pixel_art", False), bool):
        raise PokediffError(f"{path}: text_encoder_name must be a text, and pixel_art true or false")
    return index


# -------------------------------------------------------------------------------------------------------- the files


def check_files(folder: Path) -> None:
    """Raise PokediffError unless all below a component's folder are plain files and folders inside it.

    A link out of the folder would read what its owner did not mean to open; a pipe would wait for ever.
    """
    for path in (folder, *sorted(folder.rglob("*"))):
        check_file(path, folder.parent)


def check_file(path: Path, folder: Path) -> None:
    """Raise PokediffError when `path` is a link that leads out of `folder`, or neither a file nor a folder."""
    if path.is_dir() and path.resolve().is_relative_to(folder.resolve()):
        return
    if (path.exists() or path.is_symlink()) and not is_own_file(path, folder):
        what = "a link out of the checkpoint" if path.is_symlink() else "neither file nor folder"
        raise PokediffError(f"{path} is {what}: copy the file to its place, or take it out")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises PokediffError for another, or one of more than LARGEST_JSON bytes."""
    if not path.is_file():
        raise PokediffError(f"{path} not found")
    if path.stat().st_size > LARGEST_JSON:
        raise PokediffError(f"{path} has more than {LARGEST_JSON // 10**6} MB, so it is no configuration")
    return as_row(read_json(path), str(path))


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file; safetensors compares them with the length of the file.

    Raises PokediffError for a file that is none, or holds other numbers than floats beside COUNTERS.
    """
    if not path.is_file():
        raise PokediffError(f"{path} not found")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no dict)
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise PokediffError(f"{path} is no whole safetensors file ({first_line(error)})") from None
    if other := next(
        (name for name, kind in kinds.items() if kind not in FLOATS and not name.endswith(COUNTERS)), None
    ):
        raise PokediffError(f"{path}: {other} is of type {kinds[other]}, no floating-point numbers")
    return shapes


def check_shapes(path: Path, found: Shapes, network: nn.Module, extra: bool = False) -> None:
    """Raise PokediffError unless a file holds the tensors of a network; with `extra` it may hold others, too."""
    wanted = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    for name, shape in wanted.items():
        if found.get(name) != shape:
            raise PokediffError(f"{path}: {name} is {found.get(name, 'missing')}, but by config.json {shape}")
    if not extra and (unknown := next((name for name in found if name not in wanted), None)):
        raise PokediffError(f"{path}: {unknown[:80]} is no tensor of the network of config.json")


def check_finite(name: str, network: nn.Module) -> None:
    """Raise PokediffError when a weight is infinite or not a number: every picture would be empty."""
    for key, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise PokediffError(f"{name}: {key} holds numbers that are not finite: train or download it again")


# --------------------------------------------------------------------------------------------------- the components


def denoiser_names(folder: Path) -> list[str]:
    """The list of a cascade's folder. Raises PokediffError for one that is empty or leads out of the folder."""
    path = folder / LIST
    names = read_object(path).get("denoisers")
    if not isinstance(names, list) or not 1 <= len(names) <= MOST_DENOISERS or len(set(map(str, names))) < len(names):
        raise PokediffError(f"{path}: denoisers must be a list of 1 to {MOST_DENOISERS} names")
    for name in names:
        if not isinstance(name, str) or not name or Path(name).name != name or name[0] == "." or not name.isprintable():
            raise PokediffError(f"{path}: {str(name)[:80]!r} is not a valid denoiser name")
    return names


def read_settings(path: Path) -> tuple[ModelConfig, Facts]:
    """The configuration of a denoiser. Raises PokediffError for a key of the wrong type, or out of reason."""
    given = read_object(path)
    keys = [{field.name for field in dataclasses.fields(kind)} for kind in (ModelConfig, Facts)]
    model = from_values({key: value for key, value in given.items() if key in keys[0]}, ModelConfig, str(path))
    facts = from_values({key: value for key, value in given.items() if key in keys[1]}, Facts, str(path))
    side, factor = facts.image_size, model.upscale
    patch = model.patch or side // 16
    numbers = (model.below or 1.0, model.sigma_data, model.guidance_scale or 0.0, model.high_noise_guidance)
    if not all(abs(number) <= LARGEST_NUMBER for number in (*numbers, *facts.noise_range)):  # NaN is not
        raise PokediffError(f"{path}: a number is not finite, or beyond {LARGEST_NUMBER:,}")
    for key, value in {**plain(model), **plain(facts)}.items():
        if given.get(key, value) != value:  # the denoiser gets what stands in the file, where "5" is no number
            raise PokediffError(f"{path}: {key} is {str(given[key])[:80]!r}, not {value!r}")
    if min(model.blocks) < 1 or patch < 1 or side % (patch * 2 ** (len(model.widths) - 1)) or patch % factor:
        raise PokediffError(f"{path}: patch, upscale or blocks do not divide {side} px into whole maps")
    if model.steps > facts.num_train_timesteps:
        raise PokediffError(f"{path}: steps {model.steps} are more than num_train_timesteps")
    return model, facts


def check_denoiser(folder: Path) -> Facts:
    """Raise PokediffError unless a denoiser's configuration and weights fit each other, and it computes."""
    path, found = folder / "config.json", shapes_of(folder / WEIGHTS)
    model, facts = read_settings(path)
    if 4 * sum(model.blocks) > len(found):
        raise PokediffError(f"{path}: {sum(model.blocks)} blocks are more than {WEIGHTS} holds")
    try:
        with torch.device("meta"):
            network = Denoiser(**{**dataclasses.asdict(model), **dataclasses.asdict(facts)})
        check_shapes(folder / WEIGHTS, found, network)
        x = torch.empty(1, facts.in_channels, facts.image_size, facts.image_size, device="meta")
        small = facts.image_size // model.upscale
        network(x, torch.zeros(1, device="meta"), None, None, x[..., :small, :small])
    except (ValueError, RuntimeError, TypeError, IndexError, ArithmeticError) as error:
        raise PokediffError(f"{path}: no network of these settings ({first_line(error)})") from None
    return facts


def check_agreement(facts: Mapping[str, Facts], folder: Path) -> None:
    """Raise PokediffError when denoisers have other channels or text vectors than the first, so cannot follow it."""
    first, *others = facts
    for name in others:
        if (facts[name].in_channels, facts[name].text_dim) != (facts[first].in_channels, facts[first].text_dim):
            raise PokediffError(f"{folder}: {name} has other channels or text vectors than {first}")


def check_cascade(folder: Path) -> list[str]:
    """The names of the denoisers of a folder, all inspected. Raises PokediffError when they do not fit together."""
    check_files(folder)
    names = denoiser_names(folder)
    check_agreement({name: check_denoiser(folder / name) for name in names}, folder)
    return names


def check_scorer(folder: Path) -> None:
    """Raise PokediffError unless a scorer's configuration and weights fit each other."""
    check_files(folder)
    path, found = folder / "config.json", shapes_of(folder / WEIGHTS)
    given = read_object(path)
    features, timestep = given.get("features"), given.get("timestep")
    if type(features) is not int or found.get("linear.weight") != (1, features):
        raise PokediffError(f"{path}: features is {str(features)[:80]}, {WEIGHTS} holds {found.get('linear.weight')}")
    if not isinstance(timestep, int | float) or not 0 <= timestep <= MOST_TIMESTEPS:
        raise PokediffError(f"{path}: timestep must be 0 to {MOST_TIMESTEPS:,}")
    with torch.device("meta"):
        check_shapes(folder / WEIGHTS, found, Scorer(features))


def check_scores(scorer: Scorer, base: Denoiser) -> None:
    """Raise PokediffError when a scorer was trained on the maps of another denoiser."""
    wanted = feature_count(base.config.widths)
    if scorer.config.features != wanted:
        raise PokediffError(f"scorer: it knows {scorer.config.features} features, but the base has {wanted}")


def check_scheduler(folder: Path) -> None:
    """Raise PokediffError for a schedule that is too long, or no list of numbers."""
    check_files(folder)
    path = folder / "scheduler_config.json"
    values = read_object(path)
    steps, betas = values.get("num_train_timesteps", 1000), values.get("trained_betas")
    if not isinstance(steps, int) or not 1 < steps <= MOST_TIMESTEPS:
        raise PokediffError(f"{path}: num_train_timesteps must be 2 to {MOST_TIMESTEPS:,}")
    numbers = betas is None or (
        isinstance(betas, list)
        and len(betas) == steps
        and all(isinstance(beta, int | float) and 0 <= beta <= 1 for beta in betas)
    )
    if not numbers:
        raise PokediffError(f"{path}: trained_betas must be {steps} numbers between 0 and 1")


def check_steps(scheduler: SchedulerMixin) -> None:
    """Raise PokediffError when the schedule does not lead a few numbers through a few steps, by any sampler: its
    configuration has some fifty keys.
    """
    for sampler in (None, *SAMPLERS):
        try:
            stepping = make_scheduler(scheduler, sampler, 3, torch.device("cpu"))
            x = torch.ones(1, 1, 2, 2) * stepping.init_noise_sigma
            generator = torch.Generator().manual_seed(0)
            for timestep in stepping.timesteps:
                given = {"generator": generator} if "generator" in signature(stepping.step).parameters else {}
                scaled = stepping.scale_model_input(x, timestep)
                x = stepping.step(torch.zeros_like(scaled), timestep, x, **given).prev_sample
        except Exception as error:  # schedulers check with exceptions of many kinds, or not at all
            raise PokediffError(f"scheduler: {sampler or 'it'} takes no steps ({first_line(error)})") from None
        if not torch.isfinite(x).all():
            raise PokediffError(f"scheduler: the steps of {sampler or 'it'} are not finite")


def check_foreign(folder: Path) -> None:
    """Raise PokediffError when the folder of a text model or tokenizer leads to other files, models or code."""
    check_files(folder)
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(".index.json"):
            raise PokediffError(f"{path}: weights in several files are not read: save them as one")
        values = read_object(path) if path.name != "vocab.json" else {}
        if key := next((key for key in values for word in FOREIGN_KEYS if word in key), None):
            raise PokediffError(f"{path}: {key[:80]} is not allowed in a checkpoint: remove the key")
        if path.name == "tokenizer_config.json":
            _check_named_files(values, path)
    if adapter := next(folder.glob("adapter_*"), None):
        raise PokediffError(f"{adapter}: adapters are not read, since they name another model: merge it")


def check_text(folder: Path) -> None:
    """Raise PokediffError unless text_encoder/ and tokenizer/ of a folder are a CLIP text model and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    for part in ("text_encoder", "tokenizer"):
        check_foreign(folder / part)
    path, found = folder / "text_encoder" / "config.json", shapes_of(folder / "text_encoder" / TEXT_WEIGHTS)
    values = read_object(path)
    layers = values.get("num_hidden_layers", 12)
    if not isinstance(layers, int) or not 0 < 8 * layers <= len(found):
        raise PokediffError(f"{path}: num_hidden_layers does not fit {TEXT_WEIGHTS}")
    try:
        with torch.device("meta"):
            network = CLIPTextModelWithProjection(CLIPTextConfig(**values))
    except Exception as error:  # transformers checks with exceptions of many kinds
        raise PokediffError(f"{path}: no CLIP text model of these settings ({first_line(error)})") from None
    check_shapes(folder / "text_encoder" / TEXT_WEIGHTS, found, network, extra=True)


def _check_named_files(values: Mapping[str, Any], path: Path) -> None:
    for key, value in values.items():
        names = value if isinstance(value, list) else [value]
        for name in names if "file" in key and key != "special_tokens_map_file" else ():
            if isinstance(name, str) and (Path(name).name != name or "\\" in name):
                raise PokediffError(f"{path}: {key} names {name[:80]!r}, a file elsewhere: remove the key")
