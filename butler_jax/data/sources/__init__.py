"""Where documents come from: text files, TFDS sets, documentation of Python, and generated tasks."""
