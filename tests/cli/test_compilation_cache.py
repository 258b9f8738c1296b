"""What JAX compiled is kept from one command to the next, in the user's cache folder."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recurrentgemma.cli import compilation_cache

CODE = "import sys; from recurrentgemma.cli import main; sys.exit(main(sys.argv[1:]))"
ARGS = ["sample", "It was", "--framework", "jax", "--max-new-tokens", "2", "--json"]


@pytest.fixture
def alone(monkeypatch, tmp_path) -> Path:
    """No folder named by the user, and JAX not imported; the system's cache folder."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    return tmp_path / "recurrentgemma" / "jax"


def test_commands_fill_the_cache(tmp_path, checkpoint) -> None:
    pytest.importorskip("jax.numpy")
    folder = tmp_path / "recurrentgemma" / "jax"

    def run() -> None:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPIL")}
        environment["XDG_CACHE_HOME"] = str(tmp_path)
        command = [sys.executable, "-c", CODE, *ARGS, "--checkpoint", checkpoint]
        subprocess.run(command, env=environment, capture_output=True, check=True)

    run()
    entries = {entry.name for entry in folder.iterdir()}
    programs = [name.partition("-")[0] for name in entries]
    assert programs.count("jit_feed") == programs.count("jit_prefill") == 1  # not for any length
    run()
    assert {entry.name for entry in folder.iterdir()} == entries


def test_a_command_can_be_told_to_keep_nothing(alone: Path, cli) -> None:
    inspect = ("inspect", "--preset", "HAWK_PAPER_7B")
    assert cli("--no-compilation-cache", *inspect).code == 0
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert not alone.exists()
    assert cli(*inspect).code == 0
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(alone)
    assert alone.exists()


def test_a_folder_that_the_user_named_stays(alone: Path, monkeypatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/named")
    compilation_cache.use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/named"
    assert not alone.exists()


def test_old_programs_go(alone: Path, monkeypatch) -> None:
    alone.mkdir(parents=True)
    old, new = alone / "old", alone / "new"
    for entry, days in ((old, 31), (new, 29)):
        entry.write_bytes(b"x")
        made = time.time() - days * 24 * 3600
        os.utime(entry, (made, made))
    compilation_cache.use_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(alone)
    assert [entry.name for entry in alone.iterdir()] == ["new"]


def test_a_folder_that_cannot_be_made_turns_it_off(alone: Path) -> None:
    alone.parent.write_text("a file")
    compilation_cache.use_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


@pytest.mark.parametrize(
    ("platform", "variable", "parts"),
    [
        ("darwin", "HOME", ("Library", "Caches")),
        ("win32", "LOCALAPPDATA", ()),
        ("linux", "XDG_CACHE_HOME", ()),
    ],
)
def test_the_folder_of_each_system(monkeypatch, tmp_path, platform, variable, parts) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, str(tmp_path))
    folder = compilation_cache.cache_folder()
    assert folder == tmp_path.joinpath(*parts, "recurrentgemma", "jax")
