"""What a generation has sent and received, and how it is continued on another worker.

A token depends only on the context, the seed and its position, and the client draws the seed: so
the tokens received until a worker was lost are sent to its successor as context, and what follows
is what would have followed. Nothing is yielded twice. Text has a seam there, since a worker holds
back text that is not certain yet (part of a character, the beginning of a stop string) and its
successor sees only tokens:

- tokens at the end that brought no text yet are generated once more, so that the text they hold
  back appears;
- with stop strings the whole generation is run again from its prompt, as one may span the seam.

Tokens generated once more are compared with those yielded. Where another worker's arithmetic
makes them differ, it continues after all that was yielded, and only held-back text is lost.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Final

from djinn.v1 import inference_service_pb2
from djinn_client import _convert
from djinn_client._types import FinishReason, KvSource, Piece, PositionLogprobs, Usage

# A character is at most 4 bytes, and a byte is at least one token's: more tokens than this
# without text hold nothing back, they have none.
_MOST_HOLDING_TOKENS: Final = 8


class TokenLog:
    """A session's context as the client knows it.

    Attributes:
        ids: The token ids.
        is_shared: True if the worker is known to have the same; else the next request carries all.
    """

    def __init__(self, ids: Sequence[int] = (), *, is_shared: bool = True) -> None:
        self.ids = list(ids)
        self.is_shared = is_shared


class DivergedError(Exception):
    """Tokens generated once more are not those yielded before."""


class Transcript:
    """The state of one generation, over all its attempts.

    Args:
        template: The request, but for what depends on the log.
        new_context: Replaces the log; None: the log is continued.
        log: The session's log, kept up to date as the answer comes.
    """

    def __init__(
        self,
        template: inference_service_pb2.GenerateRequest,
        new_context: Sequence[int] | None,
        log: TokenLog,
    ) -> None:
        self._template = template
        self._new_context = new_context
        self._log = log
        self._prompt_length: int | None = None
        self._texts: list[str] = []
        self._characters = 0
        self._tokens_with_text = 0
        # Since the last resumption: tokens to see once more, characters to leave out.
        self._folded = 0
        self._expected: list[int] = []
        self._skip_characters = 0
        self._fold_all = False
        self.token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.finish_reason: FinishReason | None = None
        self.stop_string: str | None = None
        self.usage = Usage()
        self.kv = KvSource()
        self.queue_s = 0.0
        self.sends_full_context = False

    @property
    def text(self) -> str:
        """All text so far."""
        return "".join(self._texts)

    # --- sending ---------------------------------------------------------------------------------

    def next_request(self) -> inference_service_pb2.GenerateRequest:
        """Returns the request of the next attempt."""
        request = inference_service_pb2.GenerateRequest()
        request.CopyFrom(self._template)
        if self._prompt_length is not None:
            request.ClearField("append")
            self._plan_seam()
            context: Sequence[int] | None = self._log.ids
            if request.HasField("max_tokens"):
                request.max_tokens -= self._folded
        elif self._new_context is not None:
            context = self._new_context
        else:
            context = None if self._log.is_shared else self._log.ids
        if context is None:
            request.expected_context_length = len(self._log.ids)
        else:
            request.full_context.CopyFrom(_convert.token_ids_to_proto("full_context", context))
        self.sends_full_context = context is not None
        # What the worker makes of it is known once it has answered.
        self._log.is_shared = False
        return request

    def end_if_complete(self, eos_token_ids: Collection[int]) -> None:
        """Ends the generation here if the lost worker had only that left to say.

        Args:
            eos_token_ids: The model's own stop tokens.
        """
        if not self.token_ids or self._template.stop_strings or self._rewound() > 0:
            return
        last = self.token_ids[-1]
        stops = set(self._template.stop_token_ids)
        if not self._template.ignore_eos:
            stops.update(eos_token_ids)
        limit = self._template.max_tokens if self._template.HasField("max_tokens") else None
        if last in stops:
            self.finish_reason = FinishReason.STOP
        elif limit is not None and len(self.token_ids) >= limit:
            self.finish_reason = FinishReason.LENGTH
        else:
            return
        self._count_usage(inference_service_pb2.Usage())

    def fold_all(self) -> None:
        """Has the next attempt continue after all that was yielded."""
        self._fold_all = True

    def _rewound(self) -> int:
        """Returns how many yielded tokens are to be generated once more."""
        if self._fold_all:
            return 0
        if self._template.stop_strings:
            return len(self.token_ids)
        silent = len(self.token_ids) - self._tokens_with_text
        return silent if silent <= _MOST_HOLDING_TOKENS else 0

    def _plan_seam(self) -> None:
        assert self._prompt_length is not None
        again = self._rewound()
        self._folded = len(self.token_ids) - again
        self._expected = self.token_ids[self._folded :]
        replays_all = bool(self._template.stop_strings) and again > 0
        self._skip_characters = self._characters if replays_all else 0
        del self._log.ids[self._prompt_length :]
        self._log.ids.extend(self.token_ids[: self._folded])

    # --- receiving -------------------------------------------------------------------------------

    def on_started(self, started: inference_service_pb2.GenerateStarted) -> None:
        """Takes the first message of an attempt."""
        self.kv = _convert.kv_source_from_proto(started.kv)
        if self._prompt_length is not None:
            return
        self.queue_s = _convert.seconds_of(started.queue_duration)
        if self._new_context is not None:
            self._log.ids = list(self._new_context)
        self._log.ids.extend(started.appended_token_ids)
        self._prompt_length = len(self._log.ids)

    def on_delta(self, delta: inference_service_pb2.GenerateDelta) -> Piece | None:
        """Takes new tokens; returns what of them has not been yielded before, None if nothing.

        Raises:
            DivergedError: Tokens generated once more differ from those yielded.
        """
        piece = _convert.piece_from_proto(delta)
        known = min(len(self._expected), len(piece.token_ids))
        if list(piece.token_ids[:known]) != self._expected[:known]:
            raise DivergedError
        del self._expected[:known]
        self._log.ids.extend(piece.token_ids)
        skipped = min(self._skip_characters, len(piece.text))
        self._skip_characters -= skipped
        if known or skipped:
            piece = replace(
                piece,
                text=piece.text[skipped:],
                token_ids=piece.token_ids[known:],
                logprobs=piece.logprobs[known:],
                logits=piece.logits[known:],
            )
        if not piece.text and not piece.token_ids:
            return None
        self.token_ids.extend(piece.token_ids)
        self.logprobs.extend(piece.logprobs)
        if piece.text:
            self._texts.append(piece.text)
            self._characters += len(piece.text)
            self._tokens_with_text = len(self.token_ids) - len(self._expected)
        return piece

    def on_finished(self, finished: inference_service_pb2.GenerateFinished) -> None:
        """Takes the last message."""
        del self._log.ids[finished.context_length :]
        self._log.is_shared = len(self._log.ids) == finished.context_length
        self.finish_reason = _convert.finish_reason_from_proto(finished.reason)
        self.stop_string = finished.stop_string or None
        self._count_usage(finished.usage)

    def _count_usage(self, usage: inference_service_pb2.Usage) -> None:
        prompt_tokens = self._prompt_length or 0
        self.usage = Usage(
            prompt_tokens=prompt_tokens,
            cached_tokens=min(usage.cached_tokens, prompt_tokens),
            prefilled_tokens=usage.prefilled_tokens,
            completion_tokens=len(self.token_ids),
        )
