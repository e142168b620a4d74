"""Training, evaluation and prediction of models."""

from zoo.engine.checkpoint import ModelCard, find_checkpoint, load_trained, save_weights
from zoo.engine.evaluate import Evaluation, evaluate
from zoo.engine.loop import TrainResult, train
from zoo.engine.predict import (
    Prediction,
    find_images,
    load_any,
    predict_files,
    predict_into,
    settings_beside,
    write_predictions,
)
from zoo.engine.run_folder import read_log
from zoo.engine.validate import result_row, scores_row, validate, write_results

__all__ = [
    "Evaluation",
    "ModelCard",
    "Prediction",
    "TrainResult",
    "evaluate",
    "find_checkpoint",
    "find_images",
    "load_any",
    "load_trained",
    "predict_files",
    "predict_into",
    "read_log",
    "result_row",
    "save_weights",
    "scores_row",
    "settings_beside",
    "train",
    "validate",
    "write_predictions",
    "write_results",
]
