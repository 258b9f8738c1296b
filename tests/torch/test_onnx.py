"""A model as an ONNX program."""

import warnings

import numpy as np
import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
import torch
from cases import CONFIGS, make_batch

from recurrentgemma.torch import Griffin
from tolerances import assert_close


class Logits(torch.nn.Module):
    """The part of a model's results that a program returns."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor, segment_pos: torch.Tensor) -> torch.Tensor:
        return self.model(tokens, segment_pos, return_cache=False)[0]


def test_the_program_gives_the_models_logits() -> None:
    """Past the window, with several documents and padding; ONNX's own evaluator runs it."""
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript")
    reference = pytest.importorskip("onnx.reference", reason="pip install onnx onnxscript")
    config = CONFIGS["griffin"]
    model = Griffin(config, dtype=torch.float32).eval()
    model.reset_parameters(seed=0)
    inputs = tuple(map(torch.from_numpy, make_batch(config, 17)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        expected = Logits(model)(*inputs).numpy()
        program = torch.onnx.export(Logits(model), inputs, dynamo=True, verbose=False)
    assert program is not None
    evaluator = reference.ReferenceEvaluator(program.model_proto)
    names = [one.name for one in program.model_proto.graph.input]
    given = {name: z.numpy() for name, z in zip(names, inputs, strict=True)}
    (logits,) = evaluator.run(None, given)
    valid = np.asarray(inputs[1]) >= 0
    assert_close(logits[valid], expected[valid], "logits", "float32")
