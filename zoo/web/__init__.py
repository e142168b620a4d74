"""A local web page to try models on: classification with evidence, segmentation and detection, questions.

Needs gradio (``pip install 'vision-ssm-zoo[web]'``); ``python -m zoo.tools.demo --serve`` starts it.
"""

from zoo.web.examples import draw_clothes
from zoo.web.page import create_page, serve
from zoo.web.panels import Trained, load_for

__all__ = ["Trained", "create_page", "draw_clothes", "load_for", "serve"]
