"""FedBuff: average K updates, then step."""

from aggregator.rules.averaging import Averaging
from aggregator.rules.mean import Mean
from aggregator.server_optimizer import ServerOptimizer


def fedbuff(mean: Mean, optimizer: ServerOptimizer, server_lr: float) -> Averaging:
    """Buffered asynchronous aggregation.

        on arrival:        sum <- sum + s(tau_i) * Delta_i
        at K arrivals:     w_{v+1} = w_v + server_lr * sum / K;  sum <- 0

    or, instead of adding server_lr * g, whatever the server optimizer does with g = sum / K. The divisor is K, not
    the sum of the weights: a buffer of stale updates takes a smaller step. With `weight_by_samples`, Delta_i also
    counts n_i times and the divisor is sum n_i.

    Use it: by default. Memory: one vector of model size besides the weights and the optimizer's.
    Source: Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", arXiv:2106.06639, alg. 1.

    Args:
        mean: of the buffer.
        optimizer: what steps along it.
        server_lr: eta_g > 0.
    """
    return Averaging("fedbuff", mean, optimizer, server_lr)
