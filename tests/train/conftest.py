"""A tiny canonical base and the command that trains it, for tests that run the real program."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from geochat.model.build import build_model
from geochat.model.checkpoint import save_model


@pytest.fixture(scope="session")
def tiny_base(tiny_llm: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Canonical folder: the tiny tower at 84 px and the tiny LLM."""
    folder = tmp_path_factory.mktemp("tiny-base")
    save_model(*build_model(tiny_llm, tiny_clip, None, image_size=84, dtype=torch.float32), folder)
    return folder


@pytest.fixture
def flags(tiny_base: Path, tiny_records) -> list[str]:
    """Training flags for a run of seconds; tests add --output_dir and what they are about."""
    values = {
        "model_name_or_path": tiny_base,
        "data_path": tiny_records.file,
        "image_folder": tiny_records.image_folder,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 3,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lora_r": 4,
        "dataloader_num_workers": 0,
        "disable_tqdm": True,
    }
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


@pytest.fixture
def start():
    """Starts the real program in a process of its own, with one thread, so that sums are added in one order."""

    def start(
        arguments: list[str], program: tuple[str, ...] = ("-m", "geochat.train.train")
    ) -> subprocess.Popen:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            [sys.executable, *program, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.fixture
def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def on_processes(free_port: int):
    """The words that start the training, or another program, in so many processes."""

    def words(number: int, program: tuple[str, ...] = ("-m", "geochat.train.train")) -> tuple[str, ...]:
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", str(number))
        return (*launcher, "--master_port", str(free_port), *program)

    return words


@pytest.fixture
def torchrun(on_processes) -> tuple[str, ...]:
    """The program that trains in two processes."""
    return on_processes(2)


@pytest.fixture
def finish():
    """Waits for a started program and returns what it printed."""

    def finish(process: subprocess.Popen, expected: int = 0) -> str:
        try:
            output, _ = process.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun ends its workers on this signal
            output, _ = process.communicate()
            pytest.fail(f"not finished after 400 s: {output}")
        assert process.returncode == expected, output
        return output

    return finish
