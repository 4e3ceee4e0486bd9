"""Clustered standard errors, against the formula, the jackknife and repeated sampling."""

import subprocess
import sys

import numpy as np
import pytest

from megatron.statistics import Ratio, clustered_ratio, paired_difference
from tests.conftest import ROOT


def corpus(random, documents: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nats [1, D] and tokens [D] of documents of very different lengths and difficulties."""
    tokens = random.integers(20, 400, documents)
    return ((2 + random.normal(0, 0.3, documents)) * tokens)[None], tokens


def test_the_error_is_that_of_the_formula():
    random = np.random.default_rng(0)
    tokens = np.array([30, 0, 50, 20])  # one document has no scored tokens
    nats = random.random((3, 4)) * tokens
    ratio = clustered_ratio(nats, tokens)
    loss = sum(nats.mean(0)) / 100
    residuals = [nats[:, document].mean() - loss * tokens[document] for document in (0, 2, 3)]
    assert ratio.value == pytest.approx(loss)
    assert ratio.standard_error == pytest.approx(np.sqrt(3 / 2 * sum(r**2 for r in residuals)) / 100)


def test_the_error_is_that_of_the_jackknife():
    nats, tokens = corpus(np.random.default_rng(1), 500)
    count = len(tokens)
    without = [
        clustered_ratio(np.delete(nats, document, axis=1), np.delete(tokens, document)).value
        for document in range(count)
    ]
    jackknife = np.sqrt((count - 1) / count * ((np.array(without) - np.mean(without)) ** 2).sum())
    assert clustered_ratio(nats, tokens).standard_error == pytest.approx(jackknife, rel=0.01)


def test_the_error_is_the_spread_over_samples_of_documents():
    random = np.random.default_rng(2)
    ratios = [clustered_ratio(*corpus(random, 200)) for _ in range(1000)]
    spread = np.std([ratio.value for ratio in ratios], ddof=1)
    assert np.mean([ratio.standard_error for ratio in ratios]) == pytest.approx(spread, rel=0.08)


def test_a_paired_difference_leaves_out_the_difficulty_of_documents():
    random = np.random.default_rng(3)
    nats, tokens = corpus(random, 300)
    noise = random.normal(0, 0.01, (4, 300)) * tokens
    paired = paired_difference(nats + 0.1 * tokens + noise, nats, tokens)
    assert paired.value == pytest.approx(0.1, abs=0.002)
    assert paired.standard_error == pytest.approx(clustered_ratio(noise, tokens).standard_error)
    assert paired.standard_error < 0.05 * clustered_ratio(nats, tokens).standard_error
    assert paired_difference(nats, nats, tokens) == Ratio(0.0, 0.0)


def test_one_document_has_no_error():
    assert clustered_ratio(np.array([[6.0, 0.0], [8.0, 0.0]]), np.array([2, 0])) == Ratio(3.5, None)


def test_reading_runs_needs_no_torch():
    """Runs are read back, compared and reported on machines without torch."""
    modules = ("statistics", "training.run_folder", "reporting.runs", "reporting.plots", "reporting.report")
    imports = "".join(f"import megatron.{name}\n" for name in modules)
    blocked = "import sys\nsys.modules['torch'] = None\n"
    subprocess.run([sys.executable, "-c", blocked + imports], cwd=ROOT, check=True)
    planted = subprocess.run([sys.executable, "-c", blocked + "import megatron.batch"], cwd=ROOT, capture_output=True)
    assert b"torch" in planted.stderr and planted.returncode
