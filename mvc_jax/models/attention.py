"""Attention in diffusers' Flax blocks: the choice of an implementation for each layer.

Nothing in the library is patched: `nn.intercept_methods` replaces calls of modules,
`implemented_by()` those of attention, `match_pytorch()` those that differ from
PyTorch's.

Legend: B batch, T query tokens, S key and value tokens, N heads, D width of a head.
"""

import contextlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mvc_jax.errors import UserError
from mvc_jax.models.flax_classes import FlaxAttention, FlaxGEGLU, FlaxTransformer2DModel

CHOICES = ("auto", "xla", "mapped", "cudnn")
_CUDNN_DTYPES = ("bfloat16", "float16")
_CUDNN_WIDTH = 128  # maximum head width with a gradient on all GPUs that cuDNN supports
_CUDNN_TILE = 64  # tokens; only newer versions support other lengths, untested here
_MAPPED_TOKENS = 1024  # with more, the scores of a layer do not fit a CPU's cache


def backend() -> str:
    """The default backend: `cpu`, `tpu`, `cuda` or `gpu`.

    `cuda` are GPUs with cuDNN's flash attention: NVIDIA's from compute capability 8.0.
    """
    name = jax.default_backend()
    if name != "gpu":
        return name
    capability = str(getattr(jax.devices()[0], "compute_capability", "0.0"))
    return "cuda" if capability[:1].isdigit() and float(capability) >= 8 else "gpu"


def check(choice: str, *, field: str, backend: str, dtype: str) -> None:
    """Checks the value of the config field `field` before anything compiles.

    Raises:
      UserError: it is not one of `CHOICES`, or it is cuDNN with a backend or a dtype
        for which cuDNN has no flash attention.
    """
    if choice not in CHOICES:
        raise UserError(
            field,
            wanted=f"one of {', '.join(CHOICES)}",
            got=choice,
            fix="auto chooses for each layer.",
        )
    if choice != "cudnn":
        return
    if backend != "cuda":
        raise UserError(
            field,
            wanted="an NVIDIA GPU of compute capability 8.0 or newer for cudnn",
            got=f"the backend {backend}",
            fix="Use auto.",
        )
    if dtype not in _CUDNN_DTYPES:
        raise UserError(
            field,
            wanted=f"activations in {' or '.join(_CUDNN_DTYPES)} for cudnn",
            got=dtype,
            fix="Use auto, or bfloat16.",
        )


def implementation(
    choice: str, *, backend: str, dtype: str, q_tokens: int, kv_tokens: int, width: int
) -> str:
    """The implementation of one layer: `cudnn`, `mapped` or `xla`.

    Args:
      choice: one of `CHOICES`. `cudnn` falls back to `xla` in layers that cuDNN does
        not support: heads of SD 1.x are 40, 80 and 160 wide, prompts have 77 tokens.
      backend: from `backend()`.
      dtype: of the queries.
      q_tokens: T.
      kv_tokens: S.
      width: D.
    """
    if choice in ("xla", "mapped"):
        return choice
    flash = (
        backend == "cuda"
        and dtype in _CUDNN_DTYPES
        and width % 8 == 0
        and width <= _CUDNN_WIDTH
        and q_tokens % _CUDNN_TILE == kv_tokens % _CUDNN_TILE == 0
    )
    if flash:
        return "cudnn"
    if choice == "auto" and backend == "cpu" and q_tokens >= _MAPPED_TOKENS:
        return "mapped"
    return "xla"


def attend(
    query: Float[Array, "B T N D"],
    key: Float[Array, "B S N D"],
    value: Float[Array, "B S N D"],
    *,
    choice: str = "auto",
) -> Float[Array, "B T N D"]:
    """softmax(Q K^T / sqrt(D)) V; the softmax is float32 for any dtype of the inputs.

    `choice` is one of `CHOICES`.
    """
    chosen = implementation(
        choice,
        backend=backend(),
        dtype=query.dtype.name,
        q_tokens=query.shape[1],
        kv_tokens=key.shape[1],
        width=query.shape[3],
    )
    if chosen == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return (_mapped if chosen == "mapped" else _plain)(query, key, value)


def implemented_by(choice: str) -> contextlib.AbstractContextManager:
    """Context in which attention layers run the `implementation` for `choice`.

    Group norms return the dtype of their input there: Flax promotes bfloat16 to the
    float32 of the parameters, and every later residual would be float32 too. Their
    statistics stay float32.
    """

    def intercept(next_call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__":
            if isinstance(module, FlaxAttention):
                return _attention(module, choice, *args, **kwargs)
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


def _attention(module, choice, hidden_states, context=None, deterministic=True):
    """`FlaxAttention.__call__` with heads on axis 2 and `attend` for the attention."""
    context = hidden_states if context is None else context

    def heads(states):
        return states.reshape(*states.shape[:2], module.heads, module.dim_head)

    attended = attend(
        heads(module.query(hidden_states)),
        heads(module.key(context)),
        heads(module.value(context)),
        choice=choice,
    )
    output = module.proj_attn(attended.reshape(*attended.shape[:2], -1))
    return module.dropout_layer(output, deterministic=deterministic)


def _plain(query, key, value):
    scores = jnp.einsum(
        "btnd,bsnd->bnts", query, key, preferred_element_type=jnp.float32
    )
    probabilities = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1)
    return jnp.einsum("bnts,bsnd->btnd", probabilities.astype(value.dtype), value)


def _mapped(query, key, value):
    """Computes one head of one example at a time: its scores stay in a CPU's cache.

    Where the batch is sharded over several devices, each computes one of its examples.
    """
    batch, tokens, heads, width = query.shape
    parts = math.gcd(batch, jax.device_count())

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
