"""Validation in training: losses, scores and dialogues are written, and what is trained does not depend on them."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from geochat.eval.files import read_rows, write_rows
from geochat.eval.metrics import METRICS
from geochat.train import arguments
from geochat.train.curves import draw_curve
from geochat.train.train import main
from geochat.train.validation import show, undisturbed

everything = pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
WEIGHTS = "adapter_model.safetensors"
FIGURES = {"tiny_scene_accuracy", f"tiny_refer_{METRICS['boxes'].headline}"}


@pytest.fixture
def benchmark(tiny_records, tmp_path: Path) -> Path:
    """Three questions in words and one with a box, about the tiny records' pictures."""
    rows = [
        {
            "question_id": i,
            "image": "square.png",
            "task": "scene",
            "text": "Scene?",
            "ground_truth": "harbour",
        }
        for i in range(3)
    ]
    box = [[[10, 10], [20, 10], [20, 20], [10, 20]]]
    rows.append(
        {"question_id": 3, "image": "wide.jpg", "task": "refer", "text": "Where?", "ground_truth": box}
    )
    write_rows(tmp_path / "questions.jsonl", rows)
    file = tmp_path / "tiny.toml"
    file.write_text(
        f'name = "tiny"\nquestions = "questions.jsonl"\nimage_folder = "{tiny_records.image_folder}"\n'
        'max_new_tokens = 4\n[metric]\ncolumn = "task"\nscene = "exact_match"\nrefer = "boxes"\n'
    )
    return file


@pytest.fixture
def more(benchmark: Path, tiny_records) -> list[str]:
    """Flags that ask for everything there is to validate."""
    return ["--eval_data_path", str(tiny_records.file), "--eval_steps", "3", "--eval_benchmark", str(benchmark),
            "--eval_dialogues", "1"]  # fmt: skip


def test_what_a_validation_leaves(flags, more, tmp_path: Path) -> None:
    """With everything on that may disturb it: dropout, LoRA on the tower, other ways to lay a batch out."""
    flags += ["--max_steps", "6", "--lora_dropout", "0.2", "--vision_lora_r", "2", "--packing", "True"]
    flags += ["--max_tokens_per_micro_batch", "200", "--save_steps", "3", "--data_seed", "3"]
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    main([*flags, "--output_dir", str(plain)])
    main([*flags, *more, "--output_dir", str(watched)])
    for folder in ("checkpoint-3", "."):
        assert (plain / folder / WEIGHTS).read_bytes() == (watched / folder / WEIGHTS).read_bytes()

    rows = read_rows(watched / "validation.jsonl")
    assert [row["step"] for row in rows] == [3, 6]
    assert all(row["loss"] > 0 for row in rows)
    assert set(rows[0]["scores"]) == FIGURES
    losses = read_rows(watched / "loss.jsonl")
    assert [row["step"] for row in losses if "eval_loss" in row] == [3, 6]
    state = json.loads((watched / "checkpoint-6/trainer_state.json").read_text())
    assert any("eval_tiny_scene_accuracy" in row for row in state["log_history"])
    for step in (3, 6):
        folder = watched / f"validation/step-{step}"
        asked = read_rows(folder / "dialogues.jsonl")
        assert {"images", "question", "truth", "answer"} == set(asked[0])
        assert "data:image/jpeg" in (folder / "index.html").read_text()
    assert (watched / "loss.png").stat().st_size > (plain / "loss.png").stat().st_size

    rows[-1]["step"] = 99  # as if the killed run had gone on
    write_rows(watched / "validation.jsonl", rows)
    resumed = ["--resume_from_checkpoint", str(watched / "checkpoint-3")]
    main([*flags, *more, "--output_dir", str(watched), *resumed])
    assert [row["step"] for row in read_rows(watched / "validation.jsonl")] == [3, 6]
    assert (plain / WEIGHTS).read_bytes() == (watched / WEIGHTS).read_bytes()


@pytest.mark.parametrize("lora", ["True", "False"])
def test_scores_alone_in_bfloat16_and_the_best_model(
    lora: str, flags, benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "BF16_ON_CPU", True)
    run = [*flags, "--max_steps", "2", "--save_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1"]
    run += ["--eval_benchmark", str(benchmark), "--eval_benchmark_limit", "2", "--lora_enable", lora]
    run += ["--load_best_model_at_end", "True", "--metric_for_best_model", "tiny_accuracy"]
    run += ["--eval_on_start", "True"]
    main([*run, "--output_dir", str(tmp_path / "run")])
    rows = read_rows(tmp_path / "run/validation.jsonl")
    assert [(row["step"], *row["scores"]) for row in rows] == [(step, "tiny_accuracy") for step in (0, 1, 2)]
    assert rows[0]["loss"] is None
    name = WEIGHTS if lora == "True" else "model.safetensors"
    best = tmp_path / "run/checkpoint-1" / name  # no later one is better than nothing right
    assert best.read_bytes() == (tmp_path / "run" / name).read_bytes()
    assert best.read_bytes() != (tmp_path / "run/checkpoint-2" / name).read_bytes()


def test_a_share_is_held_out_and_named(flags, tmp_path: Path, capsys) -> None:
    run = [*flags, "--val_share", "0.3", "--eval_steps", "3", "--eval_dialogues", "1"]
    run += ["--max_steps", "3", "--save_strategy", "no"]
    main([*run, "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    held_out = int(said.split("validation  ")[1].split(" ")[0])
    assert f", {8 - held_out} samples" in said
    asked = {
        image
        for row in read_rows(tmp_path / "run/validation/step-3/dialogues.jsonl")
        for image in row["images"]
    }
    assert asked
    assert [row["step"] for row in read_rows(tmp_path / "run/validation.jsonl")] == [3]


def test_what_cannot_be_validated_is_said_at_the_start(
    flags, benchmark: Path, tmp_path: Path, refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*flags, "--output_dir", str(tmp_path / "run")]

    def error(*more: str) -> str:
        return refused(main, [*run, *more])

    assert "--val_share needs --eval_steps N" in error("--val_share", "0.5")
    assert "a share lies between 0 and 1" in error("--val_share", "1", "--eval_steps", "2")
    both = ("--val_share", "0.5", "--eval_data_path", "x.json", "--eval_steps", "2")
    assert "two ways to validate" in error(*both)
    scored = ("--eval_steps", "2", "--eval_benchmark")
    assert "no benchmark 'none'" in error(*scored, "none")
    (tmp_path / "questions.jsonl").write_text("")
    assert "no question is left to ask" in error(*scored, str(benchmark))
    rows = [{"question_id": 1, "image": "gone.png", "task": "scene", "text": "?", "ground_truth": "a"}]
    write_rows(tmp_path / "questions.jsonl", rows)
    assert "gone.png" in error(*scored, str(benchmark))
    write_rows(tmp_path / "questions.jsonl", [{**rows[0], "image": "square.png"}])
    best = ("--metric_for_best_model", "tiny_f1")
    assert "tiny_f1: validation gives tiny_accuracy" in error(*scored, str(benchmark), *best)
    monkeypatch.setenv("RANK", "0")
    assert "goes neither with" in error("--load_best_model_at_end", "True", "--fsdp", "True")


def test_randomness_and_mode_are_as_they_were() -> None:
    model = torch.nn.Dropout()
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with undisturbed(model):
        model.eval()
        torch.rand(3), random.random(), np.random.random()
    assert model.training
    assert torch.equal(torch.get_rng_state(), state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == state[1:]


def test_pages_and_curves_of_odd_input(tiny_records, tmp_path: Path) -> None:
    row = {
        "question": "q <b>",
        "truth": "{<1><2><30><40>|<5>}",
        "answer": "{<9999><0><-5><3>}{<",
        "images": [],
    }
    assert "q &lt;b&gt;" in show(row)
    assert "data:image/jpeg" in show({**row, "images": [str(tiny_records.image_folder / "wide.jpg")] * 2})
    assert "not found" in show({**row, "images": [str(tmp_path / "gone.png")]})
    losses = [{"step": 1, "loss": 2.0, "learning_rate": 1e-3}]
    validation = [{"step": 1, "scores": {"a": 0.5}}, {"step": 2, "scores": {"b": 0.25}}]
    draw_curve(losses, validation, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").exists()


@pytest.mark.slow
@everything
@pytest.mark.parametrize(
    "deepspeed", [[], ["--deepspeed", str(SCRIPTS / "zero2.json")]], ids=["ddp", "zero2"]
)
def test_of_two_processes_one_asks_and_training_goes_on_the_same(
    deepspeed, flags, more, start, finish, torchrun, tmp_path: Path
) -> None:
    flags += ["--max_steps", "4", "--per_device_train_batch_size", "1", "--lora_dropout", "0.1", *deepspeed]
    finish(start([*flags, "--output_dir", str(tmp_path / "plain")], torchrun))
    finish(start([*flags, *more, "--output_dir", str(tmp_path / "watched")], torchrun))
    assert (tmp_path / "plain" / WEIGHTS).read_bytes() == (tmp_path / "watched" / WEIGHTS).read_bytes()
    rows = read_rows(tmp_path / "watched/validation.jsonl")
    assert [row["step"] for row in rows] == [3, 4]
    assert all(row["scores"].keys() == FIGURES for row in rows)


@pytest.mark.slow
@everything
def test_zero3_validates_the_loss_and_refuses_to_ask(
    flags, more, benchmark: Path, tiny_records, start, finish, torchrun, tmp_path: Path
) -> None:
    """Parts of 100 tokens: the two processes have different numbers of them at evaluations too."""
    flags += ["--max_steps", "4", "--deepspeed", str(SCRIPTS / "zero3.json")]
    flags += ["--output_dir", str(tmp_path / "run")]
    output = finish(start([*flags, *more], torchrun), expected=1)
    assert "--eval_benchmark asks one process" in output
    flags += ["--max_tokens_per_micro_batch", "100", "--eval_steps", "2"]
    flags += ["--eval_data_path", str(tiny_records.file)]
    assert "no dialogues at evaluations" in finish(start(flags, torchrun))
    rows = read_rows(tmp_path / "run/validation.jsonl")
    assert [row["step"] for row in rows] == [2, 4]
    assert rows[1]["loss"] < rows[0]["loss"]
