"""Images from data sets: Arrow folders, Parquet and Arrow files, the hub. `datasets` is imported when one is wanted."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffusekrona_train.config import SubjectConfig
from diffusekrona_train.data.captions import KEYS, as_captions, looks_like_text
from diffusekrona_train.data.names import loose, printable
from diffusekrona_train.data.pictures import Candidate, Found

if TYPE_CHECKING:
    from datasets import Dataset

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SAVED = ("dataset_info.json", "dataset_dict.json")
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_SHARD = re.compile(r"(.+?)[-_.]\d+(-of-\d+)?")
"""`train-00000-of-00002`: the split's name stands before the number of the shard."""
_SPLITS = ("train", "training", "test", "testing", "validation", "valid", "val", "dev", "eval")


def is_dataset(path: Path) -> bool:
    """Return whether `path` is a Parquet or Arrow file, or a folder that holds a saved data set or such files."""
    if path.is_file():
        return path.suffix.lower() in _TABLES
    return any((path / name).is_file() for name in _SAVED) or bool(_table_files(path))


def read_dataset(path: Path, subject: SubjectConfig) -> Found:
    """Return the images of a data set on disk; ValueError where it holds none, is damaged, or does not say which to
    take."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # our one-line error is enough
    datasets.disable_progress_bars()
    shown = printable(str(path))
    with tempfile.TemporaryDirectory() as scratch:
        saved = path.is_dir() and any((path / name).is_file() for name in _SAVED)
        names = {} if saved else _files_by_split(path)
        split = _split_of(list(names), subject.split, shown) if names else None
        try:
            table = datasets.load_from_disk(str(path)) if saved else _load(names[split or ""], scratch)
        except Exception as error:
            # pyarrow and datasets have errors of their own for every kind of damage, some of them ValueErrors
            raise ValueError(f"{shown}: cannot be read as a data set ({_first_line(error)})") from None
        if isinstance(table, datasets.DatasetDict):
            table = table[_split_of(list(map(str, table)), subject.split, shown)]
        elif saved and subject.split is not None:
            raise ValueError(f"subject.split: {shown} has no splits; take it out")
        return _rows(table, subject, shown)


def _load(files: list[Path], scratch: str) -> Any:
    import datasets

    kind = _TABLES[files[0].suffix.lower()]
    names = [str(file) for file in files]
    return datasets.load_dataset(kind, data_files=names, split="train", cache_dir=scratch, keep_in_memory=True)


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    """Return split -> its files, by their names as the hub writes them; files whose names have no split are `train`."""
    files = [path] if path.is_file() else _table_files(path)
    found: dict[str, list[Path]] = {}
    for file in files:
        match = _SHARD.fullmatch(file.stem)
        name = match[1] if match else file.stem
        found.setdefault(name if name.lower() in _SPLITS else "train", []).append(file)
    return found


def _split_of(names: list[str], wanted: str | None, shown: str) -> str:
    """Return the split to read: the one asked for, `train`, or the only one; ValueError naming them otherwise."""
    known = ", ".join(map(printable, names))
    if wanted is not None and wanted not in names:
        raise ValueError(f"subject.split: {shown} has no split {printable(wanted)!r}; it has {known}")
    if wanted is None and "train" not in names and len(names) > 1:
        raise ValueError(f"{shown}: has the splits {known} and none called train; choose one with subject.split")
    return wanted or ("train" if "train" in names else names[0])


def read_hub(name: str, subject: SubjectConfig) -> Found:
    """Return the images of a split (train) of a data set on the hub; ValueError without network or such a set."""
    import datasets

    try:
        table = datasets.load_dataset(name, split=subject.split or "train")
    except Exception as error:
        if "split" in str(error).lower():
            raise ValueError(f"subject.images: {name!r}: {_first_line(error)}; choose one with subject.split") from None
        raise ValueError(
            f"subject.images: {name!r} is not a folder here, and the hub did not give a data set of that name "
            f"({_first_line(error)})"
        ) from None
    return _rows(table, subject, name)


def _rows(table: Dataset, subject: SubjectConfig, shown: str) -> Found:
    column = _image_column(table, subject.image_column, shown)
    words, notes = _caption_column(table, subject, column, shown)
    import datasets

    if isinstance(table.features[column], datasets.Image):
        table = table.cast_column(column, datasets.Image(decode=False))
    candidates = []
    texts = table.select_columns([words]) if words else None
    for index in range(len(table) if subject.limit is None else min(subject.limit, len(table))):
        captions = as_captions(texts[index][words], f"row {index}, column {words}") if texts is not None else ()
        source = f"column {words}" if captions else "subject.prompt"
        candidates.append(
            Candidate(f"row {index}", None, _reader(table, index, column), captions=captions, caption_source=source)
        )
    return Found(candidates, [], notes)


def _image_column(table: Dataset, wanted: str | None, shown: str) -> str:
    """Return the column of images: the one asked for, `image`, or the only one; ValueError naming them otherwise."""
    import datasets

    found = [name for name, kind in table.features.items() if isinstance(kind, datasets.Image)]
    found = found or [name for name in table.features if _holds_images(table, name)]
    known = ", ".join(map(printable, table.column_names))
    if wanted is not None:
        if wanted not in table.column_names:
            raise ValueError(f"subject.image_column: {shown} has no column {printable(wanted)!r}; it has {known}")
        if wanted not in found and not _holds_images(table, wanted):
            raise ValueError(f"subject.image_column: the column {printable(wanted)!r} of {shown} holds no images")
        return wanted
    if not found:
        raise ValueError(f"{shown}: has no column of images; it has {known}")
    named = [name for name in found if loose(name) == "image"]
    if not named and len(found) > 1:
        raise ValueError(
            f"{shown}: has several columns of images, {', '.join(map(printable, found))}, and none called image; "
            "choose one with subject.image_column"
        )
    return (named or found)[0]


def _holds_images(table: Any, column: str) -> bool:
    """Return whether the first cell that is filled holds the bytes of an image: plain bytes, or {bytes, path}."""
    if not re.search("binary|bytes", str(table.features[column])):
        return False
    cells = (row[column] for row in table.select_columns([column]))
    content = _bytes_of(next((cell for cell in cells if cell), None))
    try:
        with Image.open(io.BytesIO(content or b"")):
            return True
    except Exception:  # decoders raise what they like at bytes that are something else
        return False


def _bytes_of(cell: object) -> bytes | None:
    """Return the content of a cell: plain bytes, or {bytes, path} as data sets keep images; None where it has none."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None and cell.get("path"):
            return Path(cell["path"]).read_bytes()
        cell = cell.get("bytes")
    return bytes(cell) if isinstance(cell, bytes | bytearray | memoryview) else None


def _caption_column(table: Dataset, subject: SubjectConfig, image: str, shown: str) -> tuple[str | None, list[str]]:
    """Return (column of captions or None, a note); ValueError where the one asked for is not there."""
    names = [name for name in table.column_names if name != image]
    if subject.caption_column is not None and subject.caption_column not in table.column_names:
        known = ", ".join(map(printable, names)) or "none besides the image"
        raise ValueError(
            f"subject.caption_column: {shown} has no column {printable(subject.caption_column)!r}; it has {known}"
        )
    if not subject.captions:
        return None, []
    if subject.caption_column is not None:
        return subject.caption_column, []
    by_name = {loose(name): name for name in reversed(names)}
    column = next((name if name in names else by_name[name] for name in KEYS if name in names or name in by_name), None)
    if column is not None or not len(table):
        return column, []
    first = table.select_columns(names)[0] if names else {}
    unused = [name for name in names if looks_like_text(first[name])]
    if not unused:
        return None, []
    return None, [
        f"{shown}: no column is called {', '.join(KEYS[:-1])} or {KEYS[-1]}; not used: "
        f"{', '.join(map(printable, unused))} (subject.caption_column names the one to take)"
    ]


def _reader(table: Dataset, index: int, column: str) -> Callable[[], bytes]:
    cells = table.select_columns([column])

    def read() -> bytes:
        content = _bytes_of(cells[index][column])
        if not content:
            raise ValueError(f"row {index}: holds no image")
        return content

    return read


def _table_files(folder: Path) -> list[Path]:
    """Return the Parquet files of `folder` (its own, or those in `data`), or else its Arrow files."""
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
