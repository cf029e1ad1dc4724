"""One run at a time in a folder."""

import contextlib
import fcntl
import sys
from collections.abc import Generator
from pathlib import Path

# Stays in the folder, empty: were it deleted, a third run could lock a new one beside a second that waits for the old.
LOCK = ".lock"


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = False) -> Generator[None]:
    """Hold the lock of a folder, which is created; with `wait`, as soon as no other run holds it.

    The kernel holds the lock (flock) and lets go of it when the process ends, whatever ended it. On NFS it holds
    between machines too, and that of a machine that died goes when the server gives it up. Where the file system has no
    locks, a line on standard error says so, and the run goes on without.

    Raises:
        BlockingIOError: Another run holds it, and `wait` is False.
        OSError: The folder cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab")
    except OSError as error:
        said = f"got {folder}: {error.strerror}"
        raise type(error)(f"Expected a folder that can be created and written to, {said}.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            what = f"Expected out to be a folder that no other run writes to, got out={folder}"
            raise BlockingIOError(f"{what}; wait for that run to end, or name another folder.") from None
        except OSError as error:
            print(f"No lock on {folder} ({error}): start no other run in it before this one ends.", file=sys.stderr)
        yield
