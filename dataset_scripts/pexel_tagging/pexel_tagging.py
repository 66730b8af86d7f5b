"""Pexel-tagging: English images with titles and tags (section 1.2 of the supplement)."""

from ..annotated_media import AnnotatedMedia, AnnotatedMediaConfig
from ..frame_features import FEATURE_SUFFIXES
from ..media_suffixes import IMAGE_SUFFIXES


class PexelTagging(AnnotatedMedia):
    """Builds Pexel-tagging from the files in `data_dir`; see [`AnnotatedMedia`].

    `data_dir` contains `pexel_{train,val,test}.json` of `{"id", "title", "tag"}`, and `images/` or `features/` with a
    file for each `id`.
    """

    ID_FIELD = "id"
    MEDIA = {
        "image": ("images", tuple(sorted(IMAGE_SUFFIXES))),
        "frame_features": ("features", FEATURE_SUFFIXES),
    }
    BUILDER_CONFIGS = [
        AnnotatedMediaConfig(
            name="pexel",
            files={
                "train": ("pexel_train.json", "pexel_train.jsonl"),
                "validation": ("pexel_val.json", "pexel_val.jsonl"),
                "test": ("pexel_test.json", "pexel_test.jsonl"),
            },
            title_fields={"title": "title"},
        )
    ]
    DEFAULT_CONFIG_NAME = "pexel"
