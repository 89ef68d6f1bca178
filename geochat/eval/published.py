"""Published figures of a benchmark, from the `[published]` table of its TOML file, beside a run's own.

    [published]
    "GeoChat, paper" = { overall = 90.70, presence = 91.09, comp = 90.33 }

Shares are in percent. A key is `overall` or `macro` (of the headline), the name of another figure (`rouge1`; `macro f1`
for its macro average), of a task, or a value of one of the strata (`small`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from geochat.eval.compare import Run
from geochat.eval.score import Scores, cell


def beside(runs: Sequence[Run], table: Mapping[str, Any]) -> list[list[str]]:
    """The runs' own figures above the published ones, in percent; heading first. ValueError names a table unfit."""
    for name, figures in table.items():
        if not isinstance(figures, dict) or not all(isinstance(v, int | float) for v in figures.values()):
            raise ValueError(f"published.{name} must be a table of figures in percent")
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
        groups = {value: group for column in task["strata"].values() for value, group in column.items()}
        groups |= {"overall": overall, "macro": task["macro"], name: overall}
        if key in groups:
            return cell(figure, groups[key].get(figure))
        other, summary = key, overall
        if key.startswith("macro "):
            other, summary = key.removeprefix("macro "), task["macro"]
        if other in summary:
            return cell(other, summary[other])
    return "–"
