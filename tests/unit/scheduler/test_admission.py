from __future__ import annotations

import pytest

from services.common.errors import ExhaustedError
from services.scheduler.admission import admit
from services.scheduler.domain import Phase
from services.scheduler.policy.view import NoSessions, SystemView


class Some(NoSessions):
    def count(self, phase):
        return {Phase.OPEN: 1, Phase.COMPUTE: 2, Phase.IO_WAIT: 3, Phase.CLOSED: 100}[phase]


def test_without_a_limit_everybody_is_admitted():
    admit(SystemView(sessions=Some()), None)


def test_below_the_limit_one_is_admitted():
    admit(SystemView(sessions=Some()), 7)


def test_at_the_limit_none_is_and_the_error_says_when_to_retry():
    with pytest.raises(ExhaustedError, match="6 sessions are open and the limit is 6") as caught:
        admit(SystemView(sessions=Some()), 6)
    assert caught.value.retry_after_s is not None
    assert caught.value.metadata == {"limit": "6"}
