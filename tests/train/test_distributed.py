"""Two processes with DDP on the CPU (gloo): the steps of one, resume on another number, a process that is killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from geochat.model.checkpoint import load
from geochat.train.sharded import require_same_layout

everything = pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")
WEIGHTS = "adapter_model.safetensors"
TOWER = ["--vision_lora_r", "2", "--tune_mm_mlp_adapter", "True", "--lora_dropout", "0"]


def close(found: Path, expected: Path) -> None:
    wanted = load_file(expected)
    for key, tensor in load_file(found).items():
        torch.testing.assert_close(tensor, wanted[key], atol=1e-5, rtol=1e-4, msg=key)


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
def test_fsdp_computes_in_parts(flags, start, finish, torchrun, tmp_path: Path) -> None:
    """The processes have different numbers of parts; DoRA finds its norms while a block is whole."""
    run = [
        *flags,
        "--max_tokens_per_micro_batch",
        "100",
        "--share_image_prefix",
        "True",
        "--use_dora",
        "True",
    ]
    run += ["--lora_dropout", "0", "--num_train_epochs", "2", "--global_batch_size", "4"]
    one, two = tmp_path / "one", tmp_path / "two"
    finish(start([*run, "--output_dir", str(one)]))
    finish(start([*run, "--fsdp", "True", "--output_dir", str(two)], torchrun))
    close(two / WEIGHTS, one / WEIGHTS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=everything)])
def test_fsdp_takes_the_steps_of_one_process_and_resumes(
    kind: str, flags, start, finish, torchrun, tmp_path: Path
) -> None:
    run = [*flags, *(TOWER if kind == "lora" else ["--lora_enable", "False"]), "--save_steps", "2"]
    run += ["--num_train_epochs", "2", "--global_batch_size", "4", "--per_device_train_batch_size", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    name = WEIGHTS if kind == "lora" else "model.safetensors"
    finish(start([*run, "--output_dir", str(one)]))
    spread = [*run, "--fsdp", "True", "--output_dir", str(two)]
    assert "FSDP  version 2" in finish(start(spread, torchrun))
    close(two / name, one / name)
    load(two / "checkpoint-2")
    if kind == "lora":  # no frozen weights: adapter, projector, their two moments
        files = [file for file in (two / "checkpoint-2").rglob("*") if file.is_file()]
        assert sum(file.stat().st_size for file in files) < 4 * (two / name).stat().st_size + 200_000
    (two / name).unlink()
    finish(start([*spread, "--resume_from_checkpoint", str(two / "checkpoint-2")], torchrun))
    close(two / name, one / name)


def test_another_layout_of_the_optimizer_is_refused(tmp_path: Path) -> None:
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
    assert "saved by 3 processes under ZeRO, now there are 2: resume with 3" in refused(
        deepspeed="zero2.json"
    )
    require_same_layout(tmp_path, SimpleNamespace(deepspeed="zero2.json", fsdp=None, world_size=3))


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found through /proc")
def test_when_one_process_is_killed_the_others_end_within_a_minute(
    flags, start, torchrun, tmp_path: Path
) -> None:
    run = [*flags, "--num_train_epochs", "5000", "--save_steps", "2", "--output_dir", str(tmp_path)]
    launcher = start(run, torchrun)
    deadline = time.monotonic() + 240
    while not (tmp_path / "checkpoint-2").exists():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = children(launcher.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    killed = time.monotonic()
    output, _ = launcher.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert launcher.returncode != 0
    assert "SIGKILL" in output
    assert not Path(f"/proc/{workers[0]}").exists()
    assert list(tmp_path.glob("checkpoint-*"))
