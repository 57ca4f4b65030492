"""Subnormal numbers are 0 within steps, in every thread that takes part, and in none that was there before."""

import platform
import sys
import threading
import time

import numpy
import pytest

from nervenet.engine import subnormals
from nervenet.engine.parallel import parallel_for, set_threads
from nervenet.engine.plan import planned
from nervenet.engine.subnormals import no_subnormals

pytestmark = pytest.mark.skipif(sys.platform != 'linux' or platform.machine() != 'x86_64', reason='subnormal numbers stay there')

SMALL = numpy.full(1000, 1e-38, 'float32')


def products():
    """Return the sum of products that are subnormal, and of a matrix product's terms: not 0, unless such numbers are."""
    return float((SMALL * numpy.float32(0.01)).sum()), float((SMALL.reshape(10, 100) @ numpy.full((100, 3), 1e-3, 'float32')).sum())


def gone(values):
    return values == (0, 0)


def of_threads(number=2):
    """Return what `products` gives in each of some threads."""
    met = threading.Barrier(number, timeout=20)
    with set_threads(number):
        return parallel_for(range(number), lambda block: (met.wait(), products())[1])


def test_they_are_0_within_and_not_after():
    assert not gone(products())
    with no_subnormals():
        assert gone(products())
        with no_subnormals():
            assert gone(products())
        assert gone(products())
    assert not gone(products())
    with pytest.raises(KeyError), no_subnormals():
        raise KeyError
    assert not gone(products())


@pytest.mark.parametrize('first', [True, False])
def test_helpers_compute_as_their_caller_does(first):
    """Wherever a helper was started, and whatever it did before."""
    time.sleep(0.5)                                                         # the helpers of other tests are gone
    for within in (first, not first, first):
        if within:
            with no_subnormals():
                assert all(map(gone, of_threads()))
        else:
            assert not any(map(gone, of_threads()))


def test_threads_that_were_there_before_are_left_alone():
    found, within = [], threading.Event()
    thread = threading.Thread(target=lambda: (within.wait(20), found.append(products())))
    thread.start()
    with no_subnormals():
        assert gone(products())
        within.set()
        thread.join()
    assert not gone(found[0])


def test_a_step_has_none():
    class Model:
        pass

    with planned(Model(), 'a test'):
        assert gone(products())
    assert not gone(products())


def test_where_the_switch_is_not_known_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(subnormals, '_library', None)
    with no_subnormals():
        assert not gone(products())


def test_rounding_and_other_settings_stay_as_they_are():
    before = subnormals.environment()
    with no_subnormals():
        within = subnormals.environment()
    after = subnormals.environment()
    differ = int.from_bytes(before[subnormals.MXCSR:], 'little') ^ int.from_bytes(within[subnormals.MXCSR:], 'little')
    flags = 0x3F                                                            # of exceptions that have been met
    assert differ & ~flags == subnormals.FLUSH_TO_ZERO | subnormals.DENORMALS_ARE_ZERO
    assert (int.from_bytes(before[subnormals.MXCSR:], 'little') ^ int.from_bytes(after[subnormals.MXCSR:], 'little')) & ~flags == 0
