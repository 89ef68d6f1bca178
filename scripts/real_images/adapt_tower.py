"""Teach the nano model's vision tower real scenes, from AID's training images alone.

Three things are learned: the class (true label and teacher's probabilities, half and half) from the mean over the
patches; the same from every single patch, so that a language model finds it wherever it looks; and the teacher's local
features, patch by patch. Pictures are cropped, turned, mirrored, recoloured and mixed. For most of the steps the tower
sees some patches of a 126 px picture, in the last ones all of them; the position table is resampled as
`geochat.model.vision` does it. The heads are thrown away.

The projector follows: it learns to turn a patch into what the language model's own vectors of the words of the class
name are, so that the language model meets pictures in words that it knows. The language model stays as it is.

    python scripts/real_images/adapt_tower.py --base playground/nano --data DATA --teacher OUT/teacher/teacher.npz \\
        --output OUT/base

A stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from aid import CLASSES, AidScene, read_pixels, read_scenes
from teacher import CHANNELS
from torch import Tensor, nn
from tqdm import tqdm

from geochat.model.checkpoint import load, save_model
from geochat.model.processor import CLIP_MEAN, CLIP_STD
from geochat.model.vision import resample_positions

STORED = 150
"""Side at which the training pictures are kept in memory; AID's small edition is 150 px."""


@dataclass
class Scenes:
    """Everything that training reads, in memory."""

    pixels: Tensor  # uint8 [n, 3, 150, 150]
    labels: Tensor  # int64 [n]
    beliefs: Tensor  # float32 [n, classes]: what to answer, label and teacher together
    local: Tensor | None  # float16 [n, 64, 14, 14]: the teacher's local features


class Heads(nn.Module):
    """What patch features must tell. Only for this training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.scene = nn.Linear(hidden, len(CLASSES))
        self.local = nn.Linear(hidden, CHANNELS)


def read(data: Path, scenes: list[AidScene], teacher: Path | None, trust: float) -> Scenes:
    """Raises: ValueError when the teacher was asked about other scenes."""
    pixels = torch.from_numpy(read_pixels(data, scenes, STORED)).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([scene.number for scene in scenes])
    beliefs = F.one_hot(labels, len(CLASSES)).float()
    if teacher is None:
        return Scenes(pixels, labels, 0.95 * beliefs + 0.05 / len(CLASSES), None)
    with np.load(teacher) as told:
        rows = {name: i for i, name in enumerate(told["files"].tolist())}
        if missing := [scene.file for scene in scenes if scene.file not in rows]:
            raise ValueError(
                f"{teacher}: says nothing about {missing[0]} ({len(missing)} scenes are missing)"
            )
        order = [rows[scene.file] for scene in scenes]
        probabilities = torch.from_numpy(told["logits"][order]).softmax(1)
        local = torch.from_numpy(told["local"][order]).permute(0, 3, 1, 2).contiguous()
    return Scenes(pixels, labels, (1 - trust) * beliefs + trust * probabilities, local)


def features(tower: Any, pixels: Tensor, layer: int, kept: Tensor | None = None) -> Tensor:
    """Patch features [B, patches, hidden] of hidden state `layer`, the position table resampled to the picture's size.

    kept: numbers of the patches [B, k] that the tower sees; None: all of them.
    """
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels)
    table = resample_positions(embeddings.position_embedding.weight, patches.shape[-1])
    patches = patches.flatten(2).transpose(1, 2) + table[1:]
    if kept is not None:
        patches = pick(patches, kept)
    first = (embeddings.class_embedding + table[0]).expand(len(pixels), 1, -1)
    hidden = tower.pre_layrnorm(torch.cat([first, patches], 1))
    blocks = tower.encoder.layers
    for block in blocks[: layer % (len(blocks) + 1)]:
        hidden = block(hidden, attention_mask=None)
    return hidden[:, 1:]


def pick(rows: Tensor, kept: Tensor) -> Tensor:
    """Rows [B, n, C] of numbers [B, k] → [B, k, C]."""
    return rows.gather(1, kept[..., None].expand(-1, -1, rows.shape[-1]))


def some_patches(batch: int, patches: int, share: float) -> Tensor:
    """Numbers of randomly chosen patches [batch, k], other ones for every picture."""
    return torch.rand(batch, patches).argsort(1)[:, : max(1, round(share * patches))]


def normalise(pixels: Tensor) -> Tensor:
    """[B, 3, S, S] in 0 … 1 → CLIP-normalised."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std


def augment(
    scenes: Scenes, chosen: Tensor, size: int, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pixels [B, 3, size, size], beliefs [B, classes], teacher's features [B, 64, size/14, size/14] of one batch.

    The batch shares the crop's shape, the symmetry of the square and the way of mixing; every picture has its own
    place of the crop, colours and partner.
    """
    side = size // 14
    width, height = (round(STORED * float(rng.uniform(0.35, 1.0)) ** 0.5) for _ in range(2))
    if rng.random() < 0.25:
        width = height = STORED
    lefts, tops = (rng.integers(STORED - edge + 1, size=len(chosen)) for edge in (width, height))
    pixels = torch.stack(
        [
            scenes.pixels[i, :, t : t + height, x : x + width]
            for i, x, t in zip(chosen, lefts, tops, strict=True)
        ]
    )
    pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).float() / 255
    beliefs = scenes.beliefs[chosen]
    local = None
    if scenes.local is not None:
        ticks = (torch.arange(side) + 0.5) / side
        x = torch.from_numpy(lefts)[:, None] + ticks * width  # [B, side] in stored pixels
        y = torch.from_numpy(tops)[:, None] + ticks * height
        grid = torch.stack(
            [x[:, None, :].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1
        ).float()
        local = F.grid_sample(
            scenes.local[chosen].float(), grid / STORED * 2 - 1, padding_mode="border", align_corners=False
        )
    way = int(rng.integers(8))
    pixels, local = turn(pixels, way), None if local is None else turn(local, way)
    pixels = recolour(pixels)
    return mix(pixels, beliefs, local, rng)


def turn(planes: Tensor, way: int) -> Tensor:
    """One of the eight symmetries of the square on [B, C, S, S]."""
    planes = planes.flip(3) if way >= 4 else planes
    return torch.rot90(planes, -(way % 4), (2, 3))


def recolour(pixels: Tensor) -> Tensor:
    """Brightness, contrast, saturation and tint of every picture shaken a little."""
    shake = 1 + 0.25 * (2 * torch.rand(3, len(pixels), 1, 1, 1) - 1)
    pixels = pixels * shake[0]
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * shake[1]
    grey = pixels.mean(1, keepdim=True)
    pixels = grey + (pixels - grey) * (2 * shake[2] - 1)
    return pixels * (1 + 0.06 * torch.randn(len(pixels), 3, 1, 1))


def mix(
    pixels: Tensor, beliefs: Tensor, local: Tensor | None, rng: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In half of the batches every picture is blended with another one (mixup) or gets a piece of it (cutmix)."""
    chance = rng.random()
    if chance < 0.5:
        return pixels, beliefs, local
    partner = torch.from_numpy(rng.permutation(len(pixels)))
    if chance < 0.7:
        share = float(rng.beta(0.4, 0.4))
        blend = [
            None if x is None else share * x + (1 - share) * x[partner] for x in (pixels, beliefs, local)
        ]
        return blend[0], blend[1], blend[2]  # type: ignore[return-value]
    side = pixels.shape[-1] // 14
    w, h = (int(rng.integers(1, side)) for _ in range(2))  # whole patches, so that local features stay true
    x, y = int(rng.integers(side - w + 1)), int(rng.integers(side - h + 1))
    pixels, whole = pixels.clone(), w * h / side**2
    area = (slice(None), slice(None), slice(14 * y, 14 * (y + h)), slice(14 * x, 14 * (x + w)))
    pixels[area] = pixels[partner][area]
    if local is not None:
        area = (slice(None), slice(None), slice(y, y + h), slice(x, x + w))
        local = local.clone()
        local[area] = local[partner][area]
    return pixels, (1 - whole) * beliefs + whole * beliefs[partner], local


def loss_of(heads: Heads, seen: Tensor, beliefs: Tensor, local: Tensor | None) -> Tensor:
    """seen [B, patches, hidden], beliefs [B, classes], local [B, patches, 64]."""
    normed = heads.norm(seen)
    patches = heads.scene(normed)
    loss = F.cross_entropy(patches.mean(1), beliefs)
    repeated = beliefs.repeat_interleave(patches.shape[1], 0)
    loss = loss + 0.15 * F.cross_entropy(patches.flatten(0, 1), repeated)
    if local is not None:
        loss = loss + 0.5 * F.smooth_l1_loss(heads.local(normed), local)
    return loss


def class_words(model: Any, tokenizer: Any) -> Tensor:
    """A vector of the language model for each class [classes, hidden]: the mean of its words' embeddings, without what
    all of them share, with the spread of those embeddings."""
    table = model.get_input_embeddings().weight.detach()
    ids = [tokenizer.encode(name, add_special_tokens=False) for name in CLASSES]
    words = torch.stack([table[row].mean(0) for row in ids])
    words = words - words.mean(0)
    return words / words.std()


def projector_loss(projector: nn.Module, seen: Tensor, beliefs: Tensor, words: Tensor) -> Tensor:
    """How far the projected patches are from the words of the class. The tower is not drawn along."""
    target = (beliefs @ words)[:, None]
    return (projector(seen.detach()) - target).square().mean() / words.square().mean()


@torch.inference_mode()
def accuracy(tower: Any, heads: Heads, scenes: Scenes, size: int, layer: int) -> float:
    hits = 0
    for start in range(0, len(scenes.labels), 128):
        pixels = scenes.pixels[start : start + 128]
        pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True).float() / 255
        told = heads.scene(heads.norm(features(tower, normalise(pixels), layer))).mean(1)
        hits += int((told.argmax(1) == scenes.labels[start : start + 128]).sum())
    return hits / len(scenes.labels)


def plan(args: argparse.Namespace, step: int) -> tuple[int, float]:
    """Picture size and share of the patches that one step sees."""
    if step >= round(args.steps * (1 - args.last_share)):
        return 126, 1.0
    return args.size, args.keep


def split(scenes: list[AidScene], share: float) -> tuple[list[AidScene], list[AidScene]]:
    """Training scenes and held-out training scenes, for choosing settings without the test."""
    order = np.random.default_rng(7).permutation(len(scenes))
    held = set(order[: round(share * len(scenes))].tolist())
    return (
        [s for i, s in enumerate(scenes) if i not in held],
        [s for i, s in enumerate(scenes) if i in held],
    )


def train(args: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    scenes, test = read_scenes(args.data)
    scenes, held_out = split(scenes, args.hold_out)
    assert not {scene.file for scene in scenes} & {scene.file for scene in [*test, *held_out]}
    model, processor = load(args.base, dtype=torch.float32)
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    material = read(args.data, scenes, args.teacher, args.trust)
    heads = Heads(tower.config.hidden_size)
    projector = model.model.multi_modal_projector
    with torch.no_grad():  # words as loud as the base's projector speaks
        sample = material.pixels[:64, :, :126, :126].float() / 255
        spread = projector(features(tower, normalise(sample), layer)).std()
    words = class_words(model, processor.tokenizer) * spread
    modules = nn.ModuleDict({"tower": tower, "heads": heads, "projector": projector})
    modules.requires_grad_(True).train()
    groups = [
        {"params": [p for p in modules.parameters() if (p.ndim > 1) == decays], "weight_decay": decay}
        for decays, decay in ((True, 0.05), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.05, cycle_momentum=False
    )
    work = args.output.parent / f"{args.output.name}-training"
    work.mkdir(parents=True, exist_ok=True)
    state, first, spent = work / "state.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        modules.load_state_dict(saved["modules"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first, spent = saved["step"], saved["seconds"]
    started, running = time.perf_counter() - spent, 0.0
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, desc="tower", disable=None):
        rng = np.random.default_rng([1, step])  # a resumed run draws what an uninterrupted one would
        torch.manual_seed(step)
        epoch, place = divmod(step * args.batch_size, len(scenes))
        order = np.concatenate(
            [np.random.default_rng([2, epoch + k]).permutation(len(scenes)) for k in (0, 1)]
        )
        chosen = torch.from_numpy(order[place : place + args.batch_size])
        size, share = plan(args, step)
        pixels, beliefs, local = augment(material, chosen, size, rng)
        kept = some_patches(len(chosen), (size // 14) ** 2, share) if share < 1 else None
        if local is not None:
            local = local.flatten(2).transpose(1, 2)
            local = local if kept is None else pick(local, kept)
        seen = features(tower, normalise(pixels), layer, kept)
        loss = loss_of(heads, seen, beliefs, local) + projector_loss(projector, seen, beliefs, words)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % args.save_steps == 0 or step + 1 == args.steps:
            seconds = time.perf_counter() - started
            torch.save(
                {"modules": modules.state_dict(), "optimizer": optimizer.state_dict(),
                 "schedule": schedule.state_dict(), "step": step + 1, "seconds": seconds},
                state.with_suffix(".partial"),
            )  # fmt: skip
            state.with_suffix(".partial").replace(state)
            tqdm.write(json.dumps({"step": step + 1, "loss": round(running, 4), "seconds": round(seconds)}))
    modules.eval()
    result: dict[str, Any] = {
        "scenes": len(scenes),
        "steps": args.steps,
        "seconds": round(time.perf_counter() - started),
    }
    some = Scenes(material.pixels[:1000], material.labels[:1000], material.beliefs[:1000], None)
    named = {"training": some}
    if held_out:
        named["held_out"] = read(args.data, held_out, None, 0.0)
    if args.test:
        named["test"] = read(args.data, test, None, 0.0)  # after training, for the report alone
    for name, part in named.items():
        result[name] = {size: round(accuracy(tower, heads, part, size, layer), 4) for size in (84, 126)}
    save_model(model, processor, args.output)
    (work / "result.json").write_text(json.dumps(result))
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="model folder whose tower is taught")
    parser.add_argument("--data", type=Path, required=True, help="folder that holds aid150.jsonl and aid150/")
    parser.add_argument("--teacher", type=Path, help="teacher.npz; without it only the labels teach")
    parser.add_argument("--output", type=Path, required=True, help="model folder with the new tower")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--last-share", type=float, default=0.25, help="share of the steps, the last ones, at 126 px"
    )
    parser.add_argument("--size", type=int, default=126, help="picture side of the other steps")
    parser.add_argument("--keep", type=float, default=0.45, help="share of the patches that they see")
    parser.add_argument("--trust", type=float, default=0.5, help="weight of the teacher's probabilities")
    parser.add_argument(
        "--hold-out", type=float, default=0.0, help="share of the training scenes to measure on"
    )
    parser.add_argument(
        "--test", action="store_true", help="measure the heads on the test scenes, at the end"
    )
    parser.add_argument("--save-steps", type=int, default=100)
    args = parser.parse_args(argv)
    try:
        print(json.dumps(train(args)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
