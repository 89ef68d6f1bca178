"""Questions spread over processes: none lost, none doubled, whatever their number and wherever they are stopped."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

from geochat.eval.answers import Item
from geochat.eval.files import Row, read_rows
from geochat.eval.progress import ANSWERS, Progress
from geochat.eval.shards import Shard

IDENTITY = {"model": "m", "decoding": {"max_new_tokens": 5}}


def questions(count: int, seed: int) -> list[Item]:
    """About pictures of one to seven questions each, some about none, in mixed order."""
    draw = random.Random(seed)
    pictures = [None, *(Path(f"{i}.png") for i in range(1 + count // 3))]
    return [Item({"question_id": i, "prompt": f"{i}?"}, draw.choice(pictures)) for i in range(count)]


@pytest.mark.parametrize("processes", range(1, 10))
def test_every_question_is_in_one_share(processes: int) -> None:
    for count in range(41):
        items = questions(count, seed=100 * count + processes)
        shares = [Shard(i, processes).share(items) for i in range(processes)]
        assert sorted(item.key for share in shares for item in share) == sorted(item.key for item in items)
        groups = [{item.group for item in share} for share in shares]
        assert sum(map(len, groups)) == len(set().union(*groups))  # a picture's questions stay together
        sizes = [len(share) for share in shares]
        widest = max((sum(i.group == item.group for i in items) for item in items), default=0)
        assert max(sizes) - min(sizes) <= widest


def answered(item: Item, text: str | None = "yes") -> Row:
    return {**item.row, "text": text, **IDENTITY}


def write(progress: Progress, rows: list[Row], torn: str = "") -> None:
    with progress.file.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + torn)


@settings(max_examples=60)
@given(
    count=st.integers(1, 40),
    earlier=st.lists(st.integers(1, 9), max_size=3),
    processes=st.integers(1, 9),
    seed=st.integers(0, 10**6),
)
def test_stopped_with_one_number_of_shards_and_ended_with_another(
    count: int, earlier: list[int], processes: int, seed: int
) -> None:
    draw, items = random.Random(seed), questions(count, seed)
    asked: list[str] = []
    with TemporaryDirectory() as folder:
        for number in earlier:  # each killed somewhere, in the middle of a line
            for index in range(number):
                progress = Progress(Path(folder), Shard(index, number), IDENTITY)
                left = progress.begin(progress.shard.share(items))
                done = left[: draw.randrange(len(left) + 1)]
                write(progress, [answered(item) for item in done], torn='{"question_id": 0, "te')
                asked += [item.key for item in done]
        order = draw.sample(range(processes), processes)
        ended = []
        for index in order:
            progress = Progress(Path(folder), Shard(index, processes), IDENTITY)
            left = progress.begin(progress.shard.share(items))
            write(progress, [answered(item, None if item.key == "3" else "yes") for item in left])
            asked += [item.key for item in left]
            ended.append(progress.join(items, keep_others=False))
        rows = read_rows(Path(folder) / ANSWERS)
        assert [row["question_id"] for row in rows] == list(range(count))
        assert sorted(asked) == sorted(item.key for item in items)
        assert sum(joined is not None for joined in ended) >= 1
        assert [path.name for path in Path(folder).iterdir()] == [ANSWERS]


def test_shares_that_end_together_join_once(tmp_path: Path) -> None:
    """Both have written their last answer before either looks whether it is the last."""
    items = questions(20, seed=3)
    both = [Progress(tmp_path, Shard(i, 2), IDENTITY) for i in range(2)]
    for progress in both:
        write(progress, [answered(item, None) for item in progress.begin(progress.shard.share(items))])
    assert [progress.join(items, keep_others=False) is None for progress in both] == [False, True]
    assert len(read_rows(tmp_path / ANSWERS)) == 20


def test_asking_anew_needs_one_process(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--overwrite works with one process"):
        Progress(tmp_path, Shard(0, 2), IDENTITY).begin([], overwrite=True)


def test_numbers_of_a_share() -> None:
    assert Shard.parse("2/8") == Shard(2, 8)
    assert Shard(1, 2).split({"RANK": "3", "WORLD_SIZE": "4"}) == Shard(7, 8)
    assert Shard(1, 2).split({"WORLD_SIZE": "4"}) == Shard(1, 2)  # some clusters set it for every program
    for text in ("8/8", "0/0", "1", "-1/2", "a/b"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be I/N"):
            Shard.parse(text)
