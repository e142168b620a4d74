"""Vision-language models on the command line: chat at a terminal, from a pipe, one question; answers about folders."""

import csv
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.tools import chat, predict

pytest.importorskip("transformers", reason="needs transformers")

small = runpy.run_path(str(Path(__file__).with_name("small_vlm.py")))
DARK, BRIGHT, KNOWN, picture = (small[name] for name in ("DARK", "BRIGHT", "KNOWN", "picture"))
(FIRST, FIRST_ANSWER), (SECOND, SECOND_ANSWER) = KNOWN[DARK]
BRIGHT_ANSWER = KNOWN[BRIGHT][0][1]
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small["save_run"](tmp_path_factory.mktemp("vlm"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A dark image, a bright one, and a broken one."""
    folder = tmp_path_factory.mktemp("photos")
    picture(DARK).save(folder / "dark.png")
    picture(BRIGHT, (40, 30)).save(folder / "its $5 bright.png")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    return folder


def typed(monkeypatch, *lines):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_one_question(run, photos, capsys):
    assert chat.main([str(run), "--image", str(photos / "dark.png"), FIRST, *CPU]) == 0
    assert capsys.readouterr().out == FIRST_ANSWER + "\n"
    assert chat.main([str(run), FIRST, "--image", str(photos / "dark.png"), "--max-tokens", "2", *CPU]) == 0
    assert capsys.readouterr().out == FIRST_ANSWER[:2] + "\n"


def test_drawing_follows_the_seed(run, photos, capsys):
    options = [str(run), "?", "--image", str(photos / "dark.png"), "--temperature", "3", "--top-p", "0.99", *CPU]
    drawn = []
    for seed in ("1", "1", "2"):
        assert chat.main([*options, "--max-tokens", "12", "--seed", seed]) == 0
        drawn.append(capsys.readouterr().out)
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_images(run, photos, capsys):
    images = ["--image", str(photos / "dark.png"), "--image", str(photos / "its $5 bright.png")]
    assert chat.main([str(run), *images, FIRST, "--max-tokens", "5", *CPU]) == 0
    assert capsys.readouterr().out.strip()


def test_conversation_with_commands(run, photos, capsys, monkeypatch):
    bright = str(photos / "its $5 bright.png")
    typed(monkeypatch, FIRST, "", SECOND, "/reset", FIRST, f"/image '{bright}'", FIRST, "/quit", "never asked")
    assert chat.main([str(run), "--image", str(photos / "dark.png"), *CPU]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [FIRST_ANSWER, SECOND_ANSWER, FIRST_ANSWER, BRIGHT_ANSWER]
    assert printed.err == ""


def test_lines_that_are_not_understood_do_not_end_a_conversation(run, photos, capsys, monkeypatch):
    lines = ["/images x.png", "/image", "/image nowhere.png", f"/image {photos / 'broken.png'}", "/image 'x", FIRST]
    typed(monkeypatch, *lines)
    assert chat.main([str(run), "--image", str(photos / "dark.png"), *CPU]) == 1
    printed = capsys.readouterr()
    assert printed.out == FIRST_ANSWER + "\n"
    problems = printed.err.splitlines()
    for problem, part in zip(
        problems,
        (
            "no command /images; there are /image, /reset, /quit",
            "followed by",
            "nowhere.png",
            "broken.png",
            "quotation",
        ),
        strict=True,
    ):
        assert problem.startswith("error: ") and part in problem


def test_state_of_images(run, photos, tmp_path, capsys):
    state = str(tmp_path / "dark.safetensors")
    assert chat.main([str(run), "--image", str(photos / "dark.png"), "--save-state", state, SECOND, *CPU]) == 0
    assert chat.main([str(run), "--state", state, FIRST, *CPU]) == 0
    assert capsys.readouterr().out.splitlines() == [SECOND_ANSWER, FIRST_ANSWER]
    with pytest.raises(SystemExit):
        chat.main([str(run), "--state", state, "--image", "x.png"])
    assert "--state takes the place of --image" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--image", "nowhere.png", FIRST], "no image file at nowhere.png"),
        (["--save-state", "state.safetensors", FIRST], "look at some first"),
        (["--state", "nowhere.safetensors", FIRST], "nowhere.safetensors"),
        (["--top-p", "0.5", FIRST], "temperature above 0"),
        (["--temperature", "-1", FIRST], "temperature=-1.0"),
    ],
)
def test_mistakes_without_a_traceback(run, options, message, capsys):
    assert chat.main([str(run), *options, *CPU]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_models_that_are_not_there(capsys):
    assert chat.main(["runs/nowhere", FIRST]) == 1
    assert "no run and no weight file at runs/nowhere" in capsys.readouterr().err
    assert chat.main(["cobra_3b", FIRST]) == 1
    assert "--checkpoint FILE" in capsys.readouterr().err


def test_questions_from_a_pipe(run, photos):
    command = [sys.executable, "-m", "zoo.tools.chat", str(run), "--image", str(photos / "dark.png"), *CPU]
    lines = f"{FIRST}\n{SECOND}"  # the last one without an end
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(command, input=lines.encode(), capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == [FIRST_ANSWER, SECOND_ANSWER]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_conversation_at_a_terminal(run, photos):
    """A prompt, line editing, and Control-C, which stops neither the tool nor the conversation."""
    import pty
    import signal
    import time

    main, other = pty.openpty()
    command = [sys.executable, "-m", "zoo.tools.chat", str(run), "--image", str(photos / "dark.png"), *CPU]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
    os.close(other)
    seen = b""

    def until(text):
        nonlocal seen
        deadline = time.monotonic() + 60
        while text.encode() not in seen:
            assert time.monotonic() < deadline, seen.decode()
            seen += os.read(main, 4096)
        _, _, seen = seen.partition(text.encode())

    try:
        until("1 images. Ask, or /image, /reset, /quit.")
        until("> ")
        os.write(main, b"Wax\x7fs?\n")  # corrected
        until(FIRST_ANSWER)
        until("> ")
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        os.write(main, f"{SECOND}\n".encode())
        until(SECOND_ANSWER)
        os.write(main, b"/nonsense\n")
        until("there is no command /nonsense")
        os.write(main, b"\x04")  # end of input
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


class TestPredict:
    def rows(self, folder):
        with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def test_answers_about_a_folder(self, run, photos, tmp_path, capsys, caplog):
        options = ["--question", FIRST, "--question", SECOND, "--output", str(tmp_path / "out"), *CPU]
        assert predict.main([str(run), str(photos), *options]) == 0
        assert "1 of 3 files" in caplog.text and "broken.png" in caplog.text
        rows = self.rows(tmp_path / "out")
        assert [Path(row["file"]).name for row in rows] == ["dark.png"] * 2 + ["its $5 bright.png"] * 2
        assert [(row["question"], row["answer"]) for row in rows] == [*KNOWN[DARK], *KNOWN[BRIGHT]]
        printed = capsys.readouterr().out
        assert "4 answers about 2 images" in printed and str(tmp_path / "out" / "predictions.csv") in printed
        with Image.open(tmp_path / "out" / "predictions.png") as sheet:
            assert min(sheet.size) > 200 and len(np.unique(np.asarray(sheet.convert("L")))) > 20

    def test_broken_images_may_be_errors(self, run, photos, tmp_path, capsys):
        options = ["--question", FIRST, "--bad-files", "error", "--output", str(tmp_path / "out"), *CPU]
        assert predict.main([str(run), str(photos), *options]) == 1
        assert "broken.png" in capsys.readouterr().err
        assert not (tmp_path / "out" / "predictions.csv").exists()

    def test_formulas_in_questions_and_answers(self, run, photos, tmp_path, capsys):
        question = r"Is it $5 or $\frac 6$?"  # which matplotlib would try to set
        limits = ["--max-tokens", "3", "--shown", "1", "--output", str(tmp_path)]
        assert predict.main([str(run), str(photos / "dark.png"), "--question", question, *limits, *CPU]) == 0
        assert self.rows(tmp_path)[0]["question"] == question

    def test_models_and_questions_that_do_not_fit(self, run, photos, tmp_path, capsys):
        options = [str(photos), "--output", str(tmp_path), *CPU]
        assert predict.main([str(run), *options]) == 1
        assert "answers questions; ask one with --question" in capsys.readouterr().err
        assert predict.main(["vim_nano.fashion_mnist", *options, "--question", FIRST]) == 1
        assert "no vision-language model 'vim_nano.fashion_mnist'" in capsys.readouterr().err
