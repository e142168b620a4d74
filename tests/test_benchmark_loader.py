"""The benchmark of loaders on a few images: all formats hold the same ones, and every row has its numbers."""

import json

import pytest

from zoo.config import DataConfig
from zoo.data import open_split
from zoo.tools.benchmark import main
from zoo.tools.benchmarks.loader import write_images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))


def test_formats_hold_the_same_images(tmp_path):
    write_images(tmp_path, 16)
    found = []
    for name in ("folder", "tar", "shards"):
        dataset, _ = open_split(DataConfig(name=name, root=str(tmp_path)), name)
        assert len(dataset) == 16
        found.append(sorted((dataset[index][0].convert("RGB").tobytes(), dataset[index][1]) for index in range(16)))
    assert found[0] == found[1] == found[2]


def test_every_row_has_its_numbers(tmp_path, capsys):
    path = tmp_path / "loader.json"
    options = ["--images", "16", "--batch-size", "4", "--workers", "0", "--img-size", "32", "--seconds", "0.01"]
    assert main(["loader", "--device", "cpu", *options, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["records"]
    assert [(row["format"], row["mode"]) for row in rows] == [
        (name, mode) for name in ("folder", "tar", "shards") for mode in ("train", "eval")
    ]
    assert all(row["images_per_second"] == row["per_process"] > 0 < row["megabytes_per_second"] for row in rows)
    assert "shards, eval, 0 workers" in capsys.readouterr().out
