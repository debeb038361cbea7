"""Mirrors here are real HTTP servers on 127.0.0.1, each of which misbehaves in one way."""

import hashlib
import io
import logging
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import threading
import time
import types
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cifar10_tl.config.errors import UserError
from cifar10_tl.data.download import DownloadError, extract_tar, fetch

REPOSITORY = Path(__file__).resolve().parents[2]
GOOD = bytes(range(256)) * 800  # 200 kB, several pieces
MD5 = hashlib.md5(GOOD).hexdigest()


class Mirror(ThreadingHTTPServer):
    """Answers every GET by behave(handler); url is its only file."""

    daemon_threads = True

    def __init__(self, behave):
        self.requests = 0
        self.closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.requests += 1
                with suppress(ConnectionError):
                    behave(self)

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}/cifar.tar.gz"


@pytest.fixture
def mirror(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    started = []

    def start(behave):
        server = Mirror(behave)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.closing.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def place(tmp_path):
    return tmp_path / "data" / "cifar.tar.gz"


def send(handler, body=b"", length=None, status=200, **headers):
    handler.send_response(status)
    if length is not None:
        handler.send_header("Content-Length", str(length))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def good(handler):
    send(handler, GOOD, len(GOOD))


def missing(handler):
    send(handler, b"no such page", 12, status=404)


def stalls(handler):
    send(handler, GOOD[:1000], len(GOOD))
    handler.server.closing.wait(30)


def wrong(handler):
    send(handler, b"<html>please log in</html>", 26)


def truncated(handler):
    send(handler, GOOD[:-7], len(GOOD))


def truncated_chunk(handler):
    handler.protocol_version = "HTTP/1.1"
    send(handler, b"%x\r\n" % len(GOOD) + GOOD[:-7], **{"Transfer-Encoding": "chunked", "Connection": "close"})


def silent(handler):
    handler.server.closing.wait(30)


def trickling_headers(handler):
    handler.wfile.write(b"HTTP/1.0 200 OK\r\nX-Long: ")
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"x")


def trickling_body(handler):
    send(handler, length=len(GOOD))
    while not handler.server.closing.wait(0.05):
        handler.wfile.write(b"x")


def slow(handler):  # 40 kB/s
    send(handler, length=len(GOOD))
    for start in range(0, len(GOOD), 2000):
        handler.wfile.write(GOOD[start : start + 2000])
        if start < 40_000:
            time.sleep(0.05)


def endless(handler):
    send(handler)
    while not handler.server.closing.is_set():
        handler.wfile.write(GOOD)


def assert_clean(place, *, holds=None):
    """Nothing but the file, where one is expected, and the lock."""
    names = {path.name for path in place.parent.iterdir()} - {f".{place.name}.lock"}
    assert names == (set() if holds is None else {place.name})
    assert holds is None or place.read_bytes() == holds


def warnings_of(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# ---------------------------------------------------------------------------------------------------- mirrors


def test_each_bad_mirror_is_left_for_the_next(mirror, place, caplog):
    mirrors = [mirror(behave) for behave in (missing, stalls, wrong, truncated, good)]
    assert fetch([m.url for m in mirrors], place, md5=MD5.upper(), stall_seconds=0.5) == place
    assert_clean(place, holds=GOOD)
    assert [m.requests for m in mirrors] == [1] * 5
    reasons = [
        "HTTP Error 404",
        "stalled, nothing for 0.5 s",
        "wrong md5, 26 bytes",
        f"truncated, 7 of {len(GOOD)}",
    ]
    lines = warnings_of(caplog)
    assert len(lines) == len(reasons)
    for line, reason, failed, following in zip(lines, reasons, mirrors, mirrors[1:], strict=False):
        assert line.startswith(f"{failed.host} failed: {reason}")
        assert line.endswith(f"; trying {following.host}")


def test_when_all_fail_one_line_says_what_to_bring_and_where(mirror, place, monkeypatch):
    mirrors = [mirror(behave) for behave in (missing, truncated_chunk)]
    gone = mirror(good)
    gone.shutdown()
    gone.server_close()
    monkeypatch.chdir(place.parents[1])
    relative = Path("data", place.name)
    with pytest.raises(DownloadError) as caught:
        fetch([*(m.url for m in mirrors), gone.url], relative, md5=MD5, hint="Or train with data=shapes.")
    message = str(caught.value)
    assert isinstance(caught.value, UserError)
    assert len(message.splitlines()) == 1
    for part in (
        place.name,
        MD5,
        str(place),
        *(m.host for m in mirrors),
        gone.host,
        "404",
        "Connection refused",
    ):
        assert part in message
    assert f"{mirrors[1].host}: IncompleteRead" in message
    assert message.endswith(f"put it at {place}. Or train with data=shapes.")
    assert_clean(place)


@pytest.mark.parametrize(
    ("behave", "reason"),
    [
        (silent, "stalled"),
        (trickling_headers, "stalled"),
        (stalls, "stalled"),
        (trickling_body, "slow, 0.0 kB/s"),
    ],
)
def test_even_the_last_mirror_may_not_hang(mirror, place, behave, reason):
    start = time.monotonic()
    with pytest.raises(DownloadError, match=reason):
        fetch([mirror(behave).url], place, md5=MD5, stall_seconds=0.3)
    assert time.monotonic() - start < 3
    assert_clean(place)


def test_a_slow_mirror_is_left_while_there_is_another(mirror, place, caplog):
    first, second = mirror(slow), mirror(good)
    fetch([first.url, second.url], place, md5=MD5, stall_seconds=0.4)
    assert_clean(place, holds=GOOD)
    assert second.requests == 1
    assert "failed: slow, " in warnings_of(caplog)[0]


def test_a_slow_mirror_serves_as_the_last(mirror, place, caplog):
    last = mirror(slow)
    fetch([mirror(missing).url, last.url], place, md5=MD5, stall_seconds=0.4)
    assert_clean(place, holds=GOOD)
    assert last.requests == 1


def test_a_slow_mirror_is_asked_again_when_the_others_fail(mirror, place):
    first, second = mirror(slow), mirror(missing)
    fetch([first.url, second.url], place, md5=MD5, stall_seconds=0.4)
    assert_clean(place, holds=GOOD)
    assert (first.requests, second.requests) == (2, 1)


@pytest.mark.parametrize("behave", [good, endless])
def test_more_bytes_than_allowed_are_refused(mirror, place, behave):
    with pytest.raises(DownloadError, match="larger than 100000 bytes"):
        fetch([mirror(behave).url], place, md5=MD5, max_bytes=100_000)
    assert_clean(place)
    deadline = time.monotonic() + 5
    while any(thread.name == "download" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the rest is still being read"
        time.sleep(0.02)


def test_a_body_of_unknown_length_and_a_redirect_are_fine(mirror, place):
    plain = mirror(lambda handler: send(handler, GOOD))
    fetch([mirror(lambda handler: send(handler, status=302, Location=plain.url)).url], place, md5=MD5)
    assert_clean(place, holds=GOOD)


def test_a_server_that_keeps_the_connection_open_is_fine(mirror, place):
    def lingers(handler):
        good(handler)
        handler.server.closing.wait(30)

    fetch([mirror(lingers).url], place, md5=MD5, stall_seconds=1.0)
    assert_clean(place, holds=GOOD)


@pytest.mark.parametrize("scheme", ["file", "ftp", "data"])
def test_only_http_is_spoken(mirror, place, tmp_path, scheme):
    (tmp_path / "local").write_bytes(GOOD)
    other = f"{scheme}://{'127.0.0.1:1' if scheme == 'ftp' else ''}{tmp_path}/local"
    server = mirror(good)
    with pytest.raises(DownloadError, match="must be an http or https address"):
        fetch([server.url, other], place, md5=MD5)
    assert server.requests == 0
    with pytest.raises(DownloadError, match=r"Redirection to|unknown url type"):
        fetch([mirror(lambda handler: send(handler, status=302, Location=other)).url], place, md5=MD5)
    assert not place.exists()


# ------------------------------------------------------------------------------------- the file and its place


def test_a_good_file_is_used_without_network(mirror, place):
    server = mirror(good)
    place.parent.mkdir()
    place.write_bytes(GOOD)
    fetch([server.url], place, md5=MD5)
    fetch([], place, md5=MD5)
    assert server.requests == 0
    assert list(place.parent.iterdir()) == [place]  # nor is anything written: the folder may be read-only


def test_a_wrong_file_stays_until_a_good_one_is_whole(mirror, place):
    place.parent.mkdir()
    place.write_bytes(b"mine")
    with pytest.raises(DownloadError, match="truncated"):
        fetch([mirror(truncated).url], place, md5=MD5)
    assert_clean(place, holds=b"mine")
    fetch([mirror(good).url], place, md5=MD5)
    assert_clean(place, holds=GOOD)


def test_without_mirrors_the_message_still_says_what_to_bring(place):
    with pytest.raises(DownloadError, match=rf"no mirror given.*{MD5}"):
        fetch([], place, md5=MD5)


def test_a_place_that_cannot_be_written_is_not_blamed_on_the_mirror(mirror, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"cannot write .*/file/cifar\.tar\.gz"):
        fetch([mirror(good).url], tmp_path / "file" / "cifar.tar.gz", md5=MD5)


def test_an_interrupt_leaves_nothing_behind(mirror, place):
    def interrupts(handler):
        send(handler, GOOD[:100_000], len(GOOD))
        while not any(path.suffix == ".tmp" and path.stat().st_size for path in place.parent.iterdir()):
            time.sleep(0.01)  # buffered: the file shows bytes once enough have come
        os.kill(os.getpid(), signal.SIGINT)
        handler.server.closing.wait(30)

    with pytest.raises(KeyboardInterrupt):
        fetch([mirror(interrupts).url], place, md5=MD5)
    assert_clean(place)


FETCH_IN_A_PROCESS = """
import fcntl, logging, pathlib, sys
from cifar10_tl.data import download
logging.basicConfig(format="%(message)s")
def no_locks(*args):
    raise OSError("no locks here")
if sys.argv[4] == "unlocked":
    fcntl.flock = no_locks
download.fetch([sys.argv[1]], pathlib.Path(sys.argv[2]), md5=sys.argv[3])
"""


@pytest.mark.parametrize("mode", ["locked", "unlocked"])
def test_two_jobs_may_fetch_the_same_file_at_once(mirror, place, tmp_path, mode):
    release = threading.Barrier(2, timeout=20)

    def waits(handler):
        release.wait()  # locked: until the other job is seen waiting; unlocked: until both have asked
        good(handler)

    server = mirror(waits)
    command = [sys.executable, "-c", FETCH_IN_A_PROCESS, server.url, str(place), MD5, mode]
    said = tmp_path / "stderr"
    with said.open("ab") as stderr:
        jobs = [subprocess.Popen(command, stderr=stderr, cwd=REPOSITORY) for _ in range(2)]
    try:
        if mode == "locked":
            deadline = time.monotonic() + 20
            while "waiting for another process" not in said.read_text():
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.02)
            release.wait()
        assert [job.wait(20) for job in jobs] == [0, 0], said.read_text()
    finally:
        for job in jobs:
            job.kill()
            job.wait()
    assert server.requests == (1 if mode == "locked" else 2)
    assert_clean(place, holds=GOOD)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(("stderr", "progress"), [(Terminal, True), (Terminal, False), (io.StringIO, True)])
def test_the_bar_is_drawn_on_terminals_only(mirror, place, monkeypatch, caplog, stderr, progress):
    caplog.set_level(logging.INFO)
    server = mirror(good)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr())
        fetch([server.url], place, md5=MD5, progress=progress)
        drawn = sys.stderr.getvalue()
    if stderr is Terminal and progress:
        assert f"{place.name}:" in drawn
        assert "B/s" in drawn
    else:
        assert drawn == ""
    assert [r.getMessage() for r in caplog.records] == [
        f"downloading {place.name} from {server.host}",
        f"downloaded {place}",
    ]


# --------------------------------------------------------------------------------------------------- archives


def make_tar(path, entries):
    """A gzipped tar of entries: name -> bytes, or a TarInfo with its type and link set."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in entries.items():
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            data = content if isinstance(content, bytes) else b""
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(kind, target=""):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return info


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_an_archive_is_unpacked_and_replaces_what_was_there(tmp_path):
    archive = make_tar(tmp_path / "a.tar.gz", {"batches/one": b"1", "batches/deep/two": b"2", "readme": b"r"})
    into = tmp_path / "new" / "into"
    expected = {
        "batches": None,
        "batches/one": b"1",
        "batches/deep": None,
        "batches/deep/two": b"2",
        "readme": b"r",
    }
    extract_tar(archive, into)
    assert tree(into) == expected
    (into / "batches" / "one").write_bytes(b"damaged")
    (into / "batches" / "stale").touch()
    (into / "other").touch()
    extract_tar(archive, into)
    assert tree(into) == {**expected, "other": b""}


def test_nothing_shows_before_the_archive_is_unpacked_to_its_end(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "a.tar.gz", {"batches/one": b"1", "batches/two": b"2"})
    seen, extract = [], tarfile.TarFile.extract

    def spy(*args, **kwargs):
        extract(*args, **kwargs)
        seen.append((into / "batches").exists())

    into = tmp_path / "into"
    monkeypatch.setattr(tarfile.TarFile, "extract", spy)
    extract_tar(archive, into)
    assert seen == [False, False]
    assert (into / "batches" / "two").exists()


@pytest.mark.parametrize("other_job", [True, False])
def test_another_job_may_put_its_copy_there_first(tmp_path, monkeypatch, other_job):
    archive = make_tar(tmp_path / "a.tar.gz", {"batches/one": b"1"})
    target, rename = tmp_path / "into" / "batches", Path.rename

    def raced(source, to):
        if to == target:
            if other_job:
                target.mkdir()
                (target / "one").write_bytes(b"theirs")
            raise OSError("in the way")
        return rename(source, to)

    monkeypatch.setattr(Path, "rename", raced)
    if other_job:
        extract_tar(archive, tmp_path / "into")
        assert tree(tmp_path / "into") == {"batches": None, "batches/one": b"theirs"}
    else:
        with pytest.raises(DownloadError, match="in the way"):
            extract_tar(archive, tmp_path / "into")
        assert tree(tmp_path / "into") == {}


@pytest.mark.parametrize(
    "entries",
    [
        {"../evil": b"x"},
        {"batches/../../evil": b"x"},
        {"{outside}/evil": b"x"},
        {"link": special(tarfile.SYMTYPE, "{outside}"), "link/evil": b"x"},
        {"link": special(tarfile.SYMTYPE, "../.."), "link/evil": b"x"},
        {"batches/link": special(tarfile.LNKTYPE, "{outside}/mine")},
        {"batches/harmless": special(tarfile.SYMTYPE, "first")},
        {"batches/device": special(tarfile.CHRTYPE)},
        {"batches/pipe": special(tarfile.FIFOTYPE)},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_an_unsafe_archive_is_refused_and_leaves_nothing(tmp_path, entries):
    outside, into = tmp_path / "outside", tmp_path / "place" / "into"
    outside.mkdir()
    (outside / "mine").write_bytes(b"mine")
    (into / "batches").mkdir(parents=True)
    (into / "batches" / "old").write_bytes(b"old")
    filled = {"batches/first": b"1"}
    for name, content in entries.items():
        if isinstance(content, tarfile.TarInfo):
            content.linkname = content.linkname.format(outside=outside)
        filled[name.format(outside=outside)] = content
    archive = make_tar(tmp_path / "a.tar.gz", filled)
    before = tree(tmp_path)
    with pytest.raises(DownloadError) as caught:
        extract_tar(archive, into)
    assert len(str(caught.value).splitlines()) == 1
    assert str(archive) in str(caught.value)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "reason"), [("cut", "cannot unpack"), ("garbage", "cannot unpack"), ("big", "more")]
)
def test_a_damaged_or_huge_archive_leaves_nothing(tmp_path, damage, reason):
    noise = b"".join(hashlib.sha256(bytes([i, j])).digest() for i in range(250) for j in range(10))
    archive = make_tar(tmp_path / "a.tar.gz", {"batches/one": noise, "batches/two": noise})
    if damage == "cut":
        archive.write_bytes(archive.read_bytes()[:-2000])
    if damage == "garbage":
        archive.write_bytes(b"<html>")
    with pytest.raises(DownloadError, match=reason):
        extract_tar(archive, tmp_path / "into", max_bytes=100_000 if damage == "big" else 1 << 20)
    assert tree(tmp_path / "into") == {}


def test_a_python_without_the_safe_filter_is_refused(tmp_path, monkeypatch):
    archive = make_tar(tmp_path / "a.tar.gz", {"one": b"1"})
    monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(DownloadError, match="cannot unpack archives safely"):
        extract_tar(archive, tmp_path / "into")
    assert not (tmp_path / "into").exists()


# ------------------------------------------------------------------------------------------------- the script


def run_script(monkeypatch, prepare, *arguments):
    sources = types.ModuleType("cifar10_tl.data.sources")
    sources.prepare_cifar10 = prepare
    monkeypatch.setitem(sys.modules, sources.__name__, sources)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", ["download.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(REPOSITORY / "scripts" / "download.py"), run_name="__main__")
    return caught.value.code


def test_the_script_passes_on_the_config_and_prints_the_folder(monkeypatch, capsys):
    calls = []

    def prepare(root, mirrors, md5, stall_seconds):
        calls.append((root, mirrors, md5, stall_seconds))
        return Path(root, "cifar-10-batches-py")

    assert run_script(monkeypatch, prepare) == 0
    assert run_script(monkeypatch, prepare, "--root", "d", "--mirror", "http://a", "--mirror", "http://b") == 0
    (root, mirrors, md5, stall_seconds), given = calls
    assert (root, md5, stall_seconds) == ("data", "c58f30108f718f92721af3b95e74349a", 20)
    assert mirrors[-1] == "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
    assert all(type(url) is str for url in mirrors)
    assert given == ("d", ["http://a", "http://b"], md5, 20)
    assert capsys.readouterr().out.splitlines() == ["data/cifar-10-batches-py", "d/cifar-10-batches-py"]


def test_the_script_shows_a_failure_as_one_line(monkeypatch, capsys):
    def prepare(*args):
        raise DownloadError("no mirror answers")

    assert run_script(monkeypatch, prepare) == 2
    assert capsys.readouterr().err == "error: no mirror answers\n"
