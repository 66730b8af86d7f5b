"""Reads frame features of one example from NumPy, PyTorch and HDF5 files."""

import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FEATURE_SUFFIXES = (".npy", ".npz", ".pt", ".h5")
WIDTH_SAMPLE = 50


def read_frame_features(path: Path) -> np.ndarray:
    """Read frame features `[frames, width]` as float32; the first array of an archive.

    Raises:
        ValueError: The array has another number of dimensions, no frame, or values that are not finite in 16 bits.
        ModuleNotFoundError: An HDF5 file needs h5py.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        features = np.load(path, allow_pickle=False)
    elif suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            features = archive[archive.files[0]] if archive.files else np.zeros(0)
    elif suffix == ".pt":
        features = _read_tensor(path)
    else:
        features = _read_hdf5(path)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"features have the shape {features.shape}; expected [frames, width]")
    features = features.astype(np.float32)
    # The feature cache of a training run stores 16 bits.
    if not (np.abs(features) <= np.finfo(np.float16).max).all():
        raise ValueError("features contain NaN or inf, or values beyond 65,504")
    return features


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


def _read_tensor(path: Path) -> np.ndarray:
    # Importing torch takes seconds, and most feature files do not need it.
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise ValueError(f"not a tensor that is safe to load: {error}") from None
    return loaded.detach().float().numpy() if isinstance(loaded, torch.Tensor) else np.zeros(0)


def _read_hdf5(path: Path) -> np.ndarray:
    try:
        import h5py
    except ImportError as error:
        raise ModuleNotFoundError(f"{path} needs h5py: pip install 'optsg[h5]'") from error

    with h5py.File(path) as archive:
        found = next((entry for entry in archive.values() if isinstance(entry, h5py.Dataset)), None)
        return np.zeros(0) if found is None else found[()]
