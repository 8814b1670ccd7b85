"""One tree's side of against.py: a step for each line `[source, turn]` on stdin, its times as a line on stdout.

Runs with another commit's modules too, so it uses few of their names, and what is missing there is not imported.
"""

import contextlib
import importlib
import json
import os
import sys
import time

import torch

sys.path[0] = os.getcwd()  # in place of this file's folder


def main() -> None:
    threads, sources, quick = (json.loads(argument) for argument in sys.argv[1:4])
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        bench = importlib.import_module("benchmarks.training_step")
    except ModuleNotFoundError:
        bench = importlib.import_module("bov_megatron.benchmarks.training_step")
    settings = {"settings": sys.argv[4:]} if sys.argv[4:] else {}
    recipes = {source: bench.bench_recipe(source, quick, **settings) for source in sources}
    with bench.one_process(next(iter(recipes.values()))):
        engines = {source: bench.MegatronEngine(recipe) for source, recipe in recipes.items()}
        for engine in engines.values():
            engine.optimizer.step = timed(engine.optimizer.step, engine)
        for line in sys.stdin:
            source, turn = json.loads(line)
            micro_batches = bench.random_micro_batches(recipes[source], turn)
            engine, times = engines[source], []
            with clock(times):
                loss = engine.train_step(micro_batches).loss
            print(json.dumps({"step": times, "update": engine.update_times, "loss": loss}), file=answers, flush=True)


def timed(function, engine):
    """`function`, with its times left in `engine.update_times`."""

    def call(*arguments, **options):
        engine.update_times = []
        with clock(engine.update_times):
            return function(*arguments, **options)

    return call


@contextlib.contextmanager
def clock(times: list):
    """Context manager: append seconds by the wall clock, and of all threads' processor time."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    wall, processor = time.perf_counter(), time.process_time()
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times += [time.perf_counter() - wall, time.process_time() - processor]


if __name__ == "__main__":
    main()
