"""What report.json holds, written and read back."""

from __future__ import annotations

import json
import math

import pytest

from butler_jax.evaluation.report.report import Report
from tests.tiny_reports import row


def test_a_value_that_is_not_finite_is_null_in_the_file(tmp_path):
    report = Report([row("perplexity", "perplexity", "streaming", 0.25, value) for value in (math.inf, 2.0)])
    path = report.save(tmp_path)
    assert [r["value"] for r in json.loads(path.read_text(), parse_constant=pytest.fail)["rows"]] == [None, 2.0]
    first, second = Report.load(path).rows
    assert math.isnan(first["value"]) and second["value"] == 2.0
