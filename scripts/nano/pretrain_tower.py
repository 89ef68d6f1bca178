"""Teach the nano model's vision tower to see and to localise, from the dense labels that the scene generator gives.

Every patch of an object learns to name its class and colour and to state the object's oriented box; every patch learns the
scene and the counts. Batches alternate between three picture sizes, the position table resampled each time exactly as
`geochat.model.vision` does it, so the finished tower bears being taken from 84 px to 126 px. Writes a CLIP folder that
`geochat.model.build` takes as `--vision_tower`; the dense heads are thrown away. Under torchrun every process takes its
part of each batch.

    python scripts/nano/pretrain_tower.py --output playground/runs/nano/tower
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from geochat.data.boxes import Box
from geochat.data.synthetic import KINDS, PALETTE, SCENES, draw_scene
from geochat.model.vision import resample_positions

KIND_NAMES, COLOUR_NAMES, SCENE_NAMES = list(KINDS), list(PALETTE), sorted(SCENES)
MOST = 12
"""Objects kept per scene (no scene holds more)."""

CONFIG = CLIPVisionConfig(
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=6,
    image_size=84,
    patch_size=14,
)


def _scene(seed: int) -> tuple[int, np.ndarray, np.ndarray]:
    """(scene class, pixels [168, 168, 3], objects [MOST, 7]: kind + 1, colour, x, y, length, width, heading)."""
    scene = draw_scene(seed)
    rows = np.zeros((MOST, 7), np.float32)
    for row, item in zip(rows, scene.objects, strict=False):
        row[:] = (
            KIND_NAMES.index(item.kind) + 1, COLOUR_NAMES.index(item.colour),
            item.x, item.y, item.length, item.width, item.heading,
        )  # fmt: skip
    return SCENE_NAMES.index(scene.name), np.asarray(scene.image), rows


def scenes(folder: Path, first: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scenes drawn once and kept in a folder: pixels (memory-mapped), scene classes, objects."""
    pixels_file, labels_file = folder / f"{first}_{count}.npy", folder / f"{first}_{count}.pkl"
    if not labels_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.lib.format.open_memmap(pixels_file, "w+", np.uint8, (count, 168, 168, 3))
        names, objects = np.zeros(count, np.int64), np.zeros((count, MOST, 7), np.float32)
        with ProcessPoolExecutor() as pool:
            drawn = pool.map(_scene, range(first, first + count), chunksize=32)
            for i, (name, image, rows) in enumerate(tqdm(drawn, total=count, desc="scenes", unit="scene")):
                names[i], pixels[i], objects[i] = name, image, rows
        pixels.flush()
        labels_file.with_suffix(".partial").write_bytes(pickle.dumps((names, objects)))
        labels_file.with_suffix(".partial").replace(labels_file)
    names, objects = pickle.loads(labels_file.read_bytes())  # written by this function
    return np.load(pixels_file, mmap_mode="r"), names, objects


def turned(pixels: Tensor, objects: Tensor, way: int) -> tuple[Tensor, Tensor]:
    """One of the eight symmetries of the square, on pixels [B, 3, S, S] and objects [B, MOST, 7] alike."""
    objects = objects.clone()
    if way >= 4:
        pixels = pixels.flip(3)
        objects[..., 2], objects[..., 6] = 1 - objects[..., 2], 180 - objects[..., 6]
    for _ in range(way % 4):  # a quarter turn clockwise on screen
        x, y = objects[..., 2].clone(), objects[..., 3].clone()
        objects[..., 2], objects[..., 3], objects[..., 6] = 1 - y, x, objects[..., 6] + 90
    return torch.rot90(pixels, -(way % 4), (2, 3)), objects


def boxes(objects: Tensor) -> Tensor:
    """Oriented boxes [..., 5] in percent and degrees, as `SceneObject.box` states them."""
    _, _, x, y, length, width, heading = objects.unbind(-1)
    heading = torch.where(length == width, 0.0, torch.remainder(heading, 180))
    across = heading >= 90
    angle = torch.remainder(heading, 90)
    across = torch.where(angle == 0, ~across, across)
    angle = torch.where(angle == 0, 90.0, angle)
    w, h = torch.where(across, width, length), torch.where(across, length, width)
    corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1) * 100
    return torch.cat([corners, angle[..., None]], -1)


def assign(objects: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Which object each patch [B, side²] shows (MOST: none), and whether the object's centre lies in that patch."""
    grid = (torch.arange(side) + 0.5) / side
    py, px = (axis.reshape(-1) for axis in torch.meshgrid(grid, grid, indexing="ij"))
    x, y, length, width, heading = (objects[..., i, None] for i in range(2, 7))  # [B, MOST, 1]
    turn = torch.deg2rad(heading)
    u = (px - x) * turn.cos() + (py - y) * turn.sin()
    v = (py - y) * turn.cos() - (px - x) * turn.sin()
    far = torch.maximum(2 * u.abs() / length.clamp(min=1e-6), 2 * v.abs() / width.clamp(min=1e-6))
    centre = ((x * side).floor() == (px * side).floor()) & ((y * side).floor() == (py * side).floor())
    far = torch.where(centre, far - 10, far).masked_fill(
        objects[..., 0, None] == 0, math.inf
    )  # [B, MOST, side²]
    best, index = far.min(1)
    return torch.where(best < 1.1, index, MOST), best < -5


class Heads(nn.Module):
    """What the patch features must tell. Only for this training."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.sizes = {
            "kind": len(KINDS) + 1, "colour": len(PALETTE), "centre": 2, "x1": 101, "y1": 101, "x2": 101, "y2": 101,
            "angle": 91, "scene": len(SCENES), "counts": 9 * len(KINDS),
        }  # fmt: skip
        self.all = nn.Linear(hidden, sum(self.sizes.values()))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        parts = self.all(self.norm(features)).split(list(self.sizes.values()), -1)
        return dict(zip(self.sizes, parts, strict=True))


def features(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Patch features [B, side², hidden] of the last but one layer, the position table resampled to the picture's size."""
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels)
    side = patches.shape[-1]
    patches = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat([embeddings.class_embedding.expand(len(pixels), 1, -1), patches], 1)
    hidden = tower.pre_layrnorm(tokens + resample_positions(embeddings.position_embedding.weight, side))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, attention_mask=None)
    return hidden[:, 1:]


def soft_bins(values: Tensor, bins: int, spread: float) -> Tensor:
    """Targets [..., bins]: a bell around the value, since a coordinate one percent off is nearly right."""
    marks = torch.arange(bins)
    return torch.softmax(-((marks - values.clamp(0, bins - 1)[..., None]) ** 2) / (2 * spread**2), -1)


def loss_of(told: dict[str, Tensor], names: Tensor, objects: Tensor, side: int) -> Tensor:
    index, centre = assign(objects, side)
    padded = torch.cat([objects, torch.zeros_like(objects[:, :1])], 1)
    shown = padded.gather(1, index[..., None].expand(-1, -1, 7))  # [B, side², 7]
    seen = index < MOST
    kinds = shown[..., 0].long()
    weights = torch.ones(len(KINDS) + 1).index_fill(0, torch.tensor(0), 0.5)
    total = F.cross_entropy(told["kind"].flatten(0, 1), kinds.flatten(), weight=weights)
    total = total + F.cross_entropy(told["centre"].flatten(0, 1), centre.long().flatten())
    total = total + 0.5 * F.cross_entropy(told["colour"][seen], shown[seen][:, 1].long())
    target = boxes(shown[seen])
    for i, name in enumerate(("x1", "y1", "x2", "y2", "angle")):
        bins, spread = (91, 3.0) if name == "angle" else (101, 1.0)
        total = total + 0.4 * F.cross_entropy(told[name][seen], soft_bins(target[:, i], bins, spread))
    patches = side * side
    total = total + 0.3 * F.cross_entropy(told["scene"].flatten(0, 1), names.repeat_interleave(patches))
    counts = torch.stack([(objects[..., 0] == k + 1).sum(1) for k in range(len(KINDS))], 1).clamp(max=8)
    guesses = told["counts"].reshape(-1, 9)
    return total + 0.5 * F.cross_entropy(guesses, counts[:, None].expand(-1, patches, -1).reshape(-1))


def prepare(raw: np.ndarray, size: int) -> Tensor:
    pixels = torch.from_numpy(raw).permute(0, 3, 1, 2).float() / 255
    pixels = F.interpolate(
        pixels, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


@torch.no_grad()
def evaluate(
    tower: CLIPVisionModel, heads: Heads, data: tuple[np.ndarray, np.ndarray, np.ndarray], size: int
) -> dict[str, float]:
    """Scene accuracy, and for the patches that hold an object's centre: class right, rotated IoU ≥ 0.5."""
    hits = {"scene": 0.0, "kind": 0.0, "iou50": 0.0, "counts": 0.0}
    objects_seen, scenes_seen = 0, len(data[1])
    for start in range(0, scenes_seen, 64):
        part = slice(start, start + 64)
        objects = torch.from_numpy(data[2][part])
        told = heads(features(tower, prepare(np.asarray(data[0][part]), size)))
        hits["scene"] += float((told["scene"].mean(1).argmax(-1).numpy() == data[1][part]).sum())
        counts = torch.stack([(objects[..., 0] == k + 1).sum(1) for k in range(len(KINDS))], 1)
        guess = told["counts"].mean(1).view(len(objects), len(KINDS), 9).argmax(-1)
        hits["counts"] += float((guess == counts).float().mean(1).sum())
        index, centre = assign(objects, size // 14)
        for b, p in centre.nonzero().tolist():
            item = objects[b, index[b, p]]
            corners = [float(told[name][b, p].argmax()) for name in ("x1", "y1", "x2", "y2", "angle")]
            truth = Box(*boxes(item).tolist())
            objects_seen += 1
            hits["kind"] += float(told["kind"][b, p].argmax() == item[0])
            hits["iou50"] += float(Box(*corners).iou(truth, 100, 100) >= 0.5)
    return {
        k: round(v / (scenes_seen if k in ("scene", "counts") else objects_seen), 4) for k, v in hits.items()
    }


def join() -> tuple[int, int]:
    """(processes, this one's number): those that torchrun started, or one."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world > 1:
        dist.init_process_group("gloo")
    return world, rank


def share_gradients(parameters: list[nn.Parameter], world: int) -> None:
    """Mean of the processes' gradients, as one message."""
    if world == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for grad, mean in zip(grads, flat.div_(world).split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--initial", type=Path, help="tower folder to go on from, with new heads")
    parser.add_argument("--cache", type=Path, default=Path("playground/runs/nano/scenes"))
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=100_000_000, help="seed of the first scene")
    parser.add_argument("--steps", type=int, default=2200)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    args = parser.parse_args()

    world, rank = join()
    torch.manual_seed(0)
    rng = np.random.default_rng([0, rank])
    if rank == 0:
        scenes(args.cache, args.seed, args.scenes)
        scenes(args.cache, args.seed - 1000, 300)
    if world > 1:
        dist.barrier()
    pixels, names, objects = scenes(args.cache, args.seed, args.scenes)
    held_out = scenes(args.cache, args.seed - 1000, 300)
    tower = CLIPVisionModel.from_pretrained(args.initial).float() if args.initial else CLIPVisionModel(CONFIG)
    heads = Heads(CONFIG.hidden_size)
    parameters = [p for module in (tower, heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.03, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.06, cycle_momentum=False
    )
    args.output.mkdir(parents=True, exist_ok=True)
    state = args.output / "training_state.pt"
    first = 0
    if state.exists():  # goes on where an earlier run was stopped
        saved = torch.load(state, weights_only=True)
        tower.load_state_dict(saved["tower"])
        heads.load_state_dict(saved["heads"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
        rng = np.random.default_rng([first, rank])
    sizes = np.random.default_rng([first, 1])  # the same in every process, so that none waits for another
    started = time.time()
    bar = tqdm(
        range(first, args.steps),
        initial=first,
        total=args.steps,
        desc="tower",
        mininterval=10,
        disable=rank > 0,
    )
    running = 0.0
    for step in bar:
        chosen = np.sort(rng.choice(len(names), args.batch_size // world, replace=False))
        size = (84, 112, 126)[int(sizes.choice(3, p=(0.5, 0.1, 0.4)))]
        batch, labels = turned(
            prepare(pixels[chosen], size), torch.from_numpy(objects[chosen]), int(rng.integers(8))
        )
        gain = 1 + 0.08 * torch.randn(len(batch), 3, 1, 1)
        batch = batch * gain + 0.08 * torch.randn(len(batch), 3, 1, 1)
        loss = loss_of(heads(features(tower, batch)), torch.from_numpy(names[chosen]), labels, size // 14)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        share_gradients(parameters, world)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        running = 0.98 * running + 0.02 * loss.item()
        if rank == 0 and ((step + 1) % 500 == 0 or step + 1 == args.steps):
            scores = {size: evaluate(tower, heads, held_out, size) for size in (84, 126)}
            line = {
                "step": step + 1,
                "loss": round(running, 4),
                "seconds": round(time.time() - started),
                **scores,
            }
            tqdm.write(json.dumps(line))
            with (args.output / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            torch.save(
                {"tower": tower.state_dict(), "heads": heads.state_dict(), "optimizer": optimizer.state_dict(),
                 "schedule": schedule.state_dict(), "step": step + 1}, state.with_suffix(".partial")
            )  # fmt: skip
            state.with_suffix(".partial").replace(state)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    weights = {
        f"vision_model.{k}": v.contiguous() for k, v in tower.state_dict().items() if "position_ids" not in k
    }
    save_file(weights, args.output / "model.safetensors", metadata={"format": "pt"})
    (args.output / "config.json").write_text(
        json.dumps({**CONFIG.to_dict(), "architectures": ["CLIPVisionModel"]}, indent=2)
    )


if __name__ == "__main__":
    main()
