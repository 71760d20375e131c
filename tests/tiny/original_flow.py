"""Flow transformers and their VAEs in the names of the original releases, as ComfyUI's files have them: the reverse of
what a loader does, written from the two layouts and not from diffusers' conversions."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def renamed(tensors: Tensors, *rules: tuple[str, str]) -> Tensors:
    """Each name after all rules (pattern, replacement)."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        found[name] = tensor
    return found


def fused(tensors: Tensors, names: tuple[str, ...], new: str) -> Tensors:
    """The tensors whose names end in `names`.weight (or .bias), one below the other under `new`, block by block."""
    found, (first, *others) = dict(tensors), names
    for name in tensors:
        if match := re.fullmatch(rf"(.*)\b{re.escape(first)}\.(weight|bias)", name):
            start, end = match.groups()
            parts = [found.pop(name), *(found.pop(f"{start}{other}.{end}") for other in others)]
            found[f"{start}{new}.{end}"] = torch.cat(parts)
    return found


def swapped(tensors: Tensors, name: str) -> Tensors:
    """Original layers give (shift, scale), diffusers' (scale, shift)."""
    return {key: torch.cat(v.chunk(2)[::-1]) if key.startswith(f"{name}.") else v for key, v in tensors.items()}


def zimage_names(tensors: Tensors) -> Tensors:
    tensors = fused(tensors, ("attention.to_q", "attention.to_k", "attention.to_v"), "attention.qkv")
    return renamed(
        tensors,
        (r"^all_x_embedder\.2-1\.", "x_embedder."),
        (r"^all_final_layer\.2-1\.", "final_layer."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
    )


def flux2_names(tensors: Tensors) -> Tensors:
    tensors = swapped(tensors, "norm_out.linear")
    tensors = fused(tensors, ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv")
    tensors = fused(tensors, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv")
    return renamed(
        tensors,
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^time_guidance_embed\.timestep_embedder\.linear_1\.", "time_in.in_layer."),
        (r"^time_guidance_embed\.timestep_embedder\.linear_2\.", "time_in.out_layer."),
        (r"^time_guidance_embed\.guidance_embedder\.linear_1\.", "guidance_in.in_layer."),
        (r"^time_guidance_embed\.guidance_embedder\.linear_2\.", "guidance_in.out_layer."),
        (r"^(\w+_modulation(?:_img|_txt)?)\.linear\.", r"\1.lin."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.", r"single_blocks.\1.linear1."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.", r"single_blocks.\1.linear2."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (r"^transformer_blocks\.", "double_blocks."),
        (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
        (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
        (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
        (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
        (r"\.ff\.linear_in\.", ".img_mlp.0."),
        (r"\.ff\.linear_out\.", ".img_mlp.2."),
        (r"\.ff_context\.linear_in\.", ".txt_mlp.0."),
        (r"\.ff_context\.linear_out\.", ".txt_mlp.2."),
    )


def flux1_names(tensors: Tensors) -> Tensors:
    """FLUX.1's and Chroma's, which share their blocks."""
    tensors = swapped(tensors, "norm_out.linear")
    single = {name: tensor for name, tensor in tensors.items() if name.startswith("single_")}
    single = fused(single, ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1")
    double = {name: tensor for name, tensor in tensors.items() if name not in single and name[:7] != "single_"}
    double = fused(double, ("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv")
    double = fused(double, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv")
    return renamed(
        {**double, **single},
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^time_text_embed\.timestep_embedder\.linear_1\.", "time_in.in_layer."),
        (r"^time_text_embed\.timestep_embedder\.linear_2\.", "time_in.out_layer."),
        (r"^time_text_embed\.guidance_embedder\.linear_1\.", "guidance_in.in_layer."),
        (r"^time_text_embed\.guidance_embedder\.linear_2\.", "guidance_in.out_layer."),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "vector_in.in_layer."),
        (r"^time_text_embed\.text_embedder\.linear_2\.", "vector_in.out_layer."),
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_1\.", r"\1.in_layer."),
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_2\.", r"\1.out_layer."),
        (r"^(distilled_guidance_layer\.norms\.\d+)\.weight", r"\1.scale"),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^single_transformer_blocks\.(\d+)\.norm\.linear\.", r"single_blocks.\1.modulation.lin."),
        (r"^single_transformer_blocks\.(\d+)\.proj_out\.", r"single_blocks.\1.linear2."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_q\.weight", r"single_blocks.\1.norm.query_norm.scale"),
        (r"^single_transformer_blocks\.(\d+)\.attn\.norm_k\.weight", r"single_blocks.\1.norm.key_norm.scale"),
        (r"^single_transformer_blocks\.", "single_blocks."),
        (r"^transformer_blocks\.", "double_blocks."),
        (r"\.norm1\.linear\.", ".img_mod.lin."),
        (r"\.norm1_context\.linear\.", ".txt_mod.lin."),
        (r"\.attn\.norm_q\.weight", ".img_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_k\.weight", ".img_attn.norm.key_norm.scale"),
        (r"\.attn\.norm_added_q\.weight", ".txt_attn.norm.query_norm.scale"),
        (r"\.attn\.norm_added_k\.weight", ".txt_attn.norm.key_norm.scale"),
        (r"\.attn\.to_out\.0\.", ".img_attn.proj."),
        (r"\.attn\.to_add_out\.", ".txt_attn.proj."),
        (r"\.ff\.net\.0\.proj\.", ".img_mlp.0."),
        (r"\.ff\.net\.2\.", ".img_mlp.2."),
        (r"\.ff_context\.net\.0\.proj\.", ".txt_mlp.0."),
        (r"\.ff_context\.net\.2\.", ".txt_mlp.2."),
    )


def sd3_names(tensors: Tensors) -> Tensors:
    last = max(int(match[1]) for name in tensors if (match := re.match(r"transformer_blocks\.(\d+)\.", name)))
    tensors = swapped(tensors, "norm_out.linear")
    tensors = swapped(tensors, f"transformer_blocks.{last}.norm1_context.linear")
    for attention in ("attn", "attn2"):
        parts = tuple(f"{attention}.{name}" for name in ("to_q", "to_k", "to_v"))
        tensors = fused(tensors, parts, f"x_block.{attention}.qkv")
    tensors = fused(tensors, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "context_block.attn.qkv")
    return renamed(
        tensors,
        (r"^pos_embed\.pos_embed$", "pos_embed"),
        (r"^pos_embed\.proj\.", "x_embedder.proj."),
        (r"^time_text_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_text_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "y_embedder.mlp.0."),
        (r"^time_text_embed\.text_embedder\.linear_2\.", "y_embedder.mlp.2."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^transformer_blocks\.", "joint_blocks."),
        (r"\.norm1\.linear\.", ".x_block.adaLN_modulation.1."),
        (r"\.norm1_context\.linear\.", ".context_block.adaLN_modulation.1."),
        (r"\.attn\.norm_added_([qk])\.", r".context_block.attn.ln_\1."),
        (r"\.(attn2?)\.norm_([qk])\.", r".x_block.\1.ln_\2."),
        (r"\.(attn2?)\.to_out\.0\.", r".x_block.\1.proj."),
        (r"\.attn\.to_add_out\.", ".context_block.attn.proj."),
        (r"\.ff\.net\.0\.proj\.", ".x_block.mlp.fc1."),
        (r"\.ff\.net\.2\.", ".x_block.mlp.fc2."),
        (r"\.ff_context\.net\.0\.proj\.", ".context_block.mlp.fc1."),
        (r"\.ff_context\.net\.2\.", ".context_block.mlp.fc2."),
    )


def krea2_names(tensors: Tensors) -> Tensors:
    flat = {
        name: v.reshape(-1) if re.fullmatch(r"transformer_blocks\.\d+\.scale_shift_table", name) else v
        for name, v in tensors.items()
    }
    return renamed(
        flat,
        (r"^img_in\.", "first."),
        (r"^time_embed\.linear_1\.", "tmlp.0."),
        (r"^time_embed\.linear_2\.", "tmlp.2."),
        (r"^time_mod_proj\.", "tproj.1."),
        (r"^txt_in\.norm\.weight", "txtmlp.0.scale"),
        (r"^txt_in\.linear_1\.", "txtmlp.1."),
        (r"^txt_in\.linear_2\.", "txtmlp.3."),
        (r"^text_fusion\.", "txtfusion."),
        (r"^transformer_blocks\.", "blocks."),
        (r"^final_layer\.linear\.", "last.linear."),
        (r"^final_layer\.norm\.weight", "last.norm.scale"),
        (r"^final_layer\.scale_shift_table", "last.modulation.lin"),
        (r"\.attn\.to_([qkv])\.", r".attn.w\1."),
        (r"\.attn\.to_out\.0\.", ".attn.wo."),
        (r"\.attn\.to_gate\.", ".attn.gate."),
        (r"\.attn\.norm_([qk])\.weight", r".attn.qknorm.\1norm.scale"),
        (r"\.ff\.", ".mlp."),
        (r"\.norm1\.weight", ".prenorm.scale"),
        (r"\.norm2\.weight", ".postnorm.scale"),
        (r"\.scale_shift_table", ".mod.lin"),
    )


def anima_names(tensors: Tensors) -> Tensors:
    return renamed(
        tensors,
        (r"^time_embed\.t_embedder\.", "t_embedder.1."),
        (r"^time_embed\.norm\.", "t_embedding_norm."),
        (r"^patch_embed\.proj\.", "x_embedder.proj.1."),
        (r"^transformer_blocks\.", "blocks."),
        (r"\.norm1\.linear_([12])\.", r".adaln_modulation_self_attn.\1."),
        (r"\.norm2\.linear_([12])\.", r".adaln_modulation_cross_attn.\1."),
        (r"\.norm3\.linear_([12])\.", r".adaln_modulation_mlp.\1."),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1_proj."),
        (r"\.to_out\.0\.", ".output_proj."),
        (r"\.norm_([qk])\.", r".\1_norm."),
        (r"\.ff\.net\.0\.proj\.", ".mlp.layer1."),
        (r"\.ff\.net\.2\.", ".mlp.layer2."),
        (r"^norm_out\.linear_([12])\.", r"final_layer.adaln_modulation.\1."),
        (r"^proj_out\.", "final_layer.linear."),
    )


ORIGINAL: dict[str, Callable[[Tensors], Tensors]] = {
    "zimage": zimage_names,
    "flux2-klein": flux2_names,
    "flux2": flux2_names,
    "qwenimage": dict,
    "krea2": krea2_names,
    "flux1": flux1_names,
    "chroma": flux1_names,
    "sd3": sd3_names,
    "anima": anima_names,
}
"""Family -> its transformer's tensors by their original names."""


def wan_vae_names(tensors: Tensors) -> Tensors:
    """Qwen-Image's VAE, which ComfyUI keeps in the layout of Wan's: flat lists of blocks and upsamplers."""
    inner = (
        (r"\.norm1\.", ".residual.0."),
        (r"\.conv1\.", ".residual.2."),
        (r"\.norm2\.", ".residual.3."),
        (r"\.conv2\.", ".residual.6."),
        (r"\.conv_shortcut\.", ".shortcut."),
    )
    found = {}
    for name, tensor in tensors.items():
        if match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.+)", name):
            block, kind, number, rest = match.groups()
            place = 4 * int(block) + (3 if kind == "upsamplers" else int(number))
            name = f"decoder.upsamples.{place}.{rest}"
        name = re.sub(r"^encoder\.down_blocks\.", "encoder.downsamples.", name)
        name = re.sub(r"^(\w+)\.mid_block\.resnets\.(\d)\.", lambda m: f"{m[1]}.middle.{2 * int(m[2])}.", name)
        name = re.sub(r"^(\w+)\.mid_block\.attentions\.0\.", r"\1.middle.1.", name)
        name = re.sub(r"^(\w+)\.norm_out\.", r"\1.head.0.", name)
        name = re.sub(r"^(\w+)\.conv_out\.", r"\1.head.2.", name)
        name = re.sub(r"^(\w+)\.conv_in\.", r"\1.conv1.", name)
        if not re.match(r"\w+\.conv1\.", name):
            for pattern, new in inner:
                name = re.sub(pattern, new, name)
        name = re.sub(r"^quant_conv\.", "conv1.", name)
        found[re.sub(r"^post_quant_conv\.", "conv2.", name)] = tensor
    return found
