"""The way in for conversation records: the only file that knows the LLaVA / GeoChat record format.

A record is one JSON object::

    {"id": "42", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat?"},
                                                     {"from": "gpt", "value": "A harbour."}]}

``image`` may be a string, a list of strings, or absent (a text-only sample). VHM's lists have ``source_dataset`` beside
it: the folder that the image lies in. Everything behind this file works on `Sample` and `Turn`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

IMAGE_TOKEN = "<image>"
"""What stands for an image in a turn's text, in the record format as in the chat templates."""

Role = Literal["user", "assistant"]

# "human"/"gpt" is what LLaVA writes; the other names occur in converted files.
_ROLES: dict[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_WRITTEN = {"user": "human", "assistant": "gpt"}


class ImageCountError(ValueError):
    """A record whose text does not hold one `<image>` for each of its images."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One side's words. In a user turn every `IMAGE_TOKEN` stands at the front, each followed by a newline."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: user and assistant alternate, the user begins, the assistant ends."""

    id: str
    images: tuple[str, ...]
    """Paths relative to the image folder; as many as there are `IMAGE_TOKEN`s in the turns."""
    turns: tuple[Turn, ...]

    @classmethod
    def from_record(cls, record: Any, where: str = "record") -> Sample:
        """Read one record of an instruction file.

        Every `<image>` of a turn is moved to the turn's front (LLaVA's `preprocess_multimodal`), and a first
        turn that is not the human's is dropped (LLaVA's `preprocess_v1`).

        Raises:
            ValueError: `where` and the reason: a missing key, a wrong type, an unknown speaker, two turns of
                one side in a row, or a question without an answer.
            ImageCountError: a number of `<image>` unlike the number of images, or one in an answer.
        """
        if not isinstance(record, dict):
            raise ValueError(f"{where}: expected an object, found {type(record).__name__}")
        images = _images(record.get("image"), where)
        if folder := record.get("source_dataset"):
            images = tuple(f"{folder}/{name}" for name in images)
        turns = read_turns(record, where)
        marked = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
        if marked != len(images):
            raise ImageCountError(f"{where}: {marked} {IMAGE_TOKEN} in the text for {len(images)} image(s)")
        return cls(str(record.get("id", "")), images, turns)

    def to_record(self) -> dict[str, Any]:
        """The record that `from_record` reads back as this sample."""
        record: dict[str, Any] = {"id": self.id}
        if self.images:
            record["image"] = self.images[0] if len(self.images) == 1 else list(self.images)
        record["conversations"] = [{"from": _WRITTEN[turn.role], "value": turn.text} for turn in self.turns]
        return record


def read_turns(record: dict[str, Any], where: str = "record") -> tuple[Turn, ...]:
    """The conversation of a record alone, whatever number of images its text marks. Raises: ValueError, as
    `Sample.from_record`."""
    return _turns(record.get("conversations"), where)


def user_turn(text: str, images: int = 0) -> Turn:
    """A question about `images` images; marks already in `text` count, missing ones are put in front."""
    missing = max(0, images - text.count(IMAGE_TOKEN))
    return Turn("user", _marks_in_front(IMAGE_TOKEN * missing + text))


def _images(value: Any, where: str) -> tuple[str, ...]:
    if value is None or value == "":
        return ()
    images = [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(name, str) and name for name in images):
        raise ValueError(f'{where}: "image" must be a path or a list of paths, found {value!r:.80}')
    return tuple(images)


def _turns(value: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f'{where}: "conversations" must be a list of turns, found {value!r:.80}')
    turns = [_turn(turn, f"{where}: turn {number}") for number, turn in enumerate(value)]
    first = 0 if turns[0].role == "user" else 1
    for number, turn in enumerate(turns[first:], first):
        expected = "assistant" if (number - first) % 2 else "user"
        if turn.role != expected:
            raise ValueError(f"{where}: turn {number}: two {turn.role} turns in a row")
    if len(turns) == first:
        raise ValueError(f"{where}: turn 0 is the assistant's and no question follows")
    if turns[-1].role != "assistant":
        raise ValueError(f"{where}: turn {len(turns) - 1} has no answer")
    return tuple(turns[first:])


def _turn(value: Any, where: str) -> Turn:
    if not isinstance(value, dict) or not isinstance(value.get("from"), str):
        raise ValueError(f'{where}: expected {{"from": ..., "value": ...}}, found {value!r:.80}')
    role, text = _ROLES.get(value["from"]), value.get("value")
    if role is None:
        # LLaVA drops any first turn that is not human, whatever its name ("system" occurs).
        if where.endswith("turn 0"):
            role = "assistant"
        else:
            raise ValueError(f'{where}: unknown speaker {value["from"]!r:.40}; expected "human" or "gpt"')
    if not isinstance(text, str):
        raise ValueError(f'{where}: "value" must be text, found {text!r:.40}')
    if IMAGE_TOKEN in text:
        if role == "assistant":
            raise ImageCountError(f"{where}: an answer contains {IMAGE_TOKEN}")
        text = _marks_in_front(text)
    return Turn(role, text)


def _marks_in_front(text: str) -> str:
    marks = text.count(IMAGE_TOKEN)
    if not marks:
        return text
    return (f"{IMAGE_TOKEN}\n" * marks + text.replace(IMAGE_TOKEN, "").strip()).strip()
