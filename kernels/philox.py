"""Philox4x32-10 and Box-Muller, as ``sfm_fast/philox.py`` defines them (not as ``tl.randn`` does).

All in float32, and within 2e-6 of float64 for every word: the fixed points of the logarithm and of the angle are
subtracted in integers, so that the arguments of the polynomials keep their full relative precision.
"""

import triton
import triton.language as tl

MASK = 0xFFFFFFFF


def signed(word: int) -> int:
    """The low 32 bits as a signed number, so that a kernel's argument has the same type for every value."""
    return ((word & MASK) ^ 0x80000000) - 0x80000000


@triton.jit
def philox4x32(c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tuple:
    """Ten rounds: four random words from four counter words (broadcast together) and a key of two; all uint32."""
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _log_uniform(word: tl.tensor) -> tl.tensor:
    """ln((word + 0.5) 2^-32), as e ln 2 + ln(1 + f) with 1 + f in [sqrt(1/2), sqrt(2))."""
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    # Near 1, f is the distance from 1, which is exact in the integer.
    distance = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    f = tl.where(exponent == 0, -distance, f)
    p = f * 7.0376836292e-2 - 1.1514610310e-1  # Cephes, logf
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    e = exponent.to(tl.float32)
    return (p * f * square + e * -2.12194440e-4 - 0.5 * square + f) + e * 0.693359375


@triton.jit
def normal_pair(word0: tl.tensor, word1: tl.tensor) -> tl.tuple:
    """r cos a and r sin a: r = sqrt(-2 ln u(word0)), a = 2 pi u(word1)."""
    radius = tl.sqrt_rn(-2.0 * _log_uniform(word0))
    # The top two bits are the nearest quarter turn, the others the rest of the angle.
    turned = word1 + 0x20000000
    quarter = turned >> 30
    rest = (turned & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    angle = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-09
    square = angle * angle
    sine = ((square * -1.9515295891e-4 + 8.3321608736e-3) * square - 1.6666654611e-1) * square * angle + angle
    cosine = (square * 2.443315711809948e-5 - 1.388731625493765e-3) * square + 4.166664568298827e-2
    cosine = cosine * square * square - 0.5 * square + 1.0
    odd = (quarter & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where(((quarter + 1) & 2) != 0, -x, x)
    y = tl.where((quarter & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def normal4(
    block: tl.tensor, item: tl.tensor, step: tl.tensor, stream: tl.tensor, key_low: tl.tensor, key_high: tl.tensor
) -> tl.tuple:
    """Standard normal numbers 4 block .. 4 block + 3 of an item, for int32 blocks of any shape."""
    c0 = block.to(tl.uint32)
    zero = c0 * 0
    w0, w1, w2, w3 = philox4x32(
        c0,
        zero + item.to(tl.uint32),
        zero + step.to(tl.uint32),
        zero + stream.to(tl.uint32),
        key_low.to(tl.uint32),
        key_high.to(tl.uint32),
    )
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return n0, n1, n2, n3
