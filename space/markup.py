"""What is shown, as HTML. Whatever comes from a file, a title or the model is text and is escaped here."""

import base64
import io
from html import escape
from urllib.parse import quote

import numpy as np
from folder_table import to_csv
from PIL import Image
from tagging import RARE_BELOW, Slot, Tagged

# A shape and a word for each, so that no colour is needed to tell them apart.
MARKS = {"common": "●", "rare": "◆", "novel": "✦"}
MEANINGS = {
    "common": f"at least {RARE_BELOW} training examples have it",
    "rare": f"fewer than {RARE_BELOW} training examples have it",
    "novel": "no training example has it: the model made it up of pieces, and it may not be a word",
}
HEAT = (230, 97, 0)


def percent(share: float) -> str:
    """With a space that no line breaks at."""
    digits = 0 if share >= 0.095 or not share else 1
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def message(text: str) -> str:
    return f'<p class="message" role="alert">{escape(text)}</p>'


def legend() -> str:
    rows = (
        f'<li class="{mark}"><span class="mark" aria-hidden="true">{sign}</span> <b>{mark}</b> {MEANINGS[mark]}</li>'
        for mark, sign in MARKS.items()
    )
    return f'<ul class="legend" aria-label="Marks">{"".join(rows)}</ul>'


def preview(path: str, name: str, kind: str) -> str:
    """The file itself, by the browser. The address is relative, wherever this Space is served."""
    source = escape(f"gradio_api/file={quote(path)}", quote=True)
    # An animation that is an image file plays as one.
    if kind == "video" and not name.lower().endswith((".gif", ".png", ".apng")):
        shown = f'<video src="{source}" controls muted playsinline aria-label="{escape(name)}"></video>'
    else:
        shown = f'<img src="{source}" alt="{escape(name)}">'
    return f'<figure class="preview">{shown}</figure>'


def tags(tagged: Tagged, threshold: float) -> str:
    rows = tagged.at(threshold)
    where = f"{tagged.kind} {tagged.name}" + (f", “{tagged.title}”" if tagged.title else ", without a title")
    heading = f"<h3>{len(rows)} tag{'' if len(rows) == 1 else 's'} <small>{escape(where)}</small></h3>"
    if not rows:
        best = f" The most probable is at {percent(tagged.tags[0]['score'])}." if tagged.tags else ""
        hint = "" if tagged.title else " A title helps: the model reads it beside the image."
        return f'{heading}<p class="quiet">None reaches the threshold of {percent(threshold)}.{best}{hint}</p>'
    return f'{heading}<ol class="tags" aria-label="Tags">{"".join(map(_tag, rows))}</ol>'


def _tag(row: dict) -> str:
    mark, count = row["mark"], row["train_count"]
    known = "not in training" if not count else f"{count} in training"
    slot = row["slot"]
    source = "whole example" if slot is None else f'<a href="#slot-{slot + 1}">slot {slot + 1}</a>'
    return (
        f'<li class="{mark}"><span class="mark" aria-hidden="true">{MARKS[mark]}</span>'
        f'<span class="name" dir="auto">{escape(row["tag"])}</span>'
        f'<span class="bar" aria-hidden="true"><i style="width:{100 * row["score"]:.1f}%"></i></span>'
        f'<span class="score">{percent(row["score"])}</span>'
        f'<span class="known"><b>{mark}</b>, {known}</span><span class="source">{source}</span></li>'
    )


def slots(tagged: Tagged, threshold: float) -> str:
    """A card a slot; those that say nothing folded away."""
    shown = {row["tag"]: row for row in tagged.at(threshold)}
    speaking = sorted((s for s in tagged.slots if not s.silent), key=lambda slot: -slot.num_candidates[0][1])
    silent = [slot for slot in tagged.slots if slot.silent]
    frames = enumerate(tagged.frames)
    style = "".join(f".seen-{index}{{background-image:url({_jpeg(frame)})}}" for index, frame in frames)
    cards = "".join(_card(tagged, slot, shown) for slot in speaking)
    rest = "".join(_card(tagged, slot, shown) for slot in silent)
    if rest:
        count = "1 slot is" if len(silent) == 1 else f"{len(silent)} slots are"
        rest = f'<details><summary>{count} left empty ([PAD])</summary><div class="cards">{rest}</div></details>'
    return f'<style>{style}</style><div class="cards">{cards}</div>{rest}'


def _card(tagged: Tagged, slot: Slot, shown: dict[str, dict]) -> str:
    """A slot's three best num_candidates and those it is named for in the list of tags; what is in that list is marked."""
    num_candidates = []
    for place, (tag, share) in enumerate(slot.num_candidates):
        row = shown.get(tag)
        if place >= 3 and (row is None or row["slot"] != slot.number):
            continue
        sign = "" if row is None else f'<span class="mark" aria-hidden="true">{MARKS[row["mark"]]}</span> '
        kind = "quiet" if row is None else row["mark"]
        num_candidates.append(f'<li class="{kind}">{sign}<b>{escape(tag)}</b> {percent(share)}</li>')
    num_candidates = "".join(num_candidates) or '<li class="quiet">[PAD]</li>'
    looked = f"{percent(slot.frames)} {'frames' if tagged.kind == 'video' else 'image'}"
    if slot.words:
        looked += f" · {percent(1 - slot.frames)} title"
    return (
        f'<article class="slot" id="slot-{slot.number + 1}"><h4>Slot {slot.number + 1}</h4>'
        f'<ul class="num_candidates" dir="auto">{num_candidates}</ul>{_heat(tagged, slot)}{_words(slot)}'
        f'<p class="quiet">{looked}</p></article>'
    )


def _heat(tagged: Tagged, slot: Slot) -> str:
    if slot.patches is None:
        return '<p class="quiet">This model\'s frames have no patches to show.</p>'
    strongest = max(float(slot.patches.max()), 1e-9)
    frame, row, column = np.unravel_index(int(slot.patches.argmax()), slot.patches.shape)
    place = f"row {row + 1} of {slot.patches.shape[1]}, column {column + 1} of {slot.patches.shape[2]}"
    if len(tagged.frames) > 1:
        place = f"frame {frame + 1} of {len(tagged.frames)}, {place}"
    frames = "".join(
        f'<span class="frame seen-{index}"><img src="{_heat_png(patches / strongest)}" alt=""></span>'
        for index, patches in enumerate(slot.patches[: len(tagged.frames)])
    )
    label = f"Most attention: {place}, {percent(strongest)}"
    kind = "strip" if len(tagged.frames) > 1 else "single"
    return f'<div class="frames {kind}" role="img" aria-label="{label}" title="{label}">{frames}</div>'


def _words(slot: Slot) -> str:
    if not slot.words:
        return ""
    strongest = max(weight for _, weight in slot.words) or 1
    words = "".join(
        f'<span style="--heat:{80 * weight / strongest:.0f}%" title="{percent(weight)}">{escape(word)}</span> '
        for word, weight in slot.words
    )
    return f'<p class="words" dir="auto">{words}</p>'


def table(rows: list[dict], total: int) -> str:
    """A row a file."""
    done = f"{len(rows)} of {total} files" if len(rows) < total else f"{len(rows)} files"
    failed = sum(row["error"] is not None for row in rows)
    failed = f", {failed} could not be tagged" if failed else ""
    body = "".join(
        f"<tr><th scope='row' dir='auto'>{escape(row['file'])}</th><td dir='auto'>{escape(row['title'])}</td><td>"
        + (message(row["error"]) if row["error"] is not None else _chips(row["tags"]))
        + "</td></tr>"
        for row in rows
    )
    return (
        f'<p role="status">{done}{failed}</p>'
        '<div class="scroll" tabindex="0" role="region" aria-label="Tags of all files">'
        f"<table><thead><tr><th scope='col'>File</th><th scope='col'>Title</th><th scope='col'>Tags</th></tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _chips(rows: list[dict]) -> str:
    chips = (
        f'<span class="chip {row["mark"]}" title="{row["mark"]}">'
        f'<span aria-hidden="true">{MARKS[row["mark"]]}</span><span class="hidden">{row["mark"]}</span> '
        f"{escape(row['tag'])} <small>{percent(row['score'])}</small></span> "
        for row in rows
    )
    return "".join(chips) or '<span class="quiet">none reaches the threshold</span>'


def csv_link(rows: list[dict]) -> str:
    """The table inside a link: nothing is written on the server."""
    content = base64.b64encode(to_csv(rows).encode("utf-8-sig")).decode()
    return f'<a class="download" download="tags.csv" href="data:text/csv;base64,{content}">Download tags.csv</a>'


def _jpeg(frame: np.ndarray) -> str:
    return _data_address(Image.fromarray(frame), "JPEG", quality=88)


def _heat_png(patches: np.ndarray) -> str:
    pixels = np.empty((*patches.shape, 4), np.uint8)
    pixels[..., :3] = HEAT
    pixels[..., 3] = (patches.clip(0, 1) * 205).astype(np.uint8)
    return _data_address(Image.fromarray(pixels), "PNG")


def _data_address(image: Image.Image, kind: str, **options) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
