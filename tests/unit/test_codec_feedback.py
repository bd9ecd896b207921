"""Error feedback: nothing is lost, and what stalls without it converges with it."""

import numpy as np
import pytest

from shared.compression import encode_with_feedback, parse
from tests.codecs import NAMES, decoded, encode, inflate, layout_of

FED_BACK = [name for name in NAMES if parse(name).feedback]


def send(name, delta, residual, layout, rng):
    """Send with feedback; return what arrives."""
    return inflate(decoded(name, encode_with_feedback(parse(name), delta, residual, layout, rng), layout), layout)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
@pytest.mark.parametrize("name", [*FED_BACK, "ef | rotate | eden(2) | zstd", "ef | uniform(step=4) | pack"])
def test_all_that_was_trained_is_sent_or_kept(name, scale):
    layout, rng = layout_of((9,), (70, 40), (70,), (1000, 3)), np.random.default_rng(0)
    trained, arrived = np.zeros(layout.num_params), np.zeros(layout.num_params)
    residual = np.zeros(layout.num_params, np.float32)
    for _ in range(12):
        delta = (rng.laplace(size=layout.num_params) * scale).astype(np.float32)
        before = delta.tobytes()
        trained += delta
        arrived += send(name, delta, residual, layout, rng)
        assert delta.tobytes() == before
    assert residual.any()
    assert np.abs(trained - arrived - residual).max() <= 12 * 2.0**-21 * scale * 40  # float32 sums, 12 of them


@pytest.mark.parametrize("name", FED_BACK)
def test_the_residual_stays_bounded_and_everything_is_sent_sooner_or_later(name):
    """The same delta for ever, all elements alike or not: the mean of what arrives goes to it."""
    layout, rng = layout_of((50, 40)), np.random.default_rng(1)
    for delta in (np.full(2000, 0.1, np.float32), rng.standard_normal(2000).astype(np.float32)):
        residual, arrived, rounds = np.zeros(2000, np.float32), np.zeros(2000), 400
        for _ in range(rounds):
            arrived += send(name, delta, residual, layout, rng)
        error = np.linalg.norm(arrived / rounds - delta) / np.linalg.norm(delta)
        assert error < 0.25, error


def descend(name, targets, layout, feedback, rounds=500, rate=0.02):
    """Minimise sum_i ||x - t_i||^2 / 2 by clients that send compressed steps in turn; return x less the optimum."""
    codec, rng = parse(name), np.random.default_rng(0)
    x = np.zeros(layout.num_params)
    residuals = [np.zeros(layout.num_params, np.float32) for _ in targets]
    for turn in range(rounds):
        step = np.zeros(layout.num_params)
        for target, residual in zip(targets, residuals, strict=True):
            delta = (rate * (target - x)).astype(np.float32)
            if feedback:
                step += send(codec.name, delta, residual, layout, rng)
            else:
                step += inflate(decoded(codec.name, encode(codec.name, delta, layout, turn), layout), layout)
        x += step / len(targets)
    return x - np.mean(targets, axis=0)


def test_topk_needs_feedback():
    """Two clients whose largest gradients cancel: without feedback nothing else is ever sent."""
    layout, common = layout_of((50, 40)), np.random.default_rng(0).standard_normal(2000)
    torn = np.where(np.arange(2000) < 400, 10.0, 0.0)
    targets, rest = [common + torn, common - torn], slice(400, None)
    without = descend("topk(0.1)", targets, layout, feedback=False)
    np.testing.assert_allclose(without[rest], -common[rest])  # has not moved
    fed_back = descend("ef | topk(0.1)", targets, layout, feedback=True)
    assert np.linalg.norm(fed_back[rest]) < 0.2 * np.linalg.norm(common[rest])


def test_sign_needs_feedback():
    """Three clients, one of which outweighs the other two: the majority of signs points away from the optimum."""
    layout, odd = layout_of((50, 40)), np.arange(2000) % 2 > 0
    torn = np.random.default_rng(0).choice([-30.0, 30.0], 2000)  # nobody agrees: mean magnitudes stay alike
    targets = [np.where(odd, noise, pull) for noise, pull in ((30.0, 12.0), (-30.0, -3.0), (torn, -3.0))]
    without = descend("ef | sign", targets, layout, feedback=False)[~odd]  # the optimum there: 2
    fed_back = descend("ef | sign", targets, layout, feedback=True)[~odd]
    assert np.abs(without).mean() > 3
    assert np.abs(fed_back).mean() < 1


def test_the_residual_is_what_the_decoder_did_not_see():
    """Computed from the bytes that are sent, not from the encoder's own idea of them."""
    layout, rng = layout_of((50, 40), (9,)), np.random.default_rng(3)
    delta, start = rng.standard_normal((2, 2009)).astype(np.float32)
    residual = start.copy()
    encoded = encode_with_feedback(parse("ef | int4(nearest)"), delta, residual, layout, rng)
    arrived = inflate(decoded("ef | int4(nearest)", encoded, layout), layout)
    np.testing.assert_allclose(residual, start + delta - arrived, atol=1e-6)
    assert np.abs(residual[2000:]).max() < 2e-3  # also of the small tensors: float16's rounding
    assert residual[2000:].any()
