"""export(checkpoint, out): the network and its text encoder as ONNX, for a machine or a language without PyTorch.

    unet/model.onnx, and refiner/model.onnx and upscaler/model.onnx of a checkpoint that has one
                             x (B, C, H, W), timestep (B,), text (B, D) -> output (B, C, H, W), float32;
                             the upscaler also low_res (B, C, H/f, W/f)
    text_encoder/model.onnx  input_ids (N, L), attention_mask (N, L) int64 -> pooled (N, D), unit vectors

Everything else of the checkpoint (tokenizer, noise schedule, configurations) is copied, so the folder is a checkpoint
too: `sample.py --checkpoint FOLDER` draws with ONNX Runtime. Whether both draw the same is tried before export returns.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from pokediff.errors import PokediffError
from pokediff.model.pipeline import PokeDiffPipeline
from pokediff.model.text import ClipTextEncoder

MODEL = "model.onnx"
OPSET = 18
TOLERANCE = 2  # of 255: float32 adds in another order elsewhere; more means another picture
MISSING = "is not installed: pip install 'pokediff[onnx]'"


class TextVectors(nn.Module):
    """What `ClipTextEncoder` does after the tokenizer, in one graph."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(self.model(input_ids, attention_mask).text_embeds, dim=-1)


class OnnxUnet(nn.Module):
    """An exported network that stands in for `unet.Unet`: the same call, float32 on the CPU, by ONNX Runtime."""

    def __init__(self, path: Path, config: Any, null_text: torch.Tensor) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise PokediffError(f"onnxruntime {MISSING}") from None
        self.config, self.dtype, self.device = config, torch.float32, torch.device("cpu")
        self.register_buffer("null_text", null_text)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path.as_posix(), options, providers=["CPUExecutionProvider"])

    def forward(
        self,
        x: torch.Tensor,
        timestep: torch.Tensor | float,
        text: torch.Tensor,
        augment: None = None,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `Unet.forward`, without augmentation."""
        timesteps = torch.as_tensor(timestep, dtype=torch.float32).expand(len(x)).contiguous()
        values = {"x": x, "timestep": timesteps, "text": text} | ({} if low_res is None else {"low_res": low_res})
        given = {name: value.float().contiguous().numpy() for name, value in values.items()}
        (output,) = self.session.run(None, given)
        return torch.from_numpy(output)


def export(checkpoint: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the exported checkpoint to `out`. Returns what was tried: {"largest_difference": 0 to 255, ...}.

    Raises PokediffError when the checkpoint cannot be read, `out` is it, onnx is not installed, or the exported network
    draws another picture (more than TOLERANCE levels apart anywhere).
    """
    try:
        import onnxscript  # noqa: F401 (torch needs it and says so in many lines)
    except ImportError:
        raise PokediffError(f"onnxscript {MISSING}") from None
    checkpoint, out = Path(checkpoint), Path(out)
    if checkpoint.resolve() == out.resolve():
        raise PokediffError(f"{out} is the checkpoint itself: choose another --out")
    pipeline = PokeDiffPipeline.from_pretrained(checkpoint)
    if not checkpoint.is_dir():
        raise PokediffError(f"{checkpoint} is of the hub: export a folder, into which you have downloaded it")
    for name, part in pipeline.components.items():  # a run's folder holds much else
        if part is not None:
            weights = shutil.ignore_patterns("diffusion_pytorch_model*")
            shutil.copytree(checkpoint / name, out / name, dirs_exist_ok=True, ignore=weights)
    for name in ("model_index.json", "README.md"):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    vector = pipeline.unet.null_text

    batch = torch.export.Dim("batch")
    for name, network in pipeline.networks.items():
        side, upscale = network.config.image_size, network.config.upscale
        x = torch.zeros(2, network.config.in_channels, side, side)
        example = {"x": x, "timestep": torch.zeros(2), "text": vector.expand(2, -1).contiguous()}
        if upscale > 1:
            example["low_res"] = x[..., ::upscale, ::upscale].contiguous()
        _write(network, example, ["output"], {name: {0: batch} for name in example}, out / name / MODEL)
    np.savetxt(out / "unet" / "null_text.txt", vector.numpy()[None])
    if pipeline.text_encoder is not None:
        length = pipeline.text_encoder.config.max_position_embeddings
        ids = torch.full((2, length), pipeline.tokenizer.eos_token_id)
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tokens = torch.export.Dim("tokens", min=2, max=length)
        sizes = {name: {0: batch, 1: tokens} for name in texts}
        _write(TextVectors(pipeline.text_encoder), texts, ["pooled"], sizes, out / "text_encoder" / MODEL)

    options: dict[str, Any] = {"num_steps": 8, "precision": "fp32"}
    prompts = ["a blue water turtle", "a red fire dragon, pixel sprite"]
    expected = pipeline.generate(prompts, [0, 1], **options)
    drawn = load_exported(out).generate(prompts, [0, 1], **options)
    difference = int(np.abs(drawn.astype(int) - expected).max())
    if difference > TOLERANCE:
        raise PokediffError(f"{out} draws another picture than {checkpoint}: {difference} of 255 levels apart")
    size = sum((out / name / MODEL).stat().st_size for name in pipeline.networks)
    return {"largest_difference": difference, "megabytes": round(size / 1e6, 1)}


def _write(
    module: nn.Module, example: dict[str, torch.Tensor], outputs: list[str], sizes: dict[str, Any], path: Path
) -> None:
    """One graph, weights inside, batch and text length free."""
    module.eval()
    program = torch.onnx.export(
        module,
        (),
        kwargs=example,
        input_names=list(example),
        output_names=outputs,
        dynamic_shapes=sizes,
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    if program is None:  # only without dynamo
        raise PokediffError(f"{path} was not written")
    program.save(path.as_posix(), external_data=False)


def is_exported(checkpoint: str | Path) -> bool:
    return (Path(checkpoint) / "unet" / MODEL).is_file()


def load_exported(folder: str | Path) -> PokeDiffPipeline:
    """The pipeline of an exported checkpoint: our loop, schedulers and text encoder around ONNX Runtime's network.

    Raises PokediffError when onnxruntime is not installed.
    """
    folder = Path(folder)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    vector = torch.from_numpy(np.loadtxt(folder / "unet" / "null_text.txt", dtype=np.float32))

    def network(name: str) -> Any:
        config = FrozenDict(json.loads((folder / name / "config.json").read_text(encoding="utf-8")))
        return OnnxUnet(folder / name / MODEL, config, vector)

    unet = network("unet")
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    settings = {name: index[name] for name in PokeDiffPipeline.settings if name in index}
    for name in ("refiner", "upscaler"):
        if (folder / name / MODEL).is_file():
            settings[name] = network(name)
    if (name := index["text_encoder_name"]) != "builtin":
        return PokeDiffPipeline(unet, scheduler, **settings)
    encoder = ClipTextEncoder.from_folder(folder, name)
    return PokeDiffPipeline(unet, scheduler, encoder.model, encoder.tokenizer, **settings)
