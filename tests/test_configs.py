"""Every packaged training recipe: it loads, and its model can be built."""

import pytest
import torch

import zoo
from zoo.config import list_configs, load_config

CLASSIFICATION = [name for name in list_configs() if name.startswith("classification/")]


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_recipe_loads_and_its_model_builds(name):
    config = load_config(name)
    in_chans = 1 if config.data.name in ("digits", "fashion_mnist") else 3
    with torch.device("meta"):
        model = zoo.create_model(
            config.model.name,
            num_classes=10,
            in_chans=in_chans,
            drop_path_rate=config.model.drop_path,
            **config.model.kwargs,
        )
        size = config.data.img_size or model.pretrained_cfg["input_size"][-1]
        assert model(torch.empty(2, in_chans, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_recipe_warms_up_and_clips(name):
    """Scans diverge without: every recipe keeps clipping and a warm-up shorter than the run."""
    optim = load_config(name).optim
    assert optim.clip_grad
    assert 0 < optim.warmup_epochs < optim.epochs / 2
