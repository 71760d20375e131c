"""More cases of the area runs: models that lack a part, and processes that lack each other."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults import adapter_files
from tests.faults.doors import Seen
from tests.faults.harness import Case
from tests.faults.runs import fresh, training_case
from tests.faults.sandbox import Sandbox


def cases() -> list[Case]:
    return _models() + _others()


def _models() -> list[Case]:
    """A model folder that lacks a part, or holds something else in its place."""

    def without(part: str, damage: Callable[[Path, Path], Any] | None = None) -> Callable[[Sandbox], list[str]]:
        def make(box: Sandbox) -> list[str]:
            from diffusekrona_train.models.local import ASSETS

            arguments = fresh(
                box, {"model": "model", "data.resolution": 64, "adapter.a1": 4, "adapter.a2": 4}, cache=False
            )
            shutil.copytree(ASSETS / "toybox" / "pipe", box.folder / "model")
            place = box.folder / "model" / part
            if damage is not None:
                damage(place, box.canary())
            elif place.is_dir():
                shutil.rmtree(place)
            else:
                place.unlink()
            return arguments

        return make

    def cut(path: Path, canary: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def pickle_instead(path: Path, canary: Path) -> None:
        path.unlink()
        adapter_files.pickled(path.with_suffix(".bin"), canary, "zip")

    def junk(path: Path, canary: Path) -> None:
        path.write_text("{")

    unet = "unet/diffusion_pytorch_model.safetensors"
    part = "one sentence for a missing part, told apart by its name"
    return [
        *(
            training_case(f"a model without {name}", without(name), 2, name.split("/")[0], part)
            for name in (
                "unet",
                "vae",
                "text_encoder",
                "text_encoder_2",
                "tokenizer",
                "scheduler",
                unet,
                "unet/config.json",
            )
        ),
        training_case("a model whose weights are cut", without(unet, cut), 2, r"unet|denoiser"),
        training_case("a model of pickles", without(unet, pickle_instead), 2, r"unet|pickle|safetensors"),
        training_case("a model with a broken config", without("unet/config.json", junk), 2, r"config|unet"),
    ]


def _others() -> list[Case]:
    """More processes than one."""
    two = r"""
    port=$((20000 + RANDOM % 20000))
    export MASTER_ADDR=127.0.0.1 MASTER_PORT=$port WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 ACCELERATE_USE_CPU=true
    run() { "$PYTHON" -m diffusekrona_train --config dog.yaml; }
    RANK=0 LOCAL_RANK=0 run & other=$!
    RANK=1 LOCAL_RANK=1 KRONA_FAULT=step:2:SIGKILL run 2>/dev/null & one=$!
    wait $one; echo "one ended with $?"; SECONDS=0
    wait $other; status=$?; echo "the other after $SECONDS s"
    exit $status
    """

    def pair(box: Sandbox) -> list[str]:
        fresh(box, {"train.steps": 50, "validation.every": 0})
        return ["command:", "bash", "-c", two]

    def within_a_minute(box: Sandbox, seen: Seen) -> None:
        assert "one ended with 137" in seen.out, f"the one was not killed: {seen.out[-300:]}"
        seconds = int(seen.out.split("the other after ")[1].split(" s")[0])
        assert seconds < 60, f"the other went on for {seconds} s"

    launched = {"WORLD_SIZE": "2"}
    return [
        training_case(
            "one of two processes killed",
            pair,
            1,
            r"another process of this run ended.*--resume",
            how="spawn",
            then=within_a_minute,
            seconds=300,
        ),
        training_case("a launcher that started one process for two", fresh, 2, r"WORLD_SIZE|MASTER_ADDR", env=launched),
    ]
