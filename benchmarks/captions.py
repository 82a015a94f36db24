"""What captions without a network say: `attributes` beside `template`.

    python benchmarks/captions.py --images=scan:FOLDER [--base=BASE] [--count=2000]

For images of a folder with a subfolder for each class (or a Parquet file of
`datasets`, by its path), it prints the distinct captions of a class, the tokens of the
longest prompt, and which share of the variance of the text states is within classes:
that is what mixing has to mix. Text states are those of the base at BASE, without BOS;
without `--base` those with which `pretrain` begins: a tokenizer of these captions, and
a text encoder of random weights.
"""

import argparse
import io
import pathlib
import tempfile
from typing import Any

import numpy as np
from PIL import Image

from mvc_jax.data import captions
from mvc_jax.data.attribute_captions import KINDS, attribute_captions

_SIDE = 64  # pixels, at which images are measured
_TEMPLATE = "{caption}, a photo of {class_type} {label}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, help=f"one of {[*KINDS]}, :, a path")
    parser.add_argument("--class_type", default="", help="as data.class_type")
    parser.add_argument("--base", default="", help="folder of a Stable Diffusion")
    parser.add_argument("--count", type=int, default=2000, help="images, at random")
    arguments = parser.parse_args()
    kind, _, path = arguments.images.partition(":")
    images, labels = read(pathlib.Path(path), arguments.count)
    found = {
        "template": [f"{arguments.class_type} {label}".strip() for label in labels],
        "attributes": attribute_captions(images, kind),
    }
    print("| captioner | distinct | per class, mean | tokens, at most | within, % |")
    print("|---|---:|---:|---:|---:|")
    for captioner, texts in found.items():
        prompts = [
            captions.fill(
                _TEMPLATE, text, class_type=arguments.class_type, class_name=label
            ).text
            for text, label in zip(texts, labels, strict=True)
        ]
        per_class = [
            len({t for t, x in zip(texts, labels, strict=True) if x == label})
            for label in sorted({*labels})
        ]
        tokens, within = states(arguments.base, prompts, labels)
        mean = np.mean(per_class)
        print(f"| {captioner} | {len({*texts})} | {mean:.1f} | {tokens} | {within} |")


def read(path: pathlib.Path, count: int) -> tuple[np.ndarray, list[str]]:
    """uint8 [N, S, S, 3] and class names of `count` images, drawn at random."""
    rng = np.random.default_rng(0)
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        table = pq.read_table(path, columns=["image", "label"])
        rows = np.sort(rng.permutation(len(table))[:count])
        cells = table.take(rows).to_pylist()
        opened = [(io.BytesIO(x["image"]["bytes"]), str(x["label"])) for x in cells]
    else:
        files = sorted(x for x in path.glob("*/*") if x.is_file())
        rows = np.sort(rng.permutation(len(files))[:count])
        opened = [(files[i], files[i].parent.name) for i in rows]
    images = [
        np.asarray(Image.open(file).convert("RGB").resize((_SIDE, _SIDE)))
        for file, _ in opened
    ]
    return np.stack(images), [label for _, label in opened]


def states(base: str, prompts: list[str], labels: list[str]) -> tuple[str, str]:
    """Tokens of the longest prompt; the share of variance within classes, in %."""
    import jax

    from mvc_jax.checkpoints import diffusers_layout

    if base:
        model, params = diffusers_layout.load(base, ("text_encoder",))
    else:
        model, params = beginning(prompts)
    distinct = sorted({*prompts})
    run = jax.jit(model.text_states)
    batches = [distinct[i : i + 64] for i in range(0, len(distinct), 64)]
    made = [
        np.asarray(run(params, model.tokenize(x + [""] * (64 - len(x)))))[: len(x)]
        for x in batches
    ]
    row = {text: i for i, text in enumerate(distinct)}
    found = np.concatenate(made)[:, 1:]
    found = found.reshape(len(found), -1)[[row[text] for text in prompts]]
    total = np.square(found - found.mean(0)).sum()
    names = np.asarray(labels)
    within = sum(
        np.square(mine - mine.mean(0)).sum()
        for mine in (found[names == name] for name in {*labels})
    )
    longest = max(map(model.count_tokens, distinct))
    return f"{longest} of {model.context_length}", f"{100 * within / total:.1f}"


def beginning(prompts: list[str]) -> tuple[Any, dict[str, Any]]:
    """The small base before its first step: architecture, and its text encoder."""
    from mvc_jax import pretrain
    from mvc_jax.checkpoints import clip_tokenizer
    from mvc_jax.configs import common
    from mvc_jax.models.stable_diffusion import random_params
    from mvc_jax.pretraining import small, tokenizer

    config = common.get_config()
    with tempfile.TemporaryDirectory() as folder:
        size = config.pretrain.vocab_size
        tokenizer.train(folder, prompts, vocab_size=size, max_length=captions.LONGEST)
        read, _ = clip_tokenizer.read(folder)
        longest = tokenizer.longest(read, prompts, most=captions.LONGEST)
        tokenizer.set_length(folder, longest)
        read, _ = clip_tokenizer.read(folder)
    model = small.stable_diffusion(read, **pretrain._architecture(config, longest))
    rng = np.random.default_rng(0)
    return model, {"text_encoder": random_params(model.shapes("text_encoder"), rng)}


if __name__ == "__main__":
    main()
