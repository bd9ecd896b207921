"""The clients' folders in memory and in the database behave as a dictionary, whatever the budget and the crashes."""

import sqlite3

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ops.simulation.database import Database, Folders, Records

CLIENTS, NAMES = st.integers(0, 2), st.sampled_from(["a", "b", "c.update"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("write"), CLIENTS, NAMES, st.binary(max_size=12)),
        st.tuples(st.just("rename"), CLIENTS, NAMES, NAMES),
        st.tuples(st.just("remove"), CLIENTS, NAMES, st.none()),
        st.tuples(st.just("read"), CLIENTS, NAMES, st.none()),
        st.tuples(st.sampled_from(["commit", "crash"]), st.none(), st.none(), st.none()),
    ),
    max_size=40,
)


def check(folders, files):
    """Compare every folder with the model."""
    for client in range(3):
        folder = folders.folder(client)
        mine = {name: data for (owner, name), data in files.items() if owner == client}
        assert sorted(folder.names()) == sorted(mine)
        assert {name: folder.size(name) for name in mine} == {name: len(data) for name, data in mine.items()}


WRITE, REMOVE, COMMIT, CRASH = ("write", 0, "a", b"x"), ("remove", 0, "a", None), ("commit",) * 4, ("crash",) * 4


@example([WRITE, COMMIT, REMOVE, COMMIT, CRASH], 1000)
@example([WRITE, COMMIT, ("rename", 0, "a", "b"), COMMIT, CRASH], 1000)
@example([WRITE, COMMIT, REMOVE, CRASH], 0)
@given(STEPS, st.sampled_from([0, 5, 20, 1000]))
def test_folders_are_dictionaries(tmp_path_factory, steps, budget):
    path = tmp_path_factory.mktemp("folders") / "run.sqlite"
    database, files, committed = Database(path), {}, {}
    folders = Folders(database, budget)
    for step, client, name, more in steps:
        folder = folders.folder(client)
        match step:
            case "write":
                folder.write(name, more[:3], memoryview(more[3:]))
                files[client, name] = more
            case "rename":
                folder.rename(name, more)
                if (client, name) in files:
                    files[client, more] = files.pop((client, name))
            case "remove":
                folder.remove(name, durable=True)
                files.pop((client, name), None)
            case "read" if (client, name) in files:
                assert folder.read(name) == files[client, name]
            case "read":
                with pytest.raises(FileNotFoundError):
                    folder.read(name)
                with pytest.raises(FileNotFoundError):
                    folder.size(name)
            case "commit":
                folders.save()
                database.commit()
                committed = dict(files)
            case "crash":
                database.close()
                database, files = Database(path), dict(committed)
                folders = Folders(database, budget)
        assert folders._held_bytes == sum(map(len, folders._held.values())) <= budget
        check(folders, files)
    database.close()


def test_one_part_is_copied():
    """The caller may change its buffer."""
    folder, buffer = Folders(Database(None)).folder(0), bytearray(b"abc")
    folder.write("a", memoryview(buffer))
    buffer[:] = b"xyz"
    assert folder.read("a") == b"abc"


def test_records_are_a_mapping():
    records = Records(Database(None), "kept")
    records["a"], records["b"], records["a"] = b"1", b"", b"2"
    assert dict(records) == {"a": b"2", "b": b""}
    assert len(records) == 2
    del records["a"]
    assert records.get("a") is None
    assert records.pop("a", b"no") == b"no"
    with pytest.raises(KeyError):
        del records["a"]


def test_tables_do_not_mix():
    database = Database(None)
    Records(database, "kept")["a"] = b"1"
    assert "a" not in Records(database, "state")


def test_two_processes_cannot_have_one_file(tmp_path):
    path = tmp_path / "run.sqlite"
    first = Database(path)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        Database(path)
    Records(first, "state")["a"] = b"1"
    first.commit()
    with pytest.raises(sqlite3.OperationalError, match="locked"):  # nor in between two commits
        Database(path)
    with sqlite3.connect(path, timeout=0) as onlooker, pytest.raises(sqlite3.OperationalError, match="locked"):
        onlooker.execute("SELECT * FROM state")
    onlooker.close()
    first.close()
    second = Database(path)
    assert Records(second, "state")["a"] == b"1"
    second.close()


def test_what_is_no_database_is_left_alone(tmp_path):
    path = tmp_path / "run.sqlite"
    path.write_text("my notes " * 100)
    with pytest.raises(sqlite3.DatabaseError):
        Database(path)
    assert path.read_text() == "my notes " * 100
