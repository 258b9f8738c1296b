"""The documentation builds without a warning, and its generated parts are up to date."""

import functools
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
API = re.compile(r"^(?:twins|both|jax|torch): ([\w.]+)(?: \| ([\w.]+))?$", re.MULTILINE)
# What layers and strategies have for the package itself, and what Flax gives a dataclass.
INTERNAL = {
    *("build", "child", "declare", "extra_repr", "linear", "materialise", "reset_parameters"),
    *("init_with_output", "replace", "setup", "adjusts", "biases"),
}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """Strictly: a link or an anchor that leads nowhere is an error."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_pages(site):
    api = (site / "api/index.html").read_text()
    for name in ("jax.Model", "torch.Model", "jax.Sampler.stream"):
        assert f'id="recurrentgemma.{name}"' in api
    notebook = (site / "notebooks/inside_griffin/index.html").read_text()
    assert notebook.count("<img ") == 7
    assert (site / "examples/translate/results/results/index.html").exists()


def test_nothing_comes_from_elsewhere(site):
    """Pages load files of the site alone, by relative paths: it can stand at any address."""
    assert (site / "mathjax/LICENSE").exists()
    loads = re.compile(r'<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)="([^"]+)"')
    for page in site.rglob("index.html"):
        for path in loads.findall(page.read_text()):
            assert (page.parent / path.partition("?")[0]).exists(), f"{page}: {path}"
        assert 'data-md-component="source"' not in page.read_text()  # which asks GitHub


def test_api_has_every_public_name():
    """Methods too, inherited ones included."""
    entries = {name for pair in API.findall((ROOT / "docs/api.md").read_text()) for name in pair}
    kinds = (type(lambda: 0), property, classmethod, staticmethod, functools.cached_property)
    for framework, installed in (("jax", "jax.numpy"), ("torch", "torch.nn")):
        pytest.importorskip(installed)
        twin = importlib.import_module(f"recurrentgemma.{framework}")
        own = set(twin.__all__) - {"Griffin"}  # the published name of `Model`
        assert own <= entries
        for name in own:
            cls = getattr(twin, name)
            bases = cls.__mro__ if inspect.isclass(cls) else ()
            for base in bases:
                for method, value in vars(base).items():
                    ours = base.__module__.startswith("recurrentgemma") and isinstance(value, kinds)
                    called = method == "__call__" or method[0] != "_"
                    if ours and called and method not in INTERNAL:
                        assert f"{name}.{method}" in entries


def test_generated_parts():
    spec = importlib.util.spec_from_file_location("write_docs", ROOT / "scripts/write_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generated = 0
    for page in (ROOT / "docs").glob("*.md"):
        text = page.read_text()
        generated += text.count("<!-- generated: ")
        assert module.written(text) == text, f"{page.name}: run make docs"
    assert generated == 16
