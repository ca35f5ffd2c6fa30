"""What runs after what: the pipeline, one flow per stage, and the command line."""
