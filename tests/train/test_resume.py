"""kill -9 at any moment, resume: the final adapter is the uninterrupted run's, bit for bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from geochat.model.checkpoint import load
from geochat.train.saving import checkpoints

# Ends the process in the middle of its second save, after the weights and before the trainer state.
KILLED_WHILE_SAVING = """
import os, signal, sys
from geochat.train import train, trainer

def die(self, folder):
    if self.state.global_step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    super(trainer.Trainer, self)._save_rng_state(folder)

trainer.Trainer._save_rng_state = die
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_uninterrupted(flags, start, finish, tmp_path: Path) -> None:
    run = [*flags, "--save_steps", "3", "--save_total_limit", "9", "--gradient_accumulation_steps", "1"]
    run += ["--tune_mm_mlp_adapter", "True", "--lora_dropout", "0.1", "--group_by_modality_length", "True"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start([*run, "--output_dir", str(whole)]))

    saving = start([*run, "--output_dir", str(broken)], ("-c", KILLED_WHILE_SAVING))
    finish(saving, expected=-signal.SIGKILL)
    assert [path.name for path in checkpoints(broken)] == [
        "checkpoint-3"
    ]  # intact; the half save has no name
    load(broken / "checkpoint-3")

    again = [*run, "--output_dir", str(broken), "--resume_from_checkpoint", "True"]
    resumed = start(again)
    deadline = time.monotonic() + 120
    while not (broken / "checkpoint-9").exists() and resumed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(resumed.pid, signal.SIGKILL)
    resumed.communicate()
    assert not (broken / "adapter_model.safetensors").exists()

    output = finish(start(again))
    assert "checkpoint-" in output.split("resumed from")[1]
    for name in ("adapter_model.safetensors", "checkpoint-12/adapter_model.safetensors", "config.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    steps = [line.split(",")[0] for line in (broken / "loss.jsonl").read_text().splitlines()]
    assert steps == [f'{{"step": {i}' for i in range(1, 13)]
