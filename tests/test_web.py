"""The local page: what it works out, what it refuses, and, where there is a Chromium, what a person sees of it."""

import asyncio
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from zoo.assistant import Assistant
from zoo.config import load_config
from zoo.data.scenes_data import SCENE_CLASSES
from zoo.engine import predict_files
from zoo.engine.dense_build import build_detector, build_segmentor
from zoo.tools import demo
from zoo.web import Trained, create_page, draw_clothes, load_for, panels, serve

gradio = pytest.importorskip("gradio", reason="needs gradio")
pytest.importorskip("transformers", reason="needs transformers")

small = runpy.run_path(str(Path(__file__).with_name("small_vlm.py")))
DARK, BRIGHT, KNOWN, picture = (small[name] for name in ("DARK", "BRIGHT", "KNOWN", "picture"))
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PACKAGED = "vim_nano.fashion_mnist"
SECONDS = 1000  # milliseconds; a busy machine takes its time
PATIENCE = 60 * SECONDS
TINY = ["model.kwargs={dims: 8, depths: [1, 1, 1, 1]}", "model.patch_size=4"]
HEADS = {
    "segmentation": ["data.img_size=64", "model.head_kwargs={channels: 16, norm: group}"],
    "detection": [
        *("data.min_size=[64]", "data.max_size=64"),
        "model.head_kwargs={pyramid_channels: 16, representation_size: 32, mask_channels: 16, max_detections: 5}",
    ],
}


@pytest.fixture(scope="module")
def classifier():
    return load_for("classification", PACKAGED, "cpu")


@pytest.fixture(scope="module")
def dense():
    """A segmentor and a detector with random weights."""
    torch.manual_seed(0)
    trained = {}
    for task, build, classes in (
        ("segmentation", build_segmentor, SCENE_CLASSES),
        ("detection", build_detector, SCENE_CLASSES[1:]),
    ):
        model, card = build(load_config(f"{task}/nano_fashion_scenes", [*TINY, *HEADS[task]]), classes)
        trained[task] = Trained(model.eval(), card)
    return trained


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return small["save_run"](tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of the known answers, something to segment, and files that are no images."""
    folder = tmp_path_factory.mktemp("images")
    picture(DARK).save(folder / "dark.png")
    picture(BRIGHT).save(folder / "bright.png")
    scene = picture((40, 90, 160), (120, 80))
    ImageDraw.Draw(scene).ellipse((30, 10, 90, 70), fill=(220, 60, 60))
    scene.save(folder / "scene.jpg")
    (folder / "notes.png").write_text("no image")
    (folder / "cut.jpg").write_bytes((folder / "scene.jpg").read_bytes()[:900])
    return folder


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    return draw_clothes(tmp_path_factory.mktemp("clothes"))


class TestPanels:
    def test_the_packaged_model_knows_the_drawn_clothes(self, classifier, examples):
        found = predict_files(classifier.model, classifier.card, examples)
        assert [each.label for each in found] == ["T-shirt/top", "Trouser", "Dress", "Bag", "Sneaker", "Ankle boot"]
        assert min(each.probability for each in found) > 0.5

    def test_classes_are_those_of_predictions(self, classifier, examples):
        found = panels.classify(classifier, panels.open_upload(examples[3]), "Dress", "input_gradient")
        (expected,) = predict_files(classifier.model, classifier.card, examples[3:4])
        first, *others = found.probabilities.items()
        assert first == (expected.label, pytest.approx(expected.probability)) and len(others) == 4
        assert [share for _, share in others] == sorted((share for _, share in others), reverse=True)
        assert found.seen.shape == found.evidence.shape == (448, 448, 3)
        bag = panels.classify(classifier, panels.open_upload(examples[3]), "Bag", "input_gradient")
        assert np.array_equal(found.seen, bag.seen) and not np.array_equal(found.evidence, bag.evidence)

    def test_segments_cover_the_image_once(self, dense, images):
        pixels, found = panels.segment(dense["segmentation"], panels.open_upload(images / "scene.jpg"))
        assert pixels.shape == (341, 512, 3)
        assert found and {name for _, name in found} <= set(SCENE_CLASSES[1:])
        together = sum(mask.astype(int) for mask, _ in found)
        assert together.shape == (341, 512) and together.max() == 1

    def test_objects_are_sorted_and_reach_the_threshold(self, dense, images):
        image = panels.open_upload(images / "scene.jpg")
        pixels, objects = panels.find_objects(dense["detection"], image, 0.0)
        assert pixels.shape == (341, 512, 3) and 1 <= len(objects) <= 5
        scores = [score for _, score in objects]
        assert scores == sorted(scores, reverse=True)
        untouched, some = panels.find_objects(dense["detection"], image, max(scores) + 1e-6)
        assert some == [] and not np.array_equal(untouched, pixels)

    def test_large_images_are_made_smaller(self, dense):
        image = picture((40, 90, 160), (2000, 500))
        assert panels.segment(dense["segmentation"], image)[0].shape == (256, 1024, 3)

    @pytest.mark.parametrize(
        "name, problem", [("notes.png", "is not a readable image"), ("cut.jpg", "is damaged"), ("absent.png", "absent")]
    )
    def test_files_that_cannot_be_opened(self, images, name, problem):
        with pytest.raises(ValueError, match=rf"^{name} .*") as error:
            panels.open_upload(images / name)
        assert problem in str(error.value) and str(images) not in str(error.value)

    def test_images_that_would_fill_memory(self, tmp_path):
        Image.new("1", (10_000, 5_001)).save(tmp_path / "huge.png")
        with pytest.raises(ValueError, match="10000 x 5001 pixels; send at most 50 million"):
            panels.open_upload(tmp_path / "huge.png")

    def test_models_of_another_task(self, vlm):
        with pytest.raises(ValueError, match="trained for classification, not for detection; give it as --classifier"):
            load_for("detection", PACKAGED, "cpu")
        with pytest.raises(ValueError, match="trained for vlm, not for segmentation; give it as --vlm"):
            load_for("segmentation", str(vlm), "cpu")
        with pytest.raises(FileNotFoundError, match="runs/nowhere"):
            load_for("detection", "runs/nowhere", "cpu")


class Connections:
    """What this process connects to or looks up: how often its own machine, and which others."""

    def __init__(self):
        self.watching, self.own, self.elsewhere = False, 0, []
        sys.addaudithook(self.note)  # for good; it does nothing unless it is watching

    def note(self, event, arguments):
        if self.watching and event in ("socket.connect", "socket.getaddrinfo"):
            host = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
            host = host[0] if isinstance(host, tuple) else host
            if str(host).startswith("127.") or host in ("localhost", "::1", None):
                self.own += 1
            else:
                self.elsewhere.append((event, host))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def connections():
    watch = Connections()
    watch.watching = True
    yield watch
    watch.watching = False


@pytest.fixture(scope="module")
def address(connections, classifier, dense, vlm, examples):
    """The page with all its models, served as long as the tests of this file take."""
    page = create_page(classifier, dense["segmentation"], dense["detection"], Assistant.load(vlm), examples)
    yield serve(page, port=free_port())
    page.close(verbose=False)


def upload(address, content):
    """Sends a file as the page does; returns the status of the reply."""
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + content + b"\r\n--x--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    request = urllib.request.Request(f"{address}gradio_api/upload", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status
    except urllib.error.HTTPError as error:
        return error.code


def send_event(address, values):
    """Sends values to the first tab's work, past the page; returns the reply."""
    with urllib.request.urlopen(f"{address}config", timeout=60) as reply:
        events = json.load(reply)["dependencies"]
    number = next(each["id"] for each in events if len(each["inputs"]) == len(each["outputs"]) == len(values))
    body = {"data": values, "fn_index": number, "session_hash": "made-up"}
    request = urllib.request.Request(
        f"{address}gradio_api/queue/join", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).close()
    with urllib.request.urlopen(f"{address}gradio_api/queue/data?session_hash=made-up", timeout=60) as stream:
        messages = (json.loads(line.removeprefix(b"data: ")) for line in stream if line.startswith(b"data: "))
        return next(message for message in messages if message["msg"] == "process_completed")


class TestServer:
    def test_it_listens_on_this_machine_alone(self, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        with socket.socket() as probe:  # another address of this machine, as a network's would be
            assert probe.connect_ex(("127.0.0.2", int(address.rstrip("/").rpartition(":")[2]))) != 0

    def test_large_files_are_refused(self, address):
        assert upload(address, bytes(1000)) == 200
        assert upload(address, bytes(21_000_000)) == 413

    @pytest.mark.parametrize("kind", [{}, {"meta": {"_type": "gradio.FileData"}}])
    def test_files_of_the_server_are_not_read(self, address, kind, images):
        """Only what was uploaded: a path that was made up is refused before anything opens it."""
        reply = send_event(address, [{"path": str(images / "dark.png"), **kind}, "input_gradient", "Bag"])
        assert reply["success"] is False and "data" not in reply["output"]

    def test_a_taken_port(self, address):
        with pytest.raises(OSError, match=r"cannot listen on port \d+ of 127\.0\.0\.1; choose another"):
            serve(create_page(), port=int(address.rstrip("/").rpartition(":")[2]))

    def test_tabs_without_models_tell_how_to_get_one(self):
        page = create_page()
        text = " ".join(str(block.get("props", {}).get("value")) for block in page.config["components"])
        for command in ("--classifier", "train segmentation/nano_fashion_scenes", "--detector", "--vlm"):
            assert command in text


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium, for example Debian's package chromium")
    with playwright.sync_playwright() as driver:
        # What is done just when gradio ends its stream of replies, all having arrived, is answered by its next stream
        # alone, so nothing is done at once.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], slow_mo=0.5 * SECONDS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """A function that opens the page; in the end the browser has complained of nothing and asked nobody else."""
    problems, opened = [], []

    def open_page(width=1280, height=800):
        page = chromium.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(PATIENCE)
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else 0)
        page.on("response", lambda r: problems.append(f"{r.status}: {r.url} {r.request.post_data}") if not r.ok else 0)
        page.goto(address)
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert problems == []


def tab(page, name):
    page.get_by_role("tab", name=name).click()
    return page.get_by_role("tabpanel")  # those of other tabs are hidden


def send(panel, file):
    """Uploads an image in a tab; returns when it is shown."""
    panel.locator("input[type=file]").first.set_input_files(file)
    panel.get_by_role("button", name="Remove Image").wait_for()


def ask(panel, question):
    panel.get_by_role("textbox", name="Question").fill(question)
    panel.get_by_role("textbox", name="Question").press("Enter")


def ask_and_wait(page, panel, question):
    """Asks; returns once the whole answer is shown."""
    joined = itertools.count(1)  # by the question, then by what is shown at the end of its answer
    with page.expect_response(lambda response: "queue/join" in response.url and next(joined) == 2):
        ask(panel, question)


def said(panel, text):
    """What the chat shows under exactly this text."""
    return panel.get_by_role("log").get_by_text(text, exact=True)


def shown_image(page, panel, label):
    """Pixels of a picture once it is there."""
    image = panel.get_by_alt_text(label)
    content = page.request.get(image.get_attribute("src")).body()
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


class TestBrowser:
    def test_classify_an_example(self, visit):
        page = visit()
        panel = tab(page, "Classify")
        panel.get_by_role("button").filter(has=page.locator("img")).nth(3).click()
        panel.get_by_role("heading", name="Bag").wait_for()
        overlay = shown_image(page, panel, "Where the evidence lies")
        assert (np.ptp(overlay, axis=2) > 60).sum() > 100  # colour, which the grey image has none of
        assert np.ptp(shown_image(page, panel, "What the model sees"), axis=2).max() < 20

    def test_segment_and_detect(self, visit, images):
        page = visit()
        panel = tab(page, "Segment and detect")
        send(panel, images / "scene.jpg")
        panel.locator(".legend-item").first.wait_for()
        assert set(panel.locator(".legend-item").all_inner_texts()) <= set(SCENE_CLASSES[1:])
        panel.get_by_role("radio", name="Detect").check()
        panel.get_by_text("Lowest score of an object").wait_for()
        panel.get_by_role("spinbutton").fill("0")
        panel.get_by_role("spinbutton").press("Enter")
        panel.get_by_role("gridcell", name=re.compile("|".join(SCENE_CLASSES[1:]))).first.wait_for()

    def test_ask(self, visit, images):
        page = visit()
        panel = tab(page, "Ask")
        send(panel, images / "dark.png")
        for question, answer in KNOWN[DARK]:
            ask_and_wait(page, panel, question)
            said(panel, answer).wait_for()
        panel.get_by_role("button", name="Start again").click()
        (question, answer), _ = KNOWN[DARK]
        said(panel, answer).wait_for(state="detached")
        ask_and_wait(page, panel, question)
        said(panel, answer).wait_for()
        ask_and_wait(page, panel, "<img src='/x'> & **bold** $$x^2$$")
        said(panel, "<img src='/x'> & **bold** $$x^2$$").wait_for()  # text, not markup
        panel.get_by_role("button", name="Remove Image").click()
        said(panel, answer).wait_for(state="detached")
        ask(panel, question)
        page.get_by_test_id("toast-body").get_by_text("choose an image first").wait_for()

    @pytest.mark.slow
    def test_stop(self, visit, images):
        page = visit()
        panel = tab(page, "Ask")
        send(panel, images / "dark.png")
        panel.get_by_role("button", name="Options").click()
        for label, value in (("Temperature", "2"), ("Longest answer", "1024")):
            panel.get_by_label(re.compile(f"number input for {label}")).fill(value)
            panel.get_by_label(re.compile(f"number input for {label}")).press("Enter")
        ask(panel, "?")
        answer = panel.get_by_role("log").get_by_test_id("bot")
        answer.wait_for()
        panel.get_by_role("button", name="Stop").click()
        page.wait_for_timeout(SECONDS)
        taken = answer.inner_text()
        page.wait_for_timeout(SECONDS)
        assert taken == answer.inner_text()
        panel.get_by_role("button", name="Start again").click()
        said(panel, "?").wait_for(state="detached")

    @pytest.fixture
    def go_on(self, monkeypatch):
        """Answers say that half of them is there, and go on when this is set."""
        event = threading.Event()
        pieces = Assistant._pieces

        def halting(self, *arguments):
            yield "half an answer"
            assert event.wait(PATIENCE / SECONDS)
            yield from pieces(self, *arguments)

        monkeypatch.setattr(Assistant, "_pieces", halting)
        return event

    @pytest.mark.parametrize("way", ["Start again", "Remove Image"])
    def test_an_answer_that_is_left_does_not_come_back(self, visit, images, go_on, way):
        page = visit()
        panel = tab(page, "Ask")
        send(panel, images / "dark.png")
        ask(panel, "?")
        said(panel, "half an answer").wait_for()
        panel.get_by_role("button", name=way).click()
        said(panel, "half an answer").wait_for(state="detached")
        with page.expect_response(re.compile("queue/join")):  # made once the answer has ended
            go_on.set()
        page.wait_for_timeout(SECONDS)
        assert panel.get_by_role("log").get_by_test_id("bot").count() == 0

    @pytest.fixture
    def late(self, monkeypatch):
        """What is shown at the end of an answer arrives a second later, after that of a short next one."""
        send = gradio.queueing.Queue.send_message

        def send_late(queue, event, message):
            if event.fn.name == "show" and isinstance(message, gradio.server_messages.ProcessCompletedMessage):
                asyncio.get_running_loop().call_later(1, send, queue, event, message)
            else:
                send(queue, event, message)

        monkeypatch.setattr(gradio.queueing.Queue, "send_message", send_late)

    @pytest.mark.usefixtures("late")
    def test_a_question_written_during_an_answer_is_asked_after_it(self, visit, images, go_on):
        page = visit()
        panel = tab(page, "Ask")
        send(panel, images / "dark.png")
        first, second = (question for question, _ in KNOWN[DARK])
        ask(panel, first)
        said(panel, "half an answer").wait_for()
        ask(panel, second)
        go_on.set()
        said(panel, second).wait_for()
        answers = panel.get_by_role("log").get_by_test_id("bot")
        for waits in (0, 3 * SECONDS):  # then all that was late has come
            page.wait_for_timeout(waits)
            for nth, (_, answer) in enumerate(KNOWN[DARK]):
                answers.nth(nth).filter(has_text=answer).wait_for()

    @pytest.mark.slow
    def test_conversations_of_two_visitors(self, visit, images):
        visitors = []
        for color in ("dark", "bright"):
            page = visit()
            panel = tab(page, "Ask")
            send(panel, images / f"{color}.png")
            visitors.append((page, panel))
        for turn in range(2):
            for (page, panel), color in zip(visitors, (DARK, BRIGHT), strict=True):
                question, answer = KNOWN[color][turn]
                ask_and_wait(page, panel, question)
                said(panel, answer).wait_for()

    def test_bad_files_are_told(self, visit, images):
        page = visit()
        panel = tab(page, "Classify")
        for name, problem in (("cut.jpg", "cut.jpg is damaged"), ("notes.png", "notes.png is not a readable image")):
            send(panel, images / name)
            page.get_by_test_id("toast-body").get_by_text(problem).wait_for()
            panel.get_by_role("button", name="Remove Image").click()

    def test_on_a_phone_nothing_is_beyond_the_edge(self, visit):
        page = visit(390, 844)
        for name in ("Classify", "Segment and detect", "Ask"):
            tab(page, name)
            assert page.evaluate("document.scrollingElement.scrollWidth") <= 390


def test_nothing_went_to_other_machines(address, connections):
    """The last test that uses the page."""
    with urllib.request.urlopen(address, timeout=60) as reply:
        assert '"analytics_enabled":false' in reply.read().decode().replace(" ", "")
    assert connections.own > 0 and connections.elsewhere == []


class TestTool:
    def test_arguments_of_the_other_use(self, capsys):
        for arguments, problem in (
            (["--classifier", PACKAGED], "--classifier goes with --serve"),
            (["--serve", "--short"], "--short goes without --serve"),
        ):
            with pytest.raises(SystemExit):
                demo.main(arguments)
            assert problem in capsys.readouterr().err

    def test_mistakes_without_a_traceback(self, capsys):
        assert demo.main(["--serve", "--segmenter", PACKAGED]) == 1
        assert "give it as --classifier" in capsys.readouterr().err
        assert demo.main(["--serve", "--vlm", "runs/nowhere"]) == 1
        assert "no run and no weight file at runs/nowhere" in capsys.readouterr().err

    @pytest.mark.slow
    def test_it_serves_until_it_is_interrupted(self):
        port = free_port()
        command = [sys.executable, "-u", "-m", "zoo.tools.demo", "--serve", "--port", str(port), "--device", "cpu"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ})
        try:
            assert any(f"http://127.0.0.1:{port}/" in line for line in process.stdout)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as reply:
                assert "vision-ssm-zoo" in reply.read().decode()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
        finally:
            process.kill()
            process.wait()
