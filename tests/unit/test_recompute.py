"""Every version that was ever committed comes about again, byte for byte, from the ledger and the records."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from aggregator.recorder import MARK, SUFFIX, Recorder, _framed, _read_segment
from aggregator.rules import RULES
from ops.recompute import Bodies, Differs, Replay, settings_of
from ops.replay import Wanted, _start, memory_of
from ops.rollback import roll_back
from shared.errors import SettingsError, VersionGone
from shared.messages import encode, split
from shared.store.inprocess import InProcessStore
from shared.transport.ports import Delivery, Outgoing
from tests.builders import JOB, FaultyStore, System, update_of, weights
from tests.rule_scenarios import FAULTS, SCENARIOS, BlindStore, play
from tests.rule_scenarios import settings_of as drawn_settings_of


class RememberingStore(InProcessStore):
    """Keeps every version there ever was."""

    def __init__(self):
        super().__init__()
        self.ever = {}

    def create(self, model, now):
        self.ever[0] = model.copy()
        return super().create(model, now)

    def commit(self, commit):
        super().commit(commit)
        if commit.model is not None:
            self.ever[commit.version] = commit.model.copy()


class RecordedSystem(System):
    """A system whose aggregator keeps what it receives."""

    def __init__(self, folder, *given, **options):
        self.folder = folder
        super().__init__(*given, **options)

    def start(self, wrap=None, **changes):
        return super().start(lambda source: Recorder(source, self.folder, JOB, 2**28), **changes)

    @property
    def unacked(self):
        return len(self.source._inner._unacked)


class Past:
    """The history of a job in this process."""

    def __init__(self, system):
        self.store = getattr(system.store, "inner", system.store)
        self.head, self.layout = self.store.head, self.store.layout
        self.announced = system.aggregator.describe()
        self.gone = set()  # versions whose weights are not stored any more
        self.known = {}  # version -> hash, where it is not what was committed
        self.ledger = [dict(commit) for commit in self.store.ledger]

    def job(self):
        return json.loads(json.dumps(self.announced))

    def versions(self):
        return sorted(set(self.store.ever) - self.gone)

    def model(self, version):
        if version not in self.versions():
            raise VersionGone(f"version {version} is not stored")
        return self.store.ever[version].copy()

    def meta(self, version):
        if version not in self.store.ever or version in self.known:
            return {} if self.known.get(version) is None else {"sha256": self.known[version]}
        return dict(self.store.meta.get(version, {})) | {"sha256": self.store.ever[version].sha256}

    def commits(self):
        return iter(json.loads(json.dumps(self.ledger)))


def recorded(folder, store=None, **options):
    store = store or FaultyStore()
    store.inner = RememberingStore()
    return RecordedSystem(folder, weights(99), store, **options)


def replay_of(past, folder, start=0):
    return Replay(past, Bodies(folder, JOB), settings_of(JOB, past.job()), start, past.store.ever[start].copy())


def recompute(past, folder, start=0):
    """Return every version recomputed; all were compared."""
    replay = replay_of(past, folder, start)
    replay.check(past.head().version)
    made = list(replay.run(past.head().version))
    assert all(version.sha256 == version.stored == past.store.ever[version.version].sha256 for version in made)
    assert [version.version for version in made] == [v for v in sorted(past.store.ever) if v > start]
    return made


@pytest.fixture
def folders(tmp_path):
    """Return a function that makes a folder for each of hypothesis's examples."""
    made = []

    def folder():
        made.append(tmp_path / str(len(made)))
        return made[-1]

    return folder


class Deaf:
    """Takes an oracle's place."""

    def receive(self, update):
        pass


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_comes_about_again_whatever_happened_on_the_way(rule, folders):
    """Duplicates, stale updates, kills, commits whose answers were lost, several versions in one commit."""

    @settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(drawn_settings_of(rule), SCENARIOS, FAULTS)
    def holds(drawn, scenario, faults):
        folder = folders()
        system = recorded(folder, BlindStore(), **drawn)
        system.store.faults = list(faults)
        play(system, Deaf(), scenario)
        if system.store.head().version:
            recompute(Past(system), folder)

    holds()


DEFENCES = [
    {"robust": "norm_median(1.5,10)"},
    {"robust": "norm(2) | median", "buffer_size": 3},
    {"robust": "one_slot | bucketing(2) | centered_clipping(1)", "buffer_size": 4},
    {"robust": "zeno(0.0001,1)", "trusted_client": "a"},
    {"robust": "aflguard(5)", "trusted_client": "a", "rule": "fedasync"},
    {"downlink": "on", "snapshots": "bfloat16"},
    {"downlink": "on", "server_optimizer": "adam", "codec": "tiny"},
    {"rule": "fedavg", "weight_by_samples": True, "staleness_max": 0},
]


@pytest.mark.parametrize("options", DEFENCES, ids=str)
@pytest.mark.parametrize("interval_s", [0.0, 5.0])
def test_defences_optimizers_and_the_downlink_come_about_again(options, interval_s, tmp_path):
    size = {} if options.get("rule") == "fedasync" else {"buffer_size": 3}
    system = recorded(tmp_path, **size | {"commit_interval_s": interval_s} | options)
    for seed in range(60):
        codec = "int8 | zstd" if seed % 3 == 0 else "float32"
        system.publish(weights(seed) + 1, update_id=f"{'abcdef'[seed % 6]}/i/{seed}", num_samples=seed + 1, codec=codec)
        if seed % 7 == 0:
            system.drain()
            system.clock.time_s += 3
        if seed == 31:
            system.restart()
    system.drain()
    system.clock.time_s += 60
    system.drain()
    assert len(recompute(Past(system), system.folder)) >= 2


def simple(folder, count=12, **options):
    """Return a job of sums of two, and its past."""
    system = recorded(folder, **{"buffer_size": 2, "versions_kept": 3} | options)
    for seed in range(count):
        system.publish(weights(seed), update_id=f"{'ab'[seed % 2]}/i/{seed}")
        system.drain()
    return system


def test_a_rule_without_memory_may_begin_anywhere(tmp_path):
    past = Past(simple(tmp_path))
    for start in range(1, 6):
        assert len(recompute(past, tmp_path, start)) == 6 - start


def test_updates_in_parts_come_about_again(tmp_path):
    """Also where one was delivered twice in part, and cut anew by its sender."""
    store = FaultyStore()
    store.inner = RememberingStore()
    system = RecordedSystem(tmp_path, weights(99, 200), store, buffer_size=2)
    for seed in range(6):
        update = update_of(weights(seed, 200), update_id=f"a/i/{seed}", base_version=system.store.head().version)
        whole = encode(update)
        pieces = list(split(whole, 300)) if seed % 2 else [whole]
        assert len(pieces) == (3 if seed % 2 else 1)
        if seed == 3:
            pieces = [*list(split(whole, 200))[:2], pieces[0], pieces[0], *pieces]
        for piece in pieces:
            system.broker.sink().publish(Outgoing(JOB, "a", update.update_id, piece), 1.0)
            if seed == 5:
                system.drain()
                system.restart()  # between two parts; the ones before come again
        system.drain()
    system.clock.time_s += 60
    system.drain()
    assert [name for name, outcome in system.outcomes() if outcome == "applied"] == [f"a/i/{i}" for i in range(6)]
    assert [version.updates for version in recompute(Past(system), tmp_path)] == [2, 4, 6]
    spoil(tmp_path, "a/i/3")
    assert "a/i/3" in differs(Past(system), tmp_path)


def test_a_rollback_comes_about_again(tmp_path):
    system = simple(tmp_path, 9, versions_kept=50)  # one update waits in the buffer
    system.clock.time_s += 60
    system.drain()
    roll_back(system.store, 2, JOB, lambda: 0.0, 0.0)
    for seed in range(20, 25):
        system.publish(weights(seed))
        system.drain()
    past = Past(system)
    made = recompute(past, tmp_path)
    assert made[4].sha256 == made[1].sha256, "version 5 is version 2 again"
    assert len(recompute(past, tmp_path, 3)) == 4, "from between the two, with what is stored of the older"
    assert len(recompute(past, tmp_path, 5)) == 2, "from the rollback itself"
    past.gone = {2}
    with pytest.raises(Differs, match="rollback to version 2, which cannot be had"):
        recompute(past, tmp_path, 3)


def test_the_same_id_recorded_with_other_bytes_is_not_taken(tmp_path):
    """A duplicate under the same id, and what somebody else sent under it."""
    system = recorded(tmp_path, buffer_size=1)
    system.send_bytes(encode(update_of(weights(7), update_id="a/i/0")), client="b")  # rejected: in another's name
    system.publish(weights(0), update_id="a/i/0", num_samples=5)
    system.drain()
    system.send(update_of(weights(1), update_id="a/i/0", num_samples=5))
    system.drain()
    recompute(Past(system), tmp_path)


# --- what is detected, and named


def spoil(folder, update_id):
    """Flip a byte in each record of an update."""
    for path in folder.rglob(f"*{SUFFIX}"):
        head, *records = path.read_bytes().split(MARK)
        for index, record in enumerate(records):
            if update_id.encode() in record:
                records[index] = record[:150] + bytes([record[150] ^ 1]) + record[151:]
        path.write_bytes(MARK.join([head, *records]))


def differs(past, folder, start=0):
    replay = replay_of(past, folder, start)
    with pytest.raises(Differs) as caught:
        replay.check(past.head().version)
        list(replay.run(past.head().version))
    return str(caught.value)


def test_a_flipped_byte_in_a_record_is_named(tmp_path):
    past = Past(simple(tmp_path))
    spoil(tmp_path, "a/i/6")
    said = differs(past, tmp_path)
    assert "a/i/6: its record at 0000000001-" in said
    assert "damaged" in said
    assert "From version 4 on" in said
    recompute(past, tmp_path, 4)


def rewrite(folder, change):
    """Change recorded messages as somebody would who writes valid records."""
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        head = path.read_bytes().split(MARK)[0]
        frames = [
            b"".join(_framed(Delivery(change(record), record.client, record.user_id, record.update_id, (0, 0))))
            for record in _read_segment(path)
        ]
        path.write_bytes(head + b"".join(frames))


def test_a_record_that_somebody_changed_consistently_makes_another_version(tmp_path):
    past = Past(simple(tmp_path))
    other = encode(update_of(weights(1000), update_id="a/i/6", base_version=3))
    rewrite(tmp_path, lambda record: other if record.update_id == "a/i/6" else record.body)
    said = differs(past, tmp_path)
    assert "version 4 is the first that differs" in said
    assert "a/i/6, b/i/7" in said


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("weight", 0.25, "weight 0.25 became 1.0"),
        ("staleness", 3, "staleness 3 became 0"),
        ("version", 3, "version 3 became 2"),
    ],
)
def test_a_changed_ledger_is_named(tmp_path, name, value, words):
    past = Past(simple(tmp_path))
    entry = next(e for commit in past.ledger for e in commit["updates"] if e["id"] == "b/i/5")
    entry[name] = value
    said = differs(past, tmp_path)
    assert "update b/i/5" in said
    assert words in said


def test_an_update_that_the_ledger_made_up_is_named(tmp_path):
    past = Past(simple(tmp_path))
    past.ledger[2]["updates"].append(dict(past.ledger[2]["updates"][0], id="a/i/999"))
    assert "a/i/999: it was not recorded" in differs(past, tmp_path)


def test_an_update_that_the_ledger_lost_is_seen(tmp_path):
    past = Past(simple(tmp_path))
    past.ledger[2]["updates"].pop()
    said = differs(past, tmp_path)
    assert "version 3 at revision" in said
    assert "recomputed is version 2" in said


def test_the_same_update_twice_in_the_ledger_is_seen(tmp_path):
    past = Past(simple(tmp_path))
    past.ledger[3]["updates"].append(dict(past.ledger[2]["updates"][0]))
    assert "outcome 'applied' became 'duplicate'" in differs(past, tmp_path)


def test_other_settings_are_seen(tmp_path):
    past = Past(simple(tmp_path))
    past.announced |= {"server_lr": 0.5}
    assert "version 1 is the first that differs" in differs(past, tmp_path)
    past.announced |= {"server_lr": 1.0, "buffer_size": 3}
    assert "version 1 at revision" in differs(past, tmp_path)


def test_records_that_are_gone_are_counted_and_named(tmp_path):
    past = Past(simple(tmp_path))
    for path in tmp_path.rglob(f"*{SUFFIX}"):
        data = path.read_bytes()
        head, *records = data.split(b"RECD")
        path.write_bytes(b"RECD".join([head, *records[5:]]))
    said = differs(past, tmp_path)
    assert said.startswith("5 updates of versions 1 to 3 are not at hand: a/i/0, b/i/1, a/i/2, b/i/3, a/i/4;")
    assert "From version 3 on everything is there" in said
    recompute(past, tmp_path, 3)


def test_a_version_without_a_hash_is_passed_over_and_the_next_one_is_compared(tmp_path):
    past = Past(simple(tmp_path))
    past.gone, past.known = {1, 2, 3}, {1: None, 2: None, 3: None}
    made = list(replay_of(past, tmp_path).run(6))
    assert [version.stored == "" for version in made] == [True] * 3 + [False] * 3
    past.known = {1: None, 2: None, 3: "another"}
    assert "a/i/0, b/i/1, a/i/2, b/i/3, a/i/4, b/i/5" in differs(past, tmp_path)


def test_what_came_after_a_version_in_the_same_commit_is_not_needed_for_it(tmp_path):
    """Versions 1 and 2 and half of 3 in one commit; a record of that half is gone."""
    system = recorded(tmp_path, buffer_size=2, commit_interval_s=20.0, commit_age_max_s=30.0)
    for seed in range(5):
        system.publish(weights(seed), update_id=f"a/i/{seed}", base_version=0)
        system.drain()
    system.aggregator.finish()
    past = Past(system)
    assert [[entry["version"] for entry in commit["updates"]] for commit in past.ledger] == [[0, 0, 1, 1, 2]]
    spoil(tmp_path, "a/i/4")
    made = recompute(past, tmp_path)
    assert [(version.version, version.updates) for version in made] == [(2, 4)]
    assert str(replay_of(past, tmp_path).unread(2)) == "records not read: 1 damaged"
    spoil(tmp_path, "a/i/3")
    assert "a/i/3" in differs(past, tmp_path)


def test_records_that_a_replay_does_not_look_into_are_counted(tmp_path):
    system = simple(tmp_path, 9)  # four versions, and half of another
    system.publish(weights(3), update_id="b/i/3")  # a duplicate under its id, with other bytes
    system.publish(weights(9), base_version=77, update_id="a/i/77")  # rejected
    system.drain()
    system.clock.time_s += 60
    system.drain()
    past = Past(system)
    assert str(replay_of(past, tmp_path).unread(4)) == (
        "records not read: 1 applied after the end, 1 not applied, or no longer in the ledger"
    )
    assert str(replay_of(past, tmp_path, 1).unread(3)) == (
        "records not read: 2 applied before the start, 3 applied after the end, 1 not applied, or no longer in the "
        "ledger"
    )
    assert str(replay_of(Past(simple(tmp_path / "all", 4)), tmp_path / "all").unread(2)) == "every record was read"


# --- where to start from


def test_a_job_begins_where_its_state_is_whole(tmp_path):
    past = Past(simple(tmp_path))
    assert _start(past, Wanted(), JOB, 6)[0] == 0
    past.gone = {0, 1}
    assert _start(past, Wanted(), JOB, 6)[0] == 2
    past.announced |= {"server_optimizer": "momentum"}
    with pytest.raises(SettingsError, match=r"version 0 .* --from FILE .*vector momentum_m remember"):
        _start(past, Wanted(), JOB, 6)
    with pytest.raises(SettingsError, match="version 4 alone is nothing to start from"):
        _start(past, Wanted(start_version=4), JOB, 6)
    past.store.meta.setdefault(4, {})["rolled_back_to"] = "1"
    assert _start(past, Wanted(), JOB, 6)[0] == 4


def test_a_file_to_begin_with_must_be_that_version(tmp_path):
    past = Past(simple(tmp_path / "records"))
    past.gone = {0, 1, 2}
    for version in (0, 1, 2):
        past.store.ever[version].save(tmp_path / f"{version}.safetensors")
    assert _start(past, Wanted(start=tmp_path / "0.safetensors"), JOB, 6)[0] == 0
    image = _start(past, Wanted(start=tmp_path / "2.safetensors", start_version=2), JOB, 6)[1]
    np.testing.assert_array_equal(image.weights, past.store.ever[2].weights)
    with pytest.raises(SettingsError, match="is not version 1"):
        _start(past, Wanted(start=tmp_path / "2.safetensors", start_version=1), JOB, 6)
    with pytest.raises(SettingsError, match="cannot read"):
        _start(past, Wanted(start=tmp_path / "none.safetensors"), JOB, 6)
    with pytest.raises(SettingsError, match="not before version 6"):
        _start(past, Wanted(start=tmp_path / "2.safetensors", start_version=6), JOB, 6)


def test_a_trimmed_ledger_says_how_far_it_reaches_back(tmp_path):
    past = Past(simple(tmp_path))
    past.ledger = [commit for commit in past.ledger if commit["version"] >= 3]
    assert _start(past, Wanted(), JOB, 6)[0] == 4
    with pytest.raises(SettingsError, match=r"the ledger begins with version 3 .*--from-version 4 or later"):
        _start(past, Wanted(start_version=3), JOB, 6)
    past.gone = {4, 5}
    with pytest.raises(SettingsError, match="no version from 4 to 5 is stored"):
        _start(past, Wanted(), JOB, 6)
    assert len(recompute(past, tmp_path, 4)) == 2


@pytest.mark.parametrize("rule", sorted(RULES))
def test_what_a_job_remembers_is_known(rule, folders):
    """At a version of a job that remembers nothing, its state is its weights."""

    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(drawn_settings_of(rule), SCENARIOS)
    def holds(drawn, scenario):
        system = recorded(folders(), BlindStore(), **drawn)
        play(system, Deaf(), scenario)
        state = system.aggregator.state
        if state.buffer or not state.version or memory_of(system.settings):
            return
        assert not state.facts
        assert not state.kept.names
        assert not system.aggregator._rule.arrays

    holds()


def test_a_job_that_no_aggregator_has_run_has_no_settings():
    with pytest.raises(SettingsError, match="no aggregator has run it"):
        settings_of(JOB, {})
