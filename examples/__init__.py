"""Examples. Run them from the root of the checkout, for example `python -m examples.stdlib_demo`."""
