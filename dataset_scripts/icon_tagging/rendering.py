"""Draws SVG icons as PNG images, in parallel, each only once."""

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import datasets
from PIL import Image
from tqdm.auto import tqdm

try:
    import resvg_py
except ImportError as error:
    raise ImportError("icon-tagging draws its images with resvg-py: pip install 'optsg[icons]'") from error

IMAGE_SIZE = 224
RENDERER = f"resvg_py-{resvg_py.__version__}"


def render_svg(svg: str, size: int = IMAGE_SIZE) -> bytes:
    """PNG (RGB) of an SVG, centred on a white square of `size` pixels; `currentColor` is black.

    Raises:
        ValueError: not an SVG that can be drawn.
    """
    # BaselineSpec fonts would make an image depend on the machine it is drawn on.
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as drawing:
        image = Image.new("RGB", (size, size), "white")
        image.paste(drawing.convert("RGB"), ((size - drawing.width) // 2, (size - drawing.height) // 2))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _render_file(job: tuple[str, str]) -> tuple[str, str | None]:
    """(svg path, folder) -> (png path, None), or (svg path, why it could not be drawn)."""
    svg_path, folder = job
    try:
        svg = Path(svg_path).read_bytes()
        # Named by what is drawn: a changed icon gets a new image, an unchanged one keeps its own.
        png_path = Path(folder, hashlib.sha256(svg).hexdigest()[:32] + ".png")
        if not png_path.exists():
            png = render_svg(svg.decode("utf-8"))
            unfinished = png_path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(png)
            os.replace(unfinished, png_path)
    except (ValueError, FileNotFoundError) as error:
        return svg_path, str(error)
    return str(png_path), None


def render_files(svgs: Sequence[Path], folder: Path, num_proc: int | None = None) -> tuple[list[Path | None], dict]:
    """Draws every SVG into `folder`, reusing the images an earlier run left there.

    Args:
        svgs: paths of the drawings.
        folder: where the images are kept; one sub-folder per renderer version and size.
        num_proc: number of processes; all cores if not given.
    Returns:
        a list parallel to `svgs` with each image's path, or `None` where the SVG could not be drawn; and a dict
        from the SVGs that could not be drawn to the reason.
    """
    folder = folder / f"{RENDERER}-{IMAGE_SIZE}"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(str(svg), str(folder)) for svg in svgs]
    # Processes, not threads: the renderer holds the interpreter lock while it draws.
    with ProcessPoolExecutor(num_proc or os.cpu_count()) as executor:
        drawn = executor.map(_render_file, jobs, chunksize=64)
        quiet = datasets.utils.are_progress_bars_disabled()
        results = list(tqdm(drawn, total=len(jobs), desc="Drawing icons", unit=" icons", disable=quiet))
    failed = {path: reason for path, reason in results if reason is not None}
    return [Path(path) if reason is None else None for path, reason in results], failed
