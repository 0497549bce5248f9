"""A Keras model as a thing: its bytes, files, copies, inputs and outputs; apart from training it."""
