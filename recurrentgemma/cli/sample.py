"""`recurrentgemma sample`: continues a prompt."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from recurrentgemma.cli.batch import (
    logprob_fields,
    open_batch,
    recorded_options,
    run_batch,
    sample_fields,
)
from recurrentgemma.cli.console import read_stdin, working
from recurrentgemma.cli.frameworks import (
    Adapter,
    Checkpoint,
    Compiled,
    ControlTokens,
    DTypeOption,
    FrameworkOption,
    MeshText,
    Quantize,
    TokenizerFile,
    choose_framework,
    find_checkpoint,
    load_sampler,
    loading,
)
from recurrentgemma.cli.generation import generate
from recurrentgemma.cli.paths import named_path
from recurrentgemma.cli.sampling_options import (
    END,
    FrequencyPenalty,
    LogitBias,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    StopId,
    Temperature,
    TopK,
    TopP,
    strategy,
)
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.generation.stops import checked_strings
from recurrentgemma.common.io.files import expanded, require_replaceable
from recurrentgemma.common.io.jsonl import require_writable

_OUTPUT, _STATES, _BATCHES = "Output", "States", "Many prompts"


def sample(
    prompt: Annotated[
        str | None,
        typer.Argument(
            help="Text to continue; - or none reads stdin.", metavar="PROMPT", show_default=False
        ),
    ] = None,
    framework: FrameworkOption = None,
    checkpoint: Checkpoint = None,
    adapter: Adapter = None,
    quantize: Quantize = None,
    compiled: Compiled = False,
    tokenizer: TokenizerFile = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(min=0, help="Stop after N tokens.", metavar="N", rich_help_panel=END),
    ] = 100,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    presence_penalty: PresencePenalty = 0.0,
    frequency_penalty: FrequencyPenalty = 0.0,
    logit_bias: LogitBias = None,
    seed: Seed = None,
    stop: Stop = None,
    stop_id: StopId = None,
    num_samples: Annotated[
        int,
        typer.Option(
            "--num-samples",
            "-n",
            min=1,
            help="Continue N times.",
            metavar="N",
            rich_help_panel=_OUTPUT,
        ),
    ] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="With --json or --output: log-probabilities of each token and of the N likeliest.",
            metavar="N",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    dtype: DTypeOption = None,
    mesh: MeshText = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt to an instruction-tuned model as a turn.",
            rich_help_panel="Prompt",
        ),
    ] = False,
    allow_control_tokens: ControlTokens = False,
    echo: Annotated[
        bool,
        typer.Option(
            "--echo/--no-echo",
            help="Print the prompt before its continuation.",
            rich_help_panel=_OUTPUT,
        ),
    ] = True,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print one JSON object instead of text.", rich_help_panel=_OUTPUT
        ),
    ] = False,
    load_state: Annotated[
        Path | None,
        typer.Option(
            help="Continue a saved state; PROMPT, if any, or each of --input is added to it.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=_STATES,
        ),
    ] = None,
    save_state: Annotated[
        Path | None,
        typer.Option(
            help="Save the state after the last token, for either framework.",
            metavar="FILE",
            show_default=False,
            rich_help_panel=_STATES,
        ),
    ] = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help='Many prompts instead: each line a JSON string, or an object with a "prompt" or '
            'with "messages"; - reads stdin.',
            parser=named_path,
            metavar="FILE",
            show_default=False,
            rich_help_panel=_BATCHES,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Results, one JSON object a line; - is stdout. Rerunning resumes a file that is "
            "there.",
            parser=named_path,
            metavar="FILE",
            show_default=False,
            rich_help_panel=_BATCHES,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Prompts at a time.", metavar="N", rich_help_panel=_BATCHES)
    ] = 8,
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going",
            help="Write an error for a line that is no prompt, and go on.",
            rich_help_panel=_BATCHES,
        ),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace files that are there.", rich_help_panel=_OUTPUT),
    ] = False,
) -> None:
    """Continue a prompt, token by token.

    The text goes to stdout as it is generated, the speed to stderr after it.
    """
    asked_seed, stop_strings = seed, checked_strings(stop or ())
    _require_sense(prompt, chat, input_, output, load_state, save_state, num_samples)
    if logprobs is not None and not as_json and output is None:
        raise UserError(
            "--logprobs needs --json, or --input and --output: text has no place for it"
        )
    framework = choose_framework(framework)
    with working(loading(checkpoint, framework)):
        from recurrentgemma.common.generation.strategies import Greedy  # slow, as all that follows

        sampling, seed = strategy(
            temperature, top_k, top_p, min_p, repetition_penalty, seed,
            presence_penalty, frequency_penalty, logit_bias,
        )  # fmt: skip
        path, vocabulary = find_checkpoint(checkpoint, tokenizer, chat)
    if num_samples > 1 and isinstance(sampling, Greedy):
        sys.stderr.write("all samples are the likeliest text: --temperature draws others\n")
    if chat and vocabulary.end_of_turn_id is None:
        raise UserError(f"--chat: {path} has no <end_of_turn>, so it was not tuned to chat")
    if save_state is not None:
        save_state = expanded(save_state)
        if os.path.lexists(save_state) and not force:
            raise UserError(f"{save_state} exists; --force replaces it")
        require_replaceable(save_state)
        require_writable(save_state, replaced=True)
    batch = None
    if input_ is not None and output is not None:
        batch = open_batch(input_, output, force=force)
    text = "" if batch else _prompt(prompt, needed=load_state is None)
    started = time.perf_counter()
    with working(loading(checkpoint, framework)):
        loaded = load_sampler(
            framework,
            path,
            vocabulary,
            sampling,
            dtype,
            chat,
            allow_control_tokens,
            adapter,
            quantize,
            compiled,
            mesh,
            rows=num_samples * (batch_size if batch else 1),
        )
    load_s = time.perf_counter() - started
    sampler, processes = loaded.sampler, loaded.processes
    if processes.count > 1 and (batch is not None or save_state is not None):
        raise UserError("--output and --save-state are for one process; several print the text")
    seed = processes.everyone(seed)[0]
    before = None
    if load_state is not None:
        load_state = expanded(load_state)
        before = sampler.load_state(load_state)
        if before.num_rows != 1:
            raise UserError(f"{load_state} is the state of {before.num_rows} texts, not of one")
    options: dict[str, Any] = {
        "total_generation_steps": max_new_tokens,
        "stop_strings": stop_strings,
        "stop_ids": stop_id or (),
        "num_logprobs": logprobs,
    }
    if batch is not None:
        errors = run_batch(
            sampler,
            batch,
            batch_size=batch_size,
            keep_going=keep_going,
            seed=seed,
            state=before,
            options=options | {"num_samples": num_samples},
            record=recorded_options(
                sampling,
                checkpoint=None if checkpoint is None else os.path.abspath(expanded(path)),
                adapter=None if adapter is None else os.path.abspath(expanded(adapter)),
                **({} if quantize is None else {"quantize": quantize}),
                framework=framework,
                dtype=loaded.dtype,
                chat=chat,
                max_new_tokens=max_new_tokens,
                seed=asked_seed,
                stop=stop or [],
                stop_id=stop_id or [],
                num_samples=num_samples,
                logprobs=logprobs,
                load_state=None if load_state is None else os.path.abspath(load_state),
            ),
        )
        if errors:
            raise typer.Exit(1)
        return
    report: dict[str, Any] = {"prompt": text}
    about = {
        "framework": framework,
        "device": loaded.device,
        "dtype": loaded.dtype,
        "seed": seed,
    }
    shown = text + "\n" * chat if echo else ""
    source = text if before is None else sampler.prefill(text, before)
    stream = None
    if num_samples > 1:
        state = sampler.prefill(source) if isinstance(source, str) else source
        out = sampler.generate(state, rng=seed, num_samples=num_samples, **options)
        report["samples"] = [sample_fields(out, row) for row in range(num_samples)]
        speed = f"{num_samples} samples"
        timings = {"load_s": load_s, "total_s": time.perf_counter() - started - load_s}
        if not as_json:
            sys.stdout.write("\n---\n".join(shown + new for new in out.text) + "\n")
    else:
        stream = sampler.stream(source, rng=seed, **options)
        run = generate(stream, None if as_json else shown)
        report |= {"text": run.text, "tokens": run.tokens, "finish_reason": run.finish_reason}
        if logprobs is not None:
            report["logprobs"] = [logprob_fields(place) for place in run.logprobs]
        speed = run.speed
        timings = {
            "load_s": load_s,
            "first_token_s": run.first_token_s,
            "tokens_per_second": run.tokens_per_second,
        }
    if as_json:
        sys.stdout.write(json.dumps(report | about | {"timings": timings}) + "\n")
    else:
        line = f"{framework}, {loaded.dtype} on {loaded.device}"
        line += f", seed {seed}" if seed is not None else ""
        sys.stderr.write(f"{speed}, loaded in {load_s:.2f} s\n{line}\n")
    if save_state is not None and stream is not None:  # last, so that no text is lost
        state = sampler.prefill("", stream.state)  # reads the prompt if nothing was generated
        sampler.save_state(save_state, state, force=force)


def _require_sense(
    prompt: str | None,
    chat: bool,
    source: Path | None,
    output: Path | None,
    load_state: Path | None,
    save_state: Path | None,
    num_samples: int,
) -> None:
    """Raises `ValueError` if options do not go together."""
    if (source is None) != (output is None):
        raise UserError("--input and --output go together")
    if source is not None and (prompt is not None or save_state):
        raise UserError("--input takes the place of PROMPT and --save-state")
    if save_state and num_samples > 1:
        raise UserError("one text's state is saved: --num-samples must be 1")
    if load_state and chat:
        raise UserError("--load-state goes on with the text as it is; for a conversation: "
                         "recurrentgemma chat --load")  # fmt: skip


def _prompt(argument: str | None, needed: bool) -> str:
    """The prompt, from the argument or from stdin."""
    if argument == "-" or (argument is None and needed):
        return read_stdin()
    try:
        (argument or "").encode()
    except UnicodeEncodeError as error:  # from bytes that Python could not decode
        raise UserError("the prompt must be UTF-8 text") from error
    return argument or ""
