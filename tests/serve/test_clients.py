"""The `openai` client, as its users call it."""

import asyncio
from typing import Any

import openai
import pytest

CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
FREE: dict[str, Any] = {"extra_body": {"ignore_eos": True}}


def test_the_openai_client(each_server) -> None:
    with openai.OpenAI(base_url=f"{each_server.url}/v1", api_key="none", max_retries=0) as client:
        done = client.completions.create(model="tiny", prompt="x", max_tokens=5, seed=1, **FREE)
        assert done.usage is not None
        assert (done.usage.completion_tokens, done.choices[0].finish_reason) == (5, "length")
        asked: Any = {"model": "tiny", "messages": CHAT, "max_completion_tokens": 6, "seed": 1}
        said = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, **FREE)
        content = said.choices[0].logprobs.content
        assert len(content) == 6
        assert content[0].bytes is not None
        assert len(content[0].top_logprobs) == 2
        stream = client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, **FREE
        )
        *chunks, last = stream
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == said.choices[0].message.content
        assert last.usage is not None
        assert last.usage.completion_tokens == 6
        # The client's helper that puts a stream together again.
        with client.chat.completions.stream(**asked, **FREE) as helper:
            helped = [event.delta for event in helper if event.type == "content.delta"]
        assert "".join(helped) == text
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**asked, top_p=7)
        assert bad.value.param == "top_p"
        with pytest.raises(openai.NotFoundError, match="there is 'tiny'"):
            client.completions.create(model="gpt", prompt="x")
        assert client.models.retrieve("tiny").id == "tiny"


def test_the_async_openai_client(server) -> None:
    async def ask_all() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def one(seed: int) -> str:
                stream = await client.completions.create(
                    model="tiny", prompt="x", max_tokens=8, seed=seed, stream=True, **FREE
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            several = await asyncio.gather(*(one(seed % 6) for seed in range(12)))
            return [*several, await one(0), await one(1)]

    texts = asyncio.run(ask_all())
    assert texts[:6] == texts[6:12]
    assert texts[:2] == texts[12:]
    assert len(set(texts)) == 6
