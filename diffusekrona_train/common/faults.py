"""The one seam through which tests make a run fail at a named moment. Standard library only; does nothing by default.

`KRONA_FAULT=phase:step:what` acts when the run reaches `phase` at `step` (`*`: at any step), once for each value:

| phase | reached |
|---|---|
| `setup` | the config is read, nothing is loaded yet |
| `cache` | one entry of latents or text embeddings is written, not yet under its name; `step` counts entries |
| `step` | forward and backward are done, the optimiser has not moved |
| `validation` | before the first image is generated |
| `adapter` | the adapter of a checkpoint is about to be written |
| `state` | the resume state is written, not yet under its name |
| `rotation` | the new state is safe, old ones are still there |
| `end` | all steps are done, the final adapter is not yet written |

`what`: a signal name (`SIGKILL`, `SIGTERM`, `SIGINT`), `oom` (device out of memory), `full` (no space left on the disk)
or `error` (any exception).
"""

from __future__ import annotations

import errno
import os
import signal

_done = ""
"""The value that was acted on last."""


def reach(phase: str, step: int = 0) -> None:
    """Do what KRONA_FAULT says at this moment; the modules call it at the moments above."""
    global _done
    wanted = os.environ.get("KRONA_FAULT")
    if not wanted or wanted == _done:
        return
    at_phase, at_step, what = wanted.split(":")
    if at_phase != phase or at_step not in ("*", str(step)):
        return
    _done = wanted
    if what == "oom":
        import torch

        raise torch.OutOfMemoryError("out of memory (injected)")
    if what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if what == "error":
        raise RuntimeError(f"injected at {phase} {step}")
    os.kill(os.getpid(), getattr(signal, what))
