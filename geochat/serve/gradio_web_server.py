"""Ask about a picture in the browser.

    python -m geochat.serve.gradio_web_server                          # the small model of this repository
    python -m geochat.serve.gradio_web_server --model-path M
    python -m geochat.serve.gradio_web_server --model-path M --host 0.0.0.0 --port 8080 --auth user:password

The server is for this machine alone unless --host says otherwise. It opens no web addresses, sends no telemetry, and
deletes what users upload when they leave.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geochat.chat.arguments import add_model_arguments, load_chat, number
from geochat.chat.remote import RemoteChat
from geochat.chat.service import Service
from geochat.data.synthetic import draw_scene
from geochat.data.synthetic_tasks import TEST_SEEDS
from geochat.errors import stop
from geochat.serve.streams import Streams
from geochat.serve.web_session import Asked, Sessions

NANO = Path(__file__).resolve().parents[2] / "playground" / "nano"
"""The model of a clone of the repository, for a machine without weights."""

LARGEST_UPLOAD = "256mb"

AT_AN_ENDPOINT = 16
"""Questions that an --endpoint gets at a time; the batching is its own."""

THREADS = 256
"""Every question that waits or is being answered holds one."""

LAST_WORDS = 0.5
"""Seconds at the end for what is said to those whose answers are cut off; then no page waits for more."""

SCENES = {"harbour": 0, "airport": 1, "sports ground": 2, "residential area": 3, "parking lot": 4}
"""Example scenes, each with the number of its seed. No training set can hold them."""


def draw_scenes(folder: Path) -> list[tuple[Path, str]]:
    """The example pictures and their captions."""
    folder.mkdir(parents=True)
    scenes = [(folder / f"{name.replace(' ', '-')}.png", name) for name in SCENES]
    for file, name in scenes:
        draw_scene(TEST_SEEDS + SCENES[name], name=name).image.save(file)
    return scenes


def launch(
    service: Asked, folder: Path, host: str, port: int | None, auth: tuple[str, str] | None, model: str
) -> Any:
    """Start the server and return its `gradio.Blocks`; it runs in threads of its own.

    `folder` takes everything that users upload and may fetch. `port` None takes a free one.
    Raises ImportError without gradio, OSError when the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    from starlette.middleware import Middleware

    from geochat.serve.web_guard import Guard, fetch_nothing
    from geochat.serve.web_page import Page
    from geochat.serve.web_style import CSS, PASTE, THEME

    fetch_nothing()
    page = Page(Sessions(folder / "sessions"), service, draw_scenes(folder / "scenes"), model)
    page.blocks.queue(default_concurrency_limit=None)
    page.blocks.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        share=False,
        inline=False,
        theme=THEME,
        css=CSS,
        js=PASTE,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        max_threads=THREADS,
        max_file_size=LARGEST_UPLOAD,
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        app_kwargs={"middleware": [Middleware(Guard)]},
    )
    return page.blocks


def user_and_password(text: str) -> tuple[str, str]:
    """Argument type: user:password."""
    user, colon, password = text.partition(":")
    if not (user and colon and password):
        raise argparse.ArgumentTypeError("must be user:password")
    return user, password


def run(arguments: argparse.Namespace) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises ValueError, OSError or ImportError with the reason when it cannot start."""
    import gradio  # noqa: F401  # missing, it is told before a large model is read

    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda *_: sys.exit(0))  # so that the folder is deleted after both
    chat = load_chat(arguments)
    remote = isinstance(chat, RemoteChat)
    service: Any = Streams(chat, AT_AN_ENDPOINT) if remote else Service(chat)
    name = Path(chat.model if remote else arguments.model_path.resolve()).name
    with tempfile.TemporaryDirectory(prefix="geochat-demo-") as folder:
        port = arguments.port or None
        blocks = launch(service, Path(folder), arguments.host, port, arguments.auth, name)
        try:
            print(f"geochat with {name}: {blocks.local_url} (Ctrl-C ends it)", flush=True)
            blocks.block_thread()
        finally:  # before the folder goes: an answer that is being written would put it back
            service.close()
            time.sleep(LAST_WORDS)
            blocks.close(verbose=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m geochat.serve.gradio_web_server", description=__doc__.split("\n")[0]
    )
    add_model_arguments(parser, default=NANO)
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument(
        "--port", type=number(0, 65535, whole=True), default=7860, help="default 7860; 0 takes a free one"
    )
    parser.add_argument("--auth", type=user_and_password, help="user:password that the page asks for")
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except ImportError as error:
        stop(ImportError(f'{error}; the web demo needs the serve extra: pip install -e ".[serve]"'))
    except (ValueError, OSError, RuntimeError) as error:
        stop(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
