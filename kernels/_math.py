"""Branch-free scalar functions. They are cheaper than those of libdevice, because the range of the argument or the accuracy is limited.

The coefficients are minimax fits of the relative error.
"""

import triton
import triton.language as tl


@triton.jit
def log_positive(x):
    """log(x) for a positive normal float32, with a relative error of 3e-7, near 1 too."""
    bits = x.to(tl.int32, bitcast=True)
    # The exponent is chosen so that the mantissa 1 + f lies in [2/3, 4/3).
    exponent = (bits - 0x3F2AAAAB) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, -0.153656945, 0.171111852)
    p = tl.fma(p, f, -0.164200857)
    p = tl.fma(p, f, 0.197950363)
    p = tl.fma(p, f, -0.250076205)
    p = tl.fma(p, f, 0.333379894)
    p = tl.fma(p, f, -0.499999374)
    p = tl.fma(p, f, 0.999999821)
    return tl.fma(exponent.to(tl.float32), 0.693147181, p * f)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for x in [0, 1], with a relative error of 2e-7."""
    p = tl.fma(x, 0.00523269083, -0.0295052286)
    p = tl.fma(p, x, 0.0782259479)
    p = tl.fma(p, x, -0.136632457)
    p = tl.fma(p, x, 0.191060081)
    p = tl.fma(p, x, -0.24842982)
    p = tl.fma(p, x, 0.333190978)
    p = tl.fma(p, x, -0.499994934)
    p = tl.fma(p, x, 0.99999994)
    return p * x


@triton.jit
def sincos_turn(w):
    """The sine and cosine of 2 pi w / 2^32 for a uint32 w, with an absolute error of 2e-7. The quadrant is split off in integer
    arithmetic."""
    quadrant = (w + 0x20000000) >> 30
    remainder = (w - (quadrant << 30)).to(tl.int32, bitcast=True)
    x = remainder.to(tl.float32) * 1.46291807926715968e-9
    x2 = x * x
    s = tl.fma(x2, -0.000195018205, 0.00833201688)
    s = tl.fma(s, x2, -0.166666508)
    s = tl.fma(s, x2, 1.0) * x
    c = tl.fma(x2, -0.00135794037, 0.0416544192)
    c = tl.fma(c, x2, -0.49999842)
    c = tl.fma(c, x2, 0.99999994)
    swap = (quadrant & 1) != 0
    sine, cosine = tl.where(swap, c, s), tl.where(swap, s, c)
    return tl.where((quadrant & 2) != 0, -sine, sine), tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine)


@triton.jit
def sine_pair(t):
    """sin(t)^2 and sin(t) cos(t), whose period is pi, with an absolute error of 3e-7 while float32 holds the phase.

    t = n pi + r with an integer n and |r| <= pi / 2. pi is subtracted in two parts, so that r keeps its digits.
    """
    n = tl.floor(tl.fma(t, 0.318309886, 0.5))
    r = tl.fma(n, 8.74227801e-8, tl.fma(n, -3.14159274, t))
    # Where float32 cannot hold the phase the limits keep the results between 0 and 1; the comparisons keep NaN.
    r = tl.where(r < -1.5708, -1.5708, r)
    r = tl.where(r > 1.5708, 1.5708, r)
    square = r * r
    s = tl.fma(square, 2.6087896356e-6, -1.9811053451e-4)
    s = tl.fma(s, square, 8.3330874407e-3)
    s = tl.fma(s, square, -1.6666660438e-1)
    s = tl.fma(s * square, r, r)
    c = tl.fma(square, -2.6075662662e-7, 2.4761808159e-5)
    c = tl.fma(c, square, -1.3888402069e-3)
    c = tl.fma(c, square, 4.1666640625e-2)
    c = tl.fma(c, square, -4.9999999547e-1)
    return s * s, s * tl.fma(c, square, 1.0)


@triton.jit
def expm1(x):
    """exp(x) - 1, with a relative error of 6e-7."""
    p = tl.fma(x, 0.00138888718, 0.00836977828)
    p = tl.fma(p, x, 0.0416671559)
    p = tl.fma(p, x, 0.166665003)
    p = tl.fma(p, x, 0.49999997)
    p = tl.fma(p, x, 1.0)
    # Near 0 the difference would cancel.
    return tl.where(tl.abs(x) < 0.35, p * x, tl.exp(x) - 1.0)


@triton.jit
def exponential(x):
    """exp(x), exp(x) - 1 and exp(x) - 1 - x. The last two have a relative error of 6e-7 near 0 too, where the differences would cancel."""
    p = tl.fma(x, 0.00019875691500, 0.0013981999507)
    p = tl.fma(p, x, 0.0083334519073)
    p = tl.fma(p, x, 0.041665795894)
    p = tl.fma(p, x, 0.16666665459)
    p = tl.fma(p, x, 0.50000001201)
    near, rest = tl.abs(x) < 0.3466, x * x * p
    value = tl.exp2(x * 1.4426950408889634)
    difference = value - 1.0
    return value, tl.where(near, x + rest, difference), tl.where(near, rest, difference - x)


@triton.jit
def logistic(x):
    """1 / (1 + exp(-x)) and 1 / (1 + exp(x)). Neither is computed as 1 minus the other, which would cancel."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r), tl.where(x < 0, r, e * r)


@triton.jit
def standard_normal(x):
    """The density and the distribution function of the standard normal at x."""
    # exp(a^2) erfc(a) for a >= 0 is t times a polynomial in t = 1 / (1 + a / 2), here a = |x| / sqrt(2).
    t = 1.0 / tl.fma(tl.abs(x), 0.353553391, 1.0)
    p = tl.fma(t, -5.9069016e-2, 2.84575225e-1)
    p = tl.fma(p, t, -4.87200417e-1)
    p = tl.fma(p, t, 2.78067725e-1)
    p = tl.fma(p, t, -2.66260341e-2)
    p = tl.fma(p, t, 2.02687016e-1)
    p = tl.fma(p, t, 2.43103728e-1)
    p = tl.fma(p, t, 2.82375313e-1)
    p = tl.fma(p, t, 2.82086418e-1)
    e = tl.exp(-0.5 * x * x)
    tail = 0.5 * p * t * e
    return 0.398942280 * e, tl.where(x < 0, tail, 1.0 - tail)
