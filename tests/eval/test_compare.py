"""Two runs on the same questions: paired figures, exact tests, and the names of what has changed."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("scipy")

from geochat.eval.benchmark import Benchmark
from geochat.eval.compare import Run, main, pair
from geochat.eval.files import read_json, write_json, write_rows
from geochat.eval.score import judge, summarise, write_scores

SQUARE = [[10, 10], [50, 10], [50, 50], [10, 50]]
EXACT, NOTHING = "{<10><10><50><50>|<0>}", "nothing"


def write(folder: Path, scenes: dict[str, str], boxes: dict[str, str]) -> Path:
    """A scored run: the truth of every scene is "harbour", of every box question one square."""
    common = {"prompt": "?", "width": 100, "height": 100}
    rows = [{"question_id": key, "task": "scene", "ground_truth": "harbour", "text": text, **common}
            for key, text in scenes.items()]  # fmt: skip
    rows += [{"question_id": key, "task": "refer", "ground_truth": [SQUARE], "text": text, **common}
             for key, text in boxes.items()]  # fmt: skip
    benchmark = Benchmark.load("nano")
    judged = judge(rows, benchmark)
    write_rows(folder / "answers.jsonl", rows)
    write_scores(folder, summarise(judged, benchmark, total=len(rows)), judged)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Of ten common scenes A has 3 right, B has 8: six gained, one lost. B finds one box more. One scene is A's alone."""
    scenes_a = {f"s{i}": "harbour" if i < 3 else "field" for i in range(10)}
    scenes_b = {f"s{i}": "harbour" if 1 <= i < 9 else "field" for i in range(10)}
    a = write(tmp_path / "a", {**scenes_a, "extra": "harbour"}, {"r0": EXACT, "r1": NOTHING})
    return [a, write(tmp_path / "b", scenes_b, {"r0": EXACT, "r1": EXACT})]


def test_only_common_questions_count(runs: list[Path]) -> None:
    scene, refer = pair(*(Run.load(path, path.name) for path in runs))
    assert (scene.n, scene.values, scene.test) == (10, (0.3, 0.8), "McNemar")
    assert (scene.better, scene.worse) == ([f"s{i}" for i in range(3, 9)], ["s0"])
    assert scene.p == pytest.approx(
        2 * (1 + 7) / 2**7
    )  # of seven changes at most one to the worse, either way
    assert scene.interval[0] <= 0.5 <= scene.interval[1]
    assert (refer.n, refer.values, refer.better, refer.test) == (2, (0.5, 1.0), ["r1"], "bootstrap")


def test_a_run_against_itself(runs: list[Path]) -> None:
    run = Run.load(runs[0], "a")
    assert all(one.p == 1 and not one.better + one.worse for one in pair(run, run))


def test_the_command_names_what_differs(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    main([*map(str, runs), "--names", "base", "fine-tuned"])
    printed = capsys.readouterr().out
    assert "| scene: accuracy | 10 | 30.00 | 80.00 | +50.00 |" in printed
    assert "only in base (1): extra" in printed
    assert "scene, better in fine-tuned (6): s3, s4, s5, s6, s7, s8" in printed
    assert "scene, worse in fine-tuned (1): s0" in printed
    assert "refer, better in fine-tuned (1): r1" in printed


def test_runs_without_answers_beside_them(runs: list[Path]) -> None:
    for path in runs:
        (path / "answers.jsonl").unlink()
    assert pair(*(Run.load(path, path.name) for path in runs))[0].values == (0.3, 0.8)


def test_refusals(runs: list[Path], tmp_path: Path, refused) -> None:
    other = write(tmp_path / "other", {"x": "harbour"}, {})
    assert "no question in common" in refused(main, [str(runs[0]), str(other)])
    text = (other / "scores.json").read_text().replace('"nano"', '"aid"')
    (other / "scores.json").write_text(text)
    assert "aid cannot be compared with nano" in refused(main, [str(runs[0]), str(other)])
    scores = read_json(runs[1] / "scores.json")
    write_json(runs[1] / "scores.json", scores | {"iou": "hbb"})
    assert "scored in different ways" in refused(main, [*map(str, runs)])
    (other / "samples.jsonl").unlink()
    assert "samples.jsonl: cannot be read" in refused(main, [str(runs[0]), str(other)])
