from __future__ import annotations

import warnings
from collections.abc import Iterator

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest


@pytest.fixture(autouse=True)
def no_trace() -> Iterator[None]:
    """Fail a test that warns, or leaves a pyplot figure or a changed setting."""
    figures, settings = plt.get_fignums(), dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    assert plt.get_fignums() == figures
    assert dict(mpl.rcParams) == settings
