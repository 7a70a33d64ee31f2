"""Attention kernels: frozen parts with one method for the parallel pass, and two functions for keys under a mask.

`causal` says whether a kernel's queries read no token after them; what is decoded is read so, and by the functions
alone.

All compute the softmax in float32 and return the dtype of the queries.
"""
from __future__ import annotations

import functools
from typing import Any, Callable

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from loopformer import backend, sharding
from loopformer.types import Array, ConfigError, config_dataclass

SAVED = 'attention'  # what a rematerialising loop may save of attention, instead of running it again,
PRODUCT = 'product'  # and of projections
LANES = 128  # of a TPU's registers
ACROSS = 256  # queries of all heads, up to which a TPU multiplies faster than it reads
HALVES = (jnp.bfloat16, jnp.float16)
CUDNN = 'dot_product_attention_fwd_wrapper'  # the primitive
NEGATIVE = -1e30  # finite: a row without any key (padding) averages the values, and is never NaN


def _causal(kernel, q: Array, k: Array, seg: Array | None) -> Array:
  """What the kernel gives to every key, f32[B, H, T, T], rows of sum one; for looking on, since it is held whole."""
  mask = jnp.tri(q.shape[1], dtype=bool)[None]
  return weights(q, k, mask if seg is None else mask & (seg[:, :, None] == seg[:, None]))


@config_dataclass
class Blockwise:
  """Causal attention over blocks of queries; each block reads the keys up to its end only.

  Half of the score matrix is never computed, and only one block's scores are held, in the backward pass too, where
  they are recomputed. Portable.
  """
  size: int = 64
  causal = True
  weights = _causal

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    """q [B, T, H, d], k and v [B, T, G, d], seg None or i32[B, T] -> [B, T, H, d]."""
    length = q.shape[1]
    q, k, v = _heads_first(q, k, v)  # once, and not in every block: the products want heads among the leading axes
    blocks = []
    for start in range(0, length, self.size):
      stop = min(start + self.size, length)
      mask = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)[None]
      mask = mask[None] if seg is None else mask & (seg[:, start:stop, None] == seg[:, None, :stop])
      blocks.append(_attend(q[..., start:stop, :], k[..., :stop, :], v[..., :stop, :], mask))
    return _heads_last(jnp.concatenate(blocks, -2) if len(blocks) > 1 else blocks[0])


@config_dataclass
class Fused:
  """Causal attention by the kernel of the backend: cuDNN's on a GPU, splash attention on a TPU, Blockwise elsewhere and
  where those cannot serve: on a GPU float32, and heads whose width is no multiple of 8 or beyond 128; on a TPU float16,
  and texts of fewer than 128 tokens.

  size: of Blockwise's blocks.
  """
  size: int = 64
  causal = True
  weights = _causal

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    return self.on(backend.current().name, q.dtype, q.shape[1], q.shape[3])(q, k, v, seg)

  def on(self, name: str, dtype: Any, length: int, head: int) -> Blockwise | Cudnn | Splash:
    """What attends with `length` queries of width `head` in this dtype on a backend: 'cpu', 'gpu' or 'tpu'."""
    if name == 'gpu' and dtype in HALVES and head % 8 == 0 and head <= 128:
      return Cudnn()
    if name == 'tpu' and dtype in Splash.dtypes and length >= LANES:
      return Splash()
    return Blockwise(size=self.size)


@config_dataclass
class Cudnn:
  """cuDNN's flash attention, causal, for Nvidia's GPUs in bfloat16 and float16. With segments it reads a mask,
  [B, 1, T, T]."""
  causal = True
  weights = _causal

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    if backend.current().name != 'gpu' or q.dtype not in HALVES:
      raise ConfigError(f'kernel = Cudnn() with {q.dtype} on {backend.current().name}: cuDNN attends on a GPU in '
                        'bfloat16 or float16; take kernels.Fused(), which chooses by backend and dtype')
    # The kernel brings rules for the partitioner, which do not compile where a mesh is divided by hand already. With
    # segments it wants texts of even length.
    return _lengthened(functools.partial(sharding.by_rows_and_heads, self._attend), 1 if seg is None else 2,
                       q, k, v, seg)

  def _attend(self, q, k, v, seg):
    mask = None if seg is None else seg[:, None, :, None] == seg[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation='cudnn')


@config_dataclass
class Splash:
  """Splash attention, causal: JAX's Pallas kernel for TPUs, which never visits blocks above the diagonal. Texts are
  lengthened to multiples of 128 tokens.

  size: the longest block of queries and of keys. interpret: emulate the kernel, to test it elsewhere.
  """
  size: int = 512
  interpret: bool = False
  causal = True
  weights = _causal
  dtypes = (jnp.float32, jnp.bfloat16)  # with others the kernel's compiler crashes

  def __post_init__(self):
    if self.size < LANES or self.size % LANES:
      raise ConfigError(f'kernel.size = {self.size}: blocks of splash attention are multiples of {LANES} long')

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    if q.dtype not in self.dtypes:
      raise ConfigError(f'kernel = Splash() with {q.dtype}: it attends in bfloat16 or float32; take kernels.Fused(), '
                        'which chooses by dtype')
    # The partitioner cannot divide a Pallas kernel: every device runs it on its own rows and heads.
    return _lengthened(functools.partial(sharding.by_rows_and_heads, self._attend), LANES,
                       (q * q.shape[-1] ** -0.5).astype(q.dtype), k, v, seg)

  def _attend(self, q, k, v, seg):
    # Here, because the import takes a quarter of a second, and no other backend needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
    length, heads = q.shape[1:3]
    size = next(size for size in range(min(self.size, length), 0, -LANES) if length % size == 0)
    blocks = splash_attention_kernel.BlockSizes(
        block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, use_fused_bwd_kernel=True)
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((length, length))] * heads)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        mask, block_sizes=blocks, residual_checkpoint_name=SAVED, interpret=self.interpret)
    ids = None if seg is None else splash_attention_kernel.SegmentIds(q=seg, kv=seg)
    return jax.vmap(kernel)(*(x.swapaxes(1, 2) for x in (q, k, v)), ids).swapaxes(1, 2)


Kernel = Blockwise | Fused | Cudnn | Splash


def check_causal(causal: bool, where: str):
  """Raises ConfigError where tokens are to be read one after the other by attention that reads in both directions, or
  not by a softmax."""
  if not causal:
    raise ConfigError(f'{where}: its attention reads later tokens too, which are not there yet where one comes after '
                      'the other, or is no softmax, by which caches are read; answer with whole passes '
                      '(loopformer.logits, evaluate), or train with a causal kernel, such as kernels.Fused')


def _lengthened(attend, multiple, q, k, v, seg):
  """Causal attention over a text that is lengthened to a multiple of so many tokens: none before sees those at its end.
  """
  length = q.shape[1]
  if not (more := -length % multiple):
    return attend(q, k, v, seg)

  def longer(x):
    return jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2)))

  return attend(longer(q), longer(k), longer(v), None if seg is None else longer(seg))[:, :length]


def saving(*names: str) -> Callable[..., Any]:
  """The policy of a rematerialising loop that saves these names, and cuDNN's attention where SAVED is one: of its two
  results, what it gives and the sums that its backward pass wants, JAX lets nobody name the second."""
  by_name = jax.checkpoint_policies.save_only_these_names(*names)

  def policy(primitive, *avals, **params):
    return by_name(primitive, *avals, **params) or (SAVED in names and primitive.name == CUDNN)

  return policy


@config_dataclass
class Bidirectional:
  """Every token reads all tokens of its document, those after it too.

  For the pass without cache alone: what a token reads is not there yet when it is decoded.
  """
  causal = False

  def __call__(self, q: Array, k: Array, v: Array, seg: Array | None) -> Array:
    """q [B, T, H, d], k and v [B, T, G, d], seg None or i32[B, T] -> [B, T, H, d]."""
    return attend(q, k, v, self._mask(q, seg))

  def weights(self, q: Array, k: Array, seg: Array | None) -> Array:
    """What it gives to every key, f32[B, H, T, T], rows of sum one."""
    return weights(q, k, self._mask(q, seg))

  def _mask(self, q, seg):
    length = q.shape[1]
    return jnp.ones((1, length, length), bool) if seg is None else seg[:, :, None] == seg[:, None]


def weights(q: Array, k: Array, mask: Array) -> Array:
  """What queries [B, T, H, d] give to keys [B, S, G, d], mask bool[B or 1, T, S]: f32[B, H, T, S], rows of sum one."""
  q_BGrTd, k_BGSd, _ = _heads_first(q, k, k)
  att_BGrTS = jax.nn.softmax(_scores(q_BGrTd, k_BGSd, mask), -1)
  return att_BGrTS.reshape(att_BGrTS.shape[0], -1, *att_BGrTS.shape[3:])


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """q [B, T, H, d], k and v [B, S, G, d], mask bool[B or 1, T, S] -> [B, T, H, d]; H is a multiple of G."""
  return _heads_last(_attend(*_heads_first(q, k, v), mask))


def read(q: Array, k: Array, v: Array, mask: Array) -> Array:
  """As `attend`, of keys and values with their heads first, [B, G, S, d], as caches give them (layouts.py)."""
  if backend.current().merged and q.shape[1] * q.shape[2] <= ACROSS:
    return _across(q, k, v, mask)
  return _heads_last(_attend(_grouped(q, k.shape[1]), k, v, mask))


def _across(q_BTHd, k_BGSd, v_BGSd, mask_BTS):
  """Attention of few queries as products of all heads at once, for keys and values whose heads are merged in memory.

  A query is as wide as all heads together, and zero but for its own: G times the arithmetic of the products by heads,
  which is nothing beside reading keys and values, and these are read as they lie.
  """
  batch, length, heads, width = q_BTHd.shape
  groups = k_BGSd.shape[1]
  own_HG = jnp.arange(heads)[:, None] // (heads // groups) == jnp.arange(groups)
  k_BSE, v_BSE = (x.swapaxes(1, 2).reshape(batch, -1, groups * width) for x in (k_BGSd, v_BGSd))
  q_BTHGd = jnp.where(own_HG[..., None], (q_BTHd * width ** -0.5)[..., None, :], 0)
  att_BMS = _dot('BME,BSE->BMS', q_BTHGd.reshape(batch, -1, groups * width), k_BSE)
  att_BTHS = jnp.where(mask_BTS[:, :, None], att_BMS.reshape(batch, length, heads, -1), NEGATIVE)
  att_BTHS = jnp.exp(att_BTHS - att_BTHS.max(-1, keepdims=True))
  out_BME = _dot('BMS,BSE->BME', att_BTHS.reshape(att_BMS.shape).astype(v_BSE.dtype), v_BSE)
  out_BTHGd = out_BME.reshape(batch, length, heads, groups, width)
  out_BTHd = jnp.where(own_HG[..., None], out_BTHGd, 0).sum(3) / att_BTHS.sum(-1, keepdims=True)
  return out_BTHd.astype(q_BTHd.dtype)


def _heads_first(q, k, v):
  """[B, T, H, d], [B, S, G, d] twice -> [B, G, H/G, T, d], [B, G, S, d] twice."""
  return _grouped(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)


def _grouped(q, groups):
  """[B, T, H, d] -> [B, G, H/G, T, d]."""
  return q.reshape(*q.shape[:2], groups, q.shape[2] // groups, q.shape[3]).transpose(0, 2, 3, 1, 4)


def _heads_last(out_BGrTd):
  batch, groups, each, length, width = out_BGrTd.shape
  return out_BGrTd.transpose(0, 3, 1, 2, 4).reshape(batch, length, groups * each, width)


@jax.custom_vjp
def _attend(q_BGrTd, k_BGSd, v_BGSd, mask_BTS):
  """The backward pass is written out: it keeps one number a query, and recomputes the scores from it."""
  return _forward(q_BGrTd, k_BGSd, v_BGSd, mask_BTS)[0]


def _dot(equation, *operands):
  return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _merged(x_BGrTd):
  """The heads of a group and the queries as one axis: the products are then plain batched matrix products."""
  batch, groups, each, length, width = x_BGrTd.shape
  return x_BGrTd.reshape(batch, groups, each * length, width)


def _scores(q_BGrTd, k_BGSd, mask_BTS):
  scaled = q_BGrTd * q_BGrTd.shape[-1] ** -0.5
  att_BGrTS = _dot('BGMd,BGSd->BGMS', _merged(scaled), k_BGSd).reshape(*q_BGrTd.shape[:-1], -1)
  return jnp.where(mask_BTS[:, None, None], att_BGrTS, NEGATIVE)


def _forward(q_BGrTd, k_BGSd, v_BGSd, mask_BTS):
  att_BGrTS = _scores(q_BGrTd, k_BGSd, mask_BTS)
  most_BGrT1 = att_BGrTS.max(-1, keepdims=True)
  att_BGrTS = jnp.exp(att_BGrTS - most_BGrT1)
  total_BGrT1 = att_BGrTS.sum(-1, keepdims=True)
  out_BGMd = _dot('BGMS,BGSd->BGMd', _merged(att_BGrTS).astype(v_BGSd.dtype), v_BGSd)
  out_BGrTd = (out_BGMd.reshape(q_BGrTd.shape) / total_BGrT1).astype(q_BGrTd.dtype)  # T * d divisions, not T * S
  out_BGrTd = checkpoint_name(out_BGrTd, SAVED)
  lse_BGrT1 = checkpoint_name(most_BGrT1 + jnp.log(total_BGrT1), SAVED)
  return out_BGrTd, (q_BGrTd, k_BGSd, v_BGSd, mask_BTS, out_BGrTd, lse_BGrT1)


def _backward(saved, dout_BGrTd):
  q_BGrTd, k_BGSd, v_BGSd, mask_BTS, out_BGrTd, lse_BGrT1 = saved
  dtype, scale = q_BGrTd.dtype, q_BGrTd.shape[-1] ** -0.5
  att_BGMS = _merged(jnp.exp(_scores(q_BGrTd, k_BGSd, mask_BTS) - lse_BGrT1))
  dout_BGMd, out_BGMd = _merged(dout_BGrTd), _merged(out_BGrTd)
  inner_BGM1 = jnp.sum(dout_BGMd.astype(jnp.float32) * out_BGMd, -1, keepdims=True)
  dv_BGdS = _dot('BGMd,BGMS->BGdS', dout_BGMd, att_BGMS.astype(dtype))  # the layout whose product a CPU makes fastest
  datt_BGMS = (att_BGMS * (_dot('BGMd,BGSd->BGMS', dout_BGMd, v_BGSd) - inner_BGM1)).astype(dtype)
  dq_BGMd = _dot('BGMS,BGSd->BGMd', datt_BGMS, k_BGSd) * scale
  dk_BGdS = _dot('BGMd,BGMS->BGdS', _merged(q_BGrTd), datt_BGMS) * scale
  dk_BGSd, dv_BGSd = (x.swapaxes(-1, -2).astype(dtype) for x in (dk_BGdS, dv_BGdS))
  return dq_BGMd.reshape(q_BGrTd.shape).astype(dtype), dk_BGSd, dv_BGSd, None


_attend.defvjp(_forward, _backward)
