"""Ask a model the questions of a benchmark, keep the answers, score them.

    python -m geochat.eval.run --model-path M --benchmark NAME|FILE.toml --output DIR
    torchrun --nproc-per-node 8 -m geochat.eval.run …          # the questions are shared out; one GPU per process
    python -m geochat.eval.run … --shard 0/8                   # one share, for a job array; each I from 0 to 7

DIR/answers.jsonl holds one row per question: the prompt, the model's own words, the decoding settings, the model's
fingerprint and the truth. It appears when complete; until then each process keeps its answers in DIR/answers.partial.*,
and the same command, also with another number of processes, goes on where it was stopped. DIR/scores.json, scores.md
and samples.jsonl follow from it alone (`python -m geochat.eval.score`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from geochat.chat.arguments import add_model_arguments, load_chat, number
from geochat.chat.engine import Chat
from geochat.chat.remote import RemoteChat
from geochat.errors import stop
from geochat.eval.answers import ask, collect, look
from geochat.eval.benchmark import Benchmark
from geochat.eval.checks import notes
from geochat.eval.files import Row
from geochat.eval.progress import ANSWERS, Progress
from geochat.eval.score import Scores, judge, summarise, table, write_scores
from geochat.eval.shards import Shard
from geochat.eval.verdicts import IOU_MODES
from geochat.model.base import BaseRecord
from geochat.model.checkpoint import fingerprint
from geochat.model.formats.gguf_file import is_gguf

FAILURES = (ValueError, OSError, RuntimeError, ImportError)
"""What a run raises where data, model or machine are at fault."""


def evaluate(
    chat: Chat,
    benchmark: Benchmark,
    questions: Sequence[Row],
    image_folder: Path,
    batch_size: int | None = None,
    limit: int | None = None,
) -> Scores:
    """Scores without files: validation during training. `limit`: ask only the first questions."""
    items = look(collect(benchmark, questions, image_folder, limit))
    answered = ask(chat, items, batch_size=batch_size, max_new_tokens=benchmark.max_new_tokens)
    rows = {str(row["question_id"]): row for row in answered}
    total = len(questions) if limit is None else len(items)
    return summarise(judge([rows[item.key] for item in items], benchmark), benchmark, total=total)


@dataclass(frozen=True)
class Model:
    chat: Chat | RemoteChat
    identity: str
    """The fingerprint of its weights; of a server's model the name."""

    @classmethod
    def load(cls, arguments: argparse.Namespace) -> Model:
        """The model that the options name. ValueError when there is none."""
        if arguments.endpoint:
            chat = load_chat(arguments)
            return cls(chat, chat.model)
        identity = _fingerprint(arguments)
        arguments.device = _own_device(arguments)
        return cls(load_chat(arguments), identity)


def run(arguments: argparse.Namespace, model: Model | None = None) -> Scores | None:
    """One benchmark, asked of `model` where it is loaded already; None when other shards are still to end.

    Raises ValueError with one line for whatever the user can mend.
    """
    benchmark = Benchmark.load(arguments.benchmark)
    questions, image_folder = _read(benchmark, arguments)
    items = collect(benchmark, questions, image_folder, arguments.limit)
    if not items:
        raise ValueError(f"{benchmark.name}: no question is left to ask")
    shard = arguments.shard.split()
    share = look(shard.share(items))
    judge([{**item.row, "text": ""} for item in share], benchmark)  # a truth that cannot be used shows now
    model = model or Model.load(arguments)
    budget = arguments.max_new_tokens or benchmark.max_new_tokens
    identity = {"model": model.identity, "decoding": _decoding(model.chat, budget, arguments)}
    progress = Progress(arguments.output, shard, identity)
    left = progress.begin(share, arguments.overwrite)
    answered = progress.keep(ask(model.chat, left, batch_size=arguments.batch_size, max_new_tokens=budget))
    done = len(share) - len(left)
    for _ in tqdm(answered, total=len(share), initial=done, desc=benchmark.name, disable=None):
        pass
    answers = progress.join(items, keep_others=arguments.limit is not None)
    if answers is None:
        return None
    judged = judge(answers, benchmark, arguments.iou)
    total = len(answers) if arguments.limit else len(questions)
    scores = summarise(judged, benchmark, total=total, iou=arguments.iou) | identity
    scores["model_path"] = str(arguments.model_path or arguments.endpoint)
    scores |= {"source": arguments.benchmark, "image_folder": str(image_folder)}
    scores["notes"] = notes(answers, benchmark)
    scores["not_asked"] = sum(row["text"] is None for row in answers)
    write_scores(arguments.output, scores, judged)
    return scores


def _read(benchmark: Benchmark, arguments: argparse.Namespace) -> tuple[list[Row], Path]:
    """The questions and the folder of their pictures."""
    file = arguments.questions or benchmark.root / benchmark.questions
    if not file.is_file():
        raise ValueError(
            f"{file}: no question file there; give --questions, or set GEOCHAT_BENCHMARKS to its folder"
        )
    start = file.parent if arguments.questions else benchmark.root
    return benchmark.read_questions(file), arguments.image_folder or start / benchmark.image_folder


def _own_device(arguments: argparse.Namespace) -> str:
    """Of several processes on a machine each has its own GPU."""
    if arguments.device != "auto" or not torch.cuda.is_available():
        return arguments.device
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def _fingerprint(arguments: argparse.Namespace) -> str:
    if not arguments.model_path.is_dir() and not is_gguf(arguments.model_path):
        raise ValueError(f"{arguments.model_path}: no checkpoint there (no such folder)")
    named = None
    if (arguments.model_path / "adapter_config.json").exists():
        named = arguments.model_base or BaseRecord.read(arguments.model_path).model
    parts = [arguments.model_path, named, arguments.vision_tower]
    return "+".join(fingerprint(path) for path in parts if path and path.exists())


def _decoding(chat: Chat | RemoteChat, max_new_tokens: int, arguments: argparse.Namespace) -> Row:
    """What may change an answer; the batch size may not, and is not in it. A server keeps the rest to itself."""
    decoding: Row = {"max_new_tokens": max_new_tokens, "temperature": 0.0}
    if isinstance(chat, RemoteChat):
        return decoding
    return decoding | {
        "template": chat.processor.template.name,
        "image_size": chat.processor.image_size,
        "image_mode": chat.processor.image_mode,
        "dtype": str(chat.model.dtype).removeprefix("torch."),
        "quantization": "4bit" if arguments.load_4bit else "8bit" if arguments.load_8bit else None,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All but those that name a benchmark and its files."""
    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for answers and scores")
    parser.add_argument(
        "--shard", type=Shard.parse, default=Shard(), metavar="I/N", help="ask only share I of N, from 0"
    )
    parser.add_argument("--limit", type=number(1, whole=True), help="ask only the first questions")
    parser.add_argument(
        "--batch-size",
        type=number(1, whole=True),
        help="questions at a time, or requests under way; changes no answer; default: what memory holds, or 16",
    )
    parser.add_argument("--max-new-tokens", type=number(1, whole=True), help="default: the benchmark's")
    parser.add_argument(
        "--iou", choices=IOU_MODES, default="rotated", help="hbb: of the horizontal envelopes"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="ask again what the output folder has answers for"
    )


def tell(scores: Scores | None, output: Path) -> None:
    """Print what `run` returned."""
    if scores is None:
        print(f"this share is answered; the last one writes {output / ANSWERS} and the scores")
        return
    print(table(scores))
    if scores["not_asked"]:
        print(
            f"{scores['not_asked']} questions could not be asked and count as wrong; see `error` in the answers"
        )
    print(f"written to {output}: {ANSWERS}, samples.jsonl, scores.json, scores.md")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m geochat.eval.run", description=__doc__.split("\n")[0])
    parser.add_argument("--benchmark", required=True, help="name of a benchmark or a .toml file")
    parser.add_argument("--questions", type=Path, help="question file, where not where the benchmark says")
    parser.add_argument("--image-folder", type=Path, help="images, where not where the benchmark says")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        scores = run(arguments)
    except FAILURES as error:
        stop(error)
    tell(scores, arguments.output)


if __name__ == "__main__":
    main()
