"""The residual: what was not sent is kept, what was refused comes back, and a crash at any point changes nothing.

That no mass is lost whatever fails is tests/simulation/test_mass.py; here is each rule by itself.
"""

import logging

import numpy as np
import pytest

from shared.compression import decode as decode_delta
from shared.compression import parse
from shared.errors import Reason, RejectedUpdate, StoreUnavailable, TaskError
from shared.layout import Layout
from shared.messages import decode, encode
from shared.metrics import WorkerMetrics
from shared.model_image import ModelImage
from tests.builders import FaultyStore, System, add_one, device_of, update_of, weights
from worker import residual, residual_file
from worker.outbox import Outbox
from worker.residual import Residual, decay, fade, mean_version
from worker.residual_file import Header
from worker.task import TrainResult

SHAPE = (32, 40)
N = 1280  # codecs take smaller tensors for biases, and hardly compress them
LAYOUT = Layout.of([("w", SHAPE, "float32")])
EF, PLAIN = "ef | topk(0.1)", "float32"


class Store:
    """Tells outcomes, newest call only."""

    def __init__(self):
        self.told, self.asked, self.away = [], [], False

    def outcomes(self, client, after):
        """Return what was told since; the cursor counts what was."""
        if self.away:
            raise StoreUnavailable("away")
        self.asked.append((client, after))
        return self.told[after:], len(self.told)


class Rig:
    """A residual over an outbox in a folder, restarted at will."""

    def __init__(self, folder):
        self.folder, self.store, self.outbox = folder, Store(), None
        self.restart()

    def restart(self, **limits):
        """Start again from the files."""
        if self.outbox is not None:
            self.outbox.close()
        self.outbox = Outbox(self.folder, "a", **{"updates_max": 10, "bytes_max": 10**6, "sync": False} | limits)
        self.metrics = WorkerMetrics()
        self.residual = Residual(self.outbox, self.store, self.metrics)

    def make(self, delta, codec=EF, version=0, horizon=100, layout=LAYOUT, revision=None):
        """Make an update and return what it decodes to."""
        encoded = self.encode(delta, codec, version, horizon, layout, revision)
        self.residual.put(self.body(encoded, codec, layout, version))
        return self.decoded(encoded, codec, layout)

    def encode(self, delta, codec=EF, version=0, horizon=100, layout=LAYOUT, revision=None):
        """Take the first half of a step."""
        rng = np.random.default_rng(0)
        self.residual.prepare(layout, version, revision, horizon)
        return self.residual.encode(parse(codec), delta.copy(), layout, version, rng)

    def body(self, encoded, codec=EF, layout=LAYOUT, version=0):
        """Return the message."""
        name = {"name": parse(codec).name, **encoded.params}
        update = update_of(weights(0, N), update_id=self.outbox.next_id(), layout=layout.hash, base_version=version)
        return encode(type(update)(**{**{f: getattr(update, f) for f in update.__slots__}, "codec": name,
                                      "payload": encoded.payload}))  # fmt: skip

    def decoded(self, encoded, codec=EF, layout=LAYOUT):
        """Return what the message carries."""
        total = np.zeros(layout.num_params, np.float32)
        decode_delta({"name": parse(codec).name, **encoded.params}, encoded.payload, layout).add_into(total, 1.0)
        return total

    def send(self, *outcomes):
        """Have everything that waits confirmed, and these outcomes told of them in order."""
        ids = []
        while (waiting := self.outbox.oldest()) is not None:
            ids.append(waiting.update_id)
            self.outbox.confirm(waiting)
        self.store.told += list(zip(ids, outcomes, strict=False))
        return ids

    @property
    def stored(self):
        """The residual on disk; zeros for none."""
        vector = residual_file.parse((self.folder / "residual").read_bytes())[1]
        return np.zeros(N, np.float32) if vector is None else vector

    def files(self, end):
        """Return the numbers of the files with this ending."""
        return [int(path.name.split(".")[0]) for path in sorted(self.folder.glob(f"*{end}"))]


@pytest.fixture
def rig(tmp_path):
    return Rig(tmp_path / "job" / "a")


def test_what_was_not_sent_is_kept_and_goes_along_with_the_next(rig):
    first, second = weights(1, N), weights(2, N)
    sent = rig.make(first)
    assert 0 < np.count_nonzero(sent) < N
    np.testing.assert_allclose(rig.stored, first - sent, atol=1e-6)
    sent += rig.make(second)
    np.testing.assert_allclose(rig.stored, first + second - sent, atol=1e-5)
    assert rig.metrics.residual_norm._value.get() == pytest.approx(np.linalg.norm(rig.stored))


def test_a_restart_changes_nothing(tmp_path):
    steady, restarted = Rig(tmp_path / "x"), Rig(tmp_path / "y")
    for seed in range(5):
        a, b = steady.make(weights(seed, N)), restarted.make(weights(seed, N))
        np.testing.assert_array_equal(a, b)
        restarted.restart()
        assert restarted.metrics.residual_norm._value.get() == pytest.approx(np.linalg.norm(steady.stored))
    np.testing.assert_array_equal(steady.stored, restarted.stored)


def test_a_codec_without_feedback_leaves_no_trace(rig):
    rig.make(weights(1, N), PLAIN)
    assert rig.files(".update") == [0]
    assert not (rig.folder / "residual").exists()
    rig.send("stale")
    assert rig.files(".sent") == []
    np.testing.assert_array_equal(rig.make(weights(2, N), PLAIN), weights(2, N))
    assert rig.store.asked == []  # nothing to learn


def test_a_codec_that_changes_to_one_without_feedback_takes_the_residual_along(rig):
    left = weights(1, N) - rig.make(weights(1, N))
    np.testing.assert_allclose(rig.make(weights(2, N), PLAIN), weights(2, N) + left, atol=1e-6)
    assert rig.files(".kept.update") == [0, 1]  # both carry a residual
    assert not rig.stored.any()
    assert (rig.folder / "residual").stat().st_size < 300  # a header
    np.testing.assert_array_equal(rig.make(weights(3, N), PLAIN), weights(3, N))
    assert rig.files(".update") == [0, 1, 2]
    rig.restart()
    rig.send("applied", "stale", "stale")  # the second held the residual: all of it comes back
    np.testing.assert_allclose(
        rig.make(weights(4, N), PLAIN), weights(4, N) + weights(2, N) + left, atol=1e-6
    )  # fmt: skip


@pytest.mark.parametrize("outcome", ["stale", "rejected"])
def test_a_refused_update_comes_back(rig, outcome):
    rig.make(weights(1, N))
    rig.send(outcome)
    assert rig.files(".sent") == [0]
    sent = rig.make(weights(2, N))
    np.testing.assert_allclose(rig.stored, weights(1, N) + weights(2, N) - sent, atol=1e-5)
    assert rig.files(".sent") == []
    assert rig.metrics.returned._value.get() == 1
    rig.restart()
    sent += rig.make(np.zeros(N, np.float32))
    np.testing.assert_allclose(rig.stored, weights(1, N) + weights(2, N) - sent, atol=1e-5)


@pytest.mark.parametrize("outcome", ["applied", "duplicate"])
def test_an_applied_update_goes(rig, outcome):
    sent = rig.make(weights(1, N))
    rig.send(outcome)
    sent += rig.make(weights(2, N))
    np.testing.assert_allclose(rig.stored, weights(1, N) + weights(2, N) - sent, atol=1e-5)
    assert rig.files(".sent") == []
    assert rig.metrics.returned._value.get() == 0


@pytest.mark.parametrize("pages", [1, 2])
def test_the_first_outcome_counts(rig, pages):
    """An applied update that is delivered again after its id was forgotten is called stale."""
    sent = rig.make(weights(1, N))
    [update_id] = rig.send("applied")
    if pages == 2:
        sent += rig.make(np.zeros(N, np.float32))
    rig.store.told.append((update_id, "stale"))
    sent += rig.make(weights(2, N))
    np.testing.assert_allclose(rig.stored, weights(1, N) + weights(2, N) - sent, atol=1e-5)


def test_an_outcome_that_comes_before_the_confirm_is_remembered(rig):
    """The broker took it, the confirm was lost: it will be published again, and be called stale by then."""
    sent = rig.make(weights(1, N))
    rig.store.told.append((rig.outbox.oldest().update_id, "applied"))
    sent += rig.make(weights(2, N))
    assert rig.files(".kept.update") == [0, 1]
    rig.send("stale")
    sent += rig.make(weights(3, N))
    total = weights(1, N) + weights(2, N) + weights(3, N)
    np.testing.assert_allclose(rig.stored, total - sent, atol=1e-5)
    assert rig.files(".sent") == [1]


def test_others_and_former_incarnations_outcomes_are_not_ours(rig):
    rig.make(weights(1, N))
    rig.send()
    rig.store.told += [("a/other/0", "stale"), (f"b/{rig.outbox.incarnation}/0", "stale")]
    rig.make(weights(2, N))
    assert rig.files(".sent") == [0]


def test_without_a_store_settling_waits(rig):
    rig.make(weights(1, N))
    rig.send("stale")
    rig.store.away = True
    rig.make(weights(2, N))
    assert rig.files(".sent") == [0]
    rig.store.away = False
    rig.make(weights(3, N))
    assert rig.files(".sent") == []


def test_outcomes_are_read_on_from_where_it_stopped(rig):
    rig.make(weights(1, N), version=5, revision=0)
    rig.send()
    rig.store.told += [("b/i/0", "stale")] * 3
    for revision in (2, 3, None, 3):  # the head is older than the outcomes, or the store was away
        rig.make(weights(2, N), version=5, revision=revision)
    assert rig.store.asked == [("a", 0), ("a", 3), ("a", 3), ("a", 3)]


# --- a job that began anew -------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    ("version", "revision"),
    [(5, 2), (9, 2), (2, 9), (2, None)],  # what was seen: version 5, revision 4 at the head and 6 with the outcomes
)
def test_when_the_job_began_anew_nothing_of_the_former_run_counts(rig, version, revision, restart, caplog):
    rig.make(weights(1, N), version=4, revision=3)
    rig.send()
    rig.store.told += [("b/i/0", "stale")] * 6
    rig.make(weights(2, N), version=5, revision=4)  # waits to be sent
    norm = np.linalg.norm(rig.stored)
    former = [f"a/{rig.outbox.incarnation}/{number}" for number in (0, 1)]
    if restart:
        rig.restart()
    rig.store.told = []
    sent = rig.make(weights(3, N), version=version, revision=revision)
    assert f"the residual's norm of {norm:.4g} and 2 sent updates are of the former run" in caplog.text
    np.testing.assert_allclose(sent + rig.stored, weights(3, N), atol=1e-6)
    assert rig.files(".sent") == []
    rig.send()  # also the one that waited: the new aggregator rejects it
    rig.store.told += [(update_id, "rejected") for update_id in former]
    rig.restart()
    sent += rig.make(weights(4, N), version=version, revision=revision)
    np.testing.assert_allclose(sent + rig.stored, weights(3, N) + weights(4, N), atol=1e-6)
    assert rig.files(".sent") == [2]
    assert rig.store.asked[-1] == ("a", 0)
    assert caplog.text.count("the job began anew") == 1


def test_outcomes_of_the_new_run_are_read_from_its_beginning(rig):
    rig.make(weights(1, N), version=9, revision=90)
    rig.send()
    rig.store.told += [("b/i/0", "stale")] * 90
    rig.make(weights(2, N), version=9, revision=90)
    rig.store.told = []
    sent = rig.make(weights(3, N), version=9, revision=0)  # a job begun anew may have reached any version
    rig.outbox.confirm(rig.outbox.oldest())
    [update_id] = rig.send("stale")
    assert update_id.endswith("/2")
    rig.store.told = [(update_id, "stale")]
    again = rig.make(np.zeros(N, np.float32), version=9, revision=1)
    assert rig.metrics.returned._value.get() == 1
    np.testing.assert_allclose(again + rig.stored, weights(3, N), atol=1e-6)
    assert np.linalg.norm(sent) > 0


def test_a_residual_of_the_former_run_does_not_come_back_with_the_next_start(rig):
    """Also under a codec that has no use for the file."""
    rig.make(weights(1, N), version=9, revision=90)
    np.testing.assert_array_equal(rig.make(weights(2, N), PLAIN, version=0, revision=0), weights(2, N))
    rig.restart()
    np.testing.assert_array_equal(rig.make(weights(3, N), PLAIN, version=99, revision=99), weights(3, N))


@pytest.mark.parametrize("limits", [{"updates_max": 2}, {"bytes_max": 2500}])
def test_sent_updates_are_kept_within_limits_and_count_as_applied_beyond(rig, limits, caplog):
    rig.restart(**limits)
    for seed in range(5):
        rig.make(weights(seed, N))
        rig.send()
    stored = rig.stored
    rig.make(np.zeros(N, np.float32))
    assert len(rig.files(".sent")) == 2
    assert rig.files(".sent") == [3, 4]
    assert caplog.text.count("count as applied") == 1
    assert np.linalg.norm(rig.stored) < np.linalg.norm(stored)  # nothing came back


def test_a_refused_update_that_cannot_be_read_is_lost_and_named(rig, caplog):
    rig.make(weights(1, N))
    rig.send("stale")
    path = next(rig.folder.glob("*.sent"))
    path.write_bytes(path.read_bytes()[:-1])
    stored = rig.stored
    np.testing.assert_allclose(rig.make(np.zeros(N, np.float32)) + rig.stored, stored, atol=1e-6)
    assert "the refused update 0 cannot be taken back" in caplog.text
    assert rig.files(".sent") == []


# --- crashes: what the files hold when the process dies, and what a restart makes of it ------------------------


def test_a_staged_update_that_the_residual_does_not_name_never_happened(rig):
    rig.make(weights(1, N))
    stored = rig.stored
    rig.outbox.stage(rig.body(rig.encode(weights(2, N))))
    rig.restart()
    assert (rig.files(".staged"), rig.files(".update")) == ([], [0])
    assert rig.outbox.next_sequence == 2  # but its number is spent
    np.testing.assert_array_equal(rig.stored, stored)


def test_a_staged_update_that_the_residual_names_is_published(rig):
    rig.make(weights(1, N))
    path = next(rig.folder.glob("*.kept.update"))
    path.rename(rig.folder / "000000000000.staged")
    rig.restart()
    assert rig.outbox.oldest().update_id.endswith("/0")
    assert rig.files(".kept.update") == [0]


def test_what_the_residual_took_back_does_not_come_back_twice(rig):
    rig.make(weights(1, N))
    rig.send("stale")
    sent_file = next(rig.folder.glob("*.sent"))
    body = sent_file.read_bytes()
    rig.make(weights(2, N))
    stored = rig.stored
    sent_file.write_bytes(body)  # the crash came before its removal
    rig.restart()
    assert rig.files(".sent") == []
    np.testing.assert_allclose(rig.make(np.zeros(N, np.float32)) + rig.stored, stored, atol=1e-6)


def test_a_step_that_fails_half_way_starts_over_from_the_file(rig, monkeypatch):
    rig.make(weights(1, N))
    rig.send("stale")
    rig.encode(weights(2, N))  # and the encoding of the message raises
    with monkeypatch.context() as patch:
        patch.setattr(residual_file, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        encoded = rig.encode(weights(3, N))
        with pytest.raises(OSError, match="disk full"):
            rig.residual.put(rig.body(encoded))
    assert rig.files(".staged") == [1]
    sent = rig.make(weights(4, N))
    assert rig.files(".staged") == []
    assert rig.files(".kept.update") == [2]
    total = weights(1, N) + weights(4, N)
    np.testing.assert_allclose(sent + rig.stored, total, atol=1e-5)


def test_a_number_is_not_used_again_when_outbox_json_is_lost(rig):
    for seed in range(3):
        rig.make(weights(seed, N))
    rig.send("applied", "applied", "applied")
    rig.make(weights(3, N))
    rig.send()
    for path in [rig.folder / "outbox.json", *rig.folder.glob("*.sent")]:
        path.unlink()
    rig.restart()
    assert rig.outbox.next_sequence == 4


# --- the file --------------------------------------------------------------------------------------------------


def spoil_checksum(data):
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "spoil",
    [
        spoil_checksum,
        lambda data: data[:-4],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: b"fedmq-residual 1",
        lambda data: data.replace(b"residual 1", b"residual 2"),
        lambda data: data.replace(b'"made": 0', b'"made": 9'),
        lambda data: data.replace(b'"made": 0', b'"made":[]'),
        lambda data: data.replace(b'"num_params": 1280', b'"num_params": -1'),
        lambda data: data.replace(b'"version": 0', b'"version": NaN, "x": 0'),
        lambda data: data.replace(b'"means": {"0": 0}', b'"means": {"x": 0}'),
        lambda data: data.replace(b'"means": {"0": 0}', b'"means": [0]'),
        lambda data: data.split(b"\n")[0] + b"\n[]\n",
    ],
)
def test_a_damaged_residual_is_named_and_starts_from_zero(rig, spoil, caplog):
    rig.make(weights(1, N))
    path = rig.folder / "residual"
    path.write_bytes(spoil(path.read_bytes()))
    next(rig.folder.glob("*.kept.update")).rename(rig.folder / "000000000000.staged")
    rig.restart()
    assert "is damaged" in caplog.text
    assert "what it held is lost" in caplog.text
    assert rig.files(".kept.update") == [0]  # a staged one holds some of it: better sent
    sent = rig.make(weights(2, N))
    np.testing.assert_allclose(sent + rig.stored, weights(2, N), atol=1e-6)


def test_a_residual_of_another_model_is_dropped_with_its_norm(rig, caplog):
    rig.make(weights(1, N))
    rig.send("stale")
    norm = np.linalg.norm(rig.stored)
    other = Layout.of([("v", SHAPE, "float32")])
    sent = rig.make(weights(2, N), layout=other)
    np.testing.assert_allclose(sent + rig.stored, weights(2, N), atol=1e-6)
    assert f"its norm of {norm:.4g} is lost" in caplog.text
    assert "the refused update 0 cannot be taken back" in caplog.text


def test_the_file_round_trips(rig):
    header = Header("abc", N, 7.1, 3, [1, 2], {2: 6.3, 3: 7.1}, 8, 9, 1)
    residual_file.write(rig.outbox.folder, header, weights(1, N))
    found, vector = residual_file.parse((rig.folder / "residual").read_bytes())
    assert found == header
    np.testing.assert_array_equal(vector, weights(1, N))
    assert vector.flags.writeable


def test_a_delta_the_codec_cannot_hold_is_not_sent_and_costs_nothing_else(rig, monkeypatch):
    rig.make(weights(1, N))
    stored = rig.stored

    def refuse(codec, delta, e, *_):
        e += delta
        raise RejectedUpdate(Reason.NOT_FINITE, "its scale is beyond 1e16")

    with monkeypatch.context() as patch:
        patch.setattr(residual, "encode_with_feedback", refuse)
        with pytest.raises(TaskError, match=r"not sent, its delta is too large: .*1e16"):
            rig.make(weights(2, N))
    np.testing.assert_allclose(rig.make(np.zeros(N, np.float32)) + rig.stored, stored, atol=1e-6)


def test_a_residual_that_no_update_can_carry_any_more_is_dropped(rig, caplog):
    rig.make(np.full(N, 3e10, np.float32) * np.linspace(0.1, 1, N, dtype=np.float32))
    sent = rig.make(weights(1, N))
    assert "is beyond" in caplog.text
    np.testing.assert_allclose(sent + rig.stored, weights(1, N), atol=1e-6)


# --- decay -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gap", "horizon", "expected"),
    [
        (-5, 10, 1), (0, 10, 1), (10, 10, 1), (20, 10, 1 / 2), (30, 10, 1 / 4), (15, 10, 0.5**0.5),
        (0, 0, 1), (1, 0, 1), (2, 0, 1 / 2), (3, 1, 1 / 4), (10**6, 1, 0),
    ],
)  # fmt: skip
def test_decay_is_whole_up_to_the_horizon_and_halves_with_every_further_one(gap, horizon, expected):
    assert decay(gap, horizon) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("mean", "expected"), [(15.5, (1, 15.5)), (10, (1, 10)), (0, (0.5, 10)), (-10, (0.25, 10))])
def test_what_faded_counts_as_one_horizon_old(mean, expected):
    assert fade(mean, 20, 10) == expected
    share, mean_from_here = fade(mean, 20, 10)
    assert share * fade(mean_from_here, 27, 10)[0] == pytest.approx(fade(mean, 27, 10)[0])  # often or seldom: the same


def test_the_mean_version_is_weighted_by_norm():
    assert mean_version(3.0, 10.0, 1.0, 30.0) == 15.0
    assert mean_version(0.0, 10.0, 1.0, 30.0) == 30.0
    assert mean_version(0.0, 10.0, 0.0, 30.0) == 30.0
    assert mean_version(1e-30, 10.0, 0.0, 30.0) == 10.0


def test_an_old_residual_decays_once(rig, caplog):
    left = weights(1, N) - rig.make(weights(1, N), version=3)
    rig.restart()
    sent = rig.make(np.zeros(N, np.float32), version=23, horizon=10)
    np.testing.assert_allclose(sent + rig.stored, left / 2, atol=1e-6)
    assert "20 versions old: it counts 0.5" in caplog.text
    sent += rig.make(np.zeros(N, np.float32), version=23, horizon=10)
    np.testing.assert_allclose(sent + rig.stored, left / 2, atol=1e-6)
    rig.make(np.zeros(N, np.float32), version=99, horizon=10)
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_a_residual_does_not_grow_young_by_being_used(rig):
    """Small deltas, often: what is old among them decays as if they were not there."""
    total = 1000 * weights(1, N)
    sent = rig.make(total, version=0, horizon=10)
    for version in range(3, 31, 3):
        left = rig.stored
        step = rig.make(0.001 * weights(version, N), codec="ef | topk(0.01)", version=version, horizon=10)
        share = np.linalg.norm(step + rig.stored) / np.linalg.norm(left)
        sent += step
        assert share == pytest.approx(
            1 if version <= 9 else 2 ** -(2 / 10) if version == 12 else 2 ** -(3 / 10), abs=1e-3
        )


def test_normal_error_feedback_stays_young(rig, caplog):
    """A worker that trains at every version and keeps what topk(0.1) leaves never loses any to age."""
    sent, total = np.zeros(N), np.zeros(N)
    for version in range(200):
        delta = weights(version, N)
        total += delta
        sent += rig.make(delta, version=version, horizon=20)
    np.testing.assert_allclose(sent + rig.stored, total, atol=1e-3)
    assert not caplog.records


def test_a_refused_update_comes_back_whole_however_old(rig):
    rig.make(weights(1, N), version=3)
    left = rig.stored
    rig.send("stale")
    sent = rig.make(np.zeros(N, np.float32), version=23, horizon=10)
    np.testing.assert_allclose(sent + rig.stored, left / 2 + weights(1, N) - left, atol=1e-6)


def bound(share_of_horizon):
    """Solve f = 2^(1 - x - f), the share that outlives a round when all is refused; the sum of f^k is the bound.

    Where mass decays it is h old after and e = f (e + 1), so that with the new delta it is f h old on average, and
    f h + x h a round later: f = decay(f h + x h).
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        f = (low + high) / 2
        low, high = (f, high) if f < 2 ** (1 - share_of_horizon - f) else (low, f)
    return 1 / (1 - low)


@pytest.mark.parametrize("codec", ["ef | int8(nearest)", EF, PLAIN])
@pytest.mark.parametrize("gap", [20, 60, 5000])  # versions from one training to the next; the horizon is 200
def test_a_residual_that_only_grows_is_bounded(rig, codec, gap):
    """All updates are refused and all deltas are alike; then one is accepted."""
    delta, most = weights(1, N), bound(min(1, gap / 200))
    if codec == PLAIN:  # it carries what an earlier codec left
        rig.make(delta, EF)
        rig.send("stale")
    for turn in range(1, 121):
        sent = rig.make(delta, codec, version=turn * gap, horizon=200)
        rig.send("stale")
        assert np.linalg.norm(sent) <= 1.01 * most * np.linalg.norm(delta)
    ratio = np.linalg.norm(sent + rig.stored) / np.linalg.norm(delta)
    assert ratio <= 1.01 * most < 25
    if gap <= 200 or codec != EF:  # beyond, what topk left at home fades faster than what was on its way
        assert ratio == pytest.approx(most, rel=0.01)  # so it is not kept small by losing more than is said


# --- with a worker ---------------------------------------------------------------------------------------------


def test_a_worker_sends_in_the_end_everything_it_trained(tmp_path, monkeypatch):
    """Each training adds one to every weight, each update sends a tenth of them, and one in two comes too late."""
    monkeypatch.setattr(residual, "decay", lambda *_: 1.0)  # with a staleness_max of 0 all that waits is old
    system = System(
        ModelImage.of({"w": np.zeros(SHAPE, np.float32)}),
        codec=EF,
        buffer_size=1,
        staleness="constant",
        staleness_max=0,
    )

    def train(model, context):
        if context.version % 3 == 0:  # another worker is faster
            system.publish(np.zeros(N, np.float32), client="b", layout=LAYOUT.hash, update_id=f"b/i/{system.sequence}")
            system.drain()
        model["w"] += trained
        return TrainResult(1, 1)

    device = device_of(tmp_path, system, train, lambda: {"w": np.zeros(SHAPE, np.float32)})
    for turn in range(40):
        trained = 1.0 if turn < 10 else 0.0
        device.worker.step()
        device.publisher.step()
        system.drain()
    outcomes = [outcome for update_id, outcome in system.outcomes() if update_id.startswith("a/")]
    assert outcomes.count("stale") == device.metrics.returned._value.get() > 3
    assert outcomes[-1] == "applied"
    np.testing.assert_allclose(
        system.weights + residual_file.parse((tmp_path / "a" / "residual").read_bytes())[1], 10, atol=1e-3
    )


def test_the_message_of_an_update_with_feedback_names_the_whole_codec(tmp_path):
    system = System(ModelImage.of({"w": np.zeros(SHAPE, np.float32)}), codec="ef|topk(0.1)")
    device = device_of(
        tmp_path, system, lambda model, context: TrainResult(1, 1), lambda: {"w": np.zeros(SHAPE, np.float32)}
    )
    device.worker.step()
    update = decode(device.outbox.oldest().body(), 10**6)
    assert parse(update.codec["name"]).feedback


def test_a_worker_tells_the_revision_of_the_head_and_none_when_it_read_none(tmp_path, monkeypatch):
    told, prepare = [], Residual.prepare
    monkeypatch.setattr(Residual, "prepare", lambda self, *a: (told.append((a[1], a[2])), prepare(self, *a))[1])
    store = FaultyStore()
    system = System(ModelImage.of({"w": np.zeros(SHAPE, np.float32)}), store=store, codec=EF, buffer_size=1)
    device = device_of(tmp_path, system, add_one, lambda: {"w": np.zeros(SHAPE, np.float32)}, store=store)
    for failing in ((), (), ("head",), ()):
        store.failing = failing
        device.worker.step()
        store.failing = ()
        device.publisher.step()
        system.drain()
    assert told == [(0, 0), (1, 1), (1, None), (3, 3)]
