"""Teach the nano language model to read pictures: every task of the generator, with a hand on its attention.

Beside the usual loss on the answers, one layer is told where to look while it answers: at the patches of the object whose
box or name it is about to say, or at the centres of the objects it counts. The generator knows them. Without this hint a
model of two million parameters needs many times as many examples before it looks at the picture at all. The vision tower
stays as it is; projector and language model train. Goes on where it was stopped.

    python scripts/nano/train_llm.py --llm DIR --tower DIR --projector FILE --output DIR
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from pretrain_tower import (
    COLOUR_NAMES,
    KIND_NAMES,
    MOST,
    SCENE_NAMES,
    assign,
    features,
    prepare,
    scenes,
    turned,
)
from torch import Tensor
from tqdm import tqdm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from geochat.data.encode import IGNORE_INDEX
from geochat.data.sample import IMAGE_TOKEN, Sample, Turn
from geochat.data.synthetic import Scene, SceneObject
from geochat.data.synthetic_tasks import Question, conversation
from geochat.model.build import build_model
from geochat.model.checkpoint import load, save_model

LAYER = 2
"""The layer that is told where to look. Any one of its heads will do, so that each may care for a part of an answer."""

SHARP = 4.0
"""How much the best head counts before the others (a soft maximum)."""

Hint = tuple[int, list[int]]
"""A position in the sequence, and the patches to look at from there."""


def scene_objects(rows: Tensor) -> list[SceneObject]:
    """Objects of a scene from their label rows [MOST, 7], in reading order."""
    found = [
        SceneObject(
            KIND_NAMES[int(row[0]) - 1],
            COLOUR_NAMES[int(row[1])],
            *(float(v) for v in row[2:6]),
            float(row[6]) % 360,
        )
        for row in rows
        if row[0] > 0
    ]
    return sorted(found, key=lambda item: (round(item.y, 1), item.x))


class Writer:
    """One scene → ids, labels and hints."""

    def __init__(self, processor: object, turns: int) -> None:
        self.encoder = processor.encoder(2048, False)
        self.image_token_id, self.turns = processor.image_token_id, turns
        vocabulary = processor.tokenizer.get_vocab()
        self.numbers = {vocabulary[f"<{n}>"]: n for n in range(101)}
        self.opens = {vocabulary["▁{"], vocabulary["{"]}

    def write(
        self, name: str, rows: Tensor, side: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, list[Hint]]:
        items = scene_objects(rows)
        questions = conversation(Scene(name, _NO_PICTURE, items), rng, int(rng.integers(1, self.turns + 1)))
        said = [turn for q in questions for turn in (Turn("user", q.text), Turn("assistant", q.answer))]
        said[0] = Turn("user", f"{IMAGE_TOKEN}\n{said[0].text}")
        encoded = self.encoder.encode(Sample("", ("",), tuple(said)))
        return encoded.input_ids, encoded.labels, self._hints(encoded, questions, items, rows, side)

    def _hints(
        self, encoded: object, questions: list[Question], items: list[SceneObject], rows: Tensor, side: int
    ) -> list[Hint]:
        ids, labels = encoded.input_ids.tolist(), encoded.labels
        index, centre = assign(rows[None], side)
        order = scene_objects_order(rows)
        start = ids.index(self.image_token_id)
        patches = [
            [start + p for p in (index[0] == order[i]).nonzero().flatten().tolist()]
            for i in range(len(items))
        ]
        centres = [[p for p in patches[i] if centre[0, p - start]] for i in range(len(items))]
        by_box = {item.box().format(): i for i, item in enumerate(items)}
        hints: list[Hint] = []
        supervised = labels != IGNORE_INDEX
        edges = np.flatnonzero(np.diff(np.concatenate([[0], supervised.view(np.int8), [0]])))
        for question, (first, last) in zip(questions, edges.reshape(-1, 2).tolist(), strict=True):
            if question.task in ("count", "presence"):
                wanted = [
                    p
                    for i, item in enumerate(items)
                    if item.kind == question.columns["class"]
                    for p in centres[i]
                ]
                hints += [(row, wanted) for row in range(first - 1, last - 1) if wanted]
            elif question.task == "identify":
                box = question.text[question.text.index("{") :]
                hints += [
                    (row, patches[by_box[box]]) for row in range(first - 1, last - 1) if patches[by_box[box]]
                ]
            else:
                for at in range(first, last):
                    if ids[at] in self.opens and ids[at + 1] in self.numbers:
                        box = (
                            "{" + "".join(f"<{self.numbers[ids[at + k]]}>" for k in range(1, 5))
                            if self._whole(ids, at)
                            else ""
                        )
                        box = f"{box}|<{self.numbers[ids[at + 6]]}>}}" if box else ""
                        if patches[by_box[box]] if box in by_box else False:
                            hints += [(at + k, patches[by_box[box]]) for k in range(-1, 6)]
        return hints

    def _whole(self, ids: list[int], at: int) -> bool:
        return all(ids[at + k] in self.numbers for k in (1, 2, 3, 4, 6))


def scene_objects_order(rows: Tensor) -> list[int]:
    """Row numbers of a scene's objects in the order of `scene_objects`."""
    present = [i for i in range(MOST) if rows[i, 0] > 0]
    return sorted(present, key=lambda i: (round(float(rows[i, 3]), 1), float(rows[i, 2])))


class _NoPicture:
    width = height = 168


_NO_PICTURE = _NoPicture()  # questions need a picture's size only


class Watched:
    """Queries and keys of the layer that is told where to look."""

    def __init__(self, model: object) -> None:
        language = model.model.language_model
        attention = language.layers[LAYER].self_attn
        self.rotary, self.width = language.rotary_emb, attention.head_dim
        attention.q_proj.register_forward_hook(lambda _m, _i, out: setattr(self, "queries", out))
        attention.k_proj.register_forward_hook(lambda _m, _i, out: setattr(self, "keys", out))

    def loss(self, hints: list[list[Hint]]) -> Tensor:
        """−log of the attention that the best of the heads give to the patches they should look at."""
        batch, length, _ = self.keys.shape
        q, k = (
            part.view(batch, length, -1, self.width).transpose(1, 2) for part in (self.queries, self.keys)
        )
        cos, sin = self.rotary(q, torch.arange(length)[None])
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
        total, count = q.new_zeros(()), 0
        columns = torch.arange(length)
        for b, told in enumerate(hints):
            if not told:
                continue
            rows = torch.tensor([row for row, _ in told])
            scores = q[b][:, rows] @ k[b].transpose(1, 2) / self.width**0.5  # [heads, rows, length]
            scores = scores.masked_fill(columns[None, None] > rows[None, :, None], -torch.inf).log_softmax(-1)
            wanted = torch.full((len(told), length), -torch.inf)
            for r, (_, patches) in enumerate(told):
                wanted[r, patches] = 0.0
            looked = torch.logsumexp(
                scores + wanted[None], -1
            )  # [heads, rows]: log of the share that looks there
            total = total - (torch.logsumexp(SHARP * looked, 0) / SHARP).sum()
            count += len(told)
        return total / max(count, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, help="model folder to go on from, instead of the three parts")
    parser.add_argument("--llm", type=Path)
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--projector", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("playground/runs/nano/scenes"))
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--turns", type=int, default=6, help="most questions in a conversation")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--hint", type=float, default=0.5, help="weight of the attention loss at the start; it fades"
    )
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.start:
        model, processor = load(args.start, dtype=torch.float32)
    else:
        model, processor = build_model(args.llm, args.tower, args.projector, image_size=84)
    model.train()
    model.model.vision_tower.requires_grad_(False)
    writer, watched = Writer(processor, args.turns), Watched(model)
    pixels, names, objects = scenes(args.cache, args.seed, args.scenes)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.steps, pct_start=0.04, cycle_momentum=False
    )
    args.output.mkdir(parents=True, exist_ok=True)
    state, first = args.output / "training_state.pt", 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        first = saved["step"]
    rng = np.random.default_rng(first + 5)
    averages = {"loss": 0.0, "hint": 0.0}
    started = time.time()
    for step in tqdm(range(first, args.steps), initial=first, total=args.steps, desc="llm", mininterval=20):
        chosen = np.sort(rng.choice(len(names), args.batch_size, replace=False))
        batch, labels = turned(
            prepare(pixels[chosen], 84), torch.from_numpy(objects[chosen]), int(rng.integers(8))
        )
        written = [
            writer.write(SCENE_NAMES[int(name)], rows, 6, rng)
            for name, rows in zip(names[chosen], labels, strict=True)
        ]
        length = max(len(ids) for ids, _, _ in written)
        ids = torch.full((len(written), length), processor.pad_token_id)
        wanted = torch.full((len(written), length), IGNORE_INDEX)
        for row, (tokens, targets, _) in enumerate(written):
            ids[row, : len(tokens)], wanted[row, : len(tokens)] = (
                torch.from_numpy(tokens),
                torch.from_numpy(targets),
            )
        with torch.no_grad():
            seen = features(model.model.vision_tower, batch)
        embeds = model.get_input_embeddings()(ids)
        spots = (ids == processor.image_token_id)[..., None]
        embeds = embeds.masked_scatter(spots, model.model.multi_modal_projector(seen))
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
        keep = wanted[:, 1:] != IGNORE_INDEX
        loss = F.cross_entropy(model.lm_head(hidden[keep]), wanted[:, 1:][keep])
        hint = watched.loss([hints for _, _, hints in written])
        weight = args.hint * max(0.0, 1 - step / (0.7 * args.steps))
        optimizer.zero_grad(set_to_none=True)
        (loss + weight * hint).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        for key, value in (("loss", loss), ("hint", hint)):
            averages[key] = value.item() if step == first else 0.95 * averages[key] + 0.05 * value.item()
        if (step + 1) % 25 == 0:
            line = {
                "step": step + 1,
                **{k: round(v, 4) for k, v in averages.items()},
                "seconds": round(time.time() - started),
            }
            with (args.output / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            torch.save({**saved, "step": step + 1}, state.with_suffix(".partial"))
            state.with_suffix(".partial").replace(state)
            save_model(model, processor, args.output / "model")


if __name__ == "__main__":
    main()
