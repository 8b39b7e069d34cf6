"""Records and captions of many pictures in a few arrays, which may be mapped files.

A million Python objects take many seconds to make and a gigabyte to hold. So a record or a caption is made when it is
asked for; what is asked of all at once (splits, styles, which captions are shared) is answered by the arrays.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, overload

import numpy as np

from pokediff.data.records import Record, split_of

Arrays = dict[str, np.ndarray]

DEFAULTS = {column.name: column.default for column in fields(Record)}
# What is asked of all records at once: stored as numbers, with the list of their values.
CODED: dict[str, Callable[[Record], Any]] = {
    "root": lambda record: record.root,
    "split": split_of,
    "style": lambda record: record.style or "",
    "kind": lambda record: record.kind or "",
    "species": lambda record: (record.is_species and record.name) or "",
    "written": lambda record: bool(record.captions),
}


class Ragged(Sequence[Any]):
    """Rows of different lengths, one after another in one array (K,); row i begins at starts[i], (N + 1,) int64."""

    def __init__(self, values: np.ndarray, starts: np.ndarray) -> None:
        self.values, self.starts = values, starts

    @classmethod
    def of(cls, rows: Iterable[Any], dtype: Any) -> Ragged:
        """Rows: sequences of numbers, or bytes as uint8."""
        rows = list(rows)
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        if rows and isinstance(rows[0], bytes):
            return cls(np.frombuffer(b"".join(rows), dtype), starts)
        return cls(np.fromiter((value for row in rows for value in row), dtype, int(starts[-1])), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, which: Any) -> Any:  # an array for an index, a list of arrays for a slice
        if isinstance(which, slice):
            return [self[row] for row in range(len(self))[which]]
        row = range(len(self))[which]
        return self.values[self.starts[row] : self.starts[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    def lengths(self) -> np.ndarray:
        return np.diff(self.starts)

    def pick(self, index: np.ndarray) -> Ragged:
        """These rows, copied."""
        lengths = self.lengths()[index]
        starts = np.concatenate([[0], np.cumsum(lengths)])
        moved = np.repeat(self.starts[index] - starts[:-1], lengths)
        return Ragged(self.values[moved + np.arange(starts[-1])], starts)

    def only(self, keep: np.ndarray) -> Ragged:
        """Every row without the values that `keep` (K,) bool does not mark."""
        return Ragged(self.values[keep], np.concatenate([[0], np.cumsum(keep)])[self.starts])

    def row(self) -> np.ndarray:
        """(K,): the row of each value."""
        return np.repeat(np.arange(len(self)), self.lengths())

    def reduced(self, values: np.ndarray, by: np.ufunc) -> np.ndarray:
        """(N,) int64: of every row `by` (np.add, np.minimum) of its part of `values` (K,); 0 of an empty row."""
        result = np.zeros(len(self), np.int64)
        filled = np.flatnonzero(self.lengths())
        if len(filled):
            result[filled] = by.reduceat(values, self.starts[filled], dtype=np.int64)
        return result

    def arrays(self, name: str) -> Arrays:
        return {name: self.values, f"{name}-starts": self.starts}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], name: str) -> Ragged:
        return cls(arrays[name], arrays[f"{name}-starts"])


class Texts(Sequence[str]):
    """Texts that are made from their letters when they are asked for."""

    def __init__(self, letters: Ragged) -> None:
        self.letters = letters

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        return cls(Ragged.of([text.encode("utf-8", "surrogatepass") for text in texts], np.uint8))

    def __len__(self) -> int:
        return len(self.letters)

    @overload
    def __getitem__(self, which: int) -> str: ...
    @overload
    def __getitem__(self, which: slice) -> list[str]: ...
    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self[row] for row in range(len(self))[which]]
        return self.letters[which].tobytes().decode("utf-8", "surrogatepass")

    def lengths(self) -> np.ndarray:
        """(N,): their letters; a byte of UTF-8 begins one, or goes on with 10xxxxxx."""
        return self.letters.reduced(self.letters.values & 0xC0 != 0x80, np.add)


class Records(Sequence[Record]):
    """Records, each made when it is asked for."""

    def __init__(
        self, rows: Texts, codes: Mapping[str, np.ndarray], values: Mapping[str, list[Any]], places: np.ndarray
    ) -> None:
        self.rows, self.codes, self.values, self.places = rows, codes, values, places

    @classmethod
    def of(cls, records: Sequence[Record]) -> Records:
        if isinstance(records, Records):
            return records
        codes, values = {}, {}
        for name, value_of in CODED.items():
            known: dict[Any, int] = {}
            numbers = (known.setdefault(value_of(record), len(known)) for record in records)
            codes[name], values[name] = np.fromiter(numbers, np.int32, len(records)), list(known)
        return cls(Texts.of(map(_row, records)), codes, values, np.arange(len(records)))

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, which: int) -> Record: ...
    @overload
    def __getitem__(self, which: slice) -> list[Record]: ...
    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self[row] for row in range(len(self))[which]]
        row = int(self.places[range(len(self))[which]])
        columns: dict[str, Any] = json.loads(self.rows[row])
        known: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in columns.items()}
        return Record(**known, root=self.values["root"][self.codes["root"][row]])

    def pick(self, index: np.ndarray) -> Records:
        return Records(self.rows, self.codes, self.values, self.places[index])

    def coded(self, name: str) -> tuple[np.ndarray, list[Any]]:
        """A column of CODED: (N,) positions in the list of its values."""
        return self.codes[name][self.places], self.values[name]

    def column(self, name: str, dtype: Any) -> np.ndarray:
        """The values (N,) of a column of CODED."""
        codes, values = self.coded(name)
        return np.array(values, dtype)[codes]

    def arrays(self) -> Arrays:
        """All rows, also those that were not picked, but not their `root`: a folder may move."""
        values = np.frombuffer(json.dumps(dict(self.values)).encode(), np.uint8)
        codes = {f"records-{name}": codes for name, codes in self.codes.items()}
        return {**self.rows.letters.arrays("records"), **codes, "records-values": values}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], roots: Mapping[str, str]) -> Records:
        """`roots`: the folders by the names that they had."""
        values = json.loads(arrays["records-values"].tobytes())
        values["root"] = [roots[root] for root in values["root"]]
        rows = Ragged.from_arrays(arrays, "records")
        return cls(Texts(rows), {name: arrays[f"records-{name}"] for name in CODED}, values, np.arange(len(rows)))


def _row(record: Record) -> str:
    columns = {name: value for name, value in vars(record).items() if name != "root" and value != DEFAULTS[name]}
    return json.dumps(columns)


class Captions(Sequence[tuple[str, ...]]):
    """The captions of every picture: each different text once, and the numbers of every picture's texts."""

    def __init__(self, texts: Texts, numbers: Ragged) -> None:
        self.texts, self.numbers = texts, numbers

    @classmethod
    def of(cls, captions: Sequence[Sequence[str]]) -> Captions:
        if isinstance(captions, Captions):
            return captions
        known: dict[str, int] = {}
        numbers = [[known.setdefault(caption, len(known)) for caption in several] for several in captions]
        return cls(Texts.of(known), Ragged.of(numbers, np.int32))

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, which: int) -> tuple[str, ...]: ...
    @overload
    def __getitem__(self, which: slice) -> list[tuple[str, ...]]: ...
    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return [self[row] for row in range(len(self))[which]]
        return tuple(self.texts[number] for number in self.numbers[which])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Captions) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def pick(self, index: np.ndarray) -> Captions:
        return Captions(self.texts, self.numbers.pick(index))

    def used(self) -> np.ndarray:
        """The numbers of all texts that pictures have, without the empty one, in the order of their first picture."""
        numbers = self.numbers.values
        first = np.full(len(self.texts), len(numbers))
        first[numbers[::-1]] = np.arange(len(numbers))[::-1]  # of several places the last that is written: the first
        first[self.texts.letters.lengths() == 0] = len(numbers)
        found = np.flatnonzero(first < len(numbers))
        return found[np.argsort(first[found], kind="stable")]

    def arrays(self) -> Arrays:
        return self.texts.letters.arrays("texts") | self.numbers.arrays("captions")

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Captions:
        return cls(Texts(Ragged.from_arrays(arrays, "texts")), Ragged.from_arrays(arrays, "captions"))
