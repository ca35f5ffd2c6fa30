"""A configuration proposed for given data, base model and machine, with a reason for each value."""
