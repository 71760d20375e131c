"""What the flow transformers share: a flow, latents with a shift, layers by block and stream, names in files.

A family states its blocks, its feed-forwards and its fused linears as tables, and adds prompts, `predict` and `sample`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diffusekrona_train.models import layers as names
from diffusekrona_train.models.contracts import Config, Layer, Linears, Loaded, Process, Request
from diffusekrona_train.models.process import Flow
from diffusekrona_train.models.sd import SD, decoded, optional


class FlowTransformer(SD):
    """What differs from the UNets, for all transformers that predict a velocity."""

    side_multiple = 16
    caption = ""
    streams: Mapping[str, str] = {}
    """Path of repeated blocks -> whose tokens they see: image, text or both; a text projection inside is text."""
    feed_forward: Mapping[str, str] = {}
    """Pattern of a feed-forward's linear inside a block -> its stream, "" for the block's own."""
    gated: str = r"(.+)\.(gate|up)"
    """Pattern of the feed-forwards' linears that are given the same input; its first group is what they share."""
    fused: Mapping[str, str] = {}
    """Path inside a block of a linear that holds several projections -> their letters."""
    dead: Sequence[str] = ()
    """Patterns of what leads nowhere inside the last block of the first kind: its gradient is always zero."""
    originals: Mapping[str, str] = {}
    """Pattern in a diffusers path -> what the original release calls it, applied in turn."""
    joined: Mapping[str, str] = {}
    """Pattern in a diffusers path -> the original linear that holds it beside others: rows of q, k, v, then of ffn."""
    turned: Sequence[str] = ()
    """Patterns of what gives two halves, scale and shift, where the original linear gives shift and scale."""
    pipeline_class = ""
    version = ""
    architecture = ""
    """What other tools call the base: ss_base_model_version, and modelspec.architecture without /lora."""

    @property
    def blocks(self) -> tuple[str, ...]:  # type: ignore[override]
        """Return the paths of the repeated blocks, in the order in which they run."""
        return tuple(self.streams)

    def matches(self, denoiser_config: Config) -> bool:
        """Return True for the family's own class of transformer."""
        return denoiser_config.get("_class_name") == self.parts.denoiser.cls

    def process(self, scheduler_config: Config, side: int) -> Process:
        """Return a flow with the shift of the scheduler's config, for image tokens of 16 pixels a side."""
        name = scheduler_config.get("_class_name")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(
                f"its scheduler/scheduler_config.json names {name}, which is not a flow-matching scheduler; "
                "name the model's own, FlowMatchEulerDiscreteScheduler"
            )
        return Flow.from_config(scheduler_config, (side // self.side_multiple) ** 2)

    def default_resolution(self, denoiser_config: Config, vae_config: Config) -> int:
        """Return the side that the VAE was trained on, in pixels: the transformers' configs have none."""
        return int(vae_config.get("sample_size") or 1024)

    # ---- images ----

    def encode_image(self, vae: Loaded, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pixels (B, 3, H, W) in [-1, 1] as latents (B, C, h, w), shifted and scaled; the posterior's mean
        without a generator."""
        return (posterior(vae, pixels, generator) - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode(self, vae: Loaded, latents: Tensor) -> Tensor:
        """Decode shifted and scaled latents (B, C, h, w) to images (B, 3, H, W) fp32 in [0, 1]."""
        return decoded(vae, latents.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0))

    # ---- the denoiser ----

    def describe(self, name: str, in_features: int, out_features: int) -> Layer | None:
        """Describe a projection or feed-forward of the blocks; None for modulation, embedders and the last layer."""
        match = self._in_block(name)
        if match is None:
            return None
        block, rest, stream = match["block"], match["rest"], self.streams[match["kind"]]
        for pattern, whose in self.feed_forward.items():
            if re.fullmatch(pattern, rest):
                pair = re.fullmatch(self.gated, name)
                group = pair[1] if pair else name
                return Layer(name, in_features, out_features, "ffn", "ffn", whose or stream, block, group)
        if rest in self.fused:
            return Layer(name, in_features, out_features, self.fused[rest], "self", stream, block, name)
        found = names.describe(name, in_features, out_features)
        if found is None or found.kind == "ffn":
            return None
        return replace(found, block=block, stream="text" if found.stream == "text" else stream)

    def layers(self, linears: Linears) -> list[Layer]:
        """Return every projection and feed-forward of the blocks that has a gradient, in the model's order."""
        found = [layer for name, widths in linears.items() if (layer := self.describe(name, *widths))]
        first = [layer.block for layer in found if layer.block.startswith(f"{self.blocks[0]}.")]
        last = max(first, key=lambda block: int(block.rpartition(".")[2]), default="")
        return [layer for layer in found if not (layer.block == last and self._is_dead(layer))]

    def describe_other(self, name: str, in_features: int, out_features: int) -> Layer | None:
        """Describe a modulation, an embedder or the last layer."""
        if self.describe(name, in_features, out_features) is not None:
            return None
        match = self._in_block(name)
        return Layer(name, in_features, out_features, "other", "other", "both", match["block"] if match else "", name)

    def _is_dead(self, layer: Layer) -> bool:
        return any(re.fullmatch(pattern, layer.name.removeprefix(f"{layer.block}.")) for pattern in self.dead)

    def without_effect(self, layers: Sequence[Layer]) -> Sequence[str]:
        """Return the paths in the last block that `layers` leaves out, which other tools adapt all the same."""
        first = [layer for layer in layers if layer.block.startswith(f"{self.blocks[0]}.")]
        if not first:
            return ()
        start, last = first[0].block, first[-1].block
        known = {layer.name for layer in first}
        dead = [layer.name.replace(start, last, 1) for layer in first if layer.block == start and self._is_dead(layer)]
        return [name for name in dead if name not in known]

    def quantizes(self, name: str) -> bool:
        """Return True in the blocks, their modulation included; embedders and the last layer stay."""
        return self._in_block(name) is not None

    def _in_block(self, name: str) -> re.Match[str] | None:
        kinds = "|".join(map(re.escape, self.streams))
        return re.fullmatch(rf"(?P<block>(?P<kind>{kinds})\.\d+)\.(?P<rest>.+)", name)

    # ---- generating ----

    def pipeline(self, parts: Mapping[str, Any]) -> Any:
        """Build diffusers' pipeline from loaded parts; text encoders and tokenizers may be missing."""
        import diffusers

        encoders, tokenizers = optional(parts, len(self.parts.text_encoders))
        texts = (*self.parts.text_encoders, *self.parts.tokenizers)
        named = {part.folder: loaded for part, loaded in zip(texts, (*encoders, *tokenizers), strict=True)}
        pipe = getattr(diffusers, self.pipeline_class)(
            transformer=parts["denoiser"], vae=parts["vae"], scheduler=parts["scheduler"], **named
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    # ---- files ----

    def file_name(self, layer: str, layers_per_block: int = 2) -> str:
        """Return lycoris_ and the diffusers path, as LyCORIS writes it and ComfyUI reads it."""
        return names.underscored("lycoris_", layer)

    def other_names(self, layer: str, layers_per_block: int = 2) -> Sequence[str]:
        """Return the diffusers path and, where one original linear is this layer, its path: bare, below transformer.
        and diffusion_model., kohya's, LyCORIS's and OneTrainer's."""
        return self._forms(*dict.fromkeys([layer, self.original(layer)]))

    def joined_names(self, layer: str) -> Sequence[str]:
        """Return what tools call the original linear that holds this layer beside others, in the forms of
        `other_names`."""
        held = [re.sub(pattern, new, layer) for pattern, new in self.joined.items() if re.search(pattern, layer)]
        return names.usual_names(*held, prefixes=["transformer", "diffusion_model"])

    def turned_names(self, layer: Layer) -> Sequence[str]:
        """Return the original names of a layer whose halves have the other order there, in the forms of
        `other_names`."""
        if layer.out_features != 2 * layer.in_features or not any(re.fullmatch(one, layer.name) for one in self.turned):
            return ()
        return self._forms(self.original(layer.name))

    def _forms(self, *paths: str) -> list[str]:
        usual = names.usual_names(*paths, prefixes=["transformer", "diffusion_model"])
        return [*usual, *(names.underscored("lora_transformer_", path) for path in paths)]

    def original(self, layer: str) -> str:
        """Return the original path of a diffusers path by `originals`; itself where it is a part of a fused linear."""
        for pattern, new in self.originals.items():
            layer = re.sub(pattern, new, layer)
        return layer

    def metadata(self, layers: Sequence[Layer], prediction_type: str) -> dict[str, str]:
        """Return the base as other trainers name it."""
        return {
            "ss_base_model_version": self.version,
            "modelspec.architecture": f"{self.architecture}/lora",
            "modelspec.implementation": "diffusers",
            "modelspec.prediction_type": "flow",
        }


def posterior(vae: Loaded, pixels: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return what the encoder gives for pixels, as it comes: the mean without a generator, else a sample."""
    found = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return found.mean if generator is None else found.sample(generator)


def hidden_states(encoder: Loaded, tokens: Mapping[str, Tensor], taken: Sequence[int]) -> Tensor:
    """Return the hidden states behind the layers `taken` of a causal text encoder, (L, layers, D)."""
    given = {name: value.to(encoder.device) for name, value in tokens.items()}
    with torch.no_grad():
        found = encoder(**given, output_hidden_states=True, use_cache=False)
    return torch.stack([found.hidden_states[layer][0] for layer in taken], dim=1)


def pack(latents: Tensor) -> Tensor:
    """Make tokens of 2 x 2 latents: (B, C, h, w) -> (B, h w / 4, 4 C), channels in the order c, row, column."""
    return functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Turn `pack` back: (B, h w / 4, 4 C) -> (B, C, h, w), for latents of `height` x `width`."""
    return functional.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return where an image's tokens are, (rows columns, 3): 0, row, column."""
    ranges = [torch.arange(count, device=device) for count in (1, rows, columns)]
    return torch.cartesian_prod(*ranges)


def usual(request: Request) -> dict[str, Any]:
    """Return what every pipeline's call takes of a request, beside its guidance."""
    return {
        "generator": request.generators,
        "num_inference_steps": request.steps,
        "height": request.height,
        "width": request.width,
        "output_type": "latent",
        "return_dict": False,
    }
