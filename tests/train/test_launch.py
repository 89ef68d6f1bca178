"""The recipe script, run for real for one step."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.mark.slow
def test_the_lora_recipe_trains(tiny_base: Path, tiny_records, tmp_path: Path) -> None:
    variables = {
        "MODEL": tiny_base,
        "DATA": tiny_records.file,
        "IMAGES": tiny_records.image_folder,
        "OUTPUT": tmp_path,
        "GPUS": "1",
        "GLOBAL_BATCH": "8",
        "MICRO_BATCH": "4",
        "LAUNCHER": "python",
        "ZERO": "none",
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        ["bash", str(SCRIPTS / "finetune_lora.sh"), "--max_steps", "1", "--image_size", "84"],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "8 = 4 per device × 2 accumulation × 1 processes" in result.stdout
    assert "rank 64, alpha 16, dropout 0.05" in result.stdout
    assert (tmp_path / "adapter_model.safetensors").exists()


def launched(tmp_path: Path, tiny_records, nvidia: str | None, *flags: str, **variables: str) -> str:
    """What finetune_lora.sh would start, with stand-ins for the launchers, for Python and for nvidia-smi."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    programs = {"torchrun": 'echo torchrun "$@"', "deepspeed": 'echo "deepspeed[$CUDA_VISIBLE_DEVICES]" "$@"'}
    programs |= {"nvidia-smi": nvidia or "exit 127", "python": 'echo python "$@"'}
    for name, body in programs.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    given = {
        "MODEL": tmp_path,
        "DATA": tiny_records.file,
        "IMAGES": tmp_path,
        "OUTPUT": tmp_path,
        "GEOCHAT_VENV": "none",
    }
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    environment |= {name: str(value) for name, value in {**given, **variables}.items()}
    environment["PATH"] = f"{tools}:{environment['PATH']}"
    result = subprocess.run(
        ["bash", str(SCRIPTS / "finetune_lora.sh"), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result.stdout + result.stderr


EIGHT = "for i in 0 1 2 3 4 5 6 7; do echo \"GPU $i: NVIDIA (UUID: $i)\"; echo '  MIG 1g.5gb'; done"


def test_processes_follow_the_gpus(tmp_path: Path, tiny_records) -> None:
    assert "--nproc_per_node 8 " in launched(tmp_path, tiny_records, EIGHT)
    assert "--nproc_per_node 2 " in launched(tmp_path, tiny_records, EIGHT, CUDA_VISIBLE_DEVICES="2,3")
    for broken in (None, "echo 'driver/library version mismatch'; exit 9"):
        assert "--nproc_per_node 1 " in launched(tmp_path, tiny_records, broken)
    said = launched(tmp_path, tiny_records, EIGHT, CUDA_VISIBLE_DEVICES="2,3", LAUNCHER="deepspeed")
    assert "deepspeed[] --include localhost:2,3 " in said


def test_several_machines_need_their_address(tmp_path: Path, tiny_records) -> None:
    assert "MASTER_ADDR is not set" in launched(tmp_path, tiny_records, EIGHT, NODES="2")
    assert "NODE_RANK is not set" in launched(
        tmp_path, tiny_records, EIGHT, NODES="2", MASTER_ADDR="10.0.0.1"
    )
    said = launched(tmp_path, tiny_records, EIGHT, NODES="2", MASTER_ADDR="10.0.0.1", NODE_RANK="1")
    assert "--nnodes 2 --node_rank 1 --master_addr 10.0.0.1" in said


def test_a_plan_is_made_by_one_process_for_all_gpus(tmp_path: Path, tiny_records) -> None:
    said = launched(tmp_path, tiny_records, None, "--dry_run", "True", GPUS="8", NODES="2")
    assert said.startswith("python -m geochat.train.train ")
    assert "--per_device_train_batch_size 9 " in said
    assert "--plan_gpus 16 " in said
    assert "torchrun" in launched(tmp_path, tiny_records, None, "--dry_run", "False", GPUS="8")
