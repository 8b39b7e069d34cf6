"""export(checkpoint, out): a checkpoint as ONNX, for a machine or a language without PyTorch.

    cascade/config.json             names of the denoisers, in their order
    cascade/<name>/config.json      size, range of noise, default steps and guidance scale; above sigma 10 a client must
                                    multiply (guidance scale - 1) by high_noise_guidance
    cascade/<name>/model.onnx       inputs:  x (B, C, S, S) noisy pictures of unit variance,
                                             timestep (B,) 0 to num_train_timesteps - 1,
                                             text (B, D) unit vectors,
                                             of an upscaler also low_res (B, C, S/f, S/f), the small pictures
                                    output:  x0 (B, C, S, S) clean pictures, about [-1, 1]; all float32
    cascade/null_text.txt           the text vector of the empty prompt
    text_encoder/model.onnx         inputs:  input_ids, attention_mask (N, L) int64
                                    output:  pooled (N, D) unit vectors, float32

Tokenizer, noise schedule and PyTorch's text encoder are copied, so the folder is a checkpoint too: `pokediff sample
--checkpoint FOLDER` runs the denoisers by ONNX Runtime. The export is verified before `export` returns.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from pokediff.config import Sampling
from pokediff.data.images import premultiply
from pokediff.data.vocabulary import ATTRIBUTION, WORDS
from pokediff.errors import PokediffError, first_line
from pokediff.files import aside, move_whole, own_folder, write_whole
from pokediff.model import inspection
from pokediff.model.cascade import LIST, Cascade, write_list
from pokediff.model.checkpoint import (
    INDEX,
    base_of,
    cannot_be_loaded,
    check_whole,
    checked_index,
    find_folder,
    read_index,
)
from pokediff.model.denoiser import Denoiser
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.model.text import ClipTextEncoder

MODEL = "model.onnx"
NULL_TEXT = "null_text.txt"
TEMPORARY = ".export.tmp"  # folder in the output folder; marks that of a killed run as ours
OPSET = 18
SMALLEST_STORED = 256  # numbers of a tensor that is worth another node
LARGEST_MULTIPLE = 127  # of a step, in int8
SAMPLE = 16  # weights of a row from which its step is guessed
TOLERANCE = 2  # of 255 levels: float32 sums in another order
MISSING = "is not installed: pip install 'pokediff[onnx]'"


class TextVectors(nn.Module):
    """`ClipTextEncoder` after the tokenizer, in one graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.model(input_ids, attention_mask).text_embeds, dim=-1)


class OnnxDenoiser(nn.Module):
    """An exported denoiser in place of a `Denoiser`: the same call, float32 on the CPU, by ONNX Runtime."""

    def __init__(self, path: Path, config: FrozenDict, null_text: torch.Tensor) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise PokediffError(f"onnxruntime {MISSING}") from None
        self.config, self.dtype, self.device = config, torch.float32, torch.device("cpu")
        self.register_buffer("null_text", null_text)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.path = path
        try:
            self.session = onnxruntime.InferenceSession(path.as_posix(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common class
            raise PokediffError(f"{path} cannot be read: {first_line(error)}") from None
        names = {"x", "timestep", "text"} | ({"low_res"} if config.upscale > 1 else set())
        if {value.name for value in self.session.get_inputs()} != names or len(self.session.get_outputs()) != 1:
            raise PokediffError(f"{path}: its inputs are not {', '.join(sorted(names))}: export the checkpoint again")

    @property
    def below(self) -> float:
        """As `Denoiser.below`."""
        return math.inf if self.config.below is None else self.config.below

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | float,
        text: torch.Tensor,
        augment: None = None,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Denoiser.forward`, without augmentation labels."""
        timesteps = torch.as_tensor(timestep, dtype=torch.float32).expand(len(x))
        values = {"x": x, "timestep": timesteps, "text": text} | ({} if low_res is None else {"low_res": low_res})
        try:
            (x0,) = self.session.run(None, {name: value.float().contiguous().numpy() for name, value in values.items()})
        except Exception as error:
            raise PokediffError(f"{self.path} cannot be run: {first_line(error)}") from None
        if x0.shape != tuple(x.shape) or x0.dtype != np.float32:
            raise PokediffError(f"{self.path} returns {x0.dtype} {x0.shape}, not float32 {tuple(x.shape)}")
        return torch.from_numpy(x0)


def export(
    checkpoint: str | Path, out: str | Path, size: int | None = None, small: bool = False, fast: bool | None = None
) -> dict[str, Any]:
    """Write a checkpoint to `out` as ONNX: all denoisers, or those that drawings of `size` px need; with `fast` those
    that fast drawings need, if it is false the others. With `small` weights are stored as float16, or in 8 bits where
    that loses nothing, and computed in float32.

    Returns {"largest_difference": levels of 255 between drawings of both, "megabytes": of the denoisers}. Raises
    PokediffError when the checkpoint cannot be read or does not draw `size`, `out` is the checkpoint or holds other
    files, onnxscript or onnxruntime is not installed, or drawings differ by more than TOLERANCE levels anywhere.

    The files come to their places when all is verified: after a kill, `out` is as it was, or partly new and whole.
    """
    try:
        import onnxscript  # noqa: F401 (torch needs it, and would say so in many lines)
    except ImportError:
        raise PokediffError(f"onnxscript {MISSING}") from None
    folder, out = find_folder(checkpoint, {}), Path(out)
    if folder.resolve() == out.resolve():
        raise PokediffError(f"{out} is the checkpoint itself: choose another --out")
    pipeline = PokeDiffPipeline.from_pretrained(folder)
    sizes = pipeline.sizes if size is None else pipeline.cascade.legs(size)
    names = [name for name, denoiser in pipeline.cascade.items() if denoiser.config.image_size in sizes]
    if fast is not None:
        used = {step.denoiser for size in sizes for step in pipeline.evaluations(Sampling(size=size, fast=fast))}
        names = [name for name in names if name in used]
    with own_folder(out, INDEX, TEMPORARY), aside(out / TEMPORARY, INDEX) as new:
        facts = _export(pipeline, folder, new, names, small)
        move_whole(new, out, last=(f"cascade/{LIST}", INDEX))
    return facts


def _export(pipeline: PokeDiffPipeline, folder: Path, out: Path, names: list[str], small: bool) -> dict[str, Any]:
    """Write and verify all files in the new folder `out`. Returns what `export` returns."""
    copy_components(folder, out)
    for name in names:
        write_denoiser(pipeline.cascade[name], out / "cascade" / name)
    write_list(out / "cascade", names)
    np.savetxt(out / "cascade" / NULL_TEXT, pipeline.base.null_text.numpy()[None])
    if pipeline.text_encoder is not None:
        write_text_encoder(pipeline, out / "text_encoder" / MODEL)
    for path in out.glob(f"**/{MODEL}") if small else ():
        store_small(path)
    difference = largest_difference(pipeline, load_exported(out))
    if difference > TOLERANCE:
        raise PokediffError(f"the export draws another picture than {folder}: {difference} of 255 levels apart")
    megabytes = sum((out / "cascade" / name / MODEL).stat().st_size for name in names) / 1e6
    return {"largest_difference": difference, "megabytes": round(megabytes, 1)}


def copy_components(folder: Path, out: Path) -> None:
    """Copy the components of a checkpoint (of its base, for a part) other than its denoisers."""
    while base := base_of(folder):
        folder = base
    for name in ("scheduler", "tokenizer", "text_encoder"):
        if (folder / name).is_dir():
            shutil.copytree(folder / name, out / name, dirs_exist_ok=True)
    for name in (INDEX, "README.md", WORDS, ATTRIBUTION):
        if (folder / name).is_file():
            out.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, out / name)


def write_denoiser(denoiser: Denoiser, folder: Path) -> None:
    """model.onnx and config.json of one denoiser."""
    config, batch = denoiser.config, torch.export.Dim("batch")
    x = torch.zeros(2, config.in_channels, config.image_size, config.image_size)
    example = {"x": x, "timestep": torch.zeros(2), "text": denoiser.null_text.expand(2, -1).contiguous()}
    if config.upscale > 1:
        example["low_res"] = x[..., :: config.upscale, :: config.upscale].contiguous()
    denoiser.save_config(folder)
    _write(denoiser, example, "x0", {name: {0: batch} for name in example}, folder / MODEL)


def write_text_encoder(pipeline: PokeDiffPipeline, path: Path) -> None:
    model, batch = pipeline.text_encoder, torch.export.Dim("batch")
    length = model.config.max_position_embeddings
    ids = torch.full((2, length), pipeline.tokenizer.eos_token_id)
    tokens = torch.export.Dim("tokens", min=2, max=length)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    _write(TextVectors(model), example, "pooled", {name: {0: batch, 1: tokens} for name in example}, path)


def _write(module: nn.Module, example: dict[str, torch.Tensor], output: str, sizes: dict[str, Any], path: Path) -> None:
    """One graph with its weights; `sizes` names the dimensions that are free."""
    with warnings.catch_warnings(action="ignore"):  # of names that two inputs share
        program = torch.onnx.export(
            module.eval(),
            (),
            kwargs=example,
            input_names=list(example),
            output_names=[output],
            dynamic_shapes=sizes,
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    if program is None:  # only without dynamo
        raise PokediffError(f"{path} was not written")
    program.save(path.as_posix(), external_data=False)


def store_small(path: Path) -> None:
    """Store the weights of an ONNX file in 16 or 8 bits, each with nodes that make it float32 again, which runtimes
    compute when they load it. Nothing is lost of a checkpoint whose weights are float16 already: 8 bits take those that
    are whole multiples of a step a row (scripts/round_weights.py).
    """
    import onnx

    model, added = onnx.load(path.as_posix()), []
    for tensor in list(model.graph.initializer):
        if tensor.data_type != onnx.TensorProto.FLOAT or math.prod(tensor.dims) < SMALLEST_STORED:
            continue
        name, values = tensor.name, onnx.numpy_helper.to_array(tensor)
        if parts := in_steps(values):
            multiples, steps = (onnx.numpy_helper.from_array(part, f"{name}.{i}") for i, part in enumerate(parts))
            tensor.CopyFrom(multiples)
            model.graph.initializer.append(steps)
            added += [
                onnx.helper.make_node("Cast", [multiples.name], [f"{name}.float"], to=onnx.TensorProto.FLOAT),
                onnx.helper.make_node("Mul", [f"{name}.float", steps.name], [name]),
            ]
        else:
            limit = np.finfo(np.float16).max
            tensor.CopyFrom(onnx.numpy_helper.from_array(values.clip(-limit, limit).astype(np.float16), f"{name}.half"))
            added.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*added, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    write_whole(path, model.SerializeToString())


def in_steps(values: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """int8 multiples and float32 steps, of one step a row or, of a transposed matrix, a column, whose float32 products
    are exactly `values`; None where there are none.
    """
    for axis in range(2 if values.ndim > 1 else 0):
        rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
        largest = np.abs(rows).max(axis=1)
        steps = np.zeros_like(largest)
        for most in range(LARGEST_MULTIPLE, 0, -1):  # the multiple of a row's largest weight is not known
            step = largest / np.float32(most)  # exact, where that is the multiple
            fits = (multiples(rows[:, :SAMPLE], step) * step[:, None] == rows[:, :SAMPLE]).all(axis=1)
            steps = np.where((steps == 0) & fits, step, steps)
        whole = multiples(rows, steps)
        if (whole * steps[:, None] == rows).all():
            shape = [-1 if index == axis else 1 for index in range(values.ndim)]
            back = np.moveaxis(whole.reshape(np.moveaxis(values, axis, 0).shape), 0, axis)
            return np.ascontiguousarray(back, np.int8), steps.reshape(shape)
    return None


def multiples(rows: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Rows (N, M) in whole multiples of their steps (N,), rounded; a step of 0 gives 0."""
    return np.rint(rows / np.where(steps, steps, np.float32(np.inf))[:, None])


def largest_difference(whole: PokeDiffPipeline, exported: PokeDiffPipeline) -> int:
    """The largest difference between premultiplied drawings of two pipelines at any pixel, 0 to 255, in all ways in
    which the exported one can draw. (Where a pixel is faint, its straight colour magnifies a difference that cannot be
    seen.)
    """
    prompts = ["a blue water turtle", "a red fire dragon, pixel sprite"]
    largest = 0
    for size, fast in itertools.product(exported.sizes, (False, True) if exported.has_fast else (False,)):
        sampling = Sampling(size=size, num_inference_steps=8, precision="fp32", fast=fast)
        if not {step.denoiser for step in whole.evaluations(sampling)} <= set(exported.cascade):
            continue
        drawn, expected = (
            premultiply(pipeline.generate(prompts, [0, 1], sampling)).astype(int) for pipeline in (whole, exported)
        )
        largest = max(largest, int(np.abs(drawn - expected).max()))
    return largest


def is_exported(folder: str | Path) -> bool:
    """Whether a folder was written by `export`."""
    return next(Path(folder).glob(f"cascade/*/{MODEL}"), None) is not None


def load_exported(folder: str | Path) -> PokeDiffPipeline:
    """The pipeline of an exported checkpoint: its denoisers run by ONNX Runtime, which reads no weights outside of the
    folder of a file. Raises PokediffError when that is not installed, or a file is missing or wrong.
    """
    folder = Path(folder)
    with cannot_be_loaded(folder):
        return _load_exported(folder, folder / "cascade")


def _load_exported(folder: Path, cascade: Path) -> PokeDiffPipeline:
    index = checked_index(read_index(folder), folder / INDEX)
    inspection.check_files(cascade)
    inspection.check_scheduler(folder / "scheduler")
    denoisers, facts = {}, {}
    for name in inspection.denoiser_names(cascade):
        if not (cascade / name / MODEL).is_file():
            raise PokediffError(f"{cascade / name / MODEL} not found: export the checkpoint again")
        model, facts[name] = inspection.read_settings(cascade / name / "config.json")
        config = FrozenDict({**dataclasses.asdict(model), **dataclasses.asdict(facts[name])})
        null_text = read_null_text(cascade / NULL_TEXT, facts[name].text_dim)
        denoisers[name] = OnnxDenoiser(cascade / name / MODEL, config, null_text)
    inspection.check_agreement(facts, cascade)
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    settings = {name: index[name] for name in PokeDiffPipeline.settings if name in index}
    if not (folder / "text_encoder").is_dir():
        return PokeDiffPipeline(Cascade(denoisers), scheduler, **settings)
    encoder = ClipTextEncoder.from_folder(folder, index.get("text_encoder_name", "builtin"))
    pipeline = PokeDiffPipeline(Cascade(denoisers), scheduler, encoder.model, encoder.tokenizer, **settings)
    check_whole(pipeline)
    return pipeline


def read_null_text(path: Path, dim: int) -> torch.Tensor:
    """The vector (D,) of the empty prompt. Raises PokediffError for other than `dim` finite numbers."""
    try:
        vector = np.loadtxt(path, dtype=np.float32, max_rows=1, ndmin=1)
    except (ValueError, OSError) as error:
        raise PokediffError(f"{path}: {first_line(error)}") from None
    if vector.shape != (dim,) or not np.isfinite(vector).all():
        raise PokediffError(f"{path} holds no {dim} finite numbers: export the checkpoint again")
    return torch.from_numpy(vector)
