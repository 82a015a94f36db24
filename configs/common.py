"""Every field with its default; all other configs start from these.

Not a lab note: the defaults follow the supplement where it gives a number, and have not
been measured as a whole. A section belongs to the stage of the same name; `data`,
`base` and `mesh` are shared.
"""

import difflib
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from mvc_jax.errors import UserError

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # on the hub


def get_config(argument: str = "") -> ConfigDict:
    parse_argument(argument)
    config = ConfigDict()
    config.seed = 0
    config.stages = "all"  # or a comma-separated list, run in the order of the pipeline
    config.min_free_disk_gib = 0.5  # on the workdir's disk, checked before any work
    config.compilation_cache = "~/.cache/mvc_jax/xla"  # "": off

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that shard the batch; -1: all that fsdp leaves
    config.mesh.fsdp = 1  # devices that also shard the parameters

    config.data = _data()

    config.base = ConfigDict()
    # A Stable Diffusion folder or hub name; "": the model of the stage `pretrain`.
    config.base.path = ""
    config.base.variant = ""  # of the weights, e.g. fp16; "": no variant
    config.base.revision = ""  # of a hub name: branch, tag or commit; "": the default
    config.base.finetuned = False  # True: accept a base that is already fine-tuned

    config.caption = _caption()

    config.pretrain = _pretrain()

    config.encode = ConfigDict()
    config.encode.batch_size = 16  # images, or prompts
    # True: also encode mirror images, for `finetune` to draw from. Not for images where
    # left and right matter: digits, text, a heart.
    config.encode.flip = False
    config.encode.dtype = "float32"  # on disk; float16 takes half the space

    config.pairs = ConfigDict()
    config.pairs.rounds = 1  # pairs per training image

    config.finetune = _finetune()

    config.mix = _mix()

    config.generate = _generate()

    config.classify = _classify()

    config.evaluate = ConfigDict()
    config.evaluate.confidence = 0.95  # level of the intervals

    config.report = ConfigDict()
    config.report.title = "Mixing Visual Concepts"
    config.report.grid_columns = 2  # synthetic images per mode and class
    config.report.grid_scale = 64  # display pixels along one side of an image
    return config


def fast(config: ConfigDict) -> None:
    """Fewer steps of a better solver, and guidance in an interval only; our choice.

    DPM-Solver++ 2M has converged by 20 steps (arXiv 2211.01095); guidance is harmful at
    high noise levels and has little effect at low ones (arXiv 2404.07724). An image
    takes 46 evaluations of the UNet instead of 150 with the defaults. On the digits it
    costs no accuracy that three splits can show (`benchmarks/RESULTS.md`).
    """
    config.generate.sampler = "dpmpp_2m"
    config.generate.steps = min(20, config.generate.steps)
    config.generate.guidance_interval = (0.2, 0.8)


PRESETS = {"fast": fast}
_ARGUMENT = "--config=FILE:ARGUMENT"
_NAMES = {  # of arguments -> (placeholder, example)
    "path": ("FOLDER", "/data/parts"),
    "class_type": ("WORDS", "part"),
    "size": ("PIXELS", "256"),
    "per_class": ("COUNT", "50"),
    "model": ("NAME", "wrn50_2"),
    "preset": ("NAME", "fast"),
}
_OTHER = ("VALUE", "VALUE")  # for names of a user's own config
_WITHOUT_COMMAS = ("size", "per_class", "model", "preset")


def parse_argument(
    argument: str,
    *,
    known: Sequence[str] = (),
    needed: Sequence[str] = (),
    flags: Sequence[str] = (),
) -> dict[str, str]:
    """Parses `"path=/data/a,b,size=256"` to `{"path": "/data/a,b", "size": "256"}`.

    In a text, such as a path, only a comma before a known name separates.

    Args:
      argument: what follows the colon of `--config=FILE:ARGUMENT`.
      known: names that take a value.
      needed: those of them that are required.
      flags: names without a value; given flags have the value "".

    Raises:
      UserError: a part is unknown, has no value or is repeated, or one is missing.
    """
    given: dict[str, str] = {}
    last = ""  # the name whose value a comma may continue
    for part in argument.split(",") if argument else []:
        name, equals, value = part.partition("=")
        is_ours = part in flags or (name in known and equals)
        if is_ours and name not in given and (value or part in flags):
            given[name] = value
            last = "" if name in flags or name in _WITHOUT_COMMAS else name
        elif last and not is_ours:
            given[last] += f",{part}"
        else:
            raise _bad_part(part, given, known, needed, flags)
    if any(name not in given for name in needed):
        raise _bad_part(argument, given, known, needed, flags)
    return given


def whole_number(
    given: Mapping[str, str], name: str, default: int, *, minimum: int = 0
) -> int:
    """The value of a parsed argument as a whole number.

    Raises:
      UserError: it is not one, or below `minimum`.
    """
    text = given.get(name, str(default))
    if not text.isdecimal() or int(text) < minimum:
        wanted = f"a whole number of at least {minimum} as {name}"
        raise _bad_value(given, name, wanted)
    return int(text)


def choice(
    given: Mapping[str, str], name: str, choices: Sequence[str], default: str = ""
) -> str:
    """The value of a parsed argument, which must be one of `choices` or absent.

    Raises:
      UserError: it is something else.
    """
    if name in given and given[name] not in choices:
        raise _bad_value(given, name, f"{name}={' or '.join(choices)}")
    return given.get(name, default)


def apply_preset(config: ConfigDict, given: Mapping[str, str]) -> ConfigDict:
    """Applies the preset of a parsed argument, if there is one.

    Raises:
      UserError: there is no such preset.
    """
    if name := choice(given, "preset", tuple(PRESETS)):
        PRESETS[name](config)
    return config


def _bad_part(
    part: str,
    given: Mapping[str, str],
    known: Sequence[str],
    needed: Sequence[str],
    flags: Sequence[str],
) -> UserError:
    """The error for a part of an argument, with an argument that works."""
    forms = {name: f"{name}={_NAMES.get(name, _OTHER)[0]}" for name in known}
    wanted = [forms[name] for name in needed]
    optional = [*flags, *(forms[name] for name in known if name not in needed)]
    if optional:
        wanted.append(f"optionally {', '.join(optional)}")
    fix = "Leave out the colon and what follows it."
    if flags or known:
        values = {name: "" for name in flags}
        for name in known:
            values[name] = _NAMES.get(name, _OTHER)[1]
        examples = {_join({name: value}): name for name, value in values.items()}
        close = difflib.get_close_matches(part, examples, n=1, cutoff=0.5)
        names = [examples[example] for example in close]
        names += [name for name in [*needed, *flags, *known] if name not in given]
        fixed = {name: values[name] for name in needed} | dict(given)
        for name in names[:1]:
            fixed[name] = values[name]
        fix = f"Write e.g. {_join(fixed)} after the colon."
    wanted = ", ".join(wanted) or "no argument"
    return UserError(_ARGUMENT, wanted=wanted, got=repr(part), fix=fix)


def _bad_value(given: Mapping[str, str], name: str, wanted: str) -> UserError:
    """The error for the value of one name, with an argument that works."""
    fixed = dict(given) | {name: _NAMES.get(name, _OTHER)[1]}
    return UserError(
        _ARGUMENT,
        wanted=wanted,
        got=repr(_join({name: given[name]})),
        fix=f"Write e.g. {_join(fixed)} after the colon.",
    )


def _join(given: Mapping[str, str]) -> str:
    """The argument that `parse_argument` parses to `given`."""
    parts = (f"{name}={value}" if value else name for name, value in given.items())
    return ",".join(parts)


def _data() -> ConfigDict:
    config = ConfigDict()
    config.source = "digits"  # or folder:PATH, parquet:PATH/*.parquet, tfds:NAME
    config.image_column = "image"  # of a Parquet file or TFDS dataset
    config.label_column = "label"
    config.dir = ""  # data directory of TFDS; "": its default
    config.classes = ()  # names of the classes to use, in this order; (): all
    config.pool = 0  # images reserved for `pretrain`
    config.per_class = 0  # training images per class; 0: use fraction
    config.fraction = 1.0  # of the training images of each class to use
    # Fraction of each class for test, where the dataset has no test split of its own;
    # 0: all images that are left after training.
    config.test_fraction = 0.2
    config.size = 512  # pixels along one side, as the models see them
    config.resize = "stretch"  # or "crop" around the centre, or "pad" with black
    config.resample = "lanczos"  # or "area"; both antialiased
    # For more than 8 bits per channel: the range of each image, or "LOW,HIGH".
    config.window = "image"
    config.max_pixels = 89_478_485  # per image; larger ones are decompression bombs
    config.on_bad_image = "fail"  # or "skip": continue without bad images, list them
    config.duplicates = "keep"  # or "remove" from train images that are also in test
    config.class_type = ""  # as in "a photo of {class_type} {label}"
    config.prompt = "{caption}, a photo of {class_type} {label}"  # supplement
    return config


def _caption() -> ConfigDict:
    config = ConfigDict()
    config.captioner = "blip2"  # supplement; or flax, file, template, attributes
    config.model = ""  # folder or hub name for blip2 and flax; "": the default model
    config.file = ""  # captions.jsonl for `file`
    config.template = "{class_type} {label}"  # for `template`
    config.instruction = ""  # text that BLIP-2 continues, e.g. "a photo of"
    config.max_new_tokens = 30
    config.num_beams = 3  # 1: greedy
    config.dtype = "auto"  # bfloat16 on an accelerator; or float32, bfloat16, int8
    config.batch_size = 8
    return config


def _filter() -> ConfigDict:
    """Filters of synthetic images; by default all are off.

    Distances are in [0, 1] between pixels, at no more than 32 a side, and in [0, 2]
    between CLIP embeddings.
    """
    config = ConfigDict()
    # "folds": a classifier trained on real images, without the source and the partners
    # of the synthetic image, must predict its label; "clip": CLIP must; "": off.
    config.label = ""
    config.label_folds = 5  # folds of the real images for "folds"
    config.label_threshold = 0.5  # accept the label from this probability on, or
    config.label_top = 1  # if it is among so many most probable ones; 0: never
    # "any": remove images too close to any real training image; "source": to their own
    # source; "": off.
    config.copies = ""
    # Too close is less than this quantile of the distances from each real image to its
    # nearest neighbour; 0: less than their minimum.
    config.copies_quantile = 0.0
    config.outliers = False  # True: remove images too far from real ones of the class
    config.outliers_quantile = 0.99  # too far: above this quantile within the class
    config.features = (
        "auto"  # of outliers and folds: "pixels", "clip"; auto: clip if any
    )
    return config


def _finetune() -> ConfigDict:
    config = ConfigDict()
    config.mode = "full"  # or "lora": adapters only, for smaller GPUs
    config.lora = ConfigDict()
    config.lora.rank = 16
    # As in diffusers' scripts.
    config.lora.targets = ("to_q", "to_k", "to_v", "to_out.0")
    config.steps = 1000
    config.batch_size = 50  # supplement
    config.accumulate = 1  # micro-batches per step, for less memory
    config.learning_rate = 1e-4  # supplement
    config.schedule = "constant"  # or "cosine", down to 0
    config.warmup = 0
    config.max_norm = 1.0  # of the gradient; 0: no clipping
    config.ema_decay = 0.0  # 0: no EMA
    config.min_snr = 0.0  # gamma of min-SNR weighting, typically 5; 0: off
    config.drop_rate = 0.05  # p of InstructPix2Pix's conditioning dropout
    config.max_skipped = 10  # consecutive steps without a finite loss before it stops
    config.dtype = "auto"  # of activations: bfloat16 on an accelerator
    config.attention = "auto"  # or xla, mapped (for CPUs), cudnn, pallas (for TPUs)
    config.remat = "none"  # or blocks, full: less memory, more time
    config.memory_gib = 0.0  # budget per device; 0: the device's limit
    config.log_every = 20  # steps per row of metrics
    config.sample_every = 500  # steps between grids of samples; 0: none
    config.samples = 8  # pairs per grid
    config.checkpoint_every = 500  # steps
    config.checkpoint_minutes = 20.0  # or after this time; 0: by steps only
    config.keep = 2  # of the newest
    return config


def _generate() -> ConfigDict:
    config = ConfigDict()
    # Others: pretrained, caption_only, noised, interpolated, image_embedding,
    # image_number, embedding_difference, controlnet (docs/mixing.md).
    config.sets = ("mixed", "unmixed")
    config.conditioning = ""  # "all", or some sets to show in conditionings.png
    # CLIP for image_embedding and embedding_difference: a folder or hub name whose
    # embeddings have the width of the base's text states; "": the base's image_encoder.
    config.clip = ""
    # ControlNet for Canny edges: a folder or hub name; "": the one of `pretrain`.
    config.controlnet = ""
    config.limit = 0  # above 0: stop after a contact sheet of this many images
    config.sampler = "ddim"  # or "dpmpp_2m", "euler"
    config.steps = 50
    # s_T and s_I of InstructPix2Pix. If the maximum `*_most` is above 0, `mix` draws
    # the scale of each image uniformly between the two.
    config.text_scale = 7.5
    config.text_scale_most = 0.0
    config.image_scale = 1.5
    config.image_scale_most = 0.0
    # Guidance acts between these timesteps, as fractions of the training timesteps; 0
    # is without noise.
    config.guidance_interval = (0.0, 1.0)
    config.guidance_rescale = 0.0  # phi; 1: the contrast of an unguided prediction
    config.noise_scale = 0.1  # for `noised`, in standard deviations of the text states
    config.interpolation = 0.5  # for `interpolated`: weight of the partner
    config.dtype = "auto"  # of the UNet's activations: bfloat16 on an accelerator
    config.attention = "auto"  # or xla, mapped (for CPUs), cudnn, pallas (for TPUs)
    config.batch_size = 16
    config.max_redraws = 3  # of an image that is NaN, black or of a single colour
    config.shard_size = 1000  # images per Parquet file
    config.folder = True  # also write train/<class>/*.png
    config.format = "png"  # or "jpeg", in Parquet files and folder
    # Pixels of the written images, resized by area; 0: as generated; -1: the size of
    # the source, if smaller.
    config.size = 0
    config.include_real = False  # True: also write the training images
    config.filter = _filter()
    return config


def _mix() -> ConfigDict:
    config = ConfigDict()
    config.per_image = 4  # synthetic images per training image; can be raised later
    config.modes = ("coarse", "fine")  # in turn; or "both" in one image
    config.tokens = 4  # k: token positions that coarse mixing replaces
    config.tokens_most = 0  # above `tokens`: k is drawn per image, up to this maximum
    # Which: k of the words of the "caption", its "first" k, a "span" of k consecutive
    # ones, or any k of "all" 77 but BOS.
    config.positions = "caption"
    config.class_prompt = False  # True: also the words of "a photo of ..."
    config.partner = "class"  # partners are of the same class, or of "any"
    config.partners = 1  # m: partners per image
    config.dims = 8  # d: text dims that fine mixing replaces; supplement: below 10
    config.dims_per_token = False  # True: different dims for each token
    config.dims_on = "all"  # tokens; or only the "words" of the caption
    config.file = ""  # edited recipes.jsonl to use; "": draw the recipes
    config.levels = False  # True: also levels.jsonl, for Figure 5 of the supplement
    return config


def _classify() -> ConfigDict:
    config = ConfigDict()
    config.runs = ("real", "real+affine", "combined", "combined:unmixed")
    config.model = "resnet20"  # a key of models/classifiers.py
    config.width = 0  # of a ResNet's first stage; 0: the model's default
    # Stem of a ResNet: "cifar" for small images, "imagenet"; "": the model's default.
    config.stem = ""
    config.stem_stride = 1  # of the CIFAR stem
    config.pretrained = ""  # folder, file or hub name of weights; "": from scratch
    config.pretrained_revision = ""
    config.size = 0  # pixels of its input, downscaled by area; 0: data.size
    config.seeds = 3
    # Trained together by vmap; 0: all, if the model is small and on an accelerator.
    config.seeds_at_once = 0
    config.steps = 1000  # the same for every run
    config.epochs = 0.0  # over the real images, instead of `steps`; 0: use steps
    config.batch_size = 50
    config.optimizer = "adam"  # or "sgd", with Nesterov's momentum
    config.learning_rate = 1e-3
    config.schedule = "cosine"  # or "constant", "multistep"
    config.warmup = 0
    config.milestones = (0.5, 0.75)  # fractions of the steps, for "multistep"
    config.gamma = 0.1  # factor of the learning rate at each milestone
    config.momentum = 0.9  # for sgd
    config.weight_decay = 1e-4
    config.flip = True  # False: policies do not flip, where left and right matter
    config.randaugment_count = 2  # N
    config.randaugment_magnitude = 9.0  # M, of 30
    config.alpha = 1.0  # of Beta(alpha, alpha) in MixUp and CutMix
    config.label_smoothing = 0.0
    config.class_weights = "none"  # or "balanced", for imbalanced classes
    config.ema_decay = 0.0  # 0: no EMA
    config.validation = 0.0  # fraction of train held out to select the best state
    config.validate_every = 0  # steps; 0: at the end only
    config.patience = 0  # steps without improvement before stopping early; 0: never
    config.probability = 0.8  # p of `probabilistic` and `replace_*`
    config.ratio = 0.0  # synthetic images to use per real image; 0: all
    config.phase_two = 0.25  # fraction of `two_phase`'s steps on real images only
    config.phase_two_rate = 0.1  # factor of the learning rate in these steps
    config.dtype = "auto"  # of activations: bfloat16 on an accelerator
    # Images up to this size stay on the device, else they are read from disk; 0: half
    # of the device's memory.
    config.images_gib = 0.0
    config.memory_gib = 0.0  # budget per device; 0: the device's limit
    config.steps_at_once = 0  # per dispatch; 0: 1 on CPUs, else up to 50
    config.log_every = 50  # steps
    config.checkpoint_minutes = 20.0  # 0: at the end, and at validations
    return config


def _pretrain() -> ConfigDict:
    config = ConfigDict()
    config.context_length = 16  # tokens of a prompt, BOS and EOS included
    config.vocab_size = 640
    config.vae = ConfigDict()
    config.vae.channels = (8, 16, 16)
    config.vae.groups = 8
    config.vae.steps = 1000
    config.vae.batch_size = 64
    config.vae.learning_rate = 2e-3
    config.vae.kl_weight = 1e-6
    config.text = ConfigDict()
    config.text.layers = 2
    config.text.width = 64
    config.text.heads = 4
    config.unet = ConfigDict()
    config.unet.channels = (64,)
    config.unet.heads = 4
    config.unet.layers = 1  # residual blocks per level
    config.unet.steps = 2500
    config.unet.batch_size = 32
    config.unet.learning_rate = 1e-3
    config.unet.warmup = 100
    config.unet.ema_decay = 0.999
    config.unet.drop_rate = 0.1  # of the text, for classifier-free guidance
    # For the ablations that condition on image embeddings and on edges.
    config.image_encoder = ConfigDict()
    config.image_encoder.steps = 0  # 0: do not train one
    config.image_encoder.batch_size = 64
    config.image_encoder.learning_rate = 1e-3
    config.image_encoder.patch = 4  # pixels
    config.image_encoder.width = 64
    config.image_encoder.layers = 2
    config.image_encoder.heads = 4
    config.controlnet = ConfigDict()
    config.controlnet.steps = 0  # 0: do not train one
    config.controlnet.batch_size = 32
    config.controlnet.learning_rate = 5e-4
    config.controlnet.drop_rate = 0.5  # of the text, as in the ControlNet paper
    config.log_every = 50
    config.checkpoint_every = 500
    return config
