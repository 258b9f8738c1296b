"""`recurrentgemma chat`: a conversation in the terminal."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from recurrentgemma.cli.console import working
from recurrentgemma.cli.frameworks import (
    Adapter,
    Checkpoint,
    Compiled,
    ControlTokens,
    DTypeOption,
    FrameworkOption,
    Quantize,
    TokenizerFile,
    choose_framework,
    find_checkpoint,
    load_sampler,
    loading,
)
from recurrentgemma.cli.mistakes import mistake
from recurrentgemma.cli.sampling_options import (
    END,
    FrequencyPenalty,
    LogitBias,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    strategy,
)
from recurrentgemma.cli.wrapping import WrappedText
from recurrentgemma.common.errors import UserError
from recurrentgemma.common.generation.stops import checked_strings
from recurrentgemma.common.io.files import expanded

if TYPE_CHECKING:
    from recurrentgemma.common.generation.conversation import Conversation

COMMANDS = """\
/save FILE   keep the conversation in a file
/save! FILE  the same, in place of a file that is there
/load FILE   continue a conversation that was kept
/undo        take back the last turn
/reset       forget all turns
/quit        end, as Ctrl-D does
Ctrl-C stops an answer.
"""
_DOWNLOAD = "recurrentgemma download hf:google/recurrentgemma-2b-it"
_NOT_TUNED = f"""\
The model tiny was not tuned to chat: it only continues texts. Two that were,
one of them bundled:
  recurrentgemma chat --checkpoint tiny-chat
  {_DOWNLOAD}
"""
_YOU, _MODEL = "you> ", "model> "


def chat(
    framework: FrameworkOption = None,
    checkpoint: Checkpoint = None,
    adapter: Adapter = None,
    quantize: Quantize = None,
    compiled: Compiled = False,
    tokenizer: TokenizerFile = None,
    load: Annotated[
        Path | None,
        typer.Option(
            help="Continue a saved conversation.",
            metavar="FILE",
            show_default=False,
            rich_help_panel="Prompt",
        ),
    ] = None,
    system: Annotated[
        str,
        typer.Option(
            help="What the model is told before your first words.",
            metavar="TEXT",
            show_default=False,
            rich_help_panel="Prompt",
        ),
    ] = "",
    max_new_tokens: Annotated[
        int,
        typer.Option(min=1, help="End an answer after N tokens.", metavar="N", rich_help_panel=END),
    ] = 1024,
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
    dtype: DTypeOption = None,
    allow_control_tokens: ControlTokens = False,
) -> None:
    """Talk with an instruction-tuned model. /help lists the commands.

    The conversation is kept in the model's state: each turn reads only what is new.
    """
    stop_strings = checked_strings(stop or ())
    framework = choose_framework(framework)
    with working(loading(checkpoint, framework)):
        from recurrentgemma.common.generation.conversation import Conversation  # slow, as the rest
        from recurrentgemma.common.io.checkpoint import BUNDLED

        sampling, seed = strategy(
            temperature, top_k, top_p, min_p, repetition_penalty, seed,
            presence_penalty, frequency_penalty, logit_bias,
        )  # fmt: skip
        path, vocabulary = find_checkpoint(checkpoint, tokenizer, chat=True)
        if vocabulary.end_of_turn_id is None:
            raise UserError(
                f"{path} has no <end_of_turn>, so it was not tuned to chat; "
                f"{_DOWNLOAD!r} gets a model that was"
            )
        loaded = load_sampler(
            framework,
            path,
            vocabulary,
            sampling,
            dtype,
            True,
            allow_control_tokens,
            adapter,
            quantize,
            compiled,
        )
    conversation = Conversation(loaded.sampler, system)
    if load is not None:
        conversation.load(expanded(load))
    options = {
        "total_generation_steps": max_new_tokens,
        "stop_strings": stop_strings,
        "rng": seed,
    }
    if path.resolve() == BUNDLED.resolve():
        sys.stderr.write(_NOT_TUNED)
    about = f"{framework}, {loaded.dtype} on {loaded.device}"
    about += f", seed {seed}" if seed is not None else ""
    if sys.stdin.isatty():
        sys.stderr.write(f"{about}. /help for help.\n")
    elif seed is not None:
        sys.stderr.write(f"{about}\n")
    for line in _lines():
        if line.startswith("/"):
            name, *argument = line.split(maxsplit=1)
            if name == "/quit":
                return
            _command(conversation, name, *argument)
        elif line:
            _answer(conversation, line, options)


def _lines() -> Any:
    """The lines that the user types; in a terminal they can be edited."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  # makes `input` editable
    if isinstance(sys.stdin, io.TextIOWrapper):
        with contextlib.suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text end no chat
    while True:
        try:
            line = input(_YOU if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:  # clears the line, as a shell does
            sys.stdout.write("\n")
            continue
        yield line.strip()


def _answer(conversation: Conversation, text: str, options: dict[str, Any]) -> None:
    """Says something and prints the answer; after a mistake's message the chat goes on."""
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    shown, empty = WrappedText(sys.stdout.write, width), True
    try:
        _require_text(text)
        with contextlib.closing(conversation.send(text, **options)) as answer:
            with working("Reading"):
                first = next(answer, "")
            if in_terminal:
                sys.stdout.write(typer.style(_MODEL, fg="green", bold=True))
                shown = WrappedText(sys.stdout.write, width, len(_MODEL))
            for piece in itertools.chain([first], answer):
                empty = empty and not piece.strip()
                shown.add(piece)
                sys.stdout.flush()
        if empty:
            sys.stderr.write("[empty answer]" + "\n" * (not in_terminal))
    except KeyboardInterrupt:
        shown.add(" [stopped]")
    except Exception as error:
        shown.add(_told(error))
    shown.flush()
    sys.stdout.write("\n\n" if in_terminal else "\n")
    sys.stdout.flush()


def _command(conversation: Conversation, name: str, argument: str = "") -> None:
    """Obeys a line that begins with /; after a mistake's message the chat goes on."""
    try:
        if name == "/help":
            sys.stdout.write(COMMANDS)
        elif name in ("/save", "/save!", "/load") and not argument:
            raise UserError(f"{name} needs a file")
        elif name == "/save" and os.path.lexists(expanded(argument)):
            raise UserError(f"{argument} exists; /save! {argument} replaces it")
        elif name in ("/save", "/save!"):
            conversation.save(expanded(argument), force=name == "/save!")
            sys.stdout.write(f"saved to {argument}\n")
        elif name == "/load":
            conversation.load(expanded(argument))
            sys.stdout.write(f"{len(conversation.turns)} turns\n")
        elif name == "/undo":
            turn = conversation.undo()
            sys.stdout.write("nothing to undo\n" if turn is None else f"undone: {turn.user}\n")
        elif name == "/reset":
            conversation.reset()
            sys.stdout.write("begun anew\n")
        else:
            raise UserError(f"there is no {name}; /help lists what there is")
    except KeyboardInterrupt:
        sys.stdout.write(f" [{name} stopped]\n")
    except Exception as error:
        sys.stdout.write(f"{_told(error)}\n")
    sys.stdout.flush()


def _require_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # from bytes that could not be decoded
        raise UserError("what you say must be UTF-8 text; nothing was said") from error


def _told(error: Exception) -> str:
    """The message of a user's mistake; any other error is raised."""
    message = mistake(error)
    if message is None:
        raise error
    return message
