"""What the adapter needs of slime's module of this name, in our own words; see `utils.routing_replay`."""


class DataIterator:
    def __init__(self, rollout_data, micro_batch_indices):
        self.rollout_data = rollout_data
        self.micro_batch_indices = micro_batch_indices
        self.reset()

    def get_next(self, keys):
        picked = self.micro_batch_indices[self.offset]
        self.offset += 1
        return {key: [self.rollout_data[key][index] for index in picked] for key in keys}

    def reset(self):
        self.offset = 0
        return self
