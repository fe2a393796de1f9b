"""The line of progress in the first step after a start."""

import pytest
import torch
from detectron2.utils.events import CommonMetricPrinter, EventStorage
from torch import nn

from moco_d2.engine.hooks import PretrainPrinter
from moco_d2.layers.views import Views
from moco_d2.methods import SSLMethod
from moco_d2.running.progress import ProgressPrinter


class Method(SSLMethod):
    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        return {}

    def backbone(self) -> nn.Module:
        return self


@pytest.mark.parametrize("writer", [ProgressPrinter(100), PretrainPrinter(100, Method())])
def test_a_line_may_be_written_twice_before_a_step_was_timed(writer: CommonMetricPrinter) -> None:
    with EventStorage(19) as storage:
        storage.put_scalar("total_loss", 1.0)
        writer.write()
        writer.write()  # Detectron2's own divides by zero here


def test_detectron2s_own_does_not_bear_it() -> None:
    """Where this fails, Detectron2 was mended and ours can go."""
    writer = CommonMetricPrinter(100)
    with EventStorage(19):
        writer.write()
        with pytest.raises(ZeroDivisionError):
            writer.write()
