"""Small classifiers that the evaluation trains: on features, and on pixels as a judge beside the feature networks.

Neither may be used in a training loss, which would invalidate it as a measure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import nn

from pokediff.data.captions import style_phrase
from pokediff.data.dataset import translate
from pokediff.data.images import premultiply
from pokediff.data.records import Record
from pokediff.evaluation.features import stored
from pokediff.files import write_whole

FOLDS = 5
WEIGHT_DECAY = 1e-3  # of the linear classifier
STEPS, BATCH, RATE = 1500, 64, 2e-3  # of the judge's training
FEWEST = 20  # training pictures of a class that the judge learns


# -------------------------------------------------------------------------------------------------- on features


class LinearClassifier:
    """Logistic regression on standardised features (N, D) with labels (N,) from 0."""

    def __init__(self, features: np.ndarray, labels: np.ndarray) -> None:
        self.mean, self.deviation = features.mean(0), features.std(0) + 1e-6
        self.weights = fitted(self.prepared(features), torch.from_numpy(labels).long())  # (D + 1, K)

    def prepared(self, values: np.ndarray) -> torch.Tensor:
        scaled = torch.from_numpy((values - self.mean) / self.deviation).float()
        return torch.cat([scaled, torch.ones(len(scaled), 1)], dim=1)  # the last column is the bias

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """The labels (M,) of features (M, D)."""
        return (self.prepared(values) @ self.weights).argmax(1).numpy()


def fitted(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The weights (D, K) of a logistic regression of labels y (N,) on x (N, D)."""
    weights = torch.zeros(x.shape[1], int(y.max()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weights, y) + WEIGHT_DECAY * weights.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def two_sample_hits(x: np.ndarray, y: np.ndarray, x_groups: Iterable, y_groups: Iterable, seed: int = 0) -> np.ndarray:
    """(2n,) bool: which pictures a linear classifier assigns to the right one of two sets, cross-validated in FOLDS.

    C2ST (Lopez-Paz & Oquab, "Revisiting Classifier Two-Sample Tests", 2017): the share of hits is 0.5 for equal
    distributions and 1 for sets that a plane separates. x, y: features (N, D), (M, D); n = min(N, M) of each are used.
    Pictures of one group (N,), (M,), such as a family, are never in training and test folds at once.
    """
    rng = np.random.default_rng(seed)
    number = min(len(x), len(y))
    xs, ys = rng.permutation(len(x))[:number], rng.permutation(len(y))[:number]
    features, labels = np.concatenate([x[xs], y[ys]]), np.repeat([0, 1], number)
    groups = list(map(str, x_groups)), list(map(str, y_groups))
    keys = [groups[0][i] for i in xs] + [groups[1][i] for i in ys]
    names, of = np.unique(keys, return_inverse=True)
    fold = (rng.permutation(len(names)) % FOLDS)[of]
    hits = np.zeros(2 * number, bool)
    for k in range(FOLDS):
        test = fold == k
        if test.any() and len(np.unique(labels[~test])) == 2:
            hits[test] = LinearClassifier(features[~test], labels[~test])(features[test]) == labels[test]
    return hits


# ---------------------------------------------------------------------------------------------------- on pixels


class JudgeNetwork(nn.Module):
    """0.2 M parameters: premultiplied RGBA in [-1, 1] (N, 4, S, S) to logits (N, classes)."""

    def __init__(self, size: int, classes: int) -> None:
        super().__init__()
        stride = max(1, size // 32)  # the same cost at every size
        layers: list[nn.Module] = []
        widths = [(4, 32, stride), (32, 64, 2), (64, 96, 2), (96, 128, 2)]
        for inputs, outputs, step in widths:
            kernel = max(3, 2 * step - 1)
            layers += [nn.Conv2d(inputs, outputs, kernel, step, kernel // 2), nn.ReLU(), nn.GroupNorm(8, outputs)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(128, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


class Judge:
    """Classifies pictures by style and by kind, after training on real pictures."""

    def __init__(self, pixels: np.ndarray, records: Sequence[Record], seed: int = 0, cache: Path | None = None) -> None:
        """Train on straight RGBA uint8 (N, S, S, 4) and their records; one to two minutes on one core. The weights are
        kept in the folder `cache`, under a hash of everything that they depend on.

        Raises ValueError when neither style nor kind has two classes of FEWEST pictures.
        """
        self.classes: dict[str, list[str]] = {}
        targets: dict[str, np.ndarray] = {}
        for name, label in LABELS.items():
            found = [label(record) for record in records]
            known = sorted({text for text in found if text and found.count(text) >= FEWEST})
            if len(known) > 1:
                self.classes[name] = known
                targets[name] = np.array([known.index(text) if text in known else -1 for text in found])
        if not targets:
            raise ValueError(f"no two styles or kinds with {FEWEST} training pictures")
        self.sizes = [len(known) for known in self.classes.values()]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = JudgeNetwork(pixels.shape[1], sum(self.sizes))
        settings = repr((self.classes, STEPS, BATCH, RATE, seed)).encode()
        content = b"".join(target.tobytes() for target in targets.values()) + pixels.tobytes()
        key = hashlib.sha256(settings + content).hexdigest()[:24]
        path = None if cache is None else cache / f"judge-{key}.safetensors"
        if path is not None and (weights := stored(path, load_file)) is not None:
            self.network.load_state_dict(weights)
            self.network.eval()
            return
        self._train(pixels, targets, seed)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, save(self.network.state_dict()))

    def _train(self, pixels: np.ndarray, targets: dict[str, np.ndarray], seed: int) -> None:
        rng = np.random.default_rng(seed)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=RATE, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS)
        # Rare combinations of labels are oversampled, so that frequent classes are not preferred.
        combinations = np.unique(np.stack(list(targets.values()), axis=1), axis=0, return_inverse=True)[1].ravel()
        chances = 1 / np.sqrt(np.bincount(combinations))[combinations]
        chances /= chances.sum()
        for _ in range(STEPS):
            index = rng.choice(len(pixels), BATCH, p=chances)
            reach = pixels.shape[1] // 8  # flips and shifts, against memorisation
            batch = np.stack([translate(pixels[i], *rng.integers(-reach, reach + 1, 2)) for i in index])
            batch = batch[:, :, ::-1] if rng.random() < 0.5 else batch
            logits = self.network(_prepared(batch)).split(self.sizes, dim=1)
            losses = [
                F.cross_entropy(part, torch.from_numpy(target[index]), ignore_index=-1, label_smoothing=0.05)
                for part, target in zip(logits, targets.values(), strict=True)
                if (target[index] >= 0).any()
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            schedule.step()
        self.network.eval()

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """{"style": labels (N,), "kind": labels (N,)} of straight RGBA uint8 (N, S, S, 4)."""
        logits = torch.cat([self.network(_prepared(part)) for part in np.array_split(pixels, -(-len(pixels) // 256))])
        parts = logits.split(self.sizes, dim=1)
        return {
            name: np.array(known)[part.argmax(1).numpy()]
            for (name, known), part in zip(self.classes.items(), parts, strict=True)
        }


def _prepared(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(premultiply(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


LABELS: dict[str, Callable[[Record], str]] = {
    "style": lambda record: style_phrase(record.style),
    "kind": lambda record: record.kind or "",
}
