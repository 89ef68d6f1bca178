"""Two real processes under DeepSpeed on CPU (gloo): the same steps as one process, and a folder that loads.

The first run on a machine compiles one operation of DeepSpeed, about two minutes. One case runs always, the others
with GEOCHAT_ALL_TESTS=1.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from geochat.model.checkpoint import load

pytest.importorskip("deepspeed")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
EVERYTHING = bool(os.environ.get("GEOCHAT_ALL_TESTS"))
everything = pytest.mark.skipif(not EVERYTHING, reason="GEOCHAT_ALL_TESTS=1 runs it")
LORA = ["--tune_mm_mlp_adapter", "True", "--lora_dropout", "0"]
FULL = ["--lora_enable", "False"]
QLORA = [*LORA, "--bits", "4", "--vision_lora_r", "2"]
DORA = [*LORA, "--use_dora", "True"]
# Two samples in one part or in two, so that the processes have different numbers of parts.
PARTS = [*LORA, "--max_tokens_per_micro_batch", "100", "--share_image_prefix", "True"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "kind"),
    [
        (3, LORA),
        pytest.param(2, LORA, marks=everything),
        pytest.param(3, FULL, marks=everything),
        pytest.param(2, PARTS, marks=everything),
        pytest.param(3, PARTS, marks=everything),
        pytest.param(2, QLORA, marks=everything),
        pytest.param(3, DORA, marks=everything),
    ],
    ids=["zero3-lora", "zero2-lora", "zero3-full", "zero2-parts", "zero3-parts", "zero2-qlora", "zero3-dora"],
)
def test_two_processes_take_the_steps_of_one(
    stage, kind, flags, start, finish, on_processes, tmp_path: Path
) -> None:
    """AdamW in float32. A resume takes them too, also on another number of processes."""
    run = [*flags, *kind, "--save_steps", "2", "--num_train_epochs", "2", "--global_batch_size", "4"]
    # One sample at a time: one process gets the record without an image while the other has one.
    at_once = 2 if kind is PARTS else 1
    run += ["--per_device_train_batch_size", str(at_once)]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start([*run, "--output_dir", str(one)]))
    config = ["--deepspeed", str(SCRIPTS / f"zero{stage}.json")]
    output = finish(start([*run, *config, "--output_dir", str(two)], on_processes(2)))

    assert f"stage {stage}" in output
    assert f"4 = {at_once} per device × {2 // at_once} accumulation × 2 processes" in output
    name = "model.safetensors" if kind is FULL else "adapter_model.safetensors"
    for folder in (".", "checkpoint-2"):
        close(two / folder / name, one / folder / name)
        load(two / folder)
    if kind is LORA:  # no frozen weights: adapter, projector, their copies in float32 and two moments
        files = [file for file in (two / "checkpoint-2").rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 5 * (two / name).stat().st_size + 200_000

    again = [*run, *config, "--output_dir", str(two), "--resume_from_checkpoint", str(two / "checkpoint-2")]
    for processes in (2,) if kind is PARTS else (2, 1) if EVERYTHING else (1,):
        (two / name).unlink()
        output = finish(start(again, on_processes(processes)))
        close(two / name, one / name)
        assert ("saved by 2 processes and is spread over 1 now" in output) == (processes == 1)
        assert not list((two / "checkpoint-2").glob("*universal*"))


def close(found: Path, expected: Path) -> None:
    wanted, tensors = load_file(expected), load_file(found)
    assert wanted.keys() == tensors.keys()
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-5, rtol=0, msg=f"{found} {key}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=everything)])
def test_the_projector_alone_is_saved_without_frozen_weights_and_resumes(
    stage: int, flags, start, finish, torchrun, tmp_path: Path
) -> None:
    run = [*flags, "--lora_enable", "False", "--tune_mm_mlp_adapter", "True", "--save_steps", "2"]
    run += ["--deepspeed", str(SCRIPTS / f"zero{stage}.json"), "--num_train_epochs", "2"]
    finish(start([*run, "--output_dir", str(tmp_path)], torchrun))
    last = load_file(tmp_path / "mm_projector.safetensors")
    trained = sum(tensor.nbytes for tensor in last.values())
    files = [file for file in (tmp_path / "checkpoint-2").rglob("*") if file.is_file()]
    # Weights, the optimizer's own copy of them and its two moments, beside some kilobytes of settings.
    assert sum(file.stat().st_size for file in files) < 5 * trained + 200_000
    states = next(file for file in files if file.name.endswith("model_states.pt"))
    module = torch.load(states, weights_only=False)["module"]
    assert all("multi_modal_projector" in name for name in module)
    finish(
        start(
            [*run, "--output_dir", str(tmp_path), "--resume_from_checkpoint", str(tmp_path / "checkpoint-2")],
            torchrun,
        )
    )
    for key, tensor in load_file(tmp_path / "mm_projector.safetensors").items():
        torch.testing.assert_close(tensor, last[key], atol=1e-6, rtol=1e-5)
