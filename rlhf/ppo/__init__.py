"""PPO: training loop, trainer, losses, models and checkpoints."""
