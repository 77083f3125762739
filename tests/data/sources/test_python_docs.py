"""The documentation of Python as a source."""

from __future__ import annotations

import pytest

from butler_jax.data.sources import passages, python_docs


def test_python_docs_reads_sources_without_importing_them(tmp_path, monkeypatch):
    long = "Text about something. " * 12
    package = tmp_path / "package"
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {{'loops': {long!r}, 'tiny': 'x'}}\n")
    for skipped in ("test", "site-packages", "idlelib"):
        (package / skipped).mkdir(parents=True)
        (package / skipped / "module.py").write_text(f'"""{long} skipped"""')
    (package / "__init__.py").write_text(f'raise SystemExit\n\ndef f(a, /, b):\n    """{long}"""\n')
    (package / "later.py").write_text(
        f'"""short"""\nclass A:\n    """{long}"""\n    def g(self):\n        """{long}g"""\n'
        f"add_newdoc('package', 'h', '''{long}h''')\n"
    )
    (package / "broken.py").write_text("def (:")
    monkeypatch.setattr(python_docs, "LIBRARIES", ())
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    documents = dict(python_docs.read_documents())
    # The second copy of `long`, as the docstring of A, is left out.
    assert documents == {
        "topic loops": long.strip() + "\n",
        "package": f"package.f(a, b)\n\n{long.strip()}\n",
        "package.later": f"package.later.A.g(self)\n\n{long}g\n\n\npackage.h\n\n{long}h\n",
    }


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    return python_docs.open_builder(str(tmp_path_factory.mktemp("docs")))


@pytest.mark.slow
def test_python_docs_is_megabytes_of_text_with_disjoint_splits(docs):
    train, test = docs.as_data_source("train"), docs.as_data_source("test")
    assert sum(len(record["text"]) for record in train) > 3_000_000
    assert len(test) >= 5
    assert not {record["source"] for record in train} & {record["source"] for record in test}
    assert max(len(record["text"].decode()) for record in train) <= passages.PASSAGE_CHARACTERS
