"""A conversation with an instruction-tuned model, kept in the model's state."""

from __future__ import annotations

import html
import json
import os
import weakref
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, NamedTuple

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.generation.stops import checked_ids
from recurrentgemma.common.model.state import State, StateError, empty_state
from recurrentgemma.common.tokenizer import END_OF_TURN, check_text, token_ids

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

    from recurrentgemma.common.generation.sampler import BaseSampler, Prompt

_NOTE = "conversation"
_KEPT = 8  # states from before a turn; undoing more turns than this reads the text again


class Turn(NamedTuple):
    """A question and its answer.

    Attributes:
      user: The user's words.
      model: The model's words, as far as they went.
      tokens: All tokens that the turn added, also those of the template.
    """

    user: str
    model: str
    tokens: tuple[int, ...]


class Conversation:
    """The turns of a conversation; each reads only what is new, in the published template.

        chat = Conversation(sampler)
        for text in chat.send("Who are you?"):
            print(text, end="", flush=True)

    In a notebook the object shows itself; `copy.copy` forks it. Leaving the loop early, Ctrl-C, or
    going on with the conversation in any way ends the answer and keeps the part that was said. An
    answer that nobody began to read adds no turn.

    Attributes:
      sampler: The sampler that answers; `sampler.sampling` says how.
      system: What the model is told before the user's first words.
      turns: The turns so far.
      state: The model's state after them; None before the first.
    """

    def __init__(self, sampler: BaseSampler[Any], system: str = "") -> None:
        """Begins a conversation.

        Args:
          sampler: The sampler that answers.
          system: What the model is told before the user's first words; see `read_messages`.

        Raises:
          ValueError: The tokenizer has no `<end_of_turn>`: the model was not tuned to chat.
        """
        sampler.tokenizer.require_end_of_turn()
        check_text(system, "system")
        self.sampler, self.system = sampler, system
        # Weak reference: dropping the iterator ends the answer.
        self._answering: weakref.ref[Generator[str]] | None = None
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        """Ends an answer that is still running, and keeps what was said."""
        self._end_answer()
        return vars(self) | {"_answering": None}

    def __copy__(self) -> Conversation:
        """Another conversation with the same model, which goes on from here."""
        fork = Conversation(self.sampler, self.system)
        fork.turns, fork.state, fork._earlier = [*self.turns], self.state, [*self._earlier]
        return fork

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversation:
        """A copy: turns and states never change, and the model is shared."""
        return self.__copy__()

    def reset(self) -> None:
        """Forgets all that was said."""
        self._end_answer()
        self.turns: list[Turn] = []
        self.state: State | None = None
        self._earlier: list[State | None] = []  # before each turn; None: to be read again

    def send(
        self, text: Prompt, total_generation_steps: int = 1024, **options: Any
    ) -> Generator[str]:
        """Says something; yields the answer as it comes.

        Args:
          text: The user's words, or their token ids. White space around the words is left out. What
            they spell is text, `<end_of_turn>` too, unless `sampler.allow_control_tokens` is set.
          total_generation_steps: At most this many tokens in the answer.
          **options: The options of `Sampler.stream`.

        Raises:
          ValueError: The text is no `str`, is in the chat template already, or an option is out of
            range; no turn is added then.
        """
        self._end_answer()
        tokens, words = self._opening(text), text
        if not isinstance(words, str):
            words = self.sampler.tokenizer.decode(token_ids(words, "a message"))
        start = self._extended(tokens)
        end = self.sampler.tokenizer.require_end_of_turn()
        stop_ids = checked_ids(options.pop("stop_ids", ()), self.sampler.config.vocab_size)
        stream = self.sampler.stream(
            start, total_generation_steps, stop_ids={end, *stop_ids}, **options
        )
        answer = self._answer(words, tokens, stream)
        self._answering = weakref.ref(answer)
        return answer

    def ask(self, text: Prompt, total_generation_steps: int = 1024, **options: Any) -> str:
        """The whole answer of `send`."""
        return "".join(self.send(text, total_generation_steps, **options))

    def undo(self) -> Turn | None:
        """Takes back the last turn and returns it; None if there is none."""
        self._end_answer()
        if not self.turns:
            return None
        turn, self.state = self.turns.pop(), self._earlier.pop()
        if self.state is None and self.turns:
            self.state = self._extended([t for turn in self.turns for t in turn.tokens], True)
        return turn

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Writes the conversation with its state to one file, which either framework loads.

        Raises:
          ValueError: Nothing was said yet.
          DestinationError: `path` exists and `force` is not set, or cannot be written.
        """
        self._end_answer()
        if self.state is None:
            raise UserError("there is nothing to save: nothing was said yet")
        notes = {_NOTE: json.dumps(self.turns)}
        self.sampler.save_state(path, self.state, notes=notes, force=force)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on with a conversation that was saved.

        Raises:
          StateError: The file holds no whole conversation with this model; nothing changes then.
        """
        self._end_answer()
        state, notes = self.sampler.load_state_and_notes(path)
        if _NOTE not in notes:
            raise StateError(f"{path} is a state, but holds no conversation")
        try:
            turns = [_turn(user, model, tokens) for user, model, tokens in json.loads(notes[_NOTE])]
            _check_turns(turns, state)
        except (ValueError, TypeError, RecursionError) as error:
            raise StateError(f"{path} is no whole conversation: {error}") from error
        self.turns, self.state, self._earlier = turns, state, [None] * len(turns)

    def _opening(self, text: Prompt) -> list[int]:
        """The tokens from where the conversation stands to where the model speaks."""
        sampler = self.sampler
        if self.state is None:
            return [sampler.tokenizer.bos_id, *sampler.encode_turn(text, system=self.system)]
        closed = self.state.pending[0][-1] == sampler.tokenizer.end_of_turn_id
        return sampler.encode_turn(text, before="\n" if closed else f"{END_OF_TURN}\n")

    def _extended(self, tokens: list[int], anew: bool = False) -> State:
        state = None if anew else self.state
        return (state or empty_state(self.sampler.config, 1)).extended([tokens])

    def _answer(self, text: str, tokens: list[int], stream: Any) -> Generator[str]:
        pieces: list[str] = []
        try:
            for _, piece in stream:
                pieces.append(piece)
                if piece:
                    yield piece
        finally:
            state, turn = stream.state, Turn(text, "".join(pieces), (*tokens, *stream.tokens))
            self._earlier.append(self.state)
            if len(self._earlier) > _KEPT:
                self._earlier[-_KEPT - 1] = None
            self.turns.append(turn)
            self.state = state

    def _end_answer(self) -> None:
        """Closes the answer that is still running, so that turns and state agree."""
        answer = None if self._answering is None else self._answering()
        if answer is not None:
            answer.close()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        del console, options
        for turn in self.turns:
            yield Text("user", style="bold cyan")
            yield Padding(Text(turn.user), (0, 0, 1, 2))
            yield Text("model", style="bold green")
            yield Padding(Text(turn.model), (0, 0, 1, 2))

    def _repr_html_(self) -> str:
        said = (
            f"<p><b>{who}</b></p><blockquote style='white-space: pre-wrap'>"
            f"{html.escape(words)}</blockquote>"
            for turn in self.turns
            for who, words in (("user", turn.user), ("model", turn.model))
        )
        # These classes tell notebooks that dollars are no formulas.
        return f"<div class='tex2jax_ignore mathjax_ignore'>{''.join(said)}</div>"


def _turn(user: Any, model: Any, tokens: Any) -> Turn:
    turn = Turn(user, model, tuple(tokens))
    if not isinstance(user, str) or not isinstance(model, str) or not tokens or not all(
        type(token) is int for token in tokens
    ):  # fmt: skip
        raise UserError(f"a turn must be two strings and the ids of its tokens, got {turn}")
    return turn


def _check_turns(turns: list[Turn], state: State) -> None:
    """Raises `ValueError` unless the turns are what the state has read."""
    tokens = [token for turn in turns for token in turn.tokens]
    if state.num_tokens != (len(tokens),) or (
        state.pending[0] != tuple(tokens[-len(state.pending[0]) :])
    ):  # fmt: skip
        raise UserError("its turns are not what its state has read")
    if not all(0 <= token < state.config.vocab_size for token in tokens):
        raise UserError("its turns have tokens outside the model's vocabulary")
