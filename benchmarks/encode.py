"""Conversation → ids and labels, against the algorithm of LLaVA and GeoChat, with one tokenizer and equal results.

    python benchmarks/encode.py [--tokenizer FOLDER_OR_MODEL] [--samples 2000]

The peer renders the whole prompt, tokenises it around each `<image>`, then tokenises every round and every question a
second time to find out how many labels to mask. Both sides run interleaved (A B B A) in one process on one thread;
the conversations are drawn anew from `--seed`, in the proportions of GeoChat_Instruct's tasks.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from itertools import accumulate
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from geochat.data.encode import IGNORE_INDEX, Encoder
from geochat.data.sample import IMAGE_TOKEN, Sample, Turn
from geochat.data.template_texts import VICUNA_SYSTEM
from geochat.data.templates import get_template
from geochat.data.words import by_words
from geochat.model.tokenizer import convert_sentencepiece, load_tokenizer

IMAGE_TOKEN_INDEX = -200
REPOSITORY = Path(__file__).resolve().parents[1]

OBJECTS = [
    "ship",
    "plane",
    "vehicle",
    "storage-tank",
    "harbor",
    "bridge",
    "tennis-court",
    "dump-truck",
    "windmill",
]
COLOURS = ["white", "gray", "black", "red", "blue", "green", "silver", "yellow"]
PLACES = ["top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right"]
SYLLABLES = [
    "road",
    "wa",
    "ter",
    "field",
    "ing",
    "er",
    "con",
    "struct",
    "ed",
    "de",
    "ment",
    "al",
    "park",
    "side",
    "un",
]
CLASSES = [
    f"{a} {b}" for a in ("dense", "sparse", "medium") for b in (*OBJECTS, "residential", "forest", "desert")
]


def original(prompt_turns: tuple[Turn, ...], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """The published algorithm, step by step: render, tokenise, then tokenise each round again to place the mask."""
    prompt = VICUNA_SYSTEM + " "
    for turn in prompt_turns:
        prompt += f"USER: {turn.text} " if turn.role == "user" else f"ASSISTANT: {turn.text}</s>"

    def with_images(text: str) -> list[int]:
        chunks = [tokenizer(chunk).input_ids for chunk in text.split(IMAGE_TOKEN)]
        ids = list(chunks[0])
        for chunk in chunks[1:]:
            ids += [IMAGE_TOKEN_INDEX, *chunk[1:]]
        return ids

    ids = torch.tensor(with_images(prompt), dtype=torch.long)
    labels = ids.clone()
    at = 1
    labels[:at] = IGNORE_INDEX
    for part in prompt.split("</s>"):
        if not part:
            break
        question = part.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        length = len(with_images(part))
        masked = len(with_images(question)) - 2
        labels[at : at + masked] = IGNORE_INDEX
        at += length
    labels[at:] = IGNORE_INDEX
    if at != len(ids):
        labels[:] = IGNORE_INDEX
    return ids, labels


def conversations(count: int, seed: int) -> list[Sample]:
    """Conversations in the shares of GeoChat_Instruct; no two images, numbers or descriptions are alike by plan."""
    rng = random.Random(seed)

    def box() -> str:
        x, y = rng.randint(0, 80), rng.randint(0, 80)
        return f"{{<{x}><{y}><{x + rng.randint(1, 20)}><{y + rng.randint(1, 20)}>|<{rng.randint(1, 90)}>}}"

    def thing() -> str:
        return f"{rng.randint(1, 9)} {rng.choice(COLOURS)} {rng.choice(OBJECTS)} at the {rng.choice(PLACES)}"

    # A vocabulary of 5000 words, used as often as words are: the k-th in proportion to 1/k.
    words = ["".join(rng.choices(SYLLABLES, k=rng.choice([1, 1, 2, 3]))) for _ in range(5000)]
    often = list(accumulate(1 / k for k in range(1, 5001)))

    def prose(length: int) -> str:
        return " ".join(rng.choices(words, cum_weights=often, k=length)).capitalize() + "."

    def scene() -> tuple[str, str]:
        listed = ", ".join(CLASSES)
        return (
            f"Classify the given image in one of the following classes: {listed}. Answer in one word or a short phrase.",
            rng.choice(CLASSES),
        )

    def vqa() -> tuple[str, str]:
        question = rng.choice(["Is there a {}?", "How many {}s are there?", "Are there more {}s than roads?"])
        return (
            question.format(rng.choice(OBJECTS)) + " Answer in one word or a short phrase.",
            rng.choice(["yes", "no", "4"]),
        )

    def refer() -> tuple[str, str]:
        return f"[refer] where is <p>{thing()}</p> ?", "".join(box() for _ in range(rng.randint(1, 3)))

    def identify() -> tuple[str, str]:
        return f"[identify] the object in {box()} is", f"<p>{thing()}</p>"

    def grounding() -> tuple[str, str]:
        regions = " and ".join(f"<p>{thing()}</p> {box()}<delim>{box()}" for _ in range(rng.randint(1, 4)))
        return "[grounding] describe the image in detail", f"{prose(8)} {regions}. {prose(6)}"

    def detail() -> tuple[str, str]:
        return "Describe the image in detail.", " ".join(prose(14) for _ in range(6))

    tasks = [scene, vqa, refer, identify, grounding, detail]
    samples = []
    for number in range(count):
        # Shares in thousands of records: 31.5, 60, 25, 40, 45, 40 and 65 of several rounds.
        task = rng.choices([*tasks, None], weights=[31.5, 60, 25, 40, 45, 40, 65])[0]
        pairs = (
            [task()]
            if task
            else [rng.choice([vqa, refer, identify, detail])() for _ in range(rng.randint(3, 5))]
        )
        turns = []
        for k, (question, answer) in enumerate(pairs):
            mark = f"{IMAGE_TOKEN}\n" if k == 0 else ""
            turns += [Turn("user", mark + question), Turn("assistant", answer)]
        samples.append(Sample(str(number), (f"{number}.png",), tuple(turns)))
    return samples


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when the two sides disagree on any id or label."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokenizer", type=Path, default=_default_tokenizer(), help="folder or tokenizer.model"
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--rounds", type=int, default=3, help="A B B A rounds")
    options = parser.parse_args(argv)
    if options.tokenizer is None:
        parser.error("no tokenizer found; give one with --tokenizer")
    torch.set_num_threads(1)
    file = options.tokenizer
    tokenizer = convert_sentencepiece(file) if file.suffix == ".model" else load_tokenizer(file)
    backend = tokenizer.backend_tokenizer
    specials = {token.content: number for number, token in backend.get_added_tokens_decoder().items()}

    def encoder() -> Encoder:
        return Encoder(
            by_words(lambda text: backend.encode(text, add_special_tokens=False).ids, tokenizer.get_vocab()),
            get_template("vicuna_v1"),
            bos_id=tokenizer.bos_token_id,
            special_ids=specials,
            image_token_id=IMAGE_TOKEN_INDEX,
            image_tokens=1,
            max_text_tokens=1 << 30,
        )

    samples = conversations(options.samples, options.seed)
    ours, tokens = encoder(), 0
    for sample in samples:
        ids, labels = original(sample.turns, tokenizer)
        mine = ours.encode(sample)
        tokens += len(ids)
        if ids.tolist() != mine.input_ids.tolist() or labels.tolist() != mine.labels.tolist():
            print(f"different ids or labels for sample {sample.id} of seed {options.seed}")
            return 1
    print(
        f"{len(samples)} conversations, {tokens / len(samples):.0f} text tokens each, tokenizer {file.name}, seed {options.seed}"
    )
    print("ids and labels equal on all of them")

    def peer() -> None:
        for sample in samples:
            original(sample.turns, tokenizer)

    def cold() -> None:
        fresh = encoder()
        for sample in samples:
            fresh.encode(sample)

    def warm() -> None:
        for sample in samples:
            ours.encode(sample)

    for name, side in (("first pass, empty cache", cold), ("second pass over the same data", warm)):
        times: dict[str, list[tuple[float, float]]] = {"original": [], "geochat": []}
        for _ in range(options.rounds):
            for label, run in (("original", peer), ("geochat", side), ("geochat", side), ("original", peer)):
                wall, cpu = time.perf_counter(), time.process_time()
                run()
                times[label].append((time.perf_counter() - wall, time.process_time() - cpu))
        _print_row(name, times, len(samples))
    return 0


def _print_row(name: str, times: dict[str, list[tuple[float, float]]], samples: int) -> None:
    print(f"\n{name}: microseconds per conversation")
    print(f"{'':10}{'wall median':>14}{'wall min':>12}{'CPU median':>14}{'CPU min':>12}")
    rows = {}
    for label, pairs in times.items():
        walls, cpus = ([1e6 * pair[k] / samples for pair in pairs] for k in (0, 1))
        rows[label] = (statistics.median(walls), min(walls), statistics.median(cpus), min(cpus))
        print(
            f"{label:10}"
            + "".join(f"{v:>{w}.0f}" for v, w in zip(rows[label], (14, 12, 14, 12), strict=True))
        )
    ratios = [a / b for a, b in zip(rows["original"], rows["geochat"], strict=True)]
    print(
        f"{'ratio':10}" + "".join(f"{v:>{w - 1}.1f}×" for v, w in zip(ratios, (14, 12, 14, 12), strict=True))
    )


def _default_tokenizer() -> Path | None:
    assets = Path(os.environ.get("GEOCHAT_ASSETS", REPOSITORY.parent / "shared"))
    choices = [
        assets / "data/tokenizers/llama2/tokenizer.model",
        *sorted(REPOSITORY.glob("playground/*/tokenizer.model")),
    ]
    return next((path for path in choices if path.exists()), None)


if __name__ == "__main__":
    raise SystemExit(main())
