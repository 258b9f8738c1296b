"""The model is loaded in a thread that ends: PyTorch's threads of the main thread would stay."""

import threading

import pytest

from recurrentgemma.cli.serve import in_passing_thread
from recurrentgemma.common.errors import UserError


def test_a_result_comes_from_a_thread_that_ends() -> None:
    thread = in_passing_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_is_raised_as_it_is() -> None:
    def fail() -> None:
        raise UserError("there is no checkpoint")

    with pytest.raises(UserError, match="there is no checkpoint"):
        in_passing_thread(fail)


def test_the_command_loads_so(cli, monkeypatch) -> None:
    pytest.importorskip("uvicorn", reason="the extra serve is not installed")
    from recurrentgemma.cli import serve

    found: list[threading.Thread] = []

    def load(*arguments: object, **options: object) -> None:
        found.append(threading.current_thread())
        raise UserError("stop here")

    monkeypatch.setattr(serve, "load_sampler", load)
    assert "stop here" in cli("serve", "--port", "0").err
    assert found[0] is not threading.main_thread()
