"""Tags the files of `optsg tag` with an exported model."""

import numpy as np

from ..file_inputs import image_input, is_seen_as_video
from ..file_tagger import FileTagger, FileTags, ReadFile, TagSettings, num_cores
from ..media_files import MediaFile
from ..sidecars.reconciliation import tag_key
from .tagger import OnnxTagger


class OnnxFileTagger(FileTagger):
    """Loads an exported model and tags images with it.

    Args:
        folder: Folder from `optsg export-onnx`.
        settings: Settings of the generation. An exported model has no books, vocabularies and videos, and decodes in
            parallel.
        num_threads: Number of threads for the model, and of threads that read files. Default: one for each core, but
            for reading at most `MAX_READERS`.

    Raises:
        Exception: The folder is damaged. The libraries raise exceptions of many types.
    """

    def __init__(self, folder: str, settings: TagSettings, num_threads: int | None = None):
        super().__init__(settings, num_threads, num_threads or num_cores())
        # All batches share the threads that help the one that calls onnxruntime.
        helping_threads = self.threads_per_batch * self.num_batches - self.num_batches
        self.tagger = OnnxTagger.from_pretrained(folder, 1 + helping_threads)
        self.threshold, self.max_tags = settings.threshold, settings.max_tags
        # Raise any error of the model before a file is tagged.
        pixels = self.tagger.read_image(np.full((32, 32, 3), 255, np.uint8), "a blank image")
        self._generate([ReadFile(MediaFile("", None, False), pixels[None], "title", None)])

    def _read_pixels(self, file: MediaFile) -> np.ndarray:
        if is_seen_as_video(file):
            raise ValueError(
                f"{file.path} is a video, a GIF or an animated image, which an exported model does not tag; use "
                "--model CHECKPOINT"
            )
        return self.tagger.read_image(image_input(file.path), "the image")[None]

    def _generate(self, batch: list[ReadFile]) -> list[FileTags]:
        # A blank title is a missing title.
        titles = [read.title if (read.title or "").strip() else None for read in batch]
        inputs = self.tagger.prepare([read.pixels[0] for read in batch], titles)
        ranked, limits = self.tagger.rank(inputs, self.max_tags, self.threshold)
        results = []
        for candidates, limit, read in zip(ranked, limits, batch, strict=True):
            # Limits are applied after the exclusion, so that excluded tags do not count.
            decoded = self.tagger.decode(candidates if self.excluded else candidates[:limit], return_sources=True)
            kept = [tag for tag in decoded if tag_key(tag["label"]) not in self.excluded][:limit]
            tags = [{"tag": tag["label"], "score": tag["score"], "novel": tag["novel"]} for tag in kept]
            sources = [{"source": tag["source"], "neighbours": []} for tag in kept]
            results.append(FileTags(tags, [], sources, read.title, read.embedded))
        return results
