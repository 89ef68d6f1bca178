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
from transformers.trainer_utils import IntervalStrategy

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
from geochat.eval.score import Scores, judge, summarise
from geochat.model.processor import Processor
from geochat.train.arguments import TrainingArguments
from geochat.train.mixture import Mixture
from geochat.train.recipe import zero_stage

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
    figures: frozenset[str]
    """Names of what it gives."""

    @classmethod
    def load(cls, name: str, limit: int | None) -> Task:
        """Raises: ValueError when benchmark, questions, truths or images are not there or cannot be used."""
        benchmark = Benchmark.load(name)
        questions = benchmark.read_questions()
        items = look(collect(benchmark, questions, _images(benchmark), limit))
        if not items:
            raise ValueError(f"{name}: no question is left to ask")
        judged = judge([{**item.row, "text": ""} for item in items], benchmark)
        return cls(
            benchmark, questions, limit, frozenset(headlines(summarise(judged, benchmark, total=len(items))))
        )

    def score(self, chat: Chat, batch_size: int) -> Metrics:
        """The headline figures that are defined."""
        folder = _images(self.benchmark)
        scores = evaluate(chat, self.benchmark, self.questions, folder, batch_size, self.limit)
        return {name: float(value) for name, value in headlines(scores).items() if value is not None}


def _images(benchmark: Benchmark) -> Path:
    return benchmark.root / benchmark.image_folder


def headlines(scores: Scores) -> dict[str, float | None]:
    """Each task's figure as `benchmark_task_figure`; without the task where it is the only one."""
    found = {}
    for name, task in scores["tasks"].items():
        parts = [scores["benchmark"], *([name] if len(scores["tasks"]) > 1 else []), task["headline"]]
        found["_".join(parts)] = task["overall"][task["headline"]]
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


def make_validation(
    eval_set: Mixture | None, processor: Processor, args: TrainingArguments
) -> Validation | None:
    """What evaluations look at beside the loss. Raises: ValueError when that cannot be, or cannot be read."""
    if args.eval_strategy == IntervalStrategy.NO:
        return None
    whole = zero_stage(args) < 3 and not args.fsdp
    if args.eval_benchmark and not whole:
        raise ValueError(
            "--eval_benchmark asks one process, which under ZeRO-3 or FSDP holds a part of the weights only: use "
            "scripts/zero2.json, or score the checkpoints with geochat.eval.run"
        )
    tasks = [Task.load(name, args.eval_benchmark_limit) for name in args.eval_benchmark or []]
    figures = frozenset({"loss"} if eval_set else ()).union(*(task.figures for task in tasks))
    best = (args.metric_for_best_model or "").removeprefix("eval_")
    if best and best not in figures:
        raise ValueError(
            f"--metric_for_best_model {best}: validation gives {', '.join(sorted(figures)) or 'nothing'}"
        )
    if not whole:
        args.notes.append("no dialogues at evaluations: under ZeRO-3 or FSDP no process holds all weights")
        return None
    dialogues = choose_dialogues(eval_set, args.eval_dialogues, args.order_seed) if eval_set else []
    return Validation(Path(args.output_dir), processor, tasks, dialogues, args.per_device_eval_batch_size)


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
