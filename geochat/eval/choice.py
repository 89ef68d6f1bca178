"""A value of a benchmark that may depend on a column of the row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from geochat.eval.files import Row


@dataclass(frozen=True)
class Choice:
    """One value for every row, or one for each value of a column (`default` for the values not listed)."""

    default: Any = None
    column: str = ""
    table: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, value: Any, where: str) -> Choice:
        if not isinstance(value, dict):
            return cls(value)
        table = dict(value)
        column = table.pop("column", None)
        if not isinstance(column, str):
            raise ValueError(f'{where}: a table needs `column = "…"`, the column it is chosen by')
        return cls(table.pop("default", None), column, table)

    def of(self, row: Row, where: str) -> Any:
        if not self.column:
            return self.default
        if self.column not in row:
            raise ValueError(f"{where}: the row has no column {self.column!r}")
        value = self.table.get(str(row[self.column]), self.default)
        if value is None:
            raise ValueError(
                f"{where}: {self.column} is {row[self.column]!r}; known: {', '.join(sorted(self.table))}"
            )
        return value

    def values(self) -> list[Any]:
        return [value for value in (self.default, *self.table.values()) if value is not None]
