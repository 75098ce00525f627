"""BenchMARL's speed on simple_spread with its own default hyper-parameters, for `end_to_end.py`.

Runs in an environment of its own, because BenchMARL needs another TorchRL, and imports nothing of ours:

    python -m venv benchmarl && benchmarl/bin/pip install benchmarl==1.5.2 mpe2 "pettingzoo[mpe]"
    BENCHMARL_PYTHON=benchmarl/bin/python make bench

Prints one JSON line: median seconds collecting and learning of an iteration (6 000 frames), and what was used.
"""

import json
import resource
import statistics
import sys
import tempfile
import time

import mpe2
import torch

sys.modules.setdefault("pettingzoo.mpe", mpe2)  # where TorchRL looks for what has moved to mpe2

from benchmarl.algorithms import MaddpgConfig, MappoConfig  # noqa: E402
from benchmarl.environments import PettingZooTask  # noqa: E402
from benchmarl.experiment import Callback, Experiment, ExperimentConfig  # noqa: E402
from benchmarl.models.mlp import MlpConfig  # noqa: E402

ITERATIONS = 3


class Clock(Callback):
    """When each batch was there, and when learning from it had ended."""

    def __init__(self) -> None:
        super().__init__()
        self.collected, self.learnt = [], [time.perf_counter()]

    def on_batch_collected(self, batch: object) -> None:
        self.collected.append(time.perf_counter())

    def on_train_end(self, training_td: object, group: str) -> None:
        self.learnt.append(time.perf_counter())


def main() -> None:
    torch.set_num_threads(1)
    algorithm = {"mappo": MappoConfig, "maddpg": MaddpgConfig}[sys.argv[1]].get_from_yaml()
    config, clock = ExperimentConfig.get_from_yaml(), Clock()
    config.max_n_iters, config.max_n_frames, config.evaluation, config.loggers = ITERATIONS, None, False, []
    config.create_json = False
    with tempfile.TemporaryDirectory() as folder:
        config.save_folder = folder
        experiment = Experiment(
            task=PettingZooTask.SIMPLE_SPREAD.get_from_yaml(),
            algorithm_config=algorithm,
            model_config=MlpConfig.get_from_yaml(),
            critic_model_config=MlpConfig.get_from_yaml(),
            seed=0,
            config=config,
            callbacks=[clock],
        )
        clock.learnt = [time.perf_counter()]
        experiment.run()
    collect = [there - before for before, there in zip(clock.learnt, clock.collected, strict=False)]
    learn = [after - there for there, after in zip(clock.collected, clock.learnt[1:], strict=True)]
    seconds = {"collect": statistics.median(collect[1:]), "learn": statistics.median(learn[1:])}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    frames = config.collected_frames_per_batch(on_policy=sys.argv[1] == "mappo")
    print(json.dumps({"seconds": seconds, "frames": frames, "peak MB": round(peak), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
