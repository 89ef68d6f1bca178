"""Many users of the web demo at the same time: errors, answers that differ from those given alone, memory.

    python benchmarks/demo_load.py --users 20 --turns 5

Starts the demo in a process of its own. All users ask, wait for one another, and ask again; after each round the
server's resident memory is read. It may grow by what the conversations grow: their keys and values are kept for the next
turn (within a bound), and are counted beside. Exit code 1 if an answer differs or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from geochat.chat.engine import Chat, Request
from geochat.chat.runtime import token_bytes
from geochat.chat.sampling import Settings
from geochat.data.synthetic import draw_scene
from geochat.serve.gradio_web_server import NANO

QUESTIONS = (
    "[refer] Give me the location of <p> ship </p>",
    "How many ships are there in the image?\nAnswer the question using a single word or phrase.",
    "[grounding] Describe the image in detail.",
    "Is there a plane in the image?\nAnswer the question using a single word or phrase.",
    "[refer] Where is <p> vehicle </p>",
)
NEW_TOKENS = 100


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(model: Path, port: int) -> subprocess.Popen[str]:
    """The demo, once it has said where it is."""
    command = [sys.executable, "-m", "geochat.serve.gradio_web_server", "--device", "cpu"]
    command += ["--model-path", str(model), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    if "http" not in server.stdout.readline():
        raise SystemExit("error: the demo did not start")
    return server


def talk(url: str, picture: Path, questions: list[str], rounds: threading.Barrier) -> list[str]:
    """One user: every round ends when the last one has an answer."""
    from gradio_client import Client, handle_file

    client = Client(url, verbose=False)
    client.predict(handle_file(str(picture)), api_name="/show")
    answers = []
    for question in questions:
        *_, status, _, _, _, geojson = client.predict(question, NEW_TOKENS, 0, 1, api_name="/ask")
        answers.append(status or json.loads(Path(geojson["value"]).read_text())["answer"])
        rounds.wait(timeout=600)
    return answers


def alone(chat: Chat, picture: Path, questions: list[str]) -> tuple[list[str], list[int]]:
    """The answers when nobody else asks, and the tokens of the conversation after each."""
    request, answers, tokens = Request.ask(questions[0], picture), [], []
    for following in [*questions[1:], None]:
        answer = chat.answer([request], max_new_tokens=NEW_TOKENS)[0]
        answers.append(answer.text)
        tokens.append(len(chat.row(request, Settings()).prompt.ids) + len(answer.token_ids))
        if following:
            request = request.follow(answer.text, following)
    return answers, tokens


def measure(model: Path, users: int, turns: int, folder: Path) -> bool:
    pictures = [folder / f"{number}.png" for number in range(users)]
    for number, picture in enumerate(pictures):
        draw_scene(1000 + number).image.save(picture)
    questions = [[QUESTIONS[(n + turn) % len(QUESTIONS)] for turn in range(turns)] for n in range(users)]
    port = free_port()
    server = start(model, port)
    begun, memory = time.monotonic(), []

    def after_round() -> None:
        memory.append(psutil.Process(server.pid).memory_info().rss / 2**20)
        print(f"{time.monotonic() - begun:7.1f} s  {memory[-1]:7.0f} MiB", flush=True)

    rounds = threading.Barrier(users, after_round)
    try:
        with ThreadPoolExecutor(users) as pool:
            url = f"http://127.0.0.1:{port}"
            told = list(pool.map(lambda n: talk(url, pictures[n], questions[n], rounds), range(users)))
    finally:
        server.terminate()
        server.wait()
    chat = Chat.load(model, device="cpu")
    expected, tokens = zip(*[alone(chat, pictures[n], questions[n]) for n in range(users)], strict=True)
    each = token_bytes(chat.model.config.text_config, chat.model.dtype) / 2**20
    for turn, total in enumerate(memory):
        kept = each * sum(user[turn] for user in tokens)
        print(
            f"round {turn + 1}: {total:.0f} MiB, {kept:.0f} of them conversations, {total - kept:.0f} without"
        )
    pairs = [pair for n in range(users) for pair in zip(told[n], expected[n], strict=True)]
    same = sum(a == b for a, b in pairs)
    print(f"{same} of {len(pairs)} answers as given alone; load of the machine {os.getloadavg()[0]:.1f}")
    return same == len(pairs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-path", type=Path, default=NANO)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        return 0 if measure(arguments.model_path, arguments.users, arguments.turns, Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
