"""What every test runs under: the CPU, one thread, a compilation cache, checked annotations."""

import functools
import gc
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Read when a framework is first imported, which is later than this. Child processes inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # 0 where there is a GPU
# Compiling takes most of the time; these flags make it four times as fast, and leave results alone.
# XLA_FLAGS="" compiles as users do.
FAST_COMPILING = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# XLA aborts at a flag that it does not know, and newer versions lack this one.
if find_spec("jaxlib") and version("jaxlib").startswith(("0.9.", "0.10.")):
    FAST_COMPILING.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(FAST_COMPILING))
CACHE_ROOT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
try:
    JAX_CACHE = CACHE_ROOT / "recurrentgemma-tests" / "jax"
    JAX_CACHE.mkdir(parents=True, exist_ok=True)
except OSError:
    JAX_CACHE = Path(tempfile.gettempdir()) / f"recurrentgemma-tests-{os.getuid()}" / "jax"
    JAX_CACHE.mkdir(parents=True, exist_ok=True)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(JAX_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
KEEP_DAYS = 14
# Lowering is quicker without the line of the source that each operation comes from.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# The package and the tests are compiled once, and not anew in each process that a test starts.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Ignored in what a shell runs in the background, and inherited: tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from forks import ForkServer  # noqa: E402
from sweeps import sweep  # noqa: E402

from backends import BACKENDS, TWINS, Backend  # noqa: E402  # imports no twin yet

PACKAGE = Path(__file__).resolve().parents[1] / "recurrentgemma"


def _checked_modules() -> list[str]:
    """The modules with arrays in their signatures.

    Not configs, text and samplers: what they say to a wrong type is theirs to say, and tested.
    """
    files = [PACKAGE / "common" / "model" / "reference.py"]
    files += [file for twin in TWINS for file in sorted((PACKAGE / twin).rglob("[!_]*.py"))]
    for kernels in ("scan/triton_kernels.py", "runtime/triton_products.py"):
        files.remove(PACKAGE / "torch" / kernels)  # Triton reads their source
    return [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in files]


_checked = jaxtyping.jaxtyped


def _checked_outside(*, typechecker: Callable) -> Callable:
    """Checks what a module has; functions inside of functions are made anew at every call."""
    check = _checked(typechecker=typechecker)

    def decorate(made: Any) -> Any:
        if "<locals>" in made.__qualname__:
            return made
        return check(made) if isinstance(made, type) else _checked_once(made, check(made))

    return decorate


def _checked_once(function: Callable, checked: Callable) -> Callable:
    """Checks a call unless one with arrays of the same shapes and dtypes has passed before."""
    passed: set[Any] = set()

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        key = _kinds(args), *((name, _kind(value)) for name, value in kwargs.items())
        if key in passed:
            return function(*args, **kwargs)
        result = checked(*args, **kwargs)
        passed.add(key)
        return result

    return call


def _kinds(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(map(_kind, values))


def _kind(value: Any) -> Any:
    """All that an annotation can see of an argument."""
    if not isinstance(value, type) and hasattr(value, "shape") and hasattr(value, "dtype"):
        return type(value), tuple(value.shape), value.dtype
    if isinstance(value, tuple | list):
        return type(value), _kinds(value)
    if isinstance(value, dict):
        return dict, tuple(value), _kinds(value.values())
    return type(value)


jaxtyping.jaxtyped = _checked_outside  # which the hook puts before each function
jaxtyping.install_import_hook(_checked_modules(), "beartype.beartype")

hypothesis.settings.register_profile(
    "recurrentgemma",
    deadline=None,
    max_examples=sweep(12, 100),
    derandomize="CI" in os.environ,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("recurrentgemma")


def pytest_configure(config: pytest.Config) -> None:
    # Two processes may use the cache at a time: what one has half written, the other compiles.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning"
    )
    if not hasattr(config, "workerinput"):
        _forget_old_entries()


def _forget_old_entries() -> None:
    for entry in JAX_CACHE.iterdir():
        if entry.stat().st_mtime < time.time() - KEEP_DAYS * 24 * 3600:
            entry.unlink(missing_ok=True)


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not look at it every time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)  # tracing makes many objects, and few cycles


MOST_MAPS, MOST_MEMORY = 30_000, 2_500_000_000


@pytest.fixture(scope="module", autouse=True)
def _programs() -> Iterator[None]:
    """Modules share compiled programs, as long as these leave enough room.

    A program holds memory and maps pieces of it, and a process may map 65,530 pieces.
    """
    yield
    jax = sys.modules.get("jax")
    if jax is not None and _is_full():
        jax.clear_caches()


def _is_full() -> bool:
    process = Path("/proc/self")
    if not process.exists():
        return True
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident > MOST_MEMORY or (process / "maps").read_bytes().count(b"\n") > MOST_MAPS


@pytest.fixture(scope="session", autouse=True)
def _prompts_compile_what_they_need() -> Iterator[None]:
    """And not what longer ones would; tests/sampling/test_engine.py has a sampler's own way."""
    from recurrentgemma.common.generation.engine import Engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "prepares", False)
        yield


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # a library may use the global generator
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session", params=TWINS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each twin in turn."""
    return _installed(request.param)


@pytest.fixture(scope="session")
def twins() -> tuple[Backend, Backend]:
    """Both twins: JAX, PyTorch."""
    one, other = map(_installed, TWINS)
    return one, other


def _installed(twin: str) -> Backend:
    if twin not in BACKENDS:
        pytest.skip(f"{twin} is not installed")
    return BACKENDS[twin]


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    """Runs commands in processes of their own."""
    if not hasattr(os, "fork"):
        pytest.skip("forks, to be quick")
    with ForkServer(tmp_path_factory.mktemp("forks")) as server:
        yield server


@pytest.fixture
def unchecked_types() -> Iterator[None]:
    """Annotations are not checked, so that the package's own errors come through."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
