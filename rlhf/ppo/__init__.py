"""PPO on a language model: losses, rollouts, rewards, checkpoints and the training loop."""
