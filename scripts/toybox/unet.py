"""Stages UNet: v-prediction on cached latents, first on the wide world, then on the small one, then grown.

The grown UNet has no 4 x 4 level and more transformer layers (62 % of 7.11 M parameters instead of 42 % of 7.45 M), so
that attention adapters have room. It starts from the small stage's weights; layers that are new end in zeros.

On CPU cores run two one-thread processes, which is faster than one of two threads:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 scripts/toybox/make.py small
"""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from vae import Average, Pace, finish, load_state, save_state

BATCH = 16
"""Pictures a step of one process."""
DROPOUT, GAMMA = 0.1, 5.0
"""Share of captions left out; the clamp of min-SNR."""
SHAPES = {
    "wide": {"block_out_channels": (64, 128, 128), "attention_head_dim": (2, 4, 4)},
    "small": {"block_out_channels": (64, 128, 128), "attention_head_dim": (2, 4, 4)},
    "grow": {
        "block_out_channels": (64, 128),
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (2, 2),
        "reverse_transformer_layers_per_block": (3, 2),
    },
}
"""What the stages differ in; diffusers' attention_head_dim is the number of heads."""
RATES = {"wide": 1e-3, "small": 9e-4, "grow": 9e-4}
EARLIER = {"small": "wide", "grow": "small"}
"""The stage whose weights a stage starts from."""


def new_unet(stage: str) -> UNet2DConditionModel:
    shape = SHAPES[stage]
    levels = len(shape["block_out_channels"])
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        down_block_types=["CrossAttnDownBlock2D"] * levels,
        up_block_types=["CrossAttnUpBlock2D"] * levels,
        layers_per_block=1,
        cross_attention_dim=256,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=320,
        **shape,
    )


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def start_from(unet: UNet2DConditionModel, earlier: UNet2DConditionModel) -> None:
    """Weights of the same place and shape are taken over; a layer that is new adds nothing at first."""
    source, target = earlier.state_dict(), unet.state_dict()
    dropped = len(earlier.config.block_out_channels) - len(unet.config.block_out_channels)
    for name, value in target.items():
        origin = name
        if name.startswith("up_blocks."):  # the lowest levels go, and up blocks are counted from there
            _, level, rest = name.split(".", 2)
            origin = f"up_blocks.{int(level) + dropped}.{rest}"
        if origin in source and source[origin].shape == value.shape:
            target[name] = source[origin].clone()
        elif name.endswith(("to_out.0.weight", "to_out.0.bias", "ff.net.2.weight", "ff.net.2.bias")):
            target[name] = torch.zeros_like(value)
    unet.load_state_dict(target)


@torch.no_grad()
def embed(pipe_folder: Path, captions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
    """Of the different captions: (P, T, 256) hidden states and (P, 128) pooled, and each caption's row."""
    from judges import load_text_encoders

    tokenizer, first, second = load_text_encoders(pipe_folder)
    texts = sorted(set(captions))
    rows = {text: row for row, text in enumerate(texts)}
    hidden, pooled = [], []
    for i in range(0, len(texts), 512):
        part = tokenizer(texts[i : i + 512], padding="max_length", truncation=True, return_tensors="pt").input_ids
        one, two = first(part, output_hidden_states=True), second(part, output_hidden_states=True)
        hidden.append(torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1).half())
        pooled.append(two.text_embeds)
    return torch.cat(hidden), torch.cat(pooled), torch.tensor([rows[text] for text in captions])


def loss_of(
    unet: UNet2DConditionModel, alphas: Tensor, z: Tensor, hidden: Tensor, pooled: Tensor, r: torch.Generator
) -> Tensor:
    """Min-SNR loss of v over timesteps spread evenly within the batch."""
    batch, device = len(z), z.device
    keep = (torch.rand(batch, generator=r) >= DROPOUT).to(device)
    hidden, pooled = hidden * keep[:, None, None], pooled * keep[:, None]
    t = ((torch.arange(batch) + torch.rand(batch, generator=r)) / batch * 1000).long().to(device)
    noise, a = torch.randn(z.shape, generator=r).to(device), alphas[t].view(-1, 1, 1, 1)
    size = torch.tensor([[64.0, 64, 0, 0, 64, 64]], device=device).expand(batch, -1)
    with torch.autocast(device.type, torch.bfloat16):
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        out = unet(noisy, t, hidden, added_cond_kwargs={"text_embeds": pooled, "time_ids": size}).sample
    error = (out.float() - (a.sqrt() * noise - (1 - a).sqrt() * z)).pow(2).mean((1, 2, 3))
    snr = alphas[t] / (1 - alphas[t])
    return (error * snr.clamp(max=GAMMA) / (snr + 1)).mean() / 0.42  # about 1 for a prediction of nothing


def average_gradients(parameters: list[Tensor]) -> None:
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(part.view_as(p))


def run(
    build: Path,
    stage: str,
    latents: Tensor,
    captions: list[str],
    steps: int,
    seed: int = 0,
    device="cpu",
    save_every: int = 250,
) -> None:
    """Trains one stage, or goes on with it, and writes the pipeline with the averaged weights."""
    rank, many = int(os.environ.get("RANK", "0")), "RANK" in os.environ
    if many:
        dist.init_process_group("gloo")
    torch.manual_seed(seed)
    unet = new_unet(stage)
    if stage in EARLIER:
        start_from(
            unet, UNet2DConditionModel.from_pretrained(build / f"unet-{EARLIER[stage]}", torch_dtype=torch.float32)
        )
    unet = unet.to(device, memory_format=torch.channels_last)
    hidden, pooled, rows = embed(build / "pipe", captions)
    alphas, parameters = new_scheduler().alphas_cumprod.to(device), list(unet.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=RATES[stage], weight_decay=0.01, betas=(0.9, 0.99))
    average, start, pace = Average(unet, 0.999), 0, Pace(stage, steps)
    if state := load_state(build / f"{stage}.state"):
        unet.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, average.steps, start = state["average"], state["step"], state["step"]
    for step in range(start, steps):
        optimizer.param_groups[0]["lr"] = (
            RATES[stage] * min(1, (step + 1) / 60) * min(1, (1 - step / steps) / 0.45) + 1e-6
        )
        r = torch.Generator().manual_seed(hash((seed, step, rank)) % 2**31)
        picks = torch.randint(len(latents), (BATCH,), generator=r)
        z, row = latents[picks].float().to(device, memory_format=torch.channels_last), rows[picks]
        loss = loss_of(unet, alphas, z, hidden[row].float().to(device), pooled[row].to(device), r)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if many:
            average_gradients(parameters)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if rank == 0:
            average.follow(unet)
            pace.step(step + 1, loss.item())
            if (step + 1) % save_every == 0:
                model, moments = unet.state_dict(), optimizer.state_dict()
                save_state(
                    build / f"{stage}.state", model=model, optimizer=moments, average=average.values, step=step + 1
                )
    if rank == 0:
        unet.load_state_dict(average.values)
        sheet = sample_sheet(write_pipeline(build, stage, unet.cpu().half()), captions)
        samples = BATCH * steps * (dist.get_world_size() if many else 1)
        finish(
            build,
            f"unet-{stage}",
            {"steps": steps, "samples": samples, "loss": round(float(np.mean(pace.losses or [0])), 4)},
            sheet,
        )
    if many:
        dist.barrier()  # the next stage starts from what rank 0 has written
        dist.destroy_process_group()


def sample_sheet(pipe: DiffusionPipeline, captions: list[str], across: int = 10, guidance=4.0) -> list[np.ndarray]:
    """60 pictures of captions of the world, 25 steps; the captions are printed in the sheet's order."""
    texts = [captions[i] for i in np.random.default_rng(0).integers(len(captions), size=6 * across)]
    pipe.to(dtype=torch.float32).set_progress_bar_config(disable=True)
    rows = []
    for start in range(0, len(texts), across):
        part, r = texts[start : start + across], torch.Generator().manual_seed(start)
        size = {"height": 64, "width": 64, "num_inference_steps": 25, "guidance_scale": guidance}
        rows.append((pipe(part, generator=r, output_type="np", **size).images * 255).round().astype(np.uint8))
        print("; ".join(part), flush=True)
    return rows


def write_pipeline(build: Path, stage: str, unet: UNet2DConditionModel) -> StableDiffusionXLPipeline:
    from diffusers import AutoencoderKL
    from judges import load_text_encoders

    unet.save_pretrained(build / f"unet-{stage}")
    folder = build / "pipe"
    tokenizer, first, second = load_text_encoders(folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float16)
    pipe = StableDiffusionXLPipeline(
        vae, first.half(), second.half(), tokenizer, tokenizer, unet, new_scheduler(), add_watermarker=False
    )
    pipe.save_pretrained(folder)
    return pipe
