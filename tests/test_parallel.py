from __future__ import annotations

import threading

import pytest

from compat_restore.checkpoint.parallel import for_each

MUCH = 1 << 30


@pytest.mark.parametrize("size", [0, MUCH])
def test_every_part_is_taken_once(size):
    done = []
    for_each(range(1000), lambda part, _stopped: done.append(part), size=size)
    assert sorted(done) == list(range(1000))


def test_little_work_starts_no_thread():
    threads = set()
    for_each(range(10), lambda _part, _stopped: threads.add(threading.get_ident()), size=10)
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("size", [0, MUCH])
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_the_first_failure_stops_the_others_and_is_raised(size, kind):
    done = []

    def work(part, stopped):
        done.append(part)
        if part == 3:
            raise kind
        assert isinstance(stopped(), bool)

    with pytest.raises(kind):
        for_each(iter(range(100_000)), work, size=size)
    assert len(done) < 100_000


def test_a_part_in_another_thread_learns_that_it_may_stop():
    began, seen = threading.Event(), []

    def work(part, stopped):
        if part == "slow":
            began.set()
            while not stopped():
                pass
            seen.append(True)
        else:
            began.wait()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        for_each(["slow", "failing"], work, size=MUCH)
    assert seen == [True]


def test_parts_that_cannot_be_made_are_an_error():
    def parts():
        yield 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        for_each(parts(), lambda _part, _stopped: None, size=MUCH)
