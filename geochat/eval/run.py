"""Ask a model the questions of a benchmark, keep the answers, score them.

    python -m geochat.eval.run --model-path M --benchmark NAME|FILE.toml --output DIR

DIR/answers.jsonl holds one row per question: the prompt, the model's own words, the decoding settings, the model's
fingerprint and the truth. It appears when complete; until then answers collect in DIR/answers.partial.jsonl, and the
same command goes on where it was stopped. DIR/scores.json, scores.md and samples.jsonl follow from it alone
(`python -m geochat.eval.score`).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from geochat.chat.arguments import add_model_arguments, load_chat, number
from geochat.chat.engine import Chat
from geochat.errors import stop
from geochat.eval.answers import ANSWERS, PARTIAL, ask, collect, resume
from geochat.eval.benchmark import Benchmark, index_by_id
from geochat.eval.files import Row, write_rows
from geochat.eval.metrics import IOU_MODES
from geochat.eval.score import Scores, judge, summarise, table, write_scores
from geochat.model.base import BaseRecord
from geochat.model.checkpoint import fingerprint
from geochat.model.formats.gguf_file import is_gguf


def evaluate(
    chat: Chat,
    benchmark: Benchmark,
    questions: Sequence[Row],
    image_folder: Path,
    batch_size: int = 16,
    limit: int | None = None,
) -> Scores:
    """Scores without files: validation during training. `limit`: ask only the first questions."""
    items = collect(benchmark, questions, image_folder, limit)
    parts = ask(chat, benchmark, items, batch_size=batch_size, max_new_tokens=benchmark.max_new_tokens)
    rows = [row for part in parts for row in part]
    total = len(questions) if limit is None else len(items)
    return summarise(judge(rows, benchmark), benchmark, total=total)


def run(arguments: argparse.Namespace) -> Scores:
    """The whole command. Raises ValueError with one line for whatever the user can mend."""
    benchmark = Benchmark.load(arguments.benchmark)
    questions_file = arguments.questions or benchmark.root / benchmark.questions
    if not questions_file.is_file():
        raise ValueError(
            f"{questions_file}: no question file there; give --questions, or set GEOCHAT_BENCHMARKS to its folder"
        )
    questions = benchmark.read_questions(questions_file)
    start = questions_file.parent if arguments.questions else benchmark.root
    image_folder = arguments.image_folder or start / benchmark.image_folder
    items = collect(benchmark, questions, image_folder, arguments.limit)
    if not items:
        raise ValueError(f"{questions_file}: no question is left to ask")
    judge([{**item.row, "text": ""} for item in items], benchmark)  # a truth that cannot be used shows now
    budget = arguments.max_new_tokens or benchmark.max_new_tokens
    model = _fingerprint(arguments)
    chat = load_chat(arguments)
    identity = {"model": model, "decoding": _decoding(chat, budget, arguments)}
    folder: Path = arguments.output
    done = {} if arguments.overwrite else resume(folder, items, identity)
    left = [item for item in items if str(item.row["question_id"]) not in done]
    write_rows(folder / PARTIAL, list(done.values()))  # without the failures and a torn last line
    with (
        (folder / PARTIAL).open("a", encoding="utf-8", errors="backslashreplace") as file,
        tqdm(total=len(items), initial=len(items) - len(left), desc=benchmark.name, disable=None) as bar,
    ):
        for rows in ask(chat, benchmark, left, batch_size=arguments.batch_size, max_new_tokens=budget):
            rows = [{**row, **identity} for row in rows]
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
            done |= index_by_id(rows, "answers")
            bar.update(len(rows))
    answers = [done[str(item.row["question_id"])] for item in items]
    write_rows(folder / ANSWERS, list(done.values()) if arguments.limit else answers)
    (folder / PARTIAL).unlink()
    judged = judge(answers, benchmark, arguments.iou)
    total = len(answers) if arguments.limit else len(questions)
    scores = summarise(judged, benchmark, total=total, iou=arguments.iou)
    scores |= {"model_path": str(arguments.model_path), **identity}
    scores |= {"source": arguments.benchmark, "image_folder": str(image_folder)}
    scores["not_asked"] = sum(row["text"] is None for row in answers)
    write_scores(folder, scores, judged)
    return scores


def _fingerprint(arguments: argparse.Namespace) -> str:
    if not arguments.model_path.is_dir() and not is_gguf(arguments.model_path):
        raise ValueError(f"{arguments.model_path}: no checkpoint there (no such folder)")
    named = None
    if (arguments.model_path / "adapter_config.json").exists():
        named = arguments.model_base or BaseRecord.read(arguments.model_path).model
    parts = [arguments.model_path, named, arguments.vision_tower]
    return "+".join(fingerprint(path) for path in parts if path and path.exists())


def _decoding(chat: Chat, max_new_tokens: int, arguments: argparse.Namespace) -> Row:
    """What may change an answer; the batch size may not, and is not in it."""
    return {
        "max_new_tokens": max_new_tokens,
        "temperature": 0.0,
        "template": chat.processor.template.name,
        "image_size": chat.processor.image_size,
        "image_mode": chat.processor.image_mode,
        "dtype": str(chat.model.dtype).removeprefix("torch."),
        "quantization": "4bit" if arguments.load_4bit else "8bit" if arguments.load_8bit else None,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m geochat.eval.run", description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--benchmark", required=True, help="name of a benchmark or a .toml file")
    parser.add_argument("--output", type=Path, required=True, help="folder for answers and scores")
    parser.add_argument("--questions", type=Path, help="question file, where not where the benchmark says")
    parser.add_argument("--image-folder", type=Path, help="images, where not where the benchmark says")
    parser.add_argument("--limit", type=number(1, whole=True), help="ask only the first questions")
    parser.add_argument(
        "--batch-size", type=number(1, whole=True), default=16, help="questions at a time; changes no answer"
    )
    parser.add_argument("--max-new-tokens", type=number(1, whole=True), help="default: the benchmark's")
    parser.add_argument(
        "--iou", choices=IOU_MODES, default="rotated", help="hbb: of the horizontal envelopes"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="ask again what the output folder has answers for"
    )
    arguments = parser.parse_args(argv)
    try:
        scores = run(arguments)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        stop(error)
    print(table(scores))
    if scores["not_asked"]:
        print(
            f"{scores['not_asked']} questions could not be asked and count as wrong; see `error` in the answers"
        )
    print(f"written to {arguments.output}: {ANSWERS}, samples.jsonl, scores.json, scores.md")


if __name__ == "__main__":
    main()
