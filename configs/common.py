"""Every field: its default, what it may be and what it is; all configs start here.

Not a lab note: the defaults follow the supplement where it gives a number, and have not
been measured as a whole. A section belongs to the stage of the same name; `data`,
`base` and `mesh` are shared. `--help=SECTION` prints a section of this file.
"""

from ml_collections import ConfigDict

from mvc_jax.configs.arguments import choice, parse_argument, whole_number
from mvc_jax.configs.fields import (
    Field,
    Section,
    count,
    fraction,
    one_of,
    optional,
    word,
)
from mvc_jax.configs.presets import apply_preset

__all__ = ["FIELDS", "apply_preset", "get_config"]
__all__ += ["parse_argument", "whole_number", "choice"]  # for the other configs

STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # on the hub
SPACINGS = ("auto", "trailing", "leading", "linspace")  # diffusion/timesteps.py
ATTENTION = ("auto", "xla", "mapped", "cudnn", "pallas")  # those of models/attention.py
DTYPES = ("auto", "float32", "bfloat16")
ATTRIBUTES = ("strokes", "photo", "scan")  # those of data/attribute_captions.py
_CAPTIONERS = ("blip2", "flax", "file", "template", "attributes")
_MAX_BATCH = 10**6
_MAX_SIDE = 16_384  # pixels
_MAX_GIB = 10**6


def _batch(default: int, help: str = "images per batch") -> Field:
    return count(default, help, _MAX_BATCH)


def _rate(default: float, help: str = "learning rate of Adam") -> Field:
    return Field(default, help, at_least=1e-12, at_most=1000)


def _average(default: float) -> Field:
    about = "decay of the moving average of the weights, which is then used; 0: none"
    return Field(
        default,
        about,
        at_least=0,
        below=1,
        hint="0.999 is typical; 0 keeps no average.",
    )


def _memory() -> Field:
    return optional(
        0.0, "memory budget per device, in GiB; 0: the device's limit", _MAX_GIB
    )


def _minutes(at_zero: str) -> Field:
    return optional(20.0, f"minutes until a checkpoint is due; 0: {at_zero}")


def _dtype() -> Field:
    return one_of(
        "auto", DTYPES, "type of activations; auto: bfloat16 on an accelerator"
    )


def _attention() -> Field:
    return one_of(
        "auto",
        ATTENTION,
        "implementation of attention; mapped is for CPUs, pallas for TPUs; auto: by "
        "device and shape of each layer",
    )


_DATA = Section(
    "images, classes and splits (shared by all stages)",
    {
        "source": word(
            "digits", "where images are: digits, folder:PATH, parquet:PATH, tfds:NAME"
        ),
        "image_column": word("image", "of a Parquet file or TFDS dataset"),
        "label_column": word("label", "of a Parquet file or TFDS dataset"),
        "dir": Field("", "data directory of TFDS; empty: its default"),
        "train": Field(
            (),
            "folders of the training part, relative to the source's; `.` is that "
            "itself; empty: detected",
            word=True,
            distinct=True,
            hint="Name folders that hold the class folders, or `.`.",
        ),
        "test": Field(
            (),
            "folders of the test part; empty: detected",
            word=True,
            distinct=True,
            hint="Name folders that hold the class folders.",
        ),
        "labels": Field(
            "",
            "FILE:COLUMN, a file in the folder with names of images and labels; empty: "
            "detected",
        ),
        "validation": one_of(
            "join",
            ("join", "keep"),
            "the source's own validation images: join train (or are test where there "
            "is none), or keep them for classify's validation alone",
        ),
        "classes": Field(
            (),
            "names of the classes to use, in this order; empty: all",
            word=True,
            distinct=True,
            hint="Name each class once, e.g. --config.data.classes=cat,dog.",
        ),
        "pool": Field(0, "images reserved for `pretrain`", at_least=0, at_most=10**9),
        "per_class": optional(
            0,
            "training images per class; 0: use fraction",
            hint="0 uses config.data.fraction.",
        ),
        "fraction": Field(
            1.0,
            "of the training images of each class to use",
            above=0,
            at_most=1,
        ),
        "test_fraction": Field(
            0.2,
            "fraction of each class for test, where the dataset has no test split of "
            "its own; 0: all images that are left after training",
            at_least=0,
            below=1,
        ),
        "size": count(512, "pixels along one side, as the models see them", _MAX_SIDE),
        "resize": one_of(
            "stretch",
            ("stretch", "crop", "pad"),
            "how an image becomes square: crop around the centre, pad with black",
        ),
        "resample": one_of(
            "lanczos", ("lanczos", "area"), "filter of resizing; both antialias"
        ),
        "window": word(
            "image",
            "for more than 8 bits per channel: LOW,HIGH, or `image`: the range of each "
            "image, or its window in a DICOM file",
        ),
        "frames": one_of(
            "refuse",
            ("refuse", "each"),
            "of a DICOM file with several in a folder: each is an image",
        ),
        "max_pixels": Field(
            89_478_485,
            "per image; larger ones are decompression bombs",
            at_least=1024,
            at_most=10**10,
        ),
        "on_bad_image": one_of(
            "fail",
            ("fail", "skip"),
            "skip: continue without bad images, and list them",
        ),
        "duplicates": one_of(
            "keep",
            ("keep", "remove"),
            "remove: images that are also in test are not used in pool and train",
        ),
        "group": Field(
            "",
            "what must not be on both sides of a split or fold, e.g. the patient: a "
            "column of the source, or a regular expression for file names",
        ),
        "class_type": Field("", 'as in "a photo of {class_type} {label}"'),
        "prompt": word(
            "{caption}, a photo of {class_type} {label}",
            "template of the prompts; the default is the supplement's",
        ),
    },
)

_BASE = Section(
    "the Stable Diffusion to start from (shared)",
    {
        "path": Field(
            "",
            "a Stable Diffusion folder or hub name; empty: the model of the stage "
            "`pretrain`",
        ),
        "variant": Field("", "of the weights, e.g. fp16; empty: no variant"),
        "revision": Field(
            "", "of a hub name: branch, tag or commit; empty: the default"
        ),
        "finetuned": Field(False, "True: accept a base that is already fine-tuned"),
    },
)

_CAPTION = Section(
    "images -> captions and splits",
    {
        "captioner": one_of(
            "blip2",
            _CAPTIONERS,
            "what writes the captions; blip2 is the supplement's",
        ),
        "attributes": one_of(
            "strokes",
            ATTRIBUTES,
            "what the captioner `attributes` measures: strokes (bright on black, as "
            "digits), photo or scan (without colours)",
        ),
        "model": Field(
            "", "folder or hub name for blip2 and flax; empty: the default model"
        ),
        "file": Field("", "captions.jsonl for the captioner `file`"),
        "template": word(
            "{class_type} {label}", "of the captions of the captioner `template`"
        ),
        "instruction": Field(
            "", 'text that BLIP-2 continues, e.g. "a photo of"; empty: none'
        ),
        "max_new_tokens": count(30, "tokens of a caption at most", 10_000),
        "num_beams": count(3, "beams of the search; 1: greedy", 1000),
        "dtype": one_of(
            "auto",
            (*DTYPES, "int8"),
            "type of weights and activations; auto: bfloat16 on an accelerator",
        ),
        "batch_size": _batch(8),
    },
)

_PRETRAIN = Section(
    "a small Stable Diffusion from scratch, if base.path is empty",
    {
        "family": one_of(
            "sd",
            ("sd", "sdxl"),
            "what it is a small one of: Stable Diffusion 1.x, or XL with its second "
            "text encoder",
        ),
        "source": Field(
            "",
            "where the base's images are, as data.source says; empty: the pool of "
            "data.source",
        ),
        "pool": Section(
            "of pretrain.source: its images, classes and captions",
            {
                "images": optional(
                    0, "of it to use, none of its own test images; 0: all"
                ),
                "image_column": word("image", "as data.image_column"),
                "label_column": word("label", "as data.label_column"),
                "dir": Field("", "as data.dir"),
                "classes": Field(
                    (),
                    "names of the classes to use; empty: all",
                    word=True,
                    distinct=True,
                    hint="Name each class once.",
                ),
                "class_type": Field("", 'as in "a photo of {class_type} {label}"'),
                "captioner": one_of(
                    "",
                    ("", *_CAPTIONERS),
                    "what writes its captions; empty: that of caption.captioner",
                ),
                "file": Field("", "captions.jsonl for the captioner `file`"),
                "attributes": one_of(
                    "",
                    ("", *ATTRIBUTES),
                    "what the captioner `attributes` measures; empty: as "
                    "caption.attributes",
                ),
                "duplicates": one_of(
                    "refuse",
                    ("refuse", "remove"),
                    "images that are also in test: refuse them, or do without them",
                ),
            },
        ),
        "seed": Field(
            -1,
            "of the draws of pool and base, which runs of other config.seed then "
            "share; measured attributes are then relative to the pool; -1: "
            "config.seed",
            at_least=0,
            at_most=2**32 - 1,
            also=(-1,),
            hint="-1 is config.seed.",
        ),
        "context_length": Field(
            0,
            "tokens of a prompt, BOS and EOS included; 0: as many as the longest "
            "prompt of pool and training images has",
            at_least=4,
            at_most=1024,
            also=(0,),
            hint="0 is as many as the prompts need.",
        ),
        "vocab_size": Field(
            640, "tokens of the tokenizer", at_least=514, at_most=10**6
        ),
        "vae": Section(
            "the autoencoder",
            {
                "channels": Field(
                    (8, 16, 16),
                    "of each level",
                    item=int,
                    at_least=1,
                    at_most=10**5,
                    length=(1, 8),
                ),
                "groups": count(8, "of its group norms", 10**5),
                "steps": count(1000, "optimiser steps"),
                "batch_size": _batch(64),
                "learning_rate": _rate(2e-3),
                "kl_weight": Field(
                    1e-6,
                    "weight of the KL divergence in the loss",
                    at_least=0,
                    at_most=1000,
                ),
                "gradient_weight": optional(
                    0.0,
                    "weight of the error of the image's differences between "
                    "neighbouring pixels; 0: not in the loss",
                    1000,
                ),
                "feature_weight": optional(
                    0.0,
                    "weight of the error of a classifier's features; 0: not in the "
                    "loss",
                    1000,
                ),
                "features": Field(
                    "",
                    "whose features: folder, file or hub name of a classifier; empty: "
                    "the one that pretrain.judge trains on the pool",
                ),
            },
        ),
        "text": Section(
            "the text encoder",
            {
                "layers": count(2, "its transformer layers", 1000),
                "width": count(64, "dims of a text state", 10**5),
                "heads": count(4, "attention heads, a divisor of the width", 10**5),
            },
        ),
        "unet": Section(
            "the text-to-image UNet",
            {
                "channels": Field(
                    (64,),
                    "of each level",
                    item=int,
                    at_least=1,
                    at_most=10**5,
                    length=(1, 8),
                ),
                "heads": count(4, "attention heads, a divisor of the channels", 10**5),
                "layers": count(1, "residual blocks per level", 1000),
                "attention_levels": optional(
                    0,
                    "levels with attention, the coarsest; 0: all",
                    8,
                    hint="0 is all of them.",
                ),
                "steps": count(2500, "optimiser steps"),
                "batch_size": _batch(32),
                "learning_rate": _rate(1e-3),
                "warmup": optional(100, "steps of linear warm-up"),
                "ema_decay": _average(0.999),
                "drop_rate": fraction(0.1, "of the text, for classifier-free guidance"),
            },
        ),
        "image_encoder": Section(
            "for the ablations that condition on image embeddings",
            {
                "steps": optional(0, "optimiser steps; 0: do not train one"),
                "batch_size": _batch(64),
                "learning_rate": _rate(1e-3),
                "patch": count(4, "pixels along a side of a patch", _MAX_SIDE),
                "width": count(64, "dims of a token", 10**5),
                "layers": count(2, "its transformer layers", 1000),
                "heads": count(4, "attention heads, a divisor of the width", 10**5),
            },
        ),
        "controlnet": Section(
            "for the ablation that conditions on edges",
            {
                "steps": optional(0, "optimiser steps; 0: do not train one"),
                "batch_size": _batch(32),
                "learning_rate": _rate(5e-4),
                "drop_rate": fraction(0.5, "of the text, as in the ControlNet paper"),
            },
        ),
        "judge": Section(
            "a classifier of the pool's images, by which the base is judged",
            {
                "steps": optional(300, "optimiser steps; 0: do not train one"),
                "width": count(16, "channels of its first stage", 10**5),
                "batch_size": _batch(32),
                "learning_rate": _rate(1e-3),
                "samples": count(
                    100, "images that the base draws for it to classify", 10_000
                ),
            },
        ),
        "held_out": Field(
            0.05,
            "fraction of the pool on which nothing is trained, at most 200 images, to "
            "measure the autoencoder and the judge on",
            at_least=0,
            at_most=0.5,
            hint="0 measures neither.",
        ),
        "log_every": count(50, "steps per row of metrics"),
        "checkpoint_every": count(500, "steps between checkpoints"),
    },
)

_ENCODE = Section(
    "images and prompts -> VAE moments and text states, cached",
    {
        "batch_size": _batch(16, "images, or prompts, per batch"),
        "flip": Field(
            False,
            "True: also encode mirror images, for `finetune` to draw from; not for "
            "images where left and right matter: digits, text, a heart",
        ),
        "dtype": one_of(
            "float32", ("float32", "float16"), "on disk; float16 takes half the space"
        ),
    },
)

_PAIRS = Section(
    "pairs of images of one class, for `finetune`",
    {"rounds": count(1, "pairs per training image", 100_000)},
)

_FINETUNE = Section(
    "the base's UNet, conditioned on a source image",
    {
        "mode": one_of(
            "full", ("full", "lora"), "lora: adapters only, for smaller GPUs"
        ),
        "lora": Section(
            "adapters, with the mode `lora`",
            {
                "rank": count(16, "of the adapters", 4096, hint="Typical are 4 to 64."),
                "targets": Field(
                    ("to_q", "to_k", "to_v", "to_out.0"),
                    "layers that get adapters, as in diffusers' scripts",
                    word=True,
                    length=(1, 1000),
                    distinct=True,
                ),
            },
        ),
        "steps": count(1000, "optimiser steps"),
        "batch_size": _batch(50, "pairs per batch; the supplement's is 50"),
        "accumulate": count(1, "micro-batches per step, for less memory", _MAX_BATCH),
        "learning_rate": _rate(1e-4, "learning rate of Adam; the supplement's is 1e-4"),
        "schedule": one_of(
            "constant", ("constant", "cosine"), "of the learning rate; cosine: to 0"
        ),
        "warmup": optional(0, "steps of linear warm-up"),
        "max_norm": optional(1.0, "of the gradient; 0: no clipping"),
        "ema_decay": _average(0.0),
        "min_snr": optional(
            0.0, "gamma of min-SNR weighting, typically 5; 0: off", 1000
        ),
        "drop_rate": Field(
            0.05,
            "p of InstructPix2Pix's conditioning dropout",
            at_least=0,
            at_most=1 / 3,
            hint="Text, image and both are dropped at this rate.",
        ),
        "max_skipped": count(
            10, "consecutive steps without a finite loss before it stops"
        ),
        "dtype": _dtype(),
        "attention": _attention(),
        "remat": one_of(
            "none",
            ("none", "blocks", "full"),
            "what is computed again in the backward pass: less memory, more time",
        ),
        "memory_gib": _memory(),
        "log_every": count(20, "steps per row of metrics"),
        "sample_every": optional(500, "steps between grids of samples; 0: none"),
        "samples": count(8, "pairs per grid of samples", 1000),
        "checkpoint_every": count(500, "steps between checkpoints"),
        "checkpoint_minutes": _minutes("by steps only"),
        "keep": count(2, "checkpoints, the newest", 10**6),
    },
)

_MIX = Section(
    "captions -> recipes, which say what is mixed",
    {
        "per_image": count(
            4,
            "synthetic images per training image; can be raised later",
            100_000,
            hint="The paper makes 3 to 4.",
        ),
        "modes": Field(
            ("coarse", "fine"),
            "of mixing, in turn; both: both in one image",
            choices=("coarse", "fine", "both"),
            length=(1, 1000),
            hint="Choose some of these.",
        ),
        "tokens": Field(
            4,
            "k: token positions that coarse mixing replaces",
            at_least=0,
            at_most=1024,
            hint="0 mixes none; the default is 4.",
        ),
        "tokens_most": optional(
            0,
            "above `tokens`: k is drawn per image, up to this maximum",
            1024,
            hint="0 always uses config.mix.tokens.",
        ),
        "positions": one_of(
            "caption",
            ("caption", "first", "span", "all"),
            "which tokens: k of the words of the caption, its first k, a span of k "
            "consecutive ones, or any k of all 77 but BOS",
        ),
        "class_prompt": Field(False, 'True: also the words of "a photo of ..."'),
        "partner": one_of(
            "class", ("class", "any"), "whether partners are of the same class"
        ),
        "partners": count(1, "m: partners per image", 10_000, hint="The paper uses 1."),
        "partner_prompt": one_of(
            "auto",
            ("auto", "other", "any"),
            "other: partners of another prompt are preferred, as mixing equal ones "
            "changes nothing; auto: other, or in a workdir older than this field any",
        ),
        "dims": Field(
            8,
            "d: text dims that fine mixing replaces; supplement: below 10",
            at_least=0,
            at_most=10**5,
            hint="The paper replaces fewer than 10 of 768.",
        ),
        "dims_per_token": Field(False, "True: different dims for each token"),
        "dims_on": one_of(
            "all",
            ("all", "words"),
            "tokens whose dims are mixed: all, or only the words of the caption",
        ),
        "pooled": one_of(
            "source",
            ("source", "mixed", "partner"),
            "of Stable Diffusion XL: the pooled embedding is the source's, halfway to "
            "the partners', or the first partner's",
        ),
        "file": Field("", "edited recipes.jsonl to use; empty: draw the recipes"),
        "levels": Field(
            False,
            "True: also levels.jsonl, for Figure 5 of the supplement (levels.png)",
        ),
    },
)

_SCALE_HINT = "InstructPix2Pix uses 7.5 for text and 1.5 for the image."


def _scale(default: float, help: str) -> Field:
    return Field(default, help, at_least=0, at_most=1000, hint=_SCALE_HINT)


def _scale_most(of: str) -> Field:
    about = f"above 0: `mix` draws each image's scale uniformly from {of} to this"
    hint = f"0 always uses config.generate.{of}."
    return optional(0.0, about, 1000, hint=hint)


_FILTER = Section(
    "removes synthetic images; by default all are kept",
    {
        "label": one_of(
            "",
            ("", "folds", "clip"),
            "what must predict an image's label: a classifier trained on real images "
            "other than its source and partners (folds), or CLIP; empty: off",
        ),
        "label_folds": Field(
            5, "folds of the real images for `folds`", at_least=2, at_most=1000
        ),
        "label_threshold": fraction(
            0.5, "accept the label from this probability on, or", hint="A probability."
        ),
        "label_top": Field(
            1,
            "if it is among so many most probable ones; 0: never",
            at_least=0,
            at_most=10**6,
            hint="0 switches it off.",
        ),
        "copies": one_of(
            "",
            ("", "any", "source"),
            "remove images too close to any real training image, or to their own "
            "source; empty: off",
        ),
        "copies_quantile": fraction(
            0.0,
            "too close is less than this quantile of the distances from each real "
            "image to its nearest neighbour; 0: less than their minimum",
            hint="0 is the minimum, 1 the maximum.",
        ),
        "outliers": Field(False, "True: remove images too far from real ones"),
        "outliers_quantile": fraction(
            0.99,
            "too far is above this quantile of the real images' own distances within "
            "the class",
            hint="0 is the minimum, 1 the maximum.",
        ),
        "features": one_of(
            "auto",
            ("auto", "pixels", "clip"),
            "of outliers and folds: distances in [0, 1] between pixels, at no more "
            "than 32 a side, or in [0, 2] between CLIP embeddings; auto: clip if any",
        ),
    },
)

_SETS = (
    "mixed",
    "unmixed",
    "pretrained",
    "caption_only",
    "noised",
    "interpolated",
    "image_embedding",
    "image_number",
    "embedding_difference",
    "controlnet",
    "real_guidance",
    "gif_sd",
    "da_fusion",
    "diff_mix",
)

_GENERATE = Section(
    "recipes -> synthetic images",
    {
        "sets": Field(
            ("mixed", "unmixed"),
            "datasets to draw (docs/mixing.md); empty: none, for classifiers of real "
            "images alone",
            choices=_SETS,
            length=(0, len(_SETS)),
            distinct=True,
            hint="Choose some of these.",
        ),
        "coarse_fine": Field(
            0,
            "rows of Figures 1 to 3 of the supplement (coarse_fine.png): a real image, "
            "then coarse and fine mixing of it; 0: none",
            at_least=0,
            at_most=100,
            hint="10 rows show ten classes.",
        ),
        "conditioning": Field(
            "",
            '"all", or some sets to show in Figure 4 of the supplement '
            "(conditionings.png); empty: none",
        ),
        "clip": Field(
            "",
            "CLIP for image_embedding and embedding_difference: a folder or hub name "
            "whose embeddings have the width of the base's text states; empty: the "
            "base's image_encoder",
        ),
        "controlnet": Field(
            "",
            "ControlNet for Canny edges: a folder or hub name; empty: the one of "
            "`pretrain`",
        ),
        "limit": Field(
            0,
            "above 0: stop after a contact sheet of this many images",
            at_least=0,
            at_most=1000,
            hint="0 draws the dataset; 16 images make a contact sheet.",
        ),
        "sampler": one_of("ddim", ("ddim", "euler", "dpmpp_2m"), "of the images"),
        "steps": count(
            50,
            "of the sampler",
            999,
            hint="The model has 1000 training timesteps; the default is 50.",
        ),
        "timestep_spacing": one_of(
            "auto",
            SPACINGS,
            "of the sampler, as diffusers names them; auto: trailing, which starts in "
            "noise, or in a workdir older than this field what it began with",
        ),
        "text_scale": _scale(7.5, "s_T of InstructPix2Pix, guidance by the text"),
        "text_scale_most": _scale_most("text_scale"),
        "image_scale": _scale(1.5, "s_I of InstructPix2Pix, guidance by the image"),
        "image_scale_most": _scale_most("image_scale"),
        "guidance_interval": Field(
            (0.0, 1.0),
            "guidance acts between these timesteps, as fractions of the training "
            "timesteps; 0 is without noise",
            item=float,
            at_least=0,
            at_most=1,
            length=(2, 2),
            ascending=True,
            hint="(0.0, 1.0) guides at every step.",
        ),
        "guidance_rescale": fraction(
            0.0,
            "phi; 1: the contrast of an unguided prediction",
            hint="0 switches it off; 0.7 is a typical value.",
        ),
        "noise_scale": Field(
            0.1,
            "for `noised`, in standard deviations of the text states",
            at_least=0,
            at_most=1000,
            hint="0.1 is a tenth of the states' standard deviation.",
        ),
        "interpolation": fraction(
            0.5,
            "for `interpolated`: weight of the partner",
            hint="It is the weight of the partner.",
        ),
        "strength": Field(
            (0.5,),
            "for `real_guidance`, `gif_sd`, `da_fusion` and `diff_mix`: noise that is "
            "added to the source, of which each image draws one; 0 is the source, 1 is "
            "noise",
            item=float,
            at_least=0,
            at_most=1,
            length=(1, 100),
            distinct=True,
            hint="DA-Fusion draws from 0.25,0.5,0.75,1.0.",
        ),
        "perturbation": Field(
            0.8,
            "for `gif_sd`: the most that a number of the latents is changed by",
            at_least=0,
            at_most=1000,
            hint="GIF's commands have 0.8, and 4 for Caltech-101.",
        ),
        "soft_label_gamma": Field(
            0.8,
            "for `diff_mix`: the other class has the probability strength^gamma",
            at_least=0,
            at_most=100,
            hint="0.8 is in the example of Diff-Mix's code.",
        ),
        "dtype": _dtype(),
        "attention": _attention(),
        "batch_size": _batch(16),
        "max_redraws": Field(
            3,
            "of an image that is NaN, black or of a single colour",
            at_least=0,
            at_most=100,
        ),
        "shard_size": count(1000, "images per Parquet file"),
        "folder": Field(True, "also write train/<class>/*.png"),
        "format": one_of("png", ("png", "jpeg"), "in Parquet files and folder"),
        "size": Field(
            0,
            "pixels of the written images, resized by area; 0: as generated; -1: the "
            "size of the source, if smaller",
            at_least=-1,
            at_most=_MAX_SIDE,
            hint="0: as drawn, -1: as the source image, else in pixels.",
        ),
        "include_real": Field(False, "True: also write the training images"),
        "filter": _FILTER,
    },
)

_CLASSIFIERS = (
    "resnet8",
    "resnet20",
    "resnet56",
    "resnet18",
    "resnet34",
    "resnet50",
    "wide_resnet50_2",
    "wrn16_4",
    "wrn40_2",
    "wrn28_10",
    "efficientnet_b0",
    "efficientnet_b1",
    "efficientnet_b2",
    "efficientnet_b3",
    "efficientnet_lite0",
    "shake_shake26_2x96d",
    "pyramidnet272",
)

_CLASSIFY = Section(
    "classifiers on real and synthetic images",
    {
        "runs": Field(
            (
                "real",
                "real+affine",
                "combined+affine",
                "probabilistic+affine",
                "probabilistic:real+affine",
                "probabilistic:unmixed+affine",
            ),
            "regime[:set][+policy][+mix] of each (docs/classifiers.md)",
            word=True,
            length=(1, 1000),
            distinct=True,
            hint="Name at least one run, and no run twice.",
        ),
        "model": one_of("resnet20", _CLASSIFIERS, "the network"),
        "width": optional(
            0, "of a ResNet's first stage; 0: the model's default", 10**5
        ),
        "stem": one_of(
            "",
            ("", "cifar", "imagenet"),
            "of a ResNet: cifar for small images; empty: the model's default",
        ),
        "stem_stride": count(1, "of the CIFAR stem", 100),
        "pretrained": Field(
            "", "folder, file or hub name of weights; empty: from scratch"
        ),
        "pretrained_revision": Field(
            "", "of a hub name: branch, tag or commit; empty: the default"
        ),
        "size": optional(
            0,
            "pixels of its input, downscaled by area; 0: data.size",
            _MAX_SIDE,
            hint="0 is config.data.size.",
        ),
        "seeds": count(3, "classifiers per run", 10_000),
        "seeds_at_once": optional(
            0,
            "trained together by vmap; 0: one after another",
            10_000,
            hint="0 trains one after another.",
        ),
        "steps": count(1000, "optimiser steps, the same for every run"),
        "epochs": optional(
            0.0, "over the real images, instead of `steps`; 0: use steps", 10**6
        ),
        "batch_size": _batch(50),
        "optimizer": one_of("adam", ("adam", "sgd"), "sgd: with Nesterov's momentum"),
        "learning_rate": _rate(1e-3, "learning rate, at its highest"),
        "schedule": one_of(
            "cosine", ("constant", "cosine", "multistep"), "of the learning rate"
        ),
        "warmup": optional(0, "steps of linear warm-up"),
        "milestones": Field(
            (0.5, 0.75),
            "fractions of the steps, for the schedule `multistep`",
            item=float,
            above=0,
            below=1,
            ascending=True,
            hint="Write e.g. 0.5,0.75.",
        ),
        "gamma": fraction(0.1, "factor of the learning rate at each milestone"),
        "momentum": Field(0.9, "for sgd", at_least=0, below=1, hint="0.9 is typical."),
        "weight_decay": fraction(
            1e-4, "of the kernels", hint="0.0005 is typical with SGD."
        ),
        "flip": Field(True, "False: policies do not flip, where left and right matter"),
        "randaugment_count": count(2, "N of RandAugment", 14, hint="The paper has 2."),
        "randaugment_magnitude": Field(
            9.0, "M of RandAugment", at_least=0, at_most=30, hint="9 is typical."
        ),
        "alpha": Field(
            1.0,
            "of Beta(alpha, alpha) in MixUp and CutMix",
            at_least=1e-3,
            at_most=1000,
            hint="1 is CutMix's value, and MixUp's for CIFAR.",
        ),
        "label_smoothing": fraction(0.0, "0: none"),
        "class_weights": one_of(
            "none", ("none", "balanced"), "balanced: for imbalanced classes"
        ),
        "ema_decay": _average(0.0),
        "validation": Field(
            0.0,
            "fraction of train held out to select the best state",
            at_least=0,
            at_most=0.9,
            hint="0.1 to 0.2 is typical; 0 holds nothing out.",
        ),
        "validate_every": optional(
            0, "steps; 0: at the end only", hint="0 validates at the end only."
        ),
        "patience": optional(
            0, "steps without improvement before stopping early; 0: never"
        ),
        "probability": fraction(
            0.8,
            "p of `probabilistic` and `replace_*`",
            hint="The paper's probability is 0.8.",
        ),
        "ratio": optional(
            0.0,
            "synthetic images to use per real image; 0: all",
            hint="0 uses all of them.",
        ),
        "phase_two": fraction(
            0.25, "fraction of `two_phase`'s steps on real images only"
        ),
        "phase_two_rate": fraction(0.1, "factor of the learning rate in these steps"),
        "dtype": _dtype(),
        "images_gib": optional(
            0.0,
            "images up to this size stay on the device, else they are read from disk; "
            "0: half of the device's memory",
            _MAX_GIB,
            hint="0 is half of the device's memory.",
        ),
        "memory_gib": _memory(),
        "steps_at_once": optional(
            0,
            "per dispatch; 0: 1 on CPUs, else up to 50",
            hint="0 chooses by device.",
        ),
        "log_every": count(50, "steps per row of metrics"),
        "checkpoint_minutes": _minutes("at the end, and at validations"),
    },
)

_METRICS = (
    "frechet",
    "kid",
    "cmmd",
    "prdc",
    "vendi",
    "text",
    "shift",
    "classes",
)

_EVALUATE = Section(
    "metrics of all classifiers and sets",
    {
        "features": one_of(
            "pixels",
            ("pixels", "clip", "dinov2", "inception", *_CLASSIFIERS),
            "space in which sets are compared (docs/metrics.md); all but pixels need "
            "weights",
        ),
        "weights": Field(
            "",
            "of `features`: folder, file or hub name; empty: for clip that of "
            "generate.clip, or of the base; for inception the published ones",
        ),
        "metrics": Field(
            _METRICS,
            "of each set, besides copies and diversity (docs/metrics.md)",
            choices=_METRICS,
            distinct=True,
            hint="Choose some of these.",
        ),
        "neighbours": count(
            5,
            "k of precision, recall, density, coverage and predicted labels",
            1000,
        ),
        "batch_size": _batch(64, "images embedded at once"),
        "confidence": Field(
            0.95,
            "level of the intervals",
            above=0,
            below=1,
            hint="A common value is 0.95.",
        ),
    },
)

_REPORT = Section(
    "an HTML page and a picture",
    {
        "title": Field("Mixing Visual Concepts", "of the page"),
        "grid_columns": count(2, "synthetic images per mode and class", 8),
        "grid_scale": Field(
            64, "display pixels along one side of an image", at_least=16, at_most=256
        ),
    },
)

FIELDS = Section(
    "the whole config",
    {
        "seed": Field(0, "of every draw", at_least=0, at_most=2**32 - 1),
        "stages": Field(
            "all", "or a comma-separated list, run in the order of the pipeline"
        ),
        "min_free_disk_gib": Field(
            0.5,
            "free space on the workdir's disk, checked before any work",
            at_least=0,
            at_most=10**9,
        ),
        "compilation_cache": Field(
            "~/.cache/mvc_jax/xla", "folder of compiled programs; empty: none"
        ),
        "track": Field(
            ("tensorboard",),
            "programs that show losses, samples and results (docs/trackers.md); empty: "
            "none",
            choices=("tensorboard", "wandb", "mlflow"),
            distinct=True,
            hint="Choose some of these.",
        ),
        "mesh": Section(
            "devices and how they share the work (shared)",
            {
                "data": count(
                    -1,
                    "devices that shard the batch; -1: all that fsdp leaves",
                    10**6,
                    also=(-1,),
                    hint="-1 uses every device.",
                ),
                "fsdp": count(1, "devices that also shard the parameters", 10**6),
            },
        ),
        "data": _DATA,
        "base": _BASE,
        "caption": _CAPTION,
        "pretrain": _PRETRAIN,
        "encode": _ENCODE,
        "pairs": _PAIRS,
        "finetune": _FINETUNE,
        "mix": _MIX,
        "generate": _GENERATE,
        "classify": _CLASSIFY,
        "evaluate": _EVALUATE,
        "report": _REPORT,
    },
)


def get_config(argument: str = "") -> ConfigDict:
    parse_argument(argument)
    return FIELDS.defaults()
