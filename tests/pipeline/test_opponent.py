"""Who is faster, and what is said of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_spdy.pipeline.alternatives import DENSE, PRUNED, Alternative, Alternatives, Candidate
from onnx_spdy.pipeline.opponent import headline, standing, verdict
from onnx_spdy.runtimes import Environment, Measurement


def one(role: str, name: str, milliseconds, metric: float | None = None, asked: bool = False) -> Alternative:
    """Of one time, or of several visits."""
    engine, precision = name.split()
    visits = (1e-3 * np.broadcast_to(milliseconds, 6) if np.ndim(milliseconds) == 0 else 1e-3 * milliseconds).tolist()
    environment = Environment(engine, "1", precision, "cpu", "avx512", 2, 2, 1, "host")
    candidate = Candidate(role, name, None if asked else name, Path(f"{role}.onnx"))
    return Alternative(candidate, Measurement(tuple(visits)), environment, None, metric)


def machine(*others: Alternative, pruned: float = 20.0, metric: float | None = None, dense_metric: float | None = None):
    return Alternatives(
        (
            one(PRUNED, "deepsparse fp32", pruned, metric, asked=True),
            one(DENSE, "deepsparse fp32", 50.0, dense_metric, asked=True),
            *others,
        ),
        {},
    )  # fmt: skip


def test_a_dense_alternative_that_wins_is_named_with_both_times_and_bounds():
    found = standing(machine(one(DENSE, "openvino bf16", 10.0)))
    assert (found.dense.name, found.times, found.lower, found.upper) == ("openvino bf16", *[pytest.approx(0.5)] * 3)
    assert verdict(found) == (
        "The dense network in openvino bf16 is 2.00x as fast as the pruned one in deepsparse fp32 "
        "(10.0 against 20.0 ms; 95% bounds 2.00 to 2.00): rather deploy that, if its accuracy in bf16 is good enough."
    )
    assert headline(2.5, 2.4, 2.6, found) == (
        "2.50x as fast as the dense network in deepsparse fp32 (2.40 to 2.60); the best dense alternative, "
        "openvino bf16, is 2.00x as fast as this (2.00 to 2.00)"
    )


def test_one_in_the_same_precision_costs_no_accuracy():
    found = standing(machine(one(DENSE, "onnxruntime fp32", 5.0)))
    assert verdict(found).endswith("rather deploy that, which loses no accuracy.")


def test_with_a_metric_it_is_told_that_the_dense_one_loses_no_more():
    others = machine(one(DENSE, "openvino int8", 4.0, 0.85), metric=0.84, dense_metric=0.86)
    assert verdict(standing(others), "top1").endswith(
        "rather deploy that, which loses no more (top1 0.8500, pruned 0.8400)."
    )


def test_one_that_loses_more_is_not_the_opponent_but_is_told():
    found = standing(
        machine(
            one(DENSE, "openvino int8", 4.0, 0.6), one(DENSE, "openvino bf16", 25.0, 0.85),
            metric=0.84, dense_metric=0.86,
        )
    )  # fmt: skip
    assert (found.dense.name, found.lossy.name) == ("openvino bf16", "openvino int8")
    assert verdict(found, "top1").endswith(
        "1.25x as fast as the best of them, openvino bf16 (20.0 against 25.0 ms; 95% bounds 1.25 to 1.25). "
        "Dense openvino int8 takes 4.00 ms and loses more (top1 0.6000, pruned 0.8400)."
    )
    assert headline(2.5, 2.4, 2.6, found).endswith(
        "1.25x as fast as the best dense alternative, openvino bf16 (1.25 to 1.25)"
    )


def test_a_pruned_network_that_gained_accuracy_still_has_an_opponent():
    found = standing(machine(one(DENSE, "openvino fp32", 10.0, 0.86), metric=0.9, dense_metric=0.86))
    assert found.dense.name == "openvino fp32"


def test_a_pruned_network_that_wins_is_compared_with_the_best_alternative():
    assert verdict(standing(machine(one(DENSE, "openvino fp32", 60.0)))) == (
        "The pruned network in deepsparse fp32 beats every dense alternative that was measured: it is 2.50x as fast as "
        "the best of them, deepsparse fp32 (20.0 against 50.0 ms; 95% bounds 2.50 to 2.50)."
    )


def test_a_narrow_network_is_judged_where_it_is_fastest():
    found = standing(
        machine(
            one(DENSE, "openvino int8", 4.0, 0.86), one(PRUNED, "openvino int8", 2.0, 0.838),
            one(PRUNED, "onnxruntime int8", 1.0, 0.5), metric=0.84, dense_metric=0.86,
        )
    )  # fmt: skip
    assert (found.pruned.name, found.dense.name, found.times) == ("openvino int8", "openvino int8", pytest.approx(2))
    assert headline(2.5, 2.4, 2.6, found).endswith(
        "in openvino int8, where it is fastest, 2.00x as fast as the best dense alternative, openvino int8 "
        "(2.00 to 2.00)"
    )
    assert found.to_json()["best_pruned"]["metric"] == 0.838


def test_times_whose_bounds_meet_are_a_tie():
    around = np.array([0.9, 0.95, 1.0, 1.0, 1.05, 1.1])
    both = (one(PRUNED, "deepsparse fp32", 1234.0, asked=True), one(DENSE, "openvino fp32", 1234 * around))
    assert verdict(standing(Alternatives(both, {}))) == (
        "The pruned network in deepsparse fp32 and the dense one in openvino fp32 can't be told apart (1234 against "
        "1234 ms; 95% bounds of their ratio 0.90 to 1.10): pruning buys no speed over that."
    )


def test_the_bounds_hold_the_truth_when_a_noisy_alternative_is_slightly_faster():
    """Paired visits: drift that hits both at once must not hide a difference of 5 %."""
    random = np.random.default_rng(3)
    drift = np.exp(np.cumsum(0.05 * random.standard_normal(25)))
    noise = np.exp(0.01 * random.standard_normal((2, 25)))
    both = Alternatives(
        (
            one(PRUNED, "deepsparse fp32", 10.5 * drift * noise[0], asked=True),
            one(DENSE, "openvino fp32", 10.0 * drift * noise[1]),
        ),
        {},
    )
    assert verdict(standing(both)).startswith("The dense network in openvino fp32 is 1.0")


def test_the_headline_names_the_precision_of_the_dense_network_and_not_that_of_the_pruned_one():
    found = standing(
        Alternatives(
            (
                one(PRUNED, "onnxruntime int8", 10.0, asked=True), one(DENSE, "onnxruntime fp32", 40.0, asked=True),
                one(DENSE, "openvino int8+bf16", 15.0),
            ),
            {},
        )
    )  # fmt: skip
    assert headline(4.0, 3.9, 4.1, found) == (
        "4.00x as fast as the dense network in onnxruntime fp32 (3.90 to 4.10); 1.50x as fast as the best dense "
        "alternative, openvino int8+bf16 (1.50 to 1.50)"
    )


@pytest.mark.parametrize(("elsewhere", "name"), [(0.98, "deepsparse fp32"), (0.7, "onnxruntime fp32")])
def test_the_runtime_that_was_asked_for_counts_unless_another_is_faster_for_sure(elsewhere: float, name: str):
    around = np.array([0.9, 0.95, 1.0, 1.0, 1.05, 1.1])
    narrow = one(PRUNED, "onnxruntime fp32", 20 * elsewhere * around[::-1])
    asked = one(PRUNED, "deepsparse fp32", 20 * around, asked=True)
    found = standing(Alternatives((asked, one(DENSE, "deepsparse fp32", 50.0, asked=True), narrow), {}))
    assert found.pruned.name == name
    assert found.pruned_here is asked
    assert ("where it is fastest" in headline(2.5, 2.4, 2.6, found)) == (found.pruned is narrow)


def test_one_lucky_visit_is_not_the_fastest():
    """What was measured once, before the machine slowed down, is no opponent of what was measured six times."""
    found = standing(machine(one(DENSE, "onnxruntime fp32", np.array([15.0]), 0.9), metric=0.9, dense_metric=0.9))
    assert found.dense.name == "deepsparse fp32" and found.times == pytest.approx(2.5)
