"""Loss curve of a run: one JSON line per log, and a picture."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from geochat.data.rows import Row, open_rows, read_rows, row_line, write_rows
from geochat.data.staged import staged

LOSSES, VALIDATION = "loss.jsonl", "validation.jsonl"
REDRAW_SECONDS = 60
SMOOTHED_SHARE = 0.05
"""Share of the curve that the smoothed line averages over."""


class LossCurve(TrainerCallback):
    """Writes `loss.jsonl` and `loss.png` into the run folder; a resumed run continues both."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drawn = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # What was logged after the checkpoint that is resumed from will be logged again.
            for file in (self.folder / LOSSES, self.folder / VALIDATION):
                rows = [row for row in read_log(file) if row["step"] <= state.global_step]
                if file.exists():
                    write_rows(file, rows if state.global_step else [])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # the steps since the last regular log belong to the curve too

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs.keys() & {"loss", "eval_loss"}:
            return
        append_row(self.folder / LOSSES, {"step": state.global_step, **logs})
        if time.monotonic() - self.drawn > REDRAW_SECONDS:
            self.draw()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.draw()

    def draw(self) -> None:
        rows = read_log(self.folder / LOSSES)
        if any("loss" in row for row in rows):
            draw_curve(rows, read_log(self.folder / VALIDATION), self.folder / "loss.png")
        self.drawn = time.monotonic()


def read_log(file: Path) -> list[Row]:
    """Rows of a log; the last line of a killed run may be cut and is left out."""
    return read_rows(file, torn_end=True) if file.exists() else []


def append_row(file: Path, row: Row) -> None:
    with open_rows(file, "a") as stream:
        stream.write(row_line(row))


def smoothed(values: list[float]) -> list[float]:
    """Exponential mean, corrected for its start (as Adam's moments are)."""
    factor = max(0.0, 1 - 1 / (SMOOTHED_SHARE * len(values)))
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = factor * mean + (1 - factor) * value
        weight = factor * weight + 1 - factor
        result.append(mean / weight)
    return result


def draw_curve(rows: list[Row], validation: list[Row], file: Path) -> None:
    """Training loss (raw and smoothed), validation loss and benchmark scores when there are any, learning rate."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    train = [row for row in rows if "loss" in row]
    valid = [row for row in rows if "eval_loss" in row]
    steps, losses = [row["step"] for row in train], [row["loss"] for row in train]
    names = dict.fromkeys(name for row in validation for name in row["scores"])
    figure = Figure(figsize=(8, 8 if names else 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, *middle, bottom = figure.subplots(
        3 if names else 2, 1, sharex=True, height_ratios=[4, 2, 1] if names else [4, 1]
    )
    for axes in middle:
        for name in names:
            points = [(row["step"], row["scores"][name]) for row in validation if name in row["scores"]]
            axes.plot(*zip(*points, strict=True), "o-", label=name)
        axes.set_ylabel("score")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    top.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss")
    top.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label="smoothed")
    if valid:
        top.plot([row["step"] for row in valid], [row["eval_loss"] for row in valid], "o-", color="tab:orange",
                 label="validation loss")  # fmt: skip
    top.set_ylabel("loss per supervised token")
    top.grid(alpha=0.3)
    top.legend()
    bottom.plot(steps, [row.get("learning_rate") for row in train], color="tab:green")
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("step")
    bottom.grid(alpha=0.3)
    with staged(file) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")
