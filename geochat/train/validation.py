"""What is looked at during training beside the loss: scores on benchmarks, and a few dialogues with their boxes drawn."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from geochat.chat.engine import Chat
from geochat.chat.request import Request
from geochat.data.boxes import parse_regions
from geochat.data.draw import draw_regions
from geochat.data.images import open_image
from geochat.data.sample import Sample
from geochat.eval import page
from geochat.eval.answers import collect, look
from geochat.eval.benchmark import Benchmark
from geochat.eval.files import Row, write_rows, write_text
from geochat.eval.run import evaluate
from geochat.eval.score import Scores, judge
from geochat.model.processor import Processor
from geochat.train.mixture import Mixture

FOLDER = "validation"
PANEL = 384  # shorter side of a drawn picture, in pixels

Metrics = dict[str, float]


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leaves random numbers and the model's mode as they were, so that what is trained does not depend on looking."""
    training, python, numpy = model.training, random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        model.train(training)


@dataclass(frozen=True)
class Task:
    """A benchmark with its questions, where the benchmark says they are."""

    benchmark: Benchmark
    questions: list[Row]
    limit: int | None

    @classmethod
    def load(cls, name: str, limit: int | None) -> Task:
        """Raises: ValueError when benchmark, questions, truths or images are not there or cannot be used."""
        benchmark = Benchmark.load(name)
        task = cls(benchmark, benchmark.read_questions(), limit)
        items = look(collect(benchmark, task.questions, task.image_folder, limit))
        judge([{**item.row, "text": ""} for item in items], benchmark)
        if not items:
            raise ValueError(f"{name}: no question is left to ask")
        return task

    @property
    def image_folder(self) -> Path:
        return self.benchmark.root / self.benchmark.image_folder

    def score(self, chat: Chat, batch_size: int) -> Metrics:
        return headlines(
            evaluate(chat, self.benchmark, self.questions, self.image_folder, batch_size, self.limit)
        )


def headlines(scores: Scores) -> Metrics:
    """Those that are defined, as `benchmark_task_figure`; without the task where it is the only one."""
    found = {}
    for name, task in scores["tasks"].items():
        value = task["overall"][task["headline"]]
        parts = [scores["benchmark"], *([name] if len(scores["tasks"]) > 1 else []), task["headline"]]
        if value is not None:
            found["_".join(parts)] = float(value)
    return found


def choose_dialogues(samples: Mixture, count: int, seed: int) -> list[Sample]:
    """Records drawn at random, the same each time, with whole paths for images; what cannot be read is left out."""
    chosen: list[Sample] = []
    for index in np.random.default_rng(seed).permutation(len(samples)).tolist():
        if len(chosen) == count:
            break
        dataset, row = samples.find(index)
        try:
            sample = dataset.sample(row)
        except ValueError:
            continue  # training or the loss will name it
        chosen.append(replace(sample, images=dataset.pictures(sample)))
    return chosen


@dataclass(frozen=True)
class Validation:
    """Asks the model as it stands, in one process that holds all its weights."""

    run: Path
    processor: Processor
    tasks: Sequence[Task]
    dialogues: Sequence[Sample]
    batch_size: int

    def look(self, model: nn.Module, step: int) -> Metrics:
        """Scores of the benchmarks; the dialogues go to a page of `validation/step-N`."""
        chat = Chat(model, self.processor)
        if self.dialogues:
            rows = ask(chat, self.dialogues, self.batch_size)
            folder = self.run / FOLDER / f"step-{step}"
            write_rows(folder / "dialogues.jsonl", rows)
            title = f"Validation at step {step}"
            write_text(folder / "index.html", page.page(title, [show(row) for row in rows]))
        metrics: Metrics = {}
        for task in self.tasks:
            metrics |= task.score(chat, self.batch_size)
        return metrics


def ask(chat: Chat, dialogues: Sequence[Sample], batch_size: int) -> list[Row]:
    """One row for each question: images, question, truth, answer; earlier turns are the record's own."""
    rows: list[Row] = []
    requests: list[Request] = []
    for sample in dialogues:
        for number in range(0, len(sample.turns), 2):
            question, truth = sample.turns[number : number + 2]
            requests.append(Request(sample.images, sample.turns[: number + 1]))
            rows.append({"images": list(sample.images), "question": question.text, "truth": truth.text})
    answers = chat.answer_each(requests, batch_size=batch_size)
    return [
        {**row, "answer": f"not asked: {answer}" if isinstance(answer, ValueError) else answer.text}
        for row, answer in zip(rows, answers, strict=True)
    ]


def show(row: Row) -> str:
    """Question, truth and answer of `ask` as a piece of a page; true boxes white and dashed on the first picture."""
    words = page.html_table([["", "said"], ["truth", row["truth"]], ["model", row["answer"]]])
    figures = []
    for image in row["images"][:1]:
        try:
            picture = open_image(image)
        except ValueError as error:
            figures.append(page.note(str(error)))
            continue
        truth = parse_regions(row["truth"])
        figures.append(
            page.figure(draw_regions(picture, parse_regions(row["answer"]), truth=truth, min_side=PANEL), "")
        )
    return page.article(row["question"], [*figures, words])
