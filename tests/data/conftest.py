"""The small set of records, as tests of batches read it."""

import functools

import nltk
import pytest
from nltk.corpus.reader import WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from small_set import make_source, make_tokenizer, read_batches
from tiny_wordnet import write_wordnet


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


@pytest.fixture
def wordnet(tmp_path, monkeypatch):
    """A tiny WordNet in place of the installed one: synset -> id."""
    ids = write_wordnet(tmp_path / "nltk")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk")])
    other = LazyCorpusLoader("omw-2.0", nltk.corpus.CorpusReader, r".*")
    loader = LazyCorpusLoader("wordnet", WordNetCorpusReader, other)
    monkeypatch.setattr(nltk.corpus, "wordnet", loader)
    yield ids
    files = vars(loader)  # of the reader that NLTK has put in the loader's place; it closes none
    streams = [*files.get("_data_file_map", {}).values(), files.get("_key_count_file")]
    for stream in filter(None, streams):
        stream.close()
