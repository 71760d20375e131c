"""Cases of the area studio: requests that a page may not answer, uploads that are no photos, names that lead elsewhere.

The door `page` is this module: it sends one request, given as JSON, to the application over `runs`, and turns a refusal
into an error line and status 2.
"""

from __future__ import annotations

import io
import json
import socket
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.faults.doors import Seen
from tests.faults.harness import Case
from tests.faults.sandbox import Sandbox

NEW = "runs/.studio/new/photos"
_HELD: list[socket.socket] = []


def main() -> None:
    """Send the request of sys.argv[1] and print what came back."""
    from starlette.testclient import TestClient

    from diffusekrona_train.app.server import make_app

    wanted = json.loads(sys.argv[1])
    app, token = make_app(Path("runs"), wanted.get("listen", "127.0.0.1"))
    client = TestClient(app, base_url="http://127.0.0.1:7860", follow_redirects=False)
    if token and "token" in wanted:
        client.cookies.set("krona_studio", wanted["token"] or token)
    headers = {"x-csrf": app.state.studio.csrf, **wanted.get("headers", {})}
    files = [("photos", (name, bytes.fromhex(content))) for name, content in wanted.get("files", ())]
    answer = client.request(
        wanted.get("method", "GET"), wanted["path"], headers=headers, data=wanted.get("form"), files=files or None
    )
    if answer.status_code >= 400:
        plain = answer.headers["content-type"].startswith("text/plain")
        text = answer.text if plain else f"error: {answer.json()['error']}"
        print(f"{text.strip()} [{answer.status_code}]", file=sys.stderr)
        raise SystemExit(2)
    print(answer.status_code)


def page(name: str, says: str, make: Callable[[Sandbox], None] | None = None, **request: Any) -> Case:
    """A request that is refused with status 2 and a line that `says` matches; `make` fills the sandbox before."""
    more = {key: request.pop(key) for key in ("status", "then", "same_as", "may_write") if key in request}

    def build(box: Sandbox) -> list[str]:
        run(box)
        if make:
            make(box)
        return ["page", json.dumps(request)]

    return Case("studio", name, build, more.pop("status", 2), says, absent=("evil*", "runs/evil*"), fast=True, **more)


def run(box: Sandbox) -> None:
    """A run `dog` of the command line with one sample."""
    for step in (0, 2):
        box.path(f"runs/dog/samples/step-{step:06d}/x").parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64)).save(box.folder / f"runs/dog/samples/step-{step:06d}/00-0.png")
    box.config({"validation.every": 2}, name="runs/dog/config.yaml")
    box.photos()


def upload(name: str, content: bytes, says: str, file: str = "photo.png", **more: Any) -> Case:
    files = [(file, content.hex())]
    return page(name, says, method="POST", path="/new/photos", files=files, **more)


def png(width: int, height: int) -> bytes:
    """A PNG whose header names that size and which holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def whole(size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def stored(*names: str) -> Callable[[Sandbox, Seen], None]:
    def then(box: Sandbox, seen: Seen) -> None:
        there = sorted(path.name for path in (box.folder / NEW).iterdir())
        assert there == sorted(names), there

    return then


def cases() -> list[Case]:
    return [*_requests(), *_uploads(), *_paths(), *_forms(), *_commands()]


def _requests() -> list[Case]:
    post: dict[str, Any] = {"method": "POST", "path": "/runs/dog/do/stop"}
    link: dict[str, Any] = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    same = "one sentence for every request of another site"
    elsewhere: dict[str, Any] = {"says": "another site asks", "same_as": same}
    lan: dict[str, Any] = {"listen": "0.0.0.0", "path": "/"}
    return [
        page("foreign Host", r"unknown Host.*\[421\]", path="/", headers={"host": "evil.example"}),
        page(
            "Host that begins as ours", r"\[421\]", path="/", headers={"host": "127.0.0.1.evil.example"}, same_as="Host"
        ),
        page("IP address as Host, on loopback", r"\[421\]", path="/", headers={"host": "10.0.0.9"}, same_as="Host"),
        page("Origin of another site", headers={"origin": "http://evil.example"}, **post, **elsewhere),
        page("Origin of another port", headers={"origin": "http://127.0.0.1:3000"}, **post, **elsewhere),
        page("Origin null", headers={"origin": "null"}, **post, **elsewhere),
        page("a form of another site", headers={"sec-fetch-site": "cross-site"}, **post, **elsewhere),
        page("a form of the same site", headers={"sec-fetch-site": "same-site"}, **post, **elsewhere),
        page("a form by navigation", headers=link, **post, **elsewhere),
        page(
            "an image on another site",
            path="/runs/dog/samples/2/1/0",
            headers={"sec-fetch-site": "cross-site"},
            **elsewhere,
        ),
        page("a link from another site", "200", path="/", headers=link, status=0),
        page("without the form's token", r"another site or from before.*\[403\]", headers={"x-csrf": ""}, **post),
        page("with another token", r"\[403\]", headers={"x-csrf": "0" * 32}, same_as="token", **post),
        page("PUT", r"only GET and POST.*\[405\]", method="PUT", path="/new/photos"),
        page("DELETE", r"\[405\]", method="DELETE", path="/runs/dog", same_as="method"),
        page("300 MB", r"too many bytes.*\[413\]", headers={"content-length": "300000000"}, **post),
        page("no length", r"how long it is.*\[411\]", headers={"content-length": "many"}, **post),
        page("a token that is missing", r"the token is missing.*\[401\]", **lan),
        page("a token that is wrong", r"\[401\]", token="0" * 32, same_as="token", **lan),
        page("a token in the address that is wrong", r"\[401\]", listen="0.0.0.0", path="/?token=0", same_as="token"),
        page(
            "foreign Host with the token", r"\[421\]", token="", headers={"host": "evil.example"}, same_as="Host", **lan
        ),
        page("IP address as Host, with the token", "200", token="", headers={"host": "10.0.0.9:7860"}, status=0, **lan),
    ]


def _uploads() -> list[Case]:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\nshowpage\n"
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    photo, same = whole(), "one sentence for all that is no photo"
    return [
        upload("HTML as a photo", b"<html><script>alert(1)</script></html>", "photo.png: is not a photo"),
        upload("SVG", svg, "is not a photo", "photo.svg", same_as=same),
        upload("PostScript as a photo", eps, "is not a photo", same_as=same),
        upload("a truncated photo", photo[: len(photo) // 2], "is damaged or truncated"),
        upload("a decompression bomb", png(60_000, 60_000), "is not a photo|too many pixels", same_as=same),
        upload("a photo too small", whole((4, 4)), "4 x 4 pixels are too few"),
        upload("a name that leads out", photo, "303|200", "../../../evil.png", status=0, then=stored("evil.png")),
        upload("a Windows name that leads out", photo, "200", "..\\..\\evil.exe", status=0, then=stored("evil.png")),
        upload("an absolute name", photo, "200", "/etc/evil.html", status=0, then=stored("evil.png")),
        upload("a name of nothing but dots", photo, "200", "....", status=0, then=stored("photo.png")),
        upload("a device's name", photo, "200", "CON.png", status=0, then=stored("photo-CON.png")),
        upload("a name with markup", photo, "200", "<b>x</b>.png", status=0, then=stored("b.png")),
        upload("a JPEG's suffix on a PNG", photo, "200", "dog.jpg", status=0, then=stored("dog.png")),
    ]


def _paths() -> list[Case]:
    def linked_run(box: Sandbox) -> None:
        box.write("another/config.yaml", (box.folder / "runs/dog/config.yaml").read_bytes())
        (box.folder / "runs" / "linked").symlink_to(box.folder / "another")

    def linked_sample(box: Sandbox) -> None:
        sample = box.folder / "runs/dog/samples/step-000002/00-0.png"
        secret = box.path("secret.png")
        sample.rename(secret)
        sample.symlink_to(secret)

    def linked_adapter(box: Sandbox) -> None:
        secret = box.write("secret.txt", "private")
        box.path("runs/dog/checkpoints/step-000002/adapter.safetensors").symlink_to(secret)

    none = "one sentence for a run that is not there"
    return [
        page("a run that is not there", r"no run is called 'cat' *\[404\]", path="/runs/cat"),
        page("a run above", r"\[404\]", path="/runs/%2e%2e", same_as=none),
        page("a run by a path", r"\[404\]", path="/runs/..%2f..%2fetc", same_as=none),
        page("the studio's own folder", r"\[404\]", path="/runs/.studio", same_as=none),
        page(
            "a run that is a link", r"\[404\]", linked_run, path="/runs/linked", same_as=none, may_write=("another/*",)
        ),
        page("a sample that is a link", r"no such image.*\[404\]", linked_sample, path="/runs/dog/samples/2/1/0"),
        page(
            "an adapter that is a link",
            "of step 2",
            linked_adapter,
            path="/runs/dog/adapter?step=2",
            same_as="no adapter",
        ),
        page("a picture by a path", r"\[404\]", path="/runs/dog/pictures/..%2fconfig.yaml", same_as=none),
        page("a picture that is no image", r"\[404\]", path="/runs/dog/pictures/config.yaml", same_as=none),
        page("a static file above", r"\[404\]", path="/static/..%2fguard.py", same_as=none),
        page("a prompt that is not there", "has 1 prompts", path="/runs/dog/samples/2/1/7"),
    ]


def _forms() -> list[Case]:
    def post(name: str, says: str, path: str, form: dict[str, str], **more: Any) -> Case:
        return page(name, says, method="POST", path=path, form=form, **more)

    def kept(box: Sandbox, seen: Seen) -> None:
        assert (box.folder / "runs/dog/config.yaml").is_file()

    dog = "/runs/dog"
    return [
        post("start without photos", "photos: there are none yet", "/new/start", {"class": "dog"}),
        post("a photo that is not there", "no such photo", "/new/remove", {"photo": "../../dog/config.yaml"}),
        post("a button that is not there", "no such button", f"{dog}/do/format", {"x": "1"}),
        post("delete without confirming", "was not confirmed", f"{dog}/do/delete", {"sure": "yes"}, then=kept),
        post("more steps that are no number", "more: 'nan' should be", f"{dog}/do/start", {"more": "nan"}),
        post("generate without a prompt", "prompt: write what", f"{dog}/generate", {"prompt": " "}),
        post("generate without an adapter", "no checkpoint of step 0", f"{dog}/generate", {"prompt": "a"}),
        post("strength of a text", "strength: 'much' should be", f"{dog}/strength", {"strength": "much", "step": "2"}),
        post("copy without an adapter", "folder: '/etc' should be", f"{dog}/copy", {"folder": "/etc"}),
        post(
            "copy to a relative folder", r"folder: '\.\.' should be", f"{dog}/copy", {"folder": ".."}, same_as="folder"
        ),
    ]


def _commands() -> list[Case]:
    def file(box: Sandbox) -> list[str]:
        box.write("runs", "a file")
        return ["studio", "--no-open"]

    def taken(box: Sandbox) -> list[str]:
        held = socket.create_server(("127.0.0.1", 0))
        _HELD.append(held)
        return ["studio", "--no-open", "--port", str(held.getsockname()[1])]

    def studio(name: str, make: Callable[[Sandbox], list[str]], says: str) -> Case:
        return Case("studio", name, make, 2, says, fast=True)

    return [
        studio("the runs are a file", file, "runs: is a file; give a folder"),
        studio("a port in use", taken, r"--port \d+ is in use"),
        studio("a port out of range", lambda box: ["studio", "--port", "70000"], "--port.*65535"),
        studio(
            "a host that is not there", lambda box: ["studio", "--host", "nowhere.invalid"], "--host nowhere.invalid"
        ),
    ]


if __name__ == "__main__":
    main()
