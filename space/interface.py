"""The page, and what other programs call."""

import json
from pathlib import Path

import gradio as gr
import markup
from folder_table import tag_files, to_csv
from gradio.data_classes import FileData
from limits import Limits, Refused
from request_guard import RequestGuard
from starlette.middleware import Middleware
from tagging import DECODINGS, Tagged, Tagger

INTRODUCTION = """# Tags, slot by slot
Drop an image or a video. The model writes its tags from *order prompts*, each made for this example: what every prompt
proposes, and where it looked, is shown below. Order-Prompted Tag Sequence Generation (ICCV 2023), model `{model}`."""
ATTENTION = """Each card is one order prompt and the tags it would write in its slot, with the slot's own probability;
those with a mark are in the list above, where the example as a whole had its say too. **The heat is attention**: how the
prompt's look at the example was shared out over patches and title words, the mean over layers and heads. It says where
the prompt looked. It is no proof of why it wrote what it wrote: patches and words have seen one another before the
prompt looks at them, and the strongest colour is this card's largest share, however small. The frames are what the
model sees, and `[CLS]` and `[SEP]` stand at the title's ends."""
LIMITS = """### Call it from a program
```python
from gradio_client import Client, handle_file

client = Client("http://127.0.0.1:7860")  # or the Space's name on the Hub
client.predict(handle_file("photo.jpg"), title="a harbour", api_name="/tag")
client.predict([handle_file("a.png"), handle_file("b.mp4")], api_name="/tag_many")
client.predict(api_name="/limits")
```
- `/tag`: `file`, `title=""`, `decoding="parallel"` or `"sequential"`, `threshold=None` (the fitted one),
  `attention=False`; gives tags with probability, mark, training count and slot, and what each slot proposes; with
  `attention` also where it looked, `[frames][rows][columns]` and by word.
- `/tag_many`: `files`, `decoding`, `threshold`, `titles_from_names=True`; a row a file, and all of it as CSV.
- `/limits`: these numbers, and the thresholds that were fitted.

### Limits
| | at most |
|---|---|
| one file | {file_megabytes} MB |
| one upload | {upload_megabytes} MB, {files} files |
| an image, a frame | {image_megapixels} million pixels |
| a video | {video_seconds} seconds, {video_frames} frames, {video_gigapixels} billion pixels in all |
| reading one file | {read_seconds} seconds, {read_megabytes} MB of memory |
| a title | {title_characters} characters |

Files are deleted after {keep_minutes} minutes and used for nothing else. Nothing is fetched from addresses, and no
file is read that was not sent."""


def sent_file(file) -> tuple[str, str]:
    """Where an upload lies, and what its sender calls it.

    Raises:
        Refused: it is no upload.
    """
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        raise Refused("There is no file: send an image or a video.")
    name = file.get("orig_name")
    return file["path"], Path(name if isinstance(name, str) and name else file["path"]).name[:200]


def as_answer(tagged: Tagged, threshold: float, attention: bool) -> dict:
    """What programs get."""
    slots = []
    for slot in tagged.slots:
        answer = {
            "slot": slot.number,
            "num_candidates": [{"tag": t, "probability": p} for t, p in slot.num_candidates],
        }
        if attention:
            answer["attention"] = {
                "frames": None if slot.patches is None else slot.patches.round(5).tolist(),
                "words": [{"word": word, "share": round(share, 5)} for word, share in slot.words],
            }
        slots.append(answer)
    names = {name: getattr(tagged, name) for name in ("name", "title", "kind", "decoding")}
    return names | {"threshold": threshold, "tags": tagged.at(threshold), "slots": slots}


def build(tagger: Tagger, limits: Limits, examples: Path) -> gr.Blocks:
    """
    Args:
        examples: folder of images and videos with a `metadata.jsonl` of their titles.
    """
    model = {"concurrency_id": "model", "concurrency_limit": limits.at_once}
    page = {"preprocess": False, "api_visibility": "private"}

    def look(file, title, decoding, threshold):
        if file is None:
            return None, "", "", ""
        try:
            decoding, threshold = tagger.settings(decoding, threshold)
            path, name = sent_file(file)
            tagged = tagger.tag(path, name, title, decoding)
        except Refused as error:
            return None, "", markup.message(str(error)), ""
        return (tagged, markup.preview(path, name, tagged.kind), *show(tagged, threshold))

    def show(tagged, threshold):
        if tagged is None:
            return gr.skip(), gr.skip()
        return markup.tags(tagged, threshold), markup.slots(tagged, threshold)

    def look_at_many(files, decoding, threshold, titles_from_names):
        try:
            decoding, threshold = tagger.settings(decoding, threshold)
            files = [sent_file(file) for file in files or []]
            rows = []
            for row in tag_files(tagger, files, decoding, threshold, bool(titles_from_names), limits):
                rows.append(row)
                yield markup.table(rows, max(len(files), len(rows))), ""
            yield markup.table(rows, len(rows)), markup.csv_link(rows)
        except Refused as error:
            yield markup.message(str(error)), ""

    def tag(
        file: FileData, title: str = "", decoding: str = "parallel", threshold: float | None = None,
        attention: bool = False,
    ) -> dict:  # fmt: skip
        try:
            decoding, threshold = tagger.settings(decoding, threshold)
            return as_answer(tagger.tag(*sent_file(file), title, decoding), threshold, attention)
        except Refused as error:
            raise gr.Error(str(error)) from None

    def tag_many(
        files: list[FileData], decoding: str = "parallel", threshold: float | None = None,
        titles_from_names: bool = True,
    ) -> dict:  # fmt: skip
        try:
            decoding, threshold = tagger.settings(decoding, threshold)
            files = [sent_file(file) for file in (files if isinstance(files, list) else [files])]
            rows = list(tag_files(tagger, files, decoding, threshold, titles_from_names, limits))
        except Refused as error:
            raise gr.Error(str(error)) from None
        return {"decoding": decoding, "threshold": threshold, "rows": rows, "csv": to_csv(rows)}

    def say_limits() -> dict:
        thresholds = {decoding: tagger.fitted_threshold(decoding) for decoding in DECODINGS}
        return {"model": tagger.name, "thresholds": thresholds, "limits": limits.as_dict()}

    def controls() -> tuple[gr.Radio, gr.Slider]:
        decoding = gr.Radio(
            list(DECODINGS),
            value="parallel",
            label="Decoding",
            info="parallel: all slots at once. sequential: each sees those before it, as in the paper.",
        )
        threshold = gr.Slider(
            0, 1, value=tagger.fitted_threshold("parallel"), step=0.01, label="Threshold",
            info="Least probability of a tag. Where it stands at first was fitted on validation examples.",
            buttons=[],
        )  # fmt: skip
        return decoding, threshold

    delete = (60, 60 * limits.keep_minutes)
    with gr.Blocks(title="optsg: tags, slot by slot", analytics_enabled=False, delete_cache=delete) as demo:
        gr.Markdown(INTRODUCTION.format(model=tagger.name), elem_id="introduction")
        with gr.Tab("An image or a video"):
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    file = gr.File(label="Image or video", file_count="single", height=150, elem_id="file")
                    title = gr.Textbox(
                        label="Title", placeholder="what it is called, if anything", elem_id="title",
                        max_length=limits.title_characters,
                    )  # fmt: skip
                    decoding, threshold = controls()
                    button = gr.Button("Tag it", variant="primary", elem_id="tag-it")
                    gr.HTML("<h3>Or try one of these</h3>")
                    with gr.Row(elem_id="examples"):
                        sample_predictions = [
                            (row, _sample_button(examples / row["file_name"], row["title"]))
                            for row in map(json.loads, (examples / "metadata.jsonl").read_text().splitlines())
                        ]
                with gr.Column(scale=3, min_width=300):
                    preview = gr.HTML(elem_id="preview")
                    tags = gr.HTML('<p class="quiet">The tags will be here.</p>', elem_id="tags")
                    gr.HTML(markup.legend())
            with gr.Accordion("Where each slot's prompt looked", open=True):
                gr.Markdown(ATTENTION)
                slots = gr.HTML(elem_id="slots")
            result = gr.State(time_to_live=60 * limits.keep_minutes)
            inputs, outputs = [file, title, decoding, threshold], [result, preview, tags, slots]
            # A title that is entered while the image alone is being looked at must not be forgotten.
            shown = {"show_progress": "minimal", "show_progress_on": tags, "trigger_mode": "always_last"}
            gr.on([file.upload, title.submit, button.click], look, inputs, outputs, **page, **model, **shown)
            file.clear(lambda: (None, "", "", ""), None, outputs, queue=False, **page)
            threshold.input(
                show, [result, threshold], [tags, slots], trigger_mode="always_last", queue=False,
                show_progress="hidden", **page,
            )  # fmt: skip
            decoding.input(tagger.fitted_threshold, decoding, threshold, queue=False, **page).then(
                look, inputs, outputs, **page, **model, **shown
            )
            for row, sample in sample_predictions:
                chosen = str(examples / row["file_name"]), row["title"]
                sample.click(lambda chosen=chosen: chosen, None, [file, title], queue=False, **page).then(
                    look, inputs, outputs, **page, **model, **shown
                )
        with gr.Tab("A whole folder"):
            with gr.Row():
                with gr.Column(scale=2, min_width=300):
                    files = gr.File(label="Images and videos", file_count="multiple", height=180, elem_id="files")
                    names = gr.Checkbox(
                        True, label="Titles from the file names",
                        info="A metadata.csv or metadata.jsonl among the files (file_name, title) comes first.",
                    )  # fmt: skip
                    many_decoding, many_threshold = controls()
                    many_decoding.input(tagger.fitted_threshold, many_decoding, many_threshold, queue=False, **page)
                    many_button = gr.Button("Tag them all", variant="primary", elem_id="tag-all")
                with gr.Column(scale=3, min_width=300):
                    download = gr.HTML(elem_id="download")
                    rows = gr.HTML('<p class="quiet">A row a file will be here.</p>', elem_id="rows")
                    gr.HTML(markup.legend())
            many_inputs = [files, many_decoding, many_threshold, names]
            gr.on(
                [files.upload, many_button.click], look_at_many, many_inputs, [rows, download],
                show_progress="minimal", show_progress_on=rows, **page, **model,
            )  # fmt: skip
        with gr.Tab("For programs, and limits"):
            gr.Markdown(LIMITS.format(**limits.as_dict()))
        gr.api(tag, api_name="tag", **model)
        gr.api(tag_many, api_name="tag_many", **model)
        gr.api(say_limits, api_name="limits", queue=False)
    # Every request waits its turn: no route leads past the queue.
    demo.queue(max_size=limits.waiting, api_open=False)
    return demo


def _sample_button(path: Path, title: str) -> gr.Button:
    moves = path.suffix != ".png"
    return gr.Button(f"▶ {title}" if moves else title, icon=None if moves else str(path), size="sm", min_width=90)


def launch_settings(limits: Limits, uploads, here: Path) -> dict:
    """What `launch` is to be given: limits, and nothing from other hosts."""
    # Gradio's own themes ask for fonts elsewhere.
    theme = gr.themes.Soft(
        primary_hue="orange",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return {
        "app_kwargs": {"middleware": [Middleware(RequestGuard, limits=limits, upload_folder=uploads.path)]},
        "max_file_size": limits.file_megabytes * 10**6,
        "allowed_paths": [str(here / "examples")],
        "state_session_capacity": 200,
        "theme": theme,
        "css": (here / "style.css").read_text(encoding="utf-8"),
        "footer_links": ["api", "settings"],
        "run_history": False,
        "ssr_mode": False,
        "share": False,
    }
