"""Sources of documents: text files, TFDS sets, the documentation of Python, and generated tasks."""
