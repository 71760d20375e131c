"""Measures what was learnt: pictures of any origin, suites of subjects, several adapters, the checkpoints of a run.

best_checkpoint("runs/dog")["chosen_step"]
compare([Path("krona.safetensors"), Path("lora.safetensors")], None, Plan(), Path("comparison"))
"""

from diffusekrona_train.evaluation.adapters import RULE, Plan
from diffusekrona_train.evaluation.best import best_checkpoint
from diffusekrona_train.evaluation.compare import compare
from diffusekrona_train.evaluation.inputs import load_suite, photos_of, read_generated
from diffusekrona_train.evaluation.suite import evaluate_images, evaluate_suite

__all__ = [
    "RULE",
    "Plan",
    "best_checkpoint",
    "compare",
    "evaluate_images",
    "evaluate_suite",
    "load_suite",
    "photos_of",
    "read_generated",
]
