"""The errors a person can mend, each with the exit code that `raylign` ends with."""

import re


class RaylignError(Exception):
    """A problem described in one sentence: what, where, and how to mend it."""

    exit_code = 1


class ConfigError(RaylignError):
    """The configuration is wrong or impossible."""

    exit_code = 3


class DataError(RaylignError):
    """A prompt, image, model folder or run folder is missing or unusable."""

    exit_code = 4


class ClusterError(RaylignError):
    """Ray cannot be reached, or has not the resources that were asked for."""

    exit_code = 5


class WeightSyncError(RaylignError):
    """An engine does not hold the weights it was given."""

    exit_code = 6


class JudgeError(RaylignError):
    """The judge cannot be asked: it does not answer, refuses the key, or its budget is spent."""

    exit_code = 7


# Of what an actor's constructor raises, Ray passes on the text alone.
_OURS = re.compile(r"^cluster\.errors\.(ConfigError|DataError|ClusterError|WeightSyncError|JudgeError): (.+)$", re.M)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def root_cause(error: BaseException) -> BaseException:
    """The error of ours inside what Ray wrapped around it, or if there is none the first that is not Ray's."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    foreign: BaseException | None = None
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, RaylignError) and not type(current).__module__.startswith("ray."):
            return current
        if (said := _OURS.search(str(current))) and type(current).__module__.startswith("ray."):
            return next(kind for kind in RaylignError.__subclasses__() if kind.__name__ == said[1])(said[2])
        if foreign is None and not type(current).__module__.startswith("ray."):
            foreign = current
        queue += list(getattr(current, "worker_failures", {}).values())
        queue += [getattr(current, name, None) for name in ("cause", "controller_failure", "_base_exc")]
        queue += [current.__cause__, current.__context__]
    return foreign or error


def first_line(error: BaseException) -> str:
    """The first line of what an error says, its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def describe(error: BaseException) -> str:
    """The kind of an unexpected error and what it says, in one line, without colours or traces."""
    cause = root_cause(error)
    lines = [line.strip() for line in _ANSI.sub("", str(cause)).splitlines() if line.strip()]
    is_trace = any(line.startswith(("Traceback", "ray::")) for line in lines)
    return f"{type(cause).__name__}: {(lines or ['no message'])[-1 if is_trace else 0][:300]}"
