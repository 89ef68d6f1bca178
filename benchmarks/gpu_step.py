"""A 7B LoRA training step on one GPU: geochat against transformers' Trainer with PEFT, each with its best setting.

    python benchmarks/gpu_step.py [--questions 3] [--steps 6]
    python benchmarks/gpu_step.py --tiny     (the whole path with a small model, on any machine)

Vicuna-7B's shape with ViT-L/14 at 504 px and random weights, bfloat16, LoRA of rank 64 with dropout 0.05 on every linear
layer, AdamW: whole steps of both trainers on samples of about 1,446 tokens, `--questions` of them about each picture. Both
sides share the frozen weights. Each searches the micro-batch (doubled until the memory is full) with and without
recomputation, geochat also the attention; then the two best take turns, A B B A. MFU is what the samples need, without
padding or recomputation (geochat/train/flops.py), over a matrix product measured in the same run. That the sides compute
the same is asserted on a small model.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
import warnings
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import torch
from gpu_sides import WARM, Measured, Run, Samples, Way, big, dtype_of, now, ours, peer
from train_step import adapted, build, compare, draw, make_sides


def main(argv: list[str] | None = None) -> None:
    """Parse, check, measure the peak, search both sides, let the best take turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=1, help="samples about each picture")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--largest", type=int, default=64, help="most samples in a micro-batch")
    parser.add_argument("--tiny", action="store_true", help="a small model, on any machine")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries
    if not (args.tiny or torch.cuda.is_available()):
        parser.error("no GPU here: --tiny runs the same path with a small model")
    seed = time.time_ns() % 2**32 if args.seed is None else args.seed
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        peak = matmul_peak(device, 256 if args.tiny else 8192)
        print(f"matrix product: {peak / 1e12:.4g} TFLOP/s in {dtype_of(device)}", flush=True)
        base = big(device, args.tiny)
        # The same weights in other modules: adapters and hooks of one side are not the other's.
        twin = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
        samples = Samples(random, args.largest * (WARM + args.steps), args.questions)
        runs = {
            "Trainer + PEFT": peer(base, samples, args.steps, Path(folder)),
            "geochat": ours(twin, samples, args.steps, Path(folder), share=args.questions > 1),
        }
        masked = args.questions > 1 and device.type == "cuda"
        kinds = {"Trainer + PEFT": ["sdpa"], "geochat": ["sdpa", "flex_attention"] if masked else ["sdpa"]}
        best = {name: search(name, run, kinds[name], args.largest) for name, run in runs.items()}
        turns = [(name, runs[name](best[name])) for name in [*runs, *list(runs)[::-1]]]
        small = adapted(build(64, 1))
        compare({name: step() for name, step in make_sides(small, draw(random, 1, 3), Path(folder)).items()})
    print(f"the sides agree within 1e-5 on a small model; seed {seed}\n\ntaking turns, each with its best:")
    report(turns, peak)


def search(name: str, run: Run, kinds: Iterable[str], largest: int) -> Way:
    """The fastest way, micro-batches doubled until the memory is full."""
    found: list[Measured] = []
    for recompute, attention in product((False, True), kinds):
        batch = 1
        while batch <= largest and (measured := attempt(run, Way(batch, recompute, attention))):
            found.append(measured)
            print(f"{name:>15} {line(measured)}", flush=True)
            batch *= 2
    return max(found, key=lambda measured: measured.samples).way


def attempt(run: Run, way: Way) -> Measured | None:
    """None when the memory does not hold it."""
    try:
        return run(way)
    except torch.OutOfMemoryError:
        return None


def matmul_peak(device: torch.device, side: int) -> float:
    """Operations a second of a square matrix product, the best of several."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype_of(device)) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = now()
        for _ in range(5):
            a @ b
        best = min(best, (now() - start) / 5)
    return 2 * side**3 / best


def line(measured: Measured) -> str:
    way = measured.way
    how = f"{way.batch:4} × {way.attention}, {'recomputed' if way.recompute else 'kept'}"
    return f"{how:34} {measured.samples:8.3f} samples/s {measured.peak / 2**30:7.1f} GiB"


def report(turns: list[tuple[str, Measured]], peak: float) -> None:
    """Both sides at their best; the first one is the peer."""
    rates: dict[str, list[float]] = {}
    for name, measured in turns:
        rates.setdefault(name, []).append(measured.samples)
        print(f"{name:>15} {line(measured)} {measured.useful / peak:7.1%} MFU")
    first, second = (median(values) for values in rates.values())
    print(f"geochat is {second / first:.2f}x the peer")


if __name__ == "__main__":
    main()
