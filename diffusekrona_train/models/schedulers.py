"""Build samplers by the short names of other tools, each with the model's own noise schedule."""

from __future__ import annotations

from typing import Any

from diffusekrona_train.common.nearest import did_you_mean
from diffusekrona_train.models.contracts import Config, Loaded

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name -> diffusers class and what differs from the model's scheduler config."""


def check_scheduler(name: str) -> str:
    """Return `name` if it is known; otherwise ValueError with the closest one."""
    if name not in SCHEDULERS:
        hint = did_you_mean(name.lower(), SCHEDULERS, 0.4, "'{}'")
        raise ValueError(
            f"scheduler {name!r} is unknown: {hint + ' ' if hint else ''}there are {', '.join(SCHEDULERS)}"
        )
    return name


OF_DDPM = {
    *(cls for cls, _ in SCHEDULERS.values()),
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepInverseScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "IPNDMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}
"""diffusers' schedulers of the process in which SD and SDXL are trained: a table of betas, not flows or EDM."""


def check_ddpm(config: Config) -> None:
    """Raise ValueError if a scheduler's config is of another process than that of SD and SDXL."""
    name = config.get("_class_name", "DDIMScheduler")
    flows = [key for key in ("use_flow_sigmas", "use_flow_matching") if config.get(key)]
    if name not in OF_DDPM or flows:
        said = f"{name} with {flows[0]}" if flows and name in OF_DDPM else name
        raise ValueError(
            f"its scheduler/scheduler_config.json names {said}, which is not of the diffusion process of SD and SDXL; "
            "name the model's own, such as DDIMScheduler or EulerDiscreteScheduler"
        )


def check_replaces(name: str, model_scheduler: Config) -> str:
    """Return `name` if that scheduler can take the place of the model's own, given its config; otherwise ValueError."""
    own = model_scheduler.get("_class_name")
    if own == "FlowMatchEulerDiscreteScheduler":
        raise ValueError(
            f"scheduler {check_scheduler(name)!r} is for models that predict noise or v; this one predicts a flow and "
            f"has its own, {own}: leave the scheduler out"
        )
    return check_scheduler(name)


def build_scheduler(name: str, model_scheduler: Loaded) -> Any:
    """Build scheduler `name` with the model's betas, prediction type and timestep spacing. ValueError as
    `check_replaces`."""
    import diffusers

    check_replaces(name, model_scheduler.config)
    cls, options = SCHEDULERS[name]
    return getattr(diffusers, cls).from_config(dict(model_scheduler.config), **options)
