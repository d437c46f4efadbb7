"""The models of PPO: policy and value, reference, rewards, adapters."""
