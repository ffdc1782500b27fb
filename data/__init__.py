"""TFDS dataset builders: ArrayRecord files, no TensorFlow. A folder per data set, with its card."""
