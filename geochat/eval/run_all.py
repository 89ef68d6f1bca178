"""Ask one model, loaded once, the questions of several benchmarks; score each and write its page.

    python -m geochat.eval.run_all --model-path M --output DIR --benchmarks NAME [NAME …]
    torchrun --nproc-per-node 8 -m geochat.eval.run_all …

Each has its folder DIR/NAME, as of `geochat.eval.run`, with its page in DIR/NAME/report. One that fails does not stop the
others, nor other processes, and leaves the exit code alone: the reason stands in DIR/NAME/failed.txt until it has
succeeded, and `geochat.eval.suite index` collects the reasons.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from geochat.errors import stop
from geochat.eval.benchmark import Benchmark
from geochat.eval.compare import Run
from geochat.eval.files import write_text
from geochat.eval.report import tables, write_report
from geochat.eval.run import FAILURES, Model, add_arguments, run, tell
from geochat.eval.suite import FAILED


def run_one(benchmark: Benchmark, source: str, arguments: argparse.Namespace, model: Model) -> None:
    """Ask, score, and write the page where this process is the one that completes the answers."""
    folder = arguments.output / benchmark.name
    one = {"benchmark": source, "output": folder, "questions": None, "image_folder": None}
    scores = run(argparse.Namespace(**vars(arguments) | one), model)
    tell(scores, folder)
    if scores is None:
        return
    runs = [Run.load(folder, model.identity if arguments.endpoint else arguments.model_path.resolve().name)]
    write_report(
        runs,
        folder / "report",
        benchmark=benchmark,
        image_folder=Path(scores["image_folder"]),
        figures=tables(runs, benchmark),
        title=f"{benchmark.name}: {runs[0].name}",
    )
    (folder / FAILED).unlink(missing_ok=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m geochat.eval.run_all", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--benchmarks", nargs="+", required=True, metavar="NAME", help="names of benchmarks, or .toml files"
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        benchmarks = [(Benchmark.load(source), source) for source in arguments.benchmarks]
        model = Model.load(arguments)
    except FAILURES as error:
        stop(error)
    for benchmark, source in benchmarks:
        print(f"== {benchmark.name}", flush=True)
        try:
            run_one(benchmark, source, arguments, model)
        except Exception as error:
            if not isinstance(error, FAILURES):
                traceback.print_exc()  # a fault of this package
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"error: {benchmark.name}: {reason}", file=sys.stderr, flush=True)
            write_text(arguments.output / benchmark.name / FAILED, reason + "\n")


if __name__ == "__main__":
    main()
