"""Mixtures in training: the same samples in the same order for a seed, after a kill, and on any number of processes."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from geochat.data.mixture import read_sources
from geochat.data.store import InstructionStore
from geochat.model.build import build_model
from geochat.train.dataset import InstructionDataset
from geochat.train.mixture import Library, Mixture
from geochat.train.sampler import EpochSampler
from geochat.train.train import main
from geochat.train.trainer import Trainer

everything = pytest.mark.skipif(not os.environ.get("GEOCHAT_ALL_TESTS"), reason="GEOCHAT_ALL_TESTS=1 runs it")


@pytest.fixture(scope="module")
def processor(tiny_llm: Path, tiny_clip: Path):
    return build_model(tiny_llm, tiny_clip, None, image_size=84, dtype=torch.float32)[1]


@pytest.fixture
def mixture(tiny_records, tmp_path: Path) -> Path:
    """Five rows once, three rows of another folder 2.3 times: twelve samples."""
    other = tmp_path / "other"
    other.mkdir()
    for image in tiny_records.image_folder.iterdir():
        (other / image.name).write_bytes(image.read_bytes())
    (tmp_path / "first.json").write_text(json.dumps(tiny_records.records[:5]))
    (tmp_path / "second.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in tiny_records.records[5:])
    )
    file = tmp_path / "mixture.yaml"
    file.write_text(
        f"- {{path: first.json, image_folder: {tiny_records.image_folder}}}\n"
        "- {path: second.jsonl, image_folder: other, weight: 2.3, name: second}\n"
    )
    return file


def library_of(
    processor, *parts: tuple[Path, Path | None], weights: tuple[float, ...] = (), **options
) -> Library:
    files, folders = [file for file, _ in parts], [folder for _, folder in parts if folder]
    sources = read_sources(files, folders, weights)
    datasets = [
        InstructionDataset(InstructionStore(s.path), s.image_folder, processor, **options) for s in sources
    ]
    return Library(sources, datasets)


def records_about(images: list[list[str]], file: Path) -> Path:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [
        {"image": names, "conversations": [{**turns[0], "value": "<image>" * len(names) + "q"}, turns[1]]}
        for names in images
    ]
    file.write_text(json.dumps(rows))
    return file


def test_samples_come_from_their_own_folders(processor, mixture: Path, tiny_records) -> None:
    sources = read_sources([mixture])
    library = library_of(processor, *((source.path, source.image_folder) for source in sources))
    samples = Mixture.draw(library, seed=1)
    first, last = samples[4], samples[5]
    assert "first.json:row 4" in first["source"]
    assert "second.jsonl:row 0" in last["source"]
    assert Path(first["images"][0]).parent == tiny_records.image_folder.resolve()
    assert Path(last["images"][0]).parent == (mixture.parent / "other").resolve()
    assert Path(first["images"][0]).name == Path(last["images"][0]).name
    images = samples.images()
    assert images[4] != images[5], "another folder, another picture"
    assert images[0] == images[1]
    assert images[7] == -1
    assert (samples.lengths() > 0).tolist() == [True] * 7 + [False]


def test_a_row_that_is_seen_again_meets_itself_nowhere(processor, tmp_path: Path) -> None:
    file = records_about([["a.png"], ["a.png"], ["b.png"]], tmp_path / "rows.json")
    samples = Mixture.draw(library_of(processor, (file, None), weights=(2.0,)), seed=1)
    assert samples.rows.tolist() == [0, 1, 2, 0, 1, 2]
    images = samples.images()
    assert images[0] == images[1]
    assert images[3] == images[4] != images[0]
    assert len(set(images.tolist())) == 4


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_no_picture_is_on_both_sides_of_the_split(processor, tmp_path: Path, share: float) -> None:
    random = np.random.default_rng(0)
    names = [f"{number}.png" for number in range(60)]
    pictures = [random.choice(names, size=1 + (i % 20 == 0), replace=False).tolist() for i in range(200)]
    one = records_about(pictures[:150], tmp_path / "one.json")
    two = records_about(pictures[150:], tmp_path / "two.json")
    library = library_of(processor, (one, tmp_path), (two, tmp_path))
    held_out = library.held_out(share, seed=3)
    sides = [
        {name for row in np.flatnonzero(side) for name in pictures[row]} for side in (held_out, ~held_out)
    ]
    assert not sides[0] & sides[1]
    assert abs(held_out.mean() - share) < 0.2, "families of a few rows each"
    assert np.array_equal(held_out, library.held_out(share, seed=3))
    assert not np.array_equal(held_out, library.held_out(share, seed=4))


def test_a_split_that_leaves_nothing_is_refused(processor, tmp_path: Path) -> None:
    library = library_of(processor, (records_about([["a.png"]] * 3, tmp_path / "rows.json"), None))
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        library.held_out(0.2, seed=1)


def test_a_bad_row_is_not_replaced_by_one_that_is_held_out(processor, tiny_records, tmp_path: Path) -> None:
    rows = [
        tiny_records.records[0],
        {**tiny_records.records[0], "image": "gone.png"},
        *tiny_records.records[2:4],
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    part = (tmp_path / "rows.json", tiny_records.image_folder)
    library = library_of(processor, part, on_bad_sample="skip")
    item = Mixture(library, np.array([0, 1, 3]))[1]
    assert "rows.json:row 3" in item["source"]
    assert "gone.png" in item["bad_samples"][0]


def test_the_order_is_the_same_on_any_number_of_processes(processor, mixture: Path) -> None:
    sources = read_sources([mixture])
    library = library_of(
        processor, *((source.path, source.image_folder) for source in sources), weights=(9, 5.5)
    )
    samples = Mixture.draw(library, seed=1)

    def order(processes: int, shared: bool) -> list[int]:
        args = SimpleNamespace(
            order_seed=1, samples_per_step=8, world_size=processes, share_image_prefix=shared,
            per_device_train_batch_size=2, gradient_accumulation_steps=4 // processes,
        )  # fmt: skip
        return list(EpochSampler.of(samples, args, grouped=True))

    for shared in (False, True):
        assert order(1, shared) == order(2, shared) == order(4, shared)
        assert sorted(order(1, shared)) == list(range(len(samples)))


# ---- whole runs ----


def test_validation_needs_to_know_its_folder(
    flags, mixture: Path, tiny_records, tmp_path: Path, refused
) -> None:
    place = flags.index("--data_path")
    flags[place + 1 : place + 2] = [str(mixture.parent / name) for name in ("first.json", "second.jsonl")]
    folders = ["--image_folder", str(tiny_records.image_folder), str(mixture.parent / "other")]
    run = [*flags, *folders, "--output_dir", str(tmp_path / "run"), "--eval_steps", "9"]
    assert "name it in a mixture file" in refused(main, [*run, "--eval_data_path", str(tiny_records.file)])


def test_a_plan_counts_each_dataset(flags, mixture: Path, tmp_path: Path, capsys) -> None:
    flags[flags.index("--data_path") + 1] = str(mixture)
    written = tmp_path / "plan.json"
    main([*flags, "--dry_run", "True", "--plan_json", str(written), "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "· second  7 samples of 3 rows, weight 2.3, 58.3% of all" in said
    plan = json.loads(written.read_text())
    assert plan["rows"] == 12
    shares = plan["token_shares"]
    assert f"tokens of second  {shares['second']:.1%}" in said
    assert sum(shares.values()) == pytest.approx(1)
    validated = ["--val_share", "0.4", "--eval_steps", "5", "--output_dir", str(tmp_path)]
    main([*flags, "--dry_run", "True", *validated])
    assert "validation  " in capsys.readouterr().out


WAYS = ["--share_image_prefix", "True", "--packing", "True", "--max_tokens_per_micro_batch", "300",
        "--group_by_modality_length", "True"]  # fmt: skip

# Writes down what is read and trained on, step by step; ends like a killed process when it is told to.
RECORDED = """
import os, signal, sys
from geochat.train import dataset, train, trainer

def note(words):
    with open(os.path.join(os.environ["SEEN"], os.environ.get("RANK", "0")), "a") as file:
        file.write(words + "\\n")

step, read = trainer.Trainer.training_step, dataset.InstructionDataset.read

def recorded(self, model, inputs, *args):
    note(f"step {self.state.global_step} {','.join(sorted(inputs['sources']))}")
    if str(self.state.global_step) == os.environ.get("DIE_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, model, inputs, *args)

def counted(self, index):
    note(f"read {self.store.where(index)}")
    return read(self, index)

trainer.Trainer.training_step, dataset.InstructionDataset.read = recorded, counted
train.main(sys.argv[1:])
"""


def seen(folder: Path) -> dict[int, list[str]]:
    """Step → its samples, those of all processes together."""
    steps: dict[int, list[str]] = {}
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            kind, number, *sources = line.split(" ", 2)
            if kind == "step":
                steps.setdefault(int(number), []).extend(sources[0].split(","))
    return {step: sorted(sources) for step, sources in sorted(steps.items())}


@pytest.fixture
def recorded(start, finish, tmp_path: Path) -> Callable[..., Path]:
    """Runs the program, in this process unless it is launched or dies, and returns the folder of what it has seen."""
    script = tmp_path / "recorded.py"
    script.write_text(RECORDED)

    def run(name: str, arguments: list[str], launcher: tuple[str, ...] = (), die_at: int = -1) -> Path:
        folder = tmp_path / f"seen-{name}"
        folder.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SEEN", str(folder))
            patch.setenv("DIE_AT", str(die_at))
            if launcher or die_at >= 0:
                process = start(arguments, (*launcher, str(script)))
                finish(process, expected=-signal.SIGKILL if die_at >= 0 else 0)
                return folder
            patch.setattr(sys, "argv", [str(script), *arguments])
            patch.setattr(Trainer, "training_step", Trainer.training_step)  # put back when the run is over
            patch.setattr(InstructionDataset, "read", InstructionDataset.read)
            runpy.run_path(str(script))
        return folder

    return run


def with_mixture(flags: list[str], mixture: Path) -> list[str]:
    flags[flags.index("--data_path") + 1] = str(mixture)
    return [*flags, *WAYS, "--lora_dropout", "0"]


@pytest.mark.slow
def test_killed_and_resumed_in_the_middle_of_an_epoch_sees_what_is_left(
    flags, mixture: Path, recorded, tmp_path: Path
) -> None:
    """Six steps an epoch; killed in step 10, resumed from the save at step 8."""
    run = [*with_mixture(flags, mixture), "--save_steps", "4", "--num_train_epochs", "2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = seen(recorded("whole", [*run, "--output_dir", str(whole)]))
    assert list(expected) == list(range(12))
    assert {len(sources) for sources in expected.values()} == {2}
    killed = seen(recorded("killed", [*run, "--output_dir", str(broken)], die_at=10))
    assert killed == {step: expected[step] for step in range(11)}
    folder = recorded("resumed", [*run, "--output_dir", str(broken), "--resume_from_checkpoint", "True"])
    assert seen(folder) == {step: expected[step] for step in range(8, 12)}
    reads = [line for line in (folder / "0").read_text().splitlines() if line.startswith("read ")]
    assert len(reads) == 4 * 2, "nothing is read to be skipped"
    last = load_file(whole / "adapter_model.safetensors")
    for key, tensor in load_file(broken / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, last[key], atol=1e-5, rtol=0, msg=key)


@pytest.mark.slow
@everything
def test_two_processes_and_a_resume_on_two_or_one_see_the_same(
    flags, mixture: Path, recorded, torchrun, tmp_path: Path
) -> None:
    """Three steps an epoch; resumed in the middle of the second."""
    run = [*with_mixture(flags, mixture), "--save_steps", "4", "--num_train_epochs", "2"]
    run += ["--global_batch_size", "4", "--output_dir"]
    launcher, folder, name = torchrun[:-2], tmp_path / "two", "adapter_model.safetensors"
    expected = seen(recorded("two", [*run, str(folder)], launcher))
    assert [len(sources) for sources in expected.values()] == [4] * 6
    assert seen(recorded("one", [*run, str(tmp_path / "one")])) == expected
    assert expected[3] != expected[0]
    last = load_file(folder / name)
    again = [*run, str(folder), "--resume_from_checkpoint", str(folder / "checkpoint-4")]
    for processes, how in (("two", launcher), ("one", ())):
        (folder / name).unlink()
        assert seen(recorded(f"again-{processes}", again, how)) == {4: expected[4], 5: expected[5]}
        for key, tensor in load_file(folder / name).items():
            torch.testing.assert_close(tensor, last[key], atol=1e-5, rtol=1e-4, msg=key)


def test_data_that_changed_since_the_save_are_refused(
    flags, mixture: Path, tmp_path: Path, refused, capsys
) -> None:
    run = [*flags, "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--save_steps", "1"]
    run[run.index("--data_path") + 1] = str(mixture)
    main(run)
    again = [*run, "--max_steps", "2", "--resume_from_checkpoint", "True"]
    text = mixture.read_text()
    for change, said in (
        (
            ("weight: 2.3", "weight: 2.6"),
            "second.jsonl: its weight was 2.3 when .*checkpoint-1 was saved, now it is 2.6",
        ),
        (("image_folder: other", "image_folder: ."), "second.jsonl: its image folder was .*other"),
    ):
        mixture.write_text(text.replace(*change))
        assert re.search(said, refused(main, again))
    mixture.write_text(text.splitlines()[0])
    assert "was trained on 2 datasets, now there are 1" in refused(main, again)
    mixture.write_text(text)
    for more, said in (
        (["--data_seed", "7"], "--data_seed 42, now it is 7"),
        (["--global_batch_size", "4"], "--global_batch_size 2, now it is 4"),
        (["--val_share", "0.3", "--eval_steps", "9"], "--val_share None, now it is 0.3"),
        (["--share_image_prefix", "True"], "--share_image_prefix False, now it is True"),
    ):
        assert said in refused(main, [*again, *more])
    rows = mixture.parent / "second.jsonl"
    rows.write_text(rows.read_text().replace("planes", "ships"))
    line = refused(main, again)
    assert f"{rows} has changed since" in line
    assert "--allow_changed_data True" in line
    main([*again, "--allow_changed_data", "True"])
    assert "has changed since" in capsys.readouterr().out
    assert (tmp_path / "run/checkpoint-2").exists()
