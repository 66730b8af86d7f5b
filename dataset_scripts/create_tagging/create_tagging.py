"""CREATE-tagging: Chinese videos with titles and tags (section 1.1 of the supplement), from the released files."""

from ..annotated_media import FEATURE_SUFFIXES, AnnotatedMedia, AnnotatedMediaConfig
from ..media_suffixes import VIDEO_SUFFIXES

_RAW_TITLE = {"raw": "raw_title"}


def _names(name: str) -> tuple[str, ...]:
    return f"{name}.json", f"{name}.jsonl"


def _pretraining(size: str) -> AnnotatedMediaConfig:
    return AnnotatedMediaConfig(
        name=f"create_{size}", files={"train": _names(f"create_{size}_pretrain")}, title_fields=_RAW_TITLE
    )


class CreateTagging(AnnotatedMedia):
    """`CreateTagging("create_210k", data_dir=…).download_and_prepare()`, then `.as_dataset()`.

    `data_dir` holds `create_210k_{train,val,test}.json` (or `create_3m_pretrain.json`, `create_10m_pretrain.json` for
    the configurations of pre-training), and `videos/` or `features/` with a file for each `vid`. `title="raw"` takes
    the title as it was uploaded instead of the annotated one. See [`AnnotatedMedia`].
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
                "train": _names("create_210k_train"),
                "validation": _names("create_210k_val"),
                "test": _names("create_210k_test"),
            },
            title_fields={"annotated": "ann_title"} | _RAW_TITLE,
            categories=True,
        ),
        _pretraining("3m"),
        _pretraining("10m"),
    ]
    DEFAULT_CONFIG_NAME = "create_210k"
