"""Renders SVG icons as PNG images, in parallel, each only once."""

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
    raise ImportError("icon-tagging renders its images with resvg-py: pip install 'optsg[icons]'") from error

IMAGE_SIZE = 224
RENDERER = f"resvg_py-{resvg_py.__version__}"


def render_svg(svg: str, size: int = IMAGE_SIZE) -> bytes:
    """Render an SVG in the centre of a white square, with black as `currentColor`.

    Args:
        svg: The SVG.
        size: Width and height in pixels.

    Returns:
        An RGB image as the bytes of a PNG file.

    Raises:
        ValueError: The SVG cannot be rendered.
    """
    # With fonts of the machine, the image would depend on the machine.
    png = resvg_py.svg_to_bytes(svg_string=svg, background="white", width=size, height=size, skip_system_fonts=True)
    with Image.open(io.BytesIO(png)) as drawing:
        image = Image.new("RGB", (size, size), "white")
        image.paste(drawing.convert("RGB"), ((size - drawing.width) // 2, (size - drawing.height) // 2))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def svg_bytes(svg: Path | str) -> bytes:
    """Return an SVG, given the path of its file or the SVG itself."""
    return svg.read_bytes() if isinstance(svg, Path) else svg.encode()


def _render_file(job: tuple[Path | str, str]) -> tuple[str, str | None]:
    """Render `(svg, folder)`; returns `(png path, None)`, or `(svg path, reason)` if that fails."""
    svg_or_path, folder = job
    try:
        svg = svg_bytes(svg_or_path)
        # Named by its content, so that only changed icons are rendered again.
        png_path = Path(folder, hashlib.sha256(svg).hexdigest()[:32] + ".png")
        if not png_path.exists():
            png = render_svg(svg.decode("utf-8"))
            unfinished = png_path.with_suffix(f".{os.getpid()}")
            unfinished.write_bytes(png)
            os.replace(unfinished, png_path)
    except (ValueError, FileNotFoundError) as error:
        return str(svg_or_path), str(error)
    return str(png_path), None


def render_files(
    svgs: Sequence[Path | str], folder: Path, num_proc: int | None = None
) -> tuple[list[Path | None], dict[str, str]]:
    """Render every SVG into `folder`, except those that an earlier call has rendered.

    Args:
        svgs: The drawings: paths of SVG files, or SVGs.
        folder: Folder of the images. Each version of the renderer and each size has its own sub-folder.
        num_proc: Number of processes; all cores by default.

    Returns:
        The path of each image, `None` where rendering failed; and the reasons of failures by the path of the SVG or by
        the SVG.
    """
    folder = folder / f"{RENDERER}-{IMAGE_SIZE}"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(svg, str(folder)) for svg in svgs]
    # Processes, because the renderer holds the interpreter lock.
    with ProcessPoolExecutor(num_proc or os.cpu_count()) as executor:
        rendered = executor.map(_render_file, jobs, chunksize=64)
        quiet = datasets.utils.are_progress_bars_disabled()
        results = list(tqdm(rendered, total=len(jobs), desc="Rendering icons", unit=" icons", disable=quiet))
    failed = {path: reason for path, reason in results if reason is not None}
    return [Path(path) if reason is None else None for path, reason in results], failed
