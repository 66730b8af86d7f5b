"""Batches in a training loop: with the examples they are of, and without those that cannot be read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from accelerate.utils import gather_object


@dataclass
class CollatedExamples:
    """
    Args:
        examples: index of each example of the batch.
        batch: what the collator made of them.
        unreadable: examples that were left out, by their `id` or else their index, and why.
        weight: 0 where the batch stands in for one of which nothing could be read.
    """

    examples: list[int]
    batch: dict
    unreadable: dict[int | str, str] = field(default_factory=dict)
    weight: float = 1.0


class CollateReadable:
    """Collates examples with `example_index`; those that the collator refuses are left out. A batch that loses all of them
    is made of the first of all examples that can be read, and its `weight` is 0: other processes wait for this one's
    part, and what stands in must not depend on what came before.

    Args:
        collator: an [`OPTSGDataCollator`].
        examples: all of them.
        max_tries: at most so many are looked at for one that can be read.

    Raises:
        ValueError: none of a batch's examples can be read, and none of those looked at.
    """

    def __init__(
        self, collator: Callable[[Sequence[Mapping]], dict], examples: Iterable[Mapping], max_tries: int = 100
    ):
        self.collator, self.examples, self.max_tries = collator, examples, max_tries
        # An example that is known to be good, and the one that stands in.
        self.company = self.stand_in = None

    def __call__(self, examples: Sequence[Mapping]) -> CollatedExamples:
        readable, unreadable = list(examples), {}
        try:
            batch = self.collator(readable)
        except (ValueError, OSError):
            readable = []
            for example in examples:
                # Beside one that is known to be good: features of another width are wrong only in company.
                company = readable[-1:] or ([self.company] if self.company is not None else [])
                try:
                    self.collator([*company, example])
                    readable.append(example)
                except (ValueError, OSError) as error:
                    unreadable[example.get("id", example["example_index"])] = str(error)
            if not readable:
                if self.stand_in is None and not self._find_stand_in():
                    reason = next(iter(unreadable.values()))
                    raise ValueError(
                        f"None of the {len(examples)} examples of a batch can be read, nor others that were tried: {reason}"
                    ) from None
                return CollatedExamples([], self.collator([self.stand_in]), unreadable, weight=0.0)
            batch = self.collator(readable)
        self.company = readable[0]
        return CollatedExamples([example["example_index"] for example in readable], batch, unreadable)

    def _find_stand_in(self) -> bool:
        for example in islice(iter(self.examples), self.max_tries):
            example = {**example, "example_seed": 0}
            try:
                self.collator([example])
            except (ValueError, OSError):
                continue
            self.stand_in = example
            return True
        return False


class Unreadable:
    """Examples that were left out in any process, each once, up to a limit.

    Args:
        most: so many examples may be; what is wrong with more is wrong with the data.
        reasons: why, by example, of those known already.
    """

    def __init__(self, most: int, reasons: Mapping[str, str] | None = None):
        self.most, self.reasons = most, dict(reasons or {})

    def new(self, reasons: Mapping) -> dict[str, str]:
        """Those of this process's examples that are not known yet."""
        # As text, for they are kept as the keys of JSON.
        return {str(example): reason for example, reason in reasons.items() if str(example) not in self.reasons}

    def note(self, reasons: Mapping[str, str]) -> None:
        """Takes up what any process has found. All processes call it in the same step.

        Raises:
            ValueError: there are too many of them.
        """
        self.reasons |= {example: reason for own in gather_object([dict(reasons)]) for example, reason in own.items()}
        if len(self.reasons) > self.most:
            shown = "; ".join(list(dict.fromkeys(self.reasons.values()))[:3])
            raise ValueError(
                f"{len(self.reasons)} training examples could not be read, more than max_unreadable={self.most}, such "
                f"as: {shown}"
            )
