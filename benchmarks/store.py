"""Opening a large instruction file, against json.load: time, memory, and memory in forked workers.

    python benchmarks/store.py [--rows 1400000] [--folder DIR]

Writes a file of conversation records to a temporary folder (1.4 million rows, about 1 GB), then measures each side in
fresh processes, interleaved (A B B A). Cold means that the index is built; the file itself is in the page cache for
both sides. That both give the same records is checked in the same run on 5000 random rows.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from geochat.data.store import InstructionStore, index_paths

READS = 5000
WORKERS = 4
WORDS = [
    "dense",
    "trees",
    "along",
    "a",
    'narrow \\"road\\"',
    "near",
    "houses",
    "{<12><33><44><55>|<90>}",
    "<p>2 ships</p>",
]


def write_file(path: Path, rows: int, seed: int) -> None:
    """Records of several lengths; escapes, braces and brackets stand in the texts."""
    rng = random.Random(seed)
    answers = [" ".join(rng.choices(WORDS, k=rng.choice([1, 5, 60, 100, 150]))) for _ in range(2000)]
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for row in range(rows):
            comma = ",\n  " if row else "\n  "
            file.write(
                f'{comma}{{"id": "{row}", "image": "part{row % 7}/{row}.jpg", "conversations": [{{"from": "human", '
                f'"value": "<image>\\nDescribe the image in detail [{row}]."}}, '
                f'{{"from": "gpt", "value": "{rng.choice(answers)}"}}]}}'
            )
        file.write("\n]\n")


def memory() -> dict[str, int]:
    """Of this process in KiB: resident, proportional share, and private (unshared) memory."""
    fields = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":")
        fields[name] = int(value.split()[0])
    private = fields["Private_Clean"] + fields["Private_Dirty"]
    return {"rss": fields["Rss"], "pss": fields["Pss"], "private": private}


def measure(side: str, path: Path, seed: int) -> dict[str, float]:
    """In a fresh process: open, read random rows, fork workers that read random rows."""
    before = memory()
    wall, cpu = time.perf_counter(), time.process_time()
    if side == "json.load":
        with path.open(encoding="utf-8") as file:
            rows = json.load(file)
    else:
        rows = InstructionStore(path)
    result: dict[str, float] = {"open_s": time.perf_counter() - wall, "open_cpu_s": time.process_time() - cpu}
    rng = random.Random(seed)
    wall = time.perf_counter()
    chosen = [rows[rng.randrange(len(rows))] for _ in range(READS)]
    result["read_us"] = 1e6 * (time.perf_counter() - wall) / READS
    result["rows"], result["digest"] = len(rows), hash(json.dumps(chosen))
    after = memory()
    result["added_mb"] = (after["rss"] - before["rss"]) / 1024
    result |= _in_workers(rows, seed)
    return result


def _in_workers(rows, seed: int) -> dict[str, float]:
    """Largest memory that one of several forked workers adds while it reads rows of its own."""
    pipes = []
    for worker in range(WORKERS):
        read, write = os.pipe()
        if os.fork() == 0:
            before = memory()
            rng = random.Random(seed + 1 + worker)
            for _ in range(READS):
                rows[rng.randrange(len(rows))]
            after = memory()
            added = {name: (after[name] - before[name]) / 1024 for name in before}
            os.write(write, json.dumps(added).encode())
            os._exit(0)
        os.close(write)
        pipes.append(read)
    reports = [json.loads(os.read(pipe, 4096)) for pipe in pipes]
    for _ in pipes:
        os.wait()
    return {f"worker_{name}_mb": max(report[name] for report in reports) for name in ("rss", "private")}


def main(argv: list[str] | None = None) -> int:
    """Print the table; 1 when the two sides give different records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_400_000)
    parser.add_argument(
        "--folder", type=Path, help="where the file is written; a temporary folder by default"
    )
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--measure", choices=["json.load", "cold", "warm"], help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder, options.seed)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "instructions.json"
        write_file(path, options.rows, options.seed)
        print(f"{options.rows} rows, {path.stat().st_size / 2**20:.0f} MiB, seed {options.seed}")
        results: dict[str, list[dict[str, float]]] = {"json.load": [], "cold": [], "warm": []}
        for side in ("json.load", "cold", "warm", "warm", "cold", "json.load"):
            if side == "cold":
                for index in index_paths(path):
                    index.unlink(missing_ok=True)
            command = [
                sys.executable,
                __file__,
                "--measure",
                side,
                "--folder",
                str(path),
                "--seed",
                str(options.seed),
            ]
            # A fixed hash seed makes the digests of the processes comparable.
            done = subprocess.run(
                command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "0"}
            )
            results[side].append(json.loads(done.stdout))
    digests = {result["digest"] for runs in results.values() for result in runs}
    if len(digests) != 1:
        print("the two sides give different records")
        return 1
    print(f"the same {READS} random records from every side\n")
    _print_table(results)
    return 0


def _print_table(results: dict[str, list[dict[str, float]]]) -> None:
    columns = {
        "open_s": "open, wall s",
        "open_cpu_s": "open, CPU s",
        "read_us": "read, µs/row",
        "added_mb": "added MB",
        "worker_rss_mb": "worker +RSS MB",
        "worker_private_mb": "worker +private MB",
    }
    print(f"{'':10}" + "".join(f"{title:>20}" for title in columns.values()) + "   (best of two)")
    best = {
        side: {name: min(run[name] for run in runs) for name in columns} for side, runs in results.items()
    }
    for side, values in best.items():
        print(f"{side:10}" + "".join(f"{values[name]:>20.3f}" for name in columns))
    for side in ("cold", "warm"):
        ratio = statistics.median(run["open_s"] for run in results["json.load"]) / statistics.median(
            run["open_s"] for run in results[side]
        )
        print(f"opening, {side}: {ratio:.1f} times as fast as json.load (medians of wall time)")


if __name__ == "__main__":
    raise SystemExit(main())
