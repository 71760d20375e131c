"""fp8 and weights in host memory, against plain linears of the same (rounded) weights, on the CPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.quantize import quantize_linears
from diffusekrona_train.models.stored import FORMS, Host, StoredLinear, block_of, store_linears

CPU = torch.device("cpu")


def everything(name: str) -> bool:
    return True


class Blocks(nn.Module):
    """Four blocks of two linears, as a transformer has them."""

    def __init__(self, width: int = 128, count: int = 4):
        super().__init__()
        made = [
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(count)
        ]
        self.layers = nn.ModuleList(made)
        self.checkpointing = False

    def forward(self, x):
        for block in self.layers:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x))
        return x


def model(dtype=torch.float32, **options) -> Blocks:
    torch.manual_seed(0)
    return Blocks(**options).to(dtype).requires_grad_(False)


def host_of(net: nn.Module) -> Host:
    found = next(module._host for module in net.modules() if isinstance(module, StoredLinear))
    assert found is not None
    return found[0]


def rounded(kind: str, weight: torch.Tensor) -> torch.Tensor:
    form = FORMS[kind]
    return form.unpack(form.pack(weight), weight.shape, weight.dtype)


def test_fp8_rounds_each_row_to_within_half_a_step():
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 64)[:, None]
    back = rounded("fp8", weight)
    by_torch = torch.stack([(row * (448 / row.abs().max())).to(torch.float8_e4m3fn).float() for row in weight])
    by_torch = by_torch * weight.abs().amax(1, keepdim=True) / 448
    torch.testing.assert_close(back, by_torch, rtol=1e-6, atol=0)
    large = weight.abs() > weight.abs().amax(1, keepdim=True) / 1000
    assert ((back - weight)[large] / weight[large]).abs().max() < 2**-4 + 1e-6
    assert torch.equal(rounded("fp8", torch.zeros(4, 4)), torch.zeros(4, 4))


def test_fp8_keeps_a_quarter_of_fp32_s_bytes():
    stored = model()
    before = sum(value.nbytes for value in stored.state_dict().values())
    assert store_linears(stored, "fp8", everything) == 8
    after = sum(value.nbytes for value in stored.state_dict().values())
    assert 0.25 < after / before < 0.27


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("kind", FORMS)
def test_products_and_gradients_are_those_of_the_stored_weights(kind, offload, checkpointing):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
    stored, plain = model(), model()
    store_linears(stored, kind, everything, CPU if offload else None)
    for linear in (module for module in plain.modules() if type(module) is nn.Linear):
        linear.weight.copy_(rounded(kind, linear.weight))
    stored.checkpointing = checkpointing
    inputs = [torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    for net, x in zip((stored, plain), inputs, strict=True):
        for _ in range(2):
            net(x).square().sum().backward()
    assert torch.equal(stored(inputs[0]), plain(inputs[1]))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-6, atol=1e-6)


def test_nf4_in_host_memory_is_bitsandbytes_own():
    pytest.importorskip("bitsandbytes")
    ours, theirs = model(), model()
    store_linears(ours, "nf4", everything, CPU)
    quantize_linears(theirs, "nf4", torch.float32, everything)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs.to("cpu")(x), rtol=1e-4, atol=1e-5)


def test_at_most_two_blocks_are_on_the_device_and_each_comes_twice_a_step(monkeypatch):
    stored = model(count=6)
    store_linears(stored, "none", everything, CPU)
    stored.checkpointing = True
    host = host_of(stored)
    brought, most, bring = [], [], Host._bring

    def noting(self, block):
        if block not in self._here:
            brought.append(block)
        bring(self, block)
        most.append(len(self._here))

    monkeypatch.setattr(Host, "_bring", noting)
    x = torch.randn(2, 128).requires_grad_()
    stored(x).sum().backward()  # the order is learnt
    brought.clear()
    stored(x).sum().backward()
    assert max(most) == 2 and len(host.shelves) == 6
    # all but the last block come in both passes; the first is still there from the step before
    assert 10 <= len(brought) <= 12 and {f"layers.{i}" for i in range(6)} >= set(brought)
    # ahead of their use: in the backward pass the neighbour below comes while its upper one works
    assert brought[-1] == "layers.0"


def test_nothing_of_an_offloaded_block_is_registered_in_the_model():
    stored = model(torch.bfloat16)
    weights = sum(module.weight.numel() for module in stored.modules() if type(module) is nn.Linear)
    store_linears(stored, "none", everything, CPU)
    left = sum(value.numel() for value in stored.state_dict().values())
    assert left < 0.02 * weights
    host = host_of(stored)
    assert sum(shelf.flat.numel() for shelf in host.shelves.values()) == pytest.approx(2 * weights, rel=0.01)


@pytest.mark.parametrize("kind, offload", [("fp8", False), ("none", True), ("fp8", True)])
def test_adapters_train_over_stored_linears_and_leave_them_as_they_were(kind, offload):
    from tests.tiny import make_unet

    plain: Any = make_unet("sd15").requires_grad_(False)
    stored = copy.deepcopy(plain)

    def wanted(name):
        return ".attentions." in name

    store_linears(stored, kind, wanted, CPU if offload else None)
    for module in (m for n, m in plain.named_modules() if type(m) is nn.Linear and wanted(n)):
        module.weight.copy_(rounded(kind, module.weight))
    given = (torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 7, plain.config.cross_attention_dim))
    before = stored(*given).sample
    spec = AdapterConfig(a1=4, a2=4, init_b="same")
    gradients = []
    for net in (stored, plain):
        injection = inject(net, spec, seed=0)
        net(*given).sample.square().mean().backward()
        gradients.append({name: value.grad for name, value in injection.named_parameters()})
        if net is stored:
            with pytest.raises(ValueError, match="load it unquantized"):
                injection.fuse()
        injection.eject()
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(grad, gradients[1][name], rtol=1e-4, atol=1e-6)
    assert torch.equal(stored(*given).sample, before)
    assert any(isinstance(module, StoredLinear) for module in stored.modules())


def test_blocks_are_told_by_their_names():
    said = {
        "layers.12.attention.to_out.0": "layers.12",
        "noise_refiner.1.feed_forward.w1": "noise_refiner.1",
        "single_transformer_blocks.3.attn.to_out": "single_transformer_blocks.3",
        "transformer_blocks.3.attn.to_out.0": "transformer_blocks.3",
        "down_blocks.1.attentions.0.transformer_blocks.2.attn1.to_q": "down_blocks.1.attentions.0.transformer_blocks.2",
        "mid_block.attentions.0.proj_in": "mid_block.attentions.0",
        "context_embedder": "context_embedder",
    }
    assert {name: block_of(name) for name in said} == said


def test_what_replaces_nothing_says_so():
    with pytest.raises(ValueError, match="finds no linear to replace in this Blocks"):
        store_linears(model(), "fp8", lambda name: False)


def test_a_bias_is_added_in_the_input_s_type():
    linear = nn.Linear(64, 32).requires_grad_(False)
    stored = StoredLinear(linear, FORMS["none"], FORMS["none"].pack(linear.weight))
    x = torch.randn(2, 64, dtype=torch.bfloat16)
    assert torch.equal(stored(x), F.linear(x, linear.weight.bfloat16(), linear.bias.bfloat16()))
