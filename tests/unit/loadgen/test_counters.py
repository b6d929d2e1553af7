import pytest

from loadgen import counters


class Server:
    """Answers in turn, and then the last answer again; None: it is away."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = 0

    async def __call__(self):
        self.asked += 1
        told = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if told is None:
            return {}
        answer_s, report_s, evictions = told
        stats = {"evictions": evictions, "answer_time_s": answer_s}
        return stats if report_s is None else stats | {"report_time_s": report_s}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(counters, "_FIRST_PAUSE_S", 0.0)


async def test_two_reports_after_the_first_answer_are_waited_for():
    # What was reported at 10.5 may have been counted before the end at 10.
    server = Server((10.0, 9.2, 1), (10.2, 9.2, 1), (10.6, 10.5, 2), (10.8, 10.5, 2), (12, 11.5, 3))
    stats, settled = await counters.settled(server)
    assert settled
    assert stats["evictions"] == 3
    assert server.asked == 5


async def test_a_server_that_is_away_is_asked_again():
    server = Server(None, (10.0, None, 0), None, (11.2, 11.1, 4), (12.2, 12.1, 5))
    stats, settled = await counters.settled(server)
    assert (stats["evictions"], settled) == (5, True)


async def test_without_a_new_report_it_ends_and_says_so():
    stats, settled = await counters.settled(Server((10.0, 9.5, 1)), timeout_s=0.02)
    assert (stats["evictions"], settled) == (1, False)


async def test_counters_without_times_are_up_to_date():
    async def ask():
        return {"evictions": 7.0}

    assert await counters.settled(ask) == ({"evictions": 7.0}, True)
