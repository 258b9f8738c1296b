"""The models of `transformers`, an implementation from outside.

They read whole documents, one a row, without padding. Modules of some hold the state, so each row
has a copy.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from recurrentgemma.common.errors import ConfigError
from recurrentgemma.common.model.activations import EMBEDDER
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.twin import Outputs
from recurrentgemma.parity.models import Arrays, ComparedModel
from recurrentgemma_conversion.formats import Format
from recurrentgemma_conversion.names import family_of, layout
from recurrentgemma_conversion.overrides import NO_OVERRIDES, Overrides


class TransformersModel(ComparedModel):
    """A model of `transformers`; its recurrence is float32 in every dtype."""

    widest = "float32"
    plain = True

    def __init__(self, config: Config, model: Any) -> None:
        self.config, self._model = config, model

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | None,
        dtype: str,
        overrides: Overrides = NO_OVERRIDES,
        as_stored: bool = False,
        adapter: str | os.PathLike[str] | None = None,
    ) -> TransformersModel:
        """Loads a checkpoint of any format, or the bundled model if None.

        Args:
          path: The checkpoint.
          dtype: The dtype of parameters and computation.
          overrides: What the checkpoint does not say of the model.
          as_stored: Whether `transformers` reads the folder by itself, as its config says.
          adapter: LoRA adapters to add to the parameters; not `as_stored`.

        Raises:
          ConfigError: `transformers` has no such model, or does not read such a folder.
        """
        from recurrentgemma_conversion.opening import open_checkpoint

        with open_checkpoint(path, overrides, adapter=adapter) as reader:
            if not as_stored:
                return cls.make(reader.config, {spec.path: value for spec, value in reader}, dtype)
            if reader.format is not Format.HUGGINGFACE:
                raise ConfigError(
                    f"{path} must be a {Format.HUGGINGFACE} folder, got {reader.format}"
                )
            import torch
            import transformers

            folder = reader.path if reader.path.is_dir() else reader.path.parent
            transformers.logging.disable_progress_bar()  # the caller shows one
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation="eager"
            )
            return cls(reader.config, model.eval())

    @classmethod
    def make(cls, config: Config, params: Arrays, dtype: str) -> TransformersModel:
        """Makes a model of parameters in the Flax layout, by path.

        Raises:
          ConfigError: `transformers` has no model of this config.
        """
        import torch
        import transformers

        from recurrentgemma.torch.runtime.arrays import to_tensor

        family = family_of(config)
        if family is None:
            raise ConfigError("transformers has no model of other layers than the published ones")
        if problems := family.not_in_transformers(config):
            raise ConfigError(f"transformers has no such model: {', '.join(problems)}")
        theirs = transformers.AutoConfig.for_model(**family.to_fields(config, dtype))
        model = transformers.AutoModelForCausalLM.from_config(
            theirs, dtype=torch.float32, attn_implementation="eager"
        )
        stored = layout(config, Format.HUGGINGFACE).encode(lambda spec: params[spec.path])
        state = {name: to_tensor(np.asarray(tensor)) for name, tensor in stored}
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state)
        return cls(config, model.to(getattr(torch, dtype)).eval())

    def cast(self, dtype):
        import torch

        model = copy.deepcopy(self._model).to(getattr(torch, dtype))
        return TransformersModel(self.config, model)

    def run(self, tokens, segment_pos, state, names):
        rows = [(self._model, None)] * len(tokens) if state is None else state
        outputs = [
            self._row(model, cache, tokens[i : i + 1], segment_pos[i : i + 1], names)
            for i, (model, cache) in enumerate(rows)
        ]
        arrays = {name: np.concatenate([row[name] for row in outputs]) for name in outputs[0]}
        return Outputs(arrays, state)

    def _row(
        self, model: Any, cache: Any, tokens: np.ndarray, places: np.ndarray, names: tuple[str, ...]
    ) -> Arrays:
        import torch

        from recurrentgemma.torch.runtime.arrays import to_array

        captured, family = {}, family_of(self.config)
        assert family is not None  # or else it was not made

        def keep(name: str, output: Any) -> None:
            captured[name] = to_array(output[0] if isinstance(output, tuple) else output)

        with contextlib.ExitStack() as hooks, torch.no_grad():
            for name in names:
                if name == EMBEDDER:
                    handle = model.model.layers[0].register_forward_pre_hook(
                        lambda _, args: keep(EMBEDDER, args)
                    )
                else:
                    handle = model.model.get_submodule(
                        _their_name(name, family.modules)
                    ).register_forward_hook(
                        functools.partial(lambda name, _, args, output: keep(name, output), name)
                    )
                hooks.callback(handle.remove)
            given = {"use_cache": False} if cache is None else with_cache(model, cache)
            ids, position_ids = (torch.from_numpy(z.astype(np.int64)) for z in (tokens, places))
            logits = model(ids, position_ids=position_ids, **given).logits
        return {name: captured[name] for name in names} | {"logits": to_array(logits)}

    def start(self, batch_size, capacity):
        del capacity
        import transformers

        shared = {id(parameter): parameter for parameter in self._model.parameters()}
        return [
            (
                copy.deepcopy(self._model, dict(shared)),
                transformers.DynamicCache(config=self._model.config),
            )
            for _ in range(batch_size)
        ]

    def arrays_of(self, state):
        del state
        return {}  # its states have other layouts

    def parameters(self):
        return self._by_path(self._model.state_dict())

    def gradients(self, tokens, segment_pos):
        import torch

        ids, places = (torch.from_numpy(z.astype(np.int64)) for z in (tokens, segment_pos))
        logits = self._model(ids, position_ids=places, use_cache=False).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        names, parameters = zip(*self._model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters)
        return self._by_path(dict(zip(names, gradients, strict=True)))

    def _by_path(self, tensors: Any) -> Arrays:
        from recurrentgemma.torch.runtime.arrays import to_array

        stored = layout(self.config, Format.HUGGINGFACE)

        def fetch(name: str) -> np.ndarray:
            return to_array(tensors[name])

        return {spec.path: np.asarray(stored.decode(spec, fetch)) for spec in stored.specs}


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The argument that gives a model of `transformers` its cache, whose name is new in 5.24."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def _their_name(name: str, modules: Mapping[str, str]) -> str:
    """The "blocks.0.recurrent_block" of ours is "layers.0.temporal_block", for example."""
    return ".".join(modules.get(part, part) for part in name.split(".")).replace("blocks", "layers")
