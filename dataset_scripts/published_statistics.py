"""Published statistics of the paper's supplement (Tables 1 to 3), for comparison with counts."""

from collections.abc import Mapping

# Tables 1 and 2, with the names of `tag_statistics`. Numbers of examples are rounded as in the supplement. If a table
# differs from its section, this is the number of the section, and `DISCREPANCIES` has both numbers.
PUBLISHED = {
    "create_tagging": {
        "train_examples": 162_000,
        "test_examples": 5_000,
        "training_tags": 17573,
        "test_tags": 3686,
        "union": 18464,
        "evaluated_tags": 2795,
        "common_tags": 705,
        "rare_tags": 2090,
    },
    "pexel_tagging": {
        "train_examples": 162_000,
        "test_examples": 5_000,
        "training_tags": 27752,
        "test_tags": 6003,
        "union": 28094,
        "evaluated_tags": 5669,
        "common_tags": 1627,
        "rare_tags": 4042,
    },
}

# Contradictions within the supplement.
DISCREPANCIES = {
    "create_tagging": ("Table 1 has 210k training videos, section 1.1 has 162k",),
    "pexel_tagging": ("Table 2 has an intersection of 5,660, section 1.2 has 5,669, which is common + rare",),
}

# Table 3: dataset, type of data, number of videos or images, number of tags or labels, domain.
COMPARED_DATASETS = (
    ("CREATE-3M", "Video Tag.", "3M", 57297, "Open"),
    ("CREATE-210k", "Video Tag.", "215k", 18464, "Open"),
    ("Pexel", "Image Tag.", "167k", 28094, "Open"),
    ("THUMOS14", "Video MLC.", "413", 20, "Action"),
    ("ActivityNet1.3", "Video MLC.", "15k", 200, "Action"),
    ("MS-COCO", "Image MLC.", "122k", 80, "Object"),
    ("NUS-WIDE", "Image MLC.", "210k", 81, "Object"),
    ("WIDER Attribute", "Image MLC.", "14k", 14, "Human att."),
    ("PA-100K", "Image MLC.", "100k", 26, "Human att."),
)


def check_identities(statistics: Mapping[str, int | float]) -> list[tuple[str, bool]]:
    """Check two identities that must hold for consistent statistics.

    Args:
        statistics: Counted or published statistics of a benchmark with the splits train and test.

    Returns:
        A description of each identity with its numbers, and whether it holds.
    """
    union = statistics["training_tags"] + statistics["test_tags"] - statistics["evaluated_tags"]
    evaluated = statistics["common_tags"] + statistics["rare_tags"]
    return [
        (f"train + test - intersection = {union:,}, union {statistics['union']:,}", union == statistics["union"]),
        (
            f"common + rare = {evaluated:,}, intersection {statistics['evaluated_tags']:,}",
            evaluated == statistics["evaluated_tags"],
        ),
    ]
