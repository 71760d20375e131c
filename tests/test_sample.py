"""The sampling path against diffusers' own pipelines, and krona-sample from plan to picture."""

from __future__ import annotations

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusekrona_train.adapters.formats import save_adapter
from diffusekrona_train.adapters.inject import inject
from diffusekrona_train.cli.sample import app
from diffusekrona_train.config import AdapterConfig
from diffusekrona_train.models import open_model
from diffusekrona_train.models.schedulers import SCHEDULERS, build_scheduler, check_scheduler
from diffusekrona_train.sampling import plan as pictures
from diffusekrona_train.sampling import session as studio
from diffusekrona_train.sampling.render import SampleSettings, noise_generator, render
from tests.runs import finish, start, world_env
from tests.tiny import make_pipeline

FEW = SampleSettings(steps=3, guidance=4.0, height=64, width=64)
JOBS = [("a dog on the grass", 0), ("a red car on the road", 3), ("a cat in the snow", 1), ("a dog on the grass", 2)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """toybox and tiny SD pipelines, loaded; two adapters of the toybox as files."""
    root = tmp_path_factory.mktemp("world")
    sources = {"toybox": open_model("toybox")}
    for kind, prediction in (("sd15", "epsilon"), ("sd21", "v_prediction"), ("sdxl", "epsilon")):
        sources[kind] = open_model(str(make_pipeline(kind, root / kind, prediction_type=prediction)))
    pipes = {kind: found.family.pipeline(found.load()) for kind, found in sources.items()}
    unet = pipes["toybox"].unet
    for i, token in enumerate(("sks", "zwx")):
        injection = inject(unet, AdapterConfig(a1=4, a2=4), seed=i)
        dice = torch.Generator().manual_seed(i)
        for parameter in injection.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=dice)
        about = {"model": "toybox", "token": token, "class": "dog", "resolution": 64, "step": 7}
        save_adapter(root / f"{token}.safetensors", injection, about)
        injection.eject()
    return {"root": root, "sources": sources, "pipes": pipes}


def levels(a, b) -> int:
    return int(np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max())


def door(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


# --- render


def test_noise_depends_on_prompt_and_seed_alone():
    def draw(prompt, seed):
        return torch.randn(4, generator=noise_generator(prompt, seed))

    assert torch.equal(draw("a dog", 1), draw("a dog", 1))
    assert not torch.equal(draw("a dog", 1), draw("a dog", 2))
    assert not torch.equal(draw("a dog", 1), draw("a cat", 1))
    # frozen: a new release must draw the same pictures
    assert noise_generator("a dog", 1).initial_seed() == 4764372755943792478


@pytest.mark.parametrize("kind", ["toybox", "sd15", "sd21", "sdxl"])
@pytest.mark.parametrize("negative", ["", "a cat"])
def test_render_is_diffusers_pipeline_with_its_own_text_encoding(world, kind, negative):
    pipe, family = world["pipes"][kind], world["sources"][kind].family
    settings = SampleSettings(steps=3, guidance=4.0, negative=negative, height=64, width=64)
    (ours,) = render(pipe, family, JOBS[:1], settings)
    channels, side = pipe.unet.config.in_channels, 64 // pipe.vae_scale_factor
    noise = torch.randn((1, channels, side, side), generator=noise_generator(*JOBS[0]))
    theirs = pipe(
        JOBS[0][0],
        negative_prompt=negative or None,
        latents=noise,
        num_inference_steps=3,
        guidance_scale=4.0,
        height=64,
        width=64,
    ).images[0]
    assert levels(ours, theirs) == 0


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_batches_of_1_and_4_agree_with_every_scheduler(world, scheduler):
    pipe, family = world["pipes"]["toybox"], world["sources"]["toybox"].family
    before = pipe.scheduler
    settings = SampleSettings(steps=3, guidance=4.0, scheduler=scheduler)
    one, four = (render(pipe, family, JOBS, settings, batch_size=size) for size in (1, 4))
    assert max(levels(a, b) for a, b in zip(one, four, strict=True)) <= 2
    assert pipe.scheduler is before
    assert levels(one[0], one[1]) > 8


def test_a_picture_does_not_depend_on_its_neighbours_and_comes_as_it_is_made(world):
    pipe, family = world["pipes"]["sd15"], world["sources"]["sd15"].family
    seen = []
    alone = render(pipe, family, [JOBS[2]], FEW)
    among = render(pipe, family, JOBS, FEW, on_image=lambda index, picture: seen.append((index, picture)))
    assert levels(alone[0], among[2]) == 0
    assert [index for index, _ in seen] == [0, 1, 2, 3] and seen[2][1] is among[2]


def test_cached_embeddings_give_bitwise_the_same_picture_without_text_encoders(world):
    source = world["sources"]["toybox"]
    texts = studio.encode_texts(source, [JOBS[0][0], ""], torch.device("cpu"))
    pipe = source.family.pipeline(source.load("denoiser", "vae", "scheduler"))
    cached = render(pipe, source.family, JOBS[:1], FEW, conditioning_of=texts.__getitem__)
    assert levels(cached[0], render(world["pipes"]["toybox"], source.family, JOBS[:1], FEW)[0]) == 0


def test_no_guidance_and_other_shapes(world):
    pipe, family = world["pipes"]["toybox"], world["sources"]["toybox"].family
    (picture,) = render(pipe, family, JOBS[:1], SampleSettings(steps=2, guidance=0, height=32, width=48))
    assert picture.size == (48, 32)
    assert render(pipe, family, JOBS[:1], SampleSettings(steps=1))[0].size == (64, 64)


def test_every_scheduler_keeps_the_models_noise_and_prediction(world):
    own = world["pipes"]["toybox"].scheduler
    for name in SCHEDULERS:
        built = build_scheduler(name, own)
        assert built.config.prediction_type == "v_prediction" and built.config.beta_end == own.config.beta_end
    with pytest.raises(ValueError, match="did you mean 'euler_a'"):
        check_scheduler("euler_b")


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("guidance", -1), ("guidance", float("nan")), ("height", 65), ("width", 4)]
)
def test_settings_that_cannot_be_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        SampleSettings(**{field: value})


# --- plan


def test_the_plan_sorts_and_every_difference_has_its_own_name():
    plan = pictures.plan_pictures(
        ["a dog", "a cat"], [0, 1], FEW, sweeps=[pictures.parse_sweep("guidance=1,2.5,10")], with_base=True
    )
    assert len(plan) == len({item.file for item in plan}) == 2 * 2 * 2 * 3
    prompts = [item.prompt for item in sorted(plan, key=lambda item: item.file)]
    assert prompts == ["a dog"] * 12 + ["a cat"] * 12
    other = pictures.plan_pictures(["a dog"], [0], FEW, about={"model": "other"})
    assert other[0].file not in {item.file for item in plan}
    assert pictures.plan_pictures(["a dog"], [0], FEW) == pictures.plan_pictures(["a dog"], [0], FEW)


def test_sweeps_of_scale_seed_and_names():
    sweeps = [pictures.parse_sweep("scale=0,0.5,1"), pictures.parse_sweep("seed=3,4")]
    plan = pictures.plan_pictures(["a dog"], [0, 1], FEW, sweeps=sweeps, with_base=True)
    assert {(item.scale, item.seed) for item in plan} == {(s, n) for s in (None, 0.0, 0.5, 1.0) for n in (3, 4)}
    assert pictures.parse_sweep("scheduler=ddim,euler") == ("scheduler", ["ddim", "euler"])
    for text, message in (("cfg=1", "use one of steps"), ("steps=a", "of type int"), ("steps", "write OPTION=v1,v2")):
        with pytest.raises(ValueError, match=message):
            pictures.parse_sweep(text)
    with pytest.raises(ValueError, match="twice"):
        pictures.plan_pictures(["a"], [0], FEW, sweeps=[("steps", [1]), ("steps", [2])])


def test_stops_and_shares_leave_batches_alone(tmp_path):
    plan = pictures.plan_pictures(["a", "b", "c"], range(3), FEW, sweeps=[("steps", [1, 2])], with_base=True)
    drawn: list[list] = []

    def paint(batch):
        drawn.append([item.file for item in batch])
        return [Image.new("RGB", (8, 8)) for _ in batch]

    whole = [[item.file for item in batch] for batch in pictures.batches(plan, 4)]
    assert sorted(sum(whole, [])) == sorted(item.file for item in plan)
    assert all(len({(i.scale, i.settings) for i in batch}) == 1 for batch in pictures.batches(plan, 4))
    for rank in (0, 1):
        list(pictures.draw(plan, tmp_path, paint, batch_size=4, rank=rank, world=2))
    assert sorted(drawn) == sorted(whole)
    gone = random.Random(0).sample([item.file for item in plan], 5)
    for name in gone:
        (tmp_path / name).unlink()
    drawn.clear()
    assert len(list(pictures.draw(plan, tmp_path, paint, batch_size=4))) == 5
    assert all(batch in whole and set(batch) & set(gone) for batch in drawn)
    drawn.clear()
    assert len(list(pictures.draw(plan, tmp_path, paint, batch_size=4))) == 0 and not drawn


# --- the door


def test_the_door_from_file_to_sheet(world, tmp_path):
    file, out = world["root"] / "sks.safetensors", tmp_path / "out"
    words = (file, "A [V] {class} on the beach", "--steps", 2, "--num-images", 2, "--output", out, "--base", "--sheet")
    done = door(*words)
    assert done.exit_code == 0, done.output
    drawn = sorted(out.glob("0*.png"))
    assert len(drawn) == 4 and len(list(out.glob("sheet-*.png"))) == 1
    rows = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [path.name for path in drawn]
    record = json.loads(Image.open(drawn[-1]).info["krona"])
    expected = {
        "prompt": "A sks dog on the beach",
        "seed": 1,
        "steps": 2,
        "guidance": 4.0,
        "model": "toybox",
        "scale": 1.0,
    }
    assert expected.items() <= record.items() and {"file": drawn[-1].name, **record} == rows[-1]
    assert record["adapters"][0]["file"] == "sks.safetensors"
    assert "Steps: 2" in Image.open(drawn[-1]).info["parameters"]
    assert str(world["root"]) not in json.dumps(rows)
    assert Image.open(drawn[-1]).size == (64, 64)

    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in drawn}
    again = door(*words)
    assert again.exit_code == 0 and "4 were there already" in again.output
    assert all(path.stat().st_mtime_ns == before[path][0] for path in drawn)
    drawn[1].unlink()
    assert "1 new" in door(*words).output and drawn[1].read_bytes() == before[drawn[1]][1]
    assert "4 new" in door(*words, "--overwrite").output
    assert all(path.read_bytes() == before[path][1] for path in drawn)


def render_with_file(world, *, fuse: bool, scale: float = 1.0, keep: bool = True):
    source = world["sources"]["toybox"]
    subjects = studio.subjects_of([(world["root"] / "sks.safetensors", 1.0)])
    room = studio.Studio(
        source, subjects, [job[0] for job in JOBS] + [""], studio.Memory(fuse=fuse), torch.device("cpu")
    )
    plan = [pictures.plan_pictures([prompt], [seed], FEW, scale=scale)[0] for prompt, seed in JOBS]
    paint = room.painter([scale], keep)
    pictures_ = [paint([item])[0] for item in plan]
    copies = [module for module in room.pipe.unet.modules() if "_unfused_weight" in module.__dict__]
    assert bool(copies) == (fuse and keep)
    return pictures_


def test_fused_and_apart_agree_and_scale_0_is_the_base(world):
    apart, fused = render_with_file(world, fuse=False), render_with_file(world, fuse=True)
    base = render(world["pipes"]["toybox"], world["sources"]["toybox"].family, JOBS, FEW)
    assert max(levels(a, b) for a, b in zip(apart, fused, strict=True)) <= 2
    assert min(levels(a, b) for a, b in zip(apart, base, strict=True)) > 8
    nothing = render_with_file(world, fuse=False, scale=0.0)
    assert all(levels(a, b) == 0 for a, b in zip(nothing, base, strict=True))
    alone = render_with_file(world, fuse=True, keep=False)
    assert all(levels(a, b) == 0 for a, b in zip(alone, fused, strict=True))


def test_a_picture_made_while_training_is_bitwise_the_doors(world, tmp_path):
    """The model as training holds it (adapter apart, cached embeddings) against the saved file."""
    source = world["sources"]["toybox"]
    parts = source.load("denoiser", "vae", "scheduler")
    injection = inject(parts["denoiser"], AdapterConfig(a1=4, a2=4), seed=5)
    for parameter in injection.parameters():
        parameter.data += 0.05
    texts = studio.encode_texts(source, ["A sks dog in the snow", ""], torch.device("cpu"))
    (trained,) = render(
        source.family.pipeline(parts),
        source.family,
        [("A sks dog in the snow", 4)],
        FEW,
        conditioning_of=texts.__getitem__,
    )
    save_adapter(tmp_path / "run.safetensors", injection, {"model": "toybox", "token": "sks", "class": "dog"})
    done = door(
        tmp_path / "run.safetensors",
        "A [V] dog in the snow",
        "--seed",
        4,
        "--steps",
        3,
        "--no-fuse",
        "--output",
        tmp_path,
    )
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("0*.png")
    assert levels(trained, Image.open(path)) == 0


def test_two_subjects_and_sweeps(world, tmp_path):
    first, second = world["root"] / "sks.safetensors", world["root"] / "zwx.safetensors"
    common = ("--steps", 1, "--output", tmp_path)
    done = door("--adapter", f"{first}:0.7", "--adapter", second, "A [V1] dog and a [V2] cat", *common)
    assert done.exit_code == 0, done.output
    (row,) = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert row["prompt"] == "A sks dog and a zwx cat"
    assert [item["strength"] for item in row["adapters"]] == [0.7, 1.0]
    done = door("--adapter", first, "--prompt", "A [V] dog", "--sweep", "guidance=1,5", "--sweep", "scale=0,1", *common)
    assert done.exit_code == 0 and "4 images" in done.output


def test_a_prompt_without_the_identifier_is_warned_about(world, tmp_path):
    done = door(world["root"] / "sks.safetensors", "A dog", "--steps", 1, "--output", tmp_path)
    assert done.exit_code == 0 and "warning: prompt 'A dog' does not name the subject of sks.safetensors" in done.output


def test_the_bare_base_prompts_file_and_quantised(tmp_path):
    (tmp_path / "prompts.txt").write_text("# comment\na dog on the grass\n\na café\n", encoding="utf-8")
    words = (
        "--model",
        "toybox",
        "--prompts-file",
        tmp_path / "prompts.txt",
        "--steps",
        1,
        "--output",
        tmp_path / "out",
    )
    assert "2 images" in door(*words).output
    quantised = door(*words, "--quantize", "nf4", "--vae-tiling", "--vae-slicing")
    assert quantised.exit_code == 0 and len(list((tmp_path / "out").glob("*.png"))) == 4


def test_noise_by_seed_alone_is_the_same_for_every_prompt(world):
    """What the pipeline is handed as its first latents."""
    pipe, family = world["pipes"]["toybox"], world["sources"]["toybox"].family
    blind = SampleSettings(steps=1, guidance=1.0, height=64, width=64, noise="seed")
    starts = []
    pipe_call = type(pipe).__call__

    def listening(self, *arguments, latents, **more):
        starts.append(latents.clone())
        return pipe_call(self, *arguments, latents=latents, **more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(pipe), "__call__", listening)
        render(pipe, family, [("a dog", 3), ("a cat", 3), ("a cat", 4)], blind, batch_size=3)
        render(pipe, family, [("a dog", 3), ("a cat", 3)], FEW, batch_size=2)
    by_seed, by_prompt = starts
    assert torch.equal(by_seed[0], by_seed[1]) and not torch.equal(by_seed[1], by_seed[2])
    assert torch.equal(by_seed[0], torch.randn(by_seed[0].shape, generator=noise_generator("", 3)))
    assert not torch.equal(by_prompt[0], by_prompt[1])
    with pytest.raises(ValueError, match="noise is 'sed'; give prompt or seed"):
        SampleSettings(noise="sed")


def test_the_door_takes_noise_and_pictures_of_before_keep_their_names(world, tmp_path):
    words = ("--model", "toybox", "a dog on the grass", "--steps", 1, "--output", tmp_path)
    assert door(*words).exit_code == 0 and door(*words, "--noise", "seed").exit_code == 0
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and sorted(row.get("noise", "-") for row in rows) == ["-", "seed"]
    before = next(row for row in rows if "noise" not in row)
    key = hashlib.sha256(json.dumps({k: v for k, v in before.items() if k != "file"}, sort_keys=True).encode())
    assert before["file"].endswith(f"-{key.hexdigest()[:8]}.png")
    wrong = door(*words, "--noise", "sed")
    assert wrong.exit_code == 2 and "noise is 'sed'" in wrong.output


def test_what_a_prompt_says_in_vain_is_told_and_kept(world, tmp_path):
    long = "a (small:1.3) dog, sitting, standing, looking, small, large, brown, white, black, young, on the beach"
    words = ("--model", "toybox", long, "--steps", 1, "--output", tmp_path)
    for _ in range(2):  # the second call draws nothing and tells it again
        done = door(*words)
        assert done.exit_code == 0 and "on the beach' is not read: it has" in done.output
        assert "'(small:1.3)' means something to other programs" in done.output
        (row,) = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
        assert row["not_read"].endswith("on the beach") and long.endswith(row["not_read"])


def test_two_adapters_with_one_identifier_are_told():
    several = [studio.Subject(None, token=token) for token in ("sks", "ohwx", "SKS", None, None)]  # type: ignore[arg-type]
    (told,) = studio.shared_identifiers(several)
    assert told.startswith("[V1] and [V3] have the same identifier token, 'sks'")
    assert studio.shared_identifiers(several[:2]) == []


def test_run_folders_name_their_adapters(world, tmp_path):
    run = tmp_path / "dog"
    data = (world["root"] / "sks.safetensors").read_bytes()
    for step in (100, 200):
        (run / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
        (run / "checkpoints" / f"step-{step:06d}" / "adapter.safetensors").write_bytes(data)
    assert studio.find_adapter(run).parent.name == "step-000200"
    assert studio.find_adapter(run, 100).parent.name == "step-000100"
    with pytest.raises(ValueError, match="has checkpoints at steps 100, 200"):
        studio.find_adapter(run, 300)
    (run / "dog.safetensors").write_bytes(data)
    assert studio.find_adapter(run) == run / "dog.safetensors"
    (run / "config.yaml").write_text(f"model: toybox\nsubject: {{images: x, class: dog}}\noutput: {run}\n")
    done = door(run, "A [V] dog", "--steps", 1, "--checkpoint", 100)
    assert done.exit_code == 0, done.output
    assert len(list((run / "pictures").glob("0*.png"))) == 1


def test_two_processes_share_the_work_and_make_the_same_pictures(world, tmp_path):
    file = str(world["root"] / "sks.safetensors")

    def sample(folder):
        return lambda: app([file, "A [V] dog", "--steps", "1", "--num-images", "4", "--output", str(folder)])

    children = [start(sample(tmp_path / "two"), tmp_path / f"log{i}", **env) for i, env in enumerate(world_env(2))]
    assert [finish(child) for child in children] == [0, 0], (tmp_path / "log0").read_text()
    alone = start(sample(tmp_path / "one"), tmp_path / "log")
    assert finish(alone) == 0
    one, two = (sorted((tmp_path / name).glob("0*.png")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 4
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(one, two, strict=True))
    assert (tmp_path / "one" / "manifest.jsonl").read_text() == (tmp_path / "two" / "manifest.jsonl").read_text()
    assert "2 by this process" in (tmp_path / "log0").read_text()


MISTAKES = [
    (("nowhere.safetensors", "a [V]"), "no such run folder or adapter file"),
    (("A [V] dog",), "is a prompt; put a run folder or adapter file before it"),
    (("FILE",), "no prompt is given"),
    (("FILE", "a [V2]"), "[V2] has no adapter"),
    (("FILE", "a [V]", "--checkpoint", "3"), "--checkpoint 3 needs a run folder"),
    (("FILE", "a [V]", "--scheduler", "eulr"), "did you mean 'euler'"),
    (("FILE", "a [V]", "--sweep", "colour=1"), "unknown option; use one of"),
    (("FILE", "a [V]", "--sweep", "steps=0,1"), "steps is 0"),
    (("FILE", "a [V]", "--height", "63"), "height is 63"),
    (("FILE", "a [V]", "--dtype", "half"), "--dtype 'half'"),
    (("FILE", "a [V]", "--quantize", "nf4", "--offload", "sequential"), "cannot move a quantised base"),
    (("FILE", "a [V]", "--model", "nothing"), "is not known"),
    (("FILE", "a [V]", "--model", "SD15"), "is of family sd"),
    (("--model", "toybox", "a [V]"), "[V] has no adapter"),
    (("--model", "toybox-flow", "a dog", "--scheduler", "euler"), "predicts a flow and has its own"),
    (("FILE", "a [V]", "--offload", "model"), "but there is no GPU"),
    (("FILE", "--prompts-file", "missing.txt"), "missing.txt"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_line(world, tmp_path, words, message):
    given = {"FILE": str(world["root"] / "sks.safetensors"), "SD15": str(world["root"] / "sd15")}
    done = door(*(given.get(word, word) for word in words), "--output", tmp_path / "out")
    assert done.exit_code == 2, done.output
    line = done.stderr.strip()
    assert message in line and line.startswith("error: ") and "\n" not in line
    assert not list((tmp_path / "out").glob("*.png"))
