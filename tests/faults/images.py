"""Cases of the area images: photos, captions and folders as people really have them, and as nobody should."""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable
from typing import Any

from tests.faults.harness import NOT_BEGUN, Case
from tests.faults.sandbox import Sandbox, picture

Make = Callable[[Sandbox], Any]
UNREADABLE = "whatever the bytes are, they are no image that a decoder knows"


def cases() -> list[Case]:
    return _refused() + _welcome() + _metadata()


def _case(name: str, make: Make, status: int, says: str, same_as: str = "", **more: Any) -> Case:
    """A case of `krona-train --check` on the photos that `make` puts into the sandbox."""

    def arguments(box: Sandbox) -> list[str]:
        changes = make(box)
        return ["train", "--config", box.config(changes if isinstance(changes, dict) else {}), "--check"]

    settings = {"absent": NOT_BEGUN if status else (), "fast": True, "seconds": 90, **more}
    return Case("images", name, arguments, status, says, same_as, **settings)


def encoded(image: Any, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(width: int, height: int) -> bytes:
    """A PNG header of any size, and hardly any pixels behind it."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def _beside(name: str, content: bytes | Callable[[], bytes]) -> Make:
    """Two good photos and one file `name` that holds `content`."""

    def make(box: Sandbox) -> None:
        box.photos(2)
        box.write(f"photos/{name}", content() if callable(content) else content)

    return make


def _refused() -> list[Case]:
    photo = picture((72, 64), 5)
    whole = encoded(photo)
    jpeg = encoded(photo, "JPEG")
    rows: list[tuple[str, str, bytes | Callable[[], bytes], str, str]] = [
        ("zero bytes", "a.jpg", b"", r"a\.jpg: the file is empty", ""),
        ("truncated PNG", "a.png", whole[: len(whole) // 2], r"a\.png: is damaged or truncated", ""),
        ("truncated JPEG", "a.jpg", jpeg[: len(jpeg) // 2], r"a\.jpg: is damaged or truncated \(.*bytes", ""),
        ("only a PNG signature", "a.png", whole[:8], r"a\.png: is (damaged|not an image)", UNREADABLE),
        (
            "text with the suffix of a photo",
            "a.jpg",
            b"dear diary",
            r"a\.jpg: is not an image that can be read",
            UNREADABLE,
        ),
        ("a web page saved as .webp", "a.webp", b"<html>not found</html>", r"a\.webp: is not an image", UNREADABLE),
        ("random bytes as .png", "a.png", bytes(range(256)) * 8, r"a\.png: is not an image", UNREADABLE),
        (
            "1 x 1",
            "a.png",
            lambda: encoded(picture((1, 1))),
            r"a\.png: 1 x 1 pixels are too few",
            "the same least side",
        ),
        (
            "4,000 x 3",
            "a.png",
            lambda: encoded(picture((4000, 3))),
            r"4000 x 3 pixels are too few",
            "the same least side",
        ),
        ("decompression bomb", "a.png", png_claiming(50_000, 50_000), r"a\.png: has too many pixels", ""),
        (
            "a bomb just below the limit",
            "a.png",
            png_claiming(13_000, 13_000),
            r"a\.png: is damaged or truncated",
            "truncated",
        ),
        ("a PNG of 2^31 x 2^31", "a.png", png_claiming(2**31 - 1, 2**31 - 1), r"a\.png: ", "the same limit of pixels"),
        ("a caption that is not UTF-8", "01.txt", b"caf\xe9", r"01\.txt: byte 3 is not UTF-8", ""),
    ]
    table = [_case(name, _beside(file, content), 2, says, same) for name, file, content, says, same in rows]
    return table + [
        _case(
            "HEIC without its extra",
            _beside("a.HEIC", b"\0\0\0\x18ftypheic"),
            2,
            r"a\.HEIC: reading HEIC needs an extra: pip install 'diffusekrona-train\[heic\]'",
            how="fork",
            limits={"without": "pillow_heif"},
        ),
        _case("empty folder", lambda box: box.path("photos/x").parent and None, 2, r"photos holds no image$"),
        _case("folder missing", lambda box: None, 2, r"subject\.images: photos is not there"),
        _case("folder misspelt", _misspelt, 2, r"phtos is not there.*did you mean photos"),
        _case("only stray files", _only_strays, 2, r"holds no image \(\d skipped"),
        _case("a file that is named twice", _twice, 2, r"subject\.files\[1\].*named twice"),
        _case("a listed file that is missing", _listed_missing, 2, r"subject\.files\[0\].*not there"),
        _case("a listed file that is a folder", _listed_folder, 2, r"subject\.files\[0\].*is a folder"),
        _case(
            "embedded subject misspelt", lambda box: {"subject.images": "toybox:pudle"}, 2, r"not an embedded subject"
        ),
        _case(
            "a photo as text file given as images",
            _text_as_images,
            2,
            r"notes\.txt is not a folder, an image or a data set",
        ),
        _case(
            "no permission for a photo",
            _no_permission,
            2,
            r"01\.png: .*ermission",
            how="fork",
            limits={"unprivileged": 1},
        ),
        _case("no permission for the folder", _closed, 2, r"photos.*ermission", how="fork", limits={"unprivileged": 1}),
        _case("a kohya folder with 0 repeats", _kohya(0), 2, r"0 repeats; a kohya folder has 1 to 500"),
        _case(
            "nothing left of a transparent photo",
            _beside("a.png", lambda: encoded(photo.convert("LA").point(lambda value: 0))),
            2,
            r"a\.png: is transparent and nothing of it is left over white",
        ),
        _case("several columns of images", _columns, 2, r"photo, mask, and none called image; .*subject\.image_column"),
        _case("several splits, none called train", _splits, 2, r"splits test, validation .*subject\.split"),
        _case(
            "a parquet file of nothing",
            _beside_alone("data.parquet", b"PAR1"),
            2,
            r"photos: cannot be read as a data set",
        ),
        _case("a parquet file given that is text", _text_parquet, 2, r"cannot be read as a data set"),
    ]


def _misspelt(box: Sandbox) -> dict:
    box.photos(1)
    return {"subject.images": "phtos"}


def _only_strays(box: Sandbox) -> None:
    for name in (".DS_Store", "Thumbs.db", "notes.md"):
        box.write(f"photos/{name}", "x")


def _twice(box: Sandbox) -> dict:
    box.photos(2)
    return {"subject.files": ["00.png", "./00.png"]}


def _listed_missing(box: Sandbox) -> dict:
    box.photos(1)
    return {"subject.files": ["99.png"]}


def _listed_folder(box: Sandbox) -> dict:
    box.photos(1)
    box.path("photos/more/x")
    return {"subject.files": ["more"]}


def _text_as_images(box: Sandbox) -> dict:
    box.write("notes.txt", "no photo")
    return {"subject.images": "notes.txt"}


def _no_permission(box: Sandbox) -> None:
    box.photos(3)
    box.folder.joinpath("photos/01.png").chmod(0)


def _closed(box: Sandbox) -> None:
    box.photos(2).chmod(0)


def _kohya(repeats: int) -> Make:
    return lambda box: box.photos(2, f"photos/{repeats}_sks dog") and None


def _beside_alone(name: str, content: bytes) -> Make:
    return lambda box: box.write(f"photos/{name}", content) and None


def _text_parquet(box: Sandbox) -> dict:
    box.write("set.parquet", "dear diary")
    return {"subject.images": "set.parquet"}


def _columns(box: Sandbox, names: tuple[str, ...] = ("photo", "mask"), file: str = "photos/a.parquet") -> None:
    import datasets

    cells = {name: [{"bytes": encoded(picture((72, 64), index)), "path": None}] for index, name in enumerate(names)}
    features = datasets.Features({name: datasets.Image() for name in names})
    datasets.Dataset.from_dict(cells, features=features).to_parquet(str(box.path(file)))


def _splits(box: Sandbox) -> None:
    for split in ("validation", "test"):
        _columns(box, ("image",), f"photos/data/{split}-00000-of-00001.parquet")


def _welcome() -> list[Case]:
    """What must work, and be said where something was done to it."""
    photo = picture((72, 64), 3)
    palette = photo.quantize(8)
    frames = [picture((64, 64), index) for index in range(3)]
    corrupt_exif = encoded(photo, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 40)
    icc = encoded(photo, "JPEG", icc_profile=b"no profile at all" * 30)
    works: list[tuple[str, str, bytes | Callable[[], bytes], str]] = [
        ("CMYK", "a.jpg", lambda: encoded(photo.convert("CMYK"), "JPEG"), r"\b3\b"),
        ("16-bit greyscale", "a.png", lambda: encoded(photo.convert("I;16")), r"\b3\b"),
        ("one bit", "a.png", lambda: encoded(photo.convert("1")), r"\b3\b"),
        ("floats in a TIFF", "a.tiff", lambda: encoded(photo.convert("F"), "TIFF"), r"\b3\b"),
        ("transparent", "a.png", lambda: encoded(photo.convert("RGBA")), r"\b3\b"),
        ("palette with transparency", "a.png", lambda: encoded(palette, transparency=bytes(range(8))), r"\b3\b"),
        (
            "animated",
            "a.gif",
            lambda: encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
            r"first frame",
        ),
        ("wrong suffix of a whole image", "a.png", lambda: encoded(photo, "JPEG"), r"\b3\b"),
        ("corrupt EXIF", "a.jpg", corrupt_exif, r"\b3\b"),
        ("corrupt colour profile", "a.jpg", icc, r"\b3\b"),
        (
            "transparent here and there",
            "a.png",
            lambda: encoded(_with_a_hole(photo)),
            r"a\.png: transparent, laid over",
        ),
        (
            "a phone's gain map",
            "a.jpg",
            lambda: encoded(photo, "MPO", save_all=True, append_images=frames[:1]),
            r"\b3\b",
        ),
        ("a mask", "00-masklabel.png", encoded(photo), r"skipped 00-masklabel\.png: a mask, by its name"),
        ("a caption in capitals", "00.TXT", b"[V] dog", r"1 from \.txt files"),
        ("captions by turns", "00.txt", b"[V] one\n[V] two\n", r"captions by turns.*00\.png"),
        ("a caption for other programs", "00.txt", b"(sks dog:1.4)", r"means something to other programs"),
        ("20,000 x 20", "a.png", lambda: encoded(picture((20_000, 20))), r"\b3\b"),
        ("a name with a newline", "a\nb.png", encoded(photo), r"\b3\b"),
        ("a name with a terminal escape", "a\x1b[31mred.png", encoded(photo), r"\b3\b"),
        ("a name of 250 letters", "a" * 246 + ".png", encoded(photo), r"\b3\b"),
        (".DS_Store", ".DS_Store", b"\0\0\0\1Bud1", r"\.DS_Store"),
        ("Thumbs.db", "Thumbs.db", b"\xd0\xcf\x11\xe0", r"Thumbs\.db"),
        ("resource fork of a photo", "._00.png", b"\0\5\26\7", r"\._00\.png"),
        ("a folder named as a photo", "old.png/00.png", encoded(photo), r"old\.png"),
        ("a caption of 10,000 words", "00.txt", b"very " * 10_000 + b"[V] dog", r"\.txt"),
        ("an empty caption", "00.txt", b"", r"empty"),
        ("a caption in another script", "00.txt", "[V] собака на пляже 海滩 🐕".encode(), r"\.txt"),
        ("a caption with markup", "00.txt", b"<script>alert(1)</script> {class} %s", r"\.txt"),
    ]
    table = [_case(name, _beside(file, content), 0, says) for name, file, content, says in works]
    return table + [
        _case("links in a circle", _circle, 0, r"leads nowhere"),
        _case("a folder linked into itself", _folder_circle, 0, r"\b2\b"),
        _case("10,000 files", _many, 0, r"\b3\b", seconds=120),
        _case("kohya's folders", _kohya(3), 0, r"kohya.*3 repeats x 2 photos"),
        _case("a year before a folder's name", _kohya(2023), 0, r"2023 is taken for a date"),
        _case("paths with quotes and dots", _odd_folder, 0, r"\b2\b"),
        _case("one photo of a hundred, by limit", _limited, 0, r"beyond subject\.limit"),
    ]


def _with_a_hole(image: Any) -> Any:
    pierced = image.convert("RGBA")
    pierced.putpixel((3, 3), (0, 0, 0, 0))
    return pierced


def _circle(box: Sandbox) -> None:
    box.photos(2)
    box.path("photos/a.png").symlink_to("b.png")
    box.path("photos/b.png").symlink_to("a.png")


def _folder_circle(box: Sandbox) -> None:
    box.photos(2)
    box.path("photos/again").symlink_to(".")


def _many(box: Sandbox) -> None:
    box.photos(3)
    for index in range(10_000):
        box.write(f"photos/note-{index}.md", "")


def _odd_folder(box: Sandbox) -> dict:
    box.photos(2, 'my "best" dog\'s photos 🐕/..x')
    return {"subject.images": './my "best" dog\'s photos 🐕/../my "best" dog\'s photos 🐕/..x'}


def _limited(box: Sandbox) -> dict:
    box.photos(4)
    return {"subject.limit": 1}


def _metadata() -> list[Case]:
    """metadata.jsonl beside two photos."""
    good = json.dumps({"file_name": "00.png", "text": "[V] dog"})
    rows = [
        ("names a missing file", '{"file_name": "99.png", "text": "x"}', r"line 2: 99\.png is not there"),
        ("a broken line", '{"file_name": ', r"line 2: is not JSON"),
        ("a line without a name", '{"text": "x"}', r"line 2: should read"),
        ("a list for a line", "[1, 2]", r"line 2: should read"),
        ("leaves the folder by ..", '{"file_name": "../secret.png", "text": "x"}', r"leads out of the folder"),
        ("an absolute path", '{"file_name": "/etc/hostname", "text": "x"}', r"leads out of the folder"),
        ("a link out of the folder", '{"file_name": "out.png", "text": "x"}', r"leads out of the folder"),
        ("a caption that is a number", '{"file_name": "01.png", "text": 7}', r"caption should be text and is int"),
        ("one photo in two lines", good, r"00\.png has a line already"),
        ("names a text file", '{"file_name": "notes.md", "text": "x"}', r"not an image, by its suffix"),
        ("nested 100,000 deep", "[" * 100_000, r"line 2: is not JSON"),
    ]
    same = {
        "a list for a line": "neither line names a file",
        "an absolute path": "three ways out of one folder",
        "a link out of the folder": "three ways out of one folder",
        "nested 100,000 deep": "both are not JSON",
    }

    def with_line(line: str) -> Make:
        def make(box: Sandbox) -> None:
            box.photos(2)
            box.write("secret.png", encoded(picture((64, 64))))
            box.write("photos/notes.md", "x")
            box.path("photos/out.png").symlink_to("../secret.png")
            box.write("photos/metadata.jsonl", f"{good}\n{line}\n")

        return make

    def bytes_in_it(box: Sandbox) -> None:
        box.photos(2)
        box.write("photos/metadata.jsonl", b'{"file_name": "00.png", "text": "caf\xe9"}\n')

    table = [
        _case(f"metadata.jsonl: {name}", with_line(line), 2, says, same.get(name, "")) for name, line, says in rows
    ]

    def a_csv(text: str) -> Make:
        return lambda box: box.photos(2) and box.write("photos/metadata.csv", text) and None

    table += [
        _case("metadata.csv: read", a_csv('file_name,text\n00.png,"[V], dog"\n'), 0, r"1 from metadata\.csv"),
        _case(
            "metadata.csv: captions under another key",
            a_csv("file_name,blip\n00.png,a dog\n"),
            0,
            r"not used: blip \(subject\.caption_key",
        ),
        _case("metadata.csv: a comma too many", a_csv("file_name,text\n00.png,a, b\n"), 2, r"3 values for 2 columns"),
        _case("metadata.csv: an open quote", a_csv('file_name,text\n00.png,"a\n'), 2, r"is not CSV"),
    ]
    return [*table, _case("metadata.jsonl: not UTF-8", bytes_in_it, 2, r"metadata\.jsonl: byte \d+ is not UTF-8")]


def fuzz_image(content: bytes) -> str:
    """'' where bytes either open as an image or are refused in one line; else what went wrong."""
    from diffusekrona_train.data import open_image

    try:
        image = open_image(content, "photo.png")
    except ValueError as error:
        text = str(error)
        return "" if text.startswith("photo.png: ") and "\n" not in text and len(text) < 400 else f"said {text[:200]!r}"
    return "" if image.mode == "RGB" and min(image.size) >= 1 else f"opened as {image.mode} {image.size}"
