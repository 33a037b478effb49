"""The noise of `Ops.sample` on the host: for drafters that rank a few candidates and for accept tests.

Integer for integer what the kernels draw (`Ops.sample` holds the formula and its source); the logarithms are taken in
float64. numpy and plain integers only: a call costs microseconds where a tensor would cost the dispatch of a hundred
operations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = 0xFFFFFFFF
_FEW = 24
"""Up to this many tokens plain integers are faster than arrays: 5 us each against 130 us for any number."""
_Word = int | NDArray[Any]
"""32 bits, as an integer or as uint64."""


def uniform(seed: int, sample_index: int, position: int, stream: int, index: int = 0) -> float:
    """A number in (0, 1), a multiple of 2^-24: the one behind the Gumbel noise of token id `index`."""
    word = _words(index // 4, seed, sample_index, position, stream)[index % 4]
    return ((int(word) >> 9) + 0.5) * 2.0**-23


def gumbel(
    seed: int, sample_index: int, position: int, token_ids: NDArray[np.integer], stream: int = 0
) -> NDArray[np.float32]:
    """Standard Gumbel noise of the given token ids (any integer dtype and shape), float32.

    seed      64 bits, signed or not; position counts the sequence's output tokens; stream as in `Ops.sample`
    """
    if token_ids.size <= _FEW:
        drawn = [uniform(seed, sample_index, position, stream, token) for token in token_ids.ravel().tolist()]
        uniforms = np.array(drawn, dtype=np.float64).reshape(token_ids.shape)
    else:
        ids = token_ids.astype(np.uint64)
        words = _words(ids >> 2, seed, sample_index, position, stream)
        bits = np.choose((ids & 3).astype(np.intp), np.broadcast_arrays(*words))
        uniforms = ((bits >> 9).astype(np.float64) + 0.5) * 2.0**-23
    noise: NDArray[np.float32] = (-np.log(-np.log(uniforms))).astype(np.float32)
    return noise


def _words(quad: _Word, seed: int, sample_index: int, position: int, stream: int) -> tuple[_Word, _Word, _Word, _Word]:
    """Philox4x32-10 of counter (quad, position, sample index, stream) under the key `seed`; 32-bit values."""
    c0, c1, c2, c3 = quad, position & _MASK, sample_index & _MASK, stream & _MASK
    return _rounds(c0, c1, c2, c3, seed & _MASK, seed >> 32 & _MASK)


def _rounds(c0: _Word, c1: _Word, c2: _Word, c3: _Word, k0: int, k1: int) -> tuple[_Word, _Word, _Word, _Word]:
    for _ in range(10):
        # 32 x 32 bits fit into 64: exact for Python's integers and for numpy's uint64 alike.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (product1 >> 32) ^ c1 ^ k0, product1 & _MASK
        c2, c3 = (product0 >> 32) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3
