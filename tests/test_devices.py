"""A step where the device is not the host: the run on `meta`, the host's tensors real, and no operation mixes them.

What a GPU would refuse ("expected all tensors to be on the same device") or would wait for (`.item()`, `bool()`) fails
here without one.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from scripts.bench.contender import Bench
from tests.tiny import make_unet

COPIES = ("aten::_to_copy", "aten::copy_")


class OneDevice(TorchDispatchMode):
    """Refuses an operation on tensors of two devices, but for copies and for scalars of the host; counts the copies."""

    def __init__(self):
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
        if func.name() in COPIES:
            self.sent += any(value.device != result.device for value in given)
            return result
        devices = {value.device.type for value in given if value.dim() or value.device.type != "cpu"}
        assert len(devices) <= 1, f"{func.name()} mixes {devices}"
        return result


def contender(kind: str, dtype: torch.dtype, adapter: dict):
    unet = make_unet(kind).to(dtype).requires_grad_(False).to("meta")
    return Bench(unet, 64, 2).contender(adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", [{"a1": 4, "a2": 4}, {"type": "lora"}, {"type": "loha", "rank": 2}], ids=str)
def test_a_step_mixes_no_devices_and_waits_for_none(dtype, adapter, monkeypatch):
    optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta", "cuda"])
    run = contender("sdxl", dtype, adapter)
    for checkpointed in (False, True):
        if checkpointed:
            run.objective.denoiser.enable_gradient_checkpointing()
        with OneDevice() as mode:
            for number in range(2):
                run.descent.backward(run.objective.loss(number, 0))
                run.descent.step(1e-3)
        assert mode.sent <= 2 * 8  # noise, timesteps, indices, … of each micro-batch
    assert all(parameter.grad.device.type == "meta" for parameter in run.objective.injection.parameters())


def test_the_held_out_loss_mixes_no_devices():
    run = contender("sd15", torch.float32, {"a1": 4, "a2": 4})
    with OneDevice(), torch.no_grad():
        for batch in run.objective._held_out():
            assert run.objective.per_sample(batch, weighted=False).device.type == "meta"


def test_a_mixed_operation_is_refused():
    with OneDevice(), pytest.raises((AssertionError, RuntimeError)):
        torch.ones(3, device="meta") + torch.ones(3)
    with OneDevice(), pytest.raises((AssertionError, RuntimeError)):
        torch.ones(3, device="meta").sum().item()
