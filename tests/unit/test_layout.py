"""Layout: which tensors there are, in which order, and the hash that proves it."""

import hashlib
import json
import re

import numpy as np
import pytest

import shared.layout
from shared.errors import SettingsError
from shared.layout import Layout, difference

MIXED = (
    ("flag", (3,), "bool"),
    ("a", (2, 3), "float32"),
    ("short", (1,), "int16"),
    ("b", (), "float16"),
    ("count", (), "int64"),
    ("c", (4,), "bfloat16"),
)


def test_floats_keep_their_order_and_the_kept_follow_widest_first():
    layout = Layout.of(MIXED)
    assert [t.name for t in layout.tensors] == ["a", "b", "c", "count", "short", "flag"]
    assert [(t.name, t.offset) for t in layout.averaged] == [("a", 0), ("b", 6), ("c", 7)]
    assert [(t.name, t.offset) for t in layout.kept] == [("count", 0), ("short", 8), ("flag", 10)]
    assert (layout.num_params, layout.kept_bytes) == (11, 13)


def test_kept_tensors_of_equal_width_keep_their_order():
    layout = Layout.of([("w", (1,), "float32"), ("z", (), "int32"), ("y", (), "uint32"), ("x", (), "int32")])
    assert [t.name for t in layout.kept] == ["z", "y", "x"]


def test_hash_is_the_sha256_of_the_canonical_json_and_never_changes():
    layout = Layout.of([("w", (2, 1), "float32"), ("n", (), "int64")])
    text = (
        '{"tensors":[{"dtype":"float32","name":"w","offset":0,"policy":"average","shape":[2,1]},'
        '{"dtype":"int64","name":"n","offset":0,"policy":"keep","shape":[]}]}'
    )
    assert layout.json == text
    assert layout.hash == hashlib.sha256(text.encode()).hexdigest()
    assert layout.hash == "b730572afe62740b6b9545558b53723d6cc9b344f781db3efcd408be68d5bd86"


@pytest.mark.parametrize(
    "changed",
    [
        (("w", (3, 2), "float32"), ("n", (), "int64")),
        (("w", (2, 3), "float64"), ("n", (), "int64")),
        (("v", (2, 3), "float32"), ("n", (), "int64")),
        (("w", (2, 3), "float32"), ("n", (1,), "int64")),
        (("w", (2, 3), "float32"), ("n", (), "int32")),
        (("w", (2, 3), "float32"),),
    ],
)
def test_hash_changes_with_every_name_shape_and_type(changed):
    assert Layout.of(changed).hash != Layout.of((("w", (2, 3), "float32"), ("n", (), "int64"))).hash


def test_hash_changes_with_the_order_of_the_floats():
    x, y = ("x", (2,), "float32"), ("y", (2,), "float32")
    assert Layout.of([x, y]).hash != Layout.of([y, x]).hash


def test_json_reads_back_as_the_same_layout():
    layout = Layout.of(MIXED)
    again = Layout.from_json(layout.json)
    assert again == layout
    assert again.hash == layout.hash
    assert Layout.from_json(json.dumps(json.loads(layout.json), indent=2)).hash == layout.hash


@pytest.mark.parametrize("dtype", ["complex64", "float8_e4m3fn", "object", "str", "", ">f4", "qint8"])
def test_a_type_that_cannot_be_averaged_or_kept_is_refused_by_name(dtype):
    with pytest.raises(SettingsError, match="'odd' is"):
        Layout.of([("w", (1,), "float32"), ("odd", (1,), dtype)])


@pytest.mark.parametrize("kinds", [("float32", "float32"), ("float32", "int64"), ("int8", "int8")])
def test_a_repeated_name_is_refused(kinds):
    with pytest.raises(SettingsError, match=r"'w'.*unique"):
        Layout.of([("w", (1,), kinds[0]), ("w", (1,), kinds[1])])


@pytest.mark.parametrize("shapes", [[], [("n", (3,), "int64")], [("w", (0, 4), "float32")]])
def test_a_model_without_float_parameters_is_refused(shapes):
    with pytest.raises(SettingsError, match="0 floating-point parameters"):
        Layout.of(shapes)


def test_names_and_counts_are_bounded(monkeypatch):
    with pytest.raises(SettingsError, match="512 characters"):
        Layout.of([("w" * 513, (1,), "float32")])
    with pytest.raises(SettingsError, match="characters"):
        Layout.of([("", (1,), "float32")])
    with pytest.raises(SettingsError, match="floating-point parameters"):
        Layout.of([("w", (2**17, 2**17), "float32")])
    monkeypatch.setattr(shared.layout, "TENSORS_MAX", 3)
    Layout.of([(str(i), (1,), "float32") for i in range(3)])
    with pytest.raises(SettingsError, match="at most 3"):
        Layout.of([(str(i), (1,), "float32") for i in range(4)])


def test_unflatten_gives_views_not_copies():
    layout = Layout.of(MIXED)
    flat = np.zeros(layout.num_params, np.float32)
    layout.unflatten(flat)["c"][:] = 5
    assert flat.tolist() == [0] * 7 + [5] * 4


def test_flatten_writes_into_the_given_vector():
    layout = Layout.of([("a", (2,), "float64"), ("b", (), "float16")])
    out = np.zeros(3, np.float32)
    assert layout.flatten({"b": np.array(3, np.float16), "a": np.array([1.0, 2.0])}, out=out) is out
    assert out.tolist() == [1, 2, 3]


BASE = (("w", (2, 3), "float32"), ("b", (3,), "float32"), ("n", (), "int64"))


@pytest.mark.parametrize(
    ("mine", "named"),
    [
        (BASE[1:], r"'w' \(2, 3\) float32 of the job is missing"),
        ((*BASE, ("extra", (1,), "bool")), r"'extra' \(1,\) bool of this task's model is unknown"),
        ((("w", (3, 2), "float32"), *BASE[1:]), r"'w' is \(3, 2\) float32 here, \(2, 3\) float32 in the job"),
        ((*BASE[:2], ("n", (), "int32")), r"'n' is \(\) int32 here, \(\) int64 in the job"),
        ((BASE[1], BASE[0], BASE[2]), r"'b' stands at offset 0 here, at 6 in the job"),
        (BASE, "no difference"),
    ],
)
def test_difference_names_the_tensor(mine, named):
    assert re.search(named, difference(Layout.of(mine), Layout.of(BASE)))
