"""Makes videos whose frames show their own number."""

import av
import numpy as np


def numbered_frame(number):
    """Returns a frame that shows its number as seven black or white bars, which any codec keeps."""
    bars = [255 * (number >> bit & 1) for bit in range(7)]
    return np.repeat(np.repeat(np.array([[bars]], dtype=np.uint8).reshape(1, 7, 1), 16, 1), 64, 0).repeat(3, 2)


def number_of(frame):
    grey = np.asarray(frame.convert("L"), dtype=int)
    return sum((grey[32, 16 * bit + 8] > 127) << bit for bit in range(7))


def write_video(path, num_frames, codec="libx264", rotation=0, container_options=None, **options):
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 112, 64, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for number in range(num_frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered_frame(number), format="rgb24")))
        container.mux(stream.encode())
    return path
