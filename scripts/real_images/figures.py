"""One table of everything the run measured: OUT/figures.md and OUT/figures.json.

    python scripts/real_images/figures.py --output OUT [--geochat ANSWERS.jsonl]

What has not been measured is left out.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from aid import CLASSES
from prepare import write

from geochat.eval.benchmark import Benchmark
from geochat.eval.files import read_rows
from geochat.eval.score import judge, summarise

SIZES = ((0.0, 20.0, "below 20 px"), (20.0, 26.0, "20 to 26 px"), (26.0, math.inf, "26 px and more"))
"""Square root of a box's area in pixels of the tile; about a fifth, a half and a third of the vehicles."""


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def aid_rows(output: Path, geochat: Path | None) -> list[dict[str, Any]]:
    """Accuracy on the 3 000 scenes, strict and lenient, of each model and yardstick."""
    rows = [{"what": "chance", "accuracy": 1 / len(CLASSES)}]
    if probe := read(output / "probe.json"):
        rows.append({"what": "linear probe on raw pixels (32 px)", "accuracy": probe["accuracy"]})
    named = (("base", "nano base, before"), ("tuned", "nano, fine-tuned on AID"))
    for folder, what in named:
        if scores := read(output / "aid" / "eval" / folder / "scores.json"):
            overall = scores["tasks"]["aid"]["overall"]
            rows.append({"what": what, **_pick(overall)})
    heads = read(output / "aid" / "base-training" / "result.json") or {}
    if "test" in heads:
        rows.append({"what": "linear head on the adapted tower", "accuracy": heads["test"]["126"]})
    if geochat and geochat.is_file():
        benchmark = Benchmark.load("aid")
        answers = read_rows(geochat)
        overall = summarise(judge(answers, benchmark), benchmark, total=len(answers))["tasks"]["aid"][
            "overall"
        ]
        rows.append({"what": "GeoChat-7B, its published answers (not trained on AID)", **_pick(overall)})
    return rows


def _pick(overall: dict[str, Any]) -> dict[str, Any]:
    keys = {"accuracy": "accuracy", "lenient": "accuracy_lenient", "failed": "failed", "n": "n"}
    return {name: overall.get(key) for name, key in keys.items()}


def kit_rows(run: Path, questions: Path) -> list[dict[str, Any]]:
    """Recall by place and question, then by the size of the box (both places, all-vehicle questions)."""
    if not (run / "samples.jsonl").is_file():
        return []
    truth = {row["question_id"]: row for row in read_rows(questions)}
    verdicts = read_rows(run / "samples.jsonl")
    rows = []
    for place in ("seen", "unseen"):
        for kind, what in (("all", "all vehicles of a window"), ("one", "one vehicle, by its place")):
            chosen = [v for v in verdicts if v["place"] == place and v["kind"] == kind]
            rows.append(
                {"what": f"{what}, {place} street", **_found([iou for v in chosen for iou in v["ious"]])}
            )
    pairs = [
        (_side(polygon), iou, v["place"])
        for v in verdicts
        if v["kind"] == "all"
        for polygon, iou in zip(truth[v["question_id"]]["ground_truth"], v["ious"], strict=True)
    ]
    for place in ("seen", "unseen"):
        for low, high, what in SIZES:
            ious = [iou for side, iou, where in pairs if low <= side < high and where == place]
            rows.append({"what": f"· {what}, {place} street", **_found(ious)})
    return rows


def _side(polygon: list[list[float]]) -> float:
    """Square root of the area of a polygon (shoelace)."""
    pairs = zip(polygon, polygon[1:] + polygon[:1], strict=True)
    return abs(sum(ax * by - bx * ay for (ax, ay), (bx, by) in pairs) / 2) ** 0.5


def _found(ious: list[float]) -> dict[str, Any]:
    n = len(ious)
    return {"boxes": n} | {
        f"recall@{bar}": sum(iou >= bar for iou in ious) / n if n else None for bar in (0.5, 0.25)
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; fractions as percent."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|---" + "|---:" * (len(keys) - 1) + "|"]
    for row in rows:
        cells = [row.get(key) for key in keys]
        shown = ["–" if c is None else f"{100 * c:.1f} %" if isinstance(c, float) else str(c) for c in cells]
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--geochat", type=Path, help="published answers of GeoChat-7B on the AID test")
    args = parser.parse_args(argv)
    try:
        aid = aid_rows(args.output, args.geochat)
        kit = {
            name: kit_rows(args.output / "kit" / "eval" / name, args.output / "kit" / "questions.jsonl")
            for name in ("base", "tuned")
        }
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    text = "## AID\n\n" + table(aid)
    for name, rows in kit.items():
        if rows:
            text += f"\n## KIT, {name}\n\n" + table(rows)
    write(args.output / "figures.json", json.dumps({"aid": aid, "kit": kit}, indent=2))
    write(args.output / "figures.md", text)
    print(text)


if __name__ == "__main__":
    main()
