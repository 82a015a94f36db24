"""Every field there is, with its default; the other configs start from here.

No lab note: the defaults follow the supplement where it gives a number, and have not
been measured as a whole. A section belongs to the stage of the same name; `data`,
`base` and `mesh` are shared.
"""

import re
from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict

from mvc_jax.errors import require, require_one_of

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # on the hub


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.stages = "all"  # or a comma-separated list, run in the pipeline's order
    config.min_free_disk_gib = 0.5  # asked of the workdir's disk before any work
    config.compilation_cache = "~/.cache/mvc_jax/xla"  # "" switches it off

    config.mesh = ConfigDict()
    config.mesh.data = -1  # devices that split the batch; -1: all that fsdp leaves
    config.mesh.fsdp = 1  # devices that split parameters as well

    config.data = _data()

    config.base = ConfigDict()
    # A Stable Diffusion folder or its name on the Hugging Face hub; "": `pretrain`'s.
    config.base.path = ""
    config.base.variant = ""  # of the weights, e.g. fp16; "": the plain ones
    config.base.revision = ""  # of a hub name: branch, tag or commit; "": the default
    config.base.finetuned = False  # True: a base that was fine-tuned before is welcome

    config.caption = _caption()

    config.pretrain = _pretrain()

    config.encode = ConfigDict()
    config.encode.batch_size = 16  # images, or prompts, at once
    # Also the mirror images, for `finetune` to draw from. Not where left and right mean
    # something: digits, text, a heart.
    config.encode.flip = False
    config.encode.dtype = "float32"  # on disk; float16 halves it

    config.pairs = ConfigDict()
    config.pairs.rounds = 1  # pairs per training image

    config.finetune = _finetune()

    config.mix = _mix()

    config.generate = _generate()

    config.classify = _classify()

    config.evaluate = ConfigDict()
    config.evaluate.confidence = 0.95  # of the intervals

    config.report = ConfigDict()
    config.report.title = "Mixing Visual Concepts"
    config.report.grid_columns = 2  # synthetic images per mode and class
    config.report.grid_scale = 64  # display pixels of one image
    return config


def fast(config: ConfigDict) -> None:
    """Fewer steps of a better solver, guided where guidance matters: our choice.

    DPM-Solver++ 2M has settled by 20 steps (arXiv 2211.01095); guidance hurts where the
    noise is strong and hardly acts where it is weak (arXiv 2404.07724). Of 150 rows of
    the UNet behind an image with the defaults, 46 are left. On the digits it costs no
    accuracy that three splits can show (`benchmarks/RESULTS.md`).
    """
    config.generate.sampler = "dpmpp_2m"
    config.generate.steps = min(20, config.generate.steps)
    config.generate.guidance_interval = (0.2, 0.8)


PRESETS = {"fast": fast}
_EXAMPLES = {"per_class": "per_class=50", "preset": "preset=fast"}


def apply_preset(config: ConfigDict, given: Mapping[str, str]) -> ConfigDict:
    """`config` with the preset that `given` names, if it names one.

    Raises:
      UserError: there is no such preset.
    """
    if "preset" in given:
        require_one_of("--config=FILE:ARGUMENT", given, {"preset": tuple(PRESETS)})
        PRESETS[given["preset"]](config)
    return config


def parse_argument(
    argument: str, *, known: Sequence[str], needed: Sequence[str] = ()
) -> dict[str, str]:
    """`"path=/data/a,b,size=256"` -> `{"path": "/data/a,b", "size": "256"}`.

    Only a comma before a known name separates, so that paths may hold commas.

    Raises:
      UserError: a name is unknown, or a needed one is not there.
    """
    parts = re.split(rf",(?=(?:{'|'.join(known)})=)", argument) if argument else []
    given = dict(part.partition("=")[::2] for part in parts)
    require(
        all(name in known and value for name, value in given.items())
        and all(name in given for name in needed),
        "--config=FILE:ARGUMENT",
        wanted=f"{', '.join(f'{name}=VALUE' for name in known)}, of which "
        f"{', '.join(needed) or 'none'} must be there",
        got=repr(argument),
        fix="Write e.g. --config=configs/folder.py:path=/data/parts."
        if "path" in known
        else f"Write e.g. {_EXAMPLES[known[0]]} behind the colon.",
    )
    return given


def _data() -> ConfigDict:
    config = ConfigDict()
    config.source = "digits"  # or folder:PATH, parquet:PATH/*.parquet, tfds:NAME
    config.image_column = "image"  # of a Parquet file or TFDS dataset
    config.label_column = "label"
    config.dir = ""  # where TFDS keeps its datasets; "": its own default
    config.classes = ()  # names of the classes to use, in this order; (): all
    config.pool = 0  # images kept apart for `pretrain`
    config.per_class = 0  # training images per class; 0: by fraction
    config.fraction = 1.0  # of the training images of each class that is used
    # Share of each class that is test where the dataset has no test part of its own;
    # 0: all that training leaves.
    config.test_fraction = 0.2
    config.size = 512  # pixels along one side, as the models see them
    config.resize = "stretch"  # or "crop" around the centre, or "pad" with black
    config.resample = "lanczos"  # or "area"; both antialiased
    config.window = "image"  # of more than 8 bits: its own range, or "LOW,HIGH"
    config.max_pixels = 89_478_485  # of one image; more is a decompression bomb
    config.on_bad_image = "fail"  # or "skip": go on without, and keep the list
    config.duplicates = "keep"  # or "remove" from train what test has as well
    config.class_type = ""  # "a photo of {class_type} {label}"
    config.prompt = "{caption}, a photo of {class_type} {label}"  # supplement
    return config


def _caption() -> ConfigDict:
    config = ConfigDict()
    config.captioner = "blip2"  # supplement; or flax, file, template, attributes
    config.model = ""  # folder or hub name for blip2 and flax; "": the usual one
    config.file = ""  # captions.jsonl for `file`
    config.template = "{class_type} {label}"  # for `template`
    config.instruction = ""  # text that BLIP-2 continues, e.g. "a photo of"
    config.max_new_tokens = 30
    config.num_beams = 3  # 1: greedy
    config.dtype = "auto"  # bfloat16 on an accelerator; or float32, bfloat16, int8
    config.batch_size = 8
    return config


def _filter() -> ConfigDict:
    """Which synthetic images are left out; as it is, none. Distances are between 0 and
    1 of pixels, at no more than 32 a side, or between 0 and 2 of CLIP embeddings."""
    config = ConfigDict()
    # "folds": a classifier that learnt from real images, but not from those that an
    # image was made of, must find its label in it; "clip": CLIP must; "": nobody asks.
    config.label = ""
    config.label_folds = 5  # parts that the real images are dealt into for that
    config.label_threshold = 0.5  # probability from which a label is believed
    config.label_top = 1  # as it is among so many likeliest ones; 0: never
    # "any": nothing too close to a real training image; "source": to its own source.
    config.copies = ""
    # Closer than this quantile of the distances from each real image to the nearest
    # other one is too close; 0: than any two of them are.
    config.copies_quantile = 0.0
    config.outliers = False  # True: nothing too far from the real images of its class
    config.outliers_quantile = 0.99  # of distances within the class: farther is too far
    config.features = (
        "auto"  # of outliers and folds: "clip" where there is one, "pixels"
    )
    return config


def _finetune() -> ConfigDict:
    config = ConfigDict()
    config.mode = "full"  # or "lora": adapters alone, for a smaller GPU
    config.lora = ConfigDict()
    config.lora.rank = 16
    config.lora.targets = ("to_q", "to_k", "to_v", "to_out.0")  # as diffusers' scripts
    config.steps = 1000
    config.batch_size = 50  # supplement
    config.accumulate = 1  # micro-batches, one after the other, for less memory
    config.learning_rate = 1e-4  # supplement
    config.schedule = "constant"  # or "cosine", down to 0
    config.warmup = 0
    config.max_norm = 1.0  # of the gradient; 0: not clipped
    config.ema_decay = 0.0  # 0: no average is kept
    config.min_snr = 0.0  # gamma of min-SNR weighting, 5 is usual; 0: off
    config.drop_rate = 0.05  # p of InstructPix2Pix's conditioning dropout
    config.max_skipped = 10  # steps in a row without a finite loss: it stops
    config.dtype = "auto"  # of activations: bfloat16 on an accelerator
    config.attention = "auto"  # or xla, mapped (for CPUs), cudnn
    config.remat = "none"  # or blocks, full: less memory, more time
    config.memory_gib = 0.0  # of one device, at most; 0: what it says it has
    config.log_every = 20  # steps behind one row of metrics
    config.sample_every = 500  # steps from one grid of samples to the next; 0: none
    config.samples = 8  # pairs in it
    config.checkpoint_every = 500
    config.checkpoint_minutes = 20.0  # or after so long; 0: by steps alone
    config.keep = 2  # of the newest
    return config


def _generate() -> ConfigDict:
    config = ConfigDict()
    # Also pretrained, caption_only, noised, interpolated, image_embedding,
    # image_number, embedding_difference, controlnet: docs/mixing.md.
    config.sets = ("mixed", "unmixed")
    config.conditioning = ""  # "all", or some sets: the picture conditionings.png
    # CLIP for image_embedding and embedding_difference, a folder or hub name whose
    # embeddings are as wide as the base's text states; "": the base's image_encoder.
    config.clip = ""
    config.controlnet = ""  # for edges, a folder or hub name; "": `pretrain`'s
    config.limit = 0  # above 0: only a contact sheet of so many images, then it stops
    config.sampler = "ddim"  # or "dpmpp_2m", "euler"
    config.steps = 50
    # s_T and s_I of InstructPix2Pix. With a most above it, `mix` draws a scale for each
    # image, uniform between the two.
    config.text_scale = 7.5
    config.text_scale_most = 0.0
    config.image_scale = 1.5
    config.image_scale_most = 0.0
    # Shares of the training timesteps, 0 without noise, between which guidance acts.
    config.guidance_interval = (0.0, 1.0)
    config.guidance_rescale = 0.0  # phi, towards the contrast of no guidance
    config.noise_scale = 0.1  # of `noised`: times the text states' standard deviation
    config.interpolation = 0.5  # of `interpolated`: the partner's share
    config.dtype = "auto"  # of the UNet's activations: bfloat16 on an accelerator
    config.attention = "auto"  # or xla, mapped (for CPUs), cudnn
    config.batch_size = 16
    config.max_redraws = 3  # of an image that is NaN, black or of one colour
    config.shard_size = 1000  # images in a Parquet file
    config.folder = True  # also train/<class>/*.png
    config.format = "png"  # or "jpeg", in both forms
    config.size = 0  # pixels written, by area; 0: as drawn, -1: its source's, if less
    config.include_real = False  # True: also the training images, beside them
    config.filter = _filter()
    return config


def _mix() -> ConfigDict:
    config = ConfigDict()
    config.per_image = 4  # synthetic images per training image; raising it adds
    config.modes = ("coarse", "fine")  # or "both" in one image; taken in turn
    config.tokens = 4  # k: token positions that coarse mixing takes over
    config.tokens_most = 0  # above `tokens`: each image draws its k, up to this
    # Which: k of the "caption"'s words, their "first" k, a "span" of k in a row, or any
    # k of "all" 77 but BOS.
    config.positions = "caption"
    config.class_prompt = False  # True: also the words of "a photo of ..."
    config.partner = "class"  # whose caption is mixed in: of the same class, or "any"
    config.partners = 1  # m: how many images' captions
    config.dims = 8  # d: text dims that fine mixing takes over; supplement: below 10
    config.dims_per_token = False  # True: other dims at every token
    config.dims_on = "all"  # tokens, or "words" of the caption alone
    config.file = ""  # recipes.jsonl, edited and handed back; "": they are drawn
    config.levels = False  # True: also levels.jsonl, for Figure 5 of the supplement
    return config


def _classify() -> ConfigDict:
    config = ConfigDict()
    config.runs = ("real", "real+affine", "combined", "combined:unmixed")
    config.model = "resnet20"  # a key of models/classifiers.py
    config.width = 0  # of a ResNet's first stage; 0: its own
    config.stem = ""  # of a ResNet: "cifar" for small images, "imagenet"; "": its own
    config.stem_stride = 1  # of the CIFAR stem
    config.pretrained = ""  # folder, file or hub name to start from; "": from scratch
    config.pretrained_revision = ""
    config.size = 0  # pixels it sees, made smaller by area; 0: data.size
    config.seeds = 3
    config.seeds_at_once = 0  # trained side by side; 0: all small ones on accelerators
    config.steps = 1000  # the same for every run
    config.epochs = 0.0  # of the real images, in place of `steps`; 0: by steps
    config.batch_size = 50
    config.optimizer = "adam"  # or "sgd", with Nesterov's momentum
    config.learning_rate = 1e-3
    config.schedule = "cosine"  # or "constant", "multistep"
    config.warmup = 0
    config.milestones = (0.5, 0.75)  # shares of the steps, for "multistep"
    config.gamma = 0.1  # times the rate at each of them
    config.momentum = 0.9  # of sgd
    config.weight_decay = 1e-4
    config.flip = True  # False: no policy flips, where left and right matter
    config.randaugment_count = 2  # N
    config.randaugment_magnitude = 9.0  # M, of 30
    config.alpha = 1.0  # of MixUp's and CutMix's Beta(alpha, alpha)
    config.label_smoothing = 0.0
    config.class_weights = "none"  # or "balanced", for classes of different sizes
    config.ema_decay = 0.0  # 0: no average is kept
    config.validation = 0.0  # share of train that is held out to choose the best state
    config.validate_every = 0  # steps; 0: at the end only
    config.patience = 0  # steps without a better one until a fit ends; 0: never
    config.probability = 0.8  # p of `probabilistic` and `replace_*`
    config.ratio = 0.0  # synthetic images a real one that are used; 0: all
    config.phase_two = 0.25  # share of the steps of `two_phase` on real only
    config.phase_two_rate = 0.1  # times the learning rate in them
    config.dtype = "auto"  # of activations: bfloat16 on an accelerator
    config.images_gib = 0.0  # more are read from the disk; 0: half of a device's memory
    config.memory_gib = 0.0  # of one device, at most; 0: what it says it has
    config.steps_at_once = 0  # of one dispatch; 0: 1 on a CPU, else up to 50
    config.log_every = 50
    config.checkpoint_minutes = 20.0  # 0: at the end, and where it is validated
    return config


def _pretrain() -> ConfigDict:
    config = ConfigDict()
    config.context_length = 16  # tokens of a prompt, markers included
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
    # For the ablation's conditionings by an image's embedding, and by its edges.
    config.image_encoder = ConfigDict()
    config.image_encoder.steps = 0  # 0: none is made
    config.image_encoder.batch_size = 64
    config.image_encoder.learning_rate = 1e-3
    config.image_encoder.patch = 4  # pixels
    config.image_encoder.width = 64
    config.image_encoder.layers = 2
    config.image_encoder.heads = 4
    config.controlnet = ConfigDict()
    config.controlnet.steps = 0  # 0: none is made
    config.controlnet.batch_size = 32
    config.controlnet.learning_rate = 5e-4
    config.controlnet.drop_rate = 0.5  # of the text, as ControlNet's paper
    config.log_every = 50
    config.checkpoint_every = 500
    return config
