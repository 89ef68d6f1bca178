"""Questions and answers about procedural scenes: every GeoChat task, from the scene's own labels.

    python -m geochat.data.synthetic_tasks --output DIR --train 2000 --test 300

writes DIR/images/*.jpg, DIR/train.json (instruction records, several turns each) and DIR/questions.jsonl (one row per
question, with ground truth). Scenes for testing come from seeds that no training set can reach.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from geochat.data.boxes import BOX_PATTERN
from geochat.data.phrases import (
    DESCRIBE,
    SHORT,
    count_phrase,
    enumeration,
    place_name,
    scene_prompt,
    with_article,
)
from geochat.data.pool import process_pool
from geochat.data.sample import IMAGE_TOKEN, Sample, Turn
from geochat.data.staged import staged
from geochat.data.synthetic import KINDS, SCENES, Scene, SceneObject, draw_scene
from geochat.errors import stop

TEST_SEEDS = 1 << 40
"""Test scene i is drawn from seed TEST_SEEDS + i; training seeds stay below."""

SCENE_PROMPT = scene_prompt(sorted(SCENES))


@dataclass(frozen=True)
class Question:
    """A question about a scene: its text, the answer in words, and the truth that a scorer compares with."""

    task: str
    text: str
    answer: str
    truth: Any
    columns: dict[str, Any] = field(default_factory=dict)


def phrases(item: SceneObject) -> list[tuple[str, frozenset[tuple[str, str]]]]:
    """Ways to name an object, shortest first, each with the attributes it states."""
    kind, colour, place = ("kind", item.kind), ("colour", item.colour), ("place", place_name(item.x, item.y))
    ways = [
        (item.kind, {kind}),
        (f"{item.colour} {item.kind}", {kind, colour}),
        (f"{item.kind} at the {place[1]}", {kind, place}),
        (f"{item.colour} {item.kind} at the {place[1]}", {kind, colour, place}),
    ]
    if item.size:
        size = ("size", item.size)
        ways.insert(2, (f"{item.size} {item.kind}", {kind, size}))
        ways.append((f"{item.size} {item.colour} {item.kind} at the {place[1]}", {kind, colour, place, size}))
    return [(text, frozenset(stated)) for text, stated in ways]


def fits(item: SceneObject, stated: frozenset[tuple[str, str]]) -> bool:
    """Whether an object could be meant. A middle-sized one may pass for small or large, so it makes a phrase unclear."""
    facts = {"kind": item.kind, "colour": item.colour, "place": place_name(item.x, item.y), "size": item.size}
    return all(facts[name] == value or (name == "size" and not item.size) for name, value in stated)


def boxes_text(items: list[SceneObject], between: str = "") -> str:
    return between.join(item.box().format() for item in items)


def _polygons(items: list[SceneObject], side: int) -> list[list[list[float]]]:
    return [item.box().polygon(side, side).round(2).tolist() for item in items]


class Asker:
    """Asks about one scene. `rng` chooses what and how; every method returns None where the scene gives no such question."""

    def __init__(self, scene: Scene, rng: np.random.Generator) -> None:
        self.scene, self.rng = scene, rng
        self.counts = Counter(item.kind for item in scene.objects)
        self.possible = list(SCENES[scene.name])

    def _pick(self, options: list[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def scene_class(self) -> Question:
        return Question("scene", SCENE_PROMPT, self.scene.name, self.scene.name)

    def presence(self) -> Question:
        """Half of the answers are yes. A "no" asks as a rule for something that such a scene could hold."""
        present = list(self.counts)
        absent = [kind for kind in self.possible if kind not in self.counts]
        if self.rng.random() < 0.35 or not absent:
            absent = [kind for kind in KINDS if kind not in self.counts]
        yes = bool(present) and bool(self.rng.random() < 0.5)
        kind = self._pick(present if yes else absent)
        ask = self._pick(
            [f"Is there a {kind} in the image?", f"Are there any {kind}s?", f"Is a {kind} present?"]
        )
        answer = "yes" if yes else "no"
        return Question("presence", f"{ask}\n{SHORT}", answer, answer, {"class": kind})

    def comparison(self) -> Question | None:
        pairs = [(a, b) for a in self.possible for b in KINDS if a != b and self.counts[a] != self.counts[b]]
        more = [(a, b) for a, b in pairs if self.counts[a] > self.counts[b]]
        if not more:
            return None
        a, b = self._pick(more)
        yes = bool(self.rng.random() < 0.5)
        first, second = (a, b) if yes else (b, a)
        answer = "yes" if yes else "no"
        return Question("comparison", f"Are there more {first}s than {second}s?\n{SHORT}", answer, answer)

    def count(self) -> Question:
        absent = self.rng.random() < 0.12 or not self.counts
        kind = self._pick(self.possible if absent else list(self.counts))
        number = str(self.counts[kind])
        ask = self._pick([f"How many {kind}s are there in the image?", f"What is the number of {kind}s?"])
        return Question("count", f"{ask}\n{SHORT}", number, number, {"class": kind})

    def refer(self) -> Question | None:
        """One object, named by a phrase that fits no other."""
        if not self.scene.objects:
            return None
        item = self._pick(self.scene.objects)
        clear = [text for text, said in phrases(item) if sum(fits(o, said) for o in self.scene.objects) == 1]
        if not clear:
            return None
        return self._located(self._pick(clear), [item])

    def refer_several(self) -> Question | None:
        """All objects of a class, or of a class and colour, in reading order."""
        groups: dict[str, list[SceneObject]] = {}
        for item in self.scene.objects:
            for noun in (item.kind, f"{item.colour} {item.kind}"):
                groups.setdefault(noun, []).append(item)
        several = {noun: items for noun, items in groups.items() if 2 <= len(items) <= 6}
        if not several:
            return None
        noun = self._pick(sorted(several))
        return self._located(count_phrase(len(several[noun]), noun), several[noun])

    def _located(self, phrase: str, items: list[SceneObject]) -> Question:
        ask = self._pick(["Give me the location of", "Give me the location of", "Where is", "Locate"])
        columns = {"phrase": phrase, "objects": "single" if len(items) == 1 else "multi"}
        truth = _polygons(items, self.scene.image.width)
        return Question("refer", f"[refer] {ask} <p> {phrase} </p>", boxes_text(items), truth, columns)

    def identify(self) -> Question | None:
        if not self.scene.objects:
            return None
        item = self._pick(self.scene.objects)
        ask = self._pick(
            ["What is the object present at", "What is the object present at", "Identify the object at"]
        )
        answer = f"{item.colour} {item.kind}"
        return Question(
            "identify", f"[identify] {ask} {item.box().format()}", answer, answer, {"class": item.kind}
        )

    def grounding(self) -> Question:
        """A description in which every group of objects is followed by its boxes."""
        groups: dict[tuple[str, str], list[SceneObject]] = {}
        for item in self.scene.objects:
            groups.setdefault((item.colour, item.kind), []).append(item)
        parts = [
            f"<p>{count_phrase(len(items), f'{colour} {kind}')}</p> {boxes_text(items, '<delim>')}"
            for (colour, kind), items in groups.items()
        ]
        scene = with_article(self.scene.name).capitalize()
        answer = f"{scene} with {enumeration(parts)}." if parts else f"{scene}."
        truth = _polygons(self.scene.objects, self.scene.image.width)
        return Question("grounding", DESCRIBE, answer, truth)


MIX = {
    "scene_class": 1,
    "presence": 2,
    "comparison": 1,
    "count": 2,
    "refer": 3,
    "refer_several": 1,
    "identify": 2,
    "grounding": 1,
}
"""How often a training conversation asks what."""

DESCRIPTIONS = 0.15
"""Share of the training records that ask for the description and nothing else: otherwise it would be asked at the end of
a conversation only, and never first."""


def conversation(scene: Scene, rng: np.random.Generator, turns: int) -> list[Question]:
    """Up to `turns` different questions on one scene, in random order, a description last.

    No box is told twice before the description: every answer has to come from the picture, not from an earlier turn.
    """
    asker = Asker(scene, rng)
    names = list(MIX)
    weights = np.array([MIX[name] for name in names], float)
    asked: list[Question] = []
    told: set[str] = set()
    for _ in range(4 * turns + 16):
        question = getattr(asker, names[int(rng.choice(len(names), p=weights / weights.sum()))])()
        if question is None or any(question.text == other.text for other in asked):
            continue
        if question.task != "grounding":
            boxes = {match.group() for match in re.finditer(BOX_PATTERN, question.text + question.answer)}
            if boxes & told:
                continue
            told |= boxes
        asked.append(question)
        if len(asked) == turns:
            break
    return sorted(asked, key=lambda question: question.task == "grounding")


def training_record(
    scene: Scene, identity: str, image: str, rng: np.random.Generator, turns: int
) -> dict[str, Any]:
    """An instruction record (LLaVA layout): up to `turns` questions about one scene, or its description alone."""
    alone = rng.random() < DESCRIPTIONS
    said: list[Turn] = []
    for question in [Asker(scene, rng).grounding()] if alone else conversation(scene, rng, turns):
        start = f"{IMAGE_TOKEN}\n" if not said else ""
        said += [Turn("user", start + question.text), Turn("assistant", question.answer)]
    return Sample(identity, (image,), tuple(said)).to_record()


def test_questions(
    scene: Scene, identity: str, image: str, rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """One question of every task on one scene, in the columns that geochat.eval reads."""
    asker = Asker(scene, rng)
    for name in MIX:
        question = getattr(asker, name)()
        if question:
            yield {
                "question_id": f"{identity}_{name}",
                "image": image,
                "text": question.text,
                "task": question.task,
                "ground_truth": question.truth,
                "answer": question.answer,
                "scene": scene.name,
                **question.columns,
            }


def _make(job: tuple[str, int, int, int, int, str]) -> list[dict[str, Any]]:
    split, index, seed, side, turns, folder = job
    scene = draw_scene(seed, side)
    image = f"{split}_{index:06d}.jpg"
    scene.image.save(Path(folder) / image, quality=93)
    rng = np.random.default_rng([seed, 1])
    if split == "train":
        return [training_record(scene, f"train_{index}", image, rng, turns)]
    return list(test_questions(scene, f"test_{index}", image, rng))


def write_dataset(
    output: Path,
    train: int,
    test: int,
    *,
    seed: int = 0,
    side: int = 168,
    turns: int = 8,
    workers: int | None = None,
) -> None:
    """Write `train` training scenes and `test` test scenes. Instruction and question file appear when they are complete."""
    if seed < 0 or seed + train > TEST_SEEDS:
        raise ValueError(f"--seed {seed}: training seeds lie between 0 and {TEST_SEEDS}")
    images = output / "images"
    images.mkdir(parents=True, exist_ok=True)
    with process_pool(workers or os.cpu_count()) as pool:
        for split, count, first in (("train", train, seed), ("test", test, TEST_SEEDS + seed)):
            if not count:
                continue
            jobs = [(split, i, first + i, side, turns, str(images)) for i in range(count)]
            made = list(
                tqdm(pool.map(_make, jobs, chunksize=16), total=count, desc=f"{split} scenes", unit="scene")
            )
            rows = [row for rows in made for row in rows]
            target = output / ("train.json" if split == "train" else "questions.jsonl")
            with staged(target) as partial, partial.open("w", encoding="utf-8") as file:
                if split == "train":
                    json.dump(rows, file, ensure_ascii=False, indent=0)
                else:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m geochat.data.synthetic_tasks", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=2000, help="training scenes")
    parser.add_argument(
        "--test", type=int, default=300, help="test scenes, one question of every task on each"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first scene")
    parser.add_argument("--side", type=int, default=168, help="picture side in pixels")
    parser.add_argument("--turns", type=int, default=8, help="questions per training scene")
    parser.add_argument("--workers", type=int, default=None, help="processes (default: one per core)")
    args = parser.parse_args(argv)
    try:
        write_dataset(
            args.output,
            args.train,
            args.test,
            seed=args.seed,
            side=args.side,
            turns=args.turns,
            workers=args.workers,
        )
    except (ValueError, OSError) as error:
        stop(error)
    print(f"{args.output}: {args.train} training scenes, {args.test} test scenes")


if __name__ == "__main__":
    main()
