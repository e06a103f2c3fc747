"""Load models and hold them by name, follow the models directory, and measure the best size of micro-batches."""
