"""The encoders behind the scores: a CLIP, a ViT in the role of DINO, and toybox's own two, run in batches and cached.

    clip, dino = open_clip("openai/clip-vit-base-patch32"), open_dino("facebook/dino-vits16")
    clip.images(images)          # (number, width) unit rows

Encoders come by hub name, from a local folder, or as `toybox` from the package.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffusekrona_train.common.files import ASSETS, atomic, sha256
from diffusekrona_train.evaluation.metrics import unit
from diffusekrona_train.evaluation.metrics.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
)
from diffusekrona_train.models.contracts import Loadable, Loaded

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"
TOYBOX = ASSETS / "toybox"
Inputs = TypeVar("Inputs")


@dataclass
class Encoder:
    """Embeds images (and, for a CLIP, texts) as unit rows; with a cache folder, each image only once."""

    name: str
    identity: str
    """Hub name with revision, or base name with the weights' hash: never a local path."""
    preprocessing: Preprocessing
    embed_pixels: Callable[[Tensor], Tensor]
    embed_text: Callable[[list[str]], Tensor] | None = None
    tokenizer: Loaded | None = None
    """Of a CLIP: shows how much of a text it reads."""
    device: torch.device | str = "cpu"
    batch_size: int = 32
    cache: Path | None = None
    _held: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def images(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return (number, width) fp32 unit rows of PIL images."""
        self._read_cache()
        keys = [_content(picture) for picture in pictures]
        new = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in self._held}
        names, todo = list(new), list(new.values())
        for start in range(0, len(todo), self.batch_size):
            batch = np.stack([self.preprocessing.pixels(p) for p in todo[start : start + self.batch_size]])
            rows = self._run(self.embed_pixels, torch.from_numpy(batch).to(self.device))
            self._held.update(zip(names[start : start + self.batch_size], rows, strict=True))
        if new:
            self._write_cache()
        return np.stack([self._held[key] for key in keys])

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return (number, width) fp32 unit rows; each different text is embedded once."""
        assert self.embed_text is not None, f"{self.name} reads no text"
        different = list(dict.fromkeys(texts))
        rows = np.concatenate([self._run(self.embed_text, [text]) for text in different])
        return rows[[different.index(text) for text in texts]]

    def describe(self) -> dict[str, str]:
        return {"encoder": self.identity, "preprocessing": self.preprocessing.describe()}

    @torch.no_grad()
    def _run(self, embed: Callable[[Inputs], Tensor], inputs: Inputs) -> np.ndarray:
        return unit(embed(inputs).float().cpu().numpy())

    def _cache_file(self) -> Path | None:
        digest = hashlib.sha256(f"{self.identity} {self.preprocessing}".encode()).hexdigest()[:16]
        return self.cache / f"{digest}.safetensors" if self.cache else None

    def _read_cache(self) -> None:
        from safetensors.numpy import load_file

        path = self._cache_file()
        if path is not None and path.is_file() and not self._held:
            try:
                self._held.update(load_file(path))
            except Exception:  # a damaged cache is made again
                path.unlink(missing_ok=True)

    def _write_cache(self) -> None:
        from safetensors.numpy import load_file, save_file

        path = self._cache_file()
        if path is not None:
            if path.is_file():  # another process may have added to it
                self._held = load_file(path) | self._held
            with atomic(path) as temporary:
                save_file({key: np.ascontiguousarray(row) for key, row in self._held.items()}, temporary)


def _content(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    return hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest()


def open_clip(name: str = CLIP, device: torch.device | str = "cpu", cache: Path | None = None) -> Encoder:
    """Open a CLIP model with its text side; ValueError of one line where `name` is none."""
    from transformers import AutoTokenizer, CLIPModel

    where = str(TOYBOX / "clip") if name == "toybox" else name
    model = _load(CLIPModel, where, name, "clip", device)
    tokenizer = _load_tokenizer(AutoTokenizer, str(TOYBOX / "pipe" / "tokenizer") if name == "toybox" else where, name)
    side = model.config.vision_config.image_size
    length = model.config.text_config.max_position_embeddings

    def pixels(batch: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model(pixel_values=batch).pooler_output)

    def text(texts: list[str]) -> Tensor:
        # one text at a time, so that padding cannot matter
        ids = tokenizer(texts, truncation=True, max_length=length, return_tensors="pt").input_ids.to(device)
        return model.text_projection(model.text_model(input_ids=ids).pooler_output)

    shown = Preprocessing(side, side, CLIP_MEAN, CLIP_STD)
    return Encoder(name, _identity(name, where, model), shown, pixels, text, tokenizer, device, cache=cache)


def open_dino(name: str = DINO, device: torch.device | str = "cpu", cache: Path | None = None) -> Encoder:
    """Open a ViT whose class token is the embedding; `toybox` is the embedded network that tells its subjects apart."""
    if name == "toybox":
        net = load_identity_net(TOYBOX / "identity.safetensors").to(device)
        identity = f"toybox identity sha256:{sha256(TOYBOX / 'identity.safetensors')[:16]}"
        return Encoder(name, identity, Preprocessing(64, 64, HALF, HALF), net, device=device, cache=cache)
    from transformers import AutoModel

    model = _load(AutoModel, name, name, "vit", device)
    if not isinstance(getattr(model.config, "image_size", None), int) or not hasattr(model, "embeddings"):
        raise ValueError(f"encoder {name!r} is a {model.config.model_type} not a vision transformer such as {DINO}")

    def pixels(batch: Tensor) -> Tensor:
        return model(pixel_values=batch).last_hidden_state[:, 0]

    side = 224 if model.config.model_type.startswith("dino") else model.config.image_size
    shown = Preprocessing(side * 256 // 224, side, IMAGENET_MEAN, IMAGENET_STD)
    return Encoder(name, _identity(name, name, model), shown, pixels, device=device, cache=cache)


def _load(kind: type[Loadable], where: str, name: str, expected: str, device: torch.device | str) -> Any:
    import huggingface_hub
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    huggingface_hub.logging.set_verbosity_error()  # without a network there is our own one-line error
    try:
        try:
            config = transformers.AutoConfig.from_pretrained(where)
        except ValueError as error:
            raise OSError(str(error)) from None
        if expected == "clip" and config.model_type != "clip":
            raise ValueError(f"encoder {name!r} is a {config.model_type} not a CLIP such as {CLIP}")
        options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        return kind.from_pretrained(where, dtype=torch.float32, **options).to(device).eval().requires_grad_(False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ValueError(f"encoder {name!r} cannot be loaded from the hub, a folder or the cache: {reason}") from None
    finally:
        transformers.logging.set_verbosity(before)


def _load_tokenizer(kind: type[Loadable], where: str, name: str) -> Any:
    try:
        return kind.from_pretrained(where)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"encoder {name!r}: its tokenizer cannot be loaded ({reason})") from None


def _identity(name: str, where: str, model: Loaded) -> str:
    """Identify toybox and folders by the hash of their weights, hub models by their revision."""
    folder = Path(where)
    if folder.is_dir():
        digest = hashlib.sha256("".join(sha256(path) for path in sorted(folder.glob("*.safetensors"))).encode())
        return f"{'toybox clip' if name == 'toybox' else folder.resolve().name} sha256:{digest.hexdigest()[:16]}"
    revision = getattr(model.config, "_commit_hash", None)
    return f"{name}@{revision[:12]}" if revision else name


class IdentityNet(nn.Module):
    """A small convolutional network that measures identity for toybox: trained to tell its subjects apart.

    Images (B, 3, 64, 64) in [-1, 1] -> embeddings (B, 128). The classifiers it was trained with are left out.
    """

    LAYERS = ((24, 2), (48, 2), (64, 1), (96, 2), (128, 1), (160, 2))
    """(channels, stride) of each 3 x 3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for channels, stride in self.LAYERS:
            layers += [
                nn.Conv2d(width, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
            ]  # fmt: skip
            width = channels
        self.features = nn.Sequential(*layers)
        self.projection = nn.Linear(width * 4, 128)

    def forward(self, pixels: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.features(pixels), 2)
        return self.projection(pooled.flatten(1))


def load_identity_net(path: Path) -> IdentityNet:
    """Load the network of a file whose tensors are named f.* and p.* beside its classifiers."""
    from safetensors.torch import load_file

    names = {"f": "features", "p": "projection"}
    tensors = {
        f"{names.get(head, head)}.{rest}": value
        for head, _, rest, value in ((*key.partition("."), value) for key, value in load_file(path).items())
        if names.get(head, head) in names.values()
    }
    net = IdentityNet()
    net.load_state_dict(tensors)
    return net.eval().requires_grad_(False)
