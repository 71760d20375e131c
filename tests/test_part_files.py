"""Flow models from ComfyUI's files: a transformer, a VAE, text encoders; read exactly, or refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusekrona_train.config import make_config
from diffusekrona_train.config.known import known_models
from diffusekrona_train.models import ModelSource, configured_model, generating_model, open_model
from diffusekrona_train.sampling.session import base_model_of
from diffusekrona_train.training import train
from diffusekrona_train.training.check import model_lines
from tests.runs import draw_photos, factors, make_run, same_factors
from tests.tiny.families import TINY
from tests.tiny.original_flow import ORIGINAL, wan_vae_names
from tests.tiny.original_layout import vae_names

WIDE = ("flux1", "chroma")
"""diffusers converts these at their real width of 3072 only: tiny ones are read in diffusers' names."""
FP8 = torch.float8_e4m3fn
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> its tiny folder, made once."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = TINY[family].make(root / family)
        return made[family]

    return folder


def saved(tensors: Tensors, path: Path, prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    save_file({prefix + name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def transformer(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return open_model(str(folder)).load("denoiser", dtype=dtype)["denoiser"]


def in_original_names(folder: Path, family: str, path: Path, prefix: str = "") -> Path:
    return saved(ORIGINAL[family](transformer(folder).state_dict()), path, prefix)


def opened(path: Path, folder: Path | str, **more: Any) -> ModelSource:
    return open_model(str(path), model_config_dir=str(folder), **more)


def assert_same(one: torch.nn.Module, other: torch.nn.Module):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def refused(match: str, *attempts):
    for attempt in attempts:
        with pytest.raises(ValueError, match=match) as caught:
            attempt()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# ---- transformers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ORIGINAL)
def test_a_transformer_predicts_as_the_folder_it_was_saved_from(models, tmp_path, family):
    folder, path = models(family), tmp_path / "alone.safetensors"
    prefix = "model.diffusion_model." if family in ("zimage", "flux2", "sd3", "chroma") else ""
    if family in WIDE:
        saved(transformer(folder).state_dict(), path, prefix)
    else:
        in_original_names(folder, family, path, prefix)
    source = opened(path, folder)
    source.check()
    assert source.family.name == family and str(tmp_path) not in source.identity
    mine = source.load("denoiser")["denoiser"]
    assert_same(mine, transformer(folder))
    family, parts = source.family, open_model(str(folder)).load(dtype=torch.float32)
    row = family.encode_prompt(parts["tokenizers"], parts["text_encoders"], "a dog")
    x_t = torch.randn(1, *family.latent_shape(source.vae_config, 64, 96))
    with torch.no_grad():
        ours, theirs = (
            family.predict(denoiser, x_t, torch.tensor([0.6]), family.collate([row]))
            for denoiser in (mine, parts["denoiser"])
        )
    assert torch.equal(ours, theirs)


@pytest.mark.full
@pytest.mark.parametrize("family", WIDE)
def test_flux1_and_chroma_at_their_real_width(tmp_path, family):
    """One block of each kind: half a billion numbers."""
    import diffusers

    alias = {"flux1": "flux1-dev", "chroma": "chroma1"}[family]
    config = dict(open_model(alias).denoiser_config) | {"num_layers": 1, "num_single_layers": 1}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    made = getattr(diffusers, config["_class_name"]).from_config(config)
    torch.set_default_dtype(before)
    path = saved(ORIGINAL[family](made.state_dict()), tmp_path / "one.safetensors")
    assert_same(opened(path, tmp_path).load("denoiser", dtype=torch.bfloat16)["denoiser"], made)


FILES = {
    "z-image": {"z_image_turbo_bf16": "z-image-turbo", "z_image_bf16": "z-image"},
    "klein-4b": {"flux-2-klein-base-4b": "klein-4b", "flux-2-klein-4b": "klein-4b-distilled"},
    "klein-9b": {"flux-2-klein-9b-fp8": "klein-9b-distilled"},
    "flux2-dev": {"flux2_dev": "flux2-dev"},
    "qwen-image": {"qwen_image_2512_bf16": "qwen-image-2512", "qwen_image_bf16": "qwen-image"},
    "krea-2": {"krea2_turbo": "krea-2-turbo", "krea2_raw": "krea-2"},
    "flux1-dev": {"flux1-dev": "flux1-dev", "flux1-krea-dev_fp8_scaled": "flux1-krea-dev"},
    "flux1-schnell": {"flux1-schnell": "flux1-schnell"},
    "chroma1": {"Chroma1-HD": "chroma1"},
    "sd3.5-large": {"sd3.5_large": "sd3.5-large"},
    "sd3.5-medium": {"sd3.5_medium": "sd3.5-medium"},
    "anima": {"anima-base-v1.0": "anima"},
}
"""Model whose config a file's shapes are -> the file as it is called -> the model that it is."""


def sparse(shapes: dict[str, tuple[int, ...]], path: Path) -> Path:
    """A bf16 file with these shapes and zeros, which take no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def shapes_of(source: ModelSource) -> dict[str, tuple[int, ...]]:
    """The original names and shapes of a model of the package's configs."""
    empty = source._meta_model(source.family.parts.denoiser)
    tensors = ORIGINAL[source.family.name](empty.state_dict())
    return {key: tuple(v.shape) for key, v in tensors.items()}


@pytest.mark.parametrize("size", FILES)
def test_a_file_of_real_size_is_told_by_its_tensors_without_a_network(tmp_path, size):
    shapes = shapes_of(open_model(size))
    for name, alias in FILES[size].items():
        known = open_model(alias)
        source = open_model(str(sparse(shapes, tmp_path / f"{name}.safetensors")))
        assert source.like == known_models()[alias].hub
        assert source.family.name == known.family.name
        assert source.scheduler_config == known.scheduler_config
    source.check_part(source.family.parts.denoiser)


def test_fp8_is_cast_or_multiplied(models, tmp_path):
    folder = models("zimage")
    tensors = load_file(in_original_names(folder, "zimage", tmp_path / "a.safetensors"))
    plain = {name: tensor.to(FP8) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    one = opened(saved(plain, tmp_path / "plain.safetensors"), folder).load("denoiser")["denoiser"]
    layer = "layers.0.attention.to_out.0.weight"
    assert torch.equal(one.state_dict()[layer], plain["layers.0.attention.out.weight"].float())

    name = "layers.0.attention.qkv"
    scaled = tensors | {f"{name}.weight": (tensors[f"{name}.weight"] / 0.01).to(FP8)}
    scaled |= {f"{name}.scale_weight": torch.tensor(0.01), "scaled_fp8": torch.zeros(2).to(FP8)}
    source = opened(saved(scaled, tmp_path / "scaled.safetensors"), folder)
    source.check()
    got = source.load("denoiser")["denoiser"].state_dict()
    expected = scaled[f"{name}.weight"].float() * 0.01
    for index, part in enumerate(("to_q", "to_k", "to_v")):
        width = expected.shape[0] // 3
        assert torch.equal(got[f"layers.0.attention.{part}.weight"], expected[index * width :][:width])


# ---- VAEs and text encoders ------------------------------------------------------------------------------------------


def qwen_vae(folder: Path) -> Any:
    """A VAE with the real one's multiples, which its original names count by."""
    from diffusers import AutoencoderKLQwenImage

    config = dict(open_model(str(folder)).vae_config) | {"dim_mult": [1, 2, 4, 4]}
    made: Any = AutoencoderKLQwenImage.from_config(config)
    made.save_pretrained(folder / "vae")
    return made


@pytest.mark.parametrize("family", ["zimage", "flux2-klein", "qwenimage"])
def test_a_vae_in_original_names(models, tmp_path, family):
    folder = models(family)
    if family == "qwenimage":
        folder = TINY[family].make(tmp_path / "model")
        vae = qwen_vae(folder)
    else:
        vae = open_model(str(folder)).load("vae")["vae"]
    tensors = wan_vae_names(vae.state_dict()) if family == "qwenimage" else vae_names(vae)
    tensors.pop("bn.num_batches_tracked", None)
    path = saved(tensors, tmp_path / "vae.safetensors")
    source = open_model(str(folder), vae=str(path))
    mine = source.load("vae")["vae"]
    assert_same(mine, vae)
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        assert torch.equal(source.family.encode_image(mine, pixels), source.family.encode_image(vae, pixels))
    tensors.popitem()
    short = open_model(str(folder), vae=str(saved(tensors, tmp_path / "short.safetensors")))
    refused(r"vae .*short.safetensors.* lacks 1 tensor", lambda: short.load("vae"))


def plain_text(encoder: Any, cls: str) -> Tensors:
    """A text encoder's tensors as the files of ComfyUI have them."""
    tensors = {name: v for name, v in encoder.state_dict().items() if name != "lm_head.weight"}
    if cls == "Qwen3Model":
        return {f"model.{name}": v for name, v in tensors.items()}
    if cls.startswith("CLIP"):
        text = {
            f"text_model.{name.removeprefix('text_model.')}": v for name, v in tensors.items() if "proj" not in name[:9]
        }
        return text | {name: v for name, v in tensors.items() if "proj" in name[:9]}
    tensors.pop("encoder.embed_tokens.weight", None)
    old = {"model.language_model.": "model.", "model.visual.": "visual."} if "Qwen2_5" in cls else {}
    for new, first in old.items():
        tensors = {name.replace(new, first): v for name, v in tensors.items()}
    return tensors


def sd3_with_unequal_clips(folder: Path) -> Path:
    """As the real ones are, which are told by their sizes."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    TINY["sd3"].make(folder)
    config = json.loads((folder / "text_encoder_2" / "config.json").read_text())
    made = CLIPTextModelWithProjection(
        CLIPTextConfig(**config | {"num_hidden_layers": config["num_hidden_layers"] + 1})
    )
    made.save_pretrained(folder / "text_encoder_2")
    return folder


@pytest.mark.parametrize("family", ["zimage", "flux2-klein", "qwenimage", "krea2", "flux1", "sd3"])
def test_text_encoders_in_files_encode_as_the_folders(models, tmp_path, family):
    folder = sd3_with_unequal_clips(tmp_path / "model") if family == "sd3" else models(family)
    whole = open_model(str(folder))
    parts, files = whole.load("text_encoders", "tokenizers"), []
    for part, encoder in zip(whole.family.parts.text_encoders, parts["text_encoders"], strict=True):
        path = tmp_path / f"{part.folder}.safetensors"
        files.append(str(saved(plain_text(encoder, part.cls), path)))
    source = open_model(str(folder), text_encoders=files[::-1])
    source.check()
    mine = source.load("text_encoders")["text_encoders"]
    ours = source.family.encode_prompt(parts["tokenizers"], mine, "a dog")
    theirs = whole.family.encode_prompt(parts["tokenizers"], parts["text_encoders"], "a dog")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_text_encoder_in_scaled_fp8(models, tmp_path):
    folder = models("zimage")
    (encoder,) = open_model(str(folder)).load("text_encoders", dtype=torch.float32)["text_encoders"]
    tensors, name = plain_text(encoder, "Qwen3Model"), "model.layers.0.mlp.up_proj"
    tensors |= {
        f"{name}.weight": (tensors[f"{name}.weight"] / 0.02).to(FP8),
        f"{name}.scale_weight": torch.tensor(0.02),
    }
    path = saved(tensors, tmp_path / "qwen.safetensors")
    (mine,) = open_model(str(folder), text_encoders=[str(path)]).load("text_encoders", dtype=torch.float32)[
        "text_encoders"
    ]
    assert torch.equal(mine.layers[0].mlp.up_proj.weight, tensors[f"{name}.weight"].float() * 0.02)
    assert torch.equal(mine.embed_tokens.weight, encoder.embed_tokens.weight)


def test_one_file_with_all_parts(models, tmp_path):
    """As SD 3.5 "incl. clips": the transformer, the VAE and three text encoders, below a prefix each."""
    folder = sd3_with_unequal_clips(tmp_path / "model")
    parts = open_model(str(folder)).load()
    tensors = {f"model.diffusion_model.{k}": v for k, v in ORIGINAL["sd3"](parts["denoiser"].state_dict()).items()}
    tensors |= {f"first_stage_model.{name}": v for name, v in vae_names(parts["vae"]).items()}
    for name, part, encoder in zip(("clip_l", "clip_g", "t5xxl"), TEXTS_OF_SD3, parts["text_encoders"], strict=True):
        tensors |= {f"text_encoders.{name}.transformer.{k}": v for k, v in plain_text(encoder, part).items()}
    configs = tmp_path / "configs"
    for config in folder.rglob("*.json"):
        (configs / config.parent.relative_to(folder)).mkdir(parents=True, exist_ok=True)
        (configs / config.relative_to(folder)).write_bytes(config.read_bytes())
    source = opened(saved(tensors, tmp_path / "all.safetensors"), configs)
    source.check()
    mine = source.load("denoiser", "vae", "text_encoders")
    for one, other in zip(
        (mine["denoiser"], mine["vae"], *mine["text_encoders"]),
        (parts["denoiser"], parts["vae"], *parts["text_encoders"]),
        strict=True,
    ):
        assert_same(one, other)


TEXTS_OF_SD3 = ("CLIPTextModelWithProjection", "CLIPTextModelWithProjection", "T5EncoderModel")


def test_animas_file_holds_its_text_conditioner(models, tmp_path):
    folder = models("anima")
    whole = open_model(str(folder))
    conditioner = whole.load("text_encoders")["text_encoders"][1]
    tensors = {f"net.{k}": v for k, v in ORIGINAL["anima"](transformer(folder).state_dict()).items()}
    changed = {name: v + 1 for name, v in conditioner.state_dict().items()}
    tensors |= {f"net.llm_adapter.{name}": v for name, v in changed.items()}
    source = opened(saved(tensors, tmp_path / "anima.safetensors"), folder)
    source.check()
    mine = source.load("denoiser", "text_encoders")
    assert_same(mine["denoiser"], transformer(folder))
    found = mine["text_encoders"][1].state_dict()
    assert found.keys() == changed.keys() and all(torch.equal(found[name], changed[name]) for name in changed)


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_a_run_on_files_is_the_run_on_the_folder(models, tmp_path):
    folder = models("zimage")
    draw_photos(tmp_path / "photos")
    parts = open_model(str(folder)).load()
    in_original_names(folder, "zimage", tmp_path / "z_image.safetensors", "model.diffusion_model.")
    saved(vae_names(parts["vae"]), tmp_path / "ae.safetensors")
    saved(plain_text(parts["text_encoders"][0], "Qwen3Model"), tmp_path / "qwen.safetensors")
    run = {"train": {"steps": 2, "batch_size": 1}, "data": {"cache_dir": str(tmp_path / "cache")}}
    config = make_run(
        tmp_path,
        tmp_path / "files",
        model=str(tmp_path / "z_image.safetensors"),
        vae=str(tmp_path / "ae.safetensors"),
        text_encoders=[str(tmp_path / "qwen.safetensors")],
        model_config_dir=str(folder),
        sample={"model": str(tmp_path / "z_image.safetensors")},
        **run,
    )
    assert "family zimage" in model_lines(config, configured_model(config))[0]
    generating_model(config, configured_model(config)).check()
    result = train(config).file
    straight = train(make_run(tmp_path, tmp_path / "folder", model=str(folder), **run)).file
    assert same_factors(factors(result.parent), factors(straight.parent, "folder"))
    assert str(tmp_path) not in result.read_bytes().decode("latin-1")
    changed = {name: value + 0.1 for name, value in load_file(tmp_path / "qwen.safetensors").items()}
    other = {**config.model_dump(by_alias=True), "text_encoders": [str(saved(changed, tmp_path / "other.safetensors"))]}
    others = train(make_config({**other, "output": str(tmp_path / "other")})).file
    assert not same_factors(factors(others.parent), factors(result.parent)), "the first encoder's prompts were taken"
    found = open_model(**base_model_of([], None, result.parent))
    assert found.text_encoders == [str(tmp_path / "qwen.safetensors")] and found.vae == str(tmp_path / "ae.safetensors")


def test_check_says_where_the_other_parts_come_from(tmp_path):
    path = sparse(shapes_of(open_model("z-image")), tmp_path / "z_image_turbo_bf16.safetensors")
    source = open_model(str(path))
    source.place._identity = "z_image_turbo_bf16.safetensors sha256:0"  # the hash of 12 GB of zeros
    config = make_run(tmp_path, tmp_path / "run", model=str(path), data={"resolution": 1024})
    lines = "\n".join(model_lines(config, source))
    assert "what is not in files comes from Tongyi-MAI/Z-Image-Turbo" in lines
    assert "train z-image" in lines and "licence: Apache-2.0" in lines


# ---- refused in one line --------------------------------------------------------------------------------------------


def test_files_that_do_not_fit_are_refused_in_one_line(models, tmp_path):
    folder, path = models("zimage"), tmp_path / "z.safetensors"
    tensors = load_file(in_original_names(folder, "zimage", path))

    def source(change: Tensors, drop: str = "", **more: Any) -> ModelSource:
        kept = {name: v for name, v in tensors.items() if name != drop} | change
        return opened(saved(kept, tmp_path / "other.safetensors"), more.pop("folder", folder), **more)

    lacking = source({}, "layers.1.feed_forward.w2.weight")
    refused(r"'other.safetensors' lacks 1 tensor \(layers.1.feed_forward.w2.weight\)", lacking.check)
    refused("lacks 1 tensor", lambda: source({}, "layers.1.feed_forward.w2.weight").load("denoiser"))
    refused("holds 1 tensor .layers.2.norm", source({"layers.2.norm.weight": torch.ones(4)}).check)
    wide = torch.cat([tensors["layers.0.feed_forward.w1.weight"]] * 2)
    refused("layers.0.feed_forward.w1.weight has shape", source({"layers.0.feed_forward.w1.weight": wide}).check)
    whole = torch.zeros(96, 96, dtype=torch.int32)
    refused("is I32, without a scale", source({"layers.0.attention.out.weight": whole}).check)
    four = {
        "layers.0.attention.out.comfy_quant": torch.frombuffer(bytearray(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    }
    refused("quantised as nvfp4; fp8 with a scale", lambda: source(four))
    refused("holds a ZImageTransformer2DModel, and .* is a Flux2", lambda: source({}, folder=models("flux2-klein")))
    refused("of a size that no model known here has; give model_config_dir", lambda: open_model(str(path)))
    refused("model_config_dir 'zimage' is not a folder, an alias", lambda: opened(path, "zimage"))

    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    refused("'cut.safetensors' is damaged", lambda: opened(cut, folder))
    gguf = tmp_path / "z.gguf"
    gguf.write_bytes(b"GGUF" + bytes(64))
    refused("'z.gguf' is a GGUF file, which is not read; use the .safetensors", lambda: opened(gguf, folder))
    lora = saved({"layers.0.attention.qkv.lora_A.weight": torch.ones(4, 96)}, tmp_path / "lora.safetensors")
    refused("'lora.safetensors' is an adapter, not a model", lambda: open_model(str(lora)))
    encoder = saved({"model.embed_tokens.weight": torch.ones(4, 4)}, tmp_path / "qwen.safetensors")
    refused("only a text encoder .give it in text_encoders", lambda: open_model(str(encoder)))
    vae = saved({"decoder.conv_in.weight": torch.ones(4, 4)}, tmp_path / "ae.safetensors")
    refused("only a VAE .give it in vae", lambda: open_model(str(vae)))
    refused(
        "text_encoders: .*qwn.safetensors.: no such file; did you mean",
        lambda: opened(path, folder, text_encoders=[str(tmp_path / "qwn.safetensors")]),
    )
    strange = opened(path, folder, text_encoders=[str(encoder)])
    refused(
        "'qwen.safetensors' is not a text encoder of this model .Qwen3Model.: it lacks", strange.check, strange.load
    )
    texts = saved(plain_text(open_model(str(folder)).load("text_encoders")["text_encoders"][0], "Qwen3Model"), encoder)
    twice = opened(path, folder, text_encoders=[str(texts), str(texts)])
    refused("are both the text_encoder; keep one", twice.check)
