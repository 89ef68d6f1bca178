"""A plan: what a run would do, need and cost, and whether it fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from geochat.train.flops import ModelShape, Trained, work
from geochat.train.gpus import GIB, GPUS, Footprint, Gpu, Sizing, hours
from geochat.train.memory import Setting
from geochat.train.workload import Batches, Layout, Tokens


@dataclass(frozen=True)
class Plan:
    """Everything that is printed; `as_json` has the same content."""

    recipe: str
    notes: list[str]
    parameters: dict[str, int]
    """By group that trains; "total"."""
    rows: int
    rows_read: int
    """Encoded exactly; everything about the whole file is scaled up from them when they are fewer."""
    bad_rows: int
    tokens: Tokens
    token_shares: dict[str, float]
    """Of each instruction file, in an epoch; one that no row was read of has none."""
    layout: Layout
    asked: str
    """The order that the flags ask for: a key of `batches`."""
    batches: dict[str, Batches]
    """ "shuffled", and "grouped" by length and modality."""
    steps: int
    micro_batches: int
    """Of the whole run, over all GPUs."""
    ending: str
    shape: ModelShape
    trained: Trained
    setting: Setting
    sizing: Sizing
    checked: Gpu | None
    """The GPU that must hold the run; None: any one of those known."""

    @property
    def processes(self) -> int:
        return self.setting.gpus

    def mean_work(self, order: str, checkpointing: bool) -> tuple[float, float]:
        """Useful and executed operations of one micro-batch, on average over those laid out."""
        laid = self.batches[order]
        each = [work(self.shape, self.trained, load, checkpointing=checkpointing) for load in laid.loads]
        return sum(w.useful for w in each) / laid.laid_out, sum(w.executed for w in each) / laid.laid_out

    def run_operations(self, checkpointing: bool) -> float:
        """Executed in the whole run, over all GPUs."""
        return self.micro_batches * self.mean_work(self.asked, checkpointing)[1]

    @property
    def footprint(self) -> Footprint:
        return self.sizing.footprint(self.setting, self.layout.micro_batch)

    def refusal(self) -> str | None:
        """Why the run cannot be, and the nearest setting that can; None when it fits."""
        gpus = [self.checked] if self.checked else list(GPUS)
        if any(self.footprint.fits(gpu) for gpu in gpus):
            return None
        gpu, need = gpus[-1], self.footprint
        flags = self.sizing.nearest(self.setting, self.layout.micro_batch, gpu)
        advice = (
            f"the nearest setting that fits: {' '.join(flags)}"
            if flags
            else "no setting of this model fits; take more or larger GPUs"
        )
        return (
            f"does not fit {gpu.name}: {need.total / GIB:.1f} of {gpu.memory / GIB:.1f} GiB for each of "
            f"{self.processes} GPUs ({need.states.total / GIB:.1f} weights, gradients and optimizer, "
            f"{need.activations.peak / GIB:.1f} activations at micro-batch {self.layout.micro_batch}); {advice}"
        )

    def as_json(self) -> dict[str, Any]:
        value = asdict(self)
        for order, batches in self.batches.items():
            useful, executed = self.mean_work(order, self.setting.checkpointing)
            facts = asdict(batches) | {"padding": batches.padding, "positions": batches.positions}
            del facts["loads"]
            value["batches"][order] = facts | {"useful_flop": useful, "executed_flop": executed}
        value["run_flop"] = self.run_operations(self.setting.checkpointing)
        value["footprint"] = asdict(self.footprint) | {"total": self.footprint.total}
        value["gpus"] = [
            {
                "name": gpu.name,
                "fits": self.footprint.fits(gpu),
                "hours": hours(value["run_flop"], self.processes, gpu),
                "largest_micro_batch": {
                    again: self.sizing.largest(self.setting.changed(checkpointing=again == "recomputed"), gpu)
                    for again in ("recomputed", "kept")
                },
            }
            for gpu in GPUS
        ]
        value["refusal"] = self.refusal()
        return value
