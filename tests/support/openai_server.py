"""A fake OpenAI-compatible server whose streams have the form of vLLM 0.32's.

It also runs as a program, `python openai_server.py PORT`, for tests of what starts systems.
"""

import asyncio
import json
import sys
from dataclasses import dataclass, field

from aiohttp import web

MODEL = "fake"
FIRST_ID = 1000
VOCAB_SIZE = 49_152


@dataclass
class FakeOpenAI:
    """What it is told and how it behaves.

    Attributes:
        requests: Bodies of completions, in order.
        headers: Of the same.
        token_ids: It tells the ids of its tokens when asked to.
        cached_tokens: It says that so many of a prompt's tokens were cached; None: it does not say.
        continuous_usage: It sends running counts when asked to.
        tokens_per_chunk: So many at a time.
        cut_after: Chunks until the connection goes away; None: it stays.
        refuse: Status, body and headers of the next answers, in place of completions.
    """

    requests: list[dict] = field(default_factory=list)
    headers: list[dict] = field(default_factory=list)
    token_ids: bool = True
    cached_tokens: int | None = 0
    continuous_usage: bool = True
    tokens_per_chunk: int = 1
    cut_after: int | None = None
    refuse: list[tuple[int, str, dict]] = field(default_factory=list)
    _runner: web.AppRunner | None = None
    url: str = ""

    async def __aenter__(self):
        await self.start(0)
        return self

    async def start(self, port):
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/completions", self._completions)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def __aexit__(self, *exc_info):
        if self._runner is not None:
            await self._runner.cleanup()

    async def _models(self, request):
        return web.json_response(
            {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}]}
        )

    async def _completions(self, request):
        body = json.loads(await request.read())
        self.requests.append(body)
        self.headers.append(dict(request.headers))
        if self.refuse:
            status, text, headers = self.refuse.pop(0)
            return web.Response(status=status, text=text, headers=headers)
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await answer.prepare(request)
        prompt = body["prompt"]
        if isinstance(prompt, list) and max(prompt) >= VOCAB_SIZE:
            # vLLM has begun its stream by then.
            message = f"Token id {max(prompt)} is out of vocabulary"
            error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
            await _send(answer, {"error": error})
            await answer.write(b"data: [DONE]\n\n")
            return answer
        prompt_tokens = len(prompt) if isinstance(prompt, list) else len(prompt.split())
        sent = chunks = 0
        while sent < body["max_tokens"]:
            if chunks == self.cut_after:
                request.transport.close()
                return answer
            count = min(self.tokens_per_chunk, body["max_tokens"] - sent)
            ids = [FIRST_ID + sent + n for n in range(count)]
            sent += count
            chunks += 1
            await _send(answer, self._chunk(body, prompt, prompt_tokens, ids, sent))
        usage = _usage(prompt_tokens, sent)
        if self.cached_tokens is not None:
            cached = min(self.cached_tokens, prompt_tokens - 1)
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        await _send(answer, _envelope(choices=[], usage=usage))
        await answer.write(b"data: [DONE]\n\n")
        return answer

    def _chunk(self, body, prompt, prompt_tokens, ids, sent):
        choice = {
            "index": 0,
            "text": "".join(f" w{number}" for number in ids),
            "logprobs": None,
            "finish_reason": "length" if sent == body["max_tokens"] else None,
            "stop_reason": None,
            "prompt_token_ids": None,
            "token_ids": None,
        }
        if body.get("return_token_ids") and self.token_ids:
            choice["token_ids"] = ids
            choice["prompt_token_ids"] = prompt if sent == len(ids) else None
        chunk = _envelope(choices=[choice])
        if body["stream_options"].get("continuous_usage_stats") and self.continuous_usage:
            chunk["usage"] = _usage(prompt_tokens, sent)
        return chunk


def _envelope(**more):
    return {
        "id": "cmpl-9c52048972a8fca6",
        "object": "text_completion",
        "created": 1,
        "model": MODEL,
        **more,
    }


def _usage(prompt_tokens, sent):
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + sent,
        "completion_tokens": sent,
    }


async def _send(answer, data):
    await answer.write(b"data: " + json.dumps(data).encode() + b"\n\n")


async def _serve(port):
    await FakeOpenAI().start(port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1])))
