"""krona-inspect: the paper's numbers, no diffusers behind the counts, pictures of a file."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusekrona_train.adapters.formats import read_adapter, write_adapter
from diffusekrona_train.cli.inspect import app
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models.layers import find_layers
from tests.test_weights import saved
from tests.tiny import make_pipeline, make_unet


def run(*arguments, fails=None):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if fails is None:
        assert result.exit_code == 0, result.output + result.stderr
        return result.output
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and fails in result.stderr, result.stderr
    return result.stderr


PAPER = [
    ("--a1 4 --a2 64", 3_874_560, 560),
    ("--a1 8 --a2 64", 2_152_320, 560),
    ("--a1 16 --a2 64", 1_506_240, 560),
    ("--a1 2 --a2 64", 7_534_080, 560),
    ("--a1 4 --a2 64 --ffn", 8_710_400, 700),
    ("--adapter lora --rank 4", 5_806_080, 560),
    ("--adapter lokr --factor 8 --full-matrix", 14_960_640, 560),
    ("--adapter lokr --factor -1 --rank 8", 904_640, 560),
    ("--adapter lokr --factor -1 --rank 8 --ffn", 1_356_800, 700),
    ("--adapter loha --rank 4", 11_612_160, 560),
    ("--adapter loha --rank 4 --ffn", 20_930_560, 700),
    ("--params 4M", 3_874_560, 560),
]


@pytest.mark.parametrize("arguments, trainable, layers", PAPER)
def test_the_paper_s_counts(arguments, trainable, layers):
    found = json.loads(run("params", "--model", "sdxl", *arguments.split(), "--json"))
    assert (found["trainable"], found["layers"], found["base"]) == (trainable, layers, 2_567_463_684)
    assert sum(row["trainable"] for row in found["rows"]) == trainable
    assert found["macs_per_token"] > 0


def test_multiplications_are_the_cheaper_order():
    found = json.loads(run("params", "--a1", 4, "--a2", 64, "--targets", "o", "--json"))
    row = next(row for row in found["rows"] if row["in"] == 1280)
    assert row["macs_per_token"] == 120 * 30_720 and row["base_macs_per_token"] == 120 * 1_638_400


@pytest.mark.parametrize("model", ["sd15", "sd14", "sd21", "toybox"])
def test_other_models_as_tables(model):
    output = run("params", "--model", model)
    assert "of base" in output and "all " in output
    assert json.loads(run("params", "--model", model, "--json"))["trainable"] > 0


def test_counting_imports_no_diffusers():
    code = (
        "import sys; sys.argv = ['x', 'params', '--model', 'sdxl', '--json']\n"
        "from diffusekrona_train.cli.inspect import app\n"
        "app(standalone_mode=False)\n"
        "print([name for name in ('diffusers', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[0])["trainable"] == 3_874_560
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", ["inspect", "convert"])
def test_help_imports_nothing_heavy(name):
    code = (
        f"import sys; from diffusekrona_train.cli.{name} import app\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(app, ['--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'numpy', 'pydantic', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_local_pipeline_folder(tmp_path):
    folder = make_pipeline("sdxl", tmp_path / "pipe")
    unet = make_unet("sdxl")
    found = json.loads(run("params", "--model", folder, "--a1", 4, "--a2", 8, "--json"))
    assert found["base"] == sum(parameter.numel() for parameter in unet.parameters())
    layers = find_layers(unet, AdapterConfig())
    assert found["layers"] == len(layers)
    assert found["trainable"] == sum(32 + layer.in_features * layer.out_features // 32 for layer in layers)


def test_the_grid_is_table_2():
    output = run("grid", "--model", "sdxl")
    for count in ("3,874,560", "238,799,040", "4,704,120", "9,233,340", "1,613,280"):
        assert count in output
    assert "a1 = 1 row" in output
    found = json.loads(run("grid", "--json"))
    for a1, row in zip(found["a1"], found["trainable"], strict=True):
        for a2, count in zip(found["a2"], row, strict=True):
            assert count == 560 * a1 * a2 + 955_187_200 // (a1 * a2)
    assert "-" in run("grid", "--model", "toybox").splitlines()[2]  # 128 does not divide 64


def test_mistakes_are_one_line():
    run("params", "--a1", 7, fails="nearest divisors")
    run("params", "--a1", 0, fails="a1")
    run("params", "--model", "sdx", fails="did you mean 'sdxl'")
    run("params", "--targets", "qx", fails="targets")
    run("params", "--params", "many", fails="many")
    run("params", "--params", "1k", fails="smallest factors")
    run("params", "--blocks", "uq_blocks.0", fails="up_blocks.0")
    run("params", "--adapter", "lokr", "--factor", 0, fails="factor")
    run("factors", "none.safetensors", "--output", "x", fails="no such file")


def test_factors_pictures_a_file_with_and_without_its_base(tmp_path):
    folder = make_pipeline("sd15", tmp_path / "pipe")
    path, plain, out = tmp_path / "dog.safetensors", tmp_path / "plain.safetensors", tmp_path / "out"
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    unet.requires_grad_(False)
    saved(unet, AdapterConfig(a1=4, a2=8), path)
    output = run("factors", path, "--output", out)
    assert "absolute norms only" in output and "owner/name" in output
    assert json.loads((out / "spectra.json").read_text())["norms"] == "absolute"
    output = run("factors", path, "--output", out, "--model", folder)
    assert "relative to the weights" in output
    assert {file.name for file in out.iterdir()} == {"factors.png", "norms.png", "singular_values.png", "spectra.json"}
    rows = json.loads((out / "spectra.json").read_text())["layers"]
    file = read_adapter(path)
    for row in rows[::16]:
        group = file.groups[row["name"]]
        weight: Any = unet.get_submodule(row["name"]).weight
        relative = group["lokr_w1"].norm() * group["lokr_w2"].norm() / weight.norm()
        assert row["relative"] == pytest.approx(float(relative), rel=1e-5)
    write_adapter(plain, file, own_json=False)
    run("factors", plain, "--output", out, fails="give --model")
    summary = json.loads(run("factors", plain, "--output", out, "--model", folder, "--json"))
    assert len(summary["layers"]) == len(file.layers)
