"""Training and sampling share the device by the time that they use."""

from collections.abc import Iterator

from manylora.scheduler.share import DeviceShare


def run(wants: Iterator[tuple[bool, bool]], train: float, decode: float) -> dict[str, float]:
    """Seconds that each got; every turn takes as long as its kind does."""
    share, used = DeviceShare(), {"training": 0.0, "sampling": 0.0}
    for training, sampling in wants:
        trains = share.trains_next(training=training, sampling=sampling)
        assert (training, sampling)[not trains]
        seconds = train if trains else decode
        share.charge(training=trains, seconds=seconds)
        used["training" if trains else "sampling"] += seconds
    return used


def test_both_get_half_of_the_time_whatever_a_turn_takes():
    for train, decode in ((1.0, 0.05), (0.01, 0.05), (0.05, 0.05)):
        used = run(iter([(True, True)] * 1000), train, decode)
        assert abs(used["training"] - used["sampling"]) <= max(train, decode) + 1e-9


def test_who_wants_it_alone_gets_it_and_owes_nothing():
    share = DeviceShare()
    for _ in range(100):
        assert share.trains_next(training=True, sampling=False)
        share.charge(training=True, seconds=1.0)
    turns = []
    for _ in range(10):  # the newcomer has nothing to catch up on
        turns.append(share.trains_next(training=True, sampling=True))
        share.charge(training=turns[-1], seconds=1.0)
    assert turns.count(True) == 5


def test_a_pause_after_each_long_batch_gains_nothing():
    """The trainer is away for one turn after each of its batches."""
    share, used, away = DeviceShare(), [0.0, 0.0], False
    for _ in range(2000):
        trains = share.trains_next(training=not away, sampling=True)
        away = trains
        used[trains] += 1.0 if trains else 0.05
        share.charge(training=trains, seconds=1.0 if trains else 0.05)
    assert abs(used[0] - used[1]) <= 1.1
