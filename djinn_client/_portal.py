"""An event loop in a thread, for code without one."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class Portal:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="djinn client", daemon=True
        )
        self._thread.start()

    @property
    def closed(self) -> bool:
        """True once `close` has ended the loop."""
        return self._loop.is_closed()

    def call(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """Runs a coroutine in the loop, in the caller's context, and returns its result.

        Raises:
            RuntimeError: The portal is closed.
        """
        if self.closed:
            coroutine.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            # Of no effect if the coroutine itself failed; else somebody pressed Ctrl-C.
            future.cancel()
            raise

    def call_sync(self, function: Callable[[], _Result]) -> _Result:
        """Runs a function in the loop's thread and returns its result."""

        async def run() -> _Result:
            return function()

        return self.call(run())

    def post(self, function: Callable[[], object]) -> None:
        """Runs a function in the loop's thread some time soon; nothing if the portal is closed."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        """Ends the loop and its thread. Idempotent."""
        if self.closed:
            return
        self.call(self._finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _finish(self) -> None:
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        if rest:
            await asyncio.wait(rest)
        await asyncio.get_running_loop().shutdown_asyncgens()
