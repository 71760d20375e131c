"""Every family keeps its contract, on a tiny pipeline of it, against what diffusers does with the same weights."""

from __future__ import annotations

import copy
import functools
import json
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusekrona_train.adapters.formats import EXPORTERS, identify, inject_file, merged, read_adapter, save_adapter
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.common.device import moved
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models import FAMILIES, family_named, family_of, open_model
from diffusekrona_train.models import layers as tables
from diffusekrona_train.models.contracts import Family, Request
from diffusekrona_train.models.quantize import quantize_linears
from diffusekrona_train.models.source import ModelSource
from diffusekrona_train.training import train
from diffusekrona_train.training.graph import Uncapturable
from tests.runs import draw_photos, factors, make_run, same_factors
from tests.tiny.families import HEIGHT, TINY, WIDTH, Tiny
from tests.tiny.original_flow import ORIGINAL

PROMPTS = ["A photo of a dog on the beach, in the snow", "a cat"]
CROP = ((100, 80), (4, 2), (HEIGHT, WIDTH))


@dataclass
class Case:
    tiny: Tiny
    source: ModelSource
    parts: dict[str, Any]
    pipe: Any

    @property
    def family(self) -> Family:
        return self.source.family

    def row(self, prompt: str) -> dict[str, torch.Tensor]:
        return self.family.encode_prompt(self.parts["tokenizers"], self.parts["text_encoders"], prompt)

    @functools.cached_property
    def first(self) -> dict[str, Any]:
        """What the first prompt and a picture are told as."""
        return {**self.family.collate([self.row(PROMPTS[0])]), **self.told(1)}

    def told(self, count: int) -> dict[str, torch.Tensor]:
        extras = self.family.picture_conditioning(*CROP)
        return {name: torch.stack([value] * count) for name, value in extras.items()}

    def noise(self, count: int, seed: int = 0) -> torch.Tensor:
        shape = self.family.latent_shape(self.source.vae_config, HEIGHT, WIDTH)
        return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_every_family_has_a_tiny_pipeline():
    assert TINY.keys() == FAMILIES.keys()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    tiny = TINY[request.param]
    source = open_model(str(tiny.make(tmp_path_factory.mktemp(request.param))))
    assert source.family.name == request.param
    parts = source.load(dtype=torch.float32)
    return Case(tiny, source, parts, source.family.pipeline(parts))


def test_a_familys_name_parts_and_config_are_its_own(case):
    assert family_named(case.family.name) is case.family
    assert family_of(case.source.denoiser_config, "x") is case.family
    matching = [name for name in FAMILIES if family_named(name).matches(case.source.denoiser_config)]
    assert matching == [case.family.name]
    assert type(case.parts["denoiser"]).__name__ == case.family.parts.denoiser.cls
    for block in case.family.blocks:
        assert case.parts["denoiser"].get_submodule(block) is not None


@torch.no_grad()
def test_a_picture_becomes_a_latent_of_the_promised_shape_and_comes_back(case):
    pixels = torch.rand(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = case.family.encode_image(case.parts["vae"], pixels)
    assert tuple(latents.shape[1:]) == case.family.latent_shape(case.source.vae_config, HEIGHT, WIDTH)
    one = case.family.encode_image(case.parts["vae"], pixels[1:])
    torch.testing.assert_close(latents[1:], one, rtol=1e-4, atol=1e-5)
    pictures = case.family.decode(case.parts["vae"], latents)
    assert pictures.shape == pixels.shape and pictures.dtype == torch.float32
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert HEIGHT % case.family.side_multiple == WIDTH % case.family.side_multiple == 0


@torch.no_grad()
def test_a_prompt_is_encoded_as_the_pipeline_encodes_it(case):
    for prompt in [*PROMPTS, ""]:
        ours, theirs = case.row(prompt), case.tiny.encoded(case.pipe, prompt)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), prompt


@torch.no_grad()
def test_a_batch_of_unequal_captions_predicts_what_each_would_alone_and_by_hand(case):
    process = case.source.process(HEIGHT)
    t = torch.stack([process.quantile(0.3), process.quantile(0.8)])
    x_t = process.noised(case.noise(2, 1), case.noise(2, 2), t)
    rows = [case.row(prompt) for prompt in PROMPTS]
    batch = case.family.predict(case.parts["denoiser"], x_t, t, {**case.family.collate(rows), **case.told(2)})
    assert batch.shape == x_t.shape
    for i, row in enumerate(rows):
        one = slice(i, i + 1)
        alone = {**case.family.collate([row]), **case.told(1)}
        torch.testing.assert_close(
            case.family.predict(case.parts["denoiser"], x_t[one], t[one], alone), batch[one], rtol=1e-4, atol=2e-5
        )
        by_hand = case.tiny.step(case.pipe, x_t[one], t[one], row)
        torch.testing.assert_close(by_hand, batch[one], rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_noise_comes_in_as_the_models_own_scheduler_brings_it(case):
    process, scheduler = case.source.process(HEIGHT), case.parts["scheduler"]
    x_0, eps = case.noise(1, 1), case.noise(1, 2)
    t = process.quantile(0.4)[None]
    if process.prediction_type == "flow":
        theirs = scheduler.__class__.from_config({**scheduler.config, "shift": 1.0, "use_dynamic_shifting": False})
        time = theirs.timesteps[((theirs.timesteps / 1000 - t).abs().argmin())][None]
        ours = process.noised(x_0, eps, time / 1000)
        torch.testing.assert_close(ours, theirs.scale_noise(x_0, time, eps))
        assert torch.equal(process.target(x_0, eps, t), eps - x_0)
    else:
        from diffusers import DDPMScheduler

        theirs = DDPMScheduler.from_config(dict(scheduler.config))
        torch.testing.assert_close(process.noised(x_0, eps, t), theirs.add_noise(x_0, eps, t))
        wanted = {"epsilon": eps, "v_prediction": theirs.get_velocity(x_0, eps, t), "sample": x_0}
        torch.testing.assert_close(process.target(x_0, eps, t), wanted[process.prediction_type])
    drawn = torch.stack([process.draw_t(torch.Generator().manual_seed(seed)) for seed in range(400)])
    below = (drawn <= process.quantile(0.3)).float().mean()
    assert 0.2 < below < 0.4


@pytest.mark.parametrize(("negative", "guidance"), [("", 5.0), ("a cat", 5.0), ("", 1.0)])
@torch.no_grad()
def test_sampling_is_the_pipelines_own_call(case, negative, guidance):
    noise, family = case.noise(1), case.family
    rows = [family.collate([case.row(text)]) for text in (PROMPTS[0], negative)]
    request = Request(2, guidance, HEIGHT, WIDTH, [torch.Generator().manual_seed(0)], not negative)
    ours = family.sample(case.pipe, noise, rows[0], rows[1] if family.negative_prompt else None, request)
    theirs = case.tiny.call(case.pipe, noise, PROMPTS[0], negative, 2, guidance)
    assert ours.shape == noise.shape
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_layers_named_without_weights_are_those_of_the_built_denoiser(case):
    built = tables.find_layers(case.parts["denoiser"], None)
    assert case.source.layers() == built and len(built) > 0
    for layer in built:
        module = case.parts["denoiser"].get_submodule(layer.name)
        assert (module.in_features, module.out_features) == (layer.in_features, layer.out_features)
        assert layer == case.family.describe(layer.name, layer.in_features, layer.out_features)
        assert layer.block and layer.name.startswith(layer.block + ".")
        assert set(layer.projection) <= set("qkvo") or layer.projection == "ffn"
    assert len({layer.name for layer in built}) == len(built)


def test_layers_of_one_group_are_given_the_same_input_and_no_others(case):
    """Read from the tensors that really come in."""
    denoiser, seen, hooks = case.parts["denoiser"], {}, []
    built = tables.find_layers(denoiser, None)
    for layer in built:

        def hook(module, args, name=layer.name):
            seen[name] = args[0]

        hooks.append(denoiser.get_submodule(layer.name).register_forward_pre_hook(hook))
    process = case.source.process(HEIGHT)
    with torch.no_grad():
        conditioning = {**case.family.collate([case.row(PROMPTS[0])]), **case.told(1)}
        case.family.predict(denoiser, case.noise(1), process.quantile(0.5)[None], conditioning)
    for hook in hooks:
        hook.remove()
    for one in built:
        for other in built:
            if one.block == other.block and one.group == other.group:
                assert seen[one.name] is seen[other.name], (one.name, other.name)
            elif one.block == other.block and one.kind == other.kind and one.stream == other.stream:
                assert seen[one.name] is not seen[other.name], (one.name, other.name)


def test_every_layer_learns_and_eject_restores_every_bit(case):
    denoiser = case.parts["denoiser"]
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    process, spec = case.source.process(HEIGHT), AdapterConfig(a1=4, a2=4, ffn=True, init_b="same")
    injection = inject(denoiser, spec, seed=0)
    conditioning = {**case.family.collate([case.row(PROMPTS[0])]), **case.told(1)}
    predicted = case.family.predict(denoiser, case.noise(1), process.quantile(0.5)[None], conditioning)
    predicted.square().mean().backward()
    dead = [name for name, value in injection.named_parameters() if value.grad is None or not value.grad.any()]
    injection.eject()
    after = denoiser.state_dict()
    assert dead == [] and before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_names_in_files_lead_back_to_their_layers(case):
    layers = case.source.layers()
    names = [layer.name for layer in [*layers, *tables.projections_of(layers), *case.source.others()]]
    per_block = int(case.source.denoiser_config.get("layers_per_block", 2))
    files = tables.file_names(case.family.name, names, per_block)
    known = tables.known_names(names, per_block, case.family.name)
    assert len(set(files.values())) == len(names)
    assert all(known[files[name]] == name and known[name] == name for name in names)
    assert len(known) == sum(len(set(case.family.other_names(name, per_block))) for name in names), (
        "names of two layers"
    )
    said = case.family.metadata(case.source.layers(), case.source.prediction_type)
    assert {"ss_base_model_version", "modelspec.architecture"} <= said.keys()
    assert json.loads(json.dumps(said)) == said


@torch.no_grad()
def test_an_adapter_file_and_its_lora_hold_exactly_the_kronecker_products(case, tmp_path):
    """Read as other tools read them: by the family's names, each tensor by its suffix."""
    denoiser, thin = case.parts["denoiser"], AdapterConfig(a1=1, a2=16, init_b="same")
    adapted = tables.find_layers(denoiser, thin)
    before = {layer.name: _matrix(denoiser, layer) for layer in adapted}
    injection = inject(denoiser, thin, seed=1)
    save_adapter(tmp_path / "own.safetensors", injection, {"model": "x", "token": "sks", "class": "dog"})
    wanted = {layer.name: _matrix(denoiser, layer) - before[layer.name] for layer in adapted}
    injection.eject()
    layers, per_block = case.source.layers(), int(case.source.denoiser_config.get("layers_per_block", 2))
    file = identify(read_adapter(tmp_path / "own.safetensors"), layers, case.family.name, per_block)
    EXPORTERS["lora"](file, tmp_path / "lora.safetensors", dtype="fp32")
    own, lora = (load_file(tmp_path / f"{name}.safetensors") for name in ("own", "lora"))
    assert len(own) == 3 * len(wanted)
    for name, delta in wanted.items():
        key = case.family.file_name(name, per_block)
        product = torch.kron(own[f"{key}.lokr_w1"], own[f"{key}.lokr_w2"])
        torch.testing.assert_close(product, delta, rtol=1e-4, atol=1e-6)
        up, down = lora[f"{key}.lora_up.weight"], lora[f"{key}.lora_down.weight"]
        product = up.flatten(1) @ down.flatten(1) * (lora[f"{key}.alpha"] / down.shape[0])
        torch.testing.assert_close(product, delta, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_lokr_that_lycoris_saves_adds_what_it_added_there(case, tmp_path, monkeypatch):
    """Its names are the ones that ComfyUI reads for transformers."""
    from lycoris import LycorisNetwork, create_lycoris

    denoiser, layers = case.parts["denoiser"], tables.find_layers(case.parts["denoiser"], AdapterConfig(a1=4, a2=4))
    monkeypatch.setattr(LycorisNetwork, "TARGET_REPLACE_MODULE", [])
    monkeypatch.setattr(LycorisNetwork, "TARGET_REPLACE_NAME", [f"{layer.name}$" for layer in layers])
    network = create_lycoris(denoiser, 1.0, linear_dim=10_000, linear_alpha=1, algo="lokr", factor=4)
    for parameter in network.parameters():
        parameter.normal_(std=0.1)
    before = {layer.name: _matrix(denoiser, layer) for layer in layers}
    network.apply_to()
    added = {layer.name: _matrix(denoiser, layer) - before[layer.name] for layer in layers}
    network.save_weights(tmp_path / "theirs.safetensors", torch.float32, {})
    network.restore()
    per_block = int(case.source.denoiser_config.get("layers_per_block", 2))
    file = identify(read_adapter(tmp_path / "theirs.safetensors"), case.source.layers(), case.family.name, per_block)
    assert len(file.layers) == len(layers)
    for layer in file.layers:
        torch.testing.assert_close(merged.delta(file, layer), added[layer.name], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_a_merged_pipeline_predicts_what_the_adapter_does(case, tmp_path):
    denoiser, spec = case.parts["denoiser"], AdapterConfig(a1=4, a2=4, init_b="same")
    injection = inject(denoiser, spec, seed=2)
    save_adapter(tmp_path / "own.safetensors", injection, {"model": "x", "token": "sks", "class": "dog"})
    t, conditioning = case.source.process(HEIGHT).quantile(0.5)[None], case.family.collate([case.row(PROMPTS[0])])
    told = {**conditioning, **case.told(1)}
    wanted = case.family.predict(denoiser, case.noise(1), t, told)
    injection.eject()
    file = identify(read_adapter(tmp_path / "own.safetensors"), case.source.layers(), case.family.name)
    EXPORTERS["merged"](file, tmp_path / "merged", dtype="fp32", source=case.source)
    assert not [path for path in (tmp_path / "merged").glob("*.json") if ".writing" in path.read_text()]
    again = open_model(str(tmp_path / "merged")).load("denoiser", dtype=torch.float32)["denoiser"]
    torch.testing.assert_close(case.family.predict(again, case.noise(1), t, told), wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(case.family.predict(denoiser, case.noise(1), t, told), wanted, rtol=1e-3, atol=1e-4)


def _predicts(case, denoiser=None) -> torch.Tensor:
    t = case.source.process(HEIGHT).quantile(0.5)[None]
    return case.family.predict(denoiser or case.parts["denoiser"], case.noise(1), t, case.first)


def _exported(case, folder, spec):
    """An adapter of the denoiser as a file -> (the file, what the denoiser predicts with it)."""
    injection = inject(case.parts["denoiser"], spec, seed=1)
    save_adapter(folder / "own.safetensors", injection, {"model": "x", "token": "sks", "class": "dog"})
    wanted = _predicts(case)
    injection.eject()
    per_block = int(case.source.denoiser_config.get("layers_per_block", 2))
    return identify(read_adapter(folder / "own.safetensors"), case.source.layers(), case.family.name, per_block), wanted


LOKR = ("zimage", "flux2-klein", "flux2")
"""Families whose pipelines load LoKr files."""


@torch.no_grad()
@pytest.mark.parametrize("square", [False, True])
def test_a_file_for_diffusers_does_in_its_own_pipeline_what_the_adapter_does_here(case, tmp_path, square):
    """Both streams, feed-forwards and fused linears."""
    out, base = tmp_path / "diffusers.safetensors", _predicts(case)
    factors = {"a1": 4, "a2": 4, "scale": 0.5} if square else {"a1": 1, "a2": 16}
    file, wanted = _exported(case, tmp_path, AdapterConfig(init_b="same", ffn=True, **factors))
    if square and case.family.name not in LOKR:
        with pytest.raises(ValueError, match="exact LoRA rank .* diffusers loads no LoKr file for family"):
            EXPORTERS["diffusers"](file, out, dtype="fp32")
        return
    EXPORTERS["diffusers"](file, out, dtype="fp32")
    case.pipe.load_lora_weights(str(out))
    loaded = _predicts(case)
    case.pipe.unload_lora_weights()
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(_predicts(case), base)
    again = inject_file(case.parts["denoiser"], read_adapter(out))
    torch.testing.assert_close(_predicts(case), wanted, rtol=1e-4, atol=1e-5)
    again.eject()


AI_TOOLKIT = ("diffusion_model.", "lora_A", "lora_B")
KOHYA = ("lora_unet_", "lora_down", "lora_up")
DIFFUSERS = ("transformer.", "lora_A", "lora_B")
OTHERS = {
    "zimage": (AI_TOOLKIT, KOHYA, DIFFUSERS),
    "flux2-klein": (AI_TOOLKIT, KOHYA, DIFFUSERS),
    "flux2": (AI_TOOLKIT,),
    "qwenimage": (AI_TOOLKIT, KOHYA, DIFFUSERS),
    "krea2": (AI_TOOLKIT, DIFFUSERS),
    "flux1": (KOHYA, DIFFUSERS),
    "chroma": (KOHYA, DIFFUSERS),
    "sd3": (AI_TOOLKIT, DIFFUSERS),
    "anima": (AI_TOOLKIT, DIFFUSERS),
}
"""Family -> how trainers name their LoRA files: by original names, diffusers' own by its paths."""
DIFFUSERS_NAMES = ("zimage", "qwenimage")
"""Families whose files of other trainers have diffusers' paths too."""
MODULATED = {"zimage", "flux2", "flux2-klein", "qwenimage", "krea2", "flux1", "sd3", "anima"}
"""Families with linears that modulate or gate: some trainers adapt these too."""
OUTSIDE = "_stream_modulation|^text_fusion"
"""Such ones outside the repeated blocks."""
NOT_IN_DIFFUSERS = {("flux1", KOHYA), ("chroma", KOHYA), ("sd3", AI_TOOLKIT), ("flux2-klein", KOHYA)}
"""What diffusers cannot load, or in part, or only at the real width: held against the weights' own sums."""


@torch.no_grad()
def test_loras_of_other_trainers_are_as_strong_as_in_diffusers(case, tmp_path):
    """Every linear of the blocks, those too whose output leads nowhere; fused where theirs are."""
    name, denoiser, rank = case.family.name, case.parts["denoiser"], 4
    linears, generator = tables.linears_of(denoiser), torch.Generator().manual_seed(2)
    layers = {layer.name for layer in case.source.layers()} | set(case.family.without_effect(case.source.layers()))
    others = {layer.name for layer in case.source.others() if layer.block or re.search(OUTSIDE, layer.name)}
    others -= {
        n for n in others if name == "sd3" and "norm1_context" in n
    }  # its last block's rows are in another order
    assert bool(others) == (name in MODULATED)
    layers |= others
    downs = {width: torch.randn(rank, width, generator=generator) * 0.1 for width, _ in linears.values()}
    ups = {n: torch.randn(linears[n][1], rank, generator=generator) * 0.1 for n in linears if n in layers}
    pairs = {n: (up, downs[linears[n][0]]) for n, up in ups.items()}
    base = _predicts(case)
    for form in OTHERS.get(name, ()):
        alpha = 2.0 if form == KOHYA else float(rank)
        high, low = ({f"{n}.weight": pair[i] for n, pair in pairs.items()} for i in (0, 1))
        if form != DIFFUSERS and name not in DIFFUSERS_NAMES:
            high, low = ORIGINAL[name](high), ORIGINAL[name](low)
        tensors = {}
        for key in high:
            path = key.removesuffix(".weight")
            path = form[0] + (path.replace(".", "_") if form == KOHYA else path)
            tensors |= {f"{path}.{form[1]}.weight": low[key][:rank].clone(), f"{path}.{form[2]}.weight": high[key]}
            tensors |= {f"{path}.alpha": torch.tensor(alpha)} if form == KOHYA else {}
        save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "theirs.safetensors")
        if (name, form) in NOT_IN_DIFFUSERS:
            sums = copy.deepcopy(denoiser)
            for layer, (up, down) in pairs.items():
                sums.get_submodule(layer).weight.add_(up @ down * (alpha / rank))
            wanted = _predicts(case, sums)
        else:
            case.pipe.load_lora_weights(str(tmp_path / "theirs.safetensors"))
            wanted = _predicts(case)
            case.pipe.unload_lora_weights()
        injection = inject_file(denoiser, read_adapter(tmp_path / "theirs.safetensors"))
        got = _predicts(case)
        save_adapter(tmp_path / "ours.safetensors", injection, {"model": "x", "token": "sks", "class": "dog"})
        injection.eject()
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base, wanted, rtol=1e-3, atol=1e-3), form
    if others:  # a file of ours that holds them describes itself, and gives the LoRA back
        EXPORTERS["lora"](read_adapter(tmp_path / "ours.safetensors"), tmp_path / "lora.safetensors", dtype="fp32")
        for path in ("ours.safetensors", "lora.safetensors"):
            injection = inject_file(denoiser, read_adapter(tmp_path / path))
            torch.testing.assert_close(_predicts(case), got, rtol=1e-4, atol=1e-5)
            injection.eject()


def _matrix(denoiser, layer):
    """What a linear does to a vector, adapted or not, as a matrix (out, in)."""
    linear = denoiser.get_submodule(layer.name)
    return (linear(torch.eye(layer.in_features)) - linear(torch.zeros(1, layer.in_features))).T


@pytest.mark.full
def test_a_resumed_run_is_an_uninterrupted_one(case, tmp_path):
    """On captions of unequal length in one batch."""
    draw_photos(tmp_path / "photos")
    for i, caption in enumerate(("a dog", "a photo of a dog in the snow", "dog")):
        (tmp_path / "photos" / f"{i}.txt").write_text(caption)
    (tmp_path / "model").symlink_to(case.source.model)
    train(make_run(tmp_path, tmp_path / "straight", train={"steps": 4, "checkpoint_every": 2}))
    short = make_run(tmp_path, tmp_path / "resumed", train={"steps": 2, "checkpoint_every": 2})
    train(short)
    first = factors(tmp_path / "resumed")
    train(make_run(tmp_path, tmp_path / "resumed", train={"steps": 4, "checkpoint_every": 2}), resume=True)
    straight, resumed = factors(tmp_path / "straight"), factors(tmp_path / "resumed")
    assert same_factors(straight, resumed) and not same_factors(first, resumed)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_is_quantised_where_its_family_says(case, kind):
    small = case.source.load_denoiser(torch.float32, quantize=kind)
    plain = dict(case.parts["denoiser"].named_modules())
    changed = {name for name, module in small.named_modules() if type(module) is not type(plain.get(name))}
    assert changed and all(case.family.quantizes(name) for name in changed)
    linears = tables.linears_of(case.parts["denoiser"])
    weight = sum(linears[name][0] * linears[name][1] for name in changed)
    assert weight / case.source.base_parameters() > 0.1
    assert tables.find_layers(small, None) == case.source.layers()
    with pytest.raises(ValueError, match="finds no linear"):
        quantize_linears(small, kind, torch.float32, lambda name: False)


CANNOT_BE_CAPTURED = {"chroma": ["aten::_to_copy"]}
"""Families whose denoiser copies from the host in every call: they train without a CUDA graph, and say so."""


@torch.no_grad()
def test_whether_its_step_can_be_captured_as_a_graph(case):
    """On a device without content, where to wait for it is an error. The first call makes what is made once."""
    device = torch.device("meta")
    denoiser = copy.deepcopy(case.parts["denoiser"]).to(device)
    told = {**case.family.collate([moved(case.row(PROMPTS[0]), device, torch.float32)]), **case.told(1)}
    told = {name: value.to(device) for name, value in told.items()}
    x_t, t = case.noise(1).to(device), case.source.process(HEIGHT).quantile(0.5)[None].to(device)
    case.family.predict(denoiser, x_t, t, told)
    with Uncapturable() as mode:
        assert case.family.predict(denoiser, x_t, t, told).shape == x_t.shape
    assert list(mode.found) == CANNOT_BE_CAPTURED.get(case.family.name, [])
