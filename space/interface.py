"""The page: its layout and its events."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import markup
from api import add_endpoints, client_of, uploaded_file
from folder_table import tag_files
from limits import InputError, Limits
from page_text import API_AND_LIMITS, ATTENTION, INTRODUCTION, SCOPE, known_images
from request_guard import RequestGuard
from starlette.middleware import Middleware
from tagging import DECODINGS, TaggedFile, Tagger
from upload_folder import UploadFolder

# The page's own events are not part of the API.
PRIVATE = {"preprocess": False, "api_visibility": "private"}


class Handlers:
    """The functions that answer the events of the page.

    Args:
        tagger: The model, its processor and the process that reads files.
        limits: The limits of this Space.
    """

    def __init__(self, tagger: Tagger, limits: Limits):
        self.tagger, self.limits = tagger, limits
        self.known_images = known_images(tagger.name)

    def predict_one(self, file: Any, title: Any, decoding: Any, threshold: Any, request: gr.Request) -> tuple:
        """Tag one file.

        Returns:
            The tagged file for [`render`], and the HTML of the preview, the tags and the slots.
        """
        if file is None:
            return None, "", "", ""
        try:
            decoding, threshold = self.tagger.check_settings(decoding, threshold)
            path, name = uploaded_file(file)
            tagged = self.tagger.tag(path, name, title, decoding, client_of(request))
        except InputError as error:
            return None, "", markup.error_message(str(error)), ""
        return tagged, markup.preview(path, name, tagged.kind), *self.render(tagged, threshold)

    def follow_title(self, decoding: str, title: str, threshold: float) -> object:
        """Return the fitted threshold for a file with or without a title, unless the visitor chose another one."""
        return self.tagger.fitted_threshold(decoding, title) if self.is_fitted(decoding, threshold) else gr.skip()

    def is_fitted(self, decoding: str, threshold: float) -> bool:
        """Return whether a threshold is one of those that the slider has by default."""
        return threshold in [self.tagger.fitted_threshold(decoding, title) for title in ("", "a title")]

    def render(self, tagged: TaggedFile | None, threshold: float) -> tuple:
        """Render the tags and the slots of the last file at another threshold."""
        if tagged is None:
            return gr.skip(), gr.skip()
        if self.is_fitted(tagged.decoding, threshold):
            threshold = tagged.default_threshold
        return markup.tag_list(tagged, threshold, self.known_images), markup.slot_cards(tagged, threshold)

    def predict_many(
        self, files: Any, decoding: Any, threshold: Any, titles_from_names: Any, request: gr.Request
    ) -> Iterator[tuple[str, str]]:
        """Tag many files.

        Yields:
            The HTML of the table so far, and of the link to the CSV once all files are tagged.
        """
        try:
            decoding, threshold = self.tagger.check_settings(decoding, threshold)
            threshold = None if self.is_fitted(decoding, threshold) else threshold
            uploads = [uploaded_file(file) for file in files or []]
            rows = []
            options = (decoding, threshold, bool(titles_from_names), self.limits, client_of(request))
            for row in tag_files(self.tagger, uploads, *options):
                rows.append(row)
                yield markup.file_table(rows, max(len(uploads), len(rows))), ""
            yield markup.file_table(rows, len(rows)), markup.csv_link(rows)
        except InputError as error:
            yield markup.error_message(str(error)), ""


def build(tagger: Tagger, limits: Limits, examples: Path) -> gr.Blocks:
    """Build the page and the API.

    Args:
        tagger: The model, its processor and the process that reads files.
        limits: The limits of this Space.
        examples: Folder of images and videos with a `metadata.jsonl` of their titles.
    """
    handlers = Handlers(tagger, limits)
    delete_cache = (60, 60 * limits.keep_minutes)
    with gr.Blocks(title="optsg: tag images and videos", analytics_enabled=False, delete_cache=delete_cache) as page:
        gr.Markdown(INTRODUCTION.format(model=tagger.name), elem_id="introduction")
        if handlers.known_images:
            gr.Markdown(SCOPE.format(known_images=handlers.known_images), elem_id="scope")
        with gr.Tab("Image or video"):
            _add_single_file_tab(handlers, examples)
        with gr.Tab("Many files"):
            _add_many_files_tab(handlers)
        with gr.Tab("API and limits"):
            gr.Markdown(API_AND_LIMITS.format(**limits.as_dict()))
        add_endpoints(tagger, limits)
    # No route bypasses the queue.
    page.queue(max_size=limits.queued_requests, api_open=False)
    return page


def _add_single_file_tab(handlers: Handlers, examples: Path) -> None:
    limits = handlers.limits
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            file = gr.File(label="Image or video", file_count="single", height=150, elem_id="file")
            title = gr.Textbox(
                label="Title", placeholder="What does it show? (optional)", elem_id="title",
                max_length=limits.title_characters,
            )  # fmt: skip
            decoding, threshold = _add_settings(handlers.tagger, title="")
            button = gr.Button("Predict tags", variant="primary", elem_id="predict")
            gr.HTML("<h3>Or try an example</h3>")
            with gr.Row(elem_id="examples"):
                buttons = _add_example_buttons(examples)
        with gr.Column(scale=3, min_width=300):
            preview = gr.HTML(elem_id="preview")
            tags = gr.HTML('<p class="quiet">Upload a file or try an example to see its tags.</p>', elem_id="tags")
            gr.HTML(markup.legend())
    with gr.Accordion("Slots: what each order prompt proposes and where it looks", open=True):
        gr.Markdown(ATTENTION)
        slots = gr.HTML(elem_id="slots")
    result = gr.State(time_to_live=60 * limits.keep_minutes)

    inputs, outputs = [file, title, decoding, threshold], [result, preview, tags, slots]
    predict = {"fn": handlers.predict_one, "inputs": inputs, "outputs": outputs, **_model_event(limits, tags)}
    # With "always_last", a title entered while the image alone is tagged gets its own run.
    predict["trigger_mode"] = "always_last"
    gr.on([file.upload, title.submit, button.click], **predict)
    file.clear(lambda: (None, "", "", ""), None, outputs, queue=False, **PRIVATE)
    threshold.input(
        handlers.render, [result, threshold], [tags, slots], trigger_mode="always_last", queue=False,
        show_progress="hidden", **PRIVATE,
    )  # fmt: skip
    title.change(handlers.follow_title, [decoding, title, threshold], threshold, queue=False, **PRIVATE)
    fitted = {
        "fn": handlers.tagger.fitted_threshold,
        "inputs": [decoding, title],
        "outputs": threshold,
        "queue": False,
    }
    decoding.input(**fitted, **PRIVATE).then(**predict)
    for example_button, *example in buttons:
        choose = example_button.click(lambda example=example: example, None, [file, title], queue=False, **PRIVATE)
        choose.then(**fitted, **PRIVATE).then(**predict)


def _add_many_files_tab(handlers: Handlers) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            files = gr.File(label="Images and videos", file_count="multiple", height=180, elem_id="files")
            titles_from_names = gr.Checkbox(
                True, label="Use file names as titles",
                info="Titles in a metadata.csv or metadata.jsonl (file_name, title) among the files come first.",
            )  # fmt: skip
            decoding, threshold = _add_settings(handlers.tagger, title="a title")
            decoding.input(
                lambda decoding: handlers.tagger.fitted_threshold(decoding, "a title"), decoding, threshold,
                queue=False, **PRIVATE,
            )  # fmt: skip
            button = gr.Button("Predict tags for all files", variant="primary", elem_id="predict-all")
        with gr.Column(scale=3, min_width=300):
            download = gr.HTML(elem_id="download")
            table = gr.HTML('<p class="quiet">Upload files to see a table of their tags.</p>', elem_id="rows")
            gr.HTML(markup.legend())
    inputs, outputs = [files, decoding, threshold, titles_from_names], [table, download]
    gr.on(
        [files.upload, button.click], handlers.predict_many, inputs, outputs, **_model_event(handlers.limits, table)
    )  # fmt: skip


def _add_settings(tagger: Tagger, title: str) -> tuple[gr.Radio, gr.Slider]:
    decoding = gr.Radio(
        list(DECODINGS),
        value="parallel",
        label="Decoding",
        info="parallel: all slots at once. sequential: one slot after another, as in the paper.",
    )
    threshold = gr.Slider(
        0,
        1,
        value=tagger.fitted_threshold("parallel", title),
        step=0.01,
        label="Threshold",
        info="Minimum probability of a tag. The initial value was fitted on the validation split. "
        + ("With it, a photograph without a title has its five most probable tags." if tagger.book is None else ""),
        buttons=[],
    )
    return decoding, threshold


def _add_example_buttons(examples: Path) -> list[tuple[gr.Button, str, str]]:
    """Add a button per example and return it with the example's path and title."""
    buttons = []
    for row in map(json.loads, (examples / "metadata.jsonl").read_text(encoding="utf-8").strip().split("\n")):
        path, title = str(examples / row["file_name"]), row["title"]
        is_image = path.endswith(".png")
        label, icon = (title, path) if is_image else (f"▶ {title}", None)
        buttons.append((gr.Button(label, icon=icon, size="sm", min_width=90), path, title))
    return buttons


def _model_event(limits: Limits, progress: gr.HTML) -> dict:
    """Return the settings of an event that runs the model and shows its progress on a component."""
    return PRIVATE | {
        "concurrency_id": "model",
        "concurrency_limit": limits.concurrent_requests,
        "show_progress": "minimal",
        "show_progress_on": progress,
    }


def launch_settings(limits: Limits, uploads: UploadFolder, here: Path) -> dict:
    """Return the arguments of `gr.Blocks.launch`.

    Args:
        limits: The limits of this Space.
        uploads: The folder for uploads.
        here: Folder of this Space.
    """
    return {
        "app_kwargs": {"middleware": [Middleware(RequestGuard, limits=limits, upload_folder=uploads.path)]},
        "max_file_size": limits.file_megabytes * 10**6,
        "allowed_paths": [str(here / "examples")],
        "state_session_capacity": 200,
        "theme": _theme(),
        "css": (here / "style.css").read_text(encoding="utf-8"),
        "footer_links": ["api", "settings"],
        "run_history": False,
        "ssr_mode": False,
        "share": False,
    }


def _theme() -> gr.themes.Base:
    """Return a theme that downloads no fonts and has enough contrast for small text."""
    theme = gr.themes.Soft(
        primary_hue="orange",
        secondary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        # `set` would reset this colour of the Soft theme to white.
        background_fill_primary="*neutral_50",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*primary_800",
        block_title_text_color="*primary_800",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        checkbox_label_background_fill_selected="*primary_700",
        checkbox_label_background_fill_selected_dark="*primary_700",
        link_text_color="*secondary_700",
        link_text_color_dark="*secondary_300",
    )
