"""Any bytes decode or raise `RejectedUpdate`; what a worker may send arrives as it was."""

import msgpack
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import RejectedUpdate
from shared.messages import METRICS_MAX, Update, decode, encode
from tests.builders import packed, record_of, update_of, weights

IDS = st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True)
SECONDS = st.floats(0, 1e300)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.one_of(st.text(max_size=20), st.integers(-(2**63), 2**64 - 1), FINITE)
VALUES = st.recursive(
    st.none() | st.booleans() | SCALARS | st.binary(max_size=20) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def updates(draw):
    client = draw(IDS)
    return Update(
        job=draw(IDS), client=client, update_id=f"{client}/{draw(IDS)}/{draw(st.integers(0, 10**18 - 1))}",
        base_version=draw(st.integers(0, 2**53)), num_samples=draw(st.integers(1, 10**9)),
        num_steps=draw(st.integers(1, 10**9)), layout=draw(st.text(min_size=1, max_size=64)),
        codec=draw(st.dictionaries(st.text(max_size=10), SCALARS, max_size=5)), payload=draw(st.binary(max_size=300)),
        metrics=draw(st.dictionaries(st.text(max_size=64), FINITE, max_size=METRICS_MAX)),
        train_seconds=draw(SECONDS), created_at=draw(SECONDS),
    )  # fmt: skip


def settle(body):
    try:
        assert isinstance(decode(body, 10**6), Update)
    except RejectedUpdate as error:
        assert error.detail


@given(updates())
def test_encode_then_decode_is_the_identity(update):
    assert decode(encode(update), 10**6) == update


@given(st.binary(max_size=500))
def test_garbage_raises_nothing_else(body):
    settle(body)


@given(VALUES)
def test_any_msgpack_raises_nothing_else(value):
    settle(msgpack.packb(value))


@given(st.dictionaries(st.sampled_from(sorted(record_of(update_of(weights(0))))), VALUES, max_size=3))
def test_any_value_in_any_field_raises_nothing_else(changes):
    settle(packed(record_of(update_of(weights(0))) | changes))


@given(st.data())
def test_any_damage_raises_nothing_else(data):
    body = bytearray(encode(update_of(weights(0))))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    settle(bytes(body[: data.draw(st.integers(0, len(body)))]))
