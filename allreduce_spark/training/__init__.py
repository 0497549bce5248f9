"""What a rank does with Keras and TensorFlow. The only room that imports them."""
