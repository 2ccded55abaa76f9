"""The conversion engine: exact both ways, and total."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovseg_jax.errors import UserError
from ovseg_jax.weights.links import FORMS, Link, fused_attention, linear, read_links, write_links

# A source tensor's shape in each form, of two sizes.
SHAPES = {
    "same": lambda a, b: (a, 1, b),
    "scalar": lambda a, b: (),
    "vector": lambda a, b: (a,),
    "table": lambda a, b: (a, b),
    "linear": lambda a, b: (a, b),
    "pointwise": lambda a, b: (a, b, 1),
    "patch": lambda a, b: (a, 3, b, b),
    "token": lambda a, b: (1, a, b),
    "fused_linear": lambda a, b: (3 * a, b),
    "fused_vector": lambda a, b: (3 * a,),
    "count": lambda a, b: (),
}


@pytest.mark.parametrize("form", FORMS)
@given(sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)), layers=st.integers(0, 3))
def test_every_form_comes_back_to_the_bit(form, sizes, layers):
    """Single tensors, and stacks of 1 to 3 layers."""
    rng = np.random.default_rng(0)
    names = tuple(f"{index}.weight" for index in range(max(layers, 1)))
    kind = np.int64 if form == "count" else np.float32
    shape = SHAPES[form](*sizes)
    tensors = {name: np.asarray(rng.normal(size=shape) * 99, kind) for name in names}
    count = len(FORMS[form].read(tensors[names[0]]))
    link = Link(tuple(f"target_{index}" for index in range(count)), names, form, layers > 0)
    shapes = {
        target: (layers, *array.shape) if layers else array.shape
        for target, array in zip(link.targets, FORMS[form].read(tensors[names[0]]), strict=True)
    }
    arrays = read_links(tensors, [link], shapes, (), "FILE")
    assert all(array.dtype == FORMS[form].dtype for array in arrays.values())
    assert all(array.flags.c_contiguous for array in arrays.values())
    back = write_links(arrays, [link])
    assert back.keys() == tensors.keys()
    for name, wanted in tensors.items():
        assert (back[name].shape, back[name].dtype) == (wanted.shape, wanted.dtype)
        assert back[name].tobytes() == wanted.tobytes()


def test_every_fault_is_in_one_message():
    sizes = {"a.weight": (4, 2), "a.bias": (4,), "qkv.weight": (7, 2), "qkv.bias": (1, 6)}
    sizes |= {"again": (4,), "stray": (1,), "known": (1,)}
    zeros = {name: np.zeros(size, np.float32) for name, size in sizes.items()}
    links = [
        *linear("fc", "a"),
        *linear("fc", "lost"),
        *fused_attention("attention", ("",), "qkv."),
        Link(("elsewhere",), ("a.bias",), "vector"),
        Link(("fc/bias",), ("again",), "vector"),
    ]
    shapes = {"fc/kernel": (2, 5), "fc/bias": (4,), "unfilled": (1,)}
    shapes |= {f"attention/{x}/kernel": (2, 2) for x in ("query", "key", "value")}
    shapes |= {f"attention/{x}/bias": (2,) for x in ("query", "key", "value")}
    with pytest.raises(UserError) as error:
        read_links(zeros, links, shapes, ["known"], "FILE")
    for fault in (
        "FILE does not fit the model",
        "fc/kernel has shape (2, 5), a.weight gives (2, 4)",
        "lost.weight is missing (for fc/kernel)",
        "attention/query/kernel has shape (2, 2), qkv.weight gives (2, 3)",
        "qkv.bias has shape (1, 6), but needs 1 axes",
        "elsewhere is not a parameter of this model",
        "a.bias is used twice",
        "fc/bias is filled twice",
        "stray has no place in this model",
        "unfilled is not filled",
    ):
        assert fault in str(error.value), fault
    assert "known" not in str(error.value)
