"""The online fit against its definition: decayed sums, written out, and the best coefficients >= 0 for them."""

from __future__ import annotations

import random

import pytest

from scheduler import regression
from scheduler.regression import NonNegativeRidge

Sample = tuple[int, tuple[float, ...], float, float]


def by_definition(samples: list[Sample], num_terms: int, num_strata: int, kept: float) -> list[float]:
    gram = [[0.0] * num_terms for _ in range(num_terms)]
    moment = [0.0] * num_terms
    for stratum in range(num_strata):
        own = [sample for sample in samples if sample[0] == stratum]
        for age, (_, terms, value, unit) in enumerate(reversed(own)):
            for i in range(num_terms):
                moment[i] += kept**age * terms[i] * value / unit**2
                for j in range(num_terms):
                    gram[i][j] += kept**age * terms[i] * terms[j] / unit**2
    solution = [0.0] * num_terms
    for _ in range(5000):
        for i in range(num_terms):
            rest = moment[i] - sum(gram[i][j] * solution[j] for j in range(num_terms) if j != i)
            solution[i] = max(0.0, rest / (gram[i][i] * (1.0 + 1e-4))) if gram[i][i] else 0.0
    return solution


@pytest.mark.parametrize("most_weight", [1e60, 5.0])
def test_coefficients_are_those_of_the_decayed_sums(most_weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regression, "_MOST_WEIGHT", most_weight)
    rng = random.Random(0)
    model = NonNegativeRidge((1.0,) * 3, num_strata=3, forgetting=0.9)
    samples: list[Sample] = []
    for _ in range(60):
        stratum = rng.choice((0, 2))
        # The third term is 0 in one kind of sample, and falls where it is not.
        terms = (1.0, rng.uniform(0, 4), rng.uniform(0, 3) if stratum else 0.0)
        value = 2.0 + 0.7 * terms[1] - 0.2 * terms[2] + rng.gauss(0.0, 0.1)
        samples.append((stratum, terms, value, rng.uniform(0.5, 2.0)))
        model.accumulate(samples[-1][1], value, samples[-1][3], stratum)
    model.fit(5000)
    assert model.coefficients == pytest.approx(by_definition(samples, 3, 3, 0.9), rel=1e-6, abs=1e-9)
    assert model.coefficients[2] == 0.0 < model.coefficients[1]


def test_a_new_pace_is_kept_by_the_next_fit() -> None:
    model = NonNegativeRidge((1.0, 1.0))
    for rows in range(20):
        model.accumulate((1.0, rows), 3.0 + rows, 1.0)
    model.fit(2000)
    model.multiply(2.0)
    assert model.predict((1.0, 10.0)) == pytest.approx(26.0, rel=1e-2)
    model.fit(2000)
    assert model.predict((1.0, 10.0)) == pytest.approx(26.0, rel=1e-2)
