"""Begin A along the gradient: A is the leading left singular vector of the rearranged mean gradient of a few samples.

R(G) (a2 a1, b2 b1) holds the blocks of G = dL/dW as rows, so that R(A ⊗ B) = vec(A) vec(B)ᵀ: of all A of one norm,
this one lets B reach the largest part of G. A random A of 16 numbers reaches 1/16 of G's energy on average, and hardly
turns.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed
from torch import Tensor, nn

from diffusekrona_train.adapters import KronA
from diffusekrona_train.adapters.grouped import AdaptedLinear
from diffusekrona_train.adapters.inject import Injection
from diffusekrona_train.training.loss import ON_DEVICE_LIMIT, Objective

STREAM = "aligned"
"""Of the random numbers of these samples: no step draws them."""
FP16_SCALE = 1024.0
"""Multiplies the loss where gradients are fp16, which holds nothing below 6e-8. A's length does not depend on it."""


def align_new(objective: Objective) -> None:
    """Align the A of a new run, where its config asks for that."""
    config = objective.config
    if config.adapter.init_a != "aligned" or config.train.init_from is not None:
        return
    with torch.compiler.set_stance("force_eager") if config.train.compile else nullcontext():
        align(objective)


def align(objective: Objective) -> None:
    """Set A of every layer from `adapter.align_draws` samples; B, and so the model's output, stays as it is.

    Each sample is a batch of its own and every process takes them all, so batch size and number of processes do not
    matter; the factors of the first process are everybody's. Takes the memory of a step without checkpointing, and for
    the gradients as much again as the adapted layers in fp32 (above 2 GiB: in host memory). Works over a quantised
    base. Raises ValueError where a gradient is not finite.
    """
    injection, flat = objective.injection, objective.injection.flat
    assert flat is not None, "a run trains factors in flat buffers"
    size = sum(adapter.layer.in_features * adapter.layer.out_features for adapter in _adapters(injection).values()) * 4
    home = objective.device if size <= ON_DEVICE_LIMIT else torch.device("cpu")
    factor = FP16_SCALE if objective.dtype == torch.float16 else 1.0
    with collected(injection, home) as gradients:
        for number in range(objective.config.adapter.align_draws):
            batch = objective.instance(number, STREAM)
            (objective.per_sample(batch).sum() * factor).backward()
    flat.clear()
    for name, adapter in _adapters(injection).items():
        gradient = gradients.get(name)
        if gradient is None or not gradient.any():
            continue  # a layer that these samples do not reach keeps its random A
        if not gradient.isfinite().all():
            raise ValueError(
                f"adapter.init_a: aligned: the gradient of {name} is not finite in {objective.dtype}; "
                "set train.mixed_precision: bf16 or no, or adapter.init_a: normal"
            )
        with torch.no_grad():
            adapter.A.copy_(leading(gradient, *adapter.A.shape))
    if objective.processes > 1:
        torch.distributed.broadcast(flat.master.data, 0)
    flat.refresh()


def leading(gradient: Tensor, a2: int, a1: int) -> Tensor:
    """Return A (a2, a1) of rms 1/a2, as `normal` has it: the leading left singular vector of R(gradient (out, in)).

    Its largest entry is positive: A and -A are as good, and every machine should take the same.
    """
    rows, columns = gradient.shape[0] // a2, gradient.shape[1] // a1
    blocks = gradient.view(a2, rows, a1, columns).transpose(1, 2).reshape(a2 * a1, -1).to("cpu", torch.float64)
    A = torch.linalg.eigh(blocks @ blocks.mT).eigenvectors[:, -1]
    A = A * A[A.abs().argmax()].sign()
    return (A.view(a2, a1) * ((a1 * a2) ** 0.5 / a2)).float()


@contextmanager
def collected(injection: Injection, home: torch.device) -> Generator[dict[str, Tensor]]:
    """Within, the backward pass sums dL/dW (out, in) of each adapted layer, fp32 on `home`, into the dict."""
    gradients: dict[str, Tensor] = {}

    def watch(name: str):
        def after(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            x = given[0].detach()

            def add(grad: Tensor) -> None:
                part = grad.reshape(-1, grad.shape[-1]).float().mT @ x.reshape(-1, x.shape[-1]).float()
                gradients[name] = gradients[name].add_(part.to(home)) if name in gradients else part.to(home)

            output.register_hook(add)

        return after

    sites = [(name, injection.model.get_submodule(name)) for name in _adapters(injection)]
    handles = [site.register_forward_hook(watch(name)) for name, site in sites if isinstance(site, AdaptedLinear)]
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()


def _adapters(injection: Injection) -> dict[str, KronA]:
    return {name: adapter for name, adapter in injection.adapters.items() if isinstance(adapter, KronA)}
