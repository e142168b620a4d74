"""Training configuration: typed dataclasses filled from a YAML file and ``key=value`` overrides.

The dataclasses are the complete list of settings, their units and their defaults. A YAML file under ``configs/`` holds
only what differs. An unknown key is an error that names the nearest valid one.
"""

from zoo.config.classification import AugmentConfig, ClassificationConfig, DataConfig
from zoo.config.files import find_config, list_configs, load_config, save_config
from zoo.config.settings import ModelConfig, OptimConfig, TrainConfig

__all__ = [
    "AugmentConfig",
    "ClassificationConfig",
    "DataConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "find_config",
    "list_configs",
    "load_config",
    "save_config",
]
