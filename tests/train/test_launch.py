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
        ["bash", str(SCRIPTS / "finetune_lora.sh"), "--max_steps", "1", "--dataloader_num_workers", "0"],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "8 = 4 per device × 2 accumulation × 1 processes" in result.stdout
    assert "rank 64, alpha 16, dropout 0.05" in result.stdout
    assert (tmp_path / "adapter_model.safetensors").exists()
