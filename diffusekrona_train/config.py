"""The YAML of a run as strict models: the manual of the tool.

Imports pydantic and YAML alone, so that a mistake in a config is found in milliseconds, before torch is imported.
Every field has one docstring line; `krona-train schema` prints them as a JSON schema for editors.
"""

from __future__ import annotations

import difflib
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

MODEL_ALIASES = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd21": "stabilityai/stable-diffusion-2-1",
    "toybox": "toybox",
}
"""Short names that every door accepts for `model:`; `toybox` is embedded in the package."""

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "toybox": {
        "data": {"resolution": 64},
        "adapter": {"a1": 4, "a2": 4},
        "train": {"batch_size": 4},
        "validation": {"steps": 25, "guidance": 4.0},
    },
    "sd15": {"data": {"resolution": 512}},
    "sd14": {"data": {"resolution": 512}},
    "sd21": {"data": {"resolution": 768}},
}
"""Defaults that differ from the paper's SDXL ones; values in the YAML win over them."""

PROJECTIONS = ("q", "k", "v", "o")
FactorPair = Annotated[list[int], Field(min_length=2, max_length=2)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, populate_by_name=True, validate_default=True)


class SubjectConfig(Strict):
    images: str | None = None
    """Folder of photos (with optional .txt captions or metadata.jsonl), a hub or Arrow/Parquet data set, or toybox:NAME."""
    files: list[str] | None = None
    """Explicit image files, instead of or from within `images`."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first N images (one-shot and few-shot studies)."""
    class_noun: str = Field(alias="class", min_length=1)
    """What the subject is, in one or two words: dog, teapot, person."""
    token: str = Field("sks", min_length=1)
    """The rare word that [V] stands for in every prompt."""
    prompt: str = "A [V] {class}"
    """Caption of a photo that has none of its own."""
    captions: bool = True
    """Use captions found beside the images; false gives every image `prompt`."""

    def fill(self, text: str) -> str:
        """`text` with [V] and [V1] replaced by the identifier and {class} by the class noun."""
        return text.replace("[V1]", self.token).replace("[V]", self.token).replace("{class}", self.class_noun)


class AdapterConfig(Strict):
    type: Literal["krona", "lora", "lokr", "loha", "full"] = "krona"
    """Kind of adapter: krona (A x B), the baselines lora, lokr, loha, or full fine-tuning."""
    a1: Annotated[int, Field(ge=1)] = 4
    """krona: how many parts A splits the input width into (the paper's a1)."""
    a2: Annotated[int, Field(ge=1)] = 64
    """krona: how many parts A splits the output width into (the paper's a2)."""
    factors: dict[Literal["q", "k", "v", "o", "ffn"], FactorPair] = {}
    """krona: [a1, a2] by projection, where it differs from a1 and a2: {q: [8, 64]}."""
    factors_by_width: dict[int, FactorPair] = {}
    """krona: [a1, a2] for layers whose output width is the key: {640: [4, 32]}; `factors` wins over it."""
    params: Annotated[int, Field(ge=1)] | None = None
    """krona: a budget of trainable parameters (4M, 500k) from which a1 and a2 are chosen for each layer."""
    match_lora_rank: Annotated[int, Field(ge=1)] | None = None
    """krona: choose a1 and a2 so that the whole stays within what LoRA of this rank would train."""
    on_indivisible: Literal["error", "nearest"] = "error"
    """krona: what to do where a1 or a2 does not divide a layer's width."""
    init_a: Literal["normal", "normal_dim", "normal_dim_reciprocal", "kaiming_uniform", "xavier_uniform"] = "normal"
    """krona: distribution of A at the start; normal has standard deviation 1/a2."""
    init_b: Literal["zero", "same"] = "zero"
    """krona: B at the start; `same` draws it like A (the ablation that the paper reports as failing)."""
    rank: Annotated[int, Field(ge=1)] = 4
    """lora, lokr, loha: rank of the low-rank factors."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """lora, lokr, loha: the scale is alpha / rank; none means alpha = rank."""
    factor: int = -1
    """lokr: FACTORIZATION factor; -1 takes the most balanced divisors."""
    full_matrix: bool = False
    """lokr: keep both factors as full matrices."""
    decompose_both: bool = False
    """lokr: give the smaller factor low rank too."""
    scale: float = 1.0
    """Multiplies what the adapter adds, in training and afterwards."""
    targets: list[Literal["q", "k", "v", "o"]] | Literal["all"] = list(PROJECTIONS)  # type: ignore[assignment]
    """Attention projections that are adapted; `all` (full only) trains the whole denoiser."""
    attention: Literal["both", "self", "cross"] = "both"
    """Adapt self-attention, cross-attention or both."""
    blocks: list[str] | None = None
    """Only layers whose dotted name contains or matches (with * and ?) one of these patterns."""
    ffn: bool = False
    """Adapt the feed-forward layers too (the paper's ablation: twice the parameters, no gain)."""

    @model_validator(mode="before")
    @classmethod
    def _read_budget(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("params"), str):
            return {**values, "params": parse_count(values["params"])}
        return values

    @model_validator(mode="after")
    def _no_conflicts(self) -> AdapterConfig:
        given = self.model_fields_set
        if self.params and self.match_lora_rank:
            raise ValueError("params and match_lora_rank are both given; keep one budget")
        if (self.params or self.match_lora_rank) and {"a1", "a2", "factors", "factors_by_width"} & given and self.type == "krona":
            pass  # model defaults may set a1 and a2; a budget wins over them
        if self.targets == "all" and self.type != "full":
            raise ValueError(f"targets: all is for type: full; {self.type} adapts a list of projections such as [q, k, v, o]")
        if self.targets == []:
            raise ValueError("targets is empty; name at least one of q, k, v, o")
        if not math.isfinite(self.scale):
            raise ValueError("scale must be a finite number")
        return self


class DataConfig(Strict):
    resolution: Annotated[int, Field(ge=8, multiple_of=8)] = 1024
    """Side of the square training crop in pixels (with buckets: the area is resolution squared)."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut from the photo after its shorter side is scaled to the resolution."""
    buckets: bool = False
    """Keep aspect ratios: photos go to buckets of equal area instead of square crops."""
    flip: bool = False
    """Mirror pictures at random (off: a face or a logo is not symmetric)."""
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """How many random crops and flips of an image are cached."""
    cache_dir: str | None = None
    """Where latents and text embeddings are kept; none means a `cache` folder beside the run folder."""
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the VAE while latents are made (SDXL's own VAE overflows in fp16)."""


class PriorConfig(Strict):
    kind: Literal["none", "images", "teacher"] = "none"
    """Prior preservation: none, class images, or the frozen model as a teacher (no images)."""
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the prior term of the loss."""
    prompt: str = "A {class}"
    """The class prompt."""
    images: str | None = None
    """Folder of class images; missing ones are made by the base model (none: a folder in the cache)."""
    count: Annotated[int, Field(ge=1)] = 100
    """How many class images there should be."""


class TrainConfig(Strict):
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Optimiser steps: 500 for simple subjects and prompts, 1000 for complex ones."""
    learning_rate: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 5e-4
    """Learning rate of the factors."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Instance images a process takes at once; class images come on top."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=1024)] = 1
    """Micro-batches summed before an optimiser step."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw, or bitsandbytes' 8-bit AdamW (factors under 4096 elements stay 32-bit: it saves little here)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-2
    """AdamW's weight decay."""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; null does not clip."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule, counted in optimiser steps whatever the number of processes."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything: factors, picture order, noise, timesteps."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto: bf16 where the card is fast at it, else fp16, and no on a CPU."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Keep the frozen denoiser in 4 or 8 bits (bitsandbytes)."""
    memory: Literal["auto", "plain", "checkpointing", "nf4"] = "auto"
    """auto picks plain, gradient checkpointing, or NF4 with checkpointing from the free GPU memory."""
    compile: bool = False
    """torch.compile the denoiser."""
    tf32: bool = True
    """Allow TF32 matrix products on GPUs that have them."""
    channels_last: bool = False
    """Keep the denoiser in channels-last memory format."""
    loss: Literal["mse", "huber"] = "mse"
    """Loss between prediction and target."""
    weighting: Literal["none", "min_snr", "debiased"] = "none"
    """Weight of a sample's loss by its timestep."""
    snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    """min_snr: the clamp gamma."""
    noise_offset: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Adds a constant per channel to the noise."""
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of samples trained on the empty caption."""
    init_from: str | None = None
    """Adapter file to continue from (its weights, not its run)."""
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    """Optimiser steps between checkpoints."""
    keep_resume_states: Annotated[int, Field(ge=1)] = 2
    """How many resume states are kept; the adapters of all checkpoints are."""
    keep_best: bool = False
    """At the end, evaluate the checkpoints and name the best one."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Optimiser steps between lines of metrics.jsonl."""
    trackers: list[str] = []
    """Further trackers that accelerate knows: tensorboard, wandb, ..."""


class ValidationConfig(Strict):
    prompts: list[str] = ["A [V] {class} on the beach", "A [V] {class} in the snow"]
    """Prompts rendered while training; [V] stands for the identifier, {class} for the class noun."""
    every: Annotated[int, Field(ge=0)] = 100
    """Optimiser steps between validations; 0 renders none."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = [0]
    """Fixed seeds; each prompt is rendered once for each."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 7.5
    """Classifier-free guidance scale."""
    negative: str = ""
    """Negative prompt."""
    loss: bool = True
    """Also measure the loss on fixed noise at fixed timestep quantiles."""


class RunConfig(Strict):
    model: str = "sdxl"
    """Hub name, local diffusers folder, one .safetensors file, or an alias: sdxl, sd15, sd14, sd21, toybox."""
    revision: str | None = None
    """Hub revision of the model."""
    variant: str | None = None
    """Weight variant such as fp16; none takes fp16 files where the hub has them."""
    vae: str | None = None
    """Another VAE: hub name, folder or file."""
    model_config_dir: str | None = None
    """Folder with the configs and tokenizers for a single-file model; none takes the package's own."""
    subject: SubjectConfig
    """The subject: its photos, class noun and identifier."""
    adapter: AdapterConfig = AdapterConfig()
    """What is trained."""
    data: DataConfig = DataConfig()
    """How photos become latents."""
    prior: PriorConfig = PriorConfig()
    """Prior preservation."""
    train: TrainConfig = TrainConfig()
    """The optimisation."""
    validation: ValidationConfig = ValidationConfig()
    """What is rendered and measured while training."""
    output: str
    """Folder of the run; the adapter is named after it."""

    @property
    def name(self) -> str:
        """Base name of the run: `dog` for runs/dog."""
        return Path(self.output).name


def parse_count(text: str) -> int:
    """'4M' -> 4000000, '500k' -> 500000, '1234' -> 1234; ValueError otherwise."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKmM]?)\s*", text)
    if not match:
        raise ValueError(f"{text!r} is not a number of parameters; write 4M, 500k or 4000000")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()])
