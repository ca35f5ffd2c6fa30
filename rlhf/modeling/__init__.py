"""Models: from scratch or loaded, policy, reward model, critic, adapters."""
