"""Padding over a whole epoch: what share of the computed tokens is none, for each way of forming batches.

    python benchmarks/padding.py [--samples 306000] [--batch 16]

A plan of GeoChat_Instruct's size and kind is drawn (141,000 pictures; short questions, class lists, region phrases,
descriptions and dialogues; the mixture is an assumption, the file itself is not read), and every sampler orders it. No
model runs: a micro-batch costs its rows times its longest row. Lengths that samplers see are words, as in training; costs
are tokens, with 4 tokens in 3 words, give or take. The peer is transformers' sampler by length.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable

import numpy as np
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from geochat.train.sampler import EpochSampler

IMAGE_TOKENS, HEAD = 1296, 42
# share of the records, words from … to (drawn evenly on a logarithmic scale)
KINDS = ((0.30, 15, 40), (0.12, 90, 110), (0.30, 20, 60), (0.20, 60, 180), (0.08, 150, 700))


def main() -> None:
    """Draw the plan, order it in every way, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=306_000)
    parser.add_argument("--images", type=int, default=141_000)
    parser.add_argument("--batch", type=int, default=16, help="samples of one process and micro-batch")
    parser.add_argument("--processes", type=int, default=8)
    args = parser.parse_args()
    random = np.random.default_rng(time.time_ns())
    words, tokens, images = plan(random, args.samples, args.images)
    step = args.batch * args.processes
    common = {"seed": 0, "batch": step, "micro_batch": args.batch}
    samplers: dict[str, Iterable[int]] = {
        "random": EpochSampler(args.samples, **common),
        "peer: by length": LengthGroupedSampler(
            step, lengths=tokens.tolist(), generator=torch.Generator().manual_seed(0)
        ),
        "by length": EpochSampler(args.samples, lengths=words, **common),
        "by image": EpochSampler(args.samples, images=images, **common),
        "by image and length": EpochSampler(args.samples, images=images, lengths=words, **common),
    }
    print(
        f"{args.samples:,} records of {args.images:,} pictures, micro-batches of {args.batch} on {args.processes} processes"
    )
    print(f"{'order':>20} {'rows':>22} {'tokens, millions':>17} {'padding':>8} {'seconds':>8}")
    for name, sampler in samplers.items():
        start = time.perf_counter()
        order = np.fromiter(sampler, dtype=np.int64)
        seconds = time.perf_counter() - start
        ways = {"one sample each": (False, False)}
        if "image" in name:
            ways |= {"images shared": (True, False), "images shared, packed": (True, True)}
        for rows, (share, pack) in ways.items():
            computed, used = cost(order, tokens, images, args.batch, share=share, pack=pack)
            print(f"{name:>20} {rows:>22} {computed / 1e6:17.1f} {1 - used / computed:8.2%} {seconds:8.2f}")


def plan(random: np.random.Generator, samples: int, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words, tokens with those of the picture, and picture of every record."""
    kind = random.choice(len(KINDS), samples, p=[share for share, _, _ in KINDS])
    low, high = (np.log([KINDS[k][i] for k in range(len(KINDS))])[kind] for i in (1, 2))
    words = np.exp(random.uniform(low, high)).astype(np.int64)
    tokens = IMAGE_TOKENS + HEAD + np.round(words * random.normal(4 / 3, 0.1, samples)).astype(np.int64)
    picture = np.concatenate([np.arange(images), random.integers(0, images, samples - images)])
    return words, tokens, random.permutation(picture)


def cost(
    order: np.ndarray, tokens: np.ndarray, images: np.ndarray, batch: int, *, share: bool, pack: bool
) -> tuple[int, int]:
    """Tokens that are computed in an epoch, padding included, and those of them that are used."""
    computed = used = 0
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = tokens[chosen]
        if share:
            _, place = np.unique(images[chosen], return_inverse=True)
            rows = np.bincount(place, rows - IMAGE_TOKENS - HEAD).astype(np.int64) + IMAGE_TOKENS + HEAD
        used += int(rows.sum())
        computed += int(rows.sum()) if pack else len(rows) * int(rows.max())  # packed: all in one row
    return computed, used


if __name__ == "__main__":
    main()
