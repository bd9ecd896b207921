"""The aggregator's loop takes any bytes: all it does with bad ones is to bury them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from shared.messages import encode
from tests.builders import System, packed, record_of, update_of, weights

FIELDS = sorted(record_of(update_of(weights(0))))
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=9),
    st.binary(max_size=40), st.dictionaries(st.text(max_size=6), st.floats() | st.text(max_size=3), max_size=3),
)  # fmt: skip


@st.composite
def bodies(draw):
    record = record_of(update_of(weights(0)))
    kind = draw(st.sampled_from(["garbage", "field", "damage"]))
    if kind == "garbage":
        return draw(st.binary(max_size=200))
    if kind == "field":
        return packed(record | draw(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3)))
    body = bytearray(packed(record))
    body[draw(st.integers(0, len(body) - 1))] = draw(st.integers(0, 255))
    return bytes(body)


@settings(max_examples=60)
@given(st.lists(bodies(), max_size=8))
def test_every_message_is_settled_once_and_the_sound_ones_are_applied(broken):
    system = System(buffer_size=1, staleness="constant")
    good = [system.publish(weights(seed), update_id=f"good/i/{seed}") for seed in range(2)]
    for body in broken:
        system.send_bytes(body, client="a")
    good.append(system.publish(weights(2), update_id="good/i/2"))
    system.drain()
    system.aggregator.finish()
    applied = [name for name, outcome in system.outcomes() if outcome == "applied"]
    assert [name for name in applied if name.startswith("good/")] == [update.update_id for update in good]
    assert system.unacked == 0
    assert len(system.outcomes()) == len(broken) + 3
    entries = [entry for commit in system.store.ledger for entry in commit["updates"]]
    assert len(system.broker.dead) == sum("reason" in entry for entry in entries)  # also of a second one with its id
    assert encode(good[0]) not in [letter.body for letter in system.broker.dead]
