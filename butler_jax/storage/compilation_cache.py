"""JAX's persistent compilation cache: what one process compiled, later ones read.

The commands use it unasked, `import butler_jax` does not. `use_compilation_cache` is for notebooks and scripts.

JAX writes an entry in place, and never again where a file of its name exists. A process that is killed meanwhile would
leave an entry that every later process warns about. So new entries are checked before the cache is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import zlib
from pathlib import Path

VARIABLE = "BUTLER_COMPILATION_CACHE"
OFF = "off"
MOST_BYTES = 4 << 30
"""The size above which the entries that were not used for longest are removed."""

BEING_WRITTEN = 60.0
"""Seconds for which an entry may still be written."""

ZSTANDARD = b"\x28\xb5\x2f\xfd"
"""The first bytes of what zstandard compressed."""

CHECKED = "checked"
"""The file whose time of change says up to when entries were checked."""


def default_cache() -> Path:
    """The directory in the user's cache. Processors with other instructions have another one.

    A home directory may be shared between machines, and a program for one processor may not run on another.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    place = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return place / "butler-jax" / f"programs-{_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        told = " ".join(os.uname()[3:])
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def choose_cache(asked: str | None = None) -> Path | None:
    """The directory of the cache; None where it is off, or is JAX's own affair.

    `asked` comes first, then the variable BUTLER_COMPILATION_CACHE, then JAX_COMPILATION_CACHE_DIR, which JAX reads
    itself. Either of the former is "off" or a directory.
    """
    asked = asked or os.environ.get(VARIABLE)
    if asked == OFF or (not asked and "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return None
    return Path(asked).expanduser() if asked else default_cache()


def prepare_cache(asked: str | None = None) -> Path | None:
    """Make the environment variables say to JAX, before it is imported, which cache it uses; returns that of ours.

    Args:
        asked: "off", a directory, or None, as of `choose_cache`.

    Raises:
        OSError: The directory that was asked for cannot be written.
    """
    directory = choose_cache(asked)
    if (asked or os.environ.get(VARIABLE)) == OFF:
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if directory is None:
        return None
    try:
        _open(directory)
    except OSError:
        if asked or os.environ.get(VARIABLE):
            raise
        return None  # a home that cannot be written, as in a container: without a cache then
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    return directory


def use_compilation_cache(directory: str | Path | None = None) -> Path | None:
    """Read what earlier processes compiled, and keep what this one compiles: one line for notebooks and scripts.

    It changes JAX's settings for the whole process. `import butler_jax` does not.

    Args:
        directory: Default: that of the variable BUTLER_COMPILATION_CACHE or JAX_COMPILATION_CACHE_DIR, else
            butler-jax/ in the user's cache ($XDG_CACHE_HOME, or ~/.cache). "off" turns the cache off.

    Returns:
        The directory; None where the cache is off, or the default cannot be written.

    Raises:
        OSError: A directory that was asked for cannot be written.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if directory is not None and str(directory) != OFF:
        os.environ.pop("JAX_ENABLE_COMPILATION_CACHE", None)  # of an earlier call that turned the cache off
    found = prepare_cache(None if directory is None else str(directory))
    enabled = os.environ.get("JAX_ENABLE_COMPILATION_CACHE") != "false"
    jax.config.update("jax_enable_compilation_cache", enabled)
    if found is not None:
        jax.config.update("jax_compilation_cache_dir", str(found))
        least = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    compilation_cache.reset_cache()  # JAX decides at its first compilation, and keeps to it
    of_jax = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    found = Path(of_jax) if found is None and of_jax else found
    return found if enabled else None


def _open(directory: Path) -> None:
    """Make the directory, remove damaged entries, and make room. Raises OSError where it cannot be written."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = directory.stat()
    if state.st_uid != os.getuid() or not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(
            f"the compilation cache {directory} is not yours, or cannot be written; give --compilation-cache another "
            f"directory, or {OFF}"
        )
    marker = directory / CHECKED
    now = time.time()
    since = marker.stat().st_mtime if marker.exists() else 0.0
    if since > now:  # the clock was set back: what was written since has an earlier time
        since = 0.0
    entries = {}
    for path in directory.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process removed it
            entries[path] = path.stat()
    for path, about in list(entries.items()):
        if since <= about.st_mtime < now - BEING_WRITTEN and not _is_whole(path):
            path.unlink(missing_ok=True)
            del entries[path]
    total = sum(about.st_size for about in entries.values())
    for path in sorted(entries, key=lambda one: max(entries[one].st_atime, entries[one].st_mtime)):
        if total <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= entries[path].st_size
    marker.touch()
    os.utime(marker, (now - BEING_WRITTEN, now - BEING_WRITTEN))


def _is_whole(path: Path) -> bool:
    """Whether an entry can be decompressed; JAX takes zstandard where that is installed, else zlib."""
    try:
        content = path.read_bytes()
        if content[:4] != ZSTANDARD:
            zlib.decompress(content)
        else:
            import zstandard

            zstandard.ZstdDecompressor().decompress(content)
    except (OSError, ImportError):  # it is gone, or JAX cannot read it either
        return True
    except Exception:  # zlib.error and ZstdError have no common class
        return False
    return True
