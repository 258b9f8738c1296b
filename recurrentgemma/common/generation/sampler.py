"""What both samplers share: what they can be asked, the checks, and the results put together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar, Unpack

import numpy as np

from recurrentgemma.common.errors import UserError
from recurrentgemma.common.generation.engine import Engine
from recurrentgemma.common.generation.loop import Generation, TokenStream
from recurrentgemma.common.generation.prefill import (
    PAD,
    nonfinite_logits,
    read_pending,
    repeated,
    require_own,
    scored,
)
from recurrentgemma.common.generation.requests import (
    Options,
    Samplings,
    Steps,
    StopIds,
    StopStrings,
    checked_integer,
    row_requests,
)
from recurrentgemma.common.generation.results import SamplerOutput, collected
from recurrentgemma.common.generation.scores import Score
from recurrentgemma.common.generation.strategies import Categorical, Greedy, Sampling, row_keys
from recurrentgemma.common.io.state_files import (
    StoredState,
    read_state,
    write_state,
)
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.state import State, StateError, empty_state
from recurrentgemma.common.tokenizer import Tokenizer, check_text, id_rows, is_token_ids, token_ids

Prompt = str | Sequence[int]  # a text, or its token ids (also as an array) from BOS on
_Array = TypeVar("_Array")


class BaseSampler(Generic[_Array]):
    """Text from a model: what it can be asked.

    Attributes:
      engine: Runs the model.
      tokenizer: The vocabulary with its special tokens.
      sampling: How tokens are chosen.
      is_it_model: Whether prompts are put into the chat template and `<end_of_turn>` ends a row.
      allow_control_tokens: Whether `<end_of_turn>` and the like, spelled in a user's words, are
        tokens; they are text if not. Texts that get no template may always spell them.
    """

    engine: Engine

    def __init__(
        self,
        engine: Engine,
        vocab: Any,
        sampling: Sampling | None,
        greedy: bool,
        is_it_model: bool,
        allow_control_tokens: bool,
    ) -> None:
        self.engine = engine
        self.tokenizer = vocab if isinstance(vocab, Tokenizer) else Tokenizer(vocab)
        self.sampling: Sampling = sampling or (Greedy() if greedy else Categorical())
        self.is_it_model, self.allow_control_tokens = is_it_model, allow_control_tokens
        if is_it_model:
            self.tokenizer.require_end_of_turn()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.engine}, vocab={self.tokenizer.size}, {self.sampling})"

    @property
    def config(self) -> Config:
        """The model's configuration."""
        return self.engine.config

    def __call__(
        self,
        input_strings: Sequence[Prompt],
        total_generation_steps: Steps,
        *,
        rng: Any = None,
        echo: bool = False,
        return_logits: bool = False,
        end_sampling_at_eos_token: bool = True,
        sampling: Samplings = None,
        num_samples: int = 1,
        stop_strings: StopStrings = (),
        stop_ids: StopIds = (),
        num_logprobs: int | None = None,
    ) -> SamplerOutput[_Array]:
        """Continues each prompt.

        Args:
          input_strings: Prompts: texts or token ids. They may differ in length, and a text may be
            empty. Token ids are read without adding BOS or a template.
          total_generation_steps: At most this many tokens a row; a number, or one a prompt.
          rng: Seed of the draws: an integer; one a prompt, in a sequence or an array of any
            framework; or the framework's own, a key (also JAX's old uint32 ones), keys, one a
            prompt, or a `torch.Generator`; fresh if None. A row's draws depend on its seed and on
            the positions of its tokens, not on other rows: from one integer each row makes a seed
            of its own, and with one seed a prompt a prompt's place does not matter.
          echo: Whether to return the prompts too.
          return_logits: Whether to return logits.
          end_sampling_at_eos_token: Whether a row ends at EOS (and, if the model is
            instruction-tuned, at `<end_of_turn>`).
          sampling: How tokens are chosen, instead of the sampler's own way; a strategy, or one a
            prompt.
          num_samples: How many rows to return for each prompt, one after the other; the prompt is
            read once.
          stop_strings: Where a row's text ends, before the first of them that occurs; or a list of
            lists, one a prompt.
          stop_ids: Tokens that end a row; or a list of lists, one a prompt.
          num_logprobs: How many of the likeliest tokens to report with their log-probabilities
            beside the chosen one's; None reports none.

        Raises:
          ValueError: The prompts are no sequence of texts and token ids, hold tokens outside the
            vocabulary, or another argument is out of range.
        """
        prompts = self._encode(input_strings)
        state = empty_state(self.config, len(prompts)).extended(prompts)
        generation = self._generation(
            state,
            total_generation_steps,
            num_samples,
            return_logits,
            rng=rng,
            end_sampling_at_eos_token=end_sampling_at_eos_token,
            sampling=sampling,
            stop_strings=stop_strings,
            stop_ids=stop_ids,
            num_logprobs=num_logprobs,
        )
        out = collected(generation)
        if not echo:
            return out
        logits = out.logits
        if return_logits:
            scores = [row for prompt in map(self._prompt_logits, prompts)
                      for row in [prompt] * num_samples]  # fmt: skip
            logits = self._joined(scores, logits)
        prompts = [row for row in prompts for _ in range(num_samples)]
        text = map(self.tokenizer.decode, prompts)
        return out._replace(
            text=[prompt + new for prompt, new in zip(text, out.text, strict=True)],
            tokens=self._joined([np.array(row, np.int32) for row in prompts], out.tokens),
            logits=logits,
        )

    def generate(
        self,
        state: State,
        total_generation_steps: Steps,
        *,
        return_logits: bool = False,
        num_samples: int = 1,
        **options: Unpack[Options],
    ) -> SamplerOutput[_Array]:
        """Continues the texts of a state, which stays as it is; the output has the state after.

        The arguments are those of a call, with one entry a text for one a prompt, and so are the
        results: a state continues as the prompt that it was made from.

        Raises:
          StateError: It is the state of another model or framework, or holds no text.
          ValueError: An argument is out of range.
        """
        require_own(self.engine, state)
        generation = self._generation(
            state, total_generation_steps, num_samples, return_logits, **options
        )
        out = collected(generation)
        return out._replace(state=generation.state)

    def stream(
        self,
        input_string: Prompt | State,
        total_generation_steps: int,
        **options: Unpack[Options],
    ) -> TokenStream:
        """Continues one prompt, or the one text of a state, a token at a time.

        The arguments are those of a call.

        Returns:
          An iterator over each token id with the text that became certain with it; see
          `TokenStream`.

        Raises:
          StateError: The state is another model's or framework's, or does not have one row.
          ValueError: An argument is out of range.
        """
        if isinstance(input_string, State):
            state = require_own(self.engine, input_string)
            if state.num_rows != 1:
                raise StateError(f"a stream goes on from a state of one row, got {state.num_rows}")
        else:
            state = empty_state(self.config, 1).extended(self._encode([input_string]))
        return TokenStream(self._generation(state, total_generation_steps, **options))

    def generation(
        self, state: State, total_generation_steps: Steps, **options: Unpack[Options]
    ) -> Generation:
        """Continues the texts of a state, a token for each of them at a time.

        The arguments and errors are those of `generate`; iterating does the work.
        """
        return self._generation(require_own(self.engine, state), total_generation_steps, **options)

    def prefill(self, text: Prompt | Sequence[Prompt], state: State | None = None) -> State:
        """Reads text, to be continued any number of times.

        Args:
          text: One text, or several for a state of so many rows; token ids are a text, too.
          state: What the texts are added to, as they stand: each to its row or, where there is
            only one row, all of them to that. If None they are prompts.

        Raises:
          StateError: The state is of another model or framework, or has another number of rows.
          ValueError: There is no text, one is neither a string nor token ids, or it has tokens
            outside the vocabulary.
        """
        texts: Any = [text] if isinstance(text, str) or is_token_ids(text) else text
        if state is None:
            tokens = self._encode(texts)
            if not tokens:
                raise UserError("at least one text is expected, got none")
            state = empty_state(self.config, len(tokens))
        else:
            tokens = self._encode(texts, template=False, bos=False)
            if tokens and require_own(self.engine, state).num_rows == 1:
                state = repeated(self.engine, state, len(tokens))
            if len(tokens) != state.num_rows:
                raise StateError(f"{len(tokens)} texts cannot go on {state.num_rows} rows")
        return read_pending(self.engine, state.extended(tokens))

    def score(self, texts: Sequence[Prompt]) -> list[Score]:
        """The log-probability of every token of each text; no template is put around it.

        Token ids are scored from the second on.

        Raises:
          ValueError: The texts are no sequence of texts and token ids, or hold tokens outside the
            vocabulary.
        """
        none = np.zeros(0, np.float32)
        scores = []
        for tokens in self._encode(texts, template=False):
            logprobs = np.concatenate([none, *(s for _, s in scored(self.engine, tokens))])
            if np.isnan(logprobs).any():
                state = empty_state(self.config, 1).extended([tokens])
                raise nonfinite_logits(self.engine, state, 0)
            scores.append(Score(tokens[1:], logprobs))
        return scores

    def save_state(
        self,
        path: str | os.PathLike[str],
        state: State,
        *,
        notes: Mapping[str, str] | None = None,
        force: bool = False,
    ) -> None:
        """Writes a state to one safetensors file, which either framework reads.

        Args:
          path: The file.
          state: The state; arrays are stored in their own dtypes.
          notes: Kept beside it: strings by name.
          force: Whether to replace what is at `path`.

        Raises:
          StateError: It is the state of another model or framework, or holds no text.
          ValueError: A note is no string.
          DestinationError: `path` exists and `force` is not set, or cannot be written.
        """
        require_own(self.engine, state)
        cache = state.cache
        arrays = None if cache is None else self.engine.to_numpy(cache)
        stored = StoredState(arrays, state.lengths, state.pending, state.seen, dict(notes or {}))
        write_state(path, self.config, stored, force=force)

    def load_state(self, path: str | os.PathLike[str]) -> State:
        """Reads a state file, in the dtype of this model's own state.

        Raises:
          StateError: The file is no whole state file, or the state is another model's.
        """
        return self.load_state_and_notes(path)[0]

    def load_state_and_notes(self, path: str | os.PathLike[str]) -> tuple[State, dict[str, str]]:
        """Reads a state file with what was kept beside it; see `load_state`."""
        stored = read_state(path, self.config)
        arrays = stored.arrays
        cache = None if arrays is None else self.engine.from_numpy(arrays)
        state = State(self.config, cache, stored.lengths, stored.pending, stored.seen)
        return state, stored.notes

    def _encode(
        self, prompts: Sequence[Prompt], *, template: bool = True, bos: bool = True
    ) -> list[list[int]]:
        """The tokens of each prompt.

        Args:
          prompts: Texts and token ids.
          template: Whether texts are put into an instruction-tuned model's template.
          bos: Whether texts begin with BOS.
        """
        if isinstance(prompts, Mapping):
            prompts = id_rows(prompts, "input_strings")
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
            raise UserError(
                "input_strings must be a sequence of texts, or of lists of token ids, got "
                f"{prompts!r}"
            )
        rows = [self._tokens(f"prompt {i}", prompt, template) for i, prompt in enumerate(prompts)]
        if not bos:
            rows = [
                row[1:] if isinstance(prompt, str) else row
                for prompt, row in zip(prompts, rows, strict=True)
            ]
        return rows

    def _tokens(self, name: str, prompt: Any, template: bool) -> list[int]:
        if not isinstance(prompt, str):
            return self._within(name, token_ids(prompt, name))
        check_text(prompt, name)
        if template and self.is_it_model:
            return [self.tokenizer.bos_id, *self.encode_turn(prompt, name=name)]
        return self._within(name, self.tokenizer.encode(prompt))

    def encode_turn(
        self, message: Prompt, before: str = "", system: str = "", name: str = "the message"
    ) -> list[int]:
        """`Tokenizer.encode_turn` with this sampler's `allow_control_tokens`; errors say `name`."""
        allowed = self.allow_control_tokens
        tokens = self.tokenizer.encode_turn(message, before, system, allow_control_tokens=allowed)
        return self._within(name, tokens)

    def _within(self, name: str, tokens: list[int]) -> list[int]:
        outside = [token for token in tokens if token >= self.config.vocab_size]
        if outside:
            raise UserError(
                f"{name} has tokens outside the model's vocabulary of "
                f"{self.config.vocab_size}: {outside[:5]}; is this the model's tokenizer?"
            )
        return tokens

    def _prompt_logits(self, prompt: list[int]) -> np.ndarray:
        """The logits after each token of a prompt, [T, V]."""
        return np.concatenate([z for z, _ in scored(self.engine, [*prompt, PAD], True)])

    def _generation(
        self,
        state: State,
        steps: Steps,
        num_samples: int = 1,
        return_logits: bool = False,
        *,
        rng: Any = None,
        end_sampling_at_eos_token: bool = True,
        sampling: Samplings = None,
        stop_strings: StopStrings = (),
        stop_ids: StopIds = (),
        num_logprobs: int | None = None,
    ) -> Generation:
        samples = checked_integer("num_samples", num_samples, least=1)
        vocab_size = self.config.vocab_size
        if num_logprobs is not None:
            num_logprobs = checked_integer("num_logprobs", num_logprobs, 0, vocab_size)
        always = {}
        if end_sampling_at_eos_token:
            always[self.tokenizer.eos_id] = "eos"
            if self.is_it_model:
                always[self.tokenizer.require_end_of_turn()] = "end_of_turn"
        rows = row_requests(
            state.num_rows,
            samples,
            steps=steps,
            sampling=self.sampling if sampling is None else sampling,
            stop_strings=stop_strings,
            stop_ids=stop_ids,
            always=always,
            vocab_size=vocab_size,
        )
        if rng is not None or any(isinstance(row.sampling, Categorical) for row in rows):
            keys = row_keys(self._seed(rng), state.num_rows, samples)
            rows = [row._replace(key=key) for row, key in zip(rows, keys, strict=True)]
        if rows:
            state = repeated(self.engine, state, samples)
        return Generation(self.engine, self.tokenizer, state, rows, num_logprobs, return_logits)

    def _seed(self, rng: Any) -> Any:
        """Integers from the framework's own source of randomness; fresh ones if None."""
        raise NotImplementedError

    def _joined(self, before: Sequence[np.ndarray], after: Sequence[Any]) -> list[Any]:
        pairs = zip(before, map(self.engine.on_host, after), strict=True)
        return [self.engine.on_device(np.concatenate(pair)) for pair in pairs]
