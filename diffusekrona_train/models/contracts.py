"""What the package needs from a model family, its noise process and the source of a model.

A family is one file of this package with an object that pyright holds to `Family` (`FAMILY: Family = SDXL()`), and one
row in registry.FAMILIES. Nothing outside that file knows the family's parts, shapes, signs, scales or packing.

Letters in shapes: B images, C channels, h and w sides of a latent, H and W sides of an image in pixels, L tokens of
a prompt, D a width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import ModelMixin as Denoiser
else:
    Denoiser = nn.Module  # importing diffusers takes seconds

Config = Mapping[str, Any]
"""A part's config.json."""
Tensors = dict[str, Tensor]
"""What one prompt or one image brings, by name, without a batch axis. Masks are named `*_mask`; integers and
booleans are never cast."""
Conditioning = dict[str, Any]
"""The same for B images: name -> Tensor (B, ...), or a list of B tensors where a family takes lists."""
DENOISERS = ("unet", "transformer")
"""Folders that a denoiser may lie in."""
Linears = Mapping[str, tuple[int, int]]
"""Dotted name -> (in_features, out_features) of every linear of a denoiser, in the model's order."""


class Loaded(Protocol):
    """An object of diffusers or transformers (VAE, text encoder, tokenizer, pipeline), with its own class's members."""

    def __getattr__(self, name: str, /) -> Any: ...
    def __setattr__(self, name: str, value: object, /) -> None: ...
    def __call__(self, *args: Any, **options: Any) -> Any: ...


class Loadable(Protocol):
    """A class of diffusers or transformers that reads its own files."""

    @classmethod
    def from_pretrained(cls, name: str, /, **options: Any) -> Any: ...


# ---- what a family is made of ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """One part of a model: its folder in diffusers' layout and the class that reads it."""

    folder: str
    cls: str
    library: str = "diffusers"
    """diffusers or transformers."""
    dtype: torch.dtype = torch.float32
    """What a text encoder is held in while prompts are encoded, where the caller does not say."""


@dataclass(frozen=True)
class Parts:
    """The parts of a family by what they do. A scheduler's class is named in its own config."""

    denoiser: Part
    vae: Part
    text_encoders: tuple[Part, ...]
    """In the order in which `encode_prompt` takes them."""
    tokenizers: tuple[Part, ...]


@dataclass(frozen=True)
class Layer:
    """A linear layer that can be adapted."""

    name: str
    """Dotted path in the denoiser: down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"""
    in_features: int
    out_features: int
    projection: str
    """Its role: q, k, v, o or ffn; several letters where one linear holds several projections (qkv)."""
    kind: str
    """self, cross or ffn; proj and other for what only other tools adapt"""
    stream: str = "image"
    """Whose tokens it sees in a denoiser of two streams: image, text or both; image where there is but one stream."""
    block: str = ""
    """Dotted path of the block that it is in."""
    group: str = ""
    """Equal for layers that are given the same input: q, k, v of a self attention; k, v of a cross attention."""


@dataclass(frozen=True)
class MemoryFigures:
    """What a training step needs beside the weights, in GiB in 16 bits for an image of one megapixel."""

    plain: float
    checkpointing: float
    """The same with gradient checkpointing."""
    quantized_share: float
    """Share of the denoiser's parameters that `Family.quantizes` lets into 4 or 8 bits, 0 to 1."""
    largest_block: float = 0.05
    """Share of the denoiser's parameters that are such in its largest block."""


@dataclass(frozen=True)
class Request:
    """One batch to generate: what is the same for all its images."""

    steps: int
    guidance: float
    """Classifier-free guidance by the usual measure: on above 1; a family converts it to its own."""
    height: int
    """Pixels."""
    width: int
    generators: list[torch.Generator]
    """One an image: for samplers that add noise of their own."""
    negative_is_empty: bool = True
    """Whether the negative prompt is ''."""


# ---- how noise comes in ---------------------------------------------------------------------------------------------


class Process(Protocol):
    """The forward process: times, noise, what the denoiser is to predict, and how an error counts.

    A time is what `draw_t` gives: int64 in [0, T) for `Ddpm`, fp32 sigma in [0, 1] for `Flow` (1: noise alone). x_0 and
    eps are (B, C, h, w), t is (B,).
    """

    @property
    def prediction_type(self) -> str:
        """epsilon, v_prediction, sample or flow."""
        ...

    def draw_t(self, generator: torch.Generator) -> Tensor:
        """Draw one time, (), from a CPU generator."""
        ...

    def quantile(self, q: float) -> Tensor:
        """Return the time, (), below which the share q of what `draw_t` gives lies; 0 < q < 1."""
        ...

    def noised(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return x_t (B, C, h, w)."""
        ...

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what `Family.predict` should give at x_t, (B, C, h, w)."""
        ...

    def weight(self, name: str, t: Tensor, gamma: float) -> Tensor:
        """Return the weight of each sample's loss by its time, (B,); `name` is a row of process.WEIGHTINGS."""
        ...

    def check_weighting(self, name: str) -> None:
        """Raise a one-line ValueError if the weighting `name` means nothing for this process."""
        ...

    def to(self, device: torch.device) -> Process:
        """Return the same with its tables on `device`."""
        ...


# ---- where a model is -----------------------------------------------------------------------------------------------


class Place(Protocol):
    """A folder, a file or a repository that holds a model's parts. Finding one reads no weight."""

    @property
    def identity(self) -> str:
        """Return what may be written about the model in a file that is shared: hub name, or base name and hash."""
        ...

    @property
    def alias(self) -> str | None:
        """Return the short name of a model that the package knows, else None."""
        ...

    def config(self, part: str) -> dict[str, Any]:
        """Return the config of the part in folder `part`; `model_index` is the pipeline's own.

        ValueError where it is not there or cannot be read.
        """
        ...

    def load_part(self, part: str, cls: type, **options: Any) -> Any:
        """Load `cls` from the folder `part`; options are `from_pretrained`'s. ValueError where it cannot be read."""
        ...


# ---- the family -----------------------------------------------------------------------------------------------------


class Family(Protocol):
    """How one family of models turns images and prompts into tensors, predicts, generates and names its layers.

    Latents are (B, C, h, w) as `encode_image` gives them, normalised and not packed: whoever packs does it inside
    `predict` and `sample`.
    """

    @property
    def name(self) -> str:
        """Row in registry.FAMILIES; stored in adapter files."""
        ...

    @property
    def parts(self) -> Parts: ...

    @property
    def side_multiple(self) -> int:
        """Pixels that the sides of an image divide by."""
        ...

    @property
    def negative_prompt(self) -> bool:
        """Whether `sample` makes use of a negative prompt."""
        ...

    @property
    def blocks(self) -> tuple[str, ...]:
        """Dotted paths in the denoiser of what holds its repeated blocks, in the order in which they run."""
        ...

    @property
    def memory(self) -> MemoryFigures: ...

    @property
    def loads_lokr(self) -> bool:
        """Whether its pipeline's load_lora_weights takes LoKr files too."""
        ...

    @property
    def fp16(self) -> bool:
        """Whether the denoiser can compute in fp16; where its numbers overflow there, it is refused."""
        ...

    def matches(self, denoiser_config: Config) -> bool:
        """Return whether a denoiser with this config (with `_class_name`) is of the family."""
        ...

    def process(self, scheduler_config: Config, side: int) -> Process:
        """Return the process of a model, trained on images with `side` pixels a side. ValueError for a config that it
        cannot follow."""
        ...

    def default_resolution(self, denoiser_config: Config, vae_config: Config) -> int:
        """Return the side in pixels that the model was trained for."""
        ...

    def latent_shape(self, vae_config: Config, height: int, width: int) -> tuple[int, int, int]:
        """Return (C, h, w) of the latent of an image of these pixels."""
        ...

    # images

    def encode_image(self, vae: Loaded, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] as latents (B, C, h, w); the most likely ones without a generator."""
        ...

    def decode(self, vae: Loaded, latents: Tensor) -> Tensor:
        """Decode latents (B, C, h, w) to images (B, 3, H, W), fp32 in [0, 1]."""
        ...

    def picture_conditioning(
        self, original_hw: tuple[int, int], crop_top_left: tuple[int, int], target_hw: tuple[int, int]
    ) -> Tensors:
        """Return what the denoiser gets for an image beside its prompt, in pixels; {} for most. Kept in its own
        type."""
        ...

    # prompts

    def encode_prompt(self, tokenizers: Sequence[Loaded], text_encoders: Sequence[Loaded], prompt: str) -> Tensors:
        """Encode one prompt as its tensors, of its own length; padding is cut where the denoiser does not see it."""
        ...

    def collate(self, rows: Sequence[Tensors]) -> Conditioning:
        """Batch rows of `encode_prompt`, of unequal lengths too, as what `predict` and `sample` take for a batch of
        them."""
        ...

    # the denoiser

    @property
    def caption(self) -> str:
        """Name of the conditioning that `predict` gives to every cross-attention unchanged; "" if it changes on the way
        or there is no such attention."""
        ...

    def predict(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Return the prediction (B, C, h, w) in the convention of `process.target`: no caller knows a sign, scale or
        packing.

        x_t (B, C, h, w) in the denoiser's type, t (B,) of the process; conditioning from `collate`, with the stacked
        `picture_conditioning` beside it.
        """
        ...

    def describe(self, name: str, in_features: int, out_features: int) -> Layer | None:
        """Return the row of a linear of this dotted name; None for one that is not adapted."""
        ...

    def layers(self, linears: Linears) -> list[Layer]:
        """Return every layer of a complete denoiser that can be adapted; layers whose gradient is always zero are left
        out."""
        ...

    def describe_other(self, name: str, in_features: int, out_features: int) -> Layer | None:
        """Return the row of a linear that only files of other tools adapt, such as a modulation; None for another
        one."""
        ...

    def quantizes(self, name: str) -> bool:
        """Return whether the linear of this dotted name may be held in 4 or 8 bits."""
        ...

    # generating

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """Build diffusers' pipeline from loaded parts (`ModelSource.load`); text encoders and tokenizers may be
        missing."""
        ...

    def sample(
        self, pipe: Loaded, noise: Tensor, positive: Conditioning, negative: Conditioning | None, request: Request
    ) -> Tensor:
        """Generate latents (B, C, h, w) from `noise` (B, C, h, w), standard normal; `decode` makes images of them.

        `negative` is None where the family has no negative prompt.
        """
        ...

    # files

    def file_name(self, layer: str, layers_per_block: int = 2) -> str:
        """Return the name of a layer (dotted path) in an adapter file, without a tensor's suffix, as ComfyUI reads it.

        layers_per_block is the UNet's, by which SDXL's original names count.
        """
        ...

    def other_names(self, layer: str, layers_per_block: int = 2) -> Sequence[str]:
        """Return every name that tools give this layer, `file_name` among them."""
        ...

    def without_effect(self, layers: Sequence[Layer]) -> Sequence[str]:
        """Return the dotted paths that the complete list `layers` leaves out, as their outputs lead nowhere."""
        ...

    def joined_names(self, layer: str) -> Sequence[str]:
        """Return every name that tools give the original linear that holds this layer beside others: rows of q, k, v,
        then of a feed-forward. Empty where no such linear is."""
        ...

    def turned_names(self, layer: Layer) -> Sequence[str]:
        """Return every name that tools give the original linear of this layer where its two halves of rows have the
        other order. Empty where all rows have one order."""
        ...

    def metadata(self, layers: Sequence[Layer], prediction_type: str) -> dict[str, str]:
        """Return what an adapter file records about its base for other tools: ss_base_model_version,
        modelspec.architecture, …"""
        ...
