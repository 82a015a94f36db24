"""Sizes of a base model, by its JSON files and the headers of its weights."""

import dataclasses
import math

from etils import epath

from mvc_jax.checkpoints import families, hub, pipeline_folder, tensor_file
from mvc_jax.checkpoints.family import SD, XL, of_files
from mvc_jax.errors import UserError
from mvc_jax.work import BaseSizes

# Of a base that is not on this machine yet; 2.x differs in the text's width, 1024.
_STABLE_DIFFUSION_1 = BaseSizes(
    name="Stable Diffusion 1.x, until the base is downloaded",
    downsampling=8,
    latent_channels=4,
    context_length=77,
    text_width=768,
    vae_channels=128,
    unet_channels=320,
    parameters={"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
)
_XL = dataclasses.replace(
    _STABLE_DIFFUSION_1,
    name="Stable Diffusion XL, until the base is downloaded",
    text_width=2048,
    pooled_width=1280,
    parameters={
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
)


def find(path: str, variant: str = "", revision: str = "") -> BaseSizes:
    """Sizes of the base in a folder or in the hub's cache; downloads nothing.

    Args:
      path: see `pipeline_folder.resolve`, also for `variant` and `revision`.

    Returns:
      those of Stable Diffusion 1.x, or of XL if the hub lists its files, for a base
      that is not on this machine.

    Raises:
      UserError: a file of a local folder is missing or damaged.
    """
    if not pipeline_folder.is_hub_name(path):
        return of_folder(epath.Path(path).expanduser(), variant)
    patterns = pipeline_folder.download_patterns(variant)
    folder = hub.cached(path, patterns, revision)
    try:
        if folder:
            return of_folder(folder, variant)
    except UserError:  # a download that was interrupted
        pass
    listed = of_files(hub.names(path, revision))
    return _XL if listed is XL else _STABLE_DIFFUSION_1


def of_folder(folder: epath.Path, variant: str = "") -> BaseSizes:
    """Sizes of the model in a folder of the diffusers layout.

    Raises:
      UserError: a file is missing or damaged.
    """
    configs, parameters = {}, {}
    family = pipeline_folder.read_family(folder) or SD
    for name in family.components:
        path = folder / pipeline_folder.CONFIGS[name]
        configs[name] = families.completed(name, pipeline_folder.read_json(path))
        families.check_config(name, configs[name], str(path), family)
        weights = pipeline_folder.find_weights(folder, name, variant)
        entries = tensor_file.entries(weights).values()
        parameters[name] = sum(math.prod(entry.shape) for entry in entries)
    return of_configs(configs, parameters, name=str(folder))


def of_configs(
    configs: dict[str, dict], parameters: dict[str, int], *, name: str
) -> BaseSizes:
    """Sizes by the configs of diffusers and transformers.

    Args:
      configs: by component.
      parameters: numbers of their parameters.
      name: of the model, for people.
    """
    vae, text = configs["vae"], configs["text_encoder"]
    second = configs.get("text_encoder_2", {})
    return BaseSizes(
        name=name,
        downsampling=2 ** (len(vae["block_out_channels"]) - 1),
        latent_channels=vae["latent_channels"],
        context_length=text["max_position_embeddings"],
        text_width=text["hidden_size"] + second.get("hidden_size", 0),
        pooled_width=second.get("projection_dim", 0),
        vae_channels=vae["block_out_channels"][0],
        unet_channels=configs["unet"]["block_out_channels"][0],
        parameters=parameters,
    )
