"""The command end to end on a tiny model: complete, resumed, spread over processes, killed, refused."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from PIL import Image

from geochat.chat.engine import Chat
from geochat.eval import run as module
from geochat.eval.benchmark import Benchmark
from geochat.eval.files import read_json, read_rows, write_rows
from geochat.eval.progress import ANSWERS
from geochat.model.adapter import AdapterSpec, attach, save_adapter
from geochat.model.base import BaseRecord
from geochat.model.checkpoint import load, save_model
from geochat.model.processor import Processor

everything = pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")
PARTIAL = "answers.partial.0-of-1.jsonl"
BOX = [[10, 10], [20, 10], [20, 20], [10, 20]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    rows = []
    for i in range(3):
        Image.new("RGB", (60 + i, 40), (40 * i, 90, 60)).save(tmp_path / "images" / f"{i}.png")
        common = {"image": f"{i}.png", "scene": "harbour", "answer": "harbour"}
        rows += [
            {"question_id": f"{i}_s", "text": "Scene?", "task": "scene", "ground_truth": "harbour", **common},
            {
                "question_id": f"{i}_r",
                "text": "[refer] Where?",
                "task": "refer",
                "ground_truth": [BOX],
                **common,
            },
        ]
    write_rows(tmp_path / "questions.jsonl", rows)
    return tmp_path


def command(data: Path, model: Path, *more: str) -> list[str]:
    return [
        "--model-path", str(model), "--benchmark", "nano", "--questions", str(data / "questions.jsonl"),
        "--output", str(data / "out"), "--device", "cpu", "--max-new-tokens", "5", "--batch-size", "2", *more,
    ]  # fmt: skip


def test_answers_and_scores(data: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module.main(command(data, tiny_model))
    rows = read_rows(data / "out" / ANSWERS)
    assert [row["question_id"] for row in rows] == [
        r["question_id"] for r in read_rows(data / "questions.jsonl")
    ]
    first = rows[0]
    assert (first["prompt"], first["expected"], first["width"], first["height"]) == (
        "Scene?",
        "harbour",
        60,
        40,
    )
    assert first["decoding"] == {
        "max_new_tokens": 5, "temperature": 0.0, "template": "vicuna_v1", "image_size": 84, "image_mode": "pad",
        "dtype": "float32", "quantization": None,
    }  # fmt: skip
    assert len(first["model"]) >= 16
    assert "answer" not in first
    scores = read_json(data / "out" / "scores.json")
    assert (scores["n"], scores["not_asked"], scores["model"]) == (6, 0, first["model"])
    assert not (data / "out" / PARTIAL).exists()
    assert "| scene, micro | 3 |" in capsys.readouterr().out


def test_a_stopped_run_goes_on(data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module.main(command(data, tiny_model))
    complete = (data / "out" / ANSWERS).read_text()
    lines = complete.splitlines(keepends=True)
    (data / "out" / ANSWERS).unlink()
    (data / "out" / PARTIAL).write_text("".join(lines[:3]) + lines[3][:40])  # killed in the middle of a row
    asked: list[int] = []
    original = module.ask

    def counted(chat, items, **options):
        asked.append(len(items))
        return original(chat, items, **options)

    monkeypatch.setattr(module, "ask", counted)
    module.main(command(data, tiny_model))
    assert asked == [3]
    assert (data / "out" / ANSWERS).read_text() == complete
    module.main(command(data, tiny_model))  # complete: only scored again
    assert asked == [3, 0]
    assert (data / "out" / ANSWERS).read_text() == complete


def test_a_corrected_truth_is_scored_without_asking_again(data: Path, tiny_model: Path) -> None:
    module.main(command(data, tiny_model))
    rows = read_rows(data / "questions.jsonl")
    said = read_rows(data / "out" / ANSWERS)[0]["text"]
    write_rows(data / "questions.jsonl", [{**rows[0], "ground_truth": said or "x"}, *rows[1:]])
    module.main(command(data, tiny_model))
    assert read_rows(data / "out" / ANSWERS)[0]["ground_truth"] == (said or "x")
    assert read_json(data / "out" / "scores.json")["tasks"]["scene"]["overall"]["accuracy"] == (
        1 / 3 if said else 0
    )


def test_another_picture_is_another_question(data: Path, tiny_model: Path, refused) -> None:
    module.main(command(data, tiny_model))
    Image.new("RGB", (60, 40), "white").save(data / "images" / "0.png")
    assert "picture was" in refused(module.main, command(data, tiny_model))


def test_a_limit_loses_no_answers(data: Path, tiny_model: Path) -> None:
    module.main(command(data, tiny_model))
    module.main(command(data, tiny_model, "--limit", "2"))
    assert len(read_rows(data / "out" / ANSWERS)) == 6
    assert read_json(data / "out" / "scores.json")["n"] == 2


def test_an_adapter_is_scored(data: Path, tiny_model: Path) -> None:
    model, processor = load(tiny_model)
    adapted = attach(model, AdapterSpec(r=4))
    save_adapter(adapted, processor, data / "adapter", base=BaseRecord.of(tiny_model))
    module.main(command(data, data / "adapter"))
    assert read_json(data / "out" / "scores.json")["n"] == 6


def test_answers_of_another_run_are_not_mixed_in(data: Path, tiny_model: Path, refused) -> None:
    module.main(command(data, tiny_model))
    before = (data / "out" / ANSWERS).read_text()
    line = refused(module.main, command(data, tiny_model, "--image-mode", "crop"))
    assert re.search(r"holds answers of another run \(decoding was .*choose another --output", line)
    assert (data / "out" / ANSWERS).read_text() == before
    module.main(command(data, tiny_model, "--image-mode", "crop", "--overwrite"))
    assert read_rows(data / "out" / ANSWERS)[0]["decoding"]["image_mode"] == "crop"


def test_other_weights_in_the_same_folder_are_another_model(
    data: Path, tiny_model: Path, tmp_path: Path, refused
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    module.main(command(data, tmp_path / "model"))
    model, processor = load(tiny_model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    shutil.rmtree(tmp_path / "model")
    save_model(model, processor, tmp_path / "model")
    assert "holds answers of another run (model was" in refused(
        module.main, command(data, tmp_path / "model")
    )


def test_a_damaged_image_is_a_failure_not_an_answer(
    data: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "images" / "1.png").write_bytes((data / "images" / "1.png").read_bytes()[:50])
    module.main(command(data, tiny_model))
    rows = read_rows(data / "out" / ANSWERS)
    bad = [row for row in rows if row["text"] is None]
    assert [row["question_id"] for row in bad] == ["1_s", "1_r"]
    assert all("1.png" in row["error"] for row in bad)
    scores = read_json(data / "out" / "scores.json")
    assert scores["not_asked"] == 2
    assert scores["tasks"]["refer"]["overall"]["true_boxes"] == 3
    assert "2 questions could not be asked" in capsys.readouterr().out


def test_shares_meet_in_one_file(
    data: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module.main(command(data, tiny_model))
    whole = (data / "out" / ANSWERS).read_text()
    out = data / "shards"
    for number in (2, 0, 1, 3):  # more shares than pictures: one has nothing to do
        assert not (out / ANSWERS).exists()
        capsys.readouterr()
        module.main(command(data, tiny_model, "--output", str(out), "--shard", f"{number}/4"))
        if (out / ANSWERS).exists():
            break
        assert "the last one writes" in capsys.readouterr().out
    assert "| scene, micro | 3 |" in capsys.readouterr().out
    assert (out / ANSWERS).read_text() == whole
    assert not list(out.glob("*partial*"))
    # As torchrun starts them; a retry of everything that is there already asks nothing.
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        module.main(command(data, tiny_model, "--output", str(data / "ranks")))
    assert (data / "ranks" / ANSWERS).read_text() == whole


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(
    "start",
    [
        "forked",
        pytest.param("python -m", marks=everything),
    ],
)
def test_killed_three_times_it_ends_with_the_same_answers(data: Path, tiny_model: Path, start: str) -> None:
    rows = [
        {
            "question_id": f"{i}/{k}",
            "image": f"{i}.png",
            "text": f"Scene {k}?",
            "task": "scene",
            "ground_truth": "x",
        }
        for i in range(16)
        for k in range(5)
    ]
    for i in range(16):
        Image.new("RGB", (50 + i, 40), (15 * i, 90, 60)).save(data / "images" / f"{i}.png")
    write_rows(data / "questions.jsonl", rows)
    arguments = command(data, tiny_model, "--batch-size", "1")
    module.main([*arguments, "--output", str(data / "whole")])
    draw, seen = random.Random(7), 0
    for _ in range(3):
        process = started(start, arguments)
        while (written := size_of(data / "out" / PARTIAL)) <= seen:
            assert running(process), "the run ended before it could be killed"
            time.sleep(0.002)
        time.sleep(0.1 * draw.random())
        os.kill(process.pid, signal.SIGKILL)
        process.wait() if start == "python -m" else process.join()
        assert not (data / "out" / ANSWERS).exists()
        seen = written
    module.main(arguments)
    assert (data / "out" / ANSWERS).read_bytes() == (data / "whole" / ANSWERS).read_bytes()
    assert read_json(data / "out" / "scores.json") == read_json(data / "whole" / "scores.json")


def started(how: str, arguments: list[str]) -> Any:
    """The command in a process of its own; a fork of this one has torch already."""
    if how == "python -m":
        return subprocess.Popen([sys.executable, "-m", "geochat.eval.run", *arguments])
    process = multiprocessing.get_context("fork").Process(target=module.main, args=(arguments,))
    process.start()
    return process


def running(process: Any) -> bool:
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_what_failed_in_one_share_is_asked_again_by_it(data: Path, tiny_model: Path) -> None:
    def shares(*numbers: int) -> None:
        for number in numbers:
            module.main(command(data, tiny_model, "--shard", f"{number}/2"))

    module.main(command(data, tiny_model, "--output", str(data / "whole")))
    content = (data / "images" / "1.png").read_bytes()
    (data / "images" / "1.png").write_bytes(content[:50])
    shares(0, 1)
    assert sum(row["text"] is None for row in read_rows(data / "out" / ANSWERS)) == 2
    (data / "images" / "1.png").write_bytes(content)
    shares(1, 0)
    assert (data / "out" / ANSWERS).read_text() == (data / "whole" / ANSWERS).read_text()


def test_a_model_that_breaks_at_one_picture_answers_the_others(
    data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = Processor.pixels

    def breaks(self, image):
        return pixels(self, image) * (math.nan if image.width == 62 else 1)

    monkeypatch.setattr(Processor, "pixels", breaks)
    module.main(command(data, tiny_model))
    failed = [row for row in read_rows(data / "out" / ANSWERS) if row["text"] is None]
    assert [row["question_id"] for row in failed] == ["2_s", "2_r"]
    assert "not numbers" in failed[0]["error"]


def test_pictures_of_every_mode_are_read(data: Path, tiny_model: Path) -> None:
    for number, mode in enumerate(("P", "L", "RGBA")):
        Image.new("RGB", (60, 40), (200, 30, 90)).convert(mode).save(data / "images" / f"{number}.png")
    module.main(command(data, tiny_model))
    assert all(row["text"] is not None for row in read_rows(data / "out" / ANSWERS))


def test_a_bare_folder_name_is_enough(data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(data)
    module.main(command(data, tiny_model, "--output", "here"))
    assert len(read_rows(data / "here" / ANSWERS)) == 6


def test_answers_do_not_depend_on_the_batch(data: Path, tiny_model: Path) -> None:
    """Prompts of different lengths side by side: what the original's unmasked left padding changed."""
    rows = read_rows(data / "questions.jsonl")
    long = "Is there a ship beside the grey pier in the image? " * 3
    rows = [{**row, "text": row["text"] + long[: 40 * i]} for i, row in enumerate(rows)]
    write_rows(data / "questions.jsonl", rows)
    for size in ("1", "6"):
        module.main(command(data, tiny_model, "--batch-size", size, "--output", str(data / size)))
    assert (data / "1" / ANSWERS).read_text() == (data / "6" / ANSWERS).read_text()
    assert len({row["text"] for row in read_rows(data / "1" / ANSWERS)}) > 1


def test_refusals(data: Path, tiny_model: Path, tmp_path: Path, refused) -> None:
    arguments = ["--model-path", "m", "--benchmark", "referring", "--output", str(tmp_path / "o")]
    assert "no question file there; give --questions" in refused(module.main, arguments)
    (data / "images" / "2.png").unlink()
    line = refused(module.main, command(data, tiny_model))
    assert re.search(r"error: 2 of 6 images are not there .*2\.png .*--image-folder", line)
    module.main(command(data, tiny_model, "--limit", "4"))
    assert len(read_rows(data / "out" / ANSWERS)) == 4
    assert "no checkpoint" in refused(module.main, command(data, tmp_path / "nothing", "--limit", "4"))
    rows = read_rows(data / "questions.jsonl")
    write_rows(data / "questions.jsonl", [{**rows[0], "ground_truth": None}])
    assert "no truth in column" in refused(module.main, command(data, tiny_model))


@everything
def test_started_by_torchrun(data: Path, tiny_model: Path) -> None:
    arguments = command(data, tiny_model)
    module.main([*arguments, "--output", str(data / "whole")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*torchrun, "-m", "geochat.eval.run", *arguments], check=True)
    assert (data / "out" / ANSWERS).read_text() == (data / "whole" / ANSWERS).read_text()


def test_each_process_has_its_own_gpu(data: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "3")
    devices: list[str] = []
    monkeypatch.setattr(module, "load_chat", lambda arguments: devices.append(arguments.device) or 1 / 0)
    for given in ("auto", "cpu"):
        with pytest.raises(ZeroDivisionError):
            module.main([*command(data, tiny_model), "--device", given])
    assert devices == ["cuda:3", "cpu"]


def test_scores_without_files(data: Path, tiny_model: Path) -> None:
    chat, benchmark = Chat.load(tiny_model, device="cpu"), Benchmark.load("nano")
    scores = module.evaluate(chat, benchmark, read_rows(data / "questions.jsonl"), data / "images")
    assert scores["tasks"]["scene"]["overall"]["n"] == 3
    json.dumps(scores)
    assert (
        module.evaluate(chat, benchmark, read_rows(data / "questions.jsonl"), data / "images", limit=2)["n"]
        == 2
    )
