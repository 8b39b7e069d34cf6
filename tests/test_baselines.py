"""The older systems: their networks, losses and folders; each is trained two steps through the real command."""

from __future__ import annotations

import gzip
import json
import math
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, write_data
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from pokediff import cli
from pokediff.baselines.augment import Augmentation
from pokediff.baselines.digits import DigitNetwork, digit_of
from pokediff.baselines.generator import Baseline, load_baseline
from pokediff.baselines.interface import is_baseline
from pokediff.baselines.losses import PictureLosses, discriminator_loss, load_layers, real_or_not, sobel, wrong_texts
from pokediff.baselines.networks import Discriminator, PikaPikaGen, PikaPikaGenerator
from pokediff.baselines.systems import DISCRIMINATOR, GENERATOR, SYSTEMS, Batch
from pokediff.baselines.words import PAD, WordEncoder
from pokediff.config import AugmentationConfig, BaselineConfig, NetworkConfig, Sampling, load_yaml
from pokediff.data.dataset import load_pictures
from pokediff.drawing.sample import load_checkpoint
from pokediff.errors import PokediffError
from pokediff.evaluation.report import read_report

CONFIGS = sorted((ROOT / "configs" / "baselines").glob("*.yaml"))
SMALL = NetworkConfig(width=32, text_dim=32, heads=4, layers=1, noise=8, latent=64)
TEXTS = ["official artwork of a blue creature", "a red one"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def words() -> WordEncoder:
    return WordEncoder.load("builtin")


def small_config(name: str, data=None, out=None, **changes) -> BaselineConfig:
    """A shipped configuration with a small network."""
    config = load_yaml(ROOT / "configs" / "baselines" / f"{name}.yaml", BaselineConfig)
    network = config.network if config.system == "digits" else replace(SMALL, stages=config.network.stages)
    return replace(config, data=(str(data),), out=str(out), network=network, **changes)


def write_mnist(folder, number: int = 60):
    """The four idx files, gzipped, of small pictures whose brightness is their label; ten for testing."""
    for kind, many in (("train", number), ("t10k", 10)):
        labels = np.arange(many, dtype=np.uint8) % 10
        pixels = np.repeat(labels * 25, 28 * 28).astype(np.uint8)
        for what, header, body in (
            ("images-idx3", struct.pack(">4B3I", 0, 0, 8, 3, many, 28, 28), pixels),
            ("labels-idx1", struct.pack(">4BI", 0, 0, 8, 1, many), labels),
        ):
            (folder / f"{kind}-{what}-ubyte.gz").write_bytes(gzip.compress(header + body.tobytes()))
    return folder


# ------------------------------------------------------------------------------------------------------------ networks


def test_pikapikagenerator_has_the_published_number_of_parameters():
    bert = BertModel(BertConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024))
    encoder = WordEncoder(bert, None)
    config = NetworkConfig(width=768, text_dim=512, heads=8, noise=256)
    network = PikaPikaGenerator(encoder, config, channels=3, size=256)
    total, frozen = (sum(p.numel() for p in part.parameters()) for part in (network, encoder))
    assert (total - frozen, total) == (27_644_243, 38_814_803)


@pytest.mark.parametrize(("stages", "size", "sides"), [(1, 32, [32]), (2, 32, [16, 32]), (2, 256, [64, 256])])
def test_pikapikagen_attends_to_words_and_never_to_padding(words, stages, size, sides):
    network = PikaPikaGen(words, replace(SMALL, stages=stages), 4, size).eval()
    ids = words.ids(TEXTS)
    with torch.no_grad():
        drawn = network(ids, torch.zeros(2, 8))
    assert [picture.shape for picture in drawn.pictures] == [(2, 4, side, side) for side in sides]
    assert {"sentence", "4x4", "8x8", "16x16"} <= drawn.attention.keys()
    for weights in drawn.attention.values():
        torch.testing.assert_close(weights.sum(1), torch.ones_like(weights.sum(1)))
        assert weights[ids == PAD].abs().max() == 0


def test_what_pikapikagenerator_attends_to_sums_to_one(words):
    network = PikaPikaGenerator(words, SMALL, 4, 32).eval()
    with torch.no_grad():
        drawn = network(words.ids(TEXTS), torch.zeros(2, 8))
    torch.testing.assert_close(drawn.attention["sentence"].sum(1), torch.ones(2))
    assert drawn.pictures[-1].shape == (2, 4, 32, 32)


def test_words_of_a_bert_of_ones_own(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "blue", "red", "turtle", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    sizes = dict(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(vocabulary), **sizes)).save_pretrained(tmp_path)
    encoder = WordEncoder.load(f"bert:{tmp_path}").eval()
    ids = encoder.ids(["a blue turtle", "turtles"])
    assert encoder.tokens("turtles") == ["[CLS]", "turtle", "##s", "[SEP]"]
    assert ids[1].tolist() == [2, 8, 9, 3, PAD]
    tokens = encoder(ids)
    assert encoder.embed(ids).shape == tokens.shape == (2, 5, 8)
    torch.testing.assert_close(encoder.summary(ids, tokens), tokens[:, 0])
    alone = encoder(encoder.ids(["turtles"]))
    torch.testing.assert_close(tokens[1, :4], alone[0])
    with pytest.raises(PokediffError, match="holds no text model"):
        WordEncoder.load(f"bert:{tmp_path / 'none'}")


def test_model_b_draws_one_picture_for_all_digits_and_model_a_does_not():
    digits = torch.arange(10)
    torch.manual_seed(0)
    for latent, different in ((1, 1), (10, 10)):
        network = DigitNetwork(replace(SMALL, latent=latent, layers=0), 28)
        torch.nn.init.normal_(network.norm1.weight)
        drawn = network(digits).detach()
        assert len({picture.numpy().tobytes() for picture in drawn}) == different


def test_digits_of_prompts():
    assert [digit_of(text) for text in ("3", "the digit seven", "digit 0")] == [3, 7, 0]
    for text in ("a turtle", "1 or 2", ""):
        with pytest.raises(PokediffError, match="draws one digit"):
            digit_of(text)


# -------------------------------------------------------------------------------------------------------------- losses


def test_sobel_of_a_ramp_is_its_slope_times_eight():
    ramp = torch.arange(8.0).expand(1, 2, 8, 8) * torch.tensor([1.0, 3.0]).view(1, 2, 1, 1)
    across, down = sobel(ramp)[0, 0::2], sobel(ramp)[0, 1::2]
    torch.testing.assert_close(across[:, :, 1:-1], torch.tensor([8.0, 24.0]).view(2, 1, 1).expand(2, 8, 6))
    assert down.abs().max() == 0
    flipped = sobel(ramp.transpose(2, 3))[0]
    torch.testing.assert_close(flipped[1::2], across.transpose(1, 2))


def test_cross_entropy_is_lowest_for_the_mean_picture():
    pictures = (torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0)) > 0.3).float()
    mean = pictures.mean(0, keepdim=True)
    entropy = -(mean * mean.log() + (1 - mean) * (1 - mean).log()).mean()
    bce = PictureLosses(BaselineConfig(losses={"bce": 1.0}))

    def loss(guess: torch.Tensor) -> float:
        return bce((2 * guess - 1).expand_as(pictures), 2 * pictures - 1)["bce"].item()

    assert loss(mean) == pytest.approx(entropy.item(), rel=1e-5)
    assert loss((mean + 0.05).clamp(max=1)) > loss(mean)


def test_wrong_texts_are_those_of_other_pictures_and_equal_ones_do_not_count():
    ids = torch.tensor([[1, 2], [1, 2], [3, PAD]])
    wrong, differ = wrong_texts(ids.float(), ids)
    assert wrong.tolist() == [[3, -1], [1, 2], [1, 2]]
    assert differ.tolist() == [True, False, True]
    logits = torch.tensor([0.0, 100.0, 0.0])
    assert real_or_not(logits, False, differ).item() == pytest.approx(math.log(2))
    assert real_or_not(logits, False, torch.zeros(3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize(("kind", "calls"), [("picture", 2), ("text", 2), ("pairs", 5)])
def test_the_terms_of_a_discriminator(kind, calls, monkeypatch):
    judge = Discriminator(4, 0 if kind == "picture" else 3)
    text = None if kind == "picture" else torch.randn(2, 3)
    seen = []
    forward = judge.forward
    monkeypatch.setattr(judge, "forward", lambda *given: seen.append(len(given)) or forward(*given))
    x, ids = torch.rand(2, 4, 32, 32), torch.tensor([[1], [2]])
    loss = discriminator_loss(judge, x, -x, text, ids, kind)
    assert len(seen) == calls
    assert 0.3 < loss.item() < 1.5  # near ln 2: it knows nothing yet


def test_generators_get_no_gradient_of_the_discriminators_loss(words):
    config = BaselineConfig(
        system="pikapikagen",
        losses={"l1": 1.0, "adversarial": 1.0},
        discriminator="pairs",
        network=replace(SMALL, stages=2),
    )
    system = SYSTEMS["pikapikagen"](config, "builtin")
    batch = Batch(torch.rand(2, 4, 32, 32), system.ids(TEXTS), torch.randn(2, 8))
    drawn = system(batch)
    system.losses(DISCRIMINATOR, batch, drawn)["discriminator"].backward()
    players = system.players()
    assert list(players) == [DISCRIMINATOR, GENERATOR]
    assert all(p.grad is None for p in players[GENERATOR])
    assert sum(p.grad is not None for p in players[DISCRIMINATOR]) > 0
    assert not {id(p) for p in players[GENERATOR]} & {id(p) for p in players[DISCRIMINATOR]}
    losses = system.losses(GENERATOR, batch, drawn)
    assert losses.keys() == {"l1", "adversarial"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for name, p in system.generator.named_parameters() if "first" in name)


def test_feature_networks_see_no_distance_between_equal_pictures(tmp_path, squeeze):
    from torchvision.models import vgg19

    with torch.device("meta"):
        shapes = {f"features.{key}": value for key, value in vgg19().features.state_dict().items()}
    body = {key: torch.randn(value.shape) * (2 / value[0].numel()) ** 0.5 for key, value in shapes.items()}
    save_file(body, tmp_path / "vgg.safetensors")
    x, y = torch.rand(2, 4, 32, 32) * 2 - 1, torch.rand(2, 4, 32, 32) * 2 - 1
    for features in (squeeze, f"vgg19:{tmp_path / 'vgg.safetensors'}"):
        config = BaselineConfig(losses={"perceptual": 0.5, "lpips": 1.0}, features=features, lpips=squeeze)
        losses = PictureLosses(config)
        assert all(value.item() == 0 for value in losses(x, x).values())
        leaf = x.clone().requires_grad_()
        found = losses(leaf, y)
        sum(found.values()).backward()
        assert all(value.item() > 0 for value in found.values())
        assert leaf.grad.abs().sum() > 0
    activations, network = load_layers(f"vgg19:{tmp_path / 'vgg.safetensors'}")
    assert [len(a[0]) for a in activations(torch.zeros(1, 3, 64, 64))] == [64, 128, 256, 512, 512]
    assert not any(p.requires_grad for p in network.parameters())
    for wrong, message in (("vgg19:none.safetensors", "not found"), ("resnet:x", "give vgg19")):
        with pytest.raises(PokediffError, match=message):
            load_layers(wrong)


def test_augmentation_has_phases_and_keeps_pictures_premultiplied():
    phases = (AugmentationConfig(from_step=5), AugmentationConfig(from_step=10, rotation=20, erase=1.0, brightness=0.5))
    x = torch.full((3, 4, 16, 16), -1.0)
    x[:, :, 4:12, 4:12] = torch.tensor([0.2, -0.4, 0.0, 0.9]).view(1, 4, 1, 1)
    augment = Augmentation(phases)
    assert augment(x, 4) is x
    torch.testing.assert_close(augment(x, 5), x, atol=1e-6, rtol=0)
    torch.manual_seed(0)
    changed = augment(x, 10)
    assert (changed[0] - changed[1]).abs().max() > 0.1
    assert (changed[:, :3] <= changed[:, 3:] + 1e-6).all()
    assert changed.abs().max() <= 1
    assert Augmentation(())(x, 0) is x


# ------------------------------------------------------------------------------------- the command, and its folders


def test_every_configuration_can_be_read():
    assert len(CONFIGS) >= 12
    for path in CONFIGS:
        config = load_yaml(path, BaselineConfig)
        assert config.system == "sdxl-lora" or config.system in SYSTEMS


NETWORK = [f"--network.{key}={getattr(SMALL, key)}" for key in ("width", "text_dim", "heads", "layers", "noise")]
STEPS = "--max-steps 2 --batch-size 4 --validate-every 2 --preview-every 2 --log-every 1 --threads 1".split()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [path.stem for path in CONFIGS if "digits" not in path.stem and path.stem != "sdxl-lora"]
)
def test_two_steps_of_every_picture_system_through_the_command(data, tmp_path, squeeze, capsys, name):
    networks = {"pikapikagen-2": ["--features", squeeze]}.get(name, [])
    networks = ["--lpips", squeeze] if name.startswith("pikapikagenerator") else networks
    styles = "--dataset.styles artwork 1 sprite 1".split()
    out = tmp_path / "run"
    words = ["baseline", "--config", name, "--data", str(data), "--out", str(out), *STEPS, *NETWORK, *styles, *networks]
    cli.main([*words, "--precision", "fp32"])
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 2
    assert math.isfinite(rows[-1]["validation_loss"])
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
    previews = {path.name.partition("-")[0] for path in (out / "previews").iterdir()}
    assert previews == {"prompts", "pairs"} | (set() if name == "latent" else {"attention"})

    assert is_baseline(out)
    model = load_checkpoint(str(out), "cpu")
    assert isinstance(model, Baseline)
    both = model.generate(TEXTS, [1, 2])
    assert both.shape == (2, 32, 32, 4)
    np.testing.assert_allclose(model.generate(TEXTS[1:], [2])[0].astype(int), both[1], atol=1)  # alone, the same
    assert (model.generate(TEXTS[1:], [3])[0] != both[1]).any()

    drawing = tmp_path / "drawing"
    cli.main(["sample", *TEXTS, "--checkpoint", str(out), "--seed", "1", "--out", str(drawing), "--raw"])
    facts = json.loads((drawing / "sample.json").read_text())
    assert len(facts["pictures"]) == 2
    assert "denoising.gif" not in facts["files"]
    with pytest.raises(SystemExit):
        cli.main([*words, "--precision", "fp32"])
    assert "holds other files" in capsys.readouterr().err


@pytest.mark.slow
def test_a_report_of_a_baseline_and_what_it_does_not_have(tmp_path, monkeypatch):
    monkeypatch.setattr("pokediff.evaluation.classifiers.STEPS", 20)  # of the judge
    data = write_data(tmp_path / "data", 320, spotted=True)
    config = small_config(
        "pikapikagen-1", data, tmp_path / "run", max_steps=1, batch_size=4, precision="fp32", threads=1
    )
    from pokediff.baselines.training import train_baseline

    config = replace(config, dataset=replace(config.dataset, styles=None))
    out = train_baseline(config)
    report = tmp_path / "report"
    words = f"evaluate --checkpoint {out} --data {data} --number 8 --out {report} --styles artwork sprite".split()
    cli.main([*words, "--features", "none", "--kid-subset-size", "4"])
    figures = {figure["name"]: figure for figure in read_report(report)["figures"]}
    assert 0.5 < figures["parameters, M"]["value"] < 2  # without the text encoder
    assert figures["SSIM"]["value"] is not None
    assert not any(name.startswith("denoising loss") for name in figures)

    model = load_baseline(out, CPU)
    for wrong in (
        dict(num_inference_steps=5), dict(guidance_scale=2.0), dict(sampler="ddim"), dict(fast=True),
        dict(negative_prompt="red"), dict(best_of=2),
    ):  # fmt: skip
        with pytest.raises(PokediffError, match=rf"no time steps: it draws at once; leave out {next(iter(wrong))}"):
            model.resolved(Sampling(**wrong))
    with pytest.raises(PokediffError, match="draws 32 px, not 64"):
        model.resolved(Sampling(size=64))
    found = model.attention("a blue creature")
    assert len(found.tokens) == 5
    assert found.maps["16x16"].shape == (5, 16, 16)
    assert model.parameters == sum(p.numel() for n, p in model.system.named_parameters() if "words." not in n)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(PokediffError, match="no whole safetensors file"):
        load_baseline(out, CPU)


@pytest.mark.slow
def test_digits_learn_the_mean_picture_of_each_class(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    write_mnist(folder)
    pictures = load_pictures(folder, 28, report=lambda _: None)
    assert len(pictures.split("test")) == 10
    assert pictures.captions[3][0] in "0123456789"
    for name, apart in (("digits-a", 10), ("digits-b", 1), ("digits-transformer", 10)):
        out = tmp_path / name
        steps = "--max-steps 60 --validate-every 60 --preview-every 60 --threads 1 --learning-rate 0.01".split()
        cli.main(["baseline", "--config", name, "--data", str(folder), "--out", str(out), *steps])
        drawn = load_baseline(out, CPU).generate([str(digit) for digit in range(10)], range(10))
        assert drawn.shape == (10, 28, 28, 4)
        assert len({picture.tobytes() for picture in drawn}) == apart


def test_broken_idx_files_are_named(tmp_path):
    write_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(PokediffError, match=r"labels-idx1-ubyte\.gz is missing"):
        load_pictures(tmp_path, 28)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(PokediffError, match="is no idx file"):
        load_pictures(tmp_path, 28)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(image_size=40), "must be 8, 16, 32"),
        (dict(losses={"l2": 1.0}), "losses.l2 is unknown"),
        (dict(losses={"l1": 1.0, "adversarial": 1.0}), "need each other"),
        (dict(discriminator="text"), "need each other"),
        (dict(network=NetworkConfig(stages=2)), "network.stages must be 1"),
        (dict(network=NetworkConfig(heads=7)), "network.heads must divide 256"),
        (dict(system="latent", network=NetworkConfig(width=40)), "multiple of 32"),
        (dict(batch_size=1), "must be at least 2"),
        (dict(preview_prompts=()), "must not be empty"),
        (dict(data=()), "must not be empty"),
        (dict(losses={}), "must not be empty"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(PokediffError, match=message):
        BaselineConfig(**changes)


@pytest.mark.parametrize(("name", "option"), [("lpips", "--lpips"), ("perceptual", "--features")])
def test_a_loss_without_its_network_names_the_option(name, option):
    with pytest.raises(PokediffError, match=f"losses.{name} needs a network: {option}"):
        PictureLosses(BaselineConfig(losses={name: 1.0}))


def test_what_is_no_whole_baseline_says_so(tmp_path, capsys):
    (tmp_path / "baseline.json").write_text('{"system": "sdxl-lora"}')
    with pytest.raises(PokediffError, match="has no pytorch_lora_weights"):
        load_baseline(tmp_path, CPU)
    (tmp_path / "baseline.json").write_text("{")
    with pytest.raises(PokediffError, match="not JSON"):
        load_baseline(tmp_path, CPU)
    with pytest.raises(SystemExit):
        cli.main(["export", "--checkpoint", str(tmp_path)])
    assert "is a baseline, which can only draw" in capsys.readouterr().err
    with pytest.raises(PokediffError, match="unknown kind; use builtin"):
        WordEncoder.load("word2vec:x")
