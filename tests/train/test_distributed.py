"""Two processes on the CPU (gloo) with DDP, FSDP and ZeRO: the steps of one, whatever they see, and a resume on another
number of processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from geochat.model.checkpoint import load
from geochat.train import sharded
from geochat.train.sampler import EpochSampler
from geochat.train.sharded import require_same_layout

EVERYTHING = bool(os.environ.get("GEOCHAT_ALL_TESTS"))
everything = pytest.mark.skipif(not EVERYTHING, reason="GEOCHAT_ALL_TESTS=1 runs it")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
WEIGHTS = "adapter_model.safetensors"
TOWER = ["--vision_lora_r", "2", "--tune_mm_mlp_adapter", "True", "--lora_dropout", "0"]


def close(found: Path, expected: Path) -> None:
    wanted = load_file(expected)
    for key, tensor in load_file(found).items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-5, rtol=0, msg=key)


@pytest.mark.slow
def test_two_processes_and_a_resume_on_one_take_the_same_steps(
    flags, start, finish, torchrun, tmp_path: Path
) -> None:
    run = [*flags, *TOWER, "--save_steps", "2", "--num_train_epochs", "2", "--global_batch_size", "4"]
    run += [
        "--per_device_train_batch_size",
        "1",
    ]  # one process has the record without an image, the other has not
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start([*run, "--output_dir", str(one)]))
    output = finish(start([*run, "--output_dir", str(two)], torchrun))
    assert "4 = 1 per device × 2 accumulation × 2 processes" in output
    close(two / WEIGHTS, one / WEIGHTS)
    (two / WEIGHTS).unlink()
    finish(start([*run, "--output_dir", str(two), "--resume_from_checkpoint", str(two / "checkpoint-2")]))
    close(two / WEIGHTS, one / WEIGHTS)


@pytest.mark.slow
def test_what_both_processes_cannot_use_is_said_once(flags, start, finish, torchrun, tmp_path: Path) -> None:
    output = finish(start([*flags, "--bits", "5", "--output_dir", str(tmp_path)], torchrun), expected=1)
    assert output.count("error: --bits 5: choose 4, 8 or 16") == 1


@pytest.mark.slow
def test_fsdp_computes_in_parts(flags, start, finish, torchrun, tmp_path: Path) -> None:
    """The processes have different numbers of parts; DoRA finds its norms while a block is whole."""
    run = [*flags, "--max_tokens_per_micro_batch", "100", "--share_image_prefix", "True"]
    run += [
        "--use_dora",
        "True",
        "--lora_dropout",
        "0",
        "--num_train_epochs",
        "2",
        "--global_batch_size",
        "4",
    ]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start([*run, "--output_dir", str(one)]))
    finish(start([*run, "--fsdp", "True", "--output_dir", str(two)], torchrun))
    close(two / WEIGHTS, one / WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=everything)])
def test_fsdp_takes_the_steps_of_one_process_and_resumes(
    kind: str, flags, start, finish, on_processes, tmp_path: Path
) -> None:
    run = [*flags, *(TOWER if kind == "lora" else ["--lora_enable", "False"]), "--save_steps", "2"]
    run += ["--num_train_epochs", "2", "--global_batch_size", "4", "--per_device_train_batch_size", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    name = WEIGHTS if kind == "lora" else "model.safetensors"
    finish(start([*run, "--output_dir", str(one)]))
    spread = [*run, "--fsdp", "True", "--output_dir", str(two)]
    assert "FSDP  version 2" in finish(start(spread, on_processes(2)))
    close(two / name, one / name)
    load(two / "checkpoint-2")
    if kind == "lora":  # no frozen weights: adapter, projector, their two moments
        files = [file for file in (two / "checkpoint-2").rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 4 * (two / name).stat().st_size + 200_000
    for processes in (1, 2) if EVERYTHING else (1,):
        (two / name).unlink()
        again = [*spread, "--resume_from_checkpoint", str(two / "checkpoint-2")]
        finish(start(again, on_processes(processes)))
        close(two / name, one / name)


WAYS = {"ddp": [], "fsdp": ["--fsdp", "True"]}
WAYS |= {name: ["--deepspeed", str(SCRIPTS / f"{name}.json")] for name in ("zero2", "zero3")}
TEXT, IMAGE = 7, 0
SEEN = [(TEXT, IMAGE), (IMAGE, TEXT), (TEXT, TEXT), (IMAGE, IMAGE)]
"""Rows of the tiny records that the first and the second process see, step by step."""


@pytest.mark.slow
@everything
@pytest.mark.parametrize("kind", ["adapters", "full"])
@pytest.mark.parametrize("way", WAYS)
def test_texts_and_images_meet_on_no_process_alone(
    way: str, kind: str, flags, tiny_records, start, finish, torchrun, tmp_path: Path
) -> None:
    """One process sees a text while the other sees an image, both a text, both an image: the steps of one process."""
    if way.startswith("zero"):
        pytest.importorskip("deepspeed")
    order = list(EpochSampler(8, seed=42, batch=2))
    rows: list = [None] * 8
    for place, row in zip(order, (row for step in SEEN for row in step), strict=True):
        rows[place] = tiny_records.records[row]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    flags[flags.index("--data_path") + 1] = str(tmp_path / "rows.json")
    full = ["--lora_enable", "False", "--tune_vision_tower", "True"]
    run = [*flags, *(TOWER if kind == "adapters" else full), "--num_train_epochs", "1", "--seed", "42"]
    run += ["--global_batch_size", "2", "--per_device_train_batch_size", "1", "--save_strategy", "no"]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start([*run, "--output_dir", str(one)]))
    finish(start([*run, *WAYS[way], "--output_dir", str(two)], torchrun))
    name = WEIGHTS if kind == "adapters" else "model.safetensors"
    close(two / name, one / name)


def test_another_layout_of_the_optimizer_is_refused(tmp_path: Path, monkeypatch) -> None:
    def refused(**args: object) -> str:
        with pytest.raises(ValueError) as caught:
            require_same_layout(
                tmp_path, SimpleNamespace(**{"deepspeed": None, "fsdp": None, "world_size": 2} | args)
            )
        return str(caught.value)

    require_same_layout(
        tmp_path, SimpleNamespace(deepspeed=None, fsdp=None, world_size=2)
    )  # saved weights alone
    (tmp_path / "optimizer.pt").touch()
    require_same_layout(tmp_path, SimpleNamespace(deepspeed=None, fsdp=None, world_size=7))
    assert "without --fsdp: resume without it" in refused(fsdp=True)
    (tmp_path / "optimizer.pt").rename(tmp_path / "optimizer.bin")
    assert "with --fsdp: resume with it" in refused()
    (tmp_path / "optimizer.bin").unlink()
    (tmp_path / "global_step4").mkdir()
    for rank in range(3):
        (tmp_path / "global_step4" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    assert "with --deepspeed: resume with it" in refused()
    for weights, saved, asked in (("mp_rank", "2 or below", 3), ("zero_pp_rank_0_mp_rank", "3", 2)):
        (tmp_path / "global_step4" / f"{weights}_00_model_states.pt").touch()
        monkeypatch.setattr(sharded, "zero_stage", lambda args, asked=asked: asked)
        assert f"saved under ZeRO stage {saved}: resume with that stage" in refused(deepspeed="zero.json")
