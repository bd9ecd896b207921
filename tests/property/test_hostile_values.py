"""Well-formed messages with hostile values: each is refused by name, or harmless, and here stands why."""

import io
import json
import logging
import math
import zlib
from collections import Counter

import msgpack
import numpy as np
import pytest
from rich.console import Console

from aggregator.admission import Admission, admit, delta_of
from ops import status
from shared.compression import parse
from shared.errors import Reason, RejectedUpdate
from shared.messages import ID, MAPS_MAX, decode, encode
from shared.rules import RULES
from tests.builders import JOB, System, delivery_of, model_of, packed, update_of, weights

N = 9
LARGEST = 1.8e19  # the largest norm whose square is finite in float32


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def one(value, at=3):
    vector = np.zeros(N, np.float32)
    vector[at] = value
    return vector


def alternating(value):
    return np.where(np.arange(N) % 2, -value, value).astype(np.float32)


def everywhere(value):
    return np.full(N, value, np.float32)


def system_of(**settings):
    return System(np.zeros(N, np.float32), **{"buffer_size": 2, "versions_kept": 10} | settings)


def settle(system):
    """Have everything settled and committed, also what would wait for company."""
    system.drain()
    system.aggregator.finish()


def reason_of(system, body, client="a", update_id="a/i/900"):
    """Return why the loop rejected a message: from the ledger and from the dead letters, which agree."""
    system.send_bytes(body, client, update_id)
    settle(system)
    entry = system.store.ledger[-1]["updates"][-1]
    assert entry["outcome"] == "rejected"
    letter = system.broker.dead[-1]
    assert letter.body == body
    assert letter.reason == entry["reason"]
    assert entry["detail"] == letter.detail[:200]
    assert system.unacked == 0
    assert not system.weights.any()
    return Reason(entry["reason"])


def record_of(update):
    return msgpack.unpackb(encode(update))


def with_fields(**changes):
    return packed(record_of(update_of(weights(1, N), update_id="a/i/900")) | changes)


# --- refused by name --------------------------------------------------------------------------------------------------

FIELDS = [
    *(("num_samples", value, Reason.NUM_SAMPLES) for value in (0, -1, 10**9 + 1, 2**64 - 1, 1.0, 1e300, True, "9")),
    *(("num_steps", value, Reason.MALFORMED) for value in (0, -5, 10**9 + 1, 2**64 - 1, 3.0, True, "9", None)),
    *(("base_version", value, Reason.BASE_VERSION) for value in (1, 2**53, 2**53 + 1, 2**64 - 1, -1, 0.0, False, None)),
    *(
        ("train_seconds", value, Reason.MALFORMED)
        for value in (-1, -1e-9, math.nan, math.inf, True, "1", None, {"s": 1.0})
    ),
    *(("created_at", value, Reason.MALFORMED) for value in (-1, math.nan, -math.inf, False, b"1", None)),
    *(
        ("metrics", value, Reason.MALFORMED)
        for value in (
            {"loss": math.nan}, {"loss": math.inf}, {"loss": True}, {"loss": "0.5"}, {"loss": None}, {"x" * 65: 1.0},
            {"loss": {"loss": 1.0}}, {f"m{index}": 1.0 for index in range(65)}, [], None,
        )
    ),
    *(("job", value, Reason.MALFORMED) for value in ("", "j" * 65, "job\n", "job\0", "jöb", "../job", "*", b"job", 7)),
    ("job", "other", Reason.JOB), ("job", "JOB", Reason.JOB),
    *(("client", value, Reason.MALFORMED) for value in ("", "c" * 65, "a\n", "a\u202e", "a.b", "a/b", "#", 1)),
    *(
        ("update_id", value, Reason.MALFORMED)
        for value in (
            "", "a", "a/i", "a/i/", "a/i/-1", "a/i/1.0", "a/i/" + "9" * 19, "a/" + "i" * 65 + "/0", "b/i/0", "a/i/0\n",
            "A/i/0", "a/i/\u0661", "a\0/i/0", "a" * 300,
        )
    ),
    *(("layout", value, Reason.LAYOUT) for value in ("0" * 64, "\x1b[2J", "[/red]", "\u202e\n")),
    *(("layout", value, Reason.MALFORMED) for value in ("", "0" * 65, 5, None)),
    *(("checksum", value, Reason.CHECKSUM) for value in (0, -1, 2**64 - 1, "1", None, True)),
    *(("format", value, Reason.FORMAT) for value in (0, 2, 1.0, True, "1", None)),
    *(
        ("codec", name, Reason.CODEC)
        for name in ({}, {"name": 1}, {"name": "\x1b[2J"}, {"name": "x" * 201}, {"name": "int8|int8"}, {"name": "auto"})
    ),
    *(("codec", value, Reason.MALFORMED) for value in ("float32", None, [], {"name": None}, {"name": b"float32"})),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "reason"), FIELDS, ids=lambda value: repr(value)[:24])
def test_a_value_that_is_not_allowed_is_refused_by_name(field, value, reason):
    assert reason_of(system_of(), with_fields(**{field: value})) == reason


@pytest.mark.parametrize("depth", [MAPS_MAX, 500, 1000])
@pytest.mark.parametrize(
    "field", ["num_samples", "base_version", "format", "checksum", "metrics", "extra", "created_at"]
)
def test_maps_in_maps_are_refused_however_deep(field, depth):
    nested = b"\x81\xa1a" * depth + b"\xc0"
    plain = with_fields(**{field: "here"})
    body = plain.replace(b"\xa4here", nested)
    assert len(body) > len(plain)
    assert reason_of(system_of(), body) == Reason.MALFORMED


@pytest.mark.parametrize("value", [1e38, 3e38, 2e19])
@pytest.mark.parametrize("vector", [one, everywhere, alternating])
@pytest.mark.parametrize("codec", ["float32", "float32 | zstd", "bfloat16", "topk(0.2)", "topk(0.2) | bfloat16"])
def test_absurd_weights_are_refused_as_not_finite(codec, vector, value):
    system, good = system_of(), update_of(weights(1, N), codec=codec, update_id="a/i/900")
    delta = vector(value)
    encoded = parse(codec).encode(delta, model_of(delta).layout, np.random.default_rng(0))
    body = packed(
        record_of(good)
        | {
            "codec": {"name": codec, **encoded.params},
            "payload": encoded.payload,
            "checksum": zlib.crc32(encoded.payload),
        }
    )
    assert reason_of(system, body) == Reason.NOT_FINITE


@pytest.mark.parametrize(
    ("codec", "field"), [("float16", "payload"), ("int8", "payload"), ("ef | sign", "payload"), ("ternary", "payload")]
)
def test_scales_that_would_make_absurd_weights_are_refused_as_not_finite(codec, field):
    layout = model_of(weights(1, 2000)).layout
    encoded = parse(f"all | {codec}" if codec == "int8" else codec).encode(
        weights(1, 2000), layout, np.random.default_rng(0)
    )
    for scale in (1.1e12, 3e38, math.inf, -1.0):
        width = "<f2" if codec == "int8" else "<f4"
        with np.errstate(over="ignore"):
            head = np.array([scale], width).tobytes()
        payload = head + encoded.payload[len(head) :]
        with pytest.raises(RejectedUpdate) as caught:
            parse(f"all | {codec}" if codec == "int8" else codec).decode(payload, encoded.params, layout)
        assert caught.value.reason == Reason.NOT_FINITE


def test_another_clients_id_is_refused_whichever_way_it_is_claimed():
    body = encode(update_of(weights(1, N), update_id="b/i/0"))
    assert reason_of(system_of(), body, client="a", update_id="b/i/0") == Reason.CLIENT
    admission = Admission(JOB, model_of(weights(1, N)).layout, 10**6, 10**6)
    for user_id in ("a", "b "):
        with pytest.raises(RejectedUpdate) as caught:
            admit(delivery_of(body, client="b", user_id=user_id), admission, 0)
        assert caught.value.reason == Reason.CLIENT
    assert admit(delivery_of(body, client="b", user_id="b"), admission, 0).client == "b"


def test_what_somebody_else_sent_in_its_name_is_no_outcome_of_a_clients_update():
    system = system_of(buffer_size=1)
    stolen = encode(update_of(everywhere(-7), update_id="b/i/0"))
    system.send_bytes(stolen, "a", "b/i/0")  # refused: published under the key of a
    system.publish(weights(1, N), update_id="b/i/0")
    settle(system)
    assert system.outcomes() == [("b/i/0", "rejected"), ("b/i/0", "applied")]
    np.testing.assert_array_equal(system.weights, weights(1, N))


def test_a_base_version_from_the_future_is_refused_and_never_comes_true():
    system = system_of(buffer_size=1)
    assert (
        reason_of(system, encode(update_of(weights(1, N), update_id="a/i/900", base_version=1))) == Reason.BASE_VERSION
    )
    system.publish(weights(2, N), update_id="a/i/1")
    system.drain()
    assert system.store.head().version == 1
    system.send(update_of(weights(1, N), update_id="a/i/900", base_version=1))  # its first outcome is final
    settle(system)
    assert system.outcomes()[-1] == ("a/i/900", "duplicate")


# --- ids that collide -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["nothing", "commit", "restart"])
def test_of_two_bodies_under_one_id_the_first_counts(between):
    system = system_of(buffer_size=2, commit_interval_s=0.0 if between != "nothing" else 100.0, commit_age_max_s=1000.0)
    system.send(update_of(weights(1, N), update_id="a/i/0"))
    system.drain()
    if between != "nothing":
        system.aggregator.finish()
    if between == "restart":
        system.restart()
    system.send(update_of(everywhere(1e6), update_id="a/i/0", num_samples=10**9))
    system.send(update_of(weights(2, N), update_id="a/i/1"))
    system.drain()
    system.aggregator.finish()
    assert system.outcomes() == [("a/i/0", "applied"), ("a/i/0", "duplicate"), ("a/i/1", "applied")]
    np.testing.assert_allclose(system.weights, (weights(1, N) + weights(2, N)) / 2, rtol=1e-6)


def test_a_body_under_the_id_of_a_rejected_one_is_a_duplicate():
    system = system_of(buffer_size=1)
    system.send_bytes(with_fields(checksum=1), "a", "a/i/900")
    settle(system)
    system.send(update_of(weights(1, N), update_id="a/i/900"))
    settle(system)
    assert system.outcomes() == [("a/i/900", "rejected"), ("a/i/900", "duplicate")]
    assert not system.weights.any()


# --- harmless ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chars", [64, 65])
def test_ids_of_64_characters_work_everywhere_and_of_65_nowhere(chars):
    client, incarnation = "c" * chars, "i" * 64
    update_id = f"{client}/{incarnation}/{'9' * 18}"
    system = system_of(buffer_size=1)
    system.publish(weights(1, N), update_id=update_id)
    settle(system)
    assert system.outcomes() == [(update_id, "applied" if chars == 64 else "rejected")]
    assert bool(ID.fullmatch(client)) is (chars == 64)
    assert set(system.store.clients) == ({client} if chars == 64 else set())


def test_enormous_times_and_metrics_leave_every_record_readable():
    """Nothing is computed from them but a latency, left out where it is absurd; all stays plain JSON, without NaN."""
    system = system_of(buffer_size=1)
    names = {"\0\x1b[2J": 1.7e308, "\u202e" * 64: -1.7e308, "": 2**64 - 1, "loss": 5e-324, "[/bold]": 1}
    for sequence, seconds in enumerate((1e308, 2**64 - 1, 0, 5e-324)):
        system.publish(
            weights(1, N), update_id=f"a/i/{sequence}", created_at=seconds, train_seconds=seconds, metrics=names
        )
        system.drain()
    assert [outcome for _, outcome in system.outcomes()] == ["applied"] * 4

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for text in (*system.store._clients.values(), json.dumps(system.store.ledger)):
        json.loads(text, parse_constant=refuse)
    samples = [s for metric in system.metrics.registry.collect() for s in metric.samples]
    assert all(math.isfinite(sample.value) for sample in samples)
    counted = {s.value for s in samples if s.name == "fedmq_update_latency_seconds_count"}
    assert counted == {2.0}, "two were made in a future beyond all clocks'"


def test_a_checksum_as_a_float_of_the_same_value_is_the_same_number():
    record = record_of(update_of(weights(1, N)))
    assert decode(packed(record | {"checksum": float(record["checksum"])}), 10**6).payload == record["payload"]


@pytest.mark.parametrize("num_samples", [1, 10**9])
def test_huge_num_samples_count_as_the_operator_asked_and_never_beyond(num_samples):
    """weight_by_samples trusts what clients say, up to 1e9 of it; the mean stays within the updates that are in it."""
    system = system_of(buffer_size=2, weight_by_samples=True, staleness="constant")
    system.publish(everywhere(1), update_id="a/i/0", num_samples=num_samples)
    system.publish(everywhere(3), update_id="b/i/0", num_samples=1)
    system.drain()
    expected = (num_samples * 1.0 + 3.0) / (num_samples + 1)
    np.testing.assert_allclose(system.weights, everywhere(expected), rtol=1e-6)
    unweighed = system_of(buffer_size=2, staleness="constant")
    unweighed.publish(everywhere(1), update_id="a/i/0", num_samples=num_samples)
    unweighed.publish(everywhere(3), update_id="b/i/0", num_samples=1)
    unweighed.drain()
    np.testing.assert_allclose(unweighed.weights, everywhere(2), rtol=1e-6)


# --- the largest that is admitted, through all the arithmetic ---------------------------------------------------------


def loops():
    """Yield every rule, with every optimizer it takes, and what else multiplies or squares an update."""
    for rule, spec in RULES.items():
        own = {"rule": rule} | ({"clients": 6} if "clients" in spec.uses else {})
        own |= {"buffer_size": 5} if "buffer_size" in spec.uses else {}
        yield own
        if "server_optimizer" in spec.uses:
            yield from (own | {"server_optimizer": name} for name in ("momentum", "adagrad", "adam", "yogi"))
        if "weight_by_samples" in spec.uses:
            yield own | {"weight_by_samples": True}
        if rule != "fedasync":
            yield from (own | {"downlink": "on"}, own | {"snapshots": "bfloat16"})
    for robust in ("norm(10)", "norm_median(2)", "median", "trimmed_mean(0.25)", "krum(1)", "multi_krum(1)"):
        yield {"rule": "fedbuff", "buffer_size": 5, "robust": robust}
    for robust in ("centered_clipping(1)", "bucketing(2) | median", "throttle(1.5)", "one_slot"):
        yield {"rule": "fedbuff", "buffer_size": 5, "robust": robust}
    for robust in ("zeno(0.002, 0.1, 1)", "aflguard(1.5)"):
        yield {"rule": "fedbuff", "buffer_size": 5, "robust": robust, "trusted_client": "t"}


@pytest.mark.parametrize("settings", loops(), ids=lambda s: " ".join(str(value) for value in s.values()))
def test_the_largest_updates_that_are_admitted_leave_model_and_memory_finite(settings):
    system = System(np.zeros(N, np.float32), **settings)
    small = np.float32(LARGEST / math.sqrt(N) * 0.99)
    vectors = [one(LARGEST), everywhere(small), alternating(small), everywhere(-small), everywhere(1e-45)]
    with np.errstate(all="ignore"):
        for sequence in range(100):
            client = "abcdet"[sequence % 6]
            system.publish(
                vectors[sequence % 5], update_id=f"{client}/i/{sequence}", num_samples=(1, 10**9)[sequence % 3 == 0],
                num_steps=(1, 10**9)[sequence % 2],
            )  # fmt: skip
            system.drain()
        settle(system)
    outcomes = Counter(outcome for _, outcome in system.outcomes())
    assert outcomes.total() == 100
    assert np.isfinite(system.weights).all()
    lost = {name for name, array in system.aggregator.state.arrays.items() if not np.isfinite(array).all()}
    assert not lost, f"{lost} hold what is not finite: from then on those weights never move again"


# --- what people read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["[/]", "[/red][bold", "[link=https://example.org]", "\x1b[2J\x1b[31m", "a\nb\rc"])
def test_what_a_rejected_message_says_can_neither_break_nor_colour_the_status(layout):
    system = system_of()
    assert reason_of(system, with_fields(layout=layout)) == Reason.LAYOUT
    seen = sorted(system.store.clients.items())
    depths = {"updates": 0, "consumers": 1, "dead": 1}
    line = status.why({}, system.store.head(), {}, depths, ["a"], seen, system.store.head().created_at + 100)
    assert "was rejected" in line
    output = io.StringIO()
    Console(file=output, force_terminal=True, width=300, color_system=None).print(line)
    assert "layout" in output.getvalue()
    assert "\x1b[2J" not in output.getvalue()
    assert len(output.getvalue().splitlines()) == 1


def test_delta_of_an_admitted_update_is_what_was_sent():
    """The tests above refuse; this one makes sure that what they send would be taken without the hostile value."""
    admission = Admission(JOB, model_of(weights(1, N)).layout, 10**6, 10**6)
    update = admit(delivery_of(with_fields()), admission, 0)
    total = np.zeros(N, np.float32)
    delta_of(update, admission).add_into(total, 1.0)
    np.testing.assert_array_equal(total, weights(1, N))
    assert update.job == JOB
