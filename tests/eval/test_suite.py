"""All benchmarks with one command, and one benchmark over a job array: real scripts, real runs of a tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")

from PIL import Image

from geochat.eval import run, run_all
from geochat.eval.files import read_json, write_rows
from geochat.eval.suite import FAILED, main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """UC Merced complete, AID with a picture missing, everything else absent."""
    root = tmp_path / "data"
    for name, folder, suffix in (("UCmerced", "UCMerced", "tif"), ("aid", "aid", "jpg")):
        (root / folder / "river").mkdir(parents=True)
        ids = [f"river/river{i}.{suffix}" for i in range(2)]
        rows = [
            {"question_id": key, "image": key, "text": "Which class?", "ground_truth": "river"} for key in ids
        ]
        write_rows(root / f"{name}.jsonl", rows)
        for key in ids:
            Image.new("RGB", (40, 40), (20, 90, 160)).save(root / folder / key)
    (root / "aid" / "river" / "river1.jpg").unlink()
    return root


def evaluate_all(model: Path, data: Path, output: Path) -> subprocess.CompletedProcess[str]:
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "OUTPUT": str(output), "GPUS": "1"}
    environment["PATH"] = f"{folder}:{environment['PATH']}"
    command = ["bash", str(ROOT / "scripts" / "eval_all.sh"), str(model), str(data)]
    flags = ["--device", "cpu", "--max-new-tokens", "3"]
    return subprocess.run([*command, *flags], env=environment, cwd=ROOT, text=True, capture_output=True)


def test_what_can_be_run_is_found_and_what_is_missing_is_named(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEOCHAT_BENCHMARKS", "elsewhere")
    main(["find", str(data)])
    printed = capsys.readouterr()
    assert printed.out.split() == ["aid", "ucmerced"]
    [line] = [line for line in printed.err.splitlines() if line.startswith("lrben: not run")]
    assert f"{data / 'lrben.jsonl'} and {data}" in line
    assert "get it from https://" in line
    [line] = [
        line for line in printed.err.splitlines() if "datasets_eval" in line
    ]  # one for all that want it
    assert line.startswith("vhm/presence and 33 more: not run")


def test_one_model_for_all(
    data: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    monkeypatch.setenv("GEOCHAT_BENCHMARKS", str(data))
    loaded: list[object] = []
    load = run.load_chat
    monkeypatch.setattr(run, "load_chat", lambda arguments: loaded.append(arguments) or load(arguments))
    out, names = tmp_path / "out", ["gqa", "aid", "ucmerced"]
    arguments = ["--model-path", str(tiny_model), "--output", str(out), "--device", "cpu"]
    arguments += ["--max-new-tokens", "3", "--benchmarks"]
    run_all.main([*arguments, *names])
    assert len(loaded) == 1
    line = refused(main, ["index", str(out), *names])
    assert "failed: gqa, aid;" in line
    summary = (out / "summary.md").read_text()
    assert "| gqa | failed: " in summary
    assert "no question file there" in summary
    (data / "aid" / "river" / "river1.jpg").write_bytes((data / "aid" / "river" / "river0.jpg").read_bytes())
    run_all.main([*arguments, "aid"])
    main(["index", str(out), "aid", "ucmerced"])
    # What had succeeded before and fails now is not shown with its old figures.
    monkeypatch.setattr(run_all, "write_report", lambda *arguments, **options: {}["fault"])
    run_all.main([*arguments, "aid"])
    assert (out / "aid" / FAILED).read_text() == "'fault'\n"
    assert "failed: aid;" in refused(main, ["index", str(out), *names[1:]])


@pytest.mark.slow
def test_one_failure_does_not_stop_the_others(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    result = evaluate_all(tiny_model, data, tmp_path / "out")
    assert result.returncode == 1, result.stderr
    assert "error: failed: aid" in result.stderr
    assert "1 of 2 images are not there" in result.stderr
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "| aid | failed: 1 of 2 images are not there" in summary
    assert "| ucmerced | ucmerced: accuracy | 2 |" in summary
    page = (tmp_path / "out" / "index.html").read_text()
    assert 'href="ucmerced/report/index.html"' in page
    assert (tmp_path / "out" / "ucmerced" / "report" / "index.html").is_file()
    assert read_json(tmp_path / "out" / "ucmerced" / "scores.json")["n"] == 2


@pytest.mark.parametrize(
    ("model", "folder", "message"),
    [
        ("nothing", "data", "nothing: no model there"),
        ("data", "nothing", "nothing: no such folder"),
        ("data", "data/aid", "aid: the files of no benchmark are there"),
    ],
)
def test_the_script_says_what_it_needs(data: Path, model: str, folder: str, message: str) -> None:
    result = evaluate_all(data.parent / model, data.parent / folder, data / "out")
    assert result.returncode == 2
    assert message in result.stderr


TOOLS = {"srun": 'exec "$@"', "scontrol": 'echo "scontrol $*"', "python": 'echo "python $*"'}


@pytest.fixture
def task(tmp_path: Path):
    """Starts task 5 of an array 3-7 as SLURM would; `tools` replaces stand-ins."""

    def start(tools: dict[str, str], **variables: str) -> subprocess.Popen:
        folder = tmp_path / "tools"
        folder.mkdir(exist_ok=True)
        for name, body in (TOOLS | tools).items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)
        array = {"ARRAY_JOB_ID": "9", "ARRAY_TASK_ID": "5", "ARRAY_TASK_MIN": "3", "ARRAY_TASK_COUNT": "5"}
        environment = {**os.environ, **{f"SLURM_{key}": value for key, value in array.items()}, **variables}
        environment |= {"GEOCHAT_VENV": "none", "PATH": f"{folder}:{environment['PATH']}"}
        return subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "slurm" / "eval.sbatch"), "--benchmark", "aid"],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def test_a_task_of_an_array_asks_its_share(task) -> None:
    output, _ = task({}).communicate(timeout=60)
    assert "python -m geochat.eval.run --benchmark aid --shard 2/5" in output
    failed = task({"python": "exit 2"})
    failed.communicate(timeout=60)
    assert failed.returncode == 2


@pytest.mark.parametrize(
    ("restarts", "code", "said"), [("3", 0, "scontrol requeue 9_5"), ("20", 1, "error: the time is up")]
)
def test_time_up_puts_the_task_back(task, restarts: str, code: int, said: str) -> None:
    process = task({"python": "echo started; sleep 60"}, SLURM_RESTART_COUNT=restarts)
    while "started" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGUSR1)
    assert any(said in line for line in process.stdout)  # no further: the stand-in holds the pipe open
    assert process.wait(timeout=30) == code
