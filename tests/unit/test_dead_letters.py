"""What the commands make of a letter, whatever somebody put into it."""

import os
import time
from dataclasses import replace

import msgpack
import pytest

from ops import dead_letters
from ops.dead_letters import ADVICE, GIVEN_BACK, ONE_PART, Selection, advice_on, envelope_of, plain, select, why_not
from shared.compression import PRESETS
from shared.errors import Reason, SettingsError
from shared.messages import Part, encode
from shared.transport.dead_letters import Letter
from tests.builders import packed, record_of, update_of, weights


def letter_of(body=None, **changes):
    body = encode(update_of(weights(0))) if body is None else body
    plain_letter = Letter(1, body, "a", "a/i/0", "surplus", "why", 1000.0, "update.job.a", {}, {}, (0, 1))
    return replace(plain_letter, **changes)


def test_every_reason_has_its_advice():
    assert set(ADVICE) == set(Reason)
    assert all(len(text) > 20 and text.endswith(".") for text in ADVICE.values())
    assert len(set(ADVICE.values())) == len(ADVICE)
    assert advice_on("surplus") == ADVICE[Reason.SURPLUS]
    assert "RabbitMQ" in advice_on("broker:delivery_limit")
    assert "another version" in advice_on("of the future")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30min", 1800), ("12h", 43_200), ("7d", 604_800), (" 1.5 h ", 5400)]
)
def test_durations(text, seconds):
    assert dead_letters.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "7 weeks", "-1d", "7dd", "inf d"])
def test_what_is_no_duration_is_refused_by_name(text):
    with pytest.raises(SettingsError, match="is no duration: say for example 90s"):
        dead_letters.seconds_of(text)


def test_selections():
    assert Selection().empty
    assert not select([], False, None, None, "0s").empty
    with pytest.raises(SettingsError, match=r"--reason 'surplu': must be one of .*surplus"):
        select([], False, "surplu", None, None)
    assert select([], False, "broker:expired", None, None).reason == "broker:expired"
    for arguments in ((True, None, None, None), (False, "surplus", None, None), (False, None, None, "1d")):
        with pytest.raises(SettingsError, match="not both"):
            select(["a/i/0"], *arguments)


def test_a_selection_fits_what_it_says():
    now = 2000.0
    assert Selection(every=True).fits(letter_of(), now)
    assert Selection(reason="surplus", client="a", older_than_s=999).fits(letter_of(), now)
    assert not Selection(older_than_s=1000).fits(letter_of(), now)
    assert not Selection(reason="codec").fits(letter_of(), now)
    assert not Selection(client="b").fits(letter_of(), now)


def test_an_age_is_that_of_the_rejection_or_else_of_the_update_and_what_has_none_is_not_old():
    made = encode(update_of(weights(0), created_at=500.0))
    assert Selection(older_than_s=1400).fits(letter_of(made, rejected_at=None), 2000.0)
    assert not Selection(older_than_s=1400).fits(letter_of(made), 2000.0)
    for created_at in ("yesterday", float("nan"), float("inf"), -1, True, 1e300):
        body = packed(record_of(update_of(weights(0))) | {"created_at": created_at})
        old = Selection(older_than_s=0).fits(letter_of(body, rejected_at=None), time.time())
        assert old == (created_at is True)  # 1 second past 1970: a number to Python, and harmless
    assert not Selection(older_than_s=0).fits(letter_of(b"?", rejected_at=None), time.time())


def test_an_envelope_is_shown_without_its_payload_even_if_it_does_not_pass_admission():
    record = record_of(update_of(weights(0))) | {"checksum": 1, "num_samples": -5, "more": "x"}
    fields = envelope_of(packed(record))
    assert fields["payload"] == "28 bytes"
    assert (fields["num_samples"], fields["more"]) == (-5, "x")


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", os.urandom(100), packed([1, 2]), packed({"a": [1] * 10}), b"\x81" * 5000 + b"\x01", packed({1: 2}),
     b"\xdf\xff\xff\xff\xff", packed({"x": "\ud800".encode("utf-8", "surrogatepass")}), packed("text")],
    ids=lambda body: body[:6].hex(),
)  # fmt: skip
def test_what_is_no_envelope_is_none_and_nothing_is_raised(body):
    fields = envelope_of(body)
    assert fields is None or isinstance(fields, dict)
    assert why_not(letter_of(body)) is None


@pytest.mark.parametrize("codec", ["balanced", "tiny"])
def test_what_its_worker_sends_again_is_not_replayed(codec):
    name = PRESETS[codec].pipeline
    record = record_of(update_of(weights(0))) | {"codec": {"name": name}}
    assert why_not(letter_of(packed(record))) == GIVEN_BACK
    assert why_not(letter_of(packed(record | {"codec": {"name": "ef|topk(0.1)"}}))) == GIVEN_BACK
    assert why_not(letter_of(packed(record | {"codec": {"name": name.removeprefix("ef | ")}}))) is None
    assert why_not(letter_of(packed(record | {"codec": name}))) is None, "no codec at all: rejected again"


def test_a_part_is_not_replayed():
    part = update_of(weights(0), part=Part(1, 2, 100))
    assert why_not(letter_of(encode(part))) == ONE_PART
    assert why_not(letter_of(properties={"type": "update-part"})) == ONE_PART


def test_what_somebody_sent_moves_no_cursor_and_is_no_markup():
    assert plain("a\x1b[2J\nb\u202e") == "a\ufffd[2J\ufffdb\ufffd"
    assert plain("x" * 2000) == "x" * 1000 + "..."
    row = dead_letters._row(letter_of(detail="[red]x[/red]\x1b", update_id="y" * 255))
    assert row[-1].plain == "[red]x[/red]\ufffd"
    assert row[3].plain == "y" * 60 + "..."


def test_a_letter_is_told_from_others_wherever_it_stands():
    first = dead_letters._fingerprint(letter_of())
    assert dead_letters._fingerprint(letter_of(number=7, handle=(3, 9))) == first
    changed = [{"body": b"other"}, {"reason": "codec"}, {"rejected_at": 1001.0}, {"update_id": "a/i/1"}]
    assert all(dead_letters._fingerprint(letter_of(**change)) != first for change in changed)


def test_an_id_may_be_shortened_as_long_as_it_means_one_update():
    fits = {"a/i/1": {1: b"x", 4: b"y"}, "a/i/10": {2: b"z"}}
    assert dead_letters._only("a/i/1", fits, 9) == {1: b"x", 4: b"y"}, "the whole id, though another begins with it"
    assert dead_letters._only("a/i/10", {"a/i/10": {2: b"z"}}, 9) == {2: b"z"}
    with pytest.raises(SettingsError, match=r"'a/i/' begins 2 update ids: a/i/1, a/i/10$"):
        dead_letters._only("a/i/", fits, 9)
    with pytest.raises(SettingsError, match="no letter is 'b', of 9"):
        dead_letters._only("b", {}, 9)


def test_nested_maps_do_not_recurse_for_ever():
    body = msgpack.packb({})
    for _ in range(300):
        body = b"\x81\xa1a" + body
    assert envelope_of(body) is None or "a" in envelope_of(body)
