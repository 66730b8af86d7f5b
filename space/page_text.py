"""The longer texts of the page, in Markdown."""

INTRODUCTION = """# Tag images and videos
Upload an image or a video and give it a title. The model `{model}` predicts its tags, each with a probability. Below
them, the page shows which tags each *order prompt* proposes and where it looks. The method is Order-Prompted Tag
Sequence Generation (OP-TSG, ICCV 2023)."""
# By the last part of a model's name: which images it knows.
KNOWN_IMAGES = {"optsg-icon-small": "icons and simple drawings with a short English title"}
SCOPE = """**This model knows {known_images}.** It learned its tags from icons on a white background, not
from photographs. Without a title its tags are often wrong, above all for photographs."""
ATTENTION = """Each card shows one order prompt, the tags it proposes for its slot, and the slot's own probabilities. A
tag with a mark is also in the list above, where its probability takes the tag classifier into account.

**The heat shows attention**: how much the prompt looks at each image patch and each word of the title, averaged over
layers and heads. It shows where the prompt looks, not why it chooses a tag: the encoder mixes patches and words before
the prompt sees them. The strongest colour marks the highest weight of that card, even if the weight is small. The
frames are shown as the model sees them. `[CLS]` and `[SEP]` are the start and the end of the title."""
API_AND_LIMITS = """### Call the Space from a program
```python
from gradio_client import Client, handle_file

client = Client("http://127.0.0.1:7860")  # or the name of the Space on the Hub
client.predict(handle_file("photo.jpg"), title="a harbour", api_name="/tag")
client.predict([handle_file("a.png"), handle_file("b.mp4")], api_name="/tag_many")
client.predict(api_name="/limits")
```
- `/tag` tags one file. Arguments: `file`, `title=""`, `decoding="parallel"` or `"sequential"`, `threshold=None` (the
  fitted threshold; the five most probable tags for a photograph without a title), `attention=False`. It returns the
  tags with their probability, mark, number of training examples and slot, and the tags that each slot proposes. With
  `attention=True` it also returns the attention weights, as `[frames][rows][columns]` and by word.
- `/tag_many` tags several files. Arguments: `files`, `decoding`, `threshold`, `titles_from_names=True`. It returns one
  row per file, and all rows as CSV.
- `/limits` returns the limits below and the fitted thresholds.

### Limits
| | limit |
|---|---|
| size of a file | {file_megabytes} MB |
| size of an upload | {upload_megabytes} MB, {files} files |
| pixels of an image or a frame | {image_megapixels} million |
| length of a video | {video_seconds} seconds, {video_frames} frames, {video_gigapixels} billion pixels in total |
| reading a file | {read_seconds} seconds, {read_megabytes} MB of memory |
| reading all files of one visitor | {client_seconds} seconds within {client_period} seconds |
| length of a title | {title_characters} characters |

Uploaded files are deleted after {keep_minutes} minutes and used only to predict tags. The Space reads only uploaded
files and downloads none from addresses."""


def known_images(model_name: str) -> str:
    """Return which images a model knows, `""` for a model that this Space does not ship."""
    return KNOWN_IMAGES.get(model_name.rpartition("/")[2], "")
