"""The errors a person can mend, each with the exit code that `raylign` ends with."""


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


def root_cause(error: BaseException) -> BaseException:
    """The error of ours inside what Ray wrapped around it, if there is one."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, RaylignError) and type(current) in RaylignError.__subclasses__():
            return current
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]
        queue += list(getattr(current, "worker_failures", {}).values())
    return error
