"""Ask about a picture in the terminal.

    python -m geochat.serve.cli --model-path M --image-file F                                 # a conversation
    python -m geochat.serve.cli --model-path M --image-file F --query "…"                     # one question
    python -m geochat.serve.cli --model-path M --images FOLDER --prompt "…" --output DIR      # on every picture
    python -m geochat.serve.cli --model-path M --image-file SCENE --tile --query "…" --output DIR  # on every tile

F is a file or an http(s) address; --save-image OUT draws the boxes of each answer on it. DIR gets answers.jsonl and
drawings, for a scene also boxes.geojson.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geochat.chat.arguments import add_model_arguments, load_chat, number
from geochat.chat.engine import Chat
from geochat.chat.remote import RemoteChat
from geochat.data.rows import Row
from geochat.errors import stop
from geochat.serve.batch import ANSWERS
from geochat.serve.conversation import Session, converse, note
from geochat.serve.folder import answer_pictures
from geochat.serve.history import prompt_history
from geochat.serve.pictures import check_writable, gather, is_url, open_picture
from geochat.serve.raster import PERCENTILES
from geochat.serve.scenes import GEOJSON, detect

MODEL_SIDE = 0
"""`--tile` without a number: the side that the model sees."""


def run(arguments: argparse.Namespace) -> int:
    """The command. Everything that can be refused is, before the model is loaded. Raises ValueError."""
    if arguments.images:
        return ask_pictures(arguments)
    if arguments.tile is not None:
        return ask_scene(arguments)
    source: str | None = arguments.image_file
    if arguments.output:
        raise ValueError("--output belongs to --images or --tile; one drawing goes to --save-image")
    if source and not is_url(source) and Path(source).is_dir():
        raise ValueError(f"{source} is a folder: name it with --images, and give --prompt and --output")
    image = open_picture(source) if source else None
    if arguments.save_image:
        if image is None:
            raise ValueError("--save-image needs an --image-file to draw on")
        check_writable(arguments.save_image)
    session = Session(load_chat(arguments), source, image, arguments.save_image, _decoding(arguments))
    if arguments.query:
        session.ask(arguments.query)
        return 0
    remembered = sys.stdin.isatty() and not arguments.no_history
    with prompt_history() if remembered else contextlib.nullcontext():
        converse(session)
    return 0


def ask_pictures(arguments: argparse.Namespace) -> int:
    """`--images`. Returns the exit code."""
    if arguments.image_file or arguments.tile is not None:
        raise ValueError("--images goes with neither --image-file nor --tile")
    output = _output(arguments, "--images")
    files = gather(arguments.images)
    chat = load_chat(arguments)
    settings, decoding = _settings(arguments, chat), _decoding(arguments)
    failures = answer_pictures(chat, files, arguments.query, output, settings, decoding)
    note(f"{len(files) - failures} of {len(files)} pictures answered: {output / ANSWERS}")
    return 1 if failures else 0


def ask_scene(arguments: argparse.Namespace) -> int:
    """`--tile`. Returns the exit code."""
    if not arguments.image_file or is_url(arguments.image_file):
        raise ValueError("--tile needs a scene on disk as --image-file")
    output = _output(arguments, "--tile")
    chat = load_chat(arguments)
    found = detect(
        chat,
        Path(arguments.image_file),
        arguments.query,
        output,
        side=arguments.tile or _model_side(chat),
        overlap=arguments.overlap,
        crs=arguments.crs,
        settings=_settings(arguments, chat),
        decoding=_decoding(arguments),
    )
    if found.limits is not None:
        shown = ", ".join(f"{low:g} to {high:g}" for low, high in found.limits)
        note(f"shown as 8 bits between the percentiles {PERCENTILES[0]:g} and {PERCENTILES[1]:g}: {shown}")
    if not found.georeferenced:
        note("no georeference: the coordinates are pixels")
    note(f"{found.tiles - found.failures} of {found.tiles} tiles answered")
    note(f"{len(found.objects)} objects: {output / GEOJSON}")
    return 1 if found.failures else 0


def _output(arguments: argparse.Namespace, mode: str) -> Path:
    output: Path | None = arguments.output
    if not arguments.query or output is None:
        raise ValueError(f"{mode} needs a question (--prompt) and a folder for the answers (--output)")
    if output.is_file():
        raise ValueError(f"{output}: a file; --output names a folder")
    return output


def _model_side(chat: Chat | RemoteChat) -> int:
    if isinstance(chat, RemoteChat):
        raise ValueError("an endpoint does not say what its model sees: give the side, as in --tile 504")
    return chat.processor.image_size


def _settings(arguments: argparse.Namespace, chat: Chat | RemoteChat) -> Row:
    """What makes answers those of another run."""
    remote = isinstance(chat, RemoteChat)
    model = f"{chat.model} at {arguments.endpoint}" if remote else str(arguments.model_path)
    return {"model": model, "decoding": _decoding(arguments)}


def _decoding(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p")}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m geochat.serve.cli", description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--image-file", help="a picture or scene: a file or an http(s) address")
    parser.add_argument(
        "--images", type=Path, nargs="+", help="folders, pictures, or lists of pictures (.txt); with --output"
    )
    parser.add_argument(
        "--query", "--prompt", help="one question; without it the terminal asks for questions"
    )
    parser.add_argument("--output", type=Path, help="folder for answers and drawings; a stopped run goes on")
    parser.add_argument("--save-image", type=Path, help="picture with the boxes of each answer")
    parser.add_argument(
        "--tile",
        type=number(1, whole=True),
        nargs="?",
        const=MODEL_SIDE,
        help="cut --image-file into tiles of this side in pixels (default: what the model sees)",
    )
    parser.add_argument(
        "--overlap", type=number(0, 0.9), default=0.25, help="share of its side that a tile has in common"
    )
    parser.add_argument(
        "--crs",
        choices=("wgs84", "native"),
        default="wgs84",
        help="coordinates of boxes.geojson: longitude and latitude, or the scene's own",
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
    parser.add_argument("--no-history", action="store_true", help="neither read nor keep earlier questions")
    arguments = parser.parse_args(argv)
    try:
        return run(arguments)
    except KeyboardInterrupt:
        note("stopped")
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        stop(error)


if __name__ == "__main__":
    sys.exit(main())
