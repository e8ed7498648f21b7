from server.lora.pace import Pace


class Time:
    """A clock that moves as work is done, and the pauses that were made."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def pace(self, share: float) -> Pace:
        return Pace(share, clock=lambda: self.now, sleep=self.pauses.append)


def test_while_the_loop_is_busy_work_takes_its_share_and_no_more() -> None:
    time = Time()
    pace = time.pace(0.25)
    pace.is_busy = True
    with pace:
        for worked in (0.002, 0.004):
            time.now += worked
            pace.breathe()
        time.now += 0.001  # the last piece counts too
    assert [round(pause, 6) for pause in time.pauses] == [0.006, 0.012, 0.003]


def test_nobody_pauses_for_a_loop_that_is_idle_or_for_what_was_done_without_the_turn() -> None:
    time = Time()
    pace = time.pace(0.25)
    with pace:
        time.now += 1.0
    pace.is_busy = True
    time.now += 5.0
    with pace:
        time.now += 0.001
    assert [round(pause, 6) for pause in time.pauses] == [0.003]
