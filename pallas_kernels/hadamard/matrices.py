"""Hadamard matrices: square, of plus and minus one, with orthogonal rows; in numpy alone.

The matrix of a size ``n = 2^p * odd`` is the Kronecker product ``core x [[1, 1], [1, -1]] x ...``: a core whose
order is a multiple of ``odd``, and Sylvester's matrices for the powers of two that are left. A transform is
therefore one small product along each axis of a reshaped vector. Cores are constructed, not listed:

- Paley's first, of order ``q + 1`` for a prime ``q = 3 mod 4``, and second, of order ``2 * (q + 1)`` for a prime
  ``q = 1 mod 4`` (Paley, 1933), from which prime numbers are squares modulo ``q``;
- Williamson's, of order ``4 * m``, from four symmetric circulant matrices whose squares add up to ``4 * m``
  (Williamson, 1944): here for ``m = 43``, the MLP of Llama-2-7B (11008 = 172 * 64), for which Paley's are too large.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from jaxtyping import Int8

MAX_CORE_ORDER = 1024
_SYLVESTER_SIDE = 16  # powers of two are taken in matrices of this side
# First halves of the first rows; the second halves mirror them.
_WILLIAMSON = {
    43: ("+++++-++----+-++--++-+", "+++---++--+-+-+-++----", "++-+-++++-+--+--+++--+", "+-++-----++++-+-+++-++"),
}


def core_order(size: int) -> int:
    """Order of the core of ``size``, 1 for a power of two: the smallest that can be constructed.

    Raises:
        ValueError: there is none of at most ``MAX_CORE_ORDER`` that divides ``size``; the message names sizes that have
            one, of the same odd part where there are any.
    """
    if size < 1:
        raise ValueError(f"hadamard: K={size} must be positive")
    odd = size // (size & -size)
    if odd == 1:
        return 1
    doublings = range(2, MAX_CORE_ORDER.bit_length())
    order = next((odd << power for power in doublings if _is_constructible(odd << power)), None)
    if order is None or order > MAX_CORE_ORDER:
        raise ValueError(
            f"hadamard: no Hadamard matrix for K={size}, whose odd part is {odd}, can be constructed here; use a power "
            "of two, or its product with 12, 20, 28, 36, 44, 60, 68, 76, 104, 108, ..."
        )
    if size % order:
        raise ValueError(
            f"hadamard: no Hadamard matrix for K={size} can be constructed here; with its odd part {odd} use {order} "
            "or its product with a power of two"
        )
    return order


@functools.lru_cache
def kronecker_factors(size: int) -> tuple[Int8[np.ndarray, "_ _"], ...]:
    """Matrices whose Kronecker product is the Hadamard matrix of ``size``, each of them one; the core first.

    Raises:
        ValueError: there is no such matrix; see :func:`core_order`.
    """
    core = core_order(size)
    rest = size // core
    factors = [_core(core)] if core > 1 else []
    while rest > 1:
        side = min(rest, _SYLVESTER_SIDE)
        factors.append(sylvester_matrix(side))
        rest //= side
    return tuple(factors) or (np.ones((1, 1), np.int8),)


def hadamard_matrix(size: int) -> Int8[np.ndarray, "size size"]:
    """The Hadamard matrix of ``size``.

    Raises:
        ValueError: there is none; see :func:`core_order`.
    """
    return functools.reduce(np.kron, kronecker_factors(size))


def sylvester_matrix(side: int) -> Int8[np.ndarray, "side side"]:
    """The matrix of a power of two, which is symmetric: ``(-1)^(bits that row and column have in common)``."""
    index = np.arange(side)
    common = index[:, None] & index
    parity = np.zeros_like(common)
    while common.any():
        parity ^= common & 1
        common >>= 1
    return (1 - 2 * parity).astype(np.int8)


def _is_constructible(order: int) -> bool:
    first, second = order - 1, order // 2 - 1
    return order // 4 in _WILLIAMSON or _is_prime(first) or (second % 4 == 1 and _is_prime(second))


def _core(order: int) -> np.ndarray:
    if order // 4 in _WILLIAMSON:
        return _williamson_matrix(_WILLIAMSON[order // 4])
    if _is_prime(order - 1):
        return _paley_first(order - 1)
    return _paley_second(order // 2 - 1)


def _paley_first(prime: int) -> np.ndarray:
    skew = _bordered(prime)
    skew[1:, 0] = -1
    return np.eye(prime + 1, dtype=np.int8) + skew


def _paley_second(prime: int) -> np.ndarray:
    """The bordered matrix, which is symmetric here, with a 2 x 2 block in the place of each entry."""
    ones, diagonal = np.array([[1, 1], [1, -1]], np.int8), np.array([[1, -1], [-1, -1]], np.int8)
    return np.kron(_bordered(prime), ones) + np.kron(np.eye(prime + 1, dtype=np.int8), diagonal)


def _bordered(prime: int) -> np.ndarray:
    """``[prime + 1, prime + 1]``: 1 where ``row - column`` is a square modulo ``prime``, -1 elsewhere; within ones."""
    is_square = np.full(prime, -1, np.int8)
    is_square[np.arange(1, prime) ** 2 % prime] = 1
    is_square[0] = 0
    residue = np.arange(prime)
    matrix = np.ones((prime + 1, prime + 1), np.int8)
    matrix[0, 0] = 0
    matrix[1:, 1:] = is_square[(residue[:, None] - residue) % prime]
    return matrix


def _williamson_matrix(halves: tuple[str, ...]) -> np.ndarray:
    a, b, c, d = (_circulant(half + half[:0:-1]) for half in halves)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _circulant(row: str) -> np.ndarray:
    signs = np.array([1 if sign == "+" else -1 for sign in row], np.int8)
    index = np.arange(len(row))
    return signs[(index - index[:, None]) % len(row)]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
