"""Stage VAE: an AutoencoderKL of 0.66 M parameters, 64 x 64 pixels to 8 latent channels at 16 x 16.

Most steps see random crops of 32 pixels, the last quarter whole pictures. Afterwards the latents' mean and deviation,
by channel, are folded into quant_conv and post_quant_conv, so that latents are normalised and the scaling factor is 1.
"""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from stage import Average, Pace, finish, load_state, pixels, save_state
from torch.nn import functional as F

CROP, WHOLE = 16, 5
"""Pictures a step: of 32-pixel crops, and whole."""


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def loss_of(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """L1, L2, edges, the picture at a quarter of its size, and a gentle KL."""
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample()).sample
    error = y.float() - x
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return (
        error.abs().mean()
        + 0.5 * error.pow(2).mean()
        + 0.25 * edges
        + 1e-4 * kl
        + 1.5 * F.avg_pool2d(error, 4).abs().mean()
    )


def train(build: Path, pictures: np.ndarray, steps: int, seed: int, device: str) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = new_vae().to(device, memory_format=torch.channels_last)
    optimizer, average = (
        torch.optim.AdamW(vae.parameters(), lr=3e-3, weight_decay=1e-4, betas=(0.9, 0.99)),
        Average(vae, 0.997),
    )
    start, pace = 0, Pace("vae", steps)
    if state := load_state(build / "vae.state"):
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.steps, start = state["average"], state["step"], state["step"]
    for step in range(start, steps):
        r = np.random.default_rng((seed, step))
        done = step / steps
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 100) * (1 - done) ** 0.7 + 2e-5
        batch = pictures[r.integers(0, len(pictures), CROP if done < 0.72 else WHOLE)]
        if done < 0.72:
            y, x = r.integers(0, 33, 2)
            batch = batch[:, y : y + 32, x : x + 32]
        loss = loss_of(vae, pixels(batch, device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.follow(vae)
        pace.step(step + 1, loss.item())
        if (step + 1) % 500 == 0:
            save_state(
                build / "vae.state",
                model=vae.state_dict(),
                optimizer=optimizer.state_dict(),
                average=average.values,
                step=step + 1,
            )
    vae.load_state_dict(average.values)
    return normalised(vae.eval(), pictures[:6000], device)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, device: str) -> torch.Tensor:
    """(N, 8, 16, 16) fp16 latents: the posterior's mean."""
    with torch.autocast(device, torch.bfloat16):
        rows = [
            vae.encode(pixels(pictures[i : i + 128], device)).latent_dist.mean.float().cpu()
            for i in range(0, len(pictures), 128)
        ]
    return torch.cat(rows).half()


@torch.no_grad()
def normalised(vae: AutoencoderKL, pictures: np.ndarray, device: str) -> AutoencoderKL:
    """The same autoencoder with latents of mean 0 and deviation 1 in each channel."""
    latents = encode(vae, pictures, device).float()
    mean, std = latents.mean((0, 2, 3)).to(device), latents.std((0, 2, 3)).to(device)
    channels = len(mean)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= std.view(-1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) / std
    into.bias[channels:] -= 2 * std.log()
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std.view(1, -1, 1, 1)
    vae.register_to_config(scaling_factor=1.0, force_upcast=False)
    return vae


def run(build: Path, pictures: np.ndarray, steps: int = 5819, seed: int = 0, device: str = "cpu") -> None:
    vae = train(build, pictures, steps, seed, device)
    x = pixels(pictures[-512:], device)
    with torch.no_grad():
        y = vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1)
    decibel = 10 * np.log10(4 / (y - x).pow(2).mean().item())
    vae.cpu().half().save_pretrained(build / "pipe" / "vae")
    shown = ((y[:24].permute(0, 2, 3, 1).cpu().numpy() + 1) * 127.5).astype(np.uint8)
    rows = [pictures[-512:-500], shown[:12], pictures[-500:-488], shown[12:]]
    finish(build, "vae", {"steps": steps, "psnr": round(decibel, 2)}, rows)
