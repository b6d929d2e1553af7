"""The numbers behind a decision about a waiting session, for traces and for operators."""

from __future__ import annotations

from dataclasses import dataclass

from services.scheduler.policy import cost
from services.scheduler.policy.cost import Costs
from services.scheduler.policy.order import forecast_of
from services.scheduler.policy.view import SessionView, SystemView


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why a session's KV is where it is.

    Attributes:
        costs: What each choice costs.
        source: What the forecast of its wake rests on; empty: there is none.
        early_s: When one in ten that have waited this long will have woken, in seconds from now.
        median_s: The same for half of them.
        late_s: The same for nine in ten.
        waited_s: For how long it has waited.
    """

    costs: Costs
    source: str
    early_s: float
    median_s: float
    late_s: float
    waited_s: float

    def attributes(self) -> dict[str, str | float]:
        """Returns the numbers by the names that they have in a trace."""
        costs = self.costs
        return {
            "djinn.decision.best": costs.best.value,
            "djinn.cost.keep_seconds": costs.keep_s,
            "djinn.cost.evict_seconds": costs.evict_s,
            "djinn.cost.drop_seconds": costs.drop_s,
            "djinn.cost.load_seconds": costs.load_s,
            "djinn.cost.prefill_seconds": costs.prefill_s,
            "djinn.cost.measured": costs.measured,
            "djinn.pressure.device": costs.device_pressure,
            "djinn.pressure.host": costs.host_pressure,
            "djinn.wait.waited_seconds": self.waited_s,
            "djinn.wait.remaining_seconds": costs.remaining_s,
            "djinn.wait.middle_seconds": costs.middle_s,
            "djinn.wait.early_seconds": self.early_s,
            "djinn.wait.median_seconds": self.median_s,
            "djinn.wait.late_seconds": self.late_s,
            "djinn.wait.source": self.source,
        }


def explain(session: SessionView, system: SystemView, now_s: float) -> Explanation | None:
    """Returns the numbers behind what is done about a session; None: no worker holds it."""
    worker = system.workers.get(session.worker_id)
    if worker is None:
        return None
    found = cost.costs(session, worker, system.sessions.middle_wake_s(worker.worker_id), now_s)
    forecast = forecast_of(session)
    if forecast is None:
        waited_s = max(0.0, now_s - session.last_active_s)
        return Explanation(found, "", *(found.remaining_s,) * 3, waited_s)
    early_s, median_s, late_s = (forecast.wake_s(share, now_s) - now_s for share in (0.1, 0.5, 0.9))
    waited_s = max(0.0, now_s - forecast.since_s)
    return Explanation(found, forecast.source.value, early_s, median_s, late_s, waited_s)
