"""Downloads from a server that misbehaves: what arrives is whole, or there is an error and nothing half is left."""

import contextlib
import errno
import hashlib
import http.server
import io
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import threading
import time
from collections import namedtuple

import pytest
import timm
import torch
from safetensors import SafetensorError

import zoo
from zoo.weights import DownloadError, cache, checkpoint, download, load_checkpoint, pretrained, transfer
from zoo.weights.pretrained import pretrained_overlay

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
CONTENT = random.Random(0).randbytes(200_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Site:
    """A server on the loopback interface. Every path has a list of answers; the last one is given again and again."""

    def __init__(self):
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append((self.path, dict(self.headers)))
                answers = site.answers.get(self.path, [status(404)])
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                with contextlib.suppress(ConnectionError):
                    answer(self)

            def log_message(self, *args):
                pass

        self.answers, self.requests = {}, []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __setitem__(self, path, answers):
        self.answers[path] = list(answers) if isinstance(answers, list) else [answers]

    def ranges(self):
        return [headers.get("Range") for _, headers in self.requests]


def whole(content, etag='"1"', ranges=True, kind="application/octet-stream", until=None, pause=0.0, length=True):
    """The file, or the part asked for; with ``until``, the connection breaks after that byte of the file."""

    def answer(handler):
        start = 0
        asked = handler.headers.get("Range")
        if ranges and asked and handler.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            handler.send_response(206 if start < len(content) else 416)
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            handler.send_response(200)
        if etag:
            handler.send_header("ETag", etag)
        if length:
            handler.send_header("Content-Length", str(max(0, len(content) - start)))
        handler.send_header("Content-Type", kind)
        handler.end_headers()
        end = len(content) if until is None else until
        step = 8 if pause else 1 << 16
        for position in range(start, end, step):
            handler.wfile.write(content[position : min(position + step, end)])
            time.sleep(pause)
        if until is not None:
            handler.connection.shutdown(socket.SHUT_RDWR)  # closing is not enough: forks have the socket, too

    return answer


def status(code, **headers):
    def answer(handler):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@pytest.fixture
def site():
    site = Site()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """A cache of its own, no waiting, no proxy, nothing remembered from other tests."""
    for variable in ("HF_HUB_OFFLINE", "ZOO_OFFLINE", "ZOO_MIRROR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "BACKOFF", 0.01)
    monkeypatch.setattr(pretrained, "_announced", set())
    monkeypatch.setattr(cache, "_temporary", {})


@pytest.fixture(scope="module")
def micro():
    """A model, and a training checkpoint of it as bytes."""
    model = zoo.create_model("vim_micro")
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "epoch": 3}, buffer)
    return model, buffer.getvalue()


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def create(site, path="/w.pth", **kwargs):
    return zoo.create_model("vim_micro", True, pretrained_cfg_overlay={"url": site.address + path}, **kwargs)


def same(model, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


# One file.


@pytest.mark.parametrize("length", [True, False])
def test_a_file_arrives(site, tmp_path, length):
    site["/f"] = whole(CONTENT, length=length)
    assert download(f"{site.address}/f", tmp_path / "f", sha256=DIGEST, size=len(CONTENT)) == (DIGEST, len(CONTENT))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["f"]


def test_broken_connections_are_resumed(site, tmp_path):
    places = sorted(random.Random(1).sample(range(1, len(CONTENT)), 6))  # more breaks than attempts
    site["/f"] = [*(whole(CONTENT, until=place) for place in places), whole(CONTENT)]
    assert download(f"{site.address}/f", tmp_path / "f")[0] == DIGEST
    assert site.ranges() == [None, *(f"bytes={place}-" for place in places)]
    assert leftovers(tmp_path) == ["f"]


def test_a_later_call_continues(site, tmp_path):
    """What an interrupted process left is used, but only as much as its note vouches for."""
    site["/f"] = [whole(CONTENT, until=70_000), status(404)]
    with pytest.raises(DownloadError, match="404"):
        download(f"{site.address}/f", tmp_path / "f")
    assert leftovers(tmp_path) == ["f.part", "f.part.json"]
    with (tmp_path / "f.part").open("ab") as file:
        file.write(b"never synced")
    site["/f"] = whole(CONTENT)
    assert download(f"{site.address}/f", tmp_path / "f")[0] == DIGEST
    assert site.ranges()[-1] == "bytes=70000-"


@pytest.mark.parametrize("change", ["no ranges", "another file", "no validator", "another address"])
def test_restarts_where_resuming_is_not_safe(site, tmp_path, change):
    new = CONTENT[::-1] if change == "another file" else CONTENT
    etag = {"no validator": "", "another file": '"2"'}.get(change, '"1"')
    first = whole(CONTENT, etag="" if change == "no validator" else '"1"', until=50_000)
    site["/f"] = [first, status(404)]
    site["/g"] = site.answers["/f"]
    with pytest.raises(DownloadError):
        download(f"{site.address}/f", tmp_path / "f")
    site["/f"] = site["/g"] = whole(new, etag=etag, ranges=change != "no ranges")
    address = f"{site.address}/{'g' if change == 'another address' else 'f'}"
    assert download(address, tmp_path / "f")[0] == hashlib.sha256(new).hexdigest()
    assert (tmp_path / "f").read_bytes() == new


def test_pieces_of_two_files_are_noticed(site, tmp_path):
    """The server says that nothing changed, and lies."""
    site["/f"] = [whole(bytes(len(CONTENT)), until=50_000), whole(CONTENT)]
    assert download(f"{site.address}/f", tmp_path / "f", sha256=DIGEST)[0] == DIGEST
    assert site.ranges() == [None, "bytes=50000-", None]


def test_a_part_longer_than_the_file(site, tmp_path):
    site["/f"] = [whole(bytes(300_000), until=250_000), whole(CONTENT)]
    assert download(f"{site.address}/f", tmp_path / "f")[0] == DIGEST


@pytest.mark.parametrize(
    "answer, message",
    [
        (status(404), "404.*moved or was taken away"),
        (status(403), "403.*login"),
        (status(410), "410"),
        (whole(b"<!DOCTYPE html><p>gone</p>", kind="text/html; charset=utf-8"), "web page"),
        (whole(b"\n <html>gone</html>", length=False), "web page"),
        (whole(CONTENT[::-1]), "SHA-256 .* instead of"),
        (whole(CONTENT[:-1]), "199999 bytes instead of 200000"),
        (whole(CONTENT[:-1], length=False), "199999 bytes instead of 200000"),
    ],
)
def test_wrong_answers_are_final(site, tmp_path, answer, message):
    site["/f"] = answer
    with pytest.raises(DownloadError, match=message):
        download(f"{site.address}/f", tmp_path / "f", sha256=DIGEST, size=len(CONTENT))
    assert leftovers(tmp_path) == []
    assert len(site.requests) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_busy_servers_are_asked_again_a_few_times(site, tmp_path, code):
    site["/f"] = [status(code), status(code, Retry_After="0"), whole(CONTENT)]
    assert download(f"{site.address}/f", tmp_path / "f")[0] == DIGEST
    site["/g"] = status(code)
    with pytest.raises(DownloadError, match=f"{code}.*4 times"):
        download(f"{site.address}/g", tmp_path / "g")
    assert len(site.requests) == 3 + 4


def test_the_server_says_how_long_to_wait(site, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(transfer.time, "sleep", waits.append)
    site["/f"] = [status(429, Retry_After="7"), status(503, Retry_After="9999"), status(500), whole(CONTENT)]
    download(f"{site.address}/f", tmp_path / "f")
    assert waits[:3] == [7, 60, 0.04]


def test_a_trickle_is_a_failure(site, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT", 0.15)
    site["/f"] = whole(CONTENT, pause=0.02)
    with pytest.raises(DownloadError, match=r"only \d+ bytes came.*4 times"):
        download(f"{site.address}/f", tmp_path / "f")
    site["/f"] = lambda handler: time.sleep(0.5)
    with pytest.raises(DownloadError, match=r"no connection: .*timed out"):
        download(f"{site.address}/f", tmp_path / "f")


def test_nobody_listens(tmp_path):
    with pytest.raises(DownloadError, match="no connection"):
        download("http://127.0.0.1:9/f", tmp_path / "f")
    with pytest.raises(DownloadError, match="no http or https address"):
        download("file:///etc/hosts", tmp_path / "f")


def test_redirects_are_followed_and_keep_the_range(site, tmp_path):
    site["/f"] = status(302, Location="/there")
    site["/there"] = [whole(CONTENT, until=60_000), whole(CONTENT)]
    assert download(f"{site.address}/f", tmp_path / "f")[0] == DIGEST
    assert site.ranges()[-1] == "bytes=60000-"
    site["/loop"] = status(302, Location="/loop")
    with pytest.raises(DownloadError, match="302"):
        download(f"{site.address}/loop", tmp_path / "f")


def test_terminals_get_a_progress_bar(site, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    site["/f"] = [whole(CONTENT, until=100_000), whole(CONTENT)]
    monkeypatch.setattr("sys.stderr", Terminal())
    download(f"{site.address}/f", tmp_path / "f", label="weights of something")
    assert "weights of something" in transfer.sys.stderr.getvalue()


Usage = namedtuple("Usage", "free")


class FullDisk(io.FileIO):
    """A file on a disk with room for 100 kB."""

    def write(self, chunk):
        if self.tell() + len(chunk) > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(chunk)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk(site, tmp_path, monkeypatch, foreseen):
    def open_part(path, mode="r", *rest, **options):
        return FullDisk(path, mode.replace("b", "")) if path.suffix == ".part" else open(path, mode, *rest, **options)

    site["/f"] = whole(CONTENT)
    if foreseen:
        monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: Usage(1000))
    else:
        monkeypatch.setattr(pathlib.Path, "open", open_part)
    with pytest.raises(OSError, match=r"200000 bytes cannot be written.*ZOO_CACHE") as error:
        download(f"{site.address}/f", tmp_path / "f")
    assert error.value.errno == errno.ENOSPC
    assert leftovers(tmp_path) == []
    monkeypatch.undo()
    assert download(f"{site.address}/f", tmp_path / "f")[0] == DIGEST


# Through create_model.


def test_weights_are_downloaded_converted_and_kept(site, micro, tmp_path, capfd):
    model, content = micro
    site["/w.pth"] = whole(content)
    assert same(create(site), model)
    (kept,) = [name for name in leftovers(tmp_path / "cache") if name.endswith(".safetensors")]
    assert leftovers(tmp_path / "cache") == [kept.replace(".safetensors", ".json"), kept]
    site["/w.pth"] = status(500)
    again = timm.create_model("vim_micro", True, pretrained_cfg_overlay={"url": f"{site.address}/w.pth"})
    assert same(again, model) and "file" not in again.pretrained_cfg
    assert len(site.requests) == 1
    adapted = create(site, num_classes=3, in_chans=1, img_size=48)
    assert torch.equal(adapted.norm.weight, model.norm.weight) and adapted.head.out_features == 3
    features = create(site, features_only=True, out_indices=(1,))
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(features(images), model.forward_intermediates(images, [1], intermediates_only=True))
    assert capfd.readouterr().err.count("license apache-2.0") == 1


def test_weights_of_another_variant_are_named(site):
    buffer = io.BytesIO()
    torch.save(zoo.create_model("vim_nano").state_dict(), buffer)
    site["/w.pth"] = whole(buffer.getvalue())
    with pytest.raises(ValueError, match=r"do not fit this vim_micro: .*These weights fit vim_nano\."):
        create(site)
    with pytest.raises(ValueError, match="do not fit"):
        create(site, num_classes=3)


class Harmful:
    def __reduce__(self):
        return (print, ("code ran",))


def bad_files(content):
    harmful = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(1)}, "extra": Harmful()}, harmful)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    safetensors = b"\xff\x00\x00\x00\x00\x00\x00\x00" + b'{"w":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}'
    return {
        "code": ("/w.pth", harmful.getvalue(), "tensors and plain values"),
        "a flipped bit": ("/w.pth", bytes(flipped), "is damaged at"),
        "half a file": ("/w.pth", content[: len(content) // 2], "damaged"),
        "text": ("/w.pth", b"no checkpoint", "damaged"),
        "nothing": ("/w.pth", b"", "damaged"),
        "half of safetensors": ("/w.safetensors", safetensors, "damaged"),
    }


@pytest.mark.parametrize("case", ["code", "a flipped bit", "half a file", "text", "nothing", "half of safetensors"])
def test_bad_files_with_a_good_status(site, micro, tmp_path, capfd, case):
    path, content, message = bad_files(micro[1])[case]
    site[path] = whole(content)
    for _ in range(2):
        with pytest.raises(DownloadError, match=f"(?s)could not be had: .*{message}.*checkpoint_path"):
            create(site, path)
        assert leftovers(tmp_path / "cache") == []
    assert len(site.requests) == 2  # nothing of the first try was taken for the file
    assert "code ran" not in capfd.readouterr().out
    if path == "/w.pth":
        site[path] = whole(micro[1])
        assert same(create(site), micro[0])


def test_the_disk_fills_up_during_conversion(site, micro, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        pathlib.Path(path).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device")

    site["/w.pth"] = whole(micro[1])
    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        create(site)
    assert not [name for name in leftovers(tmp_path / "cache") if name.endswith((".safetensors", ".json"))]
    monkeypatch.undo()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert same(create(site), micro[0])


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_cache_is_not_used(site, micro, tmp_path, damage):
    site["/w.pth"] = whole(micro[1])
    create(site)
    (kept,) = (tmp_path / "cache").glob("*.safetensors")
    content = bytearray(kept.read_bytes())
    content[-100] ^= 1
    if damage == "gone":
        kept.unlink()
    else:
        kept.write_bytes(content[:-8] if damage == "cut" else content)
    assert same(create(site), micro[0])
    assert len(site.requests) == 2


# Several processes.


def run_in_forks(count, work):
    """Runs a function in forked processes and returns their exit statuses."""
    context = multiprocessing.get_context("fork")

    def run():
        status = 1
        try:
            status = 0 if work() else 1
        finally:
            os._exit(status)  # without what a test process does at its end

    processes = [context.Process(target=run) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@needs_fork
def test_twenty_processes_fetch_one_file(site, micro, tmp_path):
    site["/w.pth"] = [whole(micro[1], until=len(micro[1]) // 3), whole(micro[1])]
    cfg = timm.models.resolve_pretrained_cfg("vim_micro", None, {"url": f"{site.address}/w.pth"})
    expected = micro[0].state_dict()

    def work():
        got = load_checkpoint(pretrained_overlay(cfg)["file"])
        return all(torch.equal(expected[name], tensor) for name, tensor in got.items())

    assert run_in_forks(20, work) == [0] * 20
    assert len(site.requests) == 2
    assert len(leftovers(tmp_path / "cache")) == 2


@needs_fork
def test_a_killed_process_leaves_nothing_in_the_way(site, micro, tmp_path):
    """One dies while it downloads and holds the lock; the next takes over at once."""
    begun = threading.Event()

    def stuck(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(micro[1])))
        handler.end_headers()
        handler.wfile.write(micro[1][:100_000])
        begun.set()
        time.sleep(20)

    site["/w.pth"] = [stuck, whole(micro[1])]
    process = multiprocessing.get_context("fork").Process(target=create, args=(site,))
    process.start()
    assert begun.wait(20)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    started = time.monotonic()
    assert same(create(site), micro[0])
    assert time.monotonic() - started < 10
