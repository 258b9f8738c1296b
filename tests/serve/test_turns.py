"""What a turn does: prompts that are read together, and steps before tokens are delivered."""

import contextlib
import json
import socket
import time
import urllib.parse
from typing import Any

import numpy as np
import pytest
from scheduling import LONG, Served, alone, make_job
from serving import FREE, complete, events

from recurrentgemma.common.generation.strategies import Categorical
from recurrentgemma.serve import scheduler
from recurrentgemma.serve.jobs import Growth, Job
from recurrentgemma.serve.state_cache import StateCache

FOREVER_S = 1e9


class Watched(Served):
    """Notes what the engine is asked for: the shape of each chunk with the rows that grow beside
    it, and how many steps each dispatch has.
    """

    def __init__(self, sampler, monkeypatch, **options: Any) -> None:
        super().__init__(sampler, **options)
        self.chunks: list[tuple[int, tuple[int, ...]]] = []
        self.bursts: list[int] = []
        engine, slots = sampler.engine, self.scheduler.slots
        prefill, decode = engine.prefill, engine.decode

        def noted_prefill(cache, tokens, segment_pos):
            self.chunks.append((len(slots.active), tokens.shape))
            return prefill(cache, tokens, segment_pos)

        def noted_decode(*args):
            self.bursts.append(len(args[-1]))
            return decode(*args)

        monkeypatch.setattr(engine, "prefill", noted_prefill)
        monkeypatch.setattr(engine, "decode", noted_decode)


@pytest.mark.parametrize("num_short", [4, 3])
def test_short_prompts_are_read_together(sampler, monkeypatch, num_short: int) -> None:
    served, hot = Watched(sampler, monkeypatch), Categorical(1.3)
    prompts = ["Once upon a time", "Emma was", "In the beginning", "It is a truth"][:num_short]
    jobs = [served.submit(make_job(sampler, p, 5, hot, i)) for i, p in enumerate(prompts)]
    served.turn(1)
    assert len(served.chunks) == 1
    assert len(served.scheduler.slots.active) == num_short
    served.finish()
    for number, (job, prompt) in enumerate(zip(jobs, prompts, strict=True)):
        assert served.tokens(job) == alone(sampler, prompt, 5, hot, number)


def test_a_chunk_beside_growing_rows_has_few_places(sampler, monkeypatch) -> None:
    """Also where long and short prompts, kept states and scores wait at once."""
    served = Watched(sampler, monkeypatch, states=StateCache(1 << 24))
    first = served.submit(make_job(sampler, "x", 60, samples=2), turns=2)
    asked = [("y", 4), ("z z z z", 3), (LONG, 3), (LONG + "and more", 4), ("", 2), ("w", 3)]
    jobs = [served.submit(make_job(sampler, p, n, marks=(70,))) for p, n in asked]
    scored = served.submit(make_job(sampler, LONG, 1, num_logprobs=0, scored=True))
    served.finish()
    assert served.tokens(first) == alone(sampler, "x", 60) * 2
    for job, (prompt, steps) in zip(jobs, asked, strict=True):
        assert served.tokens(job) == alone(sampler, prompt, steps)
    assert served.events[scored][0].scores.chosen.shape == (len(scored.tokens) - 1,)
    beside = [shape for active, shape in served.chunks if active > 1]
    assert beside
    assert max(int(np.prod(shape)) for shape in beside) <= 32
    assert max(shape[0] for shape in beside) > 1


@pytest.mark.parametrize(("most", "expected"), [(8, 96), (2, 64)])
def test_a_turn_reads_more_where_more_rows_wait_than_grow(
    sampler, monkeypatch, most: int, expected: int
) -> None:
    monkeypatch.setattr(scheduler, "MOST_CHUNKS", most)
    served = Served(sampler)
    served.submit(make_job(sampler, "x", 60), turns=2)
    jobs = [served.submit(make_job(sampler, LONG, 5)) for _ in range(3)]
    before = served.scheduler.counts.prompt_tokens
    served.turn(1)
    read = served.scheduler.counts.prompt_tokens - before
    assert expected <= read < expected + 32  # the last chunk may go beyond
    served.finish()
    assert [served.tokens(job) for job in jobs] == [alone(sampler, LONG, 5)] * 3


def test_a_long_prompt_is_not_read_before_the_first_token_of_a_short_one(
    sampler, monkeypatch
) -> None:
    served = Watched(sampler, monkeypatch)
    short, long = (served.submit(make_job(sampler, p, 3)) for p in ("x y", LONG * 8))
    served.turn(1)
    assert len(served.tokens(short)[0]) == 1
    assert served.scheduler.counts.prompt_tokens <= 3 * 32
    served.finish()
    assert served.tokens(long) == alone(sampler, LONG * 8, 3)


def test_what_is_less_urgent_does_not_slow_a_row_down(sampler, monkeypatch) -> None:
    served = Watched(sampler, monkeypatch)
    served.submit(make_job(sampler, "x", 60), turns=2)
    for _ in range(3):
        served.submit(make_job(sampler, LONG, 5, priority=5))
    before = served.scheduler.counts.prompt_tokens
    served.turn(1)
    assert served.scheduler.counts.prompt_tokens - before <= 32


def test_a_marked_prompt_alone_is_read_in_long_chunks(sampler, monkeypatch) -> None:
    served = Watched(sampler, monkeypatch, states=StateCache(1 << 24))
    served.submit(make_job(sampler, LONG * 8, 3, marks=(20,)))
    served.finish()
    assert max(length for _, (_, length) in served.chunks) > 200


@pytest.mark.parametrize("num_slots", [1, 3, 8, 32, 300])
def test_each_width_of_a_chunk_has_lengths(sampler, num_slots: int) -> None:
    reader = Served(sampler, num_slots=num_slots).scheduler._reader
    assert reader.widths[0] == 1
    if sampler.engine.pads_chunks:
        assert all(min(reader.lengths) <= reader.lengths[0] // width for width in reader.widths)


def test_prompts_that_come_at_once_are_read_at_once(server, monkeypatch) -> None:
    complete(server, "x", max_tokens=1)
    arrived: list[int] = []
    served, turn = server.service.scheduler, server.service.scheduler.turn

    def noted() -> None:
        arrived.append(len(served._inbox))
        turn()

    monkeypatch.setattr(served, "turn", noted)
    content = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    address = urllib.parse.urlsplit(server.url)
    with contextlib.ExitStack() as stack:
        place = address.hostname, address.port
        clients = [stack.enter_context(socket.create_connection(place)) for _ in range(4)]
        time.sleep(0.1)  # accepted
        server.service._loop.call_soon_threadsafe(time.sleep, 0.3)
        for client in clients:
            client.sendall(head.encode() + content)
        for client in clients:
            assert client.recv(1 << 16).startswith(b"HTTP/1.1 200")
    assert arrived[0] == 4


def test_one_client_grows_in_bursts_and_hears_of_the_first_token_at_once(
    sampler, monkeypatch
) -> None:
    expected = alone(sampler, "x", 40)
    served = Watched(sampler, monkeypatch, hold_s=FOREVER_S)
    job = served.submit(make_job(sampler, "x", 40), turns=1)
    assert len(served.tokens(job)[0]) == 1
    served.turn(1)
    assert served.tokens(job) == expected
    assert not served.scheduler.busy
    long = max(sampler.engine.burst, sampler.engine.long_burst)
    assert served.bursts == [1, *[long] * (39 // long), *[1] * (39 % long)]


def test_another_waits_for_one_dispatch_and_takes_no_token_along(sampler, monkeypatch) -> None:
    served = Watched(sampler, monkeypatch, hold_s=FOREVER_S)
    free = alone(sampler, "x", 60)
    job = served.submit(make_job(sampler, "x", 60), turns=1)
    second: list[Job] = []
    decode = sampler.engine.decode

    def arriving(*args):
        if not second:
            second.append(served.submit(make_job(sampler, "y", 5)))
        return decode(*args)

    monkeypatch.setattr(sampler.engine, "decode", arriving)
    served.turn(1)
    most = max(sampler.engine.burst, sampler.engine.long_burst)
    (growing,) = served.scheduler.slots.active
    assert len(growing.generated) == 1 + most  # one dispatch
    served.turn(1)
    assert len(served.tokens(second[0])[0]) == 1
    assert len(served.tokens(job)[0]) == 1  # the others are held back still
    second[0].cancelled = True
    served.turn(2)
    assert [row.job for row in served.scheduler.slots.active] in ([job], [])
    served.finish()
    assert served.tokens(job) == free
    assert len(served.tokens(second[0])[0]) < 5


def test_a_stop_inside_a_burst_ends_the_text(sampler, monkeypatch) -> None:
    (free,) = alone(sampler, "x", 40)
    text = sampler.tokenizer.decode(free)
    job = make_job(sampler, "x", 40)
    stops = job.rows[0].stops._replace(strings=(text[9:12],))
    served = Watched(sampler, monkeypatch, hold_s=FOREVER_S)
    stopped = served.submit(Job(job.tokens, [job.rows[0]._replace(stops=stops)]))
    served.finish()
    pieces = [event for event in served.events[stopped] if isinstance(event, Growth)]
    assert "".join(piece.text for piece in pieces) == text[: text.find(text[9:12])]
    assert pieces[-1].finish_reason == "stop_string"


def test_tokens_that_come_together_are_one_event(server, monkeypatch) -> None:
    monkeypatch.setattr(server.service.scheduler, "_hold_s", FOREVER_S)
    # In all slots: what free ones hold from earlier texts may change the last bits of logits.
    body = {"prompt": "x", "max_tokens": 12, "n": 4, "seed": 3, "logprobs": 1, **FREE}
    whole = complete(server, **body)["choices"]
    pieces = events(server, "/v1/completions", body)
    for choice in whole:
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == choice["index"]]
        assert len(mine) <= 4  # the first token, the others, the end
        assert "".join(piece["text"] for piece in mine) == choice["text"]
        for name in ("tokens", "token_logprobs", "text_offset"):
            said = [value for piece in mine for value in piece["logprobs"][name]]
            assert said == choice["logprobs"][name]
        assert [piece["finish_reason"] for piece in mine if piece["finish_reason"]] == ["length"]
