"""Resume states: written whole or not at all, read back bit for bit, refused by field."""

from __future__ import annotations

import copy
import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusekrona_train.adapters import formats as weights
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.training import checkpoint
from scripts.studies.records import SINCE
from tests.runs import newest_state
from tests.tiny import make_unet

CONFIG = {
    "model": "m",
    "output": "runs/a",
    "train": {"steps": 5, "seed": 0, "betas": [0.9, 0.999]},
    "adapter": {"a1": 4},
}


def make(optimizer="adamw"):
    """An injection in a tiny denoiser and an optimiser that has made three steps."""
    injection = inject(make_unet("sd15"), AdapterConfig(type="lora", rank=64, blocks=["mid_block"]), seed=1)
    flat = injection.flatten()
    if optimizer == "adamw":
        descent = torch.optim.AdamW([flat.master], lr=1e-2, fused=True)
    else:
        import bitsandbytes

        descent = bitsandbytes.optim.AdamW8bit([flat.master], lr=1e-2)
    walk(injection, descent, 3)
    return injection, descent


def walk(injection, descent, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in injection.parameters():
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        descent.step()


def write(folder, step, injection, descent, keep=2):
    info = {"family": "sd", "model": "tiny", "step": step}
    about = {"config": CONFIG, "processes": 1}
    extra = {"meters": torch.arange(6.0)}
    return checkpoint.save(folder, step, injection, descent, info=info, about=about, extra=extra, keep=keep)


def equal_trees(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal_trees(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_restored_state_goes_on_bitwise(tmp_path, optimizer):
    injection, descent = make(optimizer)
    write(tmp_path, 3, injection, descent)
    other, fresh = make(optimizer)
    walk(other, fresh, 2, seed=9)
    state = checkpoint.read(tmp_path / "resume" / "step-000003")
    checkpoint.restore(state, other, fresh)
    assert state.step == 3 and torch.equal(state.tensors["extra/meters"], torch.arange(6.0))
    assert equal_trees(copy.deepcopy(descent.state_dict()["state"]), fresh.state_dict()["state"])
    walk(injection, descent, 3, seed=4)
    walk(other, fresh, 3, seed=4)
    assert equal_trees(injection.state_dict(), other.state_dict())


def as_version_0_1(path, names, eight_bit=False):
    """Rewrite a state as version 0.1 wrote it: moments by number, of an optimiser that had each factor by itself."""
    state = checkpoint.read(path)
    tensors = {name: value for name, value in state.tensors.items() if not name.startswith("optimizer/")}
    for number, name in enumerate(names):
        shape = tensors[f"factors/{name}"].shape
        for key in () if eight_bit else ("exp_avg", "exp_avg_sq"):
            moment = state.tensors[f"optimizer/{key}/{name}"][: shape.numel()]
            tensors[f"optimizer/#{number}/{key}"] = moment.reshape(shape).contiguous()
        tensors[f"optimizer/#{number}/step"] = torch.tensor(3.0)
        if eight_bit:
            tensors[f"optimizer/#{number}/__bnb_optimizer_quant_state__/state1"] = torch.zeros(shape).byte()
    save_file(tensors, path, metadata={"krona": json.dumps({**state.about, "format": "1", "optimizer": {}})})


def test_a_state_of_version_0_1_is_taken_up_bitwise(tmp_path):
    injection, descent = make()
    write(tmp_path, 3, injection, descent)
    path = tmp_path / "resume" / "step-000003" / "state.safetensors"
    as_version_0_1(path, list(injection.state_dict()))
    other, fresh = make()
    walk(other, fresh, 2, seed=9)
    checkpoint.restore(checkpoint.read(path), other, fresh)
    walk(injection, descent, 3, seed=4)
    walk(other, fresh, 3, seed=4)
    assert equal_trees(injection.state_dict(), other.state_dict())
    write(tmp_path, 3, injection, descent)
    as_version_0_1(path, list(injection.state_dict()), eight_bit=True)
    with pytest.raises(ValueError, match="written by version 0.1 with train.optimizer: adamw8bit"):
        checkpoint.restore(checkpoint.read(path), other, fresh)


def test_the_adapter_of_a_checkpoint_is_a_whole_adapter_file(tmp_path):
    injection, descent = make()
    path = write(tmp_path, 7, injection, descent)
    assert path == tmp_path / "checkpoints" / "step-000007" / "adapter.safetensors"
    file = weights.read_adapter(path)
    assert file.info["step"] == 7
    fresh = weights.inject_file(make_unet("sd15"), file)
    assert equal_trees(fresh.state_dict(), injection.state_dict())


def test_states_rotate_and_adapters_stay(tmp_path):
    injection, descent = make()
    for step in (1, 2, 3, 10):
        write(tmp_path, step, injection, descent, keep=2)
    assert [path.name for path in checkpoint.states(tmp_path)] == ["step-000010", "step-000003"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4
    assert newest_state(tmp_path).step == 10


@pytest.mark.parametrize("phase", ["adapter", "state", "rotation"])
def test_a_failure_while_writing_leaves_the_state_before(tmp_path, phase, monkeypatch):
    injection, descent = make()
    write(tmp_path, 1, injection, descent)
    before = (tmp_path / "resume" / "step-000001" / "state.safetensors").read_bytes()

    def full(at, step=0):
        if at == phase:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.faults, "reach", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path, 2, injection, descent, keep=1)
    assert (tmp_path / "resume" / "step-000001" / "state.safetensors").read_bytes() == before
    assert newest_state(tmp_path).step == (2 if phase == "rotation" else 1)
    assert not list(tmp_path.rglob(".writing-*"))


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_cut_state_is_refused_in_one_line(tmp_path, length):
    injection, descent = make()
    write(tmp_path, 1, injection, descent)
    path = tmp_path / "resume" / "step-000001" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(ValueError, match="cannot be read") as error:
        checkpoint.read(path.parent)
    assert "\n" not in str(error.value)
    assert checkpoint.newest(tmp_path) is None


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no resume state"):
        checkpoint.read(tmp_path / "nowhere")
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.read(tmp_path / "other.safetensors")
    injection, descent = make()
    write(tmp_path, 1, injection, descent)
    path = tmp_path / "resume" / "step-000001" / "state.safetensors"
    save_file(load_file(path), path, metadata={"krona": '{"format": "9", "step": 1}'})
    with pytest.raises(ValueError, match="format '9'"):
        checkpoint.read(path)


def test_a_state_of_other_factors_is_refused(tmp_path):
    injection, descent = make()
    write(tmp_path, 1, injection, descent)
    other = inject(make_unet("sd15"), AdapterConfig(type="lora", rank=2, blocks=["mid_block"]))
    with pytest.raises(ValueError, match="other factors"):
        checkpoint.restore(
            checkpoint.read(tmp_path / "resume" / "step-000001"), other, torch.optim.AdamW(other.parameters())
        )


def test_changes_are_refused_by_field_and_allowed_ones_pass(tmp_path):
    injection, descent = make()
    write(tmp_path, 1, injection, descent)
    state = checkpoint.read(tmp_path / "resume" / "step-000001")
    allowed = {**CONFIG, "output": "runs/b", "train": {**CONFIG["train"], "steps": 9}, "validation": {"every": 3}}
    checkpoint.refuse_changes(state, allowed, 1)
    changed = {**CONFIG, "adapter": {"a1": 8}, "train": {**CONFIG["train"], "seed": 5}}
    with pytest.raises(ValueError, match=r"adapter\.a1 \(was 4, now 8\); train\.seed \(was 0, now 5\)"):
        checkpoint.refuse_changes(state, changed, 1)
    with pytest.raises(ValueError, match="processes .was 1, now 2"):
        checkpoint.refuse_changes(state, CONFIG, 2)


def test_a_state_of_before_a_field_resumes_where_the_field_changes_nothing(tmp_path):
    """Fields younger than the first records are young for resume states too, with the same neutral values."""
    assert {name: value for name, value in SINCE.items() if value is not None} == checkpoint.YOUNGER
    injection, descent = make()
    write(tmp_path, 1, injection, descent)
    state = checkpoint.read(tmp_path / "resume" / "step-000001")
    new: dict = {section: dict(CONFIG.get(section, {})) for section in ("train", "adapter")}
    for name, value in checkpoint.YOUNGER.items():
        section, _, key = name.partition(".")
        new.setdefault(section, {})[key] = value
    checkpoint.refuse_changes(state, {**CONFIG, **new}, 1)
    new["train"]["rate_unit"] = "dw"
    with pytest.raises(ValueError, match=r"train\.rate_unit \(was 'factor', now 'dw'\)"):
        checkpoint.refuse_changes(state, {**CONFIG, **new}, 1)
