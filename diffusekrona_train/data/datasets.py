"""Images from data sets: Arrow folders, Parquet and Arrow files, the hub. `datasets` is imported when one is wanted."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from diffusekrona_train.data.folders import CAPTION_KEYS, Found
from diffusekrona_train.data.images import printable
from diffusekrona_train.data.pictures import Candidate

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAVED = ("dataset_info.json", "dataset_dict.json")
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}


def is_dataset(path: Path) -> bool:
    """Whether `path` is a Parquet or Arrow file, or a folder that holds a saved data set or such files."""
    if path.is_file():
        return path.suffix.lower() in _TABLES
    return any((path / name).is_file() for name in _SAVED) or bool(_table_files(path))


def read_dataset(path: Path, limit: int | None) -> Found:
    """The images of a data set on disk; ValueError where it holds none or is damaged."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our one line says it
    shown = printable(str(path))
    with tempfile.TemporaryDirectory() as scratch:
        try:
            table = _load(path, scratch)
        except Exception as error:
            # pyarrow and datasets have errors of their own for every kind of damage, some of them ValueErrors
            raise ValueError(f"{shown}: is no data set that can be read ({_first_line(error)})") from None
        return _rows(table, limit, shown)


def _load(path: Path, scratch: str) -> Any:
    import datasets

    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        return datasets.load_from_disk(str(path))
    files = [path] if path.is_file() else _table_files(path)
    kind = _TABLES[files[0].suffix.lower()]
    names = [str(file) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", cache_dir=scratch, keep_in_memory=True)


def read_hub(name: str, limit: int | None) -> Found:
    """The images of a data set's train split on the hub; ValueError without network or where there is no such set."""
    import datasets

    try:
        return _rows(datasets.load_dataset(name, split="train"), limit, name)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"subject.images: {name!r} is no folder here, and the hub did not give a data set of that name "
            f"({_first_line(error)})"
        ) from None


def _rows(table: Any, limit: int | None, shown: str) -> Found:
    import datasets

    if isinstance(table, datasets.DatasetDict):
        table = table["train"] if "train" in table else next(iter(table.values()))
    column = next((name for name, kind in table.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise ValueError(f"{shown}: has no column of images; it has {', '.join(table.column_names)}")
    words = next((name for name in CAPTION_KEYS if name in table.column_names), None)
    table = table.cast_column(column, datasets.Image(decode=False))
    candidates = []
    for index in range(len(table) if limit is None else min(limit, len(table))):
        caption = table[index][words] if words else None
        caption = " ".join(caption.split()) or None if isinstance(caption, str) else None
        source = f"column {words}" if caption else "subject.prompt"
        candidates.append(
            Candidate(f"row {index}", None, _reader(table, index, column), caption=caption, caption_source=source)
        )
    return candidates, []


def _reader(table: Any, index: int, column: str) -> Any:
    def read() -> bytes:
        cell = table[index][column]
        if not cell:
            raise ValueError(f"row {index}: holds no image")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    return read


def _table_files(folder: Path) -> list[Path]:
    """The Parquet files of `folder` (its own, or those in `data`), or else its Arrow files."""
    if not folder.is_dir():
        return []
    for suffix in _TABLES:
        for place in (folder, folder / "data"):
            files = sorted(place.glob(f"*{suffix}")) if place.is_dir() else []
            if files:
                return files
    return []


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
