"""Language models, reward models and critics, their adapters and forward passes."""
