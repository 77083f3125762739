"""Lines of task and text files that are no samples are named."""

import pytest

from butler_jax.data.sources.text import read_passages
from butler_jax.evaluation.tasks.local_tasks import read_samples


@pytest.mark.parametrize(
    "line",
    [
        b"\xff", b"[" * 200_000, b"NaN", b"\0", b"\xef\xbb\xbf{}", b'{"context": NaN, "continuation": "b"}',
        b'{"context": ["a"], "continuation": "b"}', b'{"context": "\\ud800", "continuation": "b"}',
        b'{"context": "a", "continuation": 1e400}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_sample_is_named_with_its_number(tmp_path, line):
    (tmp_path / "lambada_openai.jsonl").write_bytes(b'{"context": "a", "continuation": "b"}\n\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"lambada_openai\.jsonl, line 3") as caught:
        read_samples(tmp_path, "lambada")
    assert len(str(caught.value)) < 1000
    path = tmp_path / "text.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"text\.jsonl.*line 2"):
        list(read_passages(path))
