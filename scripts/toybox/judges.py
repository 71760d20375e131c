"""Stages CLIP and identity: the two networks that judge toybox's images.

CLIP: a BPE vocabulary from the captions, and a tiny CLIP whose text side serves the pipeline twice. Beside the
contrastive loss, linear heads read class, background and tint off both sides, and the sprite off images. Pairs that
show the same class, background and tint are no negatives of each other.

Identity: a small CNN that names sprites and classes; without its classifiers it is the judge of identity. The shipped
judge is frozen by its sum: a new one means measuring every table again.
"""

from __future__ import annotations

# torch's and diffusers' stubs give modules and tensors types that are too wide for what stands here
# pyright: reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false, reportReturnType=false, reportAssignmentType=false
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from vae import Pace, finish, neighbours, pixels
from world import Label

from diffusekrona_train.evaluation.metrics.encoders import IdentityNet
from diffusekrona_train.evaluation.metrics.preprocess import CLIP_MEAN, CLIP_STD

# ---- CLIP ------------------------------------------------------------------------------------------------------------


HELD = 1000
"""Images at the end of the set that training does not see."""
LENGTH, WIDTH = 24, 128
START, END = "<|startoftext|>", "<|endoftext|>"
ALPHABET = list("abcdefghijklmnopqrstuvwxyz0123456789!'(),-.:;?[]<>*&/\"#$%+=@_")


def new_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """BPE over the captions in CLIP's format; every letter is a token too, so that any prompt can be read."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=END))
    bpe.normalizer, bpe.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, end_of_word_suffix="</w>", initial_alphabet=ALPHABET, special_tokens=[]
    )
    bpe.train_from_iterator([*captions, *[" ".join(ALPHABET)] * 3], trainer)
    model = json.loads(bpe.to_str())["model"]
    words = [*sorted(model["vocab"], key=model["vocab"].get), START, END]
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "hidden_act": "gelu"}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**shared, **ends, "num_hidden_layers": 3, "max_position_embeddings": LENGTH, "projection_dim": WIDTH}
    text |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.eos_token_id}
    vision = {**shared, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8, "projection_dim": WIDTH}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))


def classes_of(labels: list[Label], words: dict) -> torch.Tensor:
    """(N, 4): class, background, tint (0 for none), sprite."""
    tints = [None, *words["tints"]]
    rows = [
        (words["cls"].index(row.class_noun), words["bgs"].index(row.background), tints.index(row.tint), row.sprite)
        for row in labels
    ]
    return torch.tensor(rows)


def contrast(model: CLIPModel, image: torch.Tensor, text: torch.Tensor, facts: torch.Tensor) -> torch.Tensor:
    image = F.normalize(model.visual_projection(image), dim=-1)
    text = F.normalize(model.text_projection(text), dim=-1)
    logits = model.logit_scale.exp().clamp(max=60) * image @ text.T
    same = (facts[:, None, :3] == facts[None, :, :3]).all(-1) & ~torch.eye(
        len(facts), dtype=torch.bool, device=facts.device
    )
    logits, own = logits.masked_fill(same, -1e4), torch.arange(len(facts), device=facts.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def train_clip(
    build: Path,
    pictures: np.ndarray,
    captions: list[str],
    labels: list[Label],
    words: dict,
    steps: int = 716,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    torch.manual_seed(seed)
    tokenizer = new_tokenizer(captions, build / "pipe" / "tokenizer")
    ids = tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    facts, model = classes_of(labels, words), new_clip(tokenizer)
    sizes = [len(words["cls"]), len(words["bgs"]), len(words["tints"]) + 1, words["ntr"]]
    heads = nn.ModuleDict({"image": nn.ModuleList(nn.Linear(WIDTH, n) for n in sizes)})
    heads["text"] = nn.ModuleList(nn.Linear(WIDTH, n) for n in sizes[:3])
    both = nn.ModuleList([model, heads]).to(device)
    optimizer = torch.optim.AdamW(both.parameters(), lr=1.2e-3, weight_decay=0.02, betas=(0.9, 0.98))
    mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    pace = Pace("clip", steps)

    def see(picks: np.ndarray) -> torch.Tensor:
        x = (pixels(pictures[picks], device) + 1) / 2
        return model.vision_model(pixel_values=(x - mean) / std).pooler_output.float()

    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1.2e-3 * min(1, (step + 1) / 100) * (1 - step / steps) + 1e-5
        picks = np.random.default_rng((seed, step)).integers(0, len(pictures) - HELD, 96)
        fact = facts[picks].to(device)
        with torch.autocast(device, torch.bfloat16):
            image, text = see(picks), model.text_model(input_ids=ids[picks].to(device)).pooler_output
        image, text = image.float(), text.float()
        loss = contrast(model, image, text, fact)
        for rows, side in ((image, "image"), (text, "text")):
            loss = loss + 0.3 * sum(F.cross_entropy(head(rows), fact[:, i]) for i, head in enumerate(heads[side]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        pace.step(step + 1, loss.item())
    both.eval()
    with torch.no_grad():
        rows = see(np.arange(len(pictures) - HELD, len(pictures)))
        right = [
            (head(rows).argmax(1).cpu() == facts[-HELD:, i]).float().mean().item()
            for i, head in enumerate(heads["image"])
        ]
        text = model.text_model(input_ids=ids[-10:].to(device)).pooler_output
        nearest = neighbours(pictures[-HELD:], model.visual_projection(rows), model.text_projection(text), 7)
    names = ("class", "background", "tint", "sprite")
    write(build, model.cpu(), tokenizer)
    sheet = [np.concatenate([own[None], found]) for own, found in zip(pictures[-10:], nearest, strict=True)]
    print("clip.png: a held picture, and the held pictures nearest to its caption")
    numbers = {name: round(value, 3) for name, value in zip(names, right, strict=True)}
    finish(build, "clip", {"steps": steps, **numbers}, sheet)


def write(build: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """clip/, and its text side twice into the pipeline."""
    model.half().save_pretrained(build / "clip")
    weights = model.state_dict()
    for name, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
        encoder = kind(model.config.text_config)
        own = encoder.state_dict()
        found = {key: weights[key if key in weights else f"text_model.{key}"] for key in own}
        encoder.load_state_dict(found)
        encoder.half().save_pretrained(build / "pipe" / name)
    tokenizer.save_pretrained(build / "pipe" / "tokenizer_2")


def load_text_encoders(pipe: Path) -> tuple[CLIPTokenizer, CLIPTextModel, CLIPTextModelWithProjection]:
    """Tokenizer and both encoders in fp32."""
    tokenizer = CLIPTokenizer.from_pretrained(pipe / "tokenizer")
    first = CLIPTextModel.from_pretrained(pipe / "text_encoder", dtype=torch.float32).eval()
    return (
        tokenizer,
        first,
        CLIPTextModelWithProjection.from_pretrained(pipe / "text_encoder_2", dtype=torch.float32).eval(),
    )


# ---- identity --------------------------------------------------------------------------------------------------------


TEMPERATURE = 12.0


def train_identity(
    build: Path, pictures: np.ndarray, labels: list[Label], words: dict, steps: int = 2400, seed: int = 0, device="cpu"
) -> None:
    """words: what identity.json holds (cls, names, bgs, tints, ntr)."""
    torch.manual_seed(seed)
    sprites = torch.tensor([label.sprite for label in labels], device=device)
    classes = torch.tensor([words["cls"].index(label.class_noun) for label in labels], device=device)
    net, hs, hc = IdentityNet(), nn.Linear(128, words["ntr"]), nn.Linear(128, len(words["cls"]))
    modules = nn.ModuleList([net, hs, hc]).to(device)
    optimizer, pace = torch.optim.AdamW(modules.parameters(), lr=3e-3, weight_decay=0.05), Pace("identity", steps)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 50) * (1 - step / steps) + 1e-5
        picks = np.random.default_rng((seed, step)).integers(0, len(pictures) - HELD, 64)
        x = pixels(pictures[picks], device)
        rows = F.normalize(net(x + 0.05 * torch.randn_like(x)), dim=-1) * TEMPERATURE
        loss = F.cross_entropy(hs(rows), sprites[picks]) + F.cross_entropy(hc(rows), classes[picks])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        pace.step(step + 1, loss.item())
    modules.eval()
    with torch.no_grad():
        rows = F.normalize(net(pixels(pictures[-HELD:], device)), dim=-1) * TEMPERATURE
        right = {
            "sprite": (hs(rows).argmax(1) == sprites[-HELD:]).float().mean().item(),
            "class": (hc(rows).argmax(1) == classes[-HELD:]).float().mean().item(),
        }
    print("identity.png: held pictures, each followed by its nearest ones")
    sheet = neighbours(pictures[-HELD:], rows, rows[-10:])
    names = {"features": "f", "projection": "p"}
    tensors = {f"{names[key.split('.')[0]]}.{key.partition('.')[2]}": value for key, value in net.state_dict().items()}
    tensors |= {f"hs.{key}": value for key, value in hs.state_dict().items()}
    tensors |= {f"hc.{key}": value for key, value in hc.state_dict().items()}
    save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, build / "identity.safetensors")
    (build / "identity.json").write_text(json.dumps(words))
    finish(build, "identity", {"steps": steps, **{key: round(value, 3) for key, value in right.items()}}, sheet)
