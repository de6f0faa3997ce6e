"""How close two runs must be, and where they part."""

from __future__ import annotations

import math
from typing import Any

from tests.helpers.runs import Result

TOLERANCE = 1e-5
"""Relative, in fp32; of a gradient by its largest element. One process's own rounding against float64 is about 1e-6."""


def differences(result: Result, expected: Result) -> dict[str, float]:
    """Relative differences by name: of every reported number both have, and of every gradient of step 1."""
    found: dict[str, float] = {}
    for kind in ("train", "valid"):
        for line, wanted in zip(getattr(result, kind), getattr(expected, kind), strict=False):
            assert line.get("split") == wanted.get("split")
            line, wanted = _flat(line), _flat(wanted)
            for name in wanted.keys() & line.keys() - {"split"}:
                found[f"{kind} {line['iteration']} {name}"] = _relative(line[name], wanted[name])
    for name, wanted in expected.gradients.items():
        error = (result.gradients[name].double() - wanted.double()).abs().max()
        found[f"gradient {name}"] = float(error / wanted.abs().max())
    return found


def assert_same(result: Result, expected: Result) -> None:
    """Fail with the worst difference where one is above the tolerance; the two must report the same quantities."""
    assert result.train
    assert result.valid
    assert _flat(result.train[0]).keys() >= _flat(expected.train[0]).keys()
    assert result.gradients.keys() == expected.gradients.keys()
    found = differences(result, expected)
    worst = max(found, key=lambda name: found[name] if math.isfinite(found[name]) else math.inf)
    assert found[worst] <= TOLERANCE, f"{worst}: relative difference {found[worst]:.1e}; all: {_largest(found)}"


def _flat(line: dict[str, Any]) -> dict[str, Any]:
    """A line with the report of each source among its fields."""
    sources = line.get("sources", {})
    apart = {f"{name} {of}": value for name, report in sources.items() for of, value in report.items()}
    return {name: value for name, value in line.items() if name != "sources"} | apart


def _relative(value: Any, wanted: Any) -> float:
    return abs(value - wanted) / abs(wanted) if wanted else abs(value)


def _largest(found: dict[str, float]) -> dict[str, float]:
    return dict(sorted(found.items(), key=lambda item: -item[1])[:5])
