"""What both samplers share: what they can be asked, the checks, and the results put together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import sentencepiece as spm

from recurrentgemma.common.generation.loop import Generation, Request, Stream
from recurrentgemma.common.generation.output import SamplerOutput, logprobs_of_row
from recurrentgemma.common.generation.reader import Reader
from recurrentgemma.common.generation.scores import Score
from recurrentgemma.common.generation.stops import Stops, checked_ids, checked_strings
from recurrentgemma.common.generation.strategies import Categorical, Greedy, Sampling, row_keys
from recurrentgemma.common.io.state_files import (
    StoredState,
    narrowed,
    read_state,
    widened,
    write_state,
)
from recurrentgemma.common.model.griffin import GriffinConfig
from recurrentgemma.common.model.state import State, StateError, empty_state
from recurrentgemma.common.tokenizer import Tokenizer, apply_it_formatter, check_text

_Array = TypeVar("_Array")


class BaseSampler(Reader, Generic[_Array]):
    """Text from a model: what it can be asked. The twins add what runs on their framework.

    Attributes:
      sampling: How tokens are chosen.
      is_it_model: Whether prompts are put into the chat template and `<end_of_turn>` ends a row.
    """

    def __init__(
        self,
        config: GriffinConfig,
        vocab: spm.SentencePieceProcessor | Tokenizer,
        sampling: Sampling | None,
        greedy: bool,
        is_it_model: bool,
    ) -> None:
        self.config = config
        self.tokenizer = vocab if isinstance(vocab, Tokenizer) else Tokenizer(vocab)
        self.sampling: Sampling = sampling or (Greedy() if greedy else Categorical())
        self.is_it_model = is_it_model
        if is_it_model:
            self.tokenizer.require_end_of_turn()

    def __call__(
        self,
        input_strings: Sequence[str],
        total_generation_steps: int,
        *,
        rng: Any = None,
        echo: bool = False,
        return_logits: bool = False,
        end_sampling_at_eos_token: bool = True,
        sampling: Sampling | None = None,
        num_samples: int = 1,
        stop_strings: str | Iterable[str] = (),
        stop_ids: Iterable[int] = (),
        num_logprobs: int | None = None,
    ) -> SamplerOutput[_Array]:
        """Continues each prompt.

        Args:
          input_strings: Prompts; they may differ in length and be empty.
          total_generation_steps: At most this many tokens a row.
          rng: Seed of the draws: an integer; one a prompt, in a sequence or an array of any
            framework; or the framework's own, a key (also JAX's old uint32 ones), keys, one a
            prompt, or a `torch.Generator`; fresh if None. A row's draws depend on its seed and on
            the positions of its tokens, not on other rows: of one integer each row makes a seed of
            its own, and of several each prompt's is the same wherever the prompt stands.
          echo: Whether to return the prompts too.
          return_logits: Whether to return logits.
          end_sampling_at_eos_token: Whether a row ends at EOS (and, of an instruction-tuned model,
            at `<end_of_turn>`).
          sampling: How tokens are chosen, instead of the sampler's own way.
          num_samples: How many rows to return for each prompt, one after the other; the prompt is
            read once.
          stop_strings: Where a row's text ends, before the first of them that occurs.
          stop_ids: Tokens that end a row.
          num_logprobs: How many of the likeliest tokens to report with their log-probabilities
            beside the chosen one's; None reports none.

        Raises:
          ValueError: The prompts are no sequence of strings, hold tokens outside the vocabulary, or
            something else asked for is out of range.
        """
        prompts = self._encode(input_strings)
        samples = _checked("num_samples", num_samples, least=1)
        request = self._request(
            total_generation_steps,
            (rng, len(prompts), samples),
            (end_sampling_at_eos_token, stop_strings, stop_ids),
            sampling,
            num_logprobs,
        )
        if not prompts:
            logits = [] if return_logits else None
            logprobs = None if num_logprobs is None else []
            return SamplerOutput([], [], logits, logprobs, [])
        prompt_logits = [self._prompt_logits(row) for row in prompts if echo and return_logits]
        state = empty_state(self.config, len(prompts)).extended(prompts)
        out = self._complete(self._repeated(state, samples), request, return_logits)
        if not echo:
            return out
        prompts = [row for row in prompts for _ in range(samples)]
        text = map(self.tokenizer.decode, prompts)
        logits = out.logits
        if logits is not None:
            prompt_logits = [row for row in prompt_logits for _ in range(samples)]
            logits = self._joined(prompt_logits, logits)
        return out._replace(
            text=[prompt + new for prompt, new in zip(text, out.text, strict=True)],
            tokens=self._joined([np.array(row, np.int32) for row in prompts], out.tokens),
            logits=logits,
        )

    def generate(
        self,
        state: State,
        total_generation_steps: int,
        *,
        rng: Any = None,
        return_logits: bool = False,
        end_sampling_at_eos_token: bool = True,
        sampling: Sampling | None = None,
        num_samples: int = 1,
        stop_strings: str | Iterable[str] = (),
        stop_ids: Iterable[int] = (),
        num_logprobs: int | None = None,
    ) -> SamplerOutput[_Array]:
        """Continues the texts of a state, which stays as it is; the output has the state after.

        The arguments are those of a call, and so is what comes out: the continuation of a state is
        that of the prompt it was made of.

        Raises:
          StateError: It is the state of another model or framework, or of nothing.
          ValueError: Something asked for is out of range.
        """
        self._require_own(state)
        samples = _checked("num_samples", num_samples, least=1)
        request = self._request(
            total_generation_steps,
            (rng, state.num_rows, samples),
            (end_sampling_at_eos_token, stop_strings, stop_ids),
            sampling,
            num_logprobs,
        )
        return self._complete(self._repeated(state, samples), request, return_logits, True)

    def stream(
        self,
        input_string: str | State,
        total_generation_steps: int,
        *,
        rng: Any = None,
        end_sampling_at_eos_token: bool = True,
        sampling: Sampling | None = None,
        stop_strings: str | Iterable[str] = (),
        stop_ids: Iterable[int] = (),
        num_logprobs: int | None = None,
    ) -> Stream:
        """Continues one prompt, or the one text of a state, a token at a time.

        The arguments are those of a call.

        Returns:
          An iterator over each token id with the text that became certain with it; see `Stream`.

        Raises:
          StateError: The state is of another model or framework, or has not one row.
          ValueError: Something asked for is out of range.
        """
        if isinstance(input_string, State):
            state = self._require_own(input_string)
            if state.num_rows != 1:
                raise StateError(f"a stream goes on from a state of one row, got {state.num_rows}")
        else:
            state = empty_state(self.config, 1).extended(self._encode([input_string]))
        request = self._request(
            total_generation_steps,
            (rng, 1, 1),
            (end_sampling_at_eos_token, stop_strings, stop_ids),
            sampling,
            num_logprobs,
        )
        return Stream(Generation(self, state, request))

    def prefill(self, text: str | Sequence[str], state: State | None = None) -> State:
        """Reads text, to be continued any number of times.

        Args:
          text: One text, or several for a state of so many rows.
          state: What the texts are added to, as they stand: each to its row or, where there is
            one row alone, all of them to that. If None they are prompts.

        Raises:
          StateError: The state is of another model or framework, or has another number of rows.
          ValueError: The texts are no strings, none at all, or hold tokens outside the vocabulary.
        """
        texts = [text] if isinstance(text, str) else text
        if state is None:
            tokens = self._encode(texts)
            if not tokens:
                raise ValueError("at least one text is expected, got none")
            state = empty_state(self.config, len(tokens))
        else:
            tokens = [row[1:] for row in self._encode(texts, as_prompts=False)]
            if tokens and self._require_own(state).num_rows == 1:
                state = self._repeated(state, len(tokens))
            if len(tokens) != state.num_rows:
                raise StateError(f"{len(tokens)} texts cannot go on {state.num_rows} rows")
        return self._read_state(state.extended(tokens))

    def score(self, texts: Sequence[str]) -> list[Score]:
        """The log-probability of every token of each text; no template is put around it.

        Raises:
          ValueError: The texts are no sequence of strings, or hold tokens outside the vocabulary.
        """
        return [
            Score(
                tokens[1:],
                np.concatenate([np.zeros(0, np.float32), *(s for _, s in self._scored(tokens))]),
            )
            for tokens in self._encode(texts, as_prompts=False)
        ]

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
          StateError: It is the state of another model or framework, or of nothing.
          ValueError: The notes are no strings.
          DestinationError: `path` exists and `force` is not set, or cannot be written.
        """
        self._require_own(state)
        cache = state.cache
        arrays = None if cache is None else narrowed(self._to_numpy(cache), cache)
        stored = StoredState(arrays, state.lengths, state.pending, state.seen, dict(notes or {}))
        write_state(path, self.config, stored, force=force)

    def load_state(self, path: str | os.PathLike[str]) -> State:
        """Reads a state file, in the dtype of this model's own state.

        Raises:
          StateError: It is no state file, not whole, or of another model.
        """
        return self.load_state_and_notes(path)[0]

    def load_state_and_notes(self, path: str | os.PathLike[str]) -> tuple[State, dict[str, str]]:
        """Reads a state file with what was kept beside it; see `load_state`."""
        stored = read_state(path, self.config)
        arrays = stored.arrays
        cache = None if arrays is None else self._from_numpy(widened(arrays))
        state = State(self.config, cache, stored.lengths, stored.pending, stored.seen)
        return state, stored.notes

    def _encode(self, input_strings: Sequence[str], as_prompts: bool = True) -> list[list[int]]:
        if isinstance(input_strings, str | bytes) or not isinstance(input_strings, Iterable):
            raise ValueError(f"input_strings must be a sequence of strings, got {input_strings!r}")
        strings = list(input_strings)
        for row, string in enumerate(strings):
            check_text(string, f"prompt {row}")
        texts = map(apply_it_formatter, strings) if self.is_it_model and as_prompts else strings
        prompts = [self.tokenizer.encode(text) for text in texts]
        for row, prompt in enumerate(prompts):
            outside = [token for token in prompt if token >= self.config.vocab_size]
            if outside:
                raise ValueError(
                    f"prompt {row} has tokens outside the model's vocabulary of "
                    f"{self.config.vocab_size}: {outside[:5]}; is this the model's tokenizer?"
                )
        return prompts

    def _request(
        self,
        steps: int,
        seeds: tuple[Any, int, int],
        stops: tuple[bool, str | Iterable[str], Iterable[int]],
        sampling: Sampling | None,
        num_logprobs: int | None,
    ) -> Request:
        sampling = self.sampling if sampling is None else sampling
        if not isinstance(sampling, Greedy | Categorical):
            raise ValueError(f"sampling must be Greedy or Categorical, got {sampling!r}")
        if num_logprobs is not None:
            num_logprobs = _checked("num_logprobs", num_logprobs, 0, self.config.vocab_size)
        rng, num_texts, num_samples = seeds
        drawn = isinstance(sampling, Categorical) or rng is not None
        at_eos, strings, ids = stops
        reasons = dict.fromkeys(checked_ids(ids, self.config.vocab_size), "stop_id")
        if at_eos:
            reasons[self.tokenizer.eos_id] = "eos"
            if self.is_it_model:
                reasons[self.tokenizer.require_end_of_turn()] = "end_of_turn"
        return Request(
            steps=_checked("total_generation_steps", steps, least=0),
            sampling=sampling,
            keys=row_keys(self._seed(rng), num_texts, num_samples) if drawn else [],
            stops=Stops(reasons, checked_strings(strings)),
            num_logprobs=num_logprobs,
        )

    def _complete(
        self, state: State, request: Request, return_logits: bool, return_state: bool = False
    ) -> SamplerOutput[_Array]:
        generation = Generation(self, state, request)
        rows = range(state.num_rows)
        tokens: list[list[int]] = [[] for _ in rows]
        texts: list[list[str]] = [[] for _ in rows]
        all_logits, all_logprobs = [], []
        for step in generation:
            for row in np.flatnonzero(step.active):
                tokens[row].append(int(step.tokens[row]))
                texts[row].append(step.texts[row])
            if return_logits:
                all_logits.append(self._on_host(step.logits))
            if step.logprobs is not None:
                all_logprobs.append(step.logprobs)
        logits = logprobs = None
        if return_logits:
            empty = np.zeros((0, self.config.vocab_size), np.float32)
            of_rows = [[empty, *(z[row, None] for z in all_logits[: len(tokens[row])])]
                       for row in rows]  # fmt: skip
            logits = [self._on_device(np.concatenate(parts)) for parts in of_rows]
        if request.num_logprobs is not None:
            logprobs = [logprobs_of_row(all_logprobs, row, len(tokens[row])) for row in rows]
        return SamplerOutput(
            text=["".join(parts) for parts in texts],
            tokens=[self._on_device(np.array(row, np.int32)) for row in tokens],
            logits=logits,
            logprobs=logprobs,
            finish_reasons=[text.finish_reason for text in generation.texts],
            state=generation.state if return_state else None,
        )

    def _require_own(self, state: State) -> State:
        if not isinstance(state, State):
            raise StateError(f"a State is expected, got {type(state).__name__}")
        differences = [
            f"{name}={its}, the model's is {own}"
            for name, (its, own) in state.config.differences(self.config).items()
        ]
        if differences:
            raise StateError(f"this is the state of another model: {'; '.join(differences)}")
        if not state.pending or not all(state.pending):
            raise StateError("this is the state of nothing: prefill makes one of a text")
        if state.cache is not None and not all(map(self._is_own, next(iter(state.cache.values())))):
            raise StateError(
                "this is the state of another framework's sampler: to move it, write it there with "
                "save_state and read it here with load_state"
            )
        return state

    def _joined(self, before: Sequence[np.ndarray], after: Sequence[Any]) -> list[Any]:
        pairs = zip(before, map(self._on_host, after), strict=True)
        return [self._on_device(np.concatenate(pair)) for pair in pairs]


def _checked(name: str, value: Any, least: int, most: int | None = None) -> int:
    within = f"of at least {least}" if most is None else f"from {least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least or (
        most is not None and value > most
    ):  # fmt: skip
        raise ValueError(f"{name} must be an integer {within}, got {value!r}")
    return int(value)
