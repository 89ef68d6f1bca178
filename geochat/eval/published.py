"""Published figures of a benchmark, from the `[published]` table of its TOML file, beside a run's own.

    [published]
    "GeoChat, paper" = { overall = 90.70, presence = 91.09, comp = 90.33 }

Figures are in percent. A key is `overall` or `macro` (of the headline), the name of another figure (rouge1), of a task,
or a value of one of the strata (small).
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geochat.eval.benchmark import BUILT_IN
from geochat.eval.compare import Run
from geochat.eval.score import Scores, cell

Published = dict[str, dict[str, float]]


def published(source: str) -> Published:
    """By name of a model; empty for a benchmark without published figures. `source`: as for `Benchmark.load`."""
    path = Path(source) if source.endswith(".toml") else BUILT_IN / f"{source}.toml"
    if not path.is_file():
        return {}
    table = tomllib.loads(path.read_text(encoding="utf-8")).get("published", {})
    for name, figures in table.items():
        if not isinstance(figures, dict) or not all(isinstance(v, int | float) for v in figures.values()):
            raise ValueError(f"{path}: published.{name} must be a table of figures in percent")
    return table


def beside(runs: Sequence[Run], table: Published) -> list[list[str]]:
    """The runs' own figures above the published ones, in percent; heading first."""
    keys = list(dict.fromkeys(key for figures in table.values() for key in figures))
    rows = [["in %", *keys]]
    rows += [[run.name, *(_own(run.scores, key) for key in keys)] for run in runs]
    rows += [
        [f"{name} (published)", *(f"{figures[key]:.2f}" if key in figures else "–" for key in keys)]
        for name, figures in table.items()
    ]
    return rows


def _own(scores: Scores, key: str) -> str:
    for name, task in scores["tasks"].items():
        figure, overall = task["headline"], task["overall"]
        groups: dict[str, Any] = {
            value: group for column in task["strata"].values() for value, group in column.items()
        }
        found = {"overall": overall, "macro": task["macro"], name: overall, **groups}
        if key in found:
            return cell(figure, found[key].get(figure))
        if key in overall:
            return cell(key, overall[key])
    return "–"
