"""The tables of growth, of a queue and of TPUs show what their files hold."""

from __future__ import annotations

import json

import pytest

from tests.documentation.pages import DOCS, REPOSITORY, tables

UNITS = {"seconds": "processor_seconds", "CPU seconds": "processor_seconds", "MiB": "peak_mib"}


def read(name: str) -> dict:
    return json.loads((REPOSITORY / "benchmarks" / name).read_text())


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def assert_rounded(text: str, value: float) -> None:
    """A number as a table shows it: its last digit is rounded."""
    digits = len(text.partition(".")[2])
    assert float(text.replace(",", "")) == pytest.approx(value, abs=0.5001 * 10.0**-digits), (text, value)


@pytest.mark.parametrize(("name", "base", "which"), [("growth.json", "tiny", 0), ("growth_qwen.json", "qwen.gguf", 1)])
def test_growth_is_that_of_the_files(name, base, which):
    report = read(name)
    known = {(row["pass"], row["tokens"]): row for row in report["rows"] if row["base"] == base}
    ours = [t for t in tables(DOCS / "measured" / "growth.md") if cells(t.splitlines()[0])[0] in UNITS]
    assert len(ours) == 4
    for table in ours[2 * which : 2 * which + 2]:
        head, _, *lines = map(cells, table.splitlines())
        unit = UNITS[head[0]]
        lengths = [int(cell.replace(",", "")) for cell in head[1:-2]]
        for kind, *numbers, exponent, newest in lines:
            for length, number in zip(lengths, numbers, strict=True):
                if number:
                    assert_rounded(number, known[kind, length][unit])
            assert_rounded(exponent, report["exponents"][base][kind][unit])
            assert_rounded(newest, report["exponents"][base][kind][f"{unit}_of_the_last_two"])


@pytest.mark.parametrize(("name", "tokens"), [("load.json", None), ("load_smollm2.json", {200: 239236, 24: 18733})])
def test_the_queue_is_that_of_the_file(name, tokens):
    rows = {row["name"]: row for row in read(name)["rows"]}
    for table in tables(DOCS / "measured" / "decoding.md"):
        lines = [cells(line) for line in table.splitlines()[2:]]
        found = {line[0].replace("`", "").replace("serve, 8 slots", "serve"): line[1:] for line in lines}
        if found.keys() != rows.keys() or (len(found["serve"]) == 5) != bool(tokens):
            continue
        for contender, shown in found.items():
            row = rows[contender]
            if tokens:
                assert int(shown[0]) == row["requests"]
                assert_rounded(shown[1], row["tokens_a_second"])
                assert_rounded(shown[2], row["tokens_a_processor_second"])
                assert_rounded(shown[4], (tokens[row["requests"]] + row["tokens"]) / row["seconds"][0])
            else:
                for number, of in zip(shown[:2], ("seconds", "processor_seconds"), strict=True):
                    for turn, seconds in zip(number.split(", "), row[of], strict=True):
                        assert_rounded(turn, row["tokens"] / seconds)
            assert shown[-2 if tokens else -1] == f"{row['answers_as_serve']} of {row['requests']}"
        return
    raise AssertionError(f"no table shows {name}")


def test_the_model_of_tpus_is_that_of_the_file():
    page = (DOCS / "measured" / "decoding.md").read_text()
    calls: dict[tuple, dict[int, dict]] = {}
    for row in read("tpu_model.json")["rows"]:
        calls.setdefault((row["chip"], row["context"], row["batch"]), {})[row["unit"]] = row
    for (chip, context, batch), by_unit in calls.items():
        case, row = f"| {chip} | {context:,} | {batch} |", by_unit[16]
        times = f"{1e6 * row['dense_seconds']:.1f} | {1e6 * row['seconds']:.1f} | {row['speedup']:.2f}x"
        assert f"{case} {times} | {100 * row['share_of_cap']:.0f} % |" in page
        speeds = " | ".join(f"{one['speedup']:.2f}x" for one in by_unit.values())
        assert f"{case} {speeds} |" in page


def test_recalled_mass_with_a_reach_is_that_of_the_file():
    rows = [row for row in read("quality/reach_smollm2.json")["rows"] if row["metric"] == "recalled_mass"]
    known = {(row["policy"], row["steps_with_reach"], row["context"]): row for row in rows}
    (table,) = (t for t in tables(DOCS / "measured" / "trials.md") if "windows of" in t.splitlines()[0])
    head, _, *lines = [cells(line) for line in table.splitlines()]
    for name, *shown in lines:
        for context, text in zip(head[1:], shown, strict=True):
            row = known[name.split(",")[0], 60 if "60" in name else 0, int(context.replace(",", ""))]
            for number, of in zip(text.split(" ± "), ("value", "error"), strict=True):
                assert_rounded(number, 100 * row[of])


def test_reaches_are_those_of_the_file():
    rows = [row for row in read("quality/reach_tiny.json")["rows"] if "reach" in row]
    known = {(row["length"], row["reach"], row["metric"]): row for row in rows}
    (table,) = (t for t in tables(DOCS / "measured" / "trials.md") if "`--reach`" in t.splitlines()[0])
    for length, reach, *shown in [cells(line) for line in table.splitlines()[2:]]:
        place = int(length.split()[0]), int(reach.replace(",", "")) if reach else None
        for text, (metric, scale) in zip(shown, (("over_dense", 100), ("js_divergence", 1000)), strict=True):
            row = known[*place, metric]
            for number, of in zip(text.split(" ± "), ("value", "error"), strict=True):
                assert_rounded(number, scale * row[of])
