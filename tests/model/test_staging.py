"""A save that is killed or finds the disk full leaves the previous one; a committed one is completed."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geochat.model.staging import recover, staged

OLD = {
    "config.json": "old",
    "model-00001-of-00002.safetensors": "old",
    "model-00002-of-00002.safetensors": "old",
}
NEW = {"config.json": "new", "generation_config.json": "new", "model.safetensors": "new"}
FOREIGN = {"loss.jsonl": "kept"}


def fill(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}


def save(folder: Path, files: dict[str, str] = NEW) -> None:
    with staged(folder) as staging:
        fill(staging, files)


def fail(folder: Path) -> None:
    with staged(folder) as staging:
        fill(staging, NEW)
        raise RuntimeError


def test_save_replaces_own_files_and_keeps_others(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fill(folder, OLD | FOREIGN)
    save(folder)
    assert content(folder) == NEW | FOREIGN
    assert [entry.name for entry in folder.iterdir() if entry.is_dir()] == []


def test_an_error_while_writing_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fill(folder, OLD)
    with pytest.raises(RuntimeError):
        fail(folder)
    assert content(folder) == OLD
    with pytest.raises(RuntimeError):
        fail(tmp_path / "fresh")
    assert not (tmp_path / "fresh").exists()


def test_no_space_is_one_line_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    fill(folder, OLD)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(
            ValueError, match=r"run: not saved \(File too large\); the previous save"
        ) as caught:
            save(folder, {"config.json": "new", "model.safetensors": "x" * 5000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert content(folder) == OLD
    save(folder)
    assert content(folder) == NEW


def save_in_child(folder: Path, step: int) -> int:
    """Status of a child process that kills itself at the `step`-th change it makes to the file system."""
    child = os.fork()
    if child == 0:
        calls = 0

        def killing(call: Callable[..., Any]) -> Callable[..., Any]:
            def counted(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **options)

            return counted

        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "write_text"):
            setattr(Path, name, killing(getattr(Path, name)))
        os.fsync = killing(os.fsync)
        save(folder)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_killed_at_any_moment_leaves_one_whole_save(tmp_path: Path) -> None:
    outcomes = []
    for step in range(1, 60):
        folder = tmp_path / f"run{step}"
        fill(folder, OLD | FOREIGN)
        status = save_in_child(folder, step)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if not (folder / ".saved").is_dir():  # nothing was moved yet, or everything
            assert content(folder) in (OLD | FOREIGN, NEW | FOREIGN)
        recover(folder)
        assert content(folder) in (OLD | FOREIGN, NEW | FOREIGN)
        outcomes.append("new" if content(folder) == NEW | FOREIGN else "old")
        save(folder)
        assert content(folder) == NEW | FOREIGN
    else:
        pytest.fail("the save never ran to its end")
    assert outcomes == sorted(outcomes, reverse=True)  # old, old, …, then new, new, …
    assert set(outcomes) == {"old", "new"}
