"""What lies between two noises: along the sphere (slerp) and along the straight line (lerp).

Gaussian noise of D values has length sqrt(D), almost exactly. Slerp keeps that length. Lerp cuts through the sphere,
and the network, which has never seen noise so short, draws a washed-out face in the middle.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from common.cli import UserError
from p2_ddim.noise import Noise

STRIP = tuple(k / 10 for k in range(11))


def lerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) a + alpha b: the straight line from a to b."""
    return (1 - alpha) * a + alpha * b


def slerp(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """The great circle from a to b, over all values together (Shoemake 1985; Song et al. 2021, section 5.3).

    sin((1 - alpha) theta) / sin(theta) a + sin(alpha theta) / sin(theta) b, with theta the angle between a and b, which
    have the same shape. Both ends, alpha = 0 and 1, are exact.
    """
    a_unit, b_unit = a.double() / a.double().norm(), b.double() / b.double().norm()
    # Unlike the arc cosine of a product, this keeps small angles and those near pi (Kahan 2006).
    theta = 2 * math.atan2(float((a_unit - b_unit).norm()), float((a_unit + b_unit).norm()))
    if not math.sin(theta) > 1e-6:  # parallel, opposite, or NaN for a noise of zeros: no single circle joins them
        return lerp(a, b, alpha)
    from_a, from_b = (math.sin(part * theta) / math.sin(theta) for part in (1 - alpha, alpha))
    return from_a * a + from_b * b


METHODS = {"slerp": slerp, "lerp": lerp}


def between(a: Noise, b: Noise, method: str, alphas: Sequence[float] = STRIP) -> list[Noise]:
    """The noises at these points of the way from a to b; a `UserError` if the two differ in shape."""
    if a.xt.shape != b.xt.shape:
        raise UserError(f"noises {a.name} and {b.name}: shapes {tuple(a.xt.shape)} and {tuple(b.xt.shape)} differ")
    return [Noise(f"{a.name}-{b.name}-{alpha:g}", METHODS[method](a.xt, b.xt, alpha)) for alpha in alphas]
