"""Teach the nano projector to say in the language model's own words what a patch shows: LLaVA's first stage, dense.

Each patch's projected feature is drawn towards the sum of the embeddings of its object's class and colour, of its box
numbers (each turned by its own fixed rotation, so that the five can be told apart), of how many objects of the class
there are, of the scene's name, and of a mark where the object's centre lies. The language model then meets pictures written in vectors that it shares with the text.

    python scripts/nano/align_projector.py --llm DIR --tower DIR --output DIR/projector.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from pretrain_tower import (
    COLOUR_NAMES,
    KIND_NAMES,
    MOST,
    SCENE_NAMES,
    assign,
    boxes,
    features,
    prepare,
    scenes,
    turned,
)
from safetensors.torch import save_file
from torch import Tensor
from tqdm import trange

from geochat.model.build import build_model

SCALE = 0.5
"""Spread of the projected features: about that of a projector before any training, so nothing else has to be retuned."""


class Dictionary:
    """Words and box numbers as vectors of the language model."""

    def __init__(self, table: Tensor, encode: object, number_ids: list[int]) -> None:
        hidden = table.shape[1]
        generator = torch.Generator().manual_seed(0)
        self.numbers = table[number_ids]
        self.turns = [torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0] for _ in range(5)]
        self.centre = torch.randn(hidden, generator=generator) * table.std()
        self.digits = table[[encode(str(n))[-1] for n in range(10)]]
        self.many = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0]
        words = lambda names: torch.stack([table[encode(f" {name}")].mean(0) for name in names])  # noqa: E731
        self.kinds, self.colours, self.scenes = words(KIND_NAMES), words(COLOUR_NAMES), words(SCENE_NAMES)

    def target(self, names: Tensor, objects: Tensor, side: int) -> Tensor:
        """What the projected patches [B, side², hidden] should be."""
        index, centre = assign(objects, side)
        padded = torch.cat([objects, torch.zeros_like(objects[:, :1])], 1)
        shown = padded.gather(1, index[..., None].expand(-1, -1, 7))
        seen = (index < MOST)[..., None].float()
        total = self.kinds[(shown[..., 0].long() - 1).clamp(min=0)] + self.colours[shown[..., 1].long()]
        for turn, value in zip(self.turns, boxes(shown).round().clamp(0, 100).long().unbind(-1), strict=True):
            total = total + self.numbers[value] @ turn
        alike = (objects[:, None, :, 0] == shown[..., 0, None]).sum(-1).clamp(max=9)  # [B, side²]
        total = total + self.digits[alike] @ self.many
        return total * seen + 0.5 * self.scenes[names][:, None] + centre[..., None] * self.centre


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", type=Path, required=True)
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help="projector file to write")
    parser.add_argument("--cache", type=Path, default=Path("playground/runs/nano/scenes"))
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=100_000_000)
    parser.add_argument("--batches", type=int, default=60, help="of 64 scenes each")
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()

    torch.manual_seed(0)
    rng = np.random.default_rng(1)
    model, processor = build_model(args.llm, args.tower, image_size=84)
    tokenizer = processor.tokenizer
    numbers = [tokenizer.convert_tokens_to_ids(f"<{n}>") for n in range(101)]
    table = model.get_input_embeddings().weight.detach()
    dictionary = Dictionary(
        table, lambda text: tokenizer.encode(text.strip(), add_special_tokens=False), numbers
    )
    projector, tower = model.model.multi_modal_projector, model.model.vision_tower
    pixels, names, objects = scenes(args.cache, args.seed, args.scenes)
    seen, wanted = (
        [],
        [],
    )  # patches of a sample of scenes, turned and at two sizes: the tower runs once over each
    for _ in trange(args.batches, desc="patches", mininterval=10):
        chosen = np.sort(rng.choice(len(names), 64, replace=False))
        size = (84, 126)[int(rng.random() < 0.25)]
        batch, labels = turned(
            prepare(pixels[chosen], size), torch.from_numpy(objects[chosen]), int(rng.integers(8))
        )
        with torch.no_grad():
            seen.append(features(tower, batch).flatten(0, 1))
            wanted.append(
                dictionary.target(torch.from_numpy(names[chosen]), labels, size // 14).flatten(0, 1)
            )
    inputs, targets = torch.cat(seen), torch.cat(wanted)
    targets = targets * (SCALE / targets.std())
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps)
    bar = trange(args.steps, desc="projector", mininterval=10)
    for _ in bar:
        rows = torch.from_numpy(rng.integers(len(inputs), size=4096))
        loss = (projector(inputs[rows]) - targets[rows]).pow(2).mean() / SCALE**2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(unexplained=round(loss.item(), 4))
    state = {
        f"multi_modal_projector.{name}": value.contiguous() for name, value in projector.state_dict().items()
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, args.output, metadata={"format": "pt"})


if __name__ == "__main__":
    main()
