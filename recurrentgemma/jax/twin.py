"""The JAX half of the package, as `common.twin` declares it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec, spec_by_path
from recurrentgemma.common.quantization import Quantized
from recurrentgemma.common.twin import Outputs, Twin, process_memory
from recurrentgemma.jax import products
from recurrentgemma.jax.capture import activations
from recurrentgemma.jax.checkpoint import load_checkpoint, save_checkpoint
from recurrentgemma.jax.model import Model
from recurrentgemma.jax.products import dense
from recurrentgemma.jax.quantization import dequantizing
from recurrentgemma.jax.runtime.params import init_params
from recurrentgemma.jax.runtime.processes import join, processes_of
from recurrentgemma.jax.runtime.stored import as_stored, stored
from recurrentgemma.jax.runtime.trees import Params, get_path, set_path
from recurrentgemma.jax.sampler import Sampler
from recurrentgemma.jax.sharding import make_mesh
from recurrentgemma_conversion.overrides import NO_OVERRIDES


class ModelAndParams(NamedTuple):
    """A module and its parameters."""

    module: Model
    params: Params

    @property
    def config(self) -> Config:
        return self.module.config

    @property
    def dtype(self) -> str:
        return jnp.dtype(self.module.param_dtype).name


class JaxTwin(Twin):
    """JAX; its models are a `ModelAndParams` each."""

    name = "jax"

    @property
    def training(self):
        from recurrentgemma.jax import training  # slow to import, and sampling needs none of it

        return training

    @property
    def products(self):
        return products

    def default_device(self):
        return jax.default_backend()

    def memory(self):
        statistics = jax.devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else process_memory()

    def precision(self, dtype):
        return jax.enable_x64(dtype == "float64")

    def to_numpy(self, array):
        return np.asarray(array)

    def from_numpy(self, array, dtype, device=None):
        return jnp.asarray(array, dtype, device=_device(device))

    def join(self, coordinator=None, processes=None, process_id=None):
        join(coordinator, processes, process_id)

    def mesh(self, text):
        return make_mesh(text)

    def processes(self, mesh):
        return processes_of(mesh)

    def load(
        self,
        path,
        dtype,
        device=None,
        overrides=None,
        adapter=None,
        quantize=None,
        decoding=0,
        mesh=None,
    ):
        with self.precision(dtype):
            model, params = load_checkpoint(
                path,
                dtype=dtype,
                device=_device(device),
                mesh=mesh,
                overrides=overrides or NO_OVERRIDES,
                adapter=adapter,
                quantize=quantize,
                decoding=decoding > 0,
            )
        return ModelAndParams(model, params)

    def make(self, config, params, dtype, device=None, decoding=0):
        tree: dict[str, Any] = {}
        with self.precision(dtype):
            for path, value in params:
                if isinstance(value, Quantized):
                    held = jax.device_put(value.replace(dtype=dtype), _device(device))
                else:
                    held = self.from_numpy(value, dtype, device)
                if decoding:
                    held = as_stored(spec_by_path(config)[path], held, copies=False)
                set_path(tree, path, held)
        return ModelAndParams(Model(config, param_dtype=jnp.dtype(dtype)), tree)

    def init(self, config, seed, dtype, device=None, mesh=None):
        with self.precision(dtype), jax.default_device(_device(device)):
            params = init_params(config, seed, dtype, mesh=mesh)
        return ModelAndParams(Model(config, param_dtype=jnp.dtype(dtype), mesh=mesh), params)

    def save(self, path, model, tokenizer, *, force=False):
        save_checkpoint(path, model.config, model.params, tokenizer, force=force)

    def params(self, model):
        with self.precision(model.dtype):
            return _by_path(model.config, model.params)

    def quantized(self, model):
        leaves = {s.path: get_path(model.params, s.path) for s in layer_spec(model.config)}
        return {path: leaf for path, leaf in leaves.items() if isinstance(leaf, Quantized)}

    def dequantizing(self, model):
        return model._replace(params=dequantizing(model.params))

    def init_state(self, model, batch_size, capacity=None):
        with self.precision(model.dtype):
            return model.module.init_cache(batch_size, capacity=capacity)

    def state_arrays(self, state):
        return {
            f"{block}.{field}": self.to_numpy(value)
            for block, cache in state.items()
            for field, value in cache._asdict().items()
        }

    def forward(self, model, tokens, segment_pos, state=None, names=()):
        with self.precision(model.dtype):
            found, logits, state = _forward(*model, tokens, segment_pos, state, names=names)
        found = {name: self.to_numpy(found[name]) for name in names}
        return Outputs(found | {"logits": self.to_numpy(logits)}, state)

    def gradients(self, model, tokens, segment_pos):
        with self.precision(model.dtype):
            return _by_path(model.config, _gradients(*model, tokens, segment_pos))

    def sampler(self, model, vocab, **settings):
        params = stored(model.config, model.params)  # of which the sampler makes no copy
        return Sampler(model.module, vocab, params, **settings)

    def train_state(self, model, *, gradient_checkpointing, state_dtype, **options):
        module = model.module.clone(gradient_checkpointing=gradient_checkpointing)
        state_dtype = jnp.dtype(state_dtype)
        return self.training.create_train_state(
            module, model.params, state_dtype=state_dtype, **options
        )

    def trained(self, state):
        return ModelAndParams(state.model, self.training.parameters(state))


TWIN = JaxTwin()

# Compiled once for each shape.
_forward = jax.jit(activations, static_argnums=0, static_argnames="names")


@functools.partial(jax.jit, static_argnums=0)
def _gradients(module, params, tokens, segment_pos):
    def loss(params):
        logits, _ = module.apply({"params": params}, tokens, segment_pos)
        logprobs = jax.nn.log_softmax(logits[:, :-1])
        logprobs = jnp.take_along_axis(logprobs, tokens[:, 1:, None], -1)[..., 0]
        follows = segment_pos[:, 1:] > 0
        return -jnp.where(follows, logprobs, 0).sum() / follows.sum()

    return jax.grad(loss)(params)


def _by_path(config: Config, tree: Any) -> dict[str, np.ndarray]:
    return {spec.path: np.asarray(dense(get_path(tree, spec.path))) for spec in layer_spec(config)}


def _device(name: str | None) -> Any:
    return None if name is None else jax.devices(name)[0]
