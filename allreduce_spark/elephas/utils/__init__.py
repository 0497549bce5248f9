"""Small tools, all of which `from elephas.utils import *` brings, as Elephas's own does."""

from allreduce_spark.elephas.utils.functional_utils import *  # noqa: F403
from allreduce_spark.elephas.utils.rdd_utils import *  # noqa: F403
from allreduce_spark.elephas.utils.rwlock import *  # noqa: F403
from allreduce_spark.elephas.utils.serialization import *  # noqa: F403
from allreduce_spark.elephas.utils.sockets import *  # noqa: F403
