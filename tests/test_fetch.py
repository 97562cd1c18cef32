"""Fetching from a real HTTP server on this machine: whole, broken off, changed, refused, redirected, slow, damaged."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import shutil
import socket
import stat
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import requests
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import biosae as bs
from biosae.data import download
from biosae.data.manifests import Manifest
from biosae.data.unpack import unpack
from biosae.errors import AccessError, DownloadError, FormatError, InputError, OfflineError
from biosae.settings import settings

RNG = np.random.default_rng(0)
BIG = RNG.bytes(700_000)  # more than one chunk of the downloader
SMALL = b"patient,label\nA,1\n"


@dataclass
class Web:
    """What the server holds and how it misbehaves; every request is noted as (path, Range, status)."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    breaks: dict[str, list[int]] = field(default_factory=dict)  # body bytes after which an answer is cut, one an answer
    status: dict[str, int] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)
    redirect: dict[str, str] = field(default_factory=dict)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    pause: float = 0.0
    log: list[tuple[str, str | None, int]] = field(default_factory=list)
    url: str = ""

    def tag(self, path: str) -> str:
        return f'"{hashlib.md5(self.files[path]).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        web: Web = self.server.web  # type: ignore[attr-defined]
        path, asked = self.path.split("?")[0], self.headers.get("Range")
        if path in web.redirect:
            return self._answer(web, path, asked, 302, b"", {"Location": web.redirect[path]})
        if web.busy.get(path):
            web.busy[path] -= 1
            return self._answer(web, path, asked, 503, b"", {})
        if path in web.status or path not in web.files:
            return self._answer(web, path, asked, web.status.get(path, 404), b"no", {})
        body, extra = web.files[path], dict(web.headers.get(path, {}))
        if web.etags:
            extra["ETag"] = web.tag(path)
        same = self.headers.get("If-Range") in (None, web.tag(path))
        if asked and web.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            if start >= len(body):
                return self._answer(web, path, asked, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
            extra["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            return self._answer(web, path, asked, 206, body[start:], extra)
        self._answer(web, path, asked, 200, body, extra)

    def _answer(self, web: Web, path: str, asked: str | None, code: int, body: bytes, extra: dict[str, str]) -> None:
        web.log.append((path, asked, code))
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **extra}.items():
            self.send_header(name, value)
        self.end_headers()
        cut = web.breaks[path].pop(0) if web.breaks.get(path) and code in (200, 206) else None
        for begin in range(0, len(body), 50_000):
            part = body[begin : begin + 50_000]
            if cut is not None and begin + len(part) > cut:
                self.wfile.write(part[: max(0, cut - begin)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            try:
                self.wfile.write(part)
            except OSError:  # the client has gone
                self.close_connection = True
                return
            time.sleep(web.pause)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:  # clients that go away are part of the tests
        pass


@pytest.fixture
def web() -> Iterator[Web]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.web = Web(url=f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server.web  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("pooch", reason="the extra 'data' is not installed")
    monkeypatch.setattr(settings, "offline", False)
    monkeypatch.setattr(settings, "data_dir", tmp_path / "data")
    monkeypatch.setattr(download, "WAIT_SECONDS", 0.01)


def manifest(*files: dict, **more: object) -> Manifest:
    said = {"name": "toy", "title": "Toy", "modality": "general", "access": "open", "citation": "nobody"}
    return Manifest(**{**said, "confirmed": ["here"], "files": files, **more})


def one(web: Web, body: bytes = BIG, path: str = "a.bin", **more: object) -> dict:
    web.files[f"/{path}"] = body
    return {"path": path, "urls": [f"{web.url}/{path}"], "sha256": hashlib.sha256(body).hexdigest(), **more}


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.name != ".fetch.lock")


def test_files_arrive_whole_and_are_not_asked_for_twice(web: Web) -> None:
    web.files |= {"/deep/b.csv": SMALL, "/c.txt": b"no hash"}
    files = (
        one(web, bytes=len(BIG)),
        {"path": "deep/b.csv", "urls": [f"{web.url}/deep/b.csv"], "md5": hashlib.md5(SMALL).hexdigest()},
        {"path": "c.txt", "urls": [f"{web.url}/c.txt"], "bytes": 7},
    )
    folder = bs.data.fetch(manifest(*files), n_jobs=3)
    assert folder == settings.data_dir / "toy"
    assert (folder / "a.bin").read_bytes() == BIG and (folder / "deep/b.csv").read_bytes() == SMALL
    assert left(folder) == ["a.bin", "b.csv", "c.txt"]
    found = bs.data.verify(manifest(*files)).set_index("file")
    assert dict(found["status"]) == {"a.bin": "ok", "deep/b.csv": "ok", "c.txt": "ok"}
    assert list(found["checked"]) == ["sha256", "md5", "size"]
    asked = len(web.log)
    bs.data.fetch(manifest(*files))
    assert len(web.log) == asked == 3


def test_a_broken_transfer_is_taken_up_where_it_stopped(web: Web) -> None:
    file = one(web)
    web.breaks["/a.bin"] = [300_000, 200_000]
    folder = bs.data.fetch(manifest(file))
    assert (folder / "a.bin").read_bytes() == BIG
    codes = [code for _, _, code in web.log]
    starts = [int(asked[6:-1]) for _, asked, _ in web.log[1:]]
    assert codes == [200, 206, 206]
    assert 200_000 < starts[0] <= 300_000 and starts[0] + 100_000 < starts[1] <= starts[0] + 200_000


def test_what_arrived_is_kept_for_the_next_fetch(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    file = one(web)
    web.breaks["/a.bin"] = [400_000, 0]
    with pytest.raises(DownloadError, match="bytes are kept") as caught:
        bs.data.fetch(manifest(file))
    assert "1 of 1 files" in str(caught.value)
    folder = settings.data_dir / "toy"
    held = (folder / "a.bin.part").stat().st_size
    assert 300_000 < held <= 400_000 and not (folder / "a.bin").exists()
    bs.data.fetch(manifest(file))
    assert (folder / "a.bin").read_bytes() == BIG and left(folder) == ["a.bin"]
    assert web.log[-1] == ("/a.bin", f"bytes={held}-", 206)


def test_a_server_without_ranges_gives_the_whole_file(web: Web) -> None:
    file = one(web)
    web.ranges = False
    web.breaks["/a.bin"] = [300_000]
    folder = bs.data.fetch(manifest(file))
    assert (folder / "a.bin").read_bytes() == BIG
    assert [code for _, _, code in web.log] == [200, 200]


def test_a_server_that_always_breaks_off_ends(web: Web) -> None:
    file = one(web)
    web.ranges = False
    web.breaks["/a.bin"] = [300_000] * 100
    with pytest.raises(DownloadError, match="transfer failed"):
        bs.data.fetch(manifest(file))
    assert len(web.log) == 1 + download.ATTEMPTS


@given(
    cuts=st.lists(st.integers(0, 699_999), max_size=4), ranges=st.booleans(), etags=st.booleans(), known=st.booleans()
)
@hypothesis_settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_breaks_give_the_same_file(
    web: Web, tmp_path: Path, cuts: list[int], ranges: bool, etags: bool, known: bool
) -> None:
    file = one(web)
    if not known:
        del file["sha256"]
    web.ranges, web.etags, web.breaks["/a.bin"] = ranges, etags, list(cuts)
    out = tmp_path / "any"
    shutil.rmtree(out, ignore_errors=True)
    bs.data.fetch(manifest(file), out=out)
    assert (out / "a.bin").read_bytes() == BIG and left(out) == ["a.bin"]


def test_another_file_at_the_source_is_not_joined_to_the_old_part(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    file = one(web)
    del file["sha256"]
    web.breaks["/a.bin"] = [400_000, 0]
    with pytest.raises(DownloadError):
        bs.data.fetch(manifest(file))
    newer = RNG.bytes(len(BIG))
    web.files["/a.bin"] = newer
    folder = bs.data.fetch(manifest(file))
    assert (folder / "a.bin").read_bytes() == newer
    assert web.log[-1][1] is not None and web.log[-1][2] == 200  # If-Range: the server sent everything


def test_a_wrong_join_is_found_by_the_hash_and_fetched_again(web: Web) -> None:
    file = one(web)
    folder = settings.data_dir / "toy"
    folder.mkdir(parents=True)
    (folder / "a.bin.part").write_bytes(b"\0" * 300_000)  # not the beginning of the file
    bs.data.fetch(manifest(file))
    assert (folder / "a.bin").read_bytes() == BIG and left(folder) == ["a.bin"]
    assert [code for _, _, code in web.log] == [206, 200]


def test_a_complete_part_is_only_checked(web: Web) -> None:
    file = one(web)
    folder = settings.data_dir / "toy"
    folder.mkdir(parents=True)
    (folder / "a.bin.part").write_bytes(BIG)
    bs.data.fetch(manifest(file))
    assert (folder / "a.bin").read_bytes() == BIG
    assert [code for _, _, code in web.log] == [416]


def test_a_wrong_hash_leaves_nothing_and_spares_what_was_there(web: Web) -> None:
    file = one(web) | {"sha256": "0" * 64}
    folder = settings.data_dir / "toy"
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"mine")
    with pytest.raises(DownloadError, match="another sha256 than the one published") as caught:
        bs.data.fetch(manifest(file, homepage="https://example.org"))
    assert "https://example.org" in str(caught.value)
    assert left(folder) == ["a.bin"] and (folder / "a.bin").read_bytes() == b"mine"


@pytest.mark.parametrize("stated", [len(BIG) - 1, len(BIG) + 1])
def test_a_wrong_size_is_refused_before_the_body(web: Web, stated: int) -> None:
    file = one(web, bytes=stated)
    with pytest.raises(DownloadError, match=f"{len(BIG)} bytes, but {stated} are expected"):
        bs.data.fetch(manifest(file))
    assert left(settings.data_dir / "toy") == []


def test_a_damaged_copy_is_replaced(web: Web) -> None:
    file, folder = one(web, bytes=len(BIG)), settings.data_dir / "toy"
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(BIG[:-1] + b"?")
    assert list(bs.data.verify(manifest(file))["status"]) == ["wrong hash"]
    bs.data.fetch(manifest(file))
    assert list(bs.data.verify(manifest(file))["status"]) == ["ok"]


def test_an_older_file_without_a_hash_stays_until_the_new_one_is_whole(web: Web) -> None:
    file, folder = one(web, bytes=len(BIG), sha256=None), settings.data_dir / "toy"
    folder.mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"older, of another size")
    gone = {**file, "urls": [f"{web.url}/gone/a.bin"]}
    with pytest.raises(DownloadError):
        bs.data.fetch(manifest(gone))
    assert (folder / "a.bin").read_bytes() == b"older, of another size"
    bs.data.fetch(manifest(file))
    assert (folder / "a.bin").read_bytes() == BIG and left(folder) == ["a.bin"]


def test_mirrors_in_order_and_by_choice(web: Web) -> None:
    file = one(web)
    file["urls"] = [f"{web.url}/gone/a.bin", f"{web.url}/a.bin", f"{web.url}/other/a.bin"]
    bs.data.fetch(manifest(file))
    assert [(path, code) for path, _, code in web.log] == [("/gone/a.bin", 404), ("/a.bin", 200)]
    web.files["/other/a.bin"] = BIG
    bs.data.fetch(manifest(file), out=settings.data_dir / "second", mirror="/other/")
    assert web.log[-1][0] == "/other/a.bin"
    with pytest.raises(InputError, match=r"no address of a\.bin contains mirror='zenodo'"):
        bs.data.fetch(manifest(file), out=settings.data_dir / "third", mirror="zenodo")


def test_every_address_is_named_when_none_has_the_file(web: Web) -> None:
    file = one(web)
    file["urls"] = [f"{web.url}/x", f"{web.url}/y"]
    web.status["/y"] = 403
    with pytest.raises(DownloadError) as caught:
        bs.data.fetch(manifest(file))
    assert "/x: the server answered 404" in str(caught.value)
    assert "/y: the server refused (403" in str(caught.value) and "account" in str(caught.value)


def test_redirects_keep_the_range(web: Web) -> None:
    file = one(web)
    web.redirect["/old"] = f"{web.url}/a.bin"
    file["urls"] = [f"{web.url}/old"]
    web.breaks["/a.bin"] = [300_000]
    folder = bs.data.fetch(manifest(file))
    assert (folder / "a.bin").read_bytes() == BIG
    assert [code for _, _, code in web.log] == [302, 200, 302, 206]


def test_busy_servers_are_asked_again(web: Web) -> None:
    file = one(web)
    web.busy["/a.bin"] = 2
    bs.data.fetch(manifest(file))
    assert [code for _, _, code in web.log] == [503, 503, 200]


def test_slow_is_waited_for_and_silence_is_not(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "READ_SECONDS", 0.8)
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    web.pause = 0.02
    folder = bs.data.fetch(manifest(one(web)))
    assert (folder / "a.bin").read_bytes() == BIG and len(web.log) == 1
    web.pause = 5.0
    began = time.monotonic()
    with pytest.raises(DownloadError, match="transfer failed"):
        bs.data.fetch(manifest(one(web, BIG[:200_000], "b.bin")), out=settings.data_dir / "other")
    assert time.monotonic() - began < 8


def test_a_web_page_is_not_a_data_set(web: Web) -> None:
    file = one(web, b"<html>Are you sure?</html>")
    del file["sha256"]
    web.headers["/a.bin"] = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(DownloadError, match="web page instead of the file"):
        bs.data.fetch(manifest(file))


def test_compressed_files_are_kept_as_they_are(web: Web) -> None:
    packed = gzip.compress(SMALL)
    web.headers["/t.csv.gz"] = {"Content-Encoding": "gzip"}  # some servers say so of a .gz file
    folder = bs.data.fetch(manifest(one(web, packed, "t.csv.gz")), unpack=True)
    assert (folder / "t.csv.gz").read_bytes() == packed
    assert (folder / "t.csv").read_bytes() == SMALL


def test_only_the_files_that_are_asked_for(web: Web) -> None:
    files = [one(web, SMALL, path) for path in ("a.csv", "deep/b.csv", "c.bin")]
    folder = bs.data.fetch(manifest(*files), files=["*.csv"])
    assert left(folder) == ["a.csv", "b.csv"]
    assert list(bs.data.verify(manifest(*files))["status"]) == ["ok", "ok", "missing"]
    with pytest.raises(InputError, match=r"no file 'c\.bim'; did you mean 'c\.bin'"):
        bs.data.fetch(manifest(*files), files="c.bim")


def sums(web: Web, bodies: dict[str, bytes], **more: object) -> Manifest:
    """A data set whose source publishes SHA256SUMS.txt."""
    web.files |= {f"/db/1.0/{path}": body for path, body in bodies.items()}
    lines = [f"{hashlib.sha256(body).hexdigest()}  {path}\n" for path, body in bodies.items()]
    web.files["/db/1.0/SHA256SUMS.txt"] = "".join(lines).encode()
    return manifest(base_urls=[f"{web.url}/gone/", f"{web.url}/db/1.0/"], hash_list="SHA256SUMS.txt", **more)


def test_hashes_from_the_published_list(web: Web) -> None:
    toy = sums(web, {"RECORDS": b"r1\n", "records/r 1.dat": BIG, "records/r 1.hea": SMALL})
    web.files = {path.replace(" ", "%20"): body for path, body in web.files.items()}
    folder = bs.data.fetch(toy, files="*.hea")
    assert left(folder) == ["SHA256SUMS.txt", "r 1.hea"]
    bs.data.fetch(toy)
    assert (folder / "records/r 1.dat").read_bytes() == BIG
    assert dict(bs.data.verify(toy)["status"].value_counts()) == {"ok": 3}
    assert sum(path.endswith("SUMS.txt") for path, _, _ in web.log) == 2  # the first address has none; asked for once
    (folder / "records/r 1.hea").write_bytes(b"x")
    (folder / "RECORDS").unlink()
    found = bs.data.verify(toy).set_index("file")["status"]
    assert dict(found) == {"RECORDS": "missing", "records/r 1.dat": "ok", "records/r 1.hea": "wrong hash"}
    (folder / "SHA256SUMS.txt").unlink()
    found = bs.data.verify(toy)
    assert list(found["status"]) == ["missing"] and "SHA256SUMS.txt" in found["detail"][0]


@pytest.mark.parametrize(
    "line", ["0" * 64 + "  ../../etc/x", "0" * 64 + "  /etc/x", "not a list", "", "0" * 40 + "  a"]
)
def test_a_list_that_is_none_or_leads_out_is_refused(web: Web, line: str) -> None:
    toy = sums(web, {})
    web.files["/db/1.0/SHA256SUMS.txt"] = (line + "\n").encode()
    with pytest.raises(FormatError):
        bs.data.fetch(toy)


def test_offline_says_so_and_asks_nobody(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    file, listed = one(web), sums(web, {"r": SMALL})
    monkeypatch.setattr(settings, "offline", True)
    for toy in (manifest(file), listed):
        with pytest.raises(OfflineError, match=r"settings\.offline"):
            bs.data.fetch(toy)
    folder = settings.data_dir / "toy"
    (folder / "a.bin").write_bytes(BIG)
    assert bs.data.fetch(manifest(file)) == folder  # all there: no network is needed
    assert web.log == []


def test_looking_never_uses_the_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in bs.data.list().index:
        assert repr(bs.data.info(name))
    assert "missing" in set(bs.data.verify("ptb_xl", tmp_path)["status"])


def test_a_disk_without_room_is_found_before_the_transfer(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    file = one(web, bytes=len(BIG))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(OSError, match=r"700\.0 kB are needed, 100\.0 kB are free"):
        bs.data.fetch(manifest(file))
    assert web.log == []
    del file["bytes"]  # the server states the length
    with pytest.raises(OSError, match="No space left"):
        bs.data.fetch(manifest(file))
    assert left(settings.data_dir / "toy") == []


def test_credentialed_data_explain_every_step(tmp_path: Path) -> None:
    with pytest.raises(AccessError) as caught:
        bs.data.fetch("mimic-cxr-jpg", out=tmp_path / "mimic")
    text = str(caught.value)
    for part in (
        "physionet.org/register",
        "training",
        "agreement",
        "wget -r -N -c -np",
        "--user",
        str(tmp_path / "mimic"),
    ):
        assert part in text
    assert f"biosae data verify mimic_cxr_jpg --folder {tmp_path / 'mimic'}" in text
    (tmp_path / "mimic").mkdir()
    (tmp_path / "mimic/x").touch()
    assert bs.data.fetch("mimic-cxr-jpg", out=tmp_path / "mimic") == tmp_path / "mimic"


def test_one_fetch_a_folder_at_a_time(web: Web) -> None:
    file = one(web)
    web.pause = 0.1
    first = threading.Thread(target=bs.data.fetch, args=(manifest(file),))
    first.start()
    while not web.log:
        time.sleep(0.01)
    with pytest.raises(DownloadError, match="another process"):
        bs.data.fetch(manifest(file))
    first.join()
    assert (settings.data_dir / "toy/a.bin").read_bytes() == BIG


def test_an_ended_transfer_keeps_its_part(web: Web, tmp_path: Path) -> None:
    file, stop = one(web), threading.Event()
    bar = SimpleNamespace(update=lambda n: stop.set())  # after the first chunk
    session = requests.Session()
    resume = download.Resume(tmp_path / "a.bin", size=None, hashed=True, session=session, bar=bar, stop=stop)
    with pytest.raises(DownloadError, match="stopped"):
        resume(file["urls"][0], tmp_path / "out", None)
    assert 0 < (tmp_path / "a.bin.part").stat().st_size < len(BIG)


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, body in members.items():
            bundle.writestr(name, body)
    return path


def tarred(path: Path, members: dict[str, bytes], mode: str = "w:gz") -> Path:
    with tarfile.open(path, mode) as bundle:
        for name, body in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(body)
            bundle.addfile(member, io.BytesIO(body))
    return path


def test_archives_are_unpacked_beside_themselves(web: Web, tmp_path: Path) -> None:
    members = {"top/a.txt": b"a", "top/deep/b.bin": BIG, "c": b""}
    for made in (zipped(tmp_path / "z.zip", members), tarred(tmp_path / "t.tar.gz", members),
                 tarred(tmp_path / "u.tar.xz", members, "w:xz")):  # fmt: skip
        target = unpack(made)
        assert target == tmp_path / made.name.split(".")[0]
        assert {p.relative_to(target).as_posix(): p.read_bytes() for p in target.rglob("*") if p.is_file()} == members
        assert unpack(made) == target
    folder = bs.data.fetch(manifest(one(web, (tmp_path / "z.zip").read_bytes(), "fold_1.zip")))
    assert left(folder) == ["fold_1.zip"]  # only on request
    bs.data.fetch(manifest(one(web, (tmp_path / "z.zip").read_bytes(), "fold_1.zip")), unpack=True)
    assert (folder / "fold_1/top/deep/b.bin").read_bytes() == BIG


def _linked(path: Path) -> Path:
    with tarfile.open(path, "w") as bundle:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        bundle.addfile(member)
    return path


def _linked_zip(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        member = zipfile.ZipInfo("link")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        bundle.writestr(member, "/etc")
    return path


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda f: zipped(f / "a.zip", {"../out.txt": b"x"}), "outside its folder"),
        (lambda f: zipped(f / "a.zip", {"/out.txt": b"x"}), "outside its folder"),
        (lambda f: zipped(f / "a.zip", {"C:/out.txt": b"x"}), "outside its folder"),
        (lambda f: tarred(f / "a.tar.gz", {"ok": b"", "b/../../out.txt": b"x"}), "outside its folder"),
        (lambda f: _linked(f / "a.tar"), "link or device"),
        (lambda f: _linked_zip(f / "a.zip"), "holds a link"),
        (lambda f: _cut(zipped(f / "a.zip", {"a": BIG})), "damaged"),
        (lambda f: _cut(tarred(f / "a.tar.gz", {"a": BIG})), "damaged"),
        (lambda f: _written(f / "a.bz2", b"BZh9" + bytes(200)), "damaged"),
        (lambda f: _written(f / "a.zip", _deflate64(f)), "by hand"),
        (lambda f: zipped(f / "a.zip", {"b/c": b"x", "b": b"y"}), "one place twice"),
    ],
)
def test_unsafe_and_damaged_archives_leave_nothing(tmp_path: Path, make, why: str) -> None:
    (tmp_path / "in").mkdir()
    archive = make(tmp_path / "in")
    with pytest.raises(FormatError, match=why):
        unpack(archive)
    assert [p.name for p in tmp_path.rglob("*")] == ["in", archive.name]


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _deflate64(folder: Path) -> bytes:
    """A zip whose member states a way of packing that Python does not have."""
    made = zipped(folder / "b.zip", {"a": BIG})
    data = bytearray(made.read_bytes())
    made.unlink()
    for at in (8, data.rfind(b"PK\1\2") + 10):
        data[at : at + 2] = (9).to_bytes(2, "little")
    return bytes(data)


def _cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-5000])
    return path


def test_bombs_are_stopped(tmp_path: Path) -> None:
    zeros = bytes(5_000_000)
    (tmp_path / "c.gz").write_bytes(gzip.compress(zeros))
    for archive in (
        zipped(tmp_path / "a.zip", {"a": zeros}),
        tarred(tmp_path / "b.tar.gz", {"a": zeros}),
        tmp_path / "c.gz",
    ):
        assert archive.stat().st_size < 50_000
        with pytest.raises(OSError, match=r"more than the 1\.0 MB"):
            unpack(archive, max_bytes=1_000_000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "b.tar.gz", "c.gz"]
