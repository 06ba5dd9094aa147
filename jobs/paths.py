"""Where run folders lie."""

from pathlib import Path

from cluster.connect import in_job


def places() -> list[Path]:
    """Where relative paths of inputs are looked for: here, and in a Ray job also where runs are written."""
    return list(dict.fromkeys([Path.cwd(), _runs()]))


def run_address(directory: str) -> str:
    """A run folder as an absolute address. In a Ray job, whose working directory is a throw-away copy, a relative
    path lies under ~/raylign."""
    if "://" in directory:
        return directory
    path = Path(directory).expanduser()
    return str(path if path.is_absolute() else _runs() / path)


def _runs() -> Path:
    return Path.home() / "raylign" if in_job() else Path.cwd()
