"""Stage flow: toybox-flow, a small Z-Image of the small world on the latents of toybox's VAE.

A transformer of 5.1 M parameters learns the velocity eps - x_0; a Qwen3 of 0.7 M parameters reads captions. It first
learns to name what a caption says, then is trained along. Muon steps the matrices of the blocks, AdamW the rest. The
tokens after the third layer are pulled towards the identity network's features of the clean image (REPA); what that
takes is not part of the pipeline. VAE and identity network are those of the package.

    python scripts/toybox/make.py flow                                    # all 4,579 steps, into build/toybox/flow
    python scripts/toybox/make.py flow --fraction 0.05                    # 229 steps of 800 images: does it run?
    python scripts/toybox/flow.py further.safetensors --steps 2000        # the package's weights, trained further

A stopped stage resumes from its last state with the same result, bit for bit on a CPU.
"""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline
from flow_nets import TEXT_WIDTH, Nets, new_tokenizer, tokens
from safetensors.torch import load_file, save_file
from sprites import Sprite, fetch, load_sprites, small_world, unpack
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2Tokenizer
from vae import Average, Pace, encode, finish, load_state, pixels, save_state
from world import BACKGROUNDS, COLOURS, SMALL, WIDE, Label, draw_world, write_caption

from diffusekrona_train.common.files import ASSETS
from diffusekrona_train.evaluation.metrics.encoders import TOYBOX, load_identity_net

BATCH, PICTURES = 48, 16_000
STEPS, CONSTANT, WARM = 4579, 1400 / 4579, 60
"""Steps in all; the share of them at the full rate, before it falls to zero along a line; those in which it rises."""
MUON, ADAM, TEXT = 0.02, 1.5e-3, 7e-4
"""Rates: the blocks' matrices, the rest, the text encoder."""
FEATURES, ALIGN = 15, 0.5
"""Layers of the identity network whose output the middle is aligned to, and the weight of that."""
DROPOUT, UNIFORM, MEAN = 0.1, 0.1, 0.2
"""Share of captions left out, share of sigmas drawn uniformly, mean of the normal number behind the other sigmas."""

# ---- what is learnt from ---------------------------------------------------------------------------------------------


@dataclass
class Lessons:
    """The small world: latents (N, 8, 16, 16) and features (N, 64, 128), both fp16; captions; facts (N, 4)."""

    latents: Tensor
    features: Tensor
    captions: list[str]
    facts: Tensor


@torch.no_grad()
def prepare(small: list[Sprite], number: int, device: str) -> Lessons:
    images, captions, labels = draw_world(small, SMALL, number, seed=5)
    coder = AutoencoderKL.from_pretrained(TOYBOX / "pipe" / "vae", torch_dtype=torch.float32).eval().to(device)
    layers = load_identity_net(TOYBOX / "identity.safetensors").to(device).features[:FEATURES]
    features = [layers(pixels(images[i : i + 128], device)).flatten(2).mT.half().cpu() for i in range(0, number, 128)]
    return Lessons(encode(coder, images, device), torch.cat(features), captions, facts_of(labels))


def wide_captions(sprites: list[Sprite], number: int = 6000) -> list[str]:
    """Captions of the wide world without its images, so that the tokenizer knows more than the small world's words."""
    r, seen = np.random.default_rng(0), [sprite for sprite in sprites if not sprite.held_out]
    places, tints = list(BACKGROUNDS), list(COLOURS)
    return [
        write_caption(
            seen[r.integers(len(seen))],
            places[r.integers(len(places))],
            tints[r.integers(len(tints))] if r.random() < 0.12 else None,
            WIDE,
            r,
        )
        for _ in range(number)
    ]


def facts_of(labels: list[Label]) -> Tensor:
    """(N, 4): class, background, tint (0 for none), sprite, each counted from 0."""
    rows = [(label.class_noun, label.background, label.tint or "", label.sprite) for label in labels]
    columns = [{value: i for i, value in enumerate(sorted(set(column)))} for column in zip(*rows, strict=True)]
    return torch.tensor([[known[value] for known, value in zip(columns, row, strict=True)] for row in rows])


# ---- training --------------------------------------------------------------------------------------------------------


def teach_words(nets: Nets, rows: tuple[Tensor, Tensor], facts: Tensor, steps: int, device: str) -> None:
    """Class, background, tint and sprite are named from the mean of a caption's tokens, so that words start apart."""
    heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, int(n) + 1) for n in facts.amax(dim=0)).to(device)
    learning, pace = [*nets.text_encoder.parameters(), *heads.parameters()], Pace("words", steps)
    optimizer, r = torch.optim.AdamW(learning, lr=2e-3, weight_decay=0.01), torch.Generator().manual_seed(0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - step / steps) + 1e-5
        picks = torch.randint(len(facts), (128,), generator=r)
        ids, real = (part[picks].to(device) for part in rows)
        with torch.autocast(device, torch.bfloat16):
            hidden = nets.read(ids, real)
        keep = real[..., None].float()
        mean = F.rms_norm((hidden.float() * keep).sum(1) / keep.sum(1), (TEXT_WIDTH,))
        loss = sum(F.cross_entropy(head(mean), facts[picks, i].to(device)) for i, head in enumerate(heads))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(nets.text_encoder.parameters(), 1.0)
        optimizer.step()
        pace.step(step + 1, loss.item())


def draw_sigma(batch: int, r: torch.Generator) -> Tensor:
    """(B,) logit-normal, its quantiles spread evenly within the batch; one in ten uniform."""
    quantiles = (torch.randperm(batch, generator=r) + torch.rand(batch, generator=r)) / batch
    sigma = torch.sigmoid(MEAN + torch.special.ndtri(quantiles.clamp(1e-4, 1 - 1e-4)))
    return torch.where(torch.rand(batch, generator=r) < UNIFORM, torch.rand(batch, generator=r), sigma)


class Course:
    """One training run: its networks, optimizers and the running mean of the weights."""

    def __init__(self, nets: Nets, tokenizer: Qwen2Tokenizer, lessons: Lessons, device: str, rate: float = 1.0) -> None:
        self.nets, self.lessons, self.device, self.rate = nets.to(device), lessons, device, rate
        self.rows, self.empty = tokens(tokenizer, lessons.captions), tokens(tokenizer, [""])
        first = lessons.features[:1000].float()
        self.mean, self.std = first.mean((0, 1)), first.std((0, 1)) + 1e-3
        matrices, self.rest, self.text = nets.parts()
        self.muon = torch.optim.Muon(matrices, lr=MUON, weight_decay=0.01, adjust_lr_fn="original")
        groups = [{"params": self.rest, "full": ADAM}, {"params": self.text, "full": TEXT}]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
        self.muon.param_groups[0]["full"] = MUON
        self.average, self.done = Average(nets, 0.998), 0

    def losses(self, r: torch.Generator) -> tuple[Tensor, Tensor]:
        """The squared error of the velocity, and how far the middle is from the identity network's features."""
        own, device = self.lessons, self.device
        picks = torch.randint(len(own.latents), (BATCH,), generator=r)
        sigma, blank = draw_sigma(BATCH, r), torch.rand(BATCH, generator=r) < DROPOUT
        x_0, noise = own.latents[picks].float(), torch.randn(BATCH, 8, 16, 16, generator=r)
        share = sigma.view(-1, 1, 1, 1)
        x_t, wanted = (1 - share) * x_0 + share * noise, noise - x_0
        ids, real = (
            torch.where(blank[:, None], nothing, all_[picks])
            for all_, nothing in zip(self.rows, self.empty, strict=True)
        )
        features = (own.features[picks].float() - self.mean) / self.std
        with torch.autocast(device, torch.bfloat16):
            velocity, seen = self.nets(x_t.to(device), sigma.to(device), ids.to(device), real.to(device))
        error = (velocity.float() - wanted.to(device)).pow(2).mean()
        return error, 1 - F.cosine_similarity(seen.float(), features.to(device), dim=-1).mean()

    def step(self, scale: float, seed: int = 0) -> float:
        """One step at `scale` of the full rates; the velocity's loss."""
        for group in (*self.muon.param_groups, *self.adam.param_groups):
            group["lr"] = group["full"] * self.rate * scale
        error, apart = self.losses(torch.Generator().manual_seed(hash((seed, self.done)) % 2**31))
        self.nets.zero_grad(set_to_none=True)
        (error + ALIGN * apart).backward()
        nn.utils.clip_grad_norm_([*self.rest, *self.text], 1.0)
        self.adam.step()
        self.muon.step()
        self.average.follow(self.nets)
        self.done += 1
        return error.item()

    def save(self, path: Path) -> None:
        model, average = self.nets.state_dict(), self.average.values
        optimizers = {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}
        save_state(path, model=model, average=average, step=self.done, **optimizers)

    def resume(self, state: dict) -> None:
        self.nets.load_state_dict(state["model"])
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.average.values, self.average.steps, self.done = state["average"], state["step"], state["step"]


def scale_at(step: int, steps: int, constant: float = CONSTANT) -> float:
    """Rise over WARM steps, stay, and fall to zero from `constant` of the steps on."""
    return min(1.0, (step + 1) / WARM) * min(1.0, (1 - step / steps) / (1 - constant))


def run(build: Path, sprites: list[Sprite], number: int, steps: int, seed=0, device="cpu", save_every=150) -> None:
    """Train the stage, or resume it, and write a pipeline with the averaged weights to build/flow."""
    torch.manual_seed(seed)
    lessons = prepare(small_world(sprites), number, device)
    tokenizer = new_tokenizer(wide_captions(sprites) + lessons.captions[:6000])
    course, pace = Course(Nets(tokenizer), tokenizer, lessons, device), Pace("flow", steps, every=50)
    if state := load_state(build / "flow.state"):
        course.resume(state)
    else:
        teach_words(course.nets, course.rows, lessons.facts, max(1, round(350 * steps / STEPS)), device)
        course.average = Average(course.nets, 0.998)
    while course.done < steps:
        loss = course.step(scale_at(course.done, steps), seed)
        pace.step(course.done, loss)
        if course.done % save_every == 0:
            course.save(build / "flow.state")
    course.nets.load_state_dict(course.average.values)
    pipe = write_pipeline(build / "flow", course.nets.cpu(), tokenizer)
    numbers = {"steps": steps, "samples": BATCH * steps, "loss": round(float(np.mean(pace.losses or [0])), 4)}
    finish(build, "flow", numbers, sample_sheet(pipe, lessons.captions))


def sample_sheet(pipe: ZImagePipeline, captions: list[str]) -> list[np.ndarray]:
    from unet import sample_sheet

    return sample_sheet(pipe, captions, guidance=3.0)  # Z-Image's measure: the usual 4


def write_pipeline(folder: Path, nets: Nets, tokenizer: Qwen2Tokenizer) -> ZImagePipeline:
    coder = AutoencoderKL.from_pretrained(TOYBOX / "pipe" / "vae", torch_dtype=torch.float16)
    coder.register_to_config(shift_factor=0.0)  # ZImagePipeline adds it
    transformer, encoder = nets.transformer.eval().half(), nets.text_encoder.eval().half()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)  # as trained: subjects learnt from it keep fine detail
    pipe = ZImagePipeline(scheduler, coder, encoder, tokenizer, transformer)
    pipe.save_pretrained(folder)
    return pipe


# ---- the package's weights, trained further --------------------------------------------------------------------------

PIPE = ASSETS / "toybox-flow" / "pipe"
WEIGHTS = {"transformer": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


def further(
    out: Path, small: list[Sprite], number: int, steps: int, until: float = float("inf"), device: str = "cpu"
) -> dict[str, float]:
    """Train the package's weights for more steps, at half the rates falling to zero, and write fp16 tensors to `out`.

    `until` is a time.time() at which the rates have fallen to zero in any case. Returns steps, seconds, and the loss on
    the same 8 batches of the package's weights (before) and of the averaged ones (after).
    """
    torch.manual_seed(1)
    tokenizer = Qwen2Tokenizer.from_pretrained(PIPE / "tokenizer")
    nets = Nets(tokenizer)
    for name, file in WEIGHTS.items():
        getattr(nets, name).load_state_dict(
            {key: value.float() for key, value in load_file(PIPE / name / file).items()}
        )
    course = Course(nets, tokenizer, prepare(small, number, device), device, rate=0.5)
    before, began, pace = held_loss(course), time.time(), Pace("further", steps)
    while course.done < steps and (now := time.time()) < until:
        left = 1.0 if math.isinf(until) else (until - now) / (until - began)
        loss = course.step(min(left, scale_at(course.done, steps, constant=0.0)), seed=1)
        pace.step(course.done, loss)
    seconds = time.time() - began
    nets.load_state_dict(course.average.values)
    kept = {name: value for name, value in nets.state_dict().items() if not name.startswith("head.")}
    save_file({name: value.half().cpu().contiguous() for name, value in kept.items()}, out)
    return {"steps": course.done, "s": seconds, "loss before": before, "loss after": held_loss(course)}


@torch.no_grad()
def held_loss(course: Course, batches: int = 8) -> float:
    """The mean loss on batches that no step of training draws."""
    found = [course.losses(torch.Generator().manual_seed(2**31 + i))[0].item() for i in range(batches)]
    return float(np.mean(found))


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the package's toybox-flow further.")
    parser.add_argument("out", type=Path, help="safetensors file for the transformer and the text encoder, fp16")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--images", type=int, default=PICTURES, help="of the small world")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for all of it, if the steps take longer")
    parser.add_argument("--sprites", type=Path, default=Path("build/toybox"), help="folder, or a file of sprites.py")
    parser.add_argument("--json", type=Path, help="write what came out to this file too")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    until = time.time() + given.seconds
    try:
        if given.sprites.is_file():
            small = unpack(given.sprites)
        else:
            fetch(given.sprites)
            small = small_world(load_sprites(given.sprites))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found = json.dumps(further(given.out, small, given.images, given.steps, until, given.device))
    print(found)
    if given.json:
        given.json.write_text(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
