"""`raylign export RUN FILE`: the pairs of a run as one preference set in TRL's format."""

import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import DataError
from jobs.cli import job_parser, run
from jobs.paths import run_address
from rl.store import RunFolder


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and write the file; returns the exit code."""
    parser = job_parser("export", "Write the pairs of a run as one preference set: prompt, chosen, rejected, images.")
    parser.add_argument("run", help="folder of a run that made pairs, for example runs/annotate")
    parser.add_argument("file", help="Parquet file to write, for datasets.load_dataset and TRL")
    parser.add_argument("--overwrite", action="store_true", help="replace the file")
    options = parser.parse_args(arguments)
    from rl.tables import write_trl

    folder = RunFolder(run_address(options.run))
    batches = [batch for step in folder.steps() if (batch := folder.read_batch(step)) is not None]
    pairs = [pair for batch in batches for pair in batch.pairs]
    if not pairs:
        raise DataError(f"{folder.address} holds no pairs; give the folder of a run of annotate or align")
    target = Path(options.file).expanduser().absolute()
    if target.suffix != ".parquet":
        raise DataError(f"{target} must end in .parquet, for that is what is written")
    if target.exists() and not options.overwrite:
        raise DataError(f"{target} exists; replace it by --overwrite, or give another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    out = RunFolder(str(target.parent))
    write_trl(pairs, out.filesystem, out.path(target.name))
    print(f"{len(pairs)} pairs written to {target}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
