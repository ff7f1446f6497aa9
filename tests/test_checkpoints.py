"""support/checkpoints.py: what a signal does, and when."""

import signal
from types import SimpleNamespace

import pytest

from support import checkpoints
from support.program import Stopped

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.fixture
def inside():
    """Checkpoints of a run without any."""
    before = {s: signal.getsignal(s) for s in SIGNALS}
    run = SimpleNamespace(opt=SimpleNamespace(checkpoint_minutes=10))
    yield checkpoints.Checkpoints(run, {}, None)
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize('signum', SIGNALS)
def test_a_signal_inside_an_epoch_asks_for_a_checkpoint(inside, signum):
    with pytest.raises(RuntimeError, match='end'), inside.inside_epoch():
        assert not inside.due()
        signal.raise_signal(signum)
        assert inside.due()
        raise RuntimeError('end')


def test_a_signal_outside_of_an_epoch_stops_at_once(inside):
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)


def test_a_signal_after_the_last_step_stops_before_the_test(inside):
    reached = False
    with pytest.raises(Stopped) as e, inside.inside_epoch():
        signal.raise_signal(signal.SIGTERM)
        reached = True
    assert reached and e.value.signum == signal.SIGTERM
    inside.signals.clear()
    with inside.inside_epoch():
        signal.raise_signal(signal.SIGUSR1)  # which does not stop a run


def test_a_second_signal_stops_at_once_unless_torchrun_has_passed_the_first_on(inside):
    with pytest.raises(Stopped), inside.inside_epoch():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert inside.due()
        inside.asked -= checkpoints.SAME_SIGNAL + 1
        signal.raise_signal(signal.SIGTERM)
        pytest.fail('still running')
