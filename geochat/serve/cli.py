"""Ask about a picture in the terminal.

    python -m geochat.serve.cli --model-path M --image-file F                     # a conversation
    python -m geochat.serve.cli --model-path M --image-file F --query "…"         # one question
    python -m geochat.serve.cli --model-path M --image-file FOLDER --query "…"    # one question on every picture

F is a file or an http(s) address. --save-image OUT draws the boxes of the answer on the original picture; for a folder
OUT is a folder, which gets the pictures and answers.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from geochat.chat.arguments import add_model_arguments, load_chat, number
from geochat.chat.engine import Chat, Request
from geochat.data.boxes import parse_boxes, parse_regions
from geochat.data.draw import draw_regions
from geochat.errors import stop
from geochat.serve.pictures import check_writable, is_url, open_picture, pictures_in, save_picture

HELP = "Ask about the picture. /image F shows another one, /new forgets the conversation, an empty line ends."
FOLDER_BATCH = 32


@dataclass
class Session:
    """A conversation in the terminal: the picture, what was said, and where drawings go."""

    chat: Chat
    image: Image.Image | None
    save_image: Path | None
    max_new_tokens: int
    temperature: float
    top_p: float
    said: Request | None = None
    """The conversation so far with its last answer left out."""
    answer: str = ""

    def ask(self, question: str) -> None:
        """Answer one question on the screen, piece by piece. Ctrl-C ends the answer, not the conversation."""
        if self.said is None:
            request = Request.ask(question, *([self.image] if self.image else []))
        else:
            request = self.said.follow(self.answer, question)
        pieces: list[str] = []
        stream = self.chat.stream(
            request, max_new_tokens=self.max_new_tokens, temperature=self.temperature, top_p=self.top_p
        )
        with contextlib.closing(stream), contextlib.suppress(KeyboardInterrupt):
            for piece in stream:
                pieces.append(piece)
                print(printable(piece), end="", flush=True)
        print()
        text = "".join(pieces)
        if text:  # an answer stopped before its first word leaves the conversation as it was
            self.said, self.answer = request, text
        if self.save_image and self.image:
            save_picture(draw_regions(self.image, parse_regions(text)), self.save_image)
            note(f"{_boxes(text)} drawn in {self.save_image}")

    def show(self, source: str) -> None:
        self.image = open_picture(source)
        self.forget()

    def forget(self) -> None:
        self.said, self.answer = None, ""


def converse(session: Session) -> None:
    """Questions from the keyboard (or line by line from a pipe) until an empty line or the end of input."""
    prompt = "USER: " if sys.stdin.isatty() else ""
    if prompt:
        note(HELP)
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            break
        except UnicodeDecodeError:
            note("error: the input is not UTF-8 text")
            continue
        if not line:
            break
        try:
            if line == "/new":
                session.forget()
            elif line.startswith("/image "):
                session.show(line.removeprefix("/image ").strip())
            else:
                session.ask(line)
        except (ValueError, RuntimeError) as error:
            note(f"error: {error}")


def answer_folder(
    chat: Chat,
    files: Sequence[Path],
    query: str,
    output: Path,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> int:
    """One question on every picture. Writes `output`/answers.jsonl and a drawing per picture; returns the failures."""
    output.mkdir(parents=True, exist_ok=True)
    failures = 0
    unfinished = output / "answers.partial.jsonl"
    with (
        unfinished.open("w", encoding="utf-8", errors="backslashreplace") as lines,
        tqdm(total=len(files), unit="picture") as bar,
    ):
        for start in range(0, len(files), FOLDER_BATCH):
            part = files[start : start + FOLDER_BATCH]
            requests = [Request.ask(query, file) for file in part]
            results = chat.answer_each(
                requests, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
            )
            for file, result in zip(part, results, strict=True):
                row = {"image": file.name, "query": query, "text": None}
                if isinstance(result, ValueError):
                    failures += 1
                    row["error"] = str(result)
                else:
                    row["text"] = result.text
                    try:
                        picture = draw_regions(open_picture(str(file)), parse_regions(result.text))
                        save_picture(picture, output / f"{file.name}.png")
                    except ValueError as error:
                        failures += 1
                        row["error"] = str(error)
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")
                bar.update()
            lines.flush()
    unfinished.replace(output / "answers.jsonl")
    return failures


def printable(text: str) -> str:
    """Without control characters: a model's words must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def note(text: str) -> None:
    """To the standard error: the standard output holds the answers alone."""
    print(printable(text), file=sys.stderr, flush=True)


def run(arguments: argparse.Namespace) -> int:
    """The command. Everything that can be refused is, before the model is loaded. Raises ValueError."""
    source: str = arguments.image_file or ""
    decoding = (arguments.max_new_tokens, arguments.temperature, arguments.top_p)
    if source and not is_url(source) and Path(source).is_dir():
        if not arguments.query:
            raise ValueError(f"{source} is a folder: give the question with --query")
        files = pictures_in(Path(source))
        output = arguments.save_image or Path(f"{Path(source).resolve().name}_answers")
        if output.is_file():
            raise ValueError(f"{output}: a file; for a folder of pictures --save-image names a folder")
        failures = answer_folder(load_chat(arguments), files, arguments.query, output, *decoding)
        note(f"{len(files) - failures} of {len(files)} pictures answered: {output / 'answers.jsonl'}")
        return 1 if failures else 0
    image = open_picture(source) if source else None
    if arguments.save_image:
        if image is None:
            raise ValueError("--save-image needs an --image-file to draw on")
        check_writable(arguments.save_image)
    session = Session(load_chat(arguments), image, arguments.save_image, *decoding)
    if arguments.query:
        session.ask(arguments.query)
    else:
        converse(session)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m geochat.serve.cli", description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--image-file", help="a file, an http(s) address or a folder of pictures")
    parser.add_argument("--query", help="one question; without it the terminal asks for questions")
    parser.add_argument(
        "--save-image", type=Path, help="picture with the boxes of the answer (a folder for a folder)"
    )
    parser.add_argument(
        "--temperature", type=number(0), default=0.0, help="0 (default): always the likeliest word"
    )
    parser.add_argument(
        "--top-p", type=number(0, 1), default=1.0, help="share of probability that is sampled from"
    )
    parser.add_argument(
        "--max-new-tokens", type=number(1, whole=True), default=512, help="bound on an answer's length"
    )
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        stop(error)


def _boxes(text: str) -> str:
    count = len(parse_boxes(text))
    return "1 box" if count == 1 else f"{count} boxes"


if __name__ == "__main__":
    sys.exit(main())
