"""More cases of the areas runs and adapters: model files and adapters as other programs leave them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.adapters import adapter_case
from tests.faults.harness import Case
from tests.faults.runs import fresh, training_case
from tests.faults.sandbox import Sandbox

LAYER = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
SMALL = {"data.resolution": 64, "adapter.a1": 4, "adapter.a2": 4}
NAMES = "the tensor that is missing is named, whatever it belongs to"


def cases() -> list[Case]:
    return _files() + _folders() + _adapters()


def _toybox() -> Path:
    from diffusekrona_train.models.local import ASSETS

    return ASSETS / "toybox" / "pipe"


def _single_file(folder: Path) -> None:
    """The toybox as one file in the layout of the original releases."""
    from safetensors.torch import save_file

    from diffusekrona_train.models import open_model
    from diffusekrona_train.models.original import original_tensors

    source, tensors = open_model("toybox"), {}
    parts = source.load("denoiser", "vae", "text_encoders")
    modules = [parts["denoiser"], parts["vae"], *parts["text_encoders"]]
    for part, module in zip(("unet", "vae", "text_encoder", "text_encoder_2"), modules, strict=True):
        tensors |= original_tensors(part, "sdxl", module.state_dict(), source.place.config(part))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / "toy.safetensors")


def _files() -> list[Case]:
    """A single file that is not whole, or in a format that no product with a scale gives back."""

    def file(
        edit: Callable[[dict], Any], name: str = "toy.safetensors", *more: str, **changes: Any
    ) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            from safetensors.torch import load_file, save_file

            tensors = load_file(box.shared.build("toybox-file", _single_file) / "toy.safetensors")
            edit(tensors)
            save_file(tensors, box.path(name))
            settings = {"model": name, "model_config_dir": str(_toybox()), **SMALL, **changes}
            return [*fresh(box, settings, cache=False), *more]

        return make

    def without(start: str) -> Callable[[dict], None]:
        def edit(tensors: dict) -> None:
            for name in [name for name in tensors if name.startswith(start)]:
                del tensors[name]

        return edit

    def four_bits(tensors: dict) -> None:
        import torch

        tensors[f"{LAYER}.comfy_quant"] = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)

    def stored_as(kind: str) -> Callable[[dict], None]:
        def edit(tensors: dict) -> None:
            import torch

            tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(getattr(torch, kind))

        return edit

    return [
        training_case(
            "a file without its text projection",
            file(without("conditioner.embedders.1.model.text_projection")),
            2,
            r"lacks 1 tensor \(conditioner\.embedders\.1\.model\.text_projection\) of its second text encoder",
            NAMES,
        ),
        training_case(
            "a file without its VAE encoder",
            file(without("first_stage_model.encoder.")),
            2,
            r"lacks \d+ tensors \(first_stage_model\.encoder\..*of its VAE",
            NAMES,
        ),
        training_case(
            "a file without a block, checked",
            file(without("model.diffusion_model.output_blocks.0."), "toy.safetensors", "--check"),
            2,
            r"lacks \d+ tensors \(model\.diffusion_model\.output_blocks\.0\..*of its denoiser",
            NAMES,
        ),
        training_case("a file in four bits", file(four_bits), 2, rf"{LAYER} is quantised as nvfp4"),
        training_case("a file of integers without a scale", file(stored_as("int8")), 2, rf"{LAYER}\.weight is I8, wi"),
        training_case("a whole file under another suffix", file(lambda tensors: None, "TOY.SFT"), 0, r"done: 4 steps"),
        training_case(
            "a prediction type that is none",
            file(lambda tensors: None, prediction_type="velocity"),
            2,
            r"prediction_type.*epsilon",
        ),
    ]  # fmt: skip


def _folders() -> list[Case]:
    """A folder for another task, of another process, or with numbers that are none."""

    def folder(part: str, *more: str, **change: Any) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            shutil.copytree(_toybox(), box.folder / "model")
            file = box.folder / "model" / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
            file.write_text(json.dumps(json.loads(file.read_text()) | change))
            return [*fresh(box, {"model": "model", **SMALL}, cache=False), *more]

        return make

    def poisoned(part: str) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            from safetensors.torch import load_file, save_file

            arguments = folder(part)(box)
            file = next((box.folder / "model" / part).glob("*.safetensors"))
            tensors = load_file(file)
            tensors[sorted(tensors)[-1]].view(-1)[0] = float("nan")
            save_file(tensors, file, {"format": "pt"})
            return arguments

        return make

    nan = "one sentence for a damaged base, which names the part and the tensor"
    return [
        training_case(
            "an inpainting folder", folder("unet", "--check", in_channels=17), 2, r"takes 17 input channels and gives 8"
        ),
        training_case(
            "a VAE of another model", folder("vae", "--check", latent_channels=4), 2, r"its VAE gives 4"
        ),
        training_case(
            "a scheduler of a flow",
            folder("scheduler", "--check", _class_name="FlowMatchEulerDiscreteScheduler"),
            2,
            r"FlowMatchEulerDiscreteScheduler, which is not of the diffusion process",
        ),
        training_case("NaN in the denoiser", poisoned("unet"), 2, r"part unet: tensor \S+ holds NaN", nan),
        training_case("NaN in a text encoder", poisoned("text_encoder"), 2, r"part text_encoder: tensor .* NaN", nan),
    ]  # fmt: skip


def _adapters() -> list[Case]:
    """Files of PEFT and kohya that hold more than a LoRA of the denoiser's linear layers."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    kohya = f"lora_unet_{name.replace('.', '_')}"

    def lora(
        stem: str, metadata: dict[str, str] | None = None, *others: str, shape: tuple[int, ...] = ()
    ) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            import torch
            from safetensors.torch import save_file

            from diffusekrona_train.models.layers import layer_table

            layer = next(layer for layer in layer_table("toybox") if layer.name == name)
            down, up = torch.ones(2, layer.in_features), torch.ones(layer.out_features, 2)
            ends = ("lora_A.weight", "lora_B.weight") if "." in stem else ("lora_down.weight", "lora_up.weight")
            tensors = {f"{stem}.{ends[0]}": down, f"{stem}.{ends[1]}": up}
            tensors |= {other: torch.ones(shape or (2, 2)) for other in others}
            save_file(tensors, box.path("dog.safetensors"), metadata)
            return ["convert", "dog.safetensors", "out/dog.safetensors", "--to", "native", "--model", "toybox"]

        return make

    def said(**settings: Any) -> dict[str, str]:
        return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in settings.items()})}

    conv = (
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight",
        "lora_unet_down_blocks_0_resnets_0_conv1.lora_up.weight",
    )
    text = ("lora_te1_text_model_x.lora_down.weight", "lora_te1_text_model_x.lora_up.weight")
    return [
        adapter_case(
            "a LoRA by diffusers", lora(f"unet.{name}", said(r=2, lora_alpha=4)), "", status=0,
            exists=("out/dog.safetensors",),
        ),
        adapter_case("a DoRA by diffusers", lora(f"unet.{name}", said(r=2, lora_alpha=4, use_dora=1)), r"is a DoRA"),
        adapter_case(
            "a LoRA that took from its base",
            lora(f"unet.{name}", said(r=2, lora_alpha=2, init_lora_weights="pissa")),
            r"was initialised as pissa",
        ),
        adapter_case("settings that are no JSON", lora(f"unet.{name}", {"lora_adapter_metadata": "{"}), r"not JSON"),
        adapter_case("PEFT's file alone", lora(f"base_model.model.{name}"), r"adapter_config\.json beside it"),
        adapter_case("a DoRA by kohya", lora(kohya, None, f"{kohya}.dora_scale"), r"dora_scale makes this a DoRA"),
        adapter_case("a LoRA with convolutions", lora(kohya, None, *conv), r"conv1 is a convolution or another layer"),
        adapter_case("a LoRA with a text encoder", lora(kohya, None, *text), r"and 1 more adapts a text encoder"),
    ]  # fmt: skip
