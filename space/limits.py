"""The limits of this Space and the error for what exceeds them.

The checks, the page and the API all read their limits from here.
"""

from dataclasses import asdict, dataclass


class InputError(ValueError):
    """A file or a setting is not accepted; the message is shown to the visitor."""


@dataclass(frozen=True)
class Limits:
    """Limits for files and requests from the public.

    Args:
        file_megabytes: Maximum size of one file.
        upload_megabytes: Maximum size of all files of one upload together.
        image_megapixels: Maximum size of an image or a video frame. It is read from the header, before decoding.
        video_seconds: Maximum duration of a video.
        video_frames: Maximum number of frames of a video. They are counted without decoding.
        video_gigapixels: Maximum number of pixels in all frames of a video together, which bounds the decoding time.
        read_seconds: Maximum time to read one file.
        read_megabytes: Maximum additional memory to read one file.
        client_seconds: Maximum time to read the files of one client within `client_period`.
        client_period: Seconds after which the time of a client is free again.
        files: Maximum number of files that are tagged in one request.
        title_characters: Maximum length of a title.
        request_kilobytes: Maximum size of a request that is not an upload.
        request_seconds: Maximum time to receive a request that is not an upload.
        upload_seconds: Maximum time to receive an upload.
        queued_requests: Maximum number of requests in the queue.
        concurrent_requests: Number of requests that run at the same time.
        keep_minutes: Time after which an uploaded file is deleted.
    """

    file_megabytes: int = 20
    upload_megabytes: int = 100
    image_megapixels: int = 40
    video_seconds: int = 120
    video_frames: int = 7200
    video_gigapixels: int = 8
    read_seconds: int = 20
    read_megabytes: int = 1500
    client_seconds: int = 60
    client_period: int = 120
    files: int = 100
    title_characters: int = 500
    request_kilobytes: int = 512
    request_seconds: int = 30
    upload_seconds: int = 300
    queued_requests: int = 256
    concurrent_requests: int = 2
    keep_minutes: int = 30

    def as_dict(self) -> dict[str, int]:
        """Return the limits by name."""
        return asdict(self)


def clean_title(title: object, limits: Limits) -> str:
    """Check a title and strip the white space around it.

    Returns:
        The title, `""` if there is none.

    Raises:
        InputError: The title is not text or is too long.
    """
    if title is None:
        return ""
    if not isinstance(title, str):
        raise InputError(f"The title is of type {type(title).__name__}; expected text.")
    if len(title) > limits.title_characters:
        raise InputError(f"The title has {len(title)} characters; the limit is {limits.title_characters}.")
    return well_formed(title).strip()


def well_formed(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold, and neither a tokenizer nor UTF-8."""
    return text.encode("utf-8", "replace").decode()
