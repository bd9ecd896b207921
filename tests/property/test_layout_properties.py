"""Layouts and model images of arbitrary models: nothing is lost, nothing moves."""

import numpy as np
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from shared.layout import Layout
from shared.model_image import ModelImage

FLOATS = ("float64", "float32", "float16")
KEPT = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12)


@st.composite
def models(draw):
    """Draw name -> array, of any types and shapes, with at least one float."""
    names = draw(st.lists(NAMES.filter(lambda n: n != "__metadata__"), min_size=1, max_size=8, unique=True))
    dtypes = [draw(st.sampled_from(FLOATS + KEPT)) for _ in names[1:]]
    shapes = [draw(SHAPES) for _ in names[1:]]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tensors = {
        name: (rng.standard_normal(shape) * 50).astype(dtype)
        for name, shape, dtype in zip(names[1:], shapes, dtypes, strict=True)
    }
    tensors[names[0]] = rng.standard_normal(draw(st.integers(1, 9))).astype(np.float32)
    order = draw(st.permutations(list(tensors)))
    return {name: np.asarray(tensors[name]) for name in order}


def layout_of(tensors):
    return Layout.of((name, a.shape, str(a.dtype)) for name, a in tensors.items())


@given(models())
def test_flatten_then_unflatten_gives_every_float_back(tensors):
    layout = layout_of(tensors)
    back = layout.unflatten(layout.flatten(tensors))
    assert list(back) == [name for name, a in tensors.items() if a.dtype.kind == "f"]
    for name, array in back.items():
        np.testing.assert_array_equal(array, tensors[name].astype(np.float32))
        assert array.shape == tensors[name].shape


@given(models())
def test_unflatten_then_flatten_is_the_identity(tensors):
    layout = layout_of(tensors)
    flat = np.arange(layout.num_params, dtype=np.float32)
    np.testing.assert_array_equal(layout.flatten(layout.unflatten(flat)), flat)


@given(models())
def test_offsets_tile_the_flat_vector_and_the_kept_bytes_aligned(tensors):
    layout = layout_of(tensors)
    position = 0
    for spec in layout.averaged:
        assert spec.offset == position
        position += spec.size
    assert position == layout.num_params
    position = 0
    for spec in layout.kept:
        width = np.dtype(spec.dtype).itemsize
        assert spec.offset == position
        assert position % width == 0
        position += spec.size * width
    assert position == layout.kept_bytes


@given(models())
def test_layout_survives_its_json(tensors):
    layout = layout_of(tensors)
    assert Layout.from_json(layout.json.encode()) == layout


@given(models())
def test_the_safetensors_library_reads_every_image(tensors):
    image = ModelImage.of(tensors)
    read = safetensors.numpy.load(image.data.tobytes())
    assert read.keys() == tensors.keys()
    for name, array in tensors.items():
        expected = array.astype(np.float32) if array.dtype.kind == "f" else array
        assert read[name].dtype == expected.dtype
        assert read[name].shape == expected.shape
        np.testing.assert_array_equal(read[name], expected)


@given(models())
def test_an_image_gives_its_own_tensors_back(tensors):
    image = ModelImage.of(tensors)
    for name, array in image.tensors().items():
        expected = tensors[name].astype(np.float32) if tensors[name].dtype.kind == "f" else tensors[name]
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
