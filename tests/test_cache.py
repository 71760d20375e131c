"""The cache: made once, read for ever, made again where damaged; what it hands to training is what it was made from."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona_train.config import make_config
from diffusekrona_train.data import collect, crop_pixels, plan_crops
from diffusekrona_train.data import training_set as cache
from diffusekrona_train.data.training_set import (
    build_training_set,
    cache_folder,
    class_image_folder,
    prompts_of,
)
from diffusekrona_train.models.sdxl import SDXL


class Family:
    """A family whose latents and embeddings tell what they were made from."""

    name = "fake"
    parts = SDXL.parts

    def __init__(self, sizes=True):
        self.sizes = sizes

    def encode_image(self, vae, pixels, generator=None):
        if vae == "broken":
            return torch.full((1, 4, 2, 2), float("nan"))
        assert pixels.min() >= -1 and pixels.max() <= 1
        return torch.nn.functional.avg_pool2d(pixels, 8)

    def encode_prompt(self, tokenizers, text_encoders, prompt):
        row = torch.tensor([float(len(prompt)), float(sum(map(ord, prompt)))])
        found = {"prompt_embeds": row[None], "pooled": row}
        return found if self.sizes else {"prompt_embeds": found["prompt_embeds"]}

    def picture_conditioning(self, original_hw, crop_top_left, target_hw):
        numbers = torch.tensor([*original_hw, *crop_top_left, *target_hw]).float()
        return {"size_ids": numbers} if self.sizes else {}


class Source:
    """A model source that counts what was loaded."""

    text_precision = "auto"

    @staticmethod
    def text_dtype(part):
        return part.dtype

    def __init__(self, identity="fake", vae="vae", sizes=True):
        self.identity, self.vae, self.family, self.loaded = identity, vae, Family(sizes), []
        self.place = SimpleNamespace(path=None)

    def load(self, *parts, dtype=None, device="cpu"):
        self.loaded += parts
        return {part: {"vae": self.vae}.get(part, []) for part in parts}


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in {"a": (64, 64), "b": (100, 50), "c": (50, 100)}.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    (folder / "b.txt").write_text("b of [V]")
    return folder


def run(photos, **more):
    subject = {"images": str(photos), "class": "dog"}
    tree = {"subject": subject, "output": str(photos.parent / "runs" / "dog"), "data": {"resolution": 64}}
    return make_config(tree | more)


def build(config, source=None, **more):
    source = source or Source()
    return build_training_set(config, source, device="cpu", log=lambda text: None, **more), source


def test_latents_ids_and_captions_are_those_of_the_crops(photos):
    config = run(photos, data={"resolution": 64, "crop": "random", "flip": True, "variants": 3})
    (training_set, _) = build(config)
    (bucket,) = training_set.instances
    pictures = collect(config).pictures
    assert bucket.latents.shape == (3, 3, 3, 8, 8) and bucket.latents.dtype == torch.float32
    for row, crops in enumerate(plan_crops(pictures, config.data, config.train.seed)):
        for variant, crop in enumerate(crops):
            pixels = torch.from_numpy(crop_pixels(crop)).permute(2, 0, 1)[None] / 127.5 - 1
            assert torch.equal(bucket.latents[row, variant], Family().encode_image("vae", pixels)[0])
            expected = [*crop.original_hw, *crop.top_left, 64, 64]
            assert bucket.extras["size_ids"][row, variant].tolist() == expected
    captions = [training_set.captions[index] for index in bucket.caption_index]
    assert captions == ["A sks dog", "b of sks", "A sks dog"] and bucket.names == ["a.png", "b.png", "c.png"]


def test_every_prompt_of_a_run_is_there(photos):
    config = run(photos, validation={"prompts": ["A [V] {class} x"], "negative": "ugly"})
    training_set, _ = build(config, extra_prompts=["extra [V]"])
    for text in ("", "A dog", "ugly", "A sks dog", "A sks dog x", "b of sks", "extra sks"):
        row = training_set.conditioning_of(text)
        assert row["prompt_embeds"].shape == (1, 2) and row["pooled"][0] == len(text)
    assert len(set(training_set.captions)) == len(training_set.captions)
    with pytest.raises(ValueError, match="'unknown' was not encoded"):
        training_set.conditioning_of("unknown")
    assert prompts_of(config, collect(config).pictures)[0] == ""


def test_second_run_loads_neither_vae_nor_text_encoders_and_is_equal(photos):
    first, source = build(run(photos))
    assert source.loaded == ["vae", "tokenizers", "text_encoders"]
    second, source = build(run(photos))
    assert source.loaded == []
    assert torch.equal(first.instances[0].latents, second.instances[0].latents)
    for one, other in zip(first.conditioning, second.conditioning, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_moved_and_renamed_photos_are_known_by_their_content(photos):
    build(run(photos))
    (photos / "a.png").rename(photos / "renamed.png")
    _, source = build(run(photos))
    assert source.loaded == []


@pytest.mark.parametrize(
    ("more", "source", "parts"),
    [
        ({"data": {"resolution": 32}}, {}, ["vae"]),
        ({"data": {"resolution": 64, "vae_precision": "bf16"}}, {}, ["vae"]),
        ({"vae": "other/vae"}, {}, ["vae"]),
        ({"data": {"resolution": 64, "flip": True, "variants": 2}}, {}, ["vae"]),
        ({"validation": {"prompts": ["new"]}}, {}, ["tokenizers", "text_encoders"]),
        ({}, {"identity": "another"}, ["vae", "tokenizers", "text_encoders"]),
        ({"revision": "abc"}, {}, ["vae", "tokenizers", "text_encoders"]),
    ],
)
def test_whatever_changes_the_result_changes_the_key(more, source, parts, photos):
    build(run(photos))
    _, used = build(run(photos, **more), Source(**source))
    assert used.loaded == parts


def test_a_changed_photo_is_made_again(photos):
    first, _ = build(run(photos))
    Image.new("RGB", (64, 64), "red").save(photos / "a.png")
    second, source = build(run(photos))
    assert source.loaded == ["vae"]
    changed = [
        not torch.equal(*pair) for pair in zip(first.instances[0].latents, second.instances[0].latents, strict=True)
    ]
    assert changed == [True, False, False]


def test_two_local_folders_with_the_same_denoiser_are_told_apart(tmp_path, photos):
    def local(name, content):
        (tmp_path / name / "vae").mkdir(parents=True)
        (tmp_path / name / "vae" / "model.safetensors").write_bytes(content)
        source = Source()
        source.place = SimpleNamespace(path=tmp_path / name)
        return source

    build(run(photos), local("one", b"1" * 3_000_000))
    assert build(run(photos), local("copy", b"1" * 3_000_000))[1].loaded == []
    assert build(run(photos), local("two", b"1" * 2_999_999 + b"2"))[1].loaded == ["vae"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "folder"])
def test_damaged_entries_are_made_again(damage, photos):
    config = run(photos)
    first, _ = build(config)
    files = sorted(cache_folder(config).rglob("*.safetensors"))
    for file in files:
        content = file.read_bytes()
        if damage == "folder":
            file.unlink()
        else:
            flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
            file.write_bytes({"cut": content[:-5], "flip": flipped, "empty": b""}[damage])
    second, source = build(config)
    assert source.loaded == ["vae", "tokenizers", "text_encoders"]
    assert torch.equal(first.instances[0].latents, second.instances[0].latents)
    assert build(config)[1].loaded == []


@pytest.mark.parametrize(
    ("precision", "said"), [("fp32", "is the VAE file complete?"), ("fp16", "set data.vae_precision: fp32")]
)
def test_latents_that_are_not_finite_name_the_photo_and_are_not_kept(precision, said, photos):
    config = run(photos, data={"resolution": 64, "vae_precision": precision})
    with pytest.raises(ValueError, match="a.png: .*not finite") as caught:
        build(config, Source(vae="broken"))
    assert said in str(caught.value) and not list(cache_folder(config).rglob("*.safetensors"))


def test_buckets_hold_every_picture_and_repeats_its_rows(photos):
    training_set, _ = build(run(photos, data={"resolution": 64, "buckets": True}))
    assert sorted(name for bucket in training_set.instances for name in bucket.names) == ["a.png", "b.png", "c.png"]
    assert len(training_set.instances) == 3
    for bucket in training_set.instances:
        assert (bucket.extras["size_ids"][:, :, 4:] == torch.tensor(bucket.latents.shape[-2:]) * 8).all()
    (photos / "2_sks").mkdir()
    (photos / "1_sks").mkdir()
    for name, folder in (("a.png", "2_sks"), ("b.png", "1_sks"), ("c.png", "1_sks")):
        (photos / name).rename(photos / folder / name)
    (bucket,) = build(run(photos))[0].instances
    assert bucket.names == ["1_sks/b.png", "1_sks/c.png", "2_sks/a.png", "2_sks/a.png"]
    assert torch.equal(bucket.latents[2], bucket.latents[3]) and bucket.latents.shape[0] == 4


def test_family_without_sizes(photos):
    training_set, _ = build(run(photos), Source(sizes=False))
    assert training_set.instances[0].extras == {} and list(training_set.conditioning[0]) == ["prompt_embeds"]


# --- class images ------------------------------------------------------------------------------------------------


class Renderer:
    def __init__(self, fail_at=None):
        self.jobs, self.fail_at = [], fail_at

    def __call__(self, prompt, seed):
        if seed == self.fail_at:
            raise RuntimeError("stopped")
        self.jobs.append((prompt, seed))
        return Image.new("RGB", (80, 64), (seed * 10, 0, 0))


def prior(photos, **more):
    return run(photos, prior={"kind": "images", "count": 4} | more)


def test_class_images_are_made_once_resumed_and_have_their_own_ids_and_caption(photos):
    config, renderer = prior(photos), Renderer(fail_at=2)
    with pytest.raises(RuntimeError, match="stopped"):
        build(config, render=renderer)
    again = Renderer()
    training_set, _ = build(config, render=again)
    assert renderer.jobs == [("A dog", 0), ("A dog", 1)] and again.jobs == [("A dog", 2), ("A dog", 3)]
    (bucket,) = training_set.priors
    assert len(bucket.names) == 4 and {training_set.captions[i] for i in bucket.caption_index} == {"A dog"}
    assert bucket.extras["size_ids"][0, 0].tolist() == [64, 80, 0, 8, 64, 64]
    quiet = Renderer()
    build(config, render=quiet)
    assert quiet.jobs == []


def test_a_damaged_class_image_is_made_again(photos):
    config, renderer = prior(photos), Renderer()
    build(config, render=renderer)
    (class_image_folder(config, Source()) / "class-00001.png").write_bytes(b"half")
    build(config, render=renderer)
    assert renderer.jobs[4:] == [("A dog", 1)]


def test_own_class_images_count_and_missing_ones_need_a_renderer(photos, tmp_path):
    own = tmp_path / "own"
    own.mkdir()
    for index in range(3):
        Image.new("RGB", (70, 70), (0, index, 0)).save(own / f"{index}.png")
    (own / "1.txt").write_text("a brown {class}")
    renderer = Renderer()
    training_set, _ = build(prior(photos, images=str(own)), render=renderer)
    assert renderer.jobs == [("A dog", 0)] and len(training_set.priors[0].names) == 4
    assert "a brown dog" in training_set.captions
    with pytest.raises(ValueError, match="lacks 1 of 5 images"):
        build(prior(photos, images=str(own), count=5))


def test_without_class_images_there_are_no_priors(photos):
    assert build(run(photos))[0].priors == []
    teacher = run(photos, prior={"kind": "teacher", "prompt": "some {class}"})
    assert build(teacher)[0].priors == [] and "some dog" in build(teacher)[0].captions


# --- the real thing ----------------------------------------------------------------------------------------------


def test_toybox_latents_and_embeddings_are_the_familys_own(photos):
    from diffusekrona_train.models import open_model

    config = run(photos, model="toybox")
    source = open_model("toybox")
    training_set = build_training_set(config, source, device="cpu", log=lambda text: None)
    parts = source.load("vae", "tokenizers", "text_encoders")
    crops = plan_crops(collect(config).pictures, config.data, 0)
    with torch.no_grad():
        for row, (crop,) in enumerate(crops):
            pixels = torch.from_numpy(crop_pixels(crop)).permute(2, 0, 1)[None].float() / 127.5 - 1
            expected = source.family.encode_image(parts["vae"], pixels)[0]
            assert torch.allclose(training_set.instances[0].latents[row, 0], expected, atol=1e-6)
        expected = source.family.encode_prompt(parts["tokenizers"], parts["text_encoders"], "b of sks")
    found = training_set.conditioning_of("b of sks")
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_cache_lies_beside_the_run_or_where_the_config_says(photos):
    assert cache_folder(run(photos)) == photos.parent / "runs" / "cache"
    assert cache.cache_folder(run(photos, data={"cache_dir": "/x"})).as_posix() == "/x"
