"""What happens around every RPC handler: trace context in, errors out."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from grpc_status import rpc_status
from opentelemetry import context as otel_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.common.errors import DjinnError, InternalError
from services.common.status import status_from_error

_logger = logging.getLogger(__name__)
_propagator = TraceContextTextMapPropagator()
_BUG = "internal error; see the server's log"
_TRACE_HEADERS = ("traceparent", "tracestate")

# Handlers of all message types pass through here.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_UnaryHandler: TypeAlias = Callable[[Any, _Context], Awaitable[Any]]
_WritingHandler: TypeAlias = Callable[[Any, _Context], Awaitable[None]]
_YieldingHandler: TypeAlias = Callable[[Any, _Context], AsyncIterator[Any]]


class BoundaryInterceptor(grpc.aio.ServerInterceptor):
    """Makes a call's trace context current, and answers errors as `google.rpc.Status`.

    A `DjinnError` ends its call with its code, message and details. Any other exception is a bug:
    its stack goes to the log and the client is told no more than that. Cancellation passes.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        carrier = {
            key: value
            for key, value in handler_call_details.invocation_metadata or ()
            if key in _TRACE_HEADERS and isinstance(value, str)
        }
        if carrier:
            # Interceptors and handler of one call share a contextvars.Context of their own, which
            # ends with the call: nothing to detach.
            otel_context.attach(_propagator.extract(carrier))
        return _wrapped(handler, handler_call_details.method)


def _wrapped(handler: _Handler, method: str) -> _Handler:
    codecs = (handler.request_deserializer, handler.response_serializer)
    if handler.response_streaming:
        behavior: Any = handler.stream_stream if handler.request_streaming else handler.unary_stream
        guarded: Any = _guard(_written_out(behavior), method)
        make: Any = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
    else:
        behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
        guarded = _guard(behavior, method)
        make = (
            grpc.stream_unary_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_unary_rpc_method_handler
        )
    wrapped: _Handler = make(guarded, *codecs)
    return wrapped


def _written_out(behavior: _WritingHandler | _YieldingHandler) -> _WritingHandler:
    """Returns the handler as a coroutine that writes what an async generator would yield.

    gRPC would leave a generator whose call was cancelled to the garbage collector; here it is
    closed before the call's task ends, so that its `finally` blocks run in order.
    """
    if not inspect.isasyncgenfunction(behavior):
        return behavior  # type: ignore[return-value] # it is the writing kind

    async def write_out(request: Any, context: _Context) -> None:
        async with contextlib.aclosing(behavior(request, context)) as responses:
            async for response in responses:
                await context.write(response)

    return write_out


def _guard(behavior: _UnaryHandler, method: str) -> _UnaryHandler:
    async def guarded(request: Any, context: _Context) -> Any:
        try:
            return await behavior(request, context)
        except DjinnError as error:
            await _abort(context, error, method)
        except grpc.aio.AbortError:
            raise
        except NotImplementedError as error:
            # What a generated servicer does in a method that its subclass does not have.
            if context.code() is grpc.StatusCode.UNIMPLEMENTED:
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, str(error))
            _logger.exception("a bug in %s", method)
            await _abort(context, InternalError(_BUG), method)
        except Exception:
            _logger.exception("a bug in %s", method)
            await _abort(context, InternalError(_BUG), method)

    return guarded


async def _abort(context: _Context, error: DjinnError, method: str) -> None:
    if isinstance(error, InternalError):
        _logger.error("%s: %s", method, error.message)
    if context.done():
        # The client went away first; nobody is left to be told.
        return
    await context.abort_with_status(rpc_status.to_status(status_from_error(error)))
