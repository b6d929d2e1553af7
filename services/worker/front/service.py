"""The InferenceService: protobuf in, protobuf out, everything else elsewhere."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from djinn.v1 import inference_service_pb2 as pb
from djinn.v1 import inference_service_pb2_grpc as pb_grpc
from services.common.errors import DjinnError, UnavailableError
from services.worker.front.convert import inference as convert
from services.worker.front.generator import Generator
from services.worker.front.metrics import WorkerMetrics
from services.worker.front.spans import SpanRecorder

if TYPE_CHECKING:
    import grpc


NAME = "djinn.v1.InferenceService"
register = pb_grpc.add_InferenceServiceServicer_to_server


class InferenceService(pb_grpc.InferenceServiceServicer):
    """Answers clients once it has been given a generator."""

    def __init__(self, worker_id: str, metrics: WorkerMetrics, spans: SpanRecorder) -> None:
        """Answers UNAVAILABLE until `open`."""
        self._worker_id = worker_id
        self._metrics = metrics
        self._spans = spans
        self._generator: Generator | None = None

    def open(self, generator: Generator) -> None:
        """Serves by `generator` from now on."""
        self._generator = generator

    async def Generate(
        self,
        request: pb.GenerateRequest,
        context: grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse],
    ) -> AsyncIterator[pb.GenerateResponse]:
        received_ns = time.time_ns()
        try:
            generator = self._ready()
            generator.check_open()
            checked = convert.generate_input(request, generator.model)
            generation = await generator.start(checked, received_ns, self._spans.current())
        except DjinnError as error:
            self._metrics.on_refused(error)
            raise
        try:
            while (event := await generation.next()) is not None:
                for response in convert.generate_responses(event):
                    yield response
        finally:
            # Also when the client has cancelled, or takes no more.
            generation.cancel()

    async def GetModel(
        self,
        request: pb.GetModelRequest,
        context: grpc.aio.ServicerContext[pb.GetModelRequest, pb.GetModelResponse],
    ) -> pb.GetModelResponse:
        return convert.model_response(self._ready().model, self._worker_id)

    def _ready(self) -> Generator:
        if self._generator is None:
            raise UnavailableError("the model is being loaded", retry_after_s=1.0)
        return self._generator
