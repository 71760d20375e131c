"""A training step to be timed: the loop's own over random latents, or the bare frozen UNet's two passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from diffusekrona_train.adapters.grouped import Chooser
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.config import make_config
from diffusekrona_train.data.training_set import Bucket, TrainingSet
from diffusekrona_train.models import family_of
from diffusekrona_train.models.contracts import Process
from diffusekrona_train.models.process import Ddpm, Flow
from diffusekrona_train.training.graph import CudaRecorder, Recorder, StepGraphs, add_gradients, leaves, put, staying
from diffusekrona_train.training.loss import Batch, Objective
from diffusekrona_train.training.optimizer import Descent
from scripts.bench.setting import Setting
from tests.tiny import make_unet, real_part

TENSOR_RATE = torch.library.Library("aten", "IMPL", "Meta")
"""PyTorch has the optimiser's kernel for tensors without content, but not with the learning rate as a tensor."""
TENSOR_RATE.impl("_fused_adamw_.tensor_lr", lambda *given, **named: None)

OneProcess = SimpleNamespace(num_processes=1, scaler=None, backward=lambda loss: loss.backward())


def load(setting: Setting, kind: str) -> Any:
    """A random UNet of the real configuration on the device, or the small one."""
    torch.manual_seed(0)
    if setting.small:
        return make_unet(kind, 64).requires_grad_(False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(setting.dtype)
    try:
        with torch.device(setting.device):
            return real_part(kind, "unet").requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


FIRST = {"ZImageTransformer2DModel": ("noise_refiner.0", "context_refiner.0")}
"""Class of a denoiser -> what its adapters begin in, once for each stream of tokens; a UNet's first transformer."""
TOKENS = 77


def prompt_of(family: str, config: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """One prompt's tensors, random."""
    if family == "zimage":
        return {"prompt_embeds": torch.randn(TOKENS, config.cap_feat_dim, generator=generator)}
    conditioning = {"prompt_embeds": torch.randn(TOKENS, config.cross_attention_dim, generator=generator)}
    if family == "sdxl":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditioning["pooled"] = torch.randn(width, generator=generator)
    return conditioning


@dataclass
class Bench:
    """A frozen denoiser on the device, and what it is shown: random latents of its size."""

    unet: Any
    side: int
    batch: int

    def objective(self, injection: Any) -> Objective:
        config = self.unet.config
        family = family_of({"_class_name": type(self.unet).__name__, **config}, "random")
        generator = torch.Generator().manual_seed(1)
        latents = torch.randn(5, 1, config.in_channels, self.side // 8, self.side // 8, generator=generator)
        conditioning = prompt_of(family.name, config, generator)
        crop = (self.side, self.side)
        told = family.picture_conditioning(crop, (0, 0), crop)
        extras = {name: value.expand(5, 1, *value.shape).clone() for name, value in told.items()}
        data = TrainingSet(
            [Bucket(latents, extras, torch.zeros(5, dtype=torch.long), list("abcde"))], [], [""], [conditioning]
        )
        schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        process: Process = Flow(shift=3.0) if family.name == "zimage" else Ddpm.from_config(schedule)
        device = next(self.unet.parameters()).device
        return Objective(
            self.config(), family, self.unet, injection, data, process, self.unet.dtype, device
        )  # fmt: skip

    def config(self, adapter: dict | None = None) -> Any:
        tree = {"subject": {"images": "x", "class": "dog"}, "adapter": adapter or {}, "output": "x"}
        return make_config({**tree, "train": {"batch_size": self.batch}})

    def contender(self, adapter: dict | None, by_operator: Chooser | None = None) -> Contender:
        """The step with an adapter, which sits in the UNet until `leave`; the bare UNet's for None.

        `by_operator` as in `grouped.flatten`.
        """
        if adapter is None:
            return Contender(self.objective(None))
        config = self.config(adapter)
        before = dict(self.unet.named_modules())
        injection = inject(self.unet, config.adapter)
        descent = Descent(injection.flatten(by_operator), config.train, OneProcess)
        swaps = {name: (before[name], self.unet.get_submodule(name)) for name in injection.adapters}
        return Contender(self.objective(injection), descent, swaps)

    def peft_lokr(self) -> Contender:
        """PEFT's LoKr as the paper's baseline has it (factor -1, rank 8), under the same objective and optimiser.

        It stays in the UNet: its wrapping cannot be taken out bit for bit.
        """
        from peft import LoKrConfig, inject_adapter_in_model

        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        inject_adapter_in_model(LoKrConfig(r=8, alpha=8, decompose_factor=-1, target_modules=targets), self.unet)
        parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        return Contender(self.objective(None), Descent(parameters, self.config().train, OneProcess))


def from_here(module: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let the backward pass end at a module's input."""
    return (given[0].detach().requires_grad_(), *given[1:])


@dataclass
class Contender:
    """The loop's own step; without an adapter, a forward and backward pass of the frozen UNet alone."""

    objective: Objective
    descent: Descent | None = None
    swaps: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Layer name -> (the frozen module, the module with its adapter)."""
    hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.enter()

    def step(self, number: int) -> None:
        (batch,) = self.objective.batches(number, 0)
        self.passes(batch)
        self.finish()

    def passes(self, batch: Batch) -> None:
        if self.descent is None:
            self.objective._predicted(batch.x_0, batch.t, batch.conditioning).square().mean().backward()
        else:
            add_gradients(self.descent, self.objective.per_sample(batch).sum() / len(batch))

    def finish(self) -> None:
        if self.descent is not None:
            self.descent.step(5e-4)

    def captured(self, recorder: Recorder | None = None) -> Callable[[int], None]:
        """`step` replayed as CUDA graphs, as `train.cuda_graph` does it; the bare denoiser's passes likewise.

        Raises RuntimeError with the reason where it cannot be captured.
        """
        recorder = recorder or CudaRecorder(self.objective.device)
        if self.descent is None:
            return self._captured_bare(recorder)
        graphs, descent = StepGraphs(self.objective, self.descent, recorder), self.descent

        def step(number: int) -> None:
            graphs.passes(self.objective.batches(number, 0))
            descent.prepare(5e-4, False)
            graphs.apply()

        for number in range(2):
            step(number)
        if graphs.refused is not None:
            raise RuntimeError(f"no CUDA graph: {graphs.refused}")
        return step

    def _captured_bare(self, recorder: Recorder) -> Callable[[int], None]:
        (first,) = self.objective.batches(0, 0)
        stay = staying(first)
        recorder.warm(lambda: self.passes(stay))
        replay = recorder.capture(lambda: self.passes(stay))

        def step(number: int) -> None:
            put(list(leaves([stay])), list(leaves(self.objective.batches(number, 0))))
            replay()

        return step

    def enter(self) -> None:
        """Put the adapted layers into the UNet; in the bare one, let the backward pass end where theirs ends."""
        self._put(1)
        if self.descent is None and not self.hooks:
            denoiser = self.objective.denoiser
            transformers = (
                n for n, module in denoiser.named_modules() if type(module).__name__ == "Transformer2DModel"
            )
            for name in FIRST.get(type(denoiser).__name__) or (next(transformers),):
                self.hooks.append(denoiser.get_submodule(name).register_forward_pre_hook(from_here))

    def leave(self) -> None:
        """Put the frozen layers back."""
        self._put(0)
        while self.hooks:
            self.hooks.pop().remove()

    def _put(self, which: int) -> None:
        for name, pair in self.swaps.items():
            parent, _, child = name.rpartition(".")
            setattr(self.objective.denoiser.get_submodule(parent), child, pair[which])
