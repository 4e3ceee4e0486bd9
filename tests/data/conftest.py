"""Fixtures of the data tests: small data sets, and checks of one-line errors."""

from contextlib import contextmanager

import pytest

from megatron.data.indexed import IndexedDataset, IndexedDatasetWriter
from megatron.errors import ConfigurationError


@pytest.fixture
def data_set(tmp_path):
    """Return a function that writes documents, lists of ids, and opens them."""

    def write(documents, vocabulary_size=1000, name="data"):
        with IndexedDatasetWriter(tmp_path / name, vocabulary_size) as writer:
            for ids in documents:
                writer.add_document(ids)
        return IndexedDataset(str(tmp_path / name), vocabulary_size)

    return write


@pytest.fixture
def refused():
    """Return a context manager that expects a ConfigurationError in one line that contains all given strings."""

    @contextmanager
    def check(*parts):
        with pytest.raises(ConfigurationError) as caught:
            yield
        message = str(caught.value)
        assert "\n" not in message
        assert [part for part in parts if str(part) not in message] == [], message

    return check
