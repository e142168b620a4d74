"""python -m zoo.tools.vqa with a small model of ours that was saved: from files of a benchmark to a row of results."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.config import VlmConfig, VlmDataConfig, VlmModelConfig
from zoo.data.conversations import open_conversations
from zoo.data.vqa.benchmark import SHORT_ANSWER
from zoo.engine import save_weights
from zoo.engine.vlm_build import build_vlm
from zoo.tools.vqa import main

pytest.importorskip("transformers", reason="needs transformers")

QUESTIONS = {"201": "What color is the wall?", "202": "Is the wall red?", "203": "What color is the sea?"}
ANSWERS = {"201": "red", "202": "yes", "203": "blue"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model with random weights that knows the words of the questions."""
    root = tmp_path_factory.mktemp("llava")
    (root / "images").mkdir()
    Image.new("RGB", (8, 8)).save(root / "images" / "a.png")
    turns = [(f"{question}\n{SHORT_ANSWER}", ANSWERS[key]) for key, question in QUESTIONS.items()]
    conversations = [
        {
            **{"id": str(number), "image": "a.png"},
            "conversations": [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": answer}],
        }
        for number, (text, answer) in enumerate(turns)
    ]
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(conversations))
    language = dict(model_type="mamba2", hidden_size=32, num_hidden_layers=1, num_heads=4, head_dim=16, state_size=8)
    config = VlmConfig(
        model=VlmModelConfig(name="vim_micro", language_kwargs={**language, "n_groups": 1}),
        data=VlmDataConfig(name="llava", root=str(root), img_size=8),
    )
    torch.manual_seed(0)
    model, card = build_vlm(config, open_conversations(config.data, 0)[0])
    path = root / "best.safetensors"
    save_weights(path, model.state_dict(), card)
    return path


@pytest.fixture
def gqa(tmp_path):
    questions = {
        key: {
            **{"question": text, "imageId": f"n{key}", "answer": ANSWERS[key], "isBalanced": True},
            "types": {"structural": "query" if key != "202" else "verify", "semantic": "attr", "detailed": "x"},
        }
        for key, text in QUESTIONS.items()
    }
    root = tmp_path / "gqa"
    (root / "images").mkdir(parents=True)
    (root / "testdev_balanced_questions.json").write_text(json.dumps(questions))
    for key in QUESTIONS:
        pixels = np.random.default_rng(int(key)).integers(0, 255, (12, 9, 3), np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"n{key}.jpg")
    return root


def run(weights, gqa, *options: str) -> int:
    return main(
        ["gqa", "--root", str(gqa), "--weights", str(weights), "--device", "cpu", "--max-tokens", "4", *options]
    )


def results(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_from_files_to_results(weights, gqa, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(weights, gqa, "--limit", "1") == 0
    assert run(weights, gqa, "--batch-size", "2") == 0
    folder = tmp_path / "runs" / "vqa" / "best" / "gqa-testdev_balanced"
    lines = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(QUESTIONS)
    assert lines[0]["question"] == f"What color is the wall?\n{SHORT_ANSWER}"
    submitted = json.loads((folder / "answers.json").read_text())
    assert [row["prediction"] for row in submitted] == [line["answer"].rstrip(".") for line in lines]
    right = sum(row["prediction"] == ANSWERS[row["questionId"]] for row in submitted)
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["overall"] == {"questions": 3, "accuracy": pytest.approx(100 * right / 3)}
    rows = results(tmp_path / "runs" / "vqa" / "best" / "results.csv")
    assert [(row["questions"], row["image"], row["split"]) for row in rows] == [
        ("1", "real", "testdev_balanced"),
        ("3", "real", "testdev_balanced"),
    ]
    printed = capsys.readouterr().out
    assert "questions" in printed and "structure: verify" in printed


def test_blank_images_have_answers_of_their_own(weights, gqa, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(weights, gqa) == 0
    assert run(weights, gqa, "--blank") == 0
    assert (tmp_path / "runs" / "vqa" / "best" / "gqa-testdev_balanced-blank" / "answers.jsonl").exists()
    assert [row["image"] for row in results(tmp_path / "runs" / "vqa" / "best" / "results.csv")] == ["real", "blank"]


def test_what_goes_wrong_is_told(weights, gqa, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert run(weights, gqa, *output) == 0
    assert run(weights, gqa, *output, "--max-tokens", "5") == 1
    assert "holds other answers (max_tokens was 4, is 5)" in capsys.readouterr().err
    assert run(weights, gqa, *output, "--split", "val") == 1
    assert "gqa has the splits testdev_balanced" in capsys.readouterr().err
    assert run(tmp_path / "nothing.safetensors", gqa) == 1
    assert "nothing.safetensors" in capsys.readouterr().err
    (gqa / "images" / "n203.jpg").unlink()
    assert run(weights, gqa, *output) == 1
    assert "1 of 3 files" in capsys.readouterr().err
    assert run(weights, gqa, "--output", str(tmp_path / "skipped"), "--bad-files", "skip") == 0
    assert json.loads((tmp_path / "skipped" / "scores.json").read_text())["overall"]["questions"] == 2


def test_weights_that_were_trained_further_have_other_answers(weights, gqa, tmp_path, capsys):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(weights.read_bytes())
    output = ["--output", str(tmp_path / "out")]
    assert run(copy, gqa, *output) == 0
    copy.write_bytes(weights.read_bytes())
    assert run(copy, gqa, *output) == 1
    assert "weights_written was" in capsys.readouterr().err


def test_splits_for_the_server_have_no_scores(weights, gqa, tmp_path, capsys):
    content = json.loads((gqa / "testdev_balanced_questions.json").read_text())
    bare = {key: {name: q[name] for name in ("question", "imageId", "isBalanced")} for key, q in content.items()}
    (gqa / "test_balanced_questions.json").write_text(json.dumps(bare))
    assert run(weights, gqa, "--split", "test_balanced", "--output", str(tmp_path / "out")) == 0
    assert "no scores: the answers of gqa test_balanced are not published" in capsys.readouterr().out
    assert (tmp_path / "out" / "answers.json").exists() and not (tmp_path / "out" / "scores.json").exists()
