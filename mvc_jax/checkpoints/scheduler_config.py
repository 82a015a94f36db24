"""The scheduler config of a base: its noise is kept, its sampler replaced by DDIM."""

from collections.abc import Mapping
from typing import Any

from mvc_jax.errors import UserError

NOISE = {  # field: its default in every scheduler of diffusers; ...: there is none
    "num_train_timesteps": ...,
    "beta_start": ...,
    "beta_end": ...,
    "beta_schedule": ...,
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_KNOWN = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction"),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
}
# Not DDIM's own defaults: latents are no images in [-1, 1] to be clipped, and Stable
# Diffusion ends at the first alpha of its schedule.
_SAMPLER = {
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "trailing",
}


def ddim_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the config of a DDIM scheduler from that of any scheduler.

    Bases come with PNDM (SD 1.x), DDIM (2.x), Euler (InstructPix2Pix) and others. What
    describes the noise is kept, what describes the sampler is replaced; PyTorch's DDIM
    and `samplers.ddim` draw the same from the result.

    Args:
      config: the content of a `scheduler_config.json`.

    Raises:
      UserError: a field of the noise is missing, or its value is not supported.
    """
    noise = {field: config.get(field, default) for field, default in NOISE.items()}
    for field, value in noise.items():
        if value is ...:
            raise UserError(
                f"scheduler_config.json: {field}",
                wanted="the noise that the base was trained with",
                got="no such field",
                fix="Take it from the same Stable Diffusion 1.x or 2.x checkpoint.",
            )
    for field, known in _KNOWN.items():
        value = noise.get(field, config.get(field, False))
        if value not in known:
            raise UserError(
                f"scheduler_config.json: {field}",
                wanted=" or ".join(repr(choice) for choice in known),
                got=repr(value),
                fix="This base was trained with unsupported noise: take another base.",
            )
    return {"_class_name": "DDIMScheduler", **noise, **_SAMPLER}
