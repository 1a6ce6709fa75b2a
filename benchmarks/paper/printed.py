"""What the paper prints: its threshold, Table 1 and Figure 3.

Chen et al. 2024 (arXiv 2410.10165). The figure has no numbers in print; those below
were read from the coordinates of its curves.
"""

from __future__ import annotations

import math

TABLE1 = {
    1_000: 251,
    2_000: 437,
    4_000: 761,
    8_000: 1_325,
    16_000: 2_308,
    32_000: 4_019,
    64_000: 6_997,
    128_000: 12_183,
    256_000: 21_212,
    512_000: 36_933,
    1_024_000: 64_304,
}
"""Table 1: "activated entries" by n."""

FIGURE3_CONTEXT = 2**15
FIGURE3_R = (4, 16, 64, 256, 1024, 4096, 32768)
FIGURE3 = {
    "LLaMA-3.1-8B": (84.4, 19.3, 14.95, 14.15, 13.98, 13.79, 14.03),
    "Mistral-Nemo-12B": (7477.0, 139.0, 11.4, 7.84, 7.31, 6.81, 6.70),
    "Phi-3.5-mini": (71.2, 11.2, 7.62, 7.33, 7.25, 7.33, 7.34),
}
"""Figure 3: perplexity by r; the last r is the whole context."""


def sigma(head_dim: int, rows: int, delta: float) -> float:
    """Lemma 6.1's sigma_a = 4 sqrt(1 + log(m / delta) / d), of standard normal q and k.

    Args:
      head_dim: d.
      rows: m.
      delta: probability with which the lemma may fail.
    """
    return 4.0 * math.sqrt(1.0 + math.log(rows / delta) / head_dim)


def count_bound(keys: int) -> float:
    """Lemma 6.1's 2 n^(4/5)."""
    return 2.0 * keys**0.8


def norm_bound(head_dim: int, t: float) -> float:
    """Lemma E.2's sqrt(3) sqrt(d + t) on the norm of a standard normal query."""
    return math.sqrt(3.0 * (head_dim + t))


def exponent(head_dim: int) -> float:
    """Of n in a query's time: max(1 - 1 / floor(d / 2), 4 / 5) (Theorem 5.1)."""
    return max(1.0 - 1.0 / (head_dim // 2), 0.8)
