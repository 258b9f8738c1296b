"""The documentation builds without a warning, and its generated parts are up to date."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_builds(tmp_path):
    """Strictly: a link or an anchor that leads nowhere is an error."""
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api/index.html").read_text()
    for name in ("recurrentgemma.jax.model.Model", "recurrentgemma.torch.model.Model"):
        assert f'id="{name}"' in api


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
    assert generated == 2
