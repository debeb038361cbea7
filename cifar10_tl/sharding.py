"""FSDP as residual networks want it: Lightning's strategy, sharded block by block and computing as ``trainer=ddp``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from cifar10_tl.errors import UserError


class BlockwiseFSDP(FSDPStrategy):
    """Each residual block is gathered when it computes, and given up behind it; checkpoints are those of any other run.

    Lightning's own default is one unit for the whole network, which is then whole on each GPU whenever it computes; and
    with bf16-mixed it keeps BatchNorm's running statistics in bfloat16, where an update by less than 0.4 % is lost.
    Here precision is autocast alone, as with ddp.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(auto_wrap_policy={BasicBlock, Bottleneck}, state_dict_type="full", **options)
        self._sharded: nn.Module | None = None

    @property
    def mixed_precision_config(self) -> None:
        """Parameters and buffers stay float32."""
        return

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Shard the network, once: Lightning would shard for testing what is sharded since training, and fail."""
        if self._sharded is None:
            self._sharded = super()._setup_model(model)
        return self._sharded

    def setup_environment(self) -> None:
        """As Lightning does.

        Raises:
            UserError: there is no GPU.
        """
        if self.root_device.type != "cuda":
            raise UserError(
                f"trainer=fsdp needs GPUs, and this run is on {self.root_device.type}: use trainer=ddp_cpu, or "
                "trainer=default for one process"
            )
        super().setup_environment()
