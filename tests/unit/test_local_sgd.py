"""Local SGD against a loop written by hand and against closed forms."""

from itertools import chain

import numpy as np
import pytest
import torch

from worker.local_sgd import local_sgd


def linear(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Linear(3, 2, dtype=torch.float64)


def examples(number=10):
    rng = np.random.default_rng(5)
    return torch.from_numpy(rng.standard_normal((number, 3))), torch.from_numpy(rng.integers(0, 2, number))


def by_hand(model, inputs, targets, *, lr, seed, epochs, batch_size, momentum, proximal):
    """Softmax regression's gradients, written out, in numpy and float64."""
    w, b = (parameter.detach().numpy().copy() for parameter in model.parameters())
    w0, b0, vw, vb = w.copy(), b.copy(), 0.0, 0.0
    x, y = inputs.numpy(), np.eye(2)[targets.numpy()]
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator).numpy()
        for start in range(0, len(x), batch_size):
            batch = order[start : start + batch_size]
            logits = x[batch] @ w.T + b
            p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
            losses.append(-np.log((p * y[batch]).sum(axis=1)).mean())
            error = (p - y[batch]) / len(batch)
            vw = momentum * vw + error.T @ x[batch] + proximal * (w - w0)
            vb = momentum * vb + error.sum(axis=0) + proximal * (b - b0)
            w, b = w - lr * vw, b - lr * vb
    return w, b, losses


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_the_steps_are_those_of_a_loop_written_by_hand(momentum, proximal):
    model, (inputs, targets) = linear(), examples()
    options = {"lr": 0.3, "seed": 11, "epochs": 3, "batch_size": 4, "momentum": momentum, "proximal": proximal}
    w, b, losses = by_hand(model, inputs, targets, **options)
    result = local_sgd(model, inputs, targets, **options)
    np.testing.assert_allclose(model.weight.detach().numpy(), w, rtol=1e-10)
    np.testing.assert_allclose(model.bias.detach().numpy(), b, rtol=1e-10)
    assert (result.num_samples, result.num_steps) == (10, 9)
    assert result.metrics["loss"] == pytest.approx(np.mean(losses))


class Point(torch.nn.Module):
    """A model that is a point, whatever it is given."""

    def __init__(self, start):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, inputs):
        return self.w


@pytest.mark.parametrize("mu", [0.0, 0.5, 4.0])
@pytest.mark.parametrize("steps", [1, 2, 25])
def test_the_proximal_term_follows_its_closed_form(mu, steps):
    """On 1/2 |w - c|^2 gradient descent contracts towards (c + mu w0) / (1 + mu) by 1 - lr (1 + mu) a step."""
    w0, c, lr = np.array([1.0, -2.0]), np.array([5.0, 3.0]), 0.1
    model = Point(w0)
    local_sgd(
        model, torch.zeros(1, 1), torch.from_numpy(c)[None], lr=lr, seed=0, epochs=steps, proximal=mu,
        loss=lambda output, target: 0.5 * ((output - target) ** 2).sum(),
    )  # fmt: skip
    fixed = (c + mu * w0) / (1 + mu)
    np.testing.assert_allclose(
        model.w.detach().numpy(), fixed + (1 - lr * (1 + mu)) ** steps * (w0 - fixed), rtol=1e-12
    )


def test_the_proximal_centre_is_where_this_training_started():
    model = Point([0.0])
    options = {"lr": 0.5, "seed": 0, "proximal": 1.0, "loss": lambda output, target: (output - output).sum()}
    model.w.data.fill_(7.0)  # as the worker does when it loads the pulled weights
    local_sgd(model, torch.zeros(1, 1), torch.zeros(1), **options)
    assert model.w.item() == 7.0


def test_the_seed_decides_the_order_of_the_examples():
    def trained(seed):
        model, (inputs, targets) = linear(), examples()
        local_sgd(model, inputs, targets, lr=0.5, seed=seed, epochs=2, batch_size=3)
        return model.weight.detach().numpy()

    np.testing.assert_array_equal(trained(1), trained(1))
    assert not np.array_equal(trained(1), trained(2))


def test_the_global_generator_of_torch_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    local_sgd(linear(3), *examples(), lr=0.1, seed=1)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_example_is_seen_once_an_epoch():
    seen = []
    model = Point([0.0])
    inputs = torch.arange(10.0)[:, None]
    local_sgd(
        model, inputs, torch.arange(10), lr=0.1, seed=2, epochs=2, batch_size=4,
        loss=lambda output, target: (seen.append(target.tolist()), output.sum())[1],
    )  # fmt: skip
    assert [len(batch) for batch in seen] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*seen[:3])) == sorted(chain(*seen[3:])) == list(range(10))


@pytest.mark.parametrize(("stop_after", "steps"), [(0, 1), (2, 2), (5, 5)])
def test_a_worker_that_stops_gets_what_was_done_and_at_least_one_step(stop_after, steps):
    calls = iter(range(10**6))
    result = local_sgd(
        linear(), *examples(), lr=0.1, seed=0, epochs=9, batch_size=2, stopping=lambda: next(calls) >= stop_after
    )  # fmt: skip
    assert result.num_steps == steps


@pytest.mark.parametrize("proximal", [0.0, 1.0])
def test_frozen_parameters_stay_and_the_rest_moves(proximal):
    model = linear()
    model.bias.requires_grad_(False)
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    local_sgd(model, *examples(), lr=0.1, seed=0, proximal=proximal)
    assert torch.equal(model.bias, b)
    assert not torch.equal(model.weight, w)


def test_the_model_is_in_training_mode():
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).double().eval()
    local_sgd(model, *examples(), lr=0.1, seed=0, batch_size=5)
    assert int(model[0].num_batches_tracked) == 2


@pytest.mark.parametrize(
    ("steps", "batch_size", "sizes"), [(1, 4, [4]), (7, 4, [4, 4, 2, 4, 4, 2, 4]), (3, 99, [10] * 3)]
)
def test_so_many_steps_cycle_through_shuffled_epochs(steps, batch_size, sizes):
    seen = []
    result = local_sgd(
        Point([0.0]), torch.arange(10.0)[:, None], torch.arange(10), lr=0.1, seed=2, epochs=50, steps=steps,
        batch_size=batch_size, loss=lambda output, target: (seen.append(target.tolist()), output.sum())[1],
    )  # fmt: skip
    assert [len(batch) for batch in seen] == sizes
    assert (result.num_samples, result.num_steps) == (10, steps)
    if steps == 7:
        first, second = list(chain(*seen[:3])), list(chain(*seen[3:6]))
        assert sorted(first) == sorted(second) == list(range(10))
        assert first != second


def test_steps_that_make_whole_epochs_are_epochs():
    models = linear(), linear()
    by_steps = local_sgd(models[0], *examples(), lr=0.3, seed=4, steps=9, batch_size=4, momentum=0.5)
    assert by_steps == local_sgd(models[1], *examples(), lr=0.3, seed=4, epochs=3, batch_size=4, momentum=0.5)
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.parametrize("clip", [0.01, 0.5, 1e3])
@pytest.mark.parametrize("proximal", [0.0, 0.7])
def test_a_gradient_is_cut_to_its_norm_and_the_proximal_term_is_not(clip, proximal):
    """The norm is of all parameters together; only the loss is clipped."""
    model, (inputs, targets) = linear(), examples()
    w, b = (parameter.detach().numpy().copy() for parameter in model.parameters())
    w0, b0, x, y = w.copy(), b.copy(), inputs.numpy(), np.eye(2)[targets.numpy()]
    for _ in range(3):
        logits = x @ w.T + b
        error = (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True) - y) / len(x)
        gw, gb = error.T @ x, error.sum(axis=0)
        factor = min(1.0, clip / np.sqrt((gw**2).sum() + (gb**2).sum()))
        w = w - 0.3 * (factor * gw + proximal * (w - w0))
        b = b - 0.3 * (factor * gb + proximal * (b - b0))
    local_sgd(model, inputs, targets, lr=0.3, seed=0, epochs=3, batch_size=10, clip=clip, proximal=proximal)
    np.testing.assert_allclose(model.weight.detach().numpy(), w, rtol=1e-4)  # torch divides by the norm + 1e-6
    np.testing.assert_allclose(model.bias.detach().numpy(), b, rtol=1e-4)


def test_a_clipped_step_has_the_length_asked_for():
    model = Point([0.0, 0.0])
    options = {"lr": 1.0, "seed": 0, "clip": 0.25, "loss": lambda output, target: 3 * output[0] - 4 * output[1]}
    local_sgd(model, torch.zeros(1, 1), torch.zeros(1), **options)
    np.testing.assert_allclose(model.w.detach().numpy(), [-0.15, 0.2], rtol=1e-5)


def test_weighted_examples_follow_their_closed_form():
    """On 1/2 |w - c_i|^2 the loss by weight has its minimum at the weighted mean of the c_i, and curvature 1."""
    w0, lr, steps = np.array([1.0, -2.0]), 0.1, 5
    c, weights = np.array([[5.0, 3.0], [0.0, 1.0], [-4.0, 2.0]]), np.array([0.2, 3.0, 1.0])
    model = Point(w0)
    result = local_sgd(
        model, torch.zeros(3, 1), torch.from_numpy(c), lr=lr, seed=0, epochs=steps, weights=torch.from_numpy(weights),
        loss=lambda output, target: 0.5 * (output - target) ** 2,
    )  # fmt: skip
    best = weights @ c / weights.sum()
    expected = best + (1 - lr / 2) ** steps * (w0 - best)  # an example's loss is the mean of its two places
    np.testing.assert_allclose(model.w.detach().numpy(), expected, rtol=1e-12)
    path = [best + (1 - lr / 2) ** step * (w0 - best) for step in range(steps)]
    losses = [weights @ (0.25 * (w - c) ** 2).sum(axis=1) / weights.sum() for w in path]
    assert result.metrics["loss"] == pytest.approx(np.mean(losses))


def test_equal_weights_change_nothing_and_integer_weights_are_repetitions():
    inputs, targets = examples()
    plain, equal, weighted, repeated = linear(), linear(), linear(), linear()
    options = {"lr": 0.3, "seed": 1, "epochs": 3, "batch_size": 99}
    local_sgd(plain, inputs, targets, **options)
    local_sgd(equal, inputs, targets, weights=torch.full((10,), 7.0, dtype=torch.float64), **options)
    assert torch.allclose(plain.weight, equal.weight, rtol=1e-12)
    times = torch.arange(1, 11)
    local_sgd(weighted, inputs, targets, weights=times.double(), **options)
    local_sgd(repeated, inputs.repeat_interleave(times, 0), targets.repeat_interleave(times), **options)
    assert torch.allclose(weighted.weight, repeated.weight, rtol=1e-12)
    assert not torch.allclose(weighted.weight, plain.weight, rtol=1e-3)


def test_weights_go_with_their_examples_into_the_mini_batches():
    model, inputs, seen = linear(), examples()[0], []
    local_sgd(
        model, inputs, torch.arange(10), lr=0.1, seed=3, batch_size=3, weights=torch.arange(1.0, 11.0).double(),
        loss=lambda output, target: (seen.append(target), output.sum(1))[1],
    )  # fmt: skip
    assert [len(batch) for batch in seen] == [3, 3, 3, 1]
    twin = linear()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for batch in seen:
        optimizer.zero_grad()
        weights = batch.double() + 1
        ((weights * twin(inputs[batch]).sum(1)).sum() / weights.sum()).backward()
        optimizer.step()
    assert torch.allclose(model.weight, twin.weight, rtol=1e-12)
