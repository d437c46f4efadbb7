"""From prompts to a rollout: answers, scores, token rewards, advantages."""
