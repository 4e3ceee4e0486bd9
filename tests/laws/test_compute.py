"""Compute of laws whose runs have loops or several passes: FLOPs of the records in place of 6 N D."""

from dataclasses import replace

import numpy as np
import pytest

from megatron.config.sections import ModelConfig
from megatron.config.sizes import parameter_count
from megatron.config.vocabulary import Vocabulary
from megatron.errors import ConfigurationError
from megatron.laws.answers import Limits, best_run, critical_compute, enough, frontier
from megatron.laws.base import Law
from megatron.laws.command import check_flops
from megatron.laws.compute import PLAIN, Compute
from megatron.laws.registry import from_json
from megatron.laws.table import read_table
from tests.laws.tables import collected_sweep, point, validations, write_csv
from tests.laws.test_answers import law

SIZES, COMPUTED = [1e7, 1e8, 1e9], [1.2e7, 2.1e8, 3.6e9]
LOOPED = Compute(np.log(SIZES), np.log(COMPUTED))
VOCABULARY = Vocabulary(500)


def looped(name: str, compute: Compute) -> Law:
    return replace(law(name), compute=compute)


def brute_force(form: Law, flops: float) -> tuple[float, float]:
    """Return the lowest loss and its size over a grid of N, at D = C / 6M or at most 1,000 epochs of 1e8 tokens."""
    sizes = np.geomspace(1e6, 1e11, 4000)
    computed = np.exp(np.interp(np.log(sizes), np.log(SIZES), np.log(COMPUTED)))
    computed = np.where(sizes < 1e7, 1.2 * sizes, np.where(sizes > 1e9, 3.6 * sizes, computed))
    losses = form.loss(sizes, 1e8, np.minimum(flops / 6 / computed, 1e11))
    return losses.min(), sizes[losses.argmin()]


@pytest.mark.parametrize("flops", [1e17, 1e19])
def test_optimum_and_frontier_are_those_of_a_brute_force_search(flops):
    form, limits = looped("repetition", LOOPED), Limits(parameters=(1e6, 1e11), epochs=1e3)
    loss, size = brute_force(form, flops)
    best = best_run(form, 1e8, flops, limits)
    assert best.loss == pytest.approx(loss, abs=1e-5) and best.parameters == pytest.approx(size, rel=0.02)
    assert best.flops == pytest.approx(6 * best.tokens * np.exp(LOOPED.computed(np.log(best.parameters))))
    losses, sizes = frontier(form, 1e8, np.array([flops / 2, flops]), limits)
    assert losses[-1] == pytest.approx(loss, abs=1e-5) and sizes[-1] == pytest.approx(size, rel=0.02)
    assert best_run(law("repetition"), 1e8, flops, limits).loss < loss - 1e-3  # 6 N D flatters loops


def test_a_constant_factor_multiplies_every_compute():
    twice = Compute(np.log([1e8]), np.log([2e8]))
    sides = law("repetition"), law("chinchilla")
    plain, doubled = sides, [replace(side, compute=twice) for side in sides]
    for number in (3e18, 1e21):
        assert best_run(doubled[0], 1e8, 2 * number).parameters == pytest.approx(
            best_run(plain[0], 1e8, number).parameters
        )
    assert enough(doubled[0], 1e8).flops == pytest.approx(2 * enough(plain[0], 1e8).flops, rel=1e-3)
    crossings = [critical_compute(second, first, 1e8).flops for first, second in (plain, doubled)]
    assert crossings[1] == pytest.approx(2 * crossings[0], rel=1e-3)


def test_sizes_and_computed_sizes_are_inverse_and_survive_the_file():
    sizes = np.log(np.geomspace(1e5, 1e11, 100))
    np.testing.assert_allclose(LOOPED.parameters(LOOPED.computed(sizes)), sizes, rtol=1e-12)
    copy = from_json(looped("repetition", LOOPED).to_json()).compute
    np.testing.assert_allclose(copy.computed(sizes), LOOPED.computed(sizes), rtol=1e-12)
    assert from_json(law("repetition").to_json()).compute is PLAIN
    assert "computed_parameters" not in law("repetition").to_json()


def sweep_of(folder, widths_and_loops: list[tuple[int, int]]):
    """Collect runs of two looped blocks, with the FLOPs that records have."""
    runs = []
    for width, loops in widths_and_loops:
        model = ModelConfig(num_layers=2, hidden_size=width, num_attention_heads=4, num_loops=loops)
        size, flops = (parameter_count(variant, VOCABULARY) for variant in (model, model.unrolled))
        named = f"run{width}_{loops}"
        records = validations({"validation": [4.0]}, flops=6.0 * flops * 1000)
        runs.append((point(named, parameters=size, axes={"num-loops": loops}), records))
    return collected_sweep(folder, runs)


def test_the_flops_of_a_sweep_count_the_uses_of_its_blocks(tmp_path):
    table = read_table(sweep_of(tmp_path / "k4", [(32, 4), (64, 4)]))
    computed = [
        parameter_count(ModelConfig(num_layers=8, hidden_size=width, num_attention_heads=4), VOCABULARY)
        for width in (32, 64)
    ]
    np.testing.assert_allclose(table.compute.flops(table.parameters, 7.0), 42.0 * np.array(computed))
    assert any(note.startswith("compute counts every use of a block") for note in table.notes)
    least = 6 * computed[0] * 1000
    check_flops(table, [1000], [least * 1.001])
    with pytest.raises(ConfigurationError, match="smallest model of the table"):
        check_flops(table, [1000], [least * 0.999])
    plain = read_table(sweep_of(tmp_path / "k1", [(32, 1), (64, 1)]))
    assert plain.compute is PLAIN and plain.notes == ()


@pytest.mark.parametrize("runs", [[(32, 1), (32, 4)], [(64, 4), (72, 1)]])
def test_loops_that_the_size_does_not_determine_are_refused(tmp_path, runs):
    folder = sweep_of(tmp_path / "sweep", runs)
    with pytest.raises(
        ConfigurationError, match="mixes loops or passes: runs take 1 to .* --where, such as 'num-loops=2'"
    ):
        read_table(folder)
    assert read_table(folder, mixed=["flops"]).compute is PLAIN
    assert read_table(folder, where=["num-loops=1"]).compute is PLAIN
    assert read_table(folder, where=["num-loops=4"]).compute is not PLAIN


def test_flops_of_other_tables_count_where_they_are_named(tmp_path):
    path = write_csv(tmp_path / "t.csv", "N U D loss flops\n1e6 1e6 1e6 3.0 1.2e13\n2e6 1e6 1e6 2.9 2.4e13")
    assert read_table(path).compute is PLAIN  # their convention is not known
    assert read_table(path, columns={"flops": "flops"}).compute.flops(5e6, 1.0) == pytest.approx(6e7)
