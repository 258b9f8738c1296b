"""How the tiny model is trained: the recipe, the rows it reads, one step, the checkpoint."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_evaluation import pack
from tiny_optimizer import make_optimizers
from tiny_tokenizer import VOCAB_SIZE
from torch import Tensor, nn
from torch.nn import functional


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained, how, and for how long: `steps`, or else `minutes`, or else `epochs`."""

    seed: int = 0
    batch_size: int = 16
    length: int = 256
    lr: float = 3e-3
    warmup: float = 0.03
    weight_decay: float = 0.1
    epochs: float = 3.0
    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "lr", "epochs", "minutes", "steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")

    def progress(self, step: int, seconds: float, steps_per_epoch: int) -> float:
        """How much of the run is done, in [0, 1]; the learning rate follows it."""
        if self.steps is not None:
            done = step / self.steps
        elif self.minutes is not None:
            done = seconds / (60 * self.minutes)
        else:
            done = step / max(1, round(self.epochs * steps_per_epoch))
        return min(1.0, done)

    def lr_at(self, progress: float) -> float:
        """Linear warm-up, then linearly to zero: rounding to bfloat16 finds settled weights."""
        return self.lr * min(progress / self.warmup, (1 - progress) / (1 - self.warmup))


def model_config() -> Any:
    """The tiny model's shape."""
    from recurrentgemma.torch import GriffinConfig, TemporalBlockType

    recurrent, attention = TemporalBlockType.RECURRENT, TemporalBlockType.ATTENTION
    return GriffinConfig(
        vocab_size=VOCAB_SIZE,
        width=256,
        mlp_expanded_width=768,
        num_heads=4,
        lru_width=256,
        block_types=(recurrent, recurrent, attention) * 2,
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=128,
        logits_soft_cap=30.0,
    )


def build_model(config: Any, device: torch.device) -> nn.Module:
    """A Griffin in float32."""
    from recurrentgemma.torch import Griffin

    return Griffin(config, gradient_checkpointing=False, device=device, dtype=torch.float32)


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """A cache (dicts, NamedTuples, tuples of tensors) with `function` applied to each tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        items = [map_tensors(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return tree


class Lanes:
    """The training text as `batch_size` parallel lanes, cut into rows of `length` tokens."""

    def __init__(self, encoded: list[np.ndarray], recipe: Recipe) -> None:
        self.encoded = encoded
        self.recipe = recipe
        self.lane = (sum(map(len, encoded)) - 1) // recipe.batch_size
        self.steps_per_epoch = self.lane // recipe.length
        if not self.steps_per_epoch:
            raise ValueError(
                f"batch_size x length must be less than the {sum(map(len, encoded)):,} tokens of "
                f"text, got {recipe.batch_size} x {recipe.length}"
            )

    def rows(self, step: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Endless rows from `step` on.

        Yields:
            tokens `[B, T + 1]`, the last being the last target; their positions; whether the
            lanes begin anew, so that the state of the row before does not belong to this one.
        """
        length, lane = self.recipe.length, self.lane
        while True:
            epoch, index = divmod(step, self.steps_per_epoch)
            rng = np.random.default_rng([self.recipe.seed, epoch])
            stream = pack([self.encoded[i] for i in rng.permutation(len(self.encoded))])
            starts = np.arange(self.recipe.batch_size)[:, None] * lane
            for row in range(index, self.steps_per_epoch):
                where = starts + row * length + np.arange(length + 1)
                # A lane may begin within a chapter; its rest then counts as a chapter.
                cut = stream.document[where] == stream.document[starts]
                positions = stream.positions[where] - cut * stream.positions[starts]
                yield torch.from_numpy(stream.tokens[where]), torch.from_numpy(positions), row == 0
            step = (epoch + 1) * self.steps_per_epoch


class Trainer:
    """The model, its optimizers and everything that a checkpoint must hold to go on exactly."""

    def __init__(self, recipe: Recipe, lanes: Lanes, device: torch.device) -> None:
        from recurrentgemma.common.layer_spec import layer_spec

        self.recipe, self.lanes, self.device = recipe, lanes, device
        self.config = model_config()
        self.model: Any = build_model(self.config, device)
        self.model.reset_parameters(seed=recipe.seed)
        self.optimizers = make_optimizers(
            self.model, layer_spec(self.config), recipe.lr, recipe.weight_decay
        )
        self.step, self.seconds, self.cache = 0, 0.0, None

    def progress(self) -> float:
        """How much of the run is done."""
        return self.recipe.progress(self.step, self.seconds, self.lanes.steps_per_epoch)

    def train_step(self, tokens: Tensor, positions: Tensor, fresh: bool) -> float:
        """One update; returns the loss in nats per token."""
        tokens, positions = tokens.to(self.device), positions.to(self.device)
        cache = None if fresh else self.cache
        logits, cache = self.model(
            tokens=tokens[:, :-1], segment_pos=positions[:, :-1], cache=cache
        )
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        lr = self.recipe.lr_at(self.progress())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.cache = map_tensors(Tensor.detach, cache)
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Writes the checkpoint; the file is the old one or the whole new one, never a part."""
        leaves: list[Tensor] = []
        map_tensors(lambda leaf: leaves.append(leaf) or leaf, self.cache)
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "cache": leaves,
        }
        temporary = path.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, path)

    def restore(self, state: dict[str, Any]) -> None:
        """Goes back to where `save` was called."""
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if state["cache"]:
            leaves = iter(state["cache"])
            like = self.model.init_cache(self.recipe.batch_size)
            self.cache = map_tensors(lambda leaf: next(leaves).to(leaf), like)
