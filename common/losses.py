"""What diffusion models are trained to minimise."""

from collections.abc import Callable, Mapping

from torch import Tensor

from common.schedule import NoiseSchedule


def diffusion_loss(
    network: Callable[..., Tensor],
    batch: Mapping[str, Tensor],
    schedule: NoiseSchedule,
    prediction: str,
    gamma: float,
) -> Tensor:
    """Mean squared error of the prediction, each image weighted by min-SNR (Hang et al. 2023).

    Args:
        network: called as network(xt, t, **condition).
        batch: `x0` in [-1, 1] and `eps`, both (N, C, H, W), and timesteps `t` (N,); all else in it is the condition.
        schedule: noises x0.
        prediction: what the network is to predict: eps, x0 or v.
        gamma: cap of the signal-to-noise ratio in the weights; 0 leaves the error unweighted.
    """
    condition = dict(batch)
    x0, eps, t = (condition.pop(name) for name in ("x0", "eps", "t"))
    output = network(schedule.add_noise(x0, eps, t), t, **condition).float()
    error = (output - schedule.target(x0, eps, t, prediction)).square().mean(dim=(1, 2, 3))
    if gamma:
        error = error * schedule.min_snr_weight(t, prediction, gamma)
    return error.mean()
