"""Questions as a report shows them: chosen at random and by how wrong they were answered, then drawn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from PIL import Image

from geochat.data.boxes import Box, Region, parse_regions, without_boxes
from geochat.data.draw import contact_sheet, draw_regions
from geochat.data.images import open_image
from geochat.eval.answer_files import answer_text
from geochat.eval.benchmark import Benchmark
from geochat.eval.boxes import corners, truth_polygons, upright
from geochat.eval.compare import Run
from geochat.eval.files import Row
from geochat.eval.intervals import grades

PANEL = 384  # shorter side of a drawn picture, in pixels


@dataclass(frozen=True)
class Example:
    """A question as it is shown: the picture with the boxes asked about and the true ones, and one picture, caption and
    verdict per run."""

    question: str
    task: str
    boxes: bool
    truth: tuple[Image.Image, str]
    answers: list[tuple[Image.Image, str, bool | None]]


def pick(runs: Sequence[Run], count: int) -> list[str]:
    """Question ids drawn at random (the same each time) from each task, in their order: typical, not flattering."""
    chosen: list[str] = []
    by_task = _common(runs)
    for task, keys in by_task.items():
        share = min(len(keys), max(1, count // len(by_task)))
        chosen += [keys[i] for i in sorted(random.Random(task).sample(range(len(keys)), share))]
    return chosen


def worst(runs: Sequence[Run], count: int) -> list[str]:
    """Question ids that the runs answered worst, from each task; of equally bad ones some at random. No right ones."""
    chosen: list[str] = []
    by_task = _common(runs)
    for task, keys in by_task.items():
        figures = [run.scores["tasks"][task]["headline"] for run in runs]
        graded = [grades(run.sums(task, keys), figure) for run, figure in zip(runs, figures, strict=True)]
        grade = dict(zip(keys, np.mean(graded, axis=0), strict=True))
        ranked = random.Random(task).sample(keys, len(keys))
        ranked = sorted((key for key in ranked if grade[key] < 1), key=lambda key: grade[key])
        chosen += ranked[: max(1, count // len(by_task))]
    return chosen


def _common(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Ids of the questions that all runs have answered, by task."""
    by_task: dict[str, list[str]] = {}
    for key, verdict in runs[0].verdicts.items():
        if all(key in run.verdicts and key in run.answers for run in runs):
            by_task.setdefault(verdict["task"], []).append(key)
    return by_task


def example(key: str, runs: Sequence[Run], benchmark: Benchmark, image_folder: Path) -> Example:
    """Draw one question. ValueError names the question or the picture."""
    where = f"question {key}"
    row = benchmark.prepare(runs[0].answers[key], where) or {}
    image = _picture(row, benchmark, image_folder, where)
    truth = row.get(benchmark.truth.of(row, where), "not published")
    boxes = "ious" in runs[0].verdicts[key]
    true_boxes = _true_boxes(truth, runs[0].verdicts[key]["metric"], image.size) if boxes else []
    caption = f"truth: {plural(len(true_boxes))}" if boxes else f"truth: {truth}"
    answers = [_answer(run, key, image, true_boxes if boxes else None) for run in runs]
    asked = str(row.get("prompt", key))
    true_picture = draw_regions(image, parse_regions(asked), truth=true_boxes, min_side=PANEL)
    return Example(asked, runs[0].verdicts[key]["task"], boxes, (true_picture, caption), answers)


def _true_boxes(truth: Any, metric: str, size: tuple[int, int]) -> list[Box]:
    if metric == "boxes_permille":
        polygons = [corners(*box) for box in upright(str(truth))]
    else:
        polygons = truth_polygons(truth, size)
    return [Box.from_polygon(polygon, *size) for polygon in polygons]


def _regions(text: str, metric: str) -> Sequence[Region | Box]:
    """The boxes of an answer with their phrases."""
    if metric == "boxes_permille":
        return [Box(a / 10, b / 10, c / 10, d / 10) for a, b, c, d in upright(text)]
    return parse_regions(text)


def _picture(row: Row, benchmark: Benchmark, image_folder: Path, where: str) -> Image.Image:
    """The question's picture; grey for a question without one, and for one that could not be read."""
    blank = Image.new("RGB", (PANEL, PANEL), "lightgray")
    if not (name := benchmark.image_of(row, where)):
        return blank
    try:
        return open_image(image_folder / name)
    except ValueError:
        if row.get("text") is not None:
            raise
        return blank  # the question could not be asked for this very reason


def _answer(
    run: Run, key: str, image: Image.Image, true_boxes: Sequence[Box] | None
) -> tuple[Image.Image, str, bool | None]:
    """The answer's boxes drawn over the true ones, what it said, and whether it is right, where that is a question."""
    text, verdict = answer_text(run.answers[key], f"question {key}"), run.verdicts[key]
    drawn = draw_regions(image, _regions(text, verdict["metric"]), truth=true_boxes or (), min_side=PANEL)
    if true_boxes is None:
        return drawn, f"{run.name}: {text or '(no answer)'}", verdict.get("correct")
    found = sum(iou >= 0.5 for iou in verdict["ious"])
    said = f"{run.name}: {found} of {len(true_boxes)} found, {verdict['predicted']} predicted"
    said += f"\n{without_boxes(text)}" if without_boxes(text) else ""
    return drawn, said, found == len(true_boxes) == verdict["predicted"]


def sheet(examples: Sequence[Example]) -> Image.Image:
    """Rows of: the true boxes, then every run's. Without box questions: pictures with what was said of them."""
    pictured = [e for e in examples if e.boxes]
    if not pictured:
        return contact_sheet([(e.truth[0], _said(e)) for e in examples], columns=4)
    panels = [
        panel
        for e in pictured
        for panel in [
            (e.truth[0], f"{e.question}\n{e.truth[1]}"),
            *((image, said) for image, said, _ in e.answers),
        ]
    ]
    return contact_sheet(panels, columns=1 + len(pictured[0].answers))


def _said(e: Example) -> str:
    """The question's first line, which formats and lists of classes may make long, the truth and the answers."""
    asked = shorten(e.question.partition("\n")[0], 100, placeholder=" …")
    return "\n".join([asked, e.truth[1], *(text for _, text, _ in e.answers)])


def plural(boxes: int) -> str:
    return "1 box" if boxes == 1 else f"{boxes} boxes"
