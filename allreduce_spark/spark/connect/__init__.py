"""The same with a Spark Connect session: by DataFrames alone, with neither SparkContext nor RDD nor JVM in this process."""
