"""Scores against an independent numpy rewrite of the formulas, on real CLIP and ViT classes and toybox's encoders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusekrona_train.evaluation.metrics import (
    METRICS,
    Embeddings,
    bootstrap,
    difference,
    summarise,
    unit,
    values_of,
)
from diffusekrona_train.evaluation.metrics.encoders import open_clip, open_dino
from diffusekrona_train.evaluation.metrics.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
)
from tests.tiny import make_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small random CLIP with its tokenizer and a small random ViT, as folders."""
    from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

    root = tmp_path_factory.mktemp("encoders")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = make_tokenizer(root / "words", pad="<|endoftext|>")
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        text = {**sizes, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 77}
        config = CLIPConfig(
            text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=24
        )
        CLIPModel(config).save_pretrained(root / "clip")
        tokenizer.save_pretrained(root / "clip")
        ViTModel(ViTConfig(**sizes, image_size=28, patch_size=7)).save_pretrained(root / "vit")
    return root


@pytest.fixture(scope="module")
def pictures():
    noise = np.random.default_rng(0)
    sizes = [(40, 56), (64, 33), (32, 32), (90, 91), (28, 60), (37, 37)]
    return [Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def numpy_pixels(picture, resize, crop, mean, std):
    """Shorter side to `resize`, centre crop, normalised: written from the description, pixel by pixel in numpy."""
    w, h = picture.size
    new = (resize, int(resize * h / w)) if w <= h else (int(resize * w / h), resize)
    array = (
        np.asarray(picture.resize(new, Image.Resampling.BICUBIC) if new != (w, h) else picture).astype(np.float64) / 255
    )
    top, left = (array.shape[0] - crop) // 2, (array.shape[1] - crop) // 2
    array = array[top : top + crop, left : left + crop]
    return ((array - np.array(mean)) / np.array(std)).transpose(2, 0, 1)


def similarity(a, b):
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def numpy_scores(real, generated, texts, embed_clip, embed_text, embed_dino):
    """CLIP-I, CLIP-T, DINO by loops over pairs, from un-normalised embeddings."""
    clip_real, clip_made = [embed_clip(p) for p in real], [embed_clip(p) for p in generated]
    dino_real, dino_made = [embed_dino(p) for p in real], [embed_dino(p) for p in generated]
    pairs = [(i, j) for i in range(len(real)) for j in range(len(generated))]
    return {
        "clip_i": sum(similarity(clip_real[i], clip_made[j]) for i, j in pairs) / len(pairs),
        "dino": sum(similarity(dino_real[i], dino_made[j]) for i, j in pairs) / len(pairs),
        "clip_t": sum(similarity(g, embed_text(t)) for g, t in zip(clip_made, texts, strict=True)) / len(texts),
        "copy": max(similarity(dino_real[i], dino_made[j]) for i, j in pairs),
    }


TEXTS = ["a dog on the beach", "a dog", "the snow"]


def scores_of(clip, dino, real, generated, texts):
    embeddings = Embeddings(
        clip.images(real), clip.images(generated), clip.texts(texts), dino.images(real), dino.images(generated)
    )
    return {name: summarise(name, values)["value"] for name, values in values_of(embeddings).items()}


def test_scores_equal_numpy_on_clip_and_vit_classes(folders, pictures):
    from transformers import AutoTokenizer, CLIPModel, ViTModel

    clip = CLIPModel.from_pretrained(folders / "clip").eval()
    vit = ViTModel.from_pretrained(folders / "vit").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / "clip")

    def whole(picture, text):
        """Both embeddings by CLIPModel's own forward."""
        pixels = torch.tensor(numpy_pixels(picture, 32, 32, CLIP_MEAN, CLIP_STD)[None], dtype=torch.float32)
        words = tokenizer([text], padding="max_length", max_length=77, return_tensors="pt")
        return clip(pixel_values=pixels, input_ids=words.input_ids, attention_mask=words.attention_mask)

    def embed_dino(picture):
        pixels = torch.tensor(numpy_pixels(picture, 32, 28, IMAGENET_MEAN, IMAGENET_STD)[None], dtype=torch.float32)
        return vit(pixel_values=pixels).last_hidden_state[0, 0].double().numpy()

    real, generated = pictures[:3], pictures[3:]
    with torch.no_grad():
        expected = numpy_scores(
            real,
            generated,
            TEXTS,
            lambda picture: whole(picture, "a").image_embeds[0].double().numpy(),
            lambda text: whole(pictures[0], text).text_embeds[0].double().numpy(),
            embed_dino,
        )
    found = scores_of(open_clip(str(folders / "clip")), open_dino(str(folders / "vit")), real, generated, TEXTS)
    assert found == pytest.approx(expected, abs=1e-5)


def numpy_identity_net(tensors, pixels):
    """toybox's judge in plain numpy: six convolutions with batch norm and ReLU, 2 x 2 means, one linear layer."""
    x = pixels
    for i, stride in zip(range(0, 18, 3), (2, 2, 1, 2, 1, 2), strict=True):
        weight = tensors[f"f.{i}.weight"]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))[:, ::stride, ::stride]
        x = np.einsum("chwij,ocij->ohw", windows, weight, optimize=True)
        mean, variance = tensors[f"f.{i + 1}.running_mean"], tensors[f"f.{i + 1}.running_var"]
        x = (x - mean[:, None, None]) / np.sqrt(variance + 1e-5)[:, None, None]
        x = x * tensors[f"f.{i + 1}.weight"][:, None, None] + tensors[f"f.{i + 1}.bias"][:, None, None]
        x = np.maximum(x, 0)
    half = x.shape[1] // 2
    pooled = x.reshape(len(x), 2, half, 2, half).mean((2, 4)).ravel()
    return tensors["p.weight"] @ pooled + tensors["p.bias"]


def test_scores_equal_numpy_on_toyboxs_encoders(pictures):
    from safetensors.numpy import load_file
    from transformers import AutoTokenizer, CLIPModel

    from diffusekrona_train.evaluation.metrics.encoders import TOYBOX

    tensors = {name: value.astype(np.float64) for name, value in load_file(TOYBOX / "identity.safetensors").items()}
    model = CLIPModel.from_pretrained(TOYBOX / "clip", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TOYBOX / "pipe" / "tokenizer")

    def whole(picture, text):
        pixels = torch.tensor(numpy_pixels(picture, 64, 64, CLIP_MEAN, CLIP_STD)[None], dtype=torch.float32)
        return model(pixel_values=pixels, input_ids=tokenizer([text], return_tensors="pt").input_ids)

    real, generated = pictures[:2], pictures[2:5]
    with torch.no_grad():
        expected = numpy_scores(
            real,
            generated,
            TEXTS,
            lambda picture: whole(picture, "a").image_embeds[0].double().numpy(),
            lambda text: whole(pictures[0], text).text_embeds[0].double().numpy(),
            lambda picture: numpy_identity_net(tensors, numpy_pixels(picture, 64, 64, [0.5] * 3, [0.5] * 3)),
        )
    assert scores_of(open_clip("toybox"), open_dino("toybox"), real, generated, TEXTS) == pytest.approx(
        expected, abs=1e-5
    )


def rows(*values):
    return unit(np.array(values, dtype=np.float64))


def embeddings(**changed):
    one = rows([1, 0], [0, 1])
    return Embeddings(**{**dict.fromkeys(("clip_real", "clip_generated", "clip_text", "dino_real"), one), **changed})


def test_class_drift_is_zero_for_the_same_pictures_and_one_for_orthogonal_ones():
    base = rows([1, 0], [0, 1])
    same = embeddings(dino_generated=base, dino_class_base=base, dino_class_adapted=base)
    turned = embeddings(dino_generated=base, dino_class_base=base, dino_class_adapted=base[::-1])
    assert values_of(same)["class_drift"] == pytest.approx([0, 0])
    assert values_of(turned)["class_drift"] == pytest.approx([1, 1])
    assert "class_drift" not in values_of(embeddings(dino_generated=base))


def test_a_copied_photo_has_copy_score_one():
    found = values_of(embeddings(dino_generated=rows([0, 1], [1, 1])))["copy"]
    assert found == pytest.approx([1, np.sqrt(0.5)])
    assert summarise("copy", found)["value"] == pytest.approx(1)


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_gives_one_value_a_picture_and_a_summary(name):
    base = rows([1, 0.2], [0.3, 1])
    found = values_of(embeddings(dino_generated=base, dino_class_base=base, dino_class_adapted=base))[name]
    summary = summarise(name, found, [0, 1])
    assert len(found) == summary["n"] == 2
    assert summary["low"] <= summary["value"] <= summary["high"]
    assert summary["by_seed"] == pytest.approx({"0": found[0], "1": found[1]})
    assert summary["std"] == pytest.approx(np.std(found, ddof=1))


def test_bootstrap_interval_is_that_of_a_normal_mean():
    values = np.random.default_rng(1).normal(3, 2, 400)
    low, high = bootstrap(values)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * 0.1, values.mean() + 1.96 * 0.1), abs=0.03)
    assert bootstrap(values) == (low, high)


def test_difference_knows_noise_from_a_shift():
    noise = np.random.default_rng(2)
    first = noise.normal(0, 1, 200)
    near, far = first + noise.normal(0, 0.1, 200), first + noise.normal(0, 1, 200)
    assert difference(list(first + 0.5), list(near))["larger_than_chance"]
    assert not difference(list(first), list(far))["larger_than_chance"]
    with pytest.raises(ValueError, match="3 and 2 images"):
        difference([1, 2, 3], [1, 2])


def test_each_picture_is_embedded_once_and_the_cache_survives(tmp_path, pictures):
    first = open_dino("toybox", cache=tmp_path)
    rows_first = first.images([pictures[0], pictures[1], pictures[0]])
    assert np.array_equal(rows_first[0], rows_first[2])
    second = open_dino("toybox", cache=tmp_path)
    second.embed_pixels = None  # anything that is not in the cache would fail
    assert np.array_equal(second.images(pictures[:2]), rows_first[:2])
    [file] = tmp_path.glob("*.safetensors")
    file.write_bytes(b"damaged")
    assert np.allclose(open_dino("toybox", cache=tmp_path).images(pictures[:2]), rows_first[:2], atol=1e-6)


def test_batches_do_not_change_embeddings(folders, pictures):
    one, many = open_clip(str(folders / "clip")), open_clip(str(folders / "clip"))
    one.batch_size = 1
    assert np.allclose(one.images(pictures), many.images(pictures), atol=1e-6)


def test_preprocessing_of_any_mode_and_shape():
    shown = Preprocessing(32, 28, IMAGENET_MEAN, IMAGENET_STD)
    for mode, size in (("L", (500, 30)), ("RGBA", (28, 28)), ("P", (33, 90))):
        assert shown.pixels(Image.new(mode, size)).shape == (3, 28, 28)
    assert "centre crop 28" in shown.describe()


@pytest.mark.parametrize("open_it", [open_clip, open_dino])
def test_an_encoder_that_is_none_is_one_line(open_it, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="encoder") as caught:
        open_it(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_identities_hold_no_path(folders):
    found = open_clip(str(folders / "clip")).describe()["encoder"]
    assert found.startswith("clip sha256:") and str(folders) not in found
