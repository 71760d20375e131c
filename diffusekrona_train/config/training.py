"""Sections train and validation: the optimisation, and what is rendered and measured meanwhile."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffusekrona_train.config.base import Strict, check_prompt
from diffusekrona_train.config.strengths import parse_strengths

Tracker = Literal["tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"]
Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Strict):
    PATHS = ("init_from",)
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 500
    """Optimiser steps: 500 for simple subjects and prompts, 1000 for complex ones."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 5e-4
    """Learning rate of the factors, in the unit of `rate_unit`."""
    rate_unit: Literal["factor", "dw"] = "factor"
    """factor: a step moves each factor by about the rate; dw: it moves ΔW by rms rate, whatever the type and shape."""
    rate_ratio: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Rate of the factor that starts at zero (krona's B, LoRA's up) over the others' (LoRA+: 16)."""
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 1
    """Instance images a process takes at once; class images come on top."""
    gradient_accumulation: Annotated[int, Field(ge=1, le=1024)] = 1
    """Micro-batches summed before an optimiser step."""
    average: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Save and show a running average of the factors, of this weight for the past (0.95); null: the factors."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw, or bitsandbytes' 8-bit AdamW (factors under 4096 elements stay 32-bit: it saves little here)."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.999)
    """AdamW's betas."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    """AdamW's weight decay."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm to this; null does not clip."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule, counted in optimiser steps whatever the number of processes."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of everything: factors, order of images, noise, timesteps."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """auto: bf16 where the card is fast at it, else fp16, and no on a CPU."""
    quantize: Literal["none", "nf4", "int8", "fp8"] = "none"
    """Keep the frozen denoiser's blocks in 4 or 8 bits: nf4, int8 (bitsandbytes), fp8 (8-bit floats, scaled by row)."""
    memory: Literal["auto", "plain", "checkpointing", "nf4", "offload"] = "auto"
    """auto picks by the free GPU memory: plain, checkpointing, nf4 with it, or offload (nf4 or fp8 in host memory)."""
    compile: bool = False
    """torch.compile the transformer blocks; needs a C++ compiler, and minutes for the first step."""
    cuda_graph: Literal["auto", True, False] = "auto"
    """Replay the step as a CUDA graph: auto (where memory allows it), true (always tries) or false."""
    tf32: bool = True
    """Allow TF32 matrix products on GPUs that have them."""
    channels_last: bool = False
    """Keep the denoiser in channels-last memory format."""
    loss: Literal["mse", "huber", "dco"] = "mse"
    """Loss between prediction and target; dco compares the squared error with the base model's (one more pass)."""
    dco_beta: Annotated[float, Field(gt=0)] = 1000.0
    """dco: how soon a sample counts less once the adapter predicts it better than the base does."""
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
    trackers: list[Tracker] = []
    """Further trackers that accelerate knows: tensorboard, wandb, ..."""

    @model_validator(mode="after")
    def _no_conflicts(self) -> TrainConfig:
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps: {self.warmup_steps} is more than steps: {self.steps}")
        if self.memory == "nf4" and self.quantize in ("int8", "fp8"):
            raise ValueError(f"memory: nf4 and quantize: {self.quantize} ask for two different bases; keep one")
        if self.memory == "offload" and self.quantize == "int8":
            raise ValueError("memory: offload keeps the base in nf4 or fp8, not in quantize: int8; set one of them")
        return self


class SampleConfig(Strict):
    PATHS = ("model",)
    model: str | None = None
    """Model that images are generated with, if another: the distilled one of the model that is trained."""


class ValidationConfig(Strict):
    prompts: list[str] = ["A [V] {class} on the beach", "A [V] {class} in the snow"]
    """Prompts rendered while training; [V] stands for the identifier, {class} for the class noun."""
    every: Annotated[int, Field(ge=0)] = 100
    """Optimiser steps between validations; 0 renders none."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = [0]
    """Fixed seeds; each prompt is rendered once for each."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 50
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0, le=100)] = 7.5
    """Classifier-free guidance scale."""
    negative: str = ""
    """Negative prompt."""
    strength_schedule: str = ""
    """Strength of the adapter over the noise levels: "0.3@0.25" is 0.3 in the first quarter of them, then 1."""
    loss: bool = True
    """Also measure the loss on fixed noise at fixed timestep quantiles."""
    report: bool = True
    """Write report.html and loss.png, after every validation and at the end."""

    @model_validator(mode="after")
    def _no_conflicts(self) -> ValidationConfig:
        for index, prompt in enumerate(self.prompts):
            check_prompt(f"prompts[{index}]", prompt)
        if self.every and self.prompts and not self.seeds:
            raise ValueError("seeds is empty; give at least one, or set every: 0 to render nothing")
        parse_strengths(self.strength_schedule)
        return self
