"""The PyTorch twin over NumPy."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np

from backends.base import (
    Backend,
    Network,
    float_leaves,
    input_dtype,
    named_grads,
    position_dtype,
    wide_dtype,
)
from recurrentgemma.common.model.state_dict import to_torch, torch_name


class TorchBackend(Backend):
    name = "torch"

    @contextlib.contextmanager
    def running(self, implementation: str = "auto", **_: Any):
        """Places arrays on the GPU for Triton's kernels, unless those are interpreted."""
        compiled = implementation == "triton" and os.environ["TRITON_INTERPRET"] == "0"
        self.device = "cuda" if compiled else None
        try:
            with np.errstate(over="ignore"):  # exp in an interpreted kernel
                yield
        finally:
            self.device = None

    def _network(self, kind, arguments, params, dtype, kwargs) -> TorchNetwork:
        import torch

        module = getattr(self.module, kind)(*arguments, dtype=getattr(torch, dtype), **kwargs)
        module.load_state_dict(
            {
                torch_name(path): self.array(to_torch(path, np.asarray(value)), dtype)
                for path, value in params.items()
            }
        )
        return TorchNetwork(self, kind, module, tuple(params), dtype)

    def raw_griffin(self, config, params, dtype="float32"):
        model = self.twin.make(config, params.items(), dtype)
        return model, model

    def linear_scan(self, x, a, h0=None, reset=None, *, dtype="float64", **kwargs):
        with self.running(**kwargs):
            args = self.scan_arguments(x, a, h0, reset, dtype)
            return self.to_numpy(self.module.linear_scan(*args, **kwargs))

    def linear_scan_vjp(self, x, a, h0, reset, *, dy, dlast, dtype="float64", **kwargs):
        import torch

        with self.running(**kwargs):
            x, a, h0, reset = self.scan_arguments(x, a, h0, reset, dtype)
            inputs = [value.requires_grad_() for value in (x, a, h0)]
            outputs = self.module.linear_scan(x, a, h0, reset, **kwargs)
            cotangents = self.array(dy, dtype), self.array(dlast, wide_dtype(dtype))
            gradients = torch.autograd.grad(
                outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
            )
            return self.to_numpy((outputs, gradients))

    def rg_lru_scan(
        self, x, input_gate, a_gate, a_param, segment_pos, h0=None, *, dtype="float64", **kwargs
    ):
        with self.running(**kwargs):
            args = self.rg_lru_arguments(x, input_gate, a_gate, a_param, segment_pos, h0, dtype)
            return self.to_numpy(self.module.rg_lru_scan(*args, **kwargs))

    def rg_lru_scan_vjp(
        self,
        x,
        input_gate,
        a_gate,
        a_param,
        segment_pos,
        h0,
        *,
        dy,
        dlast,
        dtype="float64",
        **kwargs,
    ):
        import torch

        with self.running(**kwargs):
            args = self.rg_lru_arguments(x, input_gate, a_gate, a_param, segment_pos, h0, dtype)
            inputs = [value.requires_grad_() for value in args if value.is_floating_point()]
            outputs = self.module.rg_lru_scan(*args, **kwargs)
            cotangents = self.array(dy, dtype), self.array(dlast, wide_dtype(dtype))
            gradients = torch.autograd.grad(
                outputs, inputs, cotangents, allow_unused=True, materialize_grads=True
            )
            return self.to_numpy((outputs, gradients))

    def rg_lru_scan_second_vjp(
        self,
        x,
        input_gate,
        a_gate,
        a_param,
        segment_pos,
        h0,
        *,
        dy,
        dlast,
        directions,
        **kwargs,
    ):
        import torch

        args = self.rg_lru_arguments(x, input_gate, a_gate, a_param, segment_pos, h0, "float64")
        inputs = [value.requires_grad_() for value in args if value.is_floating_point()]
        outputs = self.module.rg_lru_scan(*args, **kwargs)
        cotangents = self.array(dy, "float64"), self.array(dlast, "float64")
        gradients = torch.autograd.grad(outputs, inputs, cotangents, create_graph=True)
        directions = [self.array(d, "float64") for d in directions]
        return self.to_numpy(torch.autograd.grad(gradients, inputs, directions))


class TorchNetwork(Network):
    def __init__(self, backend: TorchBackend, kind: str, module, paths, dtype: str) -> None:
        self.backend, self.kind, self.module, self.dtype = backend, kind, module, dtype
        self.paths = paths

    def _arguments(self, x, segment_pos, state) -> list[Any]:
        arguments: list[Any] = [self.backend.array(x, input_dtype(x, self.dtype))]
        if segment_pos is not None:
            arguments.append(self.backend.array(segment_pos, position_dtype(segment_pos)))
            arguments.append(self.backend.state(state, self.dtype, self.kind))
        return arguments

    def __call__(self, x, segment_pos=None, state=None):
        import torch

        with torch.no_grad():
            outputs = self.module(*self._arguments(x, segment_pos, state))
        outputs = self.backend.to_numpy(outputs)
        return outputs if segment_pos is not None else (outputs, None)

    def grads(self, x, segment_pos=None, state=None, *, dy, dstate=None):
        import torch

        arguments = self._arguments(x, segment_pos, state)
        inputs = [
            leaf.requires_grad_() for leaf in _torch_leaves(arguments) if leaf.is_floating_point()
        ]
        outputs = self.module(*arguments)
        outputs = [leaf for leaf in _torch_leaves(outputs) if leaf.is_floating_point()]
        wide = wide_dtype(self.dtype)
        cotangents = [self.backend.array(c, wide) for c in [dy, *float_leaves(dstate)]]
        pairs = zip(outputs, cotangents, strict=True)
        loss = torch.stack([(out.to(c.dtype) * c).sum() for out, c in pairs]).sum()
        names, parameters = zip(*self.module.named_parameters(), strict=True)
        gradients = torch.autograd.grad(
            loss, [*parameters, *inputs], allow_unused=True, materialize_grads=True
        )
        gradients = [self.backend.to_numpy(gradient) for gradient in gradients]
        by_name = dict(zip(names, gradients, strict=False))
        flat = {path: to_torch(path, by_name[torch_name(path)]) for path in self.paths}
        return named_grads(flat, x, state, gradients[len(names) :])


def _torch_leaves(tree: Any) -> list[Any]:
    if tree is None:
        return []
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in _torch_leaves(part)]
    if isinstance(tree, tuple | list):
        return [leaf for part in tree for leaf in _torch_leaves(part)]
    return [tree]
