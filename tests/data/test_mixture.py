"""Mixtures: what flags and files name, how often rows are drawn, and errors that name the entry."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geochat.data.mixture import Source, read_sources
from geochat.data.verify import main as verify


def row(image: str) -> dict:
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    return {"id": "x", "image": image, "conversations": turns}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """a.json with four rows, b.jsonl with two, folders x and y."""
    (tmp_path / "a.json").write_text(json.dumps([row("1.png")] * 4))
    (tmp_path / "b.jsonl").write_text((json.dumps(row("2.png")) + "\n") * 2)
    for folder in "xy":
        (tmp_path / folder).mkdir()
    return tmp_path


def test_a_mixture_file_and_the_flags_name_the_same(files: Path) -> None:
    mixture = files / "mixture.yaml"
    mixture.write_text(
        "- {path: a.json, image_folder: x}\n- {path: b.jsonl, image_folder: y, weight: 0.5, name: few}\n"
    )
    named = read_sources([mixture])
    flags = read_sources([files / "a.json", files / "b.jsonl"], [files / "x", files / "y"], [1, 0.5])
    for one, other in zip(named, flags, strict=True):
        assert (one.path, one.image_folder, one.weight) == (other.path, other.image_folder, other.weight)
    assert [source.name for source in named] == ["a.json", "few"]


def test_one_folder_serves_all_that_name_none(files: Path) -> None:
    (files / "mixture.yml").write_text(f"- path: {files}/a.json\n- path: b.jsonl\n  image_folder: y\n")
    folders = [source.image_folder for source in read_sources([files / "mixture.yml"], [files / "x"])]
    assert folders == [files / "x", files / "y"]
    both = [files / "a.json", files / "b.jsonl"]
    assert [source.image_folder for source in read_sources(both, [files / "x"])] == [files / "x"] * 2
    assert [source.image_folder for source in read_sources(both)] == [None] * 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- path: [", "not YAML"),
        ("path: a.json", "expected a list"),
        ("- image_folder: x", "entry 1: expected the keys path"),
        ("- path: a.json\n- path: b.jsonl\n  wieght: 2", "entry 2: unknown key wieght"),
        ("- path: a.json\n  weight: many", "entry 1: weight must be a number, found 'many'"),
        ("- path: a.json\n  weight: 0", "above 0, found 0"),
        ("- path: a.json\n  weight: .nan", "above 0, found nan"),
        ("- path: a.json\n  name: 7", "entry 1: name must be text, found 7"),
        ("- path: a.json\n- path: x/../a.json", "entry 2, .*a.json: the file is named twice"),
        ("- path: a.json\n- path: gone.json", "entry 2, .*gone.json: no such file"),
    ],
)
def test_what_is_wrong_is_named_with_its_entry(files: Path, text: str, said: str) -> None:
    (files / "mixture.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as caught:
        read_sources([files / "mixture.yaml"])
    assert "mixture.yaml" in str(caught.value)


def test_flags_that_do_not_go_together_are_refused(files: Path) -> None:
    a, b, mixture = files / "a.json", files / "b.jsonl", files / "mixture.yaml"
    mixture.write_text("- path: a.json\n")
    for arguments, said in (
        (([a, b], [], [1.0]), "1 --data_weights for 2"),
        (([a], ["x", "y"], []), "2 --image_folder for 1"),
        (([mixture, b], [], []), "stands alone"),
        (([mixture], [], [2.0]), "holds the weights"),
        (([mixture.with_name("gone.yaml")], [], []), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=said):
            read_sources(*arguments)
    with pytest.raises(ValueError, match="z: no such folder"):
        read_sources([a], [files / "z"])[0].require_images()


@given(st.integers(0, 50), st.floats(0.01, 6), st.integers(0, 5))
def test_rows_are_drawn_as_often_as_the_weight_says(rows: int, weight: float, seed: int) -> None:
    source = Source(Path(), None, weight, "", "")
    numbers = 7 * np.arange(rows)
    drawn = source.draw(numbers, np.random.default_rng(seed))
    assert len(drawn) == source.count(rows)
    assert abs(len(drawn) - weight * rows) <= 0.5
    counts = np.bincount(np.searchsorted(numbers, drawn), minlength=rows)
    assert rows == 0 or counts.max() - counts.min() <= 1
    assert np.array_equal(drawn, source.draw(numbers, np.random.default_rng(seed)))


def test_the_linter_reads_a_mixture(files: Path, capsys: pytest.CaptureFixture[str], refused) -> None:
    (files / "mixture.yaml").write_text(
        "- {path: a.json, image_folder: x}\n- {path: b.jsonl, image_folder: y, weight: 2, name: twice}\n"
    )
    report = files / "report.json"
    assert verify([str(files / "mixture.yaml"), "--quiet", "--json", str(report)]) == 1
    said = capsys.readouterr().out
    assert "a.json: 4 rows, 4 with problems" in said
    assert "twice: 4 samples of 2 rows, weight 2, 50.0% of all" in said
    assert [part["rows"] for part in json.loads(report.read_text())["datasets"]] == [4, 2]
    (files / "y").rmdir()
    said = refused(verify, [str(files / "mixture.yaml"), "--quiet"])
    assert "entry 2, " in said
    assert "y: no such folder" in said
