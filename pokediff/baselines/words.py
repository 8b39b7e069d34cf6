"""Word vectors: a text model of transformers with its tokenizer, trained on with the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pokediff.errors import PokediffError, first_line
from pokediff.model.inspection import check_foreign
from pokediff.paths import shipped

MAX_TOKENS = 64
PAD = -1  # in place of the tokenizer's own padding, which for CLIP is its end mark


class WordEncoder(nn.Module):
    """Token ids to one vector a token: BERT, or the text half of our built-in CLIP."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.dim: int = model.config.hidden_size
        self.causal: bool = model.config.model_type.startswith("clip")  # its last token has seen the whole prompt

    @classmethod
    def load(cls, name: str) -> WordEncoder:
        """`builtin`, `builtin:CHECKPOINT`, `bert:FOLDER` (a BertModel with its tokenizer), or `baseline:FOLDER`.

        Raises PokediffError when it cannot be loaded.
        """
        kind, _, details = name.partition(":")
        if kind == "builtin":
            folder = shipped("checkpoints", details or "pokediff")
            return cls.read(folder / "text_encoder", folder / "tokenizer", name)
        if kind == "bert":
            return cls.read(Path(details), Path(details), name)
        if kind == "baseline":
            return cls.read(Path(details) / "text_encoder", Path(details) / "tokenizer", name)
        raise PokediffError(f"words {name!r}: unknown kind; use builtin, builtin:CHECKPOINT or bert:FOLDER")

    @classmethod
    def read(cls, model: Path, tokenizer: Path, name: str) -> WordEncoder:
        from transformers import AutoConfig, AutoTokenizer, BertModel, CLIPTextModelWithProjection

        if not (model / "config.json").is_file():
            raise PokediffError(f"words {name!r}: {model} holds no text model; use builtin or bert:FOLDER")
        try:
            for folder in {model, tokenizer}:
                check_foreign(folder)
            only = {"local_files_only": True, "trust_remote_code": False}
            bert = AutoConfig.from_pretrained(model, **only).model_type == "bert"
            kind = BertModel if bert else CLIPTextModelWithProjection
            network = kind.from_pretrained(model, local_files_only=True, dtype=torch.float32, use_safetensors=True)
            return cls(network, AutoTokenizer.from_pretrained(tokenizer, **only))
        except PokediffError:
            raise
        except Exception as error:  # transformers meets a wrong file with errors of many kinds
            raise PokediffError(f"words {name!r} could not be loaded: {first_line(error)}") from None

    def save(self, folder: Path) -> None:
        """Write FOLDER/text_encoder and FOLDER/tokenizer, in transformers' format."""
        self.model.save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")

    def ids(self, prompts: Sequence[str]) -> torch.Tensor:
        """(N, L) int64 token ids, start and end marks included, PAD behind them; L is at most MAX_TOKENS."""
        found = self.tokenizer(list(prompts), truncation=True, max_length=MAX_TOKENS)["input_ids"]
        rows = [torch.tensor(row) for row in found]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)

    def tokens(self, prompt: str) -> list[str]:
        """The tokens of a prompt as text, one for each column of `ids`."""
        return [self.tokenizer.decode([token]).strip() for token in self.ids([prompt])[0]]

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(N, L, D) vectors of tokens (N, L) in their sentence."""
        mask = ids != PAD
        return self.model(input_ids=ids.clamp(min=0), attention_mask=mask.long()).last_hidden_state

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(N, L, D) vectors of tokens and their places, before any attention."""
        table = self.model.text_model.embeddings if self.causal else self.model.embeddings
        return table(ids.clamp(min=0))

    def summary(self, ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(N, D) of tokens (N, L, D): BERT's first one, [CLS], or the end mark of CLIP."""
        place = (ids != PAD).sum(1) - 1 if self.causal else torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        return tokens[torch.arange(len(ids), device=ids.device), place]
