"""Read texts and labelled texts from files, and the docstrings of Python's standard library."""
