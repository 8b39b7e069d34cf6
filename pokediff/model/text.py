"""Text encoders: prompts to vectors.

    encode = load_text_encoder("builtin")
    encode(["a blue water turtle"]).pooled  # (1, 384)

An encoder is named by a string `kind:details`; ENCODERS is the table of kinds. To add one, write a class with `name`,
`dim`, `max_tokens` and `__call__`, and a line in ENCODERS.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F

from pokediff.errors import PokediffError, first_line
from pokediff.files import write_whole
from pokediff.model.inspection import check_text
from pokediff.paths import shipped

T = TypeVar("T")
BUILTIN_FOLDER = shipped("checkpoints", "pokediff")
ALTERNATIVES = 'use "builtin", which needs no download, or give a local folder or file'


@dataclass(frozen=True)
class TextEmbedding:
    """The vectors of N prompts, float32; `mask` is 1 for each of the L tokens and 0 for padding."""

    pooled: torch.Tensor  # (N, D), unit length
    tokens: torch.Tensor  # (N, L, D)
    mask: torch.Tensor  # (N, L)


class TextEncoder(Protocol):
    """Prompts to vectors. Words beyond `max_tokens` tokens are cut, with a warning."""

    name: str  # as given to load_text_encoder
    dim: int  # D
    max_tokens: int  # the largest L, start and end marks included

    def __call__(self, prompts: Sequence[str]) -> TextEmbedding: ...


class ClipTextEncoder:
    """A transformers CLIPTextModelWithProjection with its tokenizer: OpenAI's CLIP, and our own small one."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.dim: int = model.config.projection_dim
        self.max_tokens: int = model.config.max_position_embeddings
        if len(tokenizer) < 0.9 * model.config.vocab_size:
            # transformers makes an empty tokenizer, without an error, where it finds no files
            raise PokediffError(f"text encoder {name}: its tokenizer files are missing; {ALTERNATIVES}")
        if max(tokenizer.get_vocab().values(), default=0) >= model.config.vocab_size:
            raise PokediffError(f"text encoder {name}: its tokenizer knows words that the model does not")

    @classmethod
    def from_folder(cls, folder: Path, name: str) -> ClipTextEncoder:
        """Load from a folder with `text_encoder/` and `tokenizer/`, as in a diffusers pipeline."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        if not (folder / "text_encoder" / "config.json").is_file() or not (folder / "tokenizer").is_dir():
            raise PokediffError(f"text encoder {name}: {folder} has no text_encoder/ and tokenizer/")
        check_text(folder)
        only = {"local_files_only": True}
        model = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", use_safetensors=True, **only)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", **only)
        return cls(model.float(), tokenizer, name)

    @classmethod
    def builtin(cls, checkpoint: str) -> ClipTextEncoder:
        """`builtin`: the encoder of the default checkpoint; `builtin:creatures`: that of another shipped one."""
        if not checkpoint:
            return cls.from_folder(BUILTIN_FOLDER, "builtin")
        return cls.from_folder(shipped("checkpoints", checkpoint), f"builtin:{checkpoint}")

    @classmethod
    def from_hub(cls, repository: str) -> ClipTextEncoder:
        """`clip:openai/clip-vit-base-patch32`, or `clip:FOLDER` with a model and its tokenizer in one folder."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        name = f"clip:{repository}"

        def load(local: bool) -> ClipTextEncoder:
            model = CLIPTextModelWithProjection.from_pretrained(
                repository, local_files_only=local, use_safetensors=True
            )
            tokenizer = CLIPTokenizer.from_pretrained(repository, local_files_only=local)
            return cls(model.float(), tokenizer, name)

        return cached_or_downloaded(load, f"text encoder {name}", ALTERNATIVES)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        batch = self.tokenizer(list(prompts), padding=True, return_tensors="pt")
        ids, mask = batch["input_ids"], batch["attention_mask"]  # (N, L)
        if ids.shape[1] > self.max_tokens:
            _warn_cut(prompts[int(mask.sum(1).argmax())], self.max_tokens)
            ids, mask = ids[:, : self.max_tokens].clone(), mask[:, : self.max_tokens]
            ids[mask[:, -1] == 1, -1] = self.tokenizer.eos_token_id  # CLIP reads its vector off the end mark
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        output = self.model(input_ids=ids, attention_mask=mask)
        tokens = self.model.text_projection(output.last_hidden_state)  # (N, L, D)
        return TextEmbedding(F.normalize(output.text_embeds.float(), dim=-1), tokens.float(), mask.float())


class OpenClipTextEncoder:
    """The text half of an open_clip model."""

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.model, self.tokenizer, self.name = model.eval(), tokenizer, name
        self.text = getattr(model, "text", model)  # some models keep their text half apart
        self.max_tokens: int = tokenizer.context_length
        self.dim: int = self(["a"]).pooled.shape[1]

    @classmethod
    def from_hub(cls, details: str) -> OpenClipTextEncoder:
        """`open_clip:ARCHITECTURE:TAG`, `open_clip:ARCHITECTURE:FILE.safetensors` or `open_clip:local-dir:FOLDER`."""
        import open_clip

        name = f"open_clip:{details}"
        architecture, _, tag = details.partition(":")
        if architecture == "local-dir":
            architecture, weights = f"local-dir:{tag}", None
            if not (Path(tag) / "open_clip_config.json").is_file():
                raise PokediffError(f"text encoder {name}: {tag} has no open_clip_config.json")
        elif Path(tag).suffix == ".safetensors":
            weights = tag
            if not Path(tag).is_file():
                raise PokediffError(f"text encoder {name}: {tag} does not exist")
        else:
            config = open_clip.get_pretrained_cfg(architecture, tag)
            if not config.get("hf_hub"):
                known = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none: unknown architecture"
                raise PokediffError(f"text encoder {name}: no such weights on the hub (tags: {known})")
            from huggingface_hub import hf_hub_download

            hub = partial(hf_hub_download, config["hf_hub"].rstrip("/"), "open_clip_model.safetensors")
            weights = cached_or_downloaded(
                lambda local: hub(local_files_only=local), f"text encoder {name}", ALTERNATIVES
            )
        try:
            model = open_clip.create_model(architecture, pretrained=weights)
            tokenizer = open_clip.get_tokenizer(architecture)
        except (RuntimeError, ValueError, OSError) as error:
            raise PokediffError(f"text encoder {name} could not be loaded: {first_line(error)}") from error
        model.visual = None  # only the text half is needed
        return cls(model, tokenizer, name)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str]) -> TextEmbedding:
        ids = self.tokenizer(list(prompts))  # (N, L)
        mask = torch.arange(ids.shape[1]) <= ids.argmax(1, keepdim=True)  # the end mark has the largest id
        if mask.all(1).any():
            _warn_cut(prompts[int(mask.sum(1).argmax())], self.max_tokens)
        hidden: list[torch.Tensor] = []
        hook = self.text.ln_final.register_forward_hook(lambda _module, _input, output: hidden.append(output))
        try:
            pooled = self.model.encode_text(ids)
        finally:
            hook.remove()
        projection = self.text.text_projection
        tokens = projection(hidden[0]) if isinstance(projection, torch.nn.Module) else hidden[0] @ projection
        return TextEmbedding(F.normalize(pooled.float(), dim=-1), tokens.float(), mask.float())


ENCODERS: dict[str, Callable[[str], TextEncoder]] = {
    "builtin": ClipTextEncoder.builtin,
    "clip": ClipTextEncoder.from_hub,
    "open_clip": OpenClipTextEncoder.from_hub,
}


def load_text_encoder(name: str) -> TextEncoder:
    """An encoder by its name: "builtin", "builtin:CHECKPOINT", "clip:REPOSITORY", "open_clip:ARCHITECTURE:TAG".

    Raises PokediffError, in one line that names the alternative, for an unknown kind and files that cannot be reached.
    """
    kind, _, details = name.partition(":")
    if kind not in ENCODERS:
        raise PokediffError(f"text encoder {name!r}: unknown kind, there are {', '.join(ENCODERS)}")
    return ENCODERS[kind](details)


def encoder_files(name: str) -> list[Path]:
    """The files and folders of an encoder; those of the hub, which its name alone identifies, are not listed."""
    kind, _, details = name.partition(":")
    folder = shipped("checkpoints", details) if details else BUILTIN_FOLDER
    if kind == "builtin":
        return [folder / "text_encoder", folder / "tokenizer"]
    return [path for path in (Path(details), Path(details.partition(":")[2])) if path.name and path.exists()]


def encoder_sha256(name: str) -> str:
    """Of the contents of `encoder_files`: one name may get other weights."""
    places = encoder_files(name)
    files = [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*.*")))]
    return sha256(b"".join(sha256(path.read_bytes()).digest() for path in files if path.is_file())).hexdigest()


def cached_or_downloaded(load: Callable[[bool], T], what: str, otherwise: str) -> T:
    """load(local=True), else load(local=False) if the hub answers: without it the client would retry for minutes.

    Raises PokediffError, "<what>: ... cannot be reached; <otherwise>".
    """
    try:
        return load(True)
    except (OSError, PokediffError):
        pass  # not on this machine yet
    import requests
    from huggingface_hub import constants

    try:
        requests.head(constants.ENDPOINT, timeout=5)
    except requests.RequestException:
        raise PokediffError(f"{what}: {constants.ENDPOINT} cannot be reached; {otherwise}") from None
    try:
        return load(False)
    except OSError as error:
        raise PokediffError(f"{what} could not be downloaded: {first_line(error)}") from error


def _warn_cut(prompt: str, max_tokens: int) -> None:
    warnings.warn(f"only the first {max_tokens} tokens are read of {prompt[:60]!r}…", stacklevel=3)


# ------------------------------------------------------------------------------------------- vectors of a data set


def encode_captions(
    encoder: TextEncoder,
    captions: Sequence[str],
    batch_size: int = 256,
    progress: Callable[[Iterable], Iterable] = iter,
) -> torch.Tensor:
    """The pooled vectors of many captions, float32 (N, D), in their order; `progress`, e.g. tqdm, wraps the loop."""
    order = sorted(range(len(captions)), key=lambda index: len(captions[index]))  # similar lengths need little padding
    pooled = torch.empty(len(captions), encoder.dim)
    for start in progress(range(0, len(order), batch_size)):
        part = order[start : start + batch_size]
        pooled[part] = encoder([captions[index] for index in part]).pooled
    return pooled


def embeddings_path(folder: str | Path, encoder_name: str) -> Path:
    """The file of the vectors of a data set: FOLDER/embeddings-<encoder>.safetensors."""
    slug = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in encoder_name)
    return Path(folder) / f"embeddings-{slug}.safetensors"


def save_embeddings(path: Path, encoder_name: str, captions: Sequence[str], pooled: torch.Tensor) -> None:
    """One file: tensor `pooled` (N, D) float16, and in its metadata the encoder's name and digest and the captions."""
    from safetensors.torch import save

    metadata = {
        "encoder": encoder_name,
        "encoder_sha256": encoder_sha256(encoder_name),
        "captions": json.dumps(list(captions), ensure_ascii=False),
    }
    write_whole(path, save({"pooled": pooled.half()}, metadata))


class OtherWeights(Exception):
    """The vectors of a file come from an encoder of the same name, but with other weights."""


def load_embeddings(path: Path, encoder_name: str) -> dict[str, torch.Tensor]:
    """{caption: vector (D,) float32}, empty without a file.

    Raises PokediffError for the file of another encoder, and OtherWeights.
    """
    from safetensors import safe_open

    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        pooled = file.get_tensor("pooled").float()
    if metadata["encoder"] != encoder_name:
        raise PokediffError(f"{path} was made by {metadata['encoder']}, not by {encoder_name}: delete it")
    if metadata.get("encoder_sha256") != encoder_sha256(encoder_name):
        raise OtherWeights(f"{path} was made with other weights of {encoder_name}")
    return dict(zip(json.loads(metadata["captions"]), pooled, strict=True))
