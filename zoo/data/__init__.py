"""Images for classification: data sets in memory, image files, augmentation, loaders."""

from zoo.data.augment import BatchAugment, BatchShare, Normalize
from zoo.data.fashion_mnist import load_fashion_mnist
from zoo.data.files import FileLoader, open_files, report_bad_files, why_unreadable
from zoo.data.loaders import Preprocessing, image_transform, make_loader, open_split, resolve_preprocessing
from zoo.data.memory import TensorData, TensorLoader, load_digits

__all__ = [
    "BatchAugment",
    "BatchShare",
    "FileLoader",
    "Normalize",
    "Preprocessing",
    "TensorData",
    "TensorLoader",
    "image_transform",
    "load_digits",
    "load_fashion_mnist",
    "make_loader",
    "open_files",
    "open_split",
    "report_bad_files",
    "resolve_preprocessing",
    "why_unreadable",
]
