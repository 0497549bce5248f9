"""What users call, on Spark. The only room that imports pyspark."""
