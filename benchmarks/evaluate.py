"""Many questions on one picture: geochat against the original evaluation loop and against plain batches of `generate`.

    python benchmarks/evaluate.py [--questions 1 12 86] [--tokens 1 30] [--rounds 1]

Three sides answer the same questions about the same picture files with the same random model, 1,296 image tokens each:

- `loop`: the original's algorithm. One question at a time; its picture is read and transformed, and its whole prompt
  computed, for every question.
- `generate`: transformers used well. Pictures are transformed once, questions go through `generate` in padded batches.
- `geochat`: `Chat.answer`, with nothing kept from before.

They take turns, A B C C B A, in one process with one number of threads; answers have all the same length, and every
token must be the same on all sides. The last three columns say how many times the loop's figure is the side's: wall
time, processor time, and the work of the linear layers, which is counted in a run of its own.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from toy import Work, build, draw_pictures, endless, from_scratch, greedy

from geochat.chat.engine import Chat, Request
from geochat.chat.sampling import Settings
from geochat.data.images import open_image

Tokens = list[list[int]]
BATCH = 16


def main() -> None:
    """Parse, build one model, let the sides take turns at every mix of questions and answers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 12, 86], help="questions per picture")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 30], help="tokens of an answer")
    parser.add_argument("--least", type=int, default=12, help="questions in all, at least")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    args = parser.parse_args()
    seed = time.time_ns() % 2**32 if args.seed is None else args.seed
    chat = endless(*build(args.hidden, args.layers, seed))
    print(f"hidden {args.hidden}, {args.layers} layers, {torch.get_num_threads()} threads, seed {seed}")
    print(
        f"{'questions':>10} {'a picture':>9} {'tokens':>6} {'':>10} {'wall s':>8} {'least':>8} {'cpu s':>8} "
        f"{'GFLOP':>8} {'wall':>7} {'cpu':>7} {'count':>7}"
    )
    random = np.random.default_rng(seed)
    for questions in args.questions:
        with tempfile.TemporaryDirectory() as folder:
            pictures = draw_pictures(Path(folder), -(-args.least // questions), random)
            requests = [
                Request.ask(draw_question(random), picture) for picture in pictures for _ in range(questions)
            ]
            for tokens in args.tokens:
                compare(chat, requests, questions, tokens, args.rounds)


def draw_question(random: np.random.Generator) -> str:
    """24 to 36 tokens after the picture, 28.7 in the mean: RSVQA-HR's questions with their instruction take 28.2 with
    Vicuna's tokenizer."""
    words = random.choice(["road", "ship", "house", "river", "field", "square"], int(random.integers(2, 9)))
    return f"Is there a {' '.join(words)} in the image? Answer the question using a single word or phrase."


def compare(chat: Chat, requests: list[Request], questions: int, tokens: int, rounds: int) -> None:
    """All sides on one set of requests. Raises AssertionError when they do not give the same tokens."""
    sides: dict[str, Callable[[], Tokens]] = {
        "loop": lambda: [from_scratch(chat, request, tokens) for request in requests],
        "generate": lambda: generate(chat, requests, tokens),
        "geochat": lambda: ours(chat, requests, tokens),
    }
    flops, answers = {}, {}
    for name, side in sides.items():  # also the warm-up
        work = Work(chat.model)
        with work.counted():
            answers[name] = side()
        flops[name] = work.flops
    assert answers["loop"] == answers["generate"] == answers["geochat"], "the sides answer differently"
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in [*sides, *reversed(sides)]:
            start, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    walls = {name: median(wall for wall, _ in rows) for name, rows in times.items()}
    cpus = {name: median(cpu for _, cpu in rows) for name, rows in times.items()}
    for name, rows in times.items():
        ratios = [walls["loop"] / walls[name], cpus["loop"] / cpus[name], flops["loop"] / flops[name]]
        print(
            f"{len(requests):10} {questions:9} {tokens:6} {name:>10} {walls[name]:8.2f} "
            f"{min(wall for wall, _ in rows):8.2f} {cpus[name]:8.2f} {flops[name] / 1e9:8.0f} "
            + " ".join(f"{ratio:6.1f}x" for ratio in ratios),
            flush=True,
        )


def ours(chat: Chat, requests: list[Request], tokens: int) -> Tokens:
    fresh = endless(chat.model, chat.processor)
    return [list(answer.token_ids) for answer in fresh.answer(requests, max_new_tokens=tokens)]


@torch.inference_mode()
def generate(chat: Chat, requests: list[Request], tokens: int) -> Tokens:
    """transformers' own: batches padded on the left under a mask, each picture transformed once."""
    processor = chat.processor
    pixels = {picture: processor.pixels(open_image(picture)) for picture in {r.images[0] for r in requests}}
    answers = []
    for start in range(0, len(requests), BATCH):
        batch = requests[start : start + BATCH]
        prompts = [chat.row(request, Settings()).prompt.ids for request in batch]
        width = max(map(len, prompts))
        ids = torch.full((len(batch), width), processor.pad_token_id)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        output = chat.model.generate(
            input_ids=ids,
            attention_mask=(ids != processor.pad_token_id).long(),
            pixel_values=torch.stack([pixels[request.images[0]] for request in batch]),
            generation_config=greedy(chat, tokens),
        )
        answers += output[:, width:].tolist()
    return answers


if __name__ == "__main__":
    main()
