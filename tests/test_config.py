"""Configuration files: defaults, overrides, and errors that say what to change."""

import re

import pytest

from zoo.config import TrainConfig, find_config, list_configs, load_config, save_config


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model:\n  name: vim_nano\n  kwargs:\n    img_size: ${data.img_size}\ndata:\n  img_size: 8\n")
    return str(path)


def test_file_wins_over_defaults_and_command_line_over_file(recipe):
    config = load_config(recipe, ["optim.lr=3e-4", "model.kwargs.depth=2", "data.mean=[0.5]", "data.img_size=16"])
    assert config.model.name == "vim_nano"
    assert config.optim.lr == 3e-4
    assert config.data.mean == [0.5]
    assert config.model.kwargs == {"img_size": 16, "depth": 2}
    assert config.optim.epochs == TrainConfig().optim.epochs


def test_output_is_named_after_the_file(recipe):
    assert load_config(recipe).output == "runs/recipe"
    assert load_config(recipe, ["output=elsewhere"]).output == "elsewhere"


def test_saved_configuration_reads_back_unchanged(recipe, tmp_path):
    config = load_config(recipe, ["optim.betas=[0.9,0.95]", "resume=auto"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(str(tmp_path / "saved.yaml")) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.weight_deacy=0.1", "unknown key 'optim.weight_deacy'; did you mean 'optim.weight_decay'"),
        ("lr=0.1", "did you mean 'optim.lr'"),
        ("optim.lr=fast", "optim.lr"),
        ("optim.epochs=0", "optim.epochs must be at least 1, got 0"),
        ("augment.flip=2", "augment.flip must be between 0 and 1, got 2"),
        ("precision=fp8", "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ("data.bad_files=ignore", "data.bad_files must be one of error, skip"),
        ("seed", "'seed' is not of the form key=value"),
    ],
)
def test_wrong_override_is_explained(recipe, override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(recipe, [override])


def test_unknown_key_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "typo.yaml"
    path.write_text("optim:\n  learning_rates: 1\n  epoch: 3\n")
    with pytest.raises(ValueError, match=r"typo\.yaml: unknown key"):
        load_config(str(path))


def test_broken_yaml_names_the_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("optim: [1, 2\n")
    with pytest.raises(ValueError, match=r"broken\.yaml: not valid YAML"):
        load_config(str(path))


def test_mixing_needs_pairs(recipe):
    with pytest.raises(ValueError, match="batch_size must be even, got 33"):
        load_config(recipe, ["augment.mixup=0.2", "data.batch_size=33"])


def test_packaged_names_may_be_short():
    full = "classification/vim/micro_digits"
    assert full in list_configs()
    assert find_config(full) == find_config("vim/micro_digits.yaml") == find_config("micro_digits")
    with pytest.raises(FileNotFoundError, match=full):
        find_config("micro_digit")


def test_a_short_name_is_the_file_in_the_fewest_folders():
    assert find_config("nano_elpv") == find_config("classification/nano_elpv")
    assert find_config("vim/nano_elpv").parent.name == "vim"
    with pytest.raises(FileNotFoundError, match="fits several configurations, use one of: detection/nano_fashion"):
        find_config("nano_fashion_scenes")
