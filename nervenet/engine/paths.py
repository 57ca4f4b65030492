"""Which way a result is computed: by the plain mathematics alone, or by the fastest way that serves; and which way that was.

    with nervenet.plain():                  only what the files of mathematics say, line by line
        predict(model, x)

    with paths_taken() as taken:            a set of names: 'winograd_2d', 'im2col', …
        model.forward(x)

Whatever has a fast path asks `only_plain()` before it takes it, and calls `note` with its name.
"""

import contextlib
import contextvars

_plain = contextvars.ContextVar('the plain mathematics only', default=False)
_taken = contextvars.ContextVar('sets of names of the paths taken', default=())


@contextlib.contextmanager
def plain():
    """Within this context everything is computed by the plain mathematics: no fast path, nothing fused. For reading and tests."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def only_plain():
    """Say whether the code runs within `plain`."""
    return _plain.get()


@contextlib.contextmanager
def paths_taken():
    """Yield a set to which, within this context, the name of each path is added when it is taken."""
    taken = set()
    token = _taken.set((*_taken.get(), taken))
    try:
        yield taken
    finally:
        _taken.reset(token)


def note(name):
    """Write down that the path `name` is taken, if anybody wants to know."""
    for taken in _taken.get():
        taken.add(name)
