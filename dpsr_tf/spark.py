"""Sessions of Apache Spark, for the commands with --engine=spark."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from absl import flags

from dpsr_common.errors import CommandError, UsageError

T = TypeVar("T")
R = TypeVar("R")


def define_flags(values: flags.FlagValues, what: str) -> None:
    """Defines --engine and --spark_master. `what` says what the engine does, for the help text."""
    flags.DEFINE_enum(
        "engine", "local", ["local", "spark"], f"what {what}: this machine, or Apache Spark", flag_values=values
    )
    flags.DEFINE_string(
        "spark_master",
        None,
        "with --engine=spark, the cluster: local[4], yarn, k8s://..., spark://...; default: that of spark-submit",
        flag_values=values,
    )


@contextlib.contextmanager
def session_of_flags(values: flags.FlagValues, name: str) -> Iterator[Any]:
    """Gives the SparkSession that the flags ask for; None without --engine=spark.

    Raises:
        UsageError: the flags do not fit together.
        CommandError: pyspark is not installed, Spark does not start, or a task of the block fails.
    """
    if values.engine != "spark":
        if values.spark_master is not None:
            raise UsageError(f"--spark_master={values.spark_master}: needs --engine=spark")
        yield None
        return
    with session(values.spark_master, name) as spark:
        yield spark


@contextlib.contextmanager
def session(master: str | None, name: str) -> Iterator[Any]:
    """Gives a SparkSession, a new one or that of this process. A new one ends with the block.

    Args:
        master: the cluster; None is that of spark-submit.
        name: the name of the application.

    Raises:
        CommandError: pyspark is not installed, Spark does not start, or a task of the block fails. If a task raised a
            CommandError, it is that error.
    """
    try:
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise CommandError(f"--engine=spark: {error}; install dpsr with the extra spark") from None
    # Workers on this machine run the Python that runs this process.
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # Tasks show no progress bars of their own.
    builder = SparkSession.builder.appName(name).config("spark.executorEnv.TQDM_DISABLE", "1")
    if master is not None:
        builder = builder.master(master)
        if master.startswith("local"):
            builder = builder.config("spark.ui.enabled", "false").config("spark.driver.bindAddress", "127.0.0.1")
    is_new = SparkSession.getActiveSession() is None
    try:
        spark = builder.getOrCreate()
    except Exception as error:
        text = _first_line(error)
        if "master URL" in str(error):
            raise UsageError(
                "--engine=spark: names no cluster; give --spark_master, or start the command with spark-submit"
            ) from None
        raise CommandError(f"--engine=spark: Spark does not start: {text}; Spark 3.5 needs Java 17") from None
    spark.sparkContext.setLogLevel("ERROR")
    try:
        yield spark
    except (PySparkException, Py4JError) as error:
        # A task's error arrives as the text of its traceback.
        ours = re.search(r"dpsr_common\.errors\.(?:CommandError|UsageError): (.+)", str(error))
        if ours:
            raise CommandError(ours[1]) from None
        raised = re.findall(r"^(?!org\.|java\.|py4j\.)[\w.]+(?:Error|Exception): .+$", str(error), re.MULTILINE)
        reason = raised[0] if raised else _first_line(error)
        raise CommandError(f"--engine=spark: a task failed: {reason}; see Spark's logs") from error
    finally:
        if is_new:
            spark.stop()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def run_tasks(spark: Any, function: Callable[[T], R], values: Sequence[T]) -> list[R]:
    """Calls a function for each value in a task of its own. Returns the results in the order of the values."""
    if not values:
        return []
    return spark.sparkContext.parallelize(values, len(values)).map(function).collect()
