"""A diffusers folder as one .safetensors checkpoint in the layout of the original releases: the reverse of what a
single-file loader does, written from the naming rules of the two layouts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
CLIP_PART = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def write_checkpoint(kind: str, parts: dict, path: Path, metadata: dict[str, str] | None = None) -> Path:
    """`parts` as ModelSource.load gives them -> one file; kind: sd15, sd21 or sdxl."""
    from safetensors.torch import save_file

    tensors = {f"model.diffusion_model.{k}": v for k, v in unet_names(parts["denoiser"]).items()}
    tensors |= {f"first_stage_model.{k}": v for k, v in vae_names(parts["vae"]).items()}
    first = parts["text_encoders"][0]
    if kind == "sd15":
        tensors |= clip_names(first, "cond_stage_model.transformer.")
    elif kind == "sd21":
        tensors |= open_clip_names(first, "cond_stage_model.model.")
    else:
        tensors |= clip_names(first, "conditioner.embedders.0.transformer.")
        tensors |= open_clip_names(parts["text_encoders"][1], "conditioner.embedders.1.model.")
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def unet_names(unet) -> dict[str, Tensor]:
    prefixes = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for i in range(len(unet.down_blocks)):
        for j in range(2):
            prefixes[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{3 * i + j + 1}.0"
            prefixes[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{3 * i + j + 1}.1"
        prefixes[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{3 * i + 3}.0.op"
    for i, block in enumerate(unet.up_blocks):
        for j in range(3):
            prefixes[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{3 * i + j}.0"
            prefixes[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{3 * i + j}.1"
        place = 2 if hasattr(block, "attentions") else 1
        prefixes[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{3 * i + 2}.{place}.conv"
    return {_renamed(name, prefixes, RESNET): tensor for name, tensor in unet.state_dict().items()}


def vae_names(vae) -> dict[str, Tensor]:
    prefixes, last = {}, len(vae.config.block_out_channels) - 1
    for side in ("encoder", "decoder"):
        for j in (0, 1):
            prefixes[f"{side}.mid_block.resnets.{j}"] = f"{side}.mid.block_{j + 1}"
        prefixes[f"{side}.mid_block.attentions.0"] = f"{side}.mid.attn_1"
        prefixes[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for i in range(last + 1):
            ours = f"{side}.down_blocks.{i}" if side == "encoder" else f"{side}.up_blocks.{i}"
            theirs = f"{side}.down.{i}" if side == "encoder" else f"{side}.up.{last - i}"
            for j in range(4):
                prefixes[f"{ours}.resnets.{j}"] = f"{theirs}.block.{j}"
            prefixes[f"{ours}.downsamplers.0.conv"] = f"{theirs}.downsample.conv"
            prefixes[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
    inner = {
        "conv_shortcut": "nin_shortcut",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
    }
    named = {_renamed(name, prefixes, inner): tensor for name, tensor in vae.state_dict().items()}
    is_attention = ("attn_1.q.weight", "attn_1.k.weight", "attn_1.v.weight", "attn_1.proj_out.weight")
    return {k: v[:, :, None, None] if k.endswith(is_attention) else v for k, v in named.items()}


def clip_names(encoder, prefix: str) -> dict[str, Tensor]:
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in encoder.state_dict().items()}
    length = encoder.config.max_position_embeddings
    state["text_model.embeddings.position_ids"] = torch.arange(length)[None]  # old checkpoints carry it
    return {prefix + name: tensor for name, tensor in state.items()}


def open_clip_names(encoder, prefix: str) -> dict[str, Tensor]:
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    named = {
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    if "text_projection.weight" in state:
        named["text_projection"] = state["text_projection.weight"].T
    for i in range(encoder.config.num_hidden_layers):
        ours, theirs = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for end in ("weight", "bias"):
            qkv = [state[f"{ours}self_attn.{x}_proj.{end}"] for x in "qkv"]
            named[f"{theirs}attn.in_proj_{end}"] = torch.cat(qkv)
            named[f"{theirs}attn.out_proj.{end}"] = state[f"{ours}self_attn.out_proj.{end}"]
            named |= {f"{theirs}{b}.{end}": state[f"{ours}{a}.{end}"] for a, b in CLIP_PART.items()}
    return {prefix + name: tensor for name, tensor in named.items()}


def _renamed(name: str, prefixes: dict[str, str], inner: dict[str, str]) -> str:
    ours = max((p for p in prefixes if name.startswith(p + ".")), key=len, default=None)
    if ours is None:
        return name
    rest = name[len(ours) + 1 :]
    is_transformer = "transformer_blocks" in rest
    for a, b in inner.items():
        if rest.startswith(a + ".") and not is_transformer:
            rest = b + rest[len(a) :]
    return f"{prefixes[ours]}.{rest}"
