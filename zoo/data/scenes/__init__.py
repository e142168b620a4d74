"""Fashion scenes: composed images with exact boxes, masks, captions and questions; their export to known formats."""

from zoo.data.scenes.compose import GENERATOR_VERSION, FashionScenes, Scene
from zoo.data.scenes.draw import drawn
from zoo.data.scenes.export import write_ade, write_coco, write_llava
from zoo.data.scenes.language import ITEM_NAMES, Question, noun_of, split_words, vocabulary
from zoo.data.scenes.preview import plot_scenes

__all__ = [
    "GENERATOR_VERSION",
    "ITEM_NAMES",
    "FashionScenes",
    "Question",
    "Scene",
    "drawn",
    "noun_of",
    "plot_scenes",
    "split_words",
    "vocabulary",
    "write_ade",
    "write_coco",
    "write_llava",
]
