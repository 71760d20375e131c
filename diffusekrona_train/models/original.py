"""Rename a model's tensors to those of the original releases: ldm for SD, sgm for SDXL.

Single checkpoint files, ComfyUI and A1111 use these names. Works on meta tensors too, so that what a file must hold is
known without reading it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from diffusekrona_train.models.contracts import Config
from diffusekrona_train.models.sd import original_path

Tensors = dict[str, Tensor]

DENOISER, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_PREFIX = {"sd": "cond_stage_model.", "sdxl": "conditioner.embedders.0."}
"""Family -> prefix of its first text encoder."""
BIG_CLIP_PREFIX = "conditioner.embedders.1."

UNET_ENDS = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
UNET_RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
VAE_INNER = {
    "conv_shortcut.": "nin_shortcut.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
OPEN_CLIP_LAYER = {
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}

_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def original_tensors(part: str, family: str, tensors: Tensors, config: Config, second: bool = False) -> Tensors:
    """Return the tensors of `part` (unet, vae, text_encoder, text_encoder_2) by their names in a checkpoint file.

    `config` is the part's own; `second`: the text encoder is SD 2's, which is kept as OpenCLIP has it. ValueError for a
    tensor that the original layout has no name for.
    """
    if part == "unet":
        return unet_tensors(tensors, int(config["layers_per_block"]))
    if part == "vae":
        return vae_tensors(tensors)
    if part == "text_encoder_2":
        return open_clip_tensors(tensors, f"{BIG_CLIP_PREFIX}model.")
    if second:
        return open_clip_tensors(tensors, f"{CLIP_PREFIX[family]}model.")
    return clip_tensors(tensors, f"{CLIP_PREFIX[family]}transformer.")


def unet_tensors(tensors: Tensors, layers_per_block: int) -> Tensors:
    """Return a UNet2DConditionModel's state in the original layout."""
    attends = {int(match[1]) for name in tensors if (match := re.match(r"up_blocks\.(\d+)\.attentions", name))}

    def block(side: str, i: int, kind: str, j: int, rest: str, name: str) -> str:
        if kind == "attentions":
            return _other_than(name, original_path(name, layers_per_block))
        rest = _replaced(rest, UNET_RESNET) if kind == "resnets" else rest
        if side == "mid":
            return f"middle_block.{2 * j}.{rest}"
        row = (layers_per_block + 1) * i + j
        if kind == "downsamplers":
            return f"input_blocks.{(layers_per_block + 1) * (i + 1)}.0.{rest.replace('conv.', 'op.', 1)}"
        if kind == "upsamplers":
            return f"output_blocks.{row + layers_per_block}.{1 + (i in attends)}.{rest}"
        return f"input_blocks.{row + 1}.0.{rest}" if side == "down" else f"output_blocks.{row}.0.{rest}"

    return {DENOISER + _named(name, UNET_ENDS, block): tensor for name, tensor in tensors.items()}


def vae_tensors(tensors: Tensors, prefix: str = VAE) -> Tensors:
    """Return an AutoencoderKL's state in the original layout, where its attention is made of 1x1 convolutions."""
    last = max(int(match[1]) for name in tensors if (match := re.search(r"up_blocks\.(\d+)\.", name)))

    def block(side: str, i: int, kind: str, j: int, rest: str, name: str) -> str:
        rest = _replaced(rest, VAE_INNER)
        if side == "mid":
            return f"mid.attn_{j + 1}.{rest}" if kind == "attentions" else f"mid.block_{j + 1}.{rest}"
        home = f"down.{i}" if side == "down" else f"up.{last - i}"
        kind = {"resnets": f"block.{j}", "downsamplers": "downsample", "upsamplers": "upsample"}.get(kind, f"attn.{j}")
        return f"{home}.{kind}.{rest}"

    result: Tensors = {}
    for name, tensor in tensors.items():
        half, _, rest = name.partition(".")
        if half in ("encoder", "decoder"):
            ends = {"conv_norm_out.": "norm_out.", "conv_in.": "conv_in.", "conv_out.": "conv_out."}
            name = f"{half}.{_named(rest, ends, block)}"
        if ".attn_1." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        result[prefix + name] = tensor
    return result


def clip_tensors(tensors: Tensors, prefix: str) -> Tensors:
    """Return a CLIPTextModel's state as SD 1 and SDXL keep it: transformers' own names."""
    return {f"{prefix}text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def open_clip_tensors(tensors: Tensors, prefix: str) -> Tensors:
    """Return a CLIP text model's state as OpenCLIP names it: queries, keys and values in one, the projection
    transposed."""
    state = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    result: Tensors = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+?)(weight|bias)", name)
        if name in OPEN_CLIP:
            result[prefix + OPEN_CLIP[name]] = tensor.T if name == "text_projection.weight" else tensor
        elif match is None:
            raise ValueError(f"text encoder: the original layout has no name for {name}")
        elif match[2] == "self_attn.q_proj.":
            three = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            result[f"{prefix}transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"] = torch.cat(three)
        elif match[2] in OPEN_CLIP_LAYER:
            result[f"{prefix}transformer.resblocks.{match[1]}.{OPEN_CLIP_LAYER[match[2]]}{match[3]}"] = tensor
    return result


def _named(name: str, ends: dict[str, str], block: Callable[..., str]) -> str:
    """Rename a tensor outside the blocks by the table `ends`, one inside by `block`."""
    match = _BLOCK.fullmatch(name)
    if match is not None:
        side, i, kind, j, rest = match.groups()
        return block(side, int(i or 0), kind, int(j), rest, name)
    if not name.startswith(tuple(ends)):
        raise ValueError(f"the original layout has no name for {name}")
    return _replaced(name, ends)


def _other_than(name: str, renamed: str) -> str:
    if renamed == name:
        raise ValueError(f"the original layout has no name for {name}")
    return renamed


def _replaced(name: str, table: dict[str, str]) -> str:
    """Replace the beginning of `name` by the table's."""
    for ours, theirs in table.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    return name
