"""Show what was scored: figures with their intervals, plots, published numbers, and pictures with their boxes.

    python -m geochat.eval.report RUN [RUN …] --output DIR [--names base fine-tuned]
    python -m geochat.eval.report RUN [RUN …]                        # only prints the tables

RUN is a folder written by `geochat.eval.run`; several runs of one benchmark are compared on the questions that they
share. DIR gets index.html (one file, pictures inside), report.md, contact_sheet.png and scores.png.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

from geochat.errors import stop
from geochat.eval import page
from geochat.eval.benchmark import Benchmark
from geochat.eval.charts import confusion_matrix, score_bars, strata_bars
from geochat.eval.compare import Run, missing_in_one, pair, table
from geochat.eval.examples import Example, example, pick, sheet, worst
from geochat.eval.files import write_bytes, write_text
from geochat.eval.measures import confusion, measure, overview, strata
from geochat.eval.published import beside
from geochat.eval.score import headline, markdown, sections

Figures = tuple[str, list[list[str]], list[str]]
"""Heading, table, remarks."""


def tables(runs: Sequence[Run], benchmark: Benchmark) -> list[Figures]:
    """Each run's figures, the comparison with the first run, and published figures beside them."""
    found: list[Figures] = [(run.name, overview(run), run.scores.get("notes", [])) for run in runs]
    for run in runs[1:]:
        compared = table(pair(runs[0], run), [runs[0].name, run.name])
        found.append((f"{run.name} against {runs[0].name}", compared, missing_in_one(runs[0], run)))
    if benchmark.published:
        found.append(("Published figures", beside(runs, benchmark.published), []))
    return found


def bars(runs: Sequence[Run]) -> bytes:
    """PNG of every task's headline figure."""
    tasks = runs[0].scores["tasks"]
    groups = [(f"{task}\n{tasks[task]['headline']}", [measure(run, task) for run in runs]) for task in tasks]
    return score_bars([run.name for run in runs], groups, headline(runs[0].scores))


def build(
    runs: Sequence[Run],
    benchmark: Benchmark,
    figures: Sequence[Figures],
    chart: bytes,
    examples: Sequence[Example],
    failures: Sequence[Example],
    title: str,
) -> str:
    """The HTML page."""
    parts = [page.plot(chart, "score bars")]
    for name, rows, remarks in figures:
        parts += [page.heading(name), page.html_table(rows), *map(page.note, remarks)]
    parts += [page.note("Intervals: 95 %, bootstrap; questions about one picture are drawn together.")]
    parts += [*_groups(runs), *_confusions(runs, benchmark)]
    parts += _articles("Answered worst", "Of equally bad answers some at random.", failures)
    parts += _articles("At random", "Not chosen by score; the same each time.", examples)
    for run in runs:
        parts.append(page.heading(f"All figures: {run.name}"))
        model = {key: run.scores[key] for key in ("model_path", "model", "decoding") if key in run.scores}
        parts.append(page.note(" · ".join(f"{key}: {value}" for key, value in model.items())))
        parts += [page.html_table(rows) for rows in sections(run.scores)]
    return page.page(title, parts)


def _groups(runs: Sequence[Run]) -> list[str]:
    names = [run.name for run in runs]
    plots = [
        page.plot(strata_bars(names, groups, f"{task} by {column}"), f"{task} by {column}")
        for task, column, groups in strata(runs)
    ]
    return [page.heading("By group"), *plots] if plots else []


def _confusions(runs: Sequence[Run], benchmark: Benchmark) -> list[str]:
    plots = []
    for run in runs:
        for task in run.scores["tasks"]:
            if found := confusion(run, benchmark, task):
                plots.append(page.plot(confusion_matrix(*found, f"{run.name}: {task}"), f"confusion: {task}"))
    return [page.heading("What is taken for what"), page.side_by_side(plots)] if plots else []


def _articles(title: str, remark: str, examples: Sequence[Example]) -> list[str]:
    """Questions with boxes as pictures side by side, the others as a picture and a table of what was said."""
    if not examples:
        return []
    boxes = " White and dashed: the true boxes." if any(e.boxes for e in examples) else ""
    parts = [page.heading(title), page.note(remark + boxes)]
    for e in examples:
        if e.boxes:
            shown = [page.figure(*e.truth), *(page.figure(*answer) for answer in e.answers)]
        else:
            said = [["", "answer"], ["", e.truth[1]], *([_mark(right), text] for _, text, right in e.answers)]
            shown = [page.figure(e.truth[0], ""), page.html_table(said)]
        parts.append(page.article(f"{e.task} · {e.question}", shown))
    return parts


def write_report(
    runs: Sequence[Run],
    output: Path,
    *,
    benchmark: Benchmark,
    image_folder: Path,
    figures: Sequence[Figures],
    title: str,
    pictures: int = 32,
) -> None:
    """index.html, report.md, contact_sheet.png and scores.png in `output`."""
    examples, failures = (
        [example(key, runs, benchmark, image_folder) for key in keys]
        for keys in (pick(runs, pictures), worst(runs, pictures // 2))
    )
    chart = bars(runs)
    write_text(output / "index.html", build(runs, benchmark, figures, chart, examples, failures, title))
    write_text(output / "report.md", text_of(runs, figures))
    write_bytes(output / "scores.png", chart)
    if examples:
        content = io.BytesIO()
        sheet(examples).save(content, "PNG")
        write_bytes(output / "contact_sheet.png", content.getvalue())


def text_of(runs: Sequence[Run], figures: Sequence[Figures]) -> str:
    """The tables as Markdown."""
    texts = [f"# {headline(runs[0].scores)}"]
    for name, rows, remarks in figures:
        texts += [f"## {name}", markdown(rows).rstrip(), *remarks]
    return "\n\n".join(texts) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m geochat.eval.report", description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of geochat.eval.run")
    parser.add_argument("--output", type=Path, help="folder for the page; without it the tables are printed")
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
        first = runs[0].scores
        benchmark = Benchmark.load(arguments.benchmark or first.get("source") or first["benchmark"])
        figures = tables(runs, benchmark)
        print(text_of(runs, figures))
        if not arguments.output:
            return
        if not (image_folder := arguments.image_folder or first.get("image_folder")):
            raise ValueError(f"{names[0]}: does not say where the pictures are; give --image-folder")
        write_report(
            runs,
            arguments.output,
            benchmark=benchmark,
            image_folder=Path(image_folder),
            figures=figures,
            title=arguments.title or f"{first['benchmark']}: {' and '.join(names)}",
            pictures=arguments.pictures,
        )
        print(f"written: {arguments.output / 'index.html'}")
    except (ValueError, OSError) as error:
        stop(error)


def _mark(right: bool | None) -> str:
    return "" if right is None else "✓" if right else "✗"


if __name__ == "__main__":
    main()
