"""Stage identity: a small CNN that names sprites and classes; without its classifiers it is the judge of identity.

The shipped judge is frozen by its sum: a new one means measuring every table again.
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
from stage import Pace, finish, neighbours, pixels
from torch import nn
from torch.nn import functional as F
from world import Label

from diffusekrona_train.evaluation.metrics.encoders import IdentityNet

TEMPERATURE = 12.0
BATCH, HELD = 64, 1000


def run(
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
        picks = np.random.default_rng((seed, step)).integers(0, len(pictures) - HELD, BATCH)
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
