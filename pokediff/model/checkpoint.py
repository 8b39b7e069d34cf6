"""A pipeline as a folder: safe loading, and the files that diffusers does not write.

A folder is data, inspected (inspection.py) before a library opens it. `PokeDiffPipeline.from_pretrained` never imports
a file of it, whatever its model_index.json says; the `pipeline.py` inside is for
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, which needs one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, Self

import torch
from diffusers import DiffusionPipeline

from pokediff.errors import PokediffError, first_line
from pokediff.model import inspection
from pokediff.model.cascade import Cascade
from pokediff.model.text import ClipTextEncoder, cached_or_downloaded
from pokediff.paths import shipped

INDEX = "model_index.json"
CLASS = "PokeDiffPipeline"
CODE = (
    f"from pokediff import {CLASS}  # noqa: F401 (DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))\n"
)
READ_BESIDE = ("README.md", "words.json", "ATTRIBUTION.md")  # that an export copies
MOST_BASES = 8  # of a part of a part of ...
DATA_FILES = ["*.json", "*.safetensors", "*.txt", "*.md"]  # downloaded from a hub repository; no code, no pickle
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class CheckpointPipeline(DiffusionPipeline):
    """A pipeline with a cascade that is loaded from a folder and saved as one."""

    cascade: Cascade

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """A folder written by training, the name of a shipped one, or a hub repository.

        Weights become float32 unless `dtype` is given. Of a folder that holds a part of a cascade (`base_of`) the base
        is loaded, and the part put into it. No file of the folder is ever imported. Raises PokediffError when there is
        no such folder, or it is no pipeline of ours.
        """
        for code in ("trust_remote_code", "custom_pipeline"):
            kwargs.pop(code, None)
        if kwargs.pop("variant", None) is not None:
            raise PokediffError("variant: a checkpoint has one set of weights; choose their dtype when loading")
        if kwargs.get("dtype", kwargs.get("torch_dtype")) is None:
            kwargs["dtype"] = torch.float32
        kwargs["use_safetensors"] = True  # never a pickle
        folder = find_folder(pretrained_model_name_or_path, kwargs)
        with cannot_be_loaded(folder):
            base = base_of(folder)
        pipeline = cls.from_pretrained(base, **kwargs) if base else None
        with cannot_be_loaded(folder):
            if pipeline is None:
                inspect(folder)
                pipeline = super().from_pretrained(str(folder), **kwargs)
            else:
                part = Cascade.from_pretrained(folder / "cascade", dtype=pipeline.dtype)
                pipeline = pipeline.with_components(cascade=pipeline.cascade.updated(part))
            check_whole(pipeline)
        return pipeline

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers, but without imports of code from the folder."""
        loaded = super().load_config(*args, **kwargs)
        if isinstance(loaded, tuple):
            return checked_index(loaded[0]), *loaded[1:]
        return checked_index(loaded)

    def save_config(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json, the last file of `save_pretrained`, and complete the folder."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        complete(Path(save_directory))


@contextmanager
def cannot_be_loaded(folder: Path) -> Iterator[None]:
    """Make a PokediffError that names the folder of any error: libraries meet a wrong file with all kinds of them."""
    try:
        yield
    except Exception as error:
        raise PokediffError(f"{folder} cannot be loaded: {first_line(error)}") from error


def checked_index(index: dict[str, Any], path: Path = Path(INDEX)) -> dict[str, Any]:
    """The content of a model_index.json, so that loading it runs no code but that of installed libraries.

    Raises PokediffError when a component is of another class than those of `inspection.COMPONENTS`.
    """
    return {**inspection.check_index(index, path), "_class_name": CLASS}


def inspect(folder: Path) -> None:
    """Inspect a whole checkpoint before it is loaded, all but the cascade, which inspects itself when diffusers loads
    it. Raises PokediffError for what is wrong.
    """
    for name in READ_BESIDE:
        inspection.check_file(folder / name, folder)
    index = checked_index(read_index(folder), folder / INDEX)
    inspection.check_scheduler(folder / "scheduler")
    if index.get("text_encoder", [None])[0] is not None:
        inspection.check_text(folder)
    if index.get("scorer", [None])[0] is not None:
        inspection.check_scorer(folder / "scorer")


def check_whole(pipeline: Any) -> None:
    """Raise PokediffError when the loaded parts of a pipeline hold numbers that are not finite, or do not fit each
    other.
    """
    inspection.check_finite("cascade", pipeline.cascade)
    inspection.check_steps(pipeline.scheduler)
    dims = {denoiser.config.text_dim for _, denoiser in pipeline.cascade.items()}
    if pipeline.text_encoder is not None:
        inspection.check_finite("text_encoder", pipeline.text_encoder)
        encoder = ClipTextEncoder(pipeline.text_encoder, pipeline.tokenizer, "of the checkpoint")
        dims.add(encoder(["a"]).pooled.shape[1])
    if pipeline.scorer is not None:
        inspection.check_finite("scorer", pipeline.scorer)
        inspection.check_scores(pipeline.scorer, pipeline.base)
    if len(dims) > 1:
        raise PokediffError(f"text vectors have {' and '.join(map(str, sorted(dims)))} numbers: the parts do not fit")


def find_folder(name: str | Path, options: dict[str, Any]) -> Path:
    """The folder of a checkpoint: `name` itself, a shipped one of that name, or the copy of a hub repository.

    Takes HUB_OPTIONS out of `options`. Raises PokediffError when there is none.
    """
    path, hub = Path(name), {key: options.pop(key) for key in HUB_OPTIONS if key in options}
    for folder in (path, shipped("checkpoints", path.name)) if path.name == str(name) else (path,):
        if (folder / INDEX).is_file():
            return folder
    found = sorted(index.parent.as_posix() for index in Path("checkpoints").glob(f"*/{INDEX}"))
    here = f"checkpoints in {Path.cwd()}: {', '.join(found) or 'none'}"
    ours = path.parts[:1] in (("checkpoints",), ("exports",))  # no user of the hub, but a path from another folder
    if path.is_dir() or path.parent.is_dir() or str(name).count("/") != 1 or ours:
        known = (
            "a baseline, which can only draw" if (path / "baseline.json").is_file() else f"no checkpoint (no {INDEX})"
        )
        raise PokediffError(f"{path} is {known}; {here}")
    from huggingface_hub import snapshot_download

    only_local = hub.pop("local_files_only", False)

    def load(local: bool) -> Path:
        folder = snapshot_download(str(name), local_files_only=local, allow_patterns=DATA_FILES, **hub)
        return Path(folder)

    if only_local:
        try:
            return load(True)
        except OSError:
            raise PokediffError(f"checkpoint {name} is not on this machine; {here}") from None
    return cached_or_downloaded(load, f"checkpoint {name}", here)


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json. Raises PokediffError for one that cannot be read."""
    inspection.check_file(folder / INDEX, folder)
    return inspection.read_object(folder / INDEX)


def base_of(folder: Path) -> Path | None:
    """The folder of the checkpoint that `folder` holds a part of; None for a whole one. Its index names the base: a
    path relative to `folder`, or a name for `find_folder`, which downloads nothing that a stranger's folder names.

    Raises PokediffError when it is not there, or is a part whose base, in the end, is itself.
    """
    bases = [folder]
    while (base := _named_base(bases[-1])) is not None:
        if base.resolve() in [earlier.resolve() for earlier in bases] or len(bases) > MOST_BASES:
            raise PokediffError(f"{folder}: its base, {base}, is itself or a part of it")
        bases.append(base)
    return bases[1] if len(bases) > 1 else None


def _named_base(folder: Path) -> Path | None:
    if not (base := read_index(folder).get("base")):
        return None
    if not isinstance(base, str) or not base.isprintable() or PureWindowsPath(base).anchor:
        raise PokediffError(f"{folder / INDEX}: base must be a name or a relative path, not {str(base)[:80]!r}")
    by_path = base.startswith(".") or (folder / base / INDEX).is_file()
    return find_folder(folder / base if by_path else base, {"local_files_only": True})


def write_part_index(folder: Path, base: str) -> None:
    """Mark `folder` as a part of the checkpoint `base` (see `base_of`)."""
    (folder / INDEX).write_text(json.dumps({"_class_name": CLASS, "base": base}), encoding="utf-8")
    _tidy(folder)


def complete(folder: Path) -> None:
    """Finish a folder that diffusers wrote: add pipeline.py and what names it, and tidy its JSON."""
    index = {**read_index(folder), "_class_name": ["pipeline", CLASS]}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    (folder / "pipeline.py").write_text(CODE, encoding="utf-8")
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Leave out of the configurations of a checkpoint what other programs cannot read, or should not.

    Schedulers have defaults of -Infinity, which is no JSON and is the default again on loading; `_name_or_path` is
    where a model was loaded from.
    """
    for path in (folder / INDEX, *folder.glob("scheduler/*.json"), *folder.glob("cascade/*/config.json")):
        values = json.loads(path.read_text(encoding="utf-8"))
        kept = {name: value for name, value in values.items() if name != "_name_or_path" and not _infinite(value)}
        text = json.dumps(kept, indent=2, sort_keys=True, allow_nan=False) + "\n"
        path.write_text(text, encoding="utf-8")


def quiet() -> None:
    """No progress bars of diffusers and transformers for files that load at once."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
