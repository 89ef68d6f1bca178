"""One DoRA training step against a LoRA step: geochat's, with norms held for the step, and PEFT's.

    python benchmarks/dora.py [--images 2] [--rounds 3]

All sides take the same padded batch through geochat's trainer and differ in the adapter alone; a step is the norms,
forward and backward, nothing recomputed. They take turns in one process, A B C … C B A. Loss and every gradient of both
DoRA sides must agree without dropout within 1e-6, and their outputs in evaluation with it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from train_step import PAD, adapted, build, draw

from geochat.model.dora import use_held_norms
from geochat.model.lora import use_fewer_passes
from geochat.train.arguments import TrainingArguments
from geochat.train.collate import Collator
from geochat.train.norms import StepNorms
from geochat.train.trainer import Trainer


def main(argv: list[str] | None = None) -> None:
    """Parse, build the sides on one base, compare them, time them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    args = parser.parse_args(argv)
    seed = time.time_ns() % 2**32 if args.seed is None else args.seed
    torch.manual_seed(seed)
    base = build(args.hidden, args.layers)
    batch = Collator(PAD)(draw(np.random.default_rng(seed), args.images, 1))
    with tempfile.TemporaryDirectory() as folder:
        rows = {dropout: sides(base, dropout, Path(folder)) for dropout in (0.0, 0.05)}
        compare(rows[0.0]["DoRA here"], rows[0.0]["DoRA of PEFT"], batch)
        same_outputs(rows[0.05]["DoRA here"], rows[0.05]["DoRA of PEFT"], batch)
        print(
            f"{args.images} samples of 1,296 image tokens, {torch.get_num_threads()} threads, seed {seed}; "
            "gradients agree within 1e-6 without dropout, outputs in evaluation with it"
        )
        print(f"{'dropout':>8} {'':>13} {'wall s':>8} {'least':>8} {'cpu s':>8} {'÷ LoRA':>8}")
        for dropout, trainers in rows.items():
            report(dropout, timed(trainers, batch, args.rounds))


def sides(base: Any, dropout: float, folder: Path) -> dict[str, Trainer]:
    """The same A and B on copies of one base."""
    arguments = TrainingArguments(output_dir=str(folder), use_cpu=True, gradient_checkpointing="False")
    models = {"LoRA": adapted(deepcopy(base), lora_dropout=dropout)}
    models["DoRA of PEFT"] = adapted(deepcopy(base), lora_dropout=dropout, use_dora=True)
    models["DoRA here"] = deepcopy(models["DoRA of PEFT"])
    for name in ("LoRA", "DoRA here"):
        use_fewer_passes(models[name])
    use_held_norms(models["DoRA here"])
    return {
        name: Trainer(
            base=model.get_base_model(), saver=None, model=model, args=arguments, data_collator=Collator(PAD)  # type: ignore[arg-type]
        )
        for name, model in models.items()
    }  # fmt: skip


def step(trainer: Trainer, batch: dict[str, Any], *, hold: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    model, norms = trainer.model.train(), StepNorms()
    if hold:
        norms.on_step_begin(model=model)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    if hold:
        norms.on_step_end(model=model)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.item(), found


def compare(here: Trainer, peft: Trainer, batch: dict[str, Any]) -> None:
    """Raises AssertionError when loss or a gradient differs."""
    (loss, gradients), (expected, theirs) = step(here, batch, hold=True), step(peft, batch, hold=False)
    assert abs(loss - expected) < 1e-6, (loss, expected)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-6, rtol=0, msg=name)


@torch.no_grad()
def same_outputs(here: Trainer, peft: Trainer, batch: dict[str, Any]) -> None:
    """Raises AssertionError when the models in evaluation differ."""
    inputs = {name: batch[name][:1] for name in ("input_ids", "pixel_values")}
    ours, theirs = (trainer.model.eval()(**inputs).logits for trainer in (here, peft))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def timed(
    trainers: dict[str, Trainer], batch: dict[str, Any], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of every step, the first of each side left out."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for turn in range(rounds + 1):
        for name in list(trainers)[:: 1 if turn % 2 else -1]:
            start, cpu = time.perf_counter(), time.process_time()
            step(trainers[name], batch, hold=name == "DoRA here")
            if turn:
                times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    return times


def report(dropout: float, times: dict[str, list[tuple[float, float]]]) -> None:
    """One row for each side; the ratio is that of the CPU seconds, which another program disturbs less."""
    lora = median(cpu for _, cpu in times["LoRA"])
    for name, rows in times.items():
        walls, cpus = zip(*rows, strict=True)
        print(
            f"{dropout:8g} {name:>13} {median(walls):8.2f} {min(walls):8.2f} {median(cpus):8.2f} {median(cpus) / lora:7.2f}x"
        )


if __name__ == "__main__":
    main()
