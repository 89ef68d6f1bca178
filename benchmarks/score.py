"""Scoring as many answers as RSVQA-HR's second test set has questions, in a fresh process for each run.

    python benchmarks/score.py [--answers 62554]

Rows hold what geochat.eval.run writes. Three kinds: one word; a sentence, all different; a turned box. The scores are
compared with those that the rows were made with. Time is that of the whole command: start, reading, scoring, writing.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from geochat.data.boxes import Box
from geochat.eval.files import Row, read_json, write_rows

RUNS = 3
SAID_WITH_EACH = {
    "model": "sha256:0123456789abcdef",
    "decoding": {"max_new_tokens": 32, "temperature": 0.0, "template": "vicuna_v1", "image_size": 504},
    "width": 512,
    "height": 512,
    "picture": "0123456789abcdef",
    "finished": True,
}


def word(number: int, right: bool, rng: random.Random) -> Row:
    truth = rng.choice(("yes", "no"))
    said = truth if right else {"yes": "no", "no": "yes"}[truth]
    category = rng.choice(("presence", "comp"))
    return {"text": said.title(), "ground_truth": truth, "category": category}


def sentence(number: int, right: bool, rng: random.Random) -> Row:
    row = word(number, right, rng)
    return row | {
        "text": f"{row['text']}, building {number} is the larger of the two in the north of the picture."
    }


def box(number: int, right: bool, rng: random.Random) -> Row:
    x, y = rng.uniform(10, 60), rng.uniform(10, 60)
    truth = Box(x, y, x + 30, y + 20, rng.uniform(1, 90))
    said = Box.parse(truth.format()) if right else Box(0, 0, 5, 5, 90)
    strata = {"type": "ref", "dataset": "SIOR", "size_group": rng.choice(("small", "large"))}
    return {"text": said.format(), "ground_truth": [truth.polygon(512, 512).tolist()], **strata}


KINDS: dict[str, tuple[str, Callable[[int, bool, random.Random], Row], str]] = {
    "word": ("hrben", word, "accuracy"),
    "sentence": ("hrben", sentence, "accuracy_lenient"),
    "box": ("referring", box, "recall@0.5"),
}


def measure(file: Path, benchmark: str, output: Path) -> tuple[float, float]:
    """Wall and CPU seconds of the command."""
    command = [sys.executable, "-m", "geochat.eval.score", str(file), "--benchmark", benchmark]
    wall, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--output", str(output)], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when a score is not the one that the rows were made with."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answers", type=int, default=62_554)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    options = parser.parse_args(argv)
    print(
        f"{options.answers} answers, seed {options.seed}, load {os.getloadavg()[0]:.1f}, best of {RUNS} (median)"
    )
    for kind, (benchmark, make, figure) in KINDS.items():
        rng = random.Random(options.seed)
        rights = [rng.random() < 0.8 for _ in range(options.answers)]
        rows = [
            {"question_id": i, "prompt": f"Question {i}?", **make(i, right, rng), **SAID_WITH_EACH}
            for i, right in enumerate(rights)
        ]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_rows(folder / "answers.jsonl", rows)
            runs = [measure(folder / "answers.jsonl", benchmark, folder / "out") for _ in range(RUNS)]
            overall = read_json(folder / "out" / "scores.json")["tasks"][benchmark]["overall"]
        if overall[figure] != sum(rights) / len(rights):
            print(f"{kind}: {figure} is {overall[figure]}, not {sum(rights) / len(rights)}")
            return 1
        walls, cpus = ([run[i] for run in runs] for i in (0, 1))
        shown = [f"{min(values):6.2f} ({statistics.median(values):.2f})" for values in (walls, cpus)]
        print(f"{kind:10} wall {shown[0]} s   CPU {shown[1]} s   {figure} {overall[figure]:.4f}, as made")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
