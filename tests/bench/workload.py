"""The workload of the `async` and `scale` benches: response lengths with a long tail, log-normal, p99 eight times p50.

`python -m tests.bench.workload` writes `workload.txt` anew; it is committed so that every machine sees the same one.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np

FILE = Path(__file__).with_name("workload.txt")
SIZE, MEDIAN, RATIO, Z99 = 4096, 100, 8.0, NormalDist().inv_cdf(0.99)


def lengths() -> np.ndarray:
    """Tokens of each response, int64; sample i has entry i modulo their number."""
    return np.loadtxt(FILE, dtype=np.int64)


def make() -> np.ndarray:
    """Quantiles of the distribution in a fixed random order, so that p50 and p99 are what they should be."""
    quantiles = np.random.default_rng(0).permutation((np.arange(SIZE) + 0.5) / SIZE)
    normal = np.array([NormalDist().inv_cdf(quantile) for quantile in quantiles])
    return np.maximum(1, np.round(MEDIAN * np.exp(math.log(RATIO) / Z99 * normal))).astype(np.int64)


if __name__ == "__main__":
    FILE.write_text("\n".join(map(str, make())) + "\n")
