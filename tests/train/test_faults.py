"""Faults that are real: a full disk, a process that is killed, a loss that is no number on one of two processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from geochat.model.checkpoint import load
from geochat.train.saving import checkpoints
from geochat.train.train import main

everything = pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")
ZERO_3 = ["--deepspeed", str(Path(__file__).resolve().parents[2] / "scripts" / "zero3.json")]

# ---- a full disk ----

ON_A_SMALL_DISK = """mount -t tmpfs -o size="$1" tmpfs "$2" || exit 77
"${@:4}" --output_dir "$2"; code=$?
cp -r "$2" "$3"; exit $code"""
"""Size, mount point, folder for what is found there afterwards, command."""


def on_a_small_disk(size: int, tmp_path: Path, command: list[str]) -> tuple[int, str, Path]:
    """Exit code, output, and a copy of what the run folder held in the end."""
    disk, found = tmp_path / "disk", tmp_path / "found"
    disk.mkdir()
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare here: a small disk cannot be made")
    words = [unshare, "--user", "--map-root-user", "--mount", "bash", "-c", ON_A_SMALL_DISK, "_"]
    result = subprocess.run(
        [*words, str(size), disk, found, *command], capture_output=True, text=True, timeout=400
    )
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"no disk of one's own is allowed here: {result.stderr.strip()}")
    return result.returncode, result.stdout + result.stderr, found


def pages(folder: Path) -> int:
    """Bytes that a folder takes on a disk in memory, whose files are whole pages."""
    return sum(-(-file.stat().st_size // 4096) * 4096 for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "share"),
    [("lora", 1.7), pytest.param("lora", 1.1, marks=everything), pytest.param("full", 1.2, marks=everything)],
    ids=["optimizer", "adapter", "model"],
)
def test_a_full_disk_is_said_and_leaves_the_previous_save(
    kind: str, share: float, flags, tmp_path: Path
) -> None:
    """The disk has room for one save and a part of the next."""
    flags += ["--save_steps", "2", "--max_steps", "6", "--lora_enable", str(kind == "lora")]
    main([*flags, "--max_steps", "2", "--output_dir", str(tmp_path / "one")])
    room = int(share * pages(tmp_path / "one" / "checkpoint-2")) + 20_000
    code, said, found = on_a_small_disk(room, tmp_path, [sys.executable, "-m", "geochat.train.train", *flags])
    assert code == 2, said
    (line,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert "checkpoint-4 could not be saved (" in line
    assert "No space left on device" in line
    assert line.endswith("checkpoint-2 is intact")
    assert "Traceback" not in said
    assert [path.name for path in checkpoints(found)] == ["checkpoint-2"]
    load(found / "checkpoint-2")


# ---- a process that is killed ----


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are found through /proc")
@pytest.mark.parametrize(
    ("way", "rank"), [([], 1), pytest.param(ZERO_3, 0, marks=everything)], ids=["ddp", "zero3"]
)
def test_when_one_process_is_killed_the_others_end_and_the_last_save_is_resumed(
    way: list[str], rank: int, flags, start, finish, torchrun, tmp_path: Path
) -> None:
    run = [*flags, *way, "--max_steps", "2000", "--save_steps", "3", "--output_dir", str(tmp_path)]
    run += ["--global_batch_size", "4"]
    launcher = start(run, torchrun)
    deadline = time.monotonic() + 240
    while not (tmp_path / "checkpoint-3").exists():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    workers = children(launcher.pid)
    assert len(workers) == 2
    os.kill(workers[rank], signal.SIGKILL)
    killed = time.monotonic()
    output, _ = launcher.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert launcher.returncode != 0
    assert "SIGKILL" in output
    assert not Path(f"/proc/{workers[1 - rank]}").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "loss.jsonl").read_text().splitlines()]
    last = int(checkpoints(tmp_path)[-1].name.split("-")[1])
    assert steps[-1] - last <= 3 + 1  # the step that was computed before its save was whole
    again = [*run, "--max_steps", str(last + 1), "--resume_from_checkpoint", "True"]
    if way:
        finish(start(again, torchrun))
    else:
        main(again)
    assert f"checkpoint-{last}" in (tmp_path / "recipe.txt").read_text().split("resumed from")[1]


# ---- a loss that is no number ----

BROKEN_ROW = """
import sys
from geochat.train import dataset, train

read = dataset.InstructionDataset.read

def broken(self, index):
    item = read(self, index)
    if index == 2:
        item["pixels"] = item["pixels"] * float("nan")
    return item

dataset.InstructionDataset.read = broken
train.run()
"""


@pytest.mark.slow
@everything
@pytest.mark.parametrize("way", [[], ZERO_3], ids=["ddp", "zero3"])
def test_a_loss_that_is_no_number_on_one_process_ends_all_with_its_sample(
    way: list[str], flags, start, on_processes, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(BROKEN_ROW)
    run = [*flags, *way, "--save_steps", "1", "--per_device_train_batch_size", "1"]
    program = on_processes(2, (str(tmp_path / "broken.py"),))
    launcher = start([*run, "--output_dir", str(tmp_path / "run")], program)
    output, _ = launcher.communicate(timeout=400)
    assert launcher.returncode != 0
    lines = {line for line in output.splitlines() if "error: " in line}
    assert len(lines) == 1, output
    step = int(
        re.search(r"loss of step (\d+) is nan with the samples [^,]*tiny.json:row 2; ", lines.pop())[1]
    )
    assert "SIGABRT" not in output
    assert len(checkpoints(tmp_path / "run")) == min(step - 1, 2)
    for checkpoint in checkpoints(tmp_path / "run"):
        load(checkpoint)
