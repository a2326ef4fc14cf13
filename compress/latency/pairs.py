"""A latency written as a sum over pairs of ties, which `pairwise` can minimise exactly."""

from __future__ import annotations

import numpy as np

from compress.latency.table import BLOCKS, TERMS, Latency


def as_pairs(
    latency: Latency, base: np.ndarray, units: np.ndarray, parts: list[np.ndarray]
) -> tuple[list[np.ndarray], dict[tuple[int, int], np.ndarray], float]:
    """Write the cost as constant + Σ unary + Σ pairs.

    A surcharge for a width that is off the blocks depends on one tie where one tie makes that width; where several
    do, it is left out, which makes the sum a lower bound.
    """
    fixed = latency.forms @ base + latency.consts  # (3, segments)
    slopes = latency.forms @ units.T  # (3, segments, ties)
    terms = {name: latency.terms[:, index] for index, name in enumerate(TERMS)}
    reads, makes = (0, 1)
    linear = (
        terms["reads"] @ slopes[0]
        + terms["makes"] @ slopes[1]
        + terms["before"] @ slopes[2]
        + terms["product"] @ (fixed[reads][:, None] * slopes[makes] + fixed[makes][:, None] * slopes[reads])
    )
    square = np.einsum("s,si,sj->ij", terms["product"], slopes[reads], slopes[makes])
    square = square + square.T
    unary = [linear[i] * p + square[i, i] / 2 * p * p for i, p in enumerate(parts)]
    pairs = {
        (i, j): square[i, j] * np.outer(parts[i], parts[j])
        for i in range(len(parts))
        for j in range(i + 1, len(parts))
        if square[i, j] > 0
    }
    constant = latency.offset + float(
        terms["constant"].sum()
        + sum(terms[name] @ fixed[k] for k, name in enumerate(("reads", "makes", "before")))
        + terms["product"] @ (fixed[reads] * fixed[makes])
    )
    for block in BLOCKS:
        for side, name in ((reads, f"in_off_{block}"), (makes, f"out_off_{block}")):
            for segment in np.flatnonzero(terms[name]):
                mine = np.flatnonzero(slopes[side, segment])
                if mine.size > 1:
                    continue
                constant += _surcharge(
                    terms[name][segment], fixed[:, segment], slopes[:, segment], side, mine, block, parts, unary, pairs
                )
    return unary, pairs, constant


def _surcharge(
    factor: float,
    fixed: np.ndarray,
    slopes: np.ndarray,
    side: int,
    mine: np.ndarray,
    block: int,
    parts: list[np.ndarray],
    unary: list[np.ndarray],
    pairs: dict[tuple[int, int], np.ndarray],
) -> float:
    """Add factor · this side · the other side where this side is off the block; return what is constant of it."""
    other = 1 - side
    if mine.size == 0:
        off = factor * fixed[side] * (fixed[side] % block != 0)
        for j in np.flatnonzero(slopes[other]):
            unary[j] = unary[j] + off * slopes[other, j] * parts[j]
        return float(off * fixed[other])
    i = int(mine[0])
    width = fixed[side] + slopes[side, i] * parts[i]
    off = factor * width * (width % block != 0)
    unary[i] = unary[i] + off * fixed[other]
    for j in np.flatnonzero(slopes[other]).tolist():
        table = np.outer(off, slopes[other, j] * parts[j])
        if j == i:
            unary[i] = unary[i] + np.diag(table)
            continue
        key, value = ((i, j), table) if i < j else ((j, i), table.T)
        pairs[key] = pairs.get(key, 0.0) + value
    return 0.0
