"""Collation that skips examples that cannot be read, and the record of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from accelerate.utils import gather_object


@dataclass
class CollatedBatch:
    """A batch of the readable examples among those that were asked for.

    Args:
        example_indices: `example_index` of each example of the batch.
        inputs: Output of the collator.
        unreadable: Reasons for the examples left out, by `id` or else by `example_index`.
        weight: 0 if the batch is a substitute for one without any readable example, else 1.
    """

    example_indices: list[int]
    inputs: dict
    unreadable: dict[int | str, str] = field(default_factory=dict)
    weight: float = 1.0


class SkippingCollator:
    """Collate examples with `example_index`, and skip those that the collator refuses.

    A batch without any readable example is replaced by the first readable one of all examples, with `weight` 0:
    other processes wait for a batch from this one. The substitute does not depend on earlier batches, so a resumed
    run uses the same one.

    Args:
        collator: An [`OPTSGDataCollator`].
        examples: All examples, to find a substitute in.
        max_tries: Maximum number of examples to try as a substitute.

    Raises:
        ValueError: No example of a batch is readable, and no substitute was found.
    """

    def __init__(
        self, collator: Callable[[Sequence[Mapping]], dict], examples: Iterable[Mapping], max_tries: int = 100
    ):
        self.collator, self.examples, self.max_tries = collator, examples, max_tries
        self.readable_example = self.substitute = None

    def __call__(self, examples: Sequence[Mapping]) -> CollatedBatch:
        """Return a batch of the readable examples."""
        readable, unreadable = list(examples), {}
        try:
            inputs = self.collator(readable)
        except (ValueError, OSError):
            readable, unreadable = self._try_each(examples)
            if not readable:
                return CollatedBatch([], self.collator([self._find_substitute(unreadable)]), unreadable, weight=0.0)
            inputs = self.collator(readable)
        self.readable_example = readable[0]
        return CollatedBatch([example["example_index"] for example in readable], inputs, unreadable)

    def _try_each(self, examples: Sequence[Mapping]) -> tuple[list[Mapping], dict[int | str, str]]:
        readable, unreadable = [], {}
        for example in examples:
            # Together with a readable one: features of another width are only wrong in comparison.
            others = readable[-1:] or ([self.readable_example] if self.readable_example is not None else [])
            try:
                self.collator([*others, example])
                readable.append(example)
            except (ValueError, OSError) as error:
                unreadable[example.get("id", example["example_index"])] = str(error)
        return readable, unreadable

    def _find_substitute(self, unreadable: Mapping[int | str, str]) -> Mapping:
        if self.substitute is not None:
            return self.substitute
        for example in islice(iter(self.examples), self.max_tries):
            example = {**example, "example_seed": 0}
            try:
                self.collator([example])
            except (ValueError, OSError):
                continue
            self.substitute = example
            return example
        raise ValueError(
            f"None of the {len(unreadable)} examples of a batch can be read, nor any other example that was tried: "
            f"{next(iter(unreadable.values()))}"
        ) from None


class UnreadableExamples:
    """Record of the examples that any process left out, up to a limit.

    Args:
        max_unreadable: Maximum number of examples. More of them point to a problem with the dataset.
        reasons: Reasons by example that are already known.
    """

    def __init__(self, max_unreadable: int, reasons: Mapping[str, str] | None = None):
        self.max_unreadable, self.reasons = max_unreadable, dict(reasons or {})

    def not_recorded(self, reasons: Mapping[int | str, str]) -> dict[str, str]:
        """Return those of this process's unreadable examples that are not recorded yet."""
        # Keys are strings because the record is saved as JSON.
        return {str(example): reason for example, reason in reasons.items() if str(example) not in self.reasons}

    def record(self, reasons: Mapping[str, str]) -> None:
        """Record the unreadable examples of all processes, which must all call this in the same step.

        Raises:
            ValueError: There are more than `max_unreadable` of them.
        """
        self.reasons |= {example: reason for own in gather_object([dict(reasons)]) for example, reason in own.items()}
        if len(self.reasons) > self.max_unreadable:
            shown = "; ".join(list(dict.fromkeys(self.reasons.values()))[:3])
            raise ValueError(
                f"{len(self.reasons)} training examples cannot be read, more than "
                f"max_unreadable={self.max_unreadable}: {shown}"
            )
