"""Show what was scored: a page of pictures with true and predicted boxes, score bars, and a comparison of runs.

    python -m geochat.eval.report RUN [RUN …] --output DIR [--names base fine-tuned]
    python -m geochat.eval.report A/scores.json B/scores.json        # only prints the comparison

RUN is a folder written by `geochat.eval.run`; several runs must have answered the same questions. DIR gets index.html
(one file, pictures inside), contact_sheet.png, scores.png and, for several runs, comparison.md.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from geochat.data.boxes import Box, parse_regions, without_boxes
from geochat.data.draw import contact_sheet, draw_regions
from geochat.data.images import open_image
from geochat.errors import stop
from geochat.eval import page
from geochat.eval.benchmark import Benchmark
from geochat.eval.compare import Run, compare, score_bars
from geochat.eval.files import write_bytes, write_text
from geochat.eval.metrics import truth_polygons
from geochat.eval.score import answer_text, markdown, sections

PANEL = 384  # shorter side of a drawn picture, in pixels


@dataclass(frozen=True)
class Example:
    """A question as it is shown: the true picture, and one picture, caption and verdict per run."""

    question: str
    task: str
    boxes: bool
    truth: tuple[Image.Image, str]
    answers: list[tuple[Image.Image, str, bool]]


def pick(runs: Sequence[Run], count: int) -> list[str]:
    """Question ids drawn at random (the same each time) from each task, in their order: typical, not flattering."""
    by_task: dict[str, list[str]] = {}
    for key, verdict in runs[0].verdicts.items():
        if all(key in run.verdicts and key in run.answers for run in runs):
            by_task.setdefault(verdict["task"], []).append(key)
    chosen: list[str] = []
    for task, keys in by_task.items():
        share = min(len(keys), max(1, count // len(by_task)))
        chosen += [keys[i] for i in sorted(random.Random(task).sample(range(len(keys)), share))]
    return chosen


def example(key: str, runs: Sequence[Run], benchmark: Benchmark, image_folder: Path) -> Example:
    """Draw one question. ValueError names the question or the picture."""
    where = f"question {key}"
    row = benchmark.prepare(runs[0].answers[key], where) or {}
    try:
        image = open_image(image_folder / benchmark.image_of(row, where))
    except ValueError:
        if runs[0].answers[key].get("text") is not None:
            raise
        image = Image.new("RGB", (PANEL, PANEL), "lightgray")  # it could not be asked for this very reason
    truth = row[benchmark.truth.of(row, where)]
    boxes = runs[0].verdicts[key]["metric"] == "boxes"
    true_boxes = (
        [Box.from_polygon(p, *image.size) for p in truth_polygons(truth, image.size)] if boxes else []
    )
    caption = f"truth: {plural(len(true_boxes))}" if boxes else f"truth: {truth}"
    answers = []
    for run in runs:
        text = answer_text(run.answers[key], where)
        verdict = run.verdicts[key]
        drawn = draw_regions(image, parse_regions(text), truth=true_boxes, min_side=PANEL)
        if boxes:
            found = sum(iou >= 0.5 for iou in verdict["ious"])
            said = f"{run.name}: {found} of {len(true_boxes)} found, {verdict['predicted']} predicted"
            said += f"\n{without_boxes(text)}" if without_boxes(text) else ""
            right = found == len(true_boxes) == verdict["predicted"]
        else:
            said, right = f"{run.name}: {text or '(no answer)'}", verdict["correct"]
        answers.append((drawn, said, right))
    true_picture = draw_regions(image, [], truth=true_boxes, min_side=PANEL)
    return Example(row["prompt"], runs[0].verdicts[key]["task"], boxes, (true_picture, caption), answers)


def sheet(examples: Sequence[Example]) -> Image.Image:
    """Rows of: the true boxes, then every run's. Without box questions: pictures with what was said of them."""
    pictured = [e for e in examples if e.boxes]
    if not pictured:
        said = [(e.truth[0], "\n".join([e.truth[1], *(text for _, text, _ in e.answers)])) for e in examples]
        return contact_sheet(said, columns=4)
    panels = [
        panel
        for e in pictured
        for panel in [
            (e.truth[0], f"{e.question}\n{e.truth[1]}"),
            *((image, said) for image, said, _ in e.answers),
        ]
    ]
    return contact_sheet(panels, columns=1 + len(pictured[0].answers))


def build(runs: Sequence[Run], examples: Sequence[Example], title: str) -> str:
    """The HTML page."""
    parts = [page.bars(score_bars(runs))]
    if len(runs) > 1:
        parts += [page.heading("Comparison"), page.html_table(compare(runs))]
    boxes, texts = [e for e in examples if e.boxes], [e for e in examples if not e.boxes]
    if boxes:
        parts += [page.heading("True and predicted boxes")]
        parts += [page.note("Drawn at random, not chosen by score. White and dashed: the true boxes.")]
    for e in boxes:
        figures = [page.figure(*e.truth), *(page.figure(*answer) for answer in e.answers)]
        parts.append(page.article(f"{e.task} · {e.question}", figures))
    if texts:
        parts += [page.heading("Questions answered in words")]
    for e in texts:
        said = [
            page.html_table(
                [["", "answer"], ["", e.truth[1]], *([_mark(right), text] for _, text, right in e.answers)]
            )
        ]
        parts.append(page.article(f"{e.task} · {e.question}", [page.figure(e.truth[0], ""), *said]))
    for run in runs:
        parts.append(page.heading(f"All figures: {run.name}"))
        model = {key: run.scores[key] for key in ("model_path", "model", "decoding") if key in run.scores}
        parts.append(page.note(" · ".join(f"{key}: {value}" for key, value in model.items())))
        parts += [page.html_table(rows) for rows in sections(run.scores)]
    return page.page(title, parts)


def write_report(
    runs: Sequence[Run],
    output: Path,
    *,
    benchmark: Benchmark,
    image_folder: Path,
    title: str,
    pictures: int = 32,
) -> None:
    """index.html, contact_sheet.png, scores.png and comparison.md in `output`."""
    examples = [example(key, runs, benchmark, image_folder) for key in pick(runs, pictures)]
    write_text(output / "index.html", build(runs, examples, title))
    write_bytes(output / "scores.png", score_bars(runs))
    content = io.BytesIO()
    sheet(examples).save(content, "PNG")
    write_bytes(output / "contact_sheet.png", content.getvalue())
    if len(runs) > 1:
        write_text(output / "comparison.md", markdown(compare(runs)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m geochat.eval.report", description=__doc__.split("\n")[0])
    parser.add_argument(
        "runs", type=Path, nargs="+", help="folders of geochat.eval.run, or scores.json files"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the page; without it the comparison is printed"
    )
    parser.add_argument("--names", nargs="+", help="what to call the runs; default: the folders' names")
    parser.add_argument("--image-folder", type=Path, help="default: where the first run found the images")
    parser.add_argument("--benchmark", help="default: the first run's")
    parser.add_argument("--pictures", type=int, default=32, help="questions shown, spread over the tasks")
    parser.add_argument("--title", help="default: the benchmark's name and the runs'")
    arguments = parser.parse_args(argv)
    names = arguments.names or [(p.parent if p.is_file() else p).resolve().name for p in arguments.runs]
    try:
        if len(names) != len(arguments.runs):
            raise ValueError(f"{len(names)} names for {len(arguments.runs)} runs")
        runs = [Run.load(path, name) for path, name in zip(arguments.runs, names)]
        print(markdown(compare(runs)))
        if not arguments.output:
            return
        first = runs[0].scores
        write_report(
            runs,
            arguments.output,
            benchmark=Benchmark.load(arguments.benchmark or first["source"]),
            image_folder=arguments.image_folder or Path(first["image_folder"]),
            title=arguments.title or f"{first['benchmark']}: {' and '.join(names)}",
            pictures=arguments.pictures,
        )
        print(f"written: {arguments.output / 'index.html'}")
    except (ValueError, OSError) as error:
        stop(error)


def plural(boxes: int) -> str:
    return "1 box" if boxes == 1 else f"{boxes} boxes"


def _mark(right: bool) -> str:
    return "✓" if right else "✗"


if __name__ == "__main__":
    main()
