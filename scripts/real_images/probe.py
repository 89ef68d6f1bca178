"""The yardstick: a linear classifier on raw pixels, fitted on AID's training scenes, scored on GeoChat-Bench's 3 000.

    python scripts/real_images/probe.py --data DATA --output OUT/probe.json

Pictures are shrunk to 32 × 32; the weight decay is chosen on a fifth of the training scenes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from aid import AidScene, read_pixels, read_scenes
from prepare import write
from teacher import fit_head
from torch import Tensor

SIDE = 32
DECAYS = (1e-2, 1e-1, 1.0)


def raw(data: Path, scenes: list[AidScene]) -> tuple[Tensor, Tensor]:
    """Pixels [n, 3072] in 0 … 1 and labels [n]."""
    pixels = torch.from_numpy(read_pixels(data, scenes, SIDE)).flatten(1).float() / 255
    return pixels, torch.tensor([scene.number for scene in scenes])


def probe(data: Path, steps: int) -> dict[str, float]:
    train, test = read_scenes(data)
    x, y = raw(data, train)
    mean, spread = x.mean(0), x.std(0).clamp(min=1e-5)
    x = (x - mean) / spread
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[: len(x) // 5], order[len(x) // 5 :]

    def right(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> float:
        return float(((x @ weight + bias).argmax(1) == y).float().mean())

    scores = {decay: right(*fit_head(x[rest], y[rest], decay, steps), x[held], y[held]) for decay in DECAYS}
    decay = max(scores, key=lambda d: scores[d])
    weight, bias = fit_head(x, y, decay, steps)
    test_x, test_y = raw(data, test)
    return {
        "accuracy": round(right(weight, bias, (test_x - mean) / spread, test_y), 4),
        "held_out_accuracy": round(scores[decay], 4),
        "decay": decay,
        "n": len(test),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder that holds aid150.jsonl and aid150/")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30, help="steps of L-BFGS")
    args = parser.parse_args(argv)
    try:
        result = probe(args.data, args.steps)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write(args.output, json.dumps(result))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
