"""What this Space takes from strangers at most. One place: the checks, the page and the API's answer read these."""

from dataclasses import asdict, dataclass


class Refused(ValueError):
    """A file or setting that is not taken; the message is written for who sent it."""


@dataclass(frozen=True)
class Limits:
    """
    Args:
        file_megabytes: of one file.
        upload_megabytes: of all files sent at once.
        image_megapixels: of an image and of a video's frame, read from the header before anything is decoded.
        video_seconds, video_frames: of a video, counted without decoding it.
        video_gigapixels: all frames of a video together: what decoding it may cost.
        read_seconds: until the reading of one file is given up.
        read_megabytes: memory that the reading of one file may take.
        files: of a folder.
        title_characters: of a title.
        request_kilobytes: of a request that is no upload.
        waiting: requests in the queue.
        at_once: requests being worked on.
        keep_minutes: until a file that was sent is deleted.
    """

    file_megabytes: int = 20
    upload_megabytes: int = 100
    image_megapixels: int = 40
    video_seconds: int = 120
    video_frames: int = 7200
    video_gigapixels: int = 8
    read_seconds: int = 30
    read_megabytes: int = 1500
    files: int = 100
    title_characters: int = 500
    request_kilobytes: int = 512
    waiting: int = 64
    at_once: int = 2
    keep_minutes: int = 30

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def checked_title(title, limits: Limits) -> str:
    """
    Raises:
        Refused: it is no text, or too long.
    """
    if title is None:
        return ""
    if not isinstance(title, str):
        raise Refused(f"The title is of type {type(title).__name__}; expected text.")
    if len(title) > limits.title_characters:
        raise Refused(f"The title has {len(title)} characters; at most {limits.title_characters} are taken.")
    return title.strip()
