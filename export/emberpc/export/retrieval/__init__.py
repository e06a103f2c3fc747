"""Fine-tuning an embedding model for search: its data, hard negatives, the training, and what it is worth."""
