"""`raylign sft CONFIG [key=value …]`: supervised training on given answers."""

import sys
from collections.abc import Sequence

from cluster.connect import check_room, connect
from cluster.errors import DataError, root_cause
from cluster.settings import located
from jobs.cli import job_parser, run
from jobs.config import dump_config, load_config
from jobs.paths import places, run_address
from rl.store import BAD_ROWS, RunFolder
from rl.supervised import SftConfig, supervise


def main(arguments: Sequence[str]) -> int:
    """Parse the command line and train; returns the exit code."""
    parser = job_parser("sft", "Train a model on given answers.", SftConfig)
    parser.add_argument("--dry-run", action="store_true", help="print the config, then stop")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(SftConfig, options.config, options.overrides)
    if options.dry_run:
        print(dump_config(config))
        return 0
    config = located(config, places()).model_copy(update={"output": run_address(config.output)})
    folder = RunFolder(config.output)
    if folder.exists("") and folder.filesystem.ls(folder.path(""), detail=False):
        raise DataError(f"output: {config.output} is not empty; give another folder with output=…")
    connect(config.cluster)
    check_room(config.roles)
    train(config)
    if folder.exists(BAD_ROWS):
        print(f"some rows could not be used; {folder.url(BAD_ROWS)} lists them")
    print(f"model written to {config.output}/model")
    return 0


def train(config: SftConfig) -> None:
    """Run the training workers to their end."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = config.resources.gpus > 0
    trainer = TorchTrainer(
        supervise,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": config.resources.cpus} | ({"GPU": config.resources.gpus} if on_gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        run_config=RunConfig(name="ray", storage_path=config.output),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise root_cause(error) from None


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
