"""Arms on a Ray cluster. Thin: a task is the process that `pool.py` would start; the output folder must be shared."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_moe_ext.pilot.pool import NO_LIMITS, ProcessPool, Result, Spec, read_result


class RayPool:
    """Arms as tasks of a cluster.

    Args:
        folder: Of the pilot, on a file system that every node sees under this path.
        address: Of the cluster, as `ray.init` takes it.
        threads: Of one arm.
        limit_s: An arm that takes longer is ended and has failed.

    Raises:
        ValueError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, folder: Path, address: str, threads: int, limit_s: float) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                f"--ray-address {address} needs Ray, which is not installed: pip install ray, or leave the option out to "
                "run the arms as processes of this machine"
            ) from error
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ValueError(f"--ray-address {address} cannot be reached: {error}") from error
        self.ray, self.folder, self.threads, self.limit_s = ray, folder.resolve(), threads, limit_s

    def run(
        self, specs: Sequence[Spec], on_done: Callable[[Result], None], limits: Mapping[str, float] = NO_LIMITS
    ) -> dict[str, Result]:
        """Run the arms, as many at a time as the cluster has room for."""
        results = {spec["id"]: known for spec in specs if (known := read_result(self.folder, spec)) is not None}
        for known in results.values():
            on_done(known)
        task = self.ray.remote(num_cpus=self.threads, max_retries=0)(_run_one)
        waiting: list[Any] = [
            task.remote(str(self.folder), spec, self.threads, self.limit_s, dict(limits))
            for spec in specs
            if spec["id"] not in results
        ]
        try:
            while waiting:
                ready, waiting = self.ray.wait(waiting, num_returns=1)
                for result in self.ray.get(ready):
                    results[result["spec"]["id"]] = result
                    on_done(result)
        finally:
            for reference in waiting:
                self.ray.cancel(reference, force=True)
        return {spec["id"]: results[spec["id"]] for spec in specs}

    def close(self) -> None:
        """Leave the cluster."""
        self.ray.shutdown()


def _run_one(folder: str, spec: Spec, threads: int, limit_s: float, limits: dict[str, float]) -> Result:
    pool = ProcessPool(Path(folder), 1, threads, limit_s)
    try:
        return pool.run([spec], lambda _: None, limits)[spec["id"]]
    finally:
        pool.close()
