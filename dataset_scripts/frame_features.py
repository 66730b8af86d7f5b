"""Reads frame features of one example from NumPy, PyTorch and HDF5 files."""

import math
import pickle
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

FEATURE_SUFFIXES = (".npy", ".npz", ".pt", ".h5")
WIDTH_SAMPLE = 50
# Hours of video, in 200 MB of memory.
MAX_VALUES = 50_000_000
MAX_TENSOR_BYTES = 8 * MAX_VALUES


def read_frame_features(path: Path) -> np.ndarray:
    """Read frame features `[frames, width]` as float32; the first array of an archive.

    The header is checked before the values are read, so a small file cannot fill the memory.

    Raises:
        ValueError: The array has another number of dimensions, no frame, more than `MAX_VALUES` values, or values that
            are not finite numbers in 16 bits.
        ModuleNotFoundError: An HDF5 file needs h5py.
    """
    readers = {".npy": _read_npy, ".npz": _read_npz, ".pt": _read_tensor}
    features = readers.get(path.suffix.lower(), _read_hdf5)(path).astype(np.float32)
    # The feature cache of a training run stores 16 bits.
    if not (np.abs(features) <= np.finfo(np.float16).max).all():
        raise ValueError("features contain NaN or inf, or values beyond 65,504")
    return features


def _check(shape: Sequence[int], dtype: object) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"features have the shape {tuple(shape)}; expected [frames, width]")
    if math.prod(shape) > MAX_VALUES:
        raise ValueError(f"features have the shape {tuple(shape)}, more than {MAX_VALUES:,} values; sample the frames")
    if getattr(dtype, "kind", "f") not in "fiu":
        raise ValueError(f"features are of type {dtype}; expected numbers")


def usual_width(paths: Sequence[Path]) -> int | None:
    """Return the most frequent width in a sample of feature files; `None` if none of them can be read."""
    widths: Counter[int] = Counter()
    for path in paths[:: max(1, len(paths) // WIDTH_SAMPLE)]:
        try:
            widths[read_frame_features(path).shape[1]] += 1
        except ImportError:
            raise
        except Exception:  # Each format has its own errors for damaged files.
            continue
    return widths.most_common(1)[0][0] if widths else None


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        _check_npy_header(file)
    return np.load(path, allow_pickle=False)


def _read_npz(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as archive:
        if not archive.files:
            raise ValueError("the archive is empty; expected an array [frames, width]")
        # NumPy leaves out the suffix of the members' names.
        with archive.zip.open(archive.zip.namelist()[0]) as file:
            _check_npy_header(file)
        return archive[archive.files[0]]


def _check_npy_header(file: BinaryIO) -> None:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    _check(shape, dtype)


def _read_tensor(path: Path) -> np.ndarray:
    # Importing torch takes seconds, and most feature files do not need it.
    import torch

    size = path.stat().st_size
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
    if size > MAX_TENSOR_BYTES:
        raise ValueError(f"the file holds {size:,} bytes, more than the limit {MAX_TENSOR_BYTES:,}; sample the frames")
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"not a tensor that is safe to load: {error}") from None
    if not isinstance(loaded, torch.Tensor):
        raise ValueError(f"the file holds a {type(loaded).__name__}; expected a tensor [frames, width]")
    # A tensor may repeat a few stored values without end.
    _check(loaded.shape, None)
    return loaded.detach().float().numpy()


def _read_hdf5(path: Path) -> np.ndarray:
    try:
        import h5py
    except ImportError as error:
        raise ModuleNotFoundError(f"{path} needs h5py: pip install 'optsg[h5]'") from error

    with h5py.File(path) as archive:
        found = next((entry for entry in archive.values() if isinstance(entry, h5py.Dataset)), None)
        if found is None:
            raise ValueError("the file has no array; expected one [frames, width]")
        _check(found.shape, found.dtype)
        # Chunks are decompressed as a whole, and may be larger than the array.
        _check(found.chunks or found.shape, found.dtype)
        return found[()]
