"""A reward model over conversations: what annotate and evaluate share. After training, whose batches it uses."""
