"""Stage VAE: an AutoencoderKL of 0.66 M parameters, 64 x 64 pixels to 8 latent channels at 16 x 16.

Most steps see random crops of 32 pixels, the last quarter whole pictures. Afterwards the latents' mean and deviation,
by channel, are folded into quant_conv and post_quant_conv, so that latents are normalised and the scaling factor is 1.

As the first stage it also holds what all share: batches of pixels, an average of weights, states to resume from,
numbers and sheets.
"""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
import json
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from diffusekrona_train.common.files import atomic

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


# ---- what all stages share ----------------------------------------------------------------------------------------


def pixels(pictures: np.ndarray, device="cpu") -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)


class Average:
    """Exponential moving average of a module's floating-point state, quick at first."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def follow(self, module: torch.nn.Module) -> None:
        self.steps += 1
        decay = min(self.decay, (1 + self.steps) / (20 + self.steps))
        for name, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                self.values[name].lerp_(value, 1 - decay)
            else:
                self.values[name].copy_(value)


def save_state(path: Path, **state: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(path: Path) -> dict | None:
    return torch.load(path, weights_only=True) if path.is_file() else None


def finish(build: Path, stage: str, numbers: dict, pictures: list[np.ndarray] | None = None) -> None:
    """Numbers to STAGE.json and to the screen, rows of pictures to STAGE.png."""
    with atomic(build / f"{stage}.json") as temporary:
        Path(temporary).write_text(json.dumps(numbers, indent=1) + "\n")
    print(f"{stage}: " + ", ".join(f"{key} {value}" for key, value in numbers.items()), flush=True)
    if pictures:
        sheet = np.concatenate([np.concatenate(list(row), axis=1) for row in pictures], axis=0)
        Image.fromarray(sheet).resize((sheet.shape[1] * 2, sheet.shape[0] * 2)).save(build / f"{stage}.png")


def neighbours(pictures: np.ndarray, rows: Tensor, wanted: Tensor, number: int = 8) -> list[np.ndarray]:
    """Rows of a sheet: for each wanted embedding the pictures (N, 64, 64, 3) whose embeddings (N, D) are nearest."""
    rows, wanted = (torch.nn.functional.normalize(x.float().cpu(), dim=-1) for x in (rows, wanted))
    return [pictures[order[:number].numpy()] for order in (wanted @ rows.T).argsort(dim=1, descending=True)]


class Pace:
    """Says every so many steps how a stage goes."""

    def __init__(self, stage: str, steps: int, every: int = 100) -> None:
        self.stage, self.steps, self.every, self.start, self.losses = stage, steps, every, time.monotonic(), []

    def step(self, done: int, loss: float) -> None:
        self.losses = [*self.losses[1 - self.every :], loss]
        if done % self.every == 0:
            seconds = time.monotonic() - self.start
            print(f"{self.stage} {done}/{self.steps} loss {np.mean(self.losses):.4f} after {seconds:.0f} s", flush=True)
