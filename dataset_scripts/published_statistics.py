"""What the supplement says of the benchmarks (Tables 1 to 3), for comparison with what is counted."""

# Benchmark -> the metrics of Tables 1 and 2 by the names of `tag_statistics`, examples rounded as there; where a table
# and its section differ, those of the section, and a note below.
PUBLISHED = {
    "create_tagging": {
        "train_examples": 162_000,
        "test_examples": 5_000,
        "label_vocabulary": 17573,
        "test_tags": 3686,
        "union": 18464,
        "evaluated_tags": 2795,
        "common_tags": 705,
        "rare_tags": 2090,
    },
    "pexel_tagging": {
        "train_examples": 162_000,
        "test_examples": 5_000,
        "label_vocabulary": 27752,
        "test_tags": 6003,
        "union": 28094,
        "evaluated_tags": 5669,
        "common_tags": 1627,
        "rare_tags": 4042,
    },
}

# What the supplement says in two ways.
NOTES = {
    "create_tagging": ("Table 1 has 210k training videos, section 1.1 162k",),
    "pexel_tagging": ("Table 2 has an intersection of 5,660, section 1.2 one of 5,669, which is common + rare",),
}

# Table 3: dataset, data type, videos or images, tags or labels, domain.
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


def identities(metrics: dict) -> list[tuple[str, bool]]:
    """The two identities of such a table, and whether each holds."""
    union = metrics["label_vocabulary"] + metrics["test_tags"] - metrics["evaluated_tags"]
    parts = metrics["common_tags"] + metrics["rare_tags"]
    return [
        (f"train + test - intersection = {union:,}, union {metrics['union']:,}", union == metrics["union"]),
        (f"common + rare = {parts:,}, intersection {metrics['evaluated_tags']:,}", parts == metrics["evaluated_tags"]),
    ]
