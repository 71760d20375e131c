"""Sections subject, adapter, data and prior: what is learnt, from what, and by what.

Every field has one docstring line; `krona-train schema` prints them as a JSON schema for editors.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from diffusekrona_train.config.base import Strict, check_prompt, parse_count

PROJECTIONS = ("q", "k", "v", "o")
FactorPair = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]

InitA = Literal["normal", "normal_dim", "normal_dim_reciprocal", "kaiming_uniform", "xavier_uniform", "aligned"]


class SubjectConfig(Strict):
    PATHS = ("images", "files")
    images: str | None = None
    """Folder of photos (with .txt captions or metadata.jsonl or neither), a hub or Arrow data set, or toybox:NAME."""
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
    caption_key: Annotated[str, Field(min_length=1)] | None = None
    """Key of metadata.jsonl, or column of metadata.csv, with the captions (default: text, caption or prompt)."""
    image_column: Annotated[str, Field(min_length=1)] | None = None
    """Column of a data set with the photos (default: image, or the only column of images)."""
    caption_column: Annotated[str, Field(min_length=1)] | None = None
    """Column of a data set with the captions (default: text, caption or prompt)."""
    split: Annotated[str, Field(min_length=1)] | None = None
    """Split of a data set (default: train, or the only one)."""

    @model_validator(mode="after")
    def _no_conflicts(self) -> SubjectConfig:
        if not self.images and not self.files:
            raise ValueError("images is missing; name a folder of photos, a data set, or toybox:NAME (or list `files`)")
        for name, text in (("class", self.class_noun), ("token", self.token)):
            if not text.strip() or "\n" in text or "[V" in text or "{" in text:
                raise ValueError(f"{name}: {text!r} should be a plain word or two")
        check_prompt("prompt", self.prompt)
        return self

    def fill(self, text: str) -> str:
        """`text` with [V] and [V1] replaced by the identifier and {class} by the class noun."""
        return text.replace("[V1]", self.token).replace("[V]", self.token).replace("{class}", self.class_noun)


class AdapterConfig(Strict):
    type: Literal["krona", "lora", "lokr", "loha", "full", "terms", "dora", "oft"] = "krona"
    """Kind of adapter: krona (A x B), the baselines lora, lokr, loha, full; terms, dora, oft are for studies only."""
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
    init_a: InitA = "normal"
    """krona: A at the start; normal has standard deviation 1/a2, aligned follows the gradient of some samples."""
    align_draws: Annotated[int, Field(ge=1, le=1000)] = 16
    """krona with init_a: aligned: how many samples (photo, noise, timestep) the gradient is averaged over."""
    init_b: Literal["zero", "same"] = "zero"
    """krona: B at the start; `same` initialises it like A (the ablation that the paper reports as failing)."""
    rank: Annotated[int, Field(ge=1)] = 4
    """lora, lokr, loha, dora: rank of the low-rank factors; terms: how many terms."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """lora, lokr, loha, dora: the scale is alpha / rank; none means alpha = rank."""
    rank_scale: Literal["rank", "rs"] = "rank"
    """lora, lokr, loha, dora: what alpha is divided by; rs (rsLoRA) takes the square root of the rank."""
    rho: Annotated[int, Field(ge=1)] = 2
    """terms: A_k is rho x in/rho and B_k out/rho x rho; 1 is a LoRA."""
    block_size: Annotated[int, Field(ge=2)] = 16
    """oft: side of the orthogonal blocks."""
    factor: int = -1
    """lokr: FACTORIZATION factor; -1 takes the most balanced divisors."""
    full_matrix: bool = False
    """lokr: keep both factors as full matrices."""
    decompose_both: bool = False
    """lokr: give the smaller factor low rank too."""
    norm_cap: Annotated[float, Field(gt=0)] | None = None
    """krona: after each step, keep the spectral norm of A x B at most this share of the layer's own (such as 0.3)."""
    scale: float = 1.0
    """Multiplies what the adapter adds, in training and afterwards."""
    targets: list[Literal["q", "k", "v", "o"]] | Literal["all"] = list(PROJECTIONS)  # type: ignore[assignment]
    """Attention projections that are adapted; `all` (full only) trains the whole denoiser."""
    attention: Literal["both", "self", "cross"] = "both"
    """Adapt self-attention, cross-attention or both."""
    streams: list[Literal["image", "text"]] | None = None
    """Only layers that see tokens of the image or the text (default: both); one that sees both is always adapted."""
    blocks: list[str] | None = None
    """Only layers whose dotted name contains or matches (with * and ?) one of these patterns."""
    ffn: bool = False
    """Adapt the feed-forward layers too (the paper's ablation: twice the parameters, no gain)."""

    @model_validator(mode="before")
    @classmethod
    def _read_budget(cls, values: object) -> object:
        if isinstance(values, dict) and isinstance(values.get("params"), str):
            try:
                return {**values, "params": parse_count(values["params"])}
            except ValueError as error:
                raise ValueError(f"params: {error}") from None
        return values

    @property
    def is_whole(self) -> bool:
        """Whether every parameter of the denoiser trains, not only layers that can be adapted."""
        return self.targets == "all"

    @model_validator(mode="after")
    def _no_conflicts(self) -> AdapterConfig:
        budget = [name for name in ("params", "match_lora_rank") if getattr(self, name) is not None]
        if len(budget) == 2:
            raise ValueError("params and match_lora_rank are both given; keep one budget")
        for name in (*budget, "factors", "factors_by_width", "norm_cap"):
            if getattr(self, name) and self.type != "krona":
                raise ValueError(f"{name} is for type: krona, and type is {self.type}; take it out")
        for name in ("full_matrix", "decompose_both"):
            if getattr(self, name) and self.type != "lokr":
                raise ValueError(f"{name} is for type: lokr, and type is {self.type}; take it out")
        for name, kinds, default in (
            ("rank_scale", ("lora", "lokr", "loha", "dora"), "rank"),
            ("rho", ("terms",), 2),
            ("block_size", ("oft",), 16),
        ):
            if getattr(self, name) != default and self.type not in kinds:
                raise ValueError(f"{name} is for type: {' or '.join(kinds)}, and type is {self.type}; take it out")
        if self.init_a == "aligned" and (self.type != "krona" or self.init_b == "same"):
            raise ValueError("init_a: aligned is for type: krona with init_b: zero; choose another init_a")
        if self.factor != -1 and (self.type != "lokr" or self.factor < 1):
            raise ValueError(f"factor: {self.factor} is for type: lokr, where it is -1 or a positive number")
        if self.targets == "all" and self.type != "full":
            raise ValueError(f"targets: all is for type: full; {self.type} adapts a list such as [q, k, v, o]")
        if self.targets != "all" and (not self.targets or len(set(self.targets)) < len(self.targets)):
            raise ValueError(f"targets: {self.targets} should name at least one of q, k, v, o, each once")
        if self.streams is not None and (not self.streams or len(set(self.streams)) < len(self.streams)):
            raise ValueError(f"streams: {self.streams} should name at least one of image, text, each once")
        if self.blocks == []:
            raise ValueError("blocks is an empty list and would adapt nothing; take it out to adapt all blocks")
        return self


class DataConfig(Strict):
    PATHS = ("cache_dir",)
    resolution: Annotated[int, Field(ge=16, le=4096, multiple_of=8)] = 1024
    """Side of the square training crop in pixels (with buckets: the area is resolution squared)."""
    crop: Literal["center", "random"] = "center"
    """Where the square is cut from the photo after its shorter side is scaled to the resolution."""
    buckets: bool = False
    """Keep aspect ratios: photos go to buckets of equal area instead of square crops."""
    flip: bool = False
    """Mirror images at random (off: a face or a logo is not symmetric)."""
    variants: Annotated[int, Field(ge=1, le=64)] = 1
    """How many random crops and flips of an image are cached."""
    cache_dir: str | None = None
    """Where latents and text embeddings are kept; none means a `cache` folder beside the run folder."""
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the VAE while latents are made (SDXL's own VAE overflows in fp16)."""
    text_precision: Literal["auto", "fp32", "bf16", "int8"] = "auto"
    """Precision of the text encoders while prompts are encoded; auto: the model's own; int8 halves their memory."""

    @model_validator(mode="after")
    def _variants_differ(self) -> DataConfig:
        varied = self.crop == "random" or self.flip
        if varied and self.variants == 1:
            what = "crop: random" if self.crop == "random" else "flip: true"
            raise ValueError(f"{what} with variants: 1 is chosen once for the whole run; set variants to 4 or more")
        if not varied and self.variants > 1:
            raise ValueError(f"variants: {self.variants} would keep equal copies; set crop: random or flip: true")
        return self


class PriorConfig(Strict):
    PATHS = ("images",)
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

    @model_validator(mode="after")
    def _no_conflicts(self) -> PriorConfig:
        check_prompt("prompt", self.prompt)
        if "[V" in self.prompt:
            raise ValueError(f"prompt: {self.prompt!r} is the prompt of the class and must not hold [V]")
        if self.images is not None and self.kind != "images":
            raise ValueError(f"images is for kind: images, and kind is {self.kind}; take it out or set kind: images")
        return self
