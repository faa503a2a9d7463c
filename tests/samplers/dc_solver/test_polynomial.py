"""The compensation polynomial: the reference's numbers, exact fits, files, and where it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffplug.samplers.dc_solver.polynomial import CompensationPolynomial

# The one published polynomial (Stable Diffusion 2.1, 768 pixels), its 36 numbers to four decimals.
PUBLIC = [
    1523.6766, -1111.4746, 198.3835, -1346.0890, 1007.1949, -186.2548, 168.3973, -128.0389, 24.8848,
    -8140.6440, 5906.7483, -1035.9941, 6941.4139, -5193.9807, 950.3206, -848.2105, 650.6903, -121.2867,
    13309.2704, -9616.6703, 1668.7686, -11037.1078, 8256.6667, -1503.7992, 1293.9740, -999.5629, 188.2217,
    -6747.4218, 4853.1531, -835.5117, 5489.1152, -4096.8972, 743.0953, -619.5613, 480.1497, -90.8963,
]  # fmt: skip
CONFIGURATIONS = [(steps, scale) for steps in (5, 6, 8, 10, 15, 20) for scale in (3.0, 4.5, 7.5, 9.0)]


def mild(seed: int) -> np.ndarray:
    """Coefficients whose ratios stay near 1."""
    coefficients = np.random.default_rng(seed).normal(0, 0.02, (4, 3, 3))
    coefficients[0, 2, 2] += 1
    return coefficients


def by_definition(coefficients: np.ndarray, steps: int, scale: float) -> list[float]:
    n, c = steps / 50, scale / 12
    return [
        sum(
            x**k
            * sum(
                c ** (2 - j) * sum(n ** (2 - m) * coefficients[k, j, m] for m in range(3)) for j in range(3)
            )
            for k in range(4)
        )
        for x in (step / steps for step in range(3, steps + 1))
    ]


@pytest.mark.law
@given(st.integers(0, 1000), st.integers(5, 20), st.floats(3, 9))
@settings(max_examples=30, deadline=None)
def test_ratios_are_the_nested_polynomial(seed: int, steps: int, scale: float) -> None:
    polynomial = CompensationPolynomial(mild(seed).ravel())
    ratios = polynomial.ratios(steps, scale)
    assert ratios[:2] == [1.0, 1.0] and len(ratios) == steps
    assert ratios[2:] == pytest.approx(by_definition(mild(seed), steps, scale), abs=1e-12)


@pytest.mark.law
@pytest.mark.parametrize(
    ("steps", "scale", "wanted"),
    [
        (5, 7.5, [1, 1, 1.027, 0.739, 1.226]),
        (5, 4.5, [1, 1, 1.050, 0.637, 1.375]),
        (6, 6.0, [1, 1, 1.106, 0.925, 0.662, 1.301]),
        (8, 7.5, [1, 1, 0.694, 1.044, 1.010, 0.851, 0.825, 1.193]),
        (10, 7.5, [1, 1, 0.445, 0.898, 1.063, 1.043, 0.941, 0.861, 0.907, 1.182]),
    ],
)
def test_the_published_polynomial_gives_the_published_ratios(
    steps: int, scale: float, wanted: list[float], tmp_path: Path
) -> None:
    """The reference's own values, from its file; float32 is too coarse for the cancellation."""
    np.save(tmp_path / "sd2.1.npy", np.array(PUBLIC))
    ratios = CompensationPolynomial.load(tmp_path / "sd2.1.npy").ratios(steps, scale)
    assert ratios == pytest.approx(wanted, abs=1e-3)


@pytest.mark.law
def test_the_published_polynomial_is_trusted_where_it_is_tame() -> None:
    """In 5 to 20 steps and guidance 3 to 9 nothing has to be clipped; beyond, it reaches hundreds."""
    public = CompensationPolynomial(PUBLIC)
    for steps in range(5, 21):
        for scale in np.linspace(3, 9, 7).tolist():
            inside = by_definition(public.coefficients, steps, scale)
            assert all(0.3 < ratio < 1.6 for ratio in inside)
            assert public.ratios(steps, scale)[2:] == pytest.approx(inside, abs=1e-9)
    assert max(map(abs, by_definition(public.coefficients, 50, 15.0))) > 100
    with pytest.raises(ValueError, match="search ratios"):
        public.ratios(50, 15.0)


@pytest.mark.law
def test_a_fit_on_its_own_ratios_gives_the_coefficients_back() -> None:
    truth = CompensationPolynomial(mild(3))
    searched = {(steps, scale): truth.ratios(steps, scale) for steps, scale in CONFIGURATIONS}
    fitted = CompensationPolynomial.fit(searched, ridge=0.0)
    assert np.allclose(fitted.coefficients, truth.coefficients, atol=1e-7)
    assert (fitted.steps, fitted.guidance) == ((5, 20), (3.0, 9.0))


def test_searches_at_one_guidance_scale_are_enough_for_that_scale() -> None:
    truth = CompensationPolynomial(mild(4))
    searched = {(steps, 5.0): truth.ratios(steps, 5.0) for steps in (5, 6, 8, 10)}
    fitted = CompensationPolynomial.fit(searched)
    for steps in (5, 6, 8, 10):
        assert fitted.ratios(steps, 5.0) == pytest.approx(searched[steps, 5.0], abs=1e-3)
    with pytest.raises(ValueError, match="guidance_scale=7.5 lies outside 5 to 5"):
        fitted.ratios(6, 7.5)


@pytest.mark.law
def test_ratios_never_leave_the_trusted_range() -> None:
    wild = CompensationPolynomial(50 * mild(0))
    assert all(0.3 <= ratio <= 1.6 for ratio in wild.ratios(10, 7.5))


def test_files(tmp_path: Path) -> None:
    polynomial = CompensationPolynomial(mild(1), (5, 10), (5.0, 5.0))
    polynomial.save(tmp_path / "ours.json")
    again = CompensationPolynomial.load(tmp_path / "ours.json")
    assert np.array_equal(again.coefficients, polynomial.coefficients)
    assert (again.steps, again.guidance) == ((5, 10), (5.0, 5.0))
    np.save(tmp_path / "reference.npy", mild(1).ravel())
    public = CompensationPolynomial.load(tmp_path / "reference.npy")
    assert np.array_equal(public.coefficients, polynomial.coefficients)


@pytest.mark.parametrize(
    "steps, scale, name", [(4, 7.5, "num_inference_steps=4"), (50, 7.5, "=50"), (8, 12, "=12")]
)
def test_outside_its_range_it_refuses(steps: int, scale: float, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.* lies outside .* where this polynomial was fitted"):
        CompensationPolynomial(mild(0)).ratios(steps, scale)


def test_bad_files_are_refused_by_name(tmp_path: Path) -> None:
    np.save(tmp_path / "short.npy", np.zeros(35))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:90])
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "other.json").write_text('{"format": "something"}')
    (tmp_path / "newer.json").write_text('{"format": "compensation-polynomial", "version": 2}')
    (tmp_path / "lacking.json").write_text('{"format": "compensation-polynomial", "version": 1}')
    for name, said in {
        "short.npy": "35 coefficients",
        "cut.npy": "holds no compensation polynomial",
        "pickled.npy": "holds no compensation polynomial",
        "other.json": "'format' has to be",
        "newer.json": "update diffplug",
        "lacking.json": "'coefficients'",
    }.items():
        with pytest.raises(ValueError, match=said) as caught:
            CompensationPolynomial.load(tmp_path / name)
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="not finite"):
        CompensationPolynomial(np.full(36, np.nan))
    with pytest.raises(ValueError, match="3 ratios for 5 steps"):
        CompensationPolynomial.fit({(5, 7.5): [1.0, 1.0, 1.0]})
    with pytest.raises(ValueError, match="nothing to fit"):
        CompensationPolynomial.fit({})
