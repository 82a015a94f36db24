"""Attention in diffusers' Flax blocks: the choice of an implementation for each layer.

Nothing in the library is patched: `nn.intercept_methods` replaces calls of modules,
`implemented_by()` those of attention, `match_pytorch()` those that differ from
PyTorch's.

Legend: B batch, T query tokens, S key and value tokens, N heads, D width of a head.
"""

import contextlib
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from mvc_jax import devices
from mvc_jax.errors import UserError
from mvc_jax.models.flax_classes import FlaxAttention, FlaxGEGLU, FlaxTransformer2DModel

CHOICES = ("auto", "xla", "mapped", "cudnn", "pallas")
_HALF = ("bfloat16", "float16")
_CUDNN_TILE = 64  # tokens; all versions of cuDNN support multiples of it
_PALLAS_TILE = 128  # tokens, the lanes of a TPU's registers
_PALLAS_BLOCK = 512  # tokens of a block's queries and keys; scores of 1,024 do not fit
_PALLAS_KEYS = 2**20  # bytes of keys that stay in a TPU's vector memory


@dataclasses.dataclass(frozen=True)
class Layer:
    """What the choice of an implementation depends on.

    Attributes:
      backend: from `devices.backend()`.
      dtype: of the queries.
      queries: T.
      keys: S.
      width: D.
    """

    backend: str
    dtype: str
    queries: int
    keys: int
    width: int


@dataclasses.dataclass(frozen=True)
class Rule:
    """Layers that run an implementation other than XLA's.

    Attributes:
      implementation: one of `CHOICES`.
      backends: of the layers.
      dtypes: of the layers.
      queries: least number of query tokens, and a divisor of it.
      keys: the same of key tokens.
      width: the same of a head's width.
      most: greatest width of a head.
      reason: for this choice.
    """

    implementation: str
    backends: tuple[str, ...]
    dtypes: tuple[str, ...]
    queries: tuple[int, int]
    keys: tuple[int, int]
    width: tuple[int, int]
    most: int
    reason: str

    def holds(self, layer: Layer) -> bool:
        sizes = (layer.queries, self.queries), (layer.keys, self.keys)
        return (
            layer.backend in self.backends
            and layer.dtype in self.dtypes
            and layer.width <= self.most
            and all(
                size >= least and size % divisor == 0
                for size, (least, divisor) in (*sizes, (layer.width, self.width))
            )
        )


# The first rule that holds decides; where none does, XLA's own fusions run. Bytes are
# those of compiled programs, forward and backward, of one layer with its projections in
# bfloat16: written by the kernels on an H100 (8 examples), accessed on a v5e (4).
RULES = (
    Rule(
        "cudnn",
        ("hopper",),
        _HALF,
        (64, _CUDNN_TILE),
        (1, 1),
        (8, 8),
        256,
        "4,096 tokens: 0.5 instead of 13.6 GB; with 77 keys 0.2 instead of 0.7 GB; "
        "256 tokens, heads of 160: 0.2 instead of 0.3 GB. cuDNN's support matrix has "
        "gradients of heads wider than 128 for compute capability 9.x alone; JAX asks "
        "for cuDNN 9.8 or newer, which has them.",
    ),
    Rule(
        "cudnn",
        ("cuda",),
        _HALF,
        (64, _CUDNN_TILE),
        (1, 1),
        (8, 8),
        128,
        "As above, for the widths of which cuDNN has gradients on these GPUs.",
    ),
    Rule(
        "pallas",
        ("tpu",),
        ("bfloat16", "float32"),
        (1024, 1),
        (1024, 1),
        (8, 8),
        256,
        "4,096 tokens: 1.4 instead of 17.4 GB; 1,024 tokens: 0.3 instead of 1.3 GB; "
        "1,296 (576 pixels), padded to 1,536: 0.1 instead of 1.8 GB. "
        "With 77 keys the kernel would access more than XLA's fusions (1.0 and 0.7 "
        "GB), with 256 tokens nearly as much (0.30 and 0.34 GB).",
    ),
    Rule(
        "mapped",
        ("cpu",),
        (*_HALF, "float32"),
        (1024, 1),
        (1, 1),
        (1, 1),
        2**30,
        "With more tokens the scores of a layer do not fit a CPU's cache.",
    ),
)


def check(choice: str, *, field: str, backend: str, dtype: str) -> None:
    """Checks the value of the config field `field` before anything compiles.

    Raises:
      UserError: it is not one of `CHOICES`, or it is `cudnn` or `pallas` with a backend
        or a dtype for which there is no such kernel.
    """
    if choice not in CHOICES:
        raise UserError(
            field,
            wanted=f"one of {', '.join(CHOICES)}",
            got=choice,
            fix="auto chooses for each layer.",
        )
    wanted = {
        "cudnn": "an NVIDIA GPU of compute capability 8.0 or newer",
        "pallas": "a TPU",
    }
    rules = [rule for rule in RULES if rule.implementation == choice]
    if choice not in wanted:
        return
    if not any(backend in rule.backends for rule in rules):
        raise UserError(
            field,
            wanted=f"{wanted[choice]} for {choice}",
            got=f"the backend {backend}",
            fix="Use auto.",
        )
    if not any(dtype in rule.dtypes for rule in rules):
        raise UserError(
            field,
            wanted=f"activations in {' or '.join(rules[0].dtypes)} for {choice}",
            got=dtype,
            fix="Use auto, or bfloat16.",
        )


def implementation(choice: str, layer: Layer) -> str:
    """The implementation of one layer: `cudnn`, `pallas`, `mapped` or `xla`.

    `choice` is one of `CHOICES`; `cudnn` and `pallas` leave layers for which no rule
    has them to `xla`.
    """
    if choice in ("xla", "mapped"):
        return choice
    rules = (rule for rule in RULES if choice in ("auto", rule.implementation))
    return next((rule.implementation for rule in rules if rule.holds(layer)), "xla")


def attend(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S N D"],
    value: Float[Array, "B S N D"],
    *,
    choice: str = "auto",
    mesh: Mesh | None = None,
) -> Float[Array, "B T N D"]:
    """softmax(Q K^T / sqrt(D)) V; the softmax is float32 for any dtype of the inputs.

    Args:
      query: Q.
      key: K.
      value: V.
      choice: one of `CHOICES`.
      mesh: the devices over which the batch is sharded; None: one default device.
    """
    layer = Layer(
        devices.backend(mesh),
        query.dtype.name,
        query.shape[1],
        key.shape[1],
        query.shape[3],
    )
    chosen = implementation(choice, layer)
    if chosen == "cudnn":
        return _cudnn(query, key, value)
    if chosen == "pallas":
        return _pallas(query, key, value, mesh)
    if chosen == "mapped":
        return _mapped(query, key, value, 1 if mesh is None else mesh.size)
    return _plain(query, key, value)


def implemented_by(
    choice: str, mesh: Mesh | None = None
) -> contextlib.AbstractContextManager:
    """Context in which attention layers run the `implementation` for `choice`.

    `mesh` are the devices, see `attend`.

    Group norms return the dtype of their input there: Flax promotes bfloat16 to the
    float32 of the parameters, and every later residual would be float32 too. Their
    statistics stay float32.
    """

    def intercept(next_call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__":
            if isinstance(module, FlaxAttention):
                return _attention(module, choice, mesh, *args, **kwargs)
            if isinstance(module, nn.GroupNorm):
                return next_call(*args, **kwargs).astype(args[0].dtype)
        return next_call(*args, **kwargs)

    return nn.intercept_methods(intercept)


def match_pytorch() -> contextlib.AbstractContextManager:
    """Context in which GEGLU's GELU is exact and the spatial norm's epsilon is 1e-6.

    The library's Flax classes use the tanh approximation and 1e-5, unlike the PyTorch
    classes that trained every public checkpoint.
    """
    return nn.intercept_methods(_match_pytorch)


def _match_pytorch(next_call, args, kwargs, context):
    module = context.module
    if context.method_name == "__call__":
        if isinstance(module, FlaxGEGLU):
            hidden, gate = jnp.split(module.proj(args[0]), 2, axis=-1)
            return hidden * nn.gelu(gate, approximate=False)
        if isinstance(module, nn.GroupNorm) and isinstance(
            module.parent, FlaxTransformer2DModel
        ):
            object.__setattr__(module, "epsilon", 1e-6)
    return next_call(*args, **kwargs)


def _attention(module, choice, mesh, hidden_states, context=None, deterministic=True):
    """`FlaxAttention.__call__` with heads on axis 2 and `attend` for the attention."""
    context = hidden_states if context is None else context

    def heads(states):
        return states.reshape(*states.shape[:2], module.heads, module.dim_head)

    attended = attend(
        heads(module.query(hidden_states)),
        heads(module.key(context)),
        heads(module.value(context)),
        choice=choice,
        mesh=mesh,
    )
    output = module.proj_attn(attended.reshape(*attended.shape[:2], -1))
    return module.dropout_layer(output, deterministic=deterministic)


def _plain(query, key, value):
    scores = jnp.einsum(
        "btnd,bsnd->bnts", query, key, preferred_element_type=jnp.float32
    )
    probabilities = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bnts,bsnd->btnd", probabilities.astype(value.dtype), value)


def _cudnn(query, key, value, implementation="cudnn"):
    """Pads the keys to cuDNN's tile; their numbers tell it where the padding starts."""
    rows, keys = key.shape[:2]
    lengths = None
    if keys % _CUDNN_TILE:
        key, value = (_pad(x, 1, _CUDNN_TILE) for x in (key, value))
        lengths = jnp.full(rows, keys, jnp.int32)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )


def _pad(array, axis, multiple):
    """Zero-pads an axis to a multiple of a size."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, -array.shape[axis] % multiple)
    return jnp.pad(array, widths)


def _pallas(query, key, value, mesh):
    """JAX's splash attention for TPUs (on a CPU, interpreted), on each device its rows.

    Tokens are padded to its tiles, and no query sees a padded key.

    XLA cannot split the kernel over devices, so a batch that the mesh does not divide
    is left to `_plain`.
    """
    if mesh is None:
        return _splash(query, key, value, mesh)
    if query.shape[0] % mesh.size:
        return _plain(query, key, value)
    rows = PartitionSpec(mesh.axis_names)
    return jax.shard_map(
        lambda *inputs: _splash(*inputs, mesh),
        mesh=mesh,
        in_specs=rows,
        out_specs=rows,
        check_vma=False,  # it knows nothing of Pallas kernels
    )(query, key, value)


def _splash(query, key, value, mesh):
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    tokens, real, heads = query.shape[1], key.shape[1], query.shape[2]
    query, key, value = (_pad_to_tiles(x) for x in (query, key, value))
    queries, keys = query.shape[1], key.shape[1]
    segments = None
    if keys > real:  # queries, the padding too, see the keys of their own segment
        padding = jnp.arange(keys, dtype=jnp.int32) >= real
        segments = splash.SegmentIds(
            jnp.zeros(queries, jnp.int32), padding.astype(jnp.int32)
        )
    block_q = _divisor(queries, _PALLAS_TILE, _PALLAS_BLOCK)
    block_k = _divisor(keys, _PALLAS_TILE, _PALLAS_BLOCK)
    lanes = -(-query.shape[3] // _PALLAS_TILE) * _PALLAS_TILE
    resident = _PALLAS_KEYS // (lanes * query.dtype.itemsize)
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block_q,
            block_kv=_divisor(keys, block_k, max(resident, block_k)),
            block_kv_compute=block_k,
            block_q_dkv=block_q,
            block_kv_dkv=block_k,
            block_kv_dkv_compute=block_k,
            block_q_dq=block_q,
            block_kv_dq=block_k,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=devices.platform(mesh) == "cpu",
    )
    query = query * query.shape[-1] ** -0.5  # the kernel does not scale the scores
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    attend_rows = jax.vmap(functools.partial(kernel, segment_ids=segments))
    return attend_rows(query, key, value).swapaxes(1, 2)[:, :tokens]


def _pad_to_tiles(states):
    """Pads tokens to whole tiles, and to an even number of them for larger blocks."""
    whole = states.shape[1] % _PALLAS_TILE == 0
    return states if whole else _pad(states, 1, 2 * _PALLAS_TILE)


def _divisor(size, step, most):
    """The largest divisor of `size`, up to `most`, that is a multiple of `step`."""
    return max(n for n in range(step, most + 1, step) if size % n == 0)


def _mapped(query, key, value, device_count):
    """Computes one head of one example at a time: its scores stay in a CPU's cache.

    Where the batch is sharded over several devices, each computes one of its examples.
    """
    batch, tokens, heads, width = query.shape
    parts = math.gcd(batch, device_count)

    def stack(x):  # [B, T, N, D] -> [B / parts * N, parts, T, D]
        x = x.reshape(parts, batch // parts, *x.shape[1:])
        return x.transpose(1, 3, 0, 2, 4).reshape(-1, parts, x.shape[2], width)

    stacked = _map_heads(stack(query), stack(key), stack(value))
    stacked = stacked.reshape(batch // parts, heads, parts, tokens, width)
    return stacked.transpose(2, 0, 3, 1, 4).reshape(query.shape)


@jax.custom_vjp
def _map_heads(query, key, value):
    return jax.lax.map(lambda x: _forward(*x)[0], (query, key, value))


def _map_heads_forward(query, key, value):
    output, normaliser = jax.lax.map(lambda x: _forward(*x), (query, key, value))
    return output, (query, key, value, output, normaliser)


def _map_heads_backward(saved, gradient):
    d_query, d_key, d_value = jax.lax.map(lambda x: _backward(*x), (*saved, gradient))
    return d_query.swapaxes(-1, -2), d_key, d_value


_map_heads.defvjp(_map_heads_forward, _map_heads_backward)


def _forward(query, key, value):
    """The output [P, T, D] and the log-sum-exp [P, T, 1] of the scores."""
    dtype = query.dtype
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.einsum("ptd,psd->pts", query * query.shape[-1] ** -0.5, key)
    highest = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = weights.sum(axis=-1, keepdims=True)
    output = jnp.einsum("pts,psd->ptd", weights, value) / total
    return output.astype(dtype), highest + jnp.log(total)


def _backward(query, key, value, output, normaliser, gradient):
    """The gradients, the query's as [P, D, T]; probabilities are recomputed.

    Equations of FlashAttention-2 (arXiv 2307.08691, section 2.3.2), on transposed
    probabilities [P, S, T]. On XLA's CPU backend a dot that contracts the first axis of
    a large left operand takes seven times as long: in this layout the only such operand
    is small, and one transpose is left to do after the map.
    """
    dtype, scale = query.dtype, query.shape[-1] ** -0.5
    query, key, value, output, gradient = (
        x.astype(jnp.float32) for x in (query, key, value, output, gradient)
    )
    query = query * scale
    scores = jnp.einsum("psd,ptd->pst", key, query)
    probabilities = jnp.exp(scores - normaliser.swapaxes(-1, -2))
    from_output = (gradient * output).sum(axis=-1)[:, None]
    d_scores = probabilities * (
        jnp.einsum("psd,ptd->pst", value, gradient) - from_output
    )
    d_query = scale * jnp.einsum("psd,pst->pdt", key, d_scores)
    d_key = jnp.einsum("pst,ptd->psd", d_scores, query)
    d_value = jnp.einsum("pst,ptd->psd", probabilities, gradient)
    return d_query.astype(dtype), d_key.astype(dtype), d_value.astype(dtype)
