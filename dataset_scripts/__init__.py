"""Tagging benchmarks, and `load_tagging_dataset`, which loads them and any other tagging dataset alike."""

import importlib
import os
from pathlib import Path

import datasets
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .tag_statistics import tag_statistics
from .tagging_columns import TEXT_COLUMNS, fill_stream, undecoded, with_tagging_columns
from .tagging_folder import METADATA_NAMES, has_metadata, load_tagging_folder

__all__ = ["benchmark_card", "load_tagging_dataset", "tag_statistics", "undecoded"]

# Benchmark -> its builder class, in the module of the same name.
_BUILDERS = {
    "icon_tagging": "IconTagging",
    "create_tagging": "CreateTagging",
    "pexel_tagging": "PexelTagging",
}


def load_tagging_dataset(
    name_or_path: str | os.PathLike,
    *,
    split: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    streaming: bool = False,
    texts_only: bool = False,
    **kwargs,
) -> datasets.DatasetDict | datasets.Dataset | datasets.IterableDatasetDict | datasets.IterableDataset:
    """Loads a tagging dataset: `id`, `title` and `tags: List(string)`, and `image`, `video` or `frame_features`.

    Args:
        name_or_path: the first of these that it is:
            a benchmark built here, `"icon_tagging"` or `"icon-tagging"`, or from files you hold (`data_dir`),
            `"create_tagging"` and `"pexel_tagging"`;
            a local folder of images or videos with a metadata file (see [`tagging_folder.load_tagging_folder`]);
            a local folder of Parquet files with those columns, or the name of such a dataset on the Hub, `"org/name"`
            (see [`tagging_columns.with_tagging_columns`]).
        split: one split, or a part or sum of splits in the notation of `datasets`, such as `"train[:100]"`; not given,
            all splits in a dict. A stream takes plain split names only.
        cache_dir: where `datasets` keeps what it builds or downloads; not used for a folder with a metadata file.
        streaming: give `IterableDataset`s.
        texts_only: of these give `id` (null where there is none), `title` and `tags` alone, in the same order and
            shards; of Parquet nothing else is read.
        **kwargs: for a benchmark, arguments of its builder; for Parquet and the Hub, of `datasets.load_dataset`.

    Raises:
        FileNotFoundError: there is no such benchmark, folder or Hub dataset; or files are missing.
        ValueError: the data is not laid out as described, there is no such split, or `texts_only` is asked for
            without `streaming`.
    """
    if texts_only and not streaming:
        raise ValueError("texts_only goes with streaming; of what is built select_columns reads no others.")
    name = os.fspath(name_or_path)
    cache_dir = None if cache_dir is None else os.fspath(cache_dir)
    if (benchmark := name.replace("-", "_")) in _BUILDERS:
        module = importlib.import_module(f"{__name__}.{benchmark}")
        try:
            builder = getattr(module, _BUILDERS[benchmark])(cache_dir=cache_dir, **kwargs)
            if streaming:
                rows = builder.as_streaming_dataset(split=split)
                return rows.select_columns(list(TEXT_COLUMNS)) if texts_only else rows
            builder.download_and_prepare()
        except TypeError as error:
            raise ValueError(f"{name} does not take the arguments {kwargs}: {error}") from error
        except datasets.exceptions.DatasetGenerationError as error:
            # What is wrong stands in its cause alone.
            raise ValueError(f"{name}: {error.__cause__ or error}") from error
        return builder.as_dataset(split=split)

    if not name:
        raise FileNotFoundError(f"the name is empty. {_accepted()}")
    folder = Path(name).expanduser()
    if folder.is_dir() and has_metadata(folder):
        if kwargs:
            raise ValueError(f"a folder with a metadata file takes no further arguments; got {', '.join(kwargs)}")
        selected = _select(load_tagging_folder(folder), split, streaming, name)
        return selected.select_columns(list(TEXT_COLUMNS)) if texts_only else selected
    if folder.is_dir():
        if not any(folder.rglob("*.parquet")):
            raise ValueError(f"{folder} holds neither Parquet files nor one of {', '.join(METADATA_NAMES)}")
        name = str(folder.resolve())
    elif folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds it")
    elif not _can_be_on_hub(name):
        raise FileNotFoundError(f"nothing is called {name!r}. {_accepted()}")
    if "config_name" in kwargs:
        kwargs["name"] = kwargs.pop("config_name")
    given = {"split": split, "cache_dir": cache_dir, "streaming": streaming, **kwargs}
    try:
        loaded = datasets.load_dataset(name, **given)
    except TypeError as error:
        raise ValueError(f"{name} does not take the arguments {kwargs}: {error}") from error
    except datasets.exceptions.DatasetGenerationError as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from error
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{name!r} is no local folder, and on the Hub: {error}. {_accepted()}") from error
    if not isinstance(loaded, dict):
        filled = with_tagging_columns(loaded, name)
        return _texts(name, loaded, given) if texts_only else filled
    filled = {part: with_tagging_columns(rows, f"{name} ({part})") for part, rows in loaded.items()}
    if texts_only:
        filled = {part: _texts(name, rows, given | {"split": part}) for part, rows in loaded.items()}
    return type(loaded)(filled)


def _texts(name: str, rows: datasets.IterableDataset, given: dict) -> datasets.IterableDataset:
    """`id`, `title` and `tags` of a stream.

    Args:
        rows: all of it; given: what `datasets` made it of.
    """
    builder = datasets.load_dataset_builder(name, **{key: given[key] for key in given.keys() - {"split", "streaming"}})
    columns = [column for column in TEXT_COLUMNS if column in (rows.features or ())]
    if columns and hasattr(builder.config, "columns"):
        # A stream's select_columns reads all of them first, and then lets them go.
        rows = datasets.load_dataset(name, **given, columns=columns)
    if rows.features is None:
        rows = rows._resolve_features()
    return fill_stream(rows, number_rows=False).select_columns(list(TEXT_COLUMNS))


def benchmark_card(name: str) -> Path | None:
    """The dataset card of a benchmark built here; `None` for any other name."""
    benchmark = name.replace("-", "_")
    return Path(__file__).with_name(benchmark) / "README.md" if benchmark in _BUILDERS else None


def _accepted() -> str:
    return (
        f"Accepted: {', '.join(_BUILDERS)}; a local folder with {', '.join(METADATA_NAMES)} or with Parquet files; "
        "or a dataset on the Hub, org/name"
    )


def _can_be_on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _select(dataset: datasets.DatasetDict, split: str | None, streaming: bool, name: str):
    if split is None:
        selected = dataset
    else:
        lengths = {part: rows.num_rows for part, rows in dataset.items()}
        try:
            parts = datasets.ReadInstruction.from_spec(str(split)).to_absolute(lengths)
        except (ValueError, AssertionError) as error:
            raise ValueError(f"{name} has the splits {list(lengths)}; cannot read {str(split)!r}: {error}") from error
        selected = datasets.concatenate_datasets(
            [dataset[part.splitname].select(range(part.from_, part.to)) for part in parts]
        )
    if not streaming:
        return selected
    if isinstance(selected, dict):
        return datasets.IterableDatasetDict({part: rows.to_iterable_dataset() for part, rows in selected.items()})
    return selected.to_iterable_dataset()
