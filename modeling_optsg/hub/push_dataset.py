"""Publish an exported dataset on the Hub."""

import os
from pathlib import Path

from dataset_scripts.export_manifest import exported_files

from .commits import LocalFiles, PushResult, push_files


def push_dataset(folder: str | os.PathLike, repo_id: str, private: bool = False) -> PushResult:
    """Upload the files of an export in one commit. Other files in the folder are not published.

    Args:
        folder: A folder that [`dataset_scripts.parquet_export.write_parquet`] wrote.
        repo_id: `org/name` of the dataset, created if necessary.
        private: Create the repository as private; an existing one must be private.

    Raises:
        FileNotFoundError: The folder holds no export.
        ValueError: The name is malformed, the folder names files that are not from an export, or there are more files
            than one commit may have.
        PublishingError: The Hub cannot be reached or refuses, or a local file changed during the upload.
    """
    return push_files(
        LocalFiles({name: Path(folder, name) for name in exported_files(folder)}),
        repo_id,
        repo_type="dataset",
        private=private,
        commit_message="Upload dataset",
        # Files of an earlier upload with other names would stay part of the dataset.
        delete_patterns=["*.parquet", "data/*"],
    )
