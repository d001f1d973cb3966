"""What the adapter of packed rows needs of miles' `backends.training_utils.replay_data`, in our own words.

Release 0.0.2 has no module of that name. Names, parameters and what they do are those of miles at 31f1ca9;
`scripts/prove_stack.py` runs the same tests with miles' own module.
"""

import torch

_state = None


def set_parallel_state(state):
    global _state
    _state = state


class DataIterator:
    def __init__(self, rollout_data, micro_batch_indices):
        self.rollout_data = rollout_data
        self.micro_batch_indices = micro_batch_indices
        self.offset = 0

    def get_next(self, keys):
        picked = self.micro_batch_indices[self.offset]
        self.offset += 1
        columns = {key: self.rollout_data.get(key) for key in keys}
        return {key: None if column is None else [column[index] for index in picked] for key, column in columns.items()}

    def reset(self):
        self.offset = 0
        return self


def _padded(data, multiple):
    return torch.cat([data, data.new_full((-len(data) % multiple, *data.shape[1:]), -1)])


def fill_replay_data(
    *,
    args,
    models,
    data_iterator,
    num_microbatches,
    rollout_data,
    data_key,
    replay_list,
    register_replay_list_func,
    if_sp_region=True,
    indices_are_token_positions=False,
):
    if data_key not in rollout_data:
        raise ValueError(f"{data_key} is required")
    assert args.qkv_format == "thd"
    data_iterator[0].reset()
    context, rank, tensor = _state.cp.size, _state.cp.rank, _state.tp.size
    for _ in range(sum(num_microbatches)):
        batch = data_iterator[0].get_next([data_key, "tokens", "max_seq_lens"])
        assert [one.shape[0] for one in batch[data_key]] == [len(each) - 1 for each in batch["tokens"]]
        whole = [_padded(one, len(one) + 1) for one in batch[data_key]]
        multiple = tensor * args.data_pad_size_multiplier
        if context > 1 and args.allgather_cp:
            mine = _padded(torch.cat(whole), multiple * context).chunk(context)[rank]
        else:
            if context > 1:
                parts = [_padded(each, 2 * context).chunk(2 * context) for each in whole]
                whole = [part for of_one in parts for part in (of_one[rank], of_one[2 * context - 1 - rank])]
            mine = _padded(torch.cat(whole), multiple)
        if args.sequence_parallel and if_sp_region:
            mine = mine.chunk(tensor)[_state.tp.rank]
        register_replay_list_func(replay_list, mine, models=models)
    del rollout_data[data_key]
    data_iterator[0].reset()
