"""The page: three tabs on models that are loaded once. Everything stays on this machine."""

import html
import importlib.util
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo.assistant import Assistant
from zoo.data.fashion_mnist import CLASS_NAMES
from zoo.engine.attribution import CAMS, METHODS
from zoo.engine.dense_report import palette_of
from zoo.optional import require
from zoo.web import panels
from zoo.web.panels import Trained

__all__ = ["create_page", "serve"]

_logger = logging.getLogger(__name__)

TITLE = "vision-ssm-zoo"
PREDICTED = "most probable class"
LARGEST_FILE = "20mb"
LONGEST_QUESTION = 2000  # characters
LONGEST_ANSWER = 1024  # tokens
KEPT_FOR = 3600  # seconds that uploads and conversations are kept
MOST_CONVERSATIONS, LONGEST_QUEUE = 100, 32
EXPECTED = (OSError, ValueError, RuntimeError, ModuleNotFoundError)

FASHION_NOTE = "This model knows ten kinds of clothing: one light item in the middle of a black image."
TRAIN_DENSE = """There is no segmenter and no detector yet. Each takes minutes to train on one GPU:

```
python -m zoo.tools.train segmentation/nano_fashion_scenes
python -m zoo.tools.train detection/nano_fashion_scenes
python -m zoo.tools.demo --serve --segmenter runs/segmentation_nano_fashion_scenes \\
    --detector runs/detection_nano_fashion_scenes
```

Recipes for other data are listed by `python -m zoo.tools.train --help`; any run of theirs can be given here.
"""
TRAIN_VLM = """There is no vision-language model yet. This one takes minutes to train on one GPU:

```
python -m zoo.tools.train vlm/nano_fashion_scenes
python -m zoo.tools.demo --serve --vlm runs/vlm_nano_fashion_scenes
```

A published one is given by its name and its weight file:

```
python -m zoo.tools.demo --serve --vlm cobra_3b --checkpoint latest-checkpoint.pt
```
"""
STYLE = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto !important; }
.captioned { padding-top: 2rem; }
.captioned img { image-rendering: pixelated; }
"""


@dataclass
class _Talk:
    """A visitor's conversation about one image.

    Attributes:
        file: The image.
        assistant: It has looked at the image.
        messages: Questions and answers, as the chat shows them.
        stopped: Whether the answer that is being given shall end.
    """

    file: Path
    assistant: Assistant
    messages: list[dict[str, str]] = field(default_factory=list)
    stopped: bool = False

    def restart(self) -> None:
        """Begins anew about the same image."""
        self.stopped = True
        self.assistant.reset()
        self.messages = []


def create_page(
    classifier: Trained | None = None,
    segmenter: Trained | None = None,
    detector: Trained | None = None,
    assistant: Assistant | None = None,
    examples: Sequence[Path] = (),
) -> Any:
    """Lays out the page; tabs without a model tell how to get one.

    Args:
        classifier: For the first tab.
        segmenter: For the second tab.
        detector: Likewise.
        assistant: For the third tab.
        examples: Images that the first tab offers.

    Returns:
        The page, a ``gradio.Blocks``.

    Raises:
        ModuleNotFoundError: If gradio is not installed; the message says how to install it.
    """
    gr = require("gradio", "web")
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(KEPT_FOR, KEPT_FOR)) as page:
        gr.Markdown(f"# {TITLE}\nImages are read by the models on this machine, and go nowhere else.")
        with gr.Tab("Classify"):
            _classify_tab(gr, classifier, examples)
        with gr.Tab("Segment and detect"):
            _dense_tab(gr, segmenter, detector)
        with gr.Tab("Ask"):
            _ask_tab(gr, assistant)
    return page


def serve(page: Any, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Starts to serve a page in a thread of its own; ``page.close()`` ends it.

    Args:
        page: What :func:`create_page` made.
        host: Address to listen on; default this machine alone. Nobody is asked for a password.
        port: Default the first free one from 7860 on.

    Returns:
        The page's address.

    Raises:
        OSError: If the port is taken.
    """
    gr = require("gradio", "web")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=[gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "system-ui", "sans-serif"],
        font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "monospace"],
    )
    closed = dict(share=False, enable_monitoring=False, mcp_server=False, ssr_mode=False, pwa=False, show_error=False)
    limits = dict(max_file_size=LARGEST_FILE, state_session_capacity=MOST_CONVERSATIONS)
    look = dict(theme=theme, css=STYLE, footer_links=[], inline=False, quiet=True)
    page.queue(max_size=LONGEST_QUEUE)
    try:
        launched = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, **closed, **limits, **look)
    except OSError as error:
        raise OSError(f"cannot listen on port {port or 7860} of {host}; choose another one (--port)") from error
    return launched[1]


def _classify_tab(gr: Any, classifier: Trained | None, examples: Sequence[Path]) -> None:
    if classifier is None:
        gr.Markdown("There is no classifier. Give one as `python -m zoo.tools.demo --serve --classifier runs/my_run`.")
        return
    card = classifier.card
    note = FASHION_NOTE if card.class_names == CLASS_NAMES else ""
    gr.Markdown(f"**{card.model}**, {len(card.class_names)} classes. {note}")
    with gr.Row():
        with gr.Column():
            image = _upload(gr)
            if examples:
                gr.Examples([[str(file)] for file in examples], image, label="Examples", api_visibility="private")
            with gr.Row():
                method = gr.Dropdown(_methods(), value=METHODS[0], label="How evidence is measured")
                target = gr.Dropdown([PREDICTED, *card.shown_names], value=PREDICTED, label="Evidence for")
        with gr.Column():
            label = gr.Label(label="Classes")
            with gr.Row():
                seen = _picture(gr, "What the model sees")
                evidence = _picture(gr, "Where the evidence lies")

    def classify(upload: dict[str, Any] | None, method: str, target: str) -> tuple[Any, ...]:
        if upload is None:
            return None, None, None
        picture = panels.open_upload(_uploaded(gr, upload))
        found = panels.classify(classifier, picture, None if target == PREDICTED else target, method)
        return found.probabilities, found.seen, found.evidence

    _on_change(gr, classify, [image, method, target], [label, seen, evidence])


def _dense_tab(gr: Any, segmenter: Trained | None, detector: Trained | None) -> None:
    models = {"Segment": segmenter, "Detect": detector}
    tasks = [task for task, model in models.items() if model is not None]
    if not tasks:
        gr.Markdown(TRAIN_DENSE)
        return
    gr.Markdown("; ".join(f"{task}: **{models[task].card.model}**" for task in tasks))
    with gr.Row():
        with gr.Column():
            image = _upload(gr)
            task = gr.Radio(tasks, value=tasks[0], label="Task", visible=len(tasks) > 1)
            threshold = gr.Slider(0, 1, 0.5, step=0.05, label="Lowest score of an object", visible=tasks[0] == "Detect")
        with gr.Column():
            drawn = gr.AnnotatedImage(label="Result", height=480, color_map=_colours(segmenter), buttons=["fullscreen"])
            table = gr.Dataframe(headers=["object", "score"], label="Objects", visible=tasks[0] == "Detect")

    def run(upload: dict[str, Any] | None, task: str, threshold: float) -> tuple[Any, Any]:
        searching = task == "Detect"
        if upload is None:
            return None, gr.update(value=[], visible=searching)
        picture = panels.open_upload(_uploaded(gr, upload))
        if not searching:
            return panels.segment(segmenter, picture), gr.update(value=[], visible=False)
        result, objects = panels.find_objects(detector, picture, threshold)
        rows = [[name, round(score, 3)] for name, score in objects]
        return (result, []), gr.update(value=rows, visible=True)

    task.change(lambda task: gr.update(visible=task == "Detect"), task, threshold, **_PRIVATE)
    _on_change(gr, run, [image, task, threshold], [drawn, table])


def _ask_tab(gr: Any, assistant: Assistant | None) -> None:
    if assistant is None:
        gr.Markdown(TRAIN_VLM)
        return
    talk = gr.State(None, time_to_live=KEPT_FOR)
    with gr.Row():
        with gr.Column():
            image = _upload(gr)
            with gr.Accordion("Options", open=False):
                temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: always the likeliest words)")
                longest = gr.Slider(1, LONGEST_ANSWER, 128, step=1, label="Longest answer, in tokens")
        with gr.Column():
            chat = gr.Chatbot(label="Conversation", height=400, buttons=[], feedback_options=None, **_AS_TEXT)
            box = dict(label="Question", show_label=False, placeholder="Ask about the image")
            question = gr.Textbox(**box, submit_btn=True, max_length=LONGEST_QUESTION)
            with gr.Row():
                stop, anew = (gr.Button(name, size="sm", min_width=100) for name in ("Stop", "Start again"))

    def ask(
        text: str, upload: dict[str, Any] | None, talk: _Talk | None, temperature: float, longest: int
    ) -> Iterator[tuple[Any, Any, Any]]:
        text, unchanged = (text or "").strip()[:LONGEST_QUESTION], gr.skip()
        if upload is None:
            raise ValueError("choose an image first")
        if not text:
            yield unchanged, unchanged, unchanged
            return
        file = _uploaded(gr, upload)
        if talk is None or talk.file != file:
            talk = _Talk(file, assistant.another())
            talk.assistant.look(panels.open_upload(file))
        pieces = talk.assistant.ask(text, min(int(longest), LONGEST_ANSWER), temperature=temperature)
        answer = {"role": "assistant", "content": ""}
        talk.stopped, messages = False, talk.messages
        messages += [{"role": "user", "content": _literally(text)}, answer]
        yield messages, "", talk
        for piece in pieces:
            answer["content"] += _literally(piece)
            if talk.stopped:
                return
            yield messages, unchanged, unchanged  # meanwhile the next question may be written

    def stop_answer(talk: _Talk | None) -> None:
        if talk is not None:
            talk.stopped = True

    def show(talk: _Talk | None) -> list[Any]:
        return talk.messages if talk else []

    def start_again(talk: _Talk | None) -> list[Any]:
        if talk is not None:
            talk.restart()
        return []

    def look_elsewhere(upload: dict[str, Any] | None, talk: _Talk | None) -> list[Any]:
        if talk is None or (upload is not None and _uploaded(gr, upload) == talk.file):
            return show(talk)
        return start_again(talk)

    asking, shown = [question, image, talk, temperature, longest], [chat, question, talk]
    asked = question.submit(_telling(gr, ask), asking, shown, trigger_mode="always_last", **_PRIVATE)
    stop.click(stop_answer, talk, None, **_PRIVATE)
    # The end of an answer arrives with all of its conversation, which may have been left meanwhile. So the chat is
    # shown as it is once more; one change at a time, because gradio promises no order of those side by side.
    in_turn = dict(concurrency_id="conversation", concurrency_limit=1, **_PRIVATE)
    asked.then(show, talk, chat, trigger_mode="always_last", **in_turn)  # or the next answer's end would be left out
    gr.on([anew.click, chat.clear], start_again, talk, chat, **in_turn)
    image.change(look_elsewhere, [image, talk], chat, **in_turn)


# Components' values come as they were sent: opening an image, and saying what is wrong with it, is done here.
_PRIVATE = dict(api_visibility="private", preprocess=False, show_progress="minimal")
_AS_TEXT = dict(render_markdown=False, latex_delimiters=[])


def _literally(text: str) -> str:
    """Text whose markup the chat shows instead of obeying it: a model may write anything."""
    return html.escape(text, quote=False)


def _upload(gr: Any) -> Any:
    return gr.Image(type="filepath", sources=["upload", "clipboard"], label="Image", height=320)


def _uploaded(gr: Any, upload: dict[str, Any]) -> Path:
    """The file that was uploaded; any other file of this machine is refused, however it is asked for."""
    file = Path(upload["path"]).resolve()
    if not file.is_relative_to(Path(gr.utils.get_upload_folder()).resolve()):
        raise ValueError("the image has to be uploaded")
    return file


def _picture(gr: Any, label: str) -> Any:
    """A result, with its label above."""
    options = dict(height=280, interactive=False, buttons=["fullscreen"], elem_classes="captioned")
    return gr.Image(label=label, alt_text=label, **options)


def _on_change(gr: Any, work: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    """Does the work whenever one of the inputs changes; when they change again meanwhile, once more."""
    triggers = [component.change for component in inputs]
    gr.on(triggers, _telling(gr, work), list(inputs), list(outputs), trigger_mode="always_last", **_PRIVATE)


def _telling(gr: Any, work: Callable[..., Any]) -> Callable[..., Any]:
    """The same work, with what goes wrong in a box on the page."""

    def tell(error: Exception) -> Exception:
        _logger.warning("%s", error)
        return gr.Error(html.escape(str(error)), print_exception=False)

    def once(*values: Any) -> Any:
        try:
            return work(*values)
        except EXPECTED as error:
            raise tell(error) from error

    def streaming(*values: Any) -> Iterator[Any]:
        try:
            yield from work(*values)
        except EXPECTED as error:
            raise tell(error) from error

    return streaming if inspect.isgeneratorfunction(work) else once


def _methods() -> list[tuple[str, str]]:
    """Names and values of the ways to measure evidence that work here."""
    usable = [method for method in METHODS if method not in CAMS or importlib.util.find_spec("pytorch_grad_cam")]
    return [(method.replace("_", " "), method) for method in usable]


def _colours(segmenter: Trained | None) -> dict[str, str]:
    if segmenter is None:
        return {}
    card = segmenter.card
    palette = palette_of(card.class_names)
    return {name: "#{:02x}{:02x}{:02x}".format(*palette[label]) for label, name in enumerate(card.shown_names)}
