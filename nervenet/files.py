"""Files that are written whole or not at all, and folders to write them into.

A process can be killed at any moment, and a disk can be full. What is on the disk then must be the old content or the new one,
never half of it, and nothing of somebody else may have been overwritten.
"""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path, durable=True):
    """Open a binary file for writing that takes the name `path` when the block ends, and vanishes if the block fails.

    The new content lies in the same folder under a fixed name, `path` + '.partial': what a killed process leaves there
    is overwritten by the next attempt. One process at a time may write a given path. Raises OSError.

    With durable=False nothing waits for the disk: all of this then holds if the process is killed, but after a power failure a
    new file may be empty. That is for many files that can be made again, such as predicted masks.
    """
    path = Path(path)
    partial = path.with_name(path.name + '.partial')
    try:
        with open(partial, 'wb') as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())     # the content must be on the disk before the name points to it
        os.replace(partial, path)
    except BaseException:                   # also Ctrl-C
        partial.unlink(missing_ok=True)
        raise
    if durable and os.name == 'posix':
        with contextlib.suppress(OSError):  # some network folders refuse; the file itself is whole and on the disk
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)            # and so must be the new name
            finally:
                os.close(folder)


def make_folder(path, option):
    """Make the folder `path`, and those it lies in, unless it is there, to write into. Raises OSError, with a way out: `option`."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:                        # no permission, a file in the way, a disk that cannot be written
        raise OSError(f'{path}: cannot be made a folder ({error.strerror}); choose another {option}') from error
    if not os.access(path, os.W_OK):
        raise PermissionError(f'{path}: nothing can be written there; choose another {option}')


def refuse_content(path, option, but=(), or_else=''):
    """Raise FileExistsError if something lies in the folder `path` that would be mixed or overwritten, other than the names `but`."""
    path = Path(path)
    if path.is_file():
        raise FileExistsError(f'{path}: is a file, not a folder; choose another {option}')
    if path.is_dir() and {entry.name for entry in path.iterdir()} - set(but):
        raise FileExistsError(f'{path}: exists and is not an empty folder; choose another {option}{or_else}')
