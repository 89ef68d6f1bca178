"""Score a file of answers: no torch, no network.

    python -m geochat.eval.score ANSWERS.jsonl --benchmark NAME|FILE.toml [--questions FILE] [--output DIR]

Reads the answers that `geochat.eval.run` writes, and those of GeoChat, LLaVA, RSEvalKit and XTuner. Truth comes with the
answers, or by `question_id` from the question file; with a question file, a question without an answer counts as failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geochat.errors import stop
from geochat.eval.answer_files import answer_text, read_answers
from geochat.eval.benchmark import Benchmark
from geochat.eval.checks import notes
from geochat.eval.files import Row, write_json, write_rows, write_text
from geochat.eval.judging import Scores, join, judge, summarise
from geochat.eval.metrics import IOU_MODES, MATCHES
from geochat.eval.verdicts import Summary

__all__ = [
    "Scores",
    "answer_text",
    "cell",
    "headline",
    "join",
    "judge",
    "markdown",
    "sections",
    "summarise",
    "table",
    "write_scores",
]


def sections(scores: Scores) -> list[list[list[str]]]:
    """One table of cells per metric, heading first. Shares are in percent; `micro` weighs questions, `macro` groups."""
    found = []
    for metric in dict.fromkeys(task["metric"] for task in scores["tasks"].values()):
        tasks = {name: task for name, task in scores["tasks"].items() if task["metric"] == metric}
        summary = next(iter(tasks.values()))["overall"]
        keys = [key for key in summary if key not in ("parsed", "correct", "all_found@0.25")]
        rows = [[f"{metric} (shares in %)", *keys]]
        for name, task in tasks.items():
            rows.append([f"{name}, micro", *_cells(task["overall"], keys)])
            if task["macro"]:
                over = f"{name}, macro over {task['macro']['groups']} × {task['macro']['over']}"
                rows.append([over, *_cells(task["macro"], keys)])
            for column, values in task["strata"].items():
                rows += [[f"· {column} = {value}", *_cells(group, keys)] for value, group in values.items()]
        found.append(rows)
    return found


def markdown(rows: list[list[str]]) -> str:
    """A table; cells are numbers but for the first of each row."""
    heading, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([heading, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body]) + "\n"


def headline(scores: Scores) -> str:
    parts = [f"{scores['excluded']} excluded"] if scores["excluded"] else []
    parts += [f"{scores['iou']} IoU"] if "iou" in scores else []
    parts += [f"METEOR: {scores['meteor']}"] if "meteor" in scores else []
    return f"{scores['benchmark']}: {scores['n']} questions" + (f" ({', '.join(parts)})" if parts else "")


def table(scores: Scores) -> str:
    """The scores as Markdown, below them what `geochat.eval.checks` noted."""
    noted = [f"- {note}\n" for note in scores.get("notes", [])]
    return "\n".join([f"# {headline(scores)}\n", *map(markdown, sections(scores)), *noted])


def write_scores(folder: Path, scores: Scores, judged: list[Row]) -> None:
    """scores.json, scores.md and samples.jsonl (one verdict per question)."""
    write_rows(folder / "samples.jsonl", judged)
    write_text(folder / "scores.md", table(scores))
    write_json(folder / "scores.json", scores)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m geochat.eval.score", description=__doc__.split("\n")[0])
    parser.add_argument("answers", type=Path, help="answers: JSON Lines, a JSON array or XTuner's .xlsx")
    parser.add_argument("--benchmark", required=True, help="name of a benchmark or a .toml file")
    parser.add_argument(
        "--questions", type=Path, help="question file, where the answers do not carry the truth"
    )
    parser.add_argument("--image-folder", type=Path, help="check that the pictures are there")
    parser.add_argument(
        "--iou", choices=IOU_MODES, default="rotated", help="hbb: of the horizontal envelopes"
    )
    parser.add_argument("--match", choices=MATCHES, help="match boxes as this program did, faults included")
    parser.add_argument(
        "--scorer", help="score as this program did, faults included: rsevalkit, xtuner, llava"
    )
    parser.add_argument("--output", type=Path, help="folder for scores.json, scores.md and samples.jsonl")
    arguments = parser.parse_args(argv)
    try:
        scores = _score(arguments)
    except (ValueError, OSError, ImportError) as error:
        stop(error)
    print(table(scores))


def _score(arguments: argparse.Namespace) -> Scores:
    benchmark = Benchmark.load(arguments.benchmark)
    rows = read_answers(arguments.answers, benchmark)
    if arguments.questions:
        rows = join(rows, benchmark.read_questions(arguments.questions), str(arguments.answers))
    judged = judge(rows, benchmark, arguments.iou, str(arguments.answers), _instead(benchmark, arguments))
    scores = summarise(judged, benchmark, total=len(rows), iou=arguments.iou)
    scores["notes"] = notes(rows, benchmark, arguments.image_folder)
    if arguments.output:
        write_scores(arguments.output, scores, judged)
    return scores


def _instead(benchmark: Benchmark, arguments: argparse.Namespace) -> dict[str, str]:
    instead = {"boxes": MATCHES[arguments.match]} if arguments.match else {}
    if arguments.match and "boxes" not in benchmark.metric.values():
        raise ValueError(f"--match is for boxes; {benchmark.name} has none")
    if arguments.scorer and arguments.scorer not in benchmark.scorers:
        raise ValueError(
            f"{benchmark.name} has no scorer {arguments.scorer!r}; known: {', '.join(benchmark.scorers) or 'none'}"
        )
    return instead | ({"": benchmark.scorers[arguments.scorer]} if arguments.scorer else {})


def _cells(summary: Summary, keys: list[str]) -> list[str]:
    return [cell(key, summary.get(key)) for key in keys]


def cell(key: str, value: Any) -> str:
    """A figure as text: shares in percent, an undefined one as a dash."""
    if value is None:
        return "–"
    if isinstance(value, list | tuple):
        return "–".join(f"{100 * end:.1f}" for end in value)
    if isinstance(value, float):
        return f"{value:.2f}" if key == "mean_absolute_error" else f"{100 * value:.2f}"
    return str(value)


if __name__ == "__main__":
    main()
