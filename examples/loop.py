"""Train with a loop of your own on every rank: scikit-learn's digits, a gradient tape, and an optimizer that all ranks share.

python examples/loop.py --master "local[2]"
"""

import argparse
import os
import sys

import keras
import numpy as np
import tensorflow as tf
from pyspark.sql import SparkSession
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from allreduce_spark import Communicator, DistributedOptimizer, broadcast, run, shard_dataset


def train(communicator: Communicator, x: np.ndarray, y: np.ndarray, epochs: int) -> list[np.ndarray]:
    """What each rank does. Shapes: x (rows, 64), y (rows,)."""
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128, activation="relu"), keras.layers.Dense(10)])
    broadcast(model, communicator)  # each rank has drawn weights of its own
    optimizer = DistributedOptimizer(keras.optimizers.Adam(2e-3), communicator)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    mine = shard_dataset(tf.data.Dataset.from_tensor_slices((x, y)), communicator)

    @tf.function
    def step(x_batch: tf.Tensor, y_batch: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = loss_of(y_batch, model(x_batch, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    for epoch in range(epochs):
        losses = [step(*batch) for batch in mine.shuffle(1000, seed=epoch).batch(32)]
        total = np.array([float(np.mean(losses))])
        communicator.allreduce(total)
        if communicator.rank == 0 and (epoch + 1) % 5 == 0:
            print(f"epoch {epoch + 1}: loss {total[0] / communicator.world_size:.4f}")  # in the driver's log
    return model.get_weights()


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a digit classifier with a loop of one's own on every rank.")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--master", help="where Spark runs, e.g. 'local[2]'; leave it out under spark-submit")
    args = parser.parse_args()

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's workers run this Python, unless told otherwise
    builder = SparkSession.builder.appName("loop")
    spark = (builder.master(args.master) if args.master else builder).getOrCreate()

    images, digits = load_digits(return_X_y=True)
    pixels = (images / 16).astype("float32")  # (rows, 64), 0 to 1
    x_train, x_test, y_train, y_test = train_test_split(pixels, digits, test_size=0.2, stratify=digits, random_state=0)

    of_all_ranks = run(train, x_train, y_train, args.epochs, num_ranks=args.num_ranks)

    hidden, hidden_bias, output, output_bias = of_all_ranks[0]  # those of the others are the same, to the bit
    logits = np.maximum(x_test @ hidden + hidden_bias, 0) @ output + output_bias
    accuracy = np.mean(np.argmax(logits, axis=1) == y_test)
    print(f"held-out accuracy {accuracy:.4f}")
    spark.stop()
    return 0 if accuracy >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
