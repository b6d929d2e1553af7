"""Token ids to shown text: detokenizing and stop strings together."""

from __future__ import annotations

from services.worker.front.detokenize import Detokenizer
from services.worker.front.stop_strings import StopStrings


class TextStream:
    """The text of one generation, token by token."""

    def __init__(self, detokenizer: Detokenizer | None, stops: StopStrings | None = None) -> None:
        """Joins the two.

        Args:
            detokenizer: Makes text; None: the model has no tokenizer, and there is no text.
            stops: Ends the text; None: nothing does.
        """
        self._detokenizer = detokenizer
        self._stops = stops

    def push(self, token_ids: list[int]) -> tuple[int, str, str | None]:
        """Takes tokens until a stop string appears.

        Returns:
            How many of the tokens were taken, the text that is certain now, and the stop string
            that the last token taken has completed, if one has.
        """
        detokenizer = self._detokenizer
        if detokenizer is None:
            return len(token_ids), "", None
        if self._stops is None:
            return len(token_ids), "".join(map(detokenizer.push, token_ids)), None
        pieces = []
        for taken, token_id in enumerate(token_ids, start=1):
            cut = self._stops.push(detokenizer.push(token_id))
            pieces.append(cut.text)
            if cut.stop is not None:
                return taken, "".join(pieces), cut.stop
        return len(token_ids), "".join(pieces), None

    def flush(self) -> tuple[str, str | None]:
        """Returns the text still held back, since no more tokens come, and a stop string in it."""
        if self._detokenizer is None:
            return "", None
        text = self._detokenizer.flush()
        if self._stops is None:
            return text, None
        cut = self._stops.push(text)
        return (
            (cut.text, cut.stop) if cut.stop is not None else (cut.text + self._stops.flush(), None)
        )
