"""How the averaged delta moves the weights. The server adds: a delta is weights after - weights before."""

from shared.vector import Vector, add_scaled


def sgd(weights: Vector, delta_sum: Vector, divisor: float, server_lr: float) -> None:
    """Step along the mean delta in place: w <- w + server_lr * sum / divisor.

    Args:
        weights: float32 [n], changed in place.
        delta_sum: float32 [n], weighted sum of deltas.
        divisor: > 0; FedBuff's K, not the sum of the weights.
        server_lr: eta_g > 0.
    Source: Nguyen et al., arXiv:2106.06639, algorithm 1.
    """
    add_scaled(weights, delta_sum, server_lr / divisor)
