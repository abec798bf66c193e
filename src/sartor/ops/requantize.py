"""Fewer bits for a weight: affine codes whose groups have a small squared error.

For given codes the best scale and offset of a group are a line fitted through its values; for a
given line the best codes are the nearest ones. Taking turns lowers the error each time (Lloyd's
algorithm on an evenly spaced grid), so a group ends where its start leads: it starts from the
line between its extremes, which is rounding to nearest, and from narrower ones.
"""

from __future__ import annotations

import numpy as np

from sartor.ops.weights import F32, U8, AffineFormat, Weight

REQUANTIZER_VERSION = 1
"""Part of a packed file's identity: change it when the codes change."""

GROUP = 32
"""Weights that share a scale and an offset."""

_SHARES = (1.0, 0.9, 0.8)
"""Of a group's range, what the codes span at the start: values beyond the ends are clipped."""
_TURNS = 3
_CHUNK = 1 << 16
"""Weights at a time: with their temporaries about 1 MB, the L2 cache of one core."""


def requantize(weight: Weight, bits: int, name: str) -> Weight:
    """``[N, K]`` as codes of ``bits`` bits, with a scale and an offset for every 32 inputs.

    No group is further from the weight (sum of squares, up to the rounding of float32) than
    rounding to nearest between its extremes would leave it. Columns of the result are in the
    order of the inputs; groups must divide K. Beside the result it needs a few megabytes.
    """
    rows, columns = weight.shape
    codes = np.empty((rows, columns), np.uint8)
    scale = np.empty((rows, columns // GROUP), np.float32)
    offset = np.empty_like(scale)
    step = max(1, _CHUNK // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        values = weight.rows(part).dequantize()
        # Groups side by side, so that sums over a group are sums of long rows.
        found = _search(np.ascontiguousarray(values.reshape(-1, GROUP).T), 2**bits - 1)
        codes[part] = found[0].T.reshape(values.shape)
        scale[part] = found[1].reshape(len(values), -1)
        offset[part] = found[2].reshape(len(values), -1)
    return Weight(name, AffineFormat(bits, GROUP, offset=True), codes, scale, offset)


def _search(x: F32, top: int) -> tuple[U8, F32, F32]:
    """Codes from 0 to ``top`` like ``x [group, groups]``, and scale and offset ``[groups]``."""
    mean = x.mean(axis=0)
    x = x - mean
    low, high = x.min(axis=0), x.max(axis=0)
    best = np.full(x.shape[1], -1, np.float32)
    best_scale, best_offset = np.ones_like(best), np.zeros_like(best)
    for share in _SHARES:
        scale = (high - low) * np.float32(share / top)
        offset = (low + high) / 2 - scale * np.float32(top / 2)
        for _ in range(_TURNS):
            scale = np.where(scale > 0, scale, np.float32(1))  # all values of the group are equal
            fitted_scale, fitted_offset, explained = _fit(x, _encode(x, scale, offset, top))
            better = explained > best
            best = np.where(better, explained, best)
            best_scale = np.where(better, scale, best_scale)
            best_offset = np.where(better, offset, best_offset)
            scale, offset = fitted_scale, fitted_offset
    codes = _encode(x, best_scale, best_offset, top)
    scale, offset, _ = _fit(x, codes)
    return codes.astype(np.uint8), scale, offset + mean


def _encode(x: F32, scale: F32, offset: F32, top: int) -> F32:
    """The nearest codes, as floats."""
    codes: F32 = x / scale
    codes -= offset / scale
    np.rint(codes, out=codes)
    np.clip(codes, 0, top, out=codes)
    return codes


def _fit(x: F32, codes: F32) -> tuple[F32, F32, F32]:
    """Scale and offset of the line through a group's points (code, value), and how much of the
    values' squares it explains; ``x`` has the mean 0 in every group."""
    mean = codes.mean(axis=0)
    centred = codes - mean
    together = (centred * x).sum(axis=0)
    spread = np.square(centred, out=centred).sum(axis=0)
    scale = together / np.where(spread > 0, spread, np.float32(1))
    return scale, -scale * mean, together * scale
