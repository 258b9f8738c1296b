"""`recurrentgemma serve`: the model behind HTTP, for the clients of OpenAI's API."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import gc
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from recurrentgemma.cli.console import working
from recurrentgemma.cli.frameworks import (
    Adapter,
    Checkpoint,
    DTypeOption,
    FrameworkOption,
    Quantize,
    TokenizerFile,
    choose_framework,
    find_checkpoint,
    load_sampler,
    loading,
)
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.extras import require

KEY_VARIABLE = "RECURRENTGEMMA_API_KEY"
_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
HOLD_S = 0.025  # a reader sees no difference
_SAFETY, _SIZES = "Who may ask", "How much at a time"
_Result = TypeVar("_Result")


def serve(
    framework: FrameworkOption = None,
    checkpoint: Checkpoint = None,
    adapter: Adapter = None,
    quantize: Quantize = None,
    tokenizer: TokenizerFile = None,
    name: Annotated[
        str | None,
        typer.Option(help="The model's name for clients. Default: the checkpoint's.",
                     metavar="NAME", show_default=False),
    ] = None,
    dtype: DTypeOption = None,
    host: Annotated[str, typer.Option(help="The address to listen at.", metavar="HOST",
                                      rich_help_panel=_SAFETY)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port; 0 for a free one.", metavar="PORT",
                          rich_help_panel=_SAFETY)
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help=f"Clients must send this key. Default: ${KEY_VARIABLE}.",
                     metavar="KEY", show_default=False, rich_help_panel=_SAFETY),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option("--insecure", help="Let other machines ask without a key.",
                     rich_help_panel=_SAFETY),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Let web pages of this origin ask; * for all.",
                     metavar="URL", show_default=False, rich_help_panel=_SAFETY),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(min=1, max=512, help="Texts that grow at a time. Default: 8 on CPU, else 32.",
                     metavar="N", show_default=False, rich_help_panel=_SIZES),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens of a prompt and its answer. "
                     "Default: 32768, or 4096 where the state grows with the text.",
                     metavar="N", show_default=False, rich_help_panel=_SIZES),
    ] = None,
    state_cache: Annotated[
        str, typer.Option(help="Memory for the states of texts that were read; 0 for none.",
                          metavar="BYTES", rich_help_panel=_SIZES),
    ] = "1GB",
    max_waiting: Annotated[
        int, typer.Option(min=0, help="Prompts that may wait for a slot.", metavar="N",
                          rich_help_panel=_SIZES),
    ] = 128,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that an answer may take.", metavar="S",
                            rich_help_panel=_SIZES),
    ] = 600.0,
    strict_roles: Annotated[
        bool, typer.Option("--strict-roles", help="Refuse chats with a system part.")
    ] = False,
    reproducible: Annotated[
        bool,
        typer.Option("--reproducible", help="Let no bit of an answer depend on what else runs or "
                     "is kept: every step has all slots, and answers in a chat are read again."),
    ] = False,
) -> None:  # fmt: skip
    """Serve a model to the clients of OpenAI's API, and a chat in the browser.

    Many texts grow at a time. Ctrl-C ends with the last answer, a second Ctrl-C at once.
    """
    require("starlette", "uvicorn", "msgspec", "prometheus_client")
    from recurrentgemma.common.generation.strategies import Greedy
    from recurrentgemma.common.twin import find_twin
    from recurrentgemma.serve.app import Service, Settings
    from recurrentgemma.serve.asking import Limits
    from recurrentgemma.serve.guard import LOOPBACK, Rules
    from recurrentgemma.serve.scheduler import Scheduler
    from recurrentgemma.serve.server import listen
    from recurrentgemma.serve.server import serve as serve_at
    from recurrentgemma.serve.state_cache import StateCache

    keys = tuple(api_key or filter(None, [os.environ.get(KEY_VARIABLE)]))
    if not all(key.strip() == key and key.isascii() and key for key in keys):
        raise UserError("--api-key must be ASCII without spaces around it")
    if host not in LOOPBACK and not keys and not insecure:
        raise UserError(
            f"other machines can reach {host}: give --api-key KEY, or --insecure to let all ask"
        )
    most_bytes = num_bytes(state_cache)
    framework = choose_framework(framework)
    with contextlib.ExitStack() as on_failure:
        # Objects made before the server is ready live as long as it: the collector skips them.
        on_failure.callback(gc.enable)
        gc.disable()
        listener = on_failure.enter_context(listen(host, port))
        with working(loading(checkpoint, framework)):
            number = slots or (8 if find_twin(framework).default_device() == "cpu" else 32)
            path, vocabulary = find_checkpoint(checkpoint, tokenizer, chat=True)
            arguments = path, vocabulary, Greedy(), dtype, False, False, adapter, quantize
            load = functools.partial(load_sampler, framework, *arguments, rows=number)
            loaded = in_passing_thread(load)
        on_failure.pop_all()
    engine = loaded.sampler.engine
    grows = engine.capacity_for(1) is not None
    length = max_length or (4096 if grows else 32_768)

    def make_scheduler(deliver) -> Scheduler:
        return Scheduler(
            engine,
            vocabulary,
            deliver,
            num_slots=number,
            reproducible=reproducible,
            capacity=engine.capacity_for(length),
            states=StateCache(most_bytes) if most_bytes else None,
            most_waiting=max_waiting,
            hold_s=HOLD_S,
        )

    hosts = {*LOOPBACK, host} if host in LOOPBACK and not keys else None
    rules = Rules(keys, tuple(cors_origin or ()), hosts)
    model = name or path.resolve().name
    settings = Settings(model, Limits(length), rules, strict_roles, timeout)
    service = Service(make_scheduler, vocabulary, settings)
    shown = f"[{host}]" if ":" in host else host
    url = f"http://{shown}:{listener.getsockname()[1]}"

    def on_ready() -> None:
        gc.freeze()
        gc.enable()
        sys.stderr.write(
            f"{model} at {url} ({framework}, {loaded.dtype} on {loaded.device}, {number} slots); "
            "Ctrl-C ends\n"
        )
        sys.stderr.flush()

    sys.stderr.write(f"compiling {model}\n")
    code = serve_at(service, listener, on_ready)
    if code or service.scheduler.failed:
        raise typer.Exit(code or 1)


def num_bytes(text: str) -> int:
    """A number of bytes, from words like 1GB, 500M and 0.

    Raises:
      ValueError: It is no such word.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", text.strip().upper())
    if found is None:
        raise UserError(f"--state-cache must be a number of bytes such as 1GB or 0, got {text!r}")
    return int(float(found[1]) * _UNITS[found[2]])


def in_passing_thread(function: Callable[[], _Result]) -> _Result:
    """What a function returns, or its error, from a thread that then ends.

    Each thread that computes with PyTorch starts OpenMP threads, which end with it. If there are
    more of them than cores, they sleep between operations, and a small step takes twice as long.
    The thread that owns the device starts its own, so the main thread must start none.
    """
    result: concurrent.futures.Future[_Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result()
