"""Time of a training step against the bare frozen denoiser, LoRA, PEFT's LoKr and diffusers' script, in one run.

    python scripts/bench_step.py                        # (a) to (c): a few minutes on two cores
    python scripts/bench_step.py --diffusers-script examples/dreambooth/train_dreambooth_lora_sdxl.py

All contenders take turns, round by round, on one small SDXL with random weights, so that a busy machine slows all
alike; the median over rounds is reported. With a script, both programs run in turns as a user runs them, photos in and
adapter out. Their model has SDXL's real VAE (84 M parameters, random) beside the small denoiser: its encoder is what a
program that caches latents leaves out of each step. `--tiny-vae` shows the step without that part. Both run in fp32 on
a CPU; times of the CPU are printed too, which say more on a busy machine.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from diffusekrona_train.adapters.inject import inject  # noqa: E402
from diffusekrona_train.config import make_config  # noqa: E402
from diffusekrona_train.data.training_set import Bucket, TrainingSet  # noqa: E402
from diffusekrona_train.models import family_named  # noqa: E402
from diffusekrona_train.models.process import Ddpm  # noqa: E402
from diffusekrona_train.training.loss import Objective  # noqa: E402
from diffusekrona_train.training.optimizer import Descent  # noqa: E402
from tests.tiny import make_unet  # noqa: E402

OneProcess = SimpleNamespace(num_processes=1, scaler=None, backward=lambda loss: loss.backward())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=320, help="width of the first UNet block")
    parser.add_argument("--latent", type=int, default=16, help="side of the latents (times 8: pixels)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="steps of a contender in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--diffusers-script", type=Path, help="train_dreambooth_lora_sdxl.py of a diffusers checkout")
    parser.add_argument("--script-rounds", type=int, default=3, help="how often each program runs")
    parser.add_argument("--script-steps", type=int, default=11, help="steps of each program")
    parser.add_argument("--tiny-vae", action="store_true", help="a VAE of some thousand parameters for both programs")
    parser.add_argument("--only-script", action="store_true", help="leave (a) to (c) out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.only_script:
        report(race(make_contenders(args), args), args)
    if args.diffusers_script:
        against_script(args)


# ---- (a) to (c): the step alone ------------------------------------------------------------------------------------


def make_contenders(args: argparse.Namespace) -> dict[str, Callable[[int], Any]]:
    """Name -> one training step. All share one denoiser but PEFT's, whose wrapping cannot be taken out bit for bit."""
    torch.manual_seed(0)
    unet = make_unet("sdxl", args.width).to(args.device).requires_grad_(False)
    other = make_unet("sdxl", args.width).to(args.device).requires_grad_(False)
    print(f"denoiser: {sum(p.numel() for p in unet.parameters()) / 1e6:.0f} M parameters, latents {args.latent}, fp32")
    return {
        "bare frozen denoiser, forward and backward": bare(unet, args),
        "krona (4, 64)": ours(unet, args, a1=4, a2=64),
        "LoRA rank 4, the same loop": ours(unet, args, type="lora", rank=4),
        "PEFT LoKr, the same loop": peft_lokr(other, args),
    }


def bare(unet: Any, args: argparse.Namespace) -> Callable[[int], Any]:
    objective = make_objective(unet, None, args)

    def step(number: int) -> None:
        (batch,) = objective.batches(number, 0)
        x = batch.x_0.requires_grad_()
        objective._predicted(x, batch).square().mean().backward()

    return step


def ours(unet: Any, args: argparse.Namespace, **adapter: Any) -> Callable[[int], Any]:
    """The loop's own step. The adapter sits in the model only while its turn lasts."""
    config = make_run(args, adapter)
    injection = inject(unet, config.adapter)
    parameters = injection.parameters()
    sites = {name: unet.get_submodule(name) for name in injection.adapters}
    injection.eject()
    bases = {name: unet.get_submodule(name) for name in sites}
    objective, descent = make_objective(unet, injection, args), Descent(parameters, config.train, OneProcess)

    def put(modules: dict[str, Any]) -> None:
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, module)

    def step(number: int) -> None:
        descent.backward(objective.loss(number, 0))
        descent.step(5e-4)

    step.enter, step.leave = lambda: put(sites), lambda: put(bases)  # type: ignore[attr-defined]
    return step


def peft_lokr(unet: Any, args: argparse.Namespace) -> Callable[[int], Any]:
    """PEFT's LoKr as the paper's baseline has it (factor -1, rank 8), under the same objective and optimiser."""
    from peft import LoKrConfig, inject_adapter_in_model

    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    inject_adapter_in_model(LoKrConfig(r=8, alpha=8, decompose_factor=-1, target_modules=targets), unet)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    objective, descent = make_objective(unet, None, args), Descent(parameters, make_run(args, {}).train, OneProcess)

    def step(number: int) -> None:
        descent.backward(objective.loss(number, 0))
        descent.step(5e-4)

    return step


def make_run(args: argparse.Namespace, adapter: dict) -> Any:
    subject, train = {"images": "x", "class": "dog"}, {"batch_size": args.batch}
    return make_config({"subject": subject, "adapter": adapter, "train": train, "output": "x"})


def make_objective(unet: Any, injection: Any, args: argparse.Namespace) -> Objective:
    """The loop's objective over five cached pictures that were drawn at random."""
    torch.manual_seed(1)
    latents = torch.randn(5, 1, 4, args.latent, args.latent)
    ids = torch.tensor([args.latent * 8.0, args.latent * 8.0, 0, 0, args.latent * 8.0, args.latent * 8.0])
    bucket = Bucket(latents, {"size_ids": ids.expand(5, 1, 6).clone()}, torch.zeros(5, dtype=torch.long), list("abcde"))
    conditioning = [{"prompt_embeds": torch.randn(77, 64), "pooled": torch.randn(32)}]
    process = Ddpm.from_config({"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    data = TrainingSet([bucket], [], [""], conditioning)
    device, family = torch.device(args.device), family_named("sdxl")
    return Objective(
        make_run(args, {}), family, unet, injection, data, process, torch.float32, device
    )  # fmt: skip


def race(contenders: dict[str, Callable[[int], Any]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds a step, for each contender and round; the order changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(args.rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            step = contenders[name]
            getattr(step, "enter", lambda: None)()
            step(0)  # the first step after a change of places is not measured
            wait(args)
            began = time.perf_counter()
            for i in range(args.steps):
                step(number * args.steps + i)
            wait(args)
            if number:  # nor is the first round: it makes the optimiser's state
                seconds[name].append((time.perf_counter() - began) / args.steps)
            getattr(step, "leave", lambda: None)()
    return seconds


def wait(args: argparse.Namespace) -> None:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()


def report(seconds: dict[str, list[float]], args: argparse.Namespace) -> None:
    """A table; the ratio is the median of the ratios of each round, where both stood under the same load."""
    mine = seconds["krona (4, 64)"]
    print(f"\n{'a step of':46} {'seconds':>8} {'krona takes':>12}")
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(mine, values, strict=True))
        print(f"{name:46} {statistics.median(values):8.3f} {ratio:11.2f}x")
    print(f"median of {args.rounds} rounds of {args.steps} steps, batch {args.batch}, {args.threads} thread(s)")


# ---- (d): the whole program ----------------------------------------------------------------------------------------


def against_script(args: argparse.Namespace) -> None:
    """Both programs in turns; their progress bars say when a step is done."""
    from tests.runs import draw_photos
    from tests.tiny import make_pipeline

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pipeline("sdxl", folder / "model", width=args.width)
        if not args.tiny_vae:
            real_vae().save_pretrained(folder / "model" / "vae")
        draw_photos(folder / "photos", 5, sizes=((args.latent * 8 + 16, args.latent * 8 + 8),))
        commands = {
            "krona-train": lambda number: our_command(args, folder, f"ours-{number}", f"cache-{number}"),
            "diffusers' script": lambda number: their_command(args, folder, f"theirs-{number}"),
            "krona-train, cache filled": lambda number: our_command(args, folder, f"again-{number}", f"cache-{number}"),
        }
        found: dict[str, list[tuple[float, ...]]] = {label: [] for label in commands}
        for number in range(args.script_rounds):
            for label, command in commands.items():
                found[label].append(watch(command(number), args.script_steps))
    vae = "tiny" if args.tiny_vae else "SDXL's"
    print(f"\nwhole programs, {args.latent * 8} pixels, batch {args.batch}, {vae} VAE, {args.script_rounds} rounds")
    print(f"{'seconds (and of the CPU)':28} {'a step':>8} {'CPU':>8} {'to the first step':>20} {'CPU':>8}")
    middle = {label: [statistics.median(values) for values in zip(*rows, strict=True)] for label, rows in found.items()}
    for label, (step, step_cpu, start, start_cpu) in middle.items():
        print(f"{label:28} {step:8.2f} {step_cpu:8.2f} {start:20.1f} {start_cpu:8.1f}")
    ours, theirs = middle["krona-train"], middle["diffusers' script"]
    print(f"a step of diffusers' script takes {theirs[0] / ours[0]:.2f}x ours (CPU: {theirs[1] / ours[1]:.2f}x)")


def watch(command: list[str], steps: int) -> tuple[float, float, float, float]:
    """Runs a program of `steps` steps: seconds a step, of the CPU a step, from its start to the end of the first step,
    of the CPU until then."""
    import psutil

    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    began, said, done = time.perf_counter(), b"", {}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as program:
        assert program.stderr is not None
        process = psutil.Process(program.pid)
        while chunk := os.read(program.stderr.fileno(), 4096):
            said += chunk
            bars = re.findall(rb"\b(\d+)/%d \[" % steps, said[-8192:])
            if bars and 0 < int(bars[-1]) and int(bars[-1]) not in done:
                times = process.cpu_times()
                done[int(bars[-1])] = time.perf_counter() - began, times.user + times.system
    if program.returncode or not {1, steps} <= done.keys():
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{said.decode(errors='replace')[-2000:]}")
    (first, first_cpu), (last, last_cpu) = done[1], done[steps]
    return (last - first) / (steps - 1), (last_cpu - first_cpu) / (steps - 1), first, first_cpu


def real_vae() -> Any:
    """SDXL's autoencoder, 84 M parameters of which the encoder has 34 M, with random weights."""
    from diffusers import AutoencoderKL

    settings: dict[str, Any] = {  # diffusers' own types of these are too narrow
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
    }
    torch.manual_seed(0)
    return AutoencoderKL(**settings).eval()


def our_command(args: argparse.Namespace, folder: Path, name: str, cache: str) -> list[str]:
    config = folder / f"{name}.yaml"
    config.write_text(
        f"model: {folder / 'model'}\nsubject: {{images: {folder / 'photos'}, class: dog}}\n"
        f"data: {{resolution: {args.latent * 8}, cache_dir: {folder / cache}}}\n"
        f"adapter: {{a1: 4, a2: 64}}\noutput: {folder / name}\n"
        f"train: {{steps: {args.script_steps}, batch_size: {args.batch}}}\nvalidation: {{every: 0}}\n"
    )
    return [sys.executable, "-m", "diffusekrona_train", "--config", str(config)]


def their_command(args: argparse.Namespace, folder: Path, name: str) -> list[str]:
    options = {
        "pretrained_model_name_or_path": folder / "model",
        "instance_data_dir": folder / "photos",
        "instance_prompt": "A sks dog",
        "output_dir": folder / name,
        "resolution": args.latent * 8,
        "train_batch_size": args.batch,
        "max_train_steps": args.script_steps,
        "rank": 4,
        "learning_rate": 1e-4,
        "seed": 0,
        "dataloader_num_workers": 0,
    }
    return [sys.executable, str(args.diffusers_script), *[f"--{name}={value}" for name, value in options.items()]]


if __name__ == "__main__":
    main()
