"""Documents to train and judge on: TFDS builders without TensorFlow, and the endless co-reference task."""
