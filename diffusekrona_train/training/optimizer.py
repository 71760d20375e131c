"""One optimiser step: gradients in one flat buffer, averaged over processes, clipped, and applied only where finite.

All factors and all gradients are views of one buffer each (`adapters.flat`), so that clearing, averaging, unscaling,
clipping and stepping thousands of small factors are one operation each. There is no DDP wrapper: this buffer is all
that processes have to agree on.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
import torch.distributed

from diffusekrona_train.adapters.bounds import NormCap
from diffusekrona_train.adapters.flat import LOSS, STOP, FlatFactors
from diffusekrona_train.adapters.inject import Injection
from diffusekrona_train.common.device import abilities
from diffusekrona_train.config import RunConfig
from diffusekrona_train.config.training import TrainConfig
from diffusekrona_train.training.average import Average
from diffusekrona_train.training.rates import rates_of

BAD_IN_A_ROW = 3
"""Non-finite steps in a row that end a run."""
OVERFLOWS_IN_A_ROW = 20
"""fp16: gradients that overflow while the loss is finite halve the loss scale; only this many in a row mean trouble."""


class Descent:
    """The optimiser of a run and what it counts.

    `meters` (on the device): sum of finite losses and their number since the last log, skipped steps, non-finite steps
    in a row now and at most, the last gradient norm.
    """

    def __init__(
        self,
        factors: FlatFactors | list[torch.nn.Parameter],
        train: TrainConfig,
        accelerator: Any,
        cap: NormCap | None = None,
    ):
        if isinstance(factors, list):  # parameters of another library, or of a test
            factors = FlatFactors([{"": torch.nn.ParameterList(factors)}])
        assert factors.slots == 1, "a run of several subjects has an optimiser for each slot"
        self.train = train
        self.accelerator = accelerator
        self.eight_bit = train.optimizer == "adamw8bit"
        self.factors = factors
        self.flat = factors.buffer
        can = abilities(self.flat.device)
        self.waits = self.eight_bit or not can.fused
        self.optimizer = _optimizer([factors.master], train, fused=can.fused)
        self.rates, self.cap = rates_of(factors, train), cap
        self.average = None if train.average is None else Average(factors, train.average)
        self.meters = torch.zeros(6, dtype=can.widest, device=self.flat.device)
        self.wish = torch.zeros((), device=self.flat.device)
        # On the device, so that a step that is replayed reads each step's own. CUDA's kernel reads fp32.
        exact = torch.float64 if self.flat.device.type == "cpu" else torch.float32
        self.rate = torch.zeros((), dtype=exact, device=self.flat.device)

    def step(self, learning_rate: float, stop: bool = False) -> torch.Tensor:
        """Apply the gradients; return the mean of all processes' wish to stop, on the device until the next step.

        A step whose loss or gradient is not finite leaves factors and optimiser state as they were. That is decided on
        the device; only 8-bit AdamW and Apple GPUs, which know no such switch, wait for the answer.
        """
        self.prepare(learning_rate, stop)
        self.apply()
        return self.wish

    def prepare(self, learning_rate: float, stop: bool) -> None:
        """Write what `apply` reads from the host to the device, and agree with the other processes."""
        self.rate.fill_(learning_rate)
        for group in self.optimizer.param_groups:
            # With a rate for each segment the optimiser steps at rate 1, and `_move` shortens what it did.
            group["lr"] = 1.0 if self.rates is not None else learning_rate if self.waits else self.rate
        if stop:
            self.flat[STOP] = 1.0
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(self.flat)
            self.flat.div_(self.accelerator.num_processes)

    def apply(self) -> None:
        """Clip, step, count, and clear the gradients. Reads and writes tensors that stay where they are, so it can be
        captured (unless it `waits`)."""
        scaler = self.accelerator.scaler
        if scaler is not None:
            scaler.unscale_(self.optimizer)
        gradients = self.flat[:LOSS]
        norm = torch.linalg.vector_norm(gradients)
        loss = self.flat[LOSS].clone()
        bad = ~(norm.isfinite() & loss.isfinite())
        if self.train.max_grad_norm is not None:
            gradients.mul_((self.train.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        self._move(bad)
        if scaler is not None:
            scaler.update()
        self._count(loss, norm, bad)
        self.wish.copy_(self.flat[STOP])
        self.flat.zero_()

    def state(self) -> list[torch.Tensor]:
        """Return every tensor that `apply` changes; those of the optimiser are there after its first step."""
        moments = [value for value in self.optimizer.state[self.factors.master].values() if torch.is_tensor(value)]
        scaler = self.accelerator.scaler
        scale = [] if scaler is None else [scaler._scale, scaler._growth_tracker]
        average = [] if self.average is None else [self.average.values, self.average.steps]
        return [*self.factors.tensors(), self.meters, self.wish, *average, *moments, *scale]

    def _move(self, bad: torch.Tensor) -> None:
        if self.waits:
            if bad:  # nothing has moved: neither the cap nor the average has anything to do
                return
        else:
            # What GradScaler sets for a fused optimiser: its kernel moves nothing where found_inf is 1.
            self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
        if self.rates is None:
            self.optimizer.step()
        else:
            before, table = self.factors.master.detach().clone(), self.rates.table(self.rate)
            self.optimizer.step()
            self.rates.shorten(before, table)
        if self.cap is not None:
            self.cap.apply()
        if self.average is not None:
            self.average.update(bad)
        self.factors.refresh()

    def shown(self) -> contextlib.AbstractContextManager[object]:
        """Within, the factors are those that are saved and shown: their running average, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.shown()

    def _count(self, loss: torch.Tensor, norm: torch.Tensor, bad: torch.Tensor) -> None:
        weight = torch.ones_like(loss)
        if self.accelerator.scaler is not None:
            weight = weight.masked_fill(loss.isfinite(), BAD_IN_A_ROW / OVERFLOWS_IN_A_ROW)
        total, number, skipped, streak, worst, _ = self.meters
        good = ~bad
        streak = (streak + weight).masked_fill(good, 0.0)
        new = [
            total + loss.masked_fill(bad, 0.0),
            number + good,
            skipped + bad,
            streak,
            torch.maximum(worst, streak),
            norm,
        ]
        self.meters.copy_(torch.stack([value.to(self.meters.dtype) for value in new]))

    def read(self) -> dict[str, float | None]:
        """What was counted, read from the device; the mean loss starts anew."""
        total, number, skipped, _, worst, norm = self.meters.tolist()
        self.meters[:2] = 0
        finite = norm if abs(norm) < float("inf") else None
        return {"loss": total / number if number else None, "grad_norm": finite, "skipped": skipped, "worst": worst}

    def clear(self) -> None:
        """Forgets the gradients of a step that was not completed."""
        self.factors.clear()


def make_descent(config: RunConfig, injection: Injection, accelerator: Any) -> Descent:
    """The optimiser of an injection's factors, which become views of flat buffers."""
    factors, share = injection.flatten(), config.adapter.norm_cap
    cap = None if share is None else NormCap(factors, injection.base_sigmas(), share)
    return Descent(factors, config.train, accelerator, cap)


def _optimizer(parameters: list[torch.nn.Parameter], train: TrainConfig, *, fused: bool) -> torch.optim.Optimizer:
    settings = {
        "lr": train.learning_rate,
        "betas": tuple(train.betas),
        "weight_decay": train.weight_decay,
        "eps": train.eps,
    }
    if train.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError:
            raise ValueError("train.optimizer: adamw8bit needs bitsandbytes; install it or use adamw") from None
        return AdamW8bit(parameters, **settings)
    capturable = fused and parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, fused=fused, capturable=capturable, **settings)
    optimizer._warned_capturable_if_run_uncaptured = True  # type: ignore[attr-defined]  # it runs both ways
    return optimizer


def learning_rate_factor(schedule: str, step: int, steps: int, warmup_steps: int) -> float:
    """Share of the learning rate at optimiser step `step` of `steps`; knows nothing of processes or accumulation."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "constant":
        return 1.0
    return 1.0 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
