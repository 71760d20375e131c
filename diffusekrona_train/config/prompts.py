"""What a text encoder will not read as its writer means it: the end of a long prompt, the syntax of other programs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_FOREIGN: list[tuple[re.Pattern[str], str]] = [
    (re.compile(r"<(?:lora|lyco|lycoris|loha|lokr|hypernet|embedding|ti)\s*:[^<>]*>", re.I), "load the file instead"),
    (re.compile(r"(?<!\\)\([^()]*?[^():\s]\s*:\s*[-+]?\d*\.\d+\s*\)"), "write only the words"),  # (sks dog:1.4)
    (re.compile(r"(?<!\\)\([^()]*?[^():\s\d]\s*:\s*[-+]?\d+\s*\)"), "write only the words"),  # (sks dog:2), not (16:9)
    (re.compile(r"\(\([^()]*\)\)"), "write only the words"),
    (re.compile(r"\([^()]+\)(?:[-+]{1,5}|\d*\.\d+)(?=\W|$)|\b\w+\+{2,5}(?=[\s,.]|$)"), "write only the words"),
    (re.compile(r"\[[^\[\]]*:[^\[\]]*:\s*\d*\.?\d+\s*\]"), "write one of them"),
    (re.compile(r"\bembedding:\w[\w.-]*", re.I), "load the file instead"),
    (re.compile(r"__[\w/-]+__"), "write the words out"),
    (re.compile(r"\b(?:BREAK|AND)\b"), "write one prompt"),
]
"""(a piece of a prompt that A1111, ComfyUI, compel and their kin give a meaning, what to write here)."""


MOST_LINES = 10
"""Warnings about prompts; of a thousand captions that are all too long the first few say enough."""


def prompt_warnings(texts: Iterable[str], tokenizers: Sequence[Any] = (), kind: str = "prompt") -> list[str]:
    """Return a line for each filled prompt that is too long for a text encoder or holds foreign syntax."""
    lines = []
    for text in dict.fromkeys(texts):
        lines += [f"{kind} {_short(text)}: {line}" for line in (unread(text, tokenizers), foreign_syntax(text)) if line]
    more = len(lines) - MOST_LINES
    return lines if more <= 0 else [*lines[:MOST_LINES], f"and {more} more {kind}s like these"]


def foreign_syntax(text: str) -> str | None:
    """Return what is to be said of `(sks dog:1.4)`, `<lora:dog:1>` and their like in a prompt; None without any."""
    for pattern, instead in _FOREIGN:
        match = pattern.search(text)
        if match:
            return (
                f"{_short(match[0], 40)} means something to other programs and is read as plain words here; {instead}"
            )
    return None


def unread(text: str, tokenizers: Sequence[Any]) -> str | None:
    """Return what is to be said of a text that is longer than an encoder reads; None for others."""
    tail, count, room = unread_part(text, tokenizers)
    if not tail:
        return None
    return f"its end {_short(tail)} is not read: it has {count} tokens, and the text encoder reads {room}"


def unread_part(text: str, tokenizers: Sequence[Any]) -> tuple[str, int, int]:
    """Return (the words at the end that no encoder reads whole, tokens of the text, tokens that are read).

    Of several text encoders the one counts that reads least; '' where all read everything.
    """
    worst = ("", 0, 0)
    for tokenizer in tokenizers:
        room = tokenizer.model_max_length - tokenizer.num_special_tokens_to_add()
        count = len(tokenizer.tokenize(text))
        if count > room:
            words = text.split()
            low, high = 0, len(words)
            while low < high:  # the most words that fit: tokens only grow with words
                middle = (low + high + 1) // 2
                fits = len(tokenizer.tokenize(" ".join(words[:middle]))) <= room
                low, high = (middle, high) if fits else (low, middle - 1)
            tail = " ".join(words[low:])
            worst = max(worst, (tail, count, room), key=lambda found: len(found[0]))
    return worst


def _short(text: str, limit: int = 80) -> str:
    """Quote a text, of a long one both ends: a prompt is known by its beginning and cut at its end."""
    return repr(text if len(text) <= limit else f"{text[: limit // 2]}…{text[-limit // 2 :]}")
