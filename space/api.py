"""The endpoints that other programs call."""

from pathlib import Path

import gradio as gr
from client_budget import client_address
from folder_table import tag_files, to_csv
from gradio.data_classes import FileData
from limits import InputError, Limits, well_formed
from tagging import DECODINGS, TaggedFile, Tagger

MAX_NAME_CHARACTERS = 200


def uploaded_file(file: object) -> tuple[str, str]:
    """Return the path of an upload and the visitor's name for it.

    Raises:
        InputError: There is no upload.
    """
    if not isinstance(file, dict) or not isinstance(file.get("path"), str):
        raise InputError("There is no file. Upload an image or a video.")
    name = file.get("orig_name")
    name = Path(name if isinstance(name, str) and name else file["path"]).name
    return file["path"], well_formed(name[:MAX_NAME_CHARACTERS])


def client_of(request: gr.Request | None) -> str:
    """Return the address of the client that sent a request."""
    if request is None or request.client is None:
        return ""
    return client_address(request.client.host, request.headers)


def add_endpoints(tagger: Tagger, limits: Limits) -> None:
    """Add the endpoints to the current `gr.Blocks`.

    Gradio shows the docstrings of the endpoints on its API page.
    """

    def tag(
        file: FileData, title: str = "", decoding: str = "parallel", threshold: float | None = None,
        attention: bool = False, request: gr.Request = None,
    ) -> dict:  # fmt: skip
        """Tag one image or video.

        Args:
            file: The image or video.
            title: Title of the image or video.
            decoding: "parallel" or "sequential".
            threshold: Minimum probability of a tag. Defaults to the fitted threshold: one for files with a title, and
                one for files without. A photograph without a title has its five most probable tags by default.
            attention: Whether to return the attention weights of each slot's order prompt.
        """
        try:
            decoding, threshold = tagger.check_settings(decoding, threshold)
            tagged = tagger.tag(*uploaded_file(file), title, decoding, client_of(request))
            return as_response(tagged, tagged.default_threshold if threshold is None else threshold, attention)
        except InputError as error:
            raise gr.Error(str(error)) from None

    def tag_many(
        files: list[FileData], decoding: str = "parallel", threshold: float | None = None,
        titles_from_names: bool = True, request: gr.Request = None,
    ) -> dict:  # fmt: skip
        """Tag several images and videos.

        Args:
            files: The images and videos. A metadata.csv or metadata.jsonl among them gives titles.
            decoding: "parallel" or "sequential".
            threshold: Minimum probability of a tag. Defaults to the same as in `/tag`.
            titles_from_names: Whether to make titles from file names where the metadata has none.
        """
        try:
            decoding, threshold = tagger.check_settings(decoding, threshold)
            uploads = [uploaded_file(file) for file in (files if isinstance(files, list) else [files])]
            client = client_of(request)
            rows = list(tag_files(tagger, uploads, decoding, threshold, titles_from_names, limits, client))
        except InputError as error:
            raise gr.Error(str(error)) from None
        return {"decoding": decoding, "threshold": threshold, "rows": rows, "csv": to_csv(rows)}

    def report_limits() -> dict:
        """Return the model's name, the fitted thresholds and the limits."""
        thresholds = {
            decoding: {
                "image+title": tagger.fitted_threshold(decoding, "title"),
                "image": tagger.fitted_threshold(decoding),
            }
            for decoding in DECODINGS
        }
        return {"model": tagger.name, "thresholds": thresholds, "limits": limits.as_dict()}

    model = {"concurrency_id": "model", "concurrency_limit": limits.concurrent_requests}
    gr.api(tag, api_name="tag", **model)
    gr.api(tag_many, api_name="tag_many", **model)
    gr.api(report_limits, api_name="limits", queue=False)


def as_response(tagged: TaggedFile, threshold: float, attention: bool) -> dict:
    """Return a tagged file as JSON, the response of `/tag`.

    Args:
        tagged: The tagged file.
        threshold: Minimum probability of a tag.
        attention: Whether to include the attention weights of each slot's order prompt.
    """
    slots = []
    for slot in tagged.slots:
        candidates = [{"tag": tag, "probability": probability} for tag, probability in slot.candidates]
        response = {"slot": slot.number, "candidates": candidates}
        if attention:
            response["attention"] = {
                "frames": None if slot.patches is None else slot.patches.round(5).tolist(),
                "words": [{"word": word, "weight": round(weight, 5)} for word, weight in slot.words],
            }
        slots.append(response)
    return {
        "name": tagged.name,
        "title": tagged.title,
        "kind": tagged.kind,
        "decoding": tagged.decoding,
        "threshold": threshold,
        "tags": tagged.tags_above(threshold),
        "slots": slots,
    }
