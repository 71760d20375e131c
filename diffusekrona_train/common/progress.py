"""How a run ends other than well."""

from __future__ import annotations


class Diverged(RuntimeError):
    """Several steps in a row were not finite."""
