"""From a rollout to optimizer steps: minibatches, losses, which gradients count."""
