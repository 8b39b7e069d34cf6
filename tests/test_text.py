from __future__ import annotations

import pytest
import torch
from tiny import write_open_clip

from pokediff.errors import PokediffError
from pokediff.model import text
from pokediff.model.text import (
    ClipTextEncoder,
    embeddings_path,
    encode_captions,
    load_embeddings,
    load_text_encoder,
    save_embeddings,
)

PROMPTS = ["a blue water turtle", "a crimson dragon with ice wings, pixel sprite", ""]


@pytest.fixture(scope="module")
def builtin() -> ClipTextEncoder:
    return load_text_encoder("builtin")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> str:
    """A small random CLIP in the format of openai/clip-vit-base-patch32."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("clip")
    encoder = load_text_encoder("builtin")
    encoder.tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    size = {"vocab_size": len(encoder.tokenizer), "max_position_embeddings": 16, "projection_dim": 24}
    config = CLIPTextConfig(**shape, **marks, **size)
    torch.manual_seed(0)
    CLIPTextModelWithProjection(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory) -> str:
    return write_open_clip(tmp_path_factory.mktemp("open_clip"))


def check(encoder, dim: int) -> None:
    embedding = encoder(PROMPTS)
    assert encoder.dim == dim
    assert embedding.pooled.shape == (3, dim)
    assert embedding.pooled.dtype == torch.float32
    torch.testing.assert_close(embedding.pooled.norm(dim=1), torch.ones(3))
    length = embedding.tokens.shape[1]
    assert length <= encoder.max_tokens
    assert embedding.tokens.shape == (3, length, dim)
    assert embedding.mask.shape == (3, length)
    assert embedding.mask.sum(1).tolist()[2] == 2  # the empty prompt is its marks of start and end
    for index, prompt in enumerate(PROMPTS):  # other prompts in the batch change nothing
        torch.testing.assert_close(encoder([prompt]).pooled[0], embedding.pooled[index], rtol=0, atol=1e-5)


def test_builtin(builtin):
    check(builtin, 384)


def test_transformers_clip(clip_folder):
    check(load_text_encoder(f"clip:{clip_folder}"), 24)


def test_open_clip(open_clip_folder):
    check(load_text_encoder(f"open_clip:local-dir:{open_clip_folder}"), 24)


def test_builtin_places_prompts_by_meaning(builtin):
    def similarity(a: str, b: str) -> float:
        return float(builtin([a]).pooled[0] @ builtin([b]).pooled[0])

    assert similarity("a crimson dragon", "a red dragon") > similarity("a crimson dragon", "a blue dragon")
    assert similarity("a feline", "a cat") > similarity("a feline", "a fish")
    assert similarity("a serpent", "a snake") > similarity("a serpent", "a bird")


def test_builtin_is_small():
    files = [file for part in ("text_encoder", "tokenizer") for file in (text.BUILTIN_FOLDER / part).iterdir()]
    assert 1_000_000 < sum(file.stat().st_size for file in files) <= 8_000_000


def test_any_text_has_a_vector(builtin):
    unusual = ["Flabébé ♀ ☃ 龍", "x" * 300, "<|endoftext|>", "\n\t"]
    with pytest.warns(UserWarning, match="only the first 64 tokens"):
        assert torch.isfinite(builtin(unusual).pooled).all()
    # an unknown symbol does not end the prompt
    assert not torch.equal(builtin(["☃ red"]).pooled, builtin(["☃ blue"]).pooled)


def test_long_prompts_are_cut_with_a_warning(clip_folder):
    encoder = load_text_encoder(f"clip:{clip_folder}")
    with pytest.warns(UserWarning, match="only the first 16 tokens"):
        long = encoder(["red " * 40]).pooled
    with pytest.warns(UserWarning, match="only the first"):
        torch.testing.assert_close(encoder(["red " * 60]).pooled, long)


def test_an_unreachable_hub_is_one_line_that_names_the_alternative(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in ("open_clip:ViT-B-32:laion2b_s34b_b79k", "clip:openai/clip-vit-base-patch32"):
        with pytest.raises(PokediffError, match='cannot be reached; use "builtin"') as error:
            load_text_encoder(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("magic", "unknown kind"),
        ("open_clip:ViT-B-32:nonsense", "no such weights"),
        ("open_clip:NoSuchNet:openai", "no such weights"),
        ("open_clip:ViT-B-32:/none/w.safetensors", "does not exist"),
        ("open_clip:local-dir:/none", "open_clip_config.json"),
    ],
)
def test_wrong_names(name, words):
    with pytest.raises(PokediffError, match=words):
        load_text_encoder(name)


def test_a_model_without_its_tokenizer_is_refused(clip_folder, tmp_path):
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    with pytest.raises(PokediffError, match="tokenizer files are missing"):
        ClipTextEncoder(CLIPTextModelWithProjection.from_pretrained(clip_folder), CLIPTokenizer(), "broken")


def test_vectors_of_captions_saved_and_loaded(builtin, tmp_path):
    captions = ["a long caption about a green creature", "short", "", "a red one"]
    pooled = encode_captions(builtin, captions, batch_size=2)
    torch.testing.assert_close(pooled, builtin(captions).pooled, rtol=0, atol=1e-5)
    path = embeddings_path(tmp_path, "open_clip:ViT-B-32:x")
    assert path.name == "embeddings-open_clip-ViT-B-32-x.safetensors"
    assert load_embeddings(path, "builtin") == {}
    save_embeddings(path, "builtin", captions, pooled)
    loaded = load_embeddings(path, "builtin")
    assert list(loaded) == captions
    torch.testing.assert_close(torch.stack(list(loaded.values())), pooled, rtol=0, atol=1e-3)
    with pytest.raises(PokediffError, match="made by builtin"):
        load_embeddings(path, "other")
