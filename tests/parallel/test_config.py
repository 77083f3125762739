"""Meshes, hosts and data from the command line."""

import pytest

from butler_jax.data.batches import parse_spec
from butler_jax.parallel.config import parse_hosts
from butler_jax.parallel.mesh import parse_mesh


def test_texts_of_the_command_line_are_read_or_refused():
    for text in ("data=" + "9" * 5000, "data=0", "data", "a=1", "data=-1", "data=\u00b2"):
        with pytest.raises(ValueError, match="mesh"):
            parse_mesh(text)
    assert parse_hosts("a.b:12,4,3") == ("a.b:12", 4, 3)
    for text in ("a:1,2,2", "a,1,0", "a:1,1", "a:123456,1,0", "a:1,9999999999,0"):
        with pytest.raises(ValueError, match="--distributed"):
            parse_hosts(text)
    for text in ("python_docs:0", "python_docs:" + "9" * 400, "text:", "x:1"):
        with pytest.raises(ValueError, match="data"):
            parse_spec(text)
