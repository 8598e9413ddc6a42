"""CRC-32 of two byte strings joined, from the CRC-32 of each: bytes that two sums need are read once."""

from __future__ import annotations

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31
_BITS = 32


def joined_checksum(first: int, second: int, second_bytes: int) -> int:
    """CRC-32 of a string A followed by a string B.

    crc(A + B) = crc(A) * x^(8 * len(B)) + crc(B), polynomials over GF(2) modulo the generator: the inversions at both
    ends of a CRC-32 cancel out.

    Args:
        first: CRC-32 of A.
        second: CRC-32 of B.
        second_bytes: length of B.
    """
    power, exponent, bit = _ONE, 8 * second_bytes, 0
    while exponent:
        if exponent & 1:
            power = _product(_SQUARES[bit % _BITS], power)
        exponent >>= 1
        bit += 1
    return _product(power, first) ^ second


def _product(left: int, right: int) -> int:
    """Of two polynomials modulo the generator. The highest bit stands for x^0, as in CRC-32."""
    product, bit = 0, _ONE
    while left:
        if left & bit:
            product ^= right
            left ^= bit
        bit >>= 1
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product


def _squares() -> tuple[int, ...]:
    """x^(2^n) for n = 0 to 31; n = 32 gives x again."""
    powers = [_ONE >> 1]
    while len(powers) < _BITS:
        powers.append(_product(powers[-1], powers[-1]))
    return tuple(powers)


_SQUARES = _squares()
