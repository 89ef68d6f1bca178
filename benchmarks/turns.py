"""The second question on a picture: time to its first token, with the first turn's keys and values kept and without.

    python benchmarks/turns.py [--answer 40] [--rounds 5]

A conversation of two turns about one picture file, 1,296 image tokens, a random model. `from scratch` is the original chat's
way: the picture is read, transformed and seen again, the whole conversation computed again. `kept` is `Chat.stream`'s. They
take turns, A B B A, in one process with one number of threads; each time the conversation is a new one, so that nothing
but its own first turn is known. The second answers of both sides must be the same tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from toy import build, draw_pictures, endless, from_scratch

from geochat.chat.engine import Chat, Request
from geochat.chat.sampling import Settings


def main() -> None:
    """Parse, build one model, time both sides on fresh conversations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--answer", type=int, default=40, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    args = parser.parse_args()
    seed = time.time_ns() % 2**32 if args.seed is None else args.seed
    chat = endless(*build(args.hidden, args.layers, seed))
    times: dict[str, list[tuple[float, float]]] = {"from scratch": [], "kept": []}
    with tempfile.TemporaryDirectory() as folder:
        pictures = draw_pictures(Path(folder), 2 * args.rounds + 1, np.random.default_rng(seed))
        for turn, picture in enumerate(pictures):
            first = Request.ask("Where is the harbour?", picture)
            text = "".join(chat.stream(first, max_new_tokens=args.answer))
            request = first.follow(text, "How many ships are there?")
            tokens = len(chat.row(request, Settings()).prompt.ids)
            measured = {}
            for name in list(times) if turn % 2 else list(times)[::-1]:
                start, cpu = time.perf_counter(), time.process_time()
                token = first_token(chat, request) if name == "kept" else from_scratch(chat, request, 1)[0]
                measured[name] = (time.perf_counter() - start, time.process_time() - cpu), token
            assert measured["kept"][1] == measured["from scratch"][1], "the sides begin differently"
            if turn == 0:  # the warm-up, and whole answers
                (answer,) = chat.answer([request], max_new_tokens=args.answer)
                assert list(answer.token_ids) == from_scratch(chat, request, args.answer)
                continue
            for name, (seconds, _) in measured.items():
                times[name].append(seconds)
    report(times, tokens, args, seed)


def first_token(chat: Chat, request: Request) -> int:
    """As `Chat.stream` comes to it."""
    row = chat.row(request, Settings())
    batch = chat.batch()
    batch.admit([row])
    batch.drop(row)
    return row.ids[0]


def report(
    times: dict[str, list[tuple[float, float]]], tokens: int, args: argparse.Namespace, seed: int
) -> None:
    print(
        f"prompts of {tokens} tokens, hidden {args.hidden}, {args.layers} layers, "
        f"{torch.get_num_threads()} threads, seed {seed}; the same tokens"
    )
    print(f"{'':>13} {'wall ms':>8} {'least':>8} {'cpu ms':>8} {'wall':>7} {'cpu':>7}")
    peer = times["from scratch"]
    for name, rows in times.items():
        walls, cpus = [wall for wall, _ in rows], [cpu for _, cpu in rows]
        print(
            f"{name:>13} {1000 * median(walls):8.1f} {1000 * min(walls):8.1f} {1000 * median(cpus):8.1f} "
            f"{median(wall for wall, _ in peer) / median(walls):6.1f}x "
            f"{median(cpu for _, cpu in peer) / median(cpus):6.1f}x"
        )


if __name__ == "__main__":
    main()
