"""What the adapter needs of slime's module of this name, in our own words; see `utils.routing_replay`."""

import pkgutil

import torch


def load_function(path):
    module, _, name = path.rpartition(".")
    return getattr(pkgutil.resolve_name(module), name)


def tensorize_rollout_data_for_training(rollout_data):
    for key in rollout_data:
        rollout_data[key] = [torch.as_tensor(value) for value in rollout_data[key]]


class RolloutManager:
    def _post_process_rewards(self, samples):
        if self.custom_reward_post_process_func is not None:
            return self.custom_reward_post_process_func(self.args, samples)
        rewards = [sample.reward for sample in samples]
        return rewards, rewards

    def _convert_samples_to_train_data(self, samples):
        if self.custom_convert_samples_to_train_data_func is not None:
            return self.custom_convert_samples_to_train_data_func(self.args, samples)
        raw, rewards = self._post_process_rewards(samples)
        data = {
            "tokens": [sample.tokens for sample in samples],
            "response_lengths": [sample.response_length for sample in samples],
            "loss_masks": [sample.loss_mask for sample in samples],
            "rewards": rewards,
            "raw_reward": raw,
        }
        if samples[0].rollout_routed_experts is not None:
            data["rollout_routed_experts"] = [sample.rollout_routed_experts for sample in samples]
        return data
