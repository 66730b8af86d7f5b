"""Trains the book reader of a model. Everything else in the model is frozen."""

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.optim.lr_scheduler import OneCycleLR
from tqdm.auto import tqdm

from modeling_optsg.book import BookCandidates, BookQueries, TagBook
from modeling_optsg.book.predictions import candidate_tensors
from modeling_optsg.book.votes import NO_EVIDENCE
from modeling_optsg.data.collator import OPTSGDataCollator
from modeling_optsg.generation_optsg import evaluation_mode
from modeling_optsg.modeling_optsg import OPTSGForTagGeneration
from modeling_optsg.processing_optsg import OPTSGProcessor

from .precision import is_bfloat16_fast

# In training, up to this ratio of the candidates of an example is hidden, so that the reader can read small books.
MAX_HIDDEN_RATIO = 0.5
LOOK_UP_BLOCK = 1024
WARMUP_RATIO = 0.1


def training_candidates(book: TagBook, queries: BookQueries, progress: bool = True) -> list[BookCandidates]:
    """Return the candidates of each example of a book, without the examples of its own group.

    Args:
        book: A book with fitted temperatures.
        queries: The examples of the book, in the same order.
        progress: Whether to show a progress bar.
    """
    ids, found = book.examples["id"][:], []
    with tqdm(total=len(ids), desc="Looking up", disable=not progress, leave=False) as bar:
        for start in range(0, len(ids), LOOK_UP_BLOCK):
            rows = range(start, min(start + LOOK_UP_BLOCK, len(ids)))
            for candidates in book.look_up(queries.select(rows), ids[rows.start : rows.stop]):
                # The neighbours of many examples take much memory.
                candidates.neighbours = []
                found.append(candidates)
            bar.update(len(rows))
    return found


def train_book_reader(
    model: OPTSGForTagGeneration,
    processor: OPTSGProcessor,
    book: TagBook,
    queries: BookQueries,
    examples: Sequence[Mapping],
    *,
    num_epochs: float = 2.0,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    with_evidence: bool = True,
    progress: bool = True,
) -> dict[str, float | list[float]]:
    """Give a model a new book reader and train it on the examples of a book.

    The candidates of an example come from other groups of the book, as those of a new example do.

    Args:
        model: A trained model with a tag classifier. Only its book reader is trained.
        processor: Its processor.
        book: A book with fitted temperatures.
        queries: Its examples, in the same order, from [`embed_examples`].
        examples: The same examples as [`OPTSGDataCollator`] reads them.
        num_epochs: Number of passes over the examples.
        batch_size: Examples per step.
        learning_rate: Maximum of a one-cycle schedule.
        seed: Seed of the order, of the initial weights and of dropout.
        with_evidence: Whether the reader sees the evidence of the candidates.
        progress: Whether to show a progress bar.

    Returns:
        `training_seconds`, `candidates` and `correct_candidates` per example, and `losses`, the mean loss of each
        epoch.

    Raises:
        ValueError: The lengths differ, or no example has a candidate.
        FloatingPointError: The loss is not finite.
    """
    if not len(book) == len(queries) == len(examples):
        raise ValueError(f"The book has {len(book)} examples, but there are {len(queries)} and {len(examples)}.")
    started = time.perf_counter()
    batches = _ReaderBatches(processor, examples, book, training_candidates(book, queries, progress))
    evidence = torch.from_numpy(np.concatenate([own.evidence for own in batches.candidates])).float()
    if not len(evidence):
        raise ValueError("No example of the book has a tag that an example of another group has.")
    rows = [row for row, own in enumerate(batches.candidates) if own.tags]
    steps_per_epoch = math.ceil(len(rows) / batch_size)
    # A one-cycle schedule needs three steps.
    num_steps = max(round(num_epochs * steps_per_epoch), 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.add_book_reader(len(NO_EVIDENCE))
        reader = model.book_reader
        reader.standardizer.fit_moments(evidence.to(model.device))
        if not with_evidence:
            # Standardised evidence is then 0.
            reader.standardizer.scale.fill_(torch.inf)
        optimizer = torch.optim.AdamW(reader.parameters(), learning_rate, weight_decay=0.01)
        # The warm-up needs two steps.
        warmup_ratio = max(WARMUP_RATIO, 2 / num_steps)
        schedule = OneCycleLR(optimizer, learning_rate, num_steps, pct_start=warmup_ratio)
        steps = _random_batches(rows, batch_size, num_steps, seed)
        losses = _train(model, batches, steps, optimizer, schedule, progress)
    by_epoch = [losses[start : start + steps_per_epoch] for start in range(0, num_steps, steps_per_epoch)]
    return {
        "training_seconds": round(time.perf_counter() - started, 1),
        "candidates": round(len(evidence) / len(book), 2),
        "correct_candidates": round(sum(map(sum, batches.is_correct)) / len(book), 2),
        "losses": [round(sum(epoch) / len(epoch), 4) for epoch in by_epoch],
    }


def _random_batches(rows: Sequence[int], batch_size: int, num_steps: int, seed: int) -> list[list[int]]:
    """Return the rows of each step. Every epoch has its own random order."""
    random, order, steps = np.random.default_rng(seed), [], []
    for _ in range(num_steps):
        order = order or random.permutation(rows).tolist()
        steps.append(order[:batch_size])
        order = order[batch_size:]
    return steps


def _train(
    model: OPTSGForTagGeneration,
    batches: "_ReaderBatches",
    steps: Sequence[Sequence[int]],
    optimizer: torch.optim.Optimizer,
    schedule: OneCycleLR,
    progress: bool,
) -> list[float]:
    """Train the reader of a model, and return the loss of each step."""
    reader, losses = model.book_reader, []
    with evaluation_mode(model), tqdm(steps, desc="Training the reader", disable=not progress) as bar:
        reader.train()
        for rows in bar:
            loss = _loss(model, *batches(rows))
            if not loss.isfinite():
                raise FloatingPointError(f"The loss of the book reader is {loss.item()} at step {len(losses) + 1}.")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    reader.eval().requires_grad_(False)
    return losses


class _ReaderBatches:
    """Makes batches: the inputs of the model and of the reader, and which candidates are correct."""

    def __init__(
        self,
        processor: OPTSGProcessor,
        examples: Sequence[Mapping],
        book: TagBook,
        candidates: Sequence[BookCandidates],
    ):
        self.processor, self.examples, self.candidates = processor, examples, candidates
        self.collate = OPTSGDataCollator(processor)
        wanted = (set(tags) for tags in book.examples["tags"])
        self.is_correct = [[tag in tags for tag in own.tags] for own, tags in zip(candidates, wanted, strict=True)]

    def __call__(self, rows: Sequence[int]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
        # The tags of an example are not an input.
        inputs = [{name: value for name, value in self.examples[row].items() if name != "tags"} for row in rows]
        reader_inputs = candidate_tensors([self.candidates[row] for row in rows], self.processor)
        is_correct = torch.zeros(reader_inputs["candidate_input_ids"].shape[:2], dtype=torch.bool)
        for index, row in enumerate(rows):
            is_correct[index, : len(self.is_correct[row])] = torch.tensor(self.is_correct[row])
        return self.collate(inputs), reader_inputs, is_correct


def _loss(
    model: OPTSGForTagGeneration,
    inputs: Mapping[str, torch.Tensor],
    reader_inputs: dict[str, torch.Tensor],
    is_correct: torch.Tensor,
) -> torch.Tensor:
    """Return the loss of the reader, with some candidates hidden."""
    device, pad = model.device, model.config.tag_pad_token_id
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    reader_inputs = {name: tensor.to(device) for name, tensor in reader_inputs.items()}
    hidden = _hidden(reader_inputs["candidate_input_ids"])
    input_ids = reader_inputs["candidate_input_ids"].masked_fill(hidden[..., None], pad)
    with torch.autocast(device.type, torch.bfloat16, enabled=is_bfloat16_fast(device)):
        with torch.no_grad():
            encoded = model.model(**inputs)
        memory = (encoded.order_prompts, encoded.memory, encoded.memory_mask)
        pointers = model.read_book(*memory, input_ids, reader_inputs["evidence"])
    return model.book_reader.loss(pointers, (input_ids != pad).any(dim=-1), is_correct.to(device))


def _hidden(input_ids: torch.Tensor) -> torch.Tensor:
    """Choose which candidates to hide, boolean `[batch, candidates]`. One of each example stays."""
    ratio = MAX_HIDDEN_RATIO * torch.rand(len(input_ids), 1, device=input_ids.device)
    hidden = torch.rand(input_ids.shape[:2], device=input_ids.device) < ratio
    hidden[:, 0] = False
    return hidden
