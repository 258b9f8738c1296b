"""LangChain, `llm` and lm-eval against a running server, as their users call them.

They run in an interpreter of their own, `$CLIENTS_PYTHON`: `make clients` installs them beside it.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import chat, complete

PYTHON = os.environ.get("CLIENTS_PYTHON", sys.executable)
TEXTS = ("It is a truth universally acknowledged", "It is a truth in those days. " * 12)


def run_client(code: str, *arguments: str, needs: str, **environment: str) -> Any:
    """What a program of a client prints, read as JSON; a skip where its package is missing."""
    if sys.executable == PYTHON and importlib.util.find_spec(needs) is None:
        pytest.skip(f"{needs} is not installed: `make clients` installs it and runs this test")
    settings = os.environ | {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "1"} | environment
    done = subprocess.run(
        [PYTHON, "-c", code, *arguments],
        env=settings, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


LANGCHAIN = """
import asyncio, json, sys
from langchain_openai import ChatOpenAI, OpenAI

options = dict(base_url=sys.argv[1] + "/v1", api_key="none", model="tiny", seed=1, max_tokens=8)
chat = ChatOpenAI(**options, extra_body={"ignore_eos": True})
said = chat.invoke([("system", "Be brief."), ("human", "Who?")])
streamed = "".join(chunk.content for chunk in chat.stream([("system", "Be brief."), ("human", "Who?")]))
batch = [one.content for one in asyncio.run(chat.abatch(["a", "b", "a"]))]
text = OpenAI(**options, extra_body={"ignore_eos": True}).invoke("Emma was")
print(json.dumps([said.content, said.usage_metadata["output_tokens"], streamed, batch, text]))
"""  # noqa: E501


def test_langchain(server) -> None:
    said, tokens, streamed, batch, text = run_client(
        LANGCHAIN, server.url, needs="langchain_openai"
    )  # fmt: skip
    options: Any = {"seed": 1, "max_tokens": 8, "ignore_eos": True}
    answer = chat(server, {"role": "system", "content": "Be brief."}, "Who?", **options)
    assert said == streamed == answer["choices"][0]["message"]["content"]
    assert tokens == 8
    assert batch[0] == batch[2] == chat(server, "a", **options)["choices"][0]["message"]["content"]
    options["temperature"] = 0.7  # LangChain's
    assert text == complete(server, "Emma was", **options)["choices"][0]["text"]


LLM = """
import json, subprocess, sys

command = [sys.executable, "-m", "llm", "-m", "served", "-n", "-o", "seed", "3", "-o", "max_tokens", "9"]
run = lambda *more: subprocess.run([*command, *more], check=True, capture_output=True, text=True).stdout
print(json.dumps([run("Who?"), run("Who?", "--no-stream"), run("Who?", "-s", "Be brief.")]))
"""  # noqa: E501


def test_llm(server, tmp_path: Path) -> None:
    model = {"model_id": "served", "model_name": "tiny", "api_base": f"{server.url}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    streamed, whole, told = run_client(LLM, needs="llm", LLM_USER_PATH=str(tmp_path))
    system = {"role": "system", "content": "Be brief."}
    for text, messages in ((streamed, ["Who?"]), (whole, ["Who?"]), (told, [system, "Who?"])):
        answer = chat(server, *messages, seed=3, max_tokens=9)
        assert text.strip() == answer["choices"][0]["message"]["content"].strip()


LM_EVAL = """
import json, sys
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

url, *texts = sys.argv[1:]
ask = lambda kind, *arguments: Instance(request_type=kind, doc={}, arguments=arguments, idx=0)
options = dict(model="tiny", tokenizer_backend="remote", num_concurrent=2)
lm = LocalCompletionsAPI(base_url=url + "/v1/completions", **options)
scores = lm.loglikelihood_rolling([ask("loglikelihood_rolling", text) for text in texts])
pairs = lm.loglikelihood([ask("loglikelihood", text[:7], text[7:]) for text in texts])
until = {"until": ["\\n\\n"], "max_gen_toks": 7}
said = lm.generate_until([ask("generate_until", text, dict(until)) for text in texts])
options |= dict(tokenizer_backend=None, num_concurrent=1)
chat = LocalChatCompletion(base_url=url + "/v1/chat/completions", **options)
messages = chat.apply_chat_template([{"role": "user", "content": "Who?"}])
answers = chat.generate_until([ask("generate_until", messages, dict(until))])
print(json.dumps([scores, pairs, said, answers]))
"""


def test_lm_eval(server) -> None:
    scores, pairs, said, answers = run_client(LM_EVAL, server.url, *TEXTS, needs="lm_eval")
    sampler = server.sampler
    for text, score, (logprob, _), new in zip(TEXTS, scores, pairs, said, strict=True):
        (expected,) = sampler.score([text])
        np.testing.assert_allclose(score, expected.logprobs.sum(), rtol=1e-5)
        # The continuation begins with a word, so that both parts have the tokens of the whole.
        context = len(sampler.tokenizer.encode(text[:7])) - 1
        np.testing.assert_allclose(logprob, expected.logprobs[context:].sum(), rtol=1e-5)
        body: Any = {"max_tokens": 7, "temperature": 0, "stop": ["\n\n"], "ignore_eos": False}
        assert new == complete(server, text, **body)["choices"][0]["text"]
    body = {"max_tokens": 7, "temperature": 0, "stop": ["\n\n"]}
    assert answers == [chat(server, "Who?", **body)["choices"][0]["message"]["content"]]
