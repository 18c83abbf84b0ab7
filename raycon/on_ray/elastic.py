"""A Ray Train run whose number of workers follows the cluster, in steps that the global batch divides over."""

from __future__ import annotations

from typing import Any

import ray.train.torch
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class WholeBatches(ElasticScalingPolicy):
    """Ray's elastic policy with the numbers of workers that divide the batch; between two of them the lower is taken.

    Ray has no public way to say so: this leans on two internal names of the Ray version that raycon is pinned to.
    """

    def __init__(self, scaling_config: ray.train.ScalingConfig, sizes: list[int]) -> None:
        super().__init__(scaling_config)
        self._sizes = sizes

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= possible), default=0)


class ElasticTrainer(ray.train.torch.TorchTrainer):
    """A TorchTrainer that runs on one of ``sizes`` workers."""

    def __init__(self, *args: Any, sizes: list[int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sizes = sizes

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        kwargs["scaling_policy"] = WholeBatches(self.scaling_config, self._sizes)
        return super()._initialize_and_run_controller(**kwargs)
