"""The envelope: every field is checked, every refusal has its reason, bad bytes raise nothing else."""

import struct
import zlib

import msgpack
import numpy as np
import pytest

from shared.errors import Reason, RejectedUpdate
from shared.messages import METRICS_MAX, Update, decode, encode
from tests.builders import packed, record_of, update_of

LIMIT = 10**6
DETAIL_CHARS_MAX = 1000  # the detail goes into a log line, a ledger entry and an AMQP header


def valid() -> Update:
    return update_of(np.array([1, -2, 3], np.float32), update_id="dev_1-A/inc/7", base_version=3)


def refused(body, limit=LIMIT):
    with pytest.raises(RejectedUpdate) as caught:
        decode(body, limit)
    chars = len(caught.value.detail)
    assert chars <= DETAIL_CHARS_MAX
    return caught.value.reason


def with_field(name, value):
    return packed(record_of(valid()) | {name: value})


def test_encode_then_decode_is_the_identity():
    assert decode(encode(valid()), LIMIT) == valid()


def test_the_body_is_the_map_of_the_contract():
    record = msgpack.unpackb(encode(valid()))
    assert record == {
        "format": 1, "job": "job", "client": "dev_1-A", "update_id": "dev_1-A/inc/7", "base_version": 3,
        "num_samples": 1, "num_steps": 1, "layout": valid().layout, "codec": {"name": "float32"},
        "payload": struct.pack("<fff", 1, -2, 3), "checksum": zlib.crc32(struct.pack("<fff", 1, -2, 3)),
        "metrics": {"loss": 0.5}, "train_seconds": 1.0, "created_at": 0.0,
    }  # fmt: skip


def test_unknown_fields_are_ignored_so_that_clients_may_add_some():
    assert decode(with_field("colour", "green"), LIMIT) == valid()


@pytest.mark.parametrize(
    ("field", "low", "high"),
    [("base_version", 0, 2**53), ("num_samples", 1, 10**9), ("num_steps", 1, 10**9), ("created_at", 0, 2**63)],
)
def test_the_bounds_themselves_are_accepted(field, low, high):
    for value in (low, high):
        assert getattr(decode(with_field(field, value), LIMIT), field) == value


REASONS = {"format": Reason.FORMAT, "base_version": Reason.BASE_VERSION, "num_samples": Reason.NUM_SAMPLES}
NO_STRING = [None, 5, 1.5, True, b"bytes", {}, {"a": 1}]
NO_WHOLE = [None, "1", 1.5, 2.0, True, b"1", {}, -1, -(2**63), 2**64 - 1, float("nan")]
NO_NUMBER = [None, "1", True, b"1", {}, -1, -0.5, float("nan"), float("inf"), float("-inf")]
WRONG = {
    "format": [None, 0, 2, 2**64 - 1, -1, "1", 1.5, {}, b"1"],
    "job": [*NO_STRING, "", "a b", "x" * 65, "a/b", "ä", "a\n", "*", "#", "a.b"],
    "client": [*NO_STRING, "", "a b", "x" * 65, "a/b", "a\n", "a.b"],
    "update_id": [
        *NO_STRING, "", "dev_1-A", "dev_1-A/7", "other/inc/7", "dev_1-A/inc/", "dev_1-A/inc/-1", "dev_1-A/inc/7/",
        "dev_1-A/inc/7\n", "dev_1-A//7", "dev_1-A/inc/x", "dev_1-A/inc/\u0667", "dev_1-A/inc/" + "7" * 19, "x" * 300,
    ],
    "base_version": [*NO_WHOLE, 2**53 + 1],
    "num_samples": [*NO_WHOLE, 0, 10**9 + 1],
    "num_steps": [*NO_WHOLE, 0, 10**9 + 1],
    "layout": [*NO_STRING, "", "0" * 65],
    "codec": [None, 5, "int8", b"int8", {"name": None}, {"name": {}}, {"name": b"x"}, {b"name": "int8"}],
    "payload": [None, 5, "text", {}, 1.0],
    "checksum": [None, 0, -1, "x", 2**64 - 1, {}, 1.5, b"x"],
    "metrics": [
        None, 5, "x", {"loss": None}, {"loss": "1"}, {"loss": True}, {"loss": float("nan")}, {"loss": float("inf")},
        {"loss": {"a": 1.0}}, {"x" * 65: 1.0}, {b"loss": 1.0}, {"loss": b"1"},
    ],
    "train_seconds": NO_NUMBER,
    "created_at": NO_NUMBER,
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG.items() for value in values],
    ids=lambda x: repr(x)[:30],
)
def test_a_wrong_value_is_refused_with_the_reason_of_its_field(field, value):
    expected = REASONS.get(field, Reason.CHECKSUM if field == "checksum" else Reason.MALFORMED)
    assert refused(with_field(field, value)) == expected


@pytest.mark.parametrize("field", sorted(WRONG))
def test_a_missing_field_is_refused(field):
    record = record_of(valid())
    del record[field]
    expected = REASONS.get(field, Reason.CHECKSUM if field == "checksum" else Reason.MALFORMED)
    assert refused(packed(record)) == expected


def test_every_field_of_the_contract_is_tried_above():
    assert set(WRONG) == set(record_of(valid()))


def test_every_flipped_bit_of_the_payload_is_noticed():
    body = bytearray(encode(valid()))
    start = body.index(valid().payload)
    for bit in range(8 * len(valid().payload)):
        body[start + bit // 8] ^= 1 << bit % 8
        assert refused(bytes(body)) == Reason.CHECKSUM
        body[start + bit // 8] ^= 1 << bit % 8


def test_any_flipped_bit_is_refused_or_gives_an_update():
    body = bytearray(encode(valid()))
    for bit in range(8 * len(body)):
        body[bit // 8] ^= 1 << bit % 8
        try:
            assert isinstance(decode(bytes(body), LIMIT), Update)
        except RejectedUpdate as error:
            assert len(error.detail) <= DETAIL_CHARS_MAX
        body[bit // 8] ^= 1 << bit % 8


def test_every_truncation_is_malformed():
    body = encode(valid())
    for length in range(len(body)):
        assert refused(body[:length]) == Reason.MALFORMED


def test_trailing_bytes_are_malformed():
    assert refused(encode(valid()) + b"\0") == Reason.MALFORMED
    assert refused(encode(valid()) * 2) == Reason.MALFORMED


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xc0", b"\x93\x01\x02\x03", b"\x01", b"\xa3abc", b"\xc1", b"{}", b"\x80\x80",
        b"\x91" * 10**5, b"\x81\xa1a" * 10**5, b"\x81" * 10**5, b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\x81\xa1a\xd6\xff\0\0\0\0",
        b"\x81\xa1\xff\x01", b"\x81\x01\x01", b"\x81\xa1a\xc4\xff",
    ],
    ids=lambda body: body[:6].hex() + f"-{len(body)}",
)  # fmt: skip
def test_bytes_that_are_no_map_are_malformed(body):
    assert refused(body) == Reason.MALFORMED


def test_an_empty_map_is_of_no_known_format():
    assert refused(b"\x80") == Reason.FORMAT


def test_a_message_one_byte_over_the_limit_is_too_large():
    body = encode(valid())
    assert decode(body, len(body)) == valid()
    assert refused(body, len(body) - 1) == Reason.TOO_LARGE


def test_more_metrics_than_allowed_are_malformed():
    full = {str(i): 1.0 for i in range(METRICS_MAX)}
    assert decode(with_field("metrics", full), LIMIT).metrics == full
    assert refused(with_field("metrics", full | {"one more": 1.0})) == Reason.MALFORMED


def test_a_string_longer_than_the_envelope_is_malformed():
    assert refused(with_field("layout", "0" * (64 * 2**10 + 1))) == Reason.MALFORMED


@pytest.mark.parametrize("field", sorted(WRONG))
@pytest.mark.parametrize("value", [b"\0" * 10**5, "\U000e0001" * 16_000], ids=["binary", "string"])
def test_a_detail_stays_short_whatever_a_field_holds(field, value):
    if field == "payload" and isinstance(value, bytes):
        assert refused(with_field(field, value)) == Reason.CHECKSUM
    else:
        refused(with_field(field, value))
