"""Mixes a million embeddings, and compares with the NumPy loop that a user would write.

    python benchmarks/mix.py

Text states [P, 77, 768] of P prompts; recipes as `mix` draws them, coarse and fine in
turn. Ours: `operations.as_arrays` on the host, then `operations.mix`, vmapped and
jitted with its gather from the table; a batch is dispatched while the next is padded.
The loop: image by image, E[pos] = F[pos], E[1:, dims] = F[1:, dims]; alone, which
overwrites one embedding in the processor's cache, and into a new array for each batch,
as a UNet takes them and ours makes them. The three alternate on the same recipes. In
the first turn every embedding is compared bit by bit. Only the last batch is kept: a
million embeddings are 236 GB.
"""

import argparse
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mvc_jax.mixing import operations, recipes
from mvc_jax.training import runtime

SHAPE = {"length": 77, "width": 768}
CLASSES, CAPTION, CLASS_PROMPT = 8, 9, 6  # the last two in tokens, as of BLIP-2


def main() -> None:
    arguments = parse()
    runtime.set_up("")  # as the program: glibc keeps freed memory
    turn = Turn(arguments.prompts, arguments.turn, arguments.batch)
    for ours, batch in zip(turn.on_device(), turn.batches, strict=True):
        np.testing.assert_array_equal(ours, [*loop(turn.states, batch, turn.row_of)])

    seconds: dict[str, list[float]] = {"ours": [], "loop": [], "loop, batches": []}
    for _ in range(max(arguments.count // len(turn.made), 1)):
        began = time.perf_counter()
        turn.run()
        seconds["ours"].append(time.perf_counter() - began)
        began = time.perf_counter()
        for one in loop(turn.states, turn.made, turn.row_of):
            one[-1, -1]  # noqa: B018
        seconds["loop"].append(time.perf_counter() - began)
        began = time.perf_counter()
        turn.run_loop()
        seconds["loop, batches"].append(time.perf_counter() - began)
    report(seconds, turn)


def rates(*, count: int, prompts: int, turn: int, batch: int) -> Iterator[dict]:
    """The row of `accelerator.py`: ours alone.

    Args:
      count: embeddings whose seconds are reported, from the rate of some turns.
      prompts: P.
      turn: recipes per turn.
      batch: embeddings per program.
    """
    import measure

    work = Turn(prompts, turn, batch)
    work.run()
    seconds = measure.seconds_per_call(lambda times: [work.run() for _ in range(times)])
    yield measure.row(
        f"{count:,} text states of 77 x 768, batch {batch}",
        count * seconds / turn,
        "s",
        note=f"{turn / seconds:,.0f}/s; recipes drawn: {work.drawing_rate:,.0f}/s",
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="divides --turn")
    parser.add_argument("--turn", type=int, default=8192, help="recipes per turn")
    return parser.parse_args()


def random_prompts(count: int) -> tuple[list[dict], np.ndarray]:
    """Rows as of `encode`, with captions of several lengths, and random text states."""
    rng = np.random.default_rng(0)
    rows = []
    for i, words in enumerate(rng.integers(CAPTION - 4, CAPTION + 5, count).tolist()):
        label = i % CLASSES
        row = {
            "id": f"{i}.png",
            "label": label,
            "class_name": f"class {label}",
            "prompt": f"{i}",
            "caption_start": 1,
            "caption_tokens": words,
            "tokens": words + CLASS_PROMPT + 2,
        }
        rows.append(row)
    shape = (count, SHAPE["length"], SHAPE["width"])
    return rows, rng.standard_normal(shape, np.float32)


def mix_batch(table: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
    """Mixed states [B, L, D] of a batch of recipes.

    The whole table is passed as the partners, so that none of them is copied.
    """
    rows = jax.vmap(lambda partners, donors: partners[donors])
    return jax.vmap(operations.mix, in_axes=(0, None, 0, 0, 0, 0))(
        table[arrays["source"]],
        table,
        arrays["positions"],
        rows(arrays["partners"], arrays["donors"]),
        arrays["dims"],
        rows(arrays["partners"], arrays["dim_donors"]),
    )


class Turn:
    """The recipes of a turn in batches, and the compiled program that mixes a batch."""

    def __init__(self, prompts: int, count: int, batch: int):
        """Draws `count` recipes over this many prompts, and compiles."""
        rows, self.states = random_prompts(prompts)
        self.row_of = {row["id"]: i for i, row in enumerate(rows)}
        classes, drawing = recipes.classes_of(rows), recipes.Drawing()
        began = time.perf_counter()
        self.made = [
            recipes.make_recipe(k, rows, classes, drawing, seed=0, **SHAPE)
            for k in range(count)
        ]
        self.drawing_rate = count / (time.perf_counter() - began)
        self.batches = [self.made[i : i + batch] for i in range(0, count, batch)]
        self._widths = operations.widths_of(self.made)
        self._table = jnp.asarray(self.states)
        began = time.perf_counter()
        arrays = self._arrays(self.batches[0])
        self._mixed = jax.jit(mix_batch).lower(self._table, arrays).compile()
        self.compiling = time.perf_counter() - began

    def run(self) -> None:
        """Mixes all batches, and waits for each."""
        for mixed in self.on_device():
            mixed.block_until_ready()

    def run_loop(self) -> None:
        """The same by the loop, each batch in a new array."""
        for batch in self.batches:
            in_batch(self.states, batch, self.row_of)

    def on_device(self) -> Iterator[jax.Array]:
        """Yields each mixed batch after the next one was dispatched."""
        previous = None
        for batch in self.batches:
            current = self._mixed(self._table, self._arrays(batch))
            if previous is not None:
                yield previous
            previous = current
        yield previous

    def _arrays(self, batch: list[dict]) -> dict[str, np.ndarray]:
        return operations.as_arrays(batch, self.row_of, **SHAPE, widths=self._widths)


def loop(
    states: np.ndarray, made: list[dict], row_of: dict[str, int]
) -> Iterator[np.ndarray]:
    """What a user would write, for one partner and the same dims for every token."""
    for recipe in made:
        mixed = states[row_of[recipe["source"]]].copy()
        partner = states[row_of[recipe["partners"][0]]]
        positions = recipe["positions"]
        mixed[positions] = partner[positions]
        for dims in recipe["dims"]:
            mixed[1:, dims] = partner[1:, dims]
        yield mixed


def in_batch(
    states: np.ndarray, made: list[dict], row_of: dict[str, int]
) -> np.ndarray:
    """The loop's embeddings in one array [B, L, D]."""
    batch = np.empty((len(made), *states.shape[1:]), states.dtype)
    for place, mixed in zip(batch, loop(states, made, row_of), strict=True):
        place[:] = mixed
    return batch


def report(seconds: dict[str, list[float]], turn: Turn) -> None:
    device = jax.devices()[0].device_kind
    total = {name: sum(values) for name, values in seconds.items()}
    count = len(turn.made) * len(seconds["ours"])
    gigabytes = SHAPE["length"] * SHAPE["width"] * 4 / 1e9
    print(f"{count} embeddings of 77 x 768 on {device}, {len(turn.made)} per turn")
    print("bit-identical")
    for name, value in total.items():
        rate = count / value
        print(f"{name}: {rate:,.0f} embeddings/s, {rate * gigabytes:.1f} GB/s written")
    for name in ("loop", "loop, batches"):
        turns = zip(seconds["ours"], seconds[name], strict=True)
        ratios = sorted(theirs / ours for ours, theirs in turns)
        print(
            f"ours / {name}: {total[name] / total['ours']:.2f}x; by turn: median "
            f"{ratios[len(ratios) // 2]:.2f}x, from {ratios[0]:.2f} to {ratios[-1]:.2f}"
        )
    print(
        f"compiled in {turn.compiling:.2f} s; recipes drawn: {turn.drawing_rate:,.0f}/s"
    )


if __name__ == "__main__":
    main()
