"""How a run is made to fit: plain, gradient checkpointing, NF4 with it, or blocks of the base in host memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusekrona_train.adapters import count_parameters
from diffusekrona_train.common.device import abilities, free_bytes
from diffusekrona_train.config import RunConfig
from diffusekrona_train.config.run import UNQUANTISED
from diffusekrona_train.models.contracts import Layer, MemoryFigures
from diffusekrona_train.models.layers import select_layers

GIB = 2**30
RESERVE = 1.0
"""GiB for the context and fragmentation."""

DECODING = 3.5
"""GiB that decoding one image of a megapixel takes in fp32, VAE included (counted by scripts/bench/trace.py: 3.3)."""
MOST_AT_ONCE = 8
"""Images that validation generates in one batch at most: between two batches it looks whether it should stop."""


@dataclass(frozen=True)
class Level:
    """One way to fit: how the frozen base is kept, and whether activations are computed again in the backward pass."""

    name: str
    quantize: str
    checkpointing: bool
    offload: bool = False
    """Whether the blocks of the base are in host memory, and on the device only while they are used."""

    def works_on(self, device: torch.device) -> bool:
        """Return whether a type of device can hold the base so."""
        able = abilities(device)
        return {"none": True, "fp8": able.float8}.get(self.quantize, able.quantized)


def levels(config: RunConfig) -> list[Level]:
    """Return the levels that a config allows, the fastest first."""
    kept = config.train.quantize
    ladder = [Level("plain", kept, False), Level("checkpointing", kept, True)]
    if config.adapter.type in UNQUANTISED:
        return ladder  # its base's own numbers are trained or needed: neither quantised nor away from the device
    if kept == "none" or kept == config.train.memory == "nf4":
        ladder += [Level("nf4", "nf4", True)]
    if kept != "int8":
        ladder += [Level("offload", "nf4" if kept == "none" else kept, True, offload=True)]
    return ladder


def choose(
    config: RunConfig,
    base_parameters: int,
    samples: int,
    dtype: torch.dtype,
    device: torch.device,
    figures: MemoryFigures,
    trained: int = 0,
) -> tuple[Level, str]:
    """Return the level to start with and a line that says why. `samples`: images in a forward pass, class images
    too."""
    ladder = levels(config)
    if config.train.memory != "auto":
        return next(level for level in ladder if level.name == config.train.memory), f"memory: {config.train.memory}"
    if (available := free_bytes(device)) is None:
        return ladder[0], f"memory: {ladder[0].name} (on the {device.type})"
    free = available / GIB
    ladder = [level for level in ladder if level.works_on(device)]
    needs = [(level, need(level, config, base_parameters, samples, dtype, figures, trained)) for level in ladder]
    level, least = next((pair for pair in needs if pair[1] <= free), needs[-1])
    return level, f"memory: {level.name} (about {least:.1f} GiB needed, {free:.1f} GiB free)"


def need(
    level: Level,
    config: RunConfig,
    base_parameters: int,
    samples: int,
    dtype: torch.dtype,
    figures: MemoryFigures,
    trained: int,
) -> float:
    """Return the GiB that a run needs at `level` while it trains: the step's, and what the trained numbers take."""
    megapixels = samples * (config.data.resolution / 1024) ** 2
    step = estimate(level, base_parameters, megapixels, dtype, figures)
    return step + trained * trained_bytes(config) / GIB


def room(
    level: Level,
    config: RunConfig,
    base_parameters: int,
    samples: int,
    dtype: torch.dtype,
    device: torch.device,
    figures: MemoryFigures,
    trained: int,
) -> float | None:
    """Return the GiB that `level` leaves free on the device, before the model is loaded; None where the device does not
    say."""
    if (available := free_bytes(device)) is None:
        return None
    return available / GIB - need(level, config, base_parameters, samples, dtype, figures, trained)


BLOCKS_HELD = 2
"""Blocks on the device where the others are in host memory: the one in use and the next."""
BYTES = {"int8": 1.04, "fp8": 1.01, "nf4": 0.56}
"""Bytes a quantised number, with its scales."""


def estimate(
    level: Level, base_parameters: int, megapixels: float, dtype: torch.dtype, figures: MemoryFigures
) -> float:
    """Return the GiB that a step needs at `level`; `figures` are the family's."""
    width = torch.finfo(dtype).bits / 8
    share = figures.quantized_share if level.quantize != "none" or level.offload else 0.0
    held = min(share, BLOCKS_HELD * figures.largest_block) if level.offload else share
    bytes_each = (1 - share) * width + held * BYTES.get(level.quantize, width)
    # bitsandbytes' 8-bit linears keep their inputs past checkpointing
    checkpointed = level.checkpointing and level.quantize != "int8"
    activations = figures.checkpointing if checkpointed else figures.plain
    return base_parameters * bytes_each / GIB + activations * width / 2 * megapixels + RESERVE


def decoding(config: RunConfig) -> float:
    """Return the GiB that decoding one image of the run's size takes, beside what training holds."""
    width = 4 if config.data.vae_precision == "fp32" else 2
    return DECODING * width / 4 * (config.data.resolution / 1024) ** 2


def images_at_once(config: RunConfig, dtype: torch.dtype, device: torch.device, figures: MemoryFigures) -> int:
    """Return how many images validation generates in a batch: what fits into the memory free now, decoding included.

    Without gradients a row needs less than a checkpointed step does; guidance makes two rows of an image. 1 on a CPU,
    which gains nothing, and where the device does not say.
    """
    available = None if device.type == "cpu" else free_bytes(device)
    if available is None:
        return 1
    width = torch.finfo(dtype).bits / 8
    each = 2 * figures.checkpointing * width / 2 * (config.data.resolution / 1024) ** 2
    return max(1, min(MOST_AT_ONCE, int((available / GIB - RESERVE - decoding(config)) / each)))


def trained_parameters(config: RunConfig, layers: list[Layer], base_parameters: int) -> int:
    """Return how many numbers a config trains, from the model's layers and size."""
    spec = config.adapter
    if spec.is_whole:
        return base_parameters
    return count_parameters(spec, select_layers(layers, spec))


def trained_bytes(config: RunConfig) -> int:
    """Return the bytes of a trained number: fp32 master, gradient, two moments, and a running average if any."""
    return 4 + 4 + (2 if config.train.optimizer == "adamw8bit" else 8) + (0 if config.train.average is None else 4)


def below(level: Level, config: RunConfig, device: torch.device) -> Level | None:
    """Return the next level down that works on `device`, None at the bottom or where the config names its level."""
    ladder = [other for other in levels(config) if other.works_on(device)]
    place = next(i for i, other in enumerate(ladder) if other.name == level.name)
    return ladder[place + 1] if config.train.memory == "auto" and place + 1 < len(ladder) else None


def out_of_memory(level: Level | None = None) -> str:
    """Return the message when nothing is left to try; without a level, before the first step."""
    if level is None:
        return (
            "out of device memory while the run was set up. Lower data.resolution, set data.vae_precision: bf16, "
            "data.text_precision: int8 or train.memory: nf4, and end other programs on the device"
        )
    return (
        f"out of device memory with memory: {level.name}. Lower train.batch_size (and raise "
        "train.gradient_accumulation), lower data.resolution, or set train.memory: offload with nf4"
    )
