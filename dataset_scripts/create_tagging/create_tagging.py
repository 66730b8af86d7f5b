"""CREATE-tagging: Chinese videos with titles and tags (section 1.1 of the supplement)."""

from ..annotated_media import AnnotatedMedia, AnnotatedMediaConfig
from ..frame_features import FEATURE_SUFFIXES
from ..media_suffixes import VIDEO_SUFFIXES

_RAW_TITLE = {"raw": "raw_title"}


def _file_names(stem: str) -> tuple[str, ...]:
    return f"{stem}.json", f"{stem}.jsonl"


def _pretraining_config(size: str) -> AnnotatedMediaConfig:
    return AnnotatedMediaConfig(
        name=f"create_{size}", files={"train": _file_names(f"create_{size}_pretrain")}, title_fields=_RAW_TITLE
    )


class CreateTagging(AnnotatedMedia):
    """Builds CREATE-tagging from the files in `data_dir`; see [`AnnotatedMedia`].

    `data_dir` contains `create_210k_{train,val,test}.json`, or for pretraining `create_3m_pretrain.json` or
    `create_10m_pretrain.json`, and `videos/` or `features/` with a file for each `vid`. `title="raw"` takes the title
    of the upload instead of the annotated one.
    """

    ID_FIELD = "vid"
    MEDIA = {
        "video": ("videos", tuple(sorted(VIDEO_SUFFIXES))),
        "frame_features": ("features", FEATURE_SUFFIXES),
    }
    BUILDER_CONFIGS = [
        AnnotatedMediaConfig(
            name="create_210k",
            files={
                "train": _file_names("create_210k_train"),
                "validation": _file_names("create_210k_val"),
                "test": _file_names("create_210k_test"),
            },
            title_fields={"annotated": "ann_title"} | _RAW_TITLE,
            categories=True,
        ),
        _pretraining_config("3m"),
        _pretraining_config("10m"),
    ]
    DEFAULT_CONFIG_NAME = "create_210k"
