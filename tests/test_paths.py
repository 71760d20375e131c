"""Paths as people write them, prompts as other programs take them, and trackers that are not there."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from diffusekrona_train import cli
from diffusekrona_train.cli.train import app as train_app
from diffusekrona_train.common.files import read_text
from diffusekrona_train.config import load_config, make_config
from diffusekrona_train.config.paths import user_path
from diffusekrona_train.config.prompts import foreign_syntax, prompt_warnings, unread_part
from diffusekrona_train.models import open_model
from diffusekrona_train.sampling import session
from diffusekrona_train.training import setup

FIELDS = (
    "model",
    "vae",
    "text_encoders",
    "model_config_dir",
    "output",
    "subject.images",
    "subject.files",
    "data.cache_dir",
    "prior.images",
    "train.init_from",
)


def config_with(field: str, value: str):
    tree = {"subject": {"images": "photos", "class": "dog"}, "prior": {"kind": "images"}, "output": "runs/dog"}
    section, _, name = field.rpartition(".")
    place = tree.setdefault(section, {}) if section else tree
    place[name] = [value] if name in ("files", "text_encoders") else value
    return make_config(tree)


def value_of(config, field: str):
    for part in field.split("."):
        config = getattr(config, part)
    return config[0] if isinstance(config, list) else config


@pytest.mark.parametrize("field", FIELDS)
def test_every_path_of_a_config_is_filled_in_or_refused(field, monkeypatch):
    monkeypatch.setenv("KRONA_HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", r"C:\Users\me")
    monkeypatch.delenv("KRONA_NOWHERE", raising=False)
    for text, filled in {
        "$KRONA_HOME/x": "/home/me/x",
        "${KRONA_HOME}/x": "/home/me/x",
        r"%USERPROFILE%\x": r"C:\Users\me\x",
        "a $5 photo/x": "a $5 photo/x",
        "100%/x": "100%/x",
    }.items():
        assert value_of(config_with(field, text), field) == filled
    for text, said in {
        "$KRONA_NOWHERE/x": r"holds \$KRONA_NOWHERE, which is not set here",
        r"%KRONA_NOWHERE%\x": "holds %KRONA_NOWHERE%, which is not set here",
        "D:\train": r"holds a tab \(\\t\).*single quotes or forward slashes",
        "C:\new": r"holds a line end \(\\n\).*single quotes or forward slashes",
        "C:\x07lbum": r"control character '\\x07'",
        "a\x1b[31m": r"control character '\\x1b'",
        "~krona-no-such-user/x": "no such user",
    }.items():
        with pytest.raises(ValueError, match=rf"^{field}.*{said}") as caught:
            config_with(field, text)
        assert str(caught.value).isprintable()


def test_what_lies_there_under_the_very_name_stays(tmp_path, monkeypatch):
    monkeypatch.delenv("KRONA_NOWHERE", raising=False)
    odd = tmp_path / "$KRONA_NOWHERE"
    odd.mkdir()
    assert user_path(str(odd), "output") == str(odd)


@pytest.mark.parametrize("path", [r"C:\Users\me\dog", r"C:\dogs", r"D:\xylo"])
def test_a_windows_path_in_double_quotes_is_one_line_with_advice(path, tmp_path):
    file = tmp_path / "dog.yaml"
    file.write_text(f'subject: {{images: "{path}", class: dog}}\noutput: runs/dog\n')
    with pytest.raises(ValueError, match="use single quotes or forward slashes") as caught:
        load_config(file)
    assert "\n" not in str(caught.value)
    file.write_text(f"subject: {{images: '{path}', class: dog}}\noutput: runs/dog\n")
    assert load_config(file).subject.images == path


def test_paths_of_commands_are_filled_in_and_refused_alike(tmp_path, monkeypatch):
    monkeypatch.setenv("KRONA_HOME", str(tmp_path))
    monkeypatch.delenv("KRONA_NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog.yaml").write_text("subject: {images: nowhere, class: dog}\noutput: runs/dog\n")

    def call(*words):
        return CliRunner().invoke(train_app, list(words))

    assert "nowhere is not there" in call("--config", "$KRONA_HOME/dog.yaml", "--check", "--set", "model=toybox").output
    lost = call("--config", "$KRONA_NOWHERE/dog.yaml")
    assert lost.exit_code == 2 and "$KRONA_NOWHERE, which is not set here" in lost.output
    assert call("--config", "a\tb.yaml").exit_code == 2
    with pytest.raises(ValueError, match="KRONA_NOWHERE, which is not set"):
        session.parse_use("$KRONA_NOWHERE/dog.safetensors:0.5")
    with pytest.raises(ValueError, match="KRONA_NOWHERE, which is not set"):
        open_model("$KRONA_NOWHERE/model")
    assert list(tmp_path.iterdir()) == [tmp_path / "dog.yaml"]


def test_errors_reach_the_terminal_printable(capsys):
    @cli.guarded
    def broken():
        raise ValueError("photo \x1b[31mred\x07 is bad")

    with pytest.raises(SystemExit) as left:
        broken()
    said = capsys.readouterr().err
    assert left.value.code == 2 and r"\x1b[31mred\x07" in said and "\x1b" not in said


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_any_text_file_may_begin_with_its_mark(encoding, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("a dög\n# no\n".encode(encoding))
    assert cli.read_prompts_file(tmp_path / "prompts.txt") == ["a dög"]
    (tmp_path / "dog.yaml").write_bytes(b"" + "subject: {images: ä, class: dog}\noutput: runs/dog\n".encode(encoding))
    assert load_config(tmp_path / "dog.yaml").subject.images == "ä"
    assert read_text(tmp_path / "prompts.txt").startswith("a dög")


# --- prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a (sks dog:1.4) on the beach", "(sks dog:1.4)"),
        ("a (sks dog:2)", "(sks dog:2)"),
        ("a sks dog <lora:dog:0.8>", "<lora:dog:0.8>"),
        ("a <lyco:dog> dog", "<lyco:dog>"),
        ("a ((sks dog))", "((sks dog))"),
        ("a (sks dog)1.3", "(sks dog)1.3"),
        ("a dog++ here", "dog++"),
        ("a [dog:cat:0.5]", "[dog:cat:0.5]"),
        ("embedding:bad, dog", "embedding:bad"),
        ("a __colour__ dog", "__colour__"),
        ("a dog BREAK a beach", "BREAK"),
    ],
)
def test_the_syntax_of_other_programs_is_told(prompt, found):
    said = foreign_syntax(prompt)
    assert said is not None and repr(found) in said


@pytest.mark.parametrize(
    "prompt",
    ["a [V] {class}", "a dog (close up)", "a photo (16:9)", "at 12:30", r"pikachu \(pokemon:1.2\)", "well -- a dog"],
)
def test_plain_words_are_not_warned_about(prompt):
    assert foreign_syntax(prompt) is None


def test_the_words_that_are_not_read_are_those_that_change_nothing():
    """Against the text encoders' own input: cutting the named tail leaves the tokens as they are, one word more not."""
    tokenizers = open_model("toybox").load("tokenizers")["tokenizers"]
    prompt = "a dog, sitting, standing, looking, small, large, brown, white, black, young, on the beach"
    tail, count, room = unread_part(prompt, tokenizers)
    assert room == tokenizers[0].model_max_length - 2 and count == len(tokenizers[0].tokenize(prompt)) > room
    assert prompt.endswith(tail) and tail.endswith("on the beach")
    cut = {"truncation": True, "max_length": tokenizers[0].model_max_length}
    whole = tokenizers[0](prompt, **cut).input_ids
    kept = prompt.removesuffix(tail).rstrip()
    ours = tokenizers[0](kept, **cut).input_ids
    assert whole[: len(ours) - 1] == ours[:-1]
    assert len(tokenizers[0].tokenize(f"{kept} {tail.split()[0]}")) > room
    assert unread_part("a dog on the beach", tokenizers) == ("", 0, 0)
    (line,) = prompt_warnings([prompt, "a dog"], tokenizers)
    assert "on the beach' is not read" in line and f"{count} tokens" in line


def test_a_thousand_warnings_are_ten_and_a_number():
    lines = prompt_warnings(f"dog{number}++" for number in range(1000))
    assert len(lines) == 11 and lines[-1] == "and 990 more prompts like these"


# --- trackers ----------------------------------------------------------------------------------------------------


def with_trackers(*names):
    subject = {"images": "x", "class": "dog"}
    return make_config({"subject": subject, "train": {"trackers": [*names]}, "output": "runs/x"})


def test_a_tracker_that_is_not_installed_is_refused_with_the_pip_line(monkeypatch, tmp_path):
    there = {"tensorboardX"}
    monkeypatch.setattr(setup, "_is_installed", there.__contains__)
    setup.refuse_missing_trackers(with_trackers("tensorboard"))
    with pytest.raises(ValueError, match=r"trackers: comet_ml and aim are not installed; pip install comet-ml aim"):
        setup.refuse_missing_trackers(with_trackers("tensorboard", "comet_ml", "aim"))
    with pytest.raises(ValueError, match="wandb is not installed; pip install wandb"):
        setup.check_start(with_trackers("wandb"), None)  # what --check asks
    with pytest.raises(ValueError, match="wandb is not installed; pip install wandb"):
        setup.start_accelerator(with_trackers("wandb"), tmp_path)


def test_a_folder_of_a_trackers_logs_is_no_tracker(monkeypatch, tmp_path):
    (tmp_path / "kronalogs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not setup._is_installed("kronalogs") and setup._is_installed("json")
