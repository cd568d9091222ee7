"""Tables of labelled images from parquet files, image folders and hub data sets, all with the same few methods."""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nbhd.errors import ArgumentError, FileError, MissingExtra, WrongFile
from nbhd.tasks.images import decode_image
from nbhd.tasks.labels import number_labels, number_names

IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2", ".jfif", ".jpe",
)  # fmt: skip
SPLIT_ALIASES = {
    "validation": ("validation", "valid", "val", "eval"),
    "train": ("train", "training"),
    "test": ("test",),
}
NO_BYTES = "the row holds no image bytes"
IN_MEMORY_PARQUET_BYTES = 2 << 30  # more than this goes through the memory-mapped cache of `datasets`


class NoSuchSplit(WrongFile):
    """The data has no split of this name.

    Attributes:
        splits: those it has.
    """

    def __init__(self, where: str, split: str, splits: Sequence[str]) -> None:
        super().__init__(f"{where} has no split {split!r}. It has: {', '.join(splits)}.")
        self.splits = list(splits)


class ImageTable(ABC):
    """Rows of images with labels: what every kind of source gives."""

    labels: np.ndarray  # [N] int64, class of each row
    class_names: list[str]
    where: str  # what the user called the source, for messages
    has_columns: bool = True  # which have names

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def image_bytes(self, row: int) -> bytes:
        """The stored (encoded) image of a row; raises OSError if it cannot be read."""

    @abstractmethod
    def name(self, row: int) -> str:
        """What to call a row in messages."""

    def decode(self, row: int) -> Image.Image:
        """The image of a row, upright RGB; raises `FileError` naming it if it cannot be decoded."""
        try:
            return decode_image(self.image_bytes(row))
        except MemoryError as error:
            raise FileError(f"{self.name(row)}: not enough memory to read it") from error
        except (OSError, ValueError) as error:
            raise FileError(f"{self.name(row)}: {getattr(error, 'reason', None) or _one_line(error)}") from error


@dataclass
class Rows(ImageTable):
    """Some rows of a table."""

    table: ImageTable
    rows: np.ndarray

    def __post_init__(self) -> None:
        self.labels = self.table.labels[self.rows]
        self.class_names = self.table.class_names
        self.where = self.table.where
        self.has_columns = self.table.has_columns

    def __len__(self) -> int:
        return len(self.rows)

    def image_bytes(self, row: int) -> bytes:
        return self.table.image_bytes(int(self.rows[row]))

    def name(self, row: int) -> str:
        return self.table.name(int(self.rows[row]))


def open_images(
    source: str | os.PathLike[str],
    split: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    class_names: Sequence[str] | None = None,
) -> ImageTable:
    """Open the ``split`` of a data source for classification.

    Args:
        source: a parquet file; a folder of parquet files named after their split (``train.parquet``,
            ``data/train-00000-of-00004.parquet``); a folder of class folders, or of split folders of class folders;
            or the id of a data set on the hub.
        split: ``train``, ``validation`` (``val`` is found too), ``test`` or any name. A lone parquet file or a folder
            whose folders are the classes has no splits: it is taken whole.
        class_names: names that text labels and class folders are numbered by; default: those of the source, sorted.

    Raises:
        ArgumentError: ``source`` is empty.
        WrongFile: nothing there, no such split (`NoSuchSplit`), no images, no such column; `OtherClasses`: the
            source's names are not among ``class_names``.
        FileError: it cannot be read, or a row has a bad label.
        MissingExtra: hub data sets, and parquet files too large for memory, without the ``train`` extra.
    """
    check_source(source)
    path = Path(source)
    if path.is_file():
        if path.suffix != ".parquet":
            raise WrongFile(f"{source}: a single data file must be .parquet, got {path.suffix or 'no ending'!r}")
        return _open_parquet([path], str(source), split, image_column, label_column, class_names)
    if path.is_dir():
        files, splits = _parquet_files(path, split)
        if files:
            return _open_parquet(files, f"{source} ({split})", split, image_column, label_column, class_names)
        if splits:
            raise NoSuchSplit(str(source), split, splits)
        return _FolderImages(path, split, class_names)
    if is_missing(source):
        raise WrongFile(f"{source}: no such file or folder. Name a parquet file, a folder or a hub id.")
    return _open_hub(str(source), split, image_column, label_column, class_names)


def check_source(source: str | os.PathLike[str]) -> None:
    """Raise `ArgumentError` for an empty name, which would mean the current folder."""
    if not os.fspath(source):
        raise ArgumentError(
            "data must be named, got ''. Name a parquet file, a folder or a hub id; the current folder is '.'."
        )


def is_missing(source: str | os.PathLike[str]) -> bool:
    """Whether nothing of this name is here, and it is no hub id either."""
    return not Path(source).exists() and _looks_like_path(str(source))


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~", os.sep)) or text.count("/") != 1 or not re.fullmatch(r"[\w.-]+/[\w.-]+", text)
    )


def _aliases(split: str) -> tuple[str, ...]:
    return next((names for names in SPLIT_ALIASES.values() if split in names), (split,))


def _parquet_files(folder: Path, split: str) -> tuple[list[Path], list[str]]:
    """The parquet files of a split, and the names of all splits there are."""
    files = (
        sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet")) or sorted(folder.glob("*/*.parquet"))
    )
    by_split: dict[str, list[Path]] = {}
    for file in files:
        stem = re.sub(r"[-_.]?\d+(-of-\d+)?$", "", file.stem)
        name = file.parent.name if not stem or file.parent.name in sum(SPLIT_ALIASES.values(), ()) else stem
        by_split.setdefault(name, []).append(file)
    for alias in _aliases(split):
        if alias in by_split:
            return by_split[alias], list(by_split)
    return [], list(by_split)


# ------------------------------------------------------------------------------------------------------- parquet


def _open_parquet(
    files: list[Path], where: str, split: str, image_column: str, label_column: str, class_names: Sequence[str] | None
) -> ImageTable:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if sum(file.stat().st_size for file in files) > IN_MEMORY_PARQUET_BYTES:
        datasets = _import_datasets()
        try:
            table = datasets.load_dataset("parquet", data_files=[str(file) for file in files], split="train")
        except Exception as error:  # datasets wraps pyarrow's errors in kinds of its own
            raise FileError(f"{where} cannot be read as parquet: {_one_line(error)}") from error
        return _HubImages(table, where, image_column, label_column, class_names)
    tables = []
    for file in files:
        try:
            schema = pq.read_schema(file)
            _check_columns(schema.names, image_column, label_column, str(file))
            tables.append(pq.read_table(file, columns=[image_column, label_column]))
        except (OSError, ValueError) as error:
            if isinstance(error, FileError):
                raise
            raise FileError(f"{file} cannot be read as parquet: {_one_line(error)}") from error
    try:
        table = pa.concat_tables(tables)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise FileError(f"{where}: the files have different columns: {_one_line(error)}") from error
    return _ParquetImages(table, where, image_column, label_column, class_names)


def _check_columns(names: Iterable[str], image_column: str, label_column: str, where: str) -> None:
    names = list(names)
    for option, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in names:
            raise WrongFile(
                f"{where} has no column {column!r}. It has: {', '.join(names)}. Choose one with data.{option} in a "
                f"recipe, or --{option.replace('_', '-')} of `nbhd evaluate`."
            )


class _ParquetImages(ImageTable):
    """A parquet table in memory, in the image convention of `datasets`: struct{bytes, path}, or plain bytes."""

    def __init__(
        self, table: Any, where: str, image_column: str, label_column: str, class_names: Sequence[str] | None
    ) -> None:
        import pyarrow as pa

        self.where = where
        if table.num_rows == 0:
            raise WrongFile(f"{where} has no rows")
        column = table.column(image_column).combine_chunks()
        self._paths = None
        if pa.types.is_struct(column.type):
            fields = [column.type.field(i).name for i in range(column.type.num_fields)]
            if "bytes" not in fields:
                raise WrongFile(f"{where}: column {image_column!r} has no field 'bytes', only {', '.join(fields)}")
            self._bytes = _one_chunk(column, "bytes")
            if "path" in fields:
                self._paths = _one_chunk(column, "path")
        elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
            self._bytes = column
        else:
            raise WrongFile(f"{where}: column {image_column!r} holds {column.type}, not encoded images")
        declared = _declared_classes(table.schema, label_column)
        raw = table.column(label_column).to_pylist()
        self.labels, self.class_names = number_labels(raw, declared, class_names, where, label_column)

    def __len__(self) -> int:
        return len(self._bytes)

    def image_bytes(self, row: int) -> bytes:
        data = self._bytes[row].as_py()
        if data is None:
            raise FileError(NO_BYTES)
        return bytes(data)

    def name(self, row: int) -> str:
        path = self._paths[row].as_py() if self._paths is not None else None
        return f"{self.where} row {row}" + (f" ({path})" if path else "")


def _one_chunk(column: Any, field: str) -> Any:
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):  # more than 2 GB of bytes do not fit one chunk
        return pa.chunked_array([chunk.field(field) for chunk in column.chunks])
    return column.field(field)


def _declared_classes(schema: Any, label_column: str) -> list[str] | None:
    """Class names from the schema metadata that `datasets` writes."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = info["info"]["features"][label_column]["names"]
        if isinstance(names, dict):
            names = [names[str(i)] for i in range(len(names))]
        return [str(name) for name in names]
    except (KeyError, TypeError, ValueError):
        return None


# -------------------------------------------------------------------------------------------------------- folders


class _FolderImages(ImageTable):
    """Image files in one folder a class, perhaps under folders of splits."""

    has_columns = False

    def __init__(self, root: Path, split: str, class_names: Sequence[str] | None) -> None:
        known = sum(SPLIT_ALIASES.values(), ())
        folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        base = next((root / alias for alias in _aliases(split) if alias in folders), None)
        if base is None:
            if any(name in known for name in folders):
                raise NoSuchSplit(str(root), split, folders)
            base = root
        self.where = str(base)
        names = sorted(entry.name for entry in base.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        files = {name: [file for file in sorted((base / name).rglob("*")) if _is_image_name(file)] for name in names}
        found = [name for name in names if files[name]]
        if not found:
            raise WrongFile(
                f"{base} holds no labelled images. Wanted: parquet files named after their split, or a folder for each "
                f"class with image files in it ({', '.join(IMAGE_SUFFIXES[:4])}, ...)."
            )
        self.class_names = list(class_names) if class_names is not None else found
        number = dict(zip(found, number_names(found, self.class_names, f"{base}: folders"), strict=True))
        self._files = [file for name in found for file in files[name]]
        self.labels = np.array([number[name] for name in found for _ in files[name]], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def image_bytes(self, row: int) -> bytes:
        return self._files[row].read_bytes()

    def decode(self, row: int) -> Image.Image:
        return decode_image(self._files[row])  # by its path, so that the reason speaks of the file

    def name(self, row: int) -> str:
        return str(self._files[row])


def _is_image_name(file: Path) -> bool:
    """Whether it is named as an image; a link to nothing is one that cannot be read, not one that is not there."""
    if file.suffix.lower() not in IMAGE_SUFFIXES or file.name.startswith("."):
        return False
    return file.is_file() or (file.is_symlink() and not file.exists())


# ------------------------------------------------------------------------------------------------------------ hub


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("reading hub data sets and large parquet files", "train", "datasets") from error
    return datasets


def _open_hub(
    name: str, split: str, image_column: str, label_column: str, class_names: Sequence[str] | None
) -> ImageTable:
    datasets = _import_datasets()
    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises many kinds: connection, missing repository, missing split, ...
        raise WrongFile(
            f"{name!r} is no file or folder here, and as a data set on the hub it cannot be loaded: {_one_line(error)}."
            " Check the spelling and the connection, or name a local parquet file or image folder."
        ) from error
    return _HubImages(table, f"{name} ({split})", image_column, label_column, class_names)


_BINARY = ("binary", "large_binary")  # types of columns of plain bytes


class _HubImages(ImageTable):
    """A `datasets.Dataset`: memory-mapped, any size."""

    def __init__(
        self, table: Any, where: str, image_column: str, label_column: str, class_names: Sequence[str] | None
    ) -> None:
        datasets = _import_datasets()
        self.where = where
        if len(table) == 0:
            raise WrongFile(f"{where} has no rows")
        _check_columns(table.column_names, image_column, label_column, where)
        feature = table.features[image_column]
        if isinstance(feature, dict):  # a struct that is not declared as images
            if "bytes" not in feature:
                raise WrongFile(f"{where}: column {image_column!r} has no field 'bytes', only {', '.join(feature)}")
        elif not isinstance(feature, datasets.Image) and getattr(feature, "dtype", None) not in _BINARY:
            raise WrongFile(f"{where}: column {image_column!r} holds {feature}, not images")
        self._images = table.select_columns([image_column])
        if isinstance(feature, datasets.Image):
            self._images = self._images.cast_column(image_column, datasets.Image(decode=False))
        self._column = image_column
        declared = getattr(table.features[label_column], "names", None)
        raw = list(table[label_column])
        self.labels, self.class_names = number_labels(raw, declared, class_names, where, label_column)

    def __len__(self) -> int:
        return len(self._images)

    def image_bytes(self, row: int) -> bytes:
        stored = self._stored(row)
        if stored.get("bytes") is not None:
            return bytes(stored["bytes"])
        if not stored.get("path"):
            raise FileError(NO_BYTES)
        return Path(stored["path"]).read_bytes()

    def _stored(self, row: int) -> dict[str, Any]:
        """The bytes of an image, or the path of its file, or neither."""
        stored = self._images[row][self._column]
        return stored if isinstance(stored, dict) else {"bytes": stored}

    def name(self, row: int) -> str:
        path = self._stored(row).get("path")
        return f"{self.where} row {row}" + (f" ({path})" if path else "")


def first_rows(table: ImageTable, limit: int | None) -> ImageTable:
    """The first ``limit`` rows in a shuffled order that is the same everywhere (folders are sorted by class)."""
    if limit is None or limit >= len(table):
        return table
    return Rows(table, np.sort(np.random.default_rng(0).permutation(len(table))[:limit]))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
