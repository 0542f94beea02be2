"""How far drawn images lie from real ones, by the features of both: matrices (N, D) and (M, D), one row an image.

All of them depend on how many images are compared, the Frechet distance and recall most. Compare figures only at equal
counts, and read them beside a yardstick: the same numbers for two sets of real images.
"""

from functools import partial

import torch
from torch import Tensor

from common.cli import UserError

AT_ONCE = 500


def matrices(first: Tensor, second: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both feature matrices as float64, once they are known to be comparable: of one width, and `least` rows."""
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise ValueError(f"features {tuple(first.shape)} and {tuple(second.shape)}: both must be (images, features)")
    if min(len(first), len(second)) < least:
        raise UserError(f"{min(len(first), len(second))} images: comparing two sets takes at least {least} of each")
    return first.double(), second.double()


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Frechet distance between Gaussians fitted to two sets of features (Heusel et al. 2017, equation 6).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), with the covariances C over n - 1; a `UserError` for a single image.
    """
    first, second = matrices(first, second, 2)
    means = first.mean(0), second.mean(0)
    # With C = X'X, X the centred features over sqrt(n - 1), the eigenvalues of C1 C2 are the squared singular values
    # of X1 X2'. That needs no matrix square root, which is inexact and turns complex where a covariance is singular,
    # as it is with fewer images than features. X may be replaced by the small triangle of its QR decomposition.
    roots = [torch.linalg.qr((x - m) / (len(x) - 1) ** 0.5).R for x, m in zip((first, second), means)]
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    distance = (means[0] - means[1]).square().sum() + roots[0].square().sum() + roots[1].square().sum() - 2 * cross
    return max(0.0, distance.item())


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Squared maximum mean discrepancy with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, section 4: KID).

    Unbiased: its expectation does not depend on the number of images, and it may be slightly negative. Two images
    are the least, else a `UserError`.
    """
    first, second = matrices(first, second, 2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return (within(first) + within(second) - 2 * kernel(first, second).mean()).item()


def precision_recall(real: Tensor, drawn: Tensor, k: int) -> tuple[float, float]:
    """How many drawn images look real, and how much of the real images' variety was drawn; both 0 to 1.

    Improved precision and recall (Kynkaanniemi et al. 2019, equations 1 and 2): a set's manifold is the union of balls
    around its points, each reaching to the point's k-th neighbour in the set. Precision is the share of drawn points
    inside the real manifold, recall that of real points inside the drawn one. A `UserError` for k images or fewer.
    """
    real, drawn = matrices(real, drawn, k + 1)
    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")  # the shortcut loses small ones
    # The smallest distance of every row is the point's own zero, so the k-th neighbour is at k + 1.
    real_radii, drawn_radii = (distances(x, x).kthvalue(k + 1, dim=1).values for x in (real, drawn))
    between = distances(drawn, real)
    precision = (between <= real_radii).any(dim=1).double().mean()
    recall = (between.T <= drawn_radii).any(dim=1).double().mean()
    return precision.item(), recall.item()


def all_distances(real: Tensor, drawn: Tensor, k: int) -> dict[str, float]:
    """Everything above: frechet, kernel, precision and recall."""
    precision, recall = precision_recall(real, drawn, k)
    return {
        "frechet": frechet_distance(drawn, real),
        "kernel": kernel_distance(drawn, real),
        "precision": precision,
        "recall": recall,
    }


def nearest(queries: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N,) from queries (N, D) to their nearest references (M, D), and these references' positions (N,)."""
    # Some queries at a time, for the memory. The fast shortcut ranks well enough; the distance to the winner is then
    # computed exactly.
    index = torch.cat([torch.cdist(part, references).argmin(dim=1) for part in queries.split(AT_ONCE)])
    return (queries - references[index]).norm(dim=1), index
