"""Training configuration: typed dataclasses filled from a YAML file and ``key=value`` overrides.

The dataclasses are the complete list of settings, their units and their defaults. A YAML file under ``configs/`` holds
only what differs. An unknown key is an error that names the nearest valid one.
"""

from zoo.config.classification import AugmentConfig, ClassificationConfig, DataConfig, DistillConfig
from zoo.config.clip import ClipAugmentConfig, ClipConfig, ClipDataConfig, ClipModelConfig, ZeroShotConfig
from zoo.config.dense import DenseDataConfig, DenseModelConfig
from zoo.config.detection import (
    DetectionAugmentConfig,
    DetectionConfig,
    DetectionDataConfig,
    DetectionModelConfig,
)
from zoo.config.files import find_config, list_configs, load_config, save_config
from zoo.config.segmentation import (
    SegmentationAugmentConfig,
    SegmentationConfig,
    SegmentationDataConfig,
    SegmentationInferenceConfig,
    SegmentationModelConfig,
)
from zoo.config.settings import ModelConfig, OptimConfig, TrainConfig
from zoo.config.vlm import (
    LoraConfig,
    VlmAugmentConfig,
    VlmConfig,
    VlmDataConfig,
    VlmEvaluationConfig,
    VlmModelConfig,
    VlmOptimConfig,
)

__all__ = [
    "AugmentConfig",
    "ClassificationConfig",
    "ClipAugmentConfig",
    "ClipConfig",
    "ClipDataConfig",
    "ClipModelConfig",
    "DataConfig",
    "DenseDataConfig",
    "DenseModelConfig",
    "DetectionAugmentConfig",
    "DetectionConfig",
    "DetectionDataConfig",
    "DetectionModelConfig",
    "DistillConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimConfig",
    "SegmentationAugmentConfig",
    "SegmentationConfig",
    "SegmentationDataConfig",
    "SegmentationInferenceConfig",
    "SegmentationModelConfig",
    "TrainConfig",
    "VlmAugmentConfig",
    "VlmConfig",
    "VlmDataConfig",
    "VlmEvaluationConfig",
    "VlmModelConfig",
    "VlmOptimConfig",
    "ZeroShotConfig",
    "find_config",
    "list_configs",
    "load_config",
    "save_config",
]
