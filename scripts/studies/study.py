"""Studies and model bases as strict YAML: what is varied, from what, and for which subjects.

The study `confirm` has subjects that nobody tuned on: a folder of photos for each, named subject-class.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from diffusekrona_train.config import one_line, read_yaml
from diffusekrona_train.config.base import Strict
from diffusekrona_train.config.strengths import LARGEST, parse_strengths
from diffusekrona_train.data import is_image, printable
from diffusekrona_train.evaluation.inputs import Suite, SuiteRow, load_suite
from scripts.studies.records import METRICS

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "paper"
MODELS = ("toybox", "toybox-flow", "sdxl", "sd15")
KIN = {"toybox-flow": "toybox"}
"""Model -> the one whose values and fields it takes where a study has none of its own for it."""


class Sampling(Strict):
    """How the pictures of a value are drawn, where it differs from the base."""

    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    """Classifier-free guidance scale."""
    strength: Annotated[float, Field(ge=0, le=LARGEST)] | None = None
    """Multiplies what the adapter adds."""
    strength_schedule: str | None = None
    """Strength over the noise levels, as `krona-sample --strength-schedule`."""

    @model_validator(mode="after")
    def _schedule_is_one(self) -> Sampling:
        parse_strengths(self.strength_schedule or "")
        return self


class BaseSampling(Strict):
    """How pictures are drawn where a study does not say otherwise."""

    steps: Annotated[int, Field(ge=1, le=1000)]
    """Sampling steps."""
    guidance: Annotated[float, Field(ge=0, le=100)]
    """Classifier-free guidance scale."""


class Base(Strict):
    """What every study of a model starts from."""

    suite: str
    """Suite that the subjects come from: their class, identifier and photos."""
    subjects: Annotated[list[str], Field(min_length=1)]
    """Names in the suite; the studies that ask for `subjects: all` take the whole suite."""
    config: dict[str, Any]
    """The training config, without subject and output."""
    prompts: Annotated[list[str], Field(min_length=1)]
    """Evaluation prompts with [V] and {class}."""
    pictures: Annotated[int, Field(ge=1)]
    """Pictures of each prompt; their seeds are seed * pictures, seed * pictures + 1, …"""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Pictures drawn at once."""
    sampling: BaseSampling
    """Sampling steps and guidance."""


class Series(Strict):
    """One line of the plot: fields that hold for all values."""

    label: str = ""
    """Its name."""
    set: dict[str, Any] = {}
    """Config fields by dotted name."""
    models: dict[Literal["toybox", "toybox-flow", "sdxl", "sd15"], dict[str, Any]] = {}
    """Config fields that hold for one model, such as its tuned rate; toybox-flow takes toybox's if it has none."""
    sample: Sampling = Sampling()
    """Sampling settings that differ from the base's."""

    def fields_for(self, model: str) -> dict[str, Any]:
        """The config fields that hold for a model."""
        by_model: dict[str, dict[str, Any]] = {**self.models}
        return {**self.set, **(by_model.get(model) or by_model.get(KIN.get(model, ""), {}))}


class Value(Strict):
    """One row of the table."""

    label: str
    """Its name."""
    x: float | None = None
    """Its place on the plot's axis; none puts the values side by side."""
    set: dict[str, Any] = {}
    """Config fields by dotted name."""
    sample: Sampling = Sampling()
    """Sampling settings that differ from the base's."""
    section: str = ""
    """The part of the table it stands in."""
    reference: bool = False
    """The row that the others are compared with; none marked takes the first."""
    against: str = ""
    """Label of another value of its section: the table ends with the difference to it too."""
    untrained: bool = False
    """The base model without an adapter, on the prompts without the identifier."""


class Bar(Strict):
    """What a study has to show, written down before its runs."""

    kind: Literal["hypervolume", "one rate", "floor"]
    """hypervolume: `least` more than `against`, above 0 in at least `subjects` subjects; one rate: there is a value at
    which each series is within `within` of its own best; floor: no value of a series ends further below its best."""
    methods: Annotated[list[str], Field(min_length=1)]
    """Labels of the series that it is for."""
    metric: Literal["dino", "clip_t"] = "dino"
    """What `one rate` and `floor` look at."""
    least: float = 0.0
    """hypervolume: the smallest mean difference that counts."""
    subjects: Annotated[int, Field(ge=0)] = 0
    """hypervolume: in how many subjects the difference has to be above 0."""
    within: Annotated[float, Field(ge=0)] = 0.0
    """one rate, floor: how far below the best is near enough."""


class Dropped(Strict):
    """What was tried and is not pursued."""

    what: str
    """The variant."""
    why: str
    """What spoke against it."""


class Judge(Strict):
    """How the series of a study are compared."""

    against: str
    """Label of the series that the others are compared with."""
    selected_on: list[str] = []
    """Subjects that the series were chosen on; the verdict is told with and without them."""
    keep: Annotated[int, Field(ge=0)] = 0
    """How many of the best go on to the next stage, beside those of `always`."""
    always: list[str] = []
    """Labels of the series that go on whatever they reach."""
    bars: list[Bar] = []
    """What counts as shown."""
    dropped: list[Dropped] = []
    """What was tried and is not pursued."""


class Study(Strict):
    """A figure or table of the paper: a base config and the values to vary."""

    title: str
    """What is varied."""
    paper: str
    """The paper's figures and tables."""
    axis: str
    """What the plot's axis shows."""
    log_axis: bool = False
    """Draw the axis logarithmically."""
    subjects: Annotated[str, Field(pattern="^(base|all)$")] = "base"
    """The base's subjects, or all of its suite."""
    prompts: Annotated[str, Field(pattern="^(base|suite)$")] = "base"
    """The base's prompts, or the suite's own."""
    metrics: Annotated[list[Literal["clip_i", "clip_t", "dino", "copy", "gallery", "rank"]], Field(min_length=1)] = [
        *METRICS
    ]
    """What the table shows."""
    sample: Sampling = Sampling()
    """Sampling settings of all rows."""
    strengths: Annotated[list[Annotated[float, Field(gt=0, le=LARGEST)]], Field(min_length=1)] = [1.0]
    """Every value is sampled at each of these strengths."""
    judge: Judge | None = None
    """Compare the series by the area that their values and strengths dominate together."""
    rows: Annotated[str, Field(pattern="^(values|subjects)$")] = "values"
    """What a row of the table is."""
    series: Annotated[list[Series], Field(min_length=1)] = [Series()]
    """Every value is tried in every series."""
    spread_of_series: bool = False
    """End the table with how far each series' scores spread over the values."""
    values: dict[str, Annotated[list[Value], Field(min_length=1)]]
    """Values by model; `default` is for models that are not named, toybox-flow takes toybox's if it is not."""

    @model_validator(mode="after")
    def _keys_are_known(self) -> Study:
        for name, rows in self.values.items():
            if name not in (*MODELS, "default"):
                raise ValueError(f"values: {name} is no model; there are {', '.join(MODELS)} and default")
            marks = [(value.section, value.label) for value in rows]
            if twice := [label for label in marks if marks.count(label) > 1]:
                raise ValueError(f"values.{name}: {twice[0][1]} is there twice")
            for value in rows:
                if value.against and (value.section, value.against) not in marks:
                    raise ValueError(f"values.{name}: {value.label} is against {value.against!r}, which is not there")
        if self.judge:
            labels = [series.label for series in self.series]
            named = [self.judge.against, *self.judge.always, *(name for bar in self.judge.bars for name in bar.methods)]
            if lost := [name for name in named if name not in labels]:
                raise ValueError(f"judge: {lost[0]!r} is no series; there are {', '.join(labels)}")
            if len(set(labels)) < len(labels):
                raise ValueError("series: two have the same label")
        return self

    def values_for(self, model: str) -> list[Value]:
        """The values of a model; ValueError where the study has none for it."""
        names = (model, KIN.get(model, model), "default")
        found = next((self.values[name] for name in names if name in self.values), None)
        if found is None:
            raise ValueError(f"{self.title}: there are no values for {model}")
        return found


Kind = TypeVar("Kind", bound=Strict)


def known_studies() -> list[str]:
    """Return the names of the paper's studies."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def further_studies() -> list[str]:
    """Return the names of the studies beyond the paper, which `all` leaves out."""
    return sorted(path.stem for path in (FOLDER / "method").glob("*.yaml"))


def load_studies(names: list[str]) -> dict[str, Study]:
    """Studies by name, `all` for every one, or YAML files of one's own; ValueError of one line."""
    wanted = [each for name in names for each in (known_studies() if name == "all" else [name])]
    found = {}
    for name in dict.fromkeys(wanted):
        places = {each: FOLDER / f"{each}.yaml" for each in known_studies()}
        places |= {each: FOLDER / "method" / f"{each}.yaml" for each in further_studies()}
        path = places.get(name, Path(name))
        if not path.is_file():
            raise ValueError(f"study {name!r} is not known; there are {', '.join(places)} and all")
        found[path.stem] = _read(path, Study)
    return found


def load_base(model: str, path: Path | None = None) -> Base:
    """The base of a model, or of a YAML file in its place."""
    if path is None and model not in MODELS:
        raise ValueError(f"--model {model!r} is not known; there are {', '.join(MODELS)}")
    return _read(path or FOLDER / "models" / f"{model}.yaml", Base)


def _read(path: Path, kind: type[Kind]) -> Kind:
    try:
        return kind.model_validate(read_yaml(path))
    except ValidationError as error:
        raise ValueError(f"{path.name}: {one_line(error, kind)}") from None


# ---- subjects to confirm with ----------------------------------------------------------------------------------------

CONFIRM = "confirm"
FEWEST, MOST = 3, 10
"""Photos of a subject."""
SHAPE = "name it subject-class, such as rex-toy_dinosaur (the class follows the last hyphen, _ is a space)"


def suite_to_confirm(folder: Path | None, base: Base) -> Suite:
    """Return the subjects of a folder as a suite; ValueError of one line where a folder is no subject.

    Hidden entries and files beside the folders are left out.
    """
    if folder is None:
        raise ValueError(
            f"{CONFIRM} needs --photos FOLDER, with a folder of {FEWEST} to {MOST} photos for each subject"
        )
    if not folder.is_dir():
        raise ValueError(f"--photos {printable(str(folder))}: is not a folder")
    found = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise ValueError(f"--photos {printable(str(folder))}: holds no folder of photos; {SHAPE}")
    rows = [_row_of(path) for path in found]
    return Suite(name=CONFIRM, prompts={"all": base.prompts}, rows=rows)


def _row_of(folder: Path) -> SuiteRow:
    name, shown = folder.name, f"--photos: {printable(folder.name)}"
    subject, hyphen, noun = name.rpartition("-")
    noun = noun.replace("_", " ").strip()
    if not hyphen or not subject or not noun or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"{shown}: does not say what the subject is; {SHAPE}")
    count = sum(is_image(path) for path in folder.iterdir())
    if not FEWEST <= count <= MOST:
        raise ValueError(f"{shown}: holds {count} photos; give {FEWEST} to {MOST}")
    return SuiteRow.model_validate({"name": name, "class": noun})


def look_alikes() -> list[str]:
    """Return where the photos of toybox's sprites are; they join the folder's other subjects in the gallery."""
    return [row.images for row in load_suite("toybox").rows if row.images]
