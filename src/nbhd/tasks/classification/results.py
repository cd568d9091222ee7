"""What classification says about a picture, and the ways to write it down."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from typing import IO, Any, Protocol

from nbhd._text import pad, printable, valid_unicode, width
from nbhd.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Score:
    """A label and its probability, 0 to 1."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Classification:
    """The answer for one picture.

    Attributes:
        path: the file, or None if the picture was given as bytes or as an image.
        predictions: the best labels, most probable first; empty if there was an error.
        error: why the picture could not be classified, or None.
    """

    path: str | None
    predictions: tuple[Score, ...] = ()
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """``{"path": ..., "predictions": [{"label": ..., "probability": ...}, ...], "error": ...}``"""
        return {
            "path": self.path,
            "predictions": [{"label": score.label, "probability": score.probability} for score in self.predictions],
            "error": self.error,
        }


class Writer(Protocol):
    """Writes results one after the other; nothing is held back but a bounded buffer."""

    def write(self, result: Classification) -> None: ...

    def finish(self) -> None:
        """Write what ends the file. Not called after an error."""

    def close(self) -> None:
        """Let go of what is held; called in any case."""


class JsonWriter:
    """One JSON list, a picture a line."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._separator = "[\n"

    def write(self, result: Classification) -> None:
        text = json.dumps(result.as_dict(), ensure_ascii=False, allow_nan=False)
        self._stream.write(self._separator + valid_unicode(text))
        self._separator = ",\n"

    def finish(self) -> None:
        self._stream.write("[]\n" if self._separator == "[\n" else "\n]\n")

    def close(self) -> None:
        pass


class CsvWriter:
    """A row for each picture and label: path, rank (from 1), label, probability, error."""

    def __init__(self, stream: IO[str]) -> None:
        self._rows = csv.writer(stream, lineterminator="\n")
        self._rows.writerow(("path", "rank", "label", "probability", "error"))

    def write(self, result: Classification) -> None:
        path = valid_unicode(result.path or "")
        for rank, score in enumerate(result.predictions, 1):
            self._rows.writerow((path, rank, score.label, score.probability, ""))
        if result.error is not None:
            self._rows.writerow((path, "", "", "", valid_unicode(result.error)))

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class ParquetWriter:
    """A row for each picture, with the columns of the JSON: path, predictions (a list of structs), error."""

    ROWS = 4096  # rows of a row group, and the most that is held in memory

    def __init__(self, stream: IO[bytes]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        score = pa.struct([("label", pa.string()), ("probability", pa.float64())])
        self._schema = pa.schema([("path", pa.string()), ("predictions", pa.list_(score)), ("error", pa.string())])
        self._writer = pq.ParquetWriter(stream, self._schema)
        self._rows: list[dict[str, Any]] = []

    def write(self, result: Classification) -> None:
        row = result.as_dict()
        row["path"] = None if row["path"] is None else valid_unicode(row["path"])
        row["error"] = None if row["error"] is None else valid_unicode(row["error"])
        self._rows.append(row)
        if len(self._rows) >= self.ROWS:
            self._flush()

    def finish(self) -> None:
        self._flush()

    def close(self) -> None:
        self._writer.close()  # otherwise it writes its footer when it is collected, to a stream that is closed by then

    def _flush(self) -> None:
        import pyarrow as pa

        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows.clear()


class TableWriter:
    """For people: a line for each label, the picture named on its first.

    Args:
        paths, labels: columns of the widest of each; a path beyond ``WIDEST_PATH`` gets a line of its own.
        bold: highlight the best label by terminal codes.
    """

    WIDEST_PATH = 60
    WIDEST_LABEL = 40

    def __init__(self, stream: IO[str], paths: int, labels: int, bold: bool = False) -> None:
        self._stream = stream
        self._path_width = min(max(paths, len("picture")), self.WIDEST_PATH)
        self._label_width = min(max(labels, len("label")), self.WIDEST_LABEL)
        self._bold = bold
        self._head = True

    def write(self, result: Classification) -> None:
        if result.error is not None:  # said on standard error by name
            return
        if self._head:
            self._line("picture", "label", "probability")
            self._head = False
        name = printable(result.path or "")
        if width(name) > self._path_width:
            self._stream.write(f"{name}\n")
            name = ""
        for rank, score in enumerate(result.predictions):
            self._line(name, printable(score.label), f"{score.probability:11.1%}", self._bold and rank == 0)
            name = ""

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _line(self, name: str, label: str, probability: str, bold: bool = False) -> None:
        cells = f"{pad(label, self._label_width)}  {probability}"
        self._stream.write(f"{pad(name, self._path_width)}  {_BOLD + cells + _PLAIN if bold else cells}\n")


_BOLD, _PLAIN = "\x1b[1m", "\x1b[0m"

#: The formats by name, and whether they are text.
FORMATS = {"table": True, "json": True, "csv": True, "parquet": False}


def make_writer(format: str, stream: IO[Any]) -> Writer:
    """The writer of a format for machines: ``json`` or ``csv`` on a text stream, ``parquet`` on a binary one."""
    writers: dict[str, type[JsonWriter] | type[CsvWriter] | type[ParquetWriter]]
    writers = {"json": JsonWriter, "csv": CsvWriter, "parquet": ParquetWriter}
    if format not in writers:
        raise ArgumentError(f"format must be one of {', '.join(writers)}, got {format!r}.")
    return writers[format](stream)
