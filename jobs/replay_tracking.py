"""Stores in MLflow what a job could not send: python jobs/replay_tracking.py FILE...

The job that could not reach its MLflow server has printed the file's name. Each file names its server and run; what
the run has already is not stored again. A file is removed once all of it is stored; what the server refuses stays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from roo_ray.terminal import run_job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("files", nargs="+", metavar="FILE", type=Path)
    options = parser.parse_args()

    from mlflow.exceptions import MlflowException

    from roo_ray.errors import ConfigError
    from roo_ray.training.replay import replay

    for path in options.files:
        if not path.is_file():
            raise ConfigError(f"no file {path}; jobs keep what they could not send in $ROO_RAY_HOME/tracking-spool")
        try:
            done = replay(path)
        except MlflowException as error:
            raise ConfigError(f"{path} stays, with what is not stored yet: {str(error).splitlines()[0]}") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as what a job has left: {error}") from None
        print(f"{path}: {done.stored:,} entries stored")
        if done.refused:
            print(f"{path}: the server refuses {done.refused:,} entries, which stay in it")


if __name__ == "__main__":
    run_job(main)
