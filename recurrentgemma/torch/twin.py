"""The PyTorch half of the package, as `common.twin` declares it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.layer_spec import layer_spec
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma.common.quantization import Quantized, input_axis
from recurrentgemma.common.twin import Outputs, Twin, process_memory
from recurrentgemma.torch import products
from recurrentgemma.torch.capture import activations
from recurrentgemma.torch.checkpoint import load_checkpoint, save_checkpoint
from recurrentgemma.torch.model import Model
from recurrentgemma.torch.products import dense
from recurrentgemma.torch.quantization import (
    QuantizedMatrix,
    dequantizing,
    pack_matrices,
    parameter,
    replace,
    state_of,
)
from recurrentgemma.torch.runtime.arrays import to_array, to_tensor
from recurrentgemma.torch.runtime.processes import join, processes_of
from recurrentgemma.torch.sampler import Sampler
from recurrentgemma.torch.sharding import make_mesh
from recurrentgemma_conversion.overrides import NO_OVERRIDES


class TorchTwin(Twin):
    """PyTorch; its models are a `Model` each."""

    name = "torch"

    @property
    def training(self):
        from recurrentgemma.torch import training  # slow to import, and sampling needs none of it

        return training

    @property
    def products(self):
        return products

    def default_device(self):
        return "cuda" if torch.cuda.is_available() else "cpu"

    def memory(self):
        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else process_memory()

    def precision(self, dtype):
        return contextlib.nullcontext()

    def to_numpy(self, array):
        return to_array(array)

    def from_numpy(self, array, dtype, device=None):
        return to_tensor(np.array(array, order="C")).to(device or "cpu", getattr(torch, dtype))

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
        model = load_checkpoint(
            path,
            dtype=getattr(torch, dtype),
            device=device,
            mesh=mesh,
            overrides=overrides or NO_OVERRIDES,
            adapter=adapter,
            quantize=quantize,
        )
        pack_matrices(model, decoding)
        return model

    def make(self, config, params, dtype, device=None, decoding=0):
        model = Model(config, device="meta")
        specs, state = {spec.path: spec for spec in layer_spec(config)}, {}
        for path, value in params:
            if isinstance(value, Quantized):
                held = value.replace(dtype=dtype).with_parts(to_tensor)
                replace(model, specs[path], held.with_parts(lambda part: part.to(device or "cpu")))
            else:
                state[torch_name(path)] = self.from_numpy(to_torch(path, value), dtype, device)
        model.load_state_dict(model.state_dict() | state, assign=True)
        state.clear()  # packing takes the place of each tensor
        pack_matrices(model, decoding)
        return model

    def init(self, config, seed, dtype, device=None, mesh=None):
        model = Model(config, device=device, dtype=getattr(torch, dtype), mesh=mesh)
        model.reset_parameters(seed=seed)
        return model

    def save(self, path, model, tokenizer, *, force=False):
        save_checkpoint(path, model, tokenizer, force=force)

    def params(self, model):
        return _by_path(model.config, {n: dense(v) for n, v in state_of(model).items()})

    def quantized(self, model):
        values = {spec: parameter(model, spec) for spec in layer_spec(model.config)}
        return {
            spec.path: value.quantized.replace(axis=input_axis(spec))
            for spec, value in values.items()
            if isinstance(value, QuantizedMatrix)
        }

    def dequantizing(self, model):
        dequantizing(model)
        return model

    def init_state(self, model, batch_size, capacity=None):
        return model.init_cache(batch_size, capacity=capacity)

    def state_arrays(self, state):
        return {
            f"{block}.{field}": self.to_numpy(value)
            for block, cache in state.items()
            for field, value in cache._asdict().items()
        }

    def forward(self, model, tokens, segment_pos, state=None, names=()):
        tokens, segment_pos = (self.from_numpy(z, "int32") for z in (tokens, segment_pos))
        with torch.no_grad():
            found, logits, state = activations(model, tokens, segment_pos, state, names=names)
        found = {name: self.to_numpy(found[name]) for name in names}
        return Outputs(found | {"logits": self.to_numpy(logits)}, state)

    def gradients(self, model, tokens, segment_pos):
        names, parameters = zip(*model.named_parameters(), strict=True)
        tokens, segment_pos = (self.from_numpy(z, "int64") for z in (tokens, segment_pos))
        logits, _ = model(tokens, segment_pos)
        logprobs = logits[:, :-1].log_softmax(-1)
        logprobs = logprobs.gather(-1, tokens[:, 1:, None])[..., 0]
        follows = segment_pos[:, 1:] > 0
        loss = -torch.where(follows, logprobs, 0).sum() / follows.sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        return _by_path(model.config, dict(zip(names, gradients, strict=True)))

    def sampler(self, model, vocab, **settings):
        return Sampler(model, vocab, **settings)

    def train_state(self, model, *, gradient_checkpointing, state_dtype, **options):
        model.gradient_checkpointing = gradient_checkpointing
        state_dtype = getattr(torch, state_dtype)
        return self.training.create_train_state(model, state_dtype=state_dtype, **options)

    def trained(self, state):
        return self.training.parameters(state)


TWIN = TorchTwin()


def _by_path(config: Config, tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {
        spec.path: to_torch(spec.path, to_array(tensors[torch_name(spec.path)]))
        for spec in layer_spec(config)
    }
