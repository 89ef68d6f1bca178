"""Wording that drawn scenes and converted data sets share: prompts, places, plurals."""

from __future__ import annotations

from collections.abc import Sequence

SHORT = "Answer the question using a single word or phrase."
"""What follows a question whose answer is a word or a number (GeoChat-Bench)."""

DESCRIBE = "[grounding] Describe the image in detail."


def scene_prompt(classes: Sequence[str]) -> str:
    """GeoChat-Bench's question for the class of a scene."""
    listed = ", ".join(classes)
    return (
        f"Classify the given image in one of the following classes. Classes: {listed}. \n"
        "Answer in one word or a short phrase."
    )


def place_name(x: float, y: float) -> str:
    """Which ninth of the picture a point lies in: "top left" … "bottom right"; x and y in shares of its sides."""
    row = ("top", "", "bottom")[min(2, max(0, int(y * 3)))]
    column = ("left", "", "right")[min(2, max(0, int(x * 3)))]
    return " ".join(word for word in (row, column) if word) or "center"


def plural(noun: str) -> str:
    """Regular English plural: harbors, buses, factories; a name that is a plural already ("cars") stays."""
    if noun.endswith(("ss", "us", "x", "ch", "sh")):
        return f"{noun}es"
    if noun.endswith("s"):
        return noun
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}s"


def count_phrase(count: int, noun: str) -> str:
    """ "1 ship", "2 ships"."""
    return f"{count} {noun if count == 1 else plural(noun)}"


def with_article(noun: str) -> str:
    """ "a ship", "an airport"."""
    return f"{'an' if noun[:1].lower() in set('aeiou') else 'a'} {noun}"


def enumeration(parts: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + "".join(parts[-1:])
