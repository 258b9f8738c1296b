"""`torch.compile`: no graph breaks, and no loop over time unrolled."""

import shutil

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
from programs import run_programs

# In a process of its own, where annotations are not checked: Dynamo cannot trace the checks.
PREAMBLE = """
import warnings

# Dynamo itself makes an instance of an autograd function to trace its backward pass.
warnings.simplefilter("error")
warnings.filterwarnings("ignore", ".*should not be instantiated", DeprecationWarning)
warnings.filterwarnings("ignore", ".*torch.jit.script_method")
warnings.filterwarnings("ignore", "Guards may run slower on Python 3.13.0", RuntimeWarning)

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

def compare(function, make_inputs, lengths=(20, 90), dynamic=False):
    "Compiled against not: values, gradients; returns the nodes of the graphs at each length."
    sizes = {"forward": [], "backward": []}
    def count(direction):
        def compiler(graph, inputs):
            sizes[direction].append(len(graph.graph.nodes))
            return make_boxed_func(graph.forward)
        return compiler
    backend = aot_autograd(fw_compiler=count("forward"), bw_compiler=count("backward"))
    for length in lengths:
        torch._dynamo.reset()
        inputs = make_inputs(length)
        leaves = [leaf for leaf in inputs if leaf.requires_grad]
        leaves += list(function.parameters()) if isinstance(function, torch.nn.Module) else []
        compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
        results = []
        for run in (function, compiled):
            value = run(*inputs)
            results.append([value, *torch.autograd.grad(value, leaves)])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert all(len(found) == len(lengths) for found in sizes.values()), sizes
    return sizes
"""

SCAN = """
import importlib.util

from sweeps import sweep
from recurrentgemma.torch.scan import IMPLEMENTATIONS, linear_scan

def inputs(length):
    torch.manual_seed(length)
    x, a = torch.rand(2, 3, length, 5, dtype=torch.float64)
    h0 = torch.rand(3, 5, dtype=torch.float64)
    return x.requires_grad_(), a.clone().requires_grad_(), h0.requires_grad_()

# "auto" is one of the others, and "reference" the loop that defines the scan.
for name in set(IMPLEMENTATIONS) - {"auto", "reference"}:
    if name == "triton" and importlib.util.find_spec("triton") is None:
        continue
    lengths = (2, 5) if name == "triton" else (20, 90)  # interpreted
    directions = {"associative": (True,), "triton": (False,)}.get(name, (False, True))
    for reverse in sweep(directions, (False, True)):
        def loss(x, a, h0):
            y, last = linear_scan(x, a, h0, reverse=reverse, implementation=name)
            return (y * y).sum() + last.sum()
        leaves = lambda n: tuple(v.detach().requires_grad_() for v in inputs(n))
        sizes = compare(loss, leaves, lengths)
        if name != "associative":  # whose passes are as many as the length has bits
            assert all(len(set(found)) == 1 for found in sizes.values()), (name, sizes)
"""

MODEL = """
from sweeps import sweep
from recurrentgemma.torch import Griffin, GriffinConfig

config = GriffinConfig(
    vocab_size=31, width=24, mlp_expanded_width=32, num_heads=2, attention_window_size=8,
    block_types=("recurrent", "attention"), embeddings_scale_by_sqrt_dim=True, logits_soft_cap=5.0,
)

class Loss(torch.nn.Module):
    def __init__(self, checkpointing):
        super().__init__()
        self.model = Griffin(config, checkpointing, dtype=torch.float64)

    def forward(self, tokens, segment_pos, *cache):
        first, second = cache[:2], cache[2:]
        cache = {
            "blocks.0": type(self.empty["blocks.0"])(*first),
            "blocks.1": type(self.empty["blocks.1"])(*second),
        } if cache else None
        logits, new_cache = self.model(tokens, segment_pos, cache)
        return logits.square().sum() + new_cache["blocks.0"].rg_lru_state.sum()

def inputs(length, cache):
    torch.manual_seed(length)
    leaves = [leaf for fields in cache.values() for leaf in fields] if cache else []
    start = 9 if cache else 0
    return (
        torch.randint(31, (2, length)),
        torch.arange(start, start + length).expand(2, length).contiguous(),
        *leaves,
    )

for checkpointing, lengths in ((False, sweep((20,), (20, 90))), (True, (20, 90))):
    loss = Loss(checkpointing)
    with torch.no_grad():
        _, cache = loss.model(*inputs(9, None))
    loss.empty = loss.model.init_cache(2)
    state = cache if checkpointing else None
    sizes = compare(loss, lambda n: inputs(n, state), lengths)
    assert all(len(set(found)) == 1 for found in sizes.values()), sizes

# Sizes are symbols from the start. Numbers of the config are constants: Dynamo would make symbols
# of them, too, and trace everything a second time without.
with torch._dynamo.config.patch(specialize_float=sweep(True, False)):
    compare(loss, lambda n: inputs(n, None), (20,), dynamic=True)

# Parameters that are not the module's own, which the backward pass computes with too.
torch._dynamo.reset()
model = loss.model
arguments = inputs(20, None)
names = [name for name, _ in model.named_parameters()]
others = [torch.rand_like(p).requires_grad_() for p in model.parameters()]

def handed_in(*others):
    parameters = dict(zip(names, others))
    return torch.func.functional_call(model, parameters, arguments)[0].square().sum()

compare(handed_in, lambda length: others, (20,))
"""


SAMPLER = """
import torch
from recurrentgemma.torch.quantization import quantize_matrices
from samplers import make_sampler, without_eos
from torch._dynamo.utils import counters

torch._dynamo.reset()
counters.clear()
expected = without_eos(make_sampler("torch"))
assert without_eos(make_sampler("torch", jit_compile=True)) == expected
assert counters["stats"]["unique_graphs"] == 1  # one for all steps, and whole

torch._dynamo.reset()
counters.clear()
sampler = make_sampler("torch", jit_compile=True)
quantize_matrices(sampler.model, "q8")
sampler(["In the"], 4, end_sampling_at_eos_token=False)
assert counters["stats"]["unique_graphs"] == 1
"""
# The sampler first: the others turn warnings into errors.
PROGRAMS = {"sampler": SAMPLER} if shutil.which("g++") else {}
PROGRAMS |= {"scan": PREAMBLE + SCAN, "model": PREAMBLE + MODEL}


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    """The programs that failed, with their tracebacks."""
    return run_programs(PROGRAMS)


@pytest.mark.parametrize("name", ["scan", "model"])
def test_no_graph_breaks_and_as_many_nodes_at_any_length(failures, name: str) -> None:
    assert name not in failures, failures[name]


@pytest.mark.skipif("sampler" not in PROGRAMS, reason="torch.compile needs a C++ compiler")
def test_a_sampler_that_compiles(failures) -> None:
    assert "sampler" not in failures, failures["sampler"]
