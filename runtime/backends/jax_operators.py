"""What does each ATen operator mean in JAX?  The bridge's table, one entry an overload, as torch defines it.

Every function takes the operator's arguments as the exported graph spells them, sizes being integers or symbolic
dimensions.  Sums of products are accumulated in float32 and rounded once, as torch's own CPU kernels do in bfloat16.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import torch

Array = Any
Sizes = Sequence[Any]
ATEN = torch.ops.aten
DTYPES: Mapping[torch.dtype, Any] = {
    torch.float64: jnp.float64,
    torch.float32: jnp.float32,
    torch.bfloat16: jnp.bfloat16,
    torch.float16: jnp.float16,
    torch.int64: jnp.int64,
    torch.int32: jnp.int32,
    torch.int16: jnp.int16,
    torch.int8: jnp.int8,
    torch.uint8: jnp.uint8,
    torch.bool: jnp.bool_,
}
DROPPED = frozenset({"device", "pin_memory", "layout", "non_blocking", "memory_format", "implicit"})
"""Keyword arguments that say where and how torch stores a tensor; they change no value."""


def _wide(dtype: Any) -> Any:
    """Name the type in which values of `dtype` are summed."""
    return jnp.float32 if dtype in (jnp.bfloat16, jnp.float16) else dtype


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x [...,in] times weight [out,in], plus bias [out]."""
    contracted = (((x.ndim - 1,), (1,)), ((), ()))
    product = jax.lax.dot_general(x, weight, contracted, preferred_element_type=_wide(x.dtype))
    return (product if bias is None else product + bias).astype(x.dtype)


def matmul(left: Array, right: Array) -> Array:
    """Matrix product with leading dimensions broadcast."""
    return jnp.matmul(left, right, preferred_element_type=_wide(left.dtype)).astype(left.dtype)


def addmm(bias: Array, left: Array, right: Array, *, beta: float = 1, alpha: float = 1) -> Array:
    """beta * bias + alpha * (left @ right)."""
    product = jnp.matmul(left, right, preferred_element_type=_wide(left.dtype))
    return (product * alpha + bias * beta).astype(left.dtype)


def attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    """Scaled dot-product attention [...,T,D]; a row whose every key is masked answers zeros, as torch's does."""
    if dropout_p:
        raise ValueError("scaled_dot_product_attention with dropout")
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = jnp.repeat(key, repeats, axis=-3), jnp.repeat(value, repeats, axis=-3)
    wide = _wide(query.dtype)
    # float(): a NumPy float64 scale would silently turn the whole graph into float64
    factor = float(scale if scale is not None else query.shape[-1] ** -0.5)
    scores = jnp.einsum("...qd,...kd->...qk", query, key, preferred_element_type=wide) * factor
    if is_causal:
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, scores.shape[-2:], axis) for axis in (0, 1))
        attn_mask = columns <= rows
    if attn_mask is not None:
        lowest = jnp.asarray(-jnp.inf, scores.dtype)
        scores = jnp.where(attn_mask, scores, lowest) if attn_mask.dtype == jnp.bool_ else scores + attn_mask
    top = jnp.max(scores, -1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
    total = jnp.sum(weights, -1, keepdims=True)
    weights = jnp.where(total > 0, weights / jnp.where(total > 0, total, 1), 0).astype(query.dtype)
    mixed = jnp.einsum("...qk,...kd->...qd", weights, value, preferred_element_type=wide)
    return mixed.astype(query.dtype)


def rms_norm(x: Array, shape: Sizes, weight: Array | None = None, eps: float | None = None) -> Array:
    """Root mean square norm over the last len(shape) dimensions, computed in float32 and rounded once."""
    axes = tuple(range(-len(shape), 0))
    wide = x.astype(_wide(x.dtype))
    floor = float(jnp.finfo(x.dtype).eps) if eps is None else float(eps)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axes, keepdims=True) + floor)
    return (normed if weight is None else normed * weight).astype(x.dtype)


def layer_norm(
    x: Array,
    shape: Sizes,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Array:
    """Layer norm over the last len(shape) dimensions, computed in float32 and rounded once."""
    axes = tuple(range(-len(shape), 0))
    wide = x.astype(_wide(x.dtype))
    centred = wide - jnp.mean(wide, axes, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axes, keepdims=True) + float(eps))
    scaled = normed if weight is None else normed * weight
    return (scaled if bias is None else scaled + bias).astype(x.dtype)


def softmax(x: Array, dim: int, dtype: torch.dtype | None = None) -> Array:
    """Softmax along one dimension, computed in float32 and rounded once."""
    wide = x.astype(_wide(x.dtype))
    return jax.nn.softmax(wide, axis=dim).astype(DTYPES[dtype] if dtype is not None else x.dtype)


def convolve(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    stride: Sizes = (1, 1),
    padding: Sizes = (0, 0),
    dilation: Sizes = (1, 1),
    groups: int = 1,
) -> Array:
    """Two-dimensional convolution, x [N,in,H,W] with weight [out,in/groups,h,w] and bias [out]."""
    product = jax.lax.conv_general_dilated(
        x,
        weight,
        tuple(stride),
        [(size, size) for size in padding],
        rhs_dilation=tuple(dilation),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=groups,
        preferred_element_type=_wide(x.dtype),
    )
    return (product if bias is None else product + bias[None, :, None, None]).astype(x.dtype)


def vector_norm(
    x: Array, order: float = 2, dim: Sizes | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Array:
    """Norm of order 1, 2 or infinity over dimensions, summed in float32."""
    kind = DTYPES[dtype] if dtype is not None else x.dtype
    wide, axes = jnp.abs(x.astype(_wide(kind))), None if dim is None else tuple(dim)
    if order == 2:
        found = jnp.sqrt(jnp.sum(wide * wide, axes, keepdims=keepdim))
    elif order == 1:
        found = jnp.sum(wide, axes, keepdims=keepdim)
    elif order == float("inf"):
        found = jnp.max(wide, axes, keepdims=keepdim)
    else:
        raise ValueError(f"linalg_vector_norm of order {order}")
    return found.astype(kind)


def gelu(x: Array, *, approximate: str = "none") -> Array:
    """Gaussian error linear unit, exact or by tanh."""
    return jax.nn.gelu(x.astype(_wide(x.dtype)), approximate=approximate == "tanh").astype(x.dtype)


def expand(x: Array, sizes: Sizes) -> Array:
    """Broadcast to sizes; -1 keeps a dimension."""
    x = jnp.reshape(x, (1,) * (len(sizes) - x.ndim) + x.shape)
    kept = [x.shape[axis] if isinstance(size, int) and size == -1 else size for axis, size in enumerate(sizes)]
    return jnp.broadcast_to(x, kept)


def embedding(table: Array, indices: Array, *_: Any, **__: Any) -> Array:
    """Rows of a table; an index outside answers NaN, which every comparison notices."""
    return jnp.take(table, indices, axis=0, mode="fill")


def index(x: Array, indices: Sequence[Array | None]) -> Array:
    """Advanced indexing; None keeps a dimension."""
    return x[tuple(slice(None) if entry is None else entry for entry in indices)]


def gather(x: Array, dim: int, indices: Array, **_: Any) -> Array:
    """Values along one dimension; of every other one, torch reads as much as the indices have, and never broadcasts."""
    for axis, size in enumerate(indices.shape):
        if axis != dim % x.ndim and size != x.shape[axis]:
            x = jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.take_along_axis(x, indices, axis=dim, mode="fill")


def take(x: Array, dim: int, position: int) -> Array:
    """One position along a dimension, which disappears."""
    return jax.lax.index_in_dim(x, position, dim, keepdims=False)


def cut(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    """Slice along one dimension; an end beyond the dimension is its end."""
    size = x.shape[dim]
    last = size if end is None or (isinstance(end, int) and end > 2**31) else end
    first = 0 if start is None else start
    if isinstance(size, int) and isinstance(last, int) and isinstance(first, int):
        first, last, step = slice(first, last, step).indices(size)
    return jax.lax.slice_in_dim(x, first, last, stride=step, axis=dim % x.ndim)


def split(x: Array, sizes: Sizes, dim: int = 0) -> list[Array]:
    """Cut into pieces of the given sizes."""
    pieces: list[Array] = []
    start: Any = 0
    for size in sizes:
        pieces.append(jax.lax.slice_in_dim(x, start, start + size, axis=dim % x.ndim))
        start = start + size
    return pieces


def chunk(x: Array, count: int, dim: int = 0) -> list[Array]:
    """Cut into `count` pieces as torch does: equal ones, a shorter last one."""
    return pieces_of(x, -(-x.shape[dim] // count), dim)


def pieces_of(x: Array, size: int, dim: int = 0) -> list[Array]:
    """Cut into pieces of one size, the last one shorter."""
    whole = x.shape[dim]
    return split(x, [min(size, whole - start) for start in range(0, whole, size)], dim)


def arange(*bounds: Any, dtype: torch.dtype | None = None) -> Array:
    """Count from start to end; int64 unless told otherwise or unless a bound is a float."""
    kind = (
        DTYPES[dtype] if dtype is not None else jnp.float32 if any(isinstance(b, float) for b in bounds) else jnp.int64
    )
    return jnp.arange(*bounds, dtype=kind)


def full(sizes: Sizes, value: Any, *, dtype: torch.dtype | None = None) -> Array:
    """Fill a new array; a Python float is float32 as in torch."""
    default = {bool: jnp.bool_, int: jnp.int64}.get(cast(type[Any], type(value)), jnp.float32)
    return jnp.full(tuple(sizes), value, dtype=DTYPES[dtype] if dtype is not None else default)


def mean(x: Array, dim: Sizes | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Array:
    """Mean over dimensions, summed in float32."""
    kind = DTYPES[dtype] if dtype is not None else x.dtype
    return jnp.mean(x.astype(_wide(kind)), None if dim is None else tuple(dim), keepdims=keepdim).astype(kind)


def total(x: Array, dim: Sizes | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Array:
    """Sum over dimensions; integers and booleans sum to int64."""
    integral = jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_
    kind = DTYPES[dtype] if dtype is not None else jnp.int64 if integral else x.dtype
    return jnp.sum(x.astype(_wide(kind)), tuple(dim) if dim else None, keepdims=keepdim).astype(kind)


def _add(left: Array, right: Array, *, alpha: Any = 1) -> Array:
    return left + (right if alpha == 1 else alpha * right)


def _subtract(left: Array, right: Array, *, alpha: Any = 1) -> Array:
    return left - (right if alpha == 1 else alpha * right)


def _divide(left: Array, right: Array, *, rounding_mode: str | None = None) -> Array:
    if rounding_mode == "floor":
        return jnp.floor_divide(left, right)
    quotient = jnp.divide(left, right)
    return jnp.trunc(quotient) if rounding_mode == "trunc" else quotient


def _cast(x: Array, dtype: torch.dtype, *_: Any, **__: Any) -> Array:
    return x.astype(DTYPES[dtype])


def _new_cast(x: Array, *, dtype: torch.dtype | None = None, **_: Any) -> Array:
    return x if dtype is None else x.astype(DTYPES[dtype])


def _clamp(x: Array, low: Any = None, high: Any = None) -> Array:
    return jnp.clip(x, low, high)


def _squeeze(x: Array, dim: Any = None) -> Array:
    axes = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = [axis for axis in axes if isinstance(x.shape[axis], int) and x.shape[axis] == 1]
    return jnp.squeeze(x, tuple(gone))


def _flatten(x: Array, start: int = 0, end: int = -1) -> Array:
    first, last = start % x.ndim, end % x.ndim
    merged: Any = 1
    for size in x.shape[first : last + 1]:
        merged = merged * size
    return jnp.reshape(x, (*x.shape[:first], merged, *x.shape[last + 1 :]))


def _unflatten(x: Array, dim: int, sizes: Sizes) -> Array:
    axis = dim % x.ndim
    return jnp.reshape(x, (*x.shape[:axis], *sizes, *x.shape[axis + 1 :]))


def _where_scalars(condition: Array, left: Any, right: Any) -> Array:
    return jnp.where(condition, full((), left), full((), right))


def _repeat_interleave(x: Array, repeats: int, dim: int | None = None, **_: Any) -> Array:
    return jnp.repeat(x, repeats, axis=dim)


def _same(x: Array, *_: Any, **__: Any) -> Array:
    return x


def _nothing(*_: Any, **__: Any) -> None:
    return None


OPERATORS: Mapping[Any, Callable[..., Any]] = {
    operator.getitem: operator.getitem,
    operator.add: operator.add,
    operator.sub: operator.sub,
    operator.mul: operator.mul,
    operator.floordiv: operator.floordiv,
    operator.mod: operator.mod,
    ATEN.sym_size.int: lambda x, dim: x.shape[dim],
    ATEN._assert_tensor_metadata.default: _nothing,
    ATEN.add.Tensor: _add,
    ATEN.add_.Tensor: _add,
    ATEN.sub.Tensor: _subtract,
    ATEN.rsub.Scalar: lambda x, other: other - x,
    ATEN.mul.Tensor: jnp.multiply,
    ATEN.div.Tensor: _divide,
    ATEN.div.Tensor_mode: _divide,
    ATEN.floor_divide.default: jnp.floor_divide,
    ATEN.remainder.Scalar: jnp.remainder,
    ATEN.remainder.Tensor: jnp.remainder,
    ATEN.neg.default: jnp.negative,
    ATEN.abs.default: jnp.abs,
    ATEN.pow.Tensor_Scalar: jnp.power,
    ATEN.sqrt.default: jnp.sqrt,
    ATEN.rsqrt.default: jax.lax.rsqrt,
    ATEN.exp.default: jnp.exp,
    ATEN.log.default: jnp.log,
    ATEN.cos.default: jnp.cos,
    ATEN.sin.default: jnp.sin,
    ATEN.tanh.default: jnp.tanh,
    ATEN.sigmoid.default: jax.nn.sigmoid,
    ATEN.erf.default: jax.lax.erf,
    ATEN.silu.default: jax.nn.silu,
    ATEN.relu.default: jax.nn.relu,
    ATEN.relu_.default: jax.nn.relu,
    ATEN.gelu.default: gelu,
    ATEN.clamp.default: _clamp,
    ATEN.clamp_min.default: jnp.maximum,
    ATEN.maximum.default: jnp.maximum,
    ATEN.minimum.default: jnp.minimum,
    ATEN.linear.default: linear,
    ATEN.matmul.default: matmul,
    ATEN.mm.default: matmul,
    ATEN.bmm.default: matmul,
    ATEN.addmm.default: addmm,
    ATEN.conv2d.default: convolve,
    ATEN.linalg_vector_norm.default: vector_norm,
    ATEN.scaled_dot_product_attention.default: attention,
    ATEN.rms_norm.default: rms_norm,
    ATEN.layer_norm.default: layer_norm,
    ATEN.softmax.int: softmax,
    ATEN._softmax.default: lambda x, dim, half: softmax(x, dim),
    ATEN.log_softmax.int: lambda x, dim, dtype=None: jax.nn.log_softmax(x, axis=dim),
    ATEN.mean.dim: mean,
    ATEN.mean.default: mean,
    ATEN.sum.dim_IntList: total,
    ATEN.sum.default: total,
    ATEN.amax.default: lambda x, dim=(), keepdim=False: jnp.max(x, tuple(dim) or None, keepdims=keepdim),
    ATEN.argmax.default: lambda x, dim=None, keepdim=False: jnp.argmax(x, dim, keepdims=keepdim),
    ATEN.cumsum.default: lambda x, dim, dtype=None: jnp.cumsum(x, dim, dtype=DTYPES[dtype] if dtype else None),
    ATEN.any.dim: lambda x, dim, keepdim=False: jnp.any(x, dim, keepdims=keepdim),
    ATEN.eq.Tensor: jnp.equal,
    ATEN.eq.Scalar: jnp.equal,
    ATEN.ne.Tensor: jnp.not_equal,
    ATEN.ne.Scalar: jnp.not_equal,
    ATEN.lt.Tensor: jnp.less,
    ATEN.lt.Scalar: jnp.less,
    ATEN.le.Tensor: jnp.less_equal,
    ATEN.le.Scalar: jnp.less_equal,
    ATEN.gt.Tensor: jnp.greater,
    ATEN.gt.Scalar: jnp.greater,
    ATEN.ge.Tensor: jnp.greater_equal,
    ATEN.ge.Scalar: jnp.greater_equal,
    ATEN.logical_not.default: jnp.logical_not,
    ATEN.logical_and.default: jnp.logical_and,
    ATEN.logical_or.default: jnp.logical_or,
    ATEN.bitwise_not.default: jnp.bitwise_not,
    ATEN.bitwise_and.Tensor: jnp.bitwise_and,
    ATEN.bitwise_or.Tensor: jnp.bitwise_or,
    ATEN.__and__.Tensor: jnp.bitwise_and,
    ATEN.__or__.Tensor: jnp.bitwise_or,
    ATEN.where.self: jnp.where,
    ATEN.where.ScalarOther: jnp.where,
    ATEN.where.ScalarSelf: jnp.where,
    ATEN.where.Scalar: _where_scalars,
    ATEN.masked_fill.Scalar: lambda x, mask, value: jnp.where(mask, jnp.asarray(value, x.dtype), x),
    ATEN.view.default: jnp.reshape,
    ATEN.reshape.default: jnp.reshape,
    ATEN.flatten.using_ints: _flatten,
    ATEN.unflatten.int: _unflatten,
    ATEN.expand.default: lambda x, sizes, **_: expand(x, sizes),
    ATEN.expand_as.default: lambda x, other: jnp.broadcast_to(x, other.shape),
    ATEN.unsqueeze.default: jnp.expand_dims,
    ATEN.squeeze.dim: _squeeze,
    ATEN.squeeze.dims: _squeeze,
    ATEN.squeeze.default: _squeeze,
    ATEN.transpose.int: jnp.swapaxes,
    ATEN.permute.default: jnp.transpose,
    ATEN.t.default: jnp.transpose,
    ATEN.numpy_T.default: jnp.transpose,
    ATEN.cat.default: lambda pieces, dim=0: jnp.concatenate(pieces, dim),
    ATEN.stack.default: lambda pieces, dim=0: jnp.stack(pieces, dim),
    ATEN.chunk.default: chunk,
    ATEN.split.Tensor: pieces_of,
    ATEN.split_with_sizes.default: split,
    ATEN.unbind.int: lambda x, dim=0: [take(x, dim, position) for position in range(x.shape[dim])],
    ATEN.select.int: take,
    ATEN.slice.Tensor: cut,
    ATEN.index.Tensor: index,
    ATEN.index_select.default: lambda x, dim, indices: jnp.take(x, indices, axis=dim, mode="fill"),
    ATEN.gather.default: gather,
    ATEN.embedding.default: embedding,
    ATEN.repeat_interleave.self_int: _repeat_interleave,
    ATEN.repeat.default: lambda x, repeats: jnp.tile(x, tuple(repeats)),
    ATEN.arange.default: arange,
    ATEN.arange.start: arange,
    ATEN.arange.start_step: arange,
    ATEN.full.default: full,
    ATEN.zeros.default: lambda sizes, dtype=None: full(sizes, 0.0, dtype=dtype),
    ATEN.ones.default: lambda sizes, dtype=None: full(sizes, 1.0, dtype=dtype),
    ATEN.zeros_like.default: lambda x, dtype=None: jnp.zeros_like(x, dtype=DTYPES[dtype] if dtype else None),
    ATEN.ones_like.default: lambda x, dtype=None: jnp.ones_like(x, dtype=DTYPES[dtype] if dtype else None),
    ATEN.scalar_tensor.default: lambda value, dtype=None: full((), value, dtype=dtype),
    ATEN.tril.default: lambda x, diagonal=0: jnp.tril(x, diagonal),
    ATEN.triu.default: lambda x, diagonal=0: jnp.triu(x, diagonal),
    ATEN.to.dtype: _cast,
    ATEN.to.dtype_layout: _new_cast,
    ATEN.to.device: lambda x, device, dtype, *_, **__: x.astype(DTYPES[dtype]),
    ATEN._to_copy.default: _new_cast,
    ATEN.type_as.default: lambda x, other: x.astype(other.dtype),
    ATEN.contiguous.default: _same,
    ATEN.clone.default: _same,
    ATEN.alias.default: _same,
    ATEN.detach.default: _same,
    ATEN.detach_.default: _same,
    ATEN.lift_fresh_copy.default: _same,
    ATEN.dropout.default: _same,
}
"""JAX function of each operator; inference only, so dropout is the identity."""
