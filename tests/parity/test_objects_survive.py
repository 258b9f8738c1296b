"""Objects go through pickle, copies, `torch.save`, cloudpickle, Flax and Orbax at any moment."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cases import make_config, make_params
from samplers import lists, make_sampler
from sweeps import sweep
from trainers import TRAINERS, make_batch

from recurrentgemma.common.generation.conversation import Conversation
from recurrentgemma.common.generation.strategies import Categorical, Greedy
from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.model.presets import Preset
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.common.training.adapters import Adapters
from recurrentgemma.common.training.lora import LoraOptions, trainable_specs
from recurrentgemma.common.training.optimization import OptimizerOptions

CONFIG = make_config("R")
DRAWS = Categorical(temperature=0.9, repetition_penalty=1.1)


def _torch_saved(value: Any) -> Any:
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def _cloudpickled(value: Any) -> Any:
    cloudpickle = pytest.importorskip("cloudpickle", reason="cloudpickle is not installed")
    return pickle.loads(cloudpickle.dumps(value))


WAYS: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "old pickle": lambda value: pickle.loads(pickle.dumps(value, 2)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "torch.save": _torch_saved,
    "cloudpickle": _cloudpickled,
}
way = pytest.mark.parametrize("way", WAYS)


# ----------------------------------------------------------------------------------- values


def values() -> dict[str, Any]:
    config = make_config("RA")
    lora = LoraOptions(rank=2)
    arrays = {spec.path: np.ones(spec.shape) for spec in trainable_specs(config, lora)}
    return {
        "griffin": config,
        "gemma": GemmaConfig.from_sizes(3, 512, 24, 32, 7, 2, 1, 12, sliding_window=6),
        "model": config.model,
        "preset": Preset.RECURRENT_GEMMA_2B_V1,
        "greedy": Greedy(1.5),
        "categorical": DRAWS,
        "lora": lora,
        "optimizer": OptimizerOptions("sgd", momentum=0.5),
        "batch": make_batch(config, 0),
        "adapters": Adapters(config, lora, arrays),
    }


@way
@pytest.mark.parametrize("name", values())
def test_values(name: str, way: str) -> None:
    """What comes back is equal, of the same class, and hashes alike where it hashes."""
    value = values()[name]
    back = WAYS[way](value)
    assert type(back) is type(value)
    if name in ("batch", "adapters"):
        assert str(back) == str(value)
    else:
        assert (back, hash(back), repr(back)) == (value, hash(value), repr(value))


@way
@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_tokenizers(kind: str, way: str) -> None:
    tokenizer = Tokenizer(BUNDLED / "tokenizer.model")
    if kind == "json":
        import tokenizers

        pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b"]
        model = tokenizers.models.WordLevel({p: i for i, p in enumerate(pieces)}, "<unk>")
        tokenizer = Tokenizer(tokenizers.Tokenizer(model))
    back = WAYS[way](tokenizer)
    tokens = tokenizer.encode("a b")
    assert back.encode("a b") == tokens
    assert back.decode(tokens) == tokenizer.decode(tokens)
    assert (back.bos_id, back.end_of_turn_id) == (tokenizer.bos_id, tokenizer.end_of_turn_id)


# --------------------------------------------------------------------------------- sampling


@functools.cache
def sampler(twin: str) -> Any:
    return make_sampler(twin, is_it_model=True, sampling=DRAWS)


def a_sampler(twin: str) -> tuple[Any, Callable[[Any], Any]]:
    return sampler(twin), lambda s: lists(s(["In"], 4, rng=1).tokens)


def a_state(twin: str) -> tuple[Any, Callable[[Any], Any]]:
    state = sampler(twin).prefill([2, 5, 6, 7])
    return state, lambda s: lists(sampler(twin).generate(s, 4, rng=1).tokens)


def an_output(twin: str) -> tuple[Any, Callable[[Any], Any]]:
    out = sampler(twin)(["In", "x"], 4, rng=1, return_logits=True, num_logprobs=2)
    return out, lambda o: (o.text, lists(o.tokens), lists(o.logits[0]))


def a_score(twin: str) -> tuple[Any, Callable[[Any], Any]]:
    return sampler(twin).score(["In the"]), lambda s: (s[0].tokens, s[0].logprobs.tolist())


def a_conversation(twin: str, say: tuple[str, ...] = ()) -> tuple[Any, Callable[[Any], Any]]:
    conversation = Conversation(sampler(twin), "be brief")
    for text in say:
        conversation.ask(text, 3, rng=1)
    return conversation, lambda c: (c.ask("more", 3, rng=2), [t.tokens for t in c.turns])


def a_stream(twin: str, read: int) -> tuple[Any, Callable[[Any], Any]]:
    stream = sampler(twin).stream("In the", 6, rng=1)
    for _ in range(read):
        next(stream)
    return stream, lambda s: (s.tokens, list(s), s.tokens, s.finish_reason, s.state.num_tokens)


def a_closed_stream(twin: str) -> tuple[Any, Callable[[Any], Any]]:
    stream, use = a_stream(twin, 2)
    stream.close()
    return stream, use


def a_cache(twin: str) -> tuple[Any, Callable[[Any], Any]]:
    cache = sampler(twin).prefill("In the").cache or sampler(twin).model.init_cache(2)
    return cache, lambda c: [np.asarray(z).tolist() for block in c.values() for z in block]


def a_model(twin: str) -> tuple[Any, Callable[[Any], Any]]:
    model = sampler(twin).model
    if twin == "jax":
        return model, lambda m: (m == model, hash(m) == hash(model))
    tokens = np.array([[2, 5, 6]])
    return model, lambda m: m(tokens, np.arange(3)[None])[0].tolist()


SAMPLED: dict[str, Callable[[str], tuple[Any, Callable[[Any], Any]]]] = {
    "sampler": a_sampler,
    "engine": lambda twin: (sampler(twin).engine, lambda e: (e.config, e.dtype, e.num_bytes)),
    "state": a_state,
    "output": an_output,
    "score": a_score,
    "new conversation": a_conversation,
    "conversation": lambda twin: a_conversation(twin, ("a", "b")),
    "new stream": lambda twin: a_stream(twin, 0),
    "stream": lambda twin: a_stream(twin, 2),
    "finished stream": lambda twin: a_stream(twin, 6),
    "closed stream": a_closed_stream,
    "cache": a_cache,
    "model": a_model,
}


def some_ways() -> list[tuple[str, str]]:
    """Each object goes two ways, and each way takes several of them."""
    ways, half = [*WAYS], len(WAYS) // 2
    return [(name, ways[i % half + j]) for i, name in enumerate(SAMPLED) for j in (0, half)]


@pytest.mark.parametrize(
    ("name", "way"), sweep(some_ways(), [(name, way) for name in SAMPLED for way in WAYS])
)
def test_what_samples(backend, name: str, way: str) -> None:
    """What comes back does what the original does, and using it leaves the original alone."""
    original, use = SAMPLED[name](backend.name)
    back = WAYS[way](original)
    given = use(back)
    assert given == use(original)


@way
def test_a_running_answer(backend, way: str) -> None:
    """A conversation is pickled while it answers: what was said so far is kept."""
    conversation = Conversation(sampler(backend.name))
    answer = conversation.send("a", 5, rng=1)
    next(answer)
    back = WAYS[way](conversation)
    if way not in ("copy", "deepcopy"):  # these leave the answer running
        assert len(back.turns) == 1
        assert back.turns == conversation.turns
    assert back.ask("b", 2, rng=1) == back.turns[-1].model


# --------------------------------------------------------------------------------- training

KINDS: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "adapters": {"lora": LoraOptions(rank=2, targets=("mlp", "gates"), quantize=True)},
}
BATCH = make_batch(CONFIG, 0)


def trained(twin: str, kind: str, steps: int) -> Any:
    """A training state after steps, always the same."""
    trainer = TRAINERS[twin]
    state = trainer.state(CONFIG, make_params(CONFIG), **KINDS[kind])
    for _ in range(steps):
        state, _ = trainer.module.train_step(state, BATCH)
    return state


def arrays_of(twin: str, state: Any) -> dict[str, np.ndarray]:
    arrays = TRAINERS[twin].module.state_arrays(state)
    return {name: np.array(array) for name, array in arrays.items()}


@functools.cache
def expected(twin: str, kind: str, steps: int) -> dict[str, np.ndarray]:
    return arrays_of(twin, trained(twin, kind, steps))


def assert_trains_on(twin: str, kind: str, back: Any, steps: int) -> None:
    """One more step gives the bits of a run that was never interrupted."""
    back, _ = TRAINERS[twin].module.train_step(back, BATCH)
    given, wanted = arrays_of(twin, back), expected(twin, kind, steps + 1)
    assert given.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_array_equal(given[name], array, err_msg=name)


SOME_WAYS = [
    ("pickle", "bfloat16", 1),
    ("pickle", "adapters", 0),
    ("old pickle", "adapters", 1),
    ("copy", "bfloat16", 1),
    ("deepcopy", "adapters", 1),
    ("deepcopy", "bfloat16", 0),
    ("torch.save", "bfloat16", 1),
    ("cloudpickle", "adapters", 1),
]


@pytest.mark.parametrize(
    ("way", "kind", "steps"),
    sweep(SOME_WAYS, [(way, kind, steps) for way in WAYS for kind in KINDS for steps in (0, 1)]),
)
def test_training_states(backend, kind: str, steps: int, way: str) -> None:
    """The copy trains on as the original would, which stays as it is."""
    twin = backend.name
    original = trained(twin, kind, steps)
    back = WAYS[way](original)
    assert_trains_on(twin, kind, back, steps)
    if way != "copy":  # a shallow copy shares what a step changes
        for name, array in arrays_of(twin, original).items():
            np.testing.assert_array_equal(array, expected(twin, kind, steps)[name], err_msg=name)


def test_an_optimiser_of_ones_own(backend) -> None:
    """A state with a function for an optimiser goes as that function does."""
    twin = backend.name
    trainer = TRAINERS[twin]
    if twin == "jax":
        import optax

        pytest.importorskip("cloudpickle", reason="pickle has no functions in functions")
        optimizer, back = optax.sgd(0.1), WAYS["cloudpickle"]
    else:
        import torch

        optimizer, back = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), WAYS["pickle"]
    state = trainer.state(CONFIG, make_params(CONFIG), optimizer=optimizer)
    again, _ = trainer.module.train_step(back(state), BATCH)
    state, _ = trainer.module.train_step(state, BATCH)
    one, other = arrays_of(twin, state), arrays_of(twin, again)
    for name, array in one.items():
        np.testing.assert_array_equal(other[name], array, err_msg=name)


# ------------------------------------------------------------- trees that Flax and Orbax write


def _by_flax(tree: Any, like: Any, tmp_path) -> Any:
    import flax.serialization

    return flax.serialization.from_bytes(like, flax.serialization.to_bytes(tree))


def _by_orbax(tree: Any, like: Any, tmp_path) -> Any:
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "tree", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(tmp_path / "tree", like)


@pytest.mark.parametrize(
    ("by", "kind"),
    sweep(
        [(_by_flax, "bfloat16"), (_by_orbax, "adapters")],
        [(by, kind) for by in (_by_flax, _by_orbax) for kind in KINDS],
    ),
)
def test_training_states_as_trees(by, kind: str, tmp_path, unchecked_types) -> None:
    """Orbax puts marks in the places of arrays for a while, which the annotations refuse."""
    pytest.importorskip("flax.linen", reason="jax is not installed")
    back = by(trained("jax", kind, 1), trained("jax", kind, 0), tmp_path)
    assert_trains_on("jax", kind, back, 1)


@pytest.mark.parametrize("by", [_by_flax, _by_orbax])
@pytest.mark.parametrize("name", ["params", "cache"])
def test_trees(by, name: str, tmp_path) -> None:
    pytest.importorskip("flax.linen", reason="jax is not installed")
    import jax

    own = sampler("jax")
    tree = own.params if name == "params" else own.prefill([2, 5, 6]).cache
    tree = own.model.init_cache(2) if tree is None else tree
    back = by(tree, jax.tree.map(jax.numpy.zeros_like, tree), tmp_path)
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for one, other in zip(jax.tree.leaves(tree), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_cache_of_torch_is_loaded_as_weights() -> None:
    """`torch.load` reads it without being told to trust the file."""
    pytest.importorskip("torch.nn", reason="torch is not installed")
    import torch

    cache, use = a_cache("torch")
    file = io.BytesIO()
    torch.save(cache, file)
    assert use(torch.load(io.BytesIO(file.getvalue()), weights_only=True)) == use(cache)
