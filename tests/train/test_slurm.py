"""The batch file with stand-ins for srun and scontrol: what it starts, what it does when the time is up, and two
machines (both this one) that train, go back into the queue and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BATCH = ROOT / "scripts" / "slurm" / "train.sbatch"
TOOLS = {
    "scontrol": 'if [ "$1" = show ]; then printf "alpha\\nbeta\\n"; else echo "scontrol $*"; fi',
    "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" || exit; done',
    "torchrun": 'echo "torchrun $*"',
    "nvidia-smi": 'echo "GPU 0: one"; echo "GPU 1: two"',
}


@pytest.fixture
def batch(tmp_path: Path, tiny_records):
    """Starts the batch file as SLURM would on two machines with two GPUs each; `tools` replaces stand-ins."""

    def start(*arguments: str, tools: dict[str, str] | None = None, **variables: str) -> subprocess.Popen:
        folder = tmp_path / "tools"
        folder.mkdir(exist_ok=True)
        for name, body in (TOOLS | (tools or {})).items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)
        job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "x[1-2]"}
        paths = {"MODEL": tmp_path, "DATA": tiny_records.file, "IMAGES": tmp_path, "OUTPUT": tmp_path / "run"}
        environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
        environment |= {**job, **{k: str(v) for k, v in paths.items()}, **variables}
        environment["GEOCHAT_VENV"] = "none"  # its torchrun would go before the stand-in
        environment["PATH"] = f"{folder}:{environment['PATH']}"
        return subprocess.Popen(
            ["bash", str(BATCH), *arguments], env=environment, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def test_the_batch_file_parses() -> None:
    result = subprocess.run(["bash", "-n", str(BATCH)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "#SBATCH --requeue" in BATCH.read_text()


def test_every_machine_starts_its_part(batch) -> None:
    process = batch("scripts/finetune_lora.sh", "--save_steps", "200")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    lines = [line for line in output.splitlines() if line.startswith("torchrun")]
    for rank, line in enumerate(lines):
        assert (
            f"--nproc_per_node 2 --nnodes 2 --node_rank {rank} --master_addr alpha --master_port 32345 "
            in line
        )
        assert line.endswith("--preset geochat_lora --resume_from_checkpoint True --save_steps 200")
        assert "--global_batch_size 144 --per_device_train_batch_size 12 " in line
    assert len(lines) == 2


def test_time_up_puts_the_job_back_and_an_error_does_not(batch) -> None:
    sleeping = {"srun": "sleep 60 & echo started; wait"}
    for restarts, code, said in (("3", 0, "scontrol requeue 12345"), ("20", 1, "error: the time is up")):
        process = batch("scripts/finetune_lora.sh", tools=sleeping, SLURM_RESTART_COUNT=restarts)
        while "started" not in process.stdout.readline():
            pass
        time.sleep(0.2)
        process.send_signal(signal.SIGUSR1)
        assert any(said in line for line in process.stdout)  # no further: the stand-in holds the pipe open
        assert process.wait(timeout=30) == code
    process = batch("scripts/finetune_lora.sh", tools={"torchrun": "exit 2"})
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "requeue" not in output
    process = batch("scripts/no_such_recipe.sh")
    assert "error: the first argument is the recipe" in process.communicate(timeout=60)[0]


# srun starts every machine's part and, as `--kill-on-bad-exit` says, ends all of them when one fails; scontrol ends
# them too.
REAL = {
    "scontrol": 'if [ "$1" = show ]; then printf "127.0.0.1\\nlocalhost\\n"; else kill -TERM $(cat "$PARTS"); fi',
    "srun": """
        shift; : > "$PARTS"
        for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@" & echo $! >> "$PARTS"; done
        wait -n; first=$?
        [ $first = 0 ] || kill -TERM $(cat "$PARTS")
        wait; exit $first""",
}


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")
def test_two_machines_train_and_resume_after_the_time_was_up(
    tmp_path: Path, tiny_base: Path, tiny_records, free_port: int
) -> None:
    tools, run = tmp_path / "tools", tmp_path / "run"
    tools.mkdir()
    for name, body in REAL.items():
        (tools / name).write_text(f"#!/bin/bash\n{body}\n")
        (tools / name).chmod(0o755)
    variables = {
        "MODEL": tiny_base,
        "DATA": tiny_records.file,
        "IMAGES": tiny_records.image_folder,
        "OUTPUT": run,
    }
    variables |= {
        "GPUS": 1,
        "GLOBAL_BATCH": 2,
        "ZERO": "none",
        "MASTER_PORT": free_port,
        "GEOCHAT_VENV": "none",
    }
    variables |= {"SLURM_JOB_ID": 1, "SLURM_JOB_NUM_NODES": 2, "SLURM_JOB_NODELIST": "x[1-2]"}
    variables |= {"PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": 1}
    variables |= {"PARTS": tmp_path / "parts", "CUDA_VISIBLE_DEVICES": ""}
    flags = ["--image_size", "84", "--max_steps", "60", "--save_steps", "5", "--logging_steps", "1"]
    flags += ["--dataloader_num_workers", "0", "--disable_tqdm", "True"]

    def start(restarts: int) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", str(BATCH), "scripts/finetune_lora.sh", *flags], cwd=ROOT, text=True,
            env=os.environ | {name: str(value) for name, value in variables.items()} | {"SLURM_RESTART_COUNT": str(restarts)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    first = start(0)
    deadline = time.monotonic() + 400
    while not (run / "checkpoint-5").exists():
        assert first.poll() is None, first.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0, said
    assert "2 = 1 per device × 1 accumulation × 2 processes" in said
    assert "the time is up: back into the queue" in said
    assert not (run / "adapter_model.safetensors").exists()

    again = start(1)
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert "restart 1, 2 machines, first 127.0.0.1" in said
    assert "checkpoint-" in said.split("resumed from")[1]
    steps = [json.loads(line)["step"] for line in (run / "loss.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))
    assert (run / "adapter_model.safetensors").exists()
