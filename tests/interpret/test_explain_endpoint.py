"""The endpoint against a local server that speaks chat completions, and the cards that people fill in."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import biosae as bs
from biosae.data.items import ReadError
from biosae.errors import EndpointError, FormatError, InputError, OfflineError, TooManyFailuresError
from biosae.files import write_json
from biosae.interpret import explain as ex
from biosae.interpret.explain import endpoint as module


class Tiles:
    """Bright or dark tiles by the last digit of their name."""

    def __getitem__(self, name: str) -> np.ndarray:
        if name.startswith("broken"):
            raise ReadError("truncated", f"/secret/{name}.png")
        return np.full((40, 40, 3), 200 if int(name[-1]) % 2 else 50, np.uint8)


class Server(ThreadingHTTPServer):
    """A stub that looks at the picture it is sent: yes if it is bright. ``script``: what to do instead, in turn."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.script: list = []
        self.usage: dict | None = {"prompt_tokens": 100, "completion_tokens": 10}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.headers.append(dict(self.headers))
            step = self.server.script.pop(0) if self.server.script else None
        if callable(step):
            step(self)
        elif isinstance(step, int):
            self.reply(step, {"error": {"message": f"said {step}"}})
        elif step is not None:
            self.raw(200, step)
        else:
            url = body["messages"][1]["content"][1]["image_url"]["url"]
            pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))))
            self.reply(200, completion("yes" if pixels.mean() > 128 else "no", self.server.usage))

    def reply(self, code: int, value: dict, **headers: str) -> None:
        self.raw(code, json.dumps(value).encode(), **headers)

    def raw(self, code: int, data: bytes, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


def completion(text: str | None, usage: dict | None = None, finish: str = "stop") -> dict:
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return {"model": "served", "choices": [choice], "usage": usage}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    with Server() as one:
        thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield one
        one.shutdown()


def questions(n: int = 6, *, names: tuple[str, ...] = ()) -> list[ex.Question]:
    tiles = Tiles()
    names = names or tuple(f"Doe-tile{i}" for i in range(n))
    return [ex.Question(f"Is it bright? ({i})", (ex.Picture(tiles, name),), "yes_no") for i, name in enumerate(names)]


def said(answers: list[ex.Answer]) -> list[bool | None]:
    return [ex.parse(a.text, "yes_no") for a in answers]


def test_pictures_arrive_and_answers_come_back_in_order(server: Server) -> None:
    rater = ex.Endpoint(server.url, "some-model", n_jobs=3)
    assert said(rater.ask(questions())) == [False, True] * 3
    body = server.bodies[0]
    assert body["model"] == "some-model" and body["temperature"] == 0.0 and body["max_tokens"] == 512
    assert [m["role"] for m in body["messages"]] == ["system", "user"]
    kinds = [part["type"] for part in body["messages"][1]["content"]]
    assert kinds == ["text", "image_url"]
    assert body["messages"][1]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
    assert "Doe" not in json.dumps(server.bodies) and "Authorization" not in server.headers[0]


def test_cache_resumes_and_counts(server: Server, tmp_path: Path) -> None:
    price = (2.0, 30.0)
    first = ex.Endpoint(server.url, "m", cache=tmp_path, price=price)
    first.ask(questions(4))
    assert first.usage["prompt_tokens"] == 400 and first.usage["completion_tokens"] == 40
    assert first.usage["cost"] == pytest.approx(4 * (100 * 2 + 10 * 30) / 1e6)
    again = ex.Endpoint(server.url, "m", cache=tmp_path, price=price)
    assert said(again.ask(questions(6))) == [False, True] * 3
    assert (again.usage["cached"], again.usage["requests"]) == (4, 2) and len(server.bodies) == 6
    ex.Endpoint(server.url, "m", cache=tmp_path, temperature=0.5).ask(questions(1))
    assert len(server.bodies) == 7  # other settings, other answers
    kept = [file.read_text() for file in tmp_path.iterdir()]
    assert len(kept) == 7 and not any("Doe" in text for text in kept)


def test_a_damaged_cache_file_is_asked_again(server: Server, tmp_path: Path) -> None:
    ex.Endpoint(server.url, "m", cache=tmp_path).ask(questions(1))
    (file,) = tmp_path.iterdir()
    for damage in ("{", "[]", '{"text": 3}'):
        file.write_text(damage)
        rater = ex.Endpoint(server.url, "m", cache=tmp_path)
        assert said(rater.ask(questions(1))) == [False] and rater.usage["cached"] == 0
    assert json.loads(file.read_text())["text"] == "no"


def test_a_run_that_was_killed_goes_on(server: Server, tmp_path: Path) -> None:
    server.script = [None, None, None, 401]
    with pytest.raises(EndpointError, match=r"HTTP 401 \(said 401\).*key_variable"):
        ex.Endpoint(server.url, "m", cache=tmp_path, n_jobs=1).ask(questions(6))
    rater = ex.Endpoint(server.url, "m", cache=tmp_path, n_jobs=1)
    assert said(rater.ask(questions(6))) == [False, True] * 3
    assert (rater.usage["cached"], rater.usage["requests"]) == (3, 3)


def test_a_busy_server_is_asked_again(server: Server) -> None:
    def later(handler: Handler) -> None:
        handler.reply(429, {"error": "slow down"}, Retry_After="0.2")

    def broken(handler: Handler) -> None:
        handler.connection.close()

    server.script = [500, later, broken, b"<html>", b'{"choices": []}', None]
    start = time.monotonic()
    rater = ex.Endpoint(server.url, "m", retries=5)
    assert said(rater.ask(questions(1))) == [False] and rater.usage["retried"] == 5
    assert time.monotonic() - start > 0.2


def test_a_server_that_never_answers_is_an_error(server: Server) -> None:
    server.script = [503] * 3
    with pytest.raises(EndpointError, match=r"after 3 attempts \(HTTP 503"):
        ex.Endpoint(server.url, "m", retries=2, n_jobs=1).ask(questions(2))
    with pytest.raises(EndpointError, match="is the server up"):
        ex.Endpoint("http://127.0.0.1:9/v1", "m", retries=0).ask(questions(1))


def test_one_refused_question_is_missing_many_are_an_error(server: Server) -> None:
    server.script = [413]
    rater = ex.Endpoint(server.url, "m", n_jobs=1, max_failures=0.7)
    answers = rater.ask(questions(3, names=("a0", "a1", "broken2")))[0:2]
    assert answers[0].text is None and answers[0].problem == "HTTP 413 (said 413)" and said(answers)[1] is True
    assert rater.usage["refused"] == 1 and rater.usage["unreadable"] == 1 and rater.usage["retried"] == 0
    with pytest.raises(TooManyFailuresError, match=r"1 of 2 questions.*truncated"):
        ex.Endpoint(server.url, "m").ask(questions(names=("a1", "broken2")))


def test_the_budget_is_kept(server: Server, tmp_path: Path) -> None:
    one = (100 * 2 + 10 * 30) / 1e6
    options = {"cache": tmp_path, "price": (2.0, 30.0), "n_jobs": 1}
    with pytest.raises(EndpointError, match="budget"):
        ex.Endpoint(server.url, "m", budget=2.5 * one, **options).ask(questions(6))
    assert len(server.bodies) == 3
    rater = ex.Endpoint(server.url, "m", budget=3.5 * one, **options)
    rater.ask(questions(6))
    assert rater.usage["cost"] == pytest.approx(3 * one) and rater.usage["cached"] == 3
    with pytest.raises(InputError, match="price"):
        ex.Endpoint(server.url, "m", budget=1.0)


def test_tokens_that_nobody_counted_are_said(server: Server) -> None:
    server.usage = None
    rater = ex.Endpoint(server.url, "m", price=(1.0, 1.0))
    rater.ask(questions(2))
    assert rater.usage["unmetered"] == 2 and rater.usage["cost"] == 0.0


def test_offline_no_other_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.create_connection", never)
    assert bs.settings.offline
    for host in ("example.org", "10.0.0.7", "localhost.example.org", "[2001:db8::1]"):
        with pytest.raises(OfflineError, match="another machine"):
            ex.Endpoint(f"http://{host}/v1", "m").ask(questions(1))


def test_redirects_are_not_followed(server: Server) -> None:
    with Server() as other:
        thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        server.script = [lambda handler: handler.raw(307, b"", Location=other.url + "/chat/completions")]
        with pytest.raises(EndpointError, match="HTTP 307"):
            ex.Endpoint(server.url, "m").ask(questions(1))
        other.shutdown()
        assert not other.bodies


def test_a_proxy_is_not_used_for_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert said(ex.Endpoint(server.url, "m", retries=0).ask(questions(1))) == [False]


def test_the_key_is_sent_and_never_shown(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rater = ex.Endpoint(server.url, "m", key_variable="MY_SERVER_KEY", cache=tmp_path)
    with pytest.raises(InputError, match="MY_SERVER_KEY"):
        rater.ask(questions(1))
    monkeypatch.setenv("MY_SERVER_KEY", "s3cret")
    rater.ask(questions(1))
    assert server.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(vars(rater)) + repr(rater) + "".join(f.read_text() for f in tmp_path.iterdir())


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "localhost:8000/v1",
        "http://me:pw@host/v1",
        "http://h/v1?key=1",
        "http://h:port/v1",
        "http://[::1/v1",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError):
        ex.Endpoint(url, "m")


def test_answers_of_odd_form(server: Server) -> None:
    parts = json.dumps(completion([{"type": "text", "text": "y"}, {"type": "text", "text": "es"}])).encode()
    server.script = [parts, json.dumps(completion(None)).encode()]
    answers = ex.Endpoint(server.url, "m", n_jobs=1).ask(questions(2))
    assert [a.text for a in answers] == ["yes", ""] and said(answers) == [True, None]


def test_an_answer_that_was_cut_off_is_none(server: Server, tmp_path: Path) -> None:
    server.script = [json.dumps(completion("At first sight: no", server.usage, "length")).encode()]
    for _ in range(2):  # as it came, and out of the cache
        rater = ex.Endpoint(server.url, "m", cache=tmp_path, max_tokens=4)
        (answer,) = rater.ask(questions(1))
        assert ex.parse(answer.text, "yes_no") is None and "max_tokens=4" in answer.problem
        assert rater.usage["cut_off"] == 1
    assert len(server.bodies) == 1


def test_hostile_replies_are_typed_errors_or_text(server: Server, tmp_path: Path) -> None:
    odd = [b"[" * 100_000, json.dumps(completion(["yes"])).encode(), json.dumps(completion([{"text": None}])).encode()]
    server.script = list(odd)
    assert said(ex.Endpoint(server.url, "m").ask(questions(1))) == [False]
    assert len(server.bodies) == 4  # none of the three was taken for an answer
    half = (
        b'{"model": "\\ud83d", "choices": [{"message": {"content": "sharp \\ud83d edges"}}], "usage": {"a": "\\ud83d"}}'
    )
    server.script = [half]
    rater = ex.Endpoint(server.url, "m", cache=tmp_path)
    (answer,) = rater.ask([ex.Question("What?", (ex.Picture(Tiles(), "t1"),), "text")])
    assert answer.text.encode() == b"sharp ? edges" and len(list(tmp_path.iterdir())) == 1
    server.script = [lambda h: h.raw(400, b'{"error": "\\ud83d"}')]
    (answer,) = ex.Endpoint(server.url, "m", max_failures=1.0).ask(questions(1))
    assert answer.problem.encode() == b"HTTP 400 (?)"


def test_a_budget_needs_a_server_that_counts(server: Server, tmp_path: Path) -> None:
    server.usage = None
    rater = ex.Endpoint(server.url, "m", price=(1.0, 1.0), budget=5.0, cache=tmp_path, n_jobs=1)
    with pytest.raises(EndpointError, match=r"names no tokens.*budget"):
        rater.ask(questions(4))
    assert len(server.bodies) == 1 and len(list(tmp_path.iterdir())) == 1  # what was paid is kept


def test_a_key_is_never_repeated_and_may_end_in_a_line_feed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVER_KEY", "s3cret\n")
    rater = ex.Endpoint(server.url, "m", key_variable="MY_SERVER_KEY")
    server.script = [lambda h: h.reply(401, {"error": {"message": f"no such key: {h.headers['Authorization']}"}})]
    with pytest.raises(EndpointError, match="no such key") as caught:
        rater.ask(questions(1))
    assert "s3cret" not in str(caught.value) and server.headers[0]["Authorization"] == "Bearer s3cret"
    monkeypatch.setenv("MY_SERVER_KEY", "s3cret\nX-Other: 1")
    with pytest.raises(InputError, match=r"MY_SERVER_KEY.*no key") as caught:
        rater.ask(questions(1))
    assert "s3cret" not in str(caught.value)


def test_pictures_are_sent_without_metadata(server: Server, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"  # ImageDescription
    Image.fromarray(np.full((40, 40, 3), 90, np.uint8)).save(tmp_path / "a.jpg", exif=exif, comment=b"Jane Doe")
    samples = bs.read.images(tmp_path, patient=None)
    name = samples.obs.index[0]
    ex.Endpoint(server.url, "m").ask([ex.Question("Is it bright?", (ex.Picture(samples, name),), "yes_no")])
    url = server.bodies[0]["messages"][1]["content"][1]["image_url"]["url"]
    data = base64.b64decode(url.split(",", 1)[1])
    chunks, at = [], 8
    while at < len(data):
        chunks.append(data[at + 4 : at + 8])
        at += 12 + int.from_bytes(data[at : at + 4])
    assert set(chunks) == {b"IHDR", b"IDAT", b"IEND"} and b"Doe" not in data


# -- people ------------------------------------------------------------------------------------------------------------


def test_cards_hold_no_truth_and_answers_come_back(tmp_path: Path) -> None:
    asked = questions(5)
    asked.append(ex.Question("Say <script>alert(1)</script>", (ex.Picture(Tiles(), "Doe-tile1"),), "text"))
    asked.append(
        ex.Question("Which?", tuple(ex.Picture(Tiles(), f"t{i}", caption=str(i + 1)) for i in range(5)), "choice", (5,))
    )
    cards = ex.Cards(tmp_path)
    assert {a.problem for a in cards.ask(asked)} == {"not answered"}
    page = (tmp_path / "cards.html").read_text()
    assert page.count("<section>") == 7 and "<script>alert" not in page and "&lt;script&gt;" in page
    assert "Doe" not in page and "http:" not in page and "https:" not in page and "%" + "CARDS" not in page
    names = [cards.id(q) for q in asked]
    places = [page.index(name) for name in names]
    assert places != sorted(places)
    answers = {names[0]: "no", names[1]: "yes", names[5]: "bright", names[6]: "4"}
    write_json(tmp_path / "answers.json", {"format": "biosae-answers-1", "answers": answers})
    found = cards.ask(asked)
    assert [ex.parse(a.text, q.form, q.size) for a, q in zip(found, asked)] == [
        False,
        True,
        None,
        None,
        None,
        "bright",
        4,
    ]


def test_ids_of_cards_cannot_be_guessed_from_names(tmp_path: Path) -> None:
    """Whoever gets the page and suspects a name must not be able to check it."""
    (one,) = questions(1)
    first, second = ex.Cards(tmp_path / "a"), ex.Cards(tmp_path / "b")
    first.ask([one]), second.ask([one])
    assert first.id(one) != second.id(one) and first.id(one) == ex.Cards(tmp_path / "a").id(one)
    assert one.id not in (tmp_path / "a" / "cards.html").read_text()
    for file in (tmp_path / "a").iterdir():
        assert file.name == "cards.html" or file.stat().st_mode & 0o077 == 0


def test_a_page_holds_texts_as_they_are_and_no_more_cards_than_people_answer(tmp_path: Path) -> None:
    asked = ex.Question("Is it %N% of %KEY%?", (ex.Picture(Tiles(), "t1"),), "yes_no")
    ex.Cards(tmp_path).ask([asked])
    assert "Is it %N% of %KEY%?" in (tmp_path / "cards.html").read_text()
    many = [ex.Question(f"Is it bright? ({i})", asked.pictures, "yes_no") for i in range(2001)]
    with pytest.raises(InputError, match=r"2,001 cards.*latents="):
        ex.Cards(tmp_path).ask(many)


def test_other_files_are_not_answers(tmp_path: Path) -> None:
    for value in ([], {"answers": {"a": "yes"}}, {"format": "biosae-answers-1", "answers": {"a": 1}}):
        write_json(tmp_path / "answers.json", value)
        with pytest.raises(FormatError, match="Save answers"):
            ex.read_answers(tmp_path / "answers.json")
    with pytest.raises(InputError, match="simulation"):
        ex.Cards(tmp_path).ask([ex.Question("grid", (), "grid", (2, 2))])
