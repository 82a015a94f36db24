"""Drawing images: ours against PyTorch's InstructPix2Pix pipeline.

    python benchmarks/sample.py

Both sides load the same checkpoint of random weights and draw the same images, from the
same noise, source latents and text states, by DDIM with three branches of guidance, the
decoder included; the benchmark first checks that the pixels agree. `fast` is ours with
the preset of that name: DPM-Solver++ 2M, at most 20 steps, guided in an interval. Each
side runs in a process of its own with all cores, and they take turns, so that other
load on the machine affects both.

On an accelerator only ours runs: Stable Diffusion 1.5's architecture in bfloat16 at
512 pixels, 50 steps.
"""

import argparse
import functools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from architectures import UNETS, write
from turns import accelerator, in_turns, peak, resident, results

TEXT_SCALE, IMAGE_SCALE = 7.5, 1.5
FAST = {"sampler": "dpmpp_2m", "guidance_interval": (0.2, 0.8)}  # and 20 steps at most
PLAIN = {"sampler": "ddim", "guidance_interval": (0.0, 1.0)}


def main() -> None:
    arguments = parse()
    sides = {"ours": ours, "torch": torch_s, "fast": fast}
    if arguments.model == "sd15":
        sides.pop("torch")
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = pathlib.Path(folder)
        write(arguments.folder, arguments.model)
        compiling, seconds, memory = in_turns(sides, arguments)
        compare(arguments)
        for name, settings in (("ours", PLAIN), ("fast", FAST)):
            print(f"{name}: {rows(arguments, settings)} rows of the UNet an image")
    print(results(arguments, compiling, seconds, memory))


def parse() -> argparse.Namespace:
    big = accelerator()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=UNETS, default="sd15" if big else "small")
    parser.add_argument("--batch", type=int, default=16 if big else 2, help="images")
    parser.add_argument("--size", type=int, default=512 if big else 256, help="pixels")
    parser.add_argument("--ddim_steps", type=int, default=50 if big else 10)
    parser.add_argument("--attention", default="auto", help="ours: auto, xla, ...")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=2 if big else 1, help="batches")
    return parser.parse_args()


def inputs(arguments: argparse.Namespace) -> dict[str, np.ndarray]:
    """Source latents, text states and the noise of a batch, drawn at random."""
    rng = np.random.default_rng(0)
    side = arguments.size // 8
    shape = (arguments.batch, side, side, 4)
    text = (77, UNETS[arguments.model]["cross_attention_dim"])
    return {
        "source": rng.normal(size=shape).astype(np.float32),
        "noise": rng.normal(size=shape).astype(np.float32),
        "states": rng.normal(size=(arguments.batch, *text)).astype(np.float32),
        "null": rng.normal(size=text).astype(np.float32),
    }


def count(arguments: argparse.Namespace, settings: dict) -> int:
    return min(20, arguments.ddim_steps) if settings is FAST else arguments.ddim_steps


def rows(arguments: argparse.Namespace, settings: dict) -> int:
    """Counts the rows of the UNet's batches that one image takes."""
    import jax
    import jax.numpy as jnp

    from mvc_jax.checkpoints import diffusers_layout

    model, _ = diffusers_layout.load(arguments.folder, ())
    calls = []

    def predict(rows: int) -> Callable:
        return lambda latents, timesteps: calls.append(rows) or latents

    with jax.disable_jit():  # a scan is then a loop in Python
        sampler(arguments, settings, model)(
            predict(3),
            jnp.zeros((1, 1, 1, 1)),
            unguided=predict(1),
            guidance_interval=settings["guidance_interval"],
        )
    return sum(calls)


def sampler(arguments: argparse.Namespace, settings: dict, model) -> Callable:
    from mvc_jax.diffusion import samplers

    return samplers.make(
        settings["sampler"],
        count(arguments, settings),
        alphas_cumprod=model.alphas_cumprod,
        prediction_type=model.prediction_type,
    )


def ours(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """Compiles and draws one batch; returns `step(times)` and `peak()`."""
    return _ours(arguments, PLAIN)


def fast(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """The same with the preset."""
    return _ours(arguments, FAST)


def _ours(arguments: argparse.Namespace, settings: dict):
    from mvc_jax.training import runtime

    runtime.set_up("")
    import jax
    import jax.numpy as jnp

    from mvc_jax.checkpoints import diffusers_layout
    from mvc_jax.diffusion import instruct_pix2pix

    model, params = diffusers_layout.load(arguments.folder, ("unet", "vae"))
    model = model.with_compute_options(
        attention=arguments.attention, field="--attention"
    )

    @jax.jit
    def draw(params, batch):
        source = batch["source"]
        latents = instruct_pix2pix.draw(
            functools.partial(model.denoise, params),
            batch["noise"],
            jnp.concatenate([source, jnp.zeros_like(source)], axis=-1),  # its mode
            batch["states"],
            batch["null"],
            sampler=sampler(arguments, settings, model),
            text_scale=TEXT_SCALE,
            image_scale=IMAGE_SCALE,
            guidance_interval=settings["guidance_interval"],
        )
        return jnp.clip(model.decode(params, latents) / 2 + 0.5, 0, 1)

    params, batch = jax.device_put((params, inputs(arguments)))
    images = np.asarray(draw(params, batch))
    if settings is PLAIN:
        np.save(arguments.folder / "ours.npy", images)

    def step(times: int) -> None:
        for _ in range(times):
            found = draw(params, batch)
        assert np.isfinite(np.asarray(found)).all()

    return step, peak


def rates(*, record: float, batches: int, **options) -> Iterator[dict]:
    """Rows of `accelerator.py`: the compiled program alone, and as `generate` runs it.

    Args:
      record: images/s to compare with.
      batches: that `generate` draws.
      **options: fields of `programs.Options`.
    """
    import measure
    import programs

    given = programs.Options(**options)
    built = programs.build("generate", given, measure.mesh())
    call, arguments = measure.compiled("generate", built)
    seconds = measure.seconds_per_call(measure.repeated(call, arguments))
    setting = f"batch {given.batch}, {given.preset or '50 steps of DDIM'}"
    alone = built.examples / seconds
    yield measure.rate_row(alone, "generate", given, record=record, setting=setting)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_set(pathlib.Path(folder), call, arguments, built.examples, batches)
        written = batches * built.examples / (time.perf_counter() - began)
    yield measure.row(
        f"{setting}, PNG and Parquet written meanwhile",
        written,
        "images/s",
        record=record,
        note=f"{written / alone:.2f} of the program alone; {batches} batches and the "
        "last one's writing",
    )


def write_set(
    folder: pathlib.Path, call: Callable, arguments: tuple, size: int, batches: int
) -> None:
    """Draws and writes a set as `generate` does, with the same inputs every batch."""
    import mix
    from etils import epath

    from mvc_jax import generate
    from mvc_jax.digests import Digests
    from mvc_jax.generation import image_sampler, image_status, set_writer, synthetic
    from mvc_jax.mixing import recipes
    from mvc_jax.screening import screener

    class Sampler:
        """In place of `image_sampler.ImageSampler`, whose model is on disk."""

        def load(self, name: str) -> None:
            pass

        def stream(self, groups, advance):
            """Dispatches each batch before the previous one is fetched."""
            pending = []
            for _ in groups:
                pending.append(call(*arguments))
                if len(pending) > 1:
                    yield self.fetch(pending.pop(0))
                    advance(size)
            yield self.fetch(pending.pop())
            advance(size)

        def fetch(self, found) -> image_status.Drawn:
            return image_status.Drawn(*map(np.asarray, found))

        draw = None  # nothing is redrawn
        edits = None  # and no image starts from its source

    rows, _ = mix.random_prompts(2 * mix.CLASSES)
    classes = recipes.classes_of(rows)
    made = [
        recipes.make_recipe(k, rows, classes, recipes.Drawing(), seed=0, **mix.SHAPE)
        for k in range(batches * size)
    ]
    writer = set_writer.SetWriter(
        store=synthetic.Store(
            folder=epath.Path(folder / "mixed"),
            digests=Digests(folder / "mixed", folder / "digests.jsonl"),
            class_names=[f"class {k}" for k in range(mix.CLASSES)],
            model="random",
            shard_size=size,
        ),
        train=None,
        prompts={row["id"]: row | {"prompt": "a photo"} for row in rows},
        source_sizes={},
        size=0,
        resize="stretch",
        seed=0,
        settings=image_sampler.Settings(sampler="ddim", steps=50),
    )
    off = screener.Screener(None, train=None)
    missing = generate.Missing(len(made), writer.store.missing(len(made)))
    generate.draw_set("mixed", made, Sampler(), writer, missing, off, max_redraws=0)


def torch_s(arguments: argparse.Namespace) -> tuple[Callable, Callable]:
    """The same of PyTorch's pipeline, with the same inputs."""
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        arguments.folder, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    given = {k: torch.from_numpy(v) for k, v in inputs(arguments).items()}
    null = given["null"][None].expand(arguments.batch, -1, -1)

    def draw() -> np.ndarray:
        return pipeline(
            image=given["source"].permute(0, 3, 1, 2),  # latents are taken as they are
            prompt_embeds=given["states"],
            negative_prompt_embeds=null,
            latents=given["noise"].permute(0, 3, 1, 2),
            num_inference_steps=arguments.ddim_steps,
            guidance_scale=TEXT_SCALE,
            image_guidance_scale=IMAGE_SCALE,
            output_type="np",
        ).images

    np.save(arguments.folder / "torch.npy", draw())

    def step(times: int) -> None:
        for _ in range(times):
            found = draw()
        assert np.isfinite(found).all()

    return step, resident


def compare(arguments: argparse.Namespace) -> None:
    """Fails if the two sides did not draw the same images."""
    if not (arguments.folder / "torch.npy").exists():
        return
    mine, theirs = (
        np.load(arguments.folder / f"{name}.npy") for name in ("ours", "torch")
    )
    difference = np.abs(mine - theirs).max()
    print(f"largest difference of a pixel in [0, 1]: {difference:.1e}")
    assert difference < 1e-3 and theirs.std() > 0.01


if __name__ == "__main__":
    main()
