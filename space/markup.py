"""Renders results as HTML. Text from files, titles and the model is escaped here."""

import base64
import io
from html import escape
from urllib.parse import quote

import numpy as np
from folder_table import to_csv
from PIL import Image
from tagging import RARE_BELOW, Slot, TaggedFile

# Each mark has a shape and a word, so that visitors need not tell colours apart.
MARKS = {"common": "●", "rare": "◆", "novel": "✦"}
MEANINGS = {
    "common": f"at least {RARE_BELOW} training examples have this tag",
    "rare": f"fewer than {RARE_BELOW} training examples have it",
    "novel": "no training example has it. Without a book, the model spelled it from word pieces, so it may not be a "
    "real word",
}
HEAT_COLOUR = (230, 97, 0)
# A card shows this many candidates, and those that are in the list of tags.
CARD_CANDIDATES = 3
# A tag shows this many similar examples of the book.
MAX_NEIGHBOURS = 3


def percent(ratio: float) -> str:
    """Format a ratio as a percentage, with a space that does not break."""
    digits = 0 if ratio >= 0.095 or not ratio else 1
    return f"{100 * ratio:.{digits}f}\N{NO-BREAK SPACE}%"


def error_message(text: str) -> str:
    """Render an error message."""
    return f'<p class="message" role="alert">{escape(text)}</p>'


def legend() -> str:
    """Render the meaning of the marks."""
    rows = (
        f'<li class="{mark}"><span class="mark" aria-hidden="true">{sign}</span> <b>{mark}</b>: {MEANINGS[mark]}</li>'
        for mark, sign in MARKS.items()
    )
    return f'<ul class="legend" aria-label="Marks">{"".join(rows)}</ul>'


def preview(path: str, name: str, kind: str) -> str:
    """Render the uploaded file itself.

    Args:
        path: Path of the file on this server.
        name: The visitor's name for the file.
        kind: `"image"` or `"video"`.
    """
    # A relative address works wherever this Space is served.
    source = escape(f"gradio_api/file={quote(path)}", quote=True)
    # Browsers play animated images in an image element only.
    if kind == "video" and not name.lower().endswith((".gif", ".png", ".apng")):
        element = f'<video src="{source}" controls muted playsinline aria-label="{escape(name)}"></video>'
    else:
        element = f'<img src="{source}" alt="{escape(name)}">'
    return f'<figure class="preview">{element}</figure>'


def tag_list(tagged: TaggedFile, threshold: float, known_images: str = "") -> str:
    """Render the tags of a file, or what the visitor can do if there are none.

    Args:
        tagged: The tagged file.
        threshold: Minimum probability of a tag.
        known_images: Which images the model knows, `""` if that is unknown.
    """
    rows = tagged.tags_above(threshold)
    source = f"{tagged.kind} {tagged.name}" + (f", “{tagged.title}”" if tagged.title else ", no title")
    heading = f"<h3>{len(rows)} tag{'' if len(rows) == 1 else 's'} <small>{escape(source)}</small></h3>"
    if not rows:
        return heading + _no_tags(tagged, threshold, known_images)
    return f'{heading}<ol class="tags" aria-label="Tags">{"".join(map(_tag, rows))}</ol>'


def _no_tags(tagged: TaggedFile, threshold: float, known_images: str) -> str:
    best = f" The most probable tag has {percent(tagged.tags[0]['score'])}." if tagged.tags else ""
    if tagged.title:
        advice = [f"Change the title: name what the {tagged.kind} shows in one or two words."]
    else:
        advice = [
            f"Enter a title that names what the {tagged.kind} shows. The model reads the {tagged.kind} and its title."
        ]
    if tagged.tags:
        advice.append("Lower the threshold to see less probable tags.")
    if known_images:
        advice.append(f"Try another {tagged.kind}: this model knows {known_images}.")
    steps = "".join(f"<li>{escape(step)}</li>" for step in advice)
    return (
        f'<div class="quiet"><p>No tag reaches the threshold of {percent(threshold)}.{best} What you can do:</p>'
        f'<ul class="advice">{steps}</ul></div>'
    )


def _tag(row: dict) -> str:
    mark, count = row["mark"], row["train_count"]
    examples = f"{count} training example{'' if count == 1 else 's'}" if count else "no training example"
    return (
        f'<li class="{mark}"><span class="mark" aria-hidden="true">{MARKS[mark]}</span>'
        f'<span class="name" dir="auto">{escape(row["tag"])}</span>'
        f'<span class="bar" aria-hidden="true"><i style="width:{100 * row["score"]:.1f}%"></i></span>'
        f'<span class="score">{percent(row["score"])}</span>'
        f'<span class="count"><b>{mark}</b>, {examples}</span><span class="source">{_source(row)}</span>'
        f"{_neighbours(row)}</li>"
    )


def _source(row: dict) -> str:
    """Render where a tag comes from: its slot, the book reader, the tag classifier or the book."""
    source = row.get("source")
    if row["slot"] is not None and source != "pointed":
        return f'<a href="#slot-{row["slot"] + 1}">slot {row["slot"] + 1}</a>'
    # Without a slot, a generated tag was spelled as in the book.
    return {"book": "book", "generated": "a slot", "pointed": "book reader"}.get(source, "tag classifier")


def _neighbours(row: dict) -> str:
    """Render the similar examples of the book that have a tag: title, id and score."""
    if not (neighbours := row.get("neighbours")):
        return ""
    shown = ", ".join(map(_neighbour, neighbours[:MAX_NEIGHBOURS]))
    more = len(neighbours) - MAX_NEIGHBOURS
    return f'<span class="neighbours">like {shown}{f" and {more} more" if more > 0 else ""}</span>'


def _neighbour(example: dict) -> str:
    title = f" “{escape(example['title'])}”" if example["title"] else ""
    return f"{escape(example['id'])}{title} ({example['score']:.2f})"


def slot_cards(tagged: TaggedFile, threshold: float) -> str:
    """Render one card per slot, the most confident first; empty slots are collapsed.

    Args:
        tagged: The tagged file.
        threshold: Minimum probability of a tag in the list of tags.
    """
    listed = {row["tag"]: row for row in tagged.tags_above(threshold)}
    filled = sorted((slot for slot in tagged.slots if not slot.is_empty), key=lambda slot: -slot.candidates[0][1])
    empty = [slot for slot in tagged.slots if slot.is_empty]
    frames = enumerate(tagged.frames)
    style = "".join(f".frame-{index}{{background-image:url({_jpeg(frame)})}}" for index, frame in frames)
    cards = "".join(_card(tagged, slot, listed) for slot in filled)
    rest = "".join(_card(tagged, slot, listed) for slot in empty)
    if rest:
        count = f"{len(empty)} empty slot{'' if len(empty) == 1 else 's'} ([PAD])"
        rest = f'<details><summary>{count}</summary><div class="cards">{rest}</div></details>'
    return f'<style>{style}</style><div class="cards">{cards}</div>{rest}'


def _card(tagged: TaggedFile, slot: Slot, listed: dict[str, dict]) -> str:
    candidates = []
    for rank, (tag, probability) in enumerate(slot.candidates):
        row = listed.get(tag)
        if rank >= CARD_CANDIDATES and (row is None or row["slot"] != slot.number):
            continue
        sign = "" if row is None else f'<span class="mark" aria-hidden="true">{MARKS[row["mark"]]}</span> '
        style = "quiet" if row is None else row["mark"]
        candidates.append(f'<li class="{style}">{sign}<b>{escape(tag)}</b> {percent(probability)}</li>')
    candidates = "".join(candidates) or '<li class="quiet">[PAD]</li>'
    attention = f"attention: {percent(slot.frames)} {tagged.kind}"
    if slot.words:
        attention += f", {percent(1 - slot.frames)} title"
    return (
        f'<article class="slot" id="slot-{slot.number + 1}"><h4>Slot {slot.number + 1}</h4>'
        f'<ul class="candidates" dir="auto">{candidates}</ul>{_heat_map(tagged, slot)}{_words(slot)}'
        f'<p class="quiet">{attention}</p></article>'
    )


def _heat_map(tagged: TaggedFile, slot: Slot) -> str:
    if slot.patches is None:
        return '<p class="quiet">This model has no image patches to show.</p>'
    strongest = max(float(slot.patches.max()), 1e-9)
    frame, row, column = np.unravel_index(int(slot.patches.argmax()), slot.patches.shape)
    position = f"row {row + 1} of {slot.patches.shape[1]}, column {column + 1} of {slot.patches.shape[2]}"
    if len(tagged.frames) > 1:
        position = f"frame {frame + 1} of {len(tagged.frames)}, {position}"
    frames = "".join(
        f'<span class="frame frame-{index}"><img src="{_heat_png(patches / strongest)}" alt=""></span>'
        for index, patches in enumerate(slot.patches[: len(tagged.frames)])
    )
    label = f"Highest attention: {position}, {percent(strongest)}"
    layout = "strip" if len(tagged.frames) > 1 else "single"
    return f'<div class="frames {layout}" role="img" aria-label="{label}" title="{label}">{frames}</div>'


def _words(slot: Slot) -> str:
    if not slot.words:
        return ""
    strongest = max(weight for _, weight in slot.words) or 1
    words = "".join(
        f'<span style="--heat:{80 * weight / strongest:.0f}%" title="{percent(weight)}">{escape(word)}</span> '
        for word, weight in slot.words
    )
    return f'<p class="words" dir="auto">{words}</p>'


def file_table(rows: list[dict], total: int) -> str:
    """Render one table row per file.

    Args:
        rows: The rows of [`folder_table.tag_files`] so far.
        total: Number of rows when all files are tagged.
    """
    done = f"{len(rows)} of {total} files" if len(rows) < total else f"{total} file{'' if total == 1 else 's'}"
    failures = sum(row["error"] is not None for row in rows)
    failures = f", {failures} could not be tagged" if failures else ""
    body = "".join(
        f"<tr><th scope='row' dir='auto'>{escape(row['file'])}</th><td dir='auto'>{escape(row['title'])}</td><td>"
        + (error_message(row["error"]) if row["error"] is not None else _chips(row["tags"]))
        + "</td></tr>"
        for row in rows
    )
    return (
        f'<p role="status">{done}{failures}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Tags of all files">'
        "<table><thead><tr><th scope='col'>File</th><th scope='col'>Title</th><th scope='col'>Tags</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _chips(rows: list[dict]) -> str:
    chips = (
        f'<span class="chip {row["mark"]}" title="{row["mark"]}">'
        f'<span aria-hidden="true">{MARKS[row["mark"]]}</span><span class="hidden">{row["mark"]}</span> '
        f"{escape(row['tag'])} <small>{percent(row['score'])}</small></span> "
        for row in rows
    )
    return "".join(chips) or '<span class="quiet">no tag reaches the threshold</span>'


def csv_link(rows: list[dict]) -> str:
    """Render a link that holds the rows as CSV, so that the server stores no file."""
    content = base64.b64encode(to_csv(rows).encode("utf-8-sig")).decode()
    return f'<a class="download" download="tags.csv" href="data:text/csv;base64,{content}">Download tags.csv</a>'


def _jpeg(frame: np.ndarray) -> str:
    return _data_url(Image.fromarray(frame), "JPEG", quality=88)


def _heat_png(patches: np.ndarray) -> str:
    pixels = np.empty((*patches.shape, 4), np.uint8)
    pixels[..., :3] = HEAT_COLOUR
    pixels[..., 3] = (patches.clip(0, 1) * 205).astype(np.uint8)
    return _data_url(Image.fromarray(pixels), "PNG")


def _data_url(image: Image.Image, format: str, **options: int) -> str:
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
