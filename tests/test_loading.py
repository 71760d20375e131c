"""Where a base is loaded to: onto the device at once, and in host memory once whatever the number of processes."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from diffusekrona_train.models import open_model
from diffusekrona_train.models.local import LocalModel
from diffusekrona_train.training import base
from tests.tiny import make_pipeline


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_model(str(make_pipeline("sd15", tmp_path_factory.mktemp("sd15") / "model")))


def test_a_base_is_read_onto_the_device_at_once(source, monkeypatch):
    """Unless it is quantised on the way. On a device without content only the request can be seen."""
    asked: list[dict] = []
    load = LocalModel.load_part

    def noted(self, part, cls, **options):
        asked.append(options)
        return load(self, part, cls, **{name: value for name, value in options.items() if name != "device_map"})

    monkeypatch.setattr(LocalModel, "load_part", noted)
    assert source.load_denoiser(torch.bfloat16, "meta").device.type == "meta"
    source.load_denoiser(torch.bfloat16, "cpu")
    assert [one.get("device_map") for one in asked] == [{"": torch.device("meta")}, None]
    pytest.importorskip("bitsandbytes")
    asked.clear()
    source.load_denoiser(torch.float32, torch.device("cpu"), quantize="nf4")
    assert "device_map" not in asked[0]


def test_weights_read_onto_a_device_are_those_of_the_file(source):
    from diffusers import UNet2DConditionModel

    plain = source.load_denoiser(torch.bfloat16)
    mapped = source.place.load_part(
        "unet", UNet2DConditionModel, torch_dtype=torch.bfloat16, device_map={"": torch.device("cpu")}
    )
    theirs = mapped.state_dict()
    assert theirs.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in plain.state_dict().items())
    assert not any(hasattr(module, "_hf_hook") for module in mapped.modules())


def test_memory_that_ends_while_a_base_is_read_is_not_the_folder_s_fault(source, monkeypatch):

    def short(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("diffusers.UNet2DConditionModel.from_pretrained", short)
    with pytest.raises(torch.OutOfMemoryError):
        source.load_denoiser(torch.bfloat16, "meta")


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("fails", [False, True])
def test_quantised_bases_are_loaded_in_turn(processes, fails):
    """Threads for processes: no two of them are in the block at once, all of them have been there."""
    barrier, inside, most, order = threading.Barrier(processes), [0], [0], []

    def process(index):
        accelerator = SimpleNamespace(num_processes=processes, process_index=index, wait_for_everyone=barrier.wait)
        with contextlib.suppress(RuntimeError), base.in_turn(accelerator, True):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.02)
            order.append(index)
            inside[0] -= 1
            if fails and index == 1:
                raise RuntimeError("no memory")

    threads = [threading.Thread(target=process, args=(index,)) for index in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert order == list(range(processes)) and most == [1]
