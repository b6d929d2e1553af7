"""An engine that goes on only as far as the test lets it."""

from __future__ import annotations

from collections.abc import Sequence

from tests.support.engine_harness import EngineHarness, continuation
from tests.support.manual_stream import ManualStream


class HandDriven(EngineHarness):
    """A harness on `ManualStream`s; the engine launches steps ahead as soon as it may."""

    def __init__(self, **options: float) -> None:
        super().__init__(make_stream=ManualStream, **options)  # type: ignore[arg-type]

    def step(self, count: int = 1) -> None:
        """Lets steps run, and after each the engine take a turn."""
        for _ in range(count):
            self.stream("compute").run(1)
            self.turn()

    def finish(self) -> None:
        """Runs everything to its end."""
        self.turn()
        for _ in range(400):
            if self.engine.idle:
                return
            self.stream("load").run()
            self.stream("store").run()
            self.step()
        raise AssertionError("the engine never comes to rest")

    def goes_on_rightly(self, session_id: str, log: Sequence[int]) -> bool:
        """Returns whether a session has this log and generates what follows it."""
        if self.session(session_id).tokens != list(log):
            return False
        request = self.submit(session_id, [3], max_tokens=3)
        self.finish()
        return self.generation(request).tokens == continuation([*log, 3], 3)

    def stream(self, name: str) -> ManualStream:
        """Returns the stream called compute, load or store."""
        stream = self.streams[name]
        assert isinstance(stream, ManualStream)
        return stream
