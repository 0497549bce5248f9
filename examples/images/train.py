"""Tell classes of pictures apart: a folder of images, prepared and trained on by Spark, judged on images it has not seen.

python examples/images/train.py                                     made-up pictures, on this machine
python examples/images/train.py --images 101_ObjectCategories --classes wild_cat dalmatian
spark-submit --master spark://HOST:7077 examples/images/train.py --images hdfs:///101_ObjectCategories --num-ranks 4

The folder has one sub-folder for each class, as Caltech-101 has; all executors must be able to read it. Into the output
folder go the curves and the confusion matrix as PNG files, and the trained model. Spark itself passes over empty files.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import charts
import keras
import numpy as np
import steps
import synthetic
from pyspark.errors import AnalysisException
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F

from allreduce_spark import SparkModel

IMAGE_FILES = "*.{jpg,jpeg,png,bmp,gif,tif,tiff,webp,JPG,JPEG,PNG,BMP,GIF,TIF,TIFF,WEBP}"
SUBSETS = ("train", "validation", "test")
VALIDATION_SHARE, TEST_SHARE = 0.1, 0.2  # of the images of each class
COPIES = 3  # changed copies of each training image, beside itself


def find_images(spark: SparkSession, folder: str, classes: list[str] | None, seed: int) -> DataFrame:
    """One row for each image file: name ("cat/0001.jpg"), class, subset (train, validation or test) and content."""
    reader = spark.read.format("binaryFile").option("recursiveFileLookup", True).option("pathGlobFilter", IMAGE_FILES)
    try:
        files = reader.load(folder)
    except AnalysisException as error:
        raise SystemExit(f"--images {folder}: this folder cannot be read. Spark says: {error}") from error
    name = F.regexp_extract("path", "[^/]+/[^/]+$", 0)
    files = files.withColumn("name", name).withColumn("class", F.split("name", "/")[0])
    if classes:
        files = files.where(F.col("class").isin(classes))
    # By name and seed alone: the same images are the test in every run, wherever the folder lies.
    by_chance = Window.partitionBy("class").orderBy(F.xxhash64(F.lit(seed), "name"), "path")
    rank = F.percent_rank().over(by_chance)
    subset = (
        F.when(rank < TEST_SHARE, "test").when(rank < TEST_SHARE + VALIDATION_SHARE, "validation").otherwise("train")
    )
    divided = files.select("path", subset.alias("subset"))  # without the contents, which are not worth sorting
    return files.join(F.broadcast(divided), "path").select("name", "class", "subset", "content")


def read_images(files: DataFrame) -> DataFrame:
    """One row for each image that can be read: name, class, subset and features. The others are named and left out."""
    read = files.mapInArrow(steps.read_batches, steps.READ_COLUMNS).cache()  # else each use would decode them again
    unreadable = read.where("problem IS NOT NULL")
    print(f"{read.count()} image files, of which {unreadable.count()} cannot be read")
    for row in unreadable.limit(20).collect():
        print(f"  left out: {row['name']}: {row.problem}")
    return read.where("problem IS NULL")


def classes_of(rows: DataFrame, wanted: list[str] | None) -> list[str]:
    """The names of the classes in the order of their labels; shown with their numbers of images, which must be enough."""
    counts = {(row["class"], row.subset): row["count"] for row in rows.groupBy("class", "subset").count().collect()}
    classes = sorted({name for name, _ in counts})
    for name in classes:
        print(f"  {name}:", ", ".join(f"{counts.get((name, subset), 0)} {subset}" for subset in SUBSETS))
    if not classes:
        raise SystemExit("No image can be read: --images must name a folder with one sub-folder of images per class.")
    if missing := set(wanted or ()).difference(classes):
        raise SystemExit(f"--classes names {sorted(missing)}, but there are only images of {classes}.")
    if len(classes) < 2:
        raise SystemExit(f"All images are of one class, {classes[0]!r}: there must be two sub-folders or more.")
    empty = [subset for subset in SUBSETS if not any((name, subset) in counts for name in classes)]
    if empty:
        raise SystemExit(f"Too few images: none is left for {empty[0]}. Ten or more per class are enough.")
    return classes


def build_model(num_classes: int) -> keras.Model:
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((steps.SIDE * steps.SIDE,)),
            layers.LayerNormalization(center=False, scale=False),  # each picture: how it was exposed says nothing
            layers.Dense(256, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(64, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(num_classes, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(3e-4), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train an image classifier on Spark and print its held-out accuracy.")
    parser.add_argument("--images", metavar="FOLDER", help="one sub-folder per class; without it pictures are made up")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="only these sub-folders")
    parser.add_argument("--output", metavar="FOLDER", type=Path, default=Path("image-results"))
    parser.add_argument("--master", help="where Spark runs, e.g. 'local[2]'; leave it out under spark-submit")
    parser.add_argument("--num-ranks", type=int, default=2, help="processes that train together")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="rows per rank per step")
    parser.add_argument("--seed", type=int, default=0, help="of the division, the changed copies and the training")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    images = args.images
    if images is None:
        images = str(args.output / "made-up")
        synthetic.draw_folder(Path(images), per_class=150, seed=args.seed)
        print(f"No --images given: training on made-up pictures of crosses and rings, drawn into {images}.")

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # Spark's workers run this Python, unless told otherwise
    builder = SparkSession.builder.appName("images")
    with (builder.master(args.master) if args.master else builder).getOrCreate() as spark:
        spark.sparkContext.addPyFile(str(Path(steps.__file__)))  # the executors run what is in it
        spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 64)  # images are large rows

        rows = read_images(find_images(spark, images, args.classes, args.seed))
        classes = classes_of(rows, args.classes)
        label = F.array_position(F.lit(classes), F.col("class")) - 1
        rows = rows.withColumn("label", label.cast("int"))
        # Divided by image first, changed copies only then: no copy of an image that is tested on is trained on.
        add_variants = partial(steps.variant_batches, copies=COPIES, seed=args.seed)
        train = rows.where("subset = 'train'").mapInArrow(add_variants, steps.VARIANT_COLUMNS)
        validation = rows.where("subset = 'validation'")
        test = rows.where("subset = 'test'")

        keras.utils.set_random_seed(args.seed)
        spark_model = SparkModel(build_model(len(classes)), num_ranks=args.num_ranks)
        history = spark_model.fit(
            train, epochs=args.epochs, batch_size=args.batch_size, validation_data=validation, seed=args.seed, verbose=2
        )

        accuracy = spark_model.evaluate(test)["accuracy"]
        labels = np.array([row.label for row in test.select("label").collect()])
        predicted = spark_model.predict(test).argmax(axis=1)
        confusion = np.zeros((len(classes), len(classes)), int)
        np.add.at(confusion, (labels, predicted), 1)

    charts.draw_curves(history.history, args.output / "curves.png")
    charts.draw_confusion(confusion, classes, args.output / "confusion.png")
    spark_model.model.save(args.output / "model.keras")
    guess = confusion.sum(axis=1).max() / confusion.sum()
    print(f"held-out accuracy {accuracy:.4f} on {len(labels)} images; always naming the commonest class: {guess:.4f}")
    print(f"curves.png, confusion.png and model.keras are in {args.output}")


if __name__ == "__main__":
    main()
