"""Teach the nano language model to read pictures: every task of the generator, with a hand on its attention.

Beside the usual loss on the answers, two layers are told where to look. Early, the name of a class in a question looks at
the centres of its objects and, with a share that shrinks as there are more of them, at the first token: so it learns how
many there are. Later, an answer looks at the patches of the object whose box or name it is about to say, or back at the
class that was asked for. The generator knows all of these. Without the hints a model of two million parameters needs many
times as many examples before it looks at the picture at all. The vision tower stays as it is; projector and language model
train. Goes on where it was stopped; under torchrun every process takes its part of each batch.

    python scripts/nano/train_llm.py --llm DIR --tower DIR --projector FILE --output DIR
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pretrain_tower import (
    COLOUR_NAMES,
    KIND_NAMES,
    MOST,
    SCENE_NAMES,
    assign,
    features,
    join,
    prepare,
    scenes,
    share_gradients,
    turned,
)
from torch import Tensor
from tqdm import tqdm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from geochat.data.encode import IGNORE_INDEX
from geochat.data.sample import IMAGE_TOKEN, Sample, Turn
from geochat.data.synthetic import Scene, SceneObject
from geochat.data.synthetic_tasks import conversation
from geochat.model.build import build_model
from geochat.model.checkpoint import load, save_model

COUNTING, READING = 1, 2
"""The layers that are told where to look. Any one head of a layer will do, so that each may care for a part."""

SHARP = 4.0
"""How much the best head counts before the others (a soft maximum)."""

FIRST = 3.0
"""Share of attention that counting leaves at the first token, measured in objects: n objects receive n / (n + FIRST)."""

COORDINATE_SPREAD, ANGLE_SPREAD = 1.0, 3.0
"""Standard deviations of the bell that is learned around a number: one percent beside the truth is nearly right."""

SHORT_WEIGHT = 3.0
"""A short answer (yes, no, a number) is one token or two among the thirty of a box list: it counts this much more."""


POOL = 8
"""Batches that are written at once and sorted by length."""


@dataclass(frozen=True)
class Hint:
    """From a position, look at these positions: all together (shares None), or each with its share."""

    layer: int
    row: int
    where: list[int]
    shares: list[float] | None = None


@dataclass(frozen=True)
class Written:
    """One conversation: ids and labels [n], the weight and the bell's spread of every label [n], and the hints."""

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray
    spreads: np.ndarray
    hints: list[Hint]


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
    """One scene → a conversation with its hints."""

    def __init__(self, processor: object, turns: int) -> None:
        self.encoder = processor.encoder(2048, False)
        self.image_token_id, self.turns = processor.image_token_id, turns
        vocabulary = processor.tokenizer.get_vocab()
        self.numbers = {vocabulary[f"<{n}>"]: n for n in range(101)}
        self.opens = {vocabulary["▁{"], vocabulary["{"]}
        encode = lambda text: processor.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
        self.nouns = {kind: (encode(f"{kind}s"), encode(kind)) for kind in KIND_NAMES}

    def write(self, name: str, rows: Tensor, side: int, rng: np.random.Generator) -> Written:
        items = scene_objects(rows)
        turns = int(rng.integers(1 + self.turns // 2, self.turns + 1))
        questions = conversation(Scene(name, _NO_PICTURE, items), rng, turns)
        said = [turn for q in questions for turn in (Turn("user", q.text), Turn("assistant", q.answer))]
        said[0] = Turn("user", f"{IMAGE_TOKEN}\n{said[0].text}")
        encoded = self.encoder.encode(Sample("", ("",), tuple(said)))
        ids, labels = encoded.input_ids, encoded.labels
        weights, spreads = np.ones(len(ids), np.float32), np.zeros(len(ids), np.float32)
        hints: list[Hint] = []
        patches, centres = self._places(ids, rows, side)
        by_box = {item.box().format(): i for i, item in enumerate(items)}
        known = ids.tolist()
        supervised = np.concatenate([[0], (labels != IGNORE_INDEX).view(np.int8), [0]])
        before = 0
        for question, (first, last) in zip(
            questions, np.flatnonzero(np.diff(supervised)).reshape(-1, 2).tolist(), strict=True
        ):
            if question.task in ("count", "presence", "comparison"):
                weights[first:last] = SHORT_WEIGHT
                for kind, row in self._named(known, before, first):
                    seen = [p for i, item in enumerate(items) if item.kind == kind for p in centres[i]]
                    each = 1 / (len(seen) + FIRST)
                    hints.append(Hint(COUNTING, row, [0, *seen], [FIRST * each] + [each] * len(seen)))
                    hints += [Hint(READING, at, [row]) for at in range(first - 1, last - 1)]
            elif question.task == "identify":
                there = patches[by_box[question.text[question.text.index("{") :]]]
                hints += [Hint(READING, at, there) for at in range(first - 1, last - 1) if there]
            else:
                for at in range(first, last - 6):
                    if known[at] in self.opens and all(
                        known[at + k] in self.numbers for k in (1, 2, 3, 4, 6)
                    ):
                        x1, y1, x2, y2, angle = (self.numbers[known[at + k]] for k in (1, 2, 3, 4, 6))
                        spreads[at + 1 : at + 5], spreads[at + 6] = COORDINATE_SPREAD, ANGLE_SPREAD
                        there = patches[by_box[f"{{<{x1}><{y1}><{x2}><{y2}>|<{angle}>}}"]]
                        hints += [Hint(READING, at + k, there) for k in range(-1, 6) if there]
            before = last
        return Written(ids, labels, weights, spreads, hints)

    def _places(self, ids: np.ndarray, rows: Tensor, side: int) -> tuple[list[list[int]], list[list[int]]]:
        """For every object in reading order: the positions of its patches, and of those that hold its centre."""
        index, centre = assign(rows[None], side)
        start = int(np.flatnonzero(ids == self.image_token_id)[0])
        patches = [(index[0] == row).nonzero().flatten().tolist() for row in reading_order(rows)]
        return (
            [[start + p for p in of] for of in patches],
            [[start + p for p in of if centre[0, p]] for of in patches],
        )

    def _named(self, ids: list[int], first: int, last: int) -> list[tuple[str, int]]:
        """Classes named between two positions, with the position of the name's last token."""
        found = []
        for kind, names in self.nouns.items():
            for name in names:
                ends = [
                    i + len(name) - 1
                    for i in range(first, last - len(name))
                    if ids[i : i + len(name)] == name
                ]
                found += [(kind, end) for end in ends]
        return found


def reading_order(rows: Tensor) -> list[int]:
    """Row numbers of a scene's objects in the order of `scene_objects`."""
    present = [i for i in range(MOST) if rows[i, 0] > 0]
    return sorted(present, key=lambda i: (round(float(rows[i, 3]), 1), float(rows[i, 2])))


class _NoPicture:
    width = height = 168


_NO_PICTURE = _NoPicture()  # questions need a picture's size only


class Watched:
    """Queries and keys of the layers that are told where to look."""

    def __init__(self, model: object) -> None:
        language = model.model.language_model
        self.rotary = language.rotary_emb
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        for layer in (COUNTING, READING):
            attention = language.layers[layer].self_attn
            self.width = attention.head_dim
            attention.q_proj.register_forward_hook(partial(self._keep, self.queries, layer))
            attention.k_proj.register_forward_hook(partial(self._keep, self.keys, layer))

    @staticmethod
    def _keep(kept: dict[int, Tensor], layer: int, _module: object, _inputs: object, out: Tensor) -> None:
        kept[layer] = out

    def loss(self, hints: list[list[Hint]]) -> dict[int, Tensor]:
        """For every layer, how far the best of the heads is from looking where it should, in nats, mean over hints."""
        return {layer: self._loss(layer, hints) for layer in (COUNTING, READING)}

    def _loss(self, layer: int, hints: list[list[Hint]]) -> Tensor:
        batch, length, _ = self.keys[layer].shape
        q, k = (
            part[layer].view(batch, length, -1, self.width).transpose(1, 2)
            for part in (self.queries, self.keys)
        )
        q, k = apply_rotary_pos_emb(q, k, *self.rotary(q, torch.arange(length)[None]))
        total, count = q.new_zeros(()), 0
        columns = torch.arange(length)
        for b, every in enumerate(hints):
            told = [hint for hint in every if hint.layer == layer]
            if not told:
                continue
            rows = torch.tensor([hint.row for hint in told])
            scores = q[b][:, rows] @ k[b].transpose(1, 2) / self.width**0.5  # [heads, rows, length]
            scores = scores.masked_fill(columns > rows[:, None], -torch.inf).log_softmax(-1)
            together = torch.full((len(told), length), -torch.inf)
            shares = torch.zeros(len(told), length)
            floor = torch.zeros(len(told))
            for r, hint in enumerate(told):
                if hint.shares is None:
                    together[r, hint.where] = 0.0
                else:
                    together[r] = 0.0
                    shares[r, hint.where] = torch.tensor(hint.shares)
                    floor[r] = sum(share * math.log(share) for share in hint.shares)
            alone = torch.tensor([hint.shares is not None for hint in told])
            within = (shares * scores.masked_fill(shares == 0, 0.0)).sum(-1) - floor  # [heads, rows]
            looked = torch.where(alone, within, torch.logsumexp(scores + together, -1))
            total = total - (torch.logsumexp(SHARP * looked, 0) / SHARP).sum()
            count += len(told)
        return total / max(count, 1)


class Answers:
    """The loss on what was answered: cross entropy, with a bell of truths around a box's numbers."""

    def __init__(self, number_ids: list[int]) -> None:
        self.number_ids = torch.tensor(number_ids)
        self.value = {token: n for n, token in enumerate(number_ids)}

    def loss(
        self, logits: Tensor, labels: Tensor, weights: Tensor, spreads: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted mean, and the plain means over words and over numbers, in nats above what can be reached."""
        logs = logits.log_softmax(-1)
        plain = F.nll_loss(logs, labels, reduction="none")
        soft = spreads > 0
        marks = torch.arange(len(self.number_ids))
        values = torch.tensor([self.value[token] for token in labels[soft].tolist()])
        bell = torch.softmax(-((marks - values[:, None]) ** 2) / (2 * spreads[soft, None] ** 2), -1)
        beside = (bell * (bell.clamp(min=1e-12).log() - logs[soft][:, self.number_ids])).sum(-1)
        each = plain.index_put((soft.nonzero().squeeze(1),), beside)
        return (each * weights).sum() / weights.sum(), {
            "words": plain[~soft].mean(), "numbers": beside.mean() if len(beside) else logits.new_zeros(()),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--initial", type=Path, help="model folder to go on from, instead of the three parts")
    parser.add_argument("--llm", type=Path)
    parser.add_argument("--tower", type=Path)
    parser.add_argument("--projector", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cache", type=Path, default=Path("playground/runs/nano/scenes"))
    parser.add_argument("--scenes", type=int, default=24000)
    parser.add_argument("--seed", type=int, default=100_000_000)
    parser.add_argument("--steps", type=int, default=4400)
    parser.add_argument("--batch-size", type=int, default=16, help="of all processes together")
    parser.add_argument("--turns", type=int, default=6, help="most questions in a conversation")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--hint", type=float, default=0.5, help="weight of the hints at the start; it fades away"
    )
    args = parser.parse_args()

    world, rank = join()
    torch.manual_seed(0)
    if args.initial:
        model, processor = load(args.initial, dtype=torch.float32)
    else:
        model, processor = build_model(args.llm, args.tower, args.projector, image_size=84)
    model.train()
    model.model.vision_tower.requires_grad_(False)
    writer, watched = Writer(processor, args.turns), Watched(model)
    answers = Answers(list(writer.numbers))
    if rank == 0:
        scenes(args.cache, args.seed, args.scenes)
    if world > 1:
        dist.barrier()
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
    averages: dict[str, float] = {}
    batches = stream(writer, pixels, names, objects, args.batch_size // world, first, rank)
    started = time.time()
    for step in tqdm(
        range(first, args.steps),
        initial=first,
        total=args.steps,
        desc="llm",
        mininterval=20,
        disable=rank > 0,
    ):
        batch, written = next(batches)
        ids = padded([one.ids for one in written], processor.pad_token_id)
        wanted = padded([one.labels for one in written], IGNORE_INDEX)[:, 1:].long()
        with torch.no_grad():
            seen = features(model.model.vision_tower, batch)
        embeds = model.get_input_embeddings()(ids)
        spots = (ids == processor.image_token_id)[..., None]
        embeds = embeds.masked_scatter(spots, model.model.multi_modal_projector(seen))
        hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
        keep = wanted != IGNORE_INDEX
        weights, spreads = (
            padded([getattr(one, name) for one in written], 0.0)[:, 1:][keep]
            for name in ("weights", "spreads")
        )
        loss, parts = answers.loss(model.lm_head(hidden[keep]), wanted[keep], weights, spreads)
        hints = watched.loss([one.hints for one in written])
        weight = args.hint * max(0.0, 1 - step / (0.7 * args.steps))
        optimizer.zero_grad(set_to_none=True)
        (loss + weight * sum(hints.values())).backward()
        share_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        now = {**parts, "counting": hints[COUNTING], "reading": hints[READING]}
        averages = {key: 0.95 * averages.get(key, v.item()) + 0.05 * v.item() for key, v in now.items()}
        if rank > 0:
            continue
        if (step + 1) % 25 == 0:
            line = {"step": step + 1, **{k: round(v, 4) for k, v in averages.items()}}
            with (args.output / "log.jsonl").open("a") as log:
                log.write(json.dumps({**line, "seconds": round(time.time() - started)}) + "\n")
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            saved = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
            }
            torch.save({**saved, "step": step + 1}, state.with_suffix(".partial"))
            state.with_suffix(".partial").replace(state)
            save_model(model, processor, args.output / "model")
    if world > 1:
        dist.destroy_process_group()


def stream(
    writer: Writer,
    pixels: np.ndarray,
    names: np.ndarray,
    objects: np.ndarray,
    size: int,
    first: int,
    rank: int,
) -> Iterator[tuple[Tensor, list[Written]]]:
    """Endless batches (pictures [size, 3, 84, 84], conversations), each of about one length so that little is padding.

    The pictures are turned eight ways. All processes take a pool's batches in the same order, short or long together.
    """
    rng, order = np.random.default_rng([first, 5, rank]), np.random.default_rng([first, 6])
    while True:
        pictures, written = [], []
        for _ in range(POOL):
            chosen = np.sort(rng.choice(len(names), size, replace=False))
            batch, labels = turned(
                prepare(pixels[chosen], 84), torch.from_numpy(objects[chosen]), int(rng.integers(8))
            )
            pictures.append(batch)
            written += [
                writer.write(SCENE_NAMES[int(name)], rows, 6, rng)
                for name, rows in zip(names[chosen], labels, strict=True)
            ]
        together = torch.cat(pictures)
        by_length = np.argsort([len(one.ids) for one in written], kind="stable").reshape(POOL, size)
        for part in order.permutation(POOL):
            yield together[by_length[part]], [written[i] for i in by_length[part]]


def padded(rows: list[np.ndarray], value: float) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], True, value)


if __name__ == "__main__":
    main()
