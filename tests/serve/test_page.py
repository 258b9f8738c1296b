"""The chat in the browser: typed, streamed, stopped, reloaded, on a phone, in the dark."""

import pytest
from browser import CHROMIUM, browser, wait_for

TURNS = "[...document.querySelectorAll('.turn')].map((turn) => turn.className)"
WORDS = "document.querySelector('.turn.assistant p').textContent"


def test_the_page_in_chromium(server) -> None:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: `apt-get install chromium` brings it")
    with browser(server.url, width=390, height=700, dark=True) as page:
        assert page.value("document.title") == "tiny"
        assert page.value("document.documentElement.scrollWidth") == 390  # nothing sticks out
        assert page.value("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
        # What was typed is answered piece by piece, until Stop.
        words = "Who are <img src=x>?"
        page.type(words)
        page.until(f"document.querySelector('.turn.assistant') && {WORDS}.length > 40")
        assert page.value(TURNS) == ["turn user", "turn assistant busy"]
        page.press("stop")
        page.until("!document.querySelector('.busy')")
        said = page.value(WORDS)
        scheduler = server.service.scheduler
        wait_for(lambda: not scheduler.busy)
        assert page.value("document.getElementById('stop').hidden")
        assert page.value("document.querySelectorAll('#said img').length") == 0  # it stays text
        # It is there again after a reload, and in the menu.
        page.open(server.url)
        assert (page.value(TURNS), page.value(WORDS)) == (["turn user", "turn assistant"], said)
        assert page.value("getComputedStyle(document.getElementById('side')).display") == "none"
        page.press("menu")
        assert page.value("document.querySelector('nav button').textContent") == words
        page.press("new")
        assert page.value(TURNS) == []
