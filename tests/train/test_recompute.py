"""`--gradient_checkpointing auto`: kept where memory allows, recomputed where not, said in one line; flags still force."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from geochat.train import recompute
from geochat.train.command_line import parse_arguments
from geochat.train.train import main, prepare

AUTO = ["--gradient_checkpointing", "auto"]


def checkpointing(folder: Path) -> str:
    (line,) = [
        line
        for line in (folder / "recipe.txt").read_text().splitlines()
        if line.startswith(" " * 9 + "checkpointing")
    ]
    return line.split("checkpointing  ")[1]


@pytest.mark.parametrize(("mebibytes", "again"), [(1000, False), (1, True)])
def test_memory_decides(
    mebibytes: int, again: bool, flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "available", lambda device: mebibytes * 2**20)
    trainer, _ = prepare(parse_arguments([*flags, *AUTO, "--output_dir", str(tmp_path)]))
    does = "recomputed" if again else "kept"
    said = checkpointing(tmp_path)
    assert said.startswith(f"activations {does}: keeping them needs 0.0 GiB at ")
    assert said.endswith(f"75% of {mebibytes / 1024:.1f} GiB are allowed")
    trainer.args.max_steps = 1
    trainer.train()
    layers = trainer.model.get_base_model().model.language_model.layers
    assert [layer.gradient_checkpointing for layer in layers] == [again, again]


def test_longer_texts_and_larger_batches_need_more(
    flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the size where two samples just fit, eight do not; parts of a budget do."""
    two = [*flags, *AUTO, "--output_dir", str(tmp_path / "two")]
    eight = [*flags, *AUTO, "--output_dir", str(tmp_path / "eight"), "--per_device_train_batch_size", "8"]
    found = {}
    for mebibytes in range(1, 64):
        monkeypatch.setattr(recompute, "available", lambda device, m=mebibytes: m * 2**20)
        trainer, _ = prepare(parse_arguments(two))
        if not trainer.args.gradient_checkpointing:
            break
    else:
        pytest.fail("never kept")
    for name, argv in {"eight": eight, "parts": [*eight, "--max_tokens_per_micro_batch", "240"]}.items():
        found[name] = prepare(parse_arguments(argv))[0].args.gradient_checkpointing
    assert found == {"eight": True, "parts": False}


@pytest.mark.parametrize(("value", "again"), [(["True"], True), (["false"], False), ([], True)])
def test_a_word_forces(value: list[str], again: bool, flags, tmp_path: Path) -> None:
    argv = [*flags, "--gradient_checkpointing", *value, "--output_dir", str(tmp_path)]
    assert prepare(parse_arguments(argv))[0].args.gradient_checkpointing is again
    assert checkpointing(tmp_path) == f"activations {'recomputed' if again else 'kept'}"


def test_what_is_not_counted_is_recomputed(flags, tmp_path: Path) -> None:
    argv = [*flags, *AUTO, "--attn_implementation", "eager", "--output_dir", str(tmp_path)]
    assert prepare(parse_arguments(argv))[0].args.gradient_checkpointing is True
    assert checkpointing(tmp_path).endswith("eager attention is not counted")


def test_other_words_are_refused(flags, tmp_path: Path, refused) -> None:
    said = refused(main, [*flags, "--gradient_checkpointing", "perhaps", "--output_dir", str(tmp_path)])
    assert "--gradient_checkpointing perhaps: choose True, False or auto" in said


def test_a_plan_decides_for_the_gpu_it_is_made_for(flags, tmp_path: Path, capsys) -> None:
    main([*flags, *AUTO, "--dry_run", "True", "--plan_gpu", "a100-40g", "--output_dir", str(tmp_path)])
    assert "activations kept: as an empty a100-40g decides" in capsys.readouterr().out


def test_free_memory_of_this_machine() -> None:
    assert 0 < recompute.available(torch.device("cpu")) <= psutil.virtual_memory().total
