"""Layout of the slots, their attention masks, and their embeddings."""

import torch

from modeling_optsg.tag_decoder import SlotRows, lay_out_slots

PAD, SEP = 0, 1


def test_slots_are_laid_end_to_end_in_prompt_order():
    torch.manual_seed(0)
    lengths = torch.tensor([2, 1, 4, 3])
    tokens = torch.randint(2, 9, (4, 5))
    assignment = torch.tensor([[2, -1, 0], [-1, -1, -1], [1, 3, -1], [3, 2, 0]])
    sequence = lay_out_slots(assignment, tokens, lengths, PAD, SEP)
    rows = []
    for example in assignment.tolist():
        row = []
        for slot, label in enumerate(example):
            tag = [] if label < 0 else tokens[label, : lengths[label]].tolist()
            for position, target in enumerate([*tag, SEP] if tag else [PAD]):
                row.append((slot, position, target, tag[position - 1] if position else None))
        rows.append(row)
    assert sequence.slot.shape == (4, max(map(len, rows)))
    for index, row in enumerate(rows):
        length = len(row)
        assert sequence.valid[index].tolist() == [True] * length + [False] * (sequence.slot.shape[1] - length)
        slots, positions, targets, inputs = zip(*row)
        assert sequence.slot[index, :length].tolist() == [*slots]
        assert sequence.position[index, :length].tolist() == [*positions]
        assert sequence.targets[index, :length].tolist() == [*targets]
        assert sequence.targets[index, length:].eq(-100).all()
        read = sequence.input_ids[index, :length].tolist()
        assert [token for token, expected in zip(read, inputs) if expected] == [token for token in inputs if token]


def test_sequential_mask_is_causal_and_parallel_mask_is_per_slot():
    assignment = torch.tensor([[0, -1, 1], [1, 0, 1]])
    sequence = lay_out_slots(assignment, torch.full((2, 2), 5), torch.tensor([1, 2]), PAD, SEP)
    for parallel in (torch.tensor([True, False]), torch.tensor([False, True])):
        mask = sequence.attention_mask(parallel)[:, 0]
        for example in range(2):
            slots = sequence.slot[example].tolist()
            for row, row_slot in enumerate(slots):
                for column, column_slot in enumerate(slots):
                    visible = column <= row and (row_slot == column_slot or not parallel[example])
                    assert mask[example, row, column] == visible


def test_the_token_at_position_0_is_not_read(make_model):
    model = make_model()
    prompts, positions = torch.randn(3, 16), torch.zeros(3, dtype=torch.long)
    embedded = model.tag_decoder.embed(prompts, positions, torch.tensor([PAD, SEP, 9]))
    expected = prompts + model.config.hidden_size**0.5 * model.tag_decoder.positions.weight[0]
    torch.testing.assert_close(embedded, expected)


def test_slot_rows_group_slots_by_example_and_back():
    examples = torch.tensor([0, 0, 0, 2, 3, 3])
    rows = SlotRows(examples, batch=5)
    hidden_states = torch.arange(12.0).view(6, 2) + 1
    grid = rows.by_example(hidden_states)
    expected = torch.zeros(5, 3, 2)
    for index, (example, rank) in enumerate([(0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (3, 1)]):
        expected[example, rank] = hidden_states[index]
    assert torch.equal(grid, expected)
    assert torch.equal(rows.by_slot(grid), hidden_states)
