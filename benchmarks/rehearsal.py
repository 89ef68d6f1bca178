"""A rehearsal at real size: convert, merge and export a 7B-shaped model, with time and memory; PEFT's merge beside it.

    python benchmarks/rehearsal.py --work DIR [--layers 8 16 32] [--formats llava] [--peft] [--rounds 2]
    python benchmarks/rehearsal.py --work DIR --layers 2 --scale 32 --peft        # small, some minutes

For every number of layers a random model in GeoChat's original layout and a LoRA r 64 are written, then, each in a process
of its own with the input files dropped from the page cache: conversion to the canonical folder, its verification, the
merge of the LoRA, and the export of what was merged. With `--peft` a canonical base and the same LoRA are merged by both
programs in the order A B B A. Every result is checked and then deleted; the disk needs 2.2 times the model's size.
What a figure of memory means is said in `rehearsal_measure.py`. Exits with 1 when a peak is above one shard and 1 GB.
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import median

from rehearsal_measure import Run, forget, measured
from rehearsal_model import Shape, write_adapter, write_source

ROOT = Path(__file__).resolve().parents[1]
CONVERT = [sys.executable, str(ROOT / "scripts/convert_checkpoint.py")]
MERGE = [sys.executable, str(ROOT / "scripts/merge_lora_weights.py")]
CHECKS = [sys.executable, str(ROOT / "benchmarks/rehearsal_checks.py")]
GB = 1e9


def main(argv: list[str] | None = None) -> int:
    """Rehearse every size; print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for models; needs 2.2 times their size"
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32], help="of the language model")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by this")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of the source's files")
    parser.add_argument("--formats", nargs="*", default=["llava"], help="layouts to export to")
    parser.add_argument("--peft", action="store_true", help="merge with PEFT too")
    parser.add_argument("--rounds", type=int, default=2, help="merges of each program, in the order A B B A")
    parser.add_argument(
        "--floor-gb", type=float, default=1.5, help="stop a process that leaves less memory free"
    )
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "playground/nano/tokenizer.model")
    args = parser.parse_args(argv)
    print("Seconds; GB of memory. cpu: user and system. peak: high-water mark; own: without mapped files.")
    failures = [failure for layers in args.layers for failure in rehearse(args, layers)]
    print(
        "\n".join(
            ["", *failures, "FAILED" if failures else "PASSED: every peak is at most one shard and 1 GB"]
        )
    )
    return int(bool(failures))


def rehearse(args: argparse.Namespace, layers: int) -> list[str]:
    """All steps at one size; returns what is above its bound."""
    work = args.work / f"layers-{layers}"
    source, adapter, hf, merged = (work / name for name in ("source", "adapter", "hf", "merged"))
    shape = Shape.scaled(layers, args.scale)
    shutil.rmtree(work, ignore_errors=True)
    require_space(args.work, 2.2 * sum(2 * math.prod(size) for size in shape.tensors().values()))
    write_source(source, shape, int(args.shard_gb * GB), args.tokenizer)
    write_adapter(adapter, shape, source)
    files = [file.stat().st_size for file in source.glob("*.bin")]
    print(f"\n{layers} layers: {sum(files) / GB:.3g} GB in {len(files)} files")
    print(f"{'step':>18} {'wall':>7} {'cpu':>7} {'peak':>6} {'own':>6}", flush=True)
    rows: dict[str, Run] = {}

    def step(name: str, command: list[str], *reads: Path) -> None:
        rows[name] = run(args, command, work / "log", reads)
        print(line(name, rows[name]), flush=True)
        if rows[name].stopped:
            raise SystemExit(f"error: {name}: stopped, the memory of this machine is used up")

    step("imports alone", [*CHECKS, "imports"])
    step("convert to hf", convert(source, hf, "hf"), source)
    step("verify", [*CHECKS, "same", str(source), str(hf)], source, hf)
    shutil.rmtree(hf)
    step("merge", merge(adapter, merged), source, adapter)
    measured([*CHECKS, "merged", str(source), str(adapter), str(merged)], log=work / "log")
    shutil.rmtree(source)
    for layout in args.formats:
        target = work / layout
        step(f"export to {layout}", convert(merged, target, layout), merged)
        if layout in ("llava", "gguf"):
            measured([*CHECKS, "same", str(merged), str(target)], log=work / "log")
        shutil.rmtree(target)
    if args.peft:
        beside_peft(args, work, merged, adapter)
    shutil.rmtree(work)
    return [
        f"{layers} layers, {name}: peak {row.peak / GB:.2f} GB, allowed {max(files) / GB:.2f} + 1"
        for name, row in rows.items()
        if row.peak > max(files) + GB
    ]


def beside_peft(args: argparse.Namespace, work: Path, base: Path, adapter: Path) -> None:
    """A canonical base and the same LoRA merged by both programs, in turn; prints medians and ratios."""
    native, result = work / "native", work / "result"
    measured([*CHECKS, "native", str(adapter), str(base), str(native)], log=work / "log")
    commands = {
        "geochat": merge(native, result),
        "peft": [*CHECKS, "peft", str(base), str(native), str(result)],
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for turn in range(args.rounds):
        for name in list(commands)[:: 1 if turn % 2 == 0 else -1]:
            row = run(args, commands[name], work / "log", (base, native))
            runs[name].append(row)
            print(line(f"merge, {name}", row), flush=True)
            if row.stopped:
                return  # such a model does not fit into this machine's memory
            measured([*CHECKS, "close", str(base), str(native), str(result)], log=work / "log")
            shutil.rmtree(result)
    for figure in ("wall", "cpu", "peak", "own"):
        ours, theirs = (median(getattr(row, figure) for row in runs[name]) for name in commands)
        print(f"{'PEFT / geochat':>18} {figure}: {theirs / ours:.2f}")


def convert(source: Path, target: Path, layout: str) -> list[str]:
    """Command line of a conversion."""
    return [*CONVERT, "--source", str(source), "--target", str(target), "--format", layout]


def merge(adapter: Path, target: Path) -> list[str]:
    """Command line of a merge."""
    return [*MERGE, "--model-path", str(adapter), "--save-model-path", str(target), "--no-probe"]


def run(args: argparse.Namespace, command: list[str], log: Path, reads: Iterable[Path]) -> Run:
    """One measured command whose input comes from the disk."""
    forget(reads)
    return measured(command, floor=int(args.floor_gb * GB), log=log)


def require_space(folder: Path, needed: float) -> None:
    """Raises SystemExit when the disk has less than `needed` bytes free."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(f"error: {folder}: {free / GB:.1f} GB free, {needed / GB:.1f} GB are needed")


def line(name: str, run: Run) -> str:
    """One row of the table."""
    figures = f"{run.wall:7.1f} {run.cpu:7.1f} {run.peak / GB:6.2f} {run.own / GB:6.2f}"
    return f"{name:>18} {figures}{'  stopped: the memory of this machine is used up' if run.stopped else ''}"


if __name__ == "__main__":
    raise SystemExit(main())
