"""Which files a text: source names, and how each of them is read."""

from __future__ import annotations

import atexit
import functools
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from butler_jax.data.sources.features import split_features
from butler_jax.data.sources.streams import inner_name, open_text, read_blocks
from butler_jax.storage import file_in, parse_object, read_object, writing

KINDS = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "records"),
    ".parquet": "parquet",
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
}
"""How files of a directory are read, by their suffix without that of a compression."""

ABOUT = {"readme", "license", "licence", "changelog"}
"""Names of texts about a data set."""


@dataclass(frozen=True)
class TextFile:
    """A file and how it is read.

    Attributes:
        path: Where it is.
        kind: "text", "records" (a JSON object a line), "parquet" or "arrow".
        features: The features that the user named.
        split: The split that the whole file belongs to; None where its end is held out.
        name: Its name in the prepared set.
    """

    path: Path
    kind: str
    features: tuple[str, ...] = ()
    split: str | None = None
    name: str = ""


def find_files(paths: Sequence[str | os.PathLike[str]], say: Callable[[str], None]) -> list[TextFile]:
    """Find the files of `paths` in order; those of a directory in alphabetical order.

    Args:
        paths: Files, directories, patterns such as novels/*.txt, data sets that `datasets` saved, and - for standard
            input. PATH#FEATURE names a feature, and PATH#FEATURE+FEATURE several. A path that names none has those of
            the last one, which do not concern its plain text.
        say: Receives a line with the files of a directory that are passed over.

    Raises:
        FileNotFoundError: A path does not exist.
        ValueError: A file cannot be read as text, a directory holds none that can, or a file is named with different
            features.
    """
    if not paths:
        raise ValueError("no text files given: write text:PATH or text:PATH,PATH.")
    named = [_features_of(str(path)) for path in paths]
    files: list[TextFile] = []
    for given, features in named:
        asked = _Features(features, own=True) if features else _Features(named[-1][1], own=False)
        files += _files_of(given, asked, say)
    found: dict[Path, TextFile] = {}
    for file in files:
        features = found.setdefault(file.path, file).features
        if features != file.features:
            raise ValueError(
                f"{file.path} is named twice, with the features {'+'.join(features) or '(default)'} and "
                f"{'+'.join(file.features) or '(default)'}; name it once: #FEATURE+FEATURE joins several"
            )
    return list(found.values())


@dataclass(frozen=True)
class _Features:
    """The features of a path: its own, or those of the last path."""

    names: tuple[str, ...]
    own: bool

    def of(self, kind: str) -> tuple[str, ...]:
        """Those of a file of this kind."""
        return self.names if self.own or kind != "text" else ()


def _features_of(given: str) -> tuple[str, tuple[str, ...]]:
    return (given, ()) if os.path.exists(os.path.expanduser(given)) else split_features(given)


def _files_of(given: str, features: _Features, say: Callable[[str], None]) -> list[TextFile]:
    path = Path(os.path.expanduser(given))
    if given == "-":
        return [TextFile(_standard_input(), "records" if features.names else "text", features.names, name="-")]
    if path.is_dir():
        return list(_saved_set(path, features.names, say)) or _directory(path, features, say)
    if not path.exists() and glob.has_magic(given):
        found = sorted(each for each in map(Path, glob.glob(str(path), recursive=True)) if each.is_file())
        if not found:
            raise FileNotFoundError(f"no text file matches {path}")
        return _matched(path, found, features, say)
    if not path.exists():
        raise FileNotFoundError(f"no such text file or directory: {path}")
    if not path.is_file():
        raise ValueError(
            f"text:{path} is no regular file. A text is read several times: write it to a file, or give it to standard "
            "input (text:-)."
        )
    return [_named_file(path, features)]


def _matched(pattern: Path, found: list[Path], features: _Features, say: Callable[[str], None]) -> list[TextFile]:
    """The files that a pattern matches, without empty ones and those that are no text."""
    files, errors = [], []
    for path in found:
        try:
            files.append(_named_file(path, features))
        except ValueError as error:
            if _is_compressed(path):
                raise
            errors.append((path, error))
    if not files:
        raise errors[0][1]
    if errors:
        names = _list_few([path for path, _ in errors])
        say(f"text:{pattern} passes over {len(errors)} of {len(found)} files, which hold no text: {names}")
    return files


def _list_few(paths: list[Path]) -> str:
    """The first five paths, for a line that is read by people."""
    return ", ".join(map(str, paths[:5])) + (", ..." if len(paths) > 5 else "")


def _is_compressed(path: Path) -> bool:
    """Whether the name is that of a compressed file with text inside, which is damaged if it cannot be read."""
    return path.stat().st_size > 0 and inner_name(path) != path.name.lower()


def _named_file(path: Path, features: _Features) -> TextFile:
    """A file that the user named. Raises ValueError where it cannot be read as text."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty: it holds no text to read.")
    kind = _kind(path) or "text"
    file = TextFile(path.resolve(), kind, features.of(kind), name=path.name)
    _check(file)
    return file


def _kind(path: Path) -> str | None:
    """How a file is read, by its first bytes or its suffix; None for an unknown suffix."""
    with path.open("rb") as file:
        head = file.read(6)
    if head.startswith(b"PAR1"):
        return "parquet"
    if head == b"ARROW1":
        return "arrow"
    inner = inner_name(path)
    kind = KINDS.get(PurePath(inner).suffix)
    return "text" if kind in ("parquet", "arrow") and inner != path.name.lower() else kind


def _check(file: TextFile) -> None:
    """Raise ValueError for a file that is not what its kind says; says what to do."""
    if file.kind in ("parquet", "arrow"):
        return
    if file.kind == "text" and file.features:
        raise ValueError(f"{file.path} is plain text, which has no features: leave out #{'+'.join(file.features)}.")
    if file.kind == "records" and PurePath(inner_name(file.path)).suffix == ".json":
        first = next((block.data for block in read_blocks(file.path)), b"").split(b"\n", 1)[0]
        try:
            parse_object(first.removeprefix(b"\xef\xbb\xbf"), "the first line")
        except ValueError:
            raise ValueError(
                f"{file.path} does not hold a JSON object a line; convert it first, for example with jq -c '.[]' for a "
                "list of objects."
            ) from None
        return
    open_text(file.path).close()


def _directory(directory: Path, features: _Features, say: Callable[[str], None]) -> list[TextFile]:
    files, others = [], []
    for path in sorted(directory.rglob("*")):
        inside = path.relative_to(directory)
        if not path.is_file() or any(part.startswith(".") for part in inside.parts):
            continue
        kind = _kind(path) if path.stat().st_size else None
        file = TextFile(path.resolve(), kind or "text", features.of(kind or "text"), name=path.name)
        try:
            if kind is not None:
                _check(file)
        except ValueError:
            if _is_compressed(path):
                raise
            kind = None
        (others if kind is None else files).append((inside, file))
    if any(file.kind != "text" for _, file in files):
        about = [each for each in files if each[1].kind == "text" and each[0].stem.lower() in ABOUT]
        files, others = [each for each in files if each not in about], [*others, *about]
    names = _list_few([inside for inside, _ in others])
    if not files:
        has = f"; it holds {names}" if others else ""
        wanted = " with the feature " + "+".join(features.names) if features.names else ""
        raise ValueError(
            f"no text{wanted} in directory {directory}{has}. Files are read by their suffix: {', '.join(KINDS)}, also "
            "compressed. Name a file to read it whatever its suffix."
        )
    if others:
        say(
            f"text:{directory} passes over {len(others)} of {len(others) + len(files)} files: {names}. Name a file to "
            "read it whatever its suffix."
        )
    return [file for _, file in files]


def _saved_set(
    directory: Path, features: tuple[str, ...], say: Callable[[str], None], split: str | None = None
) -> Iterator[TextFile]:
    """The files of a data set, or of a dictionary of its splits, that `datasets` saved; none for another directory."""
    if (index := file_in(directory, "dataset_dict.json")) is not None:
        splits = [name for name in read_object(index).get("splits") or [] if isinstance(name, str)]
        parts = choose_splits(splits, f"text:{directory}")
        if others := [name for name in splits if name not in parts.values()]:
            say(f"text:{directory} passes over the splits {', '.join(others)}")
        for part, name in parts.items():
            yield from _saved_set(directory / name, features, say, part if len(parts) > 1 else None)
    elif (index := file_in(directory, "state.json")) is not None and file_in(directory, "dataset_info.json"):
        state = read_object(index)
        if state.get("_indices_data_files"):
            raise ValueError(
                f"{directory} is a selection of another data set; write it out with datasets.load_from_disk"
                "(DIRECTORY).flatten_indices().save_to_disk(ANOTHER)."
            )
        listed = state.get("_data_files")
        names = [each.get("filename") if isinstance(each, dict) else None for each in listed or ()]
        if not isinstance(listed, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{index} names no files; save the data set again.")
        for name in names:
            path = file_in(directory, name)
            if path is None:
                raise ValueError(f"{index} names {name}, which is not there; copy the whole directory again.")
            yield TextFile(path.resolve(), "arrow", features, split, path.name)


def choose_splits(splits: Sequence[str], source: str) -> dict[str, str]:
    """The data set's own name of the split "train", and that of "test" where it has a split to hold out.

    Raises:
        ValueError: There is no split train.
    """
    if "train" not in splits:
        raise ValueError(f"{source} has no split train (splits: {', '.join(splits) or 'none'}).")
    held_out = next((own for own in ("test", "validation") if own in splits), None)
    return {"train": "train"} | ({"test": held_out} if held_out else {})


@functools.cache
def _standard_input() -> Path:
    """Standard input, copied to a file that is removed at exit."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("text:- reads standard input, and nothing is piped into it; write for example zcat a.gz | ...")
    directory = tempfile.mkdtemp(prefix="butler-jax-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    path = Path(directory, "standard-input")
    with writing(path), path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    if path.stat().st_size == 0:
        raise ValueError(
            "text:- reads standard input, and it is empty; pipe the same text again, or name another (--text, --data)"
        )
    return path
