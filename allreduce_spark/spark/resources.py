"""Stage-level resources: what each task of a barrier stage asks of Spark, and whether it can be had.

A profile of task requests alone (Spark calls it a TaskResourceProfile) runs on the executors that there are: on standalone
clusters since Spark 3.4, on YARN and Kubernetes since 3.5.1, in local mode not at all. One that asks for executors of its own
would need dynamic allocation, which barrier stages refuse.
"""

from __future__ import annotations

from collections.abc import Mapping

from py4j.protocol import Py4JError
from pyspark import SparkContext
from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests

from allreduce_spark.errors import ConfigError

__all__ = ["check_resources", "demand", "demand_of", "register"]

TASK_RESOURCE = "spark.task.resource."


def check_resources(resources: object) -> ResourceProfile | None:
    """Return `resources`, or raise ConfigError where barrier stages can have no such profile on any cluster."""
    if resources is None:
        return None
    if not isinstance(resources, ResourceProfile):
        raise ConfigError(f"resources must be a pyspark.resource.ResourceProfile, got {resources!r}.")
    if resources.executorResources:
        raise ConfigError(
            "resources asks for executors of its own (ExecutorResourceRequests), which Spark starts with dynamic allocation "
            "alone, and barrier stages do not work with that. Ask for what a task needs (TaskResourceRequests), and let the "
            "executors have it from the start: spark.executor.resource.gpu.amount."
        )
    return resources


def register(context: SparkContext, resources: ResourceProfile | None) -> ResourceProfile | None:
    """The profile as this application knows it; None for None.

    Raises:
        ConfigError: The cluster manager has no such profiles, or the executors do not have what it asks for.
    """
    if resources is None:
        return None
    try:
        if resources._java_resource_profile is None:  # made before there was a Spark session
            requests = TaskResourceRequests(context._jvm, resources.taskResources)
            resources = ResourceProfileBuilder().require(requests).build
        context._jsc.sc().resourceProfileManager().addResourceProfile(resources._java_resource_profile)
    except Py4JError as error:
        java = getattr(error, "java_exception", None)
        raise ConfigError(
            f"Spark (master {context.master}) has no tasks with these resources: {java.getMessage() if java else error}"
        ) from error
    return resources


def demand(context: SparkContext, resources: ResourceProfile | None) -> str:
    """What each task asks for, by the names of the settings."""
    if resources is not None:
        requests = sorted(resources.taskResources.items())
        return "resources: " + ", ".join(f"{name}={request.amount:g}" for name, request in requests)
    return demand_of(dict(context.getConf().getAll()))


def demand_of(settings: Mapping[str, str]) -> str:
    """What each task asks for by the settings of an application."""
    others = {name: value for name, value in settings.items() if name.startswith(TASK_RESOURCE)}
    asked = {"spark.task.cpus": settings.get("spark.task.cpus", "1"), **others}
    return ", ".join(f"{name}={amount}" for name, amount in asked.items())
