"""What all sections of the config share: strictness, prompt placeholders, numbers such as 4M."""

from __future__ import annotations

import re
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from diffusekrona_train.config.paths import user_path


class Strict(BaseModel):
    PATHS: ClassVar[tuple[str, ...]] = ()
    """Fields that hold paths: their environment variables are filled in, control characters refused."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        populate_by_name=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @model_validator(mode="after")
    def _fill_paths(self) -> Self:
        for name in self.PATHS:
            value = getattr(self, name)
            if isinstance(value, str) and (filled := user_path(value, name)) != value:
                setattr(self, name, filled)
            elif isinstance(value, list):
                filled = [user_path(item, f"{name}[{index}]") for index, item in enumerate(value)]
                if filled != value:
                    setattr(self, name, filled)
        return self


def check_prompt(field: str, text: str) -> None:
    """Raise ValueError where `text` is empty or holds a placeholder that nothing would fill."""
    if not text.strip():
        raise ValueError(f"{field} is empty; write for instance 'A [V] {{class}}'")
    for unknown in re.findall(r"\{[^{}]*\}", text):
        if unknown != "{class}":
            raise ValueError(f"{field}: {text!r} holds {unknown}; only {{class}} is filled in")
    for unknown in re.findall(r"\[V[0-9]+\]", text):
        if unknown != "[V1]":
            raise ValueError(f"{field}: {text!r} holds {unknown}, and there is one subject: write [V]")


def parse_count(text: str) -> int:
    """Read '4M' as 4000000, '500k' as 500000, '1234' as 1234; ValueError otherwise."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kKmM]?)\s*", text)
    if not match:
        raise ValueError(f"{text!r} is not a number of parameters; write 4M, 500k or 4000000")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6}[match[2].lower()])
