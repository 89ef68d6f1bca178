"""Which benchmarks can be run from a folder of data, and one page over the runs of several.

    python -m geochat.eval.suite find DATA_ROOT              # names, one per line; what is missing goes to stderr
    python -m geochat.eval.suite index OUTPUT NAME [NAME …]  # summary.md and index.html over OUTPUT/NAME

`scripts/eval_all.sh` calls both, and `geochat.eval.run_all` between them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from geochat.errors import stop
from geochat.eval import page
from geochat.eval.benchmark import Benchmark, known
from geochat.eval.compare import Run
from geochat.eval.files import write_text
from geochat.eval.measures import overview
from geochat.eval.score import markdown

FAILED = "failed.txt"
"""In a benchmark's folder: why its last run by `geochat.eval.run_all` failed."""


def missing(benchmark: Benchmark) -> list[Path]:
    """The files and the image folder that are not there; their common folder where that is not there."""
    if not benchmark.root.is_dir():
        return [benchmark.root]
    questions, images = benchmark.root / benchmark.questions, benchmark.root / benchmark.image_folder
    files = [questions, *(path for paths in benchmark.beside(questions).values() for path in paths)]
    return [path for path in files if not path.is_file()] + ([] if images.is_dir() else [images])


def find(data_root: Path) -> list[str]:
    """Names of the benchmarks that ship whose files are all below the folder; prints what the others want."""
    if not data_root.is_dir():
        raise ValueError(f"{data_root}: no such folder")
    os.environ["GEOCHAT_BENCHMARKS"] = str(data_root)
    found, wanting = [], dict[str, list[str]]()
    for name in known():
        benchmark = Benchmark.load(name)
        if absent := missing(benchmark):
            want = f"{' and '.join(map(str, absent))}; {_remedy(benchmark, absent)}"
            wanting.setdefault(want, []).append(name)
        else:
            found.append(name)
    for want, names in wanting.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"{names[0]}{others}: not run, for want of {want}", file=sys.stderr)
    return found


def _remedy(benchmark: Benchmark, absent: Sequence[Path]) -> str:
    images = benchmark.root / benchmark.image_folder
    if benchmark.format == "mmbench" and list(absent) == [images]:
        return (
            f"python -m geochat.eval.tsv {benchmark.root / benchmark.questions} --output {images} writes it"
        )
    return f"get it from {benchmark.source or 'its authors'}"


def index(output: Path, names: Sequence[str]) -> tuple[str, list[str]]:
    """Write summary.md and index.html. Returns the summary, and the names of those that failed or have no scores."""
    rows = [["benchmark", "task: figure (%)", "n", "value", "95 % interval", "unreadable"]]
    links, failed = [], []
    for name in names:
        note = output / name / FAILED
        if note.is_file() or not (output / name / "scores.json").is_file():
            reason = f": {note.read_text(encoding='utf-8').strip()}" if note.is_file() else ""
            rows.append([name, f"failed{reason}", *["–"] * 4])
            failed.append(name)
            continue
        rows += [[name, *row] for row in overview(Run.load(output / name, name))[1:]]
        if (output / name / "report" / "index.html").is_file():
            links.append((name, f"{name}/report/index.html"))
    text = markdown(rows)
    write_text(output / "summary.md", text)
    parts = [page.html_table(rows), page.heading("Reports"), page.links(links)]
    write_text(output / "index.html", page.page(f"Evaluation: {output.resolve().name}", parts))
    return text, failed


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m geochat.eval.suite", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    finding = commands.add_parser("find", help="name the benchmarks whose files are there")
    finding.add_argument("data_root", type=Path)
    indexing = commands.add_parser("index", help="one table and one page over several runs")
    indexing.add_argument("output", type=Path, help="folder that holds the runs' folders")
    indexing.add_argument("names", nargs="+", help="the runs' folders")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "find":
            print("\n".join(find(arguments.data_root)))
            return
        text, failed = index(arguments.output, arguments.names)
    except (ValueError, OSError) as error:
        stop(error)
    print(text)
    if failed:
        stop(ValueError(f"failed: {', '.join(failed)}; the lines above say why"))


if __name__ == "__main__":
    main()
