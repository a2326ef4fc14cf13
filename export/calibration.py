"""The range of a tensor in 8 bits, found from the histogram of its magnitudes."""

from __future__ import annotations

import numpy as np

BINS = 2048
LEVELS = 128  # magnitudes that 8 bits with a sign can tell apart
PERCENTILE = 99.999


class Histogram:
    """How often each magnitude occurs, over all arrays that were added.

    Attributes:
        largest: magnitude at the end of the last bin.
        counts: (bins,). Exact zeros are not counted: every scale represents them exactly, whatever their number.
    """

    def __init__(self, largest: float, bins: int = BINS) -> None:
        self.largest = float(largest)
        self.counts = np.zeros(bins, np.int64)

    def add(self, values: np.ndarray) -> None:
        """Count the magnitudes of an array; what is beyond the range counts in the last bin."""
        magnitudes = np.abs(values[values != 0], dtype=np.float32)
        bins = len(self.counts)
        if not len(magnitudes):
            return
        places = np.minimum((magnitudes * np.float32(bins / self.largest)).astype(np.int64), bins - 1)
        self.counts += np.bincount(places, minlength=bins)


def percentile_threshold(histogram: Histogram, percentile: float = PERCENTILE) -> float:
    """Return the smallest end of a bin that at least this share of the magnitudes, in percent, lies below."""
    reached = np.cumsum(histogram.counts)
    index = int(np.searchsorted(reached, reached[-1] * percentile / 100))
    return histogram.largest * (index + 1) / len(histogram.counts)


def kl_threshold(histogram: Histogram, levels: int = LEVELS) -> float:
    """Return the end of the range whose 8-bit version tells least apart from the whole distribution.

    For every candidate the counts beyond it are added to its last bin, the bins are merged into `levels` groups, and
    the counts of a group spread evenly over its bins that are not empty; the candidate with the least Kullback-Leibler
    divergence wins. Source: S. Migacz, 8-bit Inference with TensorRT, GTC 2017, which ncnn's own tool follows too.

    Args:
        histogram: of at least `levels` bins.
        levels: groups that 8 bits make.
    """
    counts = histogram.counts.astype(np.float64)
    ends = range(min(levels, len(counts)), len(counts) + 1)
    divergences = [_divergence(counts, end, levels) for end in ends]
    return histogram.largest * ends[int(np.argmin(divergences))] / len(counts)


def _divergence(counts: np.ndarray, end: int, levels: int) -> float:
    """Return the divergence of the first `end` bins in `levels` groups from all bins, clipped to them."""
    expected = counts[:end].copy()
    expected[-1] += counts[end:].sum()
    group = np.arange(end) * levels // end
    filled = counts[:end] > 0
    sums = np.bincount(group, counts[:end], levels)
    sizes = np.bincount(group, filled, levels)
    merged = np.where(filled, (sums / np.maximum(sizes, 1))[group], 0.0)
    expected, merged = expected / max(expected.sum(), 1.0), merged / max(merged.sum(), 1.0)
    seen = expected > 0
    # A magnitude that only clipping brought into a bin has no share of its own there.
    return float(np.sum(expected[seen] * np.log(expected[seen] / np.maximum(merged[seen], 1e-12))))
