"""Prepare a base model with its adapters for sampling: which files, which settings, and how it fits in memory."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusekrona_train.adapters.formats import AdapterFile, inject_file, read_adapter
from diffusekrona_train.common.device import DTYPES, device_type, free, name_of, pick_dtype, ran_out
from diffusekrona_train.common.files import sha256
from diffusekrona_train.common.process import world_size
from diffusekrona_train.common.run_folder import step_of
from diffusekrona_train.config import MODEL_ALIASES, MODEL_DEFAULTS, load_config
from diffusekrona_train.config.paths import user_path
from diffusekrona_train.models import generating_arguments, near_miss
from diffusekrona_train.models.contracts import Tensors
from diffusekrona_train.models.source import ModelSource, quiet
from diffusekrona_train.sampling.plan import Planned
from diffusekrona_train.sampling.render import SampleSettings, render
from diffusekrona_train.sampling.strengths import scheduled

OFFLOADS = ("none", "blocks", "model", "sequential")
"""Blocks: those of the denoiser are in host memory, in the form that `quantize` names."""
QUANTIZED = ("none", "nf4", "int8", "fp8")


DRAWING = (
    "out of device memory while generating. Use --quantize nf4 (with --offload blocks) and --vae-tiling, a smaller "
    "--batch-size or smaller images, and close other programs on the device"
)


@contextlib.contextmanager
def while_drawing() -> Iterator[None]:
    """Turn an out-of-memory error into a RuntimeError with advice."""
    try:
        yield
    except RuntimeError as error:
        if ran_out(error):
            raise RuntimeError(DRAWING) from error
        raise


@dataclass(frozen=True)
class Subject:
    """An adapter file in use: its strength, and the identifier token that replaces [V]."""

    file: AdapterFile
    strength: float = 1.0
    token: str | None = None
    noun: str | None = None

    @property
    def name(self) -> str:
        return Path(self.file.path).name


@dataclass(frozen=True)
class Memory:
    """How the model is kept in memory. dtype: auto, fp32, bf16, fp16; offload: a row of OFFLOADS; quantize: a row of
    QUANTIZED."""

    dtype: str = "auto"
    quantize: str = "none"
    offload: str = "none"
    vae_tiling: bool = False
    vae_slicing: bool = False
    fuse: bool = True

    @property
    def fuses(self) -> bool:
        """Return whether adapters are fused into the weights; 4-bit, 8-bit and offloaded weights cannot be."""
        return self.fuse and self.quantize == "none" and self.offload != "blocks"

    def __post_init__(self) -> None:
        choices = {"dtype": ("auto", *DTYPES), "quantize": QUANTIZED, "offload": OFFLOADS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)!r}: there are {', '.join(known)}")
        if self.offload == "sequential" and self.quantize != "none":
            raise ValueError("--offload sequential cannot move a quantised base; use --offload model or no --quantize")
        if self.offload == "blocks" and self.quantize == "int8":
            raise ValueError("--offload blocks keeps the base in none, nf4 or fp8, not in --quantize int8")


def find_adapter(source: Path, checkpoint: int | None = None) -> Path:
    """Find the adapter file of a run folder (the checkpoint asked for, else the final one, else the newest), or the
    file."""
    if not source.exists():
        raise ValueError(f"{str(source)!r}: no such run folder or adapter file{near_miss(source)}")
    if source.is_file():
        if checkpoint is not None:
            raise ValueError(f"--checkpoint {checkpoint} needs a run folder; {str(source)!r} is a file")
        return source
    steps = {step_of(path.parent): path for path in sorted((source / "checkpoints").glob("step-*/adapter.safetensors"))}
    if checkpoint is not None:
        if checkpoint not in steps:
            known = ", ".join(map(str, sorted(steps))) or "none"
            raise ValueError(f"--checkpoint {checkpoint}: {str(source)!r} has checkpoints at steps {known}")
        return steps[checkpoint]
    finals = [path for path in (source / f"{source.resolve().name}.safetensors",) if path.is_file()]
    finals = finals or sorted(source.glob("*.safetensors"))
    if len(finals) > 1:
        raise ValueError(f"{str(source)!r} holds {len(finals)} adapter files; name one of them")
    if not finals and not steps:
        raise ValueError(f"{str(source)!r} holds neither an adapter file nor checkpoints; is it a run folder?")
    return finals[0] if finals else steps[max(steps)]


def parse_use(text: str) -> tuple[Path, float | None]:
    """Parse 'dog.safetensors:0.7' as (path, 0.7); without a number None, the strength that the file recommends."""
    text = user_path(text, "--adapter")
    match = re.fullmatch(r"(.+?):([-+]?[0-9]*\.?[0-9]+)", text)
    if match and not Path(text).exists():
        return find_adapter(Path(match[1]).expanduser()), float(match[2])
    return find_adapter(Path(text).expanduser()), None


def recommended_strength(file: AdapterFile) -> float:
    """Return the strength that `krona-eval best` wrote into the file, 1 if none; ValueError where it is no number."""
    value = file.info.get("strength", 1.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(
            f"{file.path}: its metadata recommends strength {value!r}, which is not a number; give --scale"
        )
    return float(value)


def subjects_of(
    uses: Sequence[tuple[Path, float | None]], tokens: Sequence[str] = (), noun: str | None = None
) -> list[Subject]:
    """Read and check adapter files, in their order; `tokens` and `noun` override those of the files.

    A strength of None is the one that the file recommends.
    """
    found = []
    for i, (path, strength) in enumerate(uses):
        file = read_adapter(path)
        token = tokens[i] if i < len(tokens) else file.info.get("token")
        strength = recommended_strength(file) if strength is None else strength
        found.append(Subject(file, strength, token, noun or file.info.get("class")))
    families = {subject.file.family for subject in found if subject.file.family}
    if len(families) > 1:
        raise ValueError(
            f"the adapters are for different families ({', '.join(sorted(families))}); use them in separate commands"
        )
    return found


def fill_prompt(prompt: str, subjects: Sequence[Subject]) -> str:
    """Replace [V], [V1], [V2] … and {class}; ValueError if a file has no identifier token or class noun."""
    for marker in sorted(set(re.findall(r"\[V[0-9]*\]", prompt))):
        number = int(marker[2:-1] or 1)
        if not 1 <= number <= len(subjects):
            raise ValueError(f"prompt {prompt!r}: {marker} has no adapter; there are {len(subjects)}")
        token = subjects[number - 1].token
        if token is None:
            raise ValueError(f"{subjects[number - 1].name} has no identifier token for {marker}; give --token")
        prompt = prompt.replace(marker, token)
    if "{class}" in prompt:
        if not subjects or subjects[0].noun is None:
            raise ValueError(f"prompt {prompt!r}: the adapter file has no class noun for {{class}}; give --class")
        prompt = prompt.replace("{class}", subjects[0].noun)
    return prompt


def missing_identifiers(prompt: str, subjects: Sequence[Subject]) -> list[str]:
    """Return a warning for each adapter whose identifier does not occur in a filled prompt."""
    words = set(re.findall(r"\w+", prompt.lower()))
    warnings = []
    for i, subject in enumerate(subjects, start=1):
        if subject.token and not set(re.findall(r"\w+", subject.token.lower())) <= words:
            marker = "[V]" if len(subjects) == 1 else f"[V{i}]"
            warnings.append(f"prompt {prompt!r} does not name the subject of {subject.name}: write {marker}")
    return warnings


def shared_identifiers(subjects: Sequence[Subject]) -> list[str]:
    """Return a warning for each identifier that several adapters share: a prompt cannot tell them apart."""
    owners: dict[str, list[int]] = {}
    for i, subject in enumerate(subjects, start=1):
        if subject.token:
            owners.setdefault(subject.token.lower(), []).append(i)
    return [
        f"{' and '.join(f'[V{i}]' for i in own)} have the same identifier token, {token!r}: "
        "train each with its own subject.token"
        for token, own in owners.items()
        if len(own) > 1
    ]


def base_model_of(subjects: Sequence[Subject], model: str | None, run_folder: Path | None = None) -> dict[str, Any]:
    """Return arguments for open_model: from the user, else from the run's config, else from the adapter file."""
    said = next(filter(None, (subject.file.said_prediction(model) for subject in subjects)), None)
    if model is not None:
        return {"model": model, **({"prediction_type": said} if said else {})}
    config_file = run_folder / "config.yaml" if run_folder else None
    if config_file is not None and config_file.is_file():
        config = load_config(config_file)
        if config.sample.model is not None:
            return generating_arguments(config)
        names = ("model", "revision", "variant", "vae", "text_encoders", "model_config_dir", "prediction_type")
        return {name: getattr(config, name) for name in names} | {"text_precision": config.data.text_precision}
    told = [subject.file.info.get("sample_model") or subject.file.info.get("model") for subject in subjects]
    named = [str(name) for name in told if name]
    if not named:
        raise ValueError(f"{subjects[0].name} does not name its base model; give --model")
    if " sha256:" in named[0]:
        raise ValueError(f"{subjects[0].name} was trained on the local model {named[0]!r}; give its path with --model")
    return {"model": named[0], **({"prediction_type": said} if said else {})}


def check_base(source: ModelSource, subjects: Sequence[Subject]) -> None:
    """Raise ValueError if an adapter is for another family than the base; its layers are checked on injection."""
    for subject in subjects:
        if subject.file.family not in (None, source.family.name):
            made_for = subject.file.info.get("model", "an unknown model")
            raise ValueError(
                f"{subject.name} is for {made_for} (family {subject.file.family}); "
                f"{source.model!r} is of family {source.family.name}"
            )


def processes() -> Any:
    """Return accelerate's state under `accelerate launch` or torchrun, None for a lone one."""
    if world_size() < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=device_type() == "cpu")


def default_settings(source: ModelSource, subjects: Sequence[Subject]) -> SampleSettings:
    """Return the paper's 50 steps and guidance 7.5, or the model's own; the side that the adapter was trained at."""
    names = {target: alias for alias, target in MODEL_ALIASES.items()}
    own = MODEL_DEFAULTS.get(names.get(source.identity, ""), {}).get("validation", {})
    said = [subject.file.info.get("resolution") for subject in subjects]
    side = int(next((value for value in said if value), source.default_resolution))
    return SampleSettings(own.get("steps", 50), own.get("guidance", 7.5), height=side, width=side)


def sampling_dtype(source: ModelSource, memory: Memory, device: torch.device) -> torch.dtype:
    """Return the type to generate in: bf16 in place of fp16 where the model overflows in fp16, ValueError where fp16 is
    asked of it."""
    dtype = pick_dtype(memory.dtype, device)
    if dtype != torch.float16 or source.family.fp16:
        return dtype
    if memory.dtype == "fp16":
        raise ValueError(f"--dtype fp16: {source.model!r} overflows in it; use bf16")
    return torch.bfloat16


def fuses(source: ModelSource, memory: Memory, device: torch.device) -> bool:
    """Return whether adapters are fused: not into bf16 that nobody asked for, which rounds a small change away."""
    unasked = memory.dtype == "auto" and sampling_dtype(source, memory, device) == torch.bfloat16
    return memory.fuses and not unasked


def about_models(
    source: ModelSource, subjects: Sequence[Subject], memory: Memory, device: torch.device
) -> dict[str, Any]:
    """Describe the models for an image's record: names and hashes, no path."""
    adapters = [
        {"file": subject.name, "sha256": sha256(subject.file.path)[:16], "strength": subject.strength}
        for subject in subjects
    ]
    dtype, fused = sampling_dtype(source, memory, device), fuses(source, memory, device)
    return {"model": source.identity, "adapters": adapters, "dtype": name_of(dtype), "quantize": memory.quantize} | {
        "fused": fused
    }


class Studio:
    """The loaded pipeline. Texts are encoded first, in fp32 as training does, and the encoders leave before the
    denoiser comes, so that both never share the card."""

    @while_drawing()
    def __init__(
        self,
        source: ModelSource,
        subjects: Sequence[Subject],
        texts: Sequence[str],
        memory: Memory,
        device: torch.device,
    ):
        self.source, self.family, self.memory = source, source.family, memory
        self._conditioning = encode_texts(source, texts, device)
        self._scale: float | str | None = "not set"
        dtype = sampling_dtype(source, memory, device)
        place = device if memory.offload in ("none", "blocks") else torch.device("cpu")
        self.denoiser = source.load_denoiser(dtype, place, memory.quantize, memory.offload == "blocks")
        self.subjects = list(subjects)
        self.injections = [inject_file(self.denoiser, subject.file) for subject in subjects]
        parts = source.load("vae", "scheduler", dtype=torch.float32, device=place)
        self.pipe = self.family.pipeline({"denoiser": self.denoiser, **parts})
        if memory.vae_tiling:
            self.pipe.vae.enable_tiling()
        if memory.vae_slicing:
            self.pipe.vae.enable_slicing()
        self._device = device
        self._offloaded = False

    def set_scale(self, scale: float | None, fuse: bool, keep: bool = True) -> None:
        """Let the adapters act with `scale` times their strength (None: not at all); fused they cost nothing.

        `keep` False fuses one adapter for good: the scale can then not be set again, and no second copy of the weights
        is held.
        """
        for subject, injection in zip(self.subjects, self.injections, strict=True):
            if injection.fused:
                injection.unfuse()
            injection.set_strength(0.0 if scale is None else scale * subject.strength)
        if fuse and scale is not None:
            for injection in self.injections:
                injection.fuse(keep=keep or len(self.injections) > 1)  # several are to be rounded together
        self._scale = scale

    def offload(self) -> None:
        """Hand the modules to accelerate's hooks; after fusing, which needs the weights themselves."""
        if self.memory.offload in ("none", "blocks") or self._offloaded:
            return
        if self._device.type not in ("cuda", "xpu"):
            found = "the CPU shares its memory with it" if self._device.type == "mps" else "there is no GPU"
            raise ValueError(f"--offload {self.memory.offload} moves parts to a GPU, but {found}")
        if self.memory.offload == "model":
            self.pipe.enable_model_cpu_offload(device=self._device)
        else:
            self.pipe.enable_sequential_cpu_offload(device=self._device)
        self._offloaded = True

    def painter(
        self, scales: Sequence[float | None], keep: bool = True, varies: bool = False
    ) -> Callable[[list[Planned]], list[Any]]:
        """Return a function that generates one batch of a plan whose images have these `scales`.

        Adapters are fused where the base can take it (not 4 or 8 bits); with offload, only if the scale never changes.
        `keep` False: nothing else will be drawn, so that fused weights need no copy where there is one scale.
        `varies`: an image has a schedule of strengths; fused adapters are then fused again at each switch.
        """
        varies = varies or len(set(scales)) > 1
        fuse = fuses(self.source, self.memory, self._device) and (self.memory.offload == "none" or not varies)
        keep = keep or varies

        @while_drawing()
        def paint(batch: list[Planned]) -> list[Any]:
            if batch[0].scale != self._scale:
                self.set_scale(batch[0].scale, fuse, keep)
            self.offload()
            quiet()  # between two images the caller's log levels are back
            jobs = [(item.prompt, item.seed) for item in batch]
            with self._scheduled(batch[0], fuse):
                return render(
                    self.pipe,
                    self.family,
                    jobs,
                    batch[0].settings,
                    batch_size=len(jobs),
                    conditioning_of=self._conditioning.__getitem__,
                )

        return paint

    def _scheduled(self, item: Planned, fuse: bool) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the adapters follow the item's schedule of strengths, times its scale."""
        scale = item.scale
        if scale is None:
            return contextlib.nullcontext()
        return scheduled(
            self.denoiser,
            item.settings.strength_schedule,
            self.pipe.scheduler,
            lambda strength: self.set_scale(scale * strength, fuse),
        )


def encode_texts(source: ModelSource, texts: Sequence[str], device: torch.device) -> dict[str, Tensors]:
    """Encode texts with the family's encode_prompt; tensors are on the CPU, and the text encoders are freed."""
    parts = source.load("tokenizers", "text_encoders", device=device)
    encode = source.family.encode_prompt
    rows = {text: encode(parts["tokenizers"], parts["text_encoders"], text) for text in dict.fromkeys(texts)}
    del parts
    free()
    return {text: {name: value.cpu() for name, value in row.items()} for text, row in rows.items()}
