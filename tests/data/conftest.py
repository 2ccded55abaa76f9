"""The small set of records, as tests of batches read it."""

import functools

import pytest
from small_set import make_source, make_tokenizer, read_batches


@pytest.fixture(scope="module")
def source():
    """The 23 records of `small_set`."""
    return make_source()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A tokenizer of their words."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def read(source, tokenizer):
    """Reads them in batches; keywords change the loader's settings."""
    return functools.partial(read_batches, source, tokenizer)
